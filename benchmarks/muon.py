"""What Muon costs on this machine: a step of ours beside PyTorch's and beside a whole training step of a recipe with AdamW, in one run.

python benchmarks/muon.py recipes/emoji.yaml      # where its encoded data lies
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from microdit.distributed import start_world
from microdit.lab.plan import stepper
from microdit.recipe_file import load_recipe
from microdit.training.muon import CPUMuon
from microdit.training.trainer import Trainer

ROUNDS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    with TemporaryDirectory() as place:
        recipe = load_recipe(parser.parse_args().recipe, ["optimizer.method=adamw"])
        trainer = Trainer(recipe, Path(place) / "run", Console(quiet=True), start_world("cpu"))
        training = stepper(trainer)
        training()
        matrices = [weight for block in trainer.state.model.all_blocks for weight in block.parameters() if weight.dim() == 2]
        for weight in matrices:
            weight.grad = torch.randn_like(weight)
        steps = {
            "a training step with AdamW": training,
            "Muon, ours, in float32": CPUMuon(matrices, lr=0.0).step,
            "Muon, PyTorch's, in bfloat16": torch.optim.Muon(matrices, lr=0.0).step,
        }
        times = {name: [_seconds(step) for _ in range(ROUNDS)] for name, step in steps.items()}
    for name, seconds in times.items():
        print(f"{name:30} {min(seconds) * 1e3:8.1f} ms")


def _seconds(step: object) -> float:
    started = time.perf_counter()
    step()  # type: ignore[operator]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
