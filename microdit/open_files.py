"""How many files a process may have open: sockets of other processes, shards of a data set, workers' pipes all count."""

import os
import resource
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


def refuse_low_limit(more: int, what: str) -> None:
    """Raises UserError if this process cannot open so many `more` files, which `what` needs, by raising its limit either."""
    needed = open_files() + more
    limit = raise_limit(max(needed, ENOUGH))
    if limit < needed:
        raise UserError(
            f"{what} need {needed:,} open files in each process, and this machine allows {limit:,} (RLIMIT_NOFILE): say ulimit -n {needed} "
            "before you start, or have that limit raised (LimitNOFILE of systemd, --ulimit nofile of Docker)."
        )


def open_files() -> int:
    """How many this process has open."""
    listing = Path("/proc/self/fd")
    return len(os.listdir(listing if listing.is_dir() else "/dev/fd"))
