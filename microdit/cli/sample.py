"""The commands that draw pictures to look at: microdit sample, grid."""

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from microdit.cli.terminal import BatchSize, Device, Dtype, Rewrite, RewriteModel, console, progress, warn
from microdit.errors import UserError
from microdit.io.console import joined, styled
from microdit.io.untrusted_text import one_line

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from microdit.diffusion.guidance import GuidanceKind
    from microdit.diffusion.samplers import Solver
    from microdit.pipelines.open_model import OpenedModel
    from microdit.pipelines.settings import SamplerSettings

Model = Annotated[str, typer.Argument(help="A run folder, or an exported or imported model.")]


@dataclass(frozen=True)
class DrawingOptions:
    """The options that `sample` and `grid` share."""

    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the solver. heun evaluates the model twice per step, dpm and euler once. (default: 30; of a distilled model "
            "its own)"
        ),
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale: higher follows the prompt more closely, 1 is off. 2 suits the demo model, 5 the paper's. (default: 2; "
            "of a distilled model 1)"
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the initial noise. The same seed and settings give the same picture.")] = 0
    solver: Annotated[
        str | None,
        typer.Option(
            help="heun (the paper's), dpm (second order, at half the cost of a step) or euler. (default: heun; of a distilled model euler)"
        ),
    ] = None
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Guide only between these noise levels, such as 0.2 5. Other steps cost half."),
    ] = None
    guidance_rescale: Annotated[float, typer.Option(help="From 0 to 1: how much of the contrast that guidance adds to take back.")] = 0.0
    guidance_kind: Annotated[
        str | None, typer.Option(help="classifier-free, path-drop (sprint models) or autoguidance. (default: classifier-free)")
    ] = None
    autoguide: Annotated[str | None, typer.Option(help="A run of a smaller or less trained model of the same data, for autoguidance.")] = (
        None
    )
    autoguide_weights: Annotated[str | None, typer.Option(help="Weights of the --autoguide run: model, ema or ema-DECAY.")] = None
    churn: Annotated[float, typer.Option(help="Noise that heun adds at each step (EDM's S_churn): 0 is none, 40 is much.")] = 0.0
    noise_range: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="The last and the first noise level. 0.05 20 suits the demo model. (default: 0.002 80; about 0 1 for flow matching)",
        ),
    ] = None
    negative: Annotated[str | None, typer.Option(help="Negative prompt: what the pictures should not show.")] = None
    height: Annotated[int | None, typer.Option(help="Height in pixels. (default: as in training)")] = None
    width: Annotated[int | None, typer.Option(help="Width in pixels. (default: as in training)")] = None
    weights: Annotated[
        str | None, typer.Option(help="Weights of a run: model, ema or ema-DECAY. (default: ema if there is one, else model)")
    ] = None
    device: Device = "auto"
    dtype: Dtype = "auto"


