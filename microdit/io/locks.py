"""Folders that one process works on at a time: a locked file, which says who holds it and is free again when that process ends.

Run folders and other folders that one program writes for long: a second one is refused, and told who is at it.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from microdit.errors import UserError
from microdit.io.files import stale_asides

if TYPE_CHECKING:
    from microdit.distributed import World  # imports PyTorch


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the file `path`, made if need be, until the block ends, however it ends. `what` begins the message: what is kept from others.

    Other machines are kept out too where the file system passes locks on, as NFS does. Raises UserError at once, with the holder's process
    and host, if another process holds it, and if the file system knows no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, path):
            raise _refusal(file, what)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        yield


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold the file `path` until the block ends, and wait for whoever holds it. Its folder must be there."""
    with path.open("a+b") as file:
        _lock(file, fcntl.LOCK_EX, path)
        yield


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Hold the file `path` together with others, until the block ends."""
    with path.open("a+b") as file:
        _lock(file, fcntl.LOCK_SH, path)
        yield


def is_held(path: Path) -> bool:
    """Whether a process holds the file, alone or with others. For one process at a time to ask."""
    with path.open("a+b") as file:
        return not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, path)


def refuse_locked(path: Path, what: str) -> None:
    """Raise UserError, as `locked` does, if another process holds the file. Several may ask at once."""
    with path.open("rb") as file:
        if not _lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB, path):
            raise _refusal(file, what)


def _refusal(file: BinaryIO, what: str) -> UserError:
    file.seek(0)
    return UserError(f"{what} is in use by {file.read(200).decode(errors='replace') or 'another process'}: wait for it, or stop it.")


def _lock(file: BinaryIO, kind: int, path: Path) -> bool:
    """Until the file is closed, or its process ends. False if another process is in the way."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be locked against other processes: {error.strerror}. Choose a folder on another disk.") from None
    return True


LOCK = ".lock"  # in the folder, while it is written
VISIBLE = 60.0  # seconds after which a file that one machine wrote is seen on the others, whatever their caches hold


@contextmanager
def sole_writer(folder: Path, world: "World | None" = None) -> Iterator[None]:
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


def _refuse_others(folder: Path, world: "World") -> None:
    """Raises UserError if some processes do not see the lock that the first one has just written: theirs is another folder."""
    written, deadline = world.share(_holder(folder)), time.monotonic() + VISIBLE
    while (seen := _holder(folder)) != written and time.monotonic() < deadline:
        time.sleep(0.5)
    world.check_same_folder(seen, str(folder))


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
