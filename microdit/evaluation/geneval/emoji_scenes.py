"""GenEval's six tasks (arXiv 2310.11513) for emoji models: prompts, a template-matching detector, and ground truth to test it with.

- Objects are the things of data/sources/builtin.py; hearts, circles and squares come in colours. All of them occur in training captions.
- The detector finds a thing where its Twemoji picture matches, by normalised cross-correlation over all positions and 17 sizes (by FFT).
  A match is dropped if it continues beyond its box, or if another picture among all of Twemoji matches better.
- `true_picture` draws what a prompt asks for, and `made_false` changes the prompt so that this image no longer satisfies it.
  benchmarks/emoji_geneval.py measures how often the detector tells the two apart.
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

from microdit.data.sources.builtin import COUNTS, PLURALS, SIDE, Split, emoji_images, with_article
from microdit.evaluation.geneval.rules import COLOURS, RELATIONS, TASKS, Detection, GenEvalPrompt, ObjectRequirement, parse_prompt

SHAPES = ("heart", "circle", "square")
THINGS = tuple(name for name in PLURALS if name != "red heart")  # which is the shape heart in red
WORK = 96  # side in pixels at which an image is searched
MARGIN = 6  # white pixels added around it; otherwise a thing that fills its square would have no edges
CANVAS = WORK + 2 * MARGIN
SIZES = tuple(round(WORK / 1.08**n) for n in range(17))  # sides of a thing, from the whole image to 0.29 of it
FIT = 0.7  # correlation from which a thing counts as found
RIVAL_SIZE, RIVAL_LEAD = 32, 0.05  # side at which all pictures are compared, and the lead by which another picture must match better
RING, RING_DARKNESS = 2, 0.07  # width of the ring around a thing that should be white, and its largest mean darkness
OVERLAP = 0.3  # share of the smaller box above which the worse of two matches is the same thing
FAINT = 0.01  # energy per pixel below which there is nothing to match
FOREGROUND = 0.15  # smallest darkness of a foreground pixel, in any channel


def emoji_prompts(per_task: int, seed: int = 0) -> list[GenEvalPrompt]:
    """Return `per_task` prompts of each task, phrased like the training captions."""
    generator = np.random.default_rng(seed)
    entries = [_entry(task, generator) for task in TASKS for _ in range(per_task)]
    return [parse_prompt(json.dumps(entry), f"prompt {n}") for n, entry in enumerate(entries)]


class EmojiDetector:
    """Finds known Twemoji pictures on white, from 0.29 of the image's side to all of it. Boxes include a picture's white margin.

    Every detection scores above 0.9, since `FIT` is the only threshold here; those of the rules are meant for networks.
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
    """Small versions of all Twemoji pictures, which rule out matches of things that merely look alike."""

    def __init__(self) -> None:
        self._names = []
        flat = []
        for split in get_args(Split):
            for row in emoji_images(split):
                template = _templates().get(row.caption)
                self._names.append(template.class_name if template else "")
                flat.append(_normalised(_darkness(row.image, RIVAL_SIZE)))
        self._pictures_ND = torch.stack(flat)

    def agree(self, name: str, x_CHW: Tensor, box_4: Tensor) -> bool:
        """Return whether no other picture matches the box of the canvas better than one of class `name`."""
        left, top, right, bottom = (int(edge) + MARGIN for edge in box_4)
        window_CSS = torch.nn.functional.interpolate(
            x_CHW[None, :, top:bottom, left:right], size=(RIVAL_SIZE, RIVAL_SIZE), mode="bilinear", align_corners=False, antialias=True
        )[0]
        fit_N = self._pictures_ND @ _normalised(window_CSS)
        own_N = torch.tensor([other == name for other in self._names])
        return bool(fit_N[own_N].max() + RIVAL_LEAD > fit_N[~own_N].max())


class EmojiColours:
    """Names the colour of the shape whose mean foreground colour is nearest to that of the object."""

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
    """Draw what the prompt asks for, 144 x 144: one thing of any size, or up to four, each somewhere in its own quarter."""
    names = [f"{one.colour or ''} {one.class_name}".strip() for one in prompt.include for _ in range(one.count)]
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
    """Return a prompt of the same task that this prompt's true picture does not satisfy: another thing, colour, number or position."""
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
    """A known picture. `class_name` is its caption without the colour."""

    class_name: str
    colour: str
    pixels: Image.Image


@lru_cache(maxsize=1)
def _templates() -> dict[str, _Template]:
    """Return the known pictures by caption, without white shapes, which are invisible on white."""
    shapes = {f"{colour} {shape}": (shape, colour) for shape in SHAPES for colour in COLOURS if colour != "white"}
    templates = {}
    for row in emoji_images("train"):
        if row.caption in THINGS:
            templates[row.caption] = _Template(row.caption, "", row.image)
        elif row.caption in shapes:
            templates[row.caption] = _Template(*shapes[row.caption], row.image)
    return templates


