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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{what} is in use by {_holder(file)}: wait for it, or stop it.") from None
        except OSError as error:
            raise UserError(
                f"{path} cannot be locked against other processes: {error.strerror}. Choose a folder on another disk."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        yield


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    return file.read(200).decode(errors="replace") or "another process"
