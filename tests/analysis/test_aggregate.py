"""Statistics against scipy, against exhaustive resampling, against published numbers, and against what they must be invariant to."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from growtrain.analysis.aggregate import (
    FloatArray,
    bootstrap,
    estimate,
    first_reach,
    iqm,
    mean,
    median,
    optimality_gap,
    paired_differences,
    paired_estimate,
    performance_profile,
    probability_of_improvement,
    ratio_of_means,
    ratio_of_medians,
    score_estimate,
    value_at,
)
from growtrain.environments.games import human_normalized_score

RAGGED = [3, 5, 4]


def draw(sizes: list[int], seed: int = 0) -> list[FloatArray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=size) + game for game, size in enumerate(sizes)]


def published(agent: str) -> list[FloatArray]:
    """Human-normalised scores of a published agent, one run on each of the 57 games."""
    text = (Path(__file__).parent / "agent57_scores.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()[1:]))
    return [np.array([human_normalized_score(row["game"], float(row[agent]))]) for row in rows]


@pytest.mark.parametrize("sizes", [[4], [8, 8, 8], [5] * 4, [3] * 8])
def test_iqm_is_scipys_trimmed_mean_where_a_quarter_is_a_whole_number_of_runs(sizes: list[int]) -> None:
    scores = draw(sizes)
    expected = scipy.stats.trim_mean(np.concatenate(scores), 0.25)
    np.testing.assert_allclose(iqm(scores), expected, rtol=1e-12)


@pytest.mark.parametrize("sizes", [[3], [5, 5], RAGGED, [1, 2, 7]])
def test_iqm_weighs_games_equally_and_cuts_exactly_a_quarter(sizes: list[int]) -> None:
    scores = draw(sizes)
    whole = 4 * int(np.lcm.reduce(sizes))  # copies of runs that make all games equally long and a quarter whole
    copies = np.concatenate([np.repeat(game, whole // len(game)) for game in scores])
    np.testing.assert_allclose(iqm(scores), scipy.stats.trim_mean(copies, 0.25), rtol=1e-12)


@pytest.mark.parametrize("statistic", [iqm, mean, median])
def test_aggregates_ignore_order_and_follow_affine_maps(statistic) -> None:  # type: ignore[no-untyped-def]
    scores = draw(RAGGED)
    shuffled = [game[::-1] for game in reversed(scores)]
    np.testing.assert_allclose(statistic(shuffled), statistic(scores), rtol=1e-12)
    mapped = [3.0 * game - 7.0 for game in scores]
    np.testing.assert_allclose(statistic(mapped), 3.0 * statistic(scores) - 7.0, rtol=1e-12)


def test_an_outlier_moves_the_mean_and_not_the_iqm() -> None:
    scores = draw([8])
    wild = [np.where(scores[0] == scores[0].max(), 1e6, scores[0])]
    assert iqm(wild) == iqm(scores)
    assert mean(wild) > 1e4 * abs(mean(scores))


def test_hand_checked_values() -> None:
    scores = [np.array([0.0, 2.0]), np.array([0.5, 0.5, 0.5]), np.array([3.0])]
    assert mean(scores) == pytest.approx((1 + 0.5 + 3) / 3)
    assert median(scores) == 1
    assert optimality_gap(scores) == pytest.approx(1 - (0.5 + 0.5 + 1) / 3)


@pytest.mark.parametrize(
    ("agent", "median_percent", "above_human"), [("agent57", 1933.49, 57), ("muzero", 2381.51, 51)]
)
def test_published_agents_have_their_published_median(agent: str, median_percent: float, above_human: int) -> None:
    """Badia et al. 2020, table 1: median human-normalised score and number of games above human."""
    scores = published(agent)
    assert len(scores) == 57
    assert 100 * median(scores) == pytest.approx(median_percent, abs=0.005)
    assert sum(float(game[0]) > 1 for game in scores) == above_human


@pytest.mark.parametrize(("agent", "mean_percent"), [("agent57", 4766.25), ("muzero", 5661.84)])
def test_published_agents_have_their_published_mean_with_the_papers_video_pinball(
    agent: str, mean_percent: float
) -> None:
    """The same table's mean: the paper takes 0 for a random policy on Video Pinball, where DQN Zoo has 16256.9."""
    random_score, human_score = 16256.9, 17667.9
    text = (Path(__file__).parent / "agent57_scores.csv").read_text(encoding="utf-8")
    pinball = next(row for row in csv.DictReader(text.splitlines()[1:]) if row["game"] == "video_pinball")
    ours = (float(pinball[agent]) - random_score) / (human_score - random_score)
    papers = float(pinball[agent]) / human_score
    scores = [np.where(game == ours, papers, game) for game in published(agent)]
    assert 100 * mean(scores) == pytest.approx(mean_percent, abs=0.005)
    assert 100 * mean(published(agent)) > mean_percent + 1000  # one game with a small span carries the mean


