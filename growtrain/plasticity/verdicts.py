"""From evidence to a verdict: was plasticity lost, and where? Pure functions of numbers.

The diagnosis is the intervention itself (Nikishin et al. 2023, section 4: whoever learns better once a part has been made fresh had
lost plasticity in that part). Two kinds of evidence, judged apart and then put together, place by place:

    learning  errors of the learning test (`learning_test`); gains as a share of what the copy that learned most has learned
    returns   mean training returns of forked runs, in points; gains as a share of what the untouched fork earns above random play

Everything is paired by seed. A gain is *clear* if its 95 % interval excludes 0 and its mean is at least the threshold; it is clearly
*absent* if the whole interval is below the threshold; otherwise the evidence is *unclear*, as it always is with fewer than three seeds.
A learning test in which no copy learned anything to speak of is unclear, too. So is the absence of a gain at a place that learns nothing
even when made fresh, while other copies learn: another place stands in its way. A clear gain in one kind against a clear absence in the
other is a contradiction, and nothing is claimed from it. Places that nothing tested are named, and left out of the answer.

Units: gains are shares; 0.1 is ten percent of the scale of their kind.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from growtrain.growth.kinds import KINDS, Kind, Place
from growtrain.plasticity.learning_test import COPIES

Basis = Literal["learning", "returns"]
Sign = Literal["gain", "no gain", "unclear"]
Outcome = Literal["lost", "not lost", "cannot tell"]
PLACES: tuple[Place, ...] = get_args(Place)
MIN_SEEDS = 3
MIN_LEARNED = 0.05  # of what was asked for, by the copy that learned most: below, the learning test says nothing

# Which copies or arms have this place made fresh; head and encoder together, the `network`, in a copy only.
_FRESH: dict[Place, dict[str, Kind]] = {
    place: {name: KINDS[each] for name, each in COPIES.items() if each and KINDS[each].place == place}
    for place in PLACES
}
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
    """

    name: str
    values: tuple[float, ...]
    mean: float | None
    low: float | None
    high: float | None
    sign: Sign


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
    """

    errors: Mapping[Any, Sequence[float]]
    returns: Mapping[Any, Sequence[float | None]]
    return_scale: float = 1.0


def verdict(evidence: Evidence, *, threshold: float = 0.1) -> Verdict:
    """Was plasticity lost, where, and on the strength of what?

    Raises:
        ValueError: the threshold is not positive, or copies or arms differ in their number of seeds.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}: give a share above 0, such as 0.1")
    learned = learned_most(evidence.errors)
    gains: dict[Basis, dict[str, Gain]] = {
        "learning": _gains(evidence.errors, "current", -1 / max(learned, MIN_LEARNED), threshold),
        "returns": _gains(evidence.returns, "untouched", 1 / evidence.return_scale, threshold),
    }
    if learned < MIN_LEARNED:
        gains["learning"] = {
            name: dataclasses.replace(gain, sign="unclear") for name, gain in gains["learning"].items()
        }
    blocked = {place for place in PLACES if learned >= MIN_LEARNED > _learned_when_fresh(place, evidence.errors)}
    signs = {
        place: {basis: _signs(place, basis, gains[basis], threshold, place in blocked) for basis in gains}
        for place in PLACES
    }
    findings = tuple(_finding(place, signs[place], learned, place in blocked) for place in PLACES)
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
        bases = sorted({basis for finding in findings for basis in finding.basis})
        outcome, sentence = (
            "not lost",
            f"Plasticity was not lost, by {' and '.join(_SHOWN_BY[basis] for basis in bases)}.",
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
_SHOWN_BY: dict[Basis, str] = {"learning": "the learning test", "returns": "the forks' returns"}


def learned_most(errors: Mapping[Any, Sequence[float]]) -> float:
    """The share of what was asked for that the best copy has learned, in the mean over the seeds; 0 without a test."""
    return max((1 - sum(values) / len(values) for values in errors.values() if values), default=0.0)


def _learned_when_fresh(place: Place, errors: Mapping[Any, Sequence[float]]) -> float:
    """What the best copy with this place fresh has learned; infinite without one."""
    fresh = {name: errors[name] for name in _FRESH[place] if name in errors}
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


def judge(name: str, values: Sequence[float], threshold: float) -> Gain:
    """A gain with its interval and what it says."""
    ends = interval(values)
    mean = sum(values) / len(values) if values else None
    if ends is None or mean is None:
        return Gain(name=name, values=tuple(values), mean=mean, low=None, high=None, sign="unclear")
    low, high = ends
    sign: Sign = "gain" if low > 0 and mean >= threshold else "no gain" if high < threshold else "unclear"
    return Gain(name=name, values=tuple(values), mean=mean, low=low, high=high, sign=sign)


def _gains(
    measured: Mapping[str, Sequence[float | None]], reference: str, scale: float, threshold: float
) -> dict[str, Gain]:
    """The gain of everything measured over `reference`, over the seeds in which all have a value."""
    if len({len(values) for values in measured.values()}) > 1:
        raise ValueError(f"every one of {', '.join(measured)} needs the same seeds")
    known = [
        dict(zip(measured, seed, strict=True)) for seed in zip(*measured.values(), strict=True) if None not in seed
    ]
    return {
        name: judge(name, [scale * (seed[name] - seed[reference]) for seed in known], threshold)
        for name in measured
        if name != reference
    }


def _signs(
    place: Place, basis: Basis, gains: Mapping[str, Gain], threshold: float, blocked: bool
) -> list[tuple[Gain, Sign]]:
    """What each copy or arm with this place fresh says about it; if it is blocked by another, nothing but a gain counts.

    A fresh part has fresh optimizer slots, too: where fresh slots alone help, it counts only if it helps clearly more than they do.
    """
    signs: list[tuple[Gain, Sign]] = []
    slots = gains.get("fresh-optimizer")
    for name, kind in _FRESH[place].items():
        if name not in gains:
            continue
        gain, sign = gains[name], gains[name].sign
        if place != "optimizer" and sign == "gain" and slots is not None and slots.sign == "gain":
            beyond = [one - other for one, other in zip(gain.values, slots.values, strict=True)]
            gain = judge(f"{name} beyond fresh-optimizer", beyond, threshold)
            sign = gain.sign
        # An arm that throws predictions away has to win them back first: that it earns no more says nothing.
        if sign == "no gain" and (blocked or (basis == "returns" and not kind.keeps[0])):
            sign = "unclear"
        signs.append((gain, sign))
    return signs


def _finding(place: Place, signs: Mapping[Basis, list[tuple[Gain, Sign]]], learned: float, blocked: bool) -> Finding:
    """Puts the kinds together: a gain in any copy counts for its kind, and kinds must not contradict each other."""
    said: dict[Basis, Sign] = {}
    for basis, each in signs.items():
        found = {sign for _, sign in each}
        if found:
            said[basis] = "gain" if "gain" in found else "unclear" if "unclear" in found else "no gain"
    gaining = tuple(basis for basis, sign in said.items() if sign == "gain")
    lacking = tuple(basis for basis, sign in said.items() if sign == "no gain")
    if gaining and lacking:
        reason = (
            f"{_SHOWN_BY[gaining[0]]} shows a gain and {_SHOWN_BY[lacking[0]]} shows none: they contradict each other"
        )
        return Finding(place=place, outcome="cannot tell", basis=(), reason=reason)
    if gaining:
        reason = _numbers(signs, gaining, "gain")
        # Of a destructive arm, or there were a contradiction.
        if any(gain.sign == "no gain" for gain, _ in signs["returns"]):
            reason += ", but making it fresh has not paid in the forks yet"
        return Finding(place=place, outcome="lost", basis=gaining, reason=reason)
    if lacking:
        return Finding(place=place, outcome="not lost", basis=lacking, reason=_numbers(signs, lacking, "no gain"))
    if not said:
        return Finding(place=place, outcome="cannot tell", basis=(), reason="it was not tested")
    if all(len(gain.values) < MIN_SEEDS for each in signs.values() for gain, _ in each):
        reason = f"fewer than {MIN_SEEDS} seeds with a value"
    elif learned < MIN_LEARNED:
        reason = f"no copy learned more than {learned:.1%} of what the learning test asked for"
    elif blocked:
        reason = "even made fresh it learns nothing: another part stands in its way"
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
    means = [each[name].mean or 0.0 for each in gains.values() for name in _FRESH[place] if name in each]
    return max(means, default=0.0)
