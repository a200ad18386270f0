"""Representation alignment beside a naive reference in float64, one token after the other."""

import pytest
import torch
from torch import Tensor, nn

from microdit.models.alignment import Alignment, ProjectorShape

DIM, WIDTH, CHANNELS, ROWS, COLUMNS = 6, 5, 7, 3, 4


def made(kind: str, **settings: object) -> Alignment:
    torch.manual_seed(0)
    return Alignment(ProjectorShape(kind, DIM, WIDTH, CHANNELS), block=1, **settings).double()


def drawn(kept: int | None, batch: int = 2) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch, kept or ROWS * COLUMNS, DIM, generator=generator, dtype=torch.float64)
    features = torch.randn(batch, CHANNELS, ROWS, COLUMNS, generator=generator, dtype=torch.float64) + 2
    ids = None if kept is None else torch.stack([torch.randperm(ROWS * COLUMNS, generator=generator)[:kept] for _ in range(batch)])
    return tokens, features, ids


def naive(alignment: Alignment, tokens: Tensor, features: Tensor, ids: Tensor | None, spatial_norm: bool) -> list[float]:
    """The mean cosine similarity of each sample, from loops over places and channels."""
    similarities = []
    for sample in range(len(tokens)):
        places = list(range(ROWS * COLUMNS)) if ids is None else ids[sample].tolist()
        at = {place: tokens[sample, number] for number, place in enumerate(places)}
        total = 0.0
        for place in places:
            row, column = divmod(place, COLUMNS)
            if isinstance(alignment.projector, nn.Conv2d):
                ours = alignment.projector.bias.clone()
                for down in (-1, 0, 1):
                    for right in (-1, 0, 1):
                        inside = 0 <= row + down < ROWS and 0 <= column + right < COLUMNS
                        near = at.get((row + down) * COLUMNS + column + right) if inside else None
                        if near is not None:
                            ours = ours + alignment.projector.weight[:, :, down + 1, right + 1] @ near
            else:
                first, _, second, _, third = alignment.projector
                hidden = first.weight @ at[place] + first.bias
                hidden = second.weight @ (hidden / (1 + torch.exp(-hidden))) + second.bias
                ours = third.weight @ (hidden / (1 + torch.exp(-hidden))) + third.bias
            theirs = features[sample, :, row, column]
            if spatial_norm:
                image = features[sample].flatten(1)
                deviation = ((image - image.mean(1, keepdim=True)) ** 2).mean(1).sqrt()
                theirs = (theirs - image.mean(1)) / (deviation + 1e-6)
            total += (ours @ theirs / (ours.norm() * theirs.norm())).item()
        similarities.append(total / len(places))
    return similarities


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("kept", [None, 5])
@pytest.mark.parametrize("spatial_norm", [False, True])
def test_the_similarity_is_the_naive_one(kind, kept, spatial_norm):
    alignment, (tokens, features, ids) = made(kind, spatial_norm=spatial_norm), drawn(kept)
    found = alignment(tokens, features, (ROWS, COLUMNS), ids)
    assert found.tolist() == pytest.approx(naive(alignment, tokens, features, ids, spatial_norm), rel=1e-9)
    assert -1 < found.min() < found.max() < 1


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("kept", [None, 5])
def test_gradients_are_finite_differences(kind, kept):
    """Of the tokens, and of the projector's weights."""
    alignment, (tokens, features, ids) = made(kind), drawn(kept)
    tokens.requires_grad_()
    names, weights = zip(*alignment.named_parameters(), strict=True)

    def similarity(tokens: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(alignment, dict(zip(names, weights, strict=True)), (tokens, features, (ROWS, COLUMNS), ids))

    assert torch.autograd.gradcheck(similarity, (tokens, *weights))


def test_equal_directions_have_similarity_1_and_opposite_ones_minus_1():
    alignment, (_, features, _) = made("mlp"), drawn(None)
    alignment.projector = nn.Identity()
    tokens = features.flatten(2).mT * 3
    assert alignment(tokens, features, (ROWS, COLUMNS)).tolist() == pytest.approx([1, 1])
    assert alignment(-tokens, features, (ROWS, COLUMNS)).tolist() == pytest.approx([-1, -1])


def test_features_of_another_grid_are_interpolated():
    """A linear ramp stays one, whose values are those at the middle of each cell, away from the edges."""
    alignment = made("mlp")
    ramp = torch.arange(8, dtype=torch.float64).expand(1, 1, 8, 8)
    finer = alignment.targets(ramp, (16, 16)).view(16, 16)
    assert finer[3, 1:-1].tolist() == pytest.approx([(place + 0.5) / 2 - 0.5 for place in range(1, 15)])
    coarser = alignment.targets(ramp, (8, 4)).view(8, 4)
    assert coarser[3, 1:-1].tolist() == pytest.approx([2.5, 4.5])
    assert alignment.targets(ramp, (8, 8)).view(8, 8).equal(ramp[0, 0])


def test_with_low_precision_the_similarity_is_in_float32():
    alignment, (tokens, features, ids) = made("conv"), drawn(5)
    exact = alignment(tokens, features, (ROWS, COLUMNS), ids)
    rough = alignment.bfloat16()(tokens.bfloat16(), features.float(), (ROWS, COLUMNS), ids)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.02


def test_the_mlp_is_that_of_the_paper():
    """2410.06940: three layers with SiLU, 2,048 wide, from SiT-XL's width to DINOv2-B's."""
    alignment = Alignment(ProjectorShape("mlp", 1152, 2048, 768), block=8)
    assert [type(layer).__name__ for layer in alignment.projector] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    layers = ((1152, 2048), (2048, 2048), (2048, 768))
    assert sum(weight.numel() for weight in alignment.parameters()) == sum((into + 1) * out for into, out in layers)
