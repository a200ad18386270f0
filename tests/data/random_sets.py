"""Encoded sets of random numbers, written by the real code in a moment: as many shards as a test needs."""

from pathlib import Path

import numpy as np

from microdit.data.manifest import FORMAT, PLAN, Manifest, write_manifest
from microdit.data.packing import pack_latents, pack_text
from microdit.data.shards import EncodedRow, ShardWriter, checksums_of
from microdit.io.files import sha256_of, to_checked_json

CHANNELS, TOKENS = 32, 4


def random_set(folder: Path, shards: int = 12, rows: int = 8, buckets: int = 1, seed: int = 0, tokens: int = TOKENS) -> Manifest:
    """Write a set of `shards` shards of `rows` rows, of images of 8 x 8 pixels, each bucket with other sides.

    Row r has the key "r". A row takes about 64 bytes for each of `tokens`, and half a kB more.
    """
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(seed)
    sides = [(8, 8), (8, 16), (16, 8)][:buckets]
    plan = {
        "format": FORMAT,
        "source": f"random numbers {seed}",
        "parts": [f"part {shard}" for shard in range(shards)],
        "settings": {"resolutions": [8], "latents": "fp16", "captions": "fp16", "buckets": buckets > 1},
        "sizes": [{"8": list(side)} for side in sides],
        "latent_channels": 3,
        "downsampling": 1,
        "text_channels": CHANNELS,
        "max_tokens": tokens,
        "autoencoder": {"name": "none", "fingerprint": ""},
        "text_encoder": {"name": "none", "fingerprint": ""},
    }
    entries = []
    for shard in range(shards):
        path = folder / f"shard-{shard:05d}.arrow"
        writer = ShardWriter(path, [8])
        for row in range(rows):
            bucket = row % buckets
            latents = numbers.standard_normal((3, *sides[bucket]), np.float32)
            text = numbers.standard_normal((tokens, CHANNELS), np.float32)
            key = str(shard * rows + row)
            writer.write(EncodedRow(key, bucket, [f"caption {key}"], [1.0], [pack_text(text, "fp16")], {8: pack_latents(latents, "fp16")}))
        writer.close()
        counts = {"rows": rows, "seen": rows, "captions": rows, "tokens": rows * tokens, "captions_cut": 0, "rejected": {}}
        held = {str(bucket): count for bucket, count in sorted(writer.buckets.items())}
        entry = {"name": path.name, "part": f"part {shard}", "fingerprint": "", **counts, "buckets": held, "bytes": path.stat().st_size}
        entry |= {"sha256": sha256_of(path), "checksums": checksums_of(path)._asdict()}
        path.with_suffix(".json").write_bytes(to_checked_json(entry))
        entries.append(entry)
    (folder / PLAN).write_bytes(to_checked_json(plan))
    return write_manifest(folder, plan, entries)


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of each file, by its name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
