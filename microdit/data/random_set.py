"""Encoded sets of random numbers, to measure what a training costs before its data is encoded. Nothing can be learnt from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from microdit.data.manifest import FORMAT, WITH_FEATURES, write_manifest
from microdit.data.packing import CaptionPacking, pack_features, pack_latents, pack_text
from microdit.data.shards import EncodedRow, ShardWriter, checksums_of
from microdit.encoders.vision import CELL, feature_grid
from microdit.io.files import sha256_of


@dataclass(frozen=True)
class RandomSet:
    """What the set looks like: latents (C, H, W) of 8 bits, of images of `side`s (height, width) in pixels; captions (tokens, channels).

    `autoencoder`, `text_encoder` and `vision` are the names and fingerprints that the manifest states; `feature_channels` goes with the
    last.
    """

    resolution: int
    sides: tuple[int, int]
    latents: tuple[int, int, int]
    caption: tuple[int, int]
    autoencoder: tuple[str, str]
    text_encoder: tuple[str, str]
    captions: CaptionPacking = "full"
    vision: tuple[str, str] | None = None
    feature_channels: int = 0


def write_random_set(folder: Path, rows: int, kind: RandomSet) -> None:
    """Write a set of one shard of standard normal numbers, the same at each call."""
    folder.mkdir(parents=True)
    generator, resolution = np.random.default_rng(0), kind.resolution
    grid = feature_grid(*kind.sides)
    writer = ShardWriter(folder / "shard-00000.arrow", [resolution], kind.vision is not None)
    for number in range(rows):
        text = pack_text(generator.standard_normal(kind.caption, np.float32), kind.captions)
        latents = {resolution: pack_latents(generator.standard_normal(kind.latents, np.float32), "int8")}
        features = {}
        if kind.vision is not None:
            features = {resolution: pack_features(generator.standard_normal((kind.feature_channels, *grid), np.float32))}
        writer.write(EncodedRow(f"{number}", 0, [f"caption {number}"], [1.0], [text], latents, features))
    writer.close()
    shard = {
        "name": writer.path.name,
        "rows": rows,
        "seen": rows,
        "rejected": {},
        "buckets": {"0": rows},
        "bytes": writer.path.stat().st_size,
        "sha256": sha256_of(writer.path),
        "checksums": checksums_of(writer.path)._asdict(),
        "captions": rows,
        "tokens": rows * kind.caption[0],
        "captions_cut": 0,
    }
    write_manifest(folder, _plan(kind), [shard])


def _plan(kind: RandomSet) -> dict[str, Any]:
    plan = {
        "format": FORMAT,
        "source": "random numbers",
        "settings": {"resolutions": [kind.resolution], "latents": "int8", "captions": kind.captions},
        "sizes": [{str(kind.resolution): list(kind.sides)}],
        "latent_channels": kind.latents[0],
        "downsampling": kind.sides[0] // kind.latents[1],
        "text_channels": kind.caption[1],
        "max_tokens": kind.caption[0],
        "autoencoder": dict(zip(("name", "fingerprint"), kind.autoencoder, strict=True)),
        "text_encoder": dict(zip(("name", "fingerprint"), kind.text_encoder, strict=True)),
    }
    if kind.vision is None:
        return plan
    named = dict(zip(("name", "fingerprint"), kind.vision, strict=True))
    return plan | {"format": WITH_FEATURES, "features": {**named, "channels": kind.feature_channels, "cell": CELL}}
