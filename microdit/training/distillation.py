"""The teacher of a distillation: the model that the student starts from, frozen, and the targets that it makes.

Each process holds the teacher whole, in the dtype of matrix products. Its weights are not part of a checkpoint: they are read again from
`init_from` when a run is resumed, and must still be the same.
"""

import hashlib
from dataclasses import replace

import torch

from microdit.checkpoint import Checkpoint
from microdit.config.schema import DistillationRecipe, Recipe
from microdit.devices import HALF
from microdit.diffusion.distillation import distilled_estimate
from microdit.diffusion.guidance import guided_denoiser
from microdit.diffusion.objective import Objective
from microdit.distributed import World
from microdit.errors import UserError
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.pipelines.sampling import autocast_like, round_matrices
from microdit.training.init_from import InitialWeights
from microdit.training.noise import TrainingBatch
from microdit.training.parallel import compute_dtype


def open_teacher(
    recipe: Recipe, weights: InitialWeights | None, config: ModelConfig, checkpoint: Checkpoint | None, world: World
) -> "Teacher | None":
    """Return the teacher of a recipe; None if it distils nothing. All processes must call this.

    `weights` are those of the recipe's `init_from`; `checkpoint` is the one that training continues from, if any. Raises UserError if the
    weights cannot be read, or are not those that training began with.
    """
    if recipe.distillation is None:
        return None
    assert weights is not None, "checked when the recipe is loaded"
    dtype = compute_dtype(recipe.engine, world.device)
    teacher = Teacher(weights, config, recipe.objective, recipe.distillation, recipe.model.mask_padding, dtype, world)
    if checkpoint is not None and checkpoint.state.get("teacher") != teacher.fingerprint:
        raise UserError(
            f"{weights.origin.place} no longer holds the weights {weights.name} that {checkpoint.folder} was distilled from: bring them "
            "back, or start a new run."
        )
    return teacher


class Teacher:
    """Makes the targets of a student with `objective`. `fingerprint` is the SHA-256 of its weights, shortened."""

    def __init__(
        self,
        weights: InitialWeights,
        config: ModelConfig,
        objective: Objective,
        settings: DistillationRecipe,
        mask_padding: bool,
        dtype: torch.dtype,
        world: World,
    ):
        """Load the weights. All processes must call this. Raises UserError if they cannot be read."""
        with torch.device("meta"):
            model = MicroDiT(config)
        self.model = model.to_empty(device=world.device).eval().requires_grad_(False)
        weights.fill(self.model, world)
        self.fingerprint = _fingerprint(self.model)
        if dtype in HALF:
            round_matrices(self.model, dtype)
        self._objective, self._guidance_scale, self._mask_padding = objective, settings.guidance_scale, mask_padding

    @torch.no_grad()
    def with_target(self, batch: TrainingBatch) -> TrainingBatch:
        """Return the batch with its `target_BCHW`. Where a caption was dropped, the teacher is not given it either."""
        noisy_BCHW = self._objective.add_noise(batch.latents_BCHW, batch.sigma_B, batch.noise_BCHW)
        text_BLE = batch.text_BLE * batch.caption_kept_B.view(-1, 1, 1)
        mask_BL = batch.text_mask_BL if self._mask_padding else None
        with autocast_like(self.model):
            denoiser = guided_denoiser(self.model, self._objective, text_BLE, mask_BL, self._guidance_scale)
            return replace(batch, target_BCHW=distilled_estimate(self._objective, denoiser, noisy_BCHW, batch.sigma_B))


def _fingerprint(model: MicroDiT) -> str:
    digest = hashlib.sha256()
    for _, weight in sorted(model.named_parameters()):
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
