"""Sampling, from noise and embedded captions to latents: where objective, guidance, solvers and numerical precision come together.

Shape legend: B batch, C channels, H W height and width, L caption tokens, E caption channels.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from microdit.devices import HALF
from microdit.diffusion.edm import EDM
from microdit.diffusion.flow import Flow
from microdit.diffusion.guidance import Guide, Text, guided_denoiser
from microdit.diffusion.objective import Objective
from microdit.diffusion.samplers import OnStep, solve
from microdit.errors import UserError
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.pipelines.settings import SamplerSettings


@torch.no_grad()
def draw_latents(
    model: MicroDiT,
    objective: Objective,
    noise_BCHW: Tensor,
    text_BLE: Tensor,
    text_mask_BL: Tensor | None,
    settings: SamplerSettings,
    negative: Text | None = None,
    guide: Guide | None = None,
    on_step: OnStep | None = None,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Sample latents (B, C, H, W) of embedded captions. Noise and captions may be on any device; the model's is computed on.

    `noise_BCHW` is standard normal, and `draw` makes more of it, for churn. See `guided_denoiser` for `negative` and `guide`. Raises
    UserError for settings that the objective has no use for.
    """
    if settings.churn and not isinstance(objective, EDM):
        raise UserError("Churn adds the noise of EDM, and this model was trained by flow matching: leave churn at 0.")
    if settings.noise_range:
        objective = objective.with_noise_range(*settings.noise_range)
    device = model.patch_embed.weight.device

    def moved(text_BLE: Tensor, mask_BL: Tensor | None) -> Text:
        return Text(text_BLE.to(device), None if mask_BL is None else mask_BL.to(device))

    with autocast_like(model):
        guided = guided_denoiser(
            model,
            objective,
            *moved(text_BLE, text_mask_BL),
            settings.guidance_scale,
            settings.guidance,
            interval=settings.guidance_interval,
            rescale=settings.guidance_rescale,
            negative=moved(*negative) if negative else None,
            guide=guide,
        )

    def denoiser(noisy_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        with autocast_like(model):
            return guided(noisy_BCHW, sigma_B)

    noise_BCHW, steps = noise_BCHW.to(device), settings.num_inference_steps
    return solve(settings.solver, denoiser, noise_BCHW, objective, steps, on_step, settings.churn_settings, draw)


def first_noise(shape: tuple[int, int, int], seed: int) -> Tensor:
    """Draw the standard normal noise that the image of a seed begins with, on the CPU, so that it is the same for every device."""
    return torch.randn(shape, generator=seeded(seed))


def seeded(seed: int) -> torch.Generator:
    """Return a generator on the CPU that begins at `seed`. Raises UserError if PyTorch takes no such seed."""
    try:
        return torch.Generator().manual_seed(seed)
    except (RuntimeError, ValueError):  # ValueError in newer versions; of 64 bits they take any
        raise UserError(f"The seed is {seed!s:.40}, and must be an integer of 64 bits, such as 7.") from None


def frozen_model(config: ModelConfig, weights: dict[str, Tensor]) -> MicroDiT:
    """Build a model for inference around `weights`, which are not copied."""
    with torch.device("meta"):
        model = MicroDiT(config)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def objective_record(objective: Objective) -> dict[str, Any]:
    """Return what a checkpoint's state says of the objective: its name, edm or flow, and its settings."""
    if isinstance(objective, EDM):
        few = {name: getattr(objective, name) for name in ("student_steps", "teacher_steps") if objective.student_steps}
        return {"edm": {"sigma_data": objective.sigma_data, "P_mean": objective.P_mean, "P_std": objective.P_std, **few}}
    assert isinstance(objective, Flow)
    return {"flow": asdict(objective)}


def recorded_objective(state: Mapping[str, Any]) -> Objective:
    """Return the objective of a checkpoint's state."""
    return Flow(**state["flow"]) if "flow" in state else EDM(**state["edm"])


def round_matrices(model: MicroDiT, dtype: torch.dtype) -> None:
    """Round the weights that enter matrix products to `dtype`: what autocast does at each product, but once, and in half the memory.

    The residual stream stays float32, since it has the dtype of `patch_embed` (see `MicroDiT.forward`).
    """
    model.float()
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and not name.startswith("patch_embed."):
            weight.data = weight.data.to(dtype)


def autocast_like(model: MicroDiT) -> AbstractContextManager[Any]:
    """Return autocast in the dtype of matrices that were rounded; for float32 no context is needed."""
    weight = model.head.linear.weight
    return torch.autocast(weight.device.type, weight.dtype) if weight.dtype in HALF else nullcontext()
