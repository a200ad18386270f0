"""Write folders of MDS shards as `mosaicml-streaming` does (sources/test_mds.py compares a folder that it wrote, byte by byte)."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Column = tuple[str, int | None]  # the encoding, and the size of its values where all are of one size


def write_mds(folder: Path, columns: Mapping[str, Column], shards: Sequence[Sequence[Sequence[bytes]]], size_limit: int = 1 << 26) -> None:
    """Write shards of samples, each with its values in the order of the columns."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, samples in enumerate(shards):
        about: dict[str, Any] = {
            "column_encodings": [encoding for encoding, _ in columns.values()],
            "column_names": list(columns),
            "column_sizes": [size for _, size in columns.values()],
            "compression": None,
            "format": "mds",
            "hashes": ["sha1"],
            "size_limit": size_limit,
            "version": 2,
        }
        header = json.dumps(about, sort_keys=True).encode()
        bodies = [_body(values, list(columns.values())) for values in samples]
        begin = 4 + 4 * (len(bodies) + 1) + len(header)
        offsets = np.cumsum([begin, *map(len, bodies)]).astype("<u4")
        content = struct.pack("<I", len(bodies)) + offsets.tobytes() + header + b"".join(bodies)
        name = f"shard.{number:05d}.mds"
        (folder / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content), "hashes": {"sha1": hashlib.sha1(content).hexdigest()}}
        entries.append({**about, "raw_data": raw, "samples": len(bodies), "zip_data": None})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}, sort_keys=True))


def _body(values: Sequence[bytes], columns: Sequence[Column]) -> bytes:
    varying = [len(value) for value, (_, size) in zip(values, columns, strict=True) if size is None]
    return struct.pack(f"<{len(varying)}I", *varying) + b"".join(values)
