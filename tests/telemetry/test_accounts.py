"""Accounts, on a clock that is moved by hand."""

import pytest

from growtrain.telemetry import accounts, phases
from growtrain.telemetry.accounts import Accounts


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(accounts.time, "perf_counter", clock)
    monkeypatch.setattr(phases, "perf_counter", clock)
    return clock


def spend(kept: Accounts, clock: Clock, phase: str, seconds: float) -> None:
    with kept.phases(phase):
        clock.now += seconds


def test_a_stage_is_charged_with_its_training_and_not_with_pauses(clock: Clock) -> None:
    kept = Accounts(2, ("evaluation",))
    spend(kept, clock, "learn", 3.0)
    clock.now += 1.0  # in no phase
    kept.charge(0, 80, 5)
    spend(kept, clock, "evaluation", 10.0)
    spend(kept, clock, "learn", 2.0)
    kept.charge(1, 120, 9)
    assert [(s.frames, s.updates, s.seconds) for s in kept.stages] == [(80, 5, 4.0), (40, 4, 2.0)]
    assert kept.wall_seconds == 16.0


def test_an_interval_begins_where_the_last_one_ended(clock: Clock) -> None:
    kept = Accounts(1, ())
    spend(kept, clock, "learn", 4.0)
    kept.charge(0, 80, 8)
    first = kept.close_interval()
    assert (first["frames_per_second"], first["updates_per_second"], first["wall_seconds"]) == (20.0, 2.0, 4.0)
    assert first["seconds"] == {"learn": 4.0, "total": 4.0}
    spend(kept, clock, "act", 1.0)
    kept.charge(0, 90, 8)
    second = kept.close_interval()
    assert (second["frames_per_second"], second["updates_per_second"], kept.frames_reported) == (10.0, 0.0, 90)
    assert second["seconds"] == {"learn": 0.0, "act": 1.0, "total": 1.0}


def test_what_was_kept_goes_on_and_the_way_back_is_no_training(clock: Clock) -> None:
    kept = Accounts(2, ())
    spend(kept, clock, "learn", 4.0)
    kept.charge(0, 80, 8)
    state = kept.state_dict()
    clock.now += 1000.0  # the process is gone
    restored = Accounts(3, ())  # a fork may have more stages
    spend(restored, clock, "learn", 50.0)
    restored.load_state_dict(state, 80, 8)
    clock.now += 7.0  # the replay is read
    restored.skip()
    spend(restored, clock, "learn", 2.0)
    restored.charge(1, 100, 10)
    assert [(s.frames, s.updates, s.seconds) for s in restored.stages] == [(80, 8, 4.0), (20, 2, 2.0), (0, 0, 0.0)]
    interval = restored.close_interval()
    assert (interval["wall_seconds"], interval["frames_per_second"]) == (6.0, 100 / 6)
    assert interval["seconds"] == {"learn": 6.0, "total": 6.0}
