"""Measurements of training steps: losses by noise level, speed, utilisation, time left, and the progress line.

`LossStats` adds up losses on the device over micro-batches and processes; `PendingStep` copies them to the CPU without waiting;
`StepResult` holds them there; `Meters` averages them between two entries of the record.
"""

import math
import time
from dataclasses import dataclass, field

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TaskID
from torch import Tensor

from microdit.diffusion.objective import Objective
from microdit.io.console import LineOfProgress, PlainColumn, PlainConsole

BINS = 8
SUMS = 2 * BINS + 4  # sums of losses, numbers of samples; sum of alignments and their number; two kinds of stop requests
SMOOTHING = 0.3  # weight of the newest speed in the average that predicts the time left


def noise_bins(sigma_B: Tensor, objective: Objective) -> Tensor:
    """Return the bin of each noise level, 0 to 7 from low to high. Each bin holds an eighth of the training distribution."""
    return (objective.quantile(sigma_B) * BINS).long().clamp(0, BINS - 1)


class LossStats:
    """Sums of denoising losses and numbers of samples in each noise bin, alignments, and stop requests, as one tensor on the device.

    One tensor takes one all-reduce to add up over processes. Nothing here waits for the device.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(SUMS, dtype=exact_dtype(device), device=device)

    def add(self, loss_B: Tensor, sigma_B: Tensor, objective: Objective, alignment_B: Tensor | None = None) -> None:
        bins_B = noise_bins(sigma_B, objective)
        self.sums.index_add_(0, bins_B, loss_B.detach().to(self.sums.dtype))
        self.sums.index_add_(0, bins_B + BINS, torch.ones_like(loss_B, dtype=self.sums.dtype))
        if alignment_B is not None:
            self.sums[2 * BINS] += alignment_B.to(self.sums.dtype).sum()
            self.sums[2 * BINS + 1] += len(alignment_B)

    def add_stops(self, by_machine: bool, by_user: bool) -> None:
        self.sums[-2] += by_machine
        self.sums[-1] += by_user

    @property
    def loss(self) -> Tensor:
        """Mean over all samples, a scalar on the device."""
        return self.sums[:BINS].sum() / self.sums[BINS : 2 * BINS].sum().clamp(min=1)


@dataclass(frozen=True)
class StepResult:
    """Sums of losses and numbers of samples in each noise bin of one step, and whether any process was asked to stop, and by whom.

    `alignment` is the mean cosine similarity of representation alignment, None in steps without.
    """

    losses: list[float]
    counts: list[float]
    stop_by_machine: bool = False
    stop_by_user: bool = False
    alignment: float | None = None

    @classmethod
    def of(cls, values: list[float]) -> "StepResult":
        """Parse the values of `LossStats.sums`."""
        alignment, aligned, by_machine, by_user = values[2 * BINS : SUMS]
        stops = by_machine > 0, by_user > 0
        return cls(values[:BINS], values[BINS : 2 * BINS], *stops, alignment / aligned if aligned else None)

    @property
    def stop(self) -> bool:
        return self.stop_by_machine or self.stop_by_user

    @property
    def loss(self) -> float:
        """Mean over all samples."""
        return sum(self.losses) / max(1.0, sum(self.counts))


class PendingStep:
    """Numbers being copied from the device. Creating one does not wait for the device; `values` does."""

    def __init__(self, numbers_N: Tensor):
        self._event: torch.cuda.Event | None = None
        if numbers_N.device.type == "cuda":
            self._numbers_N = torch.empty(numbers_N.shape, dtype=numbers_N.dtype, pin_memory=True)
            self._numbers_N.copy_(numbers_N, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._numbers_N = numbers_N

    def values(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._numbers_N.tolist()


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums: float64, or float32 on Apple's GPUs, which lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def by_noise(losses: list[float], counts: list[float]) -> list[float | None]:
    """Return the mean of each bin, None where there was no sample or the mean is not finite."""
    means = [loss / count if count else None for loss, count in zip(losses, counts, strict=True)]
    return [mean if mean is not None and math.isfinite(mean) else None for mean in means]


@dataclass
class Window:
    """Sums since the last line of the record."""

    started: float = field(default_factory=time.monotonic)
    losses: list[float] = field(default_factory=lambda: [0.0] * BINS)
    counts: list[float] = field(default_factory=lambda: [0.0] * BINS)
    images: int = 0
    flops: float = 0.0
    waited: float = 0.0
    step_losses: list[float] = field(default_factory=list)
    alignments: list[float] = field(default_factory=list)


class Meters:
    """Averages over steps, and shows progress. `peak` is the FLOP/s of one process's device; FLOPs are those of all `processes`."""

    def __init__(self, first_step: int, total_steps: int, peak: float, processes: int, device: torch.device, console: PlainConsole):
        self._peak, self._processes, self._device = peak, processes, device
        self._window = Window()
        self._flops_per_second: float | None = None
        columns = (PlainColumn(), BarColumn(bar_width=20), MofNCompleteColumn(), PlainColumn("numbers"))
        self._progress = LineOfProgress(*columns, console=console, refresh_per_second=2)  # each refresh takes milliseconds of a core
        self._task: TaskID = self._progress.add_task("start", completed=first_step, total=total_steps, numbers="")

    def __enter__(self) -> "Meters":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, phase: str, step: int, result: StepResult, flops: float, waited: float, accepted: bool) -> None:
        """Add step number `step` (from 1), which waited `waited` seconds for data. Skipped steps count for speed, not for the loss."""
        window = self._window
        window.images += round(sum(result.counts))
        window.flops += flops
        window.waited += waited
        if accepted:
            window.step_losses.append(result.loss)
            window.alignments += [] if result.alignment is None else [result.alignment]
            window.losses = [a + b for a, b in zip(window.losses, result.losses, strict=True)]
            window.counts = [a + b for a, b in zip(window.counts, result.counts, strict=True)]
        self._progress.update(self._task, description=phase, completed=step)

    def read(self) -> dict[str, object]:
        """Return means and speeds since the last call, and start a new window. Time for samples and checkpoints is included.

        `loss` and, where steps had one, `alignment` are means over steps; `loss` is None if all were skipped. `memory_gb` is the peak
        memory of this process on the device.
        """
        window, now = self._window, time.monotonic()
        seconds = now - window.started
        speed = window.flops / seconds
        self._flops_per_second = speed if self._flops_per_second is None else SMOOTHING * speed + (1 - SMOOTHING) * self._flops_per_second
        losses, alignments = window.step_losses, window.alignments
        self._window = Window(started=now)
        return {
            "loss": math.fsum(losses) / len(losses) if losses else None,
            **({"alignment": math.fsum(alignments) / len(alignments)} if alignments else {}),
            "images_per_second": round(window.images / seconds, 2),
            "data_wait": round(window.waited / seconds, 4),
            "mfu": round(speed / (self._peak * self._processes), 4),
            "memory_gb": round(peak_memory(self._device) / 1e9, 3),
            "loss_by_noise": by_noise(window.losses, window.counts),
        }

    def seconds_left(self, flops: float) -> float:
        """Predict the seconds for `flops` more at the recent speed. Call it after `read`."""
        return flops / self._flops_per_second if self._flops_per_second else 0.0

    def show(self, numbers: str) -> None:
        self._progress.update(self._task, numbers=numbers)


def progress_text(
    loss: float | None, images_per_second: float, mfu: float, seconds_left: float, dollars: float | None, to_go: float | None
) -> str:
    """Return the text at the end of the progress line."""
    parts = ["no loss" if loss is None else f"loss {loss:.4f}", f"{images_per_second:.0f} images/s", f"{mfu:.0%} MFU", _clock(seconds_left)]
    if dollars is not None:
        parts.append(f"${dollars:.2f}" + ("" if to_go is None else f", ${to_go:.2f} to go"))
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d {hours} h" if days else f"{hours}:{minutes:02}:{rest:02}") + " left"


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU's allocator, or without a GPU the peak resident set size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # exists on Linux and macOS only, where training on a CPU is supported

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
