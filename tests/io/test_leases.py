"""Leases in a real S3 server."""

import json
import time

import pytest

from microdit.errors import UserError
from microdit.io import leases
from microdit.io.console import QUIET
from microdit.io.leases import _content, _object, leased
from microdit.io.places import Place
from tests.training.processes import HANG


@pytest.fixture
def place(bucket, monkeypatch) -> Place:
    monkeypatch.setattr(leases, "RENEWED", 0.3)  # seconds
    monkeypatch.setattr(leases, "EXPIRES", HANG)
    monkeypatch.setattr(leases, "LOOKS", 0.3)
    return bucket / "run"


def from_elsewhere() -> bytes:
    """The content of a lease whose holder is on another machine, with a clock that is a century ahead."""
    return json.dumps(json.loads(_content()) | {"host": "elsewhere", "process": 7, "time": time.time() + 3e9}).encode()


def test_a_second_program_is_refused_and_takes_over_after_a_release(place):
    with leased(place, False, QUIET.say, QUIET.warn, pytest.fail) as first:
        with pytest.raises(UserError, match=r"run is in use by process \d+ on .*, which renewed its lease \d s ago: wait for it, stop it"):
            leased(place, False, QUIET.say, QUIET.warn, pytest.fail).__enter__()
        with pytest.raises(UserError, match="is in use"):  # waits, and sees that it is renewed
            leased(place, True, QUIET.say, QUIET.warn, pytest.fail).__enter__()
    with leased(place, False, QUIET.say, QUIET.warn, pytest.fail) as second:
        assert second.number == first.number + 1
    assert len((place / ".lease").list()) == 1


def test_a_lease_that_is_not_renewed_expires_by_the_clock_of_the_store(place, monkeypatch):
    _object(place, 1).write(from_elsewhere())
    with pytest.raises(UserError, match="in use by process 7 on elsewhere"):
        leased(place, False, QUIET.say, QUIET.warn, pytest.fail).__enter__()
    monkeypatch.setattr(leases, "EXPIRES", 2.0)
    with leased(place, True, QUIET.say, QUIET.warn, pytest.fail) as lease:
        assert lease.number == 2


def test_a_holder_that_was_silent_for_too_long_is_told_so(place):
    lost: list[str] = []
    with leased(place, False, QUIET.say, QUIET.warn, lost.append) as lease:
        assert _object(place, lease.number + 1).create(from_elsewhere())
        with pytest.raises(UserError, match="was taken over by process 7 on elsewhere: this program writes no more to it"):
            lease.check()
        until = time.monotonic() + HANG
        while not lost and time.monotonic() < until:
            time.sleep(0.05)
    assert len(lost) == 1


def test_a_holder_that_died_on_this_machine_is_followed_at_once(place):
    died = json.loads(_content()) | {"process": 2**22 + 1}  # beyond the largest process id
    _object(place, 4).write(json.dumps(died).encode())
    with leased(place, False, QUIET.say, QUIET.warn, pytest.fail) as lease:
        assert lease.number == 5
