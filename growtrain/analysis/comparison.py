"""Arms of a study against each other: where they can be compared, and what can be said about it in one sentence.

Arms are compared at equal frames, equal wall-clock and equal FLOPs, each at the greatest value that every run of both arms has reached
that is done or still running. A run that ended earlier has no score there: it is counted as missing. Of an arm that has no such run on a
game, those count that were stopped.

Units: scores are normalised, 0 a random player, 1 the game's reference (a human, of Atari games); times are hours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from growtrain.analysis.aggregate import (
    MIN_RUNS,
    Estimate,
    FloatArray,
    Scores,
    estimate,
    first_reach,
    iqm,
    of_parts,
    paired_differences,
    paired_estimate,
    probability_of_improvement,
    ratio_of_means,
    ratio_of_medians,
    score_estimate,
    value_at,
)
from growtrain.analysis.runs import Run, at_frames, number
from growtrain.analysis.study import HEALTHY, Entry, Study, those_that_count
from growtrain.environments.games import reference_scores, references_of
from growtrain.settings.text import format_count

Axis = Literal["frames", "hours", "flops"]
AXES: tuple[Axis, ...] = ("frames", "hours", "flops")
LEVELS = (0.5, 0.9)  # of the way from a random policy to the reference's score
MARGIN = 0.25  # of the reference's score: an arm that may have lost more is not said to keep up


def limits(study: Study, arms: Sequence[str], axis: Axis) -> dict[str, float]:
    """For each game the greatest value on an axis at which all runs of these arms that count have a score; games without are left out."""
    found: dict[str, float] = {}
    for game in study.games:
        entries = [entry for arm in arms for entry in study.cell(arm, game) if len(entry.curve.frames)]
        ends = [float(getattr(entry.curve, axis)[-1]) for entry in those_that_count(entries, lambda e: e.run)]
        if ends and np.isfinite(ends).all():
            found[game] = min(ends)
    return found


def pair_limits(study: Study, pair: Sequence[str], axis: Axis) -> dict[str, float]:
    """The same for two arms, each of which has runs that count: on a game where it has no healthy run, those that were stopped."""
    found, each = limits(study, pair, axis), [limits(study, [arm], axis) for arm in pair]
    for game in found:
        failed = [all(entry.run.status == "failed" for entry in study.cell(arm, game)) for arm in pair]
        if not any(failed) and all(game in of_arm for of_arm in each):
            found[game] = min(of_arm[game] for of_arm in each)
    return found


def score_at(entry: Entry, axis: Axis, limit: float) -> float:
    """A run's score in game points at a limit; NaN if it did not get there."""
    x: FloatArray = getattr(entry.curve, axis)
    return float(value_at(x, entry.curve.score, limit)) if len(x) and x[-1] >= limit else float("nan")


def episodes_at(entry: Entry, axis: Axis, limit: float) -> float:
    """How many episodes `score_at` is the mean of; NaN if the run did not get there."""
    x: FloatArray = getattr(entry.curve, axis)
    return float(value_at(x, entry.curve.episodes, limit)) if len(x) and x[-1] >= limit else float("nan")


def normalized(game: str, score: FloatArray) -> FloatArray:
    """Normalised scores: 0 and 1 are the reference scores of the game."""
    zero, one = references(game)
    return (score - zero) / (one - zero)


def references(game: str) -> tuple[float, float]:
    """The scores that count as 0 and as 1; raises `ValueError` where there are none."""
    if (scores := reference_scores(game)) is None:
        raise ValueError(f"{game} has no reference scores")
    return scores


def cell_scores(study: Study, arm: str, game: str, axis: Axis, limit: float) -> dict[int, float]:
    """Normalised score by seed; NaN where a run did not get to the limit."""
    scores = {entry.run.seed: score_at(entry, axis, limit) for entry in study.cell(arm, game)}
    return {seed: float(normalized(game, np.array(score))) for seed, score in scores.items()}


