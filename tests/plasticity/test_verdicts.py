"""Verdicts: every branch by hand-made numbers, evidence that contradicts itself among them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from growtrain.plasticity.learning_test import kinds_of
from growtrain.plasticity.verdicts import (
    FORKED,
    Evidence,
    Verdict,
    holm,
    interval,
    judge,
    learned_most,
    upper_tail,
    verdict,
)
from growtrain.settings.config import Config

COPIES = ("current", "inject", "reset-head", "reset-encoder", "fresh-optimizer", "fresh-network")
ARMS = ("untouched", "inject", "reset-encoder", "fresh-optimizer")


def errors(seeds: int = 4, **better: float) -> dict[str, list[float]]:
    """Errors around 0.5, `better` by that much where a copy is named (in underscores), with a little noise of its own."""
    made = {}
    for index, copy in enumerate(COPIES):
        level = 0.5 - better.get(copy.replace("-", "_"), 0.0)
        made[copy] = [level + 0.05 * seed + 0.002 * ((seed + index) % 3 - 1) for seed in range(seeds)]
    return made


def returns(seeds: int = 4, **better: float) -> dict[str, list[float | None]]:
    """Returns around 100."""
    made: dict[str, list[float | None]] = {}
    for index, arm in enumerate(ARMS):
        level = 100 + better.get(arm.replace("-", "_"), 0.0)
        made[arm] = [level + 10 * seed + ((seed + index) % 3 - 1) for seed in range(seeds)]
    return made


def decide(
    learning: dict[str, list[float]] | None = None, forks: Any = None, evaluated: Any = None, **options: float
) -> Verdict:
    evidence = Evidence(
        errors=learning or {},
        returns=forks or {},
        return_scale=100.0,
        evaluations=evaluated or {},
        evaluation_scale=100.0,
    )
    return verdict(evidence, **options)


def outcomes(found: Verdict) -> dict[str, str]:
    return {finding.place: finding.outcome for finding in found.findings}


HEALTHY = {"head": "not lost", "encoder": "not lost", "optimizer": "not lost", "network": "not lost"}


def test_nothing_gains_by_being_fresh() -> None:
    found = decide(errors(), returns())
    assert (found.outcome, found.places) == ("not lost", ())
    assert outcomes(found) == HEALTHY
    assert found.sentence == "Plasticity was not lost, by the learning test and the forks' returns."


@pytest.mark.parametrize(
    ("better", "places"),
    [
        ({"inject": 0.3, "reset_head": 0.3, "fresh_network": 0.3}, ("head",)),
        ({"reset_head": 0.3, "fresh_network": 0.3}, ("head",)),  # old heads may stand in the way of an injected one
        ({"reset_encoder": 0.3, "fresh_network": 0.3}, ("encoder",)),
        ({"fresh_optimizer": 0.3, "fresh_network": 0.3}, ("optimizer",)),
        ({"inject": 0.2, "reset_encoder": 0.3, "fresh_network": 0.4}, ("encoder", "head")),  # the largest gain first
        ({"fresh_network": 0.3}, ("network",)),
    ],
)
def test_the_learning_test_names_the_place(better: dict[str, float], places: tuple[str, ...]) -> None:
    found = decide(errors(**better))
    assert (found.outcome, found.places) == ("lost", places)
    lost = [finding for finding in found.findings if finding.outcome == "lost"]
    assert all(finding.basis == ("learning",) for finding in lost)


def test_what_fresh_slots_explain_is_not_charged_to_the_head() -> None:
    """A fresh head has fresh slots: where the optimizer's state is the fault, every fresh part helps a little."""
    found = decide(errors(fresh_optimizer=0.3, inject=0.2, reset_head=0.2, reset_encoder=0.1, fresh_network=0.3))
    assert found.places == ("optimizer",)
    assert outcomes(found) == HEALTHY | {"optimizer": "lost"}
    assert "inject beyond fresh-optimizer" in found.findings[0].reason
    both = decide(errors(fresh_optimizer=0.1, inject=0.4, fresh_network=0.4))
    assert both.places == ("head", "optimizer")


