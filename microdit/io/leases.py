"""Locks in object stores: leases, which their holder renews and which expire when it has died.

A bucket has no file locks, and machines' clocks differ. So a lease is an object whose age is measured by the store's own clock: its holder
writes it anew every minute, and when it is older than `EXPIRES`, another program may take over.

    PLACE/.lease/00000001.json      the host and process of the holder; the object with the highest number is the lease

A takeover creates the object with the next number, which exactly one of several programs can do (`Place.create`). A holder that was silent
for too long, and goes on, finds the higher number and stops.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from microdit.errors import UserError
from microdit.io.places import MissingObject, Place, StoreError
from microdit.io.untrusted_text import one_line, parse_json_object

FOLDER = ".lease"
RENEWED = 60.0  # seconds between renewals
EXPIRES = 180.0  # seconds after the last renewal
LOOKS = 5.0  # seconds between two looks at another program's lease


@dataclass
class Lease:
    """A lease that this program holds. `number` is that of its object."""

    place: Place
    number: int
    content: bytes
    _ended: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise UserError if another program has taken over."""
        newest = _newest(self.place)
        if newest is not None and newest > self.number:
            raise UserError(f"{self.place} was taken over by {_name(_read(self.place, newest))}: this program writes no more to it.")

    def keep_renewing(self, on_loss: Callable[[str], None]) -> None:
        """Renew the lease until it is released. Calls `on_loss` with a sentence, and ends, if another program has taken over."""
        while not self._ended.wait(RENEWED):
            try:
                self.check()
                _object(self.place, self.number).write(self.content)
            except StoreError:  # tried again; if the store fails for long, `check` finds a takeover
                continue
            except UserError as error:
                on_loss(str(error))
                return

    def release(self) -> None:
        """Let the next program have the place at once. The object stays, so that numbers only rise."""
        _object(self.place, self.number).write(_content(released=True))


@contextmanager
def leased(
    place: Place, patient: bool, say: Callable[[str], None], warn: Callable[[str], None], on_loss: Callable[[str], None]
) -> Iterator[Lease]:
    """Hold the lease of `place` until the block ends; yields it.

    `patient`: wait for a lease that its holder no longer renews to expire, and `say` so. Raises UserError if another program holds it.
    `on_loss` is called by a thread if this program could not renew it in time, and another one has taken over. `warn` is called if the
    store fails when the lease is released.
    """
    lease = _take(place, patient, say)
    thread = threading.Thread(target=lease.keep_renewing, args=(on_loss,), name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease._ended.set()
        thread.join()  # a renewal must not follow the release
        try:
            lease.release()
        except StoreError as error:
            warn(f"{error} The lease of {place} expires by itself, {EXPIRES:.0f} s after its last renewal.")


def _take(place: Place, patient: bool, say: Callable[[str], None]) -> Lease:
    content, first_seen = _content(), None
    while True:
        newest = _newest(place)
        holder = {} if newest is None else _read(place, newest)
        renewed, now = (0.0, EXPIRES + 1) if newest is None else _times(place, newest)
        if holder.get("released") or _died_here(holder) or now - renewed > EXPIRES:
            number = 1 if newest is None else newest + 1
            if _object(place, number).create(content):
                if newest is not None:
                    _object(place, newest).delete()
                return Lease(place, number, content)
            continue  # another program was faster
        if not patient or renewed != (first_seen or renewed):
            raise UserError(
                f"{place} is in use by {_name(holder)}, which renewed its lease {now - renewed:.0f} s ago: wait for it, stop it, or choose "
                f"another --out. If it has died, its lease expires {EXPIRES:.0f} s after the last renewal."
            )
        if first_seen is None:
            left = EXPIRES - (now - renewed)
            say(f"{place} was last used by {_name(holder)}; waiting up to {left:.0f} s to see whether that still runs.")
        first_seen = renewed
        time.sleep(LOOKS)


def _object(place: Place, number: int) -> Place:
    return place / FOLDER / f"{number:08d}.json"


def _newest(place: Place) -> int | None:
    numbers = [int(Path(name).stem) for name in (place / FOLDER).list() if Path(name).stem.isdecimal()]
    return max(numbers, default=None)


def _read(place: Place, number: int) -> dict[str, Any]:
    """Return what a lease says of its holder; nothing if it is gone or was written by something else."""
    try:
        return parse_json_object(_object(place, number).read())
    except (MissingObject, ValueError):
        return {}


def _times(place: Place, number: int) -> tuple[float, float]:
    """Return when a lease was renewed last, and the time now: that of an object written now, since only the store's clock counts."""
    clock = place / FOLDER / f"clock-{uuid4().hex}"
    try:
        renewed = _object(place, number).modified()
    except MissingObject:  # another program took over just now, and holds the next number
        return 0.0, 0.0
    clock.write(b"")
    now = clock.modified()
    clock.delete()
    return renewed, now


def _content(released: bool = False) -> bytes:
    holder = {"host": socket.gethostname(), "boot": _boot(), "process": os.getpid(), "time": round(time.time(), 2), "id": uuid4().hex}
    return json.dumps({**holder, "released": released}).encode()


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""


def _died_here(holder: dict[str, Any]) -> bool:
    """Return whether the holder ran on this machine and has ended."""
    process = holder.get("process")
    if (holder.get("host"), holder.get("boot")) != (socket.gethostname(), _boot()) or type(process) is not int or process <= 0:
        return False
    try:
        os.kill(process, 0)  # signal 0 only tests whether the process exists
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        return False
    return False


def _name(holder: dict[str, Any]) -> str:
    return one_line(f"process {holder.get('process', '?')} on {holder.get('host', 'an unknown host')}", 200)
