"""The injection that freezes the whole network: Q(s) = F(s) + live(s), see `networks.snapshot`.

`whole_injection` is growtrain's own, of a `QNetwork`; `inject_network` is the drop-in for anybody's loop.
"""

import copy
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growtrain.growth.alternatives import Replacement, Subject
from growtrain.growth.inject import (
    NotPreserved,
    PlannedInjection,
    count_parameters,
    equal_with_nan,
    output_of,
    own_stream,
    plan_injection,
    same_function,
    undone_on_failure,
)
from growtrain.growth.reached import reached, tensors_in
from growtrain.networks.attachments import copied, first_hooked, hooks_aside
from growtrain.networks.build import QNetwork
from growtrain.networks.heads import initialize
from growtrain.networks.injectable import check_deterministic
from growtrain.networks.injected import Initializer, InjectedHead, fresh_copy
from growtrain.networks.location import (
    Observations,
    computes_as_its_class,
    copies_of_tensors,
    find_head,
    is_plain_sequential,
)
from growtrain.networks.snapshot import InjectedNetwork
from growtrain.records import GrowthEvent
from growtrain.settings.config import LiveEncoder
from growtrain.settings.text import require_choice


def whole_injection(subject: Subject) -> Replacement:
    """A snapshot of the network as it is, a silent head, and with `config.live_encoder` "cold" a fresh encoder, the same in every network.

    Slots of a warm encoder are kept. Networks that lag must be equal to the first, as they are after a target's copy: all share F.

    Raises:
        ValueError: a lagging network differs, the encoder does not learn and was to begin anew, or a weight is not finite.
    """
    online, *lagging = subject.networks
    assert isinstance(online, QNetwork)
    assert isinstance(online.head, InjectedHead)
    snapshot = online.frozen_whole()
    for network in lagging:
        theirs = network.state_dict()
        if not all(torch.equal(tensor, theirs[name]) for name, tensor in online.state_dict().items()):
            raise ValueError("the target lags: a whole network is frozen right after a copy of the target")
    new = {"head": online.head.silent(subject.generator), "snapshot": snapshot}
    cold = subject.config.live_encoder == "cold" and count_parameters(online.encoder)
    if cold:
        new["encoder"] = fresh_copy(online.encoder, subject.generator)
    shared = {"snapshot": snapshot}
    return Replacement(
        modules=[new, *(copy.deepcopy({k: m for k, m in new.items() if k not in shared}) | shared for _ in lagging)],
        slots={name: values for name, values in subject.slots.items() if name.split(".")[0] not in new},
        added_parameters=sum(
            count_parameters(new[part], trainable=True) - count_parameters(online.get_submodule(part), trainable=True)
            for part in new
        ),
    )


