"""Checkpoints: a resumed run is the run that was never interrupted, bit for bit; what is on disk is whole, small and shared."""

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny

from growtrain.__main__ import main
from growtrain.environments.base import Spec
from growtrain.learners.optimizers import can_compile
from growtrain.plasticity.learning_test import LearningTest, compare_copies
from growtrain.records import Decision, Evaluation, Metrics, Record
from growtrain.replay import make
from growtrain.replay import segments as replay_segments
from growtrain.replay.frames import FrameRing
from growtrain.replay.segments import Segment
from growtrain.runfiles import Unreadable, published, sweep, verify_file
from growtrain.runs.checkpoint import Checkpoint, CheckpointWriter, load_learner, open_newest
from growtrain.runs.evaluation import evaluate
from growtrain.runs.loop import train
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError
from growtrain.telemetry.sinks import read_jsonl

MINATAR = "minatar/breakout"  # takes a tenth of the time that an Atari game takes
TIMES = {
    "wall_seconds",
    "frames_per_second",
    "updates_per_second",
    "seconds",
    "pause_seconds",
    "since_report",
    "resumes",
}


SETTINGS: dict[str, Any] = {
    "game": "breakout",
    "schedule": "at:800,1600",
    "total_frames": 3_200,
    "num_envs": 4,
    "learning_starts": 400,
    "epsilon_decay_frames": 1_000,
    "target_period": 640,
    "replay_capacity": 400,  # wraps within the run
    "eval_frames": 160,
    "log_period": 500,
}


def config_of(**changes: Any) -> Config:
    return tiny(**SETTINGS | changes)


def stop_after(config: Config, *frames: int) -> Iterator[Callable[[], bool]]:
    """For each part of a run, a function that stops it when that many frames have been played in it."""
    for part in (*frames, 10**9):
        played = itertools.count(step=config.num_envs * config.frame_skip)
        yield lambda played=played, part=part: next(played) >= part  # type: ignore[misc]


def run_in_parts(config: Config, run_dir: Path, *frames: int) -> Checkpoint:
    """Plays a run, stopped and resumed after each of these numbers of frames; returns its last checkpoint."""
    start = None
    for should_stop in stop_after(config, *frames):
        list(train(config, run_dir, should_stop=should_stop, start=start))
        start = open_newest(run_dir)
    assert start is not None
    return start


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in TIMES}
    return value