def with_drawing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Show the fields of `DrawingOptions` as options of a typer command that takes them as its parameter `options`."""
    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "options"]
    shared = list(inspect.signature(DrawingOptions).parameters.values())
    arguments = [parameter for parameter in own if parameter.default is parameter.empty]
    parameters = [*arguments, *shared, *(parameter for parameter in own if parameter not in arguments)]

    @wraps(command)
    def run(**given: Any) -> None:
        options = DrawingOptions(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        command(options=options, **given)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@with_drawing_options
def sample(
    arguments: Annotated[
        list[str], typer.Argument(help="Prompts, each in quotes; before them, optionally, a run folder or an exported model.")
    ],
    options: DrawingOptions,
    count: Annotated[int, typer.Option("-n", min=1, max=10_000, help="Pictures of each prompt, each from noise of its own.")] = 1,
    rewrite: Rewrite = None,
    rewrite_model: RewriteModel = None,
    batch_size: BatchSize = 64,
    trajectory: Annotated[
        Path | None, typer.Option(help="Also write the denoising trajectory: .png makes a filmstrip, .gif an animation.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="A grid of all pictures, as .png or .jpg; or a folder (no suffix), for one PNG a picture at its own size.")
    ] = Path("grid.png"),
) -> None:
    """Draw one picture for each prompt, or -n of them, as a grid with the prompts as captions, or as one file each.

    If the first argument is a folder, it is the model; without one, the demo model that comes with microdit draws all prompts.
    Picture i starts from the noise of seed + i. Each file holds the prompts, the seed, the settings and the checksum of the weights
    as text. docs/sampling.md compares the solvers. With --rewrite, what was asked and what is drawn instead are printed and recorded.

    Example: microdit sample "red heart" "owl"

    Example: microdit sample runs/emoji "red heart" "green cat" --seed 7 --device cuda:1 --dtype float32

    Example: microdit sample runs/emoji "red heart" -n 4 --out hearts

    Example: microdit sample RUN "red heart" --rewrite http://localhost:8000/v1 --rewrite-model Qwen/Qwen3-4B

    Example: microdit sample runs/emoji "red heart" --solver dpm --steps 12 --noise-range 0.05 20 --guidance 2.5 --trajectory heart.gif
    """
    from microdit.devices import device_errors_explained
    from microdit.encoders.captions import clean_prompts
    from microdit.pipelines.open_model import model_and_prompts
    from microdit.reports.grids import Trajectory, check_picture_path, check_trajectory_path, picture_name

    model, prompts = model_and_prompts(arguments)
    prompts = clean_prompts(prompts)
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        words = " ".join(prompts)
        console.print(f'These are {len(prompts)} prompts of one word each. One prompt of several words needs quotes: "{words}".')
    negatives = clean_prompts([options.negative]) if options.negative else []
    separate = not out.suffix or out.is_dir()
    check_picture_path(out / picture_name(0) if separate else out, ", or name a folder, without a suffix, for one file a picture")
    check_trajectory_path(trajectory)
    opened = _open(model, options)
    settings = _settings(options, opened)
    asked, rewriter = prompts, ""
    if rewrite is not None:
        rewriter, prompts = _rewritten(prompts, rewrite, rewrite_model, opened.pipeline.device)
    asked, prompts = ([prompt for prompt in listed for _ in range(count)] for listed in (asked, prompts))
    film = Trajectory()
    fix = "take a smaller --batch-size, --height or --width, or --dtype bfloat16"
    with device_errors_explained(fix), progress("sample", len(prompts) * settings.num_inference_steps) as advance:
        images = opened.pipeline.generate(
            prompts,
            settings,
            options.seed,
            advance,
            options.height,
            options.width,
            negative_prompts=negatives,
            on_denoised=film.add if trajectory else None,
            warn=warn,
            batch_size=batch_size,
        )
    about = _about(opened, prompts, negatives, options.seed, settings)
    if rewriter:
        about |= {"asked": "\n".join(asked), "rewritten_by": rewriter}
    _save(images, prompts, asked, out, about, separate)
    console.print(joined(f"{_pictures(len(images))} of {opened.name}, seed {options.seed}, in ", styled(out)))
    if trajectory:
        with device_errors_explained(fix):
            film.save(trajectory, prompts, opened.pipeline.decode, about)
        console.print(joined("Denoising trajectory: ", styled(trajectory)))


def _pictures(count: int) -> str:
    return f"{count} picture{'s' * (count != 1)}"


def _rewritten(prompts: list[str], place: str, model: str | None, device: "torch.device") -> tuple[str, list[str]]:
    """Return the name of the language model and what it makes of the prompts. The request and the new prompts are printed."""
    from microdit.evaluation.rewriting import INSTRUCTIONS, open_rewriter, rewrite

    rewriter = open_rewriter(place, model, device)
    console.print(f"Asking {rewriter.name} for each prompt: {INSTRUCTIONS.format(prompt='...')}")
    with progress("rewrite", len(dict.fromkeys(prompts))) as advance:
        new = rewrite(prompts, rewriter, None, warn, advance)
    for asked, drawn in dict.fromkeys(zip(prompts, new, strict=True)):
        console.print(joined(styled(one_line(asked)), f" is drawn as: {one_line(drawn)}"))
    return rewriter.name, new


def _save(images: "list[Image.Image]", prompts: list[str], asked: list[str], out: Path, about: dict[str, str], separate: bool) -> None:
    """Write a grid, or a file for each picture, which records its own prompt and seed, and what was asked if that was rewritten."""
    from microdit.reports.grids import draw_grid, picture_name, save_picture

    if not separate:
        save_picture(draw_grid(images, prompts), out, about)
        return
    for number, image in enumerate(images):
        own = {"prompt": prompts[number], "seed": str(int(about["seed"]) + number)}
        own |= {"asked": asked[number]} if "asked" in about else {}
        save_picture(image, out / picture_name(number), about | own)


@with_drawing_options
def grid(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    sweep: Annotated[
        list[str],
        typer.Option(
            help="A setting and its values, NAME=VALUE,VALUE,...; once or twice. NAME: steps, guidance, solver, guidance-interval "
            "(LOW:HIGH or none), guidance-rescale, churn, noise-range (LOW:HIGH or none), seed."
        ),
    ],
    options: DrawingOptions,
    out: Annotated[Path, typer.Option(help="The PNG or JPEG to write.")] = Path("sweep.png"),
) -> None:
    """Draw one prompt while one or two settings vary, from the same seed, as a labelled sheet.

    Example: microdit grid runs/emoji "red heart" --sweep guidance=1,2,4,8 --sweep steps=4,8,16
    """
    from microdit.devices import device_errors_explained
    from microdit.encoders.captions import clean_prompts
    from microdit.pipelines.settings import Cell, sheet_of
    from microdit.reports.grids import check_picture_path, draw_sheet, save_picture

    check_picture_path(out)
    prompts, negatives = clean_prompts([prompt]), clean_prompts([options.negative]) if options.negative else []
    opened = _open(model, options)
    settings = _settings(options, opened)
    sheet = sheet_of(sweep, Cell(settings, options.seed))
    images, all_steps = [], sum(cell.settings.num_inference_steps for row in sheet.cells for cell in row)
    with device_errors_explained("take a smaller --height or --width, or --dtype bfloat16"), progress("grid", all_steps) as advance:
        for row in sheet.cells:
            images.append(
                [
                    opened.pipeline.generate(
                        prompts, cell.settings, cell.seed, advance, options.height, options.width, negative_prompts=negatives, warn=warn
                    )[0]
                    for cell in row
                ]
            )
    about = _about(opened, prompts, negatives, options.seed, settings) | {"sweep": "; ".join(sweep)}
    save_picture(draw_sheet(images, sheet.row_labels, sheet.column_labels, f"{prompts[0]}, seed {options.seed}"), out, about)
    console.print(joined(f"{_pictures(sum(map(len, images)))} of {opened.name}, seed {options.seed}, in ", styled(out)))


def explain(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The prompt, in quotes.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("explain.html"),
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    weights: Annotated[
        str | None, typer.Option(help="Weights of a run: model, ema or ema-DECAY. (default: ema if there is one, else model)")
    ] = None,
    device: Device = "auto",
) -> None:
    """Show the method on one picture, as a page: kept patches, widths of blocks, FLOPs by part, experts, attention to the caption's words.

    Example: microdit explain demo "red heart"

    Example: microdit explain runs/emoji "cat face" --out cat.html --seed 3
    """
    from microdit.devices import choose_device, choose_dtype, device_errors_explained
    from microdit.encoders.captions import clean_prompts
    from microdit.io.files import write_aside
    from microdit.pipelines.explain_page import explain_page
    from microdit.pipelines.open_model import open_model
    from microdit.pipelines.settings import suited_to

    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out is {out}, and a page needs a name such as explain.html.")
    where = choose_device(device)
    opened = open_model(model, warn, weights)
    (clean,) = clean_prompts([prompt])
    with device_errors_explained("take --device cpu"):
        opened.pipeline.to(where, choose_dtype("float32", where))
        with progress("explain", suited_to(opened.pipeline.objective).num_inference_steps) as advance:
            page = explain_page(opened.pipeline, opened.name, clean, seed, advance)
    write_aside(out, page)
    console.print(joined(styled(out), f" shows what {opened.name} does with it: open it in a browser."))


def _settings(options: DrawingOptions, opened: "OpenedModel") -> "SamplerSettings":
    """Return the settings that the options name, and for the others those that suit the model. Warns of others than a distilled one's."""
    from microdit.pipelines.settings import SamplerSettings, suited_to

    if options.autoguide and options.guidance_kind not in (None, "autoguidance"):
        raise UserError(f"--autoguide names a weak model, and {options.guidance_kind} guidance takes none: leave one of the two out.")
    kind = options.guidance_kind or ("autoguidance" if options.autoguide else "classifier-free")
    objective = opened.pipeline.objective
    usual = suited_to(objective)
    if objective.student_steps and options.steps not in (None, usual.num_inference_steps):
        warn(f"{opened.name} was distilled to {usual.num_inference_steps} steps of euler, and knows no noise levels between them.")
    return SamplerSettings(
        usual.num_inference_steps if options.steps is None else options.steps,
        usual.guidance_scale if options.guidance is None else options.guidance,
        cast("Solver", options.solver) if options.solver else usual.solver,
        cast("GuidanceKind", kind),
        options.guidance_interval,
        options.guidance_rescale,
        options.churn,
        noise_range=options.noise_range,
    )


