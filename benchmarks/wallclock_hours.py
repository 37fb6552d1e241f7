"""From what `run_wallclock.py` measured to hours: arithmetic on its raw JSON; nothing is measured here.

The claim examined is Nikishin et al. 2023, section 5 ("dynamic growth": a small network grown by plasticity injection saves about 20 hours
of wall-clock on one A100 against a network of full width), with everything that growing costs charged to it.

An arm's time is the sum of: frames before learning at the speed of random play; the frames of each stage at that stage's speed; the pause
of each growth and what the first steps after it take longer (compilation or capture); evaluations, checkpoints and diagnostics at what they
took with that stage's network; records; start-up. All cells ran in turn within each repeat. A saving is always a difference within one
repeat; what is stated of it, in hours and as a share, is the median of the repeats, as it is of a total. So savings need not be the
difference of two totals, nor totals the sum of their parts, which are of each cell's median speed. Intervals are the least and the greatest
of the repeats.

Units: frames, seconds, hours, watts, kilowatt-hours; GPU utilisation in percent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

PAPER_HOURS = 20.0  # Nikishin et al. 2023, section 5: saved on one A100
TOLERANCE = 0.05  # of a projection against a complete run

Raw = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run has to do, by stage where it is a list.

    Attributes:
        warmup_frames: frames played at random before the first update.
        stage_frames: frames after that, per stage.
        evaluations: evaluations per stage, taken to need `eval_frames` frames each.
        checkpoints: checkpoints per stage.
        checkpoint_transitions: transitions that all checkpoints together add to those before them.
        records: lines of metrics.
        diagnostics: of the network's plasticity, per stage, beside those around a growth.
        sweep_rows: of the replay that the growth before each stage computes what is frozen for.
    """

    warmup_frames: int
    stage_frames: list[int]
    evaluations: list[int]
    eval_frames: int
    checkpoints: list[int]
    checkpoint_transitions: int
    records: int
    diagnostics: list[int] = field(default_factory=list)  # early results do not have them
    sweep_rows: list[int] = field(default_factory=list)  # nor these


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What it costs on a machine, by stage where it is a list.

    Attributes:
        warmup_speed, speeds: frames per second of random play, and of training.
        growth_seconds: of the growth that leads to the stage; 0 for the first.
        evaluations: seconds of an evaluation as a line over its frames.
        checkpoint_seconds: of a checkpoint with no new transitions.
        seconds_per_transition: more for each new transition.
        record_seconds, startup_seconds: of a line of metrics, and from nothing to the first frame.
        diagnostics_seconds: of a measure of the network's plasticity.
        seconds_per_row: of the replay's sweep that comes with the growth.
    """

    warmup_speed: float
    speeds: list[float]
    growth_seconds: list[float]
    evaluations: list["Line"]
    checkpoint_seconds: list[float]
    seconds_per_transition: float
    record_seconds: float
    startup_seconds: float
    diagnostics_seconds: list[float]
    seconds_per_row: list[float]


@dataclass(frozen=True)
class Line:
    """Seconds as `fixed + slope * amount`."""

    fixed: float
    slope: float

    def at(self, amount: float) -> float:
        """Seconds for an amount."""
        return self.fixed + self.slope * amount


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Seconds of a run by what they are spent on; `stages` is training proper, warm-up excluded."""

    startup: float
    warmup: float
    stages: list[float]
    growth: float
    evaluation: float
    checkpoints: float
    records: float  # metrics and diagnostics

    @property
    def training(self) -> float:
        """Warm-up and all stages."""
        return self.warmup + sum(self.stages)

    @property
    def total(self) -> float:
        """Everything."""
        return self.training + self.startup + self.growth + self.evaluation + self.checkpoints + self.records


class Reaching(NamedTuple):
    """The full width at which a saving reaches a threshold; None where it does not, and how that is known."""

    width: float | None
    how: str


