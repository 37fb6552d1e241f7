"""The sweep command as a user meets it: on real games, killed and taken up again, stopped, wrong, on Ray."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from growtrain.__main__ import main
from growtrain.runfiles import RunLocked, require_unlocked
from growtrain.runs.checkpoint import open_newest
from growtrain.sweep.cells import Cell
from growtrain.sweep.ledger import Ledger
from growtrain.telemetry.sinks import read_jsonl

TINY = [
    *("--num-envs", "2", "--width", "16", "--encoder-width", "0.1", "--batch-size", "8", "--replay-capacity", "300"),
    *("--learning-starts", "200", "--eval-period", "0", "--log-period", "200", "--checkpoint-period", "400"),
    *("--device", "cpu"),
]


def sweep(directory: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "growtrain", "sweep", "--dir", str(directory), *TINY, *words]


def cells(directory: Path) -> list[Cell]:
    with Ledger(directory) as ledger:
        ledger.check_valid()
        return ledger.cells()


def wait_for(process: subprocess.Popen[str], holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 90
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def child_of(run_dir: Path) -> int:
    """The process that has the run."""
    return int(json.loads((run_dir / "run.lock").read_text())["pid"])


def checkpoints(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").glob("0*")}


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_sweep_of_real_games_is_killed_twice_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """A child dies by SIGKILL and is resumed, then the driver; the same command runs what is missing, then nothing."""
    words = sweep(tmp_path, "--games", "pong", "--schedules", "fixed,at:600", "--seeds", "1", "--workers", "2",
                  "--total-frames", "1600")  # fmt: skip
    ledger = tmp_path / "ledger.sqlite"
    with start(words) as process:
        wait_for(process, lambda: ledger.exists() and ledger.stat().st_size)
        wait_for(process, lambda: len(cells(tmp_path)) == 2)
        victim, other = (tmp_path / cell.run_dir for cell in cells(tmp_path))
        wait_for(process, lambda: checkpoints(victim))
        os.kill(child_of(victim), signal.SIGKILL)
        wait_for(process, lambda: max(cell.attempts for cell in cells(tmp_path)) == 2)
        process.kill()
    again = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [cell.status for cell in cells(tmp_path)] == ["done", "done"]
    assert max(cell.attempts for cell in cells(tmp_path)) <= 3
    for run_dir in (victim, other):
        assert json.loads((run_dir / "summary.json").read_text())["status"] == "done"
        assert [record["frames"] for record in read_jsonl(run_dir / "metrics.jsonl")] == list(range(200, 1601, 200))
        assert open_newest(run_dir).frames == 1600
    assert json.loads((victim / "summary.json").read_text())["resumes"]
    third = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert third.returncode == 0
    assert "start" not in third.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_sweep_with_checkpoints_and_75(number: signal.Signals, tmp_path: Path) -> None:
    words = sweep(tmp_path, "--games", "pong", "--schedules", "fixed", "--seeds", "1", "--total-frames", "1M")
    with start(words) as process:
        wait_for(process, lambda: list(tmp_path.glob("runs/*/checkpoints/0*")))
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 75
    (cell,) = cells(tmp_path)
    assert (cell.status, cell.attempts) == ("pending", 0)
    summary = json.loads((tmp_path / cell.run_dir / "summary.json").read_text())
    assert (summary["status"], summary["frames"]) == ("stopped", open_newest(tmp_path / cell.run_dir).frames)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--games", "pong,phonix"], "did you mean phoenix"),
        (["--schedules", "fixed"], "--games is missing"),
        (["--games", "pong", "--schedules", "grow0x"], "grow3x"),
        (["--games", "pong", "--seed", "1"], "--seeds"),
        (["--games", "pong", "--num-envs", "0"], "--num-envs"),
        (["--games", "pong", "--workers", "0"], "--workers"),
        (["--games", "pong", "--gpus-per-worker", "-1"], "--gpus-per-worker"),
        (["--games", "pong", "--executor", "slurm"], "ray"),
        (["--games", "pong", "--run-dir", "x"], "unknown flag --run-dir"),
        (["--status", "nowhere"], "nowhere holds no sweep"),
    ],
)
def test_wrong_input_gets_one_line_before_any_work(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--dir", "d", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_gpu_and_a_missing_ray_are_said_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["sweep", "--dir", str(tmp_path / "d"), "--games", "pong", "--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "growtrain.sweep.ray", raising=False)
    assert main(["sweep", "--dir", str(tmp_path / "d"), "--games", "pong", "--executor", "ray"]) == 2
    assert "growtrain[ray]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_ledger_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"\x00\xff" * 5000)
    for words in (["--dir", str(tmp_path), "--games", "pong"], ["--status", str(tmp_path)]):
        assert main(["sweep", *words]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert "move it away" in captured.err


def test_commands_for_a_batch_system_are_sweeps_of_one_cell_each(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--games", "pong,breakout", "--schedules", "fixed,at:600", "--seeds", "2", "--total-frames", "1600", *TINY]
    assert main(["sweep", "--dir", str(tmp_path), "--print-commands", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert list(tmp_path.iterdir()) == []
    with Ledger(tmp_path, create=True):
        pass
    again = shlex.split(lines[-1])[3:]
    assert main([*again, "--print-commands"]) == 0
    assert capsys.readouterr().out.splitlines() == [lines[-1]]


def test_status_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cell = Cell(game="pong", schedule="fixed", seed=4, fingerprint="f", words=(), run_dir="runs/x", total_frames=1000)
    with Ledger(tmp_path, create=True) as ledger:
        ledger.submit([cell])
    assert main(["sweep", "--status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["pending", "pong", "fixed", "4"]


@pytest.mark.slow
def test_on_ray_a_child_a_worker_and_the_driver_are_killed_and_the_next_is_stopped(tmp_path: Path) -> None:
    """A real cluster of this machine, started by the driver and gone with it."""
    pytest.importorskip("ray")

    def begun() -> list[Path]:
        return sorted({path.parent.parent for path in tmp_path.glob("runs/*/checkpoints/0*")})

    words = sweep(tmp_path, "--games", "pong", "--schedules", "fixed,at:600", "--seeds", "2", "--executor", "ray",
                  "--total-frames", "8k")  # fmt: skip
    with start(words) as process:
        wait_for(process, lambda: len(begun()) == 2)
        first, second = begun()
        os.kill(child_of(first), signal.SIGKILL)
        worker = psutil.Process(child_of(second)).parent()
        assert worker is not None
        assert "ray" in worker.name()
        worker.kill()
        wait_for(process, lambda: [cell.attempts for cell in cells(tmp_path)].count(2) == 2)
        process.kill()
    left = [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(process.info["cmdline"])]
    psutil.wait_procs(left, timeout=60)
    assert not any(process.is_running() for process in left)  # the children do not outlive the cluster

    def is_running(cell: Cell) -> bool:
        try:
            require_unlocked(tmp_path / cell.run_dir)
        except RunLocked:
            return True
        return False

    with start(["bash", "-c", "trap '' INT; exec \"$@\"", "as a script does in the background", *words]) as process:
        wait_for(process, lambda: any(map(is_running, cells(tmp_path))))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert "running" not in {cell.status for cell in cells(tmp_path)}
    again = subprocess.run(words, capture_output=True, text=True, timeout=170)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [cell.status for cell in cells(tmp_path)] == ["done"] * 4
