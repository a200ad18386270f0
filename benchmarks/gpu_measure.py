"""What the steps of benchmarks/gpu.py share: results that outlive their process, clocks, kernels, random data, a step of the trainer."""

import gc
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from microdit.budget.stages import Stage, stage_recipe
from microdit.data.card import FORMAT, write_card
from microdit.data.forms import pack_latents, pack_text
from microdit.data.latents import Batch
from microdit.data.shards import Row, ShardWriter
from microdit.distributed import World
from microdit.files import sha256_of, write_aside
from microdit.model.microdit import MicroDiT
from microdit.model.routing import kept_tokens
from microdit.model.sizes import SIZES, Size
from microdit.recipe import EngineRecipe, Recipe
from microdit.training.chips import peak_flops
from microdit.training.draws import TrainingBatch, add_draws
from microdit.training.footprint import footprint
from microdit.training.parallel import compute_dtype
from microdit.training.start import architecture
from microdit.training.state import TrainingState
from microdit.training.work import Work

CHANNELS, DOWNSAMPLING = 4, 8  # of the SDXL autoencoder
WARM_UP = 3
KERNELS = 20
KINDS = {  # of kernels, by words in their names; the first that fits
    "attention": ("flash", "fmha", "attention", "sdpa", "softmax"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "::mm", "::addmm", "::bmm", "gemv", "splitk"),
    "optimizer and clipping": ("multi_tensor", "foreach", "adam", "lerp"),
    "collectives": ("nccl", "all_gather", "reduce_scatter", "chunk_cat", "split_with_sizes"),
    "norms": ("layer_norm", "norm"),
    "compiled": ("triton",),
    "sorting and gathering": ("sort", "topk", "gather", "index", "scatter"),
    "copies": ("memcpy", "memset", "copy_kernel", "catarray"),
    "elementwise and sums": ("elementwise", "reduce", "vectorized"),
}
RANGES = ("FSDP::", "ProfilerStep", "Torch-Compiled Region", "##")  # names of stretches, which hold kernels
SMOKE = Size(dim=32, depth=2, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=4, experts_every=1, round_ffn_to=16)


@dataclass(frozen=True)
class Place:
    """Where a step works: `out` is kept, `scratch` is deleted. At smoke size everything is as small as it can be."""

    name: str
    out: Path
    scratch: Path
    smoke: bool

    def size(self, name: str) -> Size:
        return SMOKE if self.smoke else SIZES[name]

    @property
    def caption(self) -> tuple[int, int]:
        return (8, 16) if self.smoke else (77, 1024)