def in_cells(study: Study, games: Sequence[str], by_seed: Sequence[Mapping[int, float]]) -> list[FloatArray]:
    """Values by seed, one mapping a game, as cells (P, R): runs that played P games of a chain are one cell; NaN where a run has none."""
    together: dict[str, list[Mapping[int, float]]] = {}
    for game, values in zip(games, by_seed, strict=True):
        together.setdefault(study.chains.get(game, game), []).append(values)
    return [
        np.array(
            [
                [values.get(seed, np.nan) for seed in dict.fromkeys(s for part in parts for s in part)]
                for values in parts
            ]
        )
        for parts in together.values()
    ]


def arm_cells(study: Study, arm: str, axis: Axis, at: dict[str, float], games: Sequence[str]) -> list[FloatArray]:
    """Normalised scores of an arm, as `in_cells`."""
    return in_cells(study, games, [cell_scores(study, arm, game, axis, at[game]) for game in games])


def arm_scores(study: Study, arm: str, axis: Axis, at: dict[str, float], games: Sequence[str]) -> list[FloatArray]:
    """Normalised scores of an arm, one array a game."""
    return [np.array(list(cell_scores(study, arm, game, axis, at[game]).values())) for game in games]


@dataclass(frozen=True)
class Point:
    """Two arms at equal frames, hours or FLOPs: interquartile means, their difference, and who wins how often."""

    at: dict[str, float]
    arm: Estimate
    reference: Estimate
    difference: Estimate
    improvement: Estimate
    paired: Estimate | None


@dataclass(frozen=True)
class TimeToScore:
    """How much longer the arm takes than the reference to a share of the way from random to the reference's score.

    Attributes:
        level: the share.
        axis: what is counted.
        ratio: of the medians; below 1 the arm is first, infinite if it never gets there.
        reached, reference_reached: (runs that got there, runs).
        early, reference_early: runs that were there at their first score already, a tenth into the budget: that they took less is not
            seen, which draws the ratio towards 1.
    """

    level: float
    axis: Axis
    ratio: Estimate
    reached: tuple[int, int]
    reference_reached: tuple[int, int]
    early: int
    reference_early: int

    @property
    def known(self) -> bool:
        """Whether any time was seen: else every run that got there was there at its first score, and a ratio of 1 says nothing."""
        return self.reached[0] + self.reference_reached[0] > self.early + self.reference_early or not (
            self.early and self.reference_early
        )


@dataclass(frozen=True)
class Comparison:
    """An arm against its reference, over the games where both have a score.

    Attributes:
        arm, reference: labels.
        games: where both have a score at equal frames.
        elsewhere: games that either of the two was run on without a score of both.
        unknown: why no game is compared.
        short: cells with fewer runs than an interval needs, as text.
        points: by axis; an axis is missing where it cannot be compared.
        costs: ratio of hours and of FLOPs for the same frames.
        times: time-to-score, over the games where the reference clearly learned.
        unlearned: the other ones.
        machines: what the runs ran on, more than one entry if wall-clock is not comparable.
        missing: runs without a score at equal frames, as text by arm and game, of every game that both were run on.
        diverged: runs that could not go on, whether they have a score there or not, by arm.
        unscored: runs that have no score yet where an axis ends, as text by axis, which then is left out.
        related: cells whose runs share a past, as text.
        commits: how many versions of the code the runs were made by.
        epsilons: of the evaluations of those that have a score.
    """

    arm: str
    reference: str
    games: list[str]
    elsewhere: list[str]
    unknown: str
    short: list[str]
    points: dict[Axis, Point]
    costs: dict[Axis, Estimate]
    times: list[TimeToScore]
    unlearned: list[str]
    machines: list[str]
    missing: list[str]
    diverged: dict[str, int]
    unscored: dict[Axis, str]
    related: list[str]
    commits: int
    epsilons: list[float]