def _entry(task: str, generator: np.random.Generator) -> dict[str, object]:
    """Return one line of a prompt file, as read from JSON."""
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
    """Choose `count` shapes that differ in shape and in colour."""
    coloured = [template for template in _templates().values() if template.colour]
    while True:
        chosen = [coloured[n] for n in generator.choice(len(coloured), count, replace=False)]
        if len({template.class_name for template in chosen}) == len({template.colour for template in chosen}) == count:
            break
    names = [f"{template.colour} {template.class_name}" for template in chosen]
    include = [{"class": template.class_name, "count": 1, "color": template.colour} for template in chosen]
    return {"include": include, "prompt": " and ".join(map(with_article, names)) if count > 1 else names[0]}


def _quarters(count: int, relation: str | None, generator: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yield the (column, row) of each thing. With a relation, the second thing is placed accordingly relative to the first."""
    if relation is None:
        for n in generator.permutation(4)[:count]:
            yield int(n) % 2, int(n) // 2
        return
    line, second = int(generator.integers(2)), int(relation in ("right of", "below"))
    for half in (1 - second, second):
        yield (line, half) if relation in ("above", "below") else (half, line)


def _place_in(quarter: tuple[int, int], generator: np.random.Generator) -> tuple[int, int, int]:
    """Return a random (left, top, side) within the quarter."""
    half = SIDE // 2
    side = int(generator.integers(48, half - 3))
    left, top = (half * n + 2 + int(generator.integers(half - 3 - side)) for n in quarter)
    return left, top, side


def _darkness(image: Image.Image, size: int, margin: int = 0) -> Tensor:
    """Return 1 minus the image, (3, size, size) plus a margin on each side: 0 is white, 1 an empty channel."""
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    x_CHW = 1 - torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255
    return torch.nn.functional.pad(x_CHW, (margin,) * 4)


def _normalised(x_CSS: Tensor) -> Tensor:
    """Flatten to (D,), subtract the mean over all channels together (so that colours still differ), and scale to norm 1."""
    flat_D = (x_CSS - x_CSS.mean()).flatten()
    return flat_D / flat_D.norm().clamp(min=1e-6)


def _margin(size: int) -> int:
    """Return the width of the white margin around a template of this size."""
    return max(1, size * MARGIN // WORK)


def _spectra(pictures: list[Image.Image], size: int) -> Tensor:
    """Return the conjugate spectra of the pictures at this size, (K, 3, CANVAS, CANVAS / 2 + 1), with channel means 0 and norm 1."""
    x_KCSS = torch.stack([_darkness(picture, size, _margin(size)) for picture in pictures])
    x_KCSS = x_KCSS - x_KCSS.mean(dim=(2, 3), keepdim=True)
    x_KCSS = x_KCSS / x_KCSS.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    return torch.fft.rfft2(x_KCSS, s=(CANVAS, CANVAS)).conj()


def _correlate(x_CHW: Tensor, spectra_KCHW: Tensor, size: int) -> Tensor:
    """Return the normalised cross-correlation over all channels, (K, places, places), where the template lies inside the canvas."""
    window = size + 2 * _margin(size)
    places = CANVAS - window + 1
    product_KHW = (torch.fft.rfft2(x_CHW) * spectra_KCHW).sum(dim=1)
    dot_KHW = torch.fft.irfft2(product_KHW, s=(CANVAS, CANVAS))[:, :places, :places]
    sums_CHW, squares_CHW = _window_sums(x_CHW, window), _window_sums(x_CHW**2, window)
    energy_HW = (squares_CHW - sums_CHW**2 / window**2).sum(dim=0)
    return dot_KHW / energy_HW.clamp(min=FAINT * window**2).sqrt()


def _window_sums(x_CHW: Tensor, size: int) -> Tensor:
    """Return the sums over all windows of that size, (C, places, places)."""
    total = torch.nn.functional.pad(x_CHW.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    windows = total[:, size:, size:] - total[:, :-size, size:] - total[:, size:, :-size] + total[:, :-size, :-size]
    return windows.float()


def _stands_alone(x_CHW: Tensor, box_4: Tensor) -> bool:
    """Return whether a ring around the box is white; if not, the match may be part of something larger."""
    left, top, right, bottom = (int(edge) + MARGIN for edge in box_4)
    dark_HW, near = x_CHW.amax(dim=0), _margin(right - left)
    inner, outer = (dark_HW[max(0, top - n) : bottom + n, max(0, left - n) : right + n] for n in (near, near + RING))
    return float(outer.sum() - inner.sum()) <= RING_DARKNESS * (outer.numel() - inner.numel())


def _shared(boxes_N4: Tensor, box_4: Tensor) -> Tensor:
    """Return each box's intersection with `box_4` as a share of the smaller area, (N,)."""
    inner_N2 = torch.minimum(boxes_N4[:, 2:], box_4[2:]) - torch.maximum(boxes_N4[:, :2], box_4[:2])
    area_N, area = (boxes_N4[:, 2] - boxes_N4[:, 0]) ** 2, (box_4[2] - box_4[0]) ** 2
    return inner_N2.clamp(min=0).prod(dim=1) / torch.minimum(area_N, area)


def _mean_colour(image: Image.Image) -> Tensor:
    """Return the mean darkness (3,) over the foreground."""
    x_CHW = _darkness(image, 32)
    mask_HW = (x_CHW.amax(dim=0) > FOREGROUND).float()
    return (x_CHW * mask_HW).sum(dim=(1, 2)) / mask_HW.sum().clamp(min=1)
