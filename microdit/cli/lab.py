"""The commands for comparing training methods: microdit lab run, microdit lab report."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from microdit.cli.terminal import Device, console, reporter, warn
from microdit.errors import UserError
from microdit.io.console import joined, styled
from microdit.ranges import Range

lab_app = typer.Typer(no_args_is_help=True, help="Compare training methods at equal cost: studies of arms and seeds, and their reports.")


MINUTES = Range(0, 1_000_000)
Arms = Annotated[str | None, typer.Option(help="Only these arms, such as none,deferred. The reference arm must be one of them.")]


@lab_app.command()
def run(
    study: Annotated[Path, typer.Argument(help="A YAML study, such as lab/masking, which comes with microdit.")],
    out: Annotated[Path | None, typer.Option(help="Folder for results. (default: lab/NAME, or lab/NAME-cpu for the form for CPUs)")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the run folders of finished arms.")] = False,
    device: Device = "auto",
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Train so many arms at once, each in a process of its own.")] = 1,
    minutes: Annotated[float | None, typer.Option(help="Stop cleanly after so many minutes. Run again to continue.")] = None,
    arms: Arms = None,
) -> None:
    """Train every arm of a study with every seed at equal FLOPs and at equal time. Continues where it was stopped.

    A study may have a reduced form for CPUs (`on_cpu`), which is run where there is no GPU.

    Example: microdit lab run lab/masking --jobs 2

    Example: microdit lab run lab/faithful --device cuda --jobs 9 --minutes 8
    """
    from microdit.devices import choose_device
    from microdit.distributed import start_world
    from microdit.lab.run_study import run_study, stoppable
    from microdit.lab.side_by_side import run_side_by_side
    from microdit.lab.study import default_folder, load_study, only_arms

    if minutes is not None and not MINUTES.holds(minutes):
        raise UserError(f"--minutes is {minutes}: it must be {MINUTES}.")
    on_cpu = choose_device(device).type == "cpu"
    loaded, recipes = load_study(study, on_cpu)
    chosen = loaded if arms is None else only_arms(loaded, [arm.strip() for arm in arms.split(",")])
    folder = out or default_folder(loaded, on_cpu)
    with stoppable(minutes):
        if jobs == 1:
            run_study(chosen, recipes, folder, start_world(device), keep, reporter)
        else:
            options = ["--out", str(folder), "--device", device, *(["--keep"] if keep else []), *([] if arms is None else ["--arms", arms])]
            command = [sys.executable, "-m", "microdit", "lab", "run", str(study), *options]
            run_side_by_side(chosen, recipes, command, folder, jobs, reporter)
    console.print(joined("Results in ", styled(folder), f"; a report: microdit lab report {study} --out {folder}"))


@lab_app.command()
def report(
    study: Annotated[Path, typer.Argument(help="A study that was run or is still running.")],
    out: Annotated[Path | None, typer.Option(help="Folder of its results. (default: lab/NAME)")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder to write README.md and figures to. (default: docs/lab/NAME)")] = None,
) -> None:
    """Write a study's tables, figures and verdicts as Markdown.

    Example: microdit lab report lab/masking
    """
    from microdit.lab.equal_cost import check_unchanged, read_device, read_plan
    from microdit.lab.run_study import read_results
    from microdit.lab.study import default_folder, load_study, only_arms
    from microdit.lab.study_report import write_report

    loaded, _ = load_study(study)
    places = default_folder(loaded, on_cpu=False), default_folder(loaded, on_cpu=True)
    folder = out or next((place for place in places if place.is_dir()), places[0])
    results = read_results(folder, reporter)
    if not results:
        raise UserError(f"There are no results in {folder}: run the study first, microdit lab run {study}.")
    device = read_device(folder)
    loaded, recipes = load_study(study, on_cpu=device == "CPU")
    plans = read_plan(folder)
    strange = {line["arm"] for line in results} - plans.keys()
    if strange:
        raise UserError(f"{folder} holds results of {', '.join(sorted(strange))}, which its plan.json does not know: delete those lines.")
    missing = [arm for arm in loaded.arms if arm not in plans]
    if missing:
        warn(f"{folder} has no results yet of {', '.join(missing)}: the report leaves them out. Run them: microdit lab run {study}.")
    check_unchanged(loaded, recipes, folder)
    page = write_report(only_arms(loaded, plans), recipes, plans, results, device, folder, to or Path("docs/lab") / folder.name)
    console.print(styled(page))
