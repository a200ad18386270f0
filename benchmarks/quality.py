"""What measuring quality costs beside a recipe's training.

    python benchmarks/quality.py emoji
    python benchmarks/quality.py emoji record.quality_samples=256 engine.device=cpu

Some steps of each phase are trained, and quality is measured three times, in one process. Times are those of the clock; of the three the
median. Shares are of the time that all steps of the recipe would take at that speed, without checkpoints and grids.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from microdit.config.load import load_recipe
from microdit.config.schema import Recipe
from microdit.distributed import World, start_world
from microdit.io.console import PlainConsole, Reporter
from microdit.training.trainer import Trainer
from microdit.training.validation import Quality

WINDOW = 30  # steps that are timed in each phase, after as many to warm up
NEVER = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides)
    world = start_world(recipe.engine.device)
    with tempfile.TemporaryDirectory() as place:
        quiet = [f"record.{key}={NEVER}" for key in ("samples_every", "checkpoint_every")]
        short = [f"phases.{index}.steps={2 * WINDOW}" for index in range(len(recipe.phases))]
        more = [*args.overrides, *quiet, *short, f"record.metrics_every={WINDOW}", "record.sample_prompts=[]", "record.quality_every=null"]
        trainer = Trainer(load_recipe(args.recipe, more), Path(place) / "run", Reporter(PlainConsole(quiet=True)), world)
        trainer.train()
        lines = [json.loads(line) for line in (Path(place) / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = training_seconds(recipe, lines)
    start, measuring = cost(trainer, recipe, world)
    record = recipe.record
    per_thousand = f"{1000 * seconds / recipe.total_steps:.1f} s per 1,000 steps"
    print(f"{f'training, {recipe.total_steps:,} steps':40} {seconds:8.1f} s   {per_thousand}")
    print(f"{'references, once at each start':40} {start:8.1f} s   {start / seconds:.1%} of the training")
    pictures = f"{record.quality_samples} pictures in {record.sample_steps} steps, each time"
    print(f"{pictures:40} {measuring:8.1f} s   {measuring / seconds:.1%}")


def training_seconds(recipe: Recipe, lines: list[dict[str, float]]) -> float:
    """Of the whole recipe, at the speed of the second half of the steps that each phase was trained for."""
    speeds = [line["images_per_second"] for line in lines if line["step"] % (2 * WINDOW) == 0]
    return sum(phase.steps * phase.batch_size / speed for phase, speed in zip(recipe.phases, speeds, strict=True))


def cost(trainer: Trainer, recipe: Recipe, world: World) -> tuple[float, float]:
    """Seconds at the start, and each time."""
    data = trainer.held_out.data if trainer.held_out else trainer.data
    started = time.monotonic()
    quality = Quality(data, recipe, trainer.state.objective, world)
    start = time.monotonic() - started
    return start, sorted(quality.measure(trainer.state.ema_model())["quality_seconds"] for _ in range(3))[1]


if __name__ == "__main__":
    main()
