"""The commands that measure how models follow the prompts of benchmarks: microdit geneval, dpg."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microdit.cli.evaluate import LESS_MEMORY, BatchSize, GuidanceScale, Steps, start
from microdit.cli.terminal import Device, Dtype, Rewrite, RewriteModel, console, progress, warn
from microdit.errors import UserError
from microdit.io.console import joined, styled

if TYPE_CHECKING:
    from microdit.evaluation.dpg.answerers import Answerer
    from microdit.evaluation.dpg.answers import GridPicture
    from microdit.evaluation.rewriting import Rewriter

REWRITTEN = "rewritten"  # the folder in --out for what is drawn of rewritten prompts


def geneval(
    run: Annotated[str, typer.Argument(help="A run folder, or a diffusers pipeline, by folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for pictures, results.jsonl and summary.json.")],
    prompts: Annotated[Path | None, typer.Option(help="GenEval's evaluation_metadata.jsonl. (default: prompts for emoji)")] = None,
    detector: Annotated[
        str, typer.Option(help="Folder or hub name of a Mask2Former model.")
    ] = "facebook/mask2former-swin-small-coco-instance",
    classifier: Annotated[
        str, typer.Option(help="Folder or hub name of the CLIP model that names colours.")
    ] = "openai/clip-vit-large-patch14",
    rewrite: Rewrite = None,
    rewrite_model: RewriteModel = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 4,
    per_task: Annotated[int, typer.Option(min=1, help="Emoji prompts for each of the six tasks.")] = 20,
    steps: Steps = None,
    guidance: GuidanceScale = None,
    seed: int = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
) -> None:
    """Generate GenEval's prompts and let detectors judge objects, counts, colours, positions. Without --prompts: emoji, offline.

    Continues where it was stopped. Under torchrun the generation is shared. With --rewrite, pictures of rewritten prompts are judged by
    the original ones; they and their scores lie apart, in OUT/rewritten.

    Example: microdit geneval runs/emoji --out geneval/emoji
    """
    from microdit.devices import device_errors_explained
    from microdit.distributed import stop_world
    from microdit.evaluation.generators import DrawSettings, draw_pictures, open_generator, steps_to_draw
    from microdit.evaluation.geneval.detector import ClipColours, Mask2Former, evaluate_geneval
    from microdit.evaluation.geneval.emoji_scenes import EmojiColours, EmojiDetector, emoji_prompts
    from microdit.evaluation.geneval.rules import read_prompts
    from microdit.evaluation.rewriting import open_rewriter
    from microdit.io.locks import sole_writer

    wanted = emoji_prompts(per_task) if prompts is None else read_prompts(prompts)
    texts, rewriter = [prompt.text for prompt in wanted], None
    settings = DrawSettings.suited_to(run, steps, guidance, seed)
    world, compute = start(device, dtype, batch_size)
    if rewrite is not None:
        out = out / REWRITTEN
        rewriter, texts = world.look(lambda: _rewritten(open_rewriter(rewrite, rewrite_model, world.device), texts, out))
    pictures, texts = out / "pictures", [text for text in texts for _ in range(per_prompt)]
    with device_errors_explained(LESS_MEMORY):
        generator = open_generator(run, settings, warn, compute)
        with progress("draw", steps_to_draw(len(texts), generator, settings, world)) as advance:
            draw_pictures(generator, texts, pictures, settings, world, partial(_geneval_name, per_prompt), advance)
    if world.is_main:
        with (
            device_errors_explained("take --device cpu for judging alone: what is drawn is kept"),
            progress("judge", len(texts)) as advance,
            sole_writer(out),
        ):
            finder = EmojiDetector() if prompts is None else Mask2Former(detector, str(world.device))
            colours = EmojiColours() if prompts is None else ClipColours(classifier, str(world.device))
            summary = evaluate_geneval(pictures, wanted, finder, colours, out, warn, lambda done, total: advance(1), rewriter)
        console.print_json(data=summary)
    stop_world()


def _rewritten(rewriter: "Rewriter", texts: list[str], out: Path) -> tuple[str, list[str]]:
    """Return the rewriter's name and what it makes of the prompts, which are also written to OUT/prompts.jsonl."""
    from microdit.evaluation.rewriting import rewrite
    from microdit.io.files import write_aside

    with progress("rewrite", len(dict.fromkeys(texts))) as advance:
        new = rewrite(texts, rewriter, out / "requests.jsonl", warn, advance)
    lines = (json.dumps({"asked": asked, "drawn": drawn, "rewritten_by": rewriter.name}) for asked, drawn in zip(texts, new, strict=True))
    write_aside(out / "prompts.jsonl", "".join(f"{line}\n" for line in lines).encode())
    console.print(joined(f"{len(new)} prompts rewritten by {rewriter.name}, each in ", styled(out / "prompts.jsonl")))
    return rewriter.name, new


