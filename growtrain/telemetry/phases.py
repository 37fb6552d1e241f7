"""Named timers: where a run's wall-clock goes.

Units: seconds of `time.perf_counter`, which is monotonic and does not count suspended time on Linux. A timer never synchronises the
device, so work that a phase only enqueued on a GPU is charged to the phase that waits for it.
"""

from time import perf_counter
from typing import Final

TOTAL: Final = "total"


class Phases:
    """Accumulating timers by name, for one thread: `with phases("environment"): ...`.

    Phases nest; time is charged to the innermost one only, so the phases of `take` never add up to more than its total.
    """

    def __init__(self) -> None:
        self._timers: dict[str, _Timer] = {}
        self._stack: list[_Timer] = []
        self._mark = perf_counter()
        self._taken = self._mark

    def __call__(self, name: str) -> "_Timer":
        """The context that charges to `name`; made once and reused. Raises `ValueError` for the name `total`."""
        try:
            return self._timers[name]
        except KeyError:
            if name == TOTAL:
                raise ValueError(f"{TOTAL!r} is what take() calls the sum: name the phase otherwise") from None
            return self._timers.setdefault(name, _Timer(self))

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last `take` (or construction), and under `total` all seconds, timed or not.

        A phase that is open is charged up to now and goes on.
        """
        now = perf_counter()
        if self._stack:
            self._stack[-1].seconds += now - self._mark
            self._mark = now
        seconds = {name: timer.seconds for name, timer in self._timers.items()}
        for timer in self._timers.values():
            timer.seconds = 0.0
        seconds[TOTAL] = now - self._taken
        self._taken = now
        return seconds


class _Timer:
    """One phase. It holds no state of an entry, so it may be entered again while it is open."""

    __slots__ = ("_phases", "seconds")

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self.seconds = 0.0

    def __enter__(self) -> None:
        now, phases = perf_counter(), self._phases
        if phases._stack:
            phases._stack[-1].seconds += now - phases._mark
        phases._stack.append(self)
        phases._mark = now

    def __exit__(self, *exception: object) -> None:
        now, phases = perf_counter(), self._phases
        self.seconds += now - phases._mark
        phases._stack.pop()
        phases._mark = now
