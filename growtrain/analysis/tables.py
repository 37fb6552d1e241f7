"""The report's tables: what there is, arm against arm, what it cost, every run.

Units: frames; seconds, minutes or hours as written; FLOPs of training; kilowatt-hours.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from growtrain.analysis.aggregate import MIN_RUNS
from growtrain.analysis.comparison import (
    Axis,
    Comparison,
    TimeToScore,
    epsilons_text,
    interval_text,
    ratio_text,
    value_text,
)
from growtrain.analysis.figures import TITLES
from growtrain.analysis.pages import Block, Heading, Items, Paragraph, Table, compact
from growtrain.analysis.plots import short
from growtrain.analysis.runs import Run, number
from growtrain.analysis.study import HEALTHY, Study
from growtrain.settings.text import format_count

_POINT_HEADER = [
    "arm / reference",
    "at equal",
    "IQM",
    "difference",
    "P(improvement)",
    "paired difference (pairs)",
    "cost ratio",
]


def holdings(study: Study, ledger_notes: Sequence[str]) -> list[Block]:
    """The grid of games and arms with what is in each cell, then what is missing, failed or odd, by the files and by the sweep's ledger."""
    seeds = {entry.run.seed for entry in study.entries}
    rows, notes = [], []
    for game in study.games:
        row = [game]
        for arm in study.arms:
            cell = study.cell(arm, game)
            statuses = Counter(entry.run.status for entry in cell)
            row.append(", ".join(f"{count} {status}" for status, count in statuses.items()) or "missing")
            lacking = sorted(seeds - {entry.run.seed for entry in cell})
            if lacking:
                which = f"no run of seed {', '.join(map(str, lacking))}" if cell else "not run"
                notes.append(f"{arm} on {game}: {which}")
        rows.append(row)
    for entry in study.entries:
        run = entry.run
        if run.status not in HEALTHY:
            reason = run.summary.get("reason")
            why = f" ({' '.join(reason.split())})" if isinstance(reason, str) else ""
            notes.append(f"{run.name}: {run.status}{why} at {run.frames:,} of {run.budget:,} frames")
        if entry.superseded_by:
            notes.append(f"{run.name}: {entry.superseded_by} is of the same arm, game and seed, and stands for both")
        notes += [f"{run.name}: {problem}" for problem in run.problems]
    notes += ledger_notes
    grid = Table(["game", *study.arms], rows)
    if not notes:
        return [Heading("What there is"), grid, Paragraph("Nothing is missing, and every file could be read.")]
    return [Heading("What there is"), grid, Paragraph("Missing, failed or odd:"), Items(notes)]


def comparisons(compared: Sequence[Comparison]) -> list[Block]:
    """Each arm against its reference at equal frames, wall-clock and FLOPs, and how long it takes to a score."""
    if not compared:
        return []
    blocks: list[Block] = [
        Heading("Arm against arm"),
        Table(_POINT_HEADER, [row for c in compared for row in _point_rows(c)], grouped=True),
        Paragraph(
            "Difference: of the interquartile means (IQM). P(improvement): how often a run beats a run of the reference, ties "
            "half. Paired difference: mean over pairs of the same game and seed. Cost ratio: time or FLOPs for the same "
            "frames."
        ),
    ]
    times = [row for c in compared for row in _time_rows(c)]
    if times:
        header = [
            "arm / reference",
            "share of its score",
            "counted in",
            "time ratio",
            "runs there",
            "of reference",
            "note",
        ]
        blocks += [
            compact(header, times, grouped=True),
            Paragraph(
                "Time ratio: time until the smoothed score first reaches this share of the way from a random policy to the "
                "reference's mean score at the end; medians over seeds, their median over games. A run that does not get "
                "there counts as infinitely late; never says that on half of the games or more half of the arm's runs or more are, first "
                "that half of the reference's are. One that is "
                "there at its first score, a tenth into its budget, counts as having taken that long: such times are too long and draw "
                "the ratio towards 1, and the note counts them. A "
                "game where neither arm gets there is left out."
            ),
        ]
    notes = [f"{c.arm} against {c.reference}: {note}" for c in compared for note in _comparison_notes(c)]
    return [*blocks, Items(notes)] if notes else blocks


def evaluations(evaluated: Sequence[Comparison]) -> list[Block]:
    """Each arm against its reference by evaluations: the learned policy alone, without the exploration of training."""
    rows = [row for c in evaluated for row in _point_rows(c)]
    if not rows:
        return []
    text = (
        "The same pairs by the evaluations of the run: whole episodes of the learned policy, without the exploration of training. Each is "
        "of one snapshot and of few episodes, so seeds differ more. Between two evaluations the score is read off the line from one to the "
        "other."
    )
    notes = [
        f"{c.arm} against {c.reference}: {note}"
        for c in evaluated
        for note in [*_epsilon_notes(c), *_missing_notes(c), *_unscored_notes(c)]
    ]
    found: list[Block] = [
        Heading("Arm against arm, by evaluations"),
        Table(_POINT_HEADER, rows, grouped=True),
        Paragraph(text),
    ]
    return [*found, Items(notes)] if notes else found


