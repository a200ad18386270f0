"""Folders that one process works on at a time: a locked file, which says who holds it and is free again when that process ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from microdit.errors import UserError


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
