"""Growth as one transaction on a live learner: applied whole and verified, or rolled back.

What an intervention makes of the networks, and what it must keep, is its row in `kinds`. Here it is put in place, by parameter name, with
the proofs on real observations that the learner is then what it should be, and the way back. A learner with several networks that grow has
them all grown, or none. What is made are new modules, and the old ones stay as they were, so going back is putting the old objects in place
again.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from growtrain.environments.failures import RunFailed
from growtrain.growth.alternatives import Replacement, Slots, Subject, head_of
from growtrain.growth.inject import NotPreserved, count_parameters
from growtrain.growth.kinds import Kind, kind_of
from growtrain.learners.base import AbstractLearner
from growtrain.networks.snapshot import num_snapshots
from growtrain.records import GrowthEvent
from growtrain.settings.config import Config
from growtrain.settings.schedules import Intervention

Inputs = Tensor | Mapping[str, Tensor]  # of the only network of a learner, or of each by its name


class GrowthFailed(RunFailed):
    """An intervention failed and the learner is as it was before; the cause is chained."""


def apply(
    learner: AbstractLearner,
    intervention: Intervention,
    observations: Inputs,
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
        observations: probe batch, real observations on the learner's device, (B, ...) as each network takes them (`learner.inputs`).
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
    kind, optimizer = kind_of(intervention, config), learner.optimizer
    subjects = {name: _subject(pair, observations, name) for name, pair in learner.plastic_parts.items()}
    with _rolled_back_on_failure(learner):
        before = {name: subject.outputs() for name, subject in subjects.items()}
        trainable_before = _num_trainable(learner)
        kept = {name: _identities(slots_of(each.online, optimizer), kind.kept_slots) for name, each in subjects.items()}
        replacements = [
            intervene(kind, each.networks, optimizer, each.observations, config, kind.stream(generator))
            for each in subjects.values()
        ]
        frozen_now = _freeze_encoders(learner) if freeze_encoder else 0
        learner.rebuild()
        after = {name: subject.outputs() for name, subject in subjects.items()}
        added = sum(replacement.added_parameters for replacement in replacements)
        _check_membership(learner, trainable_before + added - frozen_now)
        for name, subject in subjects.items():
            slots = _identities(slots_of(subject.online, optimizer), kind.kept_slots)
            if not freeze_encoder and slots != kept[name]:
                raise NotPreserved("optimizer slots that this intervention keeps were not kept")
            _check_outputs(f" ({name})" if len(subjects) > 1 else "", kind, before[name], after[name])
        if also is not None:
            also()
    changes = {
        name: [_max_change(*values) for values in zip(before[name], after[name], strict=True)] for name in subjects
    }
    recycled = [each.recycled_units for each in replacements if each.recycled_units is not None]
    lagging = [each[1] for each in changes.values() if len(each) > 1]
    if learner.device.type == "cuda":
        torch.cuda.synchronize()  # the pause is a wall-clock claim
    return GrowthEvent(
        frames=frames,
        stage=max(head_of(each.online).num_injections + num_snapshots(each.online) for each in subjects.values()),
        kind=intervention,
        reason=reason,
        anchor=config.anchor if kind.adds == "heads" else None,
        parameters_total=sum(count_parameters(online) for online, _ in learner.networks.values()),
        parameters_trainable_before=trainable_before,
        parameters_trainable=_num_trainable(learner),
        max_abs_q_change_online=max(each[0] for each in changes.values()),
        max_abs_q_change_target=max(lagging, default=None),
        changes=changes if len(learner.networks) > 1 else None,
        recycled_units=sum(recycled) if recycled else None,
        pause_seconds=time.perf_counter() - start,
    )


def freeze_encoder(learner: AbstractLearner) -> None:
    """Freezes the encoders and nothing else, as `apply` does beside an intervention.

    Raises:
        GrowthFailed: anything went wrong; the learner is bit for bit what it was.
    """
    trainable_before = _num_trainable(learner)
    with _rolled_back_on_failure(learner):
        frozen = _freeze_encoders(learner)
        learner.rebuild()
        _check_membership(learner, trainable_before - frozen)


@dataclass(frozen=True)
class _Grown:
    """A network that is grown, its lagging copy if it has one, and probe observations as they take them."""

    networks: tuple[nn.Module, ...]
    observations: Tensor

    @property
    def online(self) -> nn.Module:
        """The network that learns."""
        return self.networks[0]

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """What each of the networks gives for the observations."""
        return [network(self.observations) for network in self.networks]


def _subject(pair: tuple[nn.Module, nn.Module | None], observations: Inputs, name: str) -> _Grown:
    online, target = pair
    networks = (online,) if target is None else (online, target)
    return _Grown(networks, observations if isinstance(observations, Tensor) else observations[name])


def _check_outputs(where: str, kind: Kind, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Raises `NotPreserved` unless the outputs of a network and of its target are as they must be."""
    for role, agree, old, new in zip(("online", "target"), kind.keeps, before, after, strict=False):
        if not torch.isfinite(new).all():
            raise NotPreserved(f"the {role} network's Q is not finite{where}")
        if agree and not agree(old, new):
            raise NotPreserved(f"the {role} network's Q changed by {_max_change(old, new):g}{where}")


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
        optimizer: of the first, and maybe of others, of which all stays as it is; afterwards its groups hold, in the network's order, what
            trains of what they held, by identity or by name.
        observations: what it looks at, (B, ...).
        config: its settings.
        generator: source of fresh weights (CPU).
    """
    names = {id(p): name for name, p in networks[0].named_parameters()}
    old = list(networks[0].parameters())
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
        held = {key for p in group["params"] if id(p) in names for key in (id(p), names[id(p)])}
        others = [p for p in group["params"] if id(p) not in names]
        group["params"] = others + [
            p for name, p in parameters.items() if p.requires_grad and (id(p) in held or name in held)
        ]
    for p in old:
        optimizer.state.pop(p, None)
    for name, slots in replacement.slots.items():
        if name in parameters:
            optimizer.state[parameters[name]] = slots
    return replacement


@contextlib.contextmanager
def _rolled_back_on_failure(learner: AbstractLearner) -> Iterator[None]:
    """Puts modules, membership, slots, trainability, gradients, targets' memory back if the body raises; then raises `GrowthFailed`."""
    pairs = learner.plastic_parts.values()
    modules = [
        (network, part, network.get_submodule(part))
        for network in (network for pair in pairs for network in pair if network is not None)
        for part in ("encoder", "head", "snapshot")
        if hasattr(network, part)
    ]
    groups = [list(group["params"]) for group in learner.optimizer.param_groups]
    slots = dict(learner.optimizer.state)
    trainable = [(p, p.requires_grad, p.grad) for online, _ in pairs for p in online.parameters()]
    # A rebuild may let targets share what was to be frozen.
    lagging = [(p, p.data) for _, target in pairs if target is not None for p in target.parameters()]
    try:
        yield
    except Exception as error:
        for network, part, module in modules:
            network.set_submodule(part, module)
        for group, params in zip(learner.optimizer.param_groups, groups, strict=True):
            group["params"] = params
        learner.optimizer.state.clear()
        learner.optimizer.state.update(slots)
        for parameter, requires_grad, grad in trainable:
            parameter.requires_grad_(requires_grad).grad = grad
        for parameter, data in lagging:
            parameter.data = data
        learner.rebuild()
        raise GrowthFailed(f"growth failed and was rolled back: {error}") from error