def project(work: Work, costs: Costs) -> Projection:
    """The time of a run, part by part."""
    return Projection(
        startup=costs.startup_seconds,
        warmup=work.warmup_frames / costs.warmup_speed,
        stages=[frames / speed for frames, speed in zip(work.stage_frames, costs.speeds, strict=True)],
        growth=sum(costs.growth_seconds)
        + sum(n * s for n, s in zip(work.sweep_rows, costs.seconds_per_row, strict=False)),
        evaluation=sum(n * e.at(work.eval_frames) for n, e in zip(work.evaluations, costs.evaluations, strict=True)),
        checkpoints=sum(n * s for n, s in zip(work.checkpoints, costs.checkpoint_seconds, strict=True))
        + costs.seconds_per_transition * work.checkpoint_transitions,
        records=work.records * costs.record_seconds
        + sum(n * s for n, s in zip(work.diagnostics, costs.diagnostics_seconds, strict=False)),
    )


def width_reaching(points: Sequence[tuple[int, float]], threshold: float) -> Reaching:
    """Where the saving reaches a threshold, linearly between the two measured widths around it, or beyond the last two.

    Args:
        points: (full width, hours saved), at least one.
        threshold: hours.
    """
    points = sorted(points)
    if points[0][1] >= threshold:
        return Reaching(float(points[0][0]), "at most (the narrowest measured saves as much)")
    for (w0, h0), (w1, h1) in pairwise(points):
        if h0 < threshold <= h1:
            return Reaching(w0 + (threshold - h0) / (h1 - h0) * (w1 - w0), "interpolated")
    if len(points) == 1:
        return Reaching(None, "not reached at the one width measured")
    (w0, h0), (w1, h1) = points[-2:]
    if h1 <= h0:
        return Reaching(None, f"not reached up to {w1}, and the saving does not grow with the width")
    return Reaching(w1 + (threshold - h1) / (h1 - h0) * (w1 - w0), f"extrapolated beyond {w1}")


# --- the raw JSON -> costs


def costs_of(stack: Raw, arm: Raw, repeat: int | None = None, *, compiled: bool = False) -> Costs:
    """The costs of an arm in a stack: from the medians of the repeats, or with the speeds of one repeat.

    Args:
        stack: raw.
        arm: raw.
        repeat: whose speeds; None for medians.
        compiled: of a run in a process that has compiled the updates of all its stages. What first steps take longer is left out, too, for
            that is compilation, except where it is the capture of a CUDA graph, which every network has of its own.
    """
    cells = [stack["cells"][key] for key in arm["cells"]]
    excess = [0.0 if compiled and stack["execution"] != "CUDA graph" else _excess(cell) for cell in cells]
    compilation = 0.0 if compiled else cells[0]["compile_seconds"]
    warmup = [window["frames"] / window["seconds"] for window in stack["warmup"]]
    empty, filled = stack["checkpoints"]
    new = filled["transitions"] - empty["transitions"]
    return Costs(
        warmup_speed=median(warmup),
        speeds=[median(speeds(cell)) if repeat is None else speeds(cell)[repeat] for cell in cells],
        growth_seconds=[0.0, *(_pause(stack, arm, stage) + excess[stage] for stage in range(1, len(cells)))],
        evaluations=[_evaluation(stack, cell, repeat) for cell in cells],
        checkpoint_seconds=[cell["checkpoint_seconds"] for cell in cells],
        seconds_per_transition=max(0.0, filled["seconds"] - empty["seconds"]) / new if new > 0 else 0.0,
        record_seconds=median(stack["record_seconds"]),
        startup_seconds=stack["startup_seconds"] + compilation + excess[0],
        diagnostics_seconds=[cell.get("diagnostics_seconds", 0.0) for cell in cells],
        seconds_per_row=[0.0, *(_seconds_per_row(stack, arm, stage) for stage in range(1, len(cells)))],
    )


