"""Checkpoints: a resumed run is the run that was never interrupted, bit for bit; what is on disk is whole, small and shared."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from growtrain.checkpoint import Checkpoint, open_newest
from growtrain.config import Config
from growtrain.replay.frame_ring import FrameRing
from growtrain.telemetry.sinks import read_jsonl
from growtrain.training import train

TIMES = {
    "wall_seconds",
    "frames_per_second",
    "updates_per_second",
    "seconds",
    "pause_seconds",
    "since_report",
    "resumes",
}


def tiny(**overrides: Any) -> Config:
    values: dict[str, Any] = {
        "game": "breakout",
        "schedule": "at:800,1600",
        "total_frames": 3_200,
        "num_envs": 4,
        "width": 32,
        "encoder_width": 0.25,
        "batch_size": 8,
        "learning_starts": 400,
        "epsilon_decay_frames": 1_000,
        "target_period": 640,
        "replay_capacity": 400,  # wraps within the run
        "eval_period": 1_600,
        "eval_frames": 160,
        "log_period": 500,
        "checkpoint_period": 0,
    }
    return Config(**(values | overrides))


def stop_after(*frames: int) -> Iterator[Callable[[], bool]]:
    """For each part of a run, a function that stops it when that many frames have been played in it."""
    for part in (*frames, 10**9):
        steps = iter(range(10**9))
        yield lambda steps=steps, part=part: next(steps) * 16 >= part  # type: ignore[misc]


def run_in_parts(config: Config, run_dir: Path, *frames: int) -> Checkpoint:
    """Plays a run, stopped and resumed after each of these numbers of frames; returns its last checkpoint."""
    start = None
    for should_stop in stop_after(*frames):
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
    config = checkpoint.config
    ring = FrameRing(config.replay_capacity, config.num_envs, rng=np.random.default_rng(0))
    ring.load_state_dict(checkpoint.state["ring"])
    checkpoint.load_frames(ring)
    return ring.frames


def assert_same_run(one: Path, other: Path) -> None:
    """Everything but times: networks, optimizer, replay, generators, counters, episodes, and the three files of records."""
    first, second = open_newest(one), open_newest(other)
    totals = [[total[:2] for total in checkpoint.state.pop("totals")] for checkpoint in (first, second)]
    assert totals[0] == totals[1]
    assert_same(without_times(first.state), without_times(second.state))
    assert torch.equal(replay_of(first), replay_of(second))
    for stem in ("metrics", "growth_events", "evaluations"):
        records = [without_times({"all": read_jsonl(run / f"{stem}.jsonl")})["all"] for run in (one, other)]
        assert [without_times(r) for r in records[0]] == [without_times(r) for r in records[1]], stem
        assert records[0], stem


VARIANTS = {
    "frozen": {},
    "sticky, mirrored, adam": {"sticky_actions": 0.25, "anchor": "mirrored", "optimizer": "adam"},
    "encoder frozen, spectral": {"freeze_encoder_at": 1, "normalization": "spectral", "max_grad_norm": 1.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_one_that_was_never_interrupted(variant: str, tmp_path: Path) -> None:
    config = tiny(**VARIANTS[variant])
    whole = run_in_parts(config, tmp_path / "whole")
    # Stopped while acting is random; before and after a growth; and between two records.
    parts = run_in_parts(dataclasses.replace(config, checkpoint_period=320), tmp_path / "parts", 208, 560, 912)
    assert whole.frames == parts.frames == 3_200
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    summary = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert [resume["frames"] for resume in summary["resumes"]] == [208, 768, 1680]
    assert summary["wall_seconds"] > read_jsonl(tmp_path / "parts" / "metrics.jsonl")[-1]["wall_seconds"] > 0
