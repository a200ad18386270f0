"""The commands that draw with a run, for people to look at: microdit sample, grid."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from microdit.cli.terminal import BatchSize, Device, Dtype, console, progress, warn
from microdit.errors import UserError
from microdit.io.console import joined, styled

if TYPE_CHECKING:
    from microdit.diffusion.guidance import GuidanceKind
    from microdit.diffusion.samplers import Solver
    from microdit.pipelines.load import OpenedModel
    from microdit.pipelines.settings import SamplerSettings

Model = Annotated[str, typer.Argument(help="A run, or a folder that was exported or imported.")]
Steps = Annotated[int, typer.Option(help="Of the solver. Heun's cost two evaluations of the model each, the others' one.")]
Guidance = Annotated[float, typer.Option(help="1: none. 2 suits the demo's small model; the paper's takes 5.")]
SolverName = Annotated[str, typer.Option(help="heun (the paper's), dpm (second order, too, at half of its calls) or euler.")]
Interval = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Guide only at noise levels between these, such as 0.2 5; elsewhere a step costs half."),
]
Rescale = Annotated[float, typer.Option(help="0 to 1: how far to take back the contrast that guidance adds.")]
Kind = Annotated[str | None, typer.Option(help="classifier-free, path-drop (sprint models) or autoguidance. [default: classifier-free]")]
Autoguide = Annotated[str | None, typer.Option(help="A smaller or earlier model of the same data, to be guided away from.")]
AutoguideWeights = Annotated[str | None, typer.Option(help="Its weights: model, ema, or ema-DECAY.")]
Churn = Annotated[float, typer.Option(help="New noise on the way (EDM's S_churn), with heun: 0 none, 40 much.")]
NoiseRange = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="The last and the first noise level. 0.05 20 suits the demo's model. [default: 0.002 80]"),
]
Negative = Annotated[str | None, typer.Option(help="What not to draw, in the place of the empty caption.")]
Seed = Annotated[int, typer.Option(help="Other seeds make other pictures.")]
Height = Annotated[int | None, typer.Option(help="Pixels, if not as in training.")]
Width = Annotated[int | None, typer.Option(help="Pixels, if not as in training.")]
Weights = Annotated[str | None, typer.Option(help="Of a run: model, ema, or ema-DECAY. [default: ema, where there is one]")]


def sample(
    arguments: Annotated[list[str], typer.Argument(help="What to draw, each in quotes; before it a run or an exported model, if any.")],
    steps: Steps = 30,
    guidance: Guidance = 2.0,
    seed: Seed = 0,
    solver: SolverName = "heun",
    guidance_interval: Interval = None,
    guidance_rescale: Rescale = 0.0,
    guidance_kind: Kind = None,
    autoguide: Autoguide = None,
    autoguide_weights: AutoguideWeights = None,
    churn: Churn = 0.0,
    noise_range: NoiseRange = None,
    negative: Negative = None,
    height: Height = None,
    width: Width = None,
    weights: Weights = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 64,
    trajectory: Annotated[Path | None, typer.Option(help="Also write how the pictures come about: .png a filmstrip, .gif a film.")] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("grid.png"),
) -> None:
    """Draw pictures of prompts, as one grid with the captions under them: with a run, an exported model, or the demo model.

    A first argument that is a folder is the model. Without one, the demo model that comes with microdit draws all arguments.
    The PNG holds prompts, seed, settings and the weights' checksum as text. Which solver and how many steps: docs/sampling.md.

    Example: microdit sample "red heart" "owl"

    Example: microdit sample runs/emoji "red heart" "green cat" --seed 7 --device cuda:1 --dtype float32

    Example: microdit sample runs/emoji "red heart" --solver dpm --steps 12 --noise-range 0.05 20 --guidance 2.5 heart.gif
    """
    from microdit.devices import device_errors_explained
    from microdit.encoders.captions import clean_prompts
    from microdit.pipelines.load import model_and_prompts
    from microdit.reports.grids import Trajectory, draw_grid, refuse_other_endings, save_png

    model, prompts = model_and_prompts(arguments)
    prompts, negatives = clean_prompts(prompts), clean_prompts([negative]) if negative else []
    settings = _settings(steps, guidance, solver, guidance_interval, guidance_rescale, guidance_kind, autoguide, churn, noise_range)
    refuse_other_endings(trajectory)
    opened = _open(model, weights, autoguide, autoguide_weights, device, dtype)
    film = Trajectory()
    fix = "take a smaller --batch-size, --height or --width, or --dtype bfloat16"
    with device_errors_explained(fix), progress("sample", len(prompts) * steps) as advance:
        images = opened.pipeline.generate(
            prompts,
            settings,
            seed,
            advance,
            height,
            width,
            negative_prompts=negatives,
            on_denoised=film.add if trajectory else None,
            warn=warn,
            batch_size=batch_size,
        )
    about = _about(opened, prompts, negatives, seed, settings)
    save_png(draw_grid(images, prompts), out, about)
    console.print(joined(f"{len(images)} pictures of {opened.name}, seed {seed}, in ", styled(out)))
    if trajectory:
        with device_errors_explained(fix):
            film.save(trajectory, prompts, opened.pipeline.decode, about)
        console.print(joined("How they came about: ", styled(trajectory)))


def grid(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    sweep: Annotated[
        list[str],
        typer.Option(
            help="NAME=VALUE,VALUE,...; once or twice. NAME: steps, guidance, solver, guidance-interval (LOW:HIGH or none), "
            "guidance-rescale, churn, noise-range (LOW:HIGH or none), seed."
        ),
    ],
    steps: Steps = 30,
    guidance: Guidance = 2.0,
    seed: Seed = 0,
    solver: SolverName = "heun",
    guidance_interval: Interval = None,
    guidance_rescale: Rescale = 0.0,
    guidance_kind: Kind = None,
    autoguide: Autoguide = None,
    autoguide_weights: AutoguideWeights = None,
    churn: Churn = 0.0,
    noise_range: NoiseRange = None,
    negative: Negative = None,
    height: Height = None,
    width: Width = None,
    weights: Weights = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("sweep.png"),
) -> None:
    """Draw one prompt with one or two settings varied, all from the same seed, as a labelled sheet.

    Example: microdit grid runs/emoji "red heart" --sweep guidance=1,2,4,8 --sweep steps=4,8,16
    """
    from microdit.devices import device_errors_explained
    from microdit.encoders.captions import clean_prompts
    from microdit.pipelines.settings import Cell, sheet_of
    from microdit.reports.grids import draw_sheet, save_png

    prompts, negatives = clean_prompts([prompt]), clean_prompts([negative]) if negative else []
    settings = _settings(steps, guidance, solver, guidance_interval, guidance_rescale, guidance_kind, autoguide, churn, noise_range)
    sheet = sheet_of(sweep, Cell(settings, seed))
    opened = _open(model, weights, autoguide, autoguide_weights, device, dtype)
    images, all_steps = [], sum(cell.settings.num_inference_steps for row in sheet.cells for cell in row)
    with device_errors_explained("take a smaller --height or --width, or --dtype bfloat16"), progress("grid", all_steps) as advance:
        for row in sheet.cells:
            images.append(
                [
                    opened.pipeline.generate(
                        prompts, cell.settings, cell.seed, advance, height, width, negative_prompts=negatives, warn=warn
                    )[0]
                    for cell in row
                ]
            )
    about = _about(opened, prompts, negatives, seed, settings) | {"sweep": "; ".join(sweep)}
    save_png(draw_sheet(images, sheet.row_labels, sheet.column_labels, f"{prompts[0]}, seed {seed}"), out, about)
    console.print(joined(f"{sum(map(len, images))} pictures of {opened.name}, seed {seed}, in ", styled(out)))


def _settings(
    steps: int,
    guidance: float,
    solver: str,
    interval: tuple[float, float] | None,
    rescale: float,
    kind: str | None,
    autoguide: str | None,
    churn: float,
    noise_range: tuple[float, float] | None,
) -> "SamplerSettings":
    from microdit.pipelines.settings import SamplerSettings

    if autoguide and kind not in (None, "autoguidance"):
        raise UserError(f"--autoguide names a weak model, which {kind} guidance has no use for: leave one of the two out.")
    kind = kind or ("autoguidance" if autoguide else "classifier-free")
    named = cast("Solver", solver), cast("GuidanceKind", kind)
    return SamplerSettings(steps, guidance, *named, interval, rescale, churn, noise_range=noise_range)


def _open(model: str, weights: str | None, autoguide: str | None, autoguide_weights: str | None, device: str, dtype: str) -> "OpenedModel":
    """On the device, which is told of."""
    from dataclasses import replace

    from microdit.devices import choose_device, choose_dtype, device_errors_explained, in_words
    from microdit.pipelines.load import open_model

    where = choose_device(device)
    numbers = choose_dtype(dtype, where)
    if autoguide_weights and not autoguide:
        raise UserError("--autoguide-weights chooses among the weights of a weak model: name its run with --autoguide.")
    opened = open_model(model, warn, weights)
    if autoguide:
        weak = open_model(autoguide, warn, autoguide_weights)
        opened = replace(opened, pipeline=opened.pipeline.guided_by(weak.pipeline))
    with device_errors_explained("free it of other programs, or take --device cpu"):
        opened.pipeline.to(where, numbers)
    console.print(in_words(where, numbers))
    return opened


def _about(
    opened: "OpenedModel",
    prompts: list[str],
    negatives: list[str],
    seed: int,
    settings: "SamplerSettings",
) -> dict[str, str]:
    """What a PNG says of itself, as text: enough to draw it again."""
    import json
    from dataclasses import asdict

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
