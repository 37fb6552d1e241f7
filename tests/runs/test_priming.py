"""Heavy priming: many updates on the first transitions, before anything more is played."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from growtrain.environments.make import spec_of
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.planning.costs import make_plan
from growtrain.replay.frames import FrameRing
from growtrain.replay.ring import Batch
from growtrain.runs.checkpoint import open_newest
from growtrain.runs.loop import train
from growtrain.runs.run import Run
from growtrain.settings.budget import updates_due
from growtrain.settings.config import Config
from tests.tiny import tiny

# In play a copy comes after 25 updates.
PRIMED = tiny(priming_updates=180, total_frames=800, schedule="at:400", log_period=80)


def test_nothing_is_played_until_all_updates_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, copies = [], []
    prime, copy_target = Run.prime, DoubleDQN.copy_target

    def watched(run: Run) -> bool:
        primed = prime(run)
        seen.append((run.frames, run.learner.updates))
        return primed

    def counted(learner: DoubleDQN) -> None:
        copies.append(learner.updates)
        copy_target(learner)

    monkeypatch.setattr(Run, "prime", watched)
    monkeypatch.setattr(DoubleDQN, "copy_target", counted)
    list(train(PRIMED, tmp_path))
    assert {frames for frames, updates in seen if 0 < updates < 180} == {200}
    assert [updates for frames, updates in seen if frames == 208] == [180]  # the step after it owes the next update
    assert [updates for updates in copies if updates <= 180] == [25, 50, 75, 100, 125, 150, 175]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["updates"] == updates_due(PRIMED, 200) == 180 + 150 // 4
    assert [stage["updates"] for stage in summary["stages"]] == [180 + 12, 25]
    assert [stage.updates for stage in make_plan(PRIMED, spec_of(PRIMED)).stages] == [180 + 12, 25]


def test_stopped_while_it_primes_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    list(train(PRIMED, whole))
    calls = iter(range(10**6))
    list(train(PRIMED, halves, should_stop=lambda: next(calls) >= 30))
    checkpoint = open_newest(halves)
    assert checkpoint.frames == 200
    assert 0 < checkpoint.state["learner"]["updates"] < 180
    list(train(PRIMED, halves, start=checkpoint))
    ours, theirs = (open_newest(run).state["learner"]["online"] for run in (whole, halves))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_stopped_again_and_again_while_it_primes_it_gets_on(tmp_path: Path) -> None:
    """Checkpoints bear the frames played, which stay what they are: each takes the place of the one before."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    list(train(PRIMED, whole))
    done, start = [], None
    for stop in (27, 2, 2, 10**6):
        calls = itertools.count()
        list(train(PRIMED, parts, should_stop=lambda calls=calls, stop=stop: next(calls) >= stop, start=start))
        start = open_newest(parts)
        done.append((start.frames, start.state["learner"]["updates"]))
    assert done[:3] == [(200, 50), (200, 100), (200, 150)]
    ours, theirs = (open_newest(run).state["learner"]["online"] for run in (whole, parts))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert not list((parts / "checkpoints").glob(".*"))


def test_updates_are_done_in_pieces_even_where_learning_starts_with_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their batches are drawn together: how many bounds the memory, which the plan counts."""
    config = dataclasses.replace(PRIMED, learning_starts=796, schedule="fixed", target_period=10_000)
    drawn, sample = [], FrameRing.sample_batches

    def counted(ring: FrameRing, num: int, size: int) -> list[Batch]:
        drawn.append(num)
        return sample(ring, num, size)

    monkeypatch.setattr(FrameRing, "sample_batches", counted)
    list(train(config, tmp_path))
    assert drawn == [64, 64, 52]
    spec = spec_of(config)
    primed, plain = (make_plan(dataclasses.replace(config, priming_updates=n), spec).memory.batch for n in (180, 0))
    assert primed - plain == (64 - 1) * config.batch_size * 5 * 84 * 84


def test_stopped_while_it_primes_at_its_end_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = dataclasses.replace(PRIMED, learning_starts=796, schedule="fixed")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    list(train(config, whole))
    calls = itertools.count()  # one for each of its 100 steps, and for each piece of the priming after them
    list(train(config, halves, should_stop=lambda: next(calls) > 100))
    checkpoint = open_newest(halves)
    assert (checkpoint.frames, checkpoint.state["learner"]["updates"]) == (800, 25)
    assert json.loads((halves / "summary.json").read_text())["status"] == "stopped"
    list(train(config, halves, start=checkpoint))
    assert json.loads((halves / "summary.json").read_text())["status"] == "done"
    ours, theirs = (open_newest(run).state["learner"]["online"] for run in (whole, halves))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_without_it_is_the_run_that_it_was_before_there_was_any() -> None:
    plain = tiny()
    values = plain.to_dict()
    del values["priming_updates"]
    assert Config.from_dict(values) == plain
    assert plain.fingerprint() != tiny(priming_updates=1).fingerprint()