@pytest.mark.parametrize("forks", [None, returns()])
def test_a_dead_encoder_hides_what_the_other_parts_have_lost(forks: Any) -> None:
    """Nothing reaches a fresh head or fresh slots: that they gain nothing does not clear them, in the forks neither."""
    learning = errors(reset_encoder=0.09, fresh_network=0.14)
    learning = {copy: [error + 0.5 - 0.05 * seed for seed, error in enumerate(each)] for copy, each in learning.items()}
    found = decide(learning, forks)
    assert found.places == ("encoder",)
    assert outcomes(found) == {"head": "cannot tell", "encoder": "lost", "optimizer": "cannot tell", "network": "lost"}
    assert "another part stands in its way" in found.findings[0].reason
    paid = decide(learning, returns(inject=40))
    assert outcomes(paid)["head"] == "lost"


def test_head_and_encoder_together_is_said_only_where_neither_is_in_doubt() -> None:
    learning = errors(seeds=5, fresh_network=0.3)
    assert decide(learning).sentence == "Plasticity was lost: in head and encoder together, in neither alone."
    learning["reset-encoder"] = [0.1, 0.6, 0.2, 0.9, 0.4]
    found = decide(learning)
    assert outcomes(found)["encoder"] == "cannot tell"
    assert (found.places, found.located) == (("network",), False)
    assert "in head or encoder, and which of them" in found.sentence


def test_returns_confirm_or_find_on_their_own() -> None:
    both = decide(errors(inject=0.3, reset_head=0.3), returns(inject=40))
    assert both.findings[0].basis == ("learning", "returns")
    wide = errors()
    wide["inject"] = wide["reset-head"] = [0.1, 0.9, 0.2, 1.0]
    assert decide(wide).outcome == "cannot tell"
    alone = decide(wide, returns(inject=40))
    assert (alone.places, alone.findings[0].basis) == (("head",), ("returns",))


def test_contradicting_evidence_is_not_decided() -> None:
    """The learning test finds the head at fault, and the forks clearly gain nothing by a new one; and the other way round."""
    found = decide(errors(inject=0.3, reset_head=0.3), returns())
    assert found.outcome == "cannot tell"
    assert outcomes(found)["head"] == "cannot tell"
    assert "contradict" in found.sentence
    assert decide(errors(), returns(fresh_optimizer=40)).outcome == "cannot tell"
    # A contradiction in one place does not hide what is clear in another.
    assert decide(errors(inject=0.3, reset_encoder=0.3), returns(reset_encoder=40)).places == ("encoder",)


def test_evaluations_are_judged_beside_training_returns_and_both_are_named_where_they_differ() -> None:
    """Exploring agents earned alike, and greedier ones do not: nothing is claimed from that, whatever the learning test says."""
    agreed = decide(errors(inject=0.3, reset_head=0.3), returns(inject=40), returns(inject=60))
    assert agreed.findings[0].basis == ("learning", "returns", "evaluations")
    assert agreed.gains["evaluations"]["inject"].mean == pytest.approx(0.6, abs=0.02)
    assert "inject +60%" in agreed.findings[0].reason
    assert decide(errors(), returns(), returns()).sentence == (
        "Plasticity was not lost, by the learning test, the forks' returns and the forks' evaluations."
    )
    better = decide(errors(), returns(), returns(inject=40))
    worse = decide(errors(inject=0.3, reset_head=0.3), returns(inject=40), returns(inject=-40))
    assert better.outcome == worse.outcome == "cannot tell"
    assert better.findings[0].reason == (
        "the forks' evaluations show a gain and the learning test and the forks' returns show none: they contradict each other"
    )
    assert worse.findings[0].reason.startswith(
        "the learning test and the forks' returns show a gain and the forks' evaluations show none"
    )
    noisy = returns()
    noisy["inject"] = [20.0, 190.0, 40.0, 210.0]
    doubtful = decide(errors(inject=0.3, reset_head=0.3), returns(inject=40), noisy)
    assert doubtful.findings[0].outcome == "lost"
    assert doubtful.findings[0].reason.endswith("; the forks' evaluations cannot tell")


