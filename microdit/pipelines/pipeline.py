"""`MicroDiTPipeline`: from captions to images, for diffusers' users, the command line, the web page, training and evaluation alike.

    pipeline = MicroDiTPipeline.from_pretrained("runs/emoji")  # or an exported folder, an id of the hub, or "demo"
    pipeline("red heart", generator=torch.Generator().manual_seed(7)).images[0].save("heart.png")

There are two ways to call it: diffusers' (`__call__`), and the one with `SamplerSettings` and a seed (`generate`). Both clean and embed
prompts, sample and decode with the same functions, so that the same words, settings and noise give the same image, bit for bit.

Shape legend: B batch, C channels, H W height and width, L caption tokens, E caption channels.
"""

import copy
import logging
import math
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from microdit.checkpoint import STATE, Checkpoint, check_finite, default_weights, find_weights
from microdit.data.manifest import has_manifest
from microdit.data.pixels import to_image
from microdit.diffusion.guidance import GuidanceKind, Guide, Text
from microdit.diffusion.objective import Objective
from microdit.diffusion.samplers import OnStep, Solver, Step
from microdit.encoders.autoencoder import Autoencoder, DiffusersAutoencoder, Pixels, lay_out_for_speed, load_autoencoder
from microdit.encoders.captions import clean_caption, clean_prompts, warn_of_unread
from microdit.encoders.model_files import dtype_argument, loading
from microdit.encoders.text import FrozenTextEncoder, MiniLM, TextEncoder, as_text_model, load_text_encoder
from microdit.errors import UserError
from microdit.io.near_names import did_you_mean_path
from microdit.io.untrusted_text import one_line
from microdit.models.microdit import MicroDiT
from microdit.pipelines.components import (
    MicroDiTTransformer2DModel,
    NoiseSettings,
    ReferencedAutoencoder,
    ReferencedTextEncoder,
    check_autoencoder_is_whole,
    check_scheduler,
    check_unchanged,
    checked_components,
    noise_settings_of,
)
from microdit.pipelines.prompts import GivenPrompts, aligned, check_negatives, repeated
from microdit.pipelines.sampling import draw_latents, frozen_model, recorded_objective, round_matrices, seeded
from microdit.pipelines.settings import DEFAULT_SETTINGS, SamplerSettings, suited_to
from microdit.reports.run_folder import is_run

DEMO = Path(__file__).parents[1] / "demo_model"  # put there by: microdit export runs/emoji microdit/demo_model --dtype float16
INDEX = "model_index.json"
BATCH = 64  # images that are sampled at a time
DECODED_PIXELS = 2**21  # decoded at a time: 8 images of 512 px
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Encoders = tuple[Autoencoder, TextEncoder]
Warn = Callable[[str], None]

log = logging.getLogger(__name__)


class _InterruptedError(Exception):
    """Raised between two steps, with the latents at which a callback has stopped the sampling."""

    def __init__(self, latents_BCHW: Tensor):
        self.latents_BCHW = latents_BCHW


class MicroDiTPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A text-to-image pipeline of diffusers around `MicroDiT`.

    Components may be left out at loading (`vae=None`): without the text encoder give `prompt_embeds`, without the autoencoder ask for
    `output_type="latent"`.

    Args:
        vae_scale_factor: how many pixels a side of one latent spans; 1 for models of pixels, which have no autoencoder.
        mask_padding: whether padded tokens are hidden from the model.
        full_captions: whether captions are padded to their full length, with the text encoder's vectors at padding, as the authors'
            models were trained.
        pad_token_id: for padding, where it is not the tokenizer's.

    >>> pipeline = MicroDiTPipeline.from_pretrained("demo")
    >>> pipeline.set_progress_bar_config(disable=True)
    >>> pipeline("red heart", num_inference_steps=2, generator=torch.Generator().manual_seed(7)).images[0].size
    (64, 64)
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012
    transformer: MicroDiTTransformer2DModel
    scheduler: NoiseSettings

    def __init__(
        self,
        transformer: MicroDiTTransformer2DModel,
        scheduler: NoiseSettings,
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
            lay_out_for_speed(vae)
        self._interrupt = False
        self._guide: Guide | None = None  # the weak model of autoguidance

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a component. Raises UserError for a scheduler that holds no noise settings of ours."""
        if name == "scheduler":
            check_scheduler(value)
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load a run folder, an exported or imported folder, an id of the hub, or the "demo" model of this package.

        Args:
            torch_dtype: what matrix products are computed in, float32 by default; `dtype` is the same. See `to`.
            device: where to move the pipeline, the CPU by default.
            weights: model, ema, or ema-DECAY of a run's newest intact checkpoint; by default ema if the checkpoint has it.
            **kwargs: diffusers' own, such as `variant`, for folders and ids. Weights are read from safetensors alone.

        Raises UserError for what is no model, is damaged, or could run code.
        """
        place = DEMO if pretrained_model_name_or_path == "demo" else Path(pretrained_model_name_or_path)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)) or torch.float32
        device, weights = kwargs.pop("device", None), kwargs.pop("weights", None)
        if is_run_folder(place):
            if kwargs:
                raise UserError(f"{place} is a run, which takes torch_dtype, device and weights, not {', '.join(kwargs)}.")
            pipeline = cls.from_checkpoint(newest_checkpoint(place, log.warning, weights), weights)
        else:
            check_no_weights(place, weights)
            pipeline = cls._from_folder(str(place), **kwargs)
        return pipeline.to(dtype) if device is None else pipeline.to(device, dtype)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, weights: str | None = None, encoders: Encoders | None = None) -> Self:
        """Build the pipeline of a run's checkpoint; `weights` as in `from_pretrained`, `encoders` as in `around`."""
        _check_describes_encoders(checkpoint)
        config, tensors = checkpoint.model_config, checkpoint.tensors(weights or default_weights(checkpoint))
        try:
            model = frozen_model(config, tensors)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            why = one_line(str(error), 300)
            raise UserError(f"{checkpoint.folder / STATE} describes another model than that of the weights beside it: {why}.") from error
        return cls.around(model, checkpoint.state, encoders)

    @classmethod
    def around(cls, model: MicroDiT, state: dict[str, Any], encoders: Encoders | None = None) -> Self:
        """Build the pipeline of a model in training from what its checkpoint would say of itself.

        The encoders that `state` names are loaded, unless they are handed in. Raises UserError if they have changed since.
        """
        data = state["data"]
        autoencoder, text_encoder = encoders or load_encoders(data)
        check_unchanged(autoencoder, data["autoencoder"]["fingerprint"])
        check_unchanged(text_encoder, data["text_encoder"]["fingerprint"])
        _, height, width = data["latent_shape"]
        objective, full = recorded_objective(state), data["captions"] == "full"
        return cls.of_parts(model, objective, autoencoder, text_encoder, (height, width), state["mask_padding"], full)

    @classmethod
    def of_parts(
        cls,
        model: MicroDiT,
        objective: Objective,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder | None,
        latent_size: tuple[int, int],
        mask_padding: bool,
        full_captions: bool = False,
    ) -> Self:
        """Build the pipeline of parts that are loaded already, none of which is copied. `latent_size`: height and width of the latents."""
        held = text_encoder if isinstance(text_encoder, FrozenTextEncoder) and not isinstance(text_encoder, MiniLM) else None
        by_name = (
            ReferencedTextEncoder.around(text_encoder) if text_encoder is not None and held is None else None
        )  # MiniLM and language models, which are large
        return cls(
            MicroDiTTransformer2DModel.around(model, latent_size),
            noise_settings_of(objective),
            autoencoder.model if isinstance(autoencoder, DiffusersAutoencoder) else None,
            held.loaded.model if held else by_name,
            held.loaded.tokenizer if held else None,
            vae_scale_factor=autoencoder.downsampling,
            mask_padding=mask_padding,
            full_captions=full_captions,
            pad_token_id=held.loaded.pad_id if held else None,
        )

    @property
    def model(self) -> MicroDiT:
        return self.transformer.denoiser

    @property
    def objective(self) -> Objective:
        return self.scheduler.objective

    @property
    def autoencoder(self) -> Autoencoder:
        """Return the autoencoder. Raises UserError if the pipeline was loaded without it."""
        if self.vae is None and self.config.vae_scale_factor != 1:
            raise UserError('This pipeline was loaded without its autoencoder: ask for output_type="latent".')
        if self.vae is None:
            return Pixels()
        return self.vae.encoder if isinstance(self.vae, ReferencedAutoencoder) else DiffusersAutoencoder("vae", self.vae, "")

    @property
    def caption_encoder(self) -> TextEncoder:
        """The text encoder with its tokenizer. Raises UserError if the pipeline was loaded without it."""
        if self.text_encoder is None:
            raise UserError("This pipeline was loaded without its text encoder: give prompt_embeds instead of prompts.")
        if isinstance(self.text_encoder, ReferencedTextEncoder):
            return self.text_encoder.encoder
        pad_id = self.config.pad_token_id
        loaded = as_text_model(self.text_encoder, self.tokenizer, self.tokenizer.pad_token_id if pad_id is None else pad_id)
        return FrozenTextEncoder(type(self.text_encoder).__name__, loaded)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents that the model was trained on."""
        height, width = self.transformer.config.sample_size
        return self.transformer.config.in_channels, height, width

    @property
    def interrupt(self) -> bool:
        """True if a callback has set `_interrupt`, which stops the sampling after its step."""
        return self._interrupt

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move all components to a device, and let matrix products be computed in a dtype; nothing is copied.

        With a half dtype the model's matrices are rounded for good, and so is the autoencoder, if it does not overflow. Everything else,
        from the noise to the residual stream, stays float32 or better, and so does the text encoder: captions are embedded once, and
        rounding there would cost more precision than in all steps of the model.
        """
        dtype = next((value for value in (*args, kwargs.pop("dtype", None)) if isinstance(value, torch.dtype)), None)
        where = [value for value in args if not isinstance(value, torch.dtype)]
        if where or kwargs:
            super().to(*where, **kwargs)
        if self._guide is not None:
            self._guide.model.to(self.model.patch_embed.weight.device)
        if dtype is not None:
            for model in (self.model, *([self._guide.model] if self._guide else [])):
                round_matrices(model, dtype)
            if self.vae is not None:
                self.autoencoder.to(self.vae.device, dtype)
        return self

    def guided_by(self, weak: "MicroDiTPipeline") -> Self:
        """Return this pipeline with `weak`'s model as the weak model of autoguidance (2406.02507).

        Raises UserError if that was trained on latents or captions of another kind.
        """
        alike = [
            (one.latent_shape, one.config.mask_padding, one.config.full_captions, type(one.objective), one.objective.noise_scale)
            for one in (self, weak)
        ]
        if alike[0] != alike[1] or not all(_same_weights(getattr(self, name), getattr(weak, name)) for name in ("vae", "text_encoder")):
            raise UserError(
                "The weak model of autoguidance was trained with another objective, other encoders, sizes or caption padding: "
                "name an earlier or smaller run on the same encoded data."
            )
        guided = copy.copy(self)
        guided._guide = Guide(weak.model, weak.objective)
        return guided

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        solver: Solver | None = None,
        guidance: GuidanceKind | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        weak_pipeline: "MicroDiTPipeline | None" = None,
        churn: float = 0.0,
        churn_interval: tuple[float, float] | None = None,
        churn_noise: float = 1.0,
        noise_range: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images of `prompt`, each `num_images_per_prompt` times in a row.

        An empty prompt is the empty caption of training. A prompt that the text encoder cuts is named in a warning of this module's log.

        Args:
            negative_prompt: what to guide away from, one for all images or one for each prompt; an empty one is none.
            height, width: in pixels, by default as in training.
            num_inference_steps, guidance_scale, solver: by default 30, 2 and heun; of a distilled model those it was trained for.
            generator: one for all images, or a list of one for each. `generate`'s seed s is a list of generators s, s + 1, ...
            latents: standard normal noise (B, C, H, W) to begin with, instead.
            prompt_embeds: vectors (B, L, E) in the place of prompts, with `prompt_attention_mask` (B, L); negative ones alike.
            output_type: pil; np (B, H, W, 3) or pt (B, 3, H, W) in [0, 1]; latent (B, C, H, W).
            callback_on_step_end: called as (pipeline, step, sigma, {"latents": ...}) after each step; may return other latents.
            guidance, guidance_interval, guidance_rescale, churn, churn_interval, churn_noise, noise_range: see `SamplerSettings`.
            weak_pipeline: a smaller or earlier model of the same data, for autoguidance.

        Raises UserError for settings with which no image can be drawn.
        """
        if weak_pipeline is not None and guidance not in (None, "autoguidance"):
            raise UserError(f"weak_pipeline is for autoguidance, and {guidance} guidance has no use for it: leave one of the two out.")
        pipeline = self if weak_pipeline is None else self.guided_by(weak_pipeline)
        usual = suited_to(self.objective)
        settings = SamplerSettings(
            usual.num_inference_steps if num_inference_steps is None else num_inference_steps,
            usual.guidance_scale if guidance_scale is None else guidance_scale,
            solver or usual.solver,
            guidance or ("classifier-free" if weak_pipeline is None else "autoguidance"),
            guidance_interval,
            guidance_rescale,
            churn,
            churn_interval,
            churn_noise,
            noise_range,
        )
        _check_outputs(num_images_per_prompt, output_type)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise UserError(f"callback_on_step_end_tensor_inputs may hold {self._callback_tensor_inputs}, not {sorted(unknown)}.")

        text, negative = self._embed_given(
            GivenPrompts("prompt", prompt, prompt_embeds, prompt_attention_mask),
            GivenPrompts("negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask, optional=True),
            num_images_per_prompt,
        )
        shape = (len(text.text_BLE), *self.latent_shape_of(height, width))
        draw = partial(self._draw_noise, shape, generator)
        noise_BCHW = draw() if latents is None else _checked_latents(latents, shape)
        self._interrupt = False
        with self.progress_bar(total=settings.num_inference_steps) as bar:

            def after_step(step: Step) -> Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                given = dict.fromkeys(callback_on_step_end_tensor_inputs, step.latents_BCHW.float())
                changed_BCHW = (callback_on_step_end(self, step.index, step.sigma, dict(given)) or {}).get("latents")
                if self._interrupt:
                    raise _InterruptedError(step.latents_BCHW.float() if changed_BCHW is None else changed_BCHW)
                return None if changed_BCHW is given.get("latents") else changed_BCHW

            try:
                latents_BCHW = pipeline._sample(noise_BCHW, text, negative, settings, after_step, draw)
            except _InterruptedError as interrupted:
                latents_BCHW = interrupted.latents_BCHW
        images = self.decode(latents_BCHW, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        settings: SamplerSettings = DEFAULT_SETTINGS,
        seed: int = 0,
        on_step: Callable[[int], None] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        negative_prompts: Sequence[str] | None = None,
        on_denoised: Callable[[Step], None] | None = None,
        warn: Warn = log.warning,
        batch_size: int = BATCH,
    ) -> list[Image.Image]:
        """Draw one image a prompt, `batch_size` at a time. Image number i begins with the noise of seed + i, whatever the others are and
        on whatever device: noise is drawn on the CPU.

        Args:
            height, width: in pixels, by default as in training.
            negative_prompts: none, one for all, or one for each; empty ones are none.
            on_step: called with n after n more steps of images.
            on_denoised: called after each step with the denoised estimate in it (see `decode`).
            warn: is passed sentences about prompts that the text encoder does not read to their end.

        What `on_step` and `on_denoised` raise ends the sampling. Raises UserError for settings with which no image can be drawn.
        """
        prompts, negatives = self._cleaned(prompts, negative_prompts or [], warn)
        shape = self.latent_shape_of(height, width)

        def after_step(step: Step) -> None:
            if on_denoised:
                on_denoised(step)
            if on_step:
                on_step(len(step.denoised_BCHW))

        images: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            text, negative = self._embed(batch, negatives[start : start + batch_size] if len(negatives) > 1 else negatives)
            generators = [seeded(seed + start + i) for i in range(len(batch))]
            draw = partial(self._draw_noise, (len(batch), *shape), generators)
            images += self.decode(self._sample(draw(), text, negative, settings, after_step, draw))
        return images

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Embed prompts that are clean: `prompt_embeds` (B, L, E) and `prompt_attention_mask` (B, L), which is None if all tokens count.

        An empty prompt gives zeros, as in training.
        """
        encoder = self.caption_encoder
        _onload(self.text_encoder)
        if self.config.full_captions:
            text_BLE, mask_BL = encoder.embed_full(encoder.tokenize(list(prompts))), None
        else:
            text_BLE, mask_BL = encoder.encode(list(prompts))
            mask_BL = mask_BL if self.config.mask_padding else None
        for index, prompt in enumerate(prompts):
            if not prompt:
                text_BLE[index] = 0
        return text_BLE, mask_BL

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor, output_type: str = "pil") -> Any:
        """Return images of latents on any device, in one of `OUTPUT_TYPES` (see `__call__`). A few are decoded at a time."""
        if output_type == "latent":
            return latents_BCHW
        autoencoder = self.autoencoder
        if self.vae is not None:
            _onload(self.vae)
        pixels = math.prod(latents_BCHW.shape[-2:]) * self.config.vae_scale_factor**2
        groups = latents_BCHW.split(max(1, DECODED_PIXELS // pixels))
        if output_type == "pil":
            return [to_image(image_CHW) for group in groups for image_CHW in autoencoder.decode(group).cpu()]
        unit_BCHW = torch.cat([(autoencoder.decode(group).float() / 2 + 0.5).clamp(0, 1) for group in groups])
        return unit_BCHW if output_type == "pt" else np.ascontiguousarray(unit_BCHW.permute(0, 2, 3, 1).cpu().numpy())

    def latent_shape_of(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return channels, height and width of the latents of an image with these sides in pixels; None takes training's.

        Raises UserError for sides that are not a multiple of what a patch spans.
        """
        channels, *trained = self.latent_shape
        scale = self.config.vae_scale_factor
        step = scale * self.model.config.patch_size
        sides = []
        for name, side, default in (("height", height, trained[0]), ("width", width, trained[1])):
            if side is not None and (side <= 0 or side % step):
                near = max(step, round(side / step) * step)
                raise UserError(
                    f"{name} {side} must be a multiple of {step}, such as {near}: the autoencoder's pixels a latent, times the patch size."
                )
            sides.append(default if side is None else side // scale)
        return channels, sides[0], sides[1]

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read a model_index.json. Raises UserError if it names components that are none of this pipeline's."""
        config = super().load_config(pretrained_model_name_or_path, **kwargs)
        if isinstance(config, tuple):
            return checked_components(config[0], str(pretrained_model_name_or_path)), *config[1:]
        return checked_components(config, str(pretrained_model_name_or_path))

    @classmethod
    def _from_folder(cls, place: str, **kwargs: Any) -> Self:
        """Load in float32, whatever the files hold. `place` is a folder or an id of the hub."""
        if "scheduler" in kwargs:
            check_scheduler(kwargs["scheduler"])
        with loading(Path(place)):
            pipeline: Self = super().from_pretrained(place, **{**kwargs, "use_safetensors": True}, **dtype_argument(torch.float32))
        vae = Path(place) / "vae"
        if vae.is_dir() and "vae" not in kwargs and isinstance(pipeline.vae, AutoencoderKL | AutoencoderTiny | AutoencoderDC):
            check_autoencoder_is_whole(vae, pipeline.vae, kwargs.get("variant"))
        check_finite(dict(pipeline.transformer.named_parameters()), "The denoiser's weights", "export or download it again")
        return pipeline

    def _cleaned(self, prompts: Sequence[str], negatives: Sequence[str], warn: Warn) -> tuple[list[str], list[str]]:
        """Return clean prompts, and the negative ones: none, one, or as many. `warn` is passed which are not read as a whole."""
        prompts, negatives = clean_prompts(prompts), [clean_caption(negative) for negative in negatives]
        check_negatives(len(negatives), len(prompts))
        negatives = negatives if any(negatives) else []
        warn_of_unread(prompts + negatives, self.caption_encoder, warn)
        return prompts, negatives

    def _embed(self, prompts: list[str], negatives: list[str]) -> tuple[Text, Text | None]:
        """Embed both together, so that both have as many tokens."""
        text_BLE, mask_BL = self.encode_prompt(prompts + negatives)
        count = len(prompts)
        text, negative = (Text(text_BLE[part], None if mask_BL is None else mask_BL[part]) for part in (slice(count), slice(count, None)))
        return text, negative if negatives else None

    def _embed_given(self, given: GivenPrompts, negative_given: GivenPrompts, times: int) -> tuple[Text, Text | None]:
        """Return the captions of all images, `times` a prompt, and the negative ones: none, one, or as many."""
        if given.text_BLE is None and negative_given.text_BLE is None:  # words alone, as in `generate`
            prompts, negatives = self._cleaned(given.listed, negative_given.listed, log.warning)
            return self._embed(repeated(prompts, times), negatives if len(negatives) == 1 else repeated(negatives, times))
        text, negative = self._text_of(given), self._text_of(negative_given)
        assert text is not None, "one of the two is given"
        return aligned(text, negative, times)

    def _text_of(self, given: GivenPrompts) -> Text | None:
        """Return given vectors, or embed given words; None for no negative prompt."""
        if given.text_BLE is None:
            if given.optional and not any(map(clean_caption, given.listed)):
                return None
            return Text(*self.encode_prompt(self._cleaned(given.listed, [], log.warning)[0]))
        channels = self.transformer.config.caption_channels
        if given.text_BLE.ndim != 3 or given.text_BLE.shape[2] != channels:
            raise UserError(f"{given.name}_embeds must be of shape (captions, tokens, {channels}), not {tuple(given.text_BLE.shape)}.")
        return Text(given.text_BLE.float(), None if given.mask_BL is None else given.mask_BL.bool())

    def _sample(
        self, noise_BCHW: Tensor, text: Text, negative: Text | None, settings: SamplerSettings, on_step: OnStep, draw: Callable[[], Tensor]
    ) -> Tensor:
        _onload(self.transformer)
        guide = self._guide if settings.guidance == "autoguidance" else None
        return draw_latents(self.model, self.objective, noise_BCHW, *text, settings, negative, guide, on_step, draw)

    def _draw_noise(self, shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """Draw standard normal noise: on the CPU for the CPU's generators, whatever the device of the model."""
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise UserError(f"{shape[0]} pictures need as many generators, or a single one; the list holds {len(generator)}.")
        noise_BCHW: Tensor = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        return noise_BCHW


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder is to be read as a run: it has a recipe, or it has no model_index.json."""
    return is_run(folder) or (folder.exists() and not (folder / INDEX).is_file())


def _what_to_do(place: Path) -> str:
    """Return what to do about a place without a checkpoint, in a sentence."""
    if has_manifest(place):
        return "It is an encoded data set: train on it, and name the run's folder."
    if run := next((item for item in sorted(place.glob("*")) if is_run(item)), None):
        return f"It holds runs: name one of them, such as {run}."
    near = "" if place.exists() else did_you_mean_path(place).strip()
    return near or f"Train one with 'microdit train RECIPE --out {shlex.quote(str(place))}'."


def newest_checkpoint(run: Path, warn: Warn, weights: str | None = None) -> Checkpoint:
    """Return the run's newest checkpoint in which these weights are whole. Raises UserError if there is none."""
    checkpoint = find_weights(run, warn, weights)
    if checkpoint is None:
        raise UserError(f"There is no checkpoint in {run}. {_what_to_do(run)}")
    return checkpoint


def check_no_weights(place: object, weights: str | None) -> None:
    """Raise UserError if weights are named for a model that has only one set of them."""
    if weights is not None:
        raise UserError(f"--weights {weights} chooses among the weights of a run, and {place} is a pipeline with one set: leave it out.")


def _check_describes_encoders(checkpoint: Checkpoint) -> None:
    """Raise UserError if state.json lacks something of what `around` reads, as one from elsewhere may."""
    state = checkpoint.state
    try:
        data = state["data"]
        texts = [data[kind][key] for kind in ("autoencoder", "text_encoder") for key in ("name", "fingerprint")] + [data["captions"]]
        described = all(isinstance(text, str) for text in texts) and type(state["mask_padding"]) is bool
        described &= [type(size) for size in (*data["latent_shape"], data["resolution"])] == [int] * 4
    except (KeyError, TypeError):
        described = False
    if not described:
        raise UserError(f"{checkpoint.folder / STATE} does not say of what data and encoders its model was trained: it is damaged.")


def load_encoders(data: dict[str, Any]) -> Encoders:
    """Load the autoencoder and the text encoder that an encoded set's manifest, or a checkpoint, names."""
    return load_autoencoder(data["autoencoder"]["name"]), load_text_encoder(data["text_encoder"]["name"])


def _check_outputs(num_images_per_prompt: int, output_type: str) -> None:
    if num_images_per_prompt < 1:
        raise UserError(f"num_images_per_prompt must be at least 1, not {num_images_per_prompt}.")
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type}.")


def _checked_latents(latents_BCHW: Tensor, shape: tuple[int, ...]) -> Tensor:
    if latents_BCHW.shape != shape:
        raise UserError(f"latents must be of shape {shape}, not {tuple(latents_BCHW.shape)}.")
    return latents_BCHW.float()


def _same_weights(one: nn.Module | None, other: nn.Module | None) -> bool:
    """Return whether two encoders have the same weights, compared in float16, in which they may have been exported."""
    if one is None or other is None or one is other:
        return one is other
    mine, theirs = (getattr(part, "network", part).state_dict() for part in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name].half(), theirs[name].to(mine[name].device).half()) for name in mine)


def _onload(module: nn.Module) -> None:
    """Bring a module to the GPU with `enable_model_cpu_offload`, as its `forward` would, which is not what is called here."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
