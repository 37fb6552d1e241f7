"""The probe's table and sentences: arithmetic against scipy, and words that follow the numbers."""

import dataclasses
import statistics
from itertools import product

import numpy as np
import pytest
import scipy.stats

from growtrain.plasticity.verdicts import _T_975
from growtrain.probe import report as probe_report
from growtrain.probe.arms import FRESH, WARM, arms
from growtrain.probe.cells import Record
from growtrain.probe.report import DEFAULT_INIT, Difference, comparisons, conclusions, effects, paired, report
from growtrain.probe.settings import ProbeConfig

CONFIG = ProbeConfig(num_tasks=8)
ABOUT = {
    "device": "cpu",
    "versions": {"torch": "2"},
    "settings": {"encoder": {"optimizer": "adam"}, "head": {"optimizer": "adam"}},
}
SPREAD = (-0.01, 0.0, 0.02, 0.005)


def records(levels: dict[str, float], seeds: int = 4, tasks: int = 8) -> list[Record]:
    """Arms whose late error is their level plus what the seed adds, a little different for each arm."""
    made = []
    for (place, (arm, level)), seed, task in product(enumerate(levels.items()), range(seeds), range(tasks)):
        late = level + SPREAD[seed] * (1 + 0.1 * place)
        made.append(
            {
                **dict.fromkeys(("effective_rank", "dormant_encoder", "dormant_head", "seconds"), 1.0),
                "setting": "head",
                "targets": "random",
                "arm": arm,
                "seed": seed,
                "task": task,
                "intervened": task == 4,
                "error": late if task >= 4 else 0.1,
            }
        )
    return made


def test_t_points_are_scipys() -> None:
    for place, point in enumerate(_T_975, start=1):
        assert point == pytest.approx(scipy.stats.t.ppf(0.975, place), abs=6e-4)


@pytest.mark.parametrize("seeds", [3, 5, 12, 40])
def test_paired_interval_is_scipys(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    x, y = ({seed: float(v) for seed, v in enumerate(rng.normal(m, 1, seeds))} for m in (0.5, 0))
    found = paired(x, y | {99: 7.0})
    expected = scipy.stats.ttest_rel(list(x.values()), list(y.values())).confidence_interval()
    assert found is not None
    assert found.mean == pytest.approx(np.mean(list(x.values())) - np.mean(list(y.values())))
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=0.05 if seeds > 31 else 1e-3)
    assert found.p == pytest.approx(scipy.stats.ttest_rel(list(x.values()), list(y.values())).pvalue)


def test_no_interval_below_three_seeds() -> None:
    found = paired({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert found == Difference(2.0, None, None, 1.0, 2)
    assert found.sign == 0
    assert str(found) == "+2.000 [no interval: n = 2]"
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_late_errors_and_incomplete_arms() -> None:
    made = records({WARM: 0.9, FRESH: 0.5})
    (found,) = comparisons(CONFIG, made[:-1])
    assert found.late(WARM) == pytest.approx({seed: 0.9 + SPREAD[seed] for seed in range(4)})
    assert set(found.late(FRESH)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ({WARM: 0.9, FRESH: 0.5}, "A warm start learns less than a fresh network: late error 0.904 against 0.504"),
        ({WARM: 0.5, FRESH: 0.9}, "A warm start learns more than a fresh network"),
        ({WARM: 0.5, FRESH: 0.5}, "A warm start is not told apart from a fresh network"),
        ({WARM: 0.9, "inject-frozen": 0.7}, "Better than a warm start: inject-frozen -0.200. Not told apart"),
        ({WARM: 0.9, "reset-head": 1.3}, "Worse: reset-head +0.400."),
        ({WARM: 0.9, "inject-frozen": 0.7, "inject-zero": 0.8}, "it restores less."),
        ({WARM: 0.9, "inject-frozen": 0.7, "inject-mirrored": 0.6}, "it restores more."),
        (
            {WARM: 0.9, "inject-frozen-3x": 0.7, "inject-mirrored-3x": 0.7},
            (
                "inject-mirrored-3x minus inject-frozen-3x: +0.000 [-0.002, +0.002]: no difference shows; one beyond 0.002 is excluded; "
                "inject-frozen-3x itself gains 0.200"
            ),
        ),
    ],
)
def test_sentences_follow_the_numbers(levels: dict[str, float], says: str) -> None:
    (found,) = comparisons(CONFIG, records(levels))
    assert any(says in sentence for sentence in conclusions(found)), conclusions(found)


def test_what_chance_explains_among_so_many_arms_is_not_claimed() -> None:
    one = {WARM: 0.9, "reset-head": 0.8972}
    many = one | dict.fromkeys(("inject-frozen", "inject-zero", "inject-mirrored", "shrink-perturb"), 0.9)
    for levels, better in ((one, "reset-head -0.002."), (many, "none.")):
        (found,) = comparisons(CONFIG, records(levels))
        difference = found.versus("reset-head", WARM)
        assert difference is not None
        assert 0.02 < difference.p < 0.05
        assert difference.sign == -1
        assert any(text.startswith(f"Better than a warm start: {better}") for text in conclusions(found))


def test_nothing_is_claimed_below_three_seeds() -> None:
    levels = {WARM: 0.9, FRESH: 0.5, "inject-frozen": 0.7, "inject-zero": 0.8}
    (found,) = comparisons(CONFIG, records(levels, seeds=2))
    text = " ".join(conclusions(found))
    assert "is not told apart from a fresh network" in text
    assert "Better than a warm start: none." in text
    assert "nothing follows from fewer than 3 seeds" in text


def test_effects_of_the_initialization_are_means_over_the_other_properties() -> None:
    config = dataclasses.replace(CONFIG, sweep="init")
    names = [name for name in arms(config) if name.startswith("scale=")]
    levels = {
        name: 0.5 + 0.2 * name.startswith("scale=4 ") + (0.06 if name == "scale=1 normal zero-bias" else 0)
        for name in names
    }
    made = records({WARM: 0.9, FRESH: 0.5} | levels)
    (found,) = comparisons(config, made)
    late = {name: found.late(name) for name in names}
    by_hand = [
        statistics.fmean(late[n][seed] for n in names if n.startswith("scale=4 "))
        - statistics.fmean(late[n][seed] for n in names if n.startswith("scale=1 "))
        for seed in range(4)
    ]
    got = effects(found)
    assert got["scale", "scale=4"].mean == pytest.approx(statistics.fmean(by_hand))
    assert got["scale", "scale=4"].mean == pytest.approx(0.19, abs=0.01)
    assert got["distribution", "normal"].mean == pytest.approx(0.01, abs=0.005)
    assert set(got) == {
        *(("scale", f"scale={s}") for s in ("0.25", "4")),
        *(("distribution", d) for d in ("normal", "orthogonal")),
        ("bias", "zero-bias"),
    }
    text = report(config, made, ABOUT)
    assert "The scale matters: scale=0.25 -0." in text
    assert "; scale=4 +0.1" in text
    assert DEFAULT_INIT in text


def test_the_table_has_every_arm_and_the_figure_draws_it() -> None:
    made = records({name: 0.5 + 0.01 * place for place, name in enumerate(arms(CONFIG))})
    text = report(CONFIG, made, ABOUT)
    for name in arms(CONFIG):
        assert text.count(f"\n| {name} | 4 | 0.") == 1
    figure = probe_report.draw(CONFIG, made)
    assert len(figure.axes) == 4
    assert [label.get_text() for label in figure.axes[-1].get_yticklabels()] == [n for n in arms(CONFIG) if n != WARM]
