"""What settings that save memory do to the losses of 500 steps of the recipe emoji, in batches of 8, beside a plain run: one seed.

    OMP_NUM_THREADS=2 python benchmarks/small_cards.py
    OMP_NUM_THREADS=2 python benchmarks/small_cards.py data.sets.emoji.path=elsewhere/emoji --ways int8

It prints the mean loss of the last 100 steps, the largest difference of a mean over 50 steps, whether the weights and the first average at
the end are the same to the last bit, and seconds. Settings in bfloat16 are compared with a run in bfloat16.
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from microdit.checkpoint import checkpoint_folders
from microdit.config.load import load_recipe
from microdit.distributed import start_world, stop_world
from microdit.io.console import PlainConsole, Reporter
from microdit.training.trainer import Trainer

RECIPE = "emoji"
SHORT = [
    *(f"phases.{number}.{setting}" for number in (0, 1) for setting in ("steps=250", "batch_size=8", "learning_rate=1e-3")),
    *("phases.0.warmup_steps=50", "record.metrics_every=1", "record.sample_prompts=[]", "record.checkpoint_every=500"),
]
WAYS = {
    "float32": [],
    "again, another seed": ["seed=1"],
    "int8": ["optimizer.moments=int8"],
    "averages_on_cpu": ["engine.averages_on_cpu=true"],
    "recomputed 0.5": ["engine.activation_checkpointing=0.5"],
    "bfloat16": ["engine.precision=bfloat16"],
    "bfloat16, released": ["engine.precision=bfloat16", "engine.release_gradients=true"],
    "bfloat16, released, 2 micro-batches": ["engine.precision=bfloat16", "engine.release_gradients=true", "engine.micro_batch=4"],
    "bfloat16, all of them": [
        *("engine.precision=bfloat16", "engine.release_gradients=true", "engine.averages_on_cpu=true"),
        *("engine.activation_checkpointing=0.5", "optimizer.moments=int8"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as data.sets.emoji.path=data/emoji")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    args = parser.parse_args()
    world = start_world("cpu")
    found: dict[str, tuple[list[float], dict[str, torch.Tensor]]] = {}
    print(f"{'':38}{'last 100':>10}{'most of 50':>12}{'bits':>8}{'seconds':>9}")
    for way in args.ways:
        recipe = load_recipe(RECIPE, [*SHORT, *WAYS[way], *args.overrides])
        with tempfile.TemporaryDirectory() as folder:
            run, started = Path(folder) / "run", time.perf_counter()
            Trainer(recipe, run, Reporter(PlainConsole(file=io.StringIO())), world).train()
            seconds = time.perf_counter() - started
            losses = [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
            newest = checkpoint_folders(run)[0]
            tensors = {f"{part}/{name}": x for part in ("model", "ema") for name, x in load_file(newest / f"{part}.safetensors").items()}
        found[way] = losses, tensors
        others = found.get("bfloat16" if way.startswith("bfloat16") else "float32")
        print(f"{way:38}{mean(losses[-100:]):>10.4f}{beside(found[way], others):>20}{seconds:>9.0f}", flush=True)
    stop_world()


def beside(ours: tuple[list[float], dict[str, torch.Tensor]], others: tuple[list[float], dict[str, torch.Tensor]] | None) -> str:
    if others is None or others is ours:
        return ""
    pairs = [(mean(ours[0][start : start + 50]), mean(others[0][start : start + 50])) for start in range(0, len(ours[0]), 50)]
    same = all(tensor.equal(others[1][name]) for name, tensor in ours[1].items())
    return f"{max(abs(a / b - 1) for a, b in pairs):>12.2%}{'same' if same else '':>8}"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
