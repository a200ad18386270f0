"""Encode once: pictures to latents, captions to token embeddings, written as one Arrow data set with a card and checksums.

Captions are stored up to their last real token. The folder appears under its name only when it is whole.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch

from microdit.data.images import to_tensor
from microdit.data.sources import Row
from microdit.encoders.autoencoder import Autoencoder
from microdit.encoders.text import MiniLM
from microdit.errors import UserError
from microdit.files import sha256_of, write_aside

datasets.disable_progress_bars()  # ours says more

CARD = "card.json"
FORMAT = 1
FEATURES = datasets.Features(
    {
        "key": datasets.Value("string"),
        "caption": datasets.Value("string"),
        "latents": datasets.Value("binary"),  # float16, the card's latent_shape
        "text": datasets.Value("binary"),  # float16, (tokens, the card's text_channels)
    }
)


def encode_rows(
    rows: Iterable[Row],
    out: Path,
    source: str,
    image_size: int,
    autoencoder: Autoencoder,
    text_encoder: MiniLM,
    batch_size: int = 64,
    on_rows: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write the encoded data set to the folder `out` and return its card. `on_rows(n)` is called after each n more rows.

    Raises UserError if `out` exists, if there is no row, or if the disk is full.
    """
    if out.exists():
        raise UserError(f"{out} exists already: delete it, or choose another --out.")
    encoded: list[dict[str, Any]] = []
    latent_shape: list[int] = []
    for batch in _chunks(rows, batch_size):
        latents = autoencoder.encode(torch.stack([to_tensor(row.image, image_size) for row in batch]))
        latent_shape = list(latents.shape[1:])
        text, mask = text_encoder.encode([row.caption for row in batch])
        encoded += [
            {
                "key": row.key,
                "caption": row.caption,
                "latents": latents[i].half().numpy().tobytes(),
                "text": text[i][mask[i]].half().numpy().tobytes(),
            }
            for i, row in enumerate(batch)
        ]
        if on_rows:
            on_rows(len(batch))
    if not encoded:
        raise UserError(f"The source {source} gave no picture.")
    card = {
        "format": FORMAT,
        "source": source,
        "rows": len(encoded),
        "image_size": image_size,
        "latent_shape": latent_shape,
        "text_channels": text_encoder.channels,
        "autoencoder": {"name": autoencoder.name, "fingerprint": autoencoder.fingerprint},
        "text_encoder": {"name": text_encoder.name, "fingerprint": text_encoder.fingerprint},
    }
    _write_whole(encoded, card, out)
    return card


def _chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _write_whole(encoded: list[dict[str, Any]], card: dict[str, Any], out: Path) -> None:
    """Write beside `out`, list every file with its checksum in the card, rename."""
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        datasets.Dataset.from_list(encoded, features=FEATURES).save_to_disk(aside)
        card["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(aside.iterdir())}
        write_aside(aside / CARD, json.dumps(card, indent=1).encode())
        aside.rename(out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"The encoded data could not be written to {out}: {error}. Make room, or choose another --out.") from error
