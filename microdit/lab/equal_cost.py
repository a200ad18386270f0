"""What a training step costs: FLOPs by formula, seconds by the clock.

Equal budgets: what a step of each arm costs, and so how many steps each may take.

FLOPs are counted by formula; images are what the reference arm sees, since all arms have its batch. Seconds are measured once, all arms in
turns; from then on an arm's seconds are its steps times its seconds a step.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from microdit.cli.terminal import progress
from microdit.config.load import with_todays_defaults
from microdit.config.schema import Recipe
from microdit.data.manifest import read_card
from microdit.distributed import World
from microdit.errors import UserError
from microdit.io.console import PlainConsole
from microdit.io.files import write_aside
from microdit.io.text import parse_json
from microdit.lab.study import Budget, Study, measurement
from microdit.training.trainer import Trainer

ROUNDS = 12  # of which the fastest counts: what others take from the machine only ever slows it
MOMENTS = 4  # steps that are timed for a whole training, or more where it has more phases


def flops_of_a_step(trainer: Trainer) -> float:
    """Forward and backward, of the whole batch, on average over the training."""
    batch = trainer.step_batch(0)
    return trainer.flops.remaining(0, batch.tokens, batch.caption_tokens) / trainer.recipe.total_steps


def seconds_of_a_step(trainers: dict[str, Trainer]) -> dict[str, float]:
    """On average over each training, by the trainers' names; all are timed in turns."""
    steps = {name: [(share, stepper(trainer, step)) for step, share in moments(trainer.recipe)] for name, trainer in trainers.items()}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    with progress("time a step of each arm", ROUNDS * len(trainers)) as advance:
        for _ in range(ROUNDS):
            for name, timed in steps.items():
                times[name].append(sum(share * _seconds(step) for share, step in timed))
                advance(1)
    return {name: min(values) for name, values in times.items()}


def moments(recipe: Recipe) -> list[tuple[int, float]]:
    """Steps that stand for a whole training and the shares of it that they stand for: evenly spread over each phase, at least one."""
    found, start = [], 0
    for phase in recipe.phases:
        count = min(phase.steps, max(1, round(MOMENTS * phase.steps / recipe.total_steps)))
        share = phase.steps / recipe.total_steps / count
        found += [(start + (2 * number + 1) * phase.steps // (2 * count), share) for number in range(count)]
        start += phase.steps
    return found


def stepper(trainer: Trainer, step: int = 0) -> Callable[[], None]:
    """What the trainer does in step number `step`, without reading and recording."""
    phase, state, batch = trainer.recipe.phase_at(step)[0], trainer.state, trainer.step_batch(step)

    def take() -> None:
        state.train_step(batch.micro_batches, 1, phase.learning_rate, phase.grad_clip, trainer.guard).values()

    return take


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


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

    Raises UserError if the known arms, the budgets or what is measured have changed.
    """
    reference = study.reference.arm
    asked = {
        "reference": asdict(study.reference),
        "measurement": measurement(study),
        "arms": {arm: recipe.to_yaml() for arm, recipe in recipes.items()},
    }
    plans: dict[str, ArmPlan] = {}
    if (out / "plan.json").is_file():
        refuse_changes(study, recipes, out)
        plans = read_plan(out)
    _refuse_other_pictures(recipes)
    new = [arm for arm in recipes if arm not in plans]
    if new:
        timed = _time(study, {arm: recipes[arm] for arm in dict.fromkeys([reference, *new])}, plans.get(reference), world)
        plans |= {arm: timed[arm] for arm in new}
    content = {"asked": asked, "arms": {arm: asdict(plan) for arm, plan in plans.items()}}
    write_aside(out / "plan.json", json.dumps(content, indent=1).encode())
    return plans


def _time(study: Study, recipes: dict[str, Recipe], known: ArmPlan | None, world: World) -> dict[str, ArmPlan]:
    """Of these arms, the reference arm among them. `known`: as that was timed at first; the machine may be faster or slower today."""
    with TemporaryDirectory() as place:
        trainers = {arm: Trainer(recipe, Path(place) / arm, PlainConsole(quiet=True), world) for arm, recipe in recipes.items()}
        flops = {arm: flops_of_a_step(trainer) for arm, trainer in trainers.items()}
        seconds = seconds_of_a_step(trainers)
    reference = study.reference.arm
    first = seconds[reference] if known is None else known.seconds_per_step
    scaled = {arm: value * first / seconds[reference] for arm, value in seconds.items()}
    costs = (study.reference.steps, flops[reference], first)
    return {arm: _plan(study.budgets, *costs, flops[arm], scaled[arm]) for arm in recipes}


def refuse_changes(study: Study, recipes: dict[str, Recipe], out: Path) -> None:
    """Of budgets, of what is measured, or of arms that have results; there may be further arms. Raises UserError naming what changed."""
    before = _content(out)
    asked, budgets = before["asked"], set(before["arms"][before["asked"]["reference"]["arm"]]["steps"])
    changed = [arm for arm, recipe in asked["arms"].items() if not _same_recipe(recipe, recipes.get(arm))]
    if asked["reference"] != asdict(study.reference) or budgets != set(study.budgets):
        changed.append("the budget")
    now = measurement(study)
    changed += [key for key, value in asked.get("measurement", now).items() if value != now[key]]  # plans of before hold none
    if changed:
        raise UserError(f"{out} holds results of this study as it was before {', '.join(changed)} changed: choose another --out.")


def _same_recipe(before: str, now: Recipe | None) -> bool:
    """But for the name, which changes nothing."""
    return now is not None and with_todays_defaults(yaml.safe_load(before)) | {"name": now.name} == yaml.safe_load(now.to_yaml())


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
    """The plan that results in `out` were made by. Raises UserError if there is none, or it is damaged."""
    return {arm: ArmPlan(**values) for arm, values in _content(out)["arms"].items()}


def _content(out: Path) -> dict[str, Any]:
    path = out / "plan.json"
    if not path.is_file():
        raise UserError(f"There is no {path}: run the study first.")
    try:
        content = parse_json(path.read_bytes())
        if not {"asked", "arms"} <= content.keys():
            raise ValueError("asked or arms are missing")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): results without their plan cannot be gone on with; choose another --out.") from error
    return dict(content)
