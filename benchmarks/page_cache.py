"""Reading as after a cold start: files that the system's page cache has forgotten, and the bytes that are then read for them."""

import os
from collections.abc import Iterable
from pathlib import Path


def forget(paths: Iterable[Path]) -> None:
    """Drop these files from the page cache. Their names and the positions of their blocks stay in memory: only root can drop those."""
    os.sync()  # a page that is not on the disk yet cannot be dropped
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def bytes_read() -> int:
    """Bytes that this process has had fetched from a disk so far; zero for ever on a file system without one (tmpfs)."""
    return _count("read_bytes")


def bytes_asked_for() -> int:
    """Bytes that this process has read so far, from a disk or from memory."""
    return _count("rchar")


def _count(name: str) -> int:
    return int(Path("/proc/self/io").read_text().split(f"{name}: ")[1].split()[0])
