"""The commands for cost, speed and this machine: microdit budget, bench, doctor."""

import json
from pathlib import Path
from typing import Annotated

import typer

from microdit.cli.terminal import Device, TrainingDtype, console, progress
from microdit.errors import UserError
from microdit.io.console import joined, styled
from microdit.io.untrusted_text import printable


def budget(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML recipe, a folder of them, or the name of a bundled one.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as phases.0.steps=100")] = None,
    chip: Annotated[str, typer.Option(help="A GPU such as h100, a100-80gb, rtx4090, or one from --prices.")] = "h100",
    gpus: Annotated[int, typer.Option("--count", help="Number of GPUs.")] = 1,
    price: Annotated[float | None, typer.Option(help="Dollars per GPU-hour. [default: from a dated table]")] = None,
    prices: Annotated[
        Path | None,
        typer.Option(help="Your own prices and chips, YAML: 'h100: 2.2', 'rtx5080: {teraflops: 112.6, memory_gb: 16, price: 0.3}'."),
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Fraction of the peak FLOP/s that is used. [default: as measured by microdit bench, else 0.32]")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, max=10**12, help="Number of images to encode. [default: those of the sets, else a million]")
    ] = None,
    dollars: Annotated[float | None, typer.Option(help="Instead of a recipe: plan a training run for this sum.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --dollars: folder to write the recipes to.")] = None,
    data: Annotated[str, typer.Option(help="With --dollars: the encoded set that the recipes use.")] = "data/mine",
    latent_channels: Annotated[int | None, typer.Option(min=1, help="For data that is not encoded yet. [default: 4]")] = None,
    downsampling: Annotated[int | None, typer.Option(min=1, help="Pixels per latent along each side. [default: 8]")] = None,
    caption_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per caption. [default: 77]")] = None,
    caption_channels: Annotated[int | None, typer.Option(min=1, help="Width of a caption token. [default: 1024]")] = None,
    bench: Annotated[Path | None, typer.Option(help="Measurements file of microdit bench.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Estimate what a recipe costs before running it: FLOPs, hours, dollars, memory, storage. No data is needed.

    With --dollars, plan the model and schedule that a sum of money buys instead, as recipes ready to train. The sum pays for encoding
    the images (--images) first, and for training with the rest.

    Example: microdit budget microdit-xl --chip h100 --count 8 --price 2.5 --mfu 0.45

    Example: microdit budget --dollars 500 --chip rtx4090 --out recipes/mine
    """
    from microdit.config.load import load_recipes
    from microdit.planning.estimate import estimate
    from microdit.planning.estimate_tables import print_estimate, print_plan
    from microdit.planning.hardware import find_machine, measurements_file
    from microdit.planning.planner import plan_for_dollars, write_recipes
    from microdit.planning.workload import KnownShapes

    if (recipe is None) == (dollars is None):
        raise UserError("Name a recipe, to see what it costs, or --dollars, to see what they buy: one of the two.")
    if dollars is None and out is not None:
        raise UserError("--out goes with --dollars: it is where the recipes that they buy are written.")
    machine = find_machine(chip, gpus, price, mfu, prices, bench or measurements_file())
    given = KnownShapes(latent_channels, downsampling, caption_tokens, caption_channels)
    plan = plan_for_dollars(dollars, machine, given, data, images) if dollars is not None else None
    recipes = plan.recipes if plan is not None else load_recipes(recipe, overrides) if recipe is not None else {}
    estimated = estimate(recipes, machine, given, images)
    if out is not None and plan is not None:
        write_recipes(plan, out)
    if as_json:
        found = {**estimated.as_dict(), **({"plan": plan.as_dict()} if plan is not None else {})}
        print(printable(json.dumps(found, indent=1)))
        return
    if plan is None:
        print_estimate(estimated, console)
    else:
        print_plan(plan, estimated, console)
        console.print(f"Written: microdit train {out}" if out else "Write it with --out FOLDER.")


def bench(
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe whose first phase is measured. [default: MicroDiT_Tiny_2, 256 px, mask ratio 0.75]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Duration of the measurement, after two warm-up steps.")] = 20.0,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Samples per step. [default: the recipe's; else 256 on a GPU, 8 on a CPU]")
    ] = None,
    device: Device = "auto",
    dtype: TrainingDtype = "auto",
    file: Annotated[Path | None, typer.Option(help="File to keep the result in. [default: microdit/bench.json in $XDG_STATE_HOME]")] = None,
) -> None:
    """Measure the model FLOPs utilisation (MFU) of training on this machine, and keep it for the estimates of microdit budget.

    Runs the trainer's own training steps on random numbers. No data is needed.

    Example: microdit bench

    Example: microdit bench --recipe microdit-xl/1-256-masked --micro-batch 64
    """
    from microdit.config.load import engine_problems
    from microdit.devices import choose_dtype, describe_device, device_errors_explained
    from microdit.distributed import start_world, stop_world
    from microdit.planning.hardware import keep_measurement, measurements_file
    from microdit.planning.workload import assumed_shapes, shapes_of
    from microdit.training.benchmark import bench_recipe, measure

    world = start_world(device)
    chosen = bench_recipe(recipe, micro_batch, world.device, dtype)
    if problems := engine_problems(chosen.engine):
        raise UserError(" ".join(problems))
    console.print(describe_device(world.device, choose_dtype(chosen.engine.precision, world.device)))
    shapes = assumed_shapes(chosen) if recipe is None else shapes_of(chosen)
    fix = f"{chosen.phases[0].batch_size} samples at a time are too many, take a smaller --micro-batch"
    with device_errors_explained(fix), progress(f"bench {chosen.name}", round(seconds)) as advance:
        found = measure(chosen, shapes, world, seconds, advance)
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
