"""The commands for cost, speed and this machine: microdit budget, bench, doctor."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from microdit.cli.terminal import Device, TrainingDtype, console, progress, reporter
from microdit.errors import UserError
from microdit.io.console import joined, styled
from microdit.io.untrusted_text import printable

THIS, DEFAULT_CHIP = ("this", "cpu"), "h100"


def budget(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML recipe, a folder of them, or the name of a bundled one.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as phases.0.steps=100")] = None,
    chip: Annotated[
        str | None,
        typer.Option(
            help="A GPU such as h100, a100-80gb, rtx4090, or one from --prices; or this (also: cpu), the machine that this runs on. "
            "(default: this, if it has a GPU or the recipe was measured on it; else h100)"
        ),
    ] = None,
    gpus: Annotated[int, typer.Option("--count", help="Number of GPUs.")] = 1,
    price: Annotated[float | None, typer.Option(help="Dollars per GPU-hour. (default: from a dated table)")] = None,
    prices: Annotated[
        Path | None,
        typer.Option(help="Your own prices and chips, YAML: 'h100: 2.2', 'rtx5080: {teraflops: 112.6, memory_gb: 16, price: 0.3}'."),
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Fraction of the peak FLOP/s that is used. (default: as measured by microdit bench, else 0.32)")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, max=10**12, help="Number of images to encode. (default: those of the sets, else a million)")
    ] = None,
    dollars: Annotated[float | None, typer.Option(help="Instead of a recipe: plan a training run for this sum.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --dollars: folder to write the recipes to.")] = None,
    family: Annotated[
        Literal["lab", "paper"],
        typer.Option(
            help="With --dollars: the networks and phases to plan with. lab: what our studies favour, with reasons; paper: MicroDiT's."
        ),
    ] = "lab",
    data: Annotated[str, typer.Option(help="With --dollars: the encoded set that the recipes use.")] = "data/mine",
    latent_channels: Annotated[int | None, typer.Option(min=1, help="For data that is not encoded yet. (default: 4)")] = None,
    downsampling: Annotated[int | None, typer.Option(min=1, help="Pixels per latent along each side. (default: 8)")] = None,
    caption_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per caption. (default: 77)")] = None,
    caption_channels: Annotated[int | None, typer.Option(min=1, help="Width of a caption token. (default: 1024)")] = None,
    bench: Annotated[Path | None, typer.Option(help="Measurements file of microdit bench.")] = None,
    check: Annotated[
        Path | None, typer.Option(help="Instead of a recipe: show planned beside actual cost of this finished run, or folder of runs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Estimate what a recipe costs before running it: FLOPs, hours, dollars, memory, storage. No data is needed.

    On the machine that it runs on (--chip this), the bill is what 'microdit bench --recipe RECIPE' measured: steps of each phase, start,
    encoding, checkpoints, sample grids, held-out losses, evaluation. --check RUN compares a finished run with its plan.

    With --dollars, plan the model and schedule that a sum of money buys instead, as recipes ready to train. The sum pays for encoding
    the images (--images) first, and for training with the rest.

    Example: microdit budget microdit-xl --chip h100 --count 8 --price 2.5 --mfu 0.45

    Example: microdit bench --recipe emoji-fast && microdit budget emoji-fast

    Example: microdit budget --check runs/emoji-fast

    Example: microdit budget --dollars 500 --chip rtx4090 --out recipes/mine
    """
    import torch

    from microdit.config.load import load_recipes
    from microdit.config.schema import EngineRecipe
    from microdit.planning.estimate import estimate, find_all_timings, with_measured_times
    from microdit.planning.estimate_tables import print_estimate, print_plan
    from microdit.planning.hardware import find_machine, measurements_file, this_machine
    from microdit.planning.phases import FAMILIES
    from microdit.planning.planner import plan_for_dollars, write_recipes
    from microdit.planning.workload import KnownShapes

    if sum(item is not None for item in (recipe, dollars, check)) != 1:
        raise UserError(
            "Name a recipe, to see what it costs, or --dollars, to see what they buy, or --check and a run, to compare it with its plan: "
            "one of the three."
        )
    if check is not None:
        _check_run(check, as_json)
        return
    if dollars is None and out is not None:
        raise UserError("--out goes with --dollars: it is where the recipes that they buy are written.")
    given = KnownShapes(latent_channels, downsampling, caption_tokens, caption_channels)
    recipes = load_recipes(recipe, overrides) if recipe is not None else {}
    is_this = chip is not None and chip.lower() in THIS
    if is_this and gpus != 1:
        raise UserError(
            f"--chip {chip} is the one device that a training uses here: for --count {gpus}, name the GPU, such as --chip h100."
        )
    timings = find_all_timings(recipes, given) if recipes and (is_this or chip is None) and gpus == 1 and mfu is None else {}
    is_timed = bool(recipes) and timings.keys() == recipes.keys()
    is_here = is_this or is_timed or (chip is None and gpus == 1 and recipe is not None and torch.cuda.is_available())
    if is_here:
        engine = next(iter(recipes.values())).engine if recipes else EngineRecipe()
        machine = this_machine(engine.device, engine.precision, price, mfu, prices, bench or measurements_file())
    else:
        machine = find_machine(chip or DEFAULT_CHIP, gpus, price, mfu, prices, bench or measurements_file())
    plan = plan_for_dollars(dollars, machine, given, data, images, family=FAMILIES[family]) if dollars is not None else None
    recipes = plan.recipes if plan is not None else recipes
    estimated = estimate(recipes, machine, given, images)
    if is_timed:
        estimated = with_measured_times(estimated, recipes, timings, images)
    if out is not None and plan is not None:
        write_recipes(plan, out)
    if as_json:
        found = {**estimated.as_dict(), **({"plan": plan.as_dict()} if plan is not None else {})}
        print(printable(json.dumps(found, indent=1)))
        return
    if plan is None:
        print_estimate(estimated, console)
        if is_here and not is_timed:
            console.print(
                "Estimated from the peak of this machine. Start, checkpoints, sample grids and evaluation are not in it: microdit bench "
                f"--recipe {recipe} measures all of it.",
                soft_wrap=True,
            )
        elif chip is None and not is_here:
            console.print(f"To know what it takes on this machine: microdit bench --recipe {recipe}", soft_wrap=True)
    else:
        print_plan(plan, estimated, console)
        console.print(f"Written: microdit train {out}" if out else "Write it with --out FOLDER.")


