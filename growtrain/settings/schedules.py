"""Growth schedules: pure functions of the frame budget that say when to inject, or do what else, and how wide the network starts.

Source: Nikishin et al. 2023: one injection at 50M of 200M frames (section 5), "dynamic growth" against a network of full width. `reset`,
`shrink-perturb` and `widen3x` are what it is compared with, at the times of `grow3x`; `redo` comes at every multiple of a period.

To add a schedule, add a line to `_NAMED` or a case to `_times`.

Units: frames.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from growtrain.settings.text import ConfigError, format_count, parse_count

if TYPE_CHECKING:
    from growtrain.settings.config import Config

# What each is and does stands in `growth.kinds`.
Intervention = Literal[
    "inject",
    "reset-head",
    "reset-encoder",
    "reset-all",
    "shrink-perturb",
    "widen",
    "net2wider",
    "redo",
    "fresh-optimizer",
]

# The redo schedule's period: 1,000 updates, as reimplementations of Sokar et al. 2023 have it. The argument's default in the authors' code,
# 200,000 (Dopamine, `labs/redo/weight_recyclers.py`), would recycle 62 times in 200M frames.
# A fifth of a budget that is shorter than five of them, and then at least so many frames.
_REDO_UPDATES, _REDO_SHARE, _REDO_MINIMUM = 1_000, 5, 4_000
_MOST_INJECTIONS, _MOST_REDONE = 1_000, 100_000  # each of the first is a stage, with costs of its own
_DECISION_FRAMES = 500_000  # an adaptive decision takes as long as some 30k frames of training: a seventeenth of this


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When the adaptive schedule injects (see `plasticity.adaptive`).

    Attributes:
        period: frames between decisions.
        min_gap: frames between injections, and before the first.
        max_injections: at most.
        threshold: gain of the injected copy that counts as lost plasticity.
        patience: decisions in a row that must say so.
    """

    period: int
    min_gap: int
    max_injections: int
    threshold: float
    patience: int


@dataclass(frozen=True)
class Schedule:
    """`intervention` at `injection_frames` (increasing, frames), on a head that starts `width_multiplier` times as wide.

    A schedule that is `periodic` has one stage, however often it intervenes. One with an `adaptive` rule decides as it goes; its
    `injection_frames` are the earliest that the rule allows, from which costs are planned.
    """

    injection_frames: tuple[int, ...] = ()
    width_multiplier: int = 1
    intervention: Intervention = "inject"
    periodic: bool = False
    adaptive: Rule | None = None

    def due(self, frames: int, stage: int) -> bool:
        """Whether stage `stage + 1` should begin, after `frames` frames with `stage` injections done; never known of an adaptive one."""
        return self.adaptive is None and stage < len(self.injection_frames) and frames >= self.injection_frames[stage]

    def stage_frames(self, total_frames: int) -> list[int]:
        """The length of each stage in frames; they sum to `total_frames`."""
        edges = (0, *(() if self.periodic else self.injection_frames), total_frames)
        return [end - start for start, end in pairwise(edges)]

    @property
    def num_stages(self) -> int:
        """How many stages a run has."""
        return 1 if self.periodic else 1 + len(self.injection_frames)

    def stage_after(self, interventions: int) -> int:
        """The stage that so many interventions lead to."""
        return 0 if self.periodic else interventions

    def describe(self) -> str:
        """What happens when, in words."""
        times = [format_count(frames) for frames in self.injection_frames]
        if self.adaptive:
            period = format_count(self.adaptive.period)
            return (
                f"at most {len(times)} injections, decided every {period}; planned at the earliest: {', '.join(times)}"
            )
        if not times:
            return "no injections"
        what = "injections" if self.intervention == "inject" else self.intervention
        when = f"{len(times)} times from {times[0]} to {times[-1]}" if self.periodic else f"at {', '.join(times)}"
        return f"{what} {when}"

    @property
    def intervenes(self) -> bool:
        """Whether it ever does anything to the network."""
        return self.periodic or self.num_stages > 1


_EIGHTHS = (1 / 8, 1 / 4, 1 / 2)
# name: (injections as fractions of the budget, width multiplier)
_NAMED: dict[str, tuple[tuple[float, ...], int]] = {
    "fixed": ((), 1),
    "grow1x": ((1 / 4,), 1),
    "reset": (_EIGHTHS, 1),
    "shrink-perturb": (_EIGHTHS, 1),
    "widen3x": (_EIGHTHS, 1),
    "redo": ((), 1),
    "adaptive": ((), 1),
}
_NUMBERED = re.compile(r"(grow|full)([1-9][0-9]?)x")
_KNOWN = "fixed, grow3x, full3x (any number), reset, shrink-perturb, widen3x, redo, adaptive, at:25M,50M, at:0.1,0.5, every:5M or at-switch"
# The schedules that have an intervention of their own.
_OWN: dict[str, Intervention] = {
    "reset": "reset-head",
    "shrink-perturb": "shrink-perturb",
    "widen3x": "net2wider",
    "redo": "redo",
}


