"""A whole update as one compiled function: loss, gradients, the count of what is not finite, the optimizer's step and what follows it.

An update of a small network is hundreds of short operations, and Python, autograd and the dispatcher take their share of each.
`torch.compile` makes one graph of them, in which what is computed element by element passes over memory once.

It is compiled anew, in some seconds, where an injection changes what an update computes. Freezing a whole network does that once, at the
first injection: from then on batches bring its values.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from growtrain.learners.base import AbstractLearner
from growtrain.learners.finite import count_nonfinite
from growtrain.learners.optimizers import Slots, compiled_anew, slots_of, step_of
from growtrain.learners.regularizers import project, regularized
from growtrain.replay.ring import Batch
from growtrain.settings.config import Config

if TYPE_CHECKING:
    from growtrain.learners.gradient_step import GradientStep


class CompiledStep:
    """A learner's gradient step on a CPU in one function.

    Args:
        learner: whose settings are compiled in.
    """

    def __init__(self, learner: AbstractLearner) -> None:
        self._step = compiled_anew(_make_step(learner.config, step_of(learner.optimizer)), on_cpu=True)

    def __call__(self, learner: AbstractLearner, parts: "GradientStep", batch: Batch) -> Tensor:
        """One step on a batch (B,); returns () bool, whether it was not finite and the parameters stayed what they were."""
        bad: Tensor = self._step(
            learner,
            batch,
            parts.trainable,
            slots_of(learner.optimizer, parts.trainable),
            parts.penalized,
            parts.initial,
            parts.projected,
            parts.norms,
            parts.lagging,
            parts.leading,
            learner.nonfinite,
            parts.sums,
        )
        return bad


def _make_step(config: Config, optimizer_step: Callable[..., None]) -> Callable[..., Tensor]:
    def step(
        learner: AbstractLearner,
        batch: Batch,
        trainable: list[Tensor],
        slots: Slots,
        penalized: list[Tensor],
        initial: list[Tensor],
        projected: list[list[Tensor]],
        norms: list[Tensor],
        lagging: list[Tensor],
        leading: list[Tensor],
        nonfinite: Tensor,
        sums: Tensor,
    ) -> Tensor:
        loss, summed = learner.objective(batch)
        gradients = list(torch.autograd.grad(regularized(loss, config, penalized, initial), trainable))
        with torch.no_grad():
            bad = count_nonfinite(loss, gradients, nonfinite)
            if config.max_grad_norm:
                norm = nn.utils.get_total_norm(gradients)
                scale = (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as `clip_grad_norm_` does
                gradients = [gradient * scale for gradient in gradients]
            optimizer_step(trainable, gradients, *slots, found_inf=bad)
            project(projected, norms, unless=bad)
            for follower, leader in zip(lagging, leading, strict=True):
                follower.copy_(torch.where(bad, follower, follower.lerp(leader, config.target_tau)))
            sums.add_(summed.nan_to_num(0.0, 0.0, 0.0))
        return bad

    return step
