"""Have an agent's values diverged? An injection keeps them as they are, so that what looks like lost plasticity would not be mended by one.

No discounted return can be larger than max |r| / (1 - gamma). What a value has beyond that has no return behind it (van Hasselt et al.
2018, "Deep Reinforcement Learning and the Deadly Triad"; Nikishin et al. 2022, "The Primacy Bias": after priming, critics overestimate
without bound). Soft values hold an entropy bonus as well, alpha times the entropy, for which the temperature's target stands in.

A healthy critic may be above the bound: where every step earns the largest reward, true values are the bound, and the largest of thousands
of approximations is above its own true value. An error of e at every step adds up as rewards do, to e / (1 - gamma). So values are said to
have diverged beyond twice the bound: that takes an error at every step as large as the largest reward, and more than half of such a
value is error, whatever the policy. What grows without bound gets there all the same.

Units: values and rewards are as learned from.
"""

from dataclasses import dataclass

import numpy as np
import torch

from growtrain.learners.base import AbstractLearner
from growtrain.replay.ring import LaneRing

_STATES = 4_096
_MARGIN = 2.0  # times the bound, beyond which a value is more error than return


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What was found.

    Attributes:
        value: the largest |Q(s, a)| over transitions of the replay.
        bound: the largest discounted return that its rewards allow.
    """

    value: float
    bound: float

    @property
    def diverged(self) -> bool:
        """Whether a value is more error than any return; never where no reward has been seen."""
        return self.bound > 0 and not self.value <= _MARGIN * self.bound  # nor is NaN

    @property
    def sentence(self) -> str:
        """The finding in a sentence."""
        return (
            f"The values have diverged: |Q| is up to {self.value:.3g}, and no discounted return of these rewards exceeds {self.bound:.3g}; "
            "an injection would keep such values, a reset forgets them."
        )


def largest_return(largest_reward: float, bonus: float, discount: float) -> float:
    """The largest discounted return of rewards of at most this size and a bonus at every step; infinite without a discount."""
    return (largest_reward + bonus) / (1 - discount) if discount < 1 else float("inf")


def measure_divergence(learner: AbstractLearner, ring: LaneRing) -> Divergence:
    """Compares a learner's values on its replay with the largest possible return; changes neither.

    Raises:
        ValueError: the replay holds no transition.
    """
    valid = np.flatnonzero(ring.valid)
    if not valid.size:
        raise ValueError("the replay of this checkpoint is empty: there is nothing to value")
    rows = np.random.default_rng(0).choice(valid, size=min(_STATES, valid.size), replace=False)
    batch = ring.gather(torch.from_numpy(rows).to(ring.device))
    rewards = ring.rewards(torch.from_numpy(valid)).abs()
    return Divergence(
        value=float(learner.values(batch.observation, batch.action).abs().max()),
        bound=largest_return(float(rewards.max()), learner.bonus, learner.config.discount),
    )
