"""Have an agent's values diverged? An injection keeps them as they are, so that what looks like lost plasticity would not be mended by one.

No discounted return can be larger than max |r| / (1 - gamma). Values beyond that have no return behind them (Nikishin et al. 2022, "The
Primacy Bias": after priming, critics overestimate without bound). Soft values hold an entropy bonus as well, alpha times the entropy, for
which the temperature's target stands in.

Units: values and rewards are as learned from.
"""

from dataclasses import dataclass

import numpy as np
import torch

from growtrain.learners.base import AbstractLearner
from growtrain.replay.ring import LaneRing

_STATES = 4_096


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
        """Whether a value is beyond any return; never where no reward has been seen."""
        return self.bound > 0 and not self.value <= self.bound  # nor is NaN

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