def test_a_reset_whose_evaluations_are_better_has_paid() -> None:
    """The mean return is of the way back, too; the evaluation comes after it."""
    found = decide(errors(reset_encoder=0.3), returns(reset_encoder=-60), returns(reset_encoder=40))
    assert (found.places, found.findings[1].basis) == (("encoder",), ("learning", "evaluations"))
    assert "not paid" not in found.findings[1].reason


def test_an_injection_with_a_fresh_encoder_says_nothing_of_the_head_alone() -> None:
    cold = kinds_of(Config(freeze="network", live_encoder="cold"))
    better = {"inject": 0.3, "fresh_network": 0.3}
    found, warm = (
        verdict(Evidence(errors=errors(**better), returns=returns(inject=40), return_scale=100.0, kinds=kinds))
        for kinds in (cold, kinds_of(Config(freeze="network")))
    )
    assert (found.places, warm.places) == (("network",), ("head",))
    assert found.findings[3].basis == ("learning", "returns")
    assert outcomes(found)["head"] == "not lost"  # by the copy whose head alone is fresh
    assert found.gains["returns"]["inject"].place == "network"
    # Of a network that is all head there is no encoder to be fresh.
    assert kinds_of(Config(freeze="network", live_encoder="cold", split="conv1"))["inject"].place == "head"


def test_of_many_measured_gains_chance_makes_few_clear_and_a_real_one_stands_out() -> None:
    rng, num_draws = np.random.default_rng(1), 1_500
    found = {"null": 0, "head": 0}
    for _ in range(num_draws):
        for what, gain, noise, spread in (("null", 0.0, 0.25, 40), ("head", 0.3, 0.05, 15)):
            levels = {copy: 0.5 - (gain if copy in ("inject", "reset-head") else 0.0) for copy in COPIES}
            learning = {copy: list(np.maximum(rng.normal(level, noise, 5), 0)) for copy, level in levels.items()}
            forks, evaluated = (
                {arm: list(rng.normal(100 + 100 * gain * (arm == "inject"), spread, 3)) for arm in ARMS}
                for _ in range(2)
            )
            found[what] += decide(learning, forks, evaluated).outcome == "lost"
    assert found["null"] / num_draws < 0.07
    assert found["head"] / num_draws > 0.95


def test_what_is_asked_beyond_fresh_slots_is_among_the_many() -> None:
    """Every fresh part helps as much as its fresh slots do, and the forks gain nothing: nothing but the slots may be called clear."""
    rng, num_draws, wrong = np.random.default_rng(1), 1_500, 0
    levels = {copy: 1.0 - 0.6 * (copy != "current") for copy in COPIES}
    for _ in range(num_draws):
        learning = {copy: list(rng.normal(level, 0.15, 8)) for copy, level in levels.items()}
        forks, evaluated = ({arm: list(rng.normal(100, 100, 5)) for arm in ARMS} for _ in range(2))
        found = decide(learning, forks, evaluated)
        by_forks = any(gain.sign == "gain" for basis in FORKED for gain in found.gains[basis].values())
        wrong += by_forks or any(each.outcome == "lost" and each.place != "optimizer" for each in found.findings)
    assert wrong / num_draws < 0.065


def test_fresh_slots_that_help_by_themselves_explain_a_head_though_they_are_one_of_many() -> None:
    learning = errors(seeds=5, inject=0.15)
    learning["fresh-optimizer"] = [
        each - gain for each, gain in zip(learning["current"], (0.1, 0.3, 0.1, 0.02, 0.3), strict=True)
    ]
    found = decide(learning)
    signs = {name: found.gains["learning"][name].sign for name in ("inject", "fresh-optimizer")}
    assert signs == {"inject": "gain", "fresh-optimizer": "unclear"}
    assert outcomes(found) == HEALTHY | {"head": "cannot tell", "optimizer": "cannot tell"}


