"""Prompts as a caller of `MicroDiTPipeline` gives them, in words or as vectors, and as many as images.

Shape legend: B batch, L caption tokens, E caption channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from microdit.diffusion.guidance import Text
from microdit.errors import UserError


@dataclass(frozen=True)
class GivenPrompts:
    """Captions as a caller gives them: words or vectors. Raises UserError if both or, of what is not optional, neither are given."""

    name: str
    words: str | list[str] | None
    text_BLE: Tensor | None
    mask_BL: Tensor | None
    optional: bool = False

    def __post_init__(self) -> None:
        if (self.words is None) == (self.text_BLE is None) and not (self.optional and self.words is None):
            raise UserError(f"Give either {self.name} or {self.name}_embeds.")

    @property
    def listed(self) -> list[str]:
        return [self.words] if isinstance(self.words, str) else list(self.words or [])


def check_negatives(negatives: int, prompts: int) -> None:
    """Raise UserError unless there is no negative prompt, one for all prompts, or one for each."""
    if negatives not in (0, 1, prompts):
        raise UserError(f"There are {negatives} negative prompts for {prompts} prompts: give one for all, or one for each.")


def aligned(text: Text, negative: Text | None, times: int) -> tuple[Text, Text | None]:
    """Repeat each caption `times`, and pad captions and negative ones to the same number of tokens."""
    if negative is None:
        return _repeated_text(text, times), None
    check_negatives(len(negative.text_BLE), len(text.text_BLE))
    text, negative = _repeated_text(text, times), negative if len(negative.text_BLE) == 1 else _repeated_text(negative, times)
    if text.text_BLE.shape[1] != negative.text_BLE.shape[1] or (text.mask_BL is None) != (negative.mask_BL is None):
        length = max(text.text_BLE.shape[1], negative.text_BLE.shape[1])
        text, negative = _padded(text, length), _padded(negative, length)
    return text, negative


def repeated(prompts: list[str], times: int) -> list[str]:
    """Return each prompt `times` in a row."""
    return [prompt for prompt in prompts for _ in range(times)]


def _repeated_text(text: Text, times: int) -> Text:
    mask_BL = None if text.mask_BL is None else text.mask_BL.repeat_interleave(times, dim=0)
    return Text(text.text_BLE.repeat_interleave(times, dim=0), mask_BL)


def _padded(text: Text, length: int) -> Text:
    """Pad with zeros to `length` tokens; the mask says that they do not count."""
    more = length - text.text_BLE.shape[1]
    mask_BL = text.text_BLE.new_ones(text.text_BLE.shape[:2], dtype=torch.bool) if text.mask_BL is None else text.mask_BL
    return Text(F.pad(text.text_BLE, (0, 0, 0, more)), F.pad(mask_BL, (0, more)))
