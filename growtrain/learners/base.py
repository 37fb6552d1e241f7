"""What a learner is to the rest of the code: it acts, updates, ends a step, and says which networks of it can be grown.

Nothing outside `learners/` knows which algorithm it is, but what measures Q-networks. What it draws while learning comes from generators of
its own, which `state_dict` holds; what acting draws comes from acting's.

Units: frames; a batch is (K x B) transitions, K updates of B.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from growtrain.environments.base import Spec
from growtrain.environments.failures import RunFailed
from growtrain.replay.ring import Batch
from growtrain.settings.config import Config


class Diverged(RunFailed):
    """Training cannot go on: a weight is not finite, or update after update had a loss or gradient that was not.

    In the second case the weights are finite, and as they were before the first of those updates.
    """


@dataclass(frozen=True, slots=True)
class LearnerReport:
    """What a learner did since the last report.

    Attributes:
        loss: mean per update; None without any.
        skipped: updates that were not applied, because a loss or gradient was not finite.
        q_mean: mean value of the transitions learned from, of a learner that does not act on values; None otherwise, or without any.
    """

    loss: float | None
    skipped: int
    q_mean: float | None = None


class AbstractLearner(ABC):
    """A learner.

    Attributes:
        config: of the run.
        spec: what is observed and can be done.
        device: where its networks live.
        optimizer: holds exactly the parameters that train.
        updates: gradient steps so far.
        version: counts changes after which a captured update is stale.
        asynchronous: the device works behind Python's back, so that reading one of its values means waiting for it.
        nonfinite: (3,) int64 on the device, updates that were not applied because a loss or gradient was not finite, see `finite`.
    """

    config: Config
    spec: Spec
    device: torch.device
    optimizer: torch.optim.Optimizer
    updates: int
    version: int
    asynchronous: bool
    nonfinite: Tensor

    @property
    @abstractmethod
    def networks(self) -> dict[str, tuple[nn.Module, nn.Module | None]]:
        """What learns, by name: online, and its lagging target or None; each with `encoder` and `head`, so that it can be grown."""

    @property
    def plastic_parts(self) -> dict[str, tuple[nn.Module, nn.Module | None]]:
        """Those of the networks that this run's interventions act on, all in one transaction."""
        return self.networks

    @abstractmethod
    def inputs(self, batch: TensorDict | Batch) -> dict[str, Tensor]:
        """What each of the networks takes of a batch (B,) of transitions, by its name."""

    @abstractmethod
    def trainable(self) -> list[nn.Parameter]:
        """All that trains now, which is what the optimizer must hold."""

    @abstractmethod
    def act(self, observation: Tensor, frozen_value: Tensor | None = None) -> Tensor:
        """What acting chooses from, (N, A) of observations (N, ...): the value of each discrete action; of continuous ones the
        distribution's parameters. It draws nothing, and an evaluation asks the same question.

        Args:
            observation: of N lanes.
            frozen_value: what `frozen_value` gives for them, where that is known already.
        """

    def frozen_value(self, observation: Tensor, before: Tensor | None = None) -> Tensor | None:
        """What networks that were frozen whole say of observations, (B, A): a fixed function until the next injection; None without any.

        Args:
            observation: of B moments.
            before: what it was of them before the newest injection, where that is known: it costs the newest network's then.
        """
        return None

    @abstractmethod
    def values(self, observation: Tensor, action: Tensor) -> Tensor:
        """The values (B,) of actions at observations, as it has learned them; without a graph."""

    @abstractmethod
    def bootstrap(self, observation: Tensor) -> Tensor:
        """What its targets say (B,) that acting on from observations is worth; without a graph."""

    @property
    def bonus(self) -> float:
        """What a value may hold at every step beside the reward, at most."""
        return 0.0

    @abstractmethod
    def update(self, batches: TensorDict | Sequence[Batch]) -> None:
        """One gradient step on each of K batches; what follows an update, as a Polyak average does, is part of it.

        Args:
            batches: (K, B) transitions in TorchRL's layout, or K batches (B,) of them as dictionaries.

        Raises:
            Diverged: where that can be known without waiting for the device.
        """

    @abstractmethod
    def compute_loss(self, batch: TensorDict | Batch, generator: torch.Generator | None = None) -> Tensor:
        """The loss () of one batch (B,), with a graph, to look at.

        Args:
            batch: in the layout of `update`.
            generator: of what is random in it (CPU), if anything is; None: there nothing is.
        """

    @abstractmethod
    def objective(self, batch: TensorDict | Batch) -> tuple[Tensor, Tensor]:
        """The loss () that a step on one batch (B,) differentiates, and what the step adds to the learner's sums, without a graph."""

    @abstractmethod
    def draw(self) -> None:
        """Draws what is random in the next `step`, outside of any graph."""

    @abstractmethod
    def step(self, batch: TensorDict | Batch) -> None:
        """One gradient step on one batch (B,), after `draw`; device work only, fit for a CUDA graph."""

    @abstractmethod
    def step_tensors(self) -> list[Tensor]:
        """What `step` moves in place, the optimizer's slots aside."""

    @abstractmethod
    def end_of_step(self, frames: int) -> None:
        """What is due after a step of all environments, `frames` being played, whether or not it came with updates: a target's copy."""

    @abstractmethod
    def rebuild(self) -> None:
        """Rebuilds what has captured parameters, after a change of architecture; networks, optimizer and counters stay."""

    @abstractmethod
    def require_finite(self) -> None:
        """Raises `Diverged` if what it has learned is not worth keeping; reads all weights."""

    @abstractmethod
    def report(self) -> LearnerReport:
        """What it did since the last call; reads the device."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that later updates depend on: tensors by name (views) and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, in a fresh learner of the same configuration; raises `ValueError` where it does not fit."""
