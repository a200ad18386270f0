"""`microdit import-minit2i`: MiniT2I's weights as a folder that diffusers and microdit load.

Three kinds of files: the parameter tree of the JAX code as Flax writes it (.msgpack), alone or in the state of its trainer, of which the
average with the slowest decay is taken; and the PyTorch copies, as safetensors or .pt. Sizes are read off the tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from microdit.diffusion.flow import Flow
from microdit.encoders.text import FrozenTextEncoder, load_text_encoder
from microdit.errors import UserError
from microdit.io.files import sha256_of
from microdit.models.minit2i import CAPTION_LENGTH, load_minit2i
from microdit.pipelines.components import MicroDiTTransformer2DModel, ReferencedTextEncoder, noise_settings_of
from microdit.pipelines.export import Dtype, check_is_free, convert_parts, save_pipeline
from microdit.pipelines.foreign_checkpoint import check_fits, copied, in_float32, read_tensors
from microdit.pipelines.model_card import card_of_minit2i
from microdit.pipelines.pipeline import MicroDiTPipeline

TEXT_ENCODER = "google/flan-t5-large"
RESOLUTION = 512  # of the released models
OBJECTIVE = Flow("image", t_mean=-0.8, t_std=0.8, noise_scale=2.0, training_floor=0.01, sampling_floor=0.05)

_FIRST_LAYER = re.compile(r"(.*?)img_embedder\.proj1\.(?:kernel|weight)")


@dataclass(frozen=True)
class MiniT2ISettings:
    """Settings that the weights lack: the text encoder (a folder is copied, anything else kept as a name), pixels and caption tokens."""

    text_encoder: str = TEXT_ENCODER
    resolution: int = RESOLUTION
    caption_length: int = CAPTION_LENGTH
    dtype: Dtype = "float32"


def import_minit2i(checkpoint: Path, out: Path, settings: MiniT2ISettings = MiniT2ISettings()) -> MicroDiTTransformer2DModel:
    """Write the pipeline of the checkpoint to the folder `out`, and return the model in it.

    Raises UserError if the checkpoint is damaged, of another architecture or could run code, if the text encoder does not fit, or if
    patches do not divide the resolution.
    """
    check_is_free(out)
    tensors = read_tensors(checkpoint)
    try:
        denoiser = load_minit2i(in_float32(network_of(tensors)), settings.caption_length).eval().requires_grad_(False)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    config, side = denoiser.config, settings.resolution
    if side % config.patch_size:
        raise UserError(f"Images of {side} x {side} cannot be cut into patches of {config.patch_size}: choose another --resolution.")
    text = copied(settings.text_encoder, load_text_encoder)
    check_fits("text encoder", text, config.caption_channels)
    pipeline = MicroDiTPipeline(
        MicroDiTTransformer2DModel.around(denoiser, (side, side)),
        noise_settings_of(OBJECTIVE),
        None,  # images are made of pixels
        text.loaded.model if isinstance(text, FrozenTextEncoder) else ReferencedTextEncoder(settings.text_encoder),
        text.loaded.tokenizer if isinstance(text, FrozenTextEncoder) else None,
        vae_scale_factor=1,
        pad_token_id=text.loaded.pad_id if isinstance(text, FrozenTextEncoder) else None,
    )
    convert_parts(
        pipeline, settings.dtype, f"As {settings.dtype}, the weights of {checkpoint}", "take --dtype float32, or download it again"
    )
    record = {
        "file": checkpoint.name,
        "sha256": sha256_of(checkpoint),
        "parameters": sum(weight.numel() for weight in denoiser.parameters()),
        "resolution": side,
        "dtype": settings.dtype,
        "text_encoder": settings.text_encoder,
    }
    save_pipeline(pipeline, out, record, card_of_minit2i(out.name, record))
    return pipeline.transformer


def network_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the network's tensors by their own names. Of a trainer's state: those of the slowest average, else the trained ones."""
    prefixes = {found[1] for name in tensors if (found := _FIRST_LAYER.fullmatch(name)) and "opt_state" not in found[1]}
    if not prefixes:
        raise UserError("This is not a checkpoint of MiniT2I: it has no layer img_embedder.proj1.")

    def rank(prefix: str) -> tuple[bool, bool, str]:
        return "ema_params_dict." in prefix, "ema_params." in prefix, prefix

    best = max(prefixes, key=rank)
    return {name.removeprefix(best): tensor for name, tensor in tensors.items() if name.startswith(best)}
