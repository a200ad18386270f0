"""The leaderboard of the README, made from the results that are committed in docs/results.

    python benchmarks/leaderboard.py                        # print the table
    python benchmarks/leaderboard.py --write                # put it into README.md, between its two marks
    python benchmarks/leaderboard.py --record runs/emoji    # first write docs/results/emoji.json, of a finished run that was evaluated

Record where the encoded data lies: FLOPs are counted on its shapes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from microdit.budget.bill import config_of, phase_flops
from microdit.budget.shapes import shapes_of
from microdit.errors import UserError
from microdit.files import write_aside
from microdit.formats import count, duration, figure, money
from microdit.model.microdit import MicroDiT
from microdit.recipe_file import load_recipe
from microdit.run_folder import RunFolder

PROJECT = Path(__file__).parents[1]
RESULTS = PROJECT / "docs" / "results"
MARKS = ("<!-- leaderboard: python benchmarks/leaderboard.py --write -->\n", "<!-- end of the leaderboard -->\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="RUN")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.record:
        result = record(arguments.record)
        write_aside(RESULTS / f"{result['name']}.json", json.dumps(result, indent=1).encode() + b"\n")
    table = leaderboard(RESULTS)
    print(table, end="")
    if arguments.write:
        readme = PROJECT / "README.md"
        write_aside(readme, with_table(readme.read_text(), table).encode())


def record(run: Path) -> dict[str, Any]:
    """Raises UserError if the run is not finished, or was not evaluated."""
    folder = RunFolder(run)
    status = folder.status
    if status.get("state") != "finished":
        raise UserError(f"{run} is not finished: train it to its end first.")
    measured = _read(run / "metrics.json")
    if measured is None:
        raise UserError(f"{run} was not evaluated: microdit evaluate {run}")
    recipe = load_recipe(run / "recipe.yaml")
    shapes = shapes_of(recipe)
    if shapes.samples is None:
        raise UserError(
            f"The data of {run} is not here: start this where {', '.join(s.path for s in recipe.data.named_sets.values())} lies."
        )
    with torch.device("meta"):
        model = MicroDiT(config_of(recipe, shapes))
    against = _read(run / "evaluation" / "metrics.json")
    return {
        "name": recipe.name,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "images_seen": measured["images_seen"],
        "flops": sum(phase_flops(recipe, phase, shapes) for phase in recipe.phases),
        "seconds": status["gpu_hours"] * 3600,
        "dollars": status.get("dollars"),
        "device": folder.record["starts"][-1].get("device"),
        "sampler": measured["sampler"],
        "retrieval": measured["retrieval"],
        "retrieval_of_reconstructions": measured["retrieval_of_reconstructions"],
        "frechet_distance": against and {"pictures": against["pictures"], **_interval(against["metrics"]["fid"])},
    }


def leaderboard(folder: Path) -> str:
    """Markdown, the best first."""
    results = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    results.sort(key=lambda result: -result["retrieval"]["top_10"])
    lines = [
        "| recipe | parameters | images seen | PFLOPs | time | cost | recognised, top 10 (top 1) | Frechet distance |",
        "|---|" + "---:|" * 7,
    ]
    for result in results:
        shares, distance = result["retrieval"], result["frechet_distance"]
        cells = [
            f"[{result['name']}](recipes/{result['name']}.yaml)",
            f"{result['parameters'] / 1e6:.1f} M",
            count(result["images_seen"]),
            figure(result["flops"] / 1e15, 3),
            duration(result["seconds"]),
            money(result["dollars"]),
            f"{shares['top_10']:.1%} ({shares['top_1']:.1%})",
            "–" if distance is None else f"{figure(distance['value'])} ({count(distance['pictures'])} pictures)",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, table: str) -> str:
    """Raises ValueError if the marks are not there."""
    start, end = readme.index(MARKS[0]) + len(MARKS[0]), readme.index(MARKS[1])
    return f"{readme[:start]}\n{table}\n{readme[end:]}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _interval(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("value", "low", "high", "network")}


if __name__ == "__main__":
    main()
