"""Equal budgets for the arms of a study: the cost of a training step of each arm, and the number of steps that each budget buys.

FLOPs are computed by formula. Seconds are measured once, with all arms timed in turns; from then on an arm's seconds are its steps times
its seconds per step. Equal images means equal steps, since all arms have the same batch size.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from microdit.config.load import with_todays_defaults
from microdit.config.schema import Recipe
from microdit.data.manifest import read_manifest
from microdit.devices import device_name
from microdit.distributed import World
from microdit.errors import UserError
from microdit.io.console import QUIET, PlainConsole, Reporter
from microdit.io.files import from_checked_json, to_checked_json, write_aside
from microdit.io.places import location
from microdit.io.strict_yaml import parse_yaml
from microdit.lab.study import Budget, Study, measurement
from microdit.training.trainer import Trainer

ROUNDS = 12  # of timing, of which the fastest counts: other load can only slow a step down
ROUNDS_UNTIMED = 2  # if seconds are no budget of the study: they are then only an estimate for people
MOMENTS = 4  # steps that are timed per training, more if it has more phases


def flops_of_a_step(trainer: Trainer) -> float:
    """Return the FLOPs of forward and backward for a whole batch, averaged over the training."""
    batch = trainer.step_batch(0)
    return trainer.flops.remaining(0, batch.tokens, batch.caption_tokens) / trainer.recipe.total_steps


def seconds_of_a_step(trainers: dict[str, Trainer], reporter: Reporter = QUIET, rounds: int = ROUNDS) -> dict[str, float]:
    """Return the seconds per step, averaged over each training, by the trainers' names. All are timed in turns."""
    steps = {name: [(share, stepper(trainer, step)) for step, share in moments(trainer.recipe)] for name, trainer in trainers.items()}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    with reporter.progress("time a step of each arm", rounds * len(trainers)) as advance:
        for _ in range(rounds):
            for name, timed in steps.items():
                times[name].append(sum(share * _seconds(step) for share, step in timed))
                advance(1)
    return {name: min(values) for name, values in times.items()}


