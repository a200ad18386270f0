"""Files: written atomically, and verified against their checksums when they are read."""

import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from microdit.errors import UserError
from microdit.io.untrusted_text import one_line, parse_json_object

ONE_DAY = 86_400  # seconds
CHECKSUM = "self_sha256"  # the last entry of a JSON file that holds its own checksum


def cache_folder() -> Path:
    """Return this program's folder below XDG_CACHE_HOME or ~/.cache. Whatever is in it can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "microdit"


def write_aside(path: Path, content: bytes) -> None:
    """Write a file atomically: to a temporary file in the same folder, flushed to the disk, then renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened_aside(path) as file:
        file.write(content)


@contextmanager
def opened_aside(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that is renamed to `path` when the block succeeds. If several processes do so, the last one wins."""
    aside = aside_of(path)
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def aside_of(path: Path) -> Path:
    """Return the hidden temporary name for `path`, in the same folder and unique to this host and process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")


def stale_asides(folder: Path, name: str | None = None) -> list[Path]:
    """Return the temporary files in `folder` (of the file `name` only, if given) whose process ended, or on another host a day old."""
    return [path for path in folder.glob(f".{'*' if name is None else glob.escape(name)}.*-*.part") if _is_stale(path)]


def _is_stale(path: Path) -> bool:
    before, _, process = path.name.removesuffix(".part").rpartition("-")
    if not process.isdecimal():
        return False
    try:
        if not before.endswith(f".{socket.gethostname()}"):
            return path.stat().st_mtime < time.time() - ONE_DAY
        os.kill(int(process), 0)  # signal 0 only tests whether the process exists
    except (ProcessLookupError, OverflowError):
        return True
    except (PermissionError, FileNotFoundError):  # another user's process; a file that was just renamed
        return False
    return False


def keep_damaged(path: Path) -> Path:
    """Copy a damaged file, before it is rewritten, to NAME.damaged-1 in its folder, or the next free number. Returns the copy."""
    copy = next(name for number in count(1) if not (name := path.with_name(f"{path.name}.damaged-{number}")).exists())
    shutil.copyfile(path, copy)
    return copy


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError for anything else, such as a pipe that nobody may ever write to."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 - returns at once for pipes
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "It is no regular file", str(path))
    return file


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file. Raises OSError like `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. The file is read in blocks."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Return the JSON object in a file, compared with its checksum if it has one.

    Raises UserError, which ends with the sentence `fix`, if the file holds none, differs from its checksum, or cannot be read.
    """
    try:
        return from_checked_json(read_regular(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(str(error))}. {fix}") from error


def to_checked_json(content: Mapping[str, Any]) -> bytes:
    """Return JSON whose first entry announces a checksum and whose last entry is that checksum: the SHA-256 of all bytes before it."""
    body = json.dumps({"checked_by": CHECKSUM, **content}, indent=1).removesuffix("\n}").encode()
    return body + _file_end(hashlib.sha256(body).hexdigest())


def to_checked_lines(contents: Iterable[Mapping[str, Any]]) -> bytes:
    """Return lines of JSON, each with a checksum as in `to_checked_json`, for a JSON Lines file."""
    return b"".join(map(_to_checked_line, contents))


def _to_checked_line(content: Mapping[str, Any]) -> bytes:
    body = json.dumps({"checked_by": CHECKSUM, **content}, ensure_ascii=False).removesuffix("}").encode("utf-8", "backslashreplace")
    return body + _line_end(hashlib.sha256(body).hexdigest()) + b"\n"


def from_checked_json(raw: bytes) -> dict[str, Any]:
    """Parse the output of `to_checked_json`, or a line of `to_checked_lines` without its newline.

    Files and lines of earlier versions, which have neither entry, are read without a check.
    If one of the entries is damaged, the other remains, so no single change makes a file look like one without a checksum.
    Raises ValueError if the bytes differ from what was written.
    """
    content = parse_json_object(raw)
    announced, checksum = content.pop("checked_by", None), content.pop(CHECKSUM, None)
    if announced is not None or checksum is not None:
        end = next((end for end in (_file_end(checksum), _line_end(checksum)) if raw.endswith(end)), b"")
        if checksum != hashlib.sha256(raw.removesuffix(end)).hexdigest():
            raise ValueError("its checksum differs")
    return content


def _file_end(checksum: Any) -> bytes:
    return f',\n "{CHECKSUM}": "{checksum}"\n}}'.encode(errors="replace")


def _line_end(checksum: Any) -> bytes:
    return f', "{CHECKSUM}": "{checksum}"}}'.encode(errors="replace")