def test_probability_of_improvement_is_mann_whitneys_u() -> None:
    x, y = draw(RAGGED, 1), draw([4, 3, 6], 2)
    x[0][0] = y[0][0]  # a tie
    expected = [scipy.stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(probability_of_improvement(x, y), np.mean(expected), rtol=1e-12)
    np.testing.assert_allclose(probability_of_improvement(x, y) + probability_of_improvement(y, x), 1)
    assert probability_of_improvement(x, x) == 0.5
    assert probability_of_improvement([np.ones(3)], [np.ones(4)]) == 0.5


def test_the_area_under_a_profile_is_the_mean() -> None:
    scores = [np.abs(game) for game in draw(RAGGED)]
    grid = np.linspace(0, 10, 20_001)
    profile = performance_profile(scores, grid)
    assert profile[0] == 1
    assert profile[-1] == 0
    assert np.mean(profile) * 10 == pytest.approx(float(mean(scores)), abs=1e-3)


def test_interval_is_that_of_all_resamples() -> None:
    game = np.array([1.0, 2.0, 6.0])
    every = np.sort([np.mean(sample) for sample in itertools.product(game, repeat=3)])  # 27, equally likely
    found = estimate(mean, [game], rng=np.random.default_rng(0), draws=20_000)
    low, high = np.quantile(every, [0.025, 0.975], method="inverted_cdf")
    assert found.value == 3
    assert (found.low, found.high) == (low, high)
    resampled = bootstrap(mean, [game], rng=np.random.default_rng(0), draws=20_000)
    for value in np.unique(every):
        assert np.mean(resampled == value) == pytest.approx(np.mean(every == value), abs=0.012)


def test_interval_is_scipys_percentile_bootstrap() -> None:
    game = np.random.default_rng(3).exponential(size=20)
    ours = estimate(mean, [game], rng=np.random.default_rng(0), draws=20_000)
    theirs = scipy.stats.bootstrap(
        (game,), np.mean, n_resamples=20_000, method="percentile", random_state=np.random.default_rng(1)
    ).confidence_interval
    np.testing.assert_allclose([ours.low, ours.high], [theirs.low, theirs.high], rtol=0.02)


def test_resampling_stays_within_games() -> None:
    scores = [np.full(3, 0.0), np.full(3, 100.0)]
    found = estimate(mean, scores, rng=np.random.default_rng(0))
    assert (found.low, found.value, found.high) == (50, 50, 50)
    mixed = estimate(mean, [np.concatenate(scores)], rng=np.random.default_rng(0))  # what it must not do
    assert mixed.low is not None
    assert mixed.low < 30


def test_intervals_cover_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        found = estimate(mean, [rng.normal(size=10), rng.normal(size=10)], rng=rng, draws=400)
        assert found.low is not None
        assert found.high is not None
        covered.append(found.low <= 0 <= found.high)
    assert 0.88 < np.mean(covered) < 0.98  # percentile intervals of few runs are a little narrow


def test_the_same_generator_gives_the_same_interval_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = estimate(iqm, draw(RAGGED), rng=np.random.default_rng(5), draws=50)
    assert estimate(iqm, draw(RAGGED), rng=np.random.default_rng(5), draws=50) == before
    monkeypatch.setattr("growtrain.analysis.aggregate._CHUNK", 100)
    sizes = []

    def watched(scores: list[FloatArray]) -> FloatArray:
        sizes.append(sum(game.size for game in scores))
        return iqm(scores)

    assert bootstrap(watched, draw(RAGGED), rng=np.random.default_rng(5), draws=50).shape == (50,)
    assert max(sizes) <= 100


def test_curves_are_aggregated_point_by_point_with_whole_runs() -> None:
    curves = [np.random.default_rng(game).normal(size=(7, size)) for game, size in enumerate(RAGGED)]
    found = estimate(iqm, curves, rng=np.random.default_rng(0))
    np.testing.assert_allclose(found.value, [iqm([game[point] for game in curves]) for point in range(7)])
    assert found.low is not None
    assert found.low.shape == (7,)
    offset = [np.stack([game[0], game[0] + 1]) for game in curves]  # the same resample at both points
    pair = estimate(iqm, offset, rng=np.random.default_rng(0))
    assert pair.low is not None
    assert pair.low[1] - pair.low[0] == pytest.approx(1)


def test_failed_runs_are_counted_and_few_runs_have_no_interval() -> None:
    nan = np.nan
    found = estimate(mean, [np.array([1.0, 2.0, nan, 3.0]), np.array([4.0, 5.0, 6.0])], rng=np.random.default_rng(0))
    assert (float(found.value), found.runs, found.missing) == (3.5, 6, 1)
    assert found.low is not None
    short = estimate(mean, [np.array([1.0, nan, 3.0]), np.array([4.0, 5.0, 6.0])], rng=np.random.default_rng(0))
    assert (float(short.value), short.low, short.runs, short.missing) == (3.5, None, 5, 1)
    assert "2 runs" in short.reason
    assert "needs 3" in short.reason
    none = estimate(mean, [np.array([nan]), np.array([4.0])], rng=np.random.default_rng(0))
    assert np.isnan(none.value)
    assert (none.low, none.missing) == (None, 1)
    with pytest.raises(ValueError, match="no game"):
        estimate(mean, [], rng=np.random.default_rng(0))


def test_pairs_have_the_same_seed_and_a_failed_half_is_counted() -> None:
    x = [{0: 5.0, 1: 6.0, 2: np.nan, 3: 8.0}]
    y = [{3: 1.0, 1: 2.0, 2: 3.0, 7: 4.0}]
    np.testing.assert_equal(paired_differences(x, y), [{1: 4.0, 2: np.nan, 3: 7.0}])


def test_the_same_samples_give_the_same_interval_wherever_they_are_asked_for() -> None:
    samples, rng = [np.arange(7.0)], np.random.default_rng(0)
    first, second = (estimate(mean, samples, rng=rng) for _ in range(2))
    assert (first.low, first.high) == (second.low, second.high)


def test_paired_intervals_are_student_s_t_and_hold_the_truth_as_often_as_they_say() -> None:
    one = paired_estimate([np.array([1.0, 2.0, 4.0, np.nan])])
    # scipy.stats.ttest_1samp([1, 2, 4], 0).confidence_interval(0.95)
    np.testing.assert_allclose([one.value, one.low, one.high], [7 / 3, -1.461325, 6.127992], atol=2e-3)
    assert (one.runs, one.missing) == (3, 1)
    assert paired_estimate([np.array([1.0, 2.0])]).reason == "2 runs in a cell; an interval needs 3"
    rng, held = np.random.default_rng(0), 0
    for _ in range(500):
        found = paired_estimate([rng.normal(size=4), rng.normal(scale=3, size=4)])
        assert found.low is not None
        assert found.high is not None
        held += bool(found.low <= 0 <= found.high)
    assert 0.93 < held / 500 < 0.99


def test_the_interval_of_a_difference_of_means_is_welchs() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=5), rng.normal(1, 3, size=4)
    ours = score_estimate(lambda a, b: mean(a) - mean(b), [x], [y], rng=rng, draws=20_000)
    low, high = scipy.stats.ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
    center, reach = (low + high) / 2, (high - low) / 2
    assert ours.value == pytest.approx(center)
    assert ours.low is not None
    # Degrees of freedom are rounded down, and n runs resampled spread by (n - 1) / n less, in each cell by another factor.
    assert 0.98 * reach < center - ours.low < 1.1 * reach


