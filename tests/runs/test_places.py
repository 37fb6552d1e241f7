"""Where a run's files go: by the working directory of the call, on file systems that lack a call, and in a directory of its own."""

import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import children
import pytest
from tiny import tiny, words

from growtrain import train
from growtrain.__main__ import main
from growtrain.commands.running import default_run_dir
from growtrain.diagnosis.forks import diagnose
from growtrain.diagnosis.page import Settings
from growtrain.plasticity.learning_test import LearningTest
from growtrain.probe import cells as probe_cells
from growtrain.probe.arms import WARM
from growtrain.probe.settings import Cell, ProbeConfig
from growtrain.runs.checkpoint import open_at, open_newest
from growtrain.settings.config import Config
from growtrain.telemetry.sinks import read_jsonl

SETTINGS: dict[str, Any] = {
    "width": 16,
    "encoder_width": 0.125,
    "num_threads": 1,
    "checkpoint_period": 960,
}


@pytest.fixture
def wanderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory beside an empty one, `elsewhere`, in which nothing may appear."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    yield home
    assert not list(elsewhere.iterdir())


def leave(home: Path) -> None:
    os.chdir(home.parent / "elsewhere")


@pytest.mark.parametrize("when", ["before the first record", "between two"])
def test_a_relative_run_directory_is_that_of_the_call(when: str, wanderer: Path) -> None:
    records = train(tiny(**SETTINGS), Path("runs/a"))
    if when == "between two":
        next(records)
    leave(wanderer)
    list(records)
    run_dir = wanderer / "runs" / "a"
    assert {"config.json", "metrics.jsonl", "summary.json", "checkpoints"} <= {path.name for path in run_dir.iterdir()}
    assert len(list((run_dir / "checkpoints").glob("0*"))) == 2
    assert open_newest(run_dir).frames == 1_600


def test_a_relative_start_is_that_of_its_opening(wanderer: Path) -> None:
    list(train(tiny(**SETTINGS), Path("a")))
    shutil.rmtree("a/checkpoints/000000001600")
    (wanderer / "a" / "summary.json").unlink()
    resumed = train(tiny(**SETTINGS), Path("a"), start=open_newest(Path("a")))
    forked = train(tiny(**SETTINGS | {"total_frames": 2_000}), Path("b"), start=open_at(Path("a"), 960))
    leave(wanderer)
    list(forked)
    list(resumed)
    assert [r["frames"] for r in read_jsonl(wanderer / "b" / "metrics.jsonl")][-1] == 2_000
    assert open_newest(wanderer / "a").frames == 1_600


def test_a_diagnosis_and_a_probe_whose_listener_wanders(wanderer: Path) -> None:
    list(train(tiny(**SETTINGS | {"schedule": "fixed"}), Path("a")))
    test = LearningTest(seeds=1, transitions=12, updates=4, warm_up=2, marks=2)
    settings = Settings(frames=80, seeds=1, arms=("untouched",), test=test, threshold=0.1)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        leave(wanderer)

    assert diagnose(Path("a"), open_newest(Path("a")), settings, Path("d"), say=say) is not None
    assert said
    assert (wanderer / "d" / "diagnosis.md").exists()
    os.chdir(wanderer)
    config = ProbeConfig(num_frames=16, num_tasks=8, num_updates=1, batch_size=4)
    records = probe_cells.run(config, [Cell(setting="head", targets="random", seed=0)], [WARM], Path("p"), 1)
    leave(wanderer)
    assert len(list(records)) == 1
    assert len(read_jsonl(wanderer / "p" / "probe.jsonl")) == 8


def test_a_relative_video_is_that_of_the_call(wanderer: Path) -> None:
    film = pytest.importorskip("growtrain.runs.video").film
    list(train(tiny(**SETTINGS), Path("a")))
    lines = film(Path("a"), Path("clip.gif"), at=None, seed=None, frames=40)
    leave(wanderer)
    assert len(list(lines)) == 2
    assert (wanderer / "clip.gif").stat().st_size


# File systems that lack a call


def on_broken(what: str, *words: str) -> subprocess.CompletedProcess[str]:
    return children.run([*words], "import broken_filesystem\n" + children.COMMAND, BROKEN=what)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("fsync_dir", "cannot sync a directory (Invalid argument)"),
        ("open_dir", "cannot sync a directory (Permission denied)"),
        ("flock_enosys", "cannot be locked (Function not implemented), so the run goes on without a lock"),
        ("flock_enolck", "cannot be locked (No locks available), so the run goes on without a lock"),
    ],
)
def test_what_a_file_system_lacks_is_said_once_and_the_run_is_whole(what: str, says: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = on_broken(what, "train", *words(**SETTINGS), "--run-dir", str(run_dir))
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert says in line
    assert open_newest(run_dir).frames == 1_600
    assert len(list((run_dir / "checkpoints").glob("0*"))) == 2


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("flock_eio", "cannot be locked (Input/output error): choose another directory"),
        ("rename_dir", "cannot rename a directory there (Invalid cross-device link)"),
        ("fsync_eio", "cannot write a file there (Input/output error)"),
    ],
)
def test_what_no_run_can_do_without_is_one_line_before_any_work(what: str, says: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = on_broken(what, "train", *words(**SETTINGS), "--run-dir", str(run_dir))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert says in line
    assert {path.name for path in run_dir.iterdir()} <= {"run.lock"}


def test_a_resume_on_a_file_system_without_locks_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with warnings.catch_warnings():
        list(train(tiny(**SETTINGS | {"total_frames": 960}), run_dir))
    done = on_broken(
        "flock_enosys", "resume", str(run_dir), "--fork", str(tmp_path / "fork"), *["--total-frames", "1600"]
    )
    assert done.returncode == 0, done.stderr
    assert "in use" not in done.stderr


# A directory of its own


def test_runs_that_begin_in_one_second_get_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    config = Config(schedule="at:0.1,0.5", game="pong")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: default_run_dir(config), range(16)))
    assert len(set(found)) == 16
    assert all(path.is_dir() for path in found)
    assert found[0].name.startswith("pong-at_0.1_0.5-s0-2026")


def test_a_run_that_is_refused_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--replay-capacity", "1G"]) == 2
    assert not list(tmp_path.iterdir())
