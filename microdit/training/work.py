"""How much work a step and the rest of a recipe are, in FLOPs: for utilisation and the time left."""

from functools import lru_cache

from microdit.model.flops import training_flops
from microdit.model.microdit import ModelConfig
from microdit.model.routing import kept_tokens
from microdit.recipe import PhaseRecipe, Recipe

SAMPLES = 32  # points at which a mask schedule is looked at, to sum a phase up


class Work:
    """Of a recipe's steps on one shape of latents."""

    def __init__(self, recipe: Recipe, config: ModelConfig):
        self._recipe, self._config = recipe, config
        self._flops = lru_cache(maxsize=4096)(training_flops)

    def of_step(self, phase: PhaseRecipe, step_in_phase: int, tokens: int, caption_tokens: int) -> float:
        """FLOPs of the whole batch, forward and backward."""
        kept = kept_tokens(tokens, phase.mask_ratio_at(step_in_phase))
        return phase.batch_size * self._flops(self._config, tokens, kept, caption_tokens)

    def after(self, step: int, tokens: int, caption_tokens: int) -> float:
        """FLOPs of all steps from number `step` to the end."""
        total = 0.0
        for phase in self._recipe.phases:
            first = min(step, phase.steps)
            step -= first
            left = phase.steps - first
            if left:
                points = {first + (left - 1) * i // (SAMPLES - 1) for i in range(SAMPLES)} if phase.mask_schedule else {first}
                total += left * sum(self.of_step(phase, point, tokens, caption_tokens) for point in points) / len(points)
        return total
