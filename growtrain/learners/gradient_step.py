"""One gradient step: loss, gradients, the count of what is not finite, the optimizer, and what follows it at every update.

It runs operation by operation, or, where a run on a CPU is long enough for that to pay, as one compiled function (see `compiled`).
"""

import warnings
from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from growtrain.learners.base import AbstractLearner
from growtrain.learners.compiled import CompiledStep
from growtrain.learners.finite import count_nonfinite
from growtrain.learners.optimizers import CompilationFailed, can_compile, make_optimizer
from growtrain.learners.regularizers import hidden_matrices, joint_norm, normalized_layers, project, regularized
from growtrain.replay.ring import Batch
from growtrain.settings.config import Config
from growtrain.settings.schedules import schedule_of

# Updates from which compiling pays: the optimizer's step takes a few seconds, and saves up to two milliseconds an update; the whole update
# takes some seconds for every architecture, of SAC's 20 to 25, and saves about half a millisecond, of SAC's one to two.
MIN_UPDATES_TO_COMPILE = 10_000
MIN_UPDATES_TO_COMPILE_ALL = 50_000
_SHARE_OF_A_STAGE = 0.3  # of the latter, which each stage of a run that is compiled anew has on average


def compiles(config: Config, device: torch.device, *, whole: bool) -> bool:
    """Whether a run compiles its optimizer's step, or whole updates: it has updates enough for that, and may and can."""
    updates = config.replay_ratio * (config.total_frames - config.learning_starts) / config.frame_skip
    updates += config.priming_updates
    least: float = MIN_UPDATES_TO_COMPILE
    if whole:
        schedule = schedule_of(config)
        changes = len(schedule.injection_frames)
        if schedule.intervention == "inject" and config.freeze == "network":
            changes = min(changes, 1)  # the others change nothing that an update computes
        least = MIN_UPDATES_TO_COMPILE_ALL * max(1.0, _SHARE_OF_A_STAGE * (1 + changes))
    return config.execution != "eager" and updates >= least and can_compile(device)


def fresh_optimizer(learner: AbstractLearner) -> torch.optim.Optimizer:
    """An optimizer of all that trains of a learner, without slots."""
    config = learner.config
    return make_optimizer(
        config.optimizer,
        learner.trainable(),
        lr=config.lr,
        eps=config.optimizer_eps,
        decay=config.optimizer_decay,
        compiled=compiles(config, learner.device, whole=False),
    )


class GradientStep:
    """What an update does to a learner's weights, its optimizer's slots and its sums.

    It is handed the learner anew at every call and keeps none: two that hold each other would keep a learner's memory, or an old head's,
    until the garbage collector comes by.

    Args:
        learner: has its networks and its optimizer; when its architecture changes, another step is needed.
        network: holds all its weights that train.
        sums: of the learner, what `objective` says beside the loss is added to it.
        initial: for `l2-init` and `nap`, the values with which weights began to train; gets those of new ones.
        pairs: what follows something by Polyak averaging after the optimizer's step, and that.

    Attributes:
        trainable: all that trains, in the learner's order.
        penalized: the weights that a regularizer looks at.
        initial: the values with which they began to train, where it needs them.
        projected, norms: layers that are rescaled after every step, and to which norm.
        lagging, leading: the two halves of the pairs.
        compiled: the whole of it as one function; None where it runs operation by operation.
    """

    def __init__(
        self,
        learner: AbstractLearner,
        network: nn.Module,
        *,
        sums: Tensor,
        initial: WeakTensorKeyDictionary,
        pairs: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        config = learner.config
        self.sums, self.trainable = sums, learner.trainable()
        weights = [p for p in network.parameters() if p.requires_grad]
        if config.keeps_initial_weights:
            initial.update({p: p.detach().clone() for p in weights if p not in initial})
        self.penalized = hidden_matrices(network) if config.regularizer == "parseval" else weights
        self.initial = [initial[p] for p in self.penalized] if config.regularizer == "l2-init" else []
        self.projected = list(normalized_layers(network)) if config.weight_projection == "nap" else []
        self.norms = [joint_norm([initial[p] for p in layer]) for layer in self.projected]
        self.lagging, self.leading = [lagging for lagging, _ in pairs], [leading for _, leading in pairs]
        compiled = not learner.asynchronous and compiles(config, learner.device, whole=True)
        self.compiled = CompiledStep(learner) if compiled else None

    def __call__(self, learner: AbstractLearner, batch: TensorDict | Batch) -> Tensor:
        """One step on a batch (B,); returns () bool, whether loss or gradients were not finite, and nothing was moved.

        Run operation by operation on the CPU, the answer is known at once. What is captured tells it to the optimizer as a gradient scaler
        does, which then moves no parameter (Adam skips the step, the moments of centred RMSProp decay by one, as they do compiled).
        """
        if self.compiled is not None:
            try:
                return self.compiled(learner, self, batch.to_dict() if isinstance(batch, TensorDict) else batch)
            except CompilationFailed as error:
                warnings.warn(f"the update could not be compiled and runs uncompiled: {error}", stacklevel=2)
                self.compiled = None
        loss, summed = learner.objective(batch)
        learner.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(regularized(loss, learner.config, self.penalized, self.initial))
        with torch.no_grad():
            gradients = [p.grad for p in self.trainable if p.grad is not None]
            bad = count_nonfinite(loss, gradients, learner.nonfinite)
        if learner.asynchronous:
            learner.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bool(bad):
            return bad
        if learner.config.max_grad_norm:
            nn.utils.clip_grad_norm_(self.trainable, learner.config.max_grad_norm)
        learner.optimizer.step()
        project(self.projected, self.norms, unless=bad)
        if self.lagging:
            with torch.no_grad():
                steps = torch._foreach_sub(self.leading, self.lagging)
                torch._foreach_mul_(steps, learner.config.target_tau * ~bad)
                torch._foreach_add_(self.lagging, steps)
        self.sums += summed.nan_to_num(0.0, 0.0, 0.0)
        return bad