def compare(study: Study, arm: str, reference: str, rng: np.random.Generator) -> Comparison:
    """Everything that can be said about an arm and its reference."""
    pair = (arm, reference)
    study = study.between(pair)
    at = pair_limits(study, pair, "frames")
    both = [game for game in study.scored_games if all(study.cell(a, game) for a in pair)]
    played = [(a, game, study.cell(a, game)) for game in both for a in pair]
    scored = {
        id(e) for a, game, cell in played if game in at for e in cell if not np.isnan(score_at(e, "frames", at[game]))
    }
    counts = {(a, game): sum(id(e) in scored for e in cell) for a, game, cell in played}
    games = [game for game in both if all(counts[a, game] for a in pair)]
    elsewhere = [game for game in study.games if game not in games and any(study.cell(a, game) for a in pair)]
    short = [
        f"{counts[a, game]} run{'s' if counts[a, game] > 1 else ''} of {a} on {game}"
        for game in games
        for a in pair
        if counts[a, game] < MIN_RUNS
    ]
    points: dict[Axis, Point] = {}
    costs: dict[Axis, Estimate] = {}
    unscored: dict[Axis, str] = {}
    for axis in AXES if games else ():
        limit = pair_limits(study, pair, axis)
        if all(game in limit for game in games):
            late = [_unscored(study, a, game, axis, limit[game]) for a in pair for game in games if axis != "frames"]
            late = [text for text in late if text]
            if late:
                unscored[axis] = "; ".join(late)
            else:
                points[axis] = _point(study, pair, axis, limit, games, rng)
            if axis != "frames":
                taken = [
                    in_cells(study, games, [_taken(study, a, game, axis, at[game]) for game in games]) for a in pair
                ]
                costs[axis] = estimate(of_parts(ratio_of_means), *taken, rng=rng)
    learned = [game for game in games if _has_learned(study, reference, game, at[game])]
    times = _times(study, pair, at, learned, tuple(points), rng) if learned else []
    unlearned = [game for game in games if game not in learned]
    cells = [(a, game, study.cell(a, game)) for a in pair for game in games]
    machines = sorted({_machine(e.run) for _, _, cell in cells for e in cell})
    ended = [(a, game, [e for e in cell if id(e) not in scored], cell) for a, game, cell in played]
    return Comparison(
        arm,
        reference,
        games,
        elsewhere,
        _why_unknown(study, pair) if not games else "",
        short,
        points,
        costs,
        times,
        unlearned,
        machines,
        missing=[
            f"{len(without)} of {len(cell)} runs of {a} on {game} have no score there"
            for a, game, without, cell in ended
            if without
        ],
        diverged={
            a: len({e.run.path for each, _, _, cell in ended if each == a for e in cell if has_diverged(e.run)})
            for a in pair
        },
        unscored=unscored,
        related=[f"{a} on {game}" for a, game, cell in cells if _share_a_past([e.run for e in cell])],
        commits=len(
            {
                (c, e.run.about.get("git_modified"))
                for *_, cell in cells
                for e in cell
                if (c := e.run.about.get("git_commit"))
            }
        ),
        epsilons=sorted(
            {number(e.run.settings, "eval_epsilon", 0.0) for *_, cell in cells for e in cell if id(e) in scored}
        ),
    )


def _why_unknown(study: Study, pair: tuple[str, str]) -> str:
    """Why no game can be compared."""
    both = [game for game in study.games if all(study.cell(arm, game) for arm in pair)]
    if not both:
        return "no game was played by both"
    if not any(game in study.scored_games for game in both):
        return f"{', '.join(both)} {'has' if len(both) == 1 else 'have'} no reference scores to normalise by"
    return "no game has a score of both"


def has_diverged(run: Run) -> bool:
    """Whether it ended because its learner could not go on."""
    return run.status == "failed" and str(run.summary.get("reason")).startswith("Diverged")


