import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from microdit.diffusion.edm import EDM
from microdit.diffusion.objective import denoising_loss
from microdit.models.config import Size, resolve
from microdit.models.microdit import MicroDiT
from microdit.models.routing import METHODS, choose_kept, kept_tokens, make_route, put_tokens, take_tokens
from tests.conftest import busy_model, routed

# A mixer narrower than the backbone, experts, width scaling, and room for the dense blocks of every row.
SIZE = Size(dim=32, depth=7, head_dim=8, mixer_dim=16, mixer_depth=2, num_experts=4, round_ffn_to=8)
DROPPING = [routing for routing, method in METHODS.items() if method.drop]
KEEP_IDS = torch.tensor([[0, 5, 6, 9], [1, 2, 3, 15]])
IS_KEPT = torch.zeros(2, 16).scatter(1, KEEP_IDS, 1.0).bool()


def model_of(routing: str, **size: object) -> MicroDiT:
    return busy_model(replace(routed(SIZE, routing), **size))


@pytest.fixture(params=DROPPING)
def model(request: pytest.FixtureRequest) -> MicroDiT:
    return model_of(request.param)


def test_there_are_six_rows():
    assert len(METHODS) == 6


@given(batch=st.integers(1, 4), tokens=st.integers(1, 64), mask_ratio=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_kept_tokens_are_distinct_in_range_and_as_many_as_asked(batch, tokens, mask_ratio, seed):
    ids = choose_kept(scores(batch, tokens, seed), mask_ratio)
    kept = ids.shape[1]
    assert kept == max(1, int(tokens * (1 - mask_ratio) + 1e-6))
    assert all(len(set(row)) == kept and 0 <= min(row) <= max(row) < tokens for row in ids.tolist())


@pytest.mark.parametrize("tenths", range(10))
def test_the_rounding_of_ratios_keeps_no_token_less(tenths):
    """20 * (1 - 0.9) is 1.9999999999999996 to a computer, and 2 tokens are kept."""
    for tokens in range(1, 1025):
        assert kept_tokens(tokens, tenths / 10) == max(1, tokens * (10 - tenths) // 10), tokens


def test_every_token_is_kept_equally_often():
    ids = choose_kept(scores(20_000, 16), 0.75)
    share = torch.bincount(ids.flatten(), minlength=16) / 20_000
    assert torch.allclose(share, torch.full((16,), 0.25), atol=0.02)


def test_no_mask_needs_no_ids_and_a_full_mask_is_refused():
    assert choose_kept(scores(2, 16), 0) is None
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \[0, 1\)"):
        choose_kept(scores(2, 16), 1.0)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), ratio=st.sampled_from([0.25, 0.5, 0.75]), seed=st.integers(0, 1000))
