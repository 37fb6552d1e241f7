"""Freed memory: what an update takes and frees, it takes again without the kernel."""

import resource
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, sys, torch
from growtrain.planning.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for count in range(30):
    if count == 20:  # by then the heap has found its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(13 << 20)  # 52 MiB, a gradient of a wide head
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_large_block_is_taken_again_without_page_faults() -> None:
    faults = {
        how: int(
            subprocess.run([sys.executable, "-c", _SCRIPT, how], capture_output=True, text=True, check=True).stdout
        )
        for how in ("keep", "give back")
    }
    blocks = 10 * (52 << 20) // resource.getpagesize()
    if faults["give back"] < blocks // 1_000:
        pytest.skip("this machine's allocator keeps what is freed anyway, or its pages are huge")
    assert faults["keep"] < faults["give back"] / 10
