"""A loss that rises and stays up: no single step looks wrong, and the run is mostly lost."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

WINDOW = 64  # steps, whose median is the level
RISE = 1.25  # times the phase's lowest level: beyond chance, and below the 1.5 of the runs that were lost here (docs/lab/README.md)


class Level:
    """Of the losses of one phase: between phases masks, sizes and data change, and the loss with them. `warning`: what was told."""

    def __init__(self, phase: str = "", losses: Sequence[float] = (), lowest: float | None = None, warning: str | None = None):
        self.phase, self.warning = phase, warning
        self.losses = deque(losses, maxlen=WINDOW)
        self.lowest = math.inf if lowest is None else lowest

    def add(self, loss: float, step: int) -> str | None:
        """What to tell now, at most once."""
        self.losses.append(loss)
        if self.warning or len(self.losses) < WINDOW:
            return None
        level = median(self.losses)
        self.lowest = min(self.lowest, level)
        if level > RISE * self.lowest:
            self.warning = (
                f"Phase {self.phase}: the loss had come down to {self.lowest:.3g}, and was above {RISE * self.lowest:.3g} in most of the "
                f"{WINDOW} steps before step {step}. If it stays up, begin again with half the learning_rate, more warmup_steps or "
                "optimizer.betas [0.9, 0.95]: anew, or from a checkpoint before the rise (delete the later ones)."
            )
        return self.warning

    def state(self) -> dict[str, Any]:
        """For JSON; `Level(**state)` goes on from it."""
        lowest = None if math.isinf(self.lowest) else self.lowest
        return {"phase": self.phase, "losses": list(self.losses), "lowest": lowest, "warning": self.warning}
