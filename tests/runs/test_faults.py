"""What a run survives, each fault provoked for real: kills, signals, full and failing disks, damage, hostile files, hangs, divergence."""

import ast
import dataclasses
import errno
import hashlib
import json
import os
import pickle
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import children
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, tiny

import growtrain
from growtrain.__main__ import main
from growtrain.environments.atari import AtariEnvironment, make_spec
from growtrain.environments.base import EnvironmentHung
from growtrain.learners.base import Diverged
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.finite import MAX_NONFINITE
from growtrain.planning.speed import synthetic_batches
from growtrain.runfiles import RunLocked, Unreadable, cut_back, require_unlocked, run_lock
from growtrain.runs.checkpoint import NoCheckpoint, load_learner, open_at, open_newest
from growtrain.runs.loop import train
from growtrain.runs.resuming import changed_config, restart
from growtrain.runs.run import Run
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError
from growtrain.telemetry.sinks import read_jsonl

SETTINGS: dict[str, Any] = {"game": "breakout", "checkpoint_period": 960}
FLAGS = TINY | SETTINGS | {"preset": "paper"}  # whose heads are frozen, as those of `tiny`
CPU = torch.device("cpu")


def config_of(**changes: Any) -> Config:
    return tiny(**SETTINGS | changes)


def command(*words: object, **flags: Any) -> list[str]:
    settings = [str(part) for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    return [sys.executable, "-m", "growtrain", *map(str, words), *settings]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, with two checkpoints: at 960 and at 1600 frames."""
    run_dir = tmp_path_factory.mktemp("faults") / "whole"
    list(train(config_of(), run_dir))
    return run_dir


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that may be harmed."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def newest(run_dir: Path) -> Path:
    return max(
        (path for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit()), key=lambda path: path.name
    )


def final_networks(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_newest(run_dir)
    learner = checkpoint.state["learner"]
    return {f"{part}.{name}": tensor for part in ("online", "target") for name, tensor in learner[part].items()}


def assert_same_end(one: Path, other: Path) -> None:
    first, second = final_networks(one), final_networks(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    frames = [[record["frames"] for record in read_jsonl(run_dir / "metrics.jsonl")] for run_dir in (one, other)]
    assert frames[0] == frames[1]


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Makes a manifest agree with what lies in its directory, as somebody who means harm would."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]
    for name in manifest["files"]:
        if (checkpoint / name).is_file():  # a pipe would be waited for
            content = (checkpoint / name).read_bytes()
            manifest["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    change(manifest)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}))


# 1, 3: killed


def test_killed_in_the_middle_of_a_checkpoint_and_resumed(whole: Path, tmp_path: Path) -> None:
    """SIGKILL of a real process, at the moment when a checkpoint's files are there but not its name."""
    run_dir = tmp_path / "killed"
    script = (
        "import os, signal, sys\n"
        "from growtrain.__main__ import main\n"
        "replace = os.replace\n"
        "def dying(source, target):\n"
        "    if str(target).endswith('/000000000960'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(source, target)\n"
        "os.replace = dying\n"
        "main(sys.argv[1:])\n"
    )
    words = command("train", run_dir=run_dir, **FLAGS | {"checkpoint_period": 480})[3:]
    assert children.run(words, script).returncode == -signal.SIGKILL
    assert newest(run_dir).name == "000000000480"
    litter = [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".partial")]
    assert litter == [".partial-000000000960"]
    assert [record["frames"] for record in read_jsonl(run_dir / "metrics.jsonl")] == [200, 400, 600, 800]

    resumed = children.run(["resume", str(run_dir)])
    assert resumed.returncode == 0, resumed.stderr
    assert "from the checkpoint at 480 frames" in resumed.stdout
    assert "ended without letting go" in resumed.stderr  # the lock of the killed process
    assert not list((run_dir / "checkpoints").glob(".partial*"))
    assert_same_end(whole, run_dir)
    assert main(["inspect", str(run_dir)]) == 0


@pytest.fixture
def unsaved(whole: Path, tmp_path: Path) -> Path:
    """What a run leaves that failed before its first checkpoint."""
    run_dir = Path(shutil.copytree(whole, tmp_path / "unsaved", ignore=shutil.ignore_patterns("checkpoints")))
    about, summary = (json.loads((whole / name).read_text()) for name in ("config.json", "summary.json"))
    (run_dir / "config.json").write_text(json.dumps(about | {"saved": False}))
    (run_dir / "summary.json").write_text(json.dumps(summary | {"status": "failed", "frames": 800}))
    cut_back(run_dir / "metrics.jsonl", 800)
    return run_dir


def files_of(run_dir: Path) -> dict[Path, bytes]:
    """All but the lock, which whoever asks for it opens."""
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != "run.lock"}


