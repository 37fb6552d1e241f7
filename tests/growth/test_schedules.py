"""Schedules: golden times, and one helpful line for every impossible one."""

import pytest

from growtrain.config import ConfigError
from growtrain.growth.schedules import Schedule, make_schedule

M = 10**6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fixed", Schedule()),
        ("grow1x", Schedule((50 * M,))),
        ("grow3x", Schedule((25 * M, 50 * M, 100 * M))),
        ("full1x", Schedule((), 2)),
        ("full3x", Schedule((), 4)),
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
        ("grow2x", "grow2x"),
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
