"""Local copies of shards that lie in an object store: a folder of bounded size, which the processes of a machine share.

A shard is copied whole, compared with its SHA-256 as it arrives, and named by it, so a name never stands for other bytes. `FetchAhead`
copies the shards of coming steps in the order in which the sampler will use them, and where room is missing, the one that is used last
goes. A process may lose a copy to the needs of another one, and then copies it again: only speed depends on the cache.

    SHA256.arrow    a whole shard
    SHA256.lock     held by the process that copies it; holds its size
    .room           held while room is being made
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from microdit.data.shards import DamagedShard
from microdit.errors import UserError
from microdit.io.files import cache_folder, stale_asides
from microdit.io.locks import in_turn, try_lock
from microdit.io.places import Place, WrongBytes

GIGABYTES = 10.0
POLL = 0.02  # seconds between looks at a shard that another thread or process copies
THREADS = 4  # shards that a process copies at a time
WINDOW = 0.75  # share of the cache for shards that are known to be needed; the rest is for others, such as those of held-out sets
BLOCK = 0.25  # share of the cache that a block of the order takes: one is read while two are fetched
NEVER = 1 << 62


class RemoteShard(NamedTuple):
    """A shard in an object store, with what its manifest says of it."""

    place: Place
    bytes: int
    sha256: str


class ShardCache:
    """Whole copies of shards in a folder that holds at most so many gigabytes (of 10^9 bytes)."""

    def __init__(self, folder: Path | None = None, gigabytes: float = GIGABYTES):
        """Create the folder if it is missing; by default it is in the user's cache. Raises UserError if it cannot be written."""
        self.folder, self.bytes = folder or cache_folder() / "shards", int(gigabytes * 10**9)
        self.ahead: FetchAhead | None = None
        self._copying: set[str] = set()  # by threads of this process, which a file lock does not keep apart from their temporary files
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in stale_asides(self.folder):
                left.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot hold copies of shards: {error.strerror}. Choose another data.cache.folder.") from error

    def check(self, largest: RemoteShard) -> None:
        """Raise UserError if the cache is too small for a shard."""
        if largest.bytes > self.bytes:
            raise UserError(
                f"{largest.place} has {largest.bytes / 1e9:.3g} GB, and {self.folder} may hold {self.bytes / 1e9:g}: raise "
                f"data.cache.gigabytes, best to {4 * largest.bytes / 1e9:.3g} or more."
            )

    def copy(self, shard: RemoteShard) -> Path:
        """Return the path of a shard's copy, waiting until it is whole.

        The copy may be taken away at any time by another process; whoever finds it missing calls this again. Raises DamagedShard if the
        bytes in the store are not those that were written, and UserError if it cannot be read or if the disk is full.
        """
        while not (path := self.path(shard)).is_file():
            if self.ahead is not None and (failure := self.ahead.failure(shard)) is not None:
                raise failure
            if not self.fetch(shard, needed=-1):
                time.sleep(POLL)
        return path

    def path(self, shard: RemoteShard) -> Path:
        """Return where a shard's copy is, or would be."""
        return self.folder / f"{shard.sha256}.arrow"

    def drop(self, shard: RemoteShard) -> None:
        """Delete a shard's copy, which turned out to be damaged or is no longer needed."""
        self.path(shard).unlink(missing_ok=True)

    def fetch(self, shard: RemoteShard, needed: int) -> bool:
        """Copy a shard, and return whether it is there now.

        Returns False at once if somebody else is copying it, or if there is no room for it beside shards that are needed up to step
        `needed`. Raises DamagedShard or UserError, as `copy` does.
        """
        with self._lock:
            if shard.sha256 in self._copying:
                return False
            self._copying.add(shard.sha256)
        try:
            return self._fetch(shard, needed)
        finally:
            self._copying.discard(shard.sha256)

    def _fetch(self, shard: RemoteShard, needed: int) -> bool:
        lock = self.folder / f"{shard.sha256}.lock"
        try:
            with lock.open("a+b") as held:
                if not try_lock(held, lock) or not _is_at(held, lock):
                    return False
                try:
                    if self.path(shard).is_file():
                        return True
                    held.truncate(0)
                    held.write(str(shard.bytes).encode())
                    held.flush()
                    if not self._make_room(shard, needed):
                        return False
                    shard.place.download(self.path(shard), shard.bytes, shard.sha256, listed=True)
                    return True
                finally:
                    lock.unlink(missing_ok=True)
        except WrongBytes as error:
            raise DamagedShard(str(error).removesuffix(".")) from error
        except OSError as error:
            why = "its disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise UserError(
                f"{self.folder} cannot take {shard.place.name} ({shard.bytes / 1e6:,.1f} MB): {why}. Make room there, or choose another "
                "data.cache.folder or fewer data.cache.gigabytes, and start again with --resume."
            ) from error

    def _make_room(self, shard: RemoteShard, needed: int) -> bool:
        """Delete copies until a shard fits, beginning with those needed last; return False if the rest is needed up to step `needed`."""
        with in_turn(self.folder / ".room"):
            locks = list(self.folder.glob("*.lock"))  # before the copies, so that one that ends meanwhile is seen
            copies = {path: path.stat() for path in self.folder.glob("*.arrow")}
            waiting = (self._claimed(path) for path in locks if path.with_suffix(".arrow") not in copies)
            room = self.bytes - sum(copy.st_size for copy in copies.values()) - sum(waiting)  # its own lock counts already
            for path in sorted(copies, key=lambda path: (-self._needed(path.stem), copies[path].st_mtime)):
                if room >= 0 or self._needed(path.stem) <= needed:
                    break
                path.unlink(missing_ok=True)
                room += copies[path].st_size
        return room >= 0

    def _needed(self, sha256: str) -> int:
        """Return the step that needs a shard next, as far as this process knows."""
        return NEVER if self.ahead is None else self.ahead.next_step(sha256)

    def _claimed(self, lock: Path) -> int:
        """Return the size of the shard that is being copied under this lock; 0 if its process has ended."""
        try:
            with lock.open("a+b") as held:
                if try_lock(held, lock):
                    lock.unlink(missing_ok=True)
                    return 0
                held.seek(0)
                return int(held.read() or b"0")
        except FileNotFoundError:
            return 0