def _point_rows(c: Comparison) -> list[list[str]]:
    return [
        [
            f"{c.arm} / {c.reference}",
            _where(axis, point.at),
            f"{value_text(float(point.arm.value))} / {value_text(float(point.reference.value))}",
            interval_text(point.difference),
            interval_text(point.improvement),
            "no pairs" if point.paired is None else f"{interval_text(point.paired)} ({point.paired.runs})",
            ratio_text(c.costs[axis]) if axis in c.costs else "",
        ]
        for axis, point in c.points.items()
    ]


def _where(axis: Axis, at: dict[str, float]) -> str:
    texts: dict[Axis, Callable[[float], str]] = {
        "frames": format_count,
        "hours": lambda hours: duration(hours * 3600),
        "flops": short,
    }
    ends = [texts[axis](value) for value in (min(at.values()), max(at.values()))]
    return f"{TITLES[axis]} ({' to '.join(dict.fromkeys(ends))})"


def _time_rows(c: Comparison) -> list[list[str]]:
    return [
        [
            f"{c.arm} / {c.reference}",
            f"{time.level:.0%}",
            TITLES[time.axis],
            interval_text(time.ratio, text=_time_ratio) if time.known else "unknown",
            "{} of {}".format(*time.reached),
            "{} of {}".format(*time.reference_reached),
            _time_note(time),
        ]
        for time in c.times
    ]


def _time_ratio(ratio: float) -> str:
    return "first" if ratio == 0 else value_text(ratio)


def _time_note(time: TimeToScore) -> str:
    notes = [f"no interval: {time.ratio.reason}"] if time.ratio.reason else []
    if time.early or time.reference_early:
        there = f"{time.early} of {time.reached[1]} runs, {time.reference_early} of {time.reference_reached[1]} of reference"
        drawn = ", which draws the ratio towards 1" if time.known else ""
        notes.append(f"there at the first score already: {there}{drawn}")
    return "; ".join(notes)


def _comparison_notes(c: Comparison) -> list[str]:
    notes = []
    if c.short:
        notes.append(f"no interval: {'; '.join(c.short)}; an interval needs {MIN_RUNS}")
    if c.unlearned:
        why = f"not every run of {c.reference} ends above a random policy and above where it began"
        notes.append(f"no time-to-score on {', '.join(c.unlearned)}: {why}")
    notes += [*_missing_notes(c), *_unscored_notes(c)]
    if c.related:
        notes.append(
            f"runs of {', '.join(c.related)} share a past (forks): intervals, which speak of other seeds, are too narrow"
        )
    if c.elsewhere:
        only = f"over {', '.join(c.games)} only" if c.games else c.unknown
        notes.append(f"{only}: not compared on {', '.join(c.elsewhere)}")
    if len(c.machines) > 1:
        notes.append(f"wall-clock is not comparable: the runs had {' and '.join(c.machines)}")
    elif c.commits > 1 and c.games:
        notes.append(f"the runs were made by {c.commits} versions of the code, which may differ in speed")
    if "flops" not in c.points and "flops" not in c.unscored and c.games:
        notes.append(
            "FLOPs are unknown of some runs: before its end a run has those of one of its arm and game that is done and got as far, a fork "
            "none, and no run has any whose network became another than its schedule planned"
        )
    return notes


def _epsilon_notes(c: Comparison) -> list[str]:
    different = f"evaluations are at epsilon {epsilons_text(c)}: their difference is that of the epsilons, too"
    return [different] if len(c.epsilons) > 1 else []


def _missing_notes(c: Comparison) -> list[str]:
    others = ": the scores are those of the others" if c.games else ""
    return [f"{'; '.join(c.missing)}{others}"] if c.missing else []


def _unscored_notes(c: Comparison) -> list[str]:
    return [
        f"not compared at equal {TITLES[axis]}: {late} have their first score after that"
        for axis, late in c.unscored.items()
    ]


