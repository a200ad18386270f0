"""A pipeline's folder on the disk: written beside and renamed, so that it is there whole or not at all.

Our pipeline as one of diffusers, and back.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from microdit.checkpoint import check_finite
from microdit.encoders.autoencoder import Autoencoder, DiffusersAutoencoder, Pixels
from microdit.encoders.text import FrozenTextEncoder, MiniLM
from microdit.errors import UserError
from microdit.io.files import aside_of, stale_asides
from microdit.io.text import parse_json_object
from microdit.pipelines.components import EDMSettings, MicroDiTTransformer2DModel, ReferencedAutoencoder, ReferencedTextEncoder
from microdit.pipelines.diffusers_pipeline import MicroDiTPipeline
from microdit.pipelines.native import Pipeline

RECORD = "record.json"  # where a model comes from: written by us beside what diffusers reads
CARD = "README.md"


def refuse_to_overwrite(folder: Path) -> None:
    """Raises UserError if there is something at `folder`, other than an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not empty: name another folder, or delete it first.")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """`fill` writes into an empty folder beside `folder`, which then takes its name.

    Raises UserError if the name is taken, or the disk is full.
    """
    refuse_to_overwrite(folder)
    folder = folder.resolve()
    aside = aside_of(folder)
    try:
        for left in (aside, *stale_asides(folder.parent, folder.name)):
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
        fill(aside)
        for path in aside.glob("*/config.json"):
            _forget_this_machine(path)
        for path in aside.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # the libraries write weights for their owner alone
        if folder.is_dir():
            folder.rmdir()
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _forget_this_machine(config: Path) -> None:
    """The libraries write where a component was loaded from, which is nobody else's business."""
    values = json.loads(config.read_text(encoding="utf-8"))
    if values.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_record(folder: Path, record: dict[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Empty if there is none, or it makes no sense: nothing is drawn by it."""
    try:
        return parse_json_object((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}


def to_diffusers(pipeline: Pipeline) -> MicroDiTPipeline:
    """The same parts; nothing is copied. MiniLM becomes a reference."""
    height, width = pipeline.latent_shape[1:]
    autoencoder, text = pipeline.autoencoder, pipeline.text_encoder
    assert isinstance(text, FrozenTextEncoder)  # the only kind there is
    by_name = ReferencedTextEncoder(text.name, text.fingerprint) if isinstance(text, MiniLM) else None
    tokenizer, pad_id = (None, None) if by_name else (text.loaded.tokenizer, text.loaded.pad_id)
    return MicroDiTPipeline(
        MicroDiTTransformer2DModel.around(pipeline.model, (height, width)),
        EDMSettings.around(pipeline.edm),
        autoencoder.model if isinstance(autoencoder, DiffusersAutoencoder) else None,
        by_name or text.loaded.model,
        tokenizer,
        vae_scale_factor=autoencoder.downsampling,
        mask_padding=pipeline.mask_padding,
        full_captions=pipeline.full_captions,
        pad_token_id=pad_id,
    )


def refuse_infinite_parts(pipeline: MicroDiTPipeline, what: str, fix: str) -> None:
    """Raises UserError if a part has weights that are not finite, as those too large for 16 bits are there. `what` begins the sentence."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            check_finite(dict(part.named_parameters()), f"{what} ({name})", fix)


def from_diffusers(pipeline: MicroDiTPipeline) -> Pipeline:
    """The same parts; nothing is copied. Raises UserError if the denoiser's weights are not finite."""
    transformer, config = pipeline.transformer, pipeline.config
    check_finite(dict(transformer.named_parameters()), "The denoiser's weights", "export or download it again")
    height, width = transformer.config.sample_size
    return Pipeline(
        transformer.denoiser.eval().requires_grad_(False),
        pipeline.scheduler.edm,
        _autoencoder(pipeline),
        pipeline.frozen_text_encoder(),
        (transformer.config.in_channels, height, width),
        config.mask_padding,
        config.full_captions,
    )


def _autoencoder(pipeline: MicroDiTPipeline) -> Autoencoder:
    if pipeline.vae is None:
        return Pixels()
    if isinstance(pipeline.vae, ReferencedAutoencoder):
        return pipeline.vae.encoder
    return DiffusersAutoencoder("vae", pipeline.vae, "")
