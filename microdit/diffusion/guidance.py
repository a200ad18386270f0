"""Guidance: extrapolate from the prediction of a weak denoiser through that of a strong one.

All kinds compute D = D_weak + scale * (D_strong - D_weak). They differ in the weak denoiser:
- classifier-free (2207.12598): the same model with the empty caption, or with a negative prompt;
- path-drop (SPRINT, 2510.21986): the same, without its sparse blocks;
- autoguidance (2406.02507): a smaller or less trained model with the same caption.

Captions are embedded, and each block's keys and values computed, once for all steps; those of the empty caption once for all images.

Shape legend: B batch, C channels, H W height and width, L caption tokens, E the text encoder's channels.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from microdit.diffusion.objective import Objective, denoise
from microdit.diffusion.samplers import Denoiser
from microdit.errors import UserError
from microdit.models.caption import Caption, join
from microdit.models.microdit import MicroDiT
from microdit.models.routing import METHODS

GuidanceKind = Literal["classifier-free", "path-drop", "autoguidance"]


class Guide(NamedTuple):
    """The weak model of autoguidance. It must have been trained with the same autoencoder, text encoder and kind of objective."""

    model: MicroDiT
    objective: Objective


class Text(NamedTuple):
    """Vectors of a text encoder, (B, L, E). The mask is True at real tokens; without one, all tokens are real."""

    text_BLE: Tensor
    mask_BL: Tensor | None


def guided_denoiser(
    model: MicroDiT,
    objective: Objective,
    text_BLE: Tensor,
    text_mask_BL: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance: GuidanceKind = "classifier-free",
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    negative: Text | None = None,
    guide: Guide | None = None,
) -> Denoiser:
    """Return a guided denoiser for the captions `text_BLE`.

    At `guidance_scale` 1, and at noise levels outside `interval` (2404.07724), the weak denoiser is not computed. `rescale`, from 0 to 1,
    brings the result back towards the standard deviation of the strong denoiser (2305.08891). `negative` replaces the empty caption: one
    for all images or one for each, with as many tokens as `text_BLE`. Raises UserError if the model does not support the kind of guidance.
    """
    _check_guidance(model, guidance, negative, guide)
    caption = model.precompute_kv(model.embed_caption(text_BLE, text_mask_BL))
    if guidance_scale == 1:
        return _plain(model, objective, caption)
    if guidance == "autoguidance":
        assert guide is not None
        strong = _plain(model, objective, caption)
        weak = _plain(*guide, guide.model.precompute_kv(guide.model.embed_caption(text_BLE, text_mask_BL)))
        pair = _one_by_one(strong, weak)
    else:
        # All zero tokens are equal, so neither their number nor the mask makes a difference.
        opposite = negative or Text(torch.zeros_like(text_BLE[:1]), None if text_mask_BL is None else text_mask_BL[:1])
        away = model.precompute_kv(model.embed_caption(*opposite)).map(lambda x: x.expand(len(text_BLE), *x.shape[1:]))
        if guidance == "path-drop":
            strong = _plain(model, objective, caption)
            pair = _one_by_one(strong, _plain(model, objective, away, drop_path=True))
        else:
            both = join(caption, away)
            strong = _plain(model, objective, both.map(lambda x: x[: len(text_BLE)]))
            pair = _doubled(model, objective, both)

    def denoiser(noisy_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        inside_B = None if interval is None else (interval[0] < sigma_B) & (sigma_B <= interval[1])
        if inside_B is not None and not inside_B.any():
            return strong(noisy_BCHW, sigma_B)
        towards, away_from = pair(noisy_BCHW, sigma_B)
        guided = away_from + guidance_scale * (towards - away_from)
        if rescale:
            guided = _rescaled(guided, towards, rescale)
        return guided if inside_B is None else torch.where(inside_B.view(-1, 1, 1, 1), guided, towards)

    return denoiser


def _check_guidance(model: MicroDiT, guidance: GuidanceKind, negative: Text | None, guide: Guide | None) -> None:
    if guidance == "path-drop" and METHODS[model.config.routing].restore != "fused":
        raise UserError(
            f"Path-drop guidance skips the sparse blocks, and a model with routing {model.config.routing} cannot run without them: "
            "use a model trained with model.routing sprint, or classifier-free guidance."
        )
    if guidance == "autoguidance" and negative is not None:
        raise UserError(
            "Autoguidance takes no negative prompt, since its weak model is given the prompt itself: "
            "leave the negative prompt out, or use classifier-free guidance."
        )
    if (guidance == "autoguidance") != (guide is not None):
        raise UserError(
            "Autoguidance needs a weak model, and no other kind of guidance takes one: name a run with --autoguide, or choose another kind."
        )


_Pair = tuple[Tensor, Tensor]
_PairDenoiser = Callable[[Tensor, Tensor], _Pair]


def _plain(model: MicroDiT, objective: Objective, caption: Caption, drop_path: bool = False) -> Denoiser:
    return lambda noisy_BCHW, sigma_B: denoise(model, objective, noisy_BCHW, sigma_B, caption, drop_path)


def _one_by_one(strong: Denoiser, weak: Denoiser) -> _PairDenoiser:
    return lambda noisy_BCHW, sigma_B: (strong(noisy_BCHW, sigma_B), weak(noisy_BCHW, sigma_B))


def _doubled(model: MicroDiT, objective: Objective, both: Caption) -> _PairDenoiser:
    """Compute both in one call of the model, since small batches use a GPU badly."""

    def pair(noisy_BCHW: Tensor, sigma_B: Tensor) -> _Pair:
        doubled = denoise(model, objective, torch.cat([noisy_BCHW] * 2), torch.cat([sigma_B] * 2), both)
        towards, away_from = doubled.chunk(2)
        return towards, away_from

    return pair


def _rescaled(guided_BCHW: Tensor, towards_BCHW: Tensor, share: float) -> Tensor:
    """Rescale the standard deviation of each image, which guidance increases, by 2305.08891, eq. 15 and 16, applied to D."""
    target, actual = (x.std(dim=(1, 2, 3), keepdim=True) for x in (towards_BCHW, guided_BCHW))
    return guided_BCHW * (1 + share * (target / actual.clamp(min=1e-12) - 1))