def test_killed_before_the_first_checkpoint_it_starts_again(whole: Path, unsaved: Path) -> None:
    """And nothing is left of what it was, in its files as in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    litter = [unsaved / "config.json.partial", unsaved / ".partial-try-1"]
    litter[0].touch()
    litter[1].mkdir()
    assert main(["resume", str(unsaved), "--log-period", "400"]) == 0
    assert [record["frames"] for record in read_jsonl(unsaved / "metrics.jsonl")] == [400, 800, 1_200, 1_600]
    shown = EventAccumulator(str(unsaved / "tensorboard")).Reload().Scalars("metrics/updates")
    assert [event.step for event in shown] == [400, 800, 1_200, 1_600]
    networks = [final_networks(run_dir) for run_dir in (whole, unsaved)]
    assert all(torch.equal(tensor, networks[1][name]) for name, tensor in networks[0].items())
    assert not any(path.exists() for path in litter)


def test_a_run_that_cannot_begin_again_keeps_what_it_has(
    unsaved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(unsaved)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["resume", str(unsaved), "--device", "cuda"]) == 2
    assert files_of(unsaved) == before
    monkeypatch.setattr("growtrain.commands.resume.require_unlocked", lambda run_dir: None)  # locked after that
    with run_lock(unsaved):
        assert main(["resume", str(unsaved)]) == 2
    assert "is in use by process" in capsys.readouterr().err
    assert files_of(unsaved) == before


@pytest.mark.parametrize("there", ["whole", "unsaved", "checkpoints"])
@pytest.mark.parametrize("forked", [False, True])
def test_no_run_is_written_over_another(there: str, forked: bool, run: Path, unsaved: Path) -> None:
    run_dir, start = unsaved if there == "unsaved" else run, None
    if there == "checkpoints":
        for path in run.glob("*.json*"):
            path.unlink()
    if forked:
        parent = Path(shutil.copytree(run, run.parent / "parent"))
        start = open_at(parent, 960)
    before = files_of(run_dir)
    with pytest.raises(ConfigError, match=r"(already holds a run|holds what is left of another run).*choose another"):
        list(train(config_of(seed=1, total_frames=2_000), run_dir, start=start))
    assert files_of(run_dir) == before


def test_what_another_process_has_saved_meanwhile_is_not_taken_for_damaged(
    run: Path, unsaved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start, before = open_at(run, 960), files_of(run)
    with pytest.raises(ConfigError, match=r"has a checkpoint at 1600 frames by now.*growtrain resume"):
        list(train(config_of(), run, start=start))
    assert files_of(run) == before

    def and_then(*arguments: Any) -> Any:
        shutil.copytree(run / "checkpoints", unsaved / "checkpoints")
        return again(*arguments)

    again = restart
    monkeypatch.setattr("growtrain.runs.resuming.restart", and_then)
    before = files_of(unsaved)
    assert main(["resume", str(unsaved)]) == 2
    assert "has a checkpoint at 1600 frames by now" in capsys.readouterr().err
    assert {path: content for path, content in files_of(unsaved).items() if "checkpoints" not in path.parts} == before


def test_records_of_a_version_that_noted_no_checkpoint_may_be_all_that_is_left(
    unsaved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = json.loads((unsaved / "config.json").read_text())
    del about["saved"]
    (unsaved / "config.json").write_text(json.dumps(about))
    before = files_of(unsaved)
    assert main(["resume", str(unsaved)]) == 2
    assert "has no checkpoint any more" in capsys.readouterr().err
    assert files_of(unsaved) == before
    for path in unsaved.glob("*.jsonl"):
        path.unlink()
    assert main(["resume", str(unsaved)]) == 0


def killed_when(condition: str, words: list[str]) -> None:
    """Runs a command that is killed by itself at the first replacement of a file of which the condition holds."""
    script = (
        "import os, signal, sys\n"
        "from growtrain.__main__ import main\n"
        "replace = os.replace\n"
        "def dying(source, target):\n"
        f"    if {condition}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(source, target)\n"
        "os.replace = dying\n"
        "main(sys.argv[1:])\n"
    )
    process = children.run(words, script)
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.filterwarnings("always")  # of the lock of the killed process: said on stderr, not raised
@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize(("checkpoint_period", "frames"), [(400, 400), (0, 1_600)])
def test_killed_in_the_middle_of_its_first_checkpoint_or_just_before_it_starts_again(
    checkpoint_period: int, frames: int, within: bool, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though its records have come as far as that: they are as those of a run whose checkpoints are gone."""
    run_dir, name = tmp_path / "run", f"{frames:012d}"
    words = command("train", run_dir=run_dir, **FLAGS | {"checkpoint_period": checkpoint_period})[3:]
    killed_when(f"str(target).endswith('/{name}')", words)
    assert max(record["frames"] for record in read_jsonl(run_dir / "metrics.jsonl")) == frames
    assert (run_dir / "checkpoints" / f".partial-{name}").is_dir()
    if not within:
        shutil.rmtree(run_dir / "checkpoints")
    assert main(["resume", str(run_dir)]) == 0
    assert "from the start" in capsys.readouterr().out
    assert_same_end(whole, run_dir)


@pytest.mark.filterwarnings("always")  # said on stderr, not raised
def test_a_run_whose_first_checkpoint_finds_no_room_starts_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("train", run_dir=tmp_path / "run", **FLAGS | {"checkpoint_period": 400})[3:]
    with monkeypatch.context() as patch:
        patch.setattr("growtrain.runs.checkpoint._SPARE_BYTES", 1 << 60)
        assert main(words) == 1
    assert "are free" in capsys.readouterr().err
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert "from the start" in capsys.readouterr().out
    assert_same_end(whole, tmp_path / "run")


MOMENTS = {
    "among the records": "str(target).endswith('/evaluations.jsonl')",
    "at its first checkpoint": "str(target).endswith('/000000000960')",
}


