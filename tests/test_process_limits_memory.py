import resource
import subprocess
import sys

import pytest
import torch

from microdit.process_limits import keep_freed_memory

BLOCKS, BLOCK = 20, 2**26  # 64 MiB, which glibc hands back at once
RETURNING = f"""
import resource
def work():
    for _ in range({BLOCKS}):
        b"1" * {BLOCK}
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is only on Linux")
def test_freed_memory_is_used_again_without_new_pages():
    """In this process, which is told to keep it, and in one that is not."""
    keep_freed_memory()

    def work() -> int:
        for _ in range(BLOCKS):
            torch.ones(BLOCK // 4)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt

    before = work()
    kept = work() - before
    returned = int(subprocess.run([sys.executable, "-c", RETURNING], capture_output=True, text=True, check=True).stdout)
    assert kept < returned / 10