def _unscored(study: Study, arm: str, game: str, axis: Axis, limit: float) -> str:
    """How many healthy runs of a cell have their first score only beyond a limit, as text: those that are there are not its like."""
    healthy = [e for e in study.cell(arm, game) if e.run.status in HEALTHY and len(e.curve.frames)]
    late = sum(float(getattr(entry.curve, axis)[0]) > limit for entry in healthy)
    return f"{late} of {len(healthy)} runs of {arm} on {game}" if late else ""


def _share_a_past(runs: Sequence[Run]) -> bool:
    """Whether any two runs went on from the same one, or one from the other."""
    own = {str(run.path.resolve()) for run in runs} | {run.path.resolve().name for run in runs}
    parents = [run.parent for run in runs if run.parent]
    return len(set(parents)) < len(parents) or any(parent in own for parent in parents)


def _point(
    study: Study,
    pair: tuple[str, str],
    axis: Axis,
    at: dict[str, float],
    games: Sequence[str],
    rng: np.random.Generator,
) -> Point:
    by_seed = [[cell_scores(study, arm, game, axis, at[game]) for game in games] for arm in pair]
    x, y = (in_cells(study, games, each) for each in by_seed)
    differences = paired_differences(*by_seed)
    return Point(
        at={game: at[game] for game in games},
        arm=score_estimate(iqm, x, rng=rng),
        reference=score_estimate(iqm, y, rng=rng),
        difference=score_estimate(lambda a, b: iqm(a) - iqm(b), x, y, rng=rng),
        improvement=_improvement(x, y, rng),
        paired=paired_estimate(in_cells(study, games, differences)) if all(differences) else None,
    )


def _improvement(x: Scores, y: Scores, rng: np.random.Generator) -> Estimate:
    """How often a run beats one of the reference; without an interval where all do or none does, since all resamples say the same."""
    found = estimate(of_parts(probability_of_improvement), x, y, rng=rng)
    if found.low is not None and found.value in (0, 1):
        return replace(found, low=None, high=None, reason="all resamples say the same")
    return found


def _taken(study: Study, arm: str, game: str, axis: Axis, frames: float) -> dict[int, float]:
    """What each run of a cell, by seed, had taken at a number of frames; NaN for one that did not get there."""
    curves = {entry.run.seed: entry.curve for entry in study.cell(arm, game)}
    return {
        seed: float(value_at(c.frames, getattr(c, axis), frames))
        if len(c.frames) and c.frames[-1] >= frames
        else np.nan
        for seed, c in curves.items()
    }


def _has_learned(study: Study, arm: str, game: str, frames: float) -> bool:
    """Whether every run of a cell that has a score ends above a random policy and above where it began."""
    scored = [e for e in study.cell(arm, game) if not np.isnan(score_at(e, "frames", frames))]
    least = [max(references(game)[0], float(entry.curve.score[0])) for entry in scored]
    return all(score_at(entry, "frames", frames) > low for entry, low in zip(scored, least, strict=True))


def _times(
    study: Study,
    pair: tuple[str, str],
    at: dict[str, float],
    games: Sequence[str],
    axes: Sequence[Axis],
    rng: np.random.Generator,
) -> list[TimeToScore]:
    ends = {g: float(np.nanmean([score_at(e, "frames", at[g]) for e in study.cell(pair[1], g)])) for g in games}
    found = []
    for level in LEVELS:
        goals = {g: references(g)[0] + level * (ends[g] - references(g)[0]) for g in games}
        for axis in axes:
            x, y = ([_time_to(study.cell(a, g), axis, goals[g], at[g]) for g in games] for a in pair)
            cells = (in_cells(study, games, each) for each in (x, y))
            ratio = estimate(of_parts(ratio_of_medians), *cells, rng=rng)
            early = [sum(_is_early(study.cell(a, g), goals[g], at[g]) for g in games) for a in pair]
            found.append(TimeToScore(level, axis, ratio, _reached(x), _reached(y), *early))
    return found


