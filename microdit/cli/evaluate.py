"""The commands for evaluation: microdit evaluate, draw, prefer, compare."""

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from microdit.cli.terminal import SOURCE_HELP, Device, Dtype, console, progress, reporter, warn
from microdit.errors import UserError, optional_package
from microdit.io.console import joined, styled
from microdit.reports.formats import figure

if TYPE_CHECKING:
    from microdit.distributed import World
    from microdit.evaluation.generators import Compute

# Processes generate at different speeds, and only the first one computes metrics.
PATIENCE = timedelta(hours=12)
LESS_MEMORY = "take a smaller --batch-size, or --dtype bfloat16"

BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Pictures per batch; smaller batches need less memory. (default: 64; 8 for other pipelines)"),
]

Steps = Annotated[int | None, typer.Option(help="Steps of the sampler. (default: 18; of a distilled model, its own)")]
GuidanceScale = Annotated[float | None, typer.Option(help="Guidance scale. (default: 2; of a distilled model 1, which is none)")]


def evaluate(
    run: Annotated[
        str,
        typer.Argument(
            help="A run folder, a run in an object store or an exported model; with --reference also any diffusers pipeline, by folder or "
            "hub id."
        ),
    ],
    reference: Annotated[
        str | None, typer.Option(help=f"Compare with this data set. (default: the run's own held-out or training set) {SOURCE_HELP}")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="fid, kid, precision, recall, density, coverage (by --network); clip-fid, cmmd, clip-score (by --clip); dino-fd (by "
            "--dino), separated by commas. (default: all by --network)"
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", min=1, help="Number of captions to generate; papers use 30,000. (default: 256, or as the set has)"),
    ] = None,
    network: Annotated[str, typer.Option(help="efficientnet (offline), or inception:FILE, for the standard FID.")] = "efficientnet",
    clip: Annotated[str, typer.Option(help="A CLIP model of transformers.")] = "openai/clip-vit-large-patch14",
    dino: Annotated[str, typer.Option(help="A DINOv2 model of transformers.")] = "facebook/dinov2-large",
    side: Annotated[int | None, typer.Option(min=8, help="Side in pixels to crop and resize both to. (default: as generated)")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for pictures, metrics.json, report.html. (default: RUN/evaluation; for a run in a store, NAME-evaluation)"
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Evaluate each new checkpoint while RUN trains, and plot the results.")] = False,
    steps: Steps = None,
    guidance: GuidanceScale = None,
    seed: Annotated[int, typer.Option(help="Picture i starts from the noise of seed + i.")] = 0,
    weights: Annotated[str | None, typer.Option(help="model, ema, or ema-DECAY. (default: ema, where there is one)")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
) -> None:
    """Measure the quality of a run against its own pictures, or those of --reference: distances such as FID, and more.

    Pictures are generated for captions of the reference and compared with its pictures. The run's own are those of its held-out set
    (data.held_out), or else up to 1,000 of its training set, as the autoencoder decodes them. Every metric has a 95% interval; a page
    shows the pictures nearest to the reference and farthest from it. An interrupted evaluation continues where it stopped; under
    torchrun the work is shared, and the figures are the same.

    A run of the built-in emoji has a task of its own, unless --reference, --metrics or --watch is given: a picture counts as recognised
    if its caption's own picture is among the 10 nearest of all training pictures. It writes metrics.json to the run folder.

    Example: microdit evaluate runs/my-pictures

    Example: microdit evaluate runs/emoji --reference emoji -n 512

    Example: torchrun --nproc-per-node 8 -m microdit evaluate RUN --reference coco2014:PATH -n 30000 --metrics fid,clip-score
    --network inception:inception-2015-12-05.pt
    """
    from microdit.data.sources.builtin import emoji_images
    from microdit.data.sources.open import open_source
    from microdit.devices import device_errors_explained
    from microdit.distributed import stop_world
    from microdit.evaluation.evaluate import EvaluationSettings
    from microdit.evaluation.evaluate import evaluate as evaluate_set
    from microdit.evaluation.generators import DrawSettings, open_generator
    from microdit.evaluation.metrics.registry import choose_metrics
    from microdit.evaluation.own_reference import COUNT, own_count, own_reference, trained_on_emoji
    from microdit.evaluation.recognition import evaluate_emoji_run
    from microdit.evaluation.watch import watch_run
    from microdit.io.places import is_remote
    from microdit.reports.remote_run import fetched_weights

    place = run
    if is_remote(run):
        folder = fetched_weights(run, warn, weights, required=not watch)
        run, out = str(folder), out or Path(f"{folder.name}-evaluation")
    settings = DrawSettings.suited_to(run, steps, guidance, seed, weights)
    if reference is None and metrics is None and not watch and trained_on_emoji(run):
        _, compute = start(device, dtype, batch_size)
        count = count or COUNT
        with device_errors_explained(LESS_MEMORY), progress("evaluate", count * settings.num_inference_steps) as advance:
            found = evaluate_emoji_run(Path(run), list(emoji_images("train")), count, settings, warn, advance, compute)
        console.print_json(data=found)
        stop_world()
        return
    chosen, folder = choose_metrics(metrics), out or Path(run) / "evaluation"
    source = open_source(reference) if reference else None
    world, compute = start(device, dtype, batch_size)
    with device_errors_explained(LESS_MEMORY):
        if source is None:
            source = own_reference(Path(run), folder, world, reporter)
            count = count or own_count(source)
        evaluation = EvaluationSettings(chosen, count or COUNT, network, clip, dino, side)
        if watch:
            refresh = partial(fetched_weights, place, warn, weights, required=False)
            page = watch_run(Path(run), source, evaluation, settings, folder, world, compute, reporter, refresh)
            console.print(joined("Quality of all checkpoints: ", styled(page)))
        else:
            generator = open_generator(run, settings, warn, compute)
            result = evaluate_set(generator, source, evaluation, settings, folder, world, reporter)
            _print_result(result, folder, world)
    stop_world()


def _print_result(result: dict[str, Any], folder: Path, world: "World") -> None:
    if world.is_main:
        console.print(f"Compared with {result['reference']['pictures']:,} pictures of {result['reference']['source']}.")
        console.print(_metrics_table(result))
        console.print(joined(styled(folder / "report.html"), f" shows the pictures, {folder / 'metrics.json'} holds the figures."))


def start(device: str, dtype: str, batch_size: int | None) -> tuple["World", "Compute"]:
    """Start the processes and choose device and dtype, which the first process prints."""
    from microdit.devices import choose_dtype, describe_device
    from microdit.distributed import start_world
    from microdit.evaluation.generators import Compute

    world = start_world(device, PATIENCE)
    console.quiet = not world.is_main
    compute = Compute(world.device, choose_dtype(dtype, world.device), batch_size)
    console.print(describe_device(world.device, compute.dtype))
    return world, compute


def _metrics_table(result: dict[str, Any]) -> Table:
    from microdit.evaluation.metrics.registry import METRICS, label

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("metric", "value", "95% interval", "better", "network"):
        table.add_column(title, justify="right" if title in ("value", "95% interval") else "left")
    for name, entry in result["metrics"].items():
        interval = "" if entry["low"] is None else f"{figure(entry['low'])} to {figure(entry['high'])}"
        better = "lower" if METRICS[name].lower_is_better else "higher"
        table.add_row(label(name, entry["network"]), figure(entry["value"]), interval, better, entry["network"])
        if "infinity" in entry:
            table.add_row("  infinitely many", figure(entry["infinity"]), "", better, entry["network"])
    return table


def draw(
    run: Annotated[str, typer.Argument(help="A run folder, or a diffusers pipeline, by folder or hub id.")],
    prompts: Annotated[Path, typer.Argument(help='A file with one prompt per line, or .jsonl with {"prompt": ...}.')],
    out: Annotated[Path, typer.Option(help="Folder to create: 0000.png, 0001.png ..., prompts.jsonl.")],
    steps: Steps = None,
    guidance: GuidanceScale = None,
    seed: Annotated[int, typer.Option(help="Picture i starts from the noise of seed + i.")] = 0,
    weights: Annotated[str | None, typer.Option(help="model, ema, or ema-DECAY. (default: ema, where there is one)")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
) -> None:
    """Generate one picture for each prompt of a file, for 'microdit prefer' and other evaluations. Continues where it was stopped.

    Under torchrun each process generates its share, and the pictures are the same.

    Example: microdit draw runs/emoji prompts.txt --out drawn/emoji
    """
    from microdit.devices import device_errors_explained
    from microdit.distributed import stop_world
    from microdit.evaluation.generators import DrawSettings, draw_pictures, open_generator, read_prompt_file, steps_to_draw

    texts, settings = read_prompt_file(prompts), DrawSettings.suited_to(run, steps, guidance, seed, weights)
    world, compute = start(device, dtype, batch_size)
    with device_errors_explained(LESS_MEMORY):
        generator = open_generator(run, settings, warn, compute)
        with progress("draw", steps_to_draw(len(texts), generator, settings, world)) as advance:
            draw_pictures(generator, texts, out, settings, world, on_step=advance)
    console.print(joined(f"{len(texts)} pictures in ", styled(out)))
    stop_world()


def prefer(
    a: Annotated[Path, typer.Argument(help="A folder of pictures from 'microdit draw'.")],
    b: Annotated[Path, typer.Argument(help="Another folder, for the same prompts.")],
    out: Annotated[Path, typer.Option(help="Folder for verdicts.jsonl; a later call continues it.")] = Path("preference"),
    judge_url: Annotated[
        str | None, typer.Option(help="Base URL of an OpenAI-compatible API; its key is read from MICRODIT_JUDGE_KEY.")
    ] = None,
    judge: Annotated[str, typer.Option(help="The vision model that judges.")] = "gpt-4o",
    dollars_per_million: Annotated[float | None, typer.Option(help="Price of a million tokens, for the cost estimate.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation after the estimate.")] = False,
    vote: Annotated[bool, typer.Option("--vote", help="Judge yourself, on a web page on this machine.")] = False,
    port: Annotated[int, typer.Option(help="Port of that page.")] = 7861,
) -> None:
    """Find out which of two folders of pictures is preferred, judged pair by pair by a vision model (in both orders) or by people.

    Example: microdit prefer drawn/a drawn/b --vote
    """
    from dataclasses import asdict

    from PIL import Image

    from microdit.evaluation.chat.client import estimate
    from microdit.evaluation.preference.judge import VisionJudge, judge_all
    from microdit.evaluation.preference.verdicts import VerdictFile, both_orders, random_order, read_pairs
    from microdit.evaluation.preference.votes import HUMAN

    if vote == (judge_url is not None):
        raise UserError("Who judges? Give --judge-url for a vision model, or --vote for people.")
    if judge_url is None:
        with optional_package("The vote page", "app"):
            from microdit.serve.votes_api import collect_votes

        file = VerdictFile(out / "verdicts.jsonl", random_order(read_pairs(a, b), 0), HUMAN)
        result = collect_votes(file, port, lambda url: console.print(joined("Vote at ", styled(url), "; Ctrl-C when you have enough.")))
    else:
        pairs = read_pairs(a, b)
        file = VerdictFile(out / "verdicts.jsonl", both_orders(pairs), judge)
        open_questions = len(file.waiting())
        with Image.open(pairs[0].a, formats=["PNG"]) as picture:
            cost = estimate(open_questions, 2, max(picture.size), dollars_per_million)
        dollars = "" if cost.dollars is None else f", about ${cost.dollars:.2f}"
        console.print(f"{open_questions} requests, about {cost.tokens:,} tokens{dollars}.")
        if open_questions and not yes and not typer.confirm("Go on?"):
            raise UserError("Cancelled: no request was sent.")
        with progress("judge", open_questions) as advance:
            result = judge_all(file, VisionJudge(judge_url, judge), on_verdict=lambda _: advance(1), warn=warn)
    console.print_json(data=asdict(result))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    table: Annotated[
        Literal["main", "geneval", "benchmarks", "ablations"], typer.Option(help="Which table of published figures.")
    ] = "main",
    geneval: Annotated[list[Path] | None, typer.Option(help="The --out folder of 'microdit geneval'; once for each run, in order.")] = None,
    dpg: Annotated[list[Path] | None, typer.Option(help="The --out folder of 'microdit dpg'; once for each run, in order.")] = None,
) -> None:
    """Compare runs with published figures, and say which figures are comparable and which are not.

    Example: microdit compare runs/emoji runs/emoji-long

    Example: microdit compare runs/xl --table geneval --geneval geneval

    Example: microdit compare runs/xl --table benchmarks --geneval geneval --dpg dpg
    """
    from microdit.evaluation.compare import comparison_lines, comparison_table
    from microdit.evaluation.published import load_published
    from microdit.evaluation.run_results import read_run

    for option, folders in (("--geneval", geneval), ("--dpg", dpg)):
        if folders and len(folders) != len(runs):
            raise UserError(f"{option} was given {len(folders)} times for {len(runs)} runs: give it once for each run, in order.")
    published, none = load_published(), [None] * len(runs)
    results = [read_run(*paths) for paths in zip(runs, geneval or none, dpg or none, strict=True)]
    console.print(comparison_table(published, table, results))
    for result in results:
        for line in comparison_lines(published, table, result):
            console.print(line, soft_wrap=True)
    console.print("How each figure was measured, and who says so: python -m microdit.evaluation.published")