@dataclass
class _Use:
    """The steps, of those that are known, that use a shard first and last."""

    shard: RemoteShard
    first: int
    last: int


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Return whether an open file is still the one at `path`: whoever held its lock before may have deleted it, and others lock another."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class FetchAhead:
    """Copies the shards of coming steps into a cache, in threads of its own, which start with the first call of `at`.

    `shards_of(step)` returns those of a step; there are `steps` steps. It looks ahead until the shards that are known to be needed fill
    WINDOW of the cache.
    """

    def __init__(self, cache: ShardCache, shards_of: Callable[[int], Iterable[RemoteShard]], steps: int):
        self._cache, self._shards_of, self._steps = cache, shards_of, steps
        self._room = int(WINDOW * cache.bytes)
        self._uses: dict[str, _Use] = {}  # in the order of first use
        self._bytes = 0  # of these shards
        self._now, self._known = 0, 0  # the step that is being read, and the first one that was not looked at
        self._beyond: dict[str, RemoteShard] | None = None  # the shards of that step, if they do not fit the window
        self._failures: dict[str, Exception] = {}
        self._busy: set[str] = set()
        self._changed, self._looking, self._closed = threading.Condition(), threading.Lock(), False
        self._threads: list[threading.Thread] = []
        cache.ahead = self

    def at(self, step: int) -> list[str]:
        """Take note that `step` is being read, and return the SHA-256 of the shards that are no longer needed."""
        with self._changed:
            if step < self._now or step > self._known:  # after a rollback, or at the start
                self._uses, self._bytes, self._known, self._beyond = {}, 0, step, None
            self._now = step
            done = [sha256 for sha256, use in self._uses.items() if use.last < step]
            for sha256 in done:
                self._bytes -= self._uses.pop(sha256).shard.bytes
            if self._known == step:
                self._note(self._shards(step))
            if done:
                self._changed.notify_all()
        if not self._threads:
            self._threads = [threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True) for number in range(THREADS)]
            for thread in self._threads:
                thread.start()
        return done

    def close(self) -> None:
        """End the threads, each after the shard that it is copying."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def failure(self, shard: RemoteShard) -> Exception | None:
        """Return the error that a thread met when it copied a shard, once, so that a later call tries again."""
        with self._changed:
            return self._failures.pop(shard.sha256, None)

    def next_step(self, sha256: str) -> int:
        """Return the next step that is known to use a shard: the present one if earlier steps used it and later ones do."""
        use = self._uses.get(sha256)
        return NEVER if use is None else max(use.first, self._now)

    def _work(self) -> None:
        while not self._closed:
            with self._changed:
                use = self._missing()
            if use is not None:
                self._fetch(use)
            elif not self._look_further():
                with self._changed:
                    self._changed.wait(1.0)  # by then another process may have died before it had copied a shard

    def _missing(self) -> _Use | None:
        """Return the first shard in need that is neither there nor being copied by this process, which is then marked as being copied."""
        for sha256, use in self._uses.items():
            if sha256 not in self._busy and sha256 not in self._failures and not self._cache.path(use.shard).is_file():
                self._busy.add(sha256)
                return use
        return None

    def _fetch(self, use: _Use) -> None:
        failure: Exception | None = None
        try:
            if not self._cache.fetch(use.shard, use.first):
                time.sleep(10 * POLL)  # another process copies it, or there is no room yet
        except Exception as error:  # raised when the shard is needed
            failure = error
        with self._changed:
            self._busy.discard(use.shard.sha256)
            if failure is not None:
                self._failures[use.shard.sha256] = failure

    def _look_further(self) -> bool:
        """Note the shards of one more step, and return whether there is one and its shards fit the window. One thread at a time looks."""
        if not self._looking.acquire(blocking=False):
            return False
        try:
            with self._changed:
                step, shards = self._known, self._beyond
            if step >= self._steps:
                return False
            shards = self._shards(step) if shards is None else shards  # takes its time, during which `at` must not wait
            with self._changed:
                if step != self._known:  # `at` started anew meanwhile
                    return True
                if self._bytes + self._more(shards) > self._room:
                    self._beyond = shards
                    return False
                self._note(shards)
                return True
        finally:
            self._looking.release()

    def _shards(self, step: int) -> dict[str, RemoteShard]:
        return {shard.sha256: shard for shard in self._shards_of(step)}

    def _more(self, shards: dict[str, RemoteShard]) -> int:
        return sum(shard.bytes for sha256, shard in shards.items() if sha256 not in self._uses)

    def _note(self, shards: dict[str, RemoteShard]) -> None:
        """Add the shards of the next step to those that are needed."""
        self._bytes += self._more(shards)
        for sha256, shard in shards.items():
            self._uses.setdefault(sha256, _Use(shard, self._known, self._known)).last = self._known
        self._known, self._beyond = self._known + 1, None
        self._changed.notify_all()
