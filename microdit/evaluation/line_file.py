"""A file of JSON Lines that is the memory of something that costs money."""

import errno
import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

from microdit.errors import UserError
from microdit.foreign_json import parse_json


class LineFile:
    """Appended to by one process at a time, from any of its threads; each line is on the disk before the next is begun.

    `lines` are those that were found. A last line that was cut off is dropped. Raises UserError if another process is writing the
    file, or if it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)  # what could not be written is not tried again behind our back
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from None
        try:
            self._take_hold()
            self.lines = self._read()
        except BaseException:
            self._file.close()
            raise

    def append(self, fields: dict[str, Any]) -> None:
        """Raises UserError if the disk is full; the file is then as it was."""
        line = json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            size = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file.fileno())
            except OSError as error:
                self._file.truncate(size)
                raise UserError(f"{self.path} cannot be written: {error.strerror}. Make room and run the same command again.") from None

    def close(self) -> None:
        """Let other processes have the file."""
        self._file.close()

    def _take_hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process is writing to {self.path}: wait for it, or stop it.") from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be locked against other processes: {error.strerror}. Write it to another disk.") from None

    def _read(self) -> list[bytes]:
        self._file.seek(0)
        content = self._file.readall()
        whole, _, last = content.rpartition(b"\n")
        lines = whole.splitlines()
        if last and not _is_json(last):
            self._file.truncate(len(content) - len(last))
        elif last:  # all but its line's end was written
            lines.append(last)
            self._file.write(b"\n")
        return lines


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True
