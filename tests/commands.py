"""The real command line, for tests that use it as a person would."""

import os
from pathlib import Path
from typing import NamedTuple

from tests.training.processes import start


class Done(NamedTuple):
    returncode: int
    output: str


def importing_from(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a process that looks for packages in `folder` first, and then where this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])), **more}


def microdit(*arguments: object, cwd: Path, ranks: int = 1) -> Done:
    """The real command in processes of its own. The worst of their exit codes, and all that they printed."""
    cores = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # other tests run beside this one there
    running = start(cwd / ".logs", list(arguments), ranks, cores=cores, cwd=cwd)
    return Done(max(running.wait()), running.output)
