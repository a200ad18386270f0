"""Numbers of the stretch since the last record, and the line of progress."""

import math
import time
from dataclasses import dataclass, field

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TaskID

from microdit.terminal import LineOfProgress, PlainColumn, PlainConsole
from microdit.training.tally import BINS, StepSums, by_noise

SMOOTHING = 0.3  # of the speed that the time left is reckoned with


@dataclass
class Window:
    """Sums since the last record."""

    started: float = field(default_factory=time.monotonic)
    losses: list[float] = field(default_factory=lambda: [0.0] * BINS)
    counts: list[float] = field(default_factory=lambda: [0.0] * BINS)
    images: int = 0
    flops: float = 0.0
    waited: float = 0.0
    step_losses: list[float] = field(default_factory=list)


class Meters:
    """Adds up steps. `peak` is the FLOP/s of one process's device; the work is that of all `processes`."""

    def __init__(self, first_step: int, total_steps: int, peak: float, processes: int, device: torch.device, console: PlainConsole):
        self._peak, self._processes, self._device = peak, processes, device
        self._window = Window()
        self._flops_per_second: float | None = None
        columns = (PlainColumn(), BarColumn(bar_width=20), MofNCompleteColumn(), PlainColumn("numbers"))
        self._progress = LineOfProgress(*columns, console=console, refresh_per_second=2)  # drawing takes milliseconds of a core
        self._task: TaskID = self._progress.add_task("start", completed=first_step, total=total_steps, numbers="")

    def __enter__(self) -> "Meters":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, phase: str, step: int, sums: StepSums, flops: float, waited: float, accepted: bool) -> None:
        """After step number `step` (from 1). `waited`: seconds for data. Steps that were not taken count as work only."""
        window = self._window
        window.images += round(sum(sums.counts))
        window.flops += flops
        window.waited += waited
        if accepted:
            window.step_losses.append(sums.loss)
            window.losses = [a + b for a, b in zip(window.losses, sums.losses, strict=True)]
            window.counts = [a + b for a, b in zip(window.counts, sums.counts, strict=True)]
        self._progress.update(self._task, description=phase, completed=step)

    def read(self) -> dict[str, object]:
        """Means and speeds since the last reading (time for pictures and checkpoints included), and a new start.

        `loss` is the mean of the steps' losses, null if none was taken; `memory_gb` the most this process held on the device.
        """
        window, now = self._window, time.monotonic()
        seconds = now - window.started
        speed = window.flops / seconds
        self._flops_per_second = speed if self._flops_per_second is None else SMOOTHING * speed + (1 - SMOOTHING) * self._flops_per_second
        losses = window.step_losses
        self._window = Window(started=now)
        return {
            "loss": math.fsum(losses) / len(losses) if losses else None,
            "images_per_second": round(window.images / seconds, 2),
            "data_wait": round(window.waited / seconds, 4),
            "mfu": round(speed / (self._peak * self._processes), 4),
            "memory_gb": round(_peak_memory(self._device) / 1e9, 3),
            "loss_by_noise": by_noise(window.losses, window.counts),
        }

    def seconds_left(self, flops: float) -> float:
        """For `flops` more, at the speed of late; call after `read`."""
        return flops / self._flops_per_second if self._flops_per_second else 0.0

    def show(self, numbers: str) -> None:
        self._progress.update(self._task, numbers=numbers)


def in_words(
    loss: float | None, images_per_second: float, mfu: float, seconds_left: float, dollars: float | None, to_go: float | None
) -> str:
    """The end of the progress line."""
    parts = ["no loss" if loss is None else f"loss {loss:.4f}", f"{images_per_second:.0f} images/s", f"{mfu:.0%} MFU", _clock(seconds_left)]
    if dollars is not None:
        parts.append(f"${dollars:.2f}" + ("" if to_go is None else f", ${to_go:.2f} to go"))
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d {hours} h" if days else f"{hours}:{minutes:02}:{rest:02}") + " left"


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system that has no GPU; training on CPU is for Linux and macOS

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