def _time_to(cell: Sequence[Entry], axis: Axis, goal: float, frames: float) -> dict[int, float]:
    """When each run, by seed, first got to a score: infinity if it did not by `frames`, or diverged; NaN if it ended before it could."""
    times = {}
    for entry in cell:
        curve = at_frames(entry.curve, frames)
        time = first_reach(getattr(curve, axis), curve.score, goal)
        ended_early = np.isinf(time) and (not len(entry.curve.frames) or entry.curve.frames[-1] < frames)
        times[entry.run.seed] = np.nan if ended_early and not has_diverged(entry.run) else time
    return times


def _is_early(cell: Sequence[Entry], goal: float, frames: float) -> int:
    """How many runs of a cell are at a score when their curves begin."""
    curves = [at_frames(entry.curve, frames) for entry in cell]
    return sum(len(curve.score) > 0 and bool(curve.score[0] >= goal) for curve in curves)


def _reached(times: Sequence[Mapping[int, float]]) -> tuple[int, int]:
    return sum(bool(np.isfinite(t)) for game in times for t in game.values()), sum(map(len, times))


def _machine(run: Run) -> str:
    """What it ran on last, and what of that was another before."""
    changes = [change for resume in run.resumes for change in resume.get("skew") or () if isinstance(change, str)]
    moved = [change for change in changes if change.startswith(("device ", "num_threads "))]
    now = f"{run.about.get('device', 'unknown device')}, {run.about.get('num_threads', '?')} threads"
    return f"{now} ({', '.join(moved)} on the way)" if moved else now


def value_text(value: float) -> str:
    """A number with three decimals, one from 10 on, none from 100 on; `never` for infinity, a dash for NaN."""
    if np.isnan(value):
        return "-"
    if np.isinf(value):
        return "never"
    decimals = 3 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"  # + 0.0: not -0.000


def interval_text(estimate: Estimate, text: Callable[[float], str] = value_text) -> str:
    """`0.123 [0.100, 0.200]`, or the value alone where there is no interval; `text` is how a number is written."""
    value = text(float(estimate.value))
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{text(float(estimate.low))}, {text(float(estimate.high))}]"


def ratio_text(ratio: Estimate) -> str:
    """`x0.800 [0.780, 0.830]`, or the value alone where all runs agree."""
    agreed = ratio.low is not None and ratio.high is not None and np.allclose([ratio.low, ratio.high], ratio.value)
    return f"x{value_text(float(ratio.value)) if agreed else interval_text(ratio)}"


def verdict(comparison: Comparison, evaluated: Comparison | None = None) -> str:
    """One honest sentence, or two, by the scores of training; another, if they are given, by evaluations."""
    by_training, by_evaluations = _verdict(comparison), _by_evaluations(evaluated, comparison) if evaluated else ""
    return f"{by_training} {by_evaluations}".rstrip()


def _by_evaluations(evaluated: Comparison, trained: Comparison) -> str:
    """What evaluations say, and of which games and frames if not of training's; nothing without an interval."""
    point = evaluated.points.get("frames")
    if point is None or point.difference.low is None or point.difference.high is None:
        return ""
    if len(evaluated.epsilons) > 1:
        return f"Its evaluations are not compared: they are at epsilon {epsilons_text(evaluated)}."
    means = (
        f"IQM {interval_text(point.arm)} against {interval_text(point.reference)}, difference {interval_text(point.difference)}"
        f"{_missing_clause(evaluated)}"
    )
    at = trained.points["frames"].at if "frames" in trained.points else {}
    of = f" on {', '.join(evaluated.games)} alone" if evaluated.games != trained.games else ""
    if any(point.at[game] < at.get(game, 0.0) for game in evaluated.games):
        of += f", at {_frames_text(point)}"
    if diverged := _diverged_text(evaluated):
        return f"Its evaluations{of} do not tell: {diverged}. {means}."
    says = "higher" if point.difference.low > 0 else "lower" if point.difference.high < 0 else ""
    return f"Its evaluations{of} {f'score {says}' if says else 'are not told apart'}: {means}."