def _open(model: str, options: DrawingOptions) -> "OpenedModel":
    """Open the model, and its weak model if there is one, on the chosen device, which is printed."""
    from microdit.devices import choose_device, choose_dtype, describe_device, device_errors_explained
    from microdit.pipelines.open_model import open_model

    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if options.autoguide_weights and not options.autoguide:
        raise UserError("--autoguide-weights chooses the weights of a weak model: name its run with --autoguide.")
    opened = open_model(model, warn, options.weights)
    if options.autoguide:
        weak = open_model(options.autoguide, warn, options.autoguide_weights)
        opened = replace(opened, pipeline=opened.pipeline.guided_by(weak.pipeline))
    with device_errors_explained("stop other programs that use it, or take --device cpu"):
        opened.pipeline.to(device, dtype)
    console.print(describe_device(device, dtype))
    return opened


def _about(
    opened: "OpenedModel",
    prompts: list[str],
    negatives: list[str],
    seed: int,
    settings: "SamplerSettings",
) -> dict[str, str]:
    """Return the PNG's text entries, from which the picture can be generated again."""
    from microdit import __version__
    from microdit.io.files import sha256_of

    weights = opened.weights_file
    return {
        "prompt": "\n".join(prompts),
        "negative_prompt": "\n".join(negatives),
        "seed": str(seed),
        "settings": json.dumps(asdict(settings)),
        "model": f"{opened.name}, {weights.name}" if weights else opened.name,
        "model_sha256": sha256_of(weights) if weights else "",
        "software": f"microdit {__version__}",
    }