@pytest.mark.filterwarnings("always")  # of the lock of the killed process: said on stderr, not raised
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_fork_that_is_killed_before_it_is_saved_goes_on_from_its_parent(
    moment: str, whole: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not from fresh weights; every setting that has no part in what is learned may be given anew."""
    shutil.rmtree(newest(run))
    fork = run.parent / "fork"
    killed_when(MOMENTS[moment], ["resume", str(run), "--fork", str(fork)])
    assert not list((fork / "checkpoints").glob("0*"))
    assert main(["resume", str(fork), "--keep", "2"]) == 0
    said = capsys.readouterr().out
    assert str(newest(run)) in said
    assert "--keep 1 -> 2" in said
    assert_same_end(whole, fork)
    assert open_newest(fork).config.keep == 2
    (resume,) = json.loads((fork / "summary.json").read_text())["resumes"]
    assert resume["forked_from"] == str(newest(run))
    assert not list(fork.rglob(".partial*"))


@pytest.mark.filterwarnings("always")  # of the lock of the killed process: said on stderr, not raised
def test_a_rescue_of_a_wider_run_that_is_killed_before_it_is_saved_goes_on_from_its_parent(tmp_path: Path) -> None:
    """Whose network counts as one that started at its width."""
    run, rescue, again = (tmp_path / name for name in ("run", "rescue", "again"))
    list(train(config_of(schedule="full1x", total_frames=800), run))
    words = ["rescue", str(run), "--frames", "400", "--seed", "7", "--run-dir"]
    killed_when("str(target).endswith('/000000000800')", [*words, str(rescue)])
    assert main(["resume", str(rescue)]) == 0
    assert main([*words, str(again)]) == 0
    assert_same_end(again, rescue)


@pytest.mark.filterwarnings("always")  # of the lock of the killed process: said on stderr, not raised
def test_a_fork_whose_parent_is_gone_before_it_was_saved_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(newest(run))
    fork = run.parent / "fork"
    killed_when(MOMENTS["at its first checkpoint"], ["resume", str(run), "--fork", str(fork)])
    (run / "checkpoints" / "000000000960").rename(run / "elsewhere")
    before = {path.name: path.read_bytes() for path in fork.glob("*.jsonl")}
    assert main(["resume", str(fork)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"growtrain resume {run} --fork NEWDIR" in line
    assert {path.name: path.read_bytes() for path in fork.glob("*.jsonl")} == before
    (run / "elsewhere").rename(run / "checkpoints" / "000000000960")
    assert main(["resume", str(fork)]) == 0
    shutil.rmtree(fork / "checkpoints")  # what it has played itself is not dropped
    assert main(["resume", str(fork)]) == 2
    assert "has no checkpoint any more" in capsys.readouterr().err


def test_flags_of_a_run_that_begins_again_are_taken_or_refused(
    unsaved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", str(unsaved), "--lr", "0.1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--lr 0.1: this run has 0.00025, and it decides what is learned: leave it out, or train a new run" in line
    assert main(["resume", str(unsaved), "--log-period", "400", "--game", "ALE/Breakout-v5"]) == 0
    assert "--log-period 200 -> 400" in capsys.readouterr().out
    assert [record["frames"] for record in read_jsonl(unsaved / "metrics.jsonl")] == [400, 800, 1_200, 1_600]


def test_records_of_others_in_a_run_directory_are_left_alone(run: Path) -> None:
    """They are neither cut back nor copied into forks."""
    shutil.rmtree(newest(run))
    (run / "notes.jsonl").write_text("mine\n")
    (run / "more.jsonl").mkdir()
    (run / "paper.partial").write_text("mine, too")
    assert main(["resume", str(run), "--fork", str(run.parent / "fork")]) == 0
    assert main(["resume", str(run)]) == 0
    assert (run / "notes.jsonl").read_text() == "mine\n"
    assert (run / "paper.partial").exists()
    assert not (run.parent / "fork" / "notes.jsonl").exists()


def test_killed_between_the_last_checkpoint_and_the_summary_only_the_summary_is_made_up_for(
    whole: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "summary.json").unlink()
    records = {path.name: path.read_bytes() for path in run.glob("*.jsonl")}
    assert main(["resume", str(run)]) == 0
    summary, expected = (json.loads((where / "summary.json").read_text()) for where in (run, whole))
    for name in ("status", "reason", "frames", "updates", "final_return"):
        assert summary[name] == expected[name], name
    assert {path.name: path.read_bytes() for path in run.glob("*.jsonl")} == records
    capsys.readouterr()
    assert main(["resume", str(run)]) == 0
    assert "is done" in capsys.readouterr().out


def test_a_finished_run_that_lacks_its_summary_is_not_evaluated_again(tmp_path: Path) -> None:
    config = config_of(total_frames=400, schedule="fixed", eval_period=300, eval_frames=400, max_episode_frames=80)
    list(train(config, tmp_path))
    (tmp_path / "summary.json").unlink()
    assert list(train(config, tmp_path, start=open_newest(tmp_path))) == []
    assert [record["frames"] for record in read_jsonl(tmp_path / "evaluations.jsonl")] == [304, 400]
    assert json.loads((tmp_path / "summary.json").read_text())["final_return_source"] == "evaluation"


@pytest.mark.parametrize("lacks", ["checkpoints", "checkpoints and summary"])
def test_a_run_that_has_lost_its_checkpoints_keeps_its_records(
    lacks: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is left of a run whose checkpoints were not copied with it is results, not a beginning."""
    shutil.rmtree(run / "checkpoints")
    if lacks != "checkpoints":
        (run / "summary.json").unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != "run.lock"}
    assert main(["resume", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no checkpoint any more" in line
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_file_in_place_of_a_directory_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for words in (
        ["train", "--total-frames", "5k", "--run-dir", str(file)],
        ["resume", str(run), "--fork", str(file), "--total-frames", "2k"],
        ["rescue", str(run), "--frames", "200", "--run-dir", str(file)],
        ["diagnose", str(run), "--learning-test-only", "--output", str(file)],
        ["probe", "--output", str(file), "--num-tasks", "8", "--num-updates", "1", "--processes", "1"],
        ["report", str(run), "--output", str(file / "deeper")],
    ):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(file) in line
    assert file.read_text() == "x"


def test_records_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"frames": 100}\n{"frames": 200}\n{"frames": 300}\n{"frames": 3')
    assert cut_back(path, 200) == 1
    assert path.read_text() == '{"frames": 100}\n{"frames": 200}\n'
    assert cut_back(path, 200) == 0
    assert cut_back(tmp_path / "missing.jsonl", 0) == 0


# 2: signals


@pytest.mark.parametrize("name", ["INT", "USR1", "HUP"])
def test_a_signal_stops_with_75_after_a_checkpoint(name: str, tmp_path: Path) -> None:
    run_dir, number = tmp_path / "run", getattr(signal, f"SIG{name}")
    words = command("train", run_dir=run_dir, stop_signal="USR1", **FLAGS | {"total_frames": 1_000_000})[3:]
    process = children.Child(words)
    next(line for line in process.stdout if line.startswith("train"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert f"stopped by SIG{name}; go on with: growtrain resume {run_dir}" in errors
    assert process.returncode == 75
    checkpoint = open_newest(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["reason"], summary["frames"]) == ("stopped", f"SIG{name}", checkpoint.frames)


def test_a_hang_up_that_is_ignored_stops_nothing(tmp_path: Path) -> None:
    """As under `nohup`."""
    words = command("train", run_dir=tmp_path / "run", **FLAGS | {"total_frames": 1_000_000})
    with subprocess.Popen(["nohup", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = (line for line in process.stdout if line.startswith("train"))
        next(lines)
        process.send_signal(signal.SIGHUP)
        for _ in range(5):
            next(lines)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["reason"] == "SIGTERM"


def test_a_terminal_that_goes_away_leaves_a_checkpoint_and_75(tmp_path: Path) -> None:
    """Its every further line is an error, on standard output and on standard error."""
    run_dir, (ours, theirs) = tmp_path / "run", pty.openpty()
    words = command("train", run_dir=run_dir, **FLAGS | {"total_frames": 1_000_000})
    script = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    said = b""
    while b"updates/s" not in said:
        said += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=60) == 75
    assert json.loads((run_dir / "summary.json").read_text())["reason"] == "SIGHUP"
    assert open_newest(run_dir).frames > 0


def test_the_second_signal_stops_at_once_and_harms_nothing(run: Path) -> None:
    """While the first is answered by writing a checkpoint, which here never ends."""
    script = """
import sys, time
from growtrain.runs import checkpoint
from growtrain.__main__ import main
from growtrain.runs.run import Run
def hang(*arguments, **options):
    print("writing", flush=True)
    time.sleep(60)
def slow(self, **options):
    checkpoint.verify_file = hang  # not before: it is also how a checkpoint is opened
    save(self, **options)
save, Run.save = Run.save, slow
main(sys.argv[1:])
"""
    shutil.rmtree(newest(run))
    words = ["resume", str(run), "--checkpoint-period", "0"]
    process = children.Child(words, script)
    lines = iter(process.stdout)
    next(line for line in lines if line.startswith("train"))
    process.send_signal(signal.SIGTERM)
    next(line for line in lines if line.startswith("writing"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM
    assert open_newest(run).frames == 960
    assert main(["inspect", str(run)]) == 0


def test_a_signal_that_cannot_be_caught_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("KILL", "9", "nonsense"):
        assert main(["--stop-signal", name]) == 2
        assert "USR1" in capsys.readouterr().err


# 4: the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB of its own."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(directory)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(directory: Path, leave: int) -> Path:
    ballast = directory / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(directory).free - leave))
    return ballast


@pytest.fixture
def no_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growtrain.runs.checkpoint._SPARE_BYTES", 0)


@pytest.mark.parametrize("estimated", [True, False], ids=["seen beforehand", "while writing"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    estimated: bool, small_disk: Path, whole: Path, no_spare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not estimated:
        monkeypatch.setattr("growtrain.runs.checkpoint.CheckpointWriter._require_space", lambda *_: None)
    run_dir, ballast = small_disk / "run", None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for record in train(config_of(checkpoint_period=480), run_dir):
            if record.frames == 600 and ballast is None:
                ballast = fill(small_disk, leave=60_000)
                before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
            if record.frames == 1_000:
                assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before  # own partial gone
                assert open_newest(run_dir).frames == 480
                assert ballast is not None
                ballast.unlink()
    said = [str(item.message) for item in caught if "checkpoint at" in str(item.message)]
    assert "at 960 frames was not written" in said[0]
    assert ("are free" if estimated else "No space left") in said[0]
    assert "next attempt is in 60 frames" in said[0]
    assert_same_end(whole, run_dir)


def test_records_written_while_the_disk_is_full_are_not_lost(
    small_disk: Path, whole: Path, no_spare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorBoard's writer thread dies of the full disk, and would report that to pytest.
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    run_dir = small_disk / "run"
    config, ballast = config_of(checkpoint_period=480), None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for record in train(config, run_dir):
            if record.frames == 600 and ballast is None:
                ballast = fill(small_disk, leave=0)
            if record.frames == 1_000 and ballast is not None and ballast.exists():
                assert not (run_dir / "growth_events.jsonl").read_bytes()  # the growth at 800 frames has no room
                ballast.unlink()
    assert "nor the records before it" in str(caught[0].message)
    (event,), (expected,) = (read_jsonl(directory / "growth_events.jsonl") for directory in (run_dir, whole))
    assert event["frames"] == expected["frames"] == 800
    assert_same_end(whole, run_dir)


@pytest.mark.filterwarnings("always")  # said on stderr, not raised
def test_no_space_for_the_first_file_is_one_line(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(small_disk, leave=0)
    assert main(command("train", run_dir=small_disk / "run", **FLAGS)[3:]) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "warning" not in text]
    assert "No space left" in line
    assert "--run-dir" in line


@pytest.mark.filterwarnings("always")  # said on stderr, not raised
def test_a_disk_that_stays_full_or_read_only_ends_the_run_with_its_own_message(
    small_disk: Path, no_spare: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = small_disk / "run"
    words = command("train", run_dir=run_dir, **FLAGS | {"checkpoint_period": 200, "log_period": 100})[3:]
    frames = []

    def read_only(self: Run) -> Any:
        frames.append(self.collector.frames)
        if len(frames) == 3:  # the records are elsewhere, the checkpoints' directory is read-only
            subprocess.run(["mount", "--bind", str(run_dir / "checkpoints"), str(run_dir / "checkpoints")], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", str(run_dir / "checkpoints")], check=True)
        return report(self)

    report = Run.report
    monkeypatch.setattr(Run, "report", read_only)
    try:
        assert main(words) == 1
    finally:
        subprocess.run(["umount", str(run_dir / "checkpoints")], capture_output=True)
    error = capsys.readouterr().err
    assert error.count("warning: checkpoint at") == 2
    assert "Read-only file system" in error.splitlines()[-1]
    assert "the checkpoints made before are whole" in error.splitlines()[-1]
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "failed"
    assert open_newest(run_dir).frames == 200


# 5: damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["manifest.json", "state.json", "state.safetensors", "segment"])
def test_damage_is_named_and_the_checkpoint_before_is_used(file: str, damage: str, run: Path) -> None:
    last = newest(run)
    path = last / file
    if file == "segment":  # the newest, which the checkpoint before does not share
        path = run / "checkpoints" / "replay" / json.loads((last / "manifest.json").read_text())["segments"][-1][0]
    DAMAGE[damage](path)
    checkpoint = open_newest(run)
    assert checkpoint.frames == 960
    assert len(checkpoint.damaged) == 1
    assert path.name in checkpoint.damaged[0]
    assert main(["inspect", str(run)]) == 1


def test_after_damage_the_run_goes_on_from_the_checkpoint_before_and_says_so(whole: Path, run: Path) -> None:
    flip(newest(run) / "state.safetensors")
    with pytest.warns(UserWarning, match=r"set aside: \.damaged-000000001600 \(.*state\.safetensors is damaged"):
        list(train(config_of(), run, start=open_newest(run)))
    assert_same_end(whole, run)


def test_what_plays_an_older_checkpoint_than_the_newest_says_so(run: Path) -> None:
    flip(newest(run) / "state.safetensors")
    with pytest.warns(UserWarning, match=r"the checkpoint at 960 frames is taken: .*state\.safetensors is damaged"):
        assert load_learner(run, torch.device("cpu"))[2] == 960


@pytest.mark.parametrize("command", ["resume", "inspect", "evaluate"])
def test_checkpoints_that_may_not_be_read_are_not_said_to_be_gone(
    command: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by `chmod 000`, which does not keep root out."""
    list_directory = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "checkpoints":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return list_directory(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert main([command, str(run)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith("checkpoints: Permission denied: give this user access to it, or name another path")


def test_a_manifest_that_is_a_list_is_damaged(run: Path) -> None:
    (newest(run) / "manifest.json").write_text("[]")
    assert open_newest(run).frames == 960


@pytest.mark.parametrize(
    ("place", "value"),
    [(("resumes",), [3]), (("gpu",), "x"), (("seconds",), []), (("totals",), [[], []]), (("learner", "initial"), [])],
)
def test_a_part_of_another_kind_is_refused(place: tuple[str, ...], value: Any, run: Path) -> None:
    checkpoint = newest(run)
    state = part = json.loads((checkpoint / "state.json").read_text())
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    (checkpoint / "state.json").write_text(json.dumps(state))
    rewrite(checkpoint)
    with pytest.raises(ConfigError):
        Run(open_at(run, 1_600).config, run, open_at(run, 1_600))


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_a_newest_checkpoint_that_may_not_be_read_is_not_passed_over(
    command: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be whole, and its run would go on from an older one and write over it."""
    opened, names = os.open, sorted(path.name for path in (run / "checkpoints").iterdir())

    def refusing(path: str | Path, *arguments: Any, **options: Any) -> int:
        if str(path).startswith(str(newest(run))):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    assert main([command, str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("manifest.json may not be read (Permission denied): give this user access to it")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names


def test_with_every_checkpoint_damaged_nothing_is_loaded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run / "checkpoints").glob("0*"):
        flip(path / "state.json")
    with pytest.raises(NoCheckpoint, match=r"000000001600.*000000000960"):
        open_newest(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["resume", str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# 6: hostile files


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/growtrain-was-here",)


def plant_pickle(checkpoint: Path) -> None:
    for name in ("state.json", "state.safetensors"):
        (checkpoint / name).write_bytes(pickle.dumps(Bomb()))
    (checkpoint / "state.pt").write_bytes(pickle.dumps(Bomb()))


def plant_link(checkpoint: Path) -> None:
    elsewhere = checkpoint.parent / "elsewhere"
    shutil.move(checkpoint / "state.json", elsewhere)
    (checkpoint / "state.json").symlink_to(elsewhere)


def plant_fifo(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()
    os.mkfifo(checkpoint / "state.json")


def plant_huge_header(checkpoint: Path) -> None:
    (checkpoint / "state.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def plant_huge_tensor(checkpoint: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (checkpoint / "state.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def plant_deep_json(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("[" * 200_000)


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def plant(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "state.safetensors")
        save_file(tensors | {name: change(tensors[name]).contiguous()}, checkpoint / "state.safetensors")

    return plant


def change_state(*path: Any, value: Any) -> Callable[[Path], None]:
    def plant(checkpoint: Path) -> None:
        state = place = json.loads((checkpoint / "state.json").read_text())
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        (checkpoint / "state.json").write_text(json.dumps(state))

    return plant


HOSTILE: dict[str, Callable[[Path], None]] = {
    "a pickle": plant_pickle,
    "a link": plant_link,
    "a pipe": plant_fifo,
    "a huge header": plant_huge_header,
    "a huge tensor": plant_huge_tensor,
    "deep nesting": plant_deep_json,
    "another dtype": change_tensor("learner/online/encoder.layers.0.weight", torch.Tensor.double),
    "another shape": change_tensor("learner/target/encoder.layers.0.weight", lambda tensor: tensor[:1]),
    "another slot shape": change_tensor("learner/optimizer/encoder.layers.0.weight/mean", lambda tensor: tensor[:1]),
    "a tensor as a number": change_tensor("ring/written", lambda tensor: tensor[:0]),
    "a million injections": change_state("learner", "head", "injections", value=["frozen"] * 10**6),
    "a wide network": change_state("config", "width", value=2**31),
    "a widened network": change_state("learner", "width", value=64),
    "heads that are not there": change_state("learner", "head", "trainable", value=[0, 10**6]),
    "many lanes": change_state("config", "num_envs", value=2**20),
    "rows beyond the ring": change_state("ring", "filled", value=2**40),
    "words for numbers": change_state("stage", value="many"),
    "no configuration": change_state("config", value=None),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoints_are_refused_in_one_line(
    kind: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = Path("/tmp/growtrain-was-here")
    marker.unlink(missing_ok=True)
    last = newest(run)
    shutil.rmtree(run / "checkpoints" / "000000000960")
    HOSTILE[kind](last)
    rewrite(last)
    allocated = psutil.Process().memory_info().rss
    assert main(["resume", str(run), "--fork", str(run / "fork"), "--total-frames", "2k"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert not marker.exists()
    assert psutil.Process().memory_info().rss - allocated < 400e6
    assert main(["evaluate", str(run), "--eval-frames", "100"]) in (0, 2)  # what it does not need may be wrong


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..", "", "x" * 64, "state.json"])
def test_names_in_a_manifest_lead_nowhere(name: str, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "000000000960")
    last = newest(run)

    def as_segment(manifest: dict[str, Any]) -> None:
        manifest["segments"][0][0] = name

    rewrite(last, as_segment)
    with pytest.raises(NoCheckpoint, match=r"impossible file|lacks"):
        open_newest(run)

    def as_file(manifest: dict[str, Any]) -> None:
        manifest["segments"] = []
        manifest["files"] = {"state.safetensors": manifest["files"]["state.safetensors"], name: [1, "0" * 64]}

    rewrite(last, as_file)
    with pytest.raises(NoCheckpoint):
        open_newest(run)


def test_a_segment_that_unpacks_to_more_than_it_says_is_cut_off(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "000000000960")
    last = newest(run)
    bomb = zlib.compress(bytes(500_000_000), 9)
    sha256 = hashlib.sha256(bomb).hexdigest()
    (run / "checkpoints" / "replay" / sha256).write_bytes(bomb)

    def swap(manifest: dict[str, Any]) -> None:
        manifest["segments"][0] = [sha256, len(bomb), [[*c[:3], 0, len(bomb)] for c in manifest["segments"][0][2]]]

    rewrite(last, swap)
    allocated = psutil.Process().memory_info().rss
    with pytest.raises(Unreadable, match="bytes of frames where"):
        list(train(config_of(total_frames=2_000), run / "fork", start=open_newest(run)))
    assert psutil.Process().memory_info().rss - allocated < 300e6


def test_a_linked_checkpoint_directory_is_refused(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "000000000960")
    last = newest(run)
    shutil.move(last, run / "elsewhere")
    last.symlink_to(run / "elsewhere")
    with pytest.raises(NoCheckpoint, match="link"):
        open_newest(run)


def test_nothing_in_the_package_can_unpickle() -> None:
    root = Path(growtrain.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, path
            # Which unpickles unless told not to.
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords], path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("np", "load"), ("torch", "save")}, path


# 7, 8: other versions, other settings


def test_other_versions_and_devices_are_warned_of_and_recorded(whole: Path, run: Path) -> None:
    def older(manifest: dict[str, Any]) -> None:
        manifest["machine"] |= {"device": "Tesla K80"}
        manifest["machine"]["versions"]["torch"] = "1.0"

    shutil.rmtree(newest(run))
    rewrite(newest(run), older)
    with pytest.warns(UserWarning, match=r"torch 1\.0 -> .*device Tesla K80 -> cpu"):
        list(train(config_of(), run, start=open_newest(run)))
    (resume,) = json.loads((run / "summary.json").read_text())["resumes"]
    assert len(resume["skew"]) == 2
    assert_same_end(whole, run)


def test_another_schema_is_refused_by_number(run: Path) -> None:
    for path in (run / "checkpoints").glob("0*"):
        rewrite(path, lambda manifest: manifest.update(schema=99))
    with pytest.raises(NoCheckpoint, match="schema 99"):
        open_newest(run)


def test_what_may_change_on_resume_and_in_a_fork(run: Path) -> None:
    shutil.rmtree(newest(run))
    checkpoint = open_newest(run)  # at 960 frames, with one injection at 800
    config, lines = changed_config(checkpoint, {"log_period": 100, "game": "breakout"}, fork=False)
    assert (config.log_period, lines) == (100, ["--log-period 200 -> 100"])
    refused = [
        ({"lr": 0.1}, False, "--lr 0.1: this run has 0.00025.*--fork NEWDIR"),
        ({"total_frames": 3_200}, False, "--fork"),
        ({"width": 64}, True, "--width 64: a fork keeps 32"),
        ({"game": "pong"}, True, "a fork keeps breakout"),
        ({"total_frames": 960}, True, "not beyond the checkpoint at 960"),
        ({"schedule": "fixed"}, True, r"the past cannot change.*at:800 to go on.*at:800,960"),
        ({"schedule": "at:400,1200"}, True, "the past cannot change"),
        ({"schedule": "at:800,900"}, True, "the past cannot change"),
        ({"schedule": "full1x"}, True, "width"),
        ({"schedule": "at:800,960", "intervention": "net2wider"}, True, "use another intervention, or fork a run"),
        ({"schedule": "at:800,960", "intervention": "redo"}, True, "use another intervention, or fork a run"),
        ({"split": "conv3"}, True, "a fork keeps fc1"),
    ]
    for changes, fork, message in refused:
        with pytest.raises(ConfigError, match=message):
            changed_config(checkpoint, changes, fork=fork)
    forked, _ = changed_config(
        checkpoint, {"schedule": "at:800,960", "anchor": "mirrored", "seed": 1, "lr": 1e-3}, fork=True
    )
    assert forked.schedule == "at:800,960"
    changed_config(checkpoint, {"schedule": "at:800,960", "intervention": "reset-head"}, fork=True)
    whole = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, freeze="network"))
    with pytest.raises(ConfigError, match="--total-frames 400 is not beyond the checkpoint at 960"):
        changed_config(whole, {"total_frames": 400}, fork=True)
    _, notes = changed_config(whole, {"anchor": "mirrored", "lr": 1e-3}, fork=True)
    assert notes[0] == "--anchor frozen -> mirrored, without effect in this run"
    assert notes[1].endswith("-> 0.001")


def test_a_fork_has_the_past_of_its_run_and_a_future_of_its_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(newest(run))
    fork = run.parent / "fork with spaces"
    words = ["resume", str(run), "--fork", str(fork), "--schedule", "at:800,960", "--anchor", "zero", "--seed", "7"]
    assert main(words) == 0
    assert "--anchor frozen -> zero\n" in capsys.readouterr().out
    assert [event["frames"] for event in read_jsonl(fork / "growth_events.jsonl")] == [800, 968]
    learner, config, frames, _ = load_learner(fork, CPU)
    assert learner.head.spec()["injections"] == ["frozen", "zero"]
    assert (config.seed, frames) == (7, 1_600)
    past = [[r for r in read_jsonl(where / "metrics.jsonl") if r["frames"] <= 960] for where in (run, fork)]
    assert past[0] == past[1]
    assert open_newest(run).frames == 960  # untouched
    summary = json.loads((fork / "summary.json").read_text())
    assert summary["resumes"][0]["forked_from"].endswith("000000000960")
    # A plan has one anchor for all stages: what the fork's updates took is not known, and not said.
    assert [stage["flops_per_update"] for stage in summary["stages"]] == [None] * 3
    assert main(words) == 2  # never over another run


def test_a_fork_counts_the_episodes_that_it_has_played_from_their_beginning(tmp_path: Path) -> None:
    # Saved at 960 and 1920.
    config = config_of(max_episode_frames=320, total_frames=1_920, schedule="fixed", log_period=80)
    run_dir, fork = tmp_path / "run", tmp_path / "fork"
    list(train(config, run_dir))
    start = open_at(run_dir, 960)
    list(train(config, fork, start=start, should_stop=lambda: len(read_jsonl(fork / "metrics.jsonl")) > 14))
    list(train(config, fork, start=open_newest(fork)))  # an interruption forgets none of it
    assert_same_end(run_dir, fork)
    whole, own = (
        [record for record in read_jsonl(where / "metrics.jsonl") if record["frames"] > 960]
        for where in (run_dir, fork)
    )
    counts = [[record["episodes"] for record in records] for records in (whole, own)]
    assert sum(counts[0]) - sum(counts[1]) == config.num_envs  # one in every lane was begun by the run
    assert sum(counts[1]) > 0
    assert all(mine <= all_ for all_, mine in zip(*counts, strict=True))


def test_a_finished_run_is_not_run_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["resume", str(run)]) == 0
    assert "is done" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before


# 9: one writer


def test_the_second_process_is_told_who_has_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = """
import sys, time
from pathlib import Path
from growtrain.runfiles import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        assert main(["resume", str(run)]) == 2
        assert f"in use by process {holder.pid} on {socket.gethostname()}" in capsys.readouterr().err
        with pytest.raises(RunLocked):
            next(train(config_of(), run))
    finally:
        holder.kill()
        holder.communicate()
    require_unlocked(run)
    with run_lock(run) as stale:
        assert stale == f"process {holder.pid} on {socket.gethostname()}"
    with run_lock(run) as stale:
        assert stale is None  # let go of in order


def test_a_lock_that_is_damaged_is_a_lock(run: Path) -> None:
    (run / "run.lock").write_bytes(b"\xff\xfe\x00")
    require_unlocked(run)
    with run_lock(run) as stale:
        assert stale == "another process"


# 10: not finite


@pytest.mark.parametrize("optimizer", ["centered_rmsprop", "adam"])
@pytest.mark.parametrize("what", ["reward", "parameter gradient"])
def test_an_update_that_is_not_finite_leaves_the_network_as_it_is(optimizer: str, what: str) -> None:
    config = config_of(optimizer=optimizer)
    learner = DoubleDQN(config, make_spec(4), width=32, device=CPU, generator=torch.Generator().manual_seed(0))
    good = synthetic_batches(config, make_spec(4), 2, torch.Generator().manual_seed(0))
    learner.update(good)
    bad = good[:1].clone()
    if what == "reward":
        bad["next", "reward"][0, 0] = float("nan")
        hook = None
    else:  # a loss that is finite and a gradient that is not
        hook = learner.online.encoder.get_parameter("layers.0.weight").register_hook(
            lambda gradient: gradient * float("inf")
        )
    before = [tensor.clone() for tensor in everything(learner)]
    for _ in range(MAX_NONFINITE - 1):
        learner.update(bad)
    assert all(map(torch.equal, before, everything(learner)))
    assert learner.report().skipped == MAX_NONFINITE - 1
    if hook is not None:
        hook.remove()
    learner.update(good)  # learning goes on
    assert not all(map(torch.equal, before, everything(learner)))
    assert np.isfinite(learner.report().loss or 0.0)
    if what == "reward":
        for _ in range(MAX_NONFINITE - 1):
            learner.update(bad)
        with pytest.raises(Diverged, match=r"10 updates in a row.*--max-grad-norm"):
            learner.update(bad)


NORMALIZED: list[dict[str, Any]] = [
    {"normalization": "spectral"},
    {"normalization": "layer", "weight_projection": "nap"},
    {"max_grad_norm": 1.0},
]


@pytest.mark.parametrize("optimizer", ["centered_rmsprop", "adam"])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("settings", NORMALIZED, ids=["spectral", "nap", "clipped"])
def test_what_else_an_update_moves_stays_too(optimizer: str, asynchronous: bool, settings: dict[str, Any]) -> None:
    """A spectral norm's vectors and a projection's rounding, with the optimizer skipping the step as on a GPU and without."""
    config = config_of(optimizer=optimizer, **settings)
    learner = DoubleDQN(config, make_spec(4), width=32, device=CPU, generator=torch.Generator().manual_seed(0))
    learner.asynchronous = asynchronous
    good = synthetic_batches(config, make_spec(4), 2, torch.Generator().manual_seed(0))
    learner.update(good)
    bad = good[:1].clone()
    bad["next", "reward"][0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in learner.online.state_dict().items()}
    learner.update(bad)
    moved = [name for name, tensor in learner.online.state_dict().items() if not torch.equal(before[name], tensor)]
    assert not moved
    assert learner.report().skipped == 1


def test_weights_that_are_not_finite_are_found_where_the_network_is_vouched_for(tmp_path: Path) -> None:
    """Finite gradients can make them, too, and then no update has been skipped yet."""
    run = Run(config_of(), tmp_path)
    with run.recording():
        run.learner.require_finite()
        with torch.no_grad():
            run.learner.head.live.get_parameter("0.weight")[0, 0] = float("inf")
        for vouch in (run.report, run.save):
            with pytest.raises(
                Diverged, match=r"1 of \d+ weight tensors are not finite.*head.live.0.weight.*lower --lr"
            ):
                vouch()
    run.collector.environment.close(raise_if_closed=False)
    assert not list((tmp_path / "checkpoints").glob("*/manifest.json"))


def everything(learner: DoubleDQN) -> list[torch.Tensor]:
    slots = [slot for slots in learner.optimizer.state.values() for slot in slots.values()]
    return [*learner.online.state_dict().values(), *learner.target.state_dict().values(), *slots]


def test_a_run_that_diverges_stops_with_advice_and_no_checkpoint_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    words = command("train", run_dir=run_dir, **FLAGS | {"lr": 1e30, "checkpoint_period": 160})[3:]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "lower --lr (now 1e+30)" in error
    assert "Traceback" not in error
    tensors = final_networks(run_dir)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "failed"


# 12, 14, 18, 19


def test_a_replay_beyond_memory_is_refused_with_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert main(["--replay-capacity", "1G", "--run-dir", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert "--replay-capacity" in error
    assert error.count("\n") == 1
    assert not run_dir.exists()


def test_a_hung_environment_is_named_and_the_checkpoint_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An action that ALE does not know makes one of its threads wait for ever: slipped past our own check."""
    run_dir = tmp_path / "run"
    dispatch, calls = AtariEnvironment._dispatch, iter(range(10**6))

    def hangs(self: AtariEnvironment, actions: Any) -> None:
        if next(calls) == 90:  # of 8 frames each
            self._watchdog_seconds, vector = 0.5, self._vector
            assert vector is not None
            send = vector.send
            monkeypatch.setattr(vector, "send", lambda real: send(np.array([real[0], 99])))
        dispatch(self, actions)

    monkeypatch.setattr(AtariEnvironment, "_dispatch", hangs)
    assert main(command("train", run_dir=run_dir, **FLAGS | {"checkpoint_period": 480})[3:]) == 1
    error = capsys.readouterr().err
    assert "no answer within 0.5 s" in error
    assert "lane 1" in error
    assert open_newest(run_dir).frames == 480
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "failed"
    assert issubclass(EnvironmentHung, RuntimeError)


def test_wall_clocks_may_jump_and_the_time_between_two_parts_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**9, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))  # a day back at every look
    config, steps = config_of(total_frames=800, schedule="fixed"), iter(range(10**6))
    run_dir, began = tmp_path / "run", time.perf_counter()
    list(train(config, run_dir, should_stop=lambda: next(steps) >= 60))
    stopped = time.perf_counter()
    time.sleep(1.0)
    resumed = time.perf_counter()
    list(train(config, run_dir, start=open_newest(run_dir)))
    worked = (stopped - began) + (time.perf_counter() - resumed)
    records = read_jsonl(run_dir / "metrics.jsonl")
    walls = [record["wall_seconds"] for record in records]
    assert walls == sorted(walls)
    assert 0 < walls[-1] < worked
    assert all(record["frames_per_second"] > 0 for record in records)
    assert sum(stage["seconds"] for stage in json.loads((run_dir / "summary.json").read_text())["stages"]) < worked


def test_no_wall_clock_measures_anything() -> None:
    for path in Path(growtrain.__file__).parent.rglob("*.py"):
        if path.match("sweep/ledger.py"):  # leases are told between processes and machines, which share no other clock
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("time", "time"), ("datetime", "now")}, path


def test_threads_come_from_the_affinity_mask(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        run = Run(config_of(), tmp_path)
        assert torch.get_num_threads() == 1
        run.collector.environment.close()
    finally:
        os.sched_setaffinity(0, allowed)


# 25: memory and disk


def test_memory_and_files_do_not_grow_with_the_run(tmp_path: Path) -> None:
    """After the replay has filled, thousands of frames, records and checkpoints leave resident memory where it was."""
    config = config_of(
        total_frames=10**6, log_period=80, checkpoint_period=400, schedule="fixed", learning_starts=16, batch_size=1
    )
    steps, resident, sizes = iter(range(10**6)), [], []
    for record in train(config, tmp_path / "run", should_stop=lambda: next(steps) >= 900):
        if record.frames % 1_200 == 0:
            resident.append(psutil.Process().memory_info().rss)
            sizes.append(
                sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file())
            )
    assert resident[-1] - resident[2] < 8e6, resident
    assert sizes[-1] < 2 * sizes[2], sizes
