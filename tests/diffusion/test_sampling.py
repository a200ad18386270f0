import pytest
import torch

from microdit.diffusion.edm import EDM, denoise
from microdit.diffusion.sampling import guided_denoiser, heun, noise_schedule
from microdit.errors import UserError
from microdit.model.sizes import Size
from tests.conftest import busy_model

EDM_SETTINGS = EDM()
MEAN, DEVIATION = 0.3, 0.9


def gaussian_denoiser(x, sigma):
    """The best denoiser of data that is normal with MEAN and DEVIATION: known in closed form."""
    variance = sigma.view(-1, 1, 1, 1) ** 2
    return (x * DEVIATION**2 + MEAN * variance) / (DEVIATION**2 + variance)


def exact_solution(noise, sigma_max):
    """The probability-flow ODE of normal data, integrated by hand from sigma_max to 0."""
    start = noise.double() * sigma_max
    return MEAN + (start - MEAN) * DEVIATION / (DEVIATION**2 + sigma_max**2) ** 0.5


def test_schedule_runs_from_sigma_max_to_sigma_min_and_then_zero():
    sigmas = noise_schedule(EDM_SETTINGS, 18)
    assert len(sigmas) == 19
    assert sigmas[0].item() == pytest.approx(80)
    assert sigmas[-2].item() == pytest.approx(0.002)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match="at least 2 steps"):
        noise_schedule(EDM_SETTINGS, 1)


def test_heun_meets_the_exact_solution_and_is_of_second_order():
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = {}
    for steps in (32, 64, 128):
        drawn = heun(gaussian_denoiser, noise, noise_schedule(EDM_SETTINGS, steps))
        errors[steps] = (drawn - exact_solution(noise, 80)).abs().max().item()
    assert errors[128] < 5e-3
    assert errors[32] / errors[64] > 3  # halving the step quarters the error
    assert errors[64] / errors[128] > 3


def test_samples_have_the_datas_mean_and_deviation():
    noise = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    drawn = heun(gaussian_denoiser, noise, noise_schedule(EDM_SETTINGS, 32))
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert drawn.std().item() == pytest.approx(DEVIATION, abs=0.03)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 3.0])
def test_guidance_moves_away_from_the_empty_caption(tiny_model, guidance_scale):
    noisy, sigma = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([0.5, 4.0], dtype=torch.float64)
    text = torch.randn(2, 3, 12, dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    conditional = denoise(tiny_model, EDM_SETTINGS, noisy, sigma, tiny_model.embed_caption(text, mask))
    empty = denoise(tiny_model, EDM_SETTINGS, noisy, sigma, tiny_model.embed_caption(torch.zeros_like(text)))
    guided = guided_denoiser(tiny_model, EDM_SETTINGS, text, mask, guidance_scale)(noisy, sigma)
    assert torch.allclose(guided, empty + guidance_scale * (conditional - empty), atol=1e-9)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_path_drop_guidance_moves_away_from_the_model_without_its_sparse_blocks(guidance_scale):
    model = busy_model(Size(dim=32, depth=5, head_dim=8, mixer_dim=32, mixer_depth=0, num_experts=0, routing="sprint"))
    noisy, sigma = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([0.5, 4.0], dtype=torch.float64)
    text, mask = torch.randn(2, 3, 12, dtype=torch.float64), torch.tensor([[True, True, True], [True, False, False]])
    conditional = denoise(model, EDM_SETTINGS, noisy, sigma, model.embed_caption(text, mask))
    weak = denoise(model, EDM_SETTINGS, noisy, sigma, model.embed_caption(torch.zeros_like(text)), drop_path=True)
    guided = guided_denoiser(model, EDM_SETTINGS, text, mask, guidance_scale, "path-drop")
    assert torch.allclose(guided(noisy, sigma), weak + guidance_scale * (conditional - weak), atol=1e-9)
    assert torch.allclose(guided(noisy, sigma), guided_denoiser(model, EDM_SETTINGS, text, mask, guidance_scale)(noisy, sigma)) == (
        guidance_scale == 1
    )


def test_path_drop_guidance_needs_a_model_that_was_trained_for_it(tiny_model):
    with pytest.raises(UserError, match=r"with routing deferred cannot do without: use a model trained with model\.routing sprint"):
        guided_denoiser(tiny_model, EDM_SETTINGS, torch.zeros(1, 3, 12, dtype=torch.float64), None, 3.0, "path-drop")
