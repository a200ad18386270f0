"""The command line. Each command is a few lines that call the package."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from microdit.errors import UserError

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, help=(
    "Train text-to-image diffusion transformers from scratch on a micro-budget.\n\n"
    "In order: [bold]data encode[/] once, [bold]train[/] a recipe, [bold]sample[/] pictures, [bold]evaluate[/] them."
))  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Make and check encoded data sets.")
app.add_typer(data_app, name="data")
console = Console()


def main() -> None:
    """Entry point: mistakes that are the user's end in one sentence and exit code 1."""
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


@data_app.command("encode")
def encode_data(
    source: Annotated[Literal["emoji"], typer.Argument(help="Where pictures and captions come from: emoji is built in.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    split: Annotated[Literal["train", "held_out"], typer.Option(help="Which part of the source.")] = "train",
    autoencoder: Annotated[str, typer.Option(help="icon, pixels, or a folder of train-autoencoder.")] = "icon",
    text_encoder: Annotated[str, typer.Option(help="minilm.")] = "minilm",
    image_size: Annotated[int, typer.Option(min=8, help="Pixels of a side; pictures are resized and cut square.")] = 64,
) -> None:
    """Encode pictures to latents and captions to embeddings, once.

    Example: microdit data encode emoji --out data/emoji
    """
    from microdit.data.encode import encode_rows
    from microdit.data.sources import emoji_rows
    from microdit.encoders.autoencoder import load_autoencoder
    from microdit.encoders.text import load_text_encoder

    rows = list(emoji_rows(split))
    with _progress(f"encode {source}", len(rows)) as advance:
        encoders = load_autoencoder(autoencoder), load_text_encoder(text_encoder)
        card = encode_rows(rows, out, f"{source}/{split}", image_size, *encoders, on_rows=advance)
    shape = " x ".join(str(side) for side in card["latent_shape"])
    console.print(f"{card['rows']:,} samples with latents of {shape} in [bold]{out}[/]")


@data_app.command("verify")
def verify_data(folder: Annotated[Path, typer.Argument(help="An encoded data set.")]) -> None:
    """Read every byte of an encoded data set and compare with its checksums."""
    from microdit.data.latents import EncodedSet

    damaged = EncodedSet(folder).verify()
    if damaged:
        raise UserError(f"Damaged in {folder}: {', '.join(damaged)}. Encode the data again.")
    console.print(f"{folder} is whole.")


@app.command("train-autoencoder")
def train_autoencoder(
    out: Annotated[Path, typer.Option(help="Folder to write config, weights and record.json to.")],
    steps: Annotated[int, typer.Option(min=1, help="2,600 made the bundled one.")] = 2600,
    latent_channels: Annotated[int, typer.Option(min=1)] = 8,
    seed: int = 0,
) -> None:
    """Train the small icon autoencoder (64 x 64 pixels to 8 x 8 latents) on the emoji, as the bundled one was."""
    from microdit.training.autoencoder import AutoencoderSettings, train_icon_autoencoder

    settings = AutoencoderSettings(steps=steps, latent_channels=latent_channels, seed=seed)
    with _progress("autoencoder", steps) as advance:
        figures = train_icon_autoencoder(out, settings, lambda step, metrics: advance(1, f"loss {metrics['loss']:.4f}"))
    console.print(figures)
    console.print(f"Written to [bold]{out}[/]; use it with: microdit data encode emoji --autoencoder {out} --out ...")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; recipes/emoji.yaml is the demo's.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as phases.0.steps=100 seed=1")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/NAME]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")] = False,
) -> None:
    """Train a recipe: its phases in turn, with metrics, sample grids and checkpoints in the run folder.

    Example: microdit train recipes/emoji.yaml phases.0.batch_size=32 --out runs/try
    """
    from microdit.recipe import load_recipe
    from microdit.training.trainer import Trainer

    settings = load_recipe(recipe, overrides)
    run = out or Path("runs") / settings.name
    Trainer(settings, run, console, resume).train()
    console.print(f'Trained. Pictures: microdit sample {run} "a red heart"', highlight=False)


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    prompts: Annotated[list[str], typer.Argument(help="What to draw; each in quotes.")],
    steps: Annotated[int, typer.Option(help="Of the Heun sampler; each costs two evaluations.")] = 30,
    guidance: Annotated[float, typer.Option(help="1: none. 2 suits the demo's small model; the paper's takes 5.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Other seeds make other pictures.")] = 0,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("grid.png"),
) -> None:
    """Draw pictures of prompts with a trained run, as one grid with the captions under them.

    Example: microdit sample runs/emoji "a red heart" "a green cat" --seed 7
    """
    from microdit.grids import draw_grid, save_png
    from microdit.pipeline import Pipeline

    pipeline, checkpoint = Pipeline.from_run(run, _warn)
    with _progress("sample", len(prompts) * steps) as advance:
        images = pipeline(prompts, steps, guidance, seed, advance)
    save_png(draw_grid(images, prompts), out)
    console.print(f"{len(images)} pictures of step {checkpoint.step}, seed {seed}, in [bold]{out}[/]")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, trained on the emoji.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many training captions to draw.")] = 256,
    steps: Annotated[int, typer.Option(help="Of the Heun sampler.")] = 18,
    guidance: float = 2.0,
    seed: int = 0,
) -> None:
    """Measure how often a caption's picture is recognised: is the right one among the 10 nearest of all training pictures?

    Writes metrics.json into the run folder.
    """
    from microdit.evaluation.emoji import evaluate_emoji_run

    with _progress("evaluate", count * steps) as advance:
        metrics = evaluate_emoji_run(run, count, steps, guidance, seed, _warn, advance)
    console.print(json.dumps(metrics, indent=1))


class _Advance:
    """Counts work done on a progress line: `advance(n)`, or `advance(n, "a note")`."""

    def __init__(self, progress: Progress, name: str, total: int):
        self._progress = progress
        self._task = progress.add_task(name, total=total, note="")

    def __call__(self, count: int, note: str = "") -> None:
        self._progress.update(self._task, advance=count, note=note)


@contextmanager
def _progress(name: str, total: int) -> Iterator[_Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        yield _Advance(progress, name, total)


def _warn(sentence: str) -> None:
    console.print(f"[yellow]{sentence}[/]")


if __name__ == "__main__":
    main()
