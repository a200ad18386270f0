"""Places in object stores, named like s3://bucket/folder/file: read, written, listed and deleted, with retries.

`location` turns a name into a `Path` or, for the stores of `STORES`, into a `Place`. The stores are reached through fsspec and its official
file systems, which find credentials as each provider's own tools do (environment, configuration files, the machine's role). They are never
part of a name, and no message contains one: errors of the libraries are reduced to their codes.

Buckets differ from file systems in three ways that matter here:

- an object appears whole or not at all, but there is no rename, so whatever consists of several objects counts once its last one is there;
- there are no file locks: `Place.create` makes an object only if it is missing, and exactly one of several processes succeeds;
- some stores show new objects late: whoever knows that an object exists says so (`listed`), and a missing one is waited for.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from microdit.errors import UserError, optional_package
from microdit.io.files import opened_aside, sha256_of

T = TypeVar("T")
WRONG = 4  # times that wrong bytes are requested again
DEADLINE = 240.0  # seconds after which an operation that keeps failing ends; below data.read_timeout
LATE = 30.0  # seconds after which an object that was written must be visible
FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0  # seconds between attempts, doubled each time
ANSWER = 20.0  # seconds within which a store accepts a connection and sends its next bytes
SLOWEST = 1 << 20  # bytes per second: an operation on a large object may take longer than the deadline
PART = 16 << 20  # bytes of one request
PARTS_AT_ONCE = 4
MOST_PARTS = 10_000  # of an upload to S3


class Store(NamedTuple):
    """A kind of object store: the package that reaches it, and the extra of microdit that installs it; where credentials come from."""

    title: str
    package: str
    extra: str
    options: dict[str, Any]
    credentials: str


_S3_CONFIG = {"connect_timeout": ANSWER, "read_timeout": ANSWER, "retries": {"mode": "standard", "max_attempts": 2}}
STORES = {
    "s3": Store(
        "S3",
        "s3fs",
        "s3",
        {"use_listings_cache": False, "config_kwargs": _S3_CONFIG},
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile in ~/.aws, or the machine's role",
    ),
    "gs": Store(
        "Google Cloud Storage",
        "gcsfs",
        "gs",
        {"use_listings_cache": False, "consistency": "md5"},
        "GOOGLE_APPLICATION_CREDENTIALS, 'gcloud auth application-default login', or the machine's service account",
    ),
    "az": Store(
        "Azure Blob Storage",
        "adlfs",
        "az",
        {"use_listings_cache": False, "anon": False},
        "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or 'az login', or the machine's managed identity",
    ),
    "hf": Store("the Hugging Face hub", "huggingface_hub", "", {"use_listings_cache": False}, "HF_TOKEN, or 'hf auth login'"),
}


class StoreError(UserError):
    """Raised when a store does not do what it was asked to within the deadline, or refuses it. The message names object and store."""


class MissingObject(StoreError):  # noqa: N818
    """Raised when an object does not exist, in a bucket that does."""


class WrongBytes(StoreError):  # noqa: N818
    """Raised when an object keeps arriving with another SHA-256 than it should have."""


def is_remote(name: str | Path) -> bool:
    """Return whether a name is that of a place in an object store."""
    return isinstance(name, str) and name.partition("://")[0] in STORES and "://" in name


def location(name: "str | Path | Place") -> "Path | Place":
    """Return the place that a name stands for: a `Place` for s3://, gs://, az:// and hf://; a `Path` for file:// and all other names.

    Raises UserError for another scheme, or for a name without a bucket.
    """
    if not isinstance(name, str):
        return name
    scheme, mark, rest = name.partition("://")
    if not mark:
        return Path(name)
    if scheme == "file":
        return Path(rest)
    if scheme not in STORES:
        known = ", ".join(f"{known}://" for known in STORES)
        raise UserError(f"{name} starts with {scheme}://, and the stores known are {known}; folders of this machine need no scheme.")
    if not rest.strip("/") or "?" in rest or "@" in rest.partition("/")[0]:
        raise UserError(f"{name} does not name a place in a store: write {scheme}://BUCKET/FOLDER, without keys or options in it.")
    return Place(f"{scheme}://{rest.strip('/')}")


@dataclass(frozen=True)
class Place:
    """An object, or a folder of objects, in a store.

    Every method raises StoreError: at once for what no retry can mend (a missing bucket, refused credentials), otherwise when attempts
    have failed for `deadline` seconds, plus one second per MB that is transferred.

    >>> from microdit.io.places import Place
    >>> place = Place("s3://bucket/data") / "card.json"
    >>> str(place), place.name, str(place.parent)
    ('s3://bucket/data/card.json', 'card.json', 's3://bucket/data')
    """

    url: str
    deadline: float = field(default=DEADLINE, compare=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Place":
        return Place(f"{self.url}/{name}", self.deadline)

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Place":
        """The folder that the place lies in."""
        return Place(self.url.rpartition("/")[0], self.deadline)

    def with_name(self, name: str) -> "Place":
        """Return the place of this name in the same folder."""
        return self.parent / name

    def read(self, start: int = 0, end: int | None = None, listed: bool = False) -> bytes:
        """Return the object's bytes from `start` up to `end`. Raises MissingObject."""

        def attempt(connection: _Connection) -> bytes:
            options: dict[str, Any] = {} if start == 0 and end is None else {"start": start, "end": end}
            if self.url.startswith("s3://"):
                options["max_concurrency"] = 1  # or s3fs asks for the size first
            content: bytes = connection.call("cat_file", connection.target, **options)
            if end is not None and len(content) != end - start:
                raise OSError(f"{len(content)} bytes came instead of {end - start}")
            return content

        return self._retry("read", attempt, 0 if end is None else end - start, listed)

    def size(self) -> int | None:
        """Return the object's size in bytes, or None if there is no such object."""

        def attempt(connection: _Connection) -> int | None:
            found = connection.call("info", connection.target)
            return None if found["type"] == "directory" else int(found["size"])

        try:
            return self._retry("looked up", attempt)
        except MissingObject:
            return None

    def exists(self) -> bool:
        """Return whether there is such an object."""
        return self.size() is not None

    def modified(self) -> float:
        """Return when the object was last written, in seconds of Unix time by the store's clock. Raises MissingObject."""

        def attempt(connection: _Connection) -> float:
            found = connection.call("info", connection.target)
            if found["type"] == "directory":
                raise FileNotFoundError(self.url)
            when: datetime = next(found[key] for key in ("LastModified", "mtime", "last_modified") if found.get(key))
            return when.timestamp()

        return self._retry("looked up", attempt)

    def list(self) -> dict[str, int]:
        """Return the objects below this folder, at any depth: their sizes by name, relative to the folder and sorted."""

        def attempt(connection: _Connection) -> dict[str, int]:
            prefix = connection.target + "/"
            found = connection.call("find", connection.target, detail=True)
            return {name.removeprefix(prefix): int(entry["size"]) for name, entry in sorted(found.items()) if name.startswith(prefix)}

        try:
            return self._retry("listed", attempt)
        except MissingObject:
            return {}

    def download(self, path: Path, size: int | None = None, sha256: str | None = None, listed: bool = False) -> None:
        """Copy the object to the file `path`, which appears whole or not at all, its bytes compared with `sha256` if that is given.

        Parts are requested several at a time, and only those that fail are requested again. Raises MissingObject, WrongBytes, and OSError
        if the disk is full.
        """
        size = self._size(listed) if size is None else size
        path.parent.mkdir(parents=True, exist_ok=True)
        with opened_aside(path) as file:
            for wait in islice(_waits(), WRONG):
                self._copy_parts(file.fileno(), size, listed)
                if sha256 is None or sha256_of(Path(file.name)) == sha256:
                    return
                time.sleep(wait)
            raise WrongBytes(
                f"{self.url} came {WRONG} times with another SHA-256 than was recorded when it was written: it is damaged in "
                f"{self._store()}, or another object now; write it again."
            )

    def write(self, content: bytes) -> None:
        """Write an object of these bytes, in place of another one if there is one."""

        def attempt(connection: _Connection) -> None:
            connection.call("pipe_file", connection.target, content)
            connection.check_stored(len(content), lambda: hashlib.md5(content, usedforsecurity=False).hexdigest())

        self._retry("written", attempt, len(content))

    def create(self, content: bytes) -> bool:
        """Write an object only if there is none, and return whether that was so; of several processes, one succeeds.

        `content` must differ between processes (an id, a host and process number), because an attempt whose answer is lost is recognised
        by it. The hub has no such operation: there the object is looked for first, and two processes may both succeed.
        """

        def attempt(connection: _Connection) -> bool:
            if self.url.startswith("hf://"):
                return not self.exists() and connection.call("pipe_file", connection.target, content) is None
            try:
                connection.call("pipe_file", connection.target, content, mode="create")
            except Exception as error:
                if not isinstance(error, FileExistsError) and _code(error) not in ("412", "PreconditionFailed"):
                    raise
                return self.read() == content
            try:
                connection.check_stored(len(content), lambda: hashlib.md5(content, usedforsecurity=False).hexdigest())
            except _WrongBytesError:
                self.write(content)  # the object is this process's
            return True

        return self._retry("created", attempt)

    def upload(self, path: Path) -> None:
        """Copy the file `path` to this object, in parts if it is large; S3's checksum of what arrived is compared with the file's."""
        size = path.stat().st_size
        part = max(PART, -(-size // MOST_PARTS))

        def attempt(connection: _Connection) -> None:
            options = {"chunksize": part, "max_concurrency": PARTS_AT_ONCE} if self.url.startswith("s3://") else {}
            connection.call("put_file", str(path), connection.target, **options)
            connection.check_stored(size, lambda: _etag(path, size, part))

        self._retry("written", attempt, size)

    def delete(self) -> None:
        """Delete the object, if there is one."""

        def attempt(connection: _Connection) -> None:
            try:
                connection.call("rm_file", connection.target)
            except FileNotFoundError:
                if connection.lacks_bucket():
                    raise

        self._retry("deleted", attempt)

    def _size(self, listed: bool) -> int:
        """Return the size of an object that must exist. Raises MissingObject."""

        def attempt(connection: _Connection) -> int:
            found = connection.call("info", connection.target)
            if found["type"] == "directory":
                raise FileNotFoundError(self.url)
            return int(found["size"])

        return self._retry("read", attempt, 0, listed)

    def _copy_parts(self, file: int, size: int, listed: bool) -> None:
        def copy(start: int) -> None:
            end = min(start + PART, size)
            content, at = memoryview(self.read(start, end, listed)), start
            while at < end:
                at += os.pwrite(file, content[at - start :], at)

        starts = range(0, size, PART)
        if len(starts) < 2:
            for start in starts:
                copy(start)
            return
        with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="parts") as pool:
            try:
                list(pool.map(copy, starts))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _retry(self, done: str, attempt: "Callable[[_Connection], T]", size: int = 0, listed: bool = False) -> T:
        """Call `attempt` until it succeeds, and return its result. `done` is what is tried, as a participle.

        `size` is the number of bytes to transfer. A missing object is waited for if it is `listed`. Raises StoreError.
        """
        began, reason = time.monotonic(), ""
        until, late = began + self.deadline + size / SLOWEST, began + LATE
        for attempts, wait in enumerate(_waits(), start=1):
            try:
                return attempt(_Connection.to(self.url, max(1.0, until - time.monotonic())))
            except StoreError:  # of an operation within this one, which has been retried already
                raise
            except Exception as error:
                final = self._final(error, done)
                if isinstance(final, MissingObject) and listed and time.monotonic() + wait < min(late, until):
                    final = None
                if final is not None:
                    raise final from None  # libraries' messages may hold keys or signed addresses
                if not _is_of_the_store(error):
                    raise
                if not (reason and isinstance(error, TimeoutError)):  # the last attempt may have had no time left
                    reason = _reason(error)
                if time.monotonic() + wait > until:
                    raise StoreError(self._gave_up(done, attempts, time.monotonic() - began, reason)) from None
                if _code(error) in EXPIRED:
                    _Connection.to(self.url, ANSWER).renew()
            time.sleep(wait)
        raise AssertionError

    def _final(self, error: Exception, done: str) -> StoreError | None:
        """Return the sentence for an error that no retry mends, or None."""
        code, store = _code(error), STORES[self.url.partition("://")[0]]
        if code == "NoSuchBucket" or (isinstance(error, FileNotFoundError) and _Connection.to(self.url, ANSWER).lacks_bucket()):
            return StoreError(
                f"{self.url} cannot be {done}: there is no such bucket in {self._store()}. Check its name"
                + (", and AWS_ENDPOINT_URL if the store is not Amazon's." if store.extra == "s3" else ".")
            )
        if isinstance(error, FileNotFoundError):
            return MissingObject(f"{self.url} cannot be {done}: there is no such object in {self._store()}.")
        if type(error).__name__ in NO_CREDENTIALS:
            return StoreError(f"{self.url} cannot be {done}: no credentials for {self._store()} were found ({store.credentials}).")
        if isinstance(error, PermissionError) and code not in EXPIRED:
            return StoreError(
                f"{self.url} cannot be {done}: {self._store()} refuses it ({code or 'no permission'}). Check that the credentials are "
                f"those of this bucket and allow it ({store.credentials})."
            )
        return None

    def _gave_up(self, done: str, attempts: int, seconds: float, reason: str) -> str:
        tried = f"{attempts} attempts" if attempts > 1 else "an attempt"
        return (
            f"{self.url} could not be {done}: {tried} in {seconds:.0f} s failed, the last because {reason}. "
            f"See whether {self._store()} can be reached from here and works, and start again."
        )

    def _store(self) -> str:
        """Return a readable name of the store, with its address if that is set in the environment."""
        scheme = self.url.partition("://")[0]
        address = (os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")) if scheme == "s3" else None
        return STORES[scheme].title + (f" at {urlsplit(address).hostname}:{urlsplit(address).port or ''}".rstrip(":") if address else "")


EXPIRED = ("400", "ExpiredToken", "TokenRefreshRequired", "RequestExpired", "ExpiredTokenException")
NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "CredentialUnavailableError",
)
_LIBRARIES = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpcore", "httpx", "huggingface_hub", "requests", "s3fs"}


class _WrongBytesError(OSError):
    """Raised when a store holds other bytes than were sent."""


@dataclass(frozen=True)
class _Connection:
    """The file system of a store, the name of an object in it, and the seconds that a call may take."""

    files: Any
    target: str
    seconds: float

    @classmethod
    def to(cls, url: str, seconds: float) -> "_Connection":
        """Connect to the store of `url`."""
        files = _file_system(url.partition("://")[0], os.getpid())
        return cls(files, str(files._strip_protocol(url)), seconds)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the file system. Raises its errors, or TimeoutError."""
        if not self.files.async_impl:
            return getattr(self.files, method)(*arguments, **options)
        from fsspec.asyn import sync

        coroutine = getattr(self.files, method if method == "set_session" else f"_{method}")
        return sync(self.files.loop, coroutine, *arguments, timeout=self.seconds, **options)

    def lacks_bucket(self) -> bool:
        """Return whether S3 says that the bucket does not exist. Other stores say so in their errors."""
        if "s3" not in self.files.protocol:
            return False
        try:
            self.call("call_s3", "list_objects_v2", Bucket=self.target.partition("/")[0], MaxKeys=1)
        except Exception as error:  # whatever else is wrong is found by the next attempt
            return _code(error) == "NoSuchBucket"
        return False

    def renew(self) -> None:
        """Look for credentials again, after those in use have expired."""
        if "s3" in self.files.protocol:
            self.call("set_session", refresh=True)

    def check_stored(self, size: int, etag: Callable[[], str]) -> None:
        """Compare what a store holds with what was sent: its size, and in S3 its ETag, which is a checksum unless a key of KMS encrypts it.

        Raises OSError if they differ.
        """
        if "s3" not in self.files.protocol:
            found = int(self.call("info", self.target)["size"])
            if found != size:
                raise _WrongBytesError(f"the store holds {found} bytes, and {size} were sent")
            return
        bucket, _, key = self.target.partition("/")
        head = self.call("call_s3", "head_object", Bucket=bucket, Key=key)
        encrypted = str(head.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in head
        if head["ContentLength"] != size or (not encrypted and head["ETag"].strip('"') != etag()):
            raise _WrongBytesError("the store holds other bytes than were sent")


@lru_cache
def _file_system(scheme: str, process: int) -> Any:
    """Return this process's file system of a store. All threads share it; a process that was forked needs its own."""
    store = STORES[scheme]
    with optional_package(f"{store.title} ({scheme}://)", store.extra):
        import_module(store.package)
    import fsspec

    files = fsspec.filesystem(scheme, skip_instance_cache=True, **store.options)
    if scheme == "s3":
        files.retries = 2  # of a part of an upload; whatever else fails is tried again here
    return files


def _etag(path: Path, size: int, part: int) -> str:
    """Return the ETag that S3 gives to a file uploaded by s3fs: its MD5, or that of the MD5 of its parts."""
    with path.open("rb") as file:
        if size < 2 * part:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        parts = [hashlib.md5(content, usedforsecurity=False).digest() for content in iter(lambda: file.read(part), b"")]
    return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"


def _waits() -> Iterator[float]:
    """Yield the seconds to wait after each attempt."""
    wait = FIRST_WAIT
    while True:
        yield wait
        wait = min(2 * wait, LONGEST_WAIT)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _code(error: BaseException) -> str:
    """Return the store's code for an error, such as AccessDenied or 503; empty if it gave none."""
    for cause in _causes(error):
        if type(cause).__module__.startswith("aiohttp"):  # its errors of broken answers have a code of their own
            continue
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        status = getattr(cause, "status_code", getattr(response, "status_code", getattr(cause, "code", None)))
        if isinstance(status, int):
            return str(status)
    return ""


def _is_of_the_store(error: BaseException) -> bool:
    """Return whether an error may pass: one of the network or the store, and neither of this program nor of its disk."""
    if isinstance(error, OSError):
        return not error.filename and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENOMEM)
    return type(error).__module__.partition(".")[0] in _LIBRARIES


def _reason(error: BaseException) -> str:
    """Return the cause of a failed attempt in words, without anything that a library or a store wrote."""
    if isinstance(error, _WrongBytesError):
        return str(error)
    if type(error).__name__ == "FlexibleChecksumError":
        return "the bytes that came do not match the store's checksum"
    code = _code(error)
    if code:
        return "the credentials have expired" if code in EXPIRED[1:] else f"the store answered {code}"
    if any(isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__ for cause in _causes(error)):
        return "the store did not answer in time"
    return f"the connection failed ({type(error).__name__})"
