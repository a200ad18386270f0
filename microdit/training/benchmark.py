"""Measure how much of this machine real training steps use, on random latents and captions."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import torch

from microdit.config.schema import EngineRecipe, Recipe
from microdit.data.dataset import Batch
from microdit.devices import device_name
from microdit.distributed import World
from microdit.models.config import SIZES
from microdit.planning.hardware import Measurement, find_chip, peak_flops
from microdit.planning.phases import STAGES, stage_recipe
from microdit.planning.workload import FlopCounter, Shapes, config_of, phase_flops, time_factor
from microdit.process_limits import keep_freed_memory
from microdit.training.noise import TrainingBatch, noise_settings, sample_noise
from microdit.training.parallel import compute_dtype
from microdit.training.stability import SpikeGuard
from microdit.training.state import TrainingState

TINY = "MicroDiT_Tiny_2"
STEP_FLOPS = 1e11  # about a second on two CPU cores
WARM_UP = 2  # steps that are not timed: kernels are chosen, blocks compiled


def bench_recipe(micro_batch: int | None, device: torch.device, precision: str = "auto") -> Recipe:
    """Return the paper's first phase of Tiny_2, with one micro-batch a step."""
    size = micro_batch or (256 if device.type == "cuda" else 8)
    recipe = stage_recipe(STAGES[0], SIZES[TINY], 1, size, engine=EngineRecipe(compile=device.type == "cuda", precision=precision))
    return replace(recipe, name=TINY)


def measure(recipe: Recipe, shapes: Shapes, world: World, seconds: float, advance: Callable[[float, str], None]) -> Measurement:
    """Time whole training steps of the recipe's first phase: forward, backward, clipping, optimizer, averages.

    `advance` is called with the seconds that have passed. Recomputed blocks count as work, since it is the chip's use that is measured.
    """
    keep_freed_memory()
    phase, device = recipe.phases[0], world.device
    micro_batch = phase.batch_size
    config = config_of(recipe, shapes)
    state = TrainingState(recipe, config, world, None, fresh=True, feature_channels=shapes.feature_channels)
    guard = SpikeGuard(recipe.guard, device)
    batch = _random_batch(recipe, shapes, state, micro_batch).to(device)
    dtype = compute_dtype(recipe.engine, device)
    peak, peak_source = peak_flops(device, dtype)

    def step(number: int) -> None:
        state.train_step([batch], number, phase.learning_rate, phase.grad_clip, guard).values()

    for number in range(WARM_UP):
        step(number)
    steps, started = 0, time.perf_counter()
    passed = 0.0
    while passed < seconds:
        step(WARM_UP + steps)
        steps += 1
        now = time.perf_counter() - started
        advance(min(now, seconds) - min(passed, seconds), f"{steps * micro_batch / now:.2f} images/s")
        passed = now
    images_per_second = steps * micro_batch / passed
    _, height, width = shapes.sides[0]
    tokens = (height // config.patch_size) * (width // config.patch_size)
    work, of_one = FlopCounter(recipe, config, shapes.feature_channels), replace(phase, batch_size=1)
    flops = work.of_step(of_one, 0, tokens, shapes.caption_tokens, recipe.aligned_at(0)) * time_factor(recipe, phase, shapes)
    return Measurement(
        chip_name(device),
        images_per_second * flops / peak,
        peak,
        peak_source,
        images_per_second,
        recipe.name,
        micro_batch,
        str(dtype).removeprefix("torch."),
        torch.__version__,
        datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def training_hours(recipe: Recipe, shapes: Shapes, world: World, seconds: float) -> tuple[float, Measurement]:
    """Return how many hours all phases take on this machine, from steps of the first one that are timed for some `seconds`.

    Each of these steps has as many samples as take STEP_FLOPS, so that even a slow machine answers soon.
    """
    phase = recipe.phases[0]
    flops_per_sample = phase_flops(recipe, phase, shapes) / (phase.steps * phase.batch_size)
    size = max(1, min(recipe.engine.micro_batch or phase.batch_size, int(STEP_FLOPS / flops_per_sample)))
    timed = replace(recipe, phases=[replace(phase, batch_size=size)], engine=replace(recipe.engine, micro_batch=None))
    found = measure(timed, shapes, world, seconds, lambda passed, note: None)
    flops = sum(phase_flops(recipe, one, shapes) for one in recipe.phases)
    return flops / flops_per_sample / found.images_per_second / 3600, found


def chip_name(device: torch.device) -> str:
    """Return the chip's name in our table, else the driver's name."""
    name = device_name(device)
    chip = find_chip(name)
    return chip.name if chip is not None else name


def _random_batch(recipe: Recipe, shapes: Shapes, state: TrainingState, size: int) -> TrainingBatch:
    phase, p = recipe.phases[0], recipe.model.patch_size
    _, height, width = shapes.sides[0]
    text = torch.randn(size, shapes.caption_tokens, shapes.caption_channels)
    grid = height // p, width // p
    features = torch.randn(size, shapes.feature_channels, *grid) if recipe.aligned_at(0) and shapes.feature_channels else None
    samples = Batch(torch.randn(size, shapes.latent_channels, height, width), text, torch.ones(text.shape[:2], dtype=torch.bool), features)
    settings = noise_settings(recipe, state.objective, phase, 0)
    return sample_noise(samples, settings, recipe.seed, 0, range(size), grid)
