"""Run folders and other folders that one program writes for long: a second one is refused, and told who is at it."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from microdit.distributed import World
from microdit.errors import UserError
from microdit.files import stale_asides
from microdit.locks import locked

LOCK = ".lock"  # in the folder, while it is written
VISIBLE = 60.0  # seconds after which a file that one machine wrote is seen on the others, whatever their caches hold


@contextmanager
def sole_writer(folder: Path, world: World | None = None) -> Iterator[None]:
    """Keep other programs from writing `folder`, which is made if need be, until the block ends or the process dies.

    All processes of `world` must call this; the first one holds the lock. Raises UserError, on all of them, if another program holds it
    (with its host and process), if the folder cannot be written, or if it is not the same one to all.
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
        if world is not None and world.size > 1:
            _refuse_others(folder, world)
        yield


def _refuse_others(folder: Path, world: World) -> None:
    """Raises UserError if some processes do not see the lock that the first one has just written: theirs is another folder."""
    written, deadline = world.share(_holder(folder)), time.monotonic() + VISIBLE
    while (seen := _holder(folder)) != written and time.monotonic() < deadline:
        time.sleep(0.5)
    world.refuse_difference(seen, str(folder))


def _holder(folder: Path) -> str:
    try:
        return (folder / LOCK).read_text(errors="replace")
    except OSError:
        return ""


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