def _evaluation(stack: Raw, cell: Raw, repeat: int | None) -> Line:
    """Evaluations with a cell's network: their start is the same in all cells, and the rest goes with their frames.

    Early results have one evaluation of a cell, which then is that of every repeat.
    """
    starts = [each["start_seconds"] for other in stack["cells"].values() for each in other["evaluations"]]
    slopes = [each["seconds"] / each["frames"] for each in cell["evaluations"]]
    return Line(median(starts), median(slopes) if repeat is None else slopes[min(repeat, len(slopes) - 1)])


def speeds(cell: Raw) -> list[float]:
    """Frames per second of each repeat."""
    return [window["frames"] / window["seconds"] for window in cell["repeats"]]


def num_repeats(stack: Raw, arm: Raw) -> int:
    """Repeats that all of an arm's cells have."""
    return min(len(stack["cells"][key]["repeats"]) for key in arm["cells"])


def _pause(stack: Raw, arm: Raw, stage: int) -> float:
    """Median pause of all growths to this stage and kind."""
    pauses: list[float] = [stack["cells"][key]["growth_seconds"][stage - 1] for key in arm["cells"][stage:]]
    return median(pauses)


def _seconds_per_row(stack: Raw, arm: Raw, stage: int) -> float:
    """Median of all sweeps of the replay that came with a growth to this stage and kind; 0 without any."""
    later = [stack["cells"][key].get("sweeps", []) for key in arm["cells"][stage:]]
    swept = [sweeps[stage - 1] for sweeps in later if sweeps]
    return median([each["seconds"] / each["rows"] for each in swept if each["rows"]] or [0.0])


def _excess(cell: Raw) -> float:
    """What the first step of a fresh network, and the first after a copy of the target, took beyond steady ones."""
    steady: float = median(window["seconds"] / window["steps"] for window in cell["repeats"])
    return sum(max(0.0, float(seconds) - steady) for seconds in cell["first_step_seconds"])


def projection_of(raw: Raw, arm: Raw, repeat: int | None = None) -> Projection:
    """An arm's projection to its full budget."""
    return project(Work(**arm["work"]), costs_of(raw["stacks"][arm["stack"]], arm, repeat))


def baseline_of(raw: Raw, arm: Raw) -> Raw:
    """The full-width arm that an arm is compared with."""
    same = ("stack", "width", "full_width")
    return next(a for a in raw["arms"] if a["baseline"] and all(a[key] == arm[key] for key in same))


def total_hours(raw: Raw, arm: Raw) -> list[float]:
    """Hours of an arm in each repeat."""
    repeats = range(num_repeats(raw["stacks"][arm["stack"]], arm))
    return [projection_of(raw, arm, repeat).total / 3600 for repeat in repeats]


def saved_hours(raw: Raw, arm: Raw) -> list[float]:
    """Hours that an arm saves against its baseline in each repeat."""
    return [
        full - own for full, own in zip(total_hours(raw, baseline_of(raw, arm)), total_hours(raw, arm), strict=True)
    ]


def saved_shares(raw: Raw, arm: Raw) -> list[float]:
    """Share of the baseline's hours that an arm saves in each repeat, which a machine that is not always equally fast blurs least."""
    full = total_hours(raw, baseline_of(raw, arm))
    return [saved / hours for saved, hours in zip(saved_hours(raw, arm), full, strict=True)]


def gpu_mean(raw: Raw, arm: Raw, field: str) -> float | str:
    """Mean of a GPU field over an arm's training, each stage weighted by its projected time; a string where it is unavailable."""
    stack, weights = raw["stacks"][arm["stack"]], projection_of(raw, arm).stages
    values: list[float] = []
    for key in arm["cells"]:
        found = [value for window in stack["cells"][key]["repeats"] for value in [_gpu_value(window["gpu"], field)]]
        numbers = [value for value in found if not isinstance(value, str)]
        if not numbers:
            return str(found[0])
        values.append(median(numbers))
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def _gpu_value(gpu: Raw, field: str) -> float | str:
    if not gpu["available"]:
        return f"unavailable: {gpu['reason']}"
    if field == "watts":
        joules = gpu["energy_joules"]
        if isinstance(joules, str) or not gpu["seconds"]:
            return joules if isinstance(joules, str) else "unavailable: one sample only"
        return float(joules / gpu["seconds"])
    value = gpu[field]
    return value if isinstance(value, str) else float(value)


