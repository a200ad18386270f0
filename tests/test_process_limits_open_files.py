import os
import resource

import pytest

from microdit.distributed import GLOO_GROUPS, World, start_world
from microdit.errors import UserError
from microdit.process_limits import ENOUGH, check_file_limit, open_files, raise_limit
from tests.training.processes import together


def test_the_limit_is_raised_as_far_as_the_system_allows():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        check_file_limit(10, "ten of something")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (allowed, hard)
        assert raise_limit() == allowed
        assert raise_limit(100) == allowed  # never lowered
        with pytest.raises(
            UserError, match=rf"^ten of something need [\d,]+ open files in each process, and this machine allows {allowed:,} "
        ):
            check_file_limit(max(hard, ENOUGH) + 1, "ten of something")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def of_many(world: World) -> None:
    """One of 1,024 processes, on a machine that allows 1,024 open files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    os.environ["WORLD_SIZE"] = "1024"
    start_world("cpu")


def test_too_many_processes_for_the_limit_are_a_sentence_before_they_meet():
    (error,) = together(1, of_many)
    assert isinstance(error, UserError)
    assert "1024 processes need 3," in str(error)
    assert "this machine allows 1,024 (RLIMIT_NOFILE): say ulimit -n 3" in str(error)


def opened(world: World) -> int:
    world.gather(world.rank)
    count = open_files()
    world.gather(count)  # a process that left before the others have counted would take its connections along
    return count


def test_what_a_peer_costs_is_what_is_reckoned():
    two, four = together(2, opened), together(4, opened)
    assert four[0] - two[0] == 2 * (GLOO_GROUPS + 1)
    assert max(four[1:]) - two[1] <= 2 * GLOO_GROUPS + 1  # they may hold pipes of the test's own
