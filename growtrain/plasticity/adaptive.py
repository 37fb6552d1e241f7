"""The adaptive schedule's rule: inject when the measured signals say that plasticity is lost, and the score has stopped rising.

The paper names what this removes as its limitation: when to inject had to be chosen for each game (Nikishin et al. 2023; its Figure 3 finds
plasticity lost at 25M frames in one game, at 100M in another, never in a third). Its own diagnosis is the injection itself: does the agent
learn better with it than without? Here that question is put to copies of the network on the run's own replay (`learning_test`).

A decision is a pure function of the signals and of what was decided before. It injects when all of these hold:
    1. the copy with an injected head learns what the replay asks for faster than the network as it is, by `threshold` at least;
    2. the score is on a plateau: the mean of the episodes that ended since the decision before, the last 100 at most, is not above the mean
       of the last 100 until then by more than the standard error of the difference. The two windows have no episode in common, and their
       common variance is pooled (Student), so that one new episode can be compared with many old ones;
    3. 1 and 2 held at the `patience - 1` decisions before, too (hysteresis: one noisy measure does not inject);
    4. the last injection is `min_gap` frames away, and there have been fewer than `max_injections`.

Units: frames; an error is the share left over of what was asked for, on average over the test's updates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from growtrain.plasticity.learning_test import LearningTest
from growtrain.plasticity.verdicts import MIN_LEARNED
from growtrain.records import Decision
from growtrain.settings.schedules import Rule

DECIDING = LearningTest(seeds=2)  # of the network as it is and of its injected copy


@dataclass(frozen=True)
class _Window:
    """Scores of successive episodes: how many, their mean, and the squares of their deviations from it."""

    count: int
    mean: float
    squares: float

    @property
    def error(self) -> float | None:
        """Standard error of the mean."""
        return math.sqrt(self.squares / (self.count - 1) / self.count) if self.count > 1 else None


def _window(returns: Sequence[float]) -> _Window | None:
    if not returns:
        return None
    mean = sum(returns) / len(returns)
    return _Window(len(returns), mean, sum((value - mean) ** 2 for value in returns))


def _window_of(decision: Decision) -> _Window | None:
    """The window that ended with a decision."""
    if decision.score is None or not decision.score_episodes:
        return None
    count = decision.score_episodes
    return _Window(count, decision.score, (decision.score_error or 0.0) ** 2 * count * (count - 1))


def _rise(before: _Window, since: _Window) -> tuple[float, float] | None:
    """How far the mean has risen, and the standard error of that; None where two episodes leave no variance to be known."""
    freedom = before.count + since.count - 2
    if not freedom:
        return None
    variance = (before.squares + since.squares) / freedom
    return since.mean - before.mean, math.sqrt(variance * (1 / before.count + 1 / since.count))


def decide(
    rule: Rule,
    *,
    frames: int,
    stage: int,
    last_injection: int,
    errors: tuple[float, float],
    returns: Sequence[float],
    episodes: int,
    before: Decision | None,
    seconds: float = 0.0,
    flops: int | None = None,
) -> Decision:
    """Whether to inject now.

    Args:
        rule: when to.
        frames: frames played.
        stage: injections done.
        last_injection: frames at the last one, 0 without one.
        errors: that the network as it is and its injected copy reach.
        returns: true scores of the last episodes, 100 at most, the newest last.
        episodes: that have ended in the run.
        before: the decision before.
        seconds: what measuring took, for the record.
        flops: the same.
    """
    error, error_injected = errors
    learned = 1 - min(errors)
    gain = (error - error_injected) / max(learned, MIN_LEARNED)
    window = _window(returns)
    num_since = min(episodes - before.episodes, len(returns)) if before else 0
    newer = _window(returns[len(returns) - num_since :]) if num_since > 0 else None
    window_before = _window_of(before) if before else None
    rise = _rise(window_before, newer) if newer and window_before else None
    plateau = rise is not None and rise[0] <= rise[1]
    lost = learned >= MIN_LEARNED and gain >= rule.threshold
    streak = (before.streak if before and not before.inject else 0) + 1 if lost and plateau else 0
    if stage >= rule.max_injections:
        inject, reason = False, f"{rule.max_injections} injections are the most"
    elif frames - last_injection < rule.min_gap:
        since = "the last injection is" if stage else "training began"
        inject, reason = False, f"{since} less than {rule.min_gap} frames ago"
    elif learned < MIN_LEARNED:
        inject, reason = False, f"neither learned more than {MIN_LEARNED:.0%} of what was asked for: nothing is known"
    elif not lost:
        inject, reason = (
            False,
            f"a fresh head gains {gain:.1%}, less than {rule.threshold:.1%}: the network still learns",
        )
    elif rise is None:
        inject, reason = False, "the score is not known twice yet, or no episode has ended since"
    elif not plateau:
        inject, reason = False, "the score is rising"
    elif streak < rule.patience:
        inject, reason = False, f"plasticity looks lost: {streak} of {rule.patience} decisions in a row"
    else:
        inject, reason = True, f"a fresh head gains {gain:.1%} and the score is on a plateau, {streak} times in a row"
    return Decision(
        frames=frames,
        stage=stage,
        error=error,
        error_injected=error_injected,
        gain=gain,
        score=window.mean if window else None,
        score_error=window.error if window else None,
        score_before=before.score if before else None,
        episodes=episodes,
        plateau=plateau,
        streak=streak,
        inject=inject,
        reason=reason,
        seconds=seconds,
        score_episodes=len(returns),
        score_since=newer.mean if newer else None,
        rise_error=rise[1] if rise else None,
        flops=flops,
    )
