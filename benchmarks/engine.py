"""What the trainer costs beside the arithmetic: its overhead, the stall of a checkpoint, the time to the first step.

    python benchmarks/engine.py                # the demo's model, and Tiny_2 for the checkpoint
    python benchmarks/engine.py --skip-tiny    # without the 200 M parameters

Overhead: the trainer (reading, noise, guard, average, metrics) against a bare loop of forward, backward, clipping and AdamW on the same
batches, made before, in turns, in one process. The stall is what the loop waits when a checkpoint begins, and, apart, how much slower steps
are while it is written on the same cores. Timings are ratios within this run.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from microdit.config.load import load_recipe
from microdit.config.schema import Recipe
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.sources.builtin import emoji_source
from microdit.distributed import World, start_world
from microdit.encoders.autoencoder import load_autoencoder
from microdit.encoders.text import load_text_encoder
from microdit.io.console import PlainConsole, Reporter
from microdit.process_limits import keep_freed_memory
from microdit.training.trainer import Trainer

FEW, MANY = 10, 70  # steps
ONE_PHASE = "phases=[{{name: all, steps: {steps}, batch_size: {batch}, learning_rate: 1e-3, mask_ratio: 0.5, grad_clip: 1.0}}]"
TINY = ["model.dim=512", "model.depth=16", "model.mixer_dim=512", "model.mixer_depth=4", "model.num_experts=8", "model.round_ffn_to=256"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--skip-tiny", action="store_true", help="measure the demo's model only")
    args = parser.parse_args()
    keep_freed_memory()
    world = start_world("cpu")
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "emoji"
        encode_source(emoji_source("train"), data, EncodeSettings((64,)), load_autoencoder("icon"), load_text_encoder("minilm"))
        demo = [f"data.path={data}", "data.sets={}", "record.sample_prompts=[]", "record.checkpoint_every=1000000"]
        clock, processor = overhead(demo, Path(place), world, args.turns)
        report("overhead of the trainer, by the clock", clock, "bar: under 3%")
        report("  by processor time", processor, "")
        for name, more, batch in (("demo", [], 64), *(() if args.skip_tiny else (("Tiny_2", TINY, 16),))):
            stall, slower, size = checkpoint(name, [*demo, *more], batch, Path(place), world)
            report(f"checkpoint of {name} ({size:.0f} MB): the loop waits, in steps", f"{stall:.2f}", "bar: under one step")
            report("  and a step beside the writing takes", f"{slower:.2f} of a step", "")
        first, imports = time_to_first_step(demo, Path(place))
        report("from start to the first step, s", f"{first:.1f}", f"{imports:.1f} of it until PyTorch and the encoders are imported")


def report(name: str, value: str, note: str) -> None:
    print(f"{name:64} {value:>26}   {note}", flush=True)


def overhead(demo: list[str], place: Path, world: World, turns: int) -> tuple[str, str]:
    """Medians and quartiles of the turns' ratios, by the clock and by the processor: a noisy neighbour spoils a turn, not the median.

    The trainer runs for a few steps and for many; the difference is that of the steps between, without beginning and end.
    """
    ratios: list[tuple[float, float]] = []
    for turn in range(turns):
        spent = {}
        for steps in (FEW, MANY):
            recipe = load_recipe("emoji", [*demo, ONE_PHASE.format(steps=steps, batch=64), "record.metrics_every=20"])
            trainer = Trainer(recipe, place / f"{turn}-{steps}", Reporter(PlainConsole(quiet=True)), world)
            spent[steps] = spent_on(trainer.train)
        step = bare_step(recipe, place / f"{turn}-bare", world)
        for number in range(FEW):
            step(number)
        bare = spent_on(lambda step=step: [step(number) for number in range(FEW, MANY)])  # type: ignore[misc]
        ratios.append(((spent[MANY][0] - spent[FEW][0]) / bare[0] - 1, (spent[MANY][1] - spent[FEW][1]) / bare[1] - 1))
    clock, processor = (sorted(values) for values in zip(*ratios, strict=True))
    return in_words(clock), in_words(processor)


def in_words(ratios: list[float]) -> str:
    return f"{median(ratios):+.1%} ({ratios[len(ratios) // 4]:+.1%} to {ratios[-1 - len(ratios) // 4]:+.1%})"


def spent_on(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time of all threads."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def bare_step(recipe: Recipe, run: Path, world: World) -> Callable[[int], None]:
    trainer = Trainer(recipe, run, Reporter(PlainConsole(quiet=True)), world)
    phase, state = recipe.phases[0], trainer.state
    batches = [trainer.step_batch(number).micro_batches[0].to(world.device) for number in range(MANY)]
    weights = list(state.model.parameters())
    state.optimizers.set_rate(1e-3)

    def step(number: int) -> None:
        state.loss(batches[number]).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, phase.grad_clip, foreach=True)
        state.optimizers.step()
        state.optimizers.zero_grad()

    return step


def checkpoint(name: str, overrides: list[str], batch: int, place: Path, world: World) -> tuple[float, float, float]:
    """The wait of the loop, in steps; how much longer a step takes while the writing goes on; megabytes."""
    recipe = load_recipe("emoji", [*overrides, ONE_PHASE.format(steps=1000, batch=batch)])
    trainer = Trainer(recipe, place / name, Reporter(PlainConsole(quiet=True)), world)
    step_batch, phase, state = trainer.step_batch(0), recipe.phases[0], trainer.state

    def step() -> None:
        state.train_step(step_batch.micro_batches, 0, 1e-5, phase.grad_clip, trainer.guard).values()

    for _ in range(2):
        step()
    alone, waits, beside = [], [], []
    for _ in range(3):
        alone += [seconds_of(step) for _ in range(3)]
        waits.append(seconds_of(trainer.save))
        while trainer.checkpoints._thread is not None and trainer.checkpoints._thread.is_alive():
            beside.append(seconds_of(step))
        trainer.checkpoints.finish()
        trainer.step += 1
    size = sum(path.stat().st_size for path in next((place / name / "checkpoints").iterdir()).rglob("*") if path.is_file())
    usual = median(alone)
    return median(waits) / usual, (median(beside) if beside else usual) / usual, size / 1e6


def time_to_first_step(demo: list[str], place: Path) -> tuple[float, float]:
    """Seconds of the whole command until its first metrics, and of the imports alone."""
    run = place / "first"
    recipe = ["emoji", *demo, ONE_PHASE.format(steps=5000, batch=64), "record.metrics_every=1", "--out", str(run)]
    imports = seconds_of(lambda: subprocess.run([sys.executable, "-c", "import microdit.training.trainer"], check=True))
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "microdit", "train", *recipe], stdout=subprocess.DEVNULL)
    try:
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
        return time.perf_counter() - started, imports
    finally:
        process.kill()
        process.wait()


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