def assert_same(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name in one:
            assert_same(one[name], other[name], f"{path}/{name}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def replay_of(checkpoint: Checkpoint) -> torch.Tensor:
    spec = Spec.from_dict(checkpoint.state["spec"])
    ring = make.make_ring(checkpoint.config, spec, rng=np.random.default_rng(0), device=torch.device("cpu"))
    ring.load_state_dict(checkpoint.state["ring"])
    checkpoint.load_frames(ring)
    return ring.frames


def assert_same_run(one: Path, other: Path) -> None:
    """Everything but times: networks, optimizer, replay, generators, counters, episodes, and the files of records."""
    first, second = open_newest(one), open_newest(other)
    totals = [[total[:2] for total in checkpoint.state.pop("totals")] for checkpoint in (first, second)]
    assert totals[0] == totals[1]
    assert_same(without_times(first.state), without_times(second.state))
    assert torch.equal(replay_of(first), replay_of(second))
    for stem in ("metrics", "growth_events", "evaluations", "diagnostics", "decisions"):
        records = [without_times({"all": read_jsonl(run / f"{stem}.jsonl")})["all"] for run in (one, other)]
        assert [without_times(r) for r in records[0]] == [without_times(r) for r in records[1]], stem
        assert records[0] or stem in ("evaluations", "decisions"), stem


SHORT: dict[str, Any] = {"game": MINATAR, "total_frames": 1_600, "schedule": "at:400,800", "learning_starts": 200}
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # Stopped while acting is random, just before a growth, and between two records; before any evaluation, which asks more often.
    "frozen": ({"num_envs": 2, "eval_period": 1_600, "max_episode_frames": 400}, (208, 560, 800)),
    "the rest": (
        {
            "num_threads": 2,
            "sticky_actions": 0.25,
            "anchor": "mirrored",
            "freeze_encoder_at": 1,
            "optimizer": "adam",
            "normalization": "spectral",
            "max_grad_norm": 1.0,
            "game": "pong",
        },
        (1_072,),
    ),
    "l2-init": (
        {**SHORT, "regularizer": "l2-init", "activation": "crelu", "freeze_encoder_at": 2},
        (280, 456),
    ),
    "nap": (
        {**SHORT, "weight_projection": "nap", "normalization": "layer", "activation": "fourier", "anchor": "zero"},
        (536,),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_one_that_was_never_interrupted(variant: str, tmp_path: Path) -> None:
    changes, parts = VARIANTS[variant]
    config = config_of(**changes)
    whole = run_in_parts(config, tmp_path / "whole")
    # Checkpoints in one of them only, so that taking one is shown to change nothing.
    resumed = run_in_parts(dataclasses.replace(config, checkpoint_period=320), tmp_path / "parts", *parts)
    assert whole.frames == resumed.frames == config.total_frames
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    summary = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert [resume["frames"] for resume in summary["resumes"]] == np.cumsum(parts).tolist()
    assert summary["status"] == "done"


class BreakingOff:
    """A `should_stop` that breaks off every evaluation in its third step, when it is made for the first time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seen = set[int]()
        self._steps: Iterator[int] | None = None  # of an evaluation that is to be broken off

        def watched(*arguments: Any, frames: int, **others: Any) -> Evaluation | None:
            self._steps = None if frames in self._seen else itertools.count(1)
            self._seen.add(frames)
            record = evaluate(*arguments, frames=frames, **others)
            self._steps = None
            return record

        monkeypatch.setattr("growtrain.runs.run.evaluate", watched)

    def __call__(self) -> bool:
        return self._steps is not None and next(self._steps) == 3


# All that is periodic comes at the frames of an evaluation.
EVALUATED: dict[str, Any] = {
    "game": MINATAR,
    "schedule": "at:320,640",
    "total_frames": 960,
    "learning_starts": 160,
    "target_period": 320,
    "replay_capacity": 200,
    "eval_period": 320,
    "diagnostics_period": 320,
    "log_period": 320,
    "max_episode_frames": 80,
}


@pytest.mark.parametrize(
    ("changes", "evaluated", "last"),
    [
        ({"log_period": 400}, [320, 640, 960], Metrics),  # the last is on the way, and the last record after it
        ({"total_frames": 800}, [320, 640, 800], Evaluation),  # the last comes at the end, after all updates
        ({"schedule": "at:640", "learning_starts": 320, "priming_updates": 70}, [320, 640, 960], Evaluation),
    ],
    ids=["on the way", "at the end", "before priming"],
)
def test_an_evaluation_that_was_broken_off_is_made_once_the_run_goes_on(
    changes: dict[str, Any],
    evaluated: list[int],
    last: type[Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever else is due with it, and though the run that made it is killed before it saves anything."""
    config, whole, parts = config_of(**EVALUATED | changes), tmp_path / "whole", tmp_path / "parts"
    run_in_parts(config, whole)
    config, stop, start = dataclasses.replace(config, checkpoint_period=320), BreakingOff(monkeypatch), None
    for frames in evaluated:
        list(train(config, parts, should_stop=stop, start=start))
        assert json.loads((parts / "summary.json").read_text())["status"] == "stopped"
        assert open_newest(parts).frames == frames
        records = train(config, parts, start=open_newest(parts))
        first = next(records)
        assert (first.frames, type(first)) == (frames, Evaluation)
        while not isinstance(first, last):
            first = next(records)
        records.close()  # type: ignore[attr-defined]
        start = open_newest(parts)
        assert start.frames == frames
    list(train(config, parts, start=start))
    assert_same_run(whole, parts)
    summary = json.loads((parts / "summary.json").read_text())
    assert (summary["status"], [resume["frames"] for resume in summary["resumes"]]) == ("done", evaluated)


class Deciding:
    """Decisions that inject, of short tests; a `should_stop` that breaks off each, when it is made first, before the copy `at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self._seen, self._at = set[int](), at
        self._copies: Iterator[int] | None = None  # of a decision that is to be broken off
        monkeypatch.setattr("growtrain.runs.growing.DECIDING", LearningTest(seeds=1, updates=2, warm_up=1, marks=1))
        monkeypatch.setattr("growtrain.runs.growing.compare_copies", self._compare)

    def _compare(self, learner: Any, ring: Any, test: Any, seed: Any, *others: Any, **named: Any) -> Any:
        frames = seed.spawn_key[-1]
        self._copies = None if frames in self._seen else itertools.count()
        self._seen.add(frames)
        compare_copies(learner, ring, test, seed, *others, **named)
        self._copies = None
        return {"current": [[1.0]], "inject": [[0.5]]}

    def __call__(self) -> bool:
        return self._copies is not None and next(self._copies) == self._at


# All that is periodic comes at the frames of a decision, each of which injects.
DECIDED = EVALUATED | {
    "schedule": "adaptive",
    "adaptive_period": 320,
    "adaptive_min_gap": 320,
    "adaptive_max": 3,
    "adaptive_patience": 1,
    "max_episode_frames": 40,
    "eval_frames": 80,
}


@pytest.mark.parametrize(("freeze", "at"), [("heads", 0), ("network", 1)])
def test_a_decision_that_was_broken_off_is_made_once_the_run_goes_on(
    freeze: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the rest of its step, and though the run that made it is killed before it saves anything."""
    config, whole, parts = config_of(**DECIDED | {"freeze": freeze}), tmp_path / "whole", tmp_path / "parts"
    with monkeypatch.context() as patch:
        Deciding(patch, at)
        run_in_parts(config, whole)
    stop, start = Deciding(monkeypatch, at), None
    for frames in (320, 640, 960):
        list(train(config, parts, should_stop=stop, start=start))
        assert json.loads((parts / "summary.json").read_text())["status"] == "stopped"
        start = open_newest(parts)
        assert (start.frames, start.state["decision_owed"]) == (frames, True)
        records = train(config, parts, start=start)
        assert isinstance(next(records), Decision)
        while not isinstance(next(records), Metrics):
            pass
        records.close()  # type: ignore[attr-defined]
        start = open_newest(parts)
        assert start.state["decision_owed"]
    list(train(config, parts, start=start))
    assert_same_run(whole, parts)
    assert len(read_jsonl(parts / "growth_events.jsonl")) == 2


def test_no_run_forks_within_a_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another network may be saved at its frames later."""
    config, parts, fork = config_of(**DECIDED), tmp_path / "parts", tmp_path / "fork"
    list(train(config, parts, should_stop=Deciding(monkeypatch, 0)))
    with pytest.raises(ConfigError, match="fork from a later"):
        list(train(dataclasses.replace(config, schedule="fixed"), fork, start=open_newest(parts)))
    early = tmp_path / "early"  # nothing is begun
    for words in (["resume", parts, "--fork", early], ["rescue", parts, "--run-dir", early], ["diagnose", parts]):
        assert main(list(map(str, words))) == 2
        assert not early.exists()
        (line,) = capsys.readouterr().err.splitlines()
        assert "the decision at 320 frames, on which its network there depends: fork from a later checkpoint" in line
    assert main(["inspect", str(parts)]) == 0
    assert "its decision was still to be made" in capsys.readouterr().out
    list(train(config, parts, start=open_newest(parts)))
    list(train(dataclasses.replace(config, total_frames=1_280), fork, start=open_newest(parts)))


def test_a_decision_that_has_been_made_up_for_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint takes the place of the one before it, of the same frames, though the evaluation after it is owed in turn."""
    config = config_of(**DECIDED)
    list(train(config, tmp_path, should_stop=Deciding(monkeypatch, 0)))
    made = functools.partial(read_jsonl, tmp_path / "decisions.jsonl")
    list(train(config, tmp_path, should_stop=lambda: bool(made()), start=open_newest(tmp_path)))
    start = open_newest(tmp_path)
    owed = [start.state[what] for what in ("decision_owed", "evaluation_owed")]
    assert (start.frames, owed) == (320, [False, True])
    list(train(config, tmp_path, start=start))
    assert [record["frames"] for record in made()] == [320, 640, 960]


def test_an_evaluation_that_has_been_made_up_for_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint takes the place of the one before it, of the same frames. A fork of that evaluates at its own times."""
    config = config_of(**EVALUATED | {"total_frames": 640, "schedule": "at:320"})
    parts, fork = tmp_path / "parts", tmp_path / "fork"
    list(train(config, parts, should_stop=BreakingOff(monkeypatch)))
    list(train(config, parts, should_stop=lambda: "at once", start=open_newest(parts)))
    summary = json.loads((parts / "summary.json").read_text())
    assert (summary["frames"], summary["reason"]) == (320, "at once")
    assert open_newest(parts).state["evaluation_owed"]
    list(train(config, fork, start=open_newest(parts)))
    assert [record["frames"] for record in read_jsonl(fork / "evaluations.jsonl")] == [640]

    made = functools.partial(read_jsonl, parts / "evaluations.jsonl")
    list(train(config, parts, should_stop=lambda: bool(made()), start=open_newest(parts)))
    start, (evaluation,) = open_newest(parts), made()
    assert (start.frames, start.state["evaluation_owed"], evaluation["frames"]) == (320, False, 320)
    list(train(config, parts, start=start))
    assert [record["frames"] for record in made()] == [320, 640]
    assert made()[0] == evaluation


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("what", ["MIN_UPDATES_TO_COMPILE", "MIN_UPDATES_TO_COMPILE_ALL"])
def test_a_run_with_a_compiled_step_resumes_bit_for_bit(
    what: str, tmp_path: Path, compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(f"growtrain.learners.gradient_step.{what}", 0)
    config = config_of()
    run_in_parts(config, tmp_path / "whole")
    run_in_parts(config, tmp_path / "parts", 560, 912)  # before the first growth, and after it
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it was compiled
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


KINDS: dict[str, dict[str, Any]] = {
    "widened": {"game": MINATAR, "schedule": "at:480,800", "intervention": "net2wider", "optimizer": "adam"},
    "recycled": {"game": MINATAR, "schedule": "redo", "redo_period": 320, "redo_tau": 0.3},
    "all heads": {"game": MINATAR, "schedule": "at:480,800", "trainable_heads": "all", "anchor": "frozen"},
    "split": {"schedule": "at:480,800", "split": "conv3", "anchor": "mirrored", "freeze_encoder_at": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_runs_whose_network_or_stages_are_others_are_resumed_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Stopped between two interventions and after them."""
    config = config_of(**({"total_frames": 1_280, "learning_starts": 160, "log_period": 320} | KINDS[kind]))
    run_in_parts(config, tmp_path / "whole")
    run_in_parts(config, tmp_path / "parts", 704, 256)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    events = read_jsonl(tmp_path / "parts" / "growth_events.jsonl")
    last = read_jsonl(tmp_path / "parts" / "metrics.jsonl")[-1]["stage"]
    if config.schedule == "redo":
        assert sum(event["recycled_units"] for event in events) > 0
        assert (len(events), last) == (3, 0)
    else:
        assert [event["stage"] for event in events] == [1, 2]
        assert last == 2
    learner, _, frames, _ = load_learner(tmp_path / "parts", torch.device("cpu"))
    assert (frames, learner.width) == (config.total_frames, 32 * (3 if "widened" in kind else 1))


def make_ring(seed: int = 0, capacity: int = 3_000, num_lanes: int = 2) -> FrameRing:
    return FrameRing(capacity, num_lanes, rng=np.random.default_rng(seed), frame_shape=(1, 84, 84), stack_size=4)


def play(ring: FrameRing, steps: int, generator: np.random.Generator) -> None:
    """Random steps with episodes, of frames that compress no better than they should."""
    lanes = ring.num_lanes
    frames = generator.integers(0, 256, (2, lanes, 1, 84, 84), dtype=np.uint8)
    if not ring.written.any():
        ring.start(frames[0])
    for _ in range(steps):
        ring.extend(
            action=generator.integers(4, size=lanes),
            reward=generator.random(lanes),
            terminated=np.zeros(lanes, np.bool_),
            frame=np.roll(frames[0], int(generator.integers(84)), axis=2),
            started=generator.random(lanes) < 0.02,
            first_frame=frames[1],
        )


def test_the_replay_is_saved_once_and_read_back_whatever_has_been_overwritten(tmp_path: Path) -> None:
    """Through several turns of the ring: each checkpoint writes what is new, drops what is gone, and restores every row."""
    generator = np.random.default_rng(1)
    ring = make_ring(capacity=3_000)
    replay = tmp_path
    segments: list[Segment] = []
    for steps in (10, 1_100, 1, 2_000, 300, 4_000):
        play(ring, steps, generator)
        segments = replay_segments.still_needed(segments, ring)
        before = sum(c.count for s in segments for c in s.chunks)
        new = replay_segments.write_new(segments, ring, replay, num_threads=2)
        written = sum(c.count for s in new for c in s.chunks)
        assert written <= 2 * min(steps * 1.1 + 10, ring.rows)
        segments += new
        for path in set(replay.iterdir()) - {replay / s.sha256 for s in segments}:
            path.unlink()
        assert before + written <= 2 * (2 * ring.rows + 40 * 1024)

        other = make_ring(seed=9, capacity=3_000)
        play(other, 50, np.random.default_rng(5))
        state = ring.state_dict()
        del state["frames"]
        other.load_state_dict(state)
        replay_segments.load_frames(segments, other, replay, num_threads=2)
        other.check_valid()
        filled = ring.state_dict()["filled"]
        assert torch.equal(ring.frames[:, :filled], other.frames[:, :filled])
        assert (ring.sample(16) == other.sample(16)).all()
        with pytest.raises(Unreadable, match="exactly once"):
            replay_segments.check_cover(segments[1:] or [], ring.written, ring.rows)
        with pytest.raises(Unreadable, match="exactly once"):
            replay_segments.check_cover([*segments, segments[-1]], ring.written, ring.rows)


def save(writer: CheckpointWriter, ring: FrameRing, frames: int) -> Path:
    state = ring.state_dict()
    del state["frames"]
    return writer.save({"ring": state}, ring, config_of(), frames=frames, device=torch.device("cpu"))


def test_what_is_kept_and_what_is_dropped(tmp_path: Path) -> None:
    generator, ring = np.random.default_rng(2), make_ring(capacity=200)
    writer = CheckpointWriter(tmp_path, keep=1)
    directory = tmp_path / "checkpoints"
    for frames in range(100, 1_000, 100):
        play(ring, 30, generator)
        save(writer, ring, frames)
        names = sorted(path.name for path in directory.iterdir())
        assert names == [f"{f:012d}" for f in (frames - 100, frames) if f >= 100] + ["replay"]
        named = {
            entry[0]
            for name in names[:-1]
            for entry in json.loads((directory / name / "manifest.json").read_text())["segments"]
        }
        assert {path.name for path in (directory / "replay").iterdir()} == named
    # A ring of 104 rows a lane takes 30 a checkpoint: never more than 5 segments for one checkpoint, 6 for two.
    assert len(named) <= 6


def test_what_is_not_of_a_checkpoint_is_left_alone_and_taken_for_none(tmp_path: Path) -> None:
    """Such as what NFS keeps of a file that is open somewhere, which cannot be removed."""
    generator, ring = np.random.default_rng(2), make_ring(capacity=200)
    writer, directory = CheckpointWriter(tmp_path, keep=0), tmp_path / "checkpoints"
    foreign = [directory / name for name in ("notes", "99999999", "\u0663" * 12, "replay/.nfs0001", "replay/foo")]
    for path in foreign:
        path.mkdir(parents=True)
    for frames in (100, 200, 300):
        play(ring, 60, generator)
        save(writer, ring, frames)
        assert published(tmp_path) == [directory / f"{frames:012d}"]
    assert all(path.is_dir() for path in foreign)
    named = {entry[0] for entry in json.loads((directory / "000000000300" / "manifest.json").read_text())["segments"]}
    assert {path.name for path in (directory / "replay").iterdir()} == named | {".nfs0001", "foo"}


def test_what_cannot_be_removed_costs_a_warning_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, ring = np.random.default_rng(2), make_ring(capacity=200)
    writer = CheckpointWriter(tmp_path, keep=0)
    unlink = Path.unlink

    def busy(self: Path, missing_ok: bool = False) -> None:
        if self.parent.name == "replay":
            raise OSError(errno.EBUSY, "Device or resource busy", str(self))
        unlink(self, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", busy)
        play(ring, 150, generator)
        save(writer, ring, 100)
        play(ring, 250, generator)
        with pytest.warns(UserWarning, match="older checkpoints could not be removed: .*busy"):
            assert save(writer, ring, 200).is_dir()
    play(ring, 250, generator)
    save(writer, ring, 300)  # tries again
    named = json.loads((tmp_path / "checkpoints" / "000000000300" / "manifest.json").read_text())["segments"]
    assert len(list((tmp_path / "checkpoints" / "replay").iterdir())) == len(named)


@pytest.mark.parametrize("call", range(24))
def test_a_kill_at_any_moment_of_a_save_leaves_the_checkpoint_before(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends at the n-th thing that a save asks of the disk: nothing after that happens, nothing is tidied up."""

    class Killed(BaseException):
        pass

    generator, ring = np.random.default_rng(3), make_ring(capacity=200)
    writer = CheckpointWriter(tmp_path, keep=0)
    play(ring, 30, generator)
    save(writer, ring, 100)
    play(ring, 30, generator)
    asked = iter(range(10**6))

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if next(asked) >= call:
                raise Killed
            return function(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "unlink", "posix_fadvise"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        with contextlib.suppress(Killed):
            save(writer, ring, 200)
            assert next(asked) < call + 2, "a save does more than the moments tried here"
    sweep(tmp_path)
    published = sorted(
        (path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()), key=lambda path: path.name
    )
    assert published, "no checkpoint is left"
    for path in published:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, (size, sha256) in manifest["files"].items():
            verify_file(path / name, size, sha256)
        for entry in manifest["segments"]:
            verify_file(tmp_path / "checkpoints" / "replay" / entry[0], entry[1], entry[0])
    # And the next process can go on saving.
    play(ring, 30, generator)
    save(CheckpointWriter(tmp_path, keep=0), ring, 300)


def test_taking_a_checkpoint_draws_nothing_and_moves_nothing(tmp_path: Path) -> None:
    generator, ring = np.random.default_rng(4), make_ring(capacity=200)
    play(ring, 30, generator)
    before = {name: value.clone() for name, value in ring.state_dict().items() if isinstance(value, torch.Tensor)}
    rng = ring.state_dict()["rng"]
    save(CheckpointWriter(tmp_path, keep=1), ring, 100)
    after = ring.state_dict()
    assert after["rng"] == rng
    assert all(torch.equal(value, after[name]) for name, value in before.items())
