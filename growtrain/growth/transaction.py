"""Growth as one transaction on a live learner: applied whole and verified, or rolled back.

Injection (Nikishin et al. 2023, section 4) is done by `interventions.inject`, by parameter name; what it is compared with is prepared by
`alternatives`. Here are the proofs that the learner is what it should be afterwards, on real observations, and the way back. The
interventions build new modules and leave the old ones as they were, so going back is putting the old objects in place again.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from growtrain.growth.alternatives import Replacement, Slots, prepare
from growtrain.growth.inject import NotPreserved, count_parameters, inject, nearly_equal, same_function
from growtrain.networks.injected import InjectedHead
from growtrain.records import GrowthEvent
from growtrain.settings.config import Anchor, Config
from growtrain.settings.schedules import Intervention


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
    """Injects plasticity into a live learner's head: `apply` with `inject`, whose only setting is the anchor."""
    return apply(
        learner,
        "inject",
        observations,
        config=Config(anchor=anchor),
        generator=generator,
        freeze_encoder=freeze_encoder,
        frames=frames,
        reason=reason,
    )


def apply(
    learner: Learner,
    intervention: Intervention,
    observations: Tensor,
    *,
    config: Config,
    generator: torch.Generator,
    freeze_encoder: bool = False,
    frames: int | None = None,
    reason: str = "schedule",
) -> GrowthEvent:
    """Applies an intervention to a live learner.

    Args:
        learner: changed in place.
        intervention: what is done.
        observations: probe batch, real observations on the learner's device, (B, ...) as the networks take them.
        config: the intervention's settings: anchor, trainable_heads, shrink_alpha, redo_tau, and width, by which a head is widened.
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
    online, target = learner.online, learner.target
    with _rolled_back_on_failure(learner):
        before_online, before_target = _q(online, observations), _q(target, observations)
        trainable_before = count_parameters(online, trainable=True)
        head_before = count_parameters(online.get_submodule("head"), trainable=True)
        slots = _slots(learner)
        kept = _identities(slots, _KEPT_SLOTS[intervention])
        recycled_units = None
        if intervention == "inject":
            inject(
                online,
                optimizer=learner.optimizer,
                target=target,
                generator=generator,
                anchor=config.anchor,
                trainable_heads=config.trainable_heads,
            )
            added = count_parameters(online.get_submodule("head.live"))
            if config.trainable_heads == "newest":
                added -= head_before
        else:
            replacement = prepare(intervention, online, target, slots, observations, config, generator)
            added, recycled_units = replacement.added_parameters, replacement.recycled_units
            _install(learner, replacement)
        frozen_now = _freeze_encoder(learner) if freeze_encoder else 0
        learner.rebuild()
        after_online, after_target = _q(online, observations), _q(target, observations)
        _check_membership(learner, trainable_before + added - frozen_now)
        if not freeze_encoder and _identities(_slots(learner), _KEPT_SLOTS[intervention]) != kept:
            raise NotPreserved("optimizer slots that this intervention keeps were not kept")
        for name, before, after in (("online", before_online, after_online), ("target", before_target, after_target)):
            if not torch.isfinite(after).all():
                raise NotPreserved(f"the {name} network's Q is not finite")
            if not _preserved(intervention, name, before, after):
                raise NotPreserved(f"the {name} network's Q changed by {_max_change(before, after):g}")
    if observations.is_cuda:
        torch.cuda.synchronize()  # the pause is a wall-clock claim
    head = online.get_submodule("head")
    assert isinstance(head, InjectedHead)
    return GrowthEvent(
        frames=frames,
        stage=head.num_injections,
        kind=intervention,
        reason=reason,
        anchor=config.anchor if intervention == "inject" else None,
        parameters_total=count_parameters(online),
        parameters_trainable_before=trainable_before,
        parameters_trainable=count_parameters(online, trainable=True),
        max_abs_q_change_online=_max_change(before_online, after_online),
        max_abs_q_change_target=_max_change(before_target, after_target),
        recycled_units=recycled_units,
        pause_seconds=time.perf_counter() - start,
    )


# Parameters, by the beginning of their names, whose optimizer slots an intervention must hand on untouched.
_KEPT_SLOTS: dict[Intervention, str | None] = {
    "inject": "encoder.",
    "reset-head": "encoder.",
    "reset-encoder": "head.",
    "reset-all": None,
    "shrink-perturb": "",
    "widen": "encoder.",
    "net2wider": "encoder.",
    "redo": None,
    "fresh-optimizer": None,
}


def _preserved(intervention: Intervention, network: str, before: Tensor, after: Tensor) -> bool:
    """Whether the probe's Q is what this intervention must leave of it in the `online` or the `target` network."""
    if intervention in ("inject", "fresh-optimizer") or (intervention == "redo" and network == "target"):
        return same_function(before, after)
    if intervention == "net2wider":
        return nearly_equal(before, after)
    return True


def _install(learner: Learner, replacement: Replacement) -> None:
    """Puts new modules and slots in place; the optimizer holds the parameters that have the names of those it held."""
    held = {id(p): name for name, p in learner.online.named_parameters()}
    for part, module in replacement.online.items():
        learner.online.set_submodule(part, module)
    for part, module in replacement.target.items():
        learner.target.set_submodule(part, module.requires_grad_(False))
    parameters = dict(learner.online.named_parameters())
    for group in learner.optimizer.param_groups:
        names = [held[id(p)] for p in group["params"]]
        group["params"] = [parameters[name] for name in names if name in parameters]
    learner.optimizer.state.clear()
    for name, slots in replacement.slots.items():
        if name in parameters:
            learner.optimizer.state[parameters[name]] = slots


@contextlib.contextmanager
def _rolled_back_on_failure(learner: Learner) -> Iterator[None]:
    """Puts modules, optimizer membership, slots, trainability, the target's memory back if the body raises; then raises `GrowthFailed`."""
    modules = [
        (network, part, network.get_submodule(part))
        for network in (learner.online, learner.target)
        for part in ("encoder", "head")
    ]
    groups = [list(group["params"]) for group in learner.optimizer.param_groups]
    slots = dict(learner.optimizer.state)
    trainable = [(p, p.requires_grad) for p in learner.online.parameters()]
    lagging = [(p, p.data) for p in learner.target.parameters()]  # a rebuild may let them share what was to be frozen
    try:
        yield
    except Exception as error:
        for network, part, module in modules:
            network.set_submodule(part, module)
        for group, params in zip(learner.optimizer.param_groups, groups, strict=True):
            group["params"] = params
        learner.optimizer.state.clear()
        learner.optimizer.state.update(slots)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for parameter, data in lagging:
            parameter.data = data
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


def _slots(learner: Learner) -> Slots:
    """The optimizer's slots by parameter name."""
    state = learner.optimizer.state
    return {name: state[p] for name, p in learner.online.named_parameters() if p in state}


def _identities(slots: Slots, prefix: str | None) -> dict[str, dict[str, int]]:
    """Identity of every slot of the parameters whose names begin with `prefix`; of none if it is None."""
    return {
        name: {slot: id(value) for slot, value in values.items()}
        for name, values in slots.items()
        if prefix is not None and name.startswith(prefix)
    }


@torch.no_grad()
def _q(network: nn.Module, observations: Tensor) -> Tensor:
    q: Tensor = network(observations)
    return q


def _max_change(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().max())