def test_a_grid_keeps_as_many_of_each_2_x_2(rows, columns, ratio, seed):
    ids = choose_kept(scores(3, 4 * rows * columns, seed), ratio, "grid", 2 * columns)
    kept = torch.zeros(3, 4 * rows * columns).scatter(1, ids, 1.0).view(3, 2 * rows, 2 * columns)
    cells = kept.unfold(1, 2, 2).unfold(2, 2, 2).sum(dim=(3, 4))
    assert torch.equal(cells, torch.full_like(cells, 4 * (1 - ratio)))
    assert ids.shape[1] == rows * columns * 4 * (1 - ratio)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_a_grid_keeps_each_of_four_equally_often_and_cells_do_not_agree(ratio):
    """Counts of 20,000 draws lie within four standard deviations; so does how often two cells keep the same places."""
    n, keep = 20_000, round(4 * (1 - ratio))
    ids = choose_kept(scores(n, 16), ratio, "grid", 4)
    share = torch.bincount(ids.flatten(), minlength=16) / n
    assert (share - (1 - ratio)).abs().max() < 4 * math.sqrt(ratio * (1 - ratio) / n)
    kept = torch.zeros(n, 16).scatter(1, ids, 1.0).view(n, 4, 4)
    agree = (kept[:, :2, :2] == kept[:, 2:, 2:]).all(dim=(1, 2)).float().mean().item()
    expected = 1 / math.comb(4, keep)
    assert abs(agree - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize(
    ("tokens", "columns", "ratio", "sentence"),
    [(16, 4, 0.6, "mask_ratio must be one of"), (15, 5, 0.5, "even number of patches"), (6, 2, 0.5, "even number of patches")],
)
def test_a_grid_that_cannot_be_is_refused(tokens, columns, ratio, sentence):
    with pytest.raises(ValueError, match=sentence):
        choose_kept(scores(1, tokens), ratio, "grid", columns)


@given(tokens=st.integers(1, 20), seed=st.integers(0, 1000))
def test_put_undoes_take(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, tokens, 5, generator=generator)
    ids = torch.rand(3, tokens, generator=generator).argsort(dim=1)
    assert torch.equal(put_tokens(take_tokens(x, ids), ids, torch.zeros_like(x)), x)
    some = ids[:, : tokens // 2 + 1]
    assert torch.equal(put_tokens(take_tokens(x, some), some, x), x)


def test_what_a_row_cannot_do_is_refused():
    with pytest.raises(ValueError, match="routing 'none' drops no tokens"):
        forward(model_of("none"), KEEP_IDS)
    for routing in ("naive", "deferred", "maskdit", "tread"):
        model = model_of(routing)
        with pytest.raises(ValueError, match="only routing 'sprint'"):
            forward(model, KEEP_IDS[:, :0])
        with pytest.raises(ValueError, match="only routing 'sprint'"):
            forward(model, KEEP_IDS, torch.ones(2))
    for size in ({"routing": "tread", "depth": 5}, {"routing": "sprint", "dense_blocks": (3, 4)}, {"dense_blocks": (1, 1)}):
        with pytest.raises(ValueError, match="dense"):
            resolve(replace(SIZE, **size))


def test_keeping_every_token_is_the_dense_model_in_another_order(model: MicroDiT):
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    dense = forward(model)
    expected = take_tokens(dense, order) if model.config.routing in ("naive", "deferred") else dense
    assert torch.allclose(forward(model, order), expected, atol=1e-10)
    assert not torch.allclose(forward(model, KEEP_IDS)[:, 0], dense[:, 0], atol=1e-3)


def test_rows_without_weights_of_their_own_are_one_dense_model():
    dense = model_of("none")
    for routing in ("naive", "deferred", "tread"):
        other = model_of(routing)
        other.load_state_dict(dense.state_dict())
        assert torch.equal(forward(other), forward(dense))


def test_which_dropped_patches_speak_through_what_is_kept(model: MicroDiT):
    """Behind a mixer the kept tokens know of the dropped ones; with naive nobody does."""
    latents, c_noise, caption = _inputs(model)
    latents.requires_grad_()
    out = model(latents, c_noise, caption, KEEP_IDS)
    if out.shape[1] == 16:
        out = take_tokens(out, KEEP_IDS)
    out.square().sum().backward()
    gradient = by_patch(latents.grad)
    assert (gradient[IS_KEPT] > 0).all()
    assert ((gradient[~IS_KEPT] > 0) == (model.config.routing != "naive")).all()


def test_dropped_patches_do_not_pass_maskdits_encoder():
    model = model_of("maskdit", mixer_depth=0)
    latents, c_noise, caption = _inputs(model)
    latents.requires_grad_()
    model(latents, c_noise, caption, KEEP_IDS).square().sum().backward()
    assert (by_patch(latents.grad)[~IS_KEPT] == 0).all()


@pytest.mark.parametrize("routing", ["tread", "sprint"])
def test_places_of_dropped_tokens_have_a_loss_and_teach_the_dense_blocks(routing):
    """The squared output at the dropped places alone, with sparse blocks that pass nothing on but their residual stream."""
    model = model_of(routing)
    first, last = model.config.dense_blocks
    out = forward(model, KEEP_IDS)
    out[~IS_KEPT].square().sum().backward()
    assert first >= 1
    for block in [*model.blocks[:first], *model.blocks[len(model.blocks) - last :]]:
        assert block.ffn_norm.weight.grad.abs().min() > 0


def test_maskdits_decoder_tells_the_places_of_dropped_patches_apart():
    """Mask tokens are all alike but for the positions that are added in front of the decoder."""
    out = forward(model_of("maskdit"), KEEP_IDS)
    for sample in range(2):
        dropped = out[sample][~IS_KEPT[sample]]
        apart = torch.cdist(dropped, dropped) + torch.eye(len(dropped))
        assert apart.min() > 1e-3


def test_treads_route_is_the_published_one():
    """Of twelve blocks, two see all tokens before the drop (start_layer_idx 2), and three after block number 8 (end_layer_idx 8)."""
    config = model_of("tread", depth=12).config
    assert [count for _, _, count in config.tokens_by_block(16, 8)][-12:] == [16] * 2 + [8] * 7 + [16] * 3


def test_maskdits_decoder_has_the_published_eight_blocks():
    assert len(resolve(replace(SIZE, routing="maskdit")).decoder) == 8
    assert len(resolve(replace(SIZE, routing="maskdit", decoder_depth=1)).decoder) == 1


def test_treads_dropped_tokens_come_back_as_they_were():
    """Without dense blocks behind the restore, the head sees what the dropped tokens were at the drop: the sparse blocks do not matter."""
    model = model_of("tread", dense_blocks=(2, 0))
    before = forward(model, KEEP_IDS)
    with torch.no_grad():
        for block in model.blocks[2:]:
            block.attn.out.weight.mul_(-3)
    after = forward(model, KEEP_IDS)
    assert torch.equal(before[~IS_KEPT], after[~IS_KEPT])
    assert not torch.allclose(before[IS_KEPT], after[IS_KEPT], atol=1e-3)


def test_sprint_fuses_dropped_tokens_with_the_mask_token():
    model = model_of("sprint", dense_blocks=(1, 0))
    grads = torch.autograd.grad(forward(model, KEEP_IDS)[~IS_KEPT].square().sum(), [model.restore.mask_token, model.restore.fuse.weight])
    assert all((grad.abs() > 0).all() for grad in grads)
    earlier, x = torch.randn(2, 16, 32, dtype=torch.float64), torch.randn(2, 4, 32, dtype=torch.float64)
    fused = model.restore(x, earlier, make_route("sprint", 16, KEEP_IDS))
    for sample in range(2):
        for token in range(16):
            kept = (KEEP_IDS[sample] == token).nonzero()
            middle = x[sample, kept.item()] if len(kept) else model.restore.mask_token
            expected = model.restore.fuse.weight @ torch.cat([middle, earlier[sample, token]]) + model.restore.fuse.bias
            assert torch.allclose(fused[sample, token], expected, atol=1e-12)


@pytest.mark.parametrize("keep_ids", [None, KEEP_IDS])
def test_where_the_path_is_dropped_the_sparse_blocks_do_not_matter(keep_ids):
    model, path_keep_mask = model_of("sprint"), torch.tensor([1.0, 0.0])
    sparse = [weight for block in model.blocks[2:-2] for weight in block.parameters()]
    kept, dropped = (forward(model, keep_ids, path_keep_mask)[i].square().sum() for i in range(2))
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(dropped, sparse))
    assert all(grad.abs().max() > 0 for grad in torch.autograd.grad(kept, sparse, allow_unused=False))
    before = forward(model, keep_ids, path_keep_mask)
    assert torch.equal(forward(model, keep_ids)[0], before[0])
    assert torch.allclose(forward(model, KEEP_IDS[:, :0])[1], before[1], atol=1e-12)  # a pass that leaves them out is the same
    with torch.no_grad():
        for weight in sparse:
            weight.add_(1.0)
    after = forward(model, keep_ids, path_keep_mask)
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0], before[0])


