"""Exceptions whose message is for the user: a sentence that says what was wrong, where, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake outside the program (recipe, data, disk). The command line prints it without a stack trace.

    >>> from microdit import load_recipe
    >>> try:
    ...     load_recipe("emoji-fast", ["phases.0.steps=0"])
    ... except UserError as error:
    ...     print("phases.0.steps" in str(error))
    True
    """


@contextmanager
def optional_package(purpose: str, extra: str) -> Iterator[None]:
    """Turn a failed import into a UserError that names the package, its `purpose`, and the `extra` of microdit that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f'{purpose} needs the package {error.name}, which is not installed: pip install "microdit[{extra}]".') from error


class DivergedError(UserError):
    """Training diverged: weights or losses are not finite, or losses stayed far too high. The cause is the recipe, not the machine."""


class StoppedError(UserError):
    """The run was asked to stop, and saved a checkpoint. `exit_code` tells the process that started it whether to restart it."""

    def __init__(self, sentence: str, exit_code: int):
        super().__init__(sentence)
        self.exit_code = exit_code


EXIT_RESTART = 75  # EX_TEMPFAIL: the machine is being preempted, restart with --resume
EXIT_BY_USER = 130  # as shells report Ctrl-C
