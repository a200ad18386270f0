"""A JSON Lines file that is written line by line, each line with its checksum, and survives kills and full disks."""

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import Any

from microdit.errors import UserError
from microdit.io.files import from_checked_json, to_checked_lines


class LineFile:
    """A JSON Lines file that one process appends to, from any thread. Each line is synced to disk before the next one.

    `lines` holds the lines found when the file was opened, without a truncated last one, for `from_checked_json` to parse.
    Raises UserError if another process has the file open, or it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)  # unbuffered: a failed write must not be retried later
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from None
        try:
            self._lock_file()
            self.lines = self._read()
        except BaseException:
            self._file.close()
            raise

    def append(self, fields: dict[str, Any]) -> None:
        """Append one line. Raises UserError if the disk is full, and leaves the file unchanged then."""
        line = to_checked_lines([fields])
        with self._lock:
            size = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file.fileno())
            except OSError as error:
                self._file.truncate(size)
                raise UserError(
                    f"{self.path} cannot be written: {error.strerror}. Free some space and run the same command again."
                ) from None

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def _lock_file(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process is writing to {self.path}: wait for it, or stop it.") from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be locked: {error.strerror}. Write it to another file system.") from None

    def _read(self) -> list[bytes]:
        self._file.seek(0)
        content = self._file.readall()
        whole, _, last = content.rpartition(b"\n")
        lines = whole.splitlines()
        if last and not _is_whole(last):
            self._file.truncate(len(content) - len(last))
        elif last:  # complete but for its newline
            lines.append(last)
            self._file.write(b"\n")
        return lines


def _is_whole(line: bytes) -> bool:
    try:
        from_checked_json(line)
    except ValueError:
        return False
    return True
