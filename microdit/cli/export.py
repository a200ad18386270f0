"""The commands for model exchange: microdit export, microdit import-official, microdit import-minit2i."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from microdit.cli.terminal import console, warn
from microdit.errors import UserError
from microdit.io.console import joined, styled


class Dtype(StrEnum):
    """The dtype of stored weights."""

    float32 = "float32"
    float16 = "float16"


def export(
    run: Annotated[str, typer.Argument(help="A run folder, or a run in an object store.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    weights: Annotated[str | None, typer.Option(help="model, ema, or ema-DECAY. (default: ema, where there is one)")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of the weights: float16 halves the files, and changes pictures slightly.")
    ] = Dtype.float32,
) -> None:
    """Write a run as a folder that diffusers can load: safetensors, a model card, and a record of its origin.

    Draw with it (microdit sample my-model "red heart"), or upload the folder to the hub.

    Example: microdit export runs/emoji my-model
    """
    from microdit.pipelines.export import export_run
    from microdit.reports.remote_run import fetched_weights

    folder = fetched_weights(run, warn, weights)
    size = export_run(folder, out, warn, weights, dtype.value, _training_flops(folder))
    console.print(joined(styled(out), f": {size / 1e6:.1f} MB. Its README.md says how to use it; read it before you share the model."))


def import_official(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' .pt: the model's weights, or their trainer's whole state.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    text_encoder: Annotated[
        str, typer.Option(help="A folder, which is copied, or a name that is looked up when pictures are generated.")
    ] = "dfn-clip-h",
    autoencoder: Annotated[str | None, typer.Option(help="As for --text-encoder. (default: sdxl for 4 channels, 16ch for 16)")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Width of an attention head; known for the released models.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = Dtype.float32,
) -> None:
    """Convert a checkpoint of the authors of arXiv 2407.15811. None of its code is run; sizes are read from the tensors' shapes.

    Example: microdit import-official dit_4_channel_37M_real_and_synthetic_data.pt official-37m
    """
    from microdit.pipelines.import_official import ImportSettings, import_official

    model = import_official(checkpoint, out, ImportSettings(text_encoder, autoencoder, head_dim, dtype.value))
    millions, channels = sum(weight.numel() for weight in model.parameters()) / 1e6, model.config.in_channels
    console.print(f'{millions:,.1f} M parameters, {channels} channels. Pictures: microdit sample {out} "..." --guidance 5')


def import_minit2i(
    checkpoint: Annotated[
        Path, typer.Argument(help="A file of MiniT2I's weights: Flax .msgpack, or a PyTorch copy as .safetensors or .pt.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    text_encoder: Annotated[
        str, typer.Option(help="A folder, which is copied, or a name that is looked up when pictures are generated.")
    ] = "google/flan-t5-large",
    resolution: Annotated[int, typer.Option(min=1, help="Pixels of a side of the images that it was trained on.")] = 512,
    caption_length: Annotated[int, typer.Option(min=1, help="Tokens that it was trained on.")] = 256,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = Dtype.float32,
) -> None:
    """Convert a checkpoint of MiniT2I. None of its code is run; sizes are read from the tensors' shapes.

    Example: microdit import-minit2i checkpoint.msgpack minit2i-b-16
    """
    from microdit.pipelines.import_minit2i import MiniT2ISettings, import_minit2i

    model = import_minit2i(checkpoint, out, MiniT2ISettings(text_encoder, resolution, caption_length, dtype.value))
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    steps = "--guidance 6 --steps 100 --solver euler"
    console.print(f'{millions:,.1f} M parameters, {resolution} px. Pictures: microdit sample {out} "..." {steps}')


def _training_flops(run: Path) -> float | None:
    """Return the training FLOPs of a finished run; None if it is unfinished, or its recipe or data can no longer be read."""
    from microdit.config.load import load_recipe
    from microdit.planning.workload import phase_flops, shapes_of
    from microdit.reports.run_folder import RECIPE, RunFolder

    if RunFolder(run).status.get("state") != "finished":
        return None
    try:
        recipe = load_recipe(run / RECIPE)
        shapes = shapes_of(recipe)
    except UserError:
        return None
    return None if shapes.samples is None else sum(phase_flops(recipe, phase, shapes) for phase in recipe.phases)