@pytest.mark.parametrize(("runs", "games"), [(3, 1), (4, 2), (3, 3)])
def test_equal_arms_are_told_apart_no_more_often_than_said(runs: int, games: int) -> None:
    rng, told = np.random.default_rng(1), 0
    for _ in range(400):
        x, y = ([rng.normal(game, 1 + game, size=runs) for game in range(games)] for _ in range(2))
        found = score_estimate(lambda a, b: iqm(a) - iqm(b), x, y, rng=rng, draws=300)
        assert found.low is not None
        assert found.high is not None
        told += bool(found.low > 0 or found.high < 0)
    assert told / 400 < 0.08  # percentiles of the bootstrap: 0.10 to 0.15


@pytest.mark.parametrize("runs", [3, 5])
def test_games_that_the_same_runs_have_played_are_no_other_runs(runs: int) -> None:
    """Three games of a chain, whose scores hang together by 0.9: taken apart, equal arms would be told apart in every ninth case."""
    rng, cases, told, paired = np.random.default_rng(1), 300, 0, 0
    for _ in range(cases):
        shared = rng.normal(size=(2, 1, runs))
        x, y = np.sqrt(0.9) * shared + np.sqrt(0.1) * rng.normal(size=(2, 3, runs))
        for estimates in (
            score_estimate(lambda a, b: iqm(a) - iqm(b), [x], [y], rng=rng, draws=300),
            paired_estimate([x - y]),
        ):
            assert estimates.low is not None
            assert estimates.high is not None
        found, pairs = (
            score_estimate(lambda a, b: iqm(a) - iqm(b), [x], [y], rng=rng, draws=300),
            paired_estimate([x - y]),
        )
        told += not found.low <= 0 <= found.high
        paired += not pairs.low <= 0 <= pairs.high
    assert told / cases < 0.08
    assert paired / cases < 0.08


