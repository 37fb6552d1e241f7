"""The report on a set of runs: what they show first, then curves, aggregates, costs, what is missing, and the commands behind it.

Everything that is drawn or said is computed from the run directories; running and failed runs are part of it.

Units: frames; hours; FLOPs of updates; scores in game points per game and human-normalised over games.
"""

import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from growtrain.analysis import comparison as cp
from growtrain.analysis import plots
from growtrain.analysis.aggregate import (
    MIN_RUNS,
    Estimate,
    FloatArray,
    Scores,
    estimate,
    iqm,
    mean,
    median,
    optimality_gap,
    performance_profile,
    value_at,
)
from growtrain.analysis.comparison import Axis, Comparison, Entry, Study, interval_text, value_text
from growtrain.analysis.pages import Block, Figure, Heading, Items, Listing, Paragraph, Table, to_html, to_markdown
from growtrain.analysis.runs import Curve, Run, at_frames, find_runs, flatten, number, series
from growtrain.config import Config, ConfigError, flag, format_count, parse_count
from growtrain.presets import resolve
from growtrain.tasks import REFERENCE_SCORES

_BOOTSTRAP_SEED = 0  # the same runs give the same report
_CURVE_POINTS = 60
_CURVE_DRAWS = 500
_AGGREGATES: list[tuple[str, Callable[[Scores], FloatArray], float | None]] = [
    ("IQM", iqm, None),
    ("Median", median, None),
    ("Mean", mean, None),
    ("Optimality gap", optimality_gap, None),
]


def write_report(paths: Sequence[Path], output: Path, command: Sequence[str]) -> tuple[Path, str]:
    """Writes `report.html`, `report.md` and `figures/*.svg` into `output`.

    Args:
        paths: runs, or directories that hold runs.
        output: made if missing; an older report in it is replaced.
        command: the words that asked for this report.

    Returns:
        The HTML file, and the verdict.

    Raises:
        ConfigError: a path holds no run.
    """
    study = cp.make_study(find_runs(paths))
    title, blocks = compose(study, command)
    (output / "figures").mkdir(parents=True, exist_ok=True)
    for old in (output / "figures").glob("*.svg"):
        old.unlink()
    for block in blocks:
        if isinstance(block, Figure):
            (output / "figures" / f"{block.name}.svg").write_text(block.svg, encoding="utf-8")
    (output / "report.md").write_text(to_markdown(title, blocks, "figures"), encoding="utf-8")
    (output / "report.html").write_text(to_html(title, blocks), encoding="utf-8")
    return output / "report.html", next(b.text for b in blocks if isinstance(b, Paragraph) and b.strong)


def compose(study: Study, command: Sequence[str]) -> tuple[str, list[Block]]:
    """The report's title and blocks."""
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    pairs = [(arm, reference) for arm in study.arms if (reference := cp.reference_of(study, arm)) is not None]
    # What the project is about comes first: growing against its full width.
    pairs.sort(key=lambda pair: not study.schedules[pair[0]].startswith("grow"))
    comparisons = [cp.compare(study, arm, reference, rng) for arm, reference in pairs]
    at = cp.limits(study, study.arms, "frames")
    games = ", ".join(study.games) if len(study.games) <= 4 else f"{len(study.games)} games"
    blocks: list[Block] = [
        *_verdict(study, comparisons),
        *_holdings(study),
        *_aggregate(study, at, rng),
        *_comparisons(comparisons),
        *_games(study, at, rng),
        *_costs(study),
        *_diagnostics(study),
        *_runs(study, at),
        *_commands(study, command),
        *_method(at),
    ]
    return f"{', '.join(study.arms[:6])} on {games}", blocks


def _verdict(study: Study, comparisons: list[Comparison]) -> list[Block]:
    statuses = Counter(entry.run.status for entry in study.entries)
    made = time.strftime("%Y-%m-%d %H:%M")
    count = f"{len(study.entries)} runs: {', '.join(f'{n} {status}' for status, n in statuses.most_common())}"
    if comparisons:
        first, *others = [cp.verdict(comparison) for comparison in comparisons]
    elif any(len(entry.curve.frames) for entry in study.entries):
        first, others = f"Only {study.arms[0]} was run: there is nothing to compare it with.", []
    else:
        first, others = "No run has a score yet.", []
    blocks: list[Block] = [Paragraph(first, strong=True)]
    if others:
        blocks.append(Items(others))
    return [*blocks, Paragraph(f"{count}. Brackets are {95} % intervals over seeds. Made {made}.")]


