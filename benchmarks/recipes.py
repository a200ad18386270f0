"""What whole trainings cost beside each other: FLOPs by formula, seconds by steps timed in turns, in one run.

    python benchmarks/recipes.py emoji emoji-fast      # where their encoded data lies

Steps of each phase are timed; of twelve rounds the fastest counts: what others take from the machine only ever slows it.
Reading, recording and checkpoints are left out.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from microdit.config.load import load_recipe
from microdit.distributed import start_world
from microdit.io.console import PlainConsole, Reporter
from microdit.lab.equal_cost import flops_of_a_step, seconds_of_a_step
from microdit.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+", help="the first is what the others are compared with")
    paths = parser.parse_args().recipes
    with TemporaryDirectory() as place:
        world = start_world("cpu")
        trainers = {
            path.stem: Trainer(load_recipe(path), Path(place) / path.stem, Reporter(PlainConsole(quiet=True)), world) for path in paths
        }
        flops = {name: flops_of_a_step(trainer) * trainer.recipe.total_steps for name, trainer in trainers.items()}
        steps = seconds_of_a_step(trainers)
    seconds = {name: steps[name] * trainer.recipe.total_steps for name, trainer in trainers.items()}
    base = paths[0].stem
    print(f"{torch.get_num_threads()} threads")
    print("| recipe | steps | images | ms a step | seconds | share | TFLOPs | share |\n|---|" + "---:|" * 7)
    for name, trainer in trainers.items():
        recipe = trainer.recipe
        cells = [
            f"{recipe.total_steps:,}",
            f"{recipe.samples_before(recipe.total_steps):,}",
            f"{steps[name] * 1e3:.1f}",
            f"{seconds[name]:.0f}",
            f"{seconds[name] / seconds[base]:.2f}",
            f"{flops[name] / 1e12:.1f}",
            f"{flops[name] / flops[base]:.2f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