def inject_network(
    network: InjectedNetwork,
    *,
    head: str | Sequence[str] = "head",
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    target: InjectedNetwork | None = None,
    generator: torch.Generator | None = None,
    live_encoder: LiveEncoder = "warm",
    probe: Tensor | None = None,
    observations: Observations | None = None,
    initializer: Initializer = initialize,
) -> GrowthEvent:
    """Freezes all of a network in one's own training loop, in place and all or nothing; predictions do not change.

    The network's head becomes a fresh one whose output is exactly 0, as `growtrain.inject` puts it in place with `anchor="mirrored"`; the
    encoder goes on from its weights and moments, or with `live_encoder="cold"`, as far as it trains, from fresh ones. A target that lags
    keeps its lag: it gets a snapshot of its own. Every forward pass computes F, without a graph; keep F(s) beside s in your replay and pass
    it as `frozen_value`, and an update costs what it cost before the first injection, however often the network has grown.

    Args:
        network: wraps the network that trains.
        head: path of the head in the wrapped network, as for `growtrain.inject`.
        optimizer: as for `growtrain.inject`.
        target: wraps a network of the same structure.
        generator: source of the fresh weights (CPU); None draws a seed from torch's global generator.
        live_encoder: `warm` or `cold`.
        probe: as for `growtrain.inject`.
        observations: a batch as the networks take it, or one for each of their inputs, on which all of each is compared. Needed unless the
            head's output is the network's by construction: the end of an `nn.Sequential` of PyTorch's own layers, without hooks.
        initializer: draws fresh weights, in place.

    Returns:
        What happened; `anchor` is None.

    Raises:
        ValueError: as for `growtrain.inject`; or observations are needed, a weight is not finite, `live_encoder` is "cold" and nothing but
            the head trains, a layer computes something else at every call (dropout, BatchNorm in training mode), the network does not
            return one tensor, or changes its input, or a hook changes what it computes, which is frozen without it.
        NotPreserved: the outputs would have changed.
    """
    start = time.perf_counter()
    require_choice("live_encoder", live_encoder, LiveEncoder)
    networks = [network] if target is None else [network, target]
    for each in networks:
        if not isinstance(each, InjectedNetwork):
            raise ValueError(
                f"{type(each).__name__} is no InjectedNetwork: wrap it, InjectedNetwork(network), and train what that gives"
            )
        check_deterministic(each.live)
        if observations is None:
            _check_alone(each.live, head)
    frozen = [each.snapshot.grown(each.live) for each in networks]
    before = count_parameters(network, trainable=True)
    planned = plan_injection(
        network.live,
        head=head,
        optimizer=optimizer,
        target=None if target is None else target.live,
        generator=generator,
        anchor="mirrored",
        trainable_heads="newest",
        probe=probe,
        observations=observations,
        initializer=initializer,
    )
    optimizers = planned.members.optimizers
    fresh = _fresh_rest(network.live, planned, generator, initializer) if live_encoder == "cold" else {}
    # Every network's snapshot holds a copy of what the fresh values are written over.
    overwritten = [
        (_tensor(each.live, name), _tensor(snapshot.networks[-1], name))
        for each, snapshot in zip(networks, frozen, strict=True)
        for name in fresh
    ]
    outputs = _outputs(networks, observations)
    if observations is not None:
        for each, snapshot in zip(networks, frozen, strict=True):
            _check_copy(each.live, snapshot.networks[-1], observations)
    with undone_on_failure(networks, optimizers, overwritten):
        planned.carry_out()
        for each, snapshot, prepared in zip(networks, frozen, planned.prepared, strict=True):
            prepared.new.frozen, each.snapshot = None, snapshot
            each.heads = [*each.heads, head if isinstance(head, str) else list(head)]
        _begin_anew(networks, optimizers, fresh)
        changes = [_changed(*values) for values in zip(outputs, _outputs(networks, observations), strict=True)]
    changes = changes or list(planned.changes)
    return GrowthEvent(
        stage=network.num_injections,
        parameters_total=count_parameters(network),
        parameters_trainable_before=before,
        parameters_trainable=count_parameters(network, trainable=True),
        max_abs_q_change_online=changes[0],
        max_abs_q_change_target=changes[1] if target is not None else None,
        pause_seconds=time.perf_counter() - start,
    )


def _check_alone(network: nn.Module, head: str | Sequence[str]) -> None:
    """Raises `ValueError` unless the head's output is the network's by construction; then 0 for the one is 0 for the other."""
    found = find_head(network, head)
    inside = {id(module) for module in found.module.modules()}
    outside = [(name, module) for name, module in network.named_modules() if id(module) not in inside]
    leaves = (module for _, module in outside if not module._modules)
    before_any_product = itertools.takewhile(lambda leaf: not leaf._parameters, leaves)
    own = next((name for name, module in outside if not _is_pytorchs(module)), None)
    if (hooked := first_hooked(network)) is not None:
        why = f"the hook on {hooked!r} may change what the network computes"
    elif not found.is_last:
        why = f"the network may give something else than head {head!r} does (a skip connection, a dueling stream, a softmax)"
    elif own is not None:
        why = f"the frozen copy of {own!r} may compute something else"
    elif any(getattr(leaf, "inplace", False) for leaf in before_any_product):
        why = "the network changes its input"
    else:
        return
    raise ValueError(f"{why}: pass observations=, a batch as the network takes it, on which all of it is compared")


def _is_pytorchs(module: nn.Module) -> bool:
    """Whether a module computes as one of PyTorch's own, and no random one."""
    made_by = type(module).__module__.startswith(("torch.nn.modules.", "growtrain.networks."))
    return (made_by and computes_as_its_class(module) and not isinstance(module, nn.RReLU)) or is_plain_sequential(
        module
    )


