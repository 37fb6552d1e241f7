"""A whole update as one compiled function: loss, gradients, the count of what is not finite, and the optimizer's step.

An update of a small network is hundreds of short operations, and Python, autograd and the dispatcher take their share of each.
`torch.compile` makes one graph of them, in which what is computed element by element passes over memory once.

It is compiled anew, in some seconds, where an injection changes what an update computes. Freezing a whole network does that once, at the
first injection: from then on batches bring its values.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from growtrain.learners.finite import count_nonfinite
from growtrain.learners.optimizers import CenteredRMSProp, centered_rmsprop_step, compiled_anew
from growtrain.replay.ring import Batch

if TYPE_CHECKING:
    from growtrain.learners.double_dqn import DoubleDQN


class CompiledStep:
    """What a learner's update does to its networks on a CPU; with Adam, which has a kernel of its own, all but the optimizer's part.

    Args:
        learner: as it is after `rebuild`; when its architecture changes, another is needed.
    """

    def __init__(self, learner: "DoubleDQN") -> None:
        self._learner = learner
        self._parameters = [parameter for parameter in learner.online.parameters() if parameter.requires_grad]
        self._step = compiled_anew(_make_step(learner))

    def __call__(self, batch: Batch) -> Tensor:
        """One step on a batch (B,); returns () bool, whether it was not finite and the parameters stayed what they were."""
        learner, optimizer, parameters = self._learner, self._learner.optimizer, self._parameters
        slots = optimizer.slots(parameters) if isinstance(optimizer, CenteredRMSProp) else None
        initial = [learner.initial[p] for p in learner.penalized] if learner.initial else []
        bad: Tensor
        bad, gradients = self._step(parameters, slots, batch, initial, learner.nonfinite, learner.loss_sum)
        if slots is None and not bool(bad):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        return bad


def _make_step(learner: "DoubleDQN") -> Callable[..., Any]:
    config, group = learner.config, learner.optimizer.param_groups[0]
    hyperparameters = {key: group[key] for key in ("lr", "decay", "eps", "inside") if key in group}

    def step(
        parameters: list[Tensor],
        slots: tuple[list[Tensor], list[Tensor]] | None,
        batch: Batch,
        initial: list[Tensor],
        nonfinite: Tensor,
        loss_sum: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        loss = learner.compute_loss(batch)
        gradients = list(torch.autograd.grad(learner.regularized(loss, learner.penalized, initial), parameters))
        with torch.no_grad():
            bad = count_nonfinite(loss, gradients, nonfinite)
            if config.max_grad_norm:
                norm = nn.utils.get_total_norm(gradients)
                scale = (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as `clip_grad_norm_` does
                gradients = [gradient * scale for gradient in gradients]
            if slots is not None:
                centered_rmsprop_step(parameters, gradients, *slots, **hyperparameters, found_inf=bad)
            loss_sum.add_(loss.detach().nan_to_num(0.0, 0.0, 0.0))
        return bad, gradients if slots is None else []

    return step
