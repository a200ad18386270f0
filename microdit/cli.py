"""The command line. Each command is a few lines that call the package."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from microdit.data.forms import CaptionForm, LatentForm
from microdit.errors import StoppedError, UserError

SOURCE_HELP = (
    "emoji and scenes are built in. Else: a folder of pictures with .txt files, metadata.jsonl or metadata.csv; .tar files (WebDataset); "
    ".parquet files; hf:NAME[:SPLIT] of the hub or a path; or NAME:PATH of cc12m, sa1b, textcaps, journeydb, diffusiondb, coco2014."
)

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
        app(args=_repeat_option(sys.argv[1:], "--resolutions"))
    except UserError as error:
        rank = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        title = "[yellow]Stopped:[/]" if isinstance(error, StoppedError) else "[bold red]Error:[/]"
        Console(stderr=True).print(f"{title}{rank} {escape(str(error))}", highlight=False, soft_wrap=True)
        code = error.exit_code if isinstance(error, StoppedError) else 1
        # At once: threads that hang, and other processes that may never answer, are not waited for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _repeat_option(arguments: list[str], option: str) -> list[str]:
    """`--resolutions 256 512` -> `--resolutions 256 --resolutions 512`, the only form that click knows."""
    spread: list[str] = []
    for argument in arguments:
        if argument.isdigit() and len(spread) >= 2 and spread[-2] == option and spread[-1].isdigit():
            spread.append(option)
        spread.append(argument)
    return spread


@data_app.command("encode")
def encode_data(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    resolutions: Annotated[list[int] | None, typer.Option("--resolutions", help="Pixels of a side, one or more. [default: 64]")] = None,
    autoencoder: Annotated[str, typer.Option(help="icon, pixels, sdxl, 16ch, or a folder or hub name of diffusers.")] = "icon",
    text_encoder: Annotated[str, typer.Option(help="minilm, dfn-clip-h, or a folder or hub name: CLIP, T5, open_clip.")] = "minilm",
    store_latents: Annotated[LatentForm, typer.Option(help="How latents are stored: int8 has a scale for each channel.")] = "int8",
    store_captions: Annotated[CaptionForm, typer.Option(help="How captions are stored; ids are embedded in training.")] = "int8",
    caption: Annotated[list[str] | None, typer.Option("--caption", help="Which captions: NAME or NAME=WEIGHT; repeatable.")] = None,
    min_side: Annotated[
        int | None, typer.Option(help="Reject pictures with a shorter side. [default: the set's own, or the resolution]")
    ] = None,
    fraction: Annotated[float, typer.Option(min=0, max=1, help="Use only this share of the source, chosen by key.")] = 1.0,
    buckets: Annotated[bool, typer.Option("--buckets", help="Keep aspect ratios (sides in steps of 64), cut no squares.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures, and captions, that the encoders take at a time.")] = 64,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode files. [default: by the cores]")] = None,
    device: Annotated[str, typer.Option(help="Where the encoders run: cpu, cuda ...")] = "cpu",
) -> None:
    """Encode pictures to latents and captions to embeddings, once.

    Stopped at any moment, the same command goes on behind the last whole shard. Under torchrun each rank encodes its share of the parts.

    Example: microdit data encode emoji --out data/emoji

    Example: microdit data encode my-pictures --out data/mine --resolutions 256 512 --autoencoder sdxl --text-encoder dfn-clip-h
    """
    from microdit.data.encode import EncodeSettings, encode_source
    from microdit.data.sources import open_source
    from microdit.encoders.autoencoder import load_autoencoder
    from microdit.encoders.text import load_text_encoder

    opened = open_source(source, _weights(caption), fraction)
    rank, world = _share()
    sides = tuple(resolutions or [64])
    settings = EncodeSettings(
        resolutions=sides,
        latents=store_latents,
        captions=store_captions,
        min_side=next(side for side in (min_side, opened.min_side, min(sides)) if side is not None),
        buckets=buckets,
        batch_size=batch_size,
        workers=max(0, (os.cpu_count() or 1) - 2) // 2 if workers is None else workers,
    )
    with _parts_progress(f"encode {opened.name}", len(range(rank, len(opened.parts), world))) as on_progress:
        encoders = load_autoencoder(autoencoder).to(device), load_text_encoder(text_encoder).to(device)
        card = encode_source(opened, out, settings, *encoders, rank, world, on_progress)
    if card:
        _report_encoded(card, out)


@data_app.command("look")
def look_at_data(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    out: Annotated[Path, typer.Option(help="The PNG to write: 16 pictures with their captions.")] = Path("look.png"),
    caption: Annotated[list[str] | None, typer.Option("--caption", help="As for encode.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many records to read for the statistics.")] = 2000,
) -> None:
    """See what a source holds before encoding it: 16 pictures as a PNG; sizes, shapes, caption lengths, duplicates, troubles.

    Example: microdit data look my-pictures
    """
    from microdit.data.look import look
    from microdit.data.sources import open_source
    from microdit.grids import draw_grid, save_png

    pictures, captions, statistics = look(open_source(source, _weights(caption)), limit=limit)
    console.print_json(json.dumps(statistics))
    if pictures:
        save_png(draw_grid(pictures, captions, columns=4), out)
        console.print(f"{len(pictures)} pictures in [bold]{out}[/]")


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
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, or a folder of them (phases, trained in the order of their names).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as phases.0.steps=100 seed=1")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/NAME]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint, if there is one.")] = False,
    accept_changes: Annotated[bool, typer.Option("--accept-changes", help="Resume though the recipe or the data changed.")] = False,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Dollars of a GPU-hour: shows what is spent and to go.")] = None,
) -> None:
    """Train a recipe: its phases in turn, with metrics, sample grids and checkpoints in the run folder.

    Asked to stop (a spot notice), it saves and ends with exit code 75, which means: start me again with --resume. Several GPUs or
    machines: torchrun --nproc-per-node 8 --max-restarts 3 -m microdit train ... --resume

    Example: microdit train recipes/emoji.yaml phases.0.batch_size=32 --out runs/try

    Example: microdit train recipes/microdit-xl --resume --price-per-hour 2.5
    """
    from microdit.recipe_file import load_recipe
    from microdit.training.chain import Settings, load_chain, train_chain, train_one
    from microdit.training.distributed import start_world, stop_world

    settings = Settings(resume, accept_changes, price_per_hour)
    if recipe.is_dir():
        recipes = load_chain(recipe, overrides)
        run = out or Path("runs") / recipe.resolve().name
        world = start_world(next(iter(recipes.values())).engine.device)
        console.quiet = not world.is_main
        train_chain(recipes, run, settings, console, world)
        run /= list(recipes)[-1]
    else:
        loaded = load_recipe(recipe, overrides)
        run = out or Path("runs") / loaded.name
        world = start_world(loaded.engine.device)
        console.quiet = not world.is_main
        train_one(loaded, run, settings, console, world)
    stop_world()
    console.print(f'Trained. Pictures: microdit sample {run} "a red heart"', highlight=False)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder of several phases' runs.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file to write. [default: RUN/report.html]")] = None,
) -> None:
    """Make one self-contained HTML page of a run: curves, pictures, cost, configuration. Works while it is training, too."""
    from microdit.report import write_report

    console.print(f"[bold]{write_report(run, out)}[/]", highlight=False)


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="Where the run folders lie.")] = Path("runs")) -> None:
    """List runs with their state, step, loss and cost."""
    from microdit.runs import list_runs, runs_table

    console.print(runs_table(list_runs(folder)))


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    prompts: Annotated[list[str], typer.Argument(help="What to draw; each in quotes.")],
    steps: Annotated[int, typer.Option(help="Of the Heun sampler; each costs two evaluations.")] = 30,
    guidance: Annotated[float, typer.Option(help="1: none. 2 suits the demo's small model; the paper's takes 5.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Other seeds make other pictures.")] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels, if not as in training.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, if not as in training.")] = None,
    weights: Annotated[str | None, typer.Option(help="model, ema, or ema-DECAY. [default: ema, where there is one]")] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("grid.png"),
) -> None:
    """Draw pictures of prompts with a trained run, as one grid with the captions under them.

    Example: microdit sample runs/emoji "a red heart" "a green cat" --seed 7
    """
    from microdit.grids import draw_grid, save_png
    from microdit.pipeline import Pipeline

    pipeline, checkpoint = Pipeline.from_run(run, _warn, weights)
    with _progress("sample", len(prompts) * steps) as advance:
        images = pipeline(prompts, steps, guidance, seed, advance, height, width)
    save_png(draw_grid(images, prompts), out)
    console.print(f"{len(images)} pictures of step {checkpoint.step}, seed {seed}, in [bold]{out}[/]")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    reference: Annotated[str | None, typer.Option(help=f"Compare with this set as a whole. {SOURCE_HELP}")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many captions to draw; papers take 30,000.")] = 256,
    network: Annotated[str, typer.Option(help="efficientnet, inception:FILE (FID), clip:PLACE (CMMD) or dino:PLACE.")] = "efficientnet",
    out: Annotated[Path | None, typer.Option(help="Folder for the compared pictures. [default: RUN/evaluation]")] = None,
    steps: Annotated[int, typer.Option(help="Of the Heun sampler.")] = 18,
    guidance: float = 2.0,
    seed: int = 0,
    weights: Annotated[str | None, typer.Option(help="model, ema, or ema-DECAY. [default: ema, where there is one]")] = None,
    device: Annotated[str, typer.Option(help="Where --network runs.")] = "cpu",
) -> None:
    """Measure a run: are single pictures recognised (emoji), or, with --reference, how near are all of them to a set?

    With --reference: Frechet distance (FID), its extrapolation to infinitely many pictures, KID, precision, recall, density and
    coverage, on the captions of the set's first records. Goes on where it was stopped; under torchrun each process draws its share.

    Without: is a caption's picture among the 10 nearest of all training pictures? Writes metrics.json into the run folder.

    Example: microdit evaluate runs/emoji --reference emoji -n 512
    """
    from microdit.data.sources import open_source
    from microdit.evaluation.distribution import compare_with_reference, open_network
    from microdit.evaluation.drawing import DrawSettings
    from microdit.evaluation.emoji import evaluate_emoji_run

    settings = DrawSettings(steps, guidance, seed, weights)
    with _progress("evaluate", count * steps) as advance:
        metrics: dict[str, Any] | None
        if reference is None:
            metrics = evaluate_emoji_run(run, count, settings, _warn, advance)
        else:
            source, features = open_source(reference), open_network(network, device)
            folder = out or run / "evaluation"
            metrics = compare_with_reference(run, source, count, features, settings, folder, _warn, _share(), advance)
    if metrics is None:
        console.print("This process's pictures are drawn, the others' not yet. Once they are, run the same command again.")
    else:
        console.print(json.dumps(metrics, indent=1))


@app.command()
def draw(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    prompts: Annotated[Path, typer.Argument(help='A file with one prompt a line, or .jsonl with {"prompt": ...}.')],
    out: Annotated[Path, typer.Option(help="Folder to make: 0000.png, 0001.png ..., prompts.jsonl.")],
    steps: Annotated[int, typer.Option(help="Of the Heun sampler.")] = 18,
    guidance: float = 2.0,
    seed: Annotated[int, typer.Option(help="Picture i starts from the noise of seed + i.")] = 0,
    weights: Annotated[str | None, typer.Option(help="model, ema, or ema-DECAY. [default: ema, where there is one]")] = None,
) -> None:
    """Draw a file of prompts, one picture each, for 'microdit prefer' and other evaluations. Goes on where it was stopped.

    Under torchrun each process draws its share, and the pictures are the same.
    """
    from microdit.evaluation.drawing import DrawSettings, draw_pictures, read_prompt_file

    texts = read_prompt_file(prompts)
    with _progress("draw", len(texts) * steps) as advance:
        draw_pictures(run, texts, out, DrawSettings(steps, guidance, seed, weights), _warn, share=_share(), on_step=advance)
    console.print(f"{len(texts)} pictures in [bold]{out}[/]", highlight=False)


@app.command()
def prefer(
    a: Annotated[Path, typer.Argument(help="A folder of pictures, by 'microdit draw'.")],
    b: Annotated[Path, typer.Argument(help="Another, of the same prompts.")],
    out: Annotated[Path, typer.Option(help="Folder for verdicts.jsonl, which a later call goes on with.")] = Path("preference"),
    judge_url: Annotated[str | None, typer.Option(help="Root of an OpenAI-compatible API; its key from MICRODIT_JUDGE_KEY.")] = None,
    judge: Annotated[str, typer.Option(help="The judge's model.")] = "gpt-4o",
    dollars_per_million: Annotated[float | None, typer.Option(help="Price of a million tokens, for the estimate.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask after the estimate.")] = False,
    vote: Annotated[bool, typer.Option("--vote", help="You are the judge: opens a page on this machine.")] = False,
    port: Annotated[int, typer.Option(help="Of that page.")] = 7861,
) -> None:
    """Which pictures are preferred? Judged pair by pair, by a vision model (in both orders) or by people."""
    from dataclasses import asdict

    from PIL import Image

    from microdit.evaluation.judge import VisionJudge, estimate, judge_all
    from microdit.evaluation.preference import VerdictFile, both_orders, random_order, read_pairs
    from microdit.evaluation.votes import HUMAN, collect_votes

    if vote == (judge_url is not None):
        raise UserError("Who judges? Give --judge-url for a vision model, or --vote for people.")
    pairs = read_pairs(a, b)
    if judge_url is None:
        file = VerdictFile(out / "verdicts.jsonl", random_order(pairs, 0), HUMAN)
        result = collect_votes(file, port, lambda url: console.print(f"Vote at [bold]{url}[/]; Ctrl-C when you have enough."))
    else:
        file = VerdictFile(out / "verdicts.jsonl", both_orders(pairs), judge)
        open_questions = len(file.waiting())
        with Image.open(pairs[0].a) as picture:
            cost = estimate(-(-open_questions // 2), max(picture.size), dollars_per_million)
        dollars = "" if cost.dollars is None else f", about ${cost.dollars:.2f}"
        console.print(f"{open_questions} requests, about {cost.tokens:,} tokens{dollars}.")
        if open_questions and not yes and not typer.confirm("Go on?"):
            raise UserError("Nothing was asked.")
        with _progress("judge", open_questions) as advance:
            result = judge_all(file, VisionJudge(judge_url, judge), on_verdict=lambda _: advance(1))
    console.print_json(json.dumps(asdict(result)))


@app.command()
def geneval(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="Folder for pictures, results.jsonl and summary.json.")],
    prompts: Annotated[Path | None, typer.Option(help="GenEval's evaluation_metadata.jsonl. [default: prompts about emoji]")] = None,
    detector: Annotated[str, typer.Option(help="Mask2Former, a folder or hub name.")] = "facebook/mask2former-swin-small-coco-instance",
    classifier: Annotated[str, typer.Option(help="CLIP for colours, a folder or hub name.")] = "openai/clip-vit-large-patch14",
    per_prompt: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 4,
    per_task: Annotated[int, typer.Option(min=1, help="Emoji prompts of each of the six tasks.")] = 20,
    steps: Annotated[int, typer.Option(help="Of the Heun sampler.")] = 18,
    guidance: float = 2.0,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Draw GenEval's prompts and let detectors judge: objects, counts, colours, positions. Without --prompts, on emoji and offline."""
    from microdit.evaluation.drawing import DrawSettings, draw_pictures
    from microdit.evaluation.emoji_geneval import EmojiColours, EmojiDetector, emoji_prompts
    from microdit.evaluation.geneval import ClipColours, Mask2Former, evaluate_geneval
    from microdit.evaluation.geneval_rules import read_prompts

    wanted = emoji_prompts(per_task) if prompts is None else read_prompts(prompts)
    texts = [prompt.text for prompt in wanted for _ in range(per_prompt)]
    pictures = out / "pictures"
    with _progress("draw", len(texts) * steps) as advance:
        settings = DrawSettings(steps, guidance, seed)
        draw_pictures(run, texts, pictures, settings, _warn, partial(_geneval_name, per_prompt), on_step=advance)
    with _progress("judge", len(texts)) as advance:
        finder = EmojiDetector() if prompts is None else Mask2Former(detector, device)
        colours = EmojiColours() if prompts is None else ClipColours(classifier, device)
        summary = evaluate_geneval(pictures, wanted, finder, colours, out, _warn, lambda done, total: advance(1))
    console.print_json(json.dumps(summary))


