"""Equal budgets: what a step of each arm costs, and so how many steps each may take.

FLOPs are counted by formula; images are what the reference arm sees, since all arms have its batch. Seconds are measured once, all arms in
turns; from then on an arm's seconds are its steps times its seconds a step.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console

from microdit.data.card import read_card
from microdit.distributed import World
from microdit.errors import UserError
from microdit.files import write_aside
from microdit.lab.study import Budget, Study
from microdit.recipe import Recipe
from microdit.recipe_file import with_todays_defaults
from microdit.terminal import progress
from microdit.training.trainer import Trainer

ROUNDS = 12  # of which the fastest counts: what others take from the machine only ever slows it
STEPS_A_ROUND = 4  # evenly spread over the training: phases cost differently


@dataclass(frozen=True)
class ArmPlan:
    """What a step costs, on average over the phases, and the `steps` that each budget buys."""

    flops_per_step: float
    seconds_per_step: float
    steps: dict[Budget, int]

    def legs(self, readings: list[float]) -> list[int]:
        """The steps at which quality is measured: shares of each budget, in order. For a scheduled arm `readings` is [1.0]."""
        return sorted({max(1, round(share * steps)) for share in readings for steps in self.steps.values()})

    def cost(self, budget: Budget, step: int) -> float:
        """FLOPs, seconds or batches."""
        return step * {"flops": self.flops_per_step, "seconds": self.seconds_per_step, "images": 1.0}[budget]


def make_plan(study: Study, recipes: dict[str, Recipe], out: Path, world: World) -> dict[str, ArmPlan]:
    """The plan in `out`/plan.json, with what arms it does not know cost, or a new one; either is written there.

    Raises UserError if the known arms or the budgets have changed.
    """
    path = out / "plan.json"
    reference, steps = study.reference.arm, study.reference.steps
    asked = {"reference": asdict(study.reference), "arms": {arm: recipe.to_yaml() for arm, recipe in recipes.items()}}
    plans: dict[str, ArmPlan] = {}
    if path.is_file():
        _refuse_changes(out, json.loads(path.read_text())["asked"], asked)
        plans = read_plan(out)
    _refuse_other_pictures(recipes)
    new = [arm for arm in recipes if arm not in plans]
    if not new:
        return plans
    with TemporaryDirectory() as place:
        trainers = {arm: Trainer(recipes[arm], Path(place) / arm, Console(quiet=True), world) for arm in dict.fromkeys([reference, *new])}
        flops = {arm: flops_of_a_step(trainer) for arm, trainer in trainers.items()}
        seconds = seconds_of_a_step(trainers)
    # Beside the reference as it was timed at first: the machine may be faster or slower today.
    first = plans[reference].seconds_per_step if plans else seconds[reference]
    seconds = {arm: value * first / seconds[reference] for arm, value in seconds.items()}
    plans |= {arm: _plan(study.budgets, steps, flops[reference], first, flops[arm], seconds[arm]) for arm in new}
    write_aside(path, json.dumps({"asked": asked, "arms": {arm: asdict(plan) for arm, plan in plans.items()}}, indent=1).encode())
    return plans


def _refuse_changes(out: Path, before: dict[str, Any], asked: dict[str, Any]) -> None:
    """Of the budgets, or of arms that have results; there may be further arms."""
    changed = [
        arm
        for arm, recipe in before["arms"].items()
        if arm not in asked["arms"] or with_todays_defaults(yaml.safe_load(recipe)) != yaml.safe_load(asked["arms"][arm])
    ]
    if changed or before["reference"] != asked["reference"]:
        what = ", ".join(changed) or "the budget"
        raise UserError(f"{out} holds results of this study as it was before {what} changed: choose another --out.")


def _refuse_other_pictures(recipes: dict[str, Recipe]) -> None:
    """Arms may have encoders of their own, but learn from the same pictures, in the same order and size."""
    seen: dict[str, str] = {}
    for arm, recipe in recipes.items():
        if recipe.data.path is not None:
            card = read_card(Path(recipe.data.path))
            sides = recipe.data.resolution or card["settings"]["resolutions"]
            pictures = f"{card['rows']:,} rows of {card.get('source')} at {sides} px"
            seen.setdefault(pictures, f"{arm} from {recipe.data.path}, {pictures}")
    if len(seen) > 1:
        raise UserError(f"Arms of one study must learn from the same pictures: {'; '.join(seen.values())}.")


def _plan(budgets: list[Budget], steps: int, reference_flops: float, reference_seconds: float, flops: float, seconds: float) -> ArmPlan:
    bought: dict[Budget, float] = {
        "flops": steps * reference_flops / flops,
        "seconds": steps * reference_seconds / seconds,
        "images": steps,
    }
    return ArmPlan(flops, seconds, {budget: max(1, round(bought[budget])) for budget in budgets})


def read_plan(out: Path) -> dict[str, ArmPlan]:
    """The plan that results in `out` were made by. Raises UserError if there is none."""
    path = out / "plan.json"
    if not path.is_file():
        raise UserError(f"There is no {path}: run the study first.")
    return {arm: ArmPlan(**values) for arm, values in json.loads(path.read_text())["arms"].items()}


def flops_of_a_step(trainer: Trainer) -> float:
    """Forward and backward, of the whole batch, on average over the training."""
    batch = trainer._batch(0)
    return trainer.work.after(0, math.prod(trainer._grid(batch)), batch.text_BLE.shape[1]) / trainer.recipe.total_steps


def seconds_of_a_step(trainers: dict[str, Trainer]) -> dict[str, float]:
    """By the trainers' names; steps of all are timed in turns."""
    steps = {arm: stepper(trainer) for arm, trainer in trainers.items()}
    times: dict[str, list[float]] = {arm: [] for arm in trainers}
    with progress("time a step of each arm", ROUNDS * len(trainers)) as advance:
        for _ in range(ROUNDS):
            for arm, step in steps.items():
                started = time.perf_counter()
                for _ in range(STEPS_A_ROUND):
                    step()
                times[arm].append((time.perf_counter() - started) / STEPS_A_ROUND)
                advance(1)
    return {arm: min(values) for arm, values in times.items()}


def stepper(trainer: Trainer) -> Callable[[], None]:
    """What the trainer does in a step, without reading and recording."""
    phase, state, total = trainer.recipe.phases[0], trainer.state, trainer.recipe.total_steps
    batches = cycle([trainer._batch((2 * number + 1) * total // (2 * STEPS_A_ROUND)) for number in range(STEPS_A_ROUND)])
    state.optimizers.set_rate(phase.learning_rate)

    def step() -> None:
        state.loss(next(batches)).mean().backward()
        state.clip(phase.grad_clip)
        state.take_step(1)
        state.optimizers.zero_grad()

    return step