def epsilons_text(comparison: Comparison) -> str:
    """As in `0.01 and 0.1`."""
    return " and ".join(f"{epsilon:g}" for epsilon in comparison.epsilons)


def _frames_text(point: Point) -> str:
    return ", ".join(sorted({format_count(frames) for frames in point.at.values()})) + " frames"


def _missing_clause(comparison: Comparison) -> str:
    """Which runs have no score, and which are no other seeds."""
    clause = f"; {'; '.join(comparison.missing)}" if comparison.missing else ""
    if comparison.related:
        clause += f"; runs of {', '.join(comparison.related)} share a past, so intervals are too narrow"
    return clause


def _diverged_text(comparison: Comparison) -> str:
    which = " and ".join(f"{count} of {a}" for a, count in comparison.diverged.items() if count)
    left = ", and only the others have a score" if comparison.games and comparison.missing else ""
    return f"{which} diverged{left}" if which else ""


def _verdict(comparison: Comparison) -> str:
    arm, reference = comparison.arm, comparison.reference
    diverged = _diverged_text(comparison)
    if "frames" not in comparison.points:
        why = comparison.unknown + (f": {diverged}" if diverged else "") + _missing_clause(comparison)
        return f"Cannot tell how {arm} compares with {reference}: {why}."
    point = comparison.points["frames"]
    where = _frames_text(point)
    scope = f"{point.difference.runs} runs, {len(comparison.games)} game{'s' if len(comparison.games) > 1 else ''}"
    how = f"{references_of(comparison.games)}-normalised"
    means = f"IQM {interval_text(point.arm)} against {interval_text(point.reference)}"
    if point.difference.low is None or point.difference.high is None:
        why = "; ".join(comparison.short[:3]) or point.difference.reason
        return (
            f"Cannot tell whether {arm} keeps up with {reference}: {why}, and an interval needs {MIN_RUNS}. "
            f"So far, at {where}: {means}, {how} ({scope})."
        )
    means += f", difference {interval_text(point.difference)}, {how} ({scope}){_missing_clause(comparison)}"
    if diverged:
        return f"Cannot tell how {arm} compares with {reference}: {diverged}. {means}."
    if all(e.low is not None and e.low <= 0 for e in (point.arm, point.reference)):
        return (
            f"Cannot tell whether {arm} keeps up with {reference}: at {where} neither is clearly better than a random policy, "
            f"whose score is 0. {means}."
        )
    if point.difference.low > 0:
        outcome = f"{arm} scores higher in training than {reference}"
    elif point.difference.high < 0:
        outcome = f"{arm} scores lower in training than {reference}"
    elif (loss := -float(point.difference.low) / max(float(point.reference.value), 1e-9)) > MARGIN:
        return (
            f"Cannot tell whether {arm} keeps up with {reference}: no difference shows at {where}{_cost_clause(comparison)}, "
            f"but losing {f'{loss:.0%} of' if loss < 1 else 'all'} its score is not excluded. {means}."
        )
    else:
        outcome = f"{arm} reaches {reference}'s training score within the interval"
    return f"{outcome} at equal frames ({where}){_cost_clause(comparison)}: {means}."


def _cost_clause(comparison: Comparison) -> str:
    clauses = []
    if "hours" in comparison.costs and len(comparison.machines) == 1:
        clauses.append(f"{ratio_text(comparison.costs['hours'])} of its time")
    if "flops" in comparison.costs:
        clauses.append(f"{ratio_text(comparison.costs['flops'])} of its FLOPs")
    return f", at {' and '.join(clauses)}" if clauses else ""
