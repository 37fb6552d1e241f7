"""The report's figures: which curves go into which panel, in which units, with which intervals.

Units: as the panels' labels say; x axes are frames, wall-clock or FLOPs of training.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from growtrain.analysis import plots
from growtrain.analysis.aggregate import (
    Estimate,
    FloatArray,
    Scores,
    estimate,
    iqm,
    mean,
    performance_profile,
    value_at,
)
from growtrain.analysis.comparison import AXES, Axis, arm_scores, limits, normalized, score_at
from growtrain.analysis.pages import Figure
from growtrain.analysis.runs import Curve, at_frames, flatten, series
from growtrain.analysis.study import Entry, Study
from growtrain.environments.games import reference_scores, references_of, zeros_of
from growtrain.settings.text import episodes_text, format_count

TITLES: dict[Axis, str] = {"frames": "frames", "hours": "wall-clock", "flops": "FLOPs"}
_POINTS = 60
_DRAWS = 500  # bands are looked at, not read off
_TIME_UNITS = ((1.5, 1.0, "hours"), (1.5 / 60, 60.0, "minutes"), (0.0, 3600.0, "seconds"))
_NO_DIAGNOSTIC = {"frames", "updates", "stage", "states", "seconds", "policy_churn_frames"}


def aggregate_figure(study: Study, names: Sequence[str], found: dict[str, list[Estimate]], scope: str) -> Figure:
    """Every aggregate of every arm as a dot with its interval."""
    look = plots.styles(study.arms)
    rows = {arm: [_row(e, look[arm]) for e in estimates] for arm, estimates in found.items()}
    caption = f"{scope}. Bars are 95 % intervals; for the optimality gap lower is better."
    return Figure("aggregates", plots.intervals(names, rows), caption)


def curves_figure(
    study: Study,
    arms: Sequence[str],
    games: Sequence[str],
    at: dict[str, float],
    rng: np.random.Generator,
    *,
    name: str = "aggregate-curves",
    of: str = "training scores",
) -> Figure:
    """Interquartile mean of some arms' scores over games against frames, wall-clock and FLOPs."""
    look = plots.styles(study.arms)
    panels = []
    for axis in AXES:
        cut = {(a, g): [at_frames(e.curve, at[g]) for e in scored(study, a, g, at)] for a in arms for g in games}
        unit, label = _unit(axis, [curve for cell in cut.values() for curve in cell])
        lines = []
        for arm in arms:
            sets = [[(_x(c, axis) * unit, normalized(game, c.score)) for c in cut[arm, game]] for game in games]
            lines += _band(sets, iqm, look[arm], rng)
        y_label = f"{references_of(games)}-normalised score" if axis == "frames" else ""
        message = "" if lines else "unknown until a run has ended"
        panels.append(plots.Panel(f"IQM against {TITLES[axis]}", label, y_label, lines, message=message))
    caption = (
        f"Interquartile mean of {of} over all runs of all games, growing in frames, wall-clock and FLOPs of training. Bands are 95 % "
        "intervals, where every game has three seeds. A curve ends where the first of its runs does."
        f"{_behind([curve for cell in cut.values() for curve in cell])}"
    )
    svg = plots.curves(panels, {arm: look[arm] for arm in arms}, 3, height=270, shared_y=True)
    return Figure(name, svg, caption)


def profiles_figure(study: Study, arms: Sequence[str], games: Sequence[str], rng: np.random.Generator) -> Figure:
    """Performance profiles of some arms over games, at equal frames and at equal wall-clock."""
    look = plots.styles(study.arms)
    panels: list[plots.Panel] = []
    for axis in AXES[:2]:
        at = limits(study, study.arms, axis)
        scores = {arm: arm_scores(study, arm, axis, at, games) for arm in arms}
        values = np.concatenate([game for arm in arms for game in scores[arm]])
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        margin = max(0.05 * (high - low), 1e-3)
        grid = np.linspace(min(0.0, low - margin), high + margin, 201)
        lines = []
        for arm in arms:
            found = estimate(lambda s, grid=grid: performance_profile(s, grid), scores[arm], rng=rng, draws=_DRAWS)
            if found.value.shape:
                lines.append(plots.Line(grid, found.value, look[arm], found.low, found.high, marked=False))
        title, label = f"Performance profiles at equal {TITLES[axis]}", f"{references_of(games)}-normalised score t"
        panels.append(plots.Panel(title, label, "share of runs above t" if axis == "frames" else "", lines))
    caption = (
        "The share of runs above each score, at the greatest frames, and wall-clock, that every run of all arms has reached. "
        "An arm that is above another everywhere is better everywhere."
    )
    return Figure("profiles", plots.curves(panels, {arm: look[arm] for arm in arms}, 2, height=250), caption)


