"""How near is the bill? Times recipes (microdit bench --recipe) and trains them in turns, and compares plan and run.

    python benchmarks/bill.py emoji-fast emoji-flow emoji microdit-dry                      # where their encoded data lies
    python benchmarks/bill.py emoji-fast --override phases.0.steps=100 --rounds 3 --out bill.json

Each round measures every recipe and then trains it, by the commands, in processes of their own with an empty cache, so that a plan never
rests on another round's measurement. Ratios are planned over actual; on a machine that does other work too, they differ between rounds.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from microdit.config.recipes import find_recipe
from microdit.devices import processor_name
from microdit.io.files import write_aside
from microdit.planning.bill import Comparison, recorded_comparisons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--override", action="append", default=[], help="key=value, for all recipes")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of microdit bench")
    parser.add_argument("--out", type=Path, help="JSON of all rounds")
    asked = parser.parse_args()
    rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(asked.rounds):
        for recipe in asked.recipes:
            rounds[recipe].append(one_round(recipe, asked.override, asked.seconds))
            print(f"{recipe}: {rounds[recipe][-1]}", file=sys.stderr, flush=True)
    load = os.getloadavg()[2]
    print(f"{processor_name()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}, load of the last 15 minutes {load:.1f}")
    print("| recipe | planned s | actual s | planned/actual | memory, planned/actual |\n|---|---:|---:|---:|---:|")
    for recipe, found in rounds.items():
        seconds, memory = (", ".join(f"{one[key]:.2f}" for one in found) for key in ("ratio", "memory_ratio"))
        planned, actual = (median(one[key] for one in found) for key in ("planned", "actual"))
        print(f"| {recipe} | {planned:.1f} | {actual:.1f} | {seconds} | {memory} |")
    if asked.out is not None:
        machine = {"processor": processor_name(), "python": platform.python_version(), "load_15_min": load}
        write_aside(asked.out, json.dumps({"machine": machine, "overrides": asked.override, "rounds": rounds}, indent=1).encode())


def one_round(recipe: str, overrides: list[str], seconds: float) -> dict[str, Any]:
    """Measure a recipe, train it, and return the sums over its runs, with the parts."""
    with TemporaryDirectory() as place:
        run = Path(place) / "run"
        environment = {**os.environ, "XDG_CACHE_HOME": f"{place}/cache"}
        for command in (
            ["bench", "--recipe", recipe, "--seconds", str(seconds), *overrides],
            ["train", recipe, *overrides, "--out", str(run)],
        ):
            subprocess.run([sys.executable, "-m", "microdit", *command], check=True, env=environment, stdout=subprocess.DEVNULL)
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


if __name__ == "__main__":
    main()