def _holdings(study: Study) -> list[Block]:
    """The grid of games and arms with what there is in each cell, and what is missing."""
    seeds = {entry.run.seed for entry in study.entries}
    rows, missing = [], []
    for game in study.games:
        row = [game]
        for arm in study.arms:
            cell = study.cell(arm, game)
            statuses = Counter(entry.run.status for entry in cell)
            row.append(", ".join(f"{n} {status}" for status, n in statuses.items()) or "missing")
            lacking = sorted(seeds - {entry.run.seed for entry in cell})
            if not cell:
                missing.append(f"{arm} on {game}: not run")
            elif lacking:
                missing.append(f"{arm} on {game}: no run of seed {', '.join(map(str, lacking))}")
        rows.append(row)
    for entry in study.entries:
        if entry.run.status not in cp.HEALTHY:
            missing.append(
                f"{entry.run.name}: {entry.run.status} at {entry.run.frames:,} of {entry.run.budget:,} frames"
            )
        if entry.superseded_by:
            missing.append(f"{entry.run.name}: same arm, game and seed as {entry.superseded_by}, which stands for both")
        missing += [f"{entry.run.name}: {problem}" for problem in entry.run.problems]
    blocks: list[Block] = [Heading("What there is"), Table(["game", *study.arms], rows, left=1 + len(study.arms))]
    if missing:
        blocks += [Paragraph("Missing, failed or odd:"), Items(missing)]
    else:
        blocks.append(
            Paragraph(
                "Nothing is missing: every arm has the same seeds on every game, and all of its files could be read."
            )
        )
    return blocks


def _aggregate(study: Study, at: dict[str, float], rng: np.random.Generator) -> list[Block]:
    games = [game for game in study.scored_games if game in at]
    blocks: list[Block] = [Heading("All games together")]
    unscored = [game for game in study.games if game not in REFERENCE_SCORES]
    if unscored:
        blocks.append(Paragraph(f"Left out, for want of a random and a human score: {', '.join(unscored)}."))
    if not games:
        return [*blocks, Paragraph("No game has a score that can be normalised yet.")]
    look = plots.styles(study.arms)
    rows: list[list[str]] = []
    dots: dict[str, list[plots.Row | None]] = {}
    profiles: list[plots.Line] = []
    complete: list[str] = []
    for arm in study.arms:
        scores = cp.arm_scores(study, arm, "frames", at, games)
        empty = [game for game, values in zip(games, scores, strict=True) if np.isnan(values).all()]
        if empty:
            n = sum(int((~np.isnan(values)).sum()) for values in scores)
            rows.append([arm, str(n), *["-"] * len(_AGGREGATES), f"no aggregate: no score on {', '.join(empty)}"])
            continue
        complete.append(arm)
        found = [estimate(statistic, scores, rng=rng) for _, statistic, _ in _AGGREGATES]
        note = f"no interval: {found[0].reason}" if found[0].reason else ""
        rows.append([arm, _counted(found[0]), *(interval_text(e) for e in found), note])
        dots[arm] = [_row(e, look[arm]) for e in found]
        profiles.append(_profile(scores, look[arm], rng))
    header = ["arm", "runs", *(name for name, _, _ in _AGGREGATES), ""]
    blocks.append(Table(header, rows))
    frames = ", ".join(sorted({format_count(at[game]) for game in games}))
    scope = f"Human-normalised scores at {frames} frames over {len(games)} game{'s' if len(games) > 1 else ''}"
    if dots:
        names = [name for name, _, _ in _AGGREGATES]
        caption = f"{scope}; bars are 95 % intervals, lower is better for the optimality gap."
        blocks.append(Figure("aggregates", plots.intervals(names, dots, [None] * len(names)), caption))
        panels = [_aggregate_panel(study, axis, complete, at, games, look, rng) for axis in cp.AXES]
        caption = (
            "Interquartile mean over all runs of all games against frames, wall-clock and FLOPs of updates; bands are 95 % intervals, "
            "where every game has three seeds. Each curve ends where the first of its runs does."
        )
        legend = {arm: look[arm] for arm in complete}
        blocks.append(Figure("aggregate-curves", plots.curves(panels, legend, 3, height=270, shared_y=True), caption))
        panel = plots.Panel("Performance profile", "human-normalised score t", "share of runs above t", profiles)
        caption = f"{scope}: share of the runs above each score. A curve above another everywhere is better everywhere."
        blocks.append(Figure("profiles", plots.curves([panel], legend, 1, height=260), caption))
    return blocks


