"""From evidence to a verdict: was plasticity lost, and where? Pure functions of numbers.

The diagnosis is the intervention itself (Nikishin et al. 2023, section 4: whoever learns better once a part has been made fresh had
lost plasticity in that part). Three kinds of evidence, judged apart and then put together, place by place:

    learning     errors of the learning test (`learning_test`); gains as a share of what the copy that learned most has learned
    returns      mean training returns of forked runs, in points; gains as a share of how far the untouched fork is from random play
    evaluations  scores of the forks' evaluations, likewise: they explore less than training does, which can hide a difference

Everything is paired by seed. A gain is *clear* if its 95 % interval excludes 0, its mean is at least the threshold, and chance does not
explain it among so many: by Holm's step-down (Holm 1979) over all gains of a verdict, those beyond what fresh slots gain among them, the
probability that any is clear where none is there is at most 5 %. It is clearly *absent* if the whole interval is below the threshold;
otherwise the evidence is *unclear*, as it always is with fewer than three seeds, and where every score is the same: it is at the game's
floor or ceiling, where no gain can show.
A learning test in which no copy learned anything to speak of is unclear, too. So is the absence of a gain at a place that learns nothing
even when made fresh, while other copies learn: another place stands in its way. A clear gain in one kind against a clear absence in
another is a contradiction: both are named, and nothing is claimed from them. Where one kind is clear and another is not, the clear one
decides, and the other is named beside it. Places that nothing tested are named, and left out of the answer.

Units: gains are shares; 0.1 is ten percent of the scale of their kind.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from growtrain.growth.kinds import KINDS, Kind, Place
from growtrain.plasticity.learning_test import COPIES

Basis = Literal["learning", "returns", "evaluations"]
Sign = Literal["gain", "no gain", "unclear"]
Outcome = Literal["lost", "not lost", "cannot tell"]
PLACES: tuple[Place, ...] = get_args(Place)
FORKED: tuple[Basis, ...] = ("returns", "evaluations")
LEVEL = 0.05  # the probability that any gain of a verdict is called clear where none is there
MIN_SEEDS = 3
MIN_LEARNED = 0.05  # of what was asked for, by the copy that learned most: below, the learning test says nothing

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom (Fisher & Yates 1963, table III); the last serves beyond.
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A paired gain: what a fresh part brought over leaving it as it is.

    Attributes:
        name: the copy or arm.
        values: one a seed.
        mean: of the values; None without any.
        low, high: ends of the 95 % interval of the mean (Student's t); None below three seeds.
        sign: what it says, given the threshold.
        p: probability of such a mean, or a larger one, where there is no gain (Student's t); None without an interval. Of a verdict it is
            adjusted by Holm's step-down: that of any such gain among all of it.
        place: where plasticity had been lost if this is a gain.
    """

    name: str
    values: tuple[float, ...]
    mean: float | None
    low: float | None
    high: float | None
    sign: Sign
    p: float | None = None
    place: Place | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is found at one place.

    Attributes:
        place: where.
        outcome: lost, not lost, or cannot tell.
        basis: the kinds of evidence that carry the outcome.
        reason: why, in a sentence.
    """

    place: Place
    outcome: Outcome
    basis: tuple[Basis, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer.

    Attributes:
        outcome: over all places.
        places: where plasticity was lost, the largest gain first; empty unless it was.
        located: whether it was lost at these places; if not, somewhere within them.
        sentence: the answer in one sentence.
        findings: place by place.
        gains: the evidence, by kind and copy or arm.
    """

    outcome: Outcome
    places: tuple[Place, ...]
    located: bool
    sentence: str
    findings: tuple[Finding, ...]
    gains: dict[Basis, dict[str, Gain]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured; the k-th value of every copy or arm has the k-th seed.

    Attributes:
        errors: mean errors of the learning test by copy, `current` among them; empty if it was not done.
        returns: mean training returns by arm, `untouched` among them, None where no episode ended; empty without forks.
        return_scale: points that are a gain of 1.
        evaluations, evaluation_scale: likewise, of scores of as many episodes of every arm.
        kinds: what was done to each copy and arm.
    """

    errors: Mapping[Any, Sequence[float]]
    returns: Mapping[Any, Sequence[float | None]]
    return_scale: float = 1.0
    evaluations: Mapping[Any, Sequence[float | None]] = field(default_factory=dict)
    evaluation_scale: float = 1.0
    kinds: Mapping[str, Kind] = field(
        default_factory=lambda: {name: KINDS[each] for name, each in COPIES.items() if each}
    )


def verdict(evidence: Evidence, *, threshold: float = 0.1) -> Verdict:
    """Was plasticity lost, where, and on the strength of what?

    Raises:
        ValueError: the threshold is not positive, or copies or arms differ in their number of seeds.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}: give a share above 0, such as 0.1")
    learned, kinds = learned_most(evidence.errors), evidence.kinds
    fresh = {place: {name for name, kind in kinds.items() if kind.place == place} for place in PLACES}
    gains: dict[Basis, dict[str, Gain]] = {
        "learning": _gains(evidence.errors, "current", -1 / max(learned, MIN_LEARNED), threshold),
        "returns": _gains(evidence.returns, "untouched", 1 / evidence.return_scale, threshold),
        "evaluations": _gains(evidence.evaluations, "untouched", 1 / evidence.evaluation_scale, threshold),
    }
    gains = {
        basis: {name: dataclasses.replace(gain, place=kinds[name].place) for name, gain in each.items()}
        for basis, each in gains.items()
    }
    if learned < MIN_LEARNED:
        gains["learning"] = {
            name: dataclasses.replace(gain, sign="unclear", p=None) for name, gain in gains["learning"].items()
        }
    gains, beyond = _stepped_down(gains, {basis: _beyond_slots(each, threshold) for basis, each in gains.items()})
    deciding = {
        basis: each | {name: gain for name, gain in beyond[basis].items() if each[name].sign == "gain"}
        for basis, each in gains.items()
    }
    blocked = {place for place in PLACES if learned >= MIN_LEARNED > _learned_when_fresh(fresh[place], evidence.errors)}
    signs = {
        place: {
            basis: [
                (gain, _sign(gain, place in blocked or (basis in FORKED and not kinds[name].keeps[0])))
                for name, gain in each.items()
                if name in fresh[place]
            ]
            for basis, each in deciding.items()
        }
        for place in PLACES
    }
    findings = tuple(_finding(place, signs[place], learned, threshold, place in blocked) for place in PLACES)
    lost = [finding.place for finding in findings if finding.outcome == "lost"]
    if "network" in lost and len(lost) > 1:  # a single part explains it
        lost.remove("network")
    lost.sort(key=lambda place: -_largest(place, gains))
    tested = {place for place in PLACES if any(signs[place].values())} or set(PLACES)
    named = [finding for finding in findings if finding.outcome == "cannot tell" and finding.place in tested]
    if lost:
        parts = [f for f in findings if f.place in ("head", "encoder")]
        located = lost != ["network"] or all(f.outcome == "not lost" or f.place in blocked for f in parts)
        where = " and ".join(_WHERE[place] for place in lost) if located else _SOMEWHERE
        return Verdict(
            outcome="lost",
            places=tuple(lost),
            located=located,
            sentence=f"Plasticity was lost: {where}.",
            findings=findings,
            gains=gains,
        )
    if named:
        places_of: dict[str, list[str]] = {}
        for finding in named:
            places_of.setdefault(finding.reason, []).append(finding.place)
        reasons = "; ".join(f"{', '.join(places)}: {reason}" for reason, places in places_of.items())
        outcome, sentence = "cannot tell", f"Cannot tell whether plasticity was lost ({reasons})."
    else:
        bases = [basis for basis in gains if any(basis in finding.basis for finding in findings)]
        outcome, sentence = (
            "not lost",
            f"Plasticity was not lost, by {_all_of(bases)}.",
        )
    return Verdict(
        outcome=outcome,  # type: ignore[arg-type]  # one of the two literals above
        places=(),
        located=True,
        sentence=sentence,
        findings=findings,
        gains=gains,
    )


