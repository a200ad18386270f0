"""The exceptions that are meant for people: a sentence that says what was wrong, where, and what to do."""

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
    """Turn a failed import into a UserError: what the package is for, its name, and the `extra` of microdit that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f'{purpose} needs the package {error.name}, which is not installed: pip install "microdit[{extra}]".') from error


class DivergedError(UserError):
    """Training ran into numbers that are not finite, or losses that stayed absurd: a matter of the recipe, not of the machine."""


class StoppedError(UserError):
    """The run was asked to stop and saved itself. `exit_code` tells whoever started it whether to start it again."""

    def __init__(self, sentence: str, exit_code: int):
        super().__init__(sentence)
        self.exit_code = exit_code


EXIT_RESTART = 75  # EX_TEMPFAIL: the machine is being taken away, start again with --resume
EXIT_BY_USER = 130  # as shells have it for Ctrl-C