def _counted(found: Estimate) -> str:
    return f"{found.runs}" + (f" ({found.missing} missing)" if found.missing else "")


def _row(found: Estimate, style: plots.Style) -> plots.Row:
    low, high = (None if end is None else float(end) for end in (found.low, found.high))
    return plots.Row(float(found.value), low, high, style)


def _profile(scores: Scores, style: plots.Style, rng: np.random.Generator) -> plots.Line:
    values = np.concatenate(list(scores))
    values = values[~np.isnan(values)]
    span = max(float(np.ptp(values)), 1e-3)
    grid = np.linspace(min(0.0, float(values.min()) - 0.05 * span), float(values.max()) + 0.05 * span, 101)
    found = estimate(lambda s: performance_profile(s, grid), scores, rng=rng, draws=_CURVE_DRAWS)
    return plots.Line(grid, found.value, style, found.low, found.high, steps=found.low is None)


def _aggregate_panel(
    study: Study,
    axis: Axis,
    arms: Sequence[str],
    at: dict[str, float],
    games: Sequence[str],
    look: dict[str, plots.Style],
    rng: np.random.Generator,
) -> plots.Panel:
    lines = []
    ends = [at_frames(e.curve, at[g]) for arm in arms for g in games for e in _scored(study, arm, g, at)]
    unit, label = _unit(axis, ends)
    for arm in arms:
        sets = []
        for game in games:
            cut = [at_frames(entry.curve, at[game]) for entry in _scored(study, arm, game, at)]
            sets.append([(getattr(c, axis) * unit, cp.normalized(game, c.score)) for c in cut])
        line = _band(sets, iqm, look[arm], rng)
        if line is not None:
            lines.append(line)
    message = "" if lines else "FLOPs unknown until a run of each arm ends"
    return plots.Panel(
        f"IQM against {_TITLES[axis]}",
        label,
        "human-normalised score" if axis == "frames" else "",
        lines,
        message=message,
    )


_TITLES: dict[Axis, str] = {"frames": "frames", "hours": "wall-clock", "flops": "FLOPs"}


def _scored(study: Study, arm: str, game: str, at: dict[str, float]) -> list[Entry]:
    """The runs of a cell that have a score at its limit."""
    cell = study.cell(arm, game) if game in at else []
    return [entry for entry in cell if not np.isnan(cp.score_at(entry, "frames", at[game]))]


def _band(
    sets: Sequence[Sequence[tuple[FloatArray, FloatArray]]],
    statistic: Callable[[Scores], FloatArray],
    style: plots.Style,
    rng: np.random.Generator,
) -> plots.Line | None:
    """A statistic of curves along their common range, with its interval; None without a common range.

    Args:
        sets: for each game the (x, y) of its runs.
        statistic: of scores.
        style: how it is drawn.
        rng: for the bootstrap.
    """
    flat = [x for runs in sets for x, _ in runs]
    if not flat or not all(len(runs) for runs in sets) or any(np.isnan(x).any() for x in flat):
        return None
    low, high = max(x[0] for x in flat), min(x[-1] for x in flat)
    if high < low:
        return None
    grid = np.linspace(low, high, _CURVE_POINTS)
    scores = [np.stack([value_at(x, y, grid) for x, y in runs], axis=-1) for runs in sets]
    found = estimate(statistic, scores, rng=rng, draws=_CURVE_DRAWS)
    return plots.Line(grid, found.value, style, found.low, found.high)


