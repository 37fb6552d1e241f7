"""Phases: who is charged, on a clock that the test moves."""

import time

import pytest

from growtrain.telemetry import phases as module
from growtrain.telemetry.phases import Phases


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "perf_counter", clock)
    return clock


def test_seconds_accumulate_by_name_and_total_includes_untimed(clock: Clock) -> None:
    phases = Phases()
    for _ in range(3):
        with phases("learn"):
            clock.now += 2
        clock.now += 0.5
    with phases("act"):
        clock.now += 1
    assert phases.take() == {"learn": 6, "act": 1, "total": 8.5}


def test_take_starts_again_from_zero(clock: Clock) -> None:
    phases = Phases()
    with phases("learn"):
        clock.now += 2
    phases.take()
    clock.now += 4
    assert phases.take() == {"learn": 0, "total": 4}


def test_nested_time_goes_to_the_innermost_only(clock: Clock) -> None:
    phases = Phases()
    with phases("outer"):
        clock.now += 1
        with phases("inner"):
            clock.now += 10
            with phases("outer"):  # entered again while it is open
                clock.now += 100
            clock.now += 1000
        clock.now += 10000
    assert phases.take() == {"outer": 10101, "inner": 1010, "total": 11111}


def test_take_splits_an_open_phase(clock: Clock) -> None:
    phases = Phases()
    with phases("learn"):
        clock.now += 3
        assert phases.take() == {"learn": 3, "total": 3}
        clock.now += 4
    assert phases.take() == {"learn": 4, "total": 4}


def test_an_exception_closes_the_phase_and_passes(clock: Clock) -> None:
    phases = Phases()

    def fail() -> None:
        with phases("learn"):
            clock.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 5
    with phases("act"):
        clock.now += 1
    assert phases.take() == {"learn": 1, "act": 1, "total": 7}


def test_the_name_total_is_taken() -> None:
    with pytest.raises(ValueError, match="total"):
        Phases()("total")


def test_contexts_are_reused_and_cheap() -> None:
    phases = Phases()
    assert phases("learn") is phases("learn")
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(2000):
            with phases("learn"):
                pass
        best = min(best, (time.perf_counter() - start) / 2000)
    assert best < 10e-6  # about 0.5 us on an idle machine; the bound leaves room for a busy one


def test_real_clock() -> None:
    phases = Phases()
    with phases("sleep"):
        time.sleep(0.02)
    taken = phases.take()
    assert 0.02 <= taken["sleep"] <= taken["total"]
