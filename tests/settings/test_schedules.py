"""Schedules: golden times, and one helpful line for every impossible one."""

from typing import Any

import pytest

from growtrain.settings.config import Config
from growtrain.settings.schedules import Schedule, make_schedule, schedule_of
from growtrain.settings.text import ConfigError

M = 10**6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fixed", Schedule()),
        ("grow1x", Schedule((50 * M,))),
        ("grow3x", Schedule((25 * M, 50 * M, 100 * M))),
        ("full1x", Schedule((), 2)),
        ("full3x", Schedule((), 4)),
        ("reset", Schedule((25 * M, 50 * M, 100 * M), intervention="reset-head")),
        ("shrink-perturb", Schedule((25 * M, 50 * M, 100 * M), intervention="shrink-perturb")),
        ("widen3x", Schedule((25 * M, 50 * M, 100 * M), intervention="net2wider")),
        ("redo", Schedule(tuple(range(208_000, 200 * M, 16_000)), intervention="redo", periodic=True)),
        ("at:25M,50M", Schedule((25 * M, 50 * M))),
        ("at:0.1, 0.5", Schedule((20 * M, 100 * M))),
        ("at:500k,0.5,150_000_000", Schedule((M // 2, 100 * M, 150 * M))),
    ],
)
def test_named_and_listed_times(name: str, expected: Schedule) -> None:
    assert make_schedule(name, 200 * M, 200_000) == expected


@pytest.mark.parametrize(
    ("name", "names_the_entry"),
    [
        ("grow0x", "grow0x"),
        ("at:", "''"),
        ("at:0", "0"),
        ("at:0.0", "0.0"),
        ("at:-5M", "-5000000"),
        ("at:200M", "200000000"),
        ("at:1.5", "1.5"),
        ("at:50M,25M", "25000000"),
        ("at:25M,25M", "25000000"),
        ("at:soon", "soon"),
        ("at:100k", "100k"),  # before learning starts
        ("at:nan", "nan"),
    ],
)
def test_impossible_schedules_get_one_line(name: str, names_the_entry: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_schedule(name, 200 * M, 200_000)
    assert names_the_entry in str(raised.value)
    assert "\n" not in str(raised.value)


def test_due_is_a_pure_function_of_frames_and_stage() -> None:
    schedule = Schedule((100, 200))
    assert [schedule.due(f, 0) for f in (99, 100, 101)] == [False, True, True]
    assert [schedule.due(f, 1) for f in (100, 199, 200)] == [False, False, True]
    assert not schedule.due(10**9, 2)
    assert schedule.stage_frames(1000) == [100, 100, 800]


def test_redo_comes_at_every_multiple_of_its_period_after_learning_starts() -> None:
    schedule = make_schedule("redo", 20_000, 5_000, redo_period=2_000)
    assert schedule.injection_frames == tuple(range(6_000, 20_000, 2_000))
    assert schedule.stage_frames(20_000) == [20_000]
    assert schedule.num_stages == 1
    assert schedule.due(6_000, 0)
    assert not schedule.due(7_999, 1)
    # Short budgets are divided in five, and never too often to learn between.
    assert make_schedule("redo", 20_000).injection_frames == (4_000, 8_000, 12_000, 16_000)
    for replay_ratio, period in ((0.25, 16_000), (1.0, 4_000), (4.0, 1_000)):
        config = Config(schedule="redo", replay_ratio=replay_ratio, total_frames=M, learning_starts=32)
        first, second = schedule_of(config).injection_frames[:2]
        assert second - first == period
        assert period / 4 * replay_ratio == 1_000  # updates
    with pytest.raises(ConfigError, match="lower the period"):
        make_schedule("redo", 20_000, redo_period=20_000)


def test_an_intervention_happens_at_the_times_of_a_schedule_that_has_none_of_its_own() -> None:
    schedule = schedule_of(Config(schedule="at:0.1,0.5", intervention="shrink-perturb"))
    assert schedule == Schedule((20 * M, 100 * M), intervention="shrink-perturb")
    assert schedule_of(Config(schedule="reset", intervention="reset-head")).intervention == "reset-head"
    assert schedule_of(Config(intervention="widen", normalization="layer")).intervention == "widen"


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"schedule": "reset", "intervention": "redo"}, "has its own, reset-head: leave it out, or choose grow3x"),
        ({"schedule": "widen3x", "intervention": "widen"}, "has its own, net2wider: leave it out"),
        ({"schedule": "fixed", "intervention": "redo"}, "does nothing to the network: leave it out"),
        ({"schedule": "full3x", "intervention": "widen"}, "does nothing to the network: leave it out"),
        ({"schedule": "widen3x", "normalization": "layer"}, "use --normalization none, or --intervention widen"),
        ({"intervention": "net2wider", "normalization": "spectral"}, "use --normalization none"),
        (
            {"intervention": "reset-encoder", "freeze_encoder_at": 1},
            "would freeze fresh weights: leave one of them out",
        ),
        ({"intervention": "reset-all", "freeze_encoder_at": 3}, "would freeze fresh weights"),
        ({"intervention": "reset-encoder", "split": "conv1"}, "use --intervention reset-all"),
        ({"schedule": "redo", "freeze_encoder_at": 1}, "leave it out"),
        ({"split": "conv1", "freeze_encoder_at": 1}, "has no encoder to freeze"),
    ],
)
def test_what_cannot_work_together_is_said_at_the_start(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as raised:
        schedule_of(Config(**settings))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "times", "multiplier"),
    [
        ("grow1x", (50_000_000,), 1),  # the paper's
        ("grow2x", (50_000_000, 100_000_000), 1),
        ("grow3x", (25_000_000, 50_000_000, 100_000_000), 1),
        ("grow5x", (6_250_000, 12_500_000, 25_000_000, 50_000_000, 100_000_000), 1),
        ("full1x", (), 2),
        ("full5x", (), 6),
        ("every:60M", (60_000_000, 120_000_000, 180_000_000), 1),
    ],
)
def test_numbered_and_periodic_schedules(name: str, times: tuple[int, ...], multiplier: int) -> None:
    schedule = make_schedule(name, 200_000_000, learning_starts=200_000)
    assert (schedule.injection_frames, schedule.width_multiplier, schedule.intervention) == (
        times,
        multiplier,
        "inject",
    )
    assert schedule.num_stages == 1 + len(times)


@pytest.mark.parametrize("name", ["every:0", "every:300M", "every:soon", "grow99x"])
def test_a_period_that_never_comes_and_times_before_learning_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        make_schedule(name, 200_000_000, learning_starts=200_000)


def test_every_leaves_out_what_lies_before_learning() -> None:
    assert make_schedule("every:100k", 500_000, learning_starts=200_000).injection_frames == (300_000, 400_000)