def test_what_is_clear_beyond_fresh_slots_must_be_clear_as_a_gain_too() -> None:
    """A head that gains steadily 8 points more than slots, which gain now much, now little: among many the sum of both is not clear."""
    learning, noise = errors(seeds=5), (0.1, 0.3, 0.1, 0.02, 0.3)
    for copy, more in (("fresh-optimizer", 0.0), ("inject", 0.08)):
        learning[copy] = [each - gain - more for each, gain in zip(learning["current"], noise, strict=True)]
    assert decide(learning).places == ("head",)
    noisy = returns() | {arm: [20.0, 190.0, 40.0, 210.0] for arm in ARMS[1:]}
    among_many = decide(learning, noisy, noisy)
    assert among_many.gains["learning"]["inject"].sign == "unclear"
    assert outcomes(among_many)["head"] == "cannot tell"


def test_a_gain_that_is_one_of_many_is_unclear_and_says_why() -> None:
    learning = errors(seeds=5)
    learning["reset-encoder"] = [
        each - gain for each, gain in zip(learning["current"], (0.1, 0.3, 0.1, 0.02, 0.3), strict=True)
    ]
    alone = decide({name: learning[name] for name in ("current", "reset-encoder")})
    many = decide(learning)
    assert (alone.places, many.places) == (("encoder",), ())
    assert alone.gains["learning"]["reset-encoder"].sign == "gain"
    assert many.gains["learning"]["reset-encoder"].sign == "unclear"
    assert many.gains["learning"]["reset-encoder"].low == alone.gains["learning"]["reset-encoder"].low
    assert many.findings[1].reason == "a gain shows, and among so many that were measured chance can explain it"


def test_holms_step_down() -> None:
    """By hand, and as R's p.adjust: the smallest is multiplied by 4, the next by 3, never below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30])
def test_the_tail_is_students(degrees: int) -> None:
    for t in (-3.0, 0.0, 0.5, 2.5, 12.0):
        assert upper_tail(t, degrees) == pytest.approx(stats.t.sf(t, degrees), rel=1e-9, abs=1e-14)


def test_a_reset_that_earns_no_more_says_nothing() -> None:
    """It has to win back what it threw away: that is neither an absent gain nor a contradiction."""
    found = decide(errors(reset_encoder=0.3), returns(reset_encoder=-60))
    assert found.places == ("encoder",)
    assert found.findings[1].reason.endswith("has not paid in the forks yet")
    assert "not paid" not in decide(errors(reset_encoder=0.3), returns(reset_encoder=40)).findings[1].reason
    assert outcomes(decide({}, returns(reset_encoder=-60)))["encoder"] == "cannot tell"


def test_noise_and_few_seeds_are_not_decided() -> None:
    few = decide(errors(seeds=2, inject=0.3))
    assert (few.outcome, few.gains["learning"]["inject"].low) == ("cannot tell", None)
    assert "fewer than 3 seeds" in few.sentence
    noisy: dict[str, Sequence[float]] = {copy: [0.2, 0.9, 0.3, 0.8] for copy in COPIES}
    noisy["inject"] = noisy["reset-head"] = [0.8, 0.2, 0.5, 0.3]
    found = verdict(Evidence(errors=noisy, returns={}))
    assert outcomes(found)["head"] == "cannot tell"
    assert "too wide" in found.sentence


def test_a_gain_below_the_threshold_does_not_count() -> None:
    small = errors(inject=0.02, reset_head=0.02)  # of some 0.44 learned: 5 %
    assert decide(small).outcome == "not lost"
    assert decide(small, threshold=0.03).places == ("head",)


def test_a_test_in_which_nobody_learns_says_nothing() -> None:
    """Not even fresh parts fit anything: that no copy is better is then no sign of health."""
    flat = {copy: [1 - 0.1 * error for error in each] for copy, each in errors().items()}  # a twentieth learned at most
    flat = {copy: [0.99 + 0.01 * error for error in each] for copy, each in flat.items()}
    assert learned_most(flat) < 0.01
    found = decide(flat)
    assert found.outcome == "cannot tell"
    assert found.sentence.startswith(
        "Cannot tell whether plasticity was lost (head, encoder, optimizer, network: no copy learned"
    )
    assert decide(flat, returns(inject=40)).places == ("head",)


@pytest.mark.parametrize("score", [0.0, 21.0])
def test_forks_that_all_score_the_same_say_nothing(score: float) -> None:
    """At a game's floor or ceiling no gain can show."""
    flat: dict[str, list[float | None]] = {arm: [score] * 3 for arm in ("untouched", "inject", "reset-head")}
    found = verdict(Evidence(errors={}, returns=flat, return_scale=1.0))
    assert found.outcome == "cannot tell"
    assert "every score is the same, at the game's floor or ceiling" in found.sentence
    another = flat | {"reset-head": [score, score, score + 0.01]}  # so a gain can show
    assert verdict(Evidence(errors={}, returns=another, return_scale=1.0)).gains["returns"]["inject"].sign == "no gain"


