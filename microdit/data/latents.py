"""Read an encoded data set: which samples come when, and batches of them.

The order is a function of (seed, epoch, position) alone, so a run's place in its data is one integer: the samples seen so far.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from microdit.data.encode import CARD, FORMAT
from microdit.errors import UserError
from microdit.files import sha256_of


@dataclass(frozen=True)
class Batch:
    """Float32 latents, (B, C, H, W); caption tokens, (B, L, E), zero where the mask (B, L) is False; the captions as text."""

    latents_BCHW: Tensor
    text_BLE: Tensor
    text_mask_BL: Tensor
    captions: list[str]


class EncodedSet:
    """A folder written by `encode_rows`, memory-mapped. Sizes are checked at opening; `verify` reads everything."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.card = _read_card(folder)
        for name, expected in self.card["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                what = "is missing" if not path.is_file() else f"has {path.stat().st_size} bytes, not {expected['bytes']}"
                raise UserError(f"{path} {what}: the data set is damaged; encode it again.")
        self._rows = datasets.load_from_disk(str(folder))

    def __len__(self) -> int:
        return int(self.card["rows"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.card["latent_shape"]
        return channels, height, width

    def batch(self, ids: list[int]) -> Batch:
        """Those rows, captions padded to the longest of them."""
        rows = self._rows[ids]
        latents = np.stack([np.frombuffer(blob, np.float16) for blob in rows["latents"]])
        texts = [torch.from_numpy(np.frombuffer(blob, np.float16).astype(np.float32)) for blob in rows["text"]]
        texts = [text.view(-1, self.card["text_channels"]) for text in texts]
        text_BLE = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths_B = torch.tensor([len(text) for text in texts])
        return Batch(
            torch.from_numpy(latents.astype(np.float32)).view(len(ids), *self.latent_shape),
            text_BLE,
            torch.arange(text_BLE.shape[1]) < lengths_B[:, None],
            rows["caption"],
        )

    def captions(self) -> list[str]:
        """Of all rows, in the order of the rows."""
        return list(self._rows["caption"])

    def keys(self) -> list[str]:
        """Of all rows, in the order of the rows."""
        return list(self._rows["key"])

    def verify(self) -> list[str]:
        """The names of the files whose content is not what was written (their checksums differ)."""
        return [name for name, expected in self.card["files"].items() if sha256_of(self.folder / name) != expected["sha256"]]


def sample_ids(rows: int, seed: int, position: int, count: int) -> list[int]:
    """The `count` row numbers that follow after `position` samples. Each epoch is a new permutation: each row once."""
    ids: list[int] = []
    while len(ids) < count:
        epoch, start = divmod(position + len(ids), rows)
        ids += _epoch_order(rows, seed, epoch)[start : start + count - len(ids)]
    return ids


@lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
    return order


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    if not path.is_file():
        raise UserError(f"There is no encoded data set in {folder} (no {CARD}): make one with 'microdit data encode'.")
    try:
        card = json.loads(path.read_text())
        if card["format"] != FORMAT:
            raise UserError(f"{path} is of format {card['format']}, this program reads {FORMAT}: encode the data again.")
        return dict(card)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): encode the data again.") from error
