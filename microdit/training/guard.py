"""Steps that would do harm: a loss that is not finite, or one that jumps far above what was usual."""

import math
from collections import deque
from statistics import median
from typing import Any

from microdit.recipe import GuardRecipe
from microdit.training.level import Level

REMEMBERED = 64  # losses of accepted steps
ENOUGH = 16  # of them, before a jump can be told


class Guard:
    """Judges each step before it is taken. Its state belongs into the checkpoint: a run that goes on judges alike."""

    def __init__(self, recipe: GuardRecipe):
        self.recipe = recipe
        self.skipped = 0  # steps, over the whole run
        self.in_a_row = 0
        self.rollbacks = 0
        self.level = Level()
        self._losses: deque[float] = deque(maxlen=REMEMBERED)

    def objection(self, loss: float, grad_norm: float) -> str | None:
        """Why the step should not be taken, or None."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"the loss is {loss:g} and the gradient's norm {grad_norm:g}"
        usual = median(self._losses) if len(self._losses) >= ENOUGH else math.inf
        if loss > self.recipe.loss_jump * usual:
            return f"the loss is {loss:.3g}, usual were {usual:.3g}"
        return None

    def accept(self, loss: float, phase: str, step: int) -> str | None:
        """Note a step that is taken. What to warn of, if the loss has risen for long."""
        self._losses.append(loss)
        self.in_a_row = 0
        if phase != self.level.phase:
            self.level = Level(phase)
        return self.level.add(loss, step)

    def skip(self) -> bool:
        """Count a step that was not taken. True if it is time to go back to a checkpoint."""
        self.skipped += 1
        self.in_a_row += 1
        return self.in_a_row >= self.recipe.rollback_after

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
        self._recall(state)

    def _recall(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=REMEMBERED)
        if "level" in state:  # else of a version that kept none
            self.level = Level(**state["level"])
