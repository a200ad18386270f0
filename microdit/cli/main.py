"""The command line. Each command is a few lines that call the package; those about data, pictures, evaluation have files of their own."""

import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from microdit.cli.data import data_app
from microdit.cli.evaluate import compare, draw, evaluate, geneval, prefer
from microdit.cli.export import export, import_official
from microdit.cli.lab import lab_app
from microdit.cli.plan import bench, budget
from microdit.cli.recipes import recipes
from microdit.cli.sample import grid, sample
from microdit.cli.serve import app as web_page
from microdit.cli.terminal import console, print_traceback, progress, take_logs
from microdit.errors import StoppedError, UserError
from microdit.io.console import PlainConsole, joined, styled
from microdit.process_limits import raise_limit

OLDEST_TORCH = (2, 9)  # as pyproject.toml says

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, help=(
    "Train text-to-image diffusion transformers from scratch on a micro-budget.\n\n"
    "In order: [bold]data encode[/] once, [bold]train[/] a recipe, [bold]sample[/] pictures, [bold]evaluate[/] them."
))  # fmt: skip
app.add_typer(data_app, name="data")
app.add_typer(lab_app, name="lab")


def main() -> None:
    """Entry point: mistakes that are the user's end in one sentence and exit code 1."""
    take_logs()
    raise_limit()
    try:
        _refuse_old_torch()
        app(args=_repeat_option(sys.argv[1:], "--resolutions"))
    except UserError as error:
        rank = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        title = styled("Stopped:", "yellow") if isinstance(error, StoppedError) else styled("Error:", "bold red")
        PlainConsole(stderr=True).print(joined(title, f"{rank} {error}"), soft_wrap=True)
        code = error.exit_code if isinstance(error, StoppedError) else 1
        # At once: threads that hang, and other processes that may never answer, are not waited for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except Exception:
        print_traceback()
        sys.exit(1)


def _refuse_old_torch() -> None:
    """Before anything of it is imported, which would end in a traceback."""
    found = version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        raise UserError(f"microdit needs torch {wanted} or newer, and {found} is installed: pip install --upgrade torch.")


def _repeat_option(arguments: list[str], option: str) -> list[str]:
    """`--resolutions 256 512` -> `--resolutions 256 --resolutions 512`, the only form that click knows."""
    spread: list[str] = []
    for argument in arguments:
        if argument.isdigit() and len(spread) >= 2 and spread[-2] == option and spread[-1].isdigit():
            spread.append(option)
        spread.append(argument)
    return spread


@app.command("train-autoencoder")
def train_autoencoder(
    out: Annotated[Path, typer.Option(help="Folder to write config, weights and record.json to.")],
    steps: Annotated[int, typer.Option(min=1, help="2,600 made the bundled one.")] = 2600,
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


@app.command()
def train(
    recipe: Annotated[
        Path,
        typer.Argument(help="A YAML recipe, a folder of them (phases, in the order of their names), or a bundled one's name."),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as phases.0.steps=100 seed=1")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/NAME]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint, if there is one.")] = False,
    accept_changes: Annotated[bool, typer.Option("--accept-changes", help="Resume though the recipe or the data changed.")] = False,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Dollars of a GPU-hour: shows what is spent and to go.")] = None,
    device: Annotated[str | None, typer.Option(help="Short for engine.device=...: auto, cpu, cuda, cuda:N or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Short for engine.precision=...: auto, float32 or bfloat16.")] = None,
) -> None:
    """Train a recipe: its phases in turn, with metrics, sample grids and checkpoints in the run folder.

    Asked to stop (a spot notice), it saves and ends with exit code 75, which means: start me again with --resume. Several GPUs or
    machines: torchrun --nproc-per-node 8 --max-restarts 3 -m microdit train ... --resume

    Example: microdit train emoji phases.0.batch_size=32 --out runs/try --device cuda:1

    Example: microdit train microdit-xl --resume --price-per-hour 2.5
    """
    from microdit.config.load import load_recipe, load_recipe_folder
    from microdit.config.recipes import find_recipe
    from microdit.devices import choose_dtype, device_errors_explained, in_words
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
    console.print(in_words(world.device, choose_dtype(first.engine.precision, world.device)))
    with device_errors_explained("take a smaller engine.micro_batch, or engine.activation_checkpointing=true"):
        if is_chain:
            train_phases(recipes, run, settings, console, world)
            run /= list(recipes)[-1]
        else:
            train_one(first, run, settings, console, world)
    stop_world()
    console.print(f'Trained. Pictures: microdit sample {run} "red heart"')


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder of several phases' runs.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file to write. [default: RUN/report.html]")] = None,
) -> None:
    """Make one self-contained HTML page of a run: curves, pictures, cost, configuration. Works while it is training, too."""
    from microdit.reports.run_page import write_report

    console.print(styled(write_report(run, out)))


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="Where the run folders lie.")] = Path("runs")) -> None:
    """List runs with their state, step, loss and cost."""
    from microdit.reports.run_table import list_runs, runs_table

    console.print(runs_table(list_runs(folder)))


for command in (recipes, grid, budget, bench, evaluate, draw, prefer, geneval, compare, export):
    app.command()(command)
app.command(no_args_is_help=True)(sample)
app.command("app")(web_page)
app.command("import-official")(import_official)


if __name__ == "__main__":
    main()
