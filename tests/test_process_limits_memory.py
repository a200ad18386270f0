import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from microdit.process_limits import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    for _ in range(20):
        torch.ones(16 * 2**20)  # 64 MiB, freed at once
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is only on Linux")
def test_freed_memory_is_used_again_without_new_pages():
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("keep", "return")
    }
    assert faults["keep"] < faults["return"] / 10
