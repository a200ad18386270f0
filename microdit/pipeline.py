"""From captions to pictures: text encoder, denoiser, sampler and autoencoder together."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from microdit.checkpoint import Checkpoint, default_weights, find_weights
from microdit.data.pixels import to_image
from microdit.diffusion.edm import EDM
from microdit.diffusion.sampling import guided_denoiser, heun, noise_schedule
from microdit.encoders.autoencoder import Autoencoder, load_autoencoder
from microdit.encoders.text import TextEncoder, load_text_encoder
from microdit.errors import UserError
from microdit.model.microdit import MicroDiT, ModelConfig

BATCH = 64


@dataclass(frozen=True)
class Pipeline:
    """All that is needed to make pictures. `from_run` loads it from a run's newest whole checkpoint."""

    model: MicroDiT
    edm: EDM
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    latent_shape: tuple[int, int, int]
    mask_padding: bool
    full_captions: bool = False  # with the padding's vectors, as the authors' models were trained

    @classmethod
    def around(cls, model: MicroDiT, state: dict[str, Any]) -> "Pipeline":
        """`model` with the encoders that a checkpoint's `state` names. Raises UserError if these have changed since."""
        card = state["data"]
        autoencoder = load_autoencoder(card["autoencoder"]["name"])
        text_encoder = load_text_encoder(card["text_encoder"]["name"])
        for encoder, wanted in ((autoencoder, card["autoencoder"]), (text_encoder, card["text_encoder"])):
            if encoder.fingerprint != wanted["fingerprint"]:
                raise UserError(
                    f"The encoder '{encoder.name}' is not the one that the data was encoded with "
                    f"(fingerprint {encoder.fingerprint}, not {wanted['fingerprint']}): encode and train again, or bring back the old one."
                )
        channels, height, width = card["latent_shape"]
        shape, full = (channels, height, width), card["captions"] == "full"
        return cls(model, EDM(**state["edm"]), autoencoder, text_encoder, shape, state["mask_padding"], full)

    @classmethod
    def from_run(cls, run: Path, warn: Callable[[str], None], weights: str | None = None) -> tuple["Pipeline", Checkpoint]:
        """With the averaged weights of the newest whole checkpoint in the run folder, or with those named: model, ema, ema-DECAY."""
        checkpoint = find_weights(run, warn, weights)
        if checkpoint is None:
            raise UserError(f"There is no checkpoint in {run}: train one with 'microdit train RECIPE --out {run}'.")
        return cls.from_checkpoint(checkpoint, weights), checkpoint

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, weights: str | None = None) -> "Pipeline":
        """With those of its weights that `from_run` takes."""
        model = model_of(checkpoint.model_config, checkpoint.tensors(weights or default_weights(checkpoint)))
        return cls.around(model, checkpoint.state)

    def to(self, device: torch.device | str) -> "Pipeline":
        """All of its parts, in float32; they are moved, not copied."""
        self.model.to(device)
        self.autoencoder.to(device)
        self.text_encoder.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: list[str],
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        seed: int = 0,
        on_step: Callable[[int], None] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Image.Image]:
        """One picture a prompt. Picture number i starts from the noise of seed + i, whatever the others are.

        `height` and `width` in pixels, if not those of the training data's squares. `on_step(n)` is called after each n more
        picture-steps. Raises UserError for settings that make no picture.
        """
        if not prompts:
            raise UserError('There is no prompt: write at least one, for example "red heart".')
        if not 2 <= num_inference_steps <= 1000:
            raise UserError(f"The sampler takes from 2 to 1000 steps, not {num_inference_steps}; 18 to 30 are usual.")
        if not -100 <= guidance_scale <= 100:
            raise UserError(f"guidance_scale must be a number between -100 and 100, not {guidance_scale}; 3 to 6 are usual.")
        shape = self._latent_shape(height, width)
        device = next(self.model.parameters()).device  # the encoders may be elsewhere: while training they are on the CPU
        images: list[Image.Image] = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            noise_BCHW = torch.stack([_noise(shape, seed + start + i) for i in range(len(batch))]).to(device)
            text_BLE, mask_BL = self._embed(batch)
            text_BLE, mask_BL = text_BLE.to(device), None if mask_BL is None else mask_BL.to(device)
            denoiser = guided_denoiser(self.model, self.edm, text_BLE, mask_BL, guidance_scale)
            latents_BCHW = heun(denoiser, noise_BCHW, noise_schedule(self.edm, num_inference_steps), on_step)
            images += [to_image(pixels) for pixels in self.autoencoder.decode(latents_BCHW).cpu()]
        return images

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        channels, *trained = self.latent_shape
        step = self.autoencoder.downsampling * self.model.config.patch_size
        sides = []
        for name, side, default in (("height", height, trained[0]), ("width", width, trained[1])):
            if side is not None and (side <= 0 or side % step):
                raise UserError(f"{name} {side} must be a multiple of {step}: the autoencoder's pixels a latent, times the patch size.")
            sides.append(default if side is None else side // self.autoencoder.downsampling)
        return channels, sides[0], sides[1]

    def _embed(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        if self.full_captions:
            return self.text_encoder.embed_full(self.text_encoder.tokenize(prompts)), None
        text_BLE, mask_BL = self.text_encoder.encode(prompts)
        return text_BLE, mask_BL if self.mask_padding else None


def model_of(config: ModelConfig, weights: dict[str, Tensor]) -> MicroDiT:
    """A model for drawing, which takes the weights as they are."""
    with torch.device("meta"):
        model = MicroDiT(config)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _noise(shape: tuple[int, int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