def costs(study: Study) -> list[Block]:
    """Time, speed, FLOPs, GPU utilisation and energy of the runs that are done, by cell."""
    rows: list[list[str]] = []
    reasons = Counter[str]()
    for game in study.games:
        for arm in study.arms:
            done = [entry.run for entry in study.cell(arm, game) if entry.run.status == "done"]
            if done:
                rows.append([game, arm, str(len(done)), *_cost_cells(done, reasons)])
    if not rows:
        return [Heading("What it cost"), Paragraph("No run is done yet.")]
    header = ["game", "arm", "done runs", "time a run", "frames/s", "FLOPs a run", "GPU utilisation", "energy a run"]
    text = (
        "Means over the done runs of a cell. Time is wall-clock with evaluation, growth and checkpoints; what else the "
        "machine did meanwhile is not known here. FLOPs are those of training: updates, acting, and what an adaptive "
        "schedule measures; evaluations are not counted."
    )
    blocks: list[Block] = [Heading("What it cost"), Table(header, rows), Paragraph(text)]
    notes = [f"unavailable: {reason} ({count} {'runs' if count > 1 else 'run'})" for reason, count in reasons.items()]
    return [*blocks, Items(notes)] if notes else blocks


def _cost_cells(done: Sequence[Run], reasons: Counter[str]) -> list[str]:
    gpus = [gpu if isinstance(gpu := run.summary.get("gpu"), dict) else {} for run in done]
    for gpu in gpus:
        if not gpu.get("available"):
            reasons[str(gpu.get("reason", "the run did not say why"))] += 1
    speeds = [run.frames / run.wall_seconds for run in done]
    flops = [run.total_flops for run in done]
    return [
        duration(float(np.mean([run.wall_seconds for run in done]))),
        value_text(float(np.mean(speeds))),
        "-" if np.isnan(flops).any() else short(float(np.mean(flops))),
        _measured(gpus, "utilization_mean", lambda percent: f"{percent:.0f} %", reasons),
        _measured(gpus, "energy_joules", lambda joules: f"{joules / 3.6e6:.3g} kWh", reasons),
    ]


def _measured(gpus: Sequence[dict[str, Any]], name: str, text: Callable[[float], str], reasons: Counter[str]) -> str:
    """The mean of what the GPU monitors measured to the end, or `unavailable`; what they say about why is counted in `reasons`."""
    watching = [gpu for gpu in gpus if gpu.get("available") and not gpu.get("lost")]
    for gpu in gpus:
        if gpu.get("available") and gpu.get("lost"):
            reasons[f"{name}, the monitor was lost {gpu['lost']}"] += 1
    for gpu in watching:
        if isinstance(gpu.get(name), str):
            reasons[f"{name}, {gpu[name].removeprefix('unavailable: ')}"] += 1
    values = [value for gpu in watching if not np.isnan(value := number(gpu, name, np.nan))]
    if not values:
        return "unavailable"
    return text(float(np.mean(values))) + (f" (of {len(values)})" if len(values) < len(gpus) else "")


def duration(seconds: float) -> str:
    """`95 s`, `12.3 min`, `41.5 h`; a dash for NaN."""
    if np.isnan(seconds):
        return "-"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def runs(study: Study, counted: set[Path]) -> list[Block]:
    """A line for every run, whether it counts or not; `counted` are the directories of those that do."""
    rows = []
    for entry in study.entries:
        run, curve = entry.run, entry.curve
        rows.append(
            [
                run.name,
                entry.arm,
                run.game,
                str(run.seed),
                run.status,
                f"{format_count(run.frames)} of {format_count(run.budget)}",
                f"{value_text(float(curve.score[-1]))} (n={curve.episodes[-1]:.0f})" if len(curve.score) else "-",
                _last_evaluation(run),
                _times([event["frames"] for event in run.growth_events]),
                "yes" if run.path in counted else "no",
                _history(run),
            ]
        )
    header = [
        "run",
        "arm",
        "game",
        "seed",
        "status",
        "frames",
        "training score",
        "last evaluation",
        "interventions at",
        "counted",
        "history",
    ]
    return [Heading("Every run"), compact(header, rows)]


def _times(frames: Sequence[float]) -> str:
    """The first few, and how many there are if there are more."""
    shown = ", ".join(map(format_count, frames[:4])) or "none"
    return f"{shown}, ... ({len(frames)})" if len(frames) > 4 else shown


def _last_evaluation(run: Run) -> str:
    if not run.evaluations:
        return "none"
    score, spread, episodes = (
        number(run.evaluations[-1], name, np.nan) for name in ("episode_return", "episode_return_std", "episodes")
    )
    return f"{value_text(score)} (std {value_text(spread)}, n={episodes:.0f})"


def _history(run: Run) -> str:
    texts = [f"forked from {resume['forked_from']}" for resume in run.resumes if "forked_from" in resume]
    count = len(run.resumes) - len(texts)
    return "; ".join([*texts, *([f"resumed {count} x"] if count else [])])