def _check_copy(network: nn.Module, frozen: nn.Module, observations: Observations) -> None:
    """Raises if a network's copy does not give what the network gives, or computes it with the network's weights."""
    before, copied = _outputs([network, frozen], observations)
    moving = reached(lambda: output_of(frozen, copies_of_tensors(observations), graph=True), network.parameters())
    for name, p in network.named_parameters():
        if id(p) in moving:
            raise ValueError(
                f"the frozen copy would go on computing with {name!r}, which trains: a function that is set on a module "
                "(forward = torch.compile(...), a lambda) holds on to it; make it a method, or use module.compile()"
            )
    if same_function(before, copied):
        return
    with hooks_aside(network, network.modules()):
        (without,) = _outputs([network], observations)
    if same_function(without, copied):
        raise ValueError(
            f"the hook on {first_hooked(network)!r} changes what the network computes, and its frozen copy has no hooks: "
            "put that into the module's forward, or remove the hook"
        )
    raise NotPreserved(
        f"an output would have changed by {float((copied - before).abs().max()):g}: a layer computes something else in evaluation mode, "
        "in which frozen networks are; use .eval(), or another layer; nothing was changed"
    )


def _fresh_rest(
    network: nn.Module, planned: PlannedInjection, generator: torch.Generator | None, initializer: Initializer
) -> dict[str, Tensor]:
    """Fresh values for all that trains of a network and is not its head, and for buffers that are then others, by name, beside it.

    Raises:
        ValueError: nothing is.
        NotPreserved: one is not finite, and no output would be.
    """
    inside = {id(p) for p in planned.prepared[0].head.module.parameters()}
    buffers = {id(buffer) for buffer in planned.prepared[0].head.module.buffers()}
    generator = generator or own_stream(None)
    with hooks_aside(network, network.modules()):
        fresh = fresh_copy(_without_frozen(network), generator, initializer)
    names = [name for name, p in network.named_parameters() if p.requires_grad and id(p) not in inside]
    if not names:
        raise ValueError("live_encoder='cold': nothing of the network trains but its head; leave it 'warm'")
    values = {name: fresh.get_parameter(name).detach() for name in names}
    drawn = dict(fresh.named_buffers())
    for name, buffer in network.named_buffers():
        if id(buffer) not in buffers and name in drawn and not torch.equal(buffer, drawn[name]):
            values[name] = drawn[name]
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            raise NotPreserved(f"a fresh value of {name} is not finite: mend initializer=; nothing was changed")
    return values


def _without_frozen(network: nn.Module) -> nn.Module:
    """A copy of a network without the modules that have parameters none of which trains."""
    bare, left = copied(network), list[str]()
    for name, module in network.named_modules():
        frozen = any(True for _ in module.parameters()) and not count_parameters(module, trainable=True)
        if name and frozen and not any(name.startswith(f"{each}.") for each in left):
            bare.set_submodule(name, nn.Identity())
            left.append(name)
    return bare


@torch.no_grad()
def _begin_anew(networks: Sequence[InjectedNetwork], optimizers: Sequence[Any], fresh: Mapping[str, Tensor]) -> None:
    """The same values in every network, and no moments, for the parameters of these names."""
    for name, value in fresh.items():
        for network in networks:
            _tensor(network.live, name).copy_(value)
        for optimizer in optimizers:
            optimizer.state.pop(_tensor(networks[0].live, name), None)


def _tensor(network: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer by its name."""
    path, _, own = name.rpartition(".")
    tensor: Tensor = getattr(network.get_submodule(path), own)
    return tensor


def _outputs(networks: Sequence[nn.Module], observations: Observations | None) -> list[Tensor]:
    """The output (B, A) of each network; none without observations.

    Raises:
        ValueError: it is no tensor, or what was given has changed.
    """
    outputs: list[Tensor] = []
    for network in networks if observations is not None else ():
        assert observations is not None
        given = copies_of_tensors(observations)
        output = output_of(network, given)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the network returns {type(output).__name__}, not a tensor: what is frozen of it could not be added up"
            )
        if not all(map(equal_with_nan, tensors_in(given), tensors_in(observations))):
            raise ValueError(
                "the network changes its input, of which both its parts are computed: have it work on a copy"
            )
        outputs.append(output)
    return outputs


def _changed(before: Tensor, after: Tensor) -> float:
    """The largest change of an output, (B, A) each; raises `NotPreserved` if it is more than rounding."""
    change = float((after - before).abs().max())
    if not same_function(before, after):
        raise NotPreserved(
            f"an output would have changed by {change:g}: the network adds to what its head gives, or changes it; "
            "name all that does in head=, or a head that gives what the network gives; "
            "nothing was changed"
        )
    return change
