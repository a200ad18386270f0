"""Our pipeline as one of diffusers, and back."""

from torch import nn

from microdit.checkpoint import refuse_infinite
from microdit.encoders.autoencoder import Autoencoder, DiffusersAutoencoder, Pixels
from microdit.encoders.text import FrozenTextEncoder, MiniLM
from microdit.hub.pipeline import MicroDiTPipeline
from microdit.hub.references import ReferencedAutoencoder, ReferencedTextEncoder
from microdit.hub.scheduler import EDMSettings
from microdit.hub.transformer import MicroDiTTransformer2DModel
from microdit.pipeline import Pipeline


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
            refuse_infinite(dict(part.named_parameters()), f"{what} ({name})", fix)


def from_diffusers(pipeline: MicroDiTPipeline) -> Pipeline:
    """The same parts; nothing is copied. Raises UserError if the denoiser's weights are not finite."""
    transformer, config = pipeline.transformer, pipeline.config
    refuse_infinite(dict(transformer.named_parameters()), "The denoiser's weights", "export or download it again")
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
