"""How much of a GPU is used? One command, under ten minutes; nothing but this repository is needed.

    python benchmarks/gpu.py                                  # Tiny_2 and XL_2, 256 px, three quarters dropped
    python benchmarks/gpu.py --sizes xl --mask 0 --micro-batch 64
    python benchmarks/gpu.py --sizes smoke --steps 2          # a very small model, on a CPU too: does it run?

Whole training steps (forward, backward, clipping, AdamW, one average) in bfloat16 on random latents, as the trainer does them: weights as
autocast float32 or sharded by FSDP (on one GPU, for its bfloat16 copies), blocks eager or compiled. Utilisation is of the chip's dense
bfloat16 peak. Then the kernels that take the most time in the fastest way, and the memory beside the arithmetic of benchmarks/memory.py.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch.profiler import ProfilerActivity, profile

from microdit.data.latents import Batch
from microdit.devices import device_name
from microdit.diffusion.edm import EDM
from microdit.distributed import World, start_world, stop_world
from microdit.model.flops import training_flops
from microdit.model.microdit import MicroDiT, ModelConfig
from microdit.model.routing import kept_tokens
from microdit.model.sizes import SIZES, Size, resolve
from microdit.recipe import EMARecipe, EngineRecipe, OptimizerRecipe
from microdit.training.chips import peak_flops
from microdit.training.draws import TrainingBatch, add_draws
from microdit.training.ema import EMA
from microdit.training.footprint import footprint
from microdit.training.optim import Optimizers
from microdit.training.parallel import Sharding, compute_dtype, prepare_blocks, sharding_of, wrap
from microdit.training.step import DenoisingLoss

SMOKE = Size(dim=64, depth=3, head_dim=16, mixer_dim=32, mixer_depth=1, num_experts=2, round_ffn_to=16)
ALL = {"smoke": SMOKE, "tiny": SIZES["MicroDiT_Tiny_2"], "xl": SIZES["MicroDiT_XL_2"]}
MICRO_BATCH = {"smoke": 4, "tiny": 256, "xl": 128}
CAPTION = (77, 1024)


@dataclass(frozen=True)
class Result:
    images_per_second: float
    utilisation: float
    memory_gb: float
    compile_seconds: float
    step: Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=ALL, default=["tiny", "xl"])
    parser.add_argument("--micro-batch", type=int, help="samples a step [default: 256 of Tiny_2, 128 of XL_2]")
    parser.add_argument("--resolution", type=int, choices=(256, 512), default=256)
    parser.add_argument("--mask", type=float, default=0.75, help="share of the patches that is dropped")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each way")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no further way after these")
    args = parser.parse_args()
    started = time.perf_counter()
    world = start_world()
    peak, source = peak_flops(world.device, compute_dtype(EngineRecipe(), world.device))
    print(f"{device_name(world.device)}; peak {peak / 1e12:.4g} TFLOP/s, {source}; PyTorch {torch.__version__}")
    print(f"{'size':8}{'batch':>7}{'weights':>10}{'blocks':>10}{'images/s':>11}{'MFU':>8}{'GB':>8}{'reckoned':>10}{'first step, s':>15}")
    for size in args.sizes:
        batch = args.micro_batch or MICRO_BATCH[size]
        results: list[Result] = []
        for compiled in (False, True):
            for sharding in ("none", "fsdp"):
                if results and time.perf_counter() - started > 60 * args.minutes:
                    print(f"{size:8}{batch:>7}{sharding:>10}{'compiled' if compiled else 'eager':>10}   left out: --minutes are over")
                    continue
                engine = EngineRecipe(sharding="fsdp" if sharding == "fsdp" else "auto", compile=compiled)
                result = measure(size, engine, world, batch, args.resolution, args.mask, args.steps, peak)
                results.append(result)
                reckoned = reckoned_gb(size, batch, args.resolution, args.mask, world, sharded=sharding == "fsdp")
                columns = f"{size:8}{batch:>7}{sharding:>10}{'compiled' if compiled else 'eager':>10}{result.images_per_second:>11.1f}"
                memory = f"{result.memory_gb:>8.1f}{reckoned:>10.1f}" if world.device.type == "cuda" else f"{'':>18}"
                print(f"{columns}{result.utilisation:>8.1%}{memory}{result.compile_seconds:>15.1f}", flush=True)
        show_profile(max(results, key=lambda result: result.images_per_second).step, world)
    stop_world()


def measure(size: str, engine: EngineRecipe, world: World, batch: int, resolution: int, mask: float, steps: int, peak: float) -> Result:
    step, config = training_step(size, engine, world, batch, resolution, mask)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = seconds_of(step, world)
    for _ in range(2):
        step()
    seconds = seconds_of(lambda: [step() for _ in range(steps)], world) / steps
    side = resolution // 8 // 2
    flops = batch * training_flops(config, side * side, kept_tokens(side * side, mask), CAPTION[0])
    memory = torch.cuda.max_memory_allocated() / 1e9 if world.device.type == "cuda" else 0.0
    return Result(batch / seconds, flops / seconds / peak, memory, first, step)


def training_step(
    size: str, engine: EngineRecipe, world: World, batch: int, resolution: int, mask: float
) -> tuple[Callable[[], None], ModelConfig]:
    """One whole step as the trainer does it, on a batch that stays the same, and the model's configuration."""
    torch.manual_seed(0)
    config = resolve(ALL[size])
    model = MicroDiT(config).train().to(world.device)
    sharding: Sharding = sharding_of(engine, world, 0)
    dtype = compute_dtype(engine, world.device)
    loss = DenoisingLoss(model, EDM(), mask_padding=False, autocast=dtype if sharding == "none" and dtype != torch.float32 else None)
    prepare_blocks(model, engine, sharding, world)
    wrapped = wrap(loss, engine, sharding, world)
    optimizers, average = Optimizers(model, OptimizerRecipe()), EMA(model, EMARecipe(0.999))
    optimizers.set_rate(1e-5)
    drawn = random_batch(batch, resolution, mask).to(world.device)

    def step() -> None:
        wrapped(drawn).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25, foreach=True)
        optimizers.step()
        optimizers.zero_grad()
        average.update(100)

    return step, config


def random_batch(batch: int, resolution: int, mask: float) -> TrainingBatch:
    side = resolution // 8
    samples = Batch(torch.randn(batch, 4, side, side), torch.randn(batch, *CAPTION), torch.ones(batch, CAPTION[0], dtype=torch.bool))
    return add_draws(samples, EDM(), 0, 0, range(batch), (side // 2, side // 2), mask, 0.1)


def reckoned_gb(size: str, batch: int, resolution: int, mask: float, world: World, sharded: bool) -> float:
    with torch.device("meta"):
        model = MicroDiT(resolve(ALL[size]))
    tokens = (resolution // 16) ** 2
    return footprint(model, batch, tokens, kept_tokens(tokens, mask), CAPTION[0], world.size, sharded=sharded).total / 1e9


def show_profile(step: Callable[[], None], world: World) -> None:
    """The kernels of one step that take the most time."""
    step()
    cuda = world.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        synchronize(world)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -cast(float, getattr(event, key)))
    total = sum(getattr(event, key) for event in events)
    for event in events[:12]:
        print(f"    {getattr(event, key) / total:6.1%} of the time, {event.count:5} calls: {event.key[:90]}")


def seconds_of(work: Callable[[], object], world: World) -> float:
    synchronize(world)
    started = time.perf_counter()
    work()
    synchronize(world)
    return time.perf_counter() - started


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