def test_a_seed_without_a_score_is_left_out_of_every_arm() -> None:
    forks = returns(seeds=4, inject=40)
    forks["fresh-optimizer"][1] = None
    gains = decide({}, forks).gains["returns"]
    assert {len(gain.values) for gain in gains.values()} == {3}
    forks["untouched"] = [None] * 4
    nothing = decide({}, forks)
    assert nothing.outcome == "cannot tell"
    assert nothing.gains["returns"]["inject"].mean is None


def test_gains_have_their_scales() -> None:
    """By hand: 0.2 of 0.8 learned is 25 %; 30 points of 100 are 30 %."""
    found = decide({"current": [0.4] * 3, "inject": [0.2] * 3}, {"untouched": [50.0] * 3, "inject": [80.0] * 3})
    assert found.gains["learning"]["inject"].mean == pytest.approx(0.25)
    assert found.gains["returns"]["inject"].mean == pytest.approx(0.3)


def test_places_that_nothing_tested_are_left_out_of_the_answer() -> None:
    """A run with a frozen encoder, or with RMSProp: there is no copy to ask."""
    learning = {copy: each for copy, each in errors().items() if copy not in ("reset-encoder", "fresh-optimizer")}
    found = decide(learning)
    assert found.outcome == "not lost"
    assert outcomes(found) == HEALTHY | {"encoder": "cannot tell", "optimizer": "cannot tell"}


def test_no_evidence_and_wrong_input() -> None:
    assert decide().outcome == "cannot tell"
    with pytest.raises(ValueError, match="same seeds"):
        decide({"current": [0.5], "inject": [0.5, 0.5]})
    with pytest.raises(ValueError, match="threshold"):
        decide(threshold=0.0)


@pytest.mark.parametrize("n", [3, 4, 8, 31])
def test_the_interval_is_students(n: int) -> None:
    values = [0.1 * (7 * k % 11) for k in range(n)]
    low, high = interval(values) or (0.0, 0.0)
    expected = stats.t.interval(0.95, n - 1, loc=sum(values) / n, scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected, rel=1e-3)
    assert interval(values[:2]) is None


def test_signs_at_their_edges() -> None:
    assert judge("x", [0.1, 0.1, 0.1], 0.1).sign == "gain"  # the mean may equal the threshold
    assert judge("x", [0.09, 0.09, 0.09], 0.1).sign == "no gain"
    assert judge("x", [0.05, 0.2, 0.05], 0.1).sign == "unclear"
