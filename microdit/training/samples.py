"""The grid of a recipe's prompts that is drawn while training goes on."""

from typing import Any

from PIL import Image

from microdit.grids import draw_grid
from microdit.model.microdit import MicroDiT
from microdit.pipeline import Pipeline, SamplerSettings
from microdit.recipe import Recipe


def draw_samples(model: MicroDiT, recipe: Recipe, description: dict[str, Any], step: int) -> Image.Image:
    """`description`: what a checkpoint says of itself, which names the encoders. Raises UserError if these have changed."""
    prompts, record = list(recipe.record.sample_prompts), recipe.record
    settings = SamplerSettings(record.sample_steps, record.guidance_scale)
    images = Pipeline.around(model, description)(prompts, settings, recipe.seed)
    return draw_grid(images, prompts, title=f"{recipe.name}, step {step}, {recipe.samples_before(step):,} images seen")
