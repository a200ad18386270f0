"""Prompts as people type them, made fit for a text encoder.

- Control characters, which no caption has, become spaces; halves of characters, from a terminal in another encoding, question marks.
- An empty prompt stands for the empty caption that models are trained with: the picture may be of anything.
- What is longer than the text encoder reads is cut, and said so; so is a prompt of which it knows no word.

From captions to pictures: text encoder, denoiser, sampler and autoencoder together.
"""

import math
import unicodedata
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from PIL import Image
from torch import Tensor

from microdit.checkpoint import Checkpoint, default_weights, find_weights
from microdit.data.pixels import to_image
from microdit.devices import HALF
from microdit.diffusion.edm import EDM
from microdit.diffusion.guidance import GuidanceKind, Guide, Text, guided_denoiser
from microdit.diffusion.samplers import Churn, OnStep, Solver, Step, solve
from microdit.encoders.autoencoder import Autoencoder, load_autoencoder
from microdit.encoders.text import TextEncoder, load_text_encoder
from microdit.errors import UserError
from microdit.models.microdit import MicroDiT, ModelConfig

RARE = "\U0002a6d4"  # a letter that no vocabulary has: what an encoder makes of it, it makes of all that it does not know


def clean_prompt(prompt: str) -> str:
    """`prompt` without control characters and halves of characters, and without space around it."""
    whole = prompt.encode("utf-8", "replace").decode("utf-8")
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in whole).strip()


def clean_prompts(prompts: list[str]) -> list[str]:
    """Each of them cleaned. Raises UserError if there is none."""
    if not prompts:
        raise UserError('There is no prompt: write at least one, for example "red heart".')
    return [clean_prompt(prompt) for prompt in prompts]


def warn_of_unread(prompts: list[str], encoder: TextEncoder, warn: Callable[[str], None]) -> None:
    """A sentence to `warn` for each cleaned prompt that the encoder does not read to its end, or of which it knows no word."""
    unknown = set(encoder.tokenize([RARE])[0])
    for prompt in dict.fromkeys(filter(None, prompts)):
        (ids,) = encoder.tokenize([prompt])
        if len(ids) >= encoder.max_tokens and encoder.tokenize([prompt[:-1]]) == [ids]:
            warn(f"The prompt {_short(prompt)} is cut: the text encoder {encoder.name} reads {encoder.max_tokens} tokens.")
        elif set(ids) <= unknown:
            warn(f"The text encoder {encoder.name} knows nothing of the prompt {_short(prompt)}: write it in words that captions use.")


def _short(prompt: str) -> str:
    return f'"{prompt}"' if len(prompt) <= 40 else f'"{prompt[:37]}..."'


BATCH = 64
DECODED_PIXELS = 2**21  # at a time: 8 pictures of 512 px
E = TypeVar("E", Autoencoder, TextEncoder)


@dataclass(frozen=True)
class SamplerSettings:
    """How a picture is drawn. Raises UserError for what makes no picture.

    Noise levels are sigma, from 80 (noise alone) down to 0.002, or as `noise_range` says: a model that was hardly trained near those ends
    needs no steps there. `guidance_rescale` lies between 0 (none) and 1.

    >>> SamplerSettings(num_inference_steps=12, solver="dpm", guidance_interval=(0.2, 5)).guidance_scale
    2.0
    """

    num_inference_steps: int = 30
    guidance_scale: float = 2.0
    solver: Solver = "heun"
    guidance: GuidanceKind = "classifier-free"
    guidance_interval: tuple[float, float] | None = None  # noise levels (above the first, up to the second) at which guidance acts
    guidance_rescale: float = 0.0
    churn: float = 0.0  # S_churn, S_tmin and S_tmax, S_noise of 2206.00364, algorithm 2; 0: no new noise on the way
    churn_interval: tuple[float, float] | None = None
    churn_noise: float = 1.0
    noise_range: tuple[float, float] | None = None  # the last and the first noise level, before the jump to 0; None: EDM's

    def __post_init__(self) -> None:
        if not 2 <= self.num_inference_steps <= 1000:
            raise UserError(f"The sampler takes from 2 to 1000 steps, not {self.num_inference_steps}; 18 to 30 are usual.")
        _between("guidance_scale", self.guidance_scale, -100, 100, "; 3 to 6 are usual")
        _among("solver", self.solver, get_args(Solver))
        _among("guidance", self.guidance, get_args(GuidanceKind))
        _interval("guidance_interval", self.guidance_interval)
        _between("guidance_rescale", self.guidance_rescale, 0, 1, "; 0.7 is usual, 0 leaves it out")
        _between("churn", self.churn, 0, 1000, "; 40 is usual, 0 leaves it out")
        _interval("churn_interval", self.churn_interval)
        _between("churn_noise", self.churn_noise, 0, 2, "; 1 to 1.007 are usual")
        _interval("noise_range", self.noise_range)
        if self.noise_range and not (self.noise_range[0] > 0 and math.isfinite(self.noise_range[1])):
            raise UserError(
                f"noise_range must lie above 0 and end somewhere, such as 0.03 30, not {self.noise_range[0]} {self.noise_range[1]}."
            )
        if self.churn and self.solver != "heun":
            raise UserError(f"Only the solver heun can churn, not {self.solver}: take heun, or churn 0.")

    @property
    def noise_on_the_way(self) -> Churn:
        return Churn(self.churn, *(self.churn_interval or (Churn.S_tmin, Churn.S_tmax)), self.churn_noise)


