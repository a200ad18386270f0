"""`microdit explain`: the method shown on one image of a trained model, as a self-contained HTML page.

It shows which patches are kept at several mask ratios, how wide each block is and which tokens it sees, where the FLOPs of a training step
go, which patches the experts take, and what the image attends to in the caption.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from microdit.models.flops import parts_of_forward
from microdit.models.microdit import ModelConfig
from microdit.models.routing import METHODS, choose_kept, kept_tokens
from microdit.pipelines.observe import observe, tokens_by_word
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.sampling import seeded
from microdit.pipelines.settings import suited_to
from microdit.reports.grids import png_bytes
from microdit.reports.html import image_data_url, load_template

SIDE = 256  # pixels of a picture on the page, at least
RATIOS = (0.25, 0.5, 0.75, 0.9)
MASKED = 0.75  # the paper's mask ratio
DIMMED = 0.18  # what is left of a dropped patch's colour, on a grey of 128


@dataclass(frozen=True)
class _Canvas:
    """The image, enlarged, and its grid of patches."""

    image: Image.Image
    rows: int
    columns: int

    def shaded(self, share_T: Tensor) -> str:
        """Return the image as a data URL, each patch as clear as its share from 0 (grey) to 1."""
        pixels = torch.frombuffer(bytearray(self.image.tobytes()), dtype=torch.uint8).float()
        pixels_HWC = pixels.view(self.image.height, self.image.width, 3)
        clear_RC = DIMMED + (1 - DIMMED) * share_T.float().view(self.rows, self.columns)
        high, wide = self.image.height // self.rows, self.image.width // self.columns
        clear_HW1 = clear_RC.repeat_interleave(high, dim=0).repeat_interleave(wide, dim=1)[..., None]
        shaded_HWC = 128 + (pixels_HWC - 128) * clear_HW1
        shaded_HWC[::high] = shaded_HWC[:, ::wide] = 128  # the grid
        found = Image.frombytes("RGB", self.image.size, shaded_HWC.round().clamp(0, 255).to(torch.uint8).numpy().tobytes())
        return image_data_url("png", png_bytes(found))


def explain_page(
    pipeline: MicroDiTPipeline, name: str, prompt: str, seed: int = 0, on_step: Callable[[int], None] = lambda steps: None
) -> bytes:
    """Draw the prompt, look at what the model does with it, and return the page, as HTML.

    The model is observed at the median noise level of its training. `on_step(n)` is called after n more steps of drawing, and with 0
    before each picture of the page; it may raise to cancel.
    """
    config, objective = pipeline.model.config, pipeline.objective
    latents: list[Tensor] = []
    settings = suited_to(objective)
    image = pipeline.generate(
        [prompt], settings, seed, on_step, warn=lambda sentence: None, on_denoised=lambda step: latents.append(step.denoised_BCHW)
    )[0]
    rows, columns = (side // config.patch_size for side in latents[-1].shape[-2:])
    canvas = _Canvas(_enlarged(image, rows, columns), rows, columns)
    sigma = objective.training_sigma(torch.zeros(1)).item()
    observed = observe(pipeline, prompt, latents[-1][0], sigma, seed)
    drops = METHODS[config.routing].drop is not None
    tokens, words = rows * columns, tokens_by_word(pipeline.caption_encoder.tokenize, prompt)
    length = config.caption_length or max(numbers.stop for _, numbers in words)
    on_step(0)
    page = load_template("explain.html.jinja").render(
        name=name,
        prompt=prompt,
        seed=seed,
        sigma=sigma,
        config=config,
        method=METHODS[config.routing],
        tokens=tokens,
        caption_tokens=length,
        picture=image_data_url("png", png_bytes(canvas.image)),
        whole=canvas.shaded(torch.ones(tokens)),
        kept=[(ratio, kept_tokens(tokens, ratio), canvas.shaded(_kept(tokens, ratio, seed))) for ratio in RATIOS],
        blocks=_blocks(config, tokens, kept_tokens(tokens, MASKED) if drops else tokens),
        costs=_costs(config, tokens, kept_tokens(tokens, MASKED) if drops else tokens, length),
        experts=[
            (block, [canvas.shaded(torch.zeros(tokens).index_fill(0, chosen, 1)) for chosen in taken_EK])
            for block, taken_EK in observed.experts.items()
        ],
        attention=_attention(canvas, observed.attention, words, on_step),
    )
    return page.encode()


def _enlarged(image: Image.Image, rows: int, columns: int) -> Image.Image:
    """Enlarge by a whole factor, without smoothing, until the shorter side has `SIDE` pixels; patches then have whole sides too."""
    factor = -(-SIDE // min(image.size))
    high, wide = (max(1, round(side * factor / parts)) * parts for side, parts in ((image.height, rows), (image.width, columns)))
    return image.convert("RGB").resize((wide, high), Image.Resampling.NEAREST)


def _kept(tokens: int, ratio: float, seed: int) -> Tensor:
    kept_1K = choose_kept(torch.rand(1, tokens, generator=seeded(seed)), ratio)
    assert kept_1K is not None
    return torch.zeros(tokens).index_fill(0, kept_1K[0], 1)


def _blocks(config: ModelConfig, tokens: int, kept: int) -> list[dict[str, Any]]:
    """Describe each block: the widths of its tokens, attention and feed-forward, its experts, and the tokens that it sees."""
    names = [f"mixer {n + 1}" for n in range(len(config.mixer))] + [f"block {n + 1}" for n in range(len(config.blocks))]
    names += [f"decoder {n + 1}" for n in range(len(config.decoder))]
    found = config.tokens_by_block(tokens, kept)
    widest = max(shape.ffn_dim * max(1, shape.num_experts) for shape, _, _ in found)
    return [
        {
            "name": name,
            "width": width,
            "attention": shape.attention_dim,
            "ffn": shape.ffn_dim,
            "experts": shape.num_experts,
            "seen": seen,
            "of_widest": shape.ffn_dim * max(1, shape.num_experts) / widest,
        }
        for name, (shape, width, seen) in zip(names, found, strict=True)
    ]


def _costs(config: ModelConfig, tokens: int, kept: int, caption_tokens: int) -> list[dict[str, Any]]:
    """Return the shares of a forward pass on all patches that each part takes, and takes on the `kept` ones."""
    whole = parts_of_forward(config, tokens, tokens, caption_tokens)
    few, total = parts_of_forward(config, tokens, kept, caption_tokens), sum(whole.values())
    return [{"part": part, "whole": whole[part] / total, "kept": few[part] / total} for part in whole]


def _attention(
    canvas: _Canvas, attention: dict[str, Tensor], words: list[tuple[str, range]], on_step: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Return for each word the mean attention of all blocks that see the whole image: its share, and a picture of where it comes from."""
    maps_BTL = torch.stack(list(attention.values()))
    mean_TL = maps_BTL.mean(dim=0)
    total = mean_TL.sum()
    found = []
    for word, numbers in words:
        on_step(0)
        at_T = mean_TL[:, numbers.start : numbers.stop].sum(dim=1)
        found.append({"word": word, "share": (at_T.sum() / total).item(), "picture": canvas.shaded(at_T / at_T.max().clamp(min=1e-12))})
    return found