def _freeze_encoders(learner: AbstractLearner) -> int:
    """Stops the encoders' learning; returns how many trainable parameters that took away."""
    encoders = [online.get_submodule("encoder") for online, _ in learner.plastic_parts.values()]
    count = sum(count_parameters(encoder, trainable=True) for encoder in encoders)
    frozen = {id(p) for encoder in encoders for p in encoder.parameters()}
    for group in learner.optimizer.param_groups:
        for p in group["params"]:
            if id(p) in frozen:
                learner.optimizer.state.pop(p, None)
        group["params"] = [p for p in group["params"] if id(p) not in frozen]
    for encoder in encoders:
        for parameter in encoder.parameters():
            parameter.requires_grad_(False).grad = None
    return count


def _num_trainable(learner: AbstractLearner) -> int:
    """How many parameters of its networks train."""
    return sum(count_parameters(online, trainable=True) for online, _ in learner.networks.values())


def _check_membership(learner: AbstractLearner, expected_trainable: int) -> None:
    held = [id(p) for group in learner.optimizer.param_groups for p in group["params"]]
    if len(held) != len(set(held)) or set(held) != {id(p) for p in learner.trainable()}:
        raise NotPreserved("the optimizer does not hold exactly the trainable parameters")
    count = _num_trainable(learner)
    if count != expected_trainable:
        raise NotPreserved(f"{count} parameters train, not {expected_trainable}")
    for online, target in learner.networks.values():
        if target is None:
            continue
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


def _max_change(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().max())