def busy_share(raw: Raw, arm: Raw) -> float | str:
    """Share of the training time in which a kernel or a copy ran: kernel time per frame, profiled, x frames per second, not profiled."""
    stack, weights = raw["stacks"][arm["stack"]], projection_of(raw, arm).stages
    shares: list[float] = []
    for key in arm["cells"]:
        cell = stack["cells"][key]
        busy = cell["busy"]
        if not busy["available"]:
            return f"unavailable: {busy['reason']}"
        shares.append(busy["busy_seconds"] / busy["frames"] * median(speeds(cell)))
    return sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights)


def summary(raw: Raw) -> Raw:
    """What the report states, as plain values, for other programs: medians of the repeats, with the least and the greatest of them."""
    arms = []
    for arm in raw["arms"]:
        totals, saved, shares = total_hours(raw, arm), saved_hours(raw, arm), saved_shares(raw, arm)
        watts = gpu_mean(raw, arm, "watts")
        arms.append(
            {
                **{key: arm[key] for key in ("name", "stack", "width", "full_width", "baseline", "anchor")},
                "hours": median(totals),
                "hours_interval": [min(totals), max(totals)],
                "hours_saved": median(saved),
                "hours_saved_interval": [min(saved), max(saved)],
                "share_saved": median(shares),
                "share_saved_each": shares,
                "gpu_utilization": gpu_mean(raw, arm, "utilization_mean"),
                "gpu_busy_share": busy_share(raw, arm),
                "gpu_watts": watts,
                "gpu_training_kwh": watts
                if isinstance(watts, str)
                else watts * projection_of(raw, arm).training / 3.6e6,
            }
        )
    return {"arms": arms, "reaching": sweeps(raw), "validation": [validated(raw, v) for v in raw["validation"]]}


def sweeps(raw: Raw) -> list[Raw]:
    """Per stack and kind of arm measured at more than one width: the savings, and where they reach the paper's hours."""
    kinds: dict[tuple[str, str], list[Raw]] = {}
    for arm in raw["arms"]:
        if not arm["baseline"]:
            kinds.setdefault((arm["stack"], arm["name"]), []).append(arm)
    found = []
    for (stack, name), arms in kinds.items():
        if len(arms) > 1:
            points = sorted((arm["full_width"], median(saved_hours(raw, arm))) for arm in arms)
            reaching = width_reaching(points, PAPER_HOURS)
            found.append({"stack": stack, "name": name, "points": points, "width": reaching.width, "how": reaching.how})
    return found


def validated(raw: Raw, validation: Raw) -> Raw:
    """A complete run beside its projection, with the projection's error; it ran in a process that had compiled all its updates before.

    `machine_speed` is the gauge's around the run relative to its median before the windows, `error_at_that_speed` the error that is left
    if all of the projection shrinks or stretches by it; None in files without a gauge. Whether the projection `holds` is judged without.
    """
    arm = raw["arms"][validation["arm"]]
    stack = raw["stacks"][arm["stack"]] | {"startup_seconds": validation["startup_seconds"]}
    projection = project(Work(**validation["work"]), costs_of(stack, arm, compiled=True))
    error = projection.total / validation["wall_seconds"] - 1
    speeds, speed = raw.get("machine_speed"), None
    if speeds and "machine_speed" in validation:
        speed = fmean(validation["machine_speed"]) / median(speeds)
    return {
        "name": arm["name"],
        "frames": validation["frames"],
        "projected_seconds": projection.total,
        "wall_seconds": validation["wall_seconds"],
        "error": error,
        "machine_speed": speed,
        "error_at_that_speed": None if speed is None else (1 + error) / speed - 1,
        "holds": abs(error) <= TOLERANCE,
    }