def _geneval_name(per_prompt: int, number: int) -> str:
    prompt, sample = divmod(number, per_prompt)
    return f"{prompt:05}/samples/{sample:04}.png"


def dpg(
    run: Annotated[str, typer.Argument(help="A run folder, or a diffusers pipeline, by folder or hub id.")],
    prompts: Annotated[Path, typer.Option(help="DPG-Bench's folder: prompts/NAME.txt, and one .csv of questions.")],
    out: Annotated[Path, typer.Option(help="Folder for pictures, grids, answers, results.jsonl and summary.json.")],
    judge_url: Annotated[
        str | None, typer.Option(help="Base URL of an OpenAI-compatible API; its key is read from MICRODIT_JUDGE_KEY.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="The vision model that answers the questions: with --judge-url its name there, else the folder or hub name of a BLIP, a "
            "ViLT or any that chats about pictures. (default: Salesforce/blip-vqa-capfilt-large)"
        ),
    ] = None,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, help="Use only the first prompts. (default: all 1,065)")] = None,
    dollars_per_million: Annotated[float | None, typer.Option(help="Price of a million tokens, for the cost estimate.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation after the estimate.")] = False,
    steps: Steps = None,
    guidance: GuidanceScale = None,
    seed: int = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
) -> None:
    """Generate DPG-Bench's dense prompts, four pictures each, and let a vision model answer yes-or-no questions about them.

    Continues where it was stopped: no picture is drawn twice, and no answered question is asked again. Under torchrun the generation is
    shared. OUT/grids has the layout that the authors' own program reads.

    Example: microdit dpg RUN --prompts ELLA/dpg_bench --out dpg

    Example: microdit dpg RUN --prompts ELLA/dpg_bench --out dpg --judge-url http://localhost:8000/v1 --judge Qwen/Qwen2.5-VL-7B-Instruct
    """
    from microdit.devices import device_errors_explained
    from microdit.distributed import stop_world
    from microdit.evaluation.dpg.answers import PICTURES, evaluate_dpg, find_grid_pictures, picture_name, write_grids
    from microdit.evaluation.dpg.questions import read_dpg_prompts
    from microdit.evaluation.generators import DrawSettings, draw_pictures, open_generator, steps_to_draw
    from microdit.io.locks import sole_writer

    wanted = read_dpg_prompts(prompts, warn)[:count]
    texts = [prompt.text for prompt in wanted for _ in range(PICTURES)]
    settings = DrawSettings.suited_to(run, steps, guidance, seed)
    world, compute = start(device, dtype, batch_size)
    if judge_url is not None and judge is None:
        raise UserError(f"--judge-url {judge_url} is an endpoint: name its model with --judge.")
    with device_errors_explained(LESS_MEMORY):
        generator = open_generator(run, settings, warn, compute)
        with progress("draw", steps_to_draw(len(texts), generator, settings, world)) as advance:

            def name(number: int) -> str:
                return picture_name(wanted[number // PICTURES], number % PICTURES)

            draw_pictures(generator, texts, out / "pictures", settings, world, name, advance)
    if world.is_main:
        with device_errors_explained("take --device cpu for the questions alone: what is drawn is kept"), sole_writer(out):
            write_grids(out / "pictures", wanted, out / "grids")
            pictures = find_grid_pictures(out / "grids", wanted, warn)
            answerer = _open_answerer(judge_url, judge, str(world.device))
            waiting = _confirm_questions(pictures, answerer, out, dollars_per_million, yes or judge_url is None)
            with progress("ask", waiting) as advance:
                summary = evaluate_dpg(pictures, answerer, out, warn, advance)
        console.print_json(data=summary)
    stop_world()


def _open_answerer(judge_url: str | None, judge: str | None, device: str) -> "Answerer":
    from microdit.evaluation.dpg.answerers import ANSWERER, EndpointAnswerer, TransformersAnswerer

    return TransformersAnswerer(judge or ANSWERER, device) if judge_url is None else EndpointAnswerer(judge_url, judge or "")


def _confirm_questions(pictures: "list[GridPicture]", answerer: "Answerer", out: Path, price: float | None, yes: bool) -> int:
    """Print how many questions are open and what they may cost, ask for consent unless `yes`, and return their number."""
    from PIL import Image

    from microdit.evaluation.chat.client import estimate
    from microdit.evaluation.dpg.answers import count_open

    waiting = count_open(pictures, answerer.name, out)
    with Image.open(pictures[0].grid, formats=["PNG"]) as grid:
        cost = estimate(waiting, 1, max(grid.size) // 2, price)
    dollars = "" if cost.dollars is None else f", about ${cost.dollars:.2f}"
    console.print(f"{waiting:,} questions to {answerer.name}, about {cost.tokens:,} tokens{dollars}.")
    if waiting and not yes and not typer.confirm("Go on?"):
        raise UserError("Cancelled: no request was sent.")
    return waiting