def _check_run(run: Path, as_json: bool) -> None:
    """Print planned beside actual cost of finished runs."""
    from dataclasses import asdict

    from microdit.planning.bill import recorded_comparisons
    from microdit.planning.estimate_tables import print_comparison

    found = recorded_comparisons(run)
    if as_json:
        print(printable(json.dumps({name: asdict(one) for name, one in found.items()}, indent=1)))
        return
    for name, one in found.items():
        print_comparison(name, one, console)


def bench(
    overrides: Annotated[list[str] | None, typer.Argument(help="With --recipe: key=value, such as engine.micro_batch=8")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Time this recipe, or a folder of them, for microdit budget. (default: only the utilisation of MicroDiT_Tiny_2, 256 px, "
            "mask ratio 0.75)"
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Duration of the measurement of steps, shared by the recipes of a folder. Other parts add to it.")
    ] = 20.0,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Without --recipe: samples per step. (default: 256 on a GPU, 8 on a CPU)")
    ] = None,
    device: Device = "auto",
    dtype: TrainingDtype = "auto",
    file: Annotated[
        Path | None,
        typer.Option(help="Without --recipe: file to keep the result in. (default: microdit/bench.json in $XDG_STATE_HOME)"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --recipe: folder for a copy of the result, RECIPE.json.")] = None,
) -> None:
    """Measure training on this machine, and keep the result for microdit budget.

    With --recipe: what that very recipe takes here, in about a minute on a CPU. The trainer itself trains it for a moment: steps of each
    phase, start, checkpoints, sample grids, held-out losses, memory; then encoding and evaluation are timed. If the data is not encoded
    yet, random numbers take its place. Without: the model FLOPs utilisation (MFU) of a model of the paper, on random numbers.

    Example: microdit bench --recipe emoji-fast

    Example: microdit bench
    """
    from microdit.devices import device_errors_explained

    with device_errors_explained("take a smaller --micro-batch, or with --recipe engine.micro_batch"):
        if recipe is None:
            if overrides or out:
                raise UserError("key=value and --out go with --recipe: name the recipe that is to be measured.")
            _measure_utilisation(seconds, micro_batch, device, dtype, file)
        else:
            if micro_batch is not None or file is not None:
                raise UserError(
                    "--micro-batch and --file go without --recipe: take engine.micro_batch=N, and --out for a copy of the result."
                )
            chosen = [
                *([f"engine.device={device}"] if device != "auto" else []),
                *([f"engine.precision={dtype}"] if dtype != "auto" else []),
            ]
            _time_recipes(recipe, [*(overrides or []), *chosen], seconds, out)


def _measure_utilisation(seconds: float, micro_batch: int | None, device: str, dtype: str, file: Path | None) -> None:
    from microdit.config.load import engine_problems
    from microdit.devices import choose_dtype, describe_device
    from microdit.distributed import start_world, stop_world
    from microdit.planning.hardware import keep_measurement, measurements_file
    from microdit.planning.workload import assumed_shapes
    from microdit.training.benchmark import bench_recipe, measure

    world = start_world(device)
    chosen = bench_recipe(micro_batch, world.device, dtype)
    if problems := engine_problems(chosen.engine):
        raise UserError(" ".join(problems))
    console.print(describe_device(world.device, choose_dtype(chosen.engine.precision, world.device)))
    with progress(f"bench {chosen.name}", round(seconds)) as advance:
        found = measure(chosen, assumed_shapes(chosen), world, seconds, advance)
    stop_world()
    place = file or measurements_file()
    keep_measurement(found, place)
    console.print(
        joined(
            styled(f"{found.images_per_second:,.2f} images/s, MFU {found.utilisation:.1%}"),
            f" on {found.chip} in {found.precision}: {found.model}, micro-batch {found.micro_batch}, "
            f"against {found.peak / 1e12:.4g} TFLOP/s ({found.peak_source}). Kept in {place}.",
        ),
        soft_wrap=True,
    )


def _time_recipes(place: Path, overrides: list[str], seconds: float, out: Path | None) -> None:
    from microdit.config.load import load_recipes
    from microdit.devices import choose_dtype, describe_device
    from microdit.distributed import start_world, stop_world
    from microdit.planning.bill import bill_of
    from microdit.planning.estimate_tables import print_bill
    from microdit.planning.timings import conditions, keep_timings, timings_file
    from microdit.planning.workload import shapes_of
    from microdit.training.recipe_benchmark import time_training, with_encoding_and_evaluation

    recipes = load_recipes(place, overrides)
    engine = next(iter(recipes.values())).engine
    world = start_world(engine.device)
    console.print(describe_device(world.device, choose_dtype(engine.precision, world.device)))
    shapes = {name: shapes_of(recipe) for name, recipe in recipes.items()}
    trained = {name: time_training(recipe, shapes[name], world, seconds / len(recipes), reporter) for name, recipe in recipes.items()}
    for name, recipe in recipes.items():
        timings = with_encoding_and_evaluation(trained[name], recipe, shapes[name], world, reporter)
        where = conditions(recipe, shapes[name])
        keep_timings(timings, where, timings_file(where))
        if out is not None:
            keep_timings(timings, where, out / f"{name}.json")
        print_bill(recipe.name, bill_of(recipe, timings), console)
    stop_world()
    console.print(f"Kept for microdit budget {place}, and for the comparison at the end of microdit train {place}.", soft_wrap=True)


def doctor() -> None:
    """Say what this machine has and lacks: Python, torch and its build, GPUs, packages, disks, limits, and which recipes fit its memory.

    Paste it into a bug report: it holds no names, paths or keys.

    Example: microdit doctor
    """
    from microdit.planning.doctor import examine

    findings = examine(Path.cwd())
    width = max(len(finding.topic) for finding in findings) + 2
    for finding in findings:
        console.print(joined(styled(f"{finding.topic:{width}}", "bold"), finding.fact), soft_wrap=True)
        if finding.advice:
            console.print(joined(" " * width, styled("-> ", "yellow"), finding.advice), soft_wrap=True)
