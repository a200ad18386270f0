"""What the steps of benchmarks/gpu.py share: results that outlive their process, clocks, kernels."""

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from microdit.io.files import write_aside
from microdit.models.config import SIZES, Size

WARM_UP = 3
KERNELS = 20
KINDS = {  # of kernels, by words in their names; the first that fits
    "attention": ("flash", "fmha", "attention", "sdpa", "softmax"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "::mm", "::addmm", "::bmm", "gemv", "splitk"),
    "optimizer and clipping": ("multi_tensor", "foreach", "adam", "lerp"),
    "collectives": ("nccl", "all_gather", "reduce_scatter", "chunk_cat", "split_with_sizes"),
    "norms": ("layer_norm", "norm"),
    "compiled": ("triton",),
    "sorting and gathering": ("sort", "topk", "gather", "index", "scatter"),
    "copies": ("memcpy", "memset", "copy_kernel", "catarray"),
    "elementwise and sums": ("elementwise", "reduce", "vectorized"),
}
RANGES = ("FSDP::", "ProfilerStep", "Torch-Compiled Region", "##")  # names of stretches, which hold kernels
SMOKE = Size(dim=32, depth=2, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=4, experts_every=1, round_ffn_to=16)


@dataclass(frozen=True)
class Place:
    """Where a step works: `out` is kept, `scratch` is deleted. At smoke size everything is as small as it can be."""

    name: str
    out: Path
    scratch: Path
    smoke: bool

    def size(self, name: str) -> Size:
        return SMOKE if self.smoke else SIZES[name]

    @property
    def caption(self) -> tuple[int, int]:
        return (8, 16) if self.smoke else (77, 1024)


class Results:
    """What a step has found so far, in a file that is whole whenever the process ends."""

    def __init__(self, path: Path):
        self._path = path
        self.found: dict[str, Any] = {}
        self.failed: list[str] = []

    def put(self, key: str, value: Any) -> None:
        self.found[key] = value
        print(f"{key}: {value}", flush=True)
        write_aside(self._path, json.dumps(self.found, indent=1).encode())

    @contextmanager
    def attempt(self, key: str) -> Iterator[None]:
        """Note what fails and go on with the next measurement; the step's exit code tells of it."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed.append(key)
            self.put(key, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        free_memory()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def time_of(work: Callable[[], object], seconds: float, warm_up: int = WARM_UP) -> tuple[float, float]:
    """Seconds of one call: the median of two repeats that take about `seconds` together, and their spread as a share of it."""
    for _ in range(warm_up - 1):
        work()
    calls = max(1, min(100, int(seconds / 2 / seconds_of(work))))
    repeats = [seconds_of(lambda: [work() for _ in range(calls)]) / calls for _ in range(2)]
    return median(repeats), (max(repeats) - min(repeats)) / median(repeats)


def measured_ceiling(place: Place) -> float | None:
    """FLOP/s of the bfloat16 product that the first step timed; None if it failed."""
    path = place.out / "ceilings.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    flops: float | None = found.get("bfloat16 product", {}).get("flops_per_second")
    return flops


def costliest_kernels(step: Callable[[], object]) -> dict[str, Any]:
    """Kernels of one step by time, and the shares of their kinds; `kernel_milliseconds` beside the step's says whether the GPU waited."""
    step()
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        synchronize()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if getattr(event, key) and not event.key.startswith(RANGES)]
    events.sort(key=lambda event: -cast(float, getattr(event, key)))
    total = sum(getattr(event, key) for event in events) or 1.0
    kinds: dict[str, float] = {}
    for event in events:
        kind = kind_of_kernel(event.key)
        kinds[kind] = kinds.get(kind, 0.0) + getattr(event, key) / total
    return {
        "kernel_milliseconds": total / 1000,
        "calls": sum(event.count for event in events),
        "kinds": {kind: round(share, 4) for kind, share in sorted(kinds.items(), key=lambda item: -item[1])},
        "kernels": [
            {"share": round(getattr(event, key) / total, 4), "calls": event.count, "name": event.key[:160]} for event in events[:KERNELS]
        ],
    }


def kind_of_kernel(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), "others")
