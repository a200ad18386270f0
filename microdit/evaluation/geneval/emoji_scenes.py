"""GenEval's six tasks (arXiv 2310.11513) with the embedded emoji: prompts, a detector of known pictures, and truth to measure it by.

- Things are those of data/sources/builtin.py; hearts, circles and squares come in colours. All of it is in the training captions.
- A thing is found where its own Twemoji picture fits: normalised cross-correlation at all places and 17 sizes, by FFT. It is dropped
  where it goes on beyond its box, or where the picture of something else, among all of Twemoji, fits better.
- `true_picture` draws what a prompt asks for and `made_false` turns the prompt into one that this picture does not fulfil: how often the
  detector tells the two apart is measured by benchmarks/emoji_geneval.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from microdit.data.sources.builtin import COUNTS, PLURALS, SIDE, Split, emoji_rows, with_article
from microdit.evaluation.geneval.rules import COLOURS, RELATIONS, TASKS, Detection, GenEvalPrompt, ObjectRequirement, parse_prompt

SHAPES = ("heart", "circle", "square")
THINGS = tuple(name for name in PLURALS if name != "red heart")  # that one is a heart, in red
WORK = 96  # pixels of the picture that is searched
MARGIN = 6  # pixels of white around it: without, what fills its whole square would have no edges
CANVAS = WORK + 2 * MARGIN
SIZES = tuple(round(WORK / 1.08**n) for n in range(17))  # of a thing: from the whole picture to 0.29 of it
FIT = 0.7  # the correlation from which a thing counts as found
RIVAL_SIZE, RIVAL_LEAD = 32, 0.05  # pixels at which all pictures are compared, and by how much another must fit better
RING, RING_DARKNESS = 2, 0.07  # pixels around a thing that should be white, and their mean darkness at most
OVERLAP = 0.3  # of the smaller box: more, and the worse of two fits is the same thing
FAINT = 0.01  # of energy a pixel: with less there is nothing to fit
FOREGROUND = 0.15  # darker than white by this much, in any channel


def emoji_prompts(per_task: int, seed: int = 0) -> list[GenEvalPrompt]:
    """As many of each task, worded like the captions that the model learns from."""
    generator = np.random.default_rng(seed)
    entries = [_entry(task, generator) for task in TASKS for _ in range(per_task)]
    return [parse_prompt(json.dumps(entry), f"prompt {n}") for n, entry in enumerate(entries)]


class EmojiDetector:
    """Finds known Twemoji pictures on white, from 0.29 of a picture's side to all of it; boxes are theirs, white margins included.

    Every detection scores above 0.9: it has one threshold, `FIT`, and those of the rules are for networks.
    """

    fingerprint = f"emoji {WORK} {MARGIN} {len(SIZES)} {FIT} {RIVAL_SIZE} {RIVAL_LEAD} {RING} {RING_DARKNESS} {OVERLAP}"

    def __init__(self) -> None:
        self._templates = list(_templates().values())
        self._spectra = [_spectra([template.pixels for template in self._templates], size) for size in SIZES]
        self.class_names = frozenset(template.class_name for template in self._templates)
        self._rivals = _Rivals()

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> list[Detection]:
        x_CHW = _darkness(image, WORK, MARGIN)
        fits, best, boxes = [], [], []
        for size, spectra in zip(SIZES, self._spectra, strict=True):
            fit_KHW = _correlate(x_CHW, spectra, size)
            fit_HW, best_HW = fit_KHW.max(dim=0)
            rows_N, columns_N = torch.nonzero(fit_HW > FIT, as_tuple=True)
            fits.append(fit_HW[rows_N, columns_N])
            best.append(best_HW[rows_N, columns_N])
            left_N, top_N = (places_N + _margin(size) - MARGIN for places_N in (columns_N, rows_N))
            boxes.append(torch.stack([left_N, top_N, left_N + size, top_N + size], dim=1))
        fit_N, best_N, box_N4 = torch.cat(fits), torch.cat(best), torch.cat(boxes).float()
        to_picture = torch.tensor([image.width, image.height] * 2) / WORK
        found = []
        while len(fit_N):
            top = fit_N.argmax()
            name = self._templates[best_N[top]].class_name
            if _stands_alone(x_CHW, box_N4[top]) and self._rivals.agree(name, x_CHW, box_N4[top]):
                left, upper, right, lower = (box_N4[top].clamp(0, WORK) * to_picture).tolist()
                found.append(Detection(name, 0.9 + 0.1 * float(fit_N[top]), (left, upper, right, lower)))
            apart_N = _shared(box_N4, box_N4[top]) <= OVERLAP
            fit_N, best_N, box_N4 = fit_N[apart_N], best_N[apart_N], box_N4[apart_N]
        return found


class _Rivals:
    """All of Twemoji's pictures, small: what looks like a known thing may be another."""

    def __init__(self) -> None:
        self._names = []
        flat = []
        for split in get_args(Split):
            for row in emoji_rows(split):
                template = _templates().get(row.caption)
                self._names.append(template.class_name if template else "")
                flat.append(_normalised(_darkness(row.image, RIVAL_SIZE)))
        self._pictures_ND = torch.stack(flat)

    def agree(self, name: str, x_CHW: Tensor, box_4: Tensor) -> bool:
        """Whether none fits what is in the box of the canvas better than a picture of that class."""
        left, top, right, bottom = (int(edge) + MARGIN for edge in box_4)
        window_CSS = torch.nn.functional.interpolate(
            x_CHW[None, :, top:bottom, left:right], size=(RIVAL_SIZE, RIVAL_SIZE), mode="bilinear", align_corners=False, antialias=True
        )[0]
        fit_N = self._pictures_ND @ _normalised(window_CSS)
        own_N = torch.tensor([other == name for other in self._names])
        return bool(fit_N[own_N].max() + RIVAL_LEAD > fit_N[~own_N].max())


