"""What Muon costs on this machine: a step of ours beside PyTorch's and beside a whole training step of a recipe with AdamW, in one run.

python benchmarks/muon.py emoji      # where its encoded data lies
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from microdit.config.load import load_recipe
from microdit.config.schema import OptimizerRecipe
from microdit.distributed import start_world
from microdit.io.console import PlainConsole, Reporter
from microdit.lab.equal_cost import stepper
from microdit.training.optim import Optimizers
from microdit.training.trainer import Trainer

ROUNDS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    with TemporaryDirectory() as place:
        recipe = load_recipe(parser.parse_args().recipe, ["optimizer.method=adamw"])
        trainer = Trainer(recipe, Path(place) / "run", Reporter(PlainConsole(quiet=True)), start_world("cpu"))
        ours = Optimizers(trainer.state.model, OptimizerRecipe(method="muon")).all[1]
        matrices = ours.param_groups[0]["params"]
        times = {"a training step with AdamW": _fastest(stepper(trainer))}
        for weight in matrices:  # a training step leaves none behind
            weight.grad = torch.randn_like(weight)
        times["Muon, ours, in float32"] = _fastest(ours.step)
        times["Muon, PyTorch's, in bfloat16"] = _fastest(torch.optim.Muon(matrices, lr=0.0, adjust_lr_fn="match_rms_adamw").step)
    for name, seconds in times.items():
        print(f"{name:30} {seconds * 1e3:8.1f} ms")


def _fastest(step: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
