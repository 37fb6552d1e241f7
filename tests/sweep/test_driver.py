"""Faults of sweeps, provoked with real processes: children and drivers that die, two drivers at once, stops, cells that cannot be run."""

import contextlib
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from growtrain.runfiles import run_lock
from growtrain.sweep import driver
from growtrain.sweep.cells import Cell
from growtrain.sweep.driver import Driver
from growtrain.sweep.ledger import Ledger
from growtrain.sweep.local import LocalExecutor, Slot, make_slots, visible_gpus
from growtrain.sweep.table import open_table

PREFIX = [sys.executable, str(Path(__file__).with_name("stub.py"))]
SLOTS = [Slot(frozenset(), None)] * 2


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_POLL", 0.01)
    monkeypatch.setattr(driver, "_LOOK", 0.05)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path, create=True) as opened:
        yield opened
        opened.check_valid()


def cells(*modes: str) -> list[Cell]:
    return [
        Cell(game="pong", schedule="fixed", seed=seed, fingerprint="f", words=(mode,), run_dir=f"runs/{seed}", total_frames=1000)
        for seed, mode in enumerate(modes)
    ]  # fmt: skip


def drive(
    ledger: Ledger, *modes: str, should_stop: Callable[[], bool] = lambda: False, retry_failed: bool = False
) -> tuple[int, list[str]]:
    """Runs a sweep here; returns the exit code and what was said."""
    said = io.StringIO()
    deadline = time.monotonic() + 20

    def stopping() -> bool:
        return should_stop() or time.monotonic() > deadline

    with open_table(ledger.directory, said) as table:
        run = Driver(ledger, ledger.submit(cells(*modes)), LocalExecutor(SLOTS, PREFIX), table, max_attempts=3)
        code = run.run(stopping, retry_failed=retry_failed)
    assert time.monotonic() < deadline, said.getvalue()
    return code, said.getvalue().splitlines()


def starts(ledger: Ledger, seed: int) -> list[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (ledger.directory / f"runs/{seed}/starts").read_text().splitlines()]
    return []


def verbs(ledger: Ledger, seed: int) -> list[str]:
    return [start["verb"] for start in starts(ledger, seed)]


def statuses(ledger: Ledger) -> list[str]:
    return [cell.status for cell in ledger.cells()]


