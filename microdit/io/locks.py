"""File locks, which the system releases when their process ends, and folders that one program writes at a time.

The locked file names its holder, so that a second program that is refused a folder can say who uses it.
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

LOCK = ".lock"  # in a folder, while it is written
VISIBLE = 60.0  # seconds until a file that one machine wrote is visible on the others, despite their caches


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Lock the file `path`, created if missing, until the block ends. `what` names what the lock protects, for the error message.

    The lock also holds between machines if the file system supports that, as NFS does. Raises UserError at once if another process holds
    it, naming the process and its host, or if the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if not try_lock(file, path):
            raise _in_use_error(file, what)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        yield


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Lock the file `path` until the block ends, waiting until it is free. Its folder must exist."""
    with path.open("a+b") as file:
        _lock(file, fcntl.LOCK_EX, path)
        yield


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Yield whether no other process holds the file `path`, created if missing, and hold it until the block ends if so."""
    with path.open("ab") as file:
        yield try_lock(file, path)


def try_lock(file: BinaryIO, path: Path) -> bool:
    """Lock the open file `path` until it is closed, also in processes that inherited it; return False if another process holds it."""
    return _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, path)


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Hold a shared lock on the file `path` until the block ends."""
    with path.open("a+b") as file:
        _lock(file, fcntl.LOCK_SH, path)
        yield


def is_held(path: Path) -> bool:
    """Return whether a process holds the file's lock, exclusive or shared. Only one process may call this at a time."""
    with path.open("a+b") as file:
        return not try_lock(file, path)


def check_unlocked(path: Path, what: str) -> None:
    """Raise UserError, as `locked` does, if another process holds the file exclusively. Several processes may call this at once."""
    with path.open("rb") as file:
        if not _lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB, path):
            raise _in_use_error(file, what)


def _in_use_error(file: BinaryIO, what: str) -> UserError:
    file.seek(0)
    return UserError(f"{what} is in use by {file.read(200).decode(errors='replace') or 'another process'}: wait for it, or stop it.")


def _lock(file: BinaryIO, kind: int, path: Path) -> bool:
    """Lock the file until it is closed or the process ends. Returns False if another process holds it."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be locked against other processes: {error.strerror}. Choose a folder on another disk.") from None
    return True


@contextmanager
def sole_writer(folder: Path, world: "World | None" = None) -> Iterator[None]:
    """Keep other programs from writing `folder`, created if missing, until the block ends or the process dies.

    All processes of `world` must call this; the first one holds the lock. Raises UserError on all of them if another program holds it
    (naming its host and process), if the folder cannot be written, or if the processes do not see the same folder.
    """
    with ExitStack() as held:
        problem = None
        if world is None or world.is_main:
            try:
                held.enter_context(_locked(folder))
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{folder} cannot be written: {error}. Fix that, or choose another --out."
        if world is not None:
            problem = world.share(problem)
        if problem:
            raise UserError(problem)
        if world is not None and world.size > 1:
            _check_same_folder(folder, world)
        yield


def _check_same_folder(folder: Path, world: "World") -> None:
    """Raise UserError if some processes do not see the lock that the first one wrote, because their folder is a different one."""
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
    """Lock a folder. The lock file is deleted while locked, so a process that opened it earlier locks a deleted file, and tries again."""
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
                        folder.rmdir()  # nothing was written
                return