def _unit(axis: Axis, curves: Sequence[Curve]) -> tuple[float, str]:
    """What to multiply an axis by, and its label."""
    if axis != "hours":
        return 1.0, {"frames": "frames", "flops": "FLOPs of updates"}[axis]
    longest = max((float(curve.hours[-1]) for curve in curves if len(curve.hours)), default=1.0)
    return next((unit, label) for limit, unit, label in _HOURS if longest >= limit)


_HOURS = ((1.5, 1.0, "hours"), (1.5 / 60, 60.0, "minutes"), (-np.inf, 3600.0, "seconds"))


def _comparisons(comparisons: list[Comparison]) -> list[Block]:
    if not comparisons:
        return []
    rows, times, notes = [], [], []
    for c in comparisons:
        for axis, point in c.points.items():
            rows.append(
                [
                    c.arm,
                    c.reference,
                    _where(axis, point.at),
                    interval_text(point.arm),
                    interval_text(point.reference),
                    interval_text(point.difference),
                    interval_text(point.improvement),
                    f"{interval_text(point.paired)} ({point.paired.runs})" if point.paired is not None else "no pairs",
                    interval_text(c.costs[axis]) if axis in c.costs else "",
                ]
            )
        times += [
            [
                c.arm,
                c.reference,
                f"{t.level:.0%}",
                _TITLES[t.axis],
                interval_text(t.ratio) + ("" if not t.ratio.reason else f" ({t.ratio.reason})"),
                f"{t.reached[0]} of {t.reached[1]}",
                f"{t.reference_reached[0]} of {t.reference_reached[1]}",
            ]
            for t in c.times
        ]
        name = f"{c.arm} against {c.reference}"
        notes += [f"{name}: no interval, {'; '.join(c.short)} (an interval needs {MIN_RUNS})"] if c.short else []
        notes += [f"{name}: no time-to-score, {c.no_times}"] if c.no_times else []
        notes += (
            [f"{name}: wall-clock is not comparable, the runs had {' and '.join(c.machines)}"]
            if len(c.machines) > 1
            else []
        )
        notes += (
            [f"{name}: over {', '.join(c.games) or 'no game'} only"]
            if c.games and c.short is not None and len(c.games) < 1
            else []
        )
    header = [
        "arm",
        "against",
        "at equal",
        "IQM",
        "IQM of reference",
        "difference",
        "P(improvement)",
        "paired difference (pairs)",
        "cost ratio",
    ]
    blocks: list[Block] = [Heading("Arm against arm"), Table(header, rows, left=3)]
    blocks.append(
        Paragraph(
            "Difference: of the interquartile means. P(improvement): how often a run beats a run of the reference, ties half. Paired "
            "difference: mean over runs of the same game and seed. Cost ratio: hours or FLOPs taken for the same frames, arm / reference."
        )
    )
    if times:
        header = ["arm", "against", "level", "counted in", "time ratio", "runs that got there", "of reference"]
        blocks.append(Table(header, times, left=4))
        blocks.append(
            Paragraph(
                "Time ratio: time until the smoothed score first reaches this share of the way from a random policy to the reference's mean "
                "score at the end, arm / reference, medians over seeds. A run that did not get there counts as infinitely late."
            )
        )
    return [*blocks, Items(notes)] if notes else blocks


def _where(axis: Axis, at: dict[str, float]) -> str:
    values = sorted(at.values())
    text = {"frames": format_count, "hours": lambda h: _duration(h * 3600), "flops": plots.short}[axis]
    ends = text(values[0]) if values[0] == values[-1] else f"{text(values[0])} to {text(values[-1])}"
    return f"{_TITLES[axis]} ({ends})"


