"""Cores that quotas pay for, and address space: by the kernel's own files, and by limits of a real shell."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from growtrain.__main__ import main
from growtrain.settings import machine
from growtrain.settings.config import Config

TINY = (
    "--game pong --schedule fixed --total-frames 2000 --num-envs 4 --width 16 --encoder-width 0.125 --eval-period 0 "
    "--num-threads 1 --checkpoint-period 1000"
)


def write_quota(directory: Path, version: int, quota: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (directory / "cpu.max").write_text(f"{quota} 100000\n")
    else:
        (directory / "cpu.cfs_quota_us").write_text(f"{'-1' if quota == 'max' else quota}\n")
        (directory / "cpu.cfs_period_us").write_text("100000\n")


@pytest.fixture(params=["1", "1 by its full name", "2", "2 beside 1"])
def groups(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Path]:
    """Version and directory of the highest of three nested groups, in the lowest of which this process is; eight cores."""
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    version, base = {
        "1": (1, root / "cpu"),
        "1 by its full name": (1, root / "cpu,cpuacct"),
        "2": (2, root),
        "2 beside 1": (2, root / "unified"),
    }[request.param]
    membership.write_text(
        "5:memory:/else\n3:cpu,cpuacct:/job/step/task\n0::/\n" if version == 1 else "0::/job/step/task\n"
    )
    (base / "job" / "step" / "task").mkdir(parents=True)
    monkeypatch.setattr(machine, "CGROUP_ROOT", root)
    monkeypatch.setattr(machine, "CGROUP_MEMBERSHIP", membership)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return version, base / "job"


@pytest.mark.parametrize("part", ["", "step", "step/task"])
def test_a_quota_of_any_group_above_bounds_the_threads(groups: tuple[int, Path], part: str) -> None:
    version, job = groups
    assert machine.usable_cores() == 8
    for each in ("", "step", "step/task"):
        write_quota(job / each, version, "max")
    assert (machine.cpu_quota(), Config().threads) == (None, 8)
    write_quota(job / part, version, "250000")
    assert (machine.cpu_quota(), Config().threads) == (2.5, 2)
    write_quota(job / "step", version, "50000")
    assert (machine.cpu_quota(), Config().threads) == (0.5, 1)
    assert Config(num_threads=4).threads == 4


def test_doctor_says_the_quota(groups: tuple[int, Path], capsys: pytest.CaptureFixture[str]) -> None:
    version, job = groups
    write_quota(job, version, "300000")
    assert main(["doctor"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " cores " in line]
    assert "8 in the affinity mask" in line
    assert "a CPU quota of 3 (cgroup): 3 threads by default" in line


def test_a_group_that_this_namespace_does_not_show_limits_nothing(groups: tuple[int, Path], tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("3:cpu:/../../other\n0::/../other\n")
    assert machine.usable_cores() == 8
    (tmp_path / "membership").unlink()
    assert machine.usable_cores() == 8


def limited(limit: str, words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"ulimit {limit}; exec {sys.executable} -m growtrain {words}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@functools.cache
def memory_with_libraries() -> str:
    """The state of a process that has imported everything; PyTorch with CUDA takes some 2 GB more of address space."""
    code = "import growtrain.runs.run; print(open('/proc/self/status').read())"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout


def kilobytes_of_libraries(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", memory_with_libraries(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(("flag", "memory"), [("-v", "VmPeak"), ("-d", "VmData")])
def test_what_fits_an_address_space_limit_is_named_and_fits(flag: str, memory: str, tmp_path: Path) -> None:
    run_dir, limit = tmp_path / "run", max(2_200_000, kilobytes_of_libraries(memory) + 1_000_000)
    refused = limited(f"{flag} {limit}", f"{TINY} --replay-capacity 1M --run-dir {run_dir}")
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stderr.splitlines()
    assert f"address space (ulimit {flag})" in line
    found = re.search(r"use --replay-capacity (\d+) or less$", line)
    assert found is not None
    assert int(found[1]) >= 30_000
    assert not run_dir.exists()
    done = limited(f"{flag} {limit}", f"{TINY} --replay-capacity {found[1]} --run-dir {run_dir}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("limit", [400_000, 900_000])
def test_a_limit_under_which_nothing_runs_is_one_line(limit: int, tmp_path: Path) -> None:
    """The libraries cannot be loaded, or no replay fits beside them."""
    done = limited(f"-v {limit}", f"{TINY} --run-dir {tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "ulimit -v" in line
    assert "raise" in line