class Results:
    """What a step has found so far, in a file that is whole whenever the process ends."""

    def __init__(self, path: Path):
        self._path = path
        self.found: dict[str, Any] = {}
        self.failed: list[str] = []

    def put(self, key: str, value: Any) -> None:
        self.found[key] = value
        print(f"{key}: {value}", flush=True)
        write_aside(self._path, json.dumps(self.found, indent=1).encode())

    @contextmanager
    def attempt(self, key: str) -> Iterator[None]:
        """Note what fails and go on with the next measurement; the step's exit code tells of it."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed.append(key)
            self.put(key, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        free_memory()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def time_of(work: Callable[[], object], seconds: float, warm_up: int = WARM_UP) -> tuple[float, float]:
    """Seconds of one call: the median of two repeats that take about `seconds` together, and their spread as a share of it."""
    for _ in range(warm_up - 1):
        work()
    calls = max(1, min(100, int(seconds / 2 / seconds_of(work))))
    repeats = [seconds_of(lambda: [work() for _ in range(calls)]) / calls for _ in range(2)]
    return median(repeats), (max(repeats) - min(repeats)) / median(repeats)


def measured_ceiling(place: Place) -> float | None:
    """FLOP/s of the bfloat16 product that the first step timed; None if it failed."""
    path = place.out / "ceilings.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    flops: float | None = found.get("bfloat16 product", {}).get("flops_per_second")
    return flops


class Training:
    """A recipe's state as the trainer has it, on random weights. The one place that knows how a training step is put together."""

    def __init__(self, place: Place, world: World, size: Size, stage: Stage, engine: EngineRecipe, mask_padding: bool = False):
        self.place, self.world, self.stage = place, world, stage
        recipe = stage_recipe(stage, size, 1000, 1, engine=engine)
        self.recipe: Recipe = replace(recipe, model=replace(recipe.model, mask_padding=mask_padding))
        self.config = architecture(self.recipe.model, CHANNELS, place.caption[1])
        torch.manual_seed(0)
        with world.device:  # drawing a billion weights on the CPU would take longer than all that is measured
            weights = MicroDiT(self.config).state_dict()
        self.state = TrainingState(self.recipe, self.config, world, weights, fresh=True)
        self.state.optimizers.set_rate(1e-5)
        self.steps = 0

    def step(self, batch: TrainingBatch) -> None:
        """Forward, backward, clipping, optimizer and averages, on a batch that is on the device."""
        self.state.loss(batch).mean().backward()
        self.state.clip(self.recipe.phases[0].grad_clip)
        self.state.take_step(self.steps)
        self.state.optimizers.zero_grad()
        self.steps += 1

    def batch(self, samples: int) -> TrainingBatch:
        """Random numbers, on the device."""
        return self.host_batch(samples).to(self.world.device)

    def host_batch(self, samples: int) -> TrainingBatch:
        """As the reader's thread makes it."""
        phase, patch = self.recipe.phases[0], self.recipe.model.patch_size
        side = self.side
        text_BLE = torch.randn(samples, *self.place.caption)
        content = Batch(torch.randn(samples, CHANNELS, side, side), text_BLE, torch.ones(text_BLE.shape[:2], dtype=torch.bool))
        grid = (side // patch, side // patch)
        dropout = self.recipe.diffusion.caption_dropout
        return add_draws(content, self.state.edm, 0, 0, range(samples), grid, phase.mask_ratio, dropout)

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
        one, spread = time_of(lambda: self.step(batch), seconds)
        phase = replace(self.recipe.phases[0], batch_size=samples)
        tokens = (self.side // self.recipe.model.patch_size) ** 2
        flops = Work(self.recipe, self.config).of_step(phase, 0, tokens, self.place.caption[0])
        peak, _ = peak_flops(self.world.device, compute_dtype(self.recipe.engine, self.world.device))
        ceiling = measured_ceiling(self.place)
        with torch.device("meta"):
            model = MicroDiT(self.config)
        kept = kept_tokens(tokens, phase.mask_ratio)
        sharded = self.recipe.engine.sharding == "fsdp"
        reckoned = footprint(model, samples, tokens, kept, self.place.caption[0], emas=len(self.recipe.ema), sharded=sharded)
        return {
            "samples": samples,
            "milliseconds": 1000 * one,
            "spread": spread,
            "images_per_second": samples / one,
            "share_of_peak": flops / one / peak,
            "share_of_product": flops / one / ceiling if ceiling else None,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
            "reckoned_gb": reckoned.total / 1e9,
        }

    def dispatch(self) -> dict[str, float]:
        """Milliseconds that the CPU needs for a step: on so few samples that the GPU waits for it."""
        batch = self.batch(2)
        return {"milliseconds": 1000 * time_of(lambda: self.step(batch), 1.0)[0]}

    def kernels(self, samples: int) -> dict[str, Any]:
        batch = self.batch(samples)
        return costliest_kernels(lambda: self.step(batch))


def costliest_kernels(step: Callable[[], None]) -> dict[str, Any]:
    """Kernels of one step by time, and the shares of their kinds; `kernel_milliseconds` beside the step's says whether the GPU waited."""
    step()
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        synchronize()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if getattr(event, key) and not event.key.startswith(RANGES)]
    events.sort(key=lambda event: -cast(float, getattr(event, key)))
    total = sum(getattr(event, key) for event in events) or 1.0
    kinds: dict[str, float] = {}
    for event in events:
        kind = kind_of_kernel(event.key)
        kinds[kind] = kinds.get(kind, 0.0) + getattr(event, key) / total
    return {
        "kernel_milliseconds": total / 1000,
        "calls": sum(event.count for event in events),
        "kinds": {kind: round(share, 4) for kind, share in sorted(kinds.items(), key=lambda item: -item[1])},
        "kernels": [
            {"share": round(getattr(event, key) / total, 4), "calls": event.count, "name": event.key[:160]} for event in events[:KERNELS]
        ],
    }


def kind_of_kernel(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), "others")


def write_random_set(
    folder: Path, rows: int, resolution: int, latents: tuple[int, int, int], caption: tuple[int, int], encoders: tuple[str, str]
) -> None:
    """An encoded set of random numbers in the real format, int8. `latents`: (C, H, W); `caption`: tokens and channels."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    writer = ShardWriter(folder / "shard-00000.arrow", [resolution])
    for number in range(rows):
        text = pack_text(generator.standard_normal(caption, np.float32), "int8")
        blob = pack_latents(generator.standard_normal(latents, np.float32), "int8")
        writer.write(Row(f"{number}", 0, [f"caption {number}"], [1.0], [text], {resolution: blob}))
    writer.close()
    shard = {
        "name": writer.path.name,
        "rows": rows,
        "seen": rows,
        "rejected": {},
        "buckets": {"0": rows},
        "bytes": writer.path.stat().st_size,
        "sha256": sha256_of(writer.path),
        "captions": rows,
        "tokens": rows * caption[0],
        "captions_cut": 0,
    }
    plan = {
        "format": FORMAT,
        "source": "random numbers",
        "settings": {"resolutions": [resolution], "latents": "int8", "captions": "int8"},
        "sizes": [{str(resolution): [resolution, resolution]}],
        "latent_channels": latents[0],
        "downsampling": resolution // latents[1],
        "text_channels": caption[1],
        "max_tokens": caption[0],
        "autoencoder": {"name": encoders[0], "fingerprint": hashlib.sha256(b"none").hexdigest()[:16]},
        "text_encoder": {"name": encoders[1], "fingerprint": hashlib.sha256(b"none").hexdigest()[:16]},
    }
    write_card(folder, plan, [shard])