def _games(study: Study, at: dict[str, float], rng: np.random.Generator) -> list[Block]:
    """A table of scores and a figure for each game."""
    look = plots.styles(study.arms)
    rows = []
    for game in study.games:
        row = [game, format_count(at[game]) if game in at else "-"]
        for arm in study.arms:
            scores = (
                np.array([cp.score_at(entry, "frames", at[game]) for entry in study.cell(arm, game)])
                if game in at
                else np.array([])
            )
            found = estimate(mean, [scores], rng=rng)
            row.append(
                f"{interval_text(found)} n={found.runs}" + (f", {found.missing} missing" if found.missing else "")
                if len(scores)
                else "-"
            )
        rows.append(
            [*row, "{} / {}".format(*map(value_text, REFERENCE_SCORES[game])) if game in REFERENCE_SCORES else "-"]
        )
    blocks: list[Block] = [
        Heading("Each game"),
        Paragraph(
            "Mean score in game points over seeds, of the training episodes that ended in the last tenth of the budget; n is the number of "
            f"seeds. There is no interval below {MIN_RUNS}."
        ),
        Table(["game", "at frames", *study.arms, "random / human"], rows, left=1),
    ]
    for index, game in enumerate(study.games):
        panels = [_game_panel(study, axis, game, at, look, rng) for axis in cp.AXES]
        legend = {arm: look[arm] for arm in study.arms if study.cell(arm, game)}
        caption = (
            f"{game}: thick lines are means over the seeds that have a score at the end, thin ones single seeds; a cross is where a run failed "
            "or was interrupted; triangles with dotted lines are injections."
        )
        name = f"game-{index:02d}-{re.sub('[^A-Za-z0-9]+', '-', game)[:40]}"
        blocks.append(Figure(name, plots.curves(panels, legend, 3, height=260, shared_y=True), caption))
    return blocks


def _game_panel(
    study: Study, axis: Axis, game: str, at: dict[str, float], look: dict[str, plots.Style], rng: np.random.Generator
) -> plots.Panel:
    lines, events = [], []
    cells = {arm: study.cell(arm, game) for arm in study.arms}
    unit, label = _unit(axis, [entry.curve for cell in cells.values() for entry in cell])
    for arm, cell in cells.items():
        drawn = [entry for entry in cell if len(entry.curve.frames) and not np.isnan(getattr(entry.curve, axis)).any()]
        for entry in drawn:
            x = getattr(entry.curve, axis) * unit
            broken = entry.run.status in ("failed", "interrupted")
            lines.append(plots.Line(x, entry.curve.score, look[arm], thin=True, ends_in_failure=broken))
        scored = [at_frames(entry.curve, at[game]) for entry in drawn if entry in _scored(study, arm, game, at)]
        line = _band([[(getattr(c, axis) * unit, c.score) for c in scored]], mean, look[arm], rng)
        lines += [line] if line is not None else []
        grown = [[float(event["frames"]) for event in entry.run.growth_events] for entry in drawn]
        for stage in range(max((len(times) for times in grown), default=0)):
            marks = [
                float(np.interp(times[stage], entry.curve.frames, getattr(entry.curve, axis)))
                for times, entry in zip(grown, drawn, strict=True)
                if stage < len(times)
            ]
            events.append((float(np.mean(marks)) * unit, look[arm]))
    levels = [(score, name) for score, name in zip(REFERENCE_SCORES.get(game, ()), ("random", "human"), strict=False)]
    message = "" if lines else "no score yet" if axis == "frames" else "unknown until a run ends"
    return plots.Panel(
        f"{game}" if axis == "frames" else f"against {_TITLES[axis]}",
        label,
        "score" if axis == "frames" else "",
        lines,
        events,
        levels,
        message,
    )


