"""Files: written so that a reader never sees half of one, and checked by their content."""

import hashlib
import os
from pathlib import Path


def write_aside(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, flush it to the disk, then rename: `path` is either the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """Of a file's content, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
