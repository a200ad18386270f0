"""What a run tells about itself: metrics.jsonl, TensorBoard, and a line of progress."""

import json
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"


class Meters:
    """Collects losses between two records. Use as a context: the files are closed and the progress line ends with it."""

    def __init__(self, run: Path, first_step: int, total_steps: int, console: Console):
        self._forget_after(run / METRICS, first_step)
        self._file = (run / METRICS).open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)
        self._losses: list[float] = []
        self._images = 0
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID = self._progress.add_task("start", completed=first_step, total=total_steps, numbers="")

    def __enter__(self) -> "Meters":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._board.close()
        self._file.close()

    def step(self, phase: str, step: int, loss: float, images: int) -> None:
        """After step number `step` (from 1)."""
        self._losses.append(loss)
        self._images += images
        self._progress.update(self._task, description=phase, completed=step)

    def record(self, step: int, phase: str, learning_rate: float, grad_norm: float) -> None:
        """Write the mean of the losses since the last record, and the speed over that time (pictures included)."""
        now = time.monotonic()
        metrics = {
            "step": step,
            "loss": sum(self._losses) / len(self._losses),
            "images_per_second": round(self._images / (now - self._started), 2),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
        }
        self._file.write(json.dumps({**metrics, "phase": phase, "time": round(time.time(), 2)}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        numbers = f"loss {metrics['loss']:.4f}  {metrics['images_per_second']:.0f} images/s"
        self._progress.update(self._task, numbers=numbers)
        self._losses, self._images, self._started = [], 0, now

    @staticmethod
    def _forget_after(path: Path, step: int) -> None:
        """Drop what a run that was cut off had recorded after its last checkpoint: those steps will be done again."""
        if path.is_file():
            lines = path.read_text().splitlines()
            whole = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            path.write_text("".join(f"{line}\n" for line in whole))
