"""Flow matching against formulas, against diffusers, and against MiniT2I's own numbers."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from microdit.diffusion.flow import Flow
from microdit.diffusion.objective import denoise_patches, denoising_loss, draw_sigma
from microdit.diffusion.samplers import euler, solve
from microdit.errors import UserError
from microdit.models.config import Size
from microdit.models.patches import patchify
from tests.conftest import busy_model

MEAN, DEVIATION, SCALE = 0.7, 0.3, 2.0
PREDICTIONS = ["velocity", "image", "noise"]
SIZE = Size(dim=16, depth=1, head_dim=8, mixer_dim=16, mixer_depth=0, num_experts=0)
MINIT2I = Path(__file__).parents[1] / "fixtures" / "minit2i_a.safetensors"


def gaussian_denoiser(x, sigma):
    """E[data | x] for data N(MEAN, DEVIATION^2) and noise of SCALE."""
    sigma = sigma.view(-1, 1, 1, 1).to(x)
    t = 1 - sigma
    return MEAN + t * DEVIATION**2 / (t**2 * DEVIATION**2 + (sigma * SCALE) ** 2) * (x - t * MEAN)


@pytest.mark.parametrize(("solver", "order"), [("euler", 0.95), ("heun", 1.95), ("dpm", 1.4)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_each_solver_converges_to_the_exact_solution_with_its_order(solver, order, shift):
    """The exact flow takes the noise n to MEAN + DEVIATION n, whatever its scale.

    DPM-Solver's order falls short of 2, since it counts steps in log(alpha / sigma), which the last of equal steps change by log 2 or so
    however many there are.
    """
    noise = torch.linspace(-2, 2, 32, dtype=torch.float64).view(2, 1, 4, 4)
    flow, exact = Flow(noise_scale=SCALE, shift=shift), MEAN + DEVIATION * noise
    errors = [(solve(solver, gaussian_denoiser, noise, flow, steps).double() - exact).abs().mean().item() for steps in (400, 800)]
    assert errors[1] < 5e-3
    assert math.log2(errors[0] / errors[1]) > order


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_denoised_estimate_is_the_same_from_every_prediction(prediction):
    data, noise, sigma = torch.randn(3, 1, 2, 2).double(), torch.randn(3, 1, 2, 2).double(), torch.tensor([0.1, 0.5, 0.9]).double()
    flow = Flow(prediction, noise_scale=SCALE)
    noisy = flow.add_noise(data, sigma, noise)
    assert torch.allclose(noisy[1], 0.5 * data[1] + 0.5 * SCALE * noise[1])
    output = {"velocity": data - SCALE * noise, "image": data, "noise": noise}[prediction]
    c_skip, c_out, c_in, c_noise = (c.view(-1, 1, 1, 1) for c in flow.preconditioning(sigma))
    assert torch.allclose(c_skip * noisy + c_out * output, data)
    assert (c_in == 1).all()
    assert torch.allclose(c_noise.flatten(), 1000 * sigma)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_mean_square_of_velocity_differences(prediction):
    model, generator = busy_model(SIZE), torch.Generator().manual_seed(0)
    flow, sigma = Flow(prediction, noise_scale=SCALE), torch.tensor([0.005, 0.3, 0.95], dtype=torch.float64)
    data, noise = (torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    caption = model.embed_caption(torch.zeros(3, 2, 12, dtype=torch.float64))
    found = denoising_loss(model, flow, data, caption, sigma, noise)
    s = sigma.view(-1, 1, 1, 1)
    noisy = (1 - s) * data + s * SCALE * noise
    output = model(noisy, 1000 * sigma, caption).float()
    noisy, data, noise, s = (patchify(x, 2) for x in (noisy, data, noise, s.expand_as(data)))
    if prediction == "velocity":
        ours, target = output, data - SCALE * noise
    elif prediction == "image":  # the floor of training, on both sides
        ours, target = (output - noisy) / s.clamp(min=0.01), (data - noisy) / s.clamp(min=0.01)
    else:
        ours, target = (noisy - SCALE * output) / (1 - s), data - SCALE * noise
    assert torch.allclose(found, (ours - target).square().mean(dim=(1, 2)), rtol=1e-4)


def test_masked_patches_have_no_part_in_the_loss():
    model, flow = busy_model(SIZE), Flow("image")
    data, noise = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.randn(1, 4, 8, 8, dtype=torch.float64)
    sigma, keep_ids = torch.tensor([0.4], dtype=torch.float64), torch.tensor([[0, 5, 10, 15]])
    caption = model.embed_caption(torch.zeros(1, 2, 12, dtype=torch.float64))
    denoised = denoise_patches(model, flow, flow.add_noise(data, sigma, noise), sigma, caption, keep_ids)
    error = (denoised - patchify(data, 2)[:, keep_ids[0]]).square().mean()
    assert torch.allclose(denoising_loss(model, flow, data, caption, sigma, noise, keep_ids), error / 0.4**2)


def test_training_noise_is_logit_normal_and_shifted_as_in_the_paper():
    sigma = draw_sigma(Flow(t_mean=-0.8, t_std=0.8), 100_000, torch.Generator().manual_seed(0)).double()
    logit_t = torch.logit(1 - sigma)
    assert (logit_t.mean().item(), logit_t.std().item()) == (pytest.approx(-0.8, abs=0.02), pytest.approx(0.8, abs=0.02))
    shifted = draw_sigma(Flow(t_mean=-0.8, t_std=0.8, shift=3.0), 100_000, torch.Generator().manual_seed(0)).double()
    assert torch.allclose(shifted, 3 * sigma / (1 + 2 * sigma), atol=1e-6)  # 2403.03206, eq. 23


def test_quantiles_are_those_of_the_training_noise():
    flow, normal = Flow(t_mean=-0.8, t_std=0.8, shift=2.0), torch.linspace(-3, 3, 7, dtype=torch.float64)
    assert torch.allclose(flow.quantile(flow.training_sigma(normal)), torch.special.ndtr(normal))
    assert flow.quantile(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_the_schedule_has_equal_steps_before_the_shift():
    assert torch.allclose(Flow().noise_schedule(4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    straight, shifted = Flow().noise_schedule(6), Flow(shift=3.0).noise_schedule(6)
    assert torch.allclose(shifted, 3 * straight / (1 + 2 * straight))
    ranged = Flow(shift=3.0).with_noise_range(0.05, 0.9).noise_schedule(5)
    assert len(ranged) == 6
    assert ranged[-1] == 0
    assert (ranged.diff() < 0).all()
    assert ranged[[0, -2]].tolist() == pytest.approx([0.9, 0.05])
    with pytest.raises(UserError, match="noise levels of a model of flow matching end at 1"):
        Flow().with_noise_range(0.05, 20)
    with pytest.raises(ValueError, match="at least 2"):
        Flow().noise_schedule(1)


def wavy_denoiser(x, sigma):
    sigma = sigma.view(-1, 1, 1, 1).to(x)
    return torch.tanh(2 * x / (1 + sigma)) * 0.7 + 0.1 * x.roll(1, -1) / (1 + sigma**2)


def test_euler_is_diffusers_scheduler_of_flow_matching():
    steps, noise = 7, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    assert torch.allclose(scheduler.sigmas.double(), Flow(shift=3.0).noise_schedule(steps), atol=1e-6)
    x = noise
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        assert Flow().preconditioning(sigma)[3] == pytest.approx(timestep.item(), rel=1e-6)  # the network's time input
        x = scheduler.step((x - wavy_denoiser(x, sigma.expand(2))) / sigma, timestep, x).prev_sample
    assert torch.allclose(solve("euler", wavy_denoiser, noise, Flow(shift=3.0), steps), x, atol=1e-5)


def test_dpm_is_diffusers_multistep_solver_on_flow_sigmas():
    steps, noise, flow = 7, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), Flow(shift=2.0)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    scheduler.sigmas = flow.noise_schedule(steps)  # its own begin at 0.999
    x = noise.double()
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step((x - wavy_denoiser(x, sigma.expand(2))) / sigma, timestep, x).prev_sample
    assert torch.allclose(solve("dpm", wavy_denoiser, noise, flow, steps), x.float(), atol=1e-5)


def test_the_floor_bounds_slopes_of_image_predictions_alone():
    noise = torch.ones(1, 1, 1, 1)
    still = solve("euler", lambda x, sigma: torch.zeros_like(x), noise, Flow("image", sampling_floor=0.5), 4)
    assert still.item() == pytest.approx(0.25 * (1 - 0.25 / 0.5), rel=1e-5)  # 1, 0.75, 0.5, 0.25, then half of a step
    exact = solve("euler", lambda x, sigma: torch.zeros_like(x), noise, Flow("velocity", sampling_floor=0.5), 4)
    assert exact.item() == pytest.approx(0, abs=1e-7)


def test_velocities_are_those_of_minit2i():
    numbers = load_file(MINIT2I)
    flow = Flow("image", noise_scale=2.0, sampling_floor=0.05)
    for image, x, velocity, t in zip(*(numbers[name] for name in ("in.images_BHWC", "out.x", "out.velocity", "in.t")), strict=True):
        sigma = 1 - t.double().item()
        drawn = euler(lambda _, __, x=x: x[None], image[None] / sigma, torch.tensor([sigma, 0.0]).double(), floor=flow.slope_floor)
        assert torch.allclose(drawn[0], image + sigma * velocity, atol=1e-4)
