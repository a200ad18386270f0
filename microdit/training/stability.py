"""Protection against unstable training: skipped steps, rollbacks, and a warning about a loss that rises and stays up.

`SpikeGuard` skips a step whose loss or gradient norm is not finite, or whose loss jumps far above its running median. The decision is made
on the device, so the program need not wait for it. The program learns of it when it reads the step's numbers, at most one step later; then
it warns, counts, and after several skipped steps in a row has the trainer roll back to a checkpoint.

`PlateauDetector` finds the failure that no single step shows: a loss that rises and stays up.
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

REMEMBERED = 64  # losses of accepted steps
ENOUGH = 16  # accepted steps before a jump can be recognised
WINDOW = 64  # steps in the running median of the loss
RISE = 1.25  # times the phase's lowest median: more than chance, and less than the 1.5 of the runs that failed (docs/lab/README.md)


class PlateauDetector:
    """Warns once per phase when the running median of the loss exceeds 1.25 times its minimum.

    Each phase has a detector of its own, because masks, resolutions and data change between phases, and the loss with them.
    `warning` is the sentence that was returned, if any.
    """

    def __init__(self, phase: str = "", losses: Sequence[float] = (), lowest: float | None = None, warning: str | None = None):
        self.phase, self.warning = phase, warning
        self.losses = deque(losses, maxlen=WINDOW)
        self.lowest = math.inf if lowest is None else lowest

    def add(self, loss: float, step: int) -> str | None:
        """Add the loss of step number `step` (from 0). Returns the warning when it is due, which is at most once."""
        self.losses.append(loss)
        if self.warning or len(self.losses) < WINDOW:
            return None
        current = median(self.losses)
        self.lowest = min(self.lowest, current)
        if current > RISE * self.lowest:
            self.warning = (
                f"Phase {self.phase}: the loss had come down to {self.lowest:.3g}, and was above {RISE * self.lowest:.3g} in most of the "
                f"{WINDOW} steps before step {step}. If it stays up, start again with half the learning_rate, more warmup_steps or "
                "optimizer.betas [0.9, 0.95], from scratch or from a checkpoint before the rise (delete the later ones)."
            )
        return self.warning

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values; `PlateauDetector(**state)` restores it."""
        lowest = None if math.isinf(self.lowest) else self.lowest
        return {"phase": self.phase, "losses": list(self.losses), "lowest": lowest, "warning": self.warning}


@dataclass(frozen=True)
class SpikeDecision:
    """The decision on a step, as read from the device: applied if `taken`. `usual` is the median of recent losses, infinite for few."""

    loss: float
    grad_norm: float
    taken: bool
    usual: float

    @property
    def objection(self) -> str | None:
        """Why the step was skipped; None if it was not."""
        if self.taken:
            return None
        if not (math.isfinite(self.loss) and math.isfinite(self.grad_norm)):
            return f"the loss is {self.loss:g} and the gradient norm {self.grad_norm:g}"
        return f"the loss is {self.loss:.3g}, and its recent median {self.usual:.3g}"


class SpikeGuard:
    """Skips steps whose loss is not finite or jumps, and asks for a rollback after several of them in a row.

    `judge` decides on the device; `record` keeps count in the program. The state belongs in the checkpoint, so that a resumed run makes the
    same decisions.
    """

    def __init__(self, recipe: GuardRecipe, device: torch.device):
        self.recipe = recipe
        self.skipped = 0  # steps of the whole run
        self.in_a_row = 0
        self.rollbacks = 0
        self.must_roll_back = False
        self.plateau = PlateauDetector()
        self._losses: deque[float] = deque(maxlen=REMEMBERED)
        # The same losses as a ring buffer on the device; the number of accepted steps, modulo its length, is the next index.
        self._ring_N = torch.zeros(REMEMBERED, dtype=exact_dtype(device), device=device)
        self._accepted = torch.zeros(1, dtype=torch.long, device=device)

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Decide whether to take a step, and remember its loss if so. Returns (1.0 or 0.0, median of recent losses), on the device."""
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

    def record(self, decision: SpikeDecision, phase: str, step: int) -> str | None:
        """Count step number `step` (from 0). Returns the plateau warning if it is due."""
        if not decision.taken:
            self.skipped += 1
            self.in_a_row += 1
            self.must_roll_back |= self.in_a_row >= self.recipe.rollback_after
            return None
        self._losses.append(decision.loss)
        self.in_a_row = 0
        if phase != self.plateau.phase:
            self.plateau = PlateauDetector(phase)
        return self.plateau.add(decision.loss, step)

    def state(self) -> dict[str, Any]:
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "rollbacks": self.rollbacks}
        return {**counts, "losses": list(self._losses), "level": self.plateau.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.rollbacks = state["skipped"], state["in_a_row"], state["rollbacks"]
        self._restore_losses(state)

    def roll_back(self, state: dict[str, Any]) -> None:
        """Restore the recent losses of a checkpoint. Skipped steps and rollbacks since then still count."""
        self.rollbacks += 1
        self.in_a_row = 0
        self.must_roll_back = False
        self._restore_losses(state)

    def _restore_losses(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=REMEMBERED)
        if "level" in state:  # earlier versions did not store it
            self.plateau = PlateauDetector(**state["level"])
        padded = [*self._losses, *[0.0] * (REMEMBERED - len(self._losses))]
        self._ring_N.copy_(torch.tensor(padded, dtype=self._ring_N.dtype))
        self._accepted.fill_(len(self._losses))