def game_figure(study: Study, index: int, game: str, at: dict[str, float], rng: np.random.Generator) -> Figure:
    """Scores on one game: every seed, the means, interventions, and where runs broke off."""
    look = plots.styles(study.arms)
    cells = {arm: study.cell(arm, game) for arm in study.arms if study.cell(arm, game)}
    levels = list(zip(reference_scores(game) or (), (zeros_of([game]), references_of([game])), strict=False))
    panels: list[plots.Panel] = []
    for axis in AXES:
        unit, label = _unit(axis, [entry.curve for cell in cells.values() for entry in cell])
        lines, events = [], []
        for arm, cell in cells.items():
            drawn = [entry for entry in cell if _is_known(entry.curve, axis)]
            for entry in drawn:
                broken = entry.run.status in ("failed", "interrupted")
                x = _x(entry.curve, axis) * unit
                lines.append(plots.Line(x, entry.curve.score, look[arm], thin=True, broken=broken))
            whole = [at_frames(e.curve, at[game]) for e in scored(study, arm, game, at) if _is_known(e.curve, axis)]
            lines += _band([[(_x(curve, axis) * unit, curve.score) for curve in whole]], mean, look[arm], rng)
            events += [(x * unit, look[arm]) for x in _interventions(drawn, axis)]
        message = "" if lines else "unknown until a run has ended" if panels and panels[0].lines else "no score yet"
        title, y_label = (game, "score") if axis == "frames" else (f"against {TITLES[axis]}", "")
        panels.append(plots.Panel(title, label, y_label, lines, events, levels, message))
    ended = f"have a score at {format_count(at[game])} frames" if game in at else "have a score"
    caption = (
        f"{game}: thick lines are means over the seeds that {ended}, thin lines single seeds; a cross is where a run failed or was "
        f"interrupted; triangles are interventions.{_behind([e.curve for cell in cells.values() for e in cell])}"
    )
    legend = {arm: look[arm] for arm in cells}
    return Figure(file_name("game", index, game), plots.curves(panels, legend, 3, height=260, shared_y=True), caption)


def _behind(curves: Sequence[Curve]) -> str:
    """A sentence on how many episodes the points of some curves are means of; empty where there is no point."""
    episodes = np.concatenate([np.zeros(0), *(curve.episodes for curve in curves)])
    if not len(episodes):
        return ""
    return f" A point of a run is the mean of {episodes_text([*episodes])}, {np.median(episodes):.0f} in the median."


def diagnostics_figure(study: Study, index: int, game: str) -> Figure | None:
    """A panel for each diagnostic that runs on a game measured, a line for each run; None if there is none."""
    look = plots.styles(study.arms)
    cells = {arm: cell for arm in study.arms if (cell := study.cell(arm, game))}
    found = {name for cell in cells.values() for e in cell for record in e.run.diagnostics for name in flatten(record)}
    panels = []
    for name in sorted(name for name in found - _NO_DIAGNOSTIC if "/head.frozen." not in name):
        lines = [plots.Line(*series(e.run, name), look[arm], marked=False) for arm, cell in cells.items() for e in cell]
        events = [(x, look[arm]) for arm, cell in cells.items() for x in _interventions(cell, "frames")]
        panels.append(plots.Panel(name, "frames", "", [line for line in lines if len(line.x)], events))
    if not panels:
        return None
    svg = plots.curves(panels, {arm: look[arm] for arm in cells}, 3, height=210)
    return Figure(
        file_name("diagnostics", index, game), svg, f"{game}: diagnostics, one line a run; frozen heads are left out."
    )


def scored(study: Study, arm: str, game: str, at: dict[str, float]) -> list[Entry]:
    """The runs of a cell that have a score at its limit."""
    cell = study.cell(arm, game) if game in at else []
    return [entry for entry in cell if not np.isnan(score_at(entry, "frames", at[game]))]


def file_name(kind: str, index: int, game: str) -> str:
    """A file name that no game's name can spoil."""
    return f"{kind}-{index:02d}-{re.sub('[^A-Za-z0-9_]+', '-', game)[:40]}"


def _x(curve: Curve, axis: Axis) -> FloatArray:
    x: FloatArray = getattr(curve, axis)
    return x


def _is_known(curve: Curve, axis: Axis) -> bool:
    return len(curve.frames) > 0 and not bool(np.isnan(_x(curve, axis)).any())


def _row(found: Estimate, style: plots.Style) -> plots.Row:
    low, high = (None if end is None else float(end) for end in (found.low, found.high))
    return plots.Row(float(found.value), low, high, style)


def _band(
    sets: Sequence[Sequence[tuple[FloatArray, FloatArray]]],
    statistic: Callable[[Scores], FloatArray],
    style: plots.Style,
    rng: np.random.Generator,
) -> list[plots.Line]:
    """A statistic of curves along their common range, with its interval; nothing without a common range.

    Args:
        sets: for each game the (x, y) of its runs.
        statistic: of scores.
        style: how it is drawn.
        rng: for the bootstrap.
    """
    flat = [x for runs in sets for x, _ in runs]
    if not flat or not all(len(runs) for runs in sets) or any(np.isnan(x).any() for x in flat):
        return []
    low, high = max(x[0] for x in flat), min(x[-1] for x in flat)
    if high < low:
        return []
    grid = np.linspace(low, high, _POINTS)
    scores = [np.stack([value_at(x, y, grid) for x, y in runs], axis=-1) for runs in sets]
    found = estimate(statistic, scores, rng=rng, draws=_DRAWS)
    return [plots.Line(grid, found.value, style, found.low, found.high)]


def _unit(axis: Axis, curves: Sequence[Curve]) -> tuple[float, str]:
    """What to multiply an axis by, and its label."""
    if axis != "hours":
        return 1.0, "frames" if axis == "frames" else "FLOPs of training"
    longest = max((float(curve.hours[-1]) for curve in curves if len(curve.hours)), default=1.0)
    return next((unit, label) for least, unit, label in _TIME_UNITS if longest >= least)


def _interventions(cell: Sequence[Entry], axis: Axis) -> list[float]:
    """Where each intervention of a cell's runs lies on an axis, the mean over the runs that had it."""
    times: list[list[float]] = []
    for entry in cell:
        curve = entry.curve
        own = [float(event["frames"]) for event in entry.run.growth_events if event["frames"] >= 0]
        passed, taken = (np.append(0.0, each) for each in (curve.frames, _x(curve, axis)))
        for stage, frames in enumerate(own):
            x = frames if axis == "frames" else float(np.interp(frames, passed, taken))
            times += [[]] if stage == len(times) else []
            times[stage].append(x)
    return [float(np.mean(values)) for values in times]
