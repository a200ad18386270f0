import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microdit.model.microdit import MicroDiT
from microdit.model.routing import make_route, put_tokens, random_keep_ids, take_tokens


@given(batch=st.integers(1, 4), tokens=st.integers(1, 64), mask_ratio=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_kept_tokens_are_distinct_in_range_and_as_many_as_asked(batch, tokens, mask_ratio, seed):
    ids = random_keep_ids(batch, tokens, mask_ratio, torch.Generator().manual_seed(seed))
    kept = ids.shape[1]
    assert kept == max(1, int(tokens * (1 - mask_ratio) + 1e-6))
    assert all(len(set(row)) == kept and 0 <= min(row) <= max(row) < tokens for row in ids.tolist())
    assert torch.equal(ids, random_keep_ids(batch, tokens, mask_ratio, torch.Generator().manual_seed(seed)))


def test_every_token_is_kept_equally_often():
    ids = random_keep_ids(20_000, 16, 0.75, torch.Generator().manual_seed(0))
    share = torch.bincount(ids.flatten(), minlength=16) / 20_000
    assert torch.allclose(share, torch.full((16,), 0.25), atol=0.02)


def test_no_mask_needs_no_ids_and_a_full_mask_is_refused():
    assert random_keep_ids(2, 16, 0) is None
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \[0, 1\)"):
        random_keep_ids(2, 16, 1.0)


@given(tokens=st.integers(1, 20), seed=st.integers(0, 1000))
def test_put_undoes_take(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, tokens, 5, generator=generator)
    everything = torch.rand(3, tokens, generator=generator).argsort(dim=1)
    assert torch.equal(put_tokens(take_tokens(x, everything), everything, tokens), x)


def test_routing_none_refuses_to_drop():
    with pytest.raises(ValueError, match="routing 'none' drops no tokens"):
        make_route("none", 2, torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize("routing", ["naive", "deferred"])
def test_keeping_every_token_is_the_dense_model_in_another_order(tiny_model: MicroDiT, routing):
    latents, c_noise, caption = _inputs(tiny_model)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    dense = tiny_model(latents, c_noise, caption)
    assert torch.allclose(tiny_model(latents, c_noise, caption, order, routing), take_tokens(dense, order), atol=1e-10)


@pytest.mark.parametrize(("routing", "dropped_patches_matter"), [("naive", False), ("deferred", True)])
def test_deferred_masking_lets_dropped_patches_speak_and_naive_does_not(tiny_model: MicroDiT, routing, dropped_patches_matter):
    latents, c_noise, caption = _inputs(tiny_model)
    latents.requires_grad_()
    keep_ids = torch.tensor([[0, 5, 6, 9], [1, 2, 3, 15]])
    tiny_model(latents, c_noise, caption, keep_ids, routing).square().sum().backward()
    gradient = latents.grad.unfold(2, 2, 2).unfold(3, 2, 2).abs().sum(dim=(1, 4, 5)).flatten(1)  # (B, T), of each patch
    is_kept = put_tokens(torch.ones(2, 4, 1), keep_ids, 16).squeeze(-1).bool()
    assert (gradient[is_kept] > 0).all()
    assert ((gradient[~is_kept] > 0) == dropped_patches_matter).all()


def _inputs(model: MicroDiT):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        caption = model.embed_caption(text)
    return latents, torch.tensor([0.3, -0.7], dtype=torch.float64), caption
