"""Run folders and other folders that one program writes for long: a second one is refused, and told who is at it."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from microdit.distributed import World
from microdit.errors import UserError
from microdit.files import stale_asides
from microdit.locks import locked

LOCK = ".lock"  # in the folder, while it is written


@contextmanager
def sole_writer(folder: Path, world: World | None = None) -> Iterator[None]:
    """Keep other programs from writing `folder`, which is made if need be, until the block ends or the process dies.

    All processes of `world` must call this; the first one holds the lock. Raises UserError, on all of them, if another program holds it
    (with its host and process), or if the folder cannot be written.
    """
    with ExitStack() as held:
        problem = None
        if world is None or world.is_main:
            try:
                held.enter_context(_locked(folder))
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{folder} cannot be written: {error}. Choose another --out, or put that right."
        if world is not None:
            problem = world.share(problem)
        if problem:
            raise UserError(problem)
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The file is removed while it is held. Who had opened it before, and locks it after, holds a file without a name, and tries again."""
    made, path = not folder.exists(), folder / LOCK
    while True:
        with locked(path, str(folder)):
            if path.is_file() and path.read_text(errors="replace") == f"process {os.getpid()} on {socket.gethostname()}":
                for left in stale_asides(folder):
                    left.unlink(missing_ok=True)
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                    if made and folder.is_dir() and not any(folder.iterdir()):
                        folder.rmdir()  # nothing came of it
                return
