"""The commands for comparing training methods: microdit lab run, microdit lab report."""

from pathlib import Path
from typing import Annotated

import typer

from microdit.cli.terminal import console, reporter
from microdit.errors import UserError
from microdit.io.console import joined, styled

lab_app = typer.Typer(no_args_is_help=True, help="Compare training methods at equal cost: studies of arms and seeds, and their reports.")


@lab_app.command()
def run(
    study: Annotated[Path, typer.Argument(help="A YAML study, such as lab/masking, which comes with microdit.")],
    out: Annotated[Path | None, typer.Option(help="Folder for results. [default: lab/NAME]")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the run folders of finished arms.")] = False,
) -> None:
    """Train every arm of a study with every seed at equal FLOPs and at equal time. Continues where it was stopped.

    Example: microdit lab run lab/masking

    Small models leave cores idle: start the same command several times, with OMP_NUM_THREADS=1, and the processes share the work.
    """
    from microdit.distributed import start_world
    from microdit.lab.run_study import run_study
    from microdit.lab.study import load_study

    loaded, recipes = load_study(study)
    folder = out or Path("lab") / loaded.name
    run_study(loaded, recipes, folder, start_world(recipes[loaded.reference.arm].engine.device), keep, reporter)
    place = "" if out is None else f" --out {out}"
    console.print(joined("Results in ", styled(folder), f"; a report: microdit lab report {study}{place}"))


@lab_app.command()
def report(
    study: Annotated[Path, typer.Argument(help="A study that was run or is still running.")],
    out: Annotated[Path | None, typer.Option(help="Folder of its results. [default: lab/NAME]")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder to write README.md and figures to. [default: docs/lab/NAME]")] = None,
) -> None:
    """Write a study's tables, figures and verdicts as Markdown."""
    from microdit.lab.equal_cost import check_unchanged, read_plan
    from microdit.lab.run_study import read_results
    from microdit.lab.study import load_study
    from microdit.lab.study_report import write_report

    loaded, recipes = load_study(study)
    folder = out or Path("lab") / loaded.name
    results = read_results(folder, reporter)
    if not results:
        raise UserError(f"There are no results in {folder}: run the study first, microdit lab run {study}.")
    plans = read_plan(folder)
    new = [arm for arm in loaded.arms if arm not in plans]
    if new:
        raise UserError(f"{folder} has no results yet of {', '.join(new)}, which {study} has now: microdit lab run {study}.")
    check_unchanged(loaded, recipes, folder)
    page = write_report(loaded, recipes, plans, results, folder, to or Path("docs/lab") / loaded.name)
    console.print(styled(page))