class EmojiColours:
    """The colour of our shapes that is nearest to the mean of what is not white."""

    fingerprint = "mean colour"

    def __init__(self) -> None:
        shapes = [template for template in _templates().values() if template.colour]
        self._names = [template.colour for template in shapes]
        self._means_N3 = torch.stack([_mean_colour(template.pixels) for template in shapes])

    def __call__(self, image: Image.Image, found: Detection) -> str:
        left, top, right, bottom = (round(edge) for edge in found.box)
        mean_3 = _mean_colour(image.crop((left, top, right, bottom)))
        return self._names[int((self._means_N3 - mean_3).norm(dim=1).argmin())]


def true_picture(prompt: GenEvalPrompt, generator: np.random.Generator) -> Image.Image:
    """What the prompt asks for, 144 x 144: one thing of any size, or up to four, each somewhere in its own quarter."""
    names = [
        (f"{required.colour} " if required.colour else "") + required.class_name
        for required in prompt.include
        for _ in range(required.count)
    ]
    if len(names) == 1:
        side = int(generator.integers(SIDE // 3, SIDE + 1))
        places = [(*(int(n) for n in generator.integers(0, SIDE - side + 1, 2)), side)]
    else:
        relation = next((required.relation[0] for required in prompt.include if required.relation), None)
        places = [_place_in(quarter, generator) for quarter in _quarters(len(names), relation, generator)]
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    for name, (left, top, side) in zip(names, places, strict=True):
        canvas.paste(_templates()[name].pixels.resize((side, side), Image.Resampling.LANCZOS), (left, top))
    return canvas


def made_false(prompt: GenEvalPrompt, generator: np.random.Generator) -> GenEvalPrompt:
    """A prompt of the same task that the true picture of this one does not fulfil: another thing, colour, number or side."""
    *before, last = prompt.include
    if prompt.tag == "counting":
        count = int(generator.choice([count for count in COUNTS if count != last.count]))
        return replace(prompt, include=(replace(last, count=count),), exclude=(ObjectRequirement(last.class_name, count + 1),))
    if last.relation is not None:
        other = RELATIONS[RELATIONS.index(last.relation[0]) ^ 1]
        return replace(prompt, include=(*before, replace(last, relation=(other, last.relation[1]))))
    if last.colour is not None:
        other = str(generator.choice([colour for colour in COLOURS if colour != last.colour]))
        return replace(prompt, include=(*before, replace(last, colour=other)))
    present = {required.class_name for required in prompt.include}
    other = str(generator.choice([name for name in THINGS if name not in present]))
    return replace(prompt, include=(*before, replace(last, class_name=other)))


@dataclass(frozen=True)
class _Template:
    """A known picture. `class_name` is its caption, or that without the colour."""

    class_name: str
    colour: str
    pixels: Image.Image


@lru_cache(maxsize=1)
def _templates() -> dict[str, _Template]:
    """By caption. White shapes are left out: they could not be told from the ground."""
    shapes = {f"{colour} {shape}": (shape, colour) for shape in SHAPES for colour in COLOURS if colour != "white"}
    templates = {}
    for row in emoji_rows("train"):
        if row.caption in THINGS:
            templates[row.caption] = _Template(row.caption, "", row.image)
        elif row.caption in shapes:
            templates[row.caption] = _Template(*shapes[row.caption], row.image)
    return templates


def _entry(task: str, generator: np.random.Generator) -> dict[str, object]:
    """One line of a file of prompts."""
    first, second = (str(name) for name in generator.choice(THINGS, 2, replace=False))
    one, other = {"class": first, "count": 1}, {"class": second, "count": 1}
    if task == "single_object":
        return {"tag": task, "include": [one], "prompt": first}
    if task == "two_object":
        return {"tag": task, "include": [one, other], "prompt": f"{with_article(first)} and {with_article(second)}"}
    if task == "counting":
        count = int(generator.choice(list(COUNTS)))
        exclude = [{"class": first, "count": count + 1}]
        return {"tag": task, "include": [one | {"count": count}], "exclude": exclude, "prompt": f"{COUNTS[count]} {PLURALS[first]}"}
    if task == "position":
        relation = str(generator.choice(RELATIONS))
        include = [other, one | {"position": [relation, 0]}]
        return {"tag": task, "include": include, "prompt": f"{with_article(first)} {relation} {with_article(second)}"}
    return {"tag": task} | _coloured_entry(2 if task == "color_attr" else 1, generator)


def _coloured_entry(count: int, generator: np.random.Generator) -> dict[str, object]:
    """Shapes that differ in shape and in colour."""
    coloured = [template for template in _templates().values() if template.colour]
    while True:
        chosen = [coloured[n] for n in generator.choice(len(coloured), count, replace=False)]
        if len({template.class_name for template in chosen}) == len({template.colour for template in chosen}) == count:
            break
    names = [f"{template.colour} {template.class_name}" for template in chosen]
    include = [{"class": template.class_name, "count": 1, "color": template.colour} for template in chosen]
    return {"include": include, "prompt": " and ".join(map(with_article, names)) if count > 1 else names[0]}


def _quarters(count: int, relation: str | None, generator: np.random.Generator) -> Iterator[tuple[int, int]]:
    """(column, row) of each thing. In a relation the second is where the prompt has it, seen from the first."""
    if relation is None:
        for n in generator.permutation(4)[:count]:
            yield int(n) % 2, int(n) // 2
        return
    line, second = int(generator.integers(2)), int(relation in ("right of", "below"))
    for half in (1 - second, second):
        yield (line, half) if relation in ("above", "below") else (half, line)


def _place_in(quarter: tuple[int, int], generator: np.random.Generator) -> tuple[int, int, int]:
    """(left, top, side)."""
    half = SIDE // 2
    side = int(generator.integers(48, half - 3))
    left, top = (half * n + 2 + int(generator.integers(half - 3 - side)) for n in quarter)
    return left, top, side


def _darkness(image: Image.Image, size: int, margin: int = 0) -> Tensor:
    """(3, size, size), 0 where it is white, 1 where a channel is empty; on each side a margin of white is added."""
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    x_CHW = 1 - torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255
    return torch.nn.functional.pad(x_CHW, (margin,) * 4)


def _normalised(x_CSS: Tensor) -> Tensor:
    """(D,): without the mean, of norm 1, flat. The mean is that of all channels: a colour of its own is something to go by."""
    flat_D = (x_CSS - x_CSS.mean()).flatten()
    return flat_D / flat_D.norm().clamp(min=1e-6)


def _margin(size: int) -> int:
    """Pixels of white around a template."""
    return max(1, size * MARGIN // WORK)


def _spectra(pictures: list[Image.Image], size: int) -> Tensor:
    """(pictures, 3, CANVAS, CANVAS / 2 + 1): each without its mean, of norm 1, ready for correlation."""
    x_KCSS = torch.stack([_darkness(picture, size, _margin(size)) for picture in pictures])
    x_KCSS = x_KCSS - x_KCSS.mean(dim=(2, 3), keepdim=True)
    x_KCSS = x_KCSS / x_KCSS.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    return torch.fft.rfft2(x_KCSS, s=(CANVAS, CANVAS)).conj()


def _correlate(x_CHW: Tensor, spectra_KCHW: Tensor, size: int) -> Tensor:
    """(K, places, places): normalised cross-correlation, of all channels together, where the template lies inside the canvas."""
    window = size + 2 * _margin(size)
    places = CANVAS - window + 1
    product_KHW = (torch.fft.rfft2(x_CHW) * spectra_KCHW).sum(dim=1)
    dot_KHW = torch.fft.irfft2(product_KHW, s=(CANVAS, CANVAS))[:, :places, :places]
    sums_CHW, squares_CHW = _window_sums(x_CHW, window), _window_sums(x_CHW**2, window)
    energy_HW = (squares_CHW - sums_CHW**2 / window**2).sum(dim=0)
    return dot_KHW / energy_HW.clamp(min=FAINT * window**2).sqrt()


def _window_sums(x_CHW: Tensor, size: int) -> Tensor:
    """(C, places, places): sums over all windows of that size."""
    total = torch.nn.functional.pad(x_CHW.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    windows = total[:, size:, size:] - total[:, :-size, size:] - total[:, size:, :-size] + total[:, :-size, :-size]
    return windows.float()


def _stands_alone(x_CHW: Tensor, box_4: Tensor) -> bool:
    """Whether all around the box is white: what fits a thing may be a part of something larger."""
    left, top, right, bottom = (int(edge) + MARGIN for edge in box_4)
    dark_HW, near = x_CHW.amax(dim=0), _margin(right - left)
    inner, outer = (dark_HW[max(0, top - n) : bottom + n, max(0, left - n) : right + n] for n in (near, near + RING))
    return float(outer.sum() - inner.sum()) <= RING_DARKNESS * (outer.numel() - inner.numel())


def _shared(boxes_N4: Tensor, box_4: Tensor) -> Tensor:
    """(N,): what is common with `box_4`, as a share of the smaller area."""
    inner_N2 = torch.minimum(boxes_N4[:, 2:], box_4[2:]) - torch.maximum(boxes_N4[:, :2], box_4[:2])
    area_N, area = (boxes_N4[:, 2] - boxes_N4[:, 0]) ** 2, (box_4[2] - box_4[0]) ** 2
    return inner_N2.clamp(min=0).prod(dim=1) / torch.minimum(area_N, area)


def _mean_colour(image: Image.Image) -> Tensor:
    """(3,): over what is not white."""
    x_CHW = _darkness(image, 32)
    mask_HW = (x_CHW.amax(dim=0) > FOREGROUND).float()
    return (x_CHW * mask_HW).sum(dim=(1, 2)) / mask_HW.sum().clamp(min=1)
