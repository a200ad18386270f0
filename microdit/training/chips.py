"""What the chips that people rent can do, to tell how much of it is used."""

import time
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Chip:
    """`teraflops`: dense matrix products in bfloat16 (float16 on V100 and T4) summed in float32, without sparsity. `memory_gb`: as sold."""

    name: str
    marks: tuple[str, ...]  # all of them are in the name that the driver gives
    teraflops: float
    memory_gb: float


# The vendors' published figures, written down in November 2026 without the data sheets at hand. Where a sheet prints the figure "with
# sparsity", half of it. Consumer cards: with float32 accumulation. The first that fits is taken, so special ones stand first.
CHIPS = (
    Chip("B200", ("B200",), 2250.0, 180),
    Chip("H200 NVL", ("H200", "NVL"), 835.5, 141),
    Chip("H200", ("H200",), 989.4, 141),
    Chip("H100 NVL", ("H100", "NVL"), 835.5, 94),
    Chip("H100 PCIe", ("H100", "PCIe"), 756.0, 80),
    Chip("H100 SXM", ("H100",), 989.4, 80),
    Chip("A100 80 GB", ("A100", "80GB"), 312.0, 80),
    Chip("A100 40 GB", ("A100",), 312.0, 40),
    Chip("L40S", ("L40S",), 362.05, 48),
    Chip("L40", ("L40",), 181.05, 48),
    Chip("L4", ("L4",), 121.0, 24),
    Chip("RTX 6000 Ada", ("RTX 6000 Ada",), 364.2, 48),
    Chip("RTX A6000", ("RTX A6000",), 154.8, 48),
    Chip("A40", ("A40",), 149.7, 48),
    Chip("A10G", ("A10G",), 70.0, 24),
    Chip("A10", ("A10",), 125.0, 24),
    Chip("RTX 5090", ("RTX 5090",), 209.5, 32),
    Chip("RTX 4090", ("RTX 4090",), 165.2, 24),
    Chip("RTX 3090", ("RTX 3090",), 71.0, 24),
    Chip("V100 32 GB", ("V100", "32GB"), 125.0, 32),
    Chip("V100", ("V100",), 125.0, 16),
    Chip("T4", ("T4",), 65.0, 16),
    Chip("MI300X", ("MI300X",), 1307.4, 192),
)
OTHERS = ("MIG", "Laptop", "Ti", "D")  # slices, and cards that share a name with a faster or slower one: not in the table

SIDES = {"cuda": (2048, 8192), "cpu": (256, 1024)}  # of products to measure, small first
TRIES = 5  # of each: the first ones get things ready, and other work disturbs some
SECONDS = 1.0  # that they may take in all: many CPUs only emulate 16 bits, and need a second for one of 1024


def find_chip(device_name: str) -> Chip | None:
    """By the name that `torch.cuda.get_device_name` gives, such as "NVIDIA H100 80GB HBM3"."""
    words = device_name.replace("-", " ")
    if any(_has(words, mark) for mark in OTHERS):
        return None
    return next((chip for chip in CHIPS if all(_has(words, mark) for mark in chip.marks)), None)


def named_chip(name: str) -> Chip | None:
    """By a name as people write it: h100, rtx4090, 4090, "A100 80GB", in any case."""
    wanted = _plain(name)
    exact = next((chip for chip in CHIPS if _plain(chip.name) == wanted), None)
    if exact is not None or not wanted:
        return exact
    first = [chip for chip in CHIPS if _plain(chip.marks[0]) == wanted and len(chip.marks) == 1]  # h100 without more is the SXM one
    endings = [chip for chip in CHIPS if _plain(chip.name).endswith(wanted)]
    return first[0] if first else endings[0] if len(endings) == 1 else None


def same_name(one: str, other: str) -> bool:
    """Whether people mean the same by both: rtx5080, "RTX 5080"."""
    return _plain(one) == _plain(other)


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that `device` can do in matrix products of `dtype`, and where the number is from.

    From the table for a known GPU in 16 bits; else measured once in a process: the best of a few products, small ones first, since a
    CPU that only emulates 16 bits would take long for large ones.
    """
    chip = find_chip(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if chip is not None and dtype in (torch.bfloat16, torch.float16):
        return chip.teraflops * 1e12, f"the vendor's figure for the {chip.name}"
    flops, side = _measured(device, dtype)
    return flops, f"a measured {str(dtype).removeprefix('torch.')} product of {side} x {side}"


def _measured(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """(FLOP/s, side) of the fastest product."""
    best, deadline = (0.0, 0), time.perf_counter() + SECONDS
    for side in SIDES.get(device.type, SIDES["cpu"]):
        seconds = min(_product_seconds(device, dtype, side) for _ in range(TRIES))
        best = max(best, (2 * side**3 / seconds, side))
        if time.perf_counter() + TRIES * 4**3 * seconds > deadline:  # the next side is four times as long
            break
    return best


def _product_seconds(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    torch.mm(a, b, out=out)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _has(words: str, mark: str) -> bool:
    """As whole words: A10 is not in A100. `words` has spaces for dashes: A100-SXM4-80GB."""
    return f" {mark} " in f" {words} "
