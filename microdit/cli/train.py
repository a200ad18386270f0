"""The commands that train, and those that look at runs: microdit train, train-autoencoder, report, runs."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from microdit.cli.terminal import console, progress, reporter
from microdit.io.console import joined, styled


def train(
    recipe: Annotated[
        Path, typer.Argument(help="A YAML recipe, a folder of them (phases, in the order of their names), or a bundled one's name.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as phases.0.steps=100 seed=1")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/NAME]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint, if there is one.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume even though the recipe or the data has changed.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Dollars per GPU-hour, to show the money spent and still to be spent.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Short for engine.device=...: auto, cpu, cuda, cuda:N or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Short for engine.precision=...: auto, float32 or bfloat16.")] = None,
) -> None:
    """Train a recipe, phase by phase. The run folder receives metrics, sample grids and checkpoints.

    When it is asked to stop (such as before a spot machine is taken away), it saves a checkpoint and ends with exit code 75: start it again
    with --resume. Several GPUs or machines: torchrun --nproc-per-node 8 --max-restarts 3 -m microdit train ... --resume

    Example: microdit train emoji phases.0.batch_size=32 --out runs/try --device cuda:1

    Example: microdit train microdit-xl --resume --price-per-hour 2.5
    """
    from microdit.config.load import load_recipe, load_recipe_folder
    from microdit.config.recipes import find_recipe
    from microdit.devices import choose_dtype, describe_device, device_errors_explained
    from microdit.distributed import start_world, stop_world
    from microdit.training.multi_phase import RunSettings, train_one, train_phases

    settings = RunSettings(resume, accept_changes, price_per_hour)
    overrides = [*(overrides or []), *([f"engine.device={device}"] if device else []), *([f"engine.precision={dtype}"] if dtype else [])]
    recipe = find_recipe(recipe)
    is_chain = recipe.is_dir()
    recipes = load_recipe_folder(recipe, overrides) if is_chain else {"": load_recipe(recipe, overrides)}
    first = next(iter(recipes.values()))
    run = out or Path("runs") / (recipe.resolve().name if is_chain else first.name)
    world = start_world(first.engine.device)
    console.quiet = not world.is_main
    console.print(describe_device(world.device, choose_dtype(first.engine.precision, world.device)))
    with device_errors_explained("take a smaller engine.micro_batch, or engine.activation_checkpointing=true"):
        if is_chain:
            train_phases(recipes, run, settings, reporter, world)
            run /= list(recipes)[-1]
        else:
            train_one(first, run, settings, reporter, world)
    stop_world()
    last = list(recipes.values())[-1]
    prompts = last.record.sample_prompts[:2] or ["a prompt worded like your captions"]
    console.print(f"Trained. Pictures: microdit sample {shlex.join([str(run), *prompts])}", soft_wrap=True)


def train_autoencoder(
    out: Annotated[Path, typer.Option(help="Folder for config, weights and record.json.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps. The bundled autoencoder took 2,600.")] = 2600,
    latent_channels: Annotated[int, typer.Option(min=1)] = 8,
    seed: int = 0,
) -> None:
    """Train the small icon autoencoder (64 x 64 pixels to 8 x 8 latents) on the emoji, as the bundled one was."""
    from microdit.io.locks import sole_writer
    from microdit.training.train_autoencoder import AutoencoderSettings, train_icon_autoencoder

    settings = AutoencoderSettings(steps=steps, latent_channels=latent_channels, seed=seed)
    with sole_writer(out), progress("autoencoder", steps) as advance:
        figures = train_icon_autoencoder(out, settings, lambda step, metrics: advance(1, f"loss {metrics['loss']:.4f}"))
    console.print(figures)
    console.print(joined("Written to ", styled(out), f"; use it with: microdit data encode emoji --autoencoder {out} --out ..."))


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder of several phases' runs.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file to write. [default: RUN/report.html]")] = None,
) -> None:
    """Write one self-contained HTML page about a run: curves, pictures, cost, configuration. Works during training, too."""
    from microdit.reports.run_page import write_report

    console.print(styled(write_report(run, out)))


def runs(folder: Annotated[Path, typer.Argument(help="The folder that holds the run folders.")] = Path("runs")) -> None:
    """List the runs in a folder with their state, step, loss and cost."""
    from microdit.reports.run_table import list_runs, runs_table

    console.print(runs_table(list_runs(folder)))
