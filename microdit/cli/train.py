"""The commands that train, and those that look at runs: microdit train, train-autoencoder, report, runs."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from microdit.cli.terminal import Device, console, progress, reporter
from microdit.errors import UserError
from microdit.io.console import joined, styled


def train(
    recipe: Annotated[
        Path, typer.Argument(help="A YAML recipe, a folder of them (phases, in the order of their names), or a bundled one's name.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as phases.0.steps=100 seed=1")] = None,
    out: Annotated[
        str | None, typer.Option(help="Run folder, or a place in an object store, such as s3://BUCKET/runs/NAME. (default: runs/NAME)")
    ] = None,
    workspace: Annotated[
        Path | None,
        typer.Option(help="Local folder of a run in an object store: checkpoints are written there first. (default: the cache)"),
    ] = None,
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
    """Train a recipe, phase by phase. The run folder receives metrics, sample grids and checkpoints. It may be a place in an object store:
    then each machine works in a folder of its own, and another machine continues with --resume.

    When it is asked to stop (such as before a spot machine is taken away), it saves a checkpoint and ends with exit code 75: start it again
    with --resume. Several GPUs or machines: torchrun --nproc-per-node 8 --max-restarts 3 -m microdit train ... --resume

    Example: microdit train emoji phases.0.batch_size=32 --out runs/try --device cuda:1

    Example: microdit train microdit-xl --resume --price-per-hour 2.5

    Example: microdit train my-recipe.yaml --out s3://BUCKET/runs/mine --resume
    """
    from microdit.config.load import load_recipe, load_recipe_folder
    from microdit.config.recipes import find_recipe
    from microdit.devices import choose_dtype, describe_device, device_errors_explained
    from microdit.distributed import start_world, stop_world
    from microdit.io.places import location
    from microdit.reports.run_folder import is_run
    from microdit.training.multi_phase import RunSettings, default_run_folder, train_one, train_phases

    settings = RunSettings(resume, accept_changes, price_per_hour, workspace)
    overrides = [*(overrides or []), *([f"engine.device={device}"] if device else []), *([f"engine.precision={dtype}"] if dtype else [])]
    recipe = find_recipe(recipe)
    is_chain = recipe.is_dir()
    if is_chain and is_run(recipe):
        quoted = shlex.quote(str(recipe))
        raise UserError(
            f"{recipe} is a run. To continue it: microdit train {quoted}/recipe.yaml --out {quoted} --resume. To train its recipe anew, "
            "name another --out."
        )
    recipes = load_recipe_folder(recipe, overrides) if is_chain else {"": load_recipe(recipe, overrides)}
    first = next(iter(recipes.values()))
    run = location(out) if out else default_run_folder(recipe.resolve().name if is_chain else first.name)
    if workspace is not None and isinstance(run, Path):
        raise UserError("--workspace is for runs in an object store: name such a place with --out, or leave it out.")
    world = start_world(first.engine.device)
    console.quiet = not world.is_main
    console.print(describe_device(world.device, choose_dtype(first.engine.precision, world.device)))
    with device_errors_explained("take a smaller engine.micro_batch, or engine.activation_checkpointing=true"):
        if is_chain:
            train_phases(recipes, run, settings, reporter, world)
            run = run / list(recipes)[-1]
        else:
            train_one(first, run, settings, reporter, world)
    stop_world()
    last = list(recipes.values())[-1]
    prompts = last.record.sample_prompts[:2] or ["a prompt worded like your captions"]
    console.print(f"Trained. Pictures: microdit sample {shlex.join([str(run), *prompts])}", soft_wrap=True)


def train_autoencoder(
    out: Annotated[Path, typer.Option(help="Folder for config, weights and record.json.")],
    source: Annotated[str | None, typer.Argument(help="As for data encode. (default: the emoji, as for the bundled autoencoder)")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Begin with the weights of an autoencoder: icon, or a folder. (default: from scratch)")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps. The bundled autoencoder took 2,600.")] = 2600,
    latent_channels: Annotated[int, typer.Option(min=1, help="Channels of the latents, without --from.")] = 8,
    resolution: Annotated[int, typer.Option(min=16, help="Side of the training pictures of a source, in pixels.")] = 64,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Train a small autoencoder (8 x 8 pixels to one latent) on a source, from scratch or from weights that exist.

    It is for pictures that come back poorly from the autoencoders at hand ('data look --autoencoder NAME' shows that), and is used by
    naming its folder: --autoencoder DIR. If it was interrupted, the same command continues.

    Without a source, the icon autoencoder (64 x 64 pixels to 8 x 8 latents) is trained on the emoji, as the bundled one was.

    Example: microdit train-autoencoder my-pictures --from icon --out data/autoencoder
    """
    from microdit.data.sources.open import open_source
    from microdit.devices import choose_device
    from microdit.io.locks import sole_writer
    from microdit.training.train_autoencoder import (
        PERCEPTUAL_WEIGHT,
        RATE_FROM_WEIGHTS,
        AutoencoderSettings,
        train_icon_autoencoder,
        train_on_source,
    )

    if source is None and start is not None:
        raise UserError("--from is for training on a source: name one, such as a folder of pictures.")
    settings = AutoencoderSettings(steps=steps, latent_channels=latent_channels, seed=seed)
    with sole_writer(out):
        if source is None:
            with progress("autoencoder", steps) as advance:
                figures = train_icon_autoencoder(out, settings, lambda step, losses: advance(1, f"loss {losses['loss']:.4f}"))
        else:
            rate = settings.learning_rate if start is None else RATE_FROM_WEIGHTS
            settings = replace(settings, image_size=resolution, learning_rate=rate, perceptual_weight=PERCEPTUAL_WEIGHT)
            figures = train_on_source(open_source(source), out, settings, start, choose_device(device), reporter)
    console.print(figures)
    use = f"microdit data encode {source or 'emoji'} --autoencoder {out} --out ..."
    console.print(joined("Written to ", styled(out), f"; use it with: {use}"))


def report(
    run: Annotated[str, typer.Argument(help="A run folder, or a folder of several phases' runs; either may be in an object store.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file to write. (default: RUN/report.html; for a run in a store, NAME-report.html)")
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run: curves, pictures, cost, configuration. Works during training, too.

    Example: microdit report runs/emoji
    """
    from microdit.io.places import is_remote
    from microdit.reports.remote_run import fetched_record
    from microdit.reports.run_page import write_report

    folder = fetched_record(run)
    if is_remote(run):
        out = out or Path(f"{folder.name}-report.html")
    console.print(styled(write_report(folder, out)))


def runs(
    folder: Annotated[str, typer.Argument(help="The folder that holds the run folders, or a place in an object store.")] = "runs",
) -> None:
    """List the runs in a folder with their state, step, loss and cost.

    Example: microdit runs
    """
    from microdit.reports.remote_run import SUMMARY, fetched_record
    from microdit.reports.run_table import list_runs, runs_table

    console.print(runs_table(list_runs(fetched_record(folder, SUMMARY))))