def schedule_of(config: "Config") -> Schedule:
    """The schedule of a configuration; raises `ConfigError` where its parts cannot work together."""
    schedule = make_schedule(
        config.schedule,
        config.total_frames,
        config.learning_starts,
        config.intervention,
        config.redo_period,
        config.frame_skip / config.replay_ratio,
        config.switch_frames,
    )
    if config.schedule == "adaptive":
        schedule = _adaptive(config)
    name = f"--intervention {schedule.intervention}"
    if schedule.intervention == "net2wider" and config.normalization != "none":
        raise ConfigError(
            f"{name} cannot keep predictions with --normalization {config.normalization}: use --normalization none, or "
            "--intervention widen at the same times"
        )
    if schedule.intervention in ("widen", "net2wider", "redo") and config.activation != "relu":
        raise ConfigError(
            f"{name} knows one output for each unit, and --activation {config.activation} has two: use --activation relu"
        )
    if schedule.intervention in ("shrink-perturb", "widen", "net2wider", "redo") and config.keeps_initial_weights:
        raise ConfigError(
            f"{name} leaves no initial weights for --regularizer l2-init or --weight-projection nap to keep to: use "
            "--regularizer l2 or parseval"
        )
    if schedule.periodic and config.freeze_encoder_at:
        raise ConfigError(
            f"--freeze-encoder-at {config.freeze_encoder_at} counts stages, of which --schedule {config.schedule} has one: leave it out"
        )
    if schedule.intervention in ("reset-encoder", "reset-all") and config.freeze_encoder_at:
        raise ConfigError(
            f"{name} with --freeze-encoder-at {config.freeze_encoder_at} would freeze fresh weights: leave one of them out"
        )
    if schedule.intervention == "reset-encoder" and config.split == "conv1":
        raise ConfigError(f"{name} has no encoder to reset with --split conv1: use --intervention reset-all")
    return schedule