def _costs(study: Study) -> list[Block]:
    rows, reasons = [], Counter[str]()
    for game in study.games:
        for arm in study.arms:
            done = [entry.run for entry in study.cell(arm, game) if entry.run.status == "done"]
            if not done:
                continue
            gpus = [run.summary.get("gpu") if isinstance(run.summary.get("gpu"), dict) else {} for run in done]
            reasons.update(str(gpu.get("reason", "")) for gpu in gpus if not gpu.get("available"))
            seconds = [run.wall_seconds for run in done]
            flops = [
                sum(number(s, "updates", 0) * c for s, c in zip(run.summary["stages"], run.stage_costs, strict=True))
                for run in done
                if run.stage_costs
            ]
            rows.append(
                [
                    game,
                    arm,
                    str(len(done)),
                    _duration(float(np.mean(seconds))),
                    value_text(float(np.mean([run.frames / s for run, s in zip(done, seconds, strict=True)]))),
                    plots.short(float(np.mean(flops))) if flops else "-",
                    _measured(gpus, "utilization_mean", lambda x: f"{x:.0f} %", reasons),
                    _measured(gpus, "energy_joules", lambda x: f"{value_text(x / 3.6e6)} kWh", reasons),
                ]
            )
    header = [
        "game",
        "arm",
        "done runs",
        "time a run",
        "frames/s",
        "FLOPs of updates",
        "GPU utilisation",
        "energy a run",
    ]
    blocks: list[Block] = [Heading("What it cost")]
    if not rows:
        return [*blocks, Paragraph("No run is done yet.")]
    blocks.append(Table(header, rows, left=2))
    blocks.append(
        Paragraph(
            "Means over the done runs of a cell. Time is wall-clock with evaluation, growth and checkpoints; what else the machine did in that "
            "time is not known. FLOPs are those of updates, acting and evaluation are not counted."
        )
    )
    notes = [f"unavailable: {reason} ({n} {'runs' if n > 1 else 'run'})" for reason, n in reasons.items() if reason]
    return [*blocks, Items(notes)] if notes else blocks


def _measured(gpus: Sequence[dict[str, Any]], name: str, text: Callable[[float], str], reasons: Counter[str]) -> str:
    """The mean of what the runs' monitors measured, or that there is nothing; reasons are counted."""
    values = [gpu.get(name) for gpu in gpus if gpu.get("available")]
    reasons.update(f"{name}: {value.removeprefix('unavailable: ')}" for value in values if isinstance(value, str))
    found = [number({name: value}, name, np.nan) for value in values]
    found = [value for value in found if not np.isnan(value)]
    if not found:
        return "unavailable"
    return text(float(np.mean(found))) + (f" (of {len(found)})" if len(found) < len(gpus) else "")


def _duration(seconds: float) -> str:
    if np.isnan(seconds):
        return "-"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _diagnostics(study: Study) -> list[Block]:
    """A panel for each diagnostic and game, if runs measured any."""
    skipped = {"frames", "agent_steps", "updates", "stage", "wall_seconds"}
    names = sorted({name for e in study.entries for record in e.run.diagnostics for name in flatten(record)} - skipped)
    if not names:
        return []
    look = plots.styles(study.arms)
    blocks: list[Block] = [Heading("Diagnostics")]
    for index, game in enumerate(study.games):
        panels = []
        for name in names:
            lines, events = [], []
            for arm in study.arms:
                for entry in study.cell(arm, game):
                    x, y = series(entry.run, name)
                    if len(x):
                        lines.append(plots.Line(x, y, look[arm]))
                        events += [(float(event["frames"]), look[arm]) for event in entry.run.growth_events]
            panels.append(plots.Panel(name, "frames", "", lines, sorted(set(events), key=lambda e: e[0])))
        panels = [panel for panel in panels if panel.lines]
        if panels:
            legend = {arm: look[arm] for arm in study.arms if study.cell(arm, game)}
            figure_name = f"diagnostics-{index:02d}-{re.sub('[^A-Za-z0-9]+', '-', game)[:40]}"
            blocks.append(Figure(figure_name, plots.curves(panels, legend, 3, height=210), f"{game}: one line a run."))
    return blocks


