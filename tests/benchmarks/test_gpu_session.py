"""The script of a first session on a GPU: a part that fails is said, and the next one begins."""

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from growtrain.learners.gradient_step import MIN_UPDATES_TO_COMPILE
from growtrain.settings.text import parse_count

ROOT = Path(__file__).parents[2]
PARTS = ["doctor", "smoke", "compiled", "smoke-network", "tests", "throughput-4", "growth_cost", "wallclock"]
# Says what it is asked for, compiles, and fails or falls back where its words match.
PYTHON = """#!/bin/sh
echo "words: $*"
echo "dynamo: ${TORCHDYNAMO_DISABLE-on} $*"
echo "$*" | grep -Eq -- "$FAILING" && exit 3
echo "$*" | grep -Eq -- "$FALLING_BACK" && echo "UserWarning: the step could not be compiled and runs uncompiled" && exit 0
mkdir -p "$TORCHINDUCTOR_CACHE_DIR/x"
"""


def session(tmp_path: Path, **environment: str) -> tuple[int, str]:
    """Exit code and output of the rehearsal, with a Python that fails where its words match `FAILING`, or runs uncompiled."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    fakes = {"PY": str(python), "FAILING": "^$", "FALLING_BACK": "^$"}
    variables = os.environ | {"SMALL": "1", "OUT": str(tmp_path / "out")} | fakes | environment
    command = ["bash", str(ROOT / "benchmarks" / "gpu_session.sh")]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "out" / "log.txt").read_text() == done.stdout
    return done.returncode, done.stdout


def test_all_parts_run_and_their_logs_are_kept(tmp_path: Path) -> None:
    code, out = session(tmp_path)
    assert code == 0
    assert re.findall(r"^=== (\S+): ok", out, re.M) == PARTS
    assert "all parts are done" in out
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert {f"./{part}.log" for part in PARTS} <= set(archive.getnames())


@pytest.mark.parametrize(
    ("failing", "part"), [("doctor", "doctor"), ("pytest", "tests"), ("throughput", "throughput-4")]
)
def test_a_part_that_fails_is_said_and_the_next_one_begins(failing: str, part: str, tmp_path: Path) -> None:
    code, out = session(tmp_path, FAILING=failing)
    assert code == 1
    assert re.findall(r"^=== (\S+): ok", out, re.M) == [each for each in PARTS if each != part]
    assert f"=== {part}: FAILED, exit code 3" in out
    assert re.search(rf"^=== FAILED after \d+ s: {part} \(exit code 3\)$", out, re.M)


def test_the_rehearsal_compiles_as_a_gpu_would_and_says_where_it_does_not(tmp_path: Path) -> None:
    _, out = session(tmp_path)
    dynamo = dict(re.findall(r"^dynamo: (\S+) .*(/smoke|wallclock\.py)\b", out, re.M))
    assert dynamo == {"on": "/smoke", "1": "wallclock.py"}
    (words,) = re.findall(r"^words: (.*)/smoke$", out, re.M)
    total, first, ratio = (
        parse_count(re.search(rf"{flag} (\S+)", words)[1])  # type: ignore[index]
        for flag in ("--total-frames", "--learning-starts", "--replay-ratio")
    )
    assert ratio * (total - first) / 4 >= MIN_UPDATES_TO_COMPILE
    code, out = session(tmp_path, FALLING_BACK="--run-dir .*/smoke$")
    assert code == 1
    assert "=== smoke: FAILED, exit code 1" in out
    assert "=== smoke-eager: ok" in out
    code, out = session(tmp_path, FALLING_BACK=".*")
    assert "=== compiled: FAILED" in out


def test_every_file_that_it_names_exists() -> None:
    named = re.findall(r"\b(?:tests|benchmarks)/[\w/]+\.py", (ROOT / "benchmarks" / "gpu_session.sh").read_text())
    assert len(named) >= 6
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_a_run_that_fails_is_tried_eagerly(tmp_path: Path) -> None:
    code, out = session(tmp_path, FAILING="--run-dir .*/smoke$")
    assert code == 1
    assert "=== smoke: FAILED" in out
    assert "=== smoke-eager: ok" in out


def test_what_there_is_no_time_for_counts_as_failed(tmp_path: Path) -> None:
    code, out = session(tmp_path, LIMIT="10")
    assert code == 1
    assert "=== wallclock: SKIPPED" in out


def test_on_a_gpu_it_uses_many_environments_few_profiled_steps_and_shows_warnings(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    code, out = session(tmp_path, SMALL="", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert code == 0
    words = dict(re.findall(r"^words: (?:-W default )?(\S+ ?\S*) (.*)$", out, re.M))
    assert "--num-envs 64" in words["-m growtrain"]
    assert "-W default" in words["-m pytest"]
    (wallclock,) = re.findall(r"words: -W default benchmarks/run_wallclock.py (.*)", out)
    assert "--num-envs 64" in wallclock
    throughput = re.findall(r"words: -W default benchmarks/throughput.py (.*)", out)
    assert [re.search(r"--num-envs (\d+)", each)[1] for each in throughput] == ["64", "8"]  # type: ignore[index]
    assert all("--profile-steps 20" in each for each in throughput)
