"""The adaptive schedule: its rule by hand, and a real run that decides, grows, and resumes as if it had never stopped."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from torch.utils.flop_counter import FlopCounterMode

from growtrain.analysis.runs import read_run, training_curve
from growtrain.diagnosis.copies import agent_of
from growtrain.plasticity.adaptive import decide
from growtrain.plasticity.learning_test import LearningTest, compare_copies, count_flops
from growtrain.records import Decision
from growtrain.runs.checkpoint import open_newest
from growtrain.runs.loop import train
from growtrain.settings.config import Config
from growtrain.settings.schedules import Rule, schedule_of
from growtrain.settings.text import ConfigError
from growtrain.telemetry.sinks import read_jsonl

RULE = Rule(period=10, min_gap=100, max_injections=2, threshold=0.1, patience=2)
FLAT, RISING = [5.0, 7.0, 5.0, 7.0], [15.0, 17.0, 15.0, 17.0]


def after(*steps: dict[str, Any]) -> Decision:
    """The last of successive decisions, 10 frames apart from frame 200 on, by default with lost plasticity and a flat score."""
    decision = None
    for number, step in enumerate(steps):
        values: dict[str, Any] = {"stage": 0, "last_injection": 0, "errors": (0.9, 0.8), "returns": FLAT}
        values |= {"episodes": number} | step
        decision = decide(RULE, frames=200 + 10 * number, before=decision, **values)
    assert decision is not None
    return decision


def test_it_injects_when_plasticity_is_lost_on_a_plateau_often_enough() -> None:
    decision = after({}, {}, {})  # the first knows no earlier score
    assert (decision.inject, decision.streak) == (True, 2)
    assert decision.gain == pytest.approx(0.5)  # 0.1 more of the 0.2 that the better one learned
    assert decision.score == 6.0
    assert decision.score_error == pytest.approx((4 / 3 / 4) ** 0.5)
    assert "gains 50.0%" in decision.reason


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([{}], "not known twice"),
        ([{}, {}], "1 of 2 decisions"),
        ([{}, {}, {"errors": (0.21, 0.2)}], "gains 1.2%, less than 10.0%"),
        ([{}, {"errors": (0.21, 0.2)}, {}], "1 of 2 decisions"),  # a streak begins anew
        ([{}, {"errors": (0.999, 0.989)}, {}], "1 of 2 decisions"),  # after a measurement that says nothing, too
        ([{}, {}, {"returns": RISING}], "the score is rising"),
        ([{"returns": []}, {"returns": []}, {"returns": []}], "not known twice"),
        ([{}, {}, {"episodes": 1}], "no episode has ended since"),  # the same score is no plateau then
        ([{}, {}, {"stage": 2}], "2 injections are the most"),
        ([{}, {}, {"stage": 1, "last_injection": 150}], "the last injection is less than 100 frames ago"),
        ([{"last_injection": 150}], "training began less than 100 frames ago"),
        ([{}, {}, {}, {}], "1 of 2 decisions"),  # what was injected has to be given time
        ([{}, {}, {"errors": (0.0, 0.0)}], "gains 0.0%"),
        ([{}, {}, {"errors": (0.999, 0.998)}], "neither learned more than 5%"),  # that is no sign of a healthy network
    ],
)
def test_it_does_not_inject_otherwise(steps: list[dict[str, Any]], reason: str) -> None:
    decision = after(*steps)
    assert not decision.inject
    assert reason in decision.reason


def test_the_two_windows_of_the_plateau_have_no_episode_in_common() -> None:
    """97 old episodes among the last 100 would hide that the three new ones score twice as much."""
    old, new = [5.0, 7.0] * 50, [13.0, 12.0, 11.0]
    decision = after({"returns": old, "episodes": 100}, {"returns": (old + new)[-100:], "episodes": 103})
    assert decision.score == pytest.approx((97 * 6 + 36) / 100, abs=0.02)
    assert (decision.score_before, decision.score_since, decision.score_episodes) == (6.0, 12.0, 100)
    assert not decision.plateau
    assert decision.reason == "the score is rising"


def test_the_error_of_the_plateau_is_that_of_the_difference() -> None:
    """Each mean has an error of 1/3, their difference one of sqrt(2)/3 = 0.47: a rise of 0.4 is within it."""
    before = [5.0, 7.0, 5.0, 7.0] + [6.0] * 4
    before = [6 + (value - 6) * (8 / 4 * 7 / 9) ** 0.5 for value in before]
    for rise, plateau in ((0.4, True), (0.5, False)):
        since = [value + rise for value in before]
        decision = after({"returns": before, "episodes": 8}, {"returns": before + since, "episodes": 16})
        assert decision.score_since == pytest.approx(6 + rise)
        assert decision.rise_error == pytest.approx(2**0.5 / 3)
        assert decision.plateau == plateau


def test_two_episodes_alone_say_nothing_of_a_plateau() -> None:
    decision = after({"returns": [5.0], "episodes": 1}, {"returns": [5.0, 5.0], "episodes": 2})
    assert not decision.plateau
    assert "not known twice" in decision.reason


def test_a_falling_score_is_a_plateau_too() -> None:
    assert after({"returns": RISING}, {}, {}).inject


SETTINGS: dict[str, Any] = {
    "game": "breakout",
    "schedule": "adaptive",
    "max_episode_frames": 160,  # so that there are scores
    "epsilon_decay_frames": 300,
    "log_period": 160,
    "adaptive_period": 200,
    "adaptive_min_gap": 300,
    "adaptive_max": 2,
    "adaptive_patience": 1,
}


def config_of(**changes: Any) -> Config:
    return tiny(**SETTINGS | changes)


def test_the_schedule_is_planned_at_the_earliest_and_impossible_ones_are_refused() -> None:
    schedule = schedule_of(config_of())
    assert schedule.injection_frames == (400, 700)
    assert not schedule.due(1_000, 0)
    assert "at most 2 injections" in schedule.describe()
    with pytest.raises(ConfigError, match="--adaptive-min-gap"):
        schedule_of(config_of(adaptive_min_gap=1_600))
    with pytest.raises(ConfigError, match="--adaptive-max"):
        config_of(adaptive_max=0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    brief = LearningTest(seeds=1, transitions=16, updates=4, warm_up=1, marks=1)
    monkeypatch.setattr("growtrain.runs.growing.DECIDING", brief)
    monkeypatch.setattr("growtrain.runs.growing.compare_copies", compare)
    monkeypatch.setattr("growtrain.runs.growing.count_flops", lambda *_: 1)


def compare(*arguments: Any, **options: Any) -> dict[str, list[list[float]]]:
    """The real measurement, a certain loss of plasticity from 600 frames on: what is tested is what follows from it."""
    from growtrain.plasticity import learning_test

    errors = learning_test.compare_copies(*arguments, **options)
    seed = arguments[3]
    return {"current": [[1.0]], "inject": [[0.5]]} if seed.spawn_key[-1] >= 600 else errors


def reached(seen: list[int], frames: int) -> bool:
    return seen[-1] >= frames


def test_a_run_decides_grows_and_resumes_as_if_it_had_never_stopped(quick: None, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run_dir in (whole, parts):
        start = None
        for stop_at in [400, 1_000, 10**9] if run_dir == parts else [10**9]:
            seen = [0]
            for record in train(
                config_of(), run_dir, should_stop=functools.partial(reached, seen, stop_at), start=start
            ):
                seen.append(record.frames)
            start = open_newest(run_dir)
    decisions = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_jsonl(run_dir / "decisions.jsonl")]
        for run_dir in (whole, parts)
    ]
    assert decisions[0] == decisions[1]
    assert [line["frames"] for line in decisions[0]] == [400, 600, 800, 1_000, 1_200, 1_400, 1_600]
    first, second = (open_newest(run_dir).state["learner"]["online"] for run_dir in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    grown = [line["frames"] for line in decisions[0] if line["inject"]]
    assert len(grown) == 2
    events = read_jsonl(whole / "growth_events.jsonl")
    assert [event["frames"] for event in events] == grown
    assert all("a fresh head gains" in event["reason"] for event in events)


def test_when_it_injects_does_not_depend_on_how_often_is_logged(quick: None, tmp_path: Path) -> None:
    decisions = []
    for log_period in (160, 5_000):
        run_dir = tmp_path / str(log_period)
        list(train(config_of(log_period=log_period), run_dir))
        lines = read_jsonl(run_dir / "decisions.jsonl")
        decisions.append([{name: value for name, value in line.items() if name != "seconds"} for line in lines])
    assert decisions[0] == decisions[1]
    assert sum(line["inject"] for line in decisions[0]) == 2
    assert decisions[0][-1]["episodes"] > decisions[0][0]["episodes"] > 0


def test_scores_of_two_games_of_a_chain_are_not_compared(quick: None, tmp_path: Path) -> None:
    pytest.importorskip("minatar")
    list(train(config_of(game="minatar/breakout+asterix"), tmp_path / "run"))
    before = {line["frames"]: line["score_before"] for line in read_jsonl(tmp_path / "run" / "decisions.jsonl")}
    assert [frames for frames, score in before.items() if score is None] == [400, 1_000]  # the first of each game


def test_a_decision_says_what_it_has_cost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_dir, test = tmp_path / "run", LearningTest(seeds=2, transitions=16, updates=5, warm_up=3, marks=2)
    monkeypatch.setattr("growtrain.runs.growing.DECIDING", test)
    list(train(config_of(adaptive_patience=99), run_dir))
    checkpoint = open_newest(run_dir)
    learner, ring = agent_of(checkpoint, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        compare_copies(learner, ring, test, np.random.SeedSequence(7), ("current", "inject"))
    expected = count_flops(learner, ring, test, ("current", "inject"))
    assert expected == counter.get_total_flops() > 0
    run = read_run(run_dir, "run")
    assert run.flops_of_decisions == [expected] * len(read_jsonl(run_dir / "decisions.jsonl"))
    curve = training_curve(run, run.stage_costs)
    np.testing.assert_allclose(curve.flops[-1], run.total_flops)
    bare = dataclasses.replace(run, decisions=[])
    assert run.total_flops - bare.total_flops == sum(run.flops_of_decisions)
    earlier = [{k: v for k, v in decision.items() if k != "flops"} for decision in run.decisions]
    assert math.isnan(dataclasses.replace(run, decisions=earlier).total_flops)


def test_measuring_changes_nothing_in_the_run(quick: None, tmp_path: Path) -> None:
    never = {"adaptive_patience": 99}
    list(train(config_of(**never), tmp_path / "adaptive"))
    list(train(dataclasses.replace(config_of(), schedule="fixed"), tmp_path / "fixed"))
    first, second = (open_newest(tmp_path / name).state["learner"]["online"] for name in ("adaptive", "fixed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(line["inject"] for line in read_jsonl(tmp_path / "adaptive" / "decisions.jsonl"))
