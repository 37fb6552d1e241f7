"""A child and its parent's death."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

# A driver that is killed while its child is between fork and exec, before or after the child asked to be told of that.
DYING = """
import os, signal, sys, time
from pathlib import Path
from growtrain.sweep import executor

directory, when = Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGTERM, lambda *_: None)  # a driver has a handler, which the fork inherits
driver, libc = os.getpid(), executor._LIBC

class Libc:
    def prctl(self, *arguments):
        (directory / "pid").write_text(str(os.getpid()))
        if when == "after":
            libc.prctl(*arguments)
        os.kill(driver, signal.SIGKILL)
        while os.getppid() == driver:
            time.sleep(0.01)
        if when == "before":
            libc.prctl(*arguments)

executor._LIBC = Libc()
executor.Child(["touch", str(directory / "ran")], directory)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_child_whose_parent_dies_while_starting_it_never_runs(when: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DYING, str(tmp_path), when], timeout=60)
    process = Path("/proc") / (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 20
    while _is_alive(process):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not (tmp_path / "ran").exists()


def _is_alive(process: Path) -> bool:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