def test_a_cell_of_one_game_is_what_it_is_apart() -> None:
    rng = np.random.default_rng(0)
    x, y = ([rng.normal(size=4), rng.normal(size=5)] for _ in range(2))
    apart, together = (
        score_estimate(lambda a, b: iqm(a) - iqm(b), *samples, rng=rng)
        for samples in ((x, y), ([each[None] for each in x], [each[None] for each in y]))
    )
    assert apart == together
    chain = score_estimate(mean, [np.array([[1.0, 2.0, 3.0, 4.0], [5.0, np.nan, 6.0, 7.0]])], rng=rng)
    assert (chain.value, chain.runs, chain.missing) == (pytest.approx(13 / 3), 3, 1)


def test_scores_without_spread_have_an_interval_of_one_point() -> None:
    found = score_estimate(iqm, [np.full(3, 2.0), np.full(4, 2.0)], rng=np.random.default_rng(0))
    assert (found.low, found.value, found.high) == (2, 2, 2)


def test_pairing_takes_out_what_seeds_share() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(scale=10, size=12)
    x, y = shared + 1 + rng.normal(scale=0.1, size=12), shared
    pairs = paired_differences([dict(enumerate(x))], [dict(enumerate(y))])
    paired = paired_estimate([np.array(list(pair.values())) for pair in pairs])
    unpaired = estimate(lambda a, b: mean(a) - mean(b), [x], [y], rng=np.random.default_rng(0))
    assert paired.low is not None
    assert unpaired.low is not None
    assert paired.low > 0.9
    assert unpaired.low < -2


def test_value_at_is_the_last_point_reached() -> None:
    x, y = np.array([10.0, 20.0, 20.0, 30.0]), np.array([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(value_at(x, y, [5, 10, 19, 20, 99]), [np.nan, 1, 1, 3, 4])
    assert np.isnan(value_at(np.empty(0), np.empty(0), 3))


def test_times_that_are_never_reached_are_infinite() -> None:
    x, y = np.array([1.0, 2.0, 3.0]), np.array([0.0, 5.0, 4.0])
    assert first_reach(x, y, 4.5) == 2
    assert first_reach(x, y, 6) == np.inf
    assert first_reach(np.empty(0), np.empty(0), 0) == np.inf
    inf = np.inf
    assert ratio_of_medians([np.array([1.0, 2.0, inf])], [np.array([4.0, 3.0, 5.0])]) == pytest.approx(0.5)
    assert ratio_of_medians([np.array([1.0, inf, inf])], [np.array([4.0, 3.0, 5.0])]) == inf
    assert ratio_of_medians([np.array([1.0, 2.0, 2.0])], [np.array([inf, inf, 5.0])]) == 0
    assert np.isnan(ratio_of_medians([np.array([inf])], [np.array([inf])]))
    two = ratio_of_medians([np.array([2.0]), np.array([2.0])], [np.array([1.0]), np.array([8.0])])
    assert two == pytest.approx(np.sqrt(2 * 0.25))
    some = [np.array([3.0]), np.array([inf]), np.array([6.0]), np.array([inf])]
    other = [np.array([1.0]), np.array([inf]), np.array([1.0]), np.array([5.0])]
    assert ratio_of_medians(some, other) == pytest.approx(6)  # of 3, 6, never, and one game left out
    batch = ratio_of_medians([np.stack([x, x]) for x in some], [np.stack([y, y]) for y in other])
    np.testing.assert_allclose(batch, [6, 6])


def test_intervals_of_censored_times_can_end_in_never() -> None:
    times, reference = [np.array([1.0, 2.0, np.inf, 3.0])], [np.array([4.0, 4.0, 4.0, 4.0])]
    found = estimate(ratio_of_medians, times, reference, rng=np.random.default_rng(0))
    assert found.value == pytest.approx(2.5 / 4)
    assert found.high == np.inf
    undefined = estimate(ratio_of_medians, times, times, rng=np.random.default_rng(0))
    assert undefined.low is None
    assert "undefined" in undefined.reason


def test_ratio_of_means_is_the_same_in_any_unit() -> None:
    x, y = [np.array([2.0, 4.0]), np.array([10.0])], [np.array([1.0]), np.array([5.0, 15.0])]
    assert ratio_of_means(x, y) == pytest.approx(np.sqrt(3 * 1))
    hours = [[game / 3600 for game in sample] for sample in (x, y)]
    assert ratio_of_means(*hours) == pytest.approx(np.sqrt(3 * 1))
