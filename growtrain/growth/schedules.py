"""Growth schedules: pure functions of the frame budget that say when to inject, or do what else, and how wide the network starts.

Source: Nikishin et al. 2023: one injection at 50M of 200M frames (section 5), "dynamic growth" against a network of full width. `reset`,
`shrink-perturb` and `widen3x` are what it is compared with, at the times of `grow3x`; `redo` comes at every multiple of a period.

To add a schedule, add a line to `_NAMED` or a case to `make_schedule`.

Units: frames.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from growtrain.config import FRAME_SKIP, Config, ConfigError, Intervention, format_count, parse_count
from growtrain.growth.adaptive import Rule

# The redo schedule's period: 1,000 updates, as in the experiments of Sokar et al. 2023 (appendix, hyperparameters of ReDo). The argument's
# default in the authors' code, 200,000 (Dopamine, `labs/redo/weight_recyclers.py`), is set by none of its configurations.
# A fifth of a budget that is shorter than five of them, and then at least so many frames.
_REDO_UPDATES, _REDO_SHARE, _REDO_MINIMUM = 1_000, 5, 4_000
_DECISION_FRAMES = 500_000  # an adaptive decision takes as long as some 30k frames of training: a seventeenth of this


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
    def widens(self) -> bool:
        """Whether the live head gets wider at every intervention."""
        return self.intervention in ("widen", "net2wider")


_EIGHTHS = (1 / 8, 1 / 4, 1 / 2)
# name: (injections as fractions of the budget, width multiplier)
_NAMED: dict[str, tuple[tuple[float, ...], int]] = {
    "fixed": ((), 1),
    "grow1x": ((1 / 4,), 1),
    "grow3x": (_EIGHTHS, 1),
    "full1x": ((), 2),
    "full3x": ((), 4),
    "reset": (_EIGHTHS, 1),
    "shrink-perturb": (_EIGHTHS, 1),
    "widen3x": (_EIGHTHS, 1),
    "redo": ((), 1),
    "adaptive": ((), 1),
}
# The schedules that have an intervention of their own.
_OWN: dict[str, Intervention] = {
    "reset": "reset-head",
    "shrink-perturb": "shrink-perturb",
    "widen3x": "net2wider",
    "redo": "redo",
}


def schedule_of(config: Config) -> Schedule:
    """The schedule of a configuration; raises `ConfigError` where its parts cannot work together."""
    schedule = make_schedule(
        config.schedule,
        config.total_frames,
        config.learning_starts,
        config.intervention,
        config.redo_period,
        config.replay_ratio,
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


def _adaptive(config: Config) -> Schedule:
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
    replay_ratio: float = 0.25,
) -> Schedule:
    """The schedule of that name for a budget.

    Args:
        name: `fixed`, `grow1x`, `grow3x`, `full1x`, `full3x`, `reset`, `shrink-perturb`, `widen3x`, `redo`, or `at:` and a comma-separated
            list of frames (25M) or fractions (0.125).
        total_frames: the budget in frames.
        learning_starts: frames before the first update; nothing may be injected before.
        intervention: what happens at the times of `grow1x`, `grow3x` and `at:`.
        redo_period: frames between the interventions of `redo`; 0 is 1,000 updates, a fifth of a short budget.
        replay_ratio: updates per agent step.

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
    if name == "redo":
        usual = max(1, round(_REDO_UPDATES / replay_ratio * FRAME_SKIP))
        period = redo_period or min(usual, max(_REDO_MINIMUM, total_frames // _REDO_SHARE))
        times = tuple(range((learning_starts // period + 1) * period, total_frames, period))
        if not times:
            raise ConfigError(
                f"--schedule redo: no multiple of --redo-period {period} lies between --learning-starts {learning_starts} and "
                f"--total-frames {total_frames}: lower the period"
            )
    own = _OWN.get(name, intervention)
    if intervention not in ("inject", own) or (intervention != "inject" and not times):
        does = f"has its own, {own}" if times else "does nothing to the network"
        raise ConfigError(
            f"--intervention {intervention}: --schedule {name} {does}: leave it out, or choose grow1x, grow3x or at:..."
        )
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
    return Schedule(times, multiplier, own, periodic=name == "redo")


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
