"""A loss that rises and stays up: no single step looks wrong, and the run is mostly lost.

Steps that would do harm are not taken: those of a loss that is not finite, or one that jumps far above what was usual.

Whether a step is taken is decided on the device, which the program would otherwise have to wait for. The program hears of it when it
reads the step's numbers, one step later at most, and then warns, counts, and goes back to a checkpoint after several in a row.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from microdit.config.schema import GuardRecipe
from microdit.training.meters import exact_dtype

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


REMEMBERED = 64  # losses of accepted steps
ENOUGH = 16  # of them, before a jump can be told


@dataclass(frozen=True)
class Verdict:
    """What was decided of a step, once it is read from the device. `usual`: the median of the last losses, infinite if they are few."""

    loss: float
    grad_norm: float
    taken: bool
    usual: float

    @property
    def objection(self) -> str | None:
        """Why the step was not taken, or None."""
        if self.taken:
            return None
        if not (math.isfinite(self.loss) and math.isfinite(self.grad_norm)):
            return f"the loss is {self.loss:g} and the gradient's norm {self.grad_norm:g}"
        return f"the loss is {self.loss:.3g}, usual were {self.usual:.3g}"


class Guard:
    """`judge` decides on the device, `note` keeps the program's account. Its state belongs into the checkpoint: a run that goes on judges
    alike."""

    def __init__(self, recipe: GuardRecipe, device: torch.device):
        self.recipe = recipe
        self.skipped = 0  # steps, over the whole run
        self.in_a_row = 0
        self.rollbacks = 0
        self.must_roll_back = False
        self.level = Level()
        self._losses: deque[float] = deque(maxlen=REMEMBERED)
        # The same losses on the device, the next one's place being that of the number of them.
        self._ring_N = torch.zeros(REMEMBERED, dtype=exact_dtype(device), device=device)
        self._accepted = torch.zeros(1, dtype=torch.long, device=device)

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Whether to take the step, 1.0 or 0.0, and the loss that is usual: scalars on the device, where the loss is remembered if so."""
        places_N = torch.arange(REMEMBERED, device=self._ring_N.device)
        ordered_N = self._ring_N.masked_fill(places_N >= self._accepted, math.inf).sort().values
        count = self._accepted.clamp(max=REMEMBERED)
        middle_2 = torch.cat([(count - 1).clamp(min=0) // 2, (count // 2).clamp(max=REMEMBERED - 1)])
        median = ordered_N.gather(0, middle_2).mean()
        usual = torch.where(self._accepted[0] >= ENOUGH, median, math.inf)
        taken = loss.isfinite() & grad_norm.isfinite() & (loss <= self.recipe.loss_jump * usual)
        self._ring_N = torch.where(taken & (places_N == self._accepted % REMEMBERED), loss.to(self._ring_N.dtype), self._ring_N)
        self._accepted = self._accepted + taken
        return taken.float(), usual

    def note(self, verdict: Verdict, phase: str, step: int) -> str | None:
        """Account for step number `step` (from 0). Returns what to warn of if the step was taken and the loss has risen for long."""
        if not verdict.taken:
            self.skipped += 1
            self.in_a_row += 1
            self.must_roll_back |= self.in_a_row >= self.recipe.rollback_after
            return None
        self._losses.append(verdict.loss)
        self.in_a_row = 0
        if phase != self.level.phase:
            self.level = Level(phase)
        return self.level.add(verdict.loss, step)

    def state(self) -> dict[str, Any]:
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "rollbacks": self.rollbacks}
        return {**counts, "losses": list(self._losses), "level": self.level.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.rollbacks = state["skipped"], state["in_a_row"], state["rollbacks"]
        self._recall(state)

    def roll_back(self, state: dict[str, Any]) -> None:
        """To what was usual at the checkpoint; what happened since still counts."""
        self.rollbacks += 1
        self.in_a_row = 0
        self.must_roll_back = False
        self._recall(state)

    def _recall(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=REMEMBERED)
        if "level" in state:  # else of a version that kept none
            self.level = Level(**state["level"])
        padded = [*self._losses, *[0.0] * (REMEMBERED - len(self._losses))]
        self._ring_N.copy_(torch.tensor(padded, dtype=self._ring_N.dtype))
        self._accepted.fill_(len(self._losses))
