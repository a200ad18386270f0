"""The table of docs/lab/README.md: every claim of every study that was run, and whether it holds, from the results in docs/lab.

python benchmarks/lab_claims.py           # print it
python benchmarks/lab_claims.py --write   # put it into docs/lab/README.md, between its two marks
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

from microdit.config.recipes import RECIPES
from microdit.io.files import write_aside
from microdit.lab.claims import check_claims, holm, relative_deviation, without_jumps
from microdit.lab.equal_cost import read_plan
from microdit.lab.run_study import read_results
from microdit.lab.study import Study, load_study
from microdit.lab.study_report import claim_cells

PROJECT = Path(__file__).parents[1]
LAB = PROJECT / "docs" / "lab"
MARKS = ("<!-- claims: python benchmarks/lab_claims.py --write -->\n", "<!-- end of the claims -->\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    table = claims(studies())
    print(table)
    print(f"\nStandard deviation over seeds, relative to the mean, over all studies: {usual_spread():.3f}")
    if arguments.write:
        page = LAB / "README.md"
        write_aside(page, with_table(page.read_text(), table).encode())


def studies() -> list[Study]:
    """Those that were run: the one of the headline first, the others by name."""
    names = sorted((folder.parent.name for folder in LAB.glob("*/results.jsonl")), key=lambda name: (name != "masking", name))
    found = []
    for name in names:  # NAME-cpu holds the results of a study's form for CPUs
        path = RECIPES / "lab" / f"{name.removesuffix('-cpu')}.yaml"
        if path.is_file():
            found.append(replace(load_study(path, on_cpu=name.endswith("-cpu"))[0], name=name))
    return found


def claims(asked: list[Study]) -> str:
    """One row a claim; then the arms that are one training under several names."""
    rows = ["| study | claim | measured here | holds? |", "|---|---|---|---|"]
    outcomes = [
        (study.name, outcome)
        for study in asked
        for outcome in check_claims(study, read_plan(LAB / study.name), read_results(LAB / study.name))
    ]
    corrected = holm([outcome.chance for _, outcome in outcomes])
    for (name, outcome), chance in zip(outcomes, corrected, strict=True):
        rows.append(f"| [{name}]({name}/README.md) | {' | '.join(claim_cells(outcome, chance))} |")
    same = [" = ".join(arms) for arms in shared_arms(asked)]
    lines = [f"One training under several names, so no independent evidence: {'; '.join(same)}."] if same else []
    return "\n".join([*rows, "", *lines])


def usual_spread() -> float:
    """The relative deviation of the Frechet distance, pooled over the studies with several seeds; each study counts once."""
    found = [
        spread
        for study in studies()
        if (
            spread := relative_deviation(
                read_plan(LAB / study.name), without_jumps(read_results(LAB / study.name)), "images", "frechet_distance"
            )
        )
    ]
    return math.sqrt(sum(spread**2 for spread in found) / len(found))


def shared_arms(asked: list[Study]) -> list[list[str]]:
    """Arms of different studies with the same readings to the last digit."""
    seen: dict[tuple[float, ...], list[str]] = {}
    for study in asked:
        lines = read_results(LAB / study.name)
        for arm in study.arms:
            found = {line["seed"]: line for line in lines if line["arm"] == arm and not line.get("diverged")}
            if 0 in found:
                seen.setdefault((found[0]["held_out_loss"], found[0]["frechet_distance"]), []).append(f"{arm} of {study.name}")
    return [arms for arms in seen.values() if len(arms) > 1]


def with_table(page: str, table: str) -> str:
    """Raises ValueError if the marks are not there."""
    start, end = page.index(MARKS[0]) + len(MARKS[0]), page.index(MARKS[1])
    return f"{page[:start]}\n{table}\n{page[end:]}"


if __name__ == "__main__":
    main()
