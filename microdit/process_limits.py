"""Limits of a process: how many files it may have open, and whether it returns freed memory to the system."""

import ctypes
import os
import resource
import sys
from pathlib import Path

from microdit.errors import UserError

ENOUGH = 65_536  # what is asked for where the system allows it: some systems take very long to start programs that may open a billion


def raise_limit(wanted: int = ENOUGH) -> int:
    """Let this process, and those that it starts, open `wanted` files, or as many as the system allows. Returns how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or allowed <= soft:
        return wanted if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (ValueError, OSError):  # macOS has a lower limit beside the hard one
        return soft
    return allowed


def check_file_limit(more: int, what: str) -> None:
    """Raise the limit of open files for `more` that `what` needs. Raises UserError if the system does not allow it."""
    needed = open_files() + more
    limit = raise_limit(max(needed, ENOUGH))
    if limit < needed:
        raise UserError(
            f"{what} need {needed:,} open files in each process, and this machine allows {limit:,} (RLIMIT_NOFILE): say ulimit -n {needed} "
            "before you start, or have that limit raised (LimitNOFILE of systemd, --ulimit nofile of Docker)."
        )


def open_files() -> int:
    """Return how many files this process has open."""
    listing = Path("/proc/self/fd")
    return len(os.listdir(listing if listing.is_dir() else "/dev/fd"))


# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Tell glibc not to hand freed blocks back to the kernel, which would clear every page of them at the next use.

    Measured by `benchmarks/train_step.py --return-memory` against the same without. Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
