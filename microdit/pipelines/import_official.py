"""`microdit import-official`: the authors' released checkpoints as a folder that diffusers and microdit load.

Two layouts: the denoiser's weights alone, under their names or with `dit.` before them (a `LatentDiffusion` saved whole); and the state of
their trainer (Composer), where they lie at state -> model -> `dit.*`, as nested dictionaries or as one name with dots. The words that
compiled and wrapped modules put into the names are removed. Sizes are read off the tensors.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from microdit.diffusion.edm import EDM
from microdit.encoders.autoencoder import DiffusersAutoencoder, load_autoencoder
from microdit.encoders.text import FrozenTextEncoder, load_text_encoder
from microdit.errors import UserError
from microdit.io.files import sha256_of
from microdit.models.microdit import MicroDiT
from microdit.models.official import load_official
from microdit.pipelines.components import MicroDiTTransformer2DModel, ReferencedAutoencoder, ReferencedTextEncoder, noise_settings_of
from microdit.pipelines.export import Dtype, check_is_free, convert_parts, save_pipeline
from microdit.pipelines.foreign_checkpoint import check_fits, copied, in_float32, read_tensors
from microdit.pipelines.model_card import card_of_official
from microdit.pipelines.pipeline import MicroDiTPipeline

TEXT_ENCODER = "dfn-clip-h"
AUTOENCODERS = {4: "sdxl", 16: "16ch"}  # by the channels of the latents
DOWNSAMPLING = 8  # of both

_PREFIXES = ("state.model.dit.", "model.dit.", "dit.")


@dataclass(frozen=True)
class ImportSettings:
    """Encoders, as `load_text_encoder` and `load_autoencoder` name them: a folder is copied, anything else is kept as a name.

    `autoencoder` is by default chosen by the channels of the latents. `head_dim`, the width of an attention head, is known for the
    released models, and must be given for others.
    """

    text_encoder: str = TEXT_ENCODER
    autoencoder: str | None = None
    head_dim: int | None = None
    dtype: Dtype = "float32"


def import_official(checkpoint: Path, out: Path, settings: ImportSettings = ImportSettings()) -> MicroDiTTransformer2DModel:
    """Write the pipeline of the checkpoint to the folder `out`, and return the model in it.

    Raises UserError if the checkpoint is damaged, of another architecture or could run code, or if an encoder does not fit.
    """
    check_is_free(out)
    tensors = read_checkpoint(checkpoint)
    try:
        denoiser = load_official(tensors, settings.head_dim).eval().requires_grad_(False)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    side = round(tensors["pos_embed"].shape[1] ** 0.5) * denoiser.config.patch_size
    pipeline = _pipeline(denoiser, side, settings)
    convert_parts(
        pipeline, settings.dtype, f"As {settings.dtype}, the weights of {checkpoint}", "take --dtype float32, or download it again"
    )
    record = {
        "file": checkpoint.name,
        "sha256": sha256_of(checkpoint),
        "parameters": sum(weight.numel() for weight in denoiser.parameters()),
        "latent_channels": denoiser.config.in_channels,
        "latent_size": side,
        "dtype": settings.dtype,
        "text_encoder": settings.text_encoder,
        "autoencoder": _autoencoder_name(denoiser, settings),
    }
    save_pipeline(pipeline, out, record, card_of_official(out.name, record))
    return pipeline.transformer


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the denoiser's tensors by the authors' names, in float32. Raises UserError; nothing in the file is run."""
    found = read_tensors(path)
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
            break
    return in_float32(found)


def _autoencoder_name(denoiser: MicroDiT, settings: ImportSettings) -> str:
    channels = denoiser.config.in_channels
    name = settings.autoencoder or AUTOENCODERS.get(channels)
    if name is None:
        raise UserError(f"The authors' models have latents of 4 or 16 channels, this one has {channels}: name its --autoencoder.")
    return name


def _pipeline(denoiser: MicroDiT, side: int, settings: ImportSettings) -> MicroDiTPipeline:
    """Build the pipeline. The model sees captions with all vectors at padding, as the authors trained it."""
    text = copied(settings.text_encoder, load_text_encoder)
    vae_name = _autoencoder_name(denoiser, settings)
    vae = copied(vae_name, load_autoencoder)
    check_fits("text encoder", text, denoiser.config.caption_channels)
    check_fits("autoencoder", vae, denoiser.config.in_channels)
    return MicroDiTPipeline(
        MicroDiTTransformer2DModel.around(denoiser, (side, side)),
        noise_settings_of(EDM()),
        vae.model if isinstance(vae, DiffusersAutoencoder) else ReferencedAutoencoder(vae_name),
        text.loaded.model if isinstance(text, FrozenTextEncoder) else ReferencedTextEncoder(settings.text_encoder),
        text.loaded.tokenizer if isinstance(text, FrozenTextEncoder) else None,
        vae_scale_factor=vae.downsampling if isinstance(vae, DiffusersAutoencoder) else DOWNSAMPLING,
        mask_padding=False,
        full_captions=True,
        pad_token_id=text.loaded.pad_id if isinstance(text, FrozenTextEncoder) else None,
    )