def _geneval_name(per_prompt: int, number: int) -> str:
    prompt, sample = divmod(number, per_prompt)
    return f"{prompt:05}/samples/{sample:04}.png"


def _share() -> tuple[int, int]:
    """This process's number and their count, under torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


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


@contextmanager
def _parts_progress(name: str, parts: int) -> Iterator[Callable[[int, int], None]]:
    """A line that counts parts, with the records and their speed: how many records there are is not known before."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("parts  {task.fields[records]}"))
    started, records = time.monotonic(), 0
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(name, total=parts, records="")

        def advance(more_records: int, more_parts: int) -> None:
            nonlocal records
            records += more_records
            speed = records / (time.monotonic() - started)
            progress.update(task, advance=more_parts, records=f"{records:,} records  {speed:.0f}/s")

        yield advance


def _report_encoded(card: dict[str, Any], out: Path) -> None:
    resolutions = ", ".join(str(r) for r in card["settings"]["resolutions"])
    size = sum(shard["bytes"] for shard in card["shards"])
    console.print(
        f"{card['rows']:,} of {card['seen']:,} records kept at {resolutions} px in [bold]{out}[/], "
        f"{size / 1e6:,.1f} MB ({size / card['rows']:,.0f} bytes each, captions of {card['tokens'] / card['captions']:.1f} tokens)"
    )
    for reason, count in card["rejected"].items():
        console.print(f"  rejected {count:,}: {reason}")
    if card["rejected"]:
        console.print(f"  each by name in {out}/*.rejected.jsonl")
    if card["captions_cut"]:
        console.print(f"  {card['captions_cut']:,} captions were longer than the text encoder's {card['max_tokens']} tokens, and cut")


def _weights(captions: list[str] | None) -> dict[str, float] | None:
    """NAME or NAME=WEIGHT, some of them -> a dict."""
    weights = {}
    for item in captions or []:
        name, _, weight = item.partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UserError(f"--caption {item}: write NAME or NAME=WEIGHT, such as --caption text=0.7.") from None
    return weights or None


def _warn(sentence: str) -> None:
    console.print(f"[yellow]{sentence}[/]")


if __name__ == "__main__":
    main()
