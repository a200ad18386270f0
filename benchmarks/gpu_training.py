"""A step of the trainer on random numbers, for benchmarks/gpu.py."""

import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from gpu_measure import Place, costliest_kernels, free_memory, measured_ceiling, synchronize, time_of

from microdit.config.schema import EngineRecipe, Recipe, architecture
from microdit.data.dataset import Batch, StoredBatch
from microdit.data.packing import StoredRows
from microdit.distributed import World
from microdit.models.config import Size
from microdit.models.microdit import MicroDiT
from microdit.models.routing import kept_tokens
from microdit.planning.hardware import peak_flops
from microdit.planning.memory import SPARE, Layout, Sharding, footprint
from microdit.planning.phases import Stage, stage_recipe
from microdit.planning.workload import FlopCounter
from microdit.training.gradients import WholeModelGradients
from microdit.training.meters import PendingStep
from microdit.training.noise import MicroBatch, NoiseSettings, StoredMicroBatch, TrainingBatch, sample_noise
from microdit.training.parallel import compute_dtype, shards_of
from microdit.training.stability import SpikeGuard
from microdit.training.state import TrainingState

CHANNELS, DOWNSAMPLING = 4, 8  # of the SDXL autoencoder


class Training:
    """A recipe's state as the trainer has it, on random weights. The one place that knows how a training step is put together."""

    def __init__(self, place: Place, world: World, size: Size, stage: Stage, engine: EngineRecipe, mask_padding: bool = False):
        self.place, self.world, self.stage = place, world, stage
        recipe = stage_recipe(stage, size, 1000, 1, engine=engine)
        self.recipe: Recipe = replace(recipe, model=replace(recipe.model, mask_padding=mask_padding))
        self.config = architecture(self.recipe.model, CHANNELS, place.caption[1])
        self.state = TrainingState(self.recipe, self.config, world, self._draw, fresh=True)
        self.guard = SpikeGuard(self.recipe.guard, world.device)
        self.steps = 0

    @torch.no_grad()
    def _draw(self, model: MicroDiT) -> None:
        """Random weights, on the device: drawing a billion on the CPU would take longer than all that is measured."""
        torch.manual_seed(0)
        with self.world.device:
            drawn = MicroDiT(self.config).state_dict()
        for shard in shards_of(model):
            shard.leaf.copy_(shard.own(drawn[shard.name]))

    def step(self, batch: MicroBatch) -> PendingStep:
        """A whole step, as the trainer gives it to the device."""
        self.steps += 1
        return self.state.train_step([batch], self.steps, 1e-5, self.recipe.phases[0].grad_clip, self.guard)

    def batch(self, samples: int) -> TrainingBatch:
        """Random numbers, on the device."""
        return self.host_batch(samples).to(self.world.device)

    def host_batch(self, samples: int) -> StoredMicroBatch:
        """As the reader's thread makes it."""
        phase, side = self.recipe.phases[0], self.side
        stored = StoredBatch(
            random_rows(samples, CHANNELS, side * side),
            (side, side),
            None,
            random_rows(samples, *self.place.caption),
            torch.full((samples,), self.place.caption[0]),
        )
        grid = (side // self.recipe.model.patch_size,) * 2
        settings = NoiseSettings(self.state.objective, phase.mask_ratio, self.recipe.diffusion.caption_dropout)

        def add_noise(batch: Batch) -> TrainingBatch:
            return sample_noise(batch, settings, 0, 0, range(samples), (grid[0], grid[1]))

        return StoredMicroBatch(stored.pin() if self.world.device.type == "cuda" else stored, add_noise)

    @property
    def side(self) -> int:
        """Latents of a picture's side."""
        return 8 if self.place.smoke else self.stage.resolution // DOWNSAMPLING

    def measure(self, samples: int, seconds: float) -> dict[str, Any]:
        """Whole steps on `samples` pictures: speed, share of the peak, memory beside what `microdit budget` reckons."""
        free_memory()
        on_gpu = self.world.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        batch = self.batch(samples)
        one, spread = time_of(lambda: self.step(batch), seconds, 6)  # recorded by then
        phase = replace(self.recipe.phases[0], batch_size=samples)
        tokens = (self.side // self.recipe.model.patch_size) ** 2
        flops = FlopCounter(self.recipe, self.config).of_step(phase, 0, tokens, self.place.caption[0])
        peak, _ = peak_flops(self.world.device, compute_dtype(self.recipe.engine, self.world.device))
        ceiling = measured_ceiling(self.place)
        with torch.device("meta"):
            model = MicroDiT(self.config)
        kept = kept_tokens(tokens, phase.mask_ratio)
        sharding: Sharding = "fsdp" if self.recipe.engine.sharding == "fsdp" else "none"
        spare = SPARE * torch.cuda.get_device_properties(self.world.device).total_memory if on_gpu else 0.0
        layout = Layout(sharding, accumulates=False, spare=spare)
        estimated = footprint(model, samples, tokens, kept, self.place.caption[0], layout, len(self.recipe.ema))
        return {
            "samples": samples,
            "milliseconds": 1000 * one,
            "spread": spread,
            "images_per_second": samples / one,
            "share_of_peak": flops / one / peak,
            "share_of_product": flops / one / ceiling if ceiling else None,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
            "reckoned_gb": estimated.total / 1e9,
        }

    def dispatch(self, samples: int) -> dict[str, float]:
        """Milliseconds that the CPU needs to give a step to the device."""
        batch, times = self.batch(samples), []
        for _ in range(5):
            synchronize()
            started = time.perf_counter()
            self.step(batch)
            times.append(time.perf_counter() - started)
        return {"milliseconds": 1000 * median(times)}

    @property
    def recorded(self) -> int:
        """How many shapes of micro-batch are replayed."""
        gradients = self.state.gradients
        return len(gradients._recorded) if isinstance(gradients, WholeModelGradients) else 0

    def forget_recorded(self) -> None:
        """So that another size has all of the memory."""
        gradients = self.state.gradients
        if isinstance(gradients, WholeModelGradients):
            gradients._recorded.clear()
        free_memory()

    def kernels(self, samples: int) -> dict[str, Any]:
        batch = self.batch(samples)
        return costliest_kernels(lambda: self.step(batch))


def random_rows(*shape: int) -> StoredRows:
    """In 8 bits, about as large as standard normal numbers."""
    return StoredRows(torch.randint(-127, 128, shape, dtype=torch.int8), torch.full((*shape[:2], 1), 0.014, dtype=torch.float16))