def test_a_pass_without_the_path_runs_no_sparse_block():
    model, ran = model_of("sprint"), []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    forward(model, KEEP_IDS[:, :0])
    assert ran == [0, 1, 5, 6]


def test_every_weight_has_a_gradient_with_and_without_a_drop():
    """DDP waits for all of them."""
    for routing in METHODS:
        model = model_of(routing)
        for keep_ids in [None] if routing == "none" else [None, KEEP_IDS]:
            model.zero_grad()
            caption = model.embed_caption(torch.randn(2, 5, 12, dtype=torch.float64))
            latents, c_noise, _ = _inputs(model)
            denoising_loss(model, EDM(), latents, caption, c_noise.exp(), torch.randn_like(latents), keep_ids).sum().backward()
            silent = {name for name, weight in model.named_parameters() if weight.grad is None}
            still = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.abs().max() == 0}
            assert silent == set()
            assert still == ({"restore.mask_token"} if keep_ids is None and routing in ("maskdit", "sprint") else set())


def by_patch(x_BCHW: Tensor) -> Tensor:
    """Sums of absolute values, (B, T)."""
    return x_BCHW.unfold(2, 2, 2).unfold(3, 2, 2).abs().sum(dim=(1, 4, 5)).flatten(1)


def scores(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed))


def forward(model: MicroDiT, keep_ids: Tensor | None = None, path_keep_mask: Tensor | None = None) -> Tensor:
    return model(*_inputs(model), keep_ids, path_keep_mask)


def _inputs(model: MicroDiT):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        caption = model.embed_caption(text)
    return latents, torch.tensor([0.3, -0.7], dtype=torch.float64), caption
