"""The one place where a pipeline of diffusers meets our sampler.

Shape legend: B batch, C channels, H W height and width, L caption tokens, E caption channels.

`MicroDiTPipeline`: captions to pictures as diffusers' users know it.

    pipeline = MicroDiTPipeline.from_pretrained(folder_or_hub_id)
    pipeline("red heart", generator=torch.Generator().manual_seed(7)).images[0].save("heart.png")

Our own `microdit.pipelines.native.Pipeline` draws the same pictures, to the last bit in float32, from the same seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from microdit.data.pixels import to_image
from microdit.diffusion.edm import EDM
from microdit.diffusion.guidance import Text, guided_denoiser
from microdit.diffusion.samplers import Step, heun, noise_schedule, state_dtype
from microdit.encoders.autoencoder import decode_latents
from microdit.encoders.model_files import dtype_argument
from microdit.encoders.text import FrozenTextEncoder, TextEncoder, as_text_model
from microdit.errors import UserError
from microdit.models.microdit import MicroDiT
from microdit.pipelines.components import (
    EDMSettings,
    MicroDiTTransformer2DModel,
    ReferencedAutoencoder,
    ReferencedTextEncoder,
    refuse_incomplete_autoencoder,
    refuse_strange_components,
)


@dataclass(frozen=True)
class Prompt:
    """Embedded captions: one vector a token, and which of them count (None: all)."""

    text_BLE: Tensor
    mask_BL: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Prompt":
        return Prompt(self.text_BLE.to(device, dtype), None if self.mask_BL is None else self.mask_BL.to(device))

    def repeated(self, count: int) -> "Prompt":
        """Each caption `count` times in a row."""
        mask_BL = None if self.mask_BL is None else self.mask_BL.repeat_interleave(count, dim=0)
        return Prompt(self.text_BLE.repeat_interleave(count, dim=0), mask_BL)

    def padded(self, length: int) -> "Prompt":
        """With zeros to `length` tokens, which do not count."""
        more = length - self.text_BLE.shape[1]
        mask_BL = self.text_BLE.new_ones(self.text_BLE.shape[:2], dtype=torch.bool) if self.mask_BL is None else self.mask_BL
        return Prompt(F.pad(self.text_BLE, (0, 0, 0, more)), F.pad(mask_BL, (0, more)))


AfterStep = Callable[[int, Tensor, Tensor], Tensor | None]
"""(number of the step, its sigma, latents) -> the latents to go on with, or None to stop here."""


@torch.no_grad()
def draw_latents(
    model: MicroDiT,
    edm: EDM,
    noise_BCHW: Tensor,
    prompt: Prompt,
    negative: Prompt | None,
    num_inference_steps: int,
    guidance_scale: float,
    on_step: Callable[[int], None],
    after_step: AfterStep | None = None,
) -> Tensor:
    """Latents (B, C, H, W) from standard normal noise. `negative`: what to move away from, in the place of the empty caption.

    With `after_step` the sampler runs step by step: its state is then rounded to float32 after each, as whoever looks at it sees it.
    """
    away: Text | None = None
    if negative is not None and guidance_scale != 1:
        if prompt.text_BLE.shape[1] != negative.text_BLE.shape[1] or (prompt.mask_BL is None) != (negative.mask_BL is None):
            length = max(prompt.text_BLE.shape[1], negative.text_BLE.shape[1])
            prompt, negative = prompt.padded(length), negative.padded(length)
        away = Text(negative.text_BLE, negative.mask_BL)
    denoiser = guided_denoiser(model, edm, prompt.text_BLE, prompt.mask_BL, guidance_scale, negative=away)

    def count(step: Step) -> None:
        on_step(len(step.denoised_BCHW))

    sigmas = noise_schedule(edm, num_inference_steps)
    if after_step is None:
        return heun(denoiser, noise_BCHW, sigmas, count)
    dtype = state_dtype(noise_BCHW.device)
    latents_BCHW = (noise_BCHW.to(dtype) * sigmas[0].item()).float()
    for index in range(num_inference_steps):
        standard_BCHW = latents_BCHW.to(dtype) / sigmas[index].item()  # heun multiplies by the first of its sigmas
        latents_BCHW = heun(denoiser, standard_BCHW, sigmas[index : index + 2], count)
        changed_BCHW = after_step(index, sigmas[index], latents_BCHW)
        if changed_BCHW is None:
            break
        latents_BCHW = changed_BCHW
    return latents_BCHW


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class MicroDiTPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Components may be left out at loading (`vae=None`): without the text encoder give `prompt_embeds`, without the autoencoder ask for
    `output_type="latent"`.

    `vae_scale_factor` is how many pixels a side of one latent spans, 1 for models of pixels, which have no autoencoder. `mask_padding`:
    padded tokens are hidden from the model. `full_captions`: captions are padded to their full length, with what the text encoder says
    at padding, as the authors' models want it. `pad_token_id`: where it is not the tokenizer's.

    >>> from microdit.pipelines.load import DEMO
    >>> pipeline = MicroDiTPipeline.from_pretrained(DEMO)
    >>> pipeline.set_progress_bar_config(disable=True)
    >>> pipeline("red heart", num_inference_steps=2, generator=torch.Generator().manual_seed(7)).images[0].size
    (64, 64)
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        transformer: MicroDiTTransformer2DModel,
        scheduler: EDMSettings,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | ReferencedAutoencoder | None = None,
        text_encoder: PreTrainedModel | ReferencedTextEncoder | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vae_scale_factor: int = 8,
        mask_padding: bool = True,
        full_captions: bool = False,
        pad_token_id: int | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(
            vae_scale_factor=vae_scale_factor, mask_padding=mask_padding, full_captions=full_captions, pad_token_id=pad_token_id
        )
        if vae is not None:
            vae.to(memory_format=torch.channels_last)  # as `DiffusersAutoencoder`: faster, and the same to the last bit
        self._interrupt = False

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Of a folder. Raises UserError if it names components that are none of this pipeline's."""
        config = super().load_config(pretrained_model_name_or_path, **kwargs)
        refuse_strange_components(config[0] if isinstance(config, tuple) else config, str(pretrained_model_name_or_path))
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """As in diffusers, but only safetensors are read. Float32, unless `dtype` says otherwise."""
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)) or torch.float32
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True}, **dtype_argument(dtype))
        vae = Path(pretrained_model_name_or_path) / "vae"
        if vae.is_dir() and "vae" not in kwargs and isinstance(pipeline.vae, AutoencoderKL | AutoencoderTiny | AutoencoderDC):
            refuse_incomplete_autoencoder(vae, pipeline.vae)
        return pipeline

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to stop behind its step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Pictures of `prompt`, each `num_images_per_prompt` times in a row.

        `height` and `width` in pixels, by default as trained. `generator`: one for all, or a list of one for each picture. `latents`:
        standard normal noise (B, C, H, W) to begin with, instead. `prompt_embeds` (B, L, E) with `prompt_attention_mask` (B, L) take
        the prompts' place; the same holds for the negative ones, which take the empty caption's. `output_type`: pil; np (B, H, W, 3)
        and pt (B, 3, H, W), both in [0, 1]; or latent (B, C, H, W). `callback_on_step_end(pipeline, step, sigma, {"latents": ...})`
        may return other latents. Raises UserError for settings that make no picture.
        """
        _refuse_settings(num_inference_steps, guidance_scale, num_images_per_prompt, output_type)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise UserError(f"callback_on_step_end_tensor_inputs may hold {self._callback_tensor_inputs}, not {sorted(unknown)}.")
        device, dtype = self._execution_device, self.transformer.dtype

        wanted = self._prompt("prompt", prompt, prompt_embeds, prompt_attention_mask)
        wanted = wanted.to(device, dtype).repeated(num_images_per_prompt)
        count = len(wanted.text_BLE)
        negative = None
        if guidance_scale != 1 and (negative_prompt is not None or negative_prompt_embeds is not None):
            negative = self._prompt("negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask)
            negative = _as_many(negative.to(device, dtype), count, num_images_per_prompt)
        noise_BCHW = self._noise((count, *self._latent_shape(height, width)), generator, latents, device)

        after_step = self._after_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
        _onload(self.transformer)
        with self.progress_bar(total=num_inference_steps) as bar:
            latents_BCHW = draw_latents(
                self.transformer.denoiser,
                self.scheduler.edm,
                noise_BCHW,
                wanted,
                negative,
                num_inference_steps,
                guidance_scale,
                lambda _: bar.update(),
                after_step,
            )
        images = latents_BCHW if output_type == "latent" else self._finish(self.decode(latents_BCHW), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode_prompt(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """`prompt_embeds` (B, L, E) and `prompt_attention_mask` (B, L), or None if all tokens count."""
        if self.text_encoder is None:
            raise UserError("This pipeline was loaded without its text encoder: give prompt_embeds instead of prompts.")
        _onload(self.text_encoder)
        encoder = self.frozen_text_encoder()
        if self.config.full_captions:
            return encoder.embed_full(encoder.tokenize(prompts)), None
        text_BLE, mask_BL = encoder.encode(prompts)
        return text_BLE, mask_BL if self.config.mask_padding else None

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), in [-1, 1] or a little outside."""
        if self.vae is None and self.config.vae_scale_factor != 1:
            raise UserError('This pipeline was loaded without its autoencoder: ask for output_type="latent".')
        if self.vae is None:
            return latents_BCHW
        _onload(self.vae)
        return self.vae.decode(latents_BCHW) if isinstance(self.vae, ReferencedAutoencoder) else decode_latents(self.vae, latents_BCHW)

    def frozen_text_encoder(self) -> TextEncoder:
        """The text encoder with its tokenizer, as the rest of microdit knows them."""
        if isinstance(self.text_encoder, ReferencedTextEncoder):
            return self.text_encoder.encoder
        pad_id = self.config.pad_token_id
        loaded = as_text_model(self.text_encoder, self.tokenizer, self.tokenizer.pad_token_id if pad_id is None else pad_id)
        return FrozenTextEncoder("text_encoder", loaded)

    def _prompt(self, name: str, texts: str | list[str] | None, text_BLE: Tensor | None, mask_BL: Tensor | None) -> Prompt:
        if (texts is None) == (text_BLE is None):
            raise UserError(f"Give either {name} or {name}_embeds.")
        if text_BLE is None:
            prompts = [texts] if isinstance(texts, str) else list(texts or [])
            if not prompts:
                raise UserError(f'{name} is an empty list: write at least one, for example "red heart".')
            return Prompt(*self.encode_prompt(prompts))
        channels = self.transformer.config.caption_channels
        if text_BLE.ndim != 3 or text_BLE.shape[2] != channels:
            raise UserError(f"{name}_embeds must be of shape (captions, tokens, {channels}), not {tuple(text_BLE.shape)}.")
        return Prompt(text_BLE, None if mask_BL is None else mask_BL.bool())

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        scale, config = self.config.vae_scale_factor, self.transformer.config
        sides = []
        for name, side, default in zip(("height", "width"), (height, width), config.sample_size, strict=True):
            if side is not None and (side <= 0 or side % (scale * config.patch_size)):
                raise UserError(f"{name} {side} must be a multiple of {scale * config.patch_size} pixels.")
            sides.append(default if side is None else side // scale)
        return config.in_channels, sides[0], sides[1]

    def _noise(self, shape: tuple[int, ...], generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
        if latents is not None:
            if latents.shape != shape:
                raise UserError(f"latents must be of shape {shape}, not {tuple(latents.shape)}.")
            return latents.to(device, torch.float32)
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise UserError(f"{shape[0]} pictures need as many generators, or a single one; the list holds {len(generator)}.")
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _after_step(self, callback: Any, names: tuple[str, ...] | list[str]) -> AfterStep | None:
        self._interrupt = False
        if callback is None:
            return None

        def after_step(index: int, sigma: Tensor, latents_BCHW: Tensor) -> Tensor | None:
            answer = callback(self, index, sigma, dict.fromkeys(names, latents_BCHW)) or {}
            return None if self._interrupt else answer.get("latents", latents_BCHW)

        return after_step

    @staticmethod
    def _finish(pixels_BCHW: Tensor, output_type: str) -> Any:
        if output_type == "pil":
            return [to_image(pixels) for pixels in pixels_BCHW.cpu()]
        unit_BCHW = (pixels_BCHW.float() / 2 + 0.5).clamp(0, 1)
        return unit_BCHW if output_type == "pt" else np.ascontiguousarray(unit_BCHW.permute(0, 2, 3, 1).cpu().numpy())


def is_pipeline(folder: Path) -> bool:
    """Whether `folder` holds a pipeline of diffusers, ours or another."""
    return (folder / "model_index.json").is_file()


def _refuse_settings(num_inference_steps: int, guidance_scale: float, num_images_per_prompt: int, output_type: str) -> None:
    if not 2 <= num_inference_steps <= 1000:
        raise UserError(f"num_inference_steps must be from 2 to 1000, not {num_inference_steps}; 18 to 30 are usual.")
    if not -100 <= guidance_scale <= 100:
        raise UserError(f"guidance_scale must be a number between -100 and 100, not {guidance_scale}; 3 to 6 are usual.")
    if num_images_per_prompt < 1:
        raise UserError(f"num_images_per_prompt must be at least 1, not {num_images_per_prompt}.")
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type}.")


def _as_many(negative: Prompt, count: int, num_images_per_prompt: int) -> Prompt:
    """One negative prompt for all pictures, or one for each prompt."""
    if len(negative.text_BLE) == 1:
        return negative.repeated(count)
    if len(negative.text_BLE) * num_images_per_prompt != count:
        raise UserError(f"{count // num_images_per_prompt} prompts and {len(negative.text_BLE)} negative ones: give one, or one for each.")
    return negative.repeated(num_images_per_prompt)


def _onload(module: nn.Module) -> None:
    """With `enable_model_cpu_offload`: bring the module to the GPU, as its `forward` would, which is not what is called here."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
