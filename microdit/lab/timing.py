"""What a training step costs: FLOPs by formula, seconds by the clock."""

import time
from collections.abc import Callable

from microdit.recipe import Recipe
from microdit.terminal import progress
from microdit.training.trainer import Trainer

ROUNDS = 12  # of which the fastest counts: what others take from the machine only ever slows it
MOMENTS = 4  # steps that are timed for a whole training, or more where it has more phases


def flops_of_a_step(trainer: Trainer) -> float:
    """Forward and backward, of the whole batch, on average over the training."""
    share = trainer.share(0)
    return trainer.work.after(0, share.tokens, share.caption_tokens) / trainer.recipe.total_steps


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
    phase, state, share = trainer.recipe.phase_at(step)[0], trainer.state, trainer.share(step)

    def take() -> None:
        state.optimizers.set_rate(phase.learning_rate)
        state.learn(share.parts, 1, phase.grad_clip, trainer.guard).values()

    return take


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