_WHERE: dict[Place, str] = {
    "head": "in the head",
    "encoder": "in the encoder",
    "optimizer": "in the optimizer's state",
    "network": "in head and encoder together, in neither alone",
}
_SOMEWHERE = "in head or encoder, and which of them, or whether only in both together, is not clear yet"
_SHOWN_BY: dict[Basis, str] = {
    "learning": "the learning test",
    "returns": "the forks' returns",
    "evaluations": "the forks' evaluations",
}


def _all_of(bases: Sequence[Basis]) -> str:
    """As in "the learning test, the forks' returns and the forks' evaluations"."""
    *most, last = (_SHOWN_BY[basis] for basis in bases)
    return f"{', '.join(most)} and {last}" if most else last


def _show(bases: Sequence[Basis]) -> str:
    return f"{_all_of(bases)} {'shows' if tuple(bases) == ('learning',) else 'show'}"


def learned_most(errors: Mapping[Any, Sequence[float]]) -> float:
    """The share of what was asked for that the best copy has learned, in the mean over the seeds; 0 without a test."""
    return max((1 - sum(values) / len(values) for values in errors.values() if values), default=0.0)


def _learned_when_fresh(names: Collection[str], errors: Mapping[Any, Sequence[float]]) -> float:
    """What the best of these copies has learned; infinite without one."""
    fresh = {name: each for name, each in errors.items() if name in names}
    return learned_most(fresh) if fresh else math.inf


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t; None for fewer than three values."""
    n = len(values)
    if n < MIN_SEEDS:
        return None
    mean = sum(values) / n
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    reach = student_t(n - 1) * spread
    return mean - reach, mean + reach


def student_t(degrees: int) -> float:
    """How many standard errors a 95 % interval reaches to each side, for so many degrees of freedom."""
    return _T_975[min(degrees, len(_T_975)) - 1]


def upper_tail(t: float, degrees: int) -> float:
    """The probability that Student's t of so many degrees of freedom exceeds t (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = (cosine if degrees > 1 else 0.0) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 - within) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values by Holm's step-down (Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure").

    Whatever is at most `LEVEL` can be claimed, and the probability that any such claim is false is at most that, however they depend on
    each other.
    """
    adjusted, so_far = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = so_far
    return adjusted


def judge(name: str, values: Sequence[float], threshold: float) -> Gain:
    """A gain with its interval and what it says by itself."""
    ends = interval(values)
    mean = sum(values) / len(values) if values else None
    if ends is None or mean is None:
        return Gain(name=name, values=tuple(values), mean=mean, low=None, high=None, sign="unclear")
    low, high = ends
    sign: Sign = "gain" if low > 0 and mean >= threshold else "no gain" if high < threshold else "unclear"
    error = (mean - low) / student_t(len(values) - 1)
    p = upper_tail(mean / error, len(values) - 1) if error > 0 else float(mean <= 0)
    return Gain(name=name, values=tuple(values), mean=mean, low=low, high=high, sign=sign, p=p)


def explained_by_chance(gain: Gain, threshold: float) -> bool:
    """Whether a gain would be clear by itself, and is not among so many."""
    return gain.sign == "unclear" and judge(gain.name, gain.values, threshold).sign == "gain"


def _stepped_down(*families: dict[Basis, dict[str, Gain]]) -> list[dict[Basis, dict[str, Gain]]]:
    """The same gains judged together: those that chance can explain, among so many, are unclear."""
    p_values = [gain.p for gains in families for each in gains.values() for gain in each.values()]
    adjusted = iter(holm([p for p in p_values if p is not None]))

    def judged(gain: Gain) -> Gain:
        if gain.p is None:
            return gain
        p = next(adjusted)
        return dataclasses.replace(gain, sign="unclear" if gain.sign == "gain" and p > LEVEL else gain.sign, p=p)

    return [
        {basis: {name: judged(gain) for name, gain in each.items()} for basis, each in gains.items()}
        for gains in families
    ]


def _gains(
    measured: Mapping[str, Sequence[float | None]], reference: str, scale: float, threshold: float
) -> dict[str, Gain]:
    """The gain of everything measured over `reference`, over the seeds in which all have a value."""
    if len({len(values) for values in measured.values()}) > 1:
        raise ValueError(f"every one of {', '.join(measured)} needs the same seeds")
    known = [
        dict(zip(measured, seed, strict=True)) for seed in zip(*measured.values(), strict=True) if None not in seed
    ]
    gains = {
        name: judge(name, [scale * (seed[name] - seed[reference]) for seed in known], threshold)
        for name in measured
        if name != reference
    }
    if reference != "untouched" or len({value for seed in known for value in seed.values()}) > 1:
        return gains
    return {name: dataclasses.replace(gain, sign="unclear", p=None) for name, gain in gains.items()}


def _beyond_slots(gains: Mapping[str, Gain], threshold: float) -> dict[str, Gain]:
    """What each gain is beyond that of fresh slots alone, where they gain, too; nothing where they do not.

    A fresh part has fresh optimizer slots: where these alone help, it counts only if it helps clearly more than they do. Whether they help
    is asked of their gain by itself: that it is one of many makes it no likelier that the part has helped.
    """
    slots = next((gain for gain in gains.values() if gain.place == "optimizer"), None)
    if slots is None or slots.sign != "gain":
        return {}
    beyond = {}
    for name, gain in gains.items():
        if gain.place != "optimizer" and gain.sign == "gain":
            values = [one - other for one, other in zip(gain.values, slots.values, strict=True)]
            beyond[name] = judge(f"{name} beyond {slots.name}", values, threshold)
    return beyond


def _sign(gain: Gain, absence_says_nothing: bool) -> Sign:
    """What a gain says of its place.

    That there is none says nothing where another place stands in the way, nor of an arm that throws predictions away: it has to win them
    back first.
    """
    return "unclear" if gain.sign == "no gain" and absence_says_nothing else gain.sign


def _finding(
    place: Place,
    signs: Mapping[Basis, list[tuple[Gain, Sign]]],
    learned: float,
    threshold: float,
    blocked: bool,
) -> Finding:
    """Puts the kinds together: a gain in any copy counts for its kind, and kinds must not contradict each other."""
    said: dict[Basis, Sign] = {}
    for basis, each in signs.items():
        found = {sign for _, sign in each}
        if found:
            said[basis] = "gain" if "gain" in found else "unclear" if "unclear" in found else "no gain"
    gaining = tuple(basis for basis, sign in said.items() if sign == "gain")
    lacking = tuple(basis for basis, sign in said.items() if sign == "no gain")
    doubtful = tuple(basis for basis, sign in said.items() if sign == "unclear")
    doubt = f"; {_all_of(doubtful)} cannot tell" if doubtful else ""
    if gaining and lacking:
        reason = f"{_show(gaining)} a gain and {_show(lacking)} none: they contradict each other"
        return Finding(place=place, outcome="cannot tell", basis=(), reason=reason)
    if gaining:
        reason = _numbers(signs, gaining, "gain")
        # Of a destructive arm, or there were a contradiction.
        forked = {gain.sign for basis in FORKED for gain, _ in signs[basis]}
        if "no gain" in forked and "gain" not in forked:
            return Finding(
                place=place,
                outcome="lost",
                basis=gaining,
                reason=f"{reason}, but making it fresh has not paid in the forks yet",
            )
        return Finding(place=place, outcome="lost", basis=gaining, reason=reason + doubt)
    if lacking:
        reason = _numbers(signs, lacking, "no gain")
        return Finding(place=place, outcome="not lost", basis=lacking, reason=reason + doubt)
    if not said:
        return Finding(place=place, outcome="cannot tell", basis=(), reason="it was not tested")
    if all(len(gain.values) < MIN_SEEDS for each in signs.values() for gain, _ in each):
        reason = f"fewer than {MIN_SEEDS} seeds with a value"
    elif learned < MIN_LEARNED and signs["learning"]:
        reason = f"no copy learned more than {learned:.1%} of what the learning test asked for"
    elif blocked:
        reason = "even made fresh it learns nothing: another part stands in its way"
    elif any(gain.low is not None and gain.p is None for basis in FORKED for gain, _ in signs[basis]):
        reason = "every score is the same, at the game's floor or ceiling"
    elif any(explained_by_chance(gain, threshold) for each in signs.values() for gain, _ in each):
        reason = "a gain shows, and among so many that were measured chance can explain it"
    else:
        reason = "the intervals are too wide for the threshold"
    return Finding(place=place, outcome="cannot tell", basis=(), reason=reason)


def _numbers(signs: Mapping[Basis, list[tuple[Gain, Sign]]], bases: Sequence[Basis], wanted: Sign) -> str:
    texts = [
        f"{gain.name} {gain.mean:+.0%} [{gain.low:+.0%}, {gain.high:+.0%}] in {_SHOWN_BY[basis]}"
        for basis in bases
        for gain, sign in signs[basis]
        if sign == wanted
    ]
    return "; ".join(texts)


def _largest(place: Place, gains: Mapping[Basis, Mapping[str, Gain]]) -> float:
    return max(
        (gain.mean or 0.0 for each in gains.values() for gain in each.values() if gain.place == place), default=0.0
    )
