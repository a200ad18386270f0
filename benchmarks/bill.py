"""How near is the bill? Times recipes (microdit bench --recipe) and trains them in turns, and compares plan and run.

    python benchmarks/bill.py emoji-fast emoji-flow emoji microdit-dry                      # where their encoded data lies
    python benchmarks/bill.py emoji-fast --override phases.0.steps=100 --rounds 3 --out bill.json

Each round measures every recipe and then trains it, by the commands, in processes of their own with an empty cache, so that a plan never
rests on another round's measurement. Ratios are planned over actual. On a machine that does other work too, seconds of the clock say
little: with --cpu-seconds both sides count the CPU seconds of their process instead.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from microdit.config.recipes import find_recipe
from microdit.devices import processor_name
from microdit.io.files import write_aside
from microdit.planning.bill import Comparison, recorded_comparisons

ON_CPU_CLOCK = "--on-cpu-clock"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--override", action="append", default=[], help="key=value, for all recipes")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of microdit bench")
    parser.add_argument("--out", type=Path, help="JSON of all rounds")
    parser.add_argument("--cpu-seconds", action="store_true", help="of the process, in place of the clock")
    asked = parser.parse_args()
    rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(asked.rounds):
        for recipe in asked.recipes:
            rounds[recipe].append(one_round(recipe, asked.override, asked.seconds, asked.cpu_seconds))
            print(f"{recipe}: {rounds[recipe][-1]}", file=sys.stderr, flush=True)
    load = os.getloadavg()[2]
    print(f"{processor_name()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}, load of the last 15 minutes {load:.1f}")
    print("| recipe | planned s | actual s | planned/actual | memory, planned/actual |\n|---|---:|---:|---:|---:|")
    for recipe, found in rounds.items():
        seconds, memory = (", ".join(f"{one[key]:.2f}" for one in found) for key in ("ratio", "memory_ratio"))
        planned, actual = (median(one[key] for one in found) for key in ("planned", "actual"))
        print(f"| {recipe} | {planned:.1f} | {actual:.1f} | {seconds} | {memory} |")
    if asked.out is not None:
        machine = {
            "processor": processor_name(),
            "python": platform.python_version(),
            "load_15_min": load,
            "cpu_seconds": asked.cpu_seconds,
        }
        write_aside(asked.out, json.dumps({"machine": machine, "overrides": asked.override, "rounds": rounds}, indent=1).encode())


def one_round(recipe: str, overrides: list[str], seconds: float, cpu_seconds: bool) -> dict[str, Any]:
    """Measure a recipe, train it, and return the sums over its runs, with the parts."""
    with TemporaryDirectory() as place:
        run = Path(place) / "run"
        environment = {**os.environ, "XDG_CACHE_HOME": f"{place}/cache"}
        for command in (
            ["bench", "--recipe", recipe, "--seconds", str(seconds), *overrides],
            ["train", recipe, *overrides, "--out", str(run)],
        ):
            program = [__file__, ON_CPU_CLOCK] if cpu_seconds else ["-m", "microdit"]
            subprocess.run([sys.executable, *program, *command], check=True, env=environment, stdout=subprocess.DEVNULL)
        found = recorded_comparisons(run)
    assert len(found) == (len(list(find_recipe(recipe).glob("*.yaml"))) or 1), "every phase is finished"
    planned, actual = (sum(_known(one, side) for one in found.values()) for side in ("planned", "actual"))
    memory = [one.memory.ratio for one in found.values() if one.memory.ratio is not None]
    parts = {name: {row.what: (row.planned, row.actual) for row in one.parts} for name, one in found.items()}
    return {"planned": planned, "actual": actual, "ratio": planned / actual, "memory_ratio": median(memory), "parts": parts}


def _known(one: Comparison, side: str) -> float:
    seconds = getattr(one.total, side)
    assert seconds is not None, "a run that was measured before has a plan"
    return float(seconds)


def run_on_cpu_clock(arguments: list[str]) -> None:
    """Run a command of microdit that books the CPU seconds of this process, all of its threads, instead of those of the clock."""
    from microdit.cli.main import main as microdit
    from microdit.training import logging, recipe_benchmark, trainer

    clock = SimpleNamespace(monotonic=time.process_time, perf_counter=time.process_time, time=time.time)
    for module in (logging, recipe_benchmark, trainer):
        module.time = clock  # type: ignore[attr-defined]
    sys.argv = ["microdit", *arguments]
    microdit()


if __name__ == "__main__":
    if sys.argv[1:2] == [ON_CPU_CLOCK]:
        run_on_cpu_clock(sys.argv[2:])
    else:
        main()
