"""Growth as one transaction on a live learner: applied whole and verified, or rolled back.

Injection (Nikishin et al. 2023, section 4) is done by `interventions.inject`, by parameter name; here are the proofs that the learner is
what it should be afterwards, on real observations, and the way back. The interventions build new modules and leave the old ones as
they were, so going back is putting the old objects in place again.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from growtrain.config import Anchor
from growtrain.growth.interventions import GrowthEvent, NotPreserved, count_parameters, inject, same_function


class GrowthFailed(RuntimeError):
    """An intervention failed and the learner is as it was before; the cause is chained."""


class Learner(Protocol):
    """What a learner must offer to be grown: networks with `encoder` and `head`, an optimizer, and a way to rebuild what captured them."""

    optimizer: torch.optim.Optimizer

    @property
    def online(self) -> nn.Module:
        """The network that learns."""

    @property
    def target(self) -> nn.Module:
        """Its lagging copy."""

    def rebuild(self) -> None:
        """Rebuilds losses, compiled functions and graphs; keeps networks, optimizer slots and the target's lag."""


def grow(
    learner: Learner,
    observations: Tensor,
    *,
    anchor: Anchor,
    generator: torch.Generator,
    freeze_encoder: bool = False,
    frames: int | None = None,
    reason: str = "schedule",
) -> GrowthEvent:
    """Injects plasticity into a live learner's head.

    Args:
        learner: grown in place.
        observations: probe batch, real observations on the learner's device, (B, ...) as the networks take them.
        anchor: `frozen`, `zero` or `mirrored`.
        generator: source of the fresh weights (CPU).
        freeze_encoder: the encoder stops learning and leaves the optimizer.
        frames: frames played so far, for the event.
        reason: why now, for the event.

    Returns:
        The event, with the measured changes of Q and the pause in seconds.

    Raises:
        GrowthFailed: anything went wrong; the learner is bit for bit what it was.
    """
    start = time.perf_counter()
    with _rolled_back_on_failure(learner):
        before_online, before_target = _q(learner.online, observations), _q(learner.target, observations)
        trainable_before = count_parameters(learner.online, trainable=True)
        kept = _optimizer_slots(learner, prefix="encoder.")
        event = inject(
            learner.online, optimizer=learner.optimizer, target=learner.target, generator=generator, anchor=anchor
        )
        frozen_now = _freeze_encoder(learner) if freeze_encoder else 0
        learner.rebuild()
        after_online, after_target = _q(learner.online, observations), _q(learner.target, observations)
        _check_membership(learner, trainable_before - frozen_now)
        if not freeze_encoder and _optimizer_slots(learner, prefix="encoder.") != kept:
            raise NotPreserved("the encoder's optimizer slots were not kept")
        for name, before, after in (("online", before_online, after_online), ("target", before_target, after_target)):
            if not same_function(before, after):
                raise NotPreserved(f"the {name} network's Q changed by {_max_change(before, after):g}")
    if observations.is_cuda:
        torch.cuda.synchronize()  # the pause is a wall-clock claim
    return dataclasses.replace(
        event,
        frames=frames,
        reason=reason,
        parameters_trainable_before=trainable_before,
        parameters_trainable=count_parameters(learner.online, trainable=True),
        max_abs_q_change_online=_max_change(before_online, after_online),
        max_abs_q_change_target=_max_change(before_target, after_target),
        pause_seconds=time.perf_counter() - start,
    )


@contextlib.contextmanager
def _rolled_back_on_failure(learner: Learner) -> Iterator[None]:
    """Puts modules, optimizer membership, slots and trainability back if the body raises, and raises `GrowthFailed`."""
    heads = learner.online.get_submodule("head"), learner.target.get_submodule("head")
    groups = [list(group["params"]) for group in learner.optimizer.param_groups]
    slots = dict(learner.optimizer.state)
    trainable = [(p, p.requires_grad) for p in learner.online.parameters()]
    try:
        yield
    except Exception as error:
        learner.online.set_submodule("head", heads[0])
        learner.target.set_submodule("head", heads[1])
        for group, params in zip(learner.optimizer.param_groups, groups, strict=True):
            group["params"] = params
        learner.optimizer.state.clear()
        learner.optimizer.state.update(slots)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        learner.rebuild()
        raise GrowthFailed(f"growth failed and was rolled back: {error}") from error


def _freeze_encoder(learner: Learner) -> int:
    """Stops the encoder's learning; returns how many trainable parameters that took away."""
    encoder = learner.online.get_submodule("encoder")
    count = count_parameters(encoder, trainable=True)
    frozen = {id(p) for p in encoder.parameters()}
    for group in learner.optimizer.param_groups:
        for p in group["params"]:
            if id(p) in frozen:
                learner.optimizer.state.pop(p, None)
        group["params"] = [p for p in group["params"] if id(p) not in frozen]
    for parameter in encoder.parameters():
        parameter.requires_grad_(False).grad = None
    return count


def _check_membership(learner: Learner, expected_trainable: int) -> None:
    trainable = {id(p): name for name, p in learner.online.named_parameters() if p.requires_grad}
    held = [id(p) for group in learner.optimizer.param_groups for p in group["params"]]
    if len(held) != len(set(held)) or set(held) != set(trainable):
        raise NotPreserved("the optimizer does not hold exactly the trainable parameters")
    count = count_parameters(learner.online, trainable=True)
    if count != expected_trainable:
        raise NotPreserved(f"{count} parameters train, not {expected_trainable}")
    online, target = learner.online.state_dict(), learner.target.state_dict()
    if {k: v.shape for k, v in online.items()} != {k: v.shape for k, v in target.items()}:
        raise NotPreserved("the target network does not have the online network's tensors")
    if any(p.requires_grad for p in learner.target.parameters()):
        raise NotPreserved("a parameter of the target network requires a gradient")


def _optimizer_slots(learner: Learner, prefix: str) -> dict[str, dict[str, int]]:
    """Identity of every optimizer slot of the parameters under `prefix`, by parameter name."""
    return {
        name: {key: id(value) for key, value in learner.optimizer.state[p].items()}
        for name, p in learner.online.named_parameters()
        if name.startswith(prefix) and p in learner.optimizer.state
    }


@torch.no_grad()
def _q(network: nn.Module, observations: Tensor) -> Tensor:
    q: Tensor = network(observations)
    return q


def _max_change(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().max())