def moments(recipe: Recipe) -> list[tuple[int, float]]:
    """Return representative steps, at least one per phase and evenly spread over each, with the share of the training each represents."""
    found, start = [], 0
    for phase in recipe.phases:
        count = min(phase.steps, max(1, round(MOMENTS * phase.steps / recipe.total_steps)))
        share = phase.steps / recipe.total_steps / count
        found += [(start + (2 * number + 1) * phase.steps // (2 * count), share) for number in range(count)]
        start += phase.steps
    return found


def stepper(trainer: Trainer, step: int = 0) -> Callable[[], None]:
    """Return a function that does the trainer's step number `step`, without loading data and logging."""
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
    """The cost of a step, averaged over the phases, and the number of `steps` that each budget buys."""

    flops_per_step: float
    seconds_per_step: float
    steps: dict[Budget, int]

    def measured_steps(self, shares: list[float]) -> list[int]:
        """Return the steps at which quality is measured, in order: these shares of each budget."""
        return sorted({max(1, round(share * steps)) for share in shares for steps in self.steps.values()})

    def cost(self, budget: Budget, step: int) -> float:
        """Return the cost of training to `step` in FLOPs, seconds or batches."""
        return step * {"flops": self.flops_per_step, "seconds": self.seconds_per_step, "images": 1.0}[budget]


def make_plan(study: Study, recipes: dict[str, Recipe], out: Path, world: World, reporter: Reporter = QUIET) -> dict[str, ArmPlan]:
    """Return the plan of the study's arms: those in `out`/plan.json, if it exists, and newly timed ones, which are added to the file.

    `recipes` may hold further arms, which are neither timed nor forgotten if the file has them.

    Raises UserError if arms in the file, the budgets, the device, or the way quality is measured have changed since, or if arms train on
    different images.
    """
    reference = study.reference.arm
    asked: dict[str, Any] = {
        "reference": asdict(study.reference),
        "measurement": measurement(study),
        "arms": {arm: recipes[arm].to_yaml() for arm in study.arms},
    }
    plans: dict[str, ArmPlan] = {}
    device = "CPU" if world.device.type == "cpu" else device_name(world.device)
    if (out / "plan.json").is_file():
        check_unchanged(study, recipes, out)
        plans, before = read_plan(out), read_device(out)
        asked["arms"] = _content(out)["asked"]["arms"] | asked["arms"]
        if before != device:
            raise UserError(f"{out} holds results of {before}, and this is {device}: seconds do not compare. Choose another --out.")
    _check_same_pictures({arm: recipes[arm] for arm in study.arms})
    new = [arm for arm in study.arms if arm not in plans]
    if new:
        timed = _time(study, {arm: recipes[arm] for arm in dict.fromkeys([reference, *new])}, plans.get(reference), world, reporter)
        plans |= {arm: timed[arm] for arm in new}
    content = {"asked": asked, "device": device, "arms": {arm: asdict(plan) for arm, plan in plans.items()}}
    write_aside(out / "plan.json", to_checked_json(content))
    return plans


def _time(study: Study, recipes: dict[str, Recipe], known: ArmPlan | None, world: World, reporter: Reporter) -> dict[str, ArmPlan]:
    """Time these arms, which include the reference arm. If that is already `known`, seconds are scaled to its original timing."""
    with TemporaryDirectory() as place:
        trainers = {arm: Trainer(recipe, Path(place) / arm, Reporter(PlainConsole(quiet=True)), world) for arm, recipe in recipes.items()}
        flops = {arm: flops_of_a_step(trainer) for arm, trainer in trainers.items()}
        seconds = seconds_of_a_step(trainers, reporter, ROUNDS if "seconds" in study.budgets else ROUNDS_UNTIMED)
        del trainers
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # for the processes that train beside this one
    reference = study.reference.arm
    first = seconds[reference] if known is None else known.seconds_per_step
    scaled = {arm: value * first / seconds[reference] for arm, value in seconds.items()}
    costs = (study.reference.steps, flops[reference], first)
    return {arm: _plan(study.budgets, *costs, flops[arm], scaled[arm]) for arm in recipes}


def check_unchanged(study: Study, recipes: dict[str, Recipe], out: Path) -> None:
    """Check that the study still matches the results in `out`: budgets, measurement, and all arms there. Further arms are fine.

    Raises UserError naming what changed.
    """
    before = _content(out)
    asked, budgets = before["asked"], set(before["arms"][before["asked"]["reference"]["arm"]]["steps"])
    changed = [arm for arm, recipe in asked["arms"].items() if not _same_recipe(recipe, recipes.get(arm))]
    if asked["reference"] != asdict(study.reference) or budgets != set(study.budgets):
        changed.append("the budget")
    now = measurement(study)
    earlier = asked.get("measurement", now)  # older plans lack the key
    changed += [key for key in {**earlier, **now} if earlier.get(key) != now.get(key)]
    if changed:
        raise UserError(f"{out} holds results from before {', '.join(changed)} changed: choose another --out.")


def _same_recipe(before: str, now: Recipe | None) -> bool:
    """Return whether two recipes are equal apart from their names."""
    return now is not None and with_todays_defaults(yaml.safe_load(before)) | {"name": now.name} == yaml.safe_load(now.to_yaml())


def _check_same_pictures(recipes: dict[str, Recipe]) -> None:
    """Raise UserError if arms train on different images, or in another order or size. Encoders may differ."""
    seen: dict[str, str] = {}
    for arm, recipe in recipes.items():
        if recipe.data.path is not None:
            card = read_manifest(location(recipe.data.path))
            sides = recipe.data.resolution or card["settings"]["resolutions"]
            pictures = f"{card['rows']:,} rows of {card.get('source')} at {sides} px"
            seen.setdefault(pictures, f"{arm} from {recipe.data.path}, {pictures}")
    if len(seen) > 1:
        raise UserError(f"All arms of a study must train on the same images: {'; '.join(seen.values())}.")


def _plan(budgets: list[Budget], steps: int, reference_flops: float, reference_seconds: float, flops: float, seconds: float) -> ArmPlan:
    bought: dict[Budget, float] = {
        "flops": steps * reference_flops / flops,
        "seconds": steps * reference_seconds / seconds,
        "images": steps,
    }
    return ArmPlan(flops, seconds, {budget: max(1, round(bought[budget])) for budget in budgets})


def read_plan(out: Path) -> dict[str, ArmPlan]:
    """Return the plan of the results in `out`. Raises UserError if it is missing or damaged."""
    return {arm: ArmPlan(**values) for arm, values in _content(out)["arms"].items()}


def read_device(out: Path) -> str:
    """Return the device of the results in `out`: "CPU", or the name of a GPU. Raises UserError as `read_plan`."""
    return str(_content(out).get("device", "CPU"))  # plans without this key are older, and of CPUs


def _content(out: Path) -> dict[str, Any]:
    path = out / "plan.json"
    if not path.is_file():
        raise UserError(f"There is no {path}: run the study first, with microdit lab run.")
    try:
        content = from_checked_json(path.read_bytes())
        _check_content(content)  # plans of earlier versions have no checksum
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path} is damaged ({error}), and the study cannot continue without it: choose another --out.") from error
    return content


def _check_content(content: dict[str, Any]) -> None:
    """Raise an exception unless a plan holds what is read of it."""
    asked, plans = content["asked"], {arm: ArmPlan(**values) for arm, values in content["arms"].items()}
    if asked["reference"]["arm"] not in plans or asked["arms"].keys() != plans.keys():
        raise ValueError("the recipe or the plan of an arm is missing")
    if not all(isinstance(parse_yaml(recipe, "a recipe"), dict) for recipe in asked["arms"].values()):
        raise ValueError("a recipe is none")
    numbers = [n for plan in plans.values() for n in (plan.flops_per_step, plan.seconds_per_step, *plan.steps.values())]
    if not all(type(number) in (int, float) and number > 0 for number in numbers):
        raise ValueError("a cost or a number of steps is none")