def wait_for(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_same_command_again_runs_nothing(ledger: Ledger) -> None:
    code, said = drive(ledger, "quick", "quick", "quick")
    assert code == 0
    assert statuses(ledger) == ["done"] * 3
    assert [line.split()[0] for line in said].count("done") == 3
    assert said[-1].startswith("sweep  3 cells: 3 done, 0 running, 0 pending, 0 failed  3k/3k frames")
    assert drive(ledger, "quick", "quick", "quick")[0] == 0
    assert [verbs(ledger, seed) for seed in range(3)] == [["train"]] * 3


def test_a_run_of_other_settings_is_not_the_cell_s(ledger: Ledger) -> None:
    code, said = drive(ledger, "quick", "other")
    assert code == 1
    assert statuses(ledger) == ["done", "failed"]
    assert any("its run has other settings" in line and "sweep again makes a new cell" in line for line in said)
    assert verbs(ledger, 1) == ["train"]


def test_a_run_of_other_settings_is_seen_before_it_is_gone_on_with(ledger: Ledger) -> None:
    for seed, finished in enumerate((True, False)):
        run_dir = ledger.directory / f"runs/{seed}"
        run_dir.mkdir(parents=True)
        (run_dir / "config.json").write_text('{"fingerprint": "g"}')
        if finished:
            (run_dir / "summary.json").write_text('{"status": "done", "frames": 1000}')
    code, said = drive(ledger, "quick", "quick", "quick")
    assert code == 1
    assert statuses(ledger) == ["failed", "failed", "done"]
    assert sum("its run has other settings" in line for line in said) == 2
    assert [verbs(ledger, seed) for seed in range(3)] == [[], [], ["train"]]


def test_a_child_that_is_killed_goes_on_by_resume(ledger: Ledger) -> None:
    killed: list[int] = []

    def kill_once() -> bool:
        if not killed and starts(ledger, 1):
            killed.append(starts(ledger, 1)[0]["pid"])
            os.kill(killed[0], signal.SIGKILL)
        return False

    code, said = drive(ledger, "quick", "slow", should_stop=kill_once)
    assert code == 0
    assert verbs(ledger, 1) == ["train", "resume"]
    assert [cell.attempts for cell in ledger.cells()] == [1, 2]
    assert "retry  pong  fixed  seed 1  attempt 1: killed by SIGKILL" in said


def test_attempts_are_capped_and_the_others_run_all_the_same(ledger: Ledger) -> None:
    code, said = drive(ledger, "fail", "quick", "quick")
    assert code == 1
    assert statuses(ledger) == ["failed", "done", "done"]
    assert verbs(ledger, 0) == ["train", "resume", "resume"]
    assert ledger.cells()[0].last_error == "exit code 1: first line\nno such luck"
    (failure,) = [line for line in said if line.startswith("fail")]
    assert "attempt 3, the last: exit code 1: no such luck  runs/0/stderr.log" in failure
    assert drive(ledger, "fail", "quick", "quick")[0] == 1  # it stays failed, and is not tried
    assert len(starts(ledger, 0)) == 3
    assert drive(ledger, "quick", "quick", "quick", retry_failed=True)[0] == 0
    assert [len(starts(ledger, seed)) for seed in range(3)] == [4, 1, 1]


DRIVER = """
import sys
from pathlib import Path
from growtrain.sweep.driver import Driver
from growtrain.sweep.ledger import Ledger
from growtrain.sweep.local import LocalExecutor, Slot
from growtrain.sweep.table import open_table
with Ledger(Path(sys.argv[1])) as ledger, open_table(ledger.directory, sys.stdout) as table:
    ids = [cell.id for cell in ledger.cells()]
    executor = LocalExecutor([Slot(frozenset(), None)] * 2, sys.argv[2:])
    sys.exit(Driver(ledger, ids, executor, table, max_attempts=3).run())
"""


def start_driver(ledger: Ledger) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", DRIVER, str(ledger.directory), *PREFIX]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_a_driver_that_is_killed_leaves_only_what_is_missing_to_the_next(ledger: Ledger) -> None:
    modes = ("quick", "slow", "slow", "quick")
    ledger.submit(cells(*modes))
    with start_driver(ledger) as process:
        wait_for(lambda: starts(ledger, 1) and starts(ledger, 2))
        process.kill()
    assert statuses(ledger) == ["done", "running", "running", "pending"]
    assert ledger.is_stale(ledger.cells()[1])
    wait_for(lambda: all((ledger.directory / f"runs/{seed}/stopped").exists() for seed in (1, 2)))  # no orphans
    code, said = drive(ledger, *modes)
    assert code == 0
    assert [verbs(ledger, seed) for seed in range(4)] == [
        ["train"],
        ["train", "resume"],
        ["train", "resume"],
        ["train"],
    ]
    assert [line.split()[0] for line in said[:2]] == ["lost", "lost"]
    assert statuses(ledger) == ["done"] * 4


def test_submitted_twice_at_the_same_time_each_cell_runs_once(ledger: Ledger) -> None:
    ledger.submit(cells(*["quick"] * 12))
    drivers = [start_driver(ledger) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in drivers]
    assert [process.returncode for process in drivers] == [0, 0]
    assert [verbs(ledger, seed) for seed in range(12)] == [["train"]] * 12
    assert sum(text.count("start") for text in said) == 12
    assert all("12 done" in text.splitlines()[-1] for text in said)  # each waits for the other


def test_a_run_that_is_stopped_by_itself_goes_on_and_costs_no_attempt(ledger: Ledger) -> None:
    """As on a node that is drained."""
    told: list[int] = []

    def stop_it() -> bool:
        if not told and starts(ledger, 0):
            told.append(starts(ledger, 0)[0]["pid"])
            os.kill(told[0], signal.SIGTERM)
        return False

    assert drive(ledger, "slow", should_stop=stop_it)[0] == 0
    assert verbs(ledger, 0) == ["train", "resume"]
    assert [(cell.status, cell.attempts) for cell in ledger.cells()] == [("done", 1)]


def test_a_stop_reaches_the_children_and_costs_no_attempt(ledger: Ledger) -> None:
    code, said = drive(
        ledger, "slow", "slow", "quick", should_stop=lambda: bool(starts(ledger, 0) and starts(ledger, 1))
    )
    assert code == 75
    assert [(cell.status, cell.attempts, cell.frames) for cell in ledger.cells()] == [
        ("pending", 0, 400),
        ("pending", 0, 400),
        ("pending", 0, 0),
    ]
    assert (ledger.directory / "runs/0/stopped").read_text() == "once\n"  # twice would end it without a checkpoint
    assert "stop   pong  fixed  seed 0  at 400 frames" in said
    assert drive(ledger, "slow", "slow", "quick")[0] == 0


def test_a_run_that_somebody_else_has_is_left_alone(ledger: Ledger) -> None:
    """Such as the child of a killed driver, which still writes its checkpoint."""
    looked = 0

    with contextlib.ExitStack() as held:
        held.enter_context(run_lock(ledger.directory / "runs/0"))

        def look() -> bool:
            nonlocal looked
            looked += 1
            if looked == 30:
                assert statuses(ledger) == ["pending", "done"]
                held.close()
            return False

        assert drive(ledger, "quick", "quick", should_stop=look)[0] == 0
    assert looked > 30
    assert verbs(ledger, 0) == ["train"]


def test_a_lost_lease_stops_the_child(ledger: Ledger) -> None:
    """As after a suspension, in which another driver took the cell over."""
    ledger.lease_seconds = 0.001

    def lose() -> bool:
        if starts(ledger, 0):
            with Ledger(ledger.directory) as other:
                other.host = "elsewhere"
                if other.reclaim(9):
                    other.lease_seconds = 300.0
                    other.claim([1], lambda cell: True)
        return (ledger.directory / "runs/0/stopped").exists()

    assert drive(ledger, "slow", should_stop=lose)[0] == 75
    (cell,) = ledger.cells()
    assert (cell.status, cell.host) == ("running", "elsewhere")
    assert len(starts(ledger, 0)) == 1


def test_a_ledger_that_fails_stops_the_children_first(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as on a full disk: they write their checkpoints before anything is written down, or cannot be."""

    def fail(frames: dict[int, int]) -> set[int]:
        if starts(ledger, 0) and starts(ledger, 1):
            raise sqlite3.OperationalError("database or disk is full")
        return set(frames)

    ledger.lease_seconds = 0.01
    monkeypatch.setattr(ledger, "beat", fail)
    monkeypatch.setattr(ledger, "release", lambda id, frames: fail({}))
    with pytest.raises(sqlite3.OperationalError, match="full"):
        drive(ledger, "slow", "slow")
    assert all((ledger.directory / f"runs/{seed}/stopped").exists() for seed in (0, 1))


def test_files_decide_what_is_done(ledger: Ledger) -> None:
    drive(ledger, "quick", "quick")
    shutil.rmtree(ledger.directory / "runs/1")
    (ledger.directory / "runs/2").mkdir()
    (ledger.directory / "runs/2/summary.json").write_text('{"status": "done", "frames": 1000}')
    assert drive(ledger, "quick", "quick", "fail")[0] == 0
    assert [len(starts(ledger, seed)) for seed in range(3)] == [1, 1, 0]
    (ledger.directory / "ledger.sqlite").unlink()  # as after damage: the runs are taken up
    with Ledger(ledger.directory, create=True) as fresh:
        assert drive(fresh, "quick", "quick", "fail")[0] == 0
        assert [len(starts(fresh, seed)) for seed in range(3)] == [1, 1, 0]


def test_a_cell_that_cannot_even_be_started_fails_alone(ledger: Ledger) -> None:
    (ledger.directory / "runs").mkdir()
    (ledger.directory / "runs/0").write_text("a file in the way")
    assert drive(ledger, "quick", "quick")[0] == 1
    assert statuses(ledger) == ["failed", "done"]
    assert "File exists" in ledger.cells()[0].last_error


def test_cores_and_gpus_are_dealt_round_robin() -> None:
    deal = [(sorted(slot.cores), slot.gpu) for slot in make_slots(3, None, range(8), ["0", "1"])]
    assert deal == [([0, 1], "0"), ([2, 3], "1"), ([4, 5], "0")]
    assert [sorted(slot.cores) for slot in make_slots(3, 2, [4, 5, 6, 7], [])] == [[4, 5], [6, 7], [4, 5]]
    assert [sorted(slot.cores) for slot in make_slots(4, None, [0, 1], [])] == [[0], [1], [0], [1]]
    assert len(make_slots(None, None, range(4), ["a", "b"])) == 2
    assert make_slots(None, 99, range(4), []) == [Slot(frozenset(range(4)), None)]


def test_gpus_are_those_that_cuda_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, names in (("0,2", ["0", "2"]), ("", []), ("-1", []), ("MIG-x", ["MIG-x"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == names


def test_a_child_has_the_cores_and_the_gpu_of_its_slot(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(sys.modules[__name__], "SLOTS", [Slot(frozenset({core}), "1")])
    drive(ledger, "quick")
    ((start),) = starts(ledger, 0)
    assert (start["cores"], start["gpu"]) == ([core], "1")