def copy_of_last(times: Sequence[int], target_period: int, after: int = 0) -> int:
    """The frames of the target's copy at which the last of `times` is carried out, each at a copy of its own after the frames `after`."""
    copies = after // target_period
    for time in times:
        copies = max(-(-time // target_period), copies + 1)
    return copies * target_period


def _adaptive(config: "Config") -> Schedule:
    """The schedule that decides as it goes."""
    short = min(config.total_frames // 10, _DECISION_FRAMES)
    period = config.adaptive_period or max(1, short, config.total_frames // 50)
    gap = config.adaptive_min_gap or max(1, config.total_frames // 8)
    first = max(gap, config.learning_starts + period)
    times = tuple(range(first, config.total_frames, gap))[: config.adaptive_max]
    if not times:
        raise ConfigError(
            f"--schedule adaptive: its first injection, at {format_count(first)} frames or later, lies beyond --total-frames "
            f"{config.total_frames}: lower --adaptive-min-gap or --learning-starts"
        )
    rule = Rule(
        period=period,
        min_gap=gap,
        max_injections=len(times),
        threshold=config.adaptive_threshold,
        patience=config.adaptive_patience,
    )
    return Schedule(times, adaptive=rule)


def make_schedule(
    name: str,
    total_frames: int,
    learning_starts: int = 0,
    intervention: Intervention = "inject",
    redo_period: int = 0,
    frames_per_update: float = 16.0,
    switches: tuple[int, ...] = (),
) -> Schedule:
    """The schedule of that name for a budget.

    Args:
        name: `fixed`, `growNx`, `fullNx`, `reset`, `shrink-perturb`, `widen3x`, `redo`, `at:` and a comma-separated list of frames (25M)
            or fractions (0.125), `every:` and a period, or `at-switch`. The times of `growNx` halve back from half the budget, but for
            `grow1x`, the paper's, at a quarter; `fullNx` has the width that `growNx` ends with.
        total_frames: the budget in frames.
        learning_starts: frames before the first update; nothing may be injected before.
        intervention: what happens at the times of `growNx`, `at:` and `every:`.
        redo_period: frames between the interventions of `redo`; 0 is 1,000 updates, a fifth of a short budget.
        frames_per_update: what an update is owed for.
        switches: the frames at which a chain of games switches.

    Raises:
        ConfigError: one line that names the entry and the remedy.
    """
    times, multiplier = _times(name, total_frames, learning_starts, switches)
    if name == "redo":
        usual = max(1, round(_REDO_UPDATES * frames_per_update))
        period = redo_period or min(usual, max(_REDO_MINIMUM, total_frames // _REDO_SHARE))
        times = _multiples(
            period, learning_starts, total_frames, f"--schedule redo: --redo-period {period}", at_most=_MOST_REDONE
        )
        if not times:
            raise ConfigError(
                f"--schedule redo: no multiple of --redo-period {period} lies between --learning-starts {learning_starts} and "
                f"--total-frames {total_frames}: lower the period"
            )
    own = _OWN.get(name, intervention)
    if intervention not in ("inject", own) or (intervention != "inject" and not times):
        does = f"has its own, {own}" if times else "does nothing to the network"
        raise ConfigError(
            f"--intervention {intervention}: --schedule {name} {does}: leave it out, or choose grow3x, at:... or every:..."
        )
    for previous, time in zip((0, *times), times, strict=False):
        if time >= total_frames:
            raise ConfigError(
                f"--schedule {name}: {time} is not before the end of --total-frames {total_frames}: inject earlier"
            )
        if time <= previous:
            reason = "is not after the start" if previous == 0 else f"does not come after {previous}"
            listed = name.startswith("at:")
            remedy = "list increasing times above 0" if listed else "inject fewer times, or raise --total-frames"
            raise ConfigError(f"--schedule {name}: {time} {reason}: {remedy}")
        if time <= learning_starts:
            raise ConfigError(
                f"--schedule {name}: injecting at {format_count(time)} frames comes before learning starts at "
                f"{format_count(learning_starts)}: inject later or lower --learning-starts"
            )
    return Schedule(times, multiplier, own, periodic=name == "redo")


def _times(
    name: str, total_frames: int, learning_starts: int, switches: tuple[int, ...]
) -> tuple[tuple[int, ...], int]:
    """The times of a schedule, in frames, and its width multiplier; those of `redo` and `adaptive` are found elsewhere."""
    if name in _NAMED:
        fractions, multiplier = _NAMED[name]
        return tuple(math.floor(fraction * total_frames) for fraction in fractions), multiplier
    if numbered := _NUMBERED.fullmatch(name):
        count = int(numbered[2])
        if numbered[1] == "full":
            return (), count + 1
        return tuple(math.floor(total_frames / 2**k) for k in range(count, 0, -1)), 1
    if name == "at-switch":
        if not switches:
            raise ConfigError(
                "--schedule at-switch: no game switches within the budget: name a chain, as --game minatar/space_invaders+asterix, "
                "or lower --switch-at"
            )
        return switches, 1
    if name.startswith("at:"):
        return tuple(_parse_time(entry.strip(), total_frames) for entry in name.removeprefix("at:").split(",")), 1
    if name.startswith("every:"):
        period = _count(name.removeprefix("every:"))
        if period <= 0:
            raise ConfigError(f"--schedule {name}: the period must be positive, as in every:5M")
        times = _multiples(period, learning_starts, total_frames, f"--schedule {name}", at_most=_MOST_INJECTIONS)
        if not times:
            raise ConfigError(
                f"--schedule {name}: no multiple of it lies between --learning-starts {learning_starts} and --total-frames "
                f"{total_frames}: shorten the period"
            )
        return times, 1
    raise ConfigError(f"--schedule is {name!r}: choose one of {_KNOWN}")


def _multiples(period: int, after: int, before: int, said: str, *, at_most: int) -> tuple[int, ...]:
    """The multiples of a period between two frames; raises `ConfigError`, which begins with what was `said`, for more than `at_most`."""
    times = range((after // period + 1) * period, before, period)
    if len(times) > at_most:
        raise ConfigError(f"{said}: that is {len(times)} times, of at most {at_most}: lengthen the period")
    return tuple(times)


def _parse_time(entry: str, total_frames: int) -> int:
    """A time in frames: `25M`, `100000`, or a fraction of the budget below 1 written with a point."""
    try:
        value = float(entry)
    except ValueError:
        return _count(entry)
    if "." in entry or "e" in entry.lower():
        if not 0 < value < 1:
            raise ConfigError(
                f"--schedule: {entry!r} is not a fraction between 0 and 1: write frames as 25M or 25000000"
            )
        return math.floor(value * total_frames)
    return _count(entry)


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except ConfigError as error:
        raise ConfigError(f"--schedule: {error}") from error
