"""What each stage of a run has taken, and what has happened since the last record.

Units: frames; seconds on a monotonic clock (`time.perf_counter`).
"""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from growtrain.telemetry.phases import Phases


@dataclass
class StageTotals:
    """What one stage has taken: frames, updates, and seconds of training, pauses excluded."""

    frames: int = 0
    updates: int = 0
    seconds: float = 0.0


class Accounts:
    """Frames, updates and seconds of one run, over all resumes.

    Args:
        num_stages: stages of the schedule; a periodic one has only one.
        pauses: phases in which training stands still.

    Attributes:
        phases: the timers to charge, `with accounts.phases("learn"): ...`.
        stages: totals by stage.
        frames_reported: counter at the last record.
    """

    def __init__(self, num_stages: int, pauses: Collection[str]) -> None:
        self.phases = Phases()
        self.stages = [StageTotals() for _ in range(num_stages)]
        self.frames_reported = self._updates_reported = 0
        self._pauses = pauses
        self._start = self._charged_at = self._reported_at = time.perf_counter()
        self._frames = self._updates = 0
        self._seconds: dict[str, float] = {}  # by phase, since the last record

    @property
    def wall_seconds(self) -> float:
        """Seconds since the start, those before an interruption included."""
        return time.perf_counter() - self._start

    def skip(self) -> None:
        """Lets the time since the last `charge`, or since the state was loaded, be nobody's: no clock has seen it."""
        self.phases.take()
        skipped = time.perf_counter() - self._charged_at
        self._charged_at += skipped
        self._reported_at += skipped
        self._start += skipped

    def charge(self, stage: int, frames: int, updates: int) -> None:
        """Charges a stage with what the counters and the clock have moved since the last call, less the pauses."""
        now, phases = time.perf_counter(), self.phases.take()
        for name, seconds in phases.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        total = self.stages[stage]
        total.seconds += now - self._charged_at - sum(phases.get(name, 0.0) for name in self._pauses)
        total.frames += frames - self._frames
        total.updates += updates - self._updates
        self._charged_at, self._frames, self._updates = now, frames, updates

    def close_interval(self) -> dict[str, Any]:
        """Ends the interval of a record with the last `charge`; its times and speeds, as `Metrics` names them."""
        now = time.perf_counter()
        elapsed = now - self._reported_at
        interval = {
            "wall_seconds": now - self._start,
            "frames_per_second": (self._frames - self.frames_reported) / elapsed,
            "updates_per_second": (self._updates - self._updates_reported) / elapsed,
            "seconds": {name: round(value, 4) for name, value in self._seconds.items()},
        }
        self._reported_at, self._seconds = now, {}
        self.frames_reported, self._updates_reported = self._frames, self._updates
        return interval

    def state_dict(self) -> dict[str, Any]:
        """Everything that later records depend on, after a `charge`; plain values."""
        now = time.perf_counter()
        return {
            "totals": [[total.frames, total.updates, total.seconds] for total in self.stages],
            "frames_reported": self.frames_reported,
            "updates_reported": self._updates_reported,
            "seconds": self._seconds,
            "since_report": now - self._reported_at,
            "wall_seconds": now - self._start,
        }

    def load_state_dict(self, state: dict[str, Any], frames: int, updates: int) -> None:
        """Restores what `state_dict` gave, at these counters; a fork may have other stages."""
        for total, values in zip(self.stages, state["totals"], strict=False):
            total.frames, total.updates, total.seconds = int(values[0]), int(values[1]), float(values[2])
        self.frames_reported, self._updates_reported = int(state["frames_reported"]), int(state["updates_reported"])
        self._frames, self._updates = frames, updates
        self._seconds = {str(name): float(seconds) for name, seconds in state["seconds"].items()}
        now = self._charged_at = time.perf_counter()
        self._reported_at, self._start = now - float(state["since_report"]), now - float(state["wall_seconds"])