def _runs(study: Study, at: dict[str, float]) -> list[Block]:
    rows = []
    for entry in study.entries:
        run, curve = entry.run, entry.curve
        evaluation = run.evaluations[-1] if run.evaluations else {}
        score = number(evaluation, "episode_return", np.nan)
        spread = f" (std {value_text(number(evaluation, 'episode_return_std', np.nan))}, {number(evaluation, 'episodes', 0):.0f} episodes)"
        events = ", ".join(format_count(event["frames"]) for event in run.growth_events)
        counted = (
            run.game in at and not np.isnan(cp.score_at(entry, "frames", at[run.game])) and not entry.superseded_by
        )
        rows.append(
            [
                run.name,
                entry.arm,
                run.game,
                str(run.seed),
                run.status,
                f"{format_count(run.frames)} of {format_count(run.budget)}",
                value_text(float(curve.score[-1])) if len(curve.score) else "-",
                "-" if np.isnan(score) else value_text(score) + spread,
                events or "none",
                "yes" if counted else "no",
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
        "injections at",
        "counted",
        "",
    ]
    return [Heading("Every run"), Table(header, rows, left=3)]


def _history(run: Run) -> str:
    resumes = run.about.get("resumes")
    texts = [r for r in resumes if isinstance(r, dict)] if isinstance(resumes, list) else []
    forks = [
        f"forked from {r['forked_from']} at {format_count(number(r, 'frames', 0))}" for r in texts if "forked_from" in r
    ]
    resumed = sum("forked_from" not in r for r in texts)
    return "; ".join([*forks, *([f"resumed {resumed} x"] if resumed else [])])


def _commands(study: Study, command: Sequence[str]) -> list[Block]:
    lines = ["# this report", shell_line(command)]
    for entry in study.entries:
        lines += [
            f"# {entry.run.name}",
            shell_line(command_of(entry.run)) if entry.run.settings else "# (its settings are unknown)",
        ]
    text = "Each run by the settings in its config.json; a run that was resumed with changes or forked has a longer history than its command."
    return [Heading("Commands"), Paragraph(text), Listing(lines)]


def command_of(run: Run) -> list[str]:
    """The words of a command line that gives a run's settings: what its preset and budget do not imply."""
    known = {name: run.settings[name] for name in Config.__dataclass_fields__ if name in run.settings}
    explicit = {name: known[name] for name in ("preset", "game", "schedule", "total_frames", "seed") if name in known}
    try:
        while True:
            implied, _ = resolve(explicit.get("preset", "paper"), explicit)
            other = {name: value for name, value in known.items() if getattr(implied, name) != value}
            if not other:
                break
            explicit |= other
    except (ConfigError, TypeError, ValueError, AttributeError):  # settings of another version, or damaged
        explicit = known
    words = ["python", "-m", "growtrain"]
    for name, value in explicit.items():
        if (name, value) != ("preset", "paper"):
            text = _setting_text(value)
            words += [f"{flag(name)}={text}"] if text.startswith("-") else [flag(name), text]
    return words


def _setting_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 1000 and parse_count(format_count(value)) == value:
        return format_count(value)
    return str(value)


def shell_line(words: Sequence[str]) -> str:
    """Words as one line for a POSIX shell (bash, where a word has characters that cannot be seen)."""
    return " ".join(shlex.quote(word) if word.isprintable() else _ansi_quoted(word) for word in words)


def _ansi_quoted(word: str) -> str:
    parts = []
    for c in word:
        code = ord(c)
        if c in "\\'":
            parts.append(f"\\{c}")
        elif c.isprintable():
            parts.append(c)
        elif 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python holds it in a path
            parts.append(f"\\x{code - 0xDC00:02x}")
        else:
            parts.append(f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return f"$'{''.join(parts)}'"


def _method(at: dict[str, float]) -> list[Block]:
    frames = ", ".join(sorted({format_count(value) for value in at.values()})) or "no"
    return [
        Heading("How to read this"),
        Items(
            [
                "Score of a run at a moment: mean true return of the training episodes that ended in the last tenth of its budget (true rewards, "
                "at the exploration epsilon of the time). Single evaluations are in the table of runs; they judge one snapshot and swing more.",
                f"All arms together are compared at {frames} frames, pairs at equal frames, wall-clock and FLOPs: each time the greatest value "
                "that every run of the arms has reached that is done or running. Runs that ended before are missing there, and counted.",
                "Human-normalised: 0 is a random policy, 1 a human tester (scores of DQN Zoo). The mean over games hangs on games with a small "
                "span between the two, such as Video Pinball: prefer the interquartile mean (IQM).",
                f"Intervals: 95 % percentile bootstrap, runs resampled within each game, seed {_BOOTSTRAP_SEED}. They speak of other seeds on "
                "these games, not of other games, and are too narrow rather than too wide with few seeds. They are not corrected for the "
                "number of comparisons. An interval that contains 0 does not show that two arms are equal.",
                "Statistics after Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice (NeurIPS 2021).",
            ]
        ),
    ]
