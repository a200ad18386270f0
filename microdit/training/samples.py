"""The grid of a recipe's prompts that is drawn while training goes on."""

from typing import Any

import torch
from PIL import Image

from microdit.distributed import World
from microdit.encoders.autoencoder import Autoencoder
from microdit.encoders.text import TextEncoder
from microdit.grids import draw_grid
from microdit.model.microdit import MicroDiT
from microdit.pipeline import Pipeline, SamplerSettings
from microdit.recipe import Recipe


class PromptGrid:
    """Draws on all processes, each some of the prompts. Encoders are loaded when they are first needed, and kept."""

    def __init__(self, recipe: Recipe, world: World, dtype: torch.dtype):
        """`dtype`: what products compute in."""
        self._recipe, self._world, self._dtype = recipe, world, dtype
        self._encoders: tuple[Autoencoder, TextEncoder] | None = None

    def draw(self, model: MicroDiT, description: dict[str, Any], step: int) -> Image.Image:
        """`description`: what a checkpoint says of itself, which names the encoders. All processes must call this.

        Raises UserError if the encoders have changed.
        """
        recipe, world = self._recipe, self._world
        prompts, record = list(recipe.record.sample_prompts), recipe.record
        pipeline = Pipeline.around(model, description, self._encoders).to(world.device, self._dtype)
        self._encoders = pipeline.autoencoder, pipeline.text_encoder
        share = -(-len(prompts) // world.size)
        start = share * world.rank
        settings = SamplerSettings(record.sample_steps, record.guidance_scale)
        mine = prompts[start : start + share]
        images = pipeline(mine, settings, recipe.seed + start) if mine else []
        for encoder in self._encoders:
            encoder.to("cpu")  # the memory is training's
        everyones = [image for images in world.gather(images) for image in images]
        return draw_grid(everyones, prompts, title=f"{recipe.name}, step {step}, {recipe.samples_before(step):,} images seen")
