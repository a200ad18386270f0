"""The leaderboard of the README, made from the results that are committed in docs/results.

    python benchmarks/leaderboard.py                        # print the table
    python benchmarks/leaderboard.py --write                # put it into README.md, between its two marks
    python benchmarks/leaderboard.py --record runs/emoji    # first write docs/results/emoji.json, of a finished run that was evaluated
    python benchmarks/leaderboard.py --record runs/a runs/b # of one recipe with several seeds: means, and deviations over the seeds

Record where the encoded data lies: FLOPs are counted on its shapes.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from microdit.config.load import load_recipe
from microdit.errors import UserError
from microdit.io.files import write_aside
from microdit.models.microdit import MicroDiT
from microdit.planning.workload import config_of, phase_flops, shapes_of
from microdit.reports.formats import count, duration, figure, money
from microdit.reports.run_folder import RunFolder

PROJECT = Path(__file__).parents[1]
RESULTS = PROJECT / "docs" / "results"
MARKS = ("<!-- leaderboard: python benchmarks/leaderboard.py --write -->\n", "<!-- end of the leaderboard -->\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="RUN", nargs="+", help="of one recipe, one for each seed")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.record:
        try:
            results = record(arguments.record)
        except UserError as error:
            raise SystemExit(str(error)) from error
        write_aside(RESULTS / f"{results[0]['name']}.json", json.dumps(results, indent=1).encode() + b"\n")
    table = leaderboard(RESULTS)
    print(table, end="")
    if arguments.write:
        readme = PROJECT / "README.md"
        write_aside(readme, with_table(readme.read_text(), table).encode())


def record(runs: list[Path]) -> list[dict[str, Any]]:
    """Raises UserError if they differ in more than their seeds."""
    results = [record_one(run) for run in runs]
    recipes = [load_recipe(run / "recipe.yaml") for run in runs]
    if any(replace(recipe, seed=0) != replace(recipes[0], seed=0) for recipe in recipes):
        raise UserError(f"{', '.join(map(str, runs))} are not of one recipe: their recipe.yaml may differ in their seeds alone.")
    if len({recipe.seed for recipe in recipes}) < len(recipes):
        raise UserError(f"{', '.join(map(str, runs))} have seeds {[recipe.seed for recipe in recipes]}: each needs its own.")
    return results


def record_one(run: Path) -> dict[str, Any]:
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
            f"The data of {run} is not here: start this where {', '.join(str(s.folder) for s in recipe.data.named_sets.values())} lies."
        )
    with torch.device("meta"):
        model = MicroDiT(config_of(recipe, shapes))
    against = _read(run / "evaluation" / "metrics.json")
    return {
        "name": recipe.name,
        "seed": recipe.seed,
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
    """Markdown, the best first; a file holds a recipe's runs, one for each seed."""
    recipes = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    recipes.sort(key=lambda runs: -mean(run["retrieval"]["top_10"] for run in runs))
    lines = [
        "| recipe | parameters | images seen | PFLOPs | time | cost | seeds | recognised, top 10 (top 1) | Frechet distance |",
        "|---|" + "---:|" * 8,
    ]
    for runs in recipes:
        result, distances = runs[0], [run["frechet_distance"] for run in runs if run["frechet_distance"]]
        shares = {rank: [run["retrieval"][rank] for run in runs] for rank in ("top_10", "top_1")}
        cells = [
            f"[{result['name']}](microdit/recipes/{result['name']}.yaml)",
            f"{result['parameters'] / 1e6:.1f} M",
            count(result["images_seen"]),
            figure(result["flops"] / 1e15, 3),
            duration(mean(run["seconds"] for run in runs)),
            money(result["dollars"]),
            str(len(runs)),
            f"{spread(shares['top_10'], '.1%')} ({mean(shares['top_1']):.1%})",
            f"{spread([d['value'] for d in distances], '.1f')} ({count(distances[0]['pictures'])} pictures)" if distances else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], form: str) -> str:
    """The mean, with the deviation where there are several."""
    return format(mean(values), form) + (f" ± {format(stdev(values), form)}" if len(values) > 1 else "")


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
