"""A training process's heap keeps the pages of large blocks, until it is trimmed."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
from opsd.common.system import share_one_heap, trim_heap

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
held = lambda: int(open("/proc/self/statm").read().split()[1])
{prepare}
before = held()
for _ in range(5):
    block = b"x" * (64 << 20)  # a micro-batch's logits
    del block
print(faults() // 16384, round((held() - before) / 16384))
trim_heap()
print(round((held() - before) / 16384))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
@pytest.mark.parametrize("prepare, blocks", [("share_one_heap()", (1, 1)), ("", (5, 0))])
def test_a_block_of_freed_pages_is_used_again(prepare, blocks):
    """64 MB have 16,384 pages. Without the call each block is mapped anew."""
    command = [sys.executable, "-c", FAULTS.format(prepare=prepare)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert tuple(map(int, said)) == (*blocks, 0)
