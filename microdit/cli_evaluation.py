"""The commands that measure: microdit evaluate, draw, prefer, geneval."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from microdit.errors import UserError
from microdit.terminal import SOURCE_HELP, console, progress, share, warn


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
    with progress("evaluate", count * steps) as advance:
        metrics: dict[str, Any] | None
        if reference is None:
            metrics = evaluate_emoji_run(run, count, settings, warn, advance)
        else:
            source, features = open_source(reference), open_network(network, device)
            folder = out or run / "evaluation"
            metrics = compare_with_reference(run, source, count, features, settings, folder, warn, share(), advance)
    if metrics is None:
        console.print("This process's pictures are drawn, the others' not yet. Once they are, run the same command again.")
    else:
        console.print(json.dumps(metrics, indent=1))


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
    with progress("draw", len(texts) * steps) as advance:
        draw_pictures(run, texts, out, DrawSettings(steps, guidance, seed, weights), warn, share=share(), on_step=advance)
    console.print(f"{len(texts)} pictures in [bold]{out}[/]", highlight=False)


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
        with progress("judge", open_questions) as advance:
            result = judge_all(file, VisionJudge(judge_url, judge), on_verdict=lambda _: advance(1))
    console.print_json(json.dumps(asdict(result)))


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
    with progress("draw", len(texts) * steps) as advance:
        settings = DrawSettings(steps, guidance, seed)
        draw_pictures(run, texts, pictures, settings, warn, partial(_geneval_name, per_prompt), on_step=advance)
    with progress("judge", len(texts)) as advance:
        finder = EmojiDetector() if prompts is None else Mask2Former(detector, device)
        colours = EmojiColours() if prompts is None else ClipColours(classifier, device)
        summary = evaluate_geneval(pictures, wanted, finder, colours, out, warn, lambda done, total: advance(1))
    console.print_json(json.dumps(summary))


def _geneval_name(per_prompt: int, number: int) -> str:
    prompt, sample = divmod(number, per_prompt)
    return f"{prompt:05}/samples/{sample:04}.png"
