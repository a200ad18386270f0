import pytest
import torch
from torch import Tensor

from microdit.diffusion.edm import EDM
from microdit.models.config import Size
from microdit.training.noise import TrainingBatch
from microdit.training.parallel import DenoisingLoss
from tests.conftest import busy_model

SIZE = Size(dim=32, depth=2, head_dim=8, mixer_dim=32, mixer_depth=1, num_experts=0, round_ffn_to=8)


@pytest.fixture(scope="module")
def loss() -> DenoisingLoss:
    return DenoisingLoss(busy_model(SIZE), EDM(), mask_padding=True)


def batch(kept: list[float], text_BLE: Tensor | None = None) -> TrainingBatch:
    """Always the same samples, noise and captions; of each caption the last token is padding."""
    draw = torch.Generator().manual_seed(0)
    size = len(kept)
    latents, noise, text = (torch.randn(size, *rest, generator=draw, dtype=torch.float64) for rest in ((4, 8, 8), (4, 8, 8), (4, 12)))
    mask = torch.tensor([True, True, True, False]).expand(size, 4)
    sigma = torch.tensor([0.3, 0.9, 4.0], dtype=torch.float64)[:size]
    return TrainingBatch(latents, text if text_BLE is None else text_BLE, mask, sigma, noise, torch.tensor(kept), None)


def test_a_dropped_caption_gives_the_loss_of_zeros_and_a_kept_one_its_own(loss):
    """What guidance is learnt from: without it the unconditional prediction would never be trained."""
    mixed, all_kept = loss(batch([1, 0, 1])).total_B, loss(batch([1, 1, 1])).total_B
    of_zeros = loss(batch([1, 1, 1], torch.zeros(3, 4, 12, dtype=torch.float64))).total_B
    assert torch.equal(mixed[[0, 2]], all_kept[[0, 2]])
    assert mixed[1].item() == pytest.approx(of_zeros[1].item(), rel=1e-9)
    assert abs(mixed[1] - all_kept[1]) > 1e-3


def test_no_gradient_reaches_a_dropped_caption(loss):
    text = batch([1, 0, 1]).text_BLE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(batch([1, 0, 1], text)).total_B.sum(), text)
    assert not gradient[1].any()
    assert all(gradient[sample, :3].abs().max() > 1e-6 for sample in (0, 2))
    first_layer = loss.model.caption.project.fc1.weight
    (of_dropped,) = torch.autograd.grad(loss(batch([0, 0, 0])).total_B.sum(), first_layer)
    (of_kept,) = torch.autograd.grad(loss(batch([1, 1, 1])).total_B.sum(), first_layer)
    assert not of_dropped.any()
    assert of_kept.abs().max() > 1e-6


def test_padding_is_masked_where_the_recipe_says_so(loss):
    other = batch([1, 1, 1]).text_BLE.clone()
    other[:, 3] += 1
    assert torch.allclose(loss(batch([1, 1, 1], other)).total_B, loss(batch([1, 1, 1])).total_B, rtol=1e-9)
    attended = DenoisingLoss(loss.model, EDM(), mask_padding=False)
    assert not torch.allclose(attended(batch([1, 1, 1], other)).total_B, attended(batch([1, 1, 1])).total_B, rtol=1e-4)
