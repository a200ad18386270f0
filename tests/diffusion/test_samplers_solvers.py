from itertools import pairwise

import pytest
import torch

from microdit.diffusion.edm import EDM
from microdit.diffusion.samplers import Churn, Step, heun, solve

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
    sigmas = EDM_SETTINGS.noise_schedule(18)
    assert len(sigmas) == 19
    assert sigmas[0].item() == pytest.approx(80)
    assert sigmas[-2].item() == pytest.approx(0.002)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match="at least 2 steps"):
        EDM_SETTINGS.noise_schedule(1)


def test_heun_meets_the_exact_solution_and_is_of_second_order():
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = {}
    for steps in (32, 64, 128):
        drawn = heun(gaussian_denoiser, noise, EDM_SETTINGS.noise_schedule(steps))
        errors[steps] = (drawn - exact_solution(noise, 80)).abs().max().item()
    assert errors[128] < 5e-3
    assert errors[32] / errors[64] > 3  # halving the step quarters the error
    assert errors[64] / errors[128] > 3


def test_samples_have_the_datas_mean_and_deviation():
    noise = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    drawn = heun(gaussian_denoiser, noise, EDM_SETTINGS.noise_schedule(32))
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert drawn.std().item() == pytest.approx(DEVIATION, abs=0.03)


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("dpm", 2), ("euler", 1)])
def test_every_solver_comes_to_the_exact_solution_at_its_order(solver, order):
    """Of a Gaussian's differential equation. The last error is far above what float32 noise levels do."""
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = [
        (solve(solver, gaussian_denoiser, noise, EDM_SETTINGS, steps) - exact_solution(noise, 80)).abs().max().item()
        for steps in (32, 64, 128)
    ]
    assert errors[2] < {2: 5e-3, 1: 0.1}[order]
    for more, fewer in pairwise(errors):
        assert more / fewer > {2: 3.0, 1: 1.7}[order]


def wavy_denoiser(x, sigma):
    """No Gaussian's: it bends, and its latents depend on each other."""
    return torch.tanh(2 * x / (1 + sigma.view(-1, 1, 1, 1))) * 0.7 + 0.1 * x.roll(1, -1) / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def test_the_schedulers_of_diffusers_come_to_what_heun_comes_to():
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    limit = heun(wavy_denoiser, noise, EDM_SETTINGS.noise_schedule(1000))
    assert (solve("dpm", wavy_denoiser, noise, EDM_SETTINGS, 500) - limit).abs().max() < 2e-3
    euler = {steps: (solve("euler", wavy_denoiser, noise, EDM_SETTINGS, steps) - limit).abs().mean().item() for steps in (200, 400)}
    assert euler[200] / euler[400] == pytest.approx(2, rel=0.15)


def test_the_schedulers_of_diffusers_take_our_denoiser_as_it_is():
    """A step of each against its formula: Euler's, and DPM-Solver++'s first and second (2211.01095, algorithm 2), in float64."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    sigmas = EDM_SETTINGS.noise_schedule(6)
    x = noise.double() * sigmas[0]
    y, before = x.clone(), None
    for index, (sigma, lower) in enumerate(pairwise(sigmas)):

        def at(state, sigma=sigma):
            return wavy_denoiser(state, sigma.expand(2))

        x = x + (lower - sigma) * (x - at(x)) / sigma
        denoised, ratio = at(y), lower / sigma
        if before is None or lower == 0:
            y = ratio * y + (1 - ratio) * denoised
        else:
            r = (sigmas[index - 1] / sigma).log() / (sigma / lower).log()
            y = ratio * y + (1 - ratio) * (denoised + (denoised - before) / (2 * r))
        before = denoised
    assert torch.allclose(solve("euler", wavy_denoiser, noise, EDM_SETTINGS, 6).double(), x, atol=1e-4)
    assert torch.allclose(solve("dpm", wavy_denoiser, noise, EDM_SETTINGS, 6).double(), y, atol=1e-4)


def test_churn_keeps_the_datas_mean_and_deviation_and_draws_again():
    """Much of it, and S_noise 1: the marginals of 2206.00364, algorithm 2, are the same."""
    noise = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)

    def draw():
        return torch.randn(noise.shape, generator=generator)

    plain = solve("heun", gaussian_denoiser, noise, EDM_SETTINGS, 64)
    churned = solve("heun", gaussian_denoiser, noise, EDM_SETTINGS, 64, churn=Churn(40, 0.05, 50), draw_noise=draw)
    assert churned.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert churned.std().item() == pytest.approx(DEVIATION, abs=0.03)
    assert (torch.corrcoef(torch.stack([plain.flatten(), churned.flatten()]))[0, 1]) < 0.5
    none = solve("heun", gaussian_denoiser, noise, EDM_SETTINGS, 64, churn=Churn(40, 100, 200), draw_noise=draw)
    assert torch.equal(none, plain)  # no noise level of the schedule lies in that interval


def test_noise_rises_as_algorithm_2_says():
    assert Churn(10).gamma(1.0, 20) == 2**0.5 - 1  # 10 / 20 would be more
    assert Churn(4, 0.05, 50).gamma(1.0, 20) == 0.2
    assert Churn(4, 0.05, 50).gamma(51.0, 20) == Churn(4, 0.05, 50).gamma(0.04, 20) == 0


@pytest.mark.parametrize("solver", ["heun", "dpm", "euler"])
def test_steps_show_what_the_denoiser_says_and_can_end_the_sampling(solver):
    noise, steps = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), []
    drawn = solve(solver, gaussian_denoiser, noise, EDM_SETTINGS, 8, steps.append)
    assert [step.index for step in steps] == list(range(8))
    assert [step.sigma for step in steps] == pytest.approx(EDM_SETTINGS.noise_schedule(8)[:-1].tolist(), rel=1e-5)
    assert torch.allclose(steps[-1].denoised_BCHW, drawn, atol=1e-6)

    def stop(step: Step):
        if step.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(solver, gaussian_denoiser, noise, EDM_SETTINGS, 8, stop)
