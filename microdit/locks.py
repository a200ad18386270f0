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
        _lock(file, fcntl.LOCK_EX, path, what)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        yield


def refuse_locked(path: Path, what: str) -> None:
    """Raise UserError, as `locked` does, if another process holds the file. Several may ask at once."""
    with path.open("rb") as file:
        _lock(file, fcntl.LOCK_SH, path, what)


def _lock(file: BinaryIO, kind: int, path: Path, what: str) -> None:
    """Until the file is closed, or its process ends."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200).decode(errors="replace") or "another process"
        raise UserError(f"{what} is in use by {holder}: wait for it, or stop it.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be locked against other processes: {error.strerror}. Choose a folder on another disk.") from None
