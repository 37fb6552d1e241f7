"""Growth schedules: pure functions of the frame budget that say when to inject and how wide the network starts.

Source: Nikishin et al. 2023: one injection at 50M of 200M frames (section 5), "dynamic growth" against a network of full width.

To add a schedule, add a line to `_NAMED` or a case to `make_schedule`.

Units: frames.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from growtrain.config import ConfigError, format_count, parse_count


@dataclass(frozen=True)
class Schedule:
    """Injections at `injection_frames` (increasing, frames), on a head that starts `width_multiplier` times as wide."""

    injection_frames: tuple[int, ...] = ()
    width_multiplier: int = 1

    def due(self, frames: int, stage: int) -> bool:
        """Whether stage `stage + 1` should begin, after `frames` frames with `stage` injections done."""
        return stage < len(self.injection_frames) and frames >= self.injection_frames[stage]

    def stage_frames(self, total_frames: int) -> list[int]:
        """The length of each stage in frames; they sum to `total_frames`."""
        edges = (0, *self.injection_frames, total_frames)
        return [end - start for start, end in pairwise(edges)]


# name: (injections as fractions of the budget, width multiplier)
_NAMED: dict[str, tuple[tuple[float, ...], int]] = {
    "fixed": ((), 1),
    "grow1x": ((1 / 4,), 1),
    "grow3x": ((1 / 8, 1 / 4, 1 / 2), 1),
    "full1x": ((), 2),
    "full3x": ((), 4),
}


def make_schedule(name: str, total_frames: int, learning_starts: int = 0) -> Schedule:
    """The schedule of that name for a budget.

    Args:
        name: `fixed`, `grow1x`, `grow3x`, `full1x`, `full3x`, or `at:` and a comma-separated list of frames (25M) or fractions (0.125).
        total_frames: the budget in frames.
        learning_starts: frames before the first update; nothing may be injected before.

    Raises:
        ConfigError: one line that names the entry and the remedy.
    """
    if name in _NAMED:
        fractions, multiplier = _NAMED[name]
        times = tuple(math.floor(fraction * total_frames) for fraction in fractions)
    elif name.startswith("at:"):
        multiplier = 1
        times = tuple(_parse_time(entry.strip(), total_frames) for entry in name[3:].split(","))
    else:
        raise ConfigError(f"--schedule is {name!r}: choose one of {', '.join(_NAMED)}, or at:25M,50M or at:0.1,0.5")
    for previous, time in zip((0, *times), times, strict=False):
        if time >= total_frames:
            raise ConfigError(
                f"--schedule {name}: {time} is not before the end of --total-frames {total_frames}: inject earlier"
            )
        if time <= previous:
            reason = "is not after the start" if previous == 0 else f"does not come after {previous}"
            raise ConfigError(f"--schedule {name}: {time} {reason}: list increasing times above 0")
        if time <= learning_starts:
            raise ConfigError(
                f"--schedule {name}: injecting at {format_count(time)} frames comes before learning starts at "
                f"{format_count(learning_starts)}: inject later or lower --learning-starts"
            )
    return Schedule(times, multiplier)


def _parse_time(entry: str, total_frames: int) -> int:
    """A time in frames: `25M`, `100000`, or a fraction of the budget below 1 written with a point."""
    try:
        value = float(entry)
    except ValueError:
        return parse_count(entry)
    if "." in entry or "e" in entry.lower():
        if not 0 < value < 1:
            raise ConfigError(
                f"--schedule: {entry!r} is not a fraction between 0 and 1: write frames as 25M or 25000000"
            )
        return math.floor(value * total_frames)
    return parse_count(entry)
