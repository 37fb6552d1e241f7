"""Trackers: they get what the JSONL files hold, and nothing that they do or fail to do reaches the run.

The packages themselves are tried where they are installed; how they fail is played by modules that stand in for them.
"""

import json
import logging
import sqlite3
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny

from growtrain.__main__ import main
from growtrain.runs.checkpoint import load_learner, open_newest
from growtrain.runs.loop import train
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError
from growtrain.telemetry import trackers
from growtrain.telemetry.sinks import RunSinks, read_jsonl
from growtrain.telemetry.trackers import check_trackers, open_trackers

RECORDS: list[dict[str, Any]] = [
    {"frames": 1000, "loss": 0.5, "episode_return": None, "seconds": {"learn": 2.0}},
    {"frames": 2000, "loss": 0.1 + 0.2, "episode_return": -7.0, "seconds": {"learn": 3.5}},
    {"frames": 3000, "loss": float("nan"), "episode_return": 11.0, "seconds": {"learn": 1e-9}},
]
EVENT = {"frames": 2000, "stage": 1, "kind": "inject", "pause_seconds": 0.25}


class StandIn(ModuleType):
    """A tracker's package that keeps what it gets; each function named in `faults` has something else done first."""

    def __init__(self, **faults: Any) -> None:
        super().__init__("standin")
        self.faults, self.calls = faults, list[tuple[str, Any]]()
        self.Settings = SimpleNamespace

    def _called(self, name: str, values: Any) -> None:
        self.faults.get(name, lambda values: None)(values)
        self.calls.append((name, values))

    def init(self, *arguments: Any, **options: Any) -> SimpleNamespace:
        self._called("init", options)
        return SimpleNamespace(
            dir="/runs/run/wandb/offline-run-1/files",
            define_metric=lambda *names, **options: self._called("define_metric", (*names, options)),
            log=lambda values, step=None: self._called("log", (step, values)),
            finish=lambda **options: self._called("finish", options),
        )

    def teardown(self) -> None:
        self._called("teardown", None)

    def setup(self) -> SimpleNamespace:
        return SimpleNamespace(settings=SimpleNamespace(mode=self.faults.get("mode", "offline")))

    def login(self, *, verify: bool) -> None:
        assert not verify  # it would wait for the network
        self._called("login", None)

    def got(self, name: str) -> list[Any]:
        return [values for called, values in self.calls if called == name]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """What is waited for in vain, until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def fail(values: Any) -> None:
    raise ConnectionError("no route\nto host")


def record(run_dir: Path, track: str, **options: Any) -> None:
    """A run of three records and a growth, without the run."""
    sinks = RunSinks(run_dir, trackers=open_trackers(Config(track=track, seed=7), run_dir))
    for values in RECORDS:
        sinks.write("metrics", values)
        if values["frames"] == EVENT["frames"]:
            sinks.write("growth_events", EVENT)
    sinks.close(**options)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


SENT: list[tuple[int, dict[str, float]]] = [
    (1000, {"metrics/loss": 0.5, "metrics/seconds/learn": 2.0}),
    (2000, {"metrics/loss": 0.1 + 0.2, "metrics/episode_return": -7.0, "metrics/seconds/learn": 3.5}),
    (2000, {"growth_events/stage": 1, "growth_events/pause_seconds": 0.25}),
    (3000, {"metrics/episode_return": 11.0, "metrics/seconds/learn": 1e-9}),
]


def test_wandb_gets_config_and_numbers_with_frames_as_their_axis(tmp_path: Path, wandb: StandIn) -> None:
    record(tmp_path, "wandb")
    (options,) = wandb.got("init")
    assert options["config"] == Config(track="wandb", seed=7).to_dict()
    assert (options["project"], options["dir"], options["resume"]) == ("growtrain", str(tmp_path), "allow")
    assert wandb.got("define_metric") == [("frames", {}), ("*", {"step_metric": "frames"})]
    assert wandb.got("log") == [(None, {"frames": frames, **scalars}) for frames, scalars in SENT]
    assert wandb.got("finish") == [{"exit_code": 0}]


def test_trackio_gets_config_and_numbers_at_steps_of_frames(tmp_path: Path, trackio: StandIn) -> None:
    record(tmp_path, "trackio")
    assert trackio.got("init")[0]["config"] == Config(track="trackio", seed=7).to_dict()
    assert trackio.got("log") == SENT
    assert trackio.got("finish") == [{}]


def test_a_resumed_run_is_the_same_and_another_directory_is_another(
    tmp_path: Path, wandb: StandIn, trackio: StandIn
) -> None:
    for name in ("one", "one", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        record(tmp_path / name, "wandb,trackio")
    first, again, other = (options["id"] for options in wandb.got("init"))
    assert first == again != other
    names = [options["name"] for options in trackio.got("init")]
    assert names == [f"phoenix-grow3x-s7-{id}" for id in (first, first, other)]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"id": '])
def test_a_damaged_identifier_is_made_anew(content: str, tmp_path: Path, trackio: StandIn) -> None:
    (tmp_path / "trackers.json").write_text(content)
    record(tmp_path, "trackio")
    record(tmp_path, "trackio")
    assert len({options["name"] for options in trackio.got("init")}) == 1


def test_a_failed_run_is_marked(tmp_path: Path, wandb: StandIn) -> None:
    record(tmp_path, "wandb", failed=True)
    assert wandb.got("finish") == [{"exit_code": 1}]


def test_wandb_out_of_reach_records_offline(tmp_path: Path, wandb: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    wandb.faults["init"] = lambda options: options.get("mode") == "offline" or fail(options)
    record(tmp_path, "wandb")
    assert [name for name, _ in wandb.calls[:2]] == ["teardown", "init"]
    assert len(wandb.got("log")) == len(SENT)
    (warning,) = warnings_of(caplog)
    assert "no route to host" in warning
    assert "wandb sync /runs/run/wandb/offline-run-1" in warning


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_a_tracker_raises_is_said_once(
    name: str, where: str, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    request.getfixturevalue(name).faults[where] = fail
    record(tmp_path, name)
    (warning,) = warnings_of(caplog)
    assert warning == f"{name} is off from here on (ConnectionError: no route to host); the JSONL files are complete"
    assert [values["frames"] for values in read_jsonl(tmp_path / "metrics.jsonl")] == [1000, 2000, 3000]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_blocks_holds_up_nothing_but_the_end_and_that_not_for_long(
    where: str,
    tmp_path: Path,
    trackio: StandIn,
    never: threading.Event,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.3)
    trackio.faults[where] = lambda values: never.wait()
    start = time.perf_counter()
    record(tmp_path, "trackio")
    assert time.perf_counter() - start < 2
    (warning,) = warnings_of(caplog)
    assert "trackio is off from here on (it has not ended" in warning
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_what_waits_for_a_tracker_is_bounded(
    tmp_path: Path,
    trackio: StandIn,
    never: threading.Event,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "_WAITING", 2)
    trackio.faults["init"] = lambda options: never.wait()
    record(tmp_path, "trackio")
    (warning,) = warnings_of(caplog)
    assert "it hangs, with 2 records waiting" in warning


# A whole run


def config_of(**changes: Any) -> Config:
    return tiny(**{"eval_period": 1_600, "eval_frames": 80} | changes)


def test_tracking_changes_nothing_in_a_run_and_its_faults_do_not_either(
    tmp_path: Path, wandb: StandIn, trackio: StandIn, never: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.1)
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    list(train(config_of(), plain))
    seen: list[tuple[int, dict[str, float]]] = []

    def take(values: Any) -> None:
        seen.append(values)
        if len(seen) == 4:
            torch.manual_seed(0)  # as somebody's library may
            fail(values)

    trackio.faults["log"] = take
    wandb.faults["init"] = lambda options: never.wait()
    list(train(config_of(track="wandb,trackio"), tracked))
    networks = [load_learner(run_dir, torch.device("cpu"))[0].online.state_dict() for run_dir in (plain, tracked)]
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])
    losses = [[values["loss"] for values in read_jsonl(run_dir / "metrics.jsonl")] for run_dir in (plain, tracked)]
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]
    assert json.loads((tracked / "summary.json").read_text())["status"] == "done"
    assert [frames for frames, _ in seen] == [200, 400, 600, 800]
    assert open_newest(tracked).config.fingerprint() == config_of().fingerprint()


def test_what_is_not_installed_or_not_logged_in_is_said_before_any_work(
    tmp_path: Path,
    wandb: StandIn,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    wandb.faults |= {"mode": "online", "login": fail}
    monkeypatch.setitem(sys.modules, "trackio", None)
    for name, remedy in (("trackio", "pip install 'growtrain[trackio]'"), ("wandb", "WANDB_MODE=offline")):
        assert main(["--game", "pong", "--track", name]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert f"--track {name}" in captured.err
        assert remedy in captured.err
    assert list(tmp_path.iterdir()) == []
    wandb.faults["mode"] = "offline"
    check_trackers(Config(track="wandb"))


def test_an_empty_folder_of_that_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "trackio"):
        (tmp_path / name).mkdir()
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        with pytest.raises(ConfigError, match=f"growtrain\\[{name}\\]"):
            check_trackers(Config(track=name))


@pytest.mark.parametrize("track", ["tensorboard", "wandb,", "WANDB", "wandb trackio", ""])
def test_an_unknown_tracker_is_refused(track: str) -> None:
    with pytest.raises(ConfigError, match=r"--track .*wandb, trackio, or be none"):
        Config(track=track)


@pytest.mark.parametrize("project", ["", "a/b", "x" * 129, "a\nb"])
def test_a_project_no_tracker_takes_is_refused(project: str) -> None:
    with pytest.raises(ConfigError, match="--track-project"):
        Config(track_project=project)


# The packages themselves


def wandb_history(run_dir: Path) -> list[list[tuple[int, dict[str, float]]]]:
    """What every part of an offline run logged, read from W&B's own files: LevelDB's log format, a protobuf record in each entry."""
    from wandb.proto.wandb_internal_pb2 import Record

    parts = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        content, position, entry, rows = path.read_bytes(), 7, b"", []
        while position + 7 <= len(content):
            if (left := 32_768 - position % 32_768) < 7:  # the end of a block is not used
                position += left
                continue
            _, size, kind = struct.unpack_from("<IHB", content, position)
            entry = (entry if kind in (3, 4) else b"") + content[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):  # the whole of an entry, or its last piece
                logged = Record.FromString(entry)
                if logged.WhichOneof("record_type") == "history":
                    rows.append(
                        {
                            ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                            for item in logged.history.item
                        }
                    )
        parts.append([(row["frames"], {name: value for name, value in row.items() if "/" in name}) for row in rows])
    return parts


def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(Config(track="wandb"))
    record(tmp_path, "wandb")
    record(tmp_path, "wandb")  # as after a resume, from an earlier frame
    deadline = time.monotonic() + 10
    while wandb_history(tmp_path) != [SENT, SENT] and time.monotonic() < deadline:
        time.sleep(0.1)  # its service writes the file when the run has ended
    assert wandb_history(tmp_path) == [SENT, SENT]
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}) == 1  # one run to W&B


def test_trackio_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    for module in ("trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    record(tmp_path, "trackio")
    record(tmp_path, "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "growtrain.db") as database:
        rows = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    database.close()
    assert [(step, json.loads(values)) for _, step, values in rows] == [*SENT, *SENT]
    assert len({run for run, _, _ in rows}) == 1
