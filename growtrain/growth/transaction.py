"""Growth as one transaction on a live learner: applied whole and verified, or rolled back.

What an intervention makes of the networks, and what it must keep, is its row in `kinds`. Here it is put in place, by parameter name, with
the proofs on real observations that the learner is then what it should be, and the way back. What is made are new modules, and the old
ones stay as they were, so going back is putting the old objects in place again.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from growtrain.growth.alternatives import Replacement, Slots, Subject, head_of
from growtrain.growth.inject import NotPreserved, count_parameters
from growtrain.growth.kinds import Kind, kind_of
from growtrain.learners.base import AbstractLearner
from growtrain.networks.snapshot import num_snapshots
from growtrain.records import GrowthEvent
from growtrain.settings.config import Anchor, Config
from growtrain.settings.schedules import Intervention


class GrowthFailed(RuntimeError):
    """An intervention failed and the learner is as it was before; the cause is chained."""


def grow(
    learner: AbstractLearner,
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
    learner: AbstractLearner,
    intervention: Intervention,
    observations: Tensor,
    *,
    config: Config,
    generator: torch.Generator,
    freeze_encoder: bool = False,
    frames: int | None = None,
    reason: str = "schedule",
    also: Callable[[], None] | None = None,
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
        also: what else belongs to it, done last; if it raises, the learner is rolled back, and the caller undoes what it has done.

    Returns:
        The event, with the measured changes of Q and the pause in seconds.

    Raises:
        GrowthFailed: anything went wrong; the learner is bit for bit what it was.
    """
    start = time.perf_counter()
    kind, networks, optimizer = kind_of(intervention, config), _networks(learner), learner.optimizer
    online = networks[0]
    with _rolled_back_on_failure(learner):
        before = [_q(network, observations) for network in networks]
        trainable_before = count_parameters(online, trainable=True)
        kept = _identities(slots_of(online, optimizer), kind.kept_slots)
        replacement = intervene(kind, networks, optimizer, observations, config, kind.stream(generator))
        frozen_now = _freeze_encoder(learner) if freeze_encoder else 0
        learner.rebuild()
        after = [_q(network, observations) for network in networks]
        _check_membership(learner, trainable_before + replacement.added_parameters - frozen_now)
        if not freeze_encoder and _identities(slots_of(online, optimizer), kind.kept_slots) != kept:
            raise NotPreserved("optimizer slots that this intervention keeps were not kept")
        changes = [_max_change(*values) for values in zip(before, after, strict=True)]
        for name, agree, old, new in zip(("online", "target"), kind.keeps, before, after, strict=True):
            if not torch.isfinite(new).all():
                raise NotPreserved(f"the {name} network's Q is not finite")
            if agree and not agree(old, new):
                raise NotPreserved(f"the {name} network's Q changed by {_max_change(old, new):g}")
        if also is not None:
            also()
    if observations.is_cuda:
        torch.cuda.synchronize()  # the pause is a wall-clock claim
    return GrowthEvent(
        frames=frames,
        stage=head_of(online).num_injections + num_snapshots(online),
        kind=intervention,
        reason=reason,
        anchor=config.anchor if kind.adds == "heads" else None,
        parameters_total=count_parameters(online),
        parameters_trainable_before=trainable_before,
        parameters_trainable=count_parameters(online, trainable=True),
        max_abs_q_change_online=changes[0],
        max_abs_q_change_target=changes[1],
        recycled_units=replacement.recycled_units,
        pause_seconds=time.perf_counter() - start,
    )


def intervene(
    kind: Kind,
    networks: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    observations: Tensor,
    config: Config,
    generator: torch.Generator,
) -> Replacement:
    """Does it, without a proof or a way back: the core of `apply`, and all of it for copies that are thrown away.

    Args:
        kind: what is done.
        networks: the one that learns, then its lagging copy if it has one; changed in place.
        optimizer: of the first; afterwards its groups hold, in the network's order, what trains of what they held, by identity or by name.
        observations: what it looks at, (B, ...).
        config: its settings.
        generator: source of fresh weights (CPU).
    """
    names = {id(p): name for name, p in networks[0].named_parameters()}
    subject = Subject(
        networks=networks,
        slots=slots_of(networks[0], optimizer),
        observations=observations,
        config=config,
        generator=generator,
    )
    replacement = kind.make(subject)
    for network, modules in zip(networks, replacement.modules, strict=False):
        for part, module in modules.items():
            network.set_submodule(part, module if network is networks[0] else module.requires_grad_(False))
    parameters = dict(networks[0].named_parameters())
    for group in optimizer.param_groups:
        held = {key for p in group["params"] for key in (id(p), names[id(p)])}
        group["params"] = [p for name, p in parameters.items() if p.requires_grad and (id(p) in held or name in held)]
    optimizer.state.clear()
    for name, slots in replacement.slots.items():
        if name in parameters:
            optimizer.state[parameters[name]] = slots
    return replacement


def _networks(learner: AbstractLearner) -> tuple[nn.Module, nn.Module]:
    """The network that is grown and its lagging copy, of a learner that has one such pair."""
    ((online, target),) = learner.plastic_parts.values()
    assert target is not None
    return online, target


@contextlib.contextmanager
def _rolled_back_on_failure(learner: AbstractLearner) -> Iterator[None]:
    """Puts modules, optimizer membership, slots, trainability, the target's memory back if the body raises; then raises `GrowthFailed`."""
    networks = _networks(learner)
    modules = [
        (network, part, network.get_submodule(part))
        for network in networks
        for part in ("encoder", "head", "snapshot")
        if hasattr(network, part)
    ]
    groups = [list(group["params"]) for group in learner.optimizer.param_groups]
    slots = dict(learner.optimizer.state)
    trainable = [(p, p.requires_grad) for p in networks[0].parameters()]
    lagging = [(p, p.data) for p in networks[1].parameters()]  # a rebuild may let them share what was to be frozen
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


def _freeze_encoder(learner: AbstractLearner) -> int:
    """Stops the encoder's learning; returns how many trainable parameters that took away."""
    encoder = _networks(learner)[0].get_submodule("encoder")
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


def _check_membership(learner: AbstractLearner, expected_trainable: int) -> None:
    online, target = _networks(learner)
    trainable = {id(p): name for name, p in online.named_parameters() if p.requires_grad}
    held = [id(p) for group in learner.optimizer.param_groups for p in group["params"]]
    if len(held) != len(set(held)) or set(held) != set(trainable):
        raise NotPreserved("the optimizer does not hold exactly the trainable parameters")
    count = count_parameters(online, trainable=True)
    if count != expected_trainable:
        raise NotPreserved(f"{count} parameters train, not {expected_trainable}")
    shapes = [{name: tensor.shape for name, tensor in network.state_dict().items()} for network in (online, target)]
    if shapes[0] != shapes[1]:
        raise NotPreserved("the target network does not have the online network's tensors")
    if any(p.requires_grad for p in target.parameters()):
        raise NotPreserved("a parameter of the target network requires a gradient")


def slots_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> Slots:
    """The optimizer's slots by the parameter's name in the network."""
    return {name: optimizer.state[p] for name, p in network.named_parameters() if p in optimizer.state}


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
