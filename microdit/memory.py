"""Keep freed memory in the process. On the CPU a training step frees and takes the same gigabytes again and again."""

import ctypes
import sys

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
