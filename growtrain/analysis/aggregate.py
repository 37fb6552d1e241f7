"""Statistics of scores over games and runs that do not claim more than the runs show: robust aggregates with bootstrap intervals.

Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021, section 4: interquartile
mean, optimality gap, probability of improvement, performance profiles, and the stratified bootstrap with percentile intervals.

Deviations: 1. games may have unequal numbers of runs: a game weighs the same however many runs it has; 2. the interquartile mean cuts
exactly a quarter of the weight at each end, a boundary run counting in part, where the paper cuts whole runs (equal when 4 divides their
number); 3. fewer than `MIN_RUNS` runs in any game give no interval, and the reason; 4. a run without a score is NaN: it is left out of the
value and counted.

Units: scores are human-normalised wherever games are put together.

Shapes: `Scores` are one array (..., R_g) for each game g, its runs last; statistics reduce games and runs and keep the rest. The P games
of a chain that the same R runs have played one after the other are one cell (P, R) where it is asked how sure a statistic is.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from growtrain.plasticity.verdicts import student_t

FloatArray = NDArray[np.float64]
Scores = Sequence[FloatArray]

MIN_RUNS = 3  # fewer resample to so few values that an interval would be mere decoration
LEVEL = 0.95
_CHUNK = 2_000_000  # resampled values held at a time


def mean(scores: Scores) -> FloatArray:
    """Mean over games of the mean over runs."""
    return np.asarray(np.mean(_per_game(scores), axis=-1))


def median(scores: Scores) -> FloatArray:
    """Median over games of the mean over runs: what the Atari literature reports."""
    return np.asarray(np.median(_per_game(scores), axis=-1))


def iqm(scores: Scores) -> FloatArray:
    """Interquartile mean: of all runs of all games, without the quarter of the weight at each end (section 4.3)."""
    values, weights = _pooled(scores)
    order = np.argsort(values, axis=-1)
    upper = np.cumsum(weights[order], axis=-1)
    inner = np.clip(np.minimum(upper, 0.75) - np.maximum(upper - weights[order], 0.25), 0.0, None)
    return np.asarray(np.sum(np.take_along_axis(values, order, axis=-1) * inner, axis=-1) / np.sum(inner, axis=-1))


def optimality_gap(scores: Scores, gamma: float = 1.0) -> FloatArray:
    """How far runs fall short of `gamma` on average, those beyond it counting as reaching it (section 4.3); lower is better."""
    return gamma - mean([np.minimum(game, gamma) for game in scores])


def probability_of_improvement(scores: Scores, reference: Scores) -> FloatArray:
    """Mean over games of the probability that a run beats a run of the reference, ties counting half (section 4.3)."""
    wins = [
        np.mean((x[..., :, None] > y[..., None, :]) + 0.5 * (x[..., :, None] == y[..., None, :]), axis=(-2, -1))
        for x, y in zip(scores, reference, strict=True)
    ]
    return np.asarray(np.mean(np.stack(wins, axis=-1), axis=-1))


def performance_profile(scores: Scores, thresholds: ArrayLike) -> FloatArray:
    """Share of runs above each threshold, (..., T): the run-score distribution (section 4.2)."""
    levels = np.asarray(thresholds, dtype=np.float64)
    above = [np.mean(game[..., None, :] > levels[:, None], axis=-1) for game in scores]
    return np.asarray(np.mean(np.stack(above, axis=-1), axis=-1))


def paired_differences(
    scores: Sequence[Mapping[int, float]], reference: Sequence[Mapping[int, float]]
) -> list[dict[int, float]]:
    """Score minus reference by seed, for each that both have, one mapping a game; NaN where one of the two has no score.

    Args:
        scores: for each game, score by seed.
        reference: the same games in the same order.
    """
    return [
        {seed: x[seed] - y[seed] for seed in sorted(x.keys() & y.keys())}
        for x, y in zip(scores, reference, strict=True)
    ]


def value_at(x: FloatArray, y: FloatArray, grid: ArrayLike) -> FloatArray:
    """What a curve had reached at each point of `grid`: its last y at or before it, NaN before its first point."""
    index = np.searchsorted(x, np.asarray(grid, dtype=np.float64), side="right") - 1
    return np.where(index >= 0, y[np.maximum(index, 0)], np.nan) if len(x) else np.full(np.shape(grid), np.nan)


def first_reach(x: FloatArray, y: FloatArray, threshold: float) -> float:
    """The first x at which a curve is at or above the threshold; infinity if it never is, which is how censored times count."""
    reached = np.flatnonzero(y >= threshold)
    return float(x[reached[0]]) if len(reached) else float("inf")


def ratio_of_medians(times: Scores, reference: Scores) -> FloatArray:
    """Ratio of a game's median times, the median over games (of the logarithms: half and double make one).

    A median is finite while more than half of a game's runs got there. A game's ratio is infinite if only the reference got there, 0 the
    other way round; a game where neither did tells nothing and is left out. NaN where no game is left.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        pairs = zip(times, reference, strict=True)
        logs = np.stack([np.log(np.median(x, axis=-1) / np.median(y, axis=-1)) for x, y in pairs], axis=-1)
        logs = np.sort(logs, axis=-1)  # NaN, infinity by infinity, comes last
        known = np.sum(~np.isnan(logs), axis=-1, keepdims=True)
        middle = np.concatenate([np.maximum(known - 1, 0) // 2, known // 2], axis=-1)
        return np.asarray(
            np.exp(np.mean(np.take_along_axis(logs, np.minimum(middle, len(times) - 1), axis=-1), axis=-1))
        )


def ratio_of_means(costs: Scores, reference: Scores) -> FloatArray:
    """Ratio of a game's mean costs, the geometric mean over games."""
    logs = [np.log(np.mean(x, axis=-1) / np.mean(y, axis=-1)) for x, y in zip(costs, reference, strict=True)]
    return np.asarray(np.exp(np.mean(np.stack(logs, axis=-1), axis=-1)))


def of_parts(statistic: Callable[..., FloatArray]) -> Callable[..., FloatArray]:
    """A statistic of cells (..., P, R), whose runs are resampled with all the games that they have played."""

    def pooled(*samples: Scores) -> FloatArray:
        return statistic(*([part for cell in sample for part in np.moveaxis(cell, -2, 0)] for sample in samples))

    return pooled


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A statistic and how sure it is.

    Attributes:
        value: the statistic of the runs that have a score; NaN where a game has none.
        low, high: ends of its 95 % interval; None without one.
        reason: why there is no interval; empty with one.
        runs: runs that went in, over all games and samples.
        missing: runs that have no score and were left out.
    """

    value: FloatArray
    low: FloatArray | None
    high: FloatArray | None
    reason: str
    runs: int
    missing: int


def estimate(
    statistic: Callable[..., FloatArray],
    *samples: Scores,
    rng: np.random.Generator,
    draws: int = 2000,
    level: float = LEVEL,
) -> Estimate:
    """A statistic with its stratified percentile-bootstrap interval: runs are resampled within each game of each sample.

    Args:
        statistic: from one `Scores` per sample to an array; must accept leading dimensions.
        samples: one for each argument of the statistic. A run is left out, and counted as missing, if any of its values is NaN.
        rng: source of the resamples, left as it is: the same samples give the same interval wherever they are asked for.
        draws: resamples.
        level: probability that the interval is meant to cover.

    Raises:
        ValueError: a sample has no game.
    """
    kept, found = _kept(statistic, samples)
    if found.reason:
        return found
    resampled = bootstrap(statistic, *kept, rng=copy.deepcopy(rng), draws=draws)
    if np.isnan(resampled).any():
        return replace(found, reason="undefined in some resamples")
    # An observed value, not one between two: infinities (censored times) cannot be interpolated.
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0, method="inverted_cdf")
    return replace(found, low=low, high=high)


def score_estimate(
    statistic: Callable[..., FloatArray], *samples: Scores, rng: np.random.Generator, draws: int = 2000
) -> Estimate:
    """A statistic of scores, or the difference of one, with a 95 % interval that holds for few runs, too: by Student's t.

    Of three to five runs in a cell the percentile bootstrap's interval excludes the truth in 6 to 15 of 100 cases instead of 5, because
    resamples of n runs spread less than runs do, by a factor of (n - 1) / n, and because it knows no degrees of freedom. Here the
    bootstrap gives the standard error, corrected by that factor, and Welch (1947) the degrees of freedom, as of a difference of means.

    Args:
        statistic: as of `estimate`, giving one number.
        samples: one for each argument of the statistic, of cells (R,) or (P, R). A run is left out, and counted as missing, if it lacks a
            score of any of its games.
        rng: as of `estimate`.
        draws: resamples.
    """
    statistic = of_parts(statistic)
    kept, found = _kept(statistic, [[np.atleast_2d(cell) for cell in sample] for sample in samples])
    if found.reason:
        return found
    cells = [cell.sum(axis=0) for sample in kept for cell in sample]
    resampled = bootstrap(statistic, *kept, rng=copy.deepcopy(rng), draws=draws)
    spread = sum(np.var(cell) / len(cell) for cell in cells)
    correction = np.sqrt(sum(_squared_errors(cells)) / spread) if spread > 0 else 1.0
    reach = student_t(_degrees(cells)) * correction * np.std(resampled, ddof=1)
    return replace(found, low=found.value - reach, high=found.value + reach)


def paired_estimate(differences: Scores) -> Estimate:
    """The mean over games of the mean difference of a game's pairs, with its 95 % interval by Student's t, as of `score_estimate`."""
    (kept,), found = _kept(of_parts(mean), [[np.atleast_2d(cell) for cell in differences]])
    if found.reason:
        return found
    cells = [cell.sum(axis=0) for cell in kept]
    reach = student_t(_degrees(cells)) * np.sqrt(sum(_squared_errors(cells))) / sum(map(len, kept))
    return replace(found, low=found.value - reach, high=found.value + reach)


def _kept(statistic: Callable[..., FloatArray], samples: Sequence[Scores]) -> tuple[list[list[FloatArray]], Estimate]:
    """The runs that have a score, and the statistic of them without an interval; its reason is empty if there can be one."""
    if not all(len(sample) for sample in samples):
        raise ValueError("there is no game to aggregate over: give at least one array of scores")
    kept = [[game[..., _scored(game)] for game in sample] for sample in samples]
    sizes = [game.shape[-1] for sample in kept for game in sample]
    return kept, Estimate(
        value=statistic(*kept) if min(sizes) else np.array(np.nan),
        low=None,
        high=None,
        reason=_too_few(sizes),
        runs=sum(sizes),
        missing=sum(game.shape[-1] for sample in samples for game in sample) - sum(sizes),
    )


def _squared_errors(cells: Scores) -> list[float]:
    """Squared standard errors of the means of cells."""
    return [float(np.var(cell, ddof=1)) / len(cell) for cell in cells]


def _degrees(cells: Scores) -> int:
    """Welch's degrees of freedom of a sum or difference of the means of cells, rounded down; those of the smallest where none spreads."""
    errors = _squared_errors(cells)
    below = sum(error**2 / (len(cell) - 1) for error, cell in zip(errors, cells, strict=True))
    return max(int(sum(errors) ** 2 / below) if below > 0 else min(map(len, cells)) - 1, 1)


def _too_few(sizes: Sequence[int]) -> str:
    """Why runs of these numbers in their games give no interval; empty if they do."""
    if min(sizes) == 0:
        return "a game has no run with a score"
    if min(sizes) >= MIN_RUNS:
        return ""
    short = sum(size < MIN_RUNS for size in sizes)
    fewest = f"{min(sizes)} run{'s' if min(sizes) > 1 else ''}"
    return f"{fewest} in {'a' if short == 1 else short} cell{'' if short == 1 else 's'}; an interval needs {MIN_RUNS}"


def bootstrap(
    statistic: Callable[..., FloatArray], *samples: Scores, rng: np.random.Generator, draws: int
) -> FloatArray:
    """The statistic of `draws` stratified resamples, (draws, ...)."""
    chunk = max(1, _CHUNK // sum(game.size for sample in samples for game in sample))
    parts = [
        statistic(*([_resample(game, min(chunk, draws - start), rng) for game in sample] for sample in samples))
        for start in range(0, draws, chunk)
    ]
    return np.concatenate(parts)


def _resample(game: FloatArray, draws: int, rng: np.random.Generator) -> FloatArray:
    """(..., R) -> (draws, ..., R): whole runs, drawn with replacement."""
    size = game.shape[-1]
    return np.moveaxis(game[..., rng.integers(size, size=(draws, size))], -2, 0)


def _scored(game: FloatArray) -> NDArray[np.bool_]:
    return np.asarray(~np.isnan(game).any(axis=tuple(range(game.ndim - 1))))


def _per_game(scores: Scores) -> FloatArray:
    return np.stack([np.mean(game, axis=-1) for game in scores], axis=-1)


def _pooled(scores: Scores) -> tuple[FloatArray, FloatArray]:
    """All runs (..., N) and their weights (N), each game weighing 1 / G."""
    weights = [np.full(game.shape[-1], 1 / (len(scores) * game.shape[-1])) for game in scores]
    return np.concatenate(list(scores), axis=-1), np.concatenate(weights)