def _between(name: str, value: float, low: float, high: float, hint: str) -> None:
    if not low <= value <= high:
        raise UserError(f"{name} must be a number between {low} and {high}, not {value}{hint}.")


def _among(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"There is no {name} '{value}'. Known: {', '.join(known)}.")


def _interval(name: str, interval: tuple[float, float] | None) -> None:
    if interval is not None and not 0 <= interval[0] < interval[1]:
        low, high = interval
        raise UserError(f"{name} must be two noise levels, the lower one first, such as 0.2 5, not {low} {high}.")


USUAL = SamplerSettings()


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
    guide: Guide | None = None  # the weak model of autoguidance

    @classmethod
    def around(cls, model: MicroDiT, state: dict[str, Any], loaded: tuple[Autoencoder, TextEncoder] | None = None) -> "Pipeline":
        """`model` with the encoders that a checkpoint's `state` names, if they are not `loaded` already.

        Raises UserError if these have changed since.
        """
        card = state["data"]
        autoencoder, text_encoder = loaded or (
            load_autoencoder(card["autoencoder"]["name"]),
            load_text_encoder(card["text_encoder"]["name"]),
        )
        unchanged(autoencoder, card["autoencoder"]), unchanged(text_encoder, card["text_encoder"])
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
    def from_checkpoint(
        cls, checkpoint: Checkpoint, weights: str | None = None, loaded: tuple[Autoencoder, TextEncoder] | None = None
    ) -> "Pipeline":
        """With those of its weights that `from_run` takes. `loaded` as in `around`."""
        model = model_of(checkpoint.model_config, checkpoint.tensors(weights or default_weights(checkpoint)))
        return cls.around(model, checkpoint.state, loaded)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Pipeline":
        """Move all parts, and let products be computed in `dtype`; nothing is copied. Latents, noise levels and solvers stay as they are.

        With a half dtype the models' matrices are rounded for good, and the autoencoder too, if it does not overflow. Captions are embedded
        once, and in float32: rounded, the text encoder would be further off than all steps of the model.
        """
        for model in (self.model, *([self.guide.model] if self.guide else [])):
            _round_matrices(model.float(), dtype)
            model.to(device)
        self.autoencoder.to(device, dtype)
        self.text_encoder.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.patch_embed.weight.device

    def guided_by(self, weak: "Pipeline") -> "Pipeline":
        """For autoguidance. Raises UserError if the weak one was trained on latents or captions of another kind."""

        def kind(pipeline: Pipeline) -> tuple[object, ...]:
            encoders = pipeline.autoencoder.fingerprint, pipeline.text_encoder.fingerprint
            return *encoders, pipeline.latent_shape, pipeline.mask_padding, pipeline.full_captions

        if kind(self) != kind(weak):
            raise UserError(
                "The weak model of autoguidance was trained with other encoders, sizes or caption padding: "
                "name an earlier or smaller run on the same encoded data."
            )
        return replace(self, guide=Guide(weak.model, weak.edm))

    @torch.no_grad()
    def __call__(
        self,
        prompts: list[str],
        settings: SamplerSettings = USUAL,
        seed: int = 0,
        on_step: Callable[[int], None] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        negative_prompts: list[str] | None = None,
        on_denoised: OnStep | None = None,
        warn: Callable[[str], None] | None = None,
        batch_size: int = BATCH,
    ) -> list[Image.Image]:
        """One picture a prompt, `batch_size` at a time. Picture number i starts from the noise of seed + i, whatever the others are and
        wherever they are drawn: noise is made on the CPU.

        `height` and `width` in pixels, if not those of the training data's squares. `negative_prompts`: one for all, or one each.
        After each n more picture-steps come `on_denoised(step)`, with the latents as they are taken for then (see `decode`), and
        `on_step(n)`; what they raise ends the drawing. `warn` is told which prompts are not read as a whole.
        Raises UserError for settings that make no picture.
        """
        prompts, negatives = clean_prompts(prompts), [clean_prompt(prompt) for prompt in negative_prompts or []]
        if len(negatives) not in (0, 1, len(prompts)):
            raise UserError(f"There are {len(negatives)} negative prompts for {len(prompts)} prompts: give one for all, or one for each.")
        if warn:
            warn_of_unread(prompts + negatives, self.text_encoder, warn)
        shape = self.latent_shape_of(height, width)
        guide = self.guide if settings.guidance == "autoguidance" else None

        def after(step: Step) -> None:
            if on_denoised:
                on_denoised(step)
            if on_step:
                on_step(len(step.denoised_BCHW))

        images: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            text, negative = self._embed(batch, negatives[start : start + batch_size] if len(negatives) > 1 else negatives)
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]

            def draw(generators: list[torch.Generator] = generators) -> Tensor:
                return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

            latents_BCHW = draw_latents(self.model, self.edm, draw(), *text, settings, negative, guide, after, draw)
            images += self.decode(latents_BCHW)
        return images

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> list[Image.Image]:
        """The pictures of latents, such as those that `on_denoised` sees, on any device. Decoded where the model is, some at a time."""
        pixels = math.prod(latents_BCHW.shape[-2:]) * self.autoencoder.downsampling**2
        groups = latents_BCHW.to(self.device).split(max(1, DECODED_PIXELS // pixels))
        return [to_image(picture) for group in groups for picture in self.autoencoder.decode(group).cpu()]

    def latent_shape_of(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Of a picture with these sides in pixels; None: as in training. Raises UserError for sides that cannot be."""
        channels, *trained = self.latent_shape
        step = self.autoencoder.downsampling * self.model.config.patch_size
        sides = []
        for name, side, default in (("height", height, trained[0]), ("width", width, trained[1])):
            if side is not None and (side <= 0 or side % step):
                raise UserError(f"{name} {side} must be a multiple of {step}: the autoencoder's pixels a latent, times the patch size.")
            sides.append(default if side is None else side // self.autoencoder.downsampling)
        return channels, sides[0], sides[1]

    def _embed(self, prompts: list[str], negatives: list[str]) -> tuple[Text, Text | None]:
        """Together, so that both have as many tokens."""
        both = prompts + negatives
        if self.full_captions:
            text_BLE, mask_BL = self.text_encoder.embed_full(self.text_encoder.tokenize(both)), None
        else:
            text_BLE, mask_BL = self.text_encoder.encode(both)
            mask_BL = mask_BL if self.mask_padding else None
        for index, prompt in enumerate(both):
            if not prompt:
                text_BLE[index] = 0  # the empty caption, as it was in training
        count = len(prompts)
        text, negative = (Text(text_BLE[part], None if mask_BL is None else mask_BL[part]) for part in (slice(count), slice(count, None)))
        return text, negative if negatives else None


def unchanged(encoder: E, wanted: dict[str, Any]) -> E:
    """`encoder`, if it is the one that a card or checkpoint names. Raises UserError if it has changed since."""
    if encoder.fingerprint != wanted["fingerprint"]:
        raise UserError(
            f"The encoder '{encoder.name}' is not the one that the data was encoded with "
            f"(fingerprint {encoder.fingerprint}, not {wanted['fingerprint']}): encode and train again, or bring back the old one."
        )
    return encoder


@torch.no_grad()
def draw_latents(
    model: MicroDiT,
    edm: EDM,
    noise_BCHW: Tensor,
    text_BLE: Tensor,
    text_mask_BL: Tensor | None,
    settings: SamplerSettings,
    negative: Text | None = None,
    guide: Guide | None = None,
    on_step: OnStep | None = None,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Latents (B, C, H, W) of embedded captions, drawn where the model's weights lie, from noise and captions that lie anywhere.

    `draw` makes further noise, for churn. See `guided_denoiser` for `negative` and `guide`.
    """
    device = model.patch_embed.weight.device

    def moved(text_BLE: Tensor, mask_BL: Tensor | None) -> Text:
        return Text(text_BLE.to(device), None if mask_BL is None else mask_BL.to(device))

    with _products_like_matrices(model):
        guided = guided_denoiser(
            model,
            edm,
            *moved(text_BLE, text_mask_BL),
            settings.guidance_scale,
            settings.guidance,
            interval=settings.guidance_interval,
            rescale=settings.guidance_rescale,
            negative=moved(*negative) if negative else None,
            guide=guide,
        )

    def denoiser(noisy_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        with _products_like_matrices(model):
            return guided(noisy_BCHW, sigma_B)

    if settings.noise_range:
        edm = replace(edm, sigma_min=settings.noise_range[0], sigma_max=settings.noise_range[1])
    noise_BCHW, steps = noise_BCHW.to(device), settings.num_inference_steps
    return solve(settings.solver, denoiser, noise_BCHW, edm, steps, on_step, settings.noise_on_the_way, draw)


def _round_matrices(model: MicroDiT, dtype: torch.dtype) -> None:
    """As autocast would at each product, but once, and in half the memory.

    What is added up between the blocks stays float32, since it has the dtype of `patch_embed` (see `MicroDiT.forward`).
    """
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and not name.startswith("patch_embed."):
            weight.data = weight.data.to(dtype)


def _products_like_matrices(model: MicroDiT) -> AbstractContextManager[Any]:
    """Autocast in the dtype of rounded matrices; nothing for those of a whole dtype."""
    weight = model.head.linear.weight
    return torch.autocast(weight.device.type, weight.dtype) if weight.dtype in HALF else nullcontext()


def model_of(config: ModelConfig, weights: dict[str, Tensor]) -> MicroDiT:
    """A model for drawing, which takes the weights as they are."""
    with torch.device("meta"):
        model = MicroDiT(config)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def first_noise(shape: tuple[int, int, int], seed: int) -> Tensor:
    """What a picture begins with: standard normal, of its own seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
