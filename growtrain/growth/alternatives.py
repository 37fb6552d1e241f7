"""The alternatives to plasticity injection that it is compared with, each from networks to what takes the place of their parts.

- reset-head, reset-encoder, reset-all: fresh weights (Nikishin et al. 2022, "The Primacy Bias in Deep Reinforcement Learning").
- shrink-perturb: old weights shrunk, fresh ones added (Ash & Adams 2020; with fresh weights as the noise: D'Oro et al. 2023, SR-SPR).
- widen: fresh hidden units in the head, the "naive width scaling" that Nikishin et al. 2023 compare with.
- net2wider: duplicated hidden units whose outgoing weights are split (Chen et al. 2016, "Net2Net", Net2WiderNet).
- redo: dormant units are recycled (Sokar et al. 2023, "The Dormant Neuron Phenomenon in Deep Reinforcement Learning", algorithm 1).
- fresh-optimizer: the optimizer forgets its moments and nothing else changes; the control for what a reset owes to fresh slots alone.

Deviations: 1. online and target get the same fresh weights, as at an injection; SR-SPR's code draws them apart. 2. shrink-perturb acts on
the whole network; SR-SPR shrinks the encoder and resets the head. 3. net2wider splits at random for each action instead of in halves:
halves have equal gradients for ever, so that twins would stay one unit without the noise that Net2Net adds. 4. redo draws a recycled
unit's bias, like its weights, from the initial distribution; the authors' network begins with zero biases.

Nothing here changes a module, a tensor or an optimizer: `transaction` puts what is returned in place, and can go back.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from growtrain.diagnostics import dormancy
from growtrain.networks.heads import SpectralLinear
from growtrain.networks.injected import InjectedHead, fresh_copy, trains
from growtrain.networks.snapshot import Snapshot, num_snapshots
from growtrain.settings.config import Config

Slots = dict[str, dict[str, Tensor]]  # optimizer slots by the parameter's name in the network, by the slot's name


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What something is done to, and with.

    Attributes:
        networks: the one that learns, then its lagging copies if it has any, each with an `encoder` and an `InjectedHead` as `head`.
        slots: of the first network's parameters.
        observations: probe batch, (B, ...) as the networks take them; `redo` finds dormant units on it.
        config: settings of the intervention, and `width`, the units that widening adds.
        generator: source of fresh weights (CPU).
    """

    networks: Sequence[nn.Module]
    slots: Slots
    observations: Tensor
    config: Config
    generator: torch.Generator


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """What takes the place of parts of the networks.

    Attributes:
        modules: for each network the new modules by the part they replace, `encoder` or `head`; other parts, and networks that are
            not listed, stay.
        slots: of the first network's parameters afterwards; a parameter without an entry starts fresh.
        added_parameters: how many more parameters train.
        recycled_units: dormant units that were recycled; None for what does not look for them.
    """

    modules: Sequence[dict[str, nn.Module]] = ()
    slots: Slots = field(default_factory=dict)
    added_parameters: int = 0
    recycled_units: int | None = None


def head_of(network: nn.Module) -> InjectedHead:
    """The head of a network that can be grown."""
    head = network.get_submodule("head")
    assert isinstance(head, InjectedHead)
    return head


def forget_moments(subject: Subject) -> Replacement:
    """Every slot starts fresh, and nothing else changes."""
    return Replacement()


def reset(subject: Subject, *, parts: tuple[str, ...]) -> Replacement:
    """Fresh weights and fresh slots for these parts; the target gets the same weights. Predictions are forgotten.

    A head that has been injected becomes a single one again.

    Raises:
        ValueError: a part does not learn any more.
    """
    online, *lagging = subject.networks
    fresh: dict[str, nn.Module] = {}
    added = 0
    for part in parts:
        old = online.get_submodule(part)
        if not list(old.parameters()):  # the encoder of a network that is all head
            continue
        if not trains(old):
            raise ValueError(f"the {part} does not learn any more: fresh weights would stay as they are drawn")
        new = fresh_copy(old.live if isinstance(old, InjectedHead) else old, subject.generator)
        fresh[part] = InjectedHead(new) if isinstance(old, InjectedHead) else new
        added += _num_trainable(fresh[part]) - _num_trainable(old)
    if "head" in fresh and num_snapshots(online):
        fresh["snapshot"] = Snapshot()
    return Replacement(
        modules=[fresh, *(copy.deepcopy(fresh) for _ in lagging)],
        slots={name: values for name, values in subject.slots.items() if name.split(".")[0] not in parts},
        added_parameters=added,
    )


def _num_trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def shrink_perturb(subject: Subject) -> Replacement:
    """Weights become alpha w + (1 - alpha) fresh in the encoder, if it learns, and the live head; slots are kept, as in SR-SPR.

    The target moves with the same fresh weights, so that its lag is shrunk to alpha times itself like everything that was learned: a target
    left behind would keep predictions that the online network has partly forgotten, and a copied one would lose the lag.
    """
    new: list[dict[str, nn.Module]] = [{} for _ in subject.networks]
    for part in ("encoder", "head"):
        old = subject.networks[0].get_submodule(part)
        if not trains(old):
            continue
        inside = "live" if part == "head" else ""
        fresh = fresh_copy(old.get_submodule(inside), subject.generator)
        for network, modules in zip(subject.networks, new, strict=True):
            modules[part] = copy.deepcopy(network.get_submodule(part))
            _interpolate(modules[part].get_submodule(inside), fresh, subject.config.shrink_alpha)
    return Replacement(modules=new, slots=subject.slots)


@torch.no_grad()
def _interpolate(module: nn.Module, fresh: nn.Module, alpha: float) -> None:
    """Moves parameters of a new module towards fresh ones, in place."""
    for name, parameter in module.named_parameters():
        parameter.mul_(alpha).add_(fresh.get_parameter(name), alpha=1 - alpha)
    _settle(module)


def _settle(module: nn.Module) -> None:
    """Finds the singular vectors of spectrally normalised layers anew, in place, as many steps as at their initialisation."""
    for layer in module.modules():
        if isinstance(layer, SpectralLinear):
            layer.power_iterate(15)


@torch.no_grad()
def widen(subject: Subject, *, preserve: bool) -> Replacement:
    """A head with `config.width` more hidden units.

    Without `preserve` they are fresh in every weight and slot, with the same weights in the target. With it they are twins of units drawn
    without replacement: equal incoming weights and slots, outgoing weights that add up to what they were. The target's twins are of the
    same units, so both networks predict what they did.

    Raises:
        ValueError: the head has been injected, or has fewer units than are to get a twin.
    """
    units, generator, slots = subject.config.width, subject.generator, subject.slots
    head = head_of(subject.networks[0])
    if head.num_injections or num_snapshots(subject.networks[0]):
        raise ValueError("a head that has been injected cannot be widened: use another intervention")
    if preserve and units > head.width:
        raise ValueError(f"{units} of {head.width} hidden units cannot get a twin: add fewer")
    wider, axes = _wider(head.live, units, generator)
    (outgoing,) = (name for name, axis in axes.items() if axis == 1)
    device = wider.get_parameter(outgoing).device
    twins = torch.randperm(head.width, generator=generator)[:units].to(device)
    shares = (0.25 + torch.rand(wider.get_parameter(outgoing).shape[0], units, generator=generator) / 2).to(device)
    heads: list[dict[str, nn.Module]] = []
    for network in subject.networks:
        live, new = network.get_submodule("head.live"), copy.deepcopy(wider)
        for name, parameter in new.named_parameters():
            value: Tensor = live.get_parameter(name)
            if name in axes:
                axis = axes[name]
                added = value.index_select(axis, twins) if preserve else parameter.narrow(axis, head.width, units)
                value = torch.cat([value, added], axis)
            parameter.copy_(value)
        if preserve:
            weight = new.get_parameter(outgoing)
            weight[:, head.width :] *= shares.to(weight.dtype)
            weight[:, twins] -= weight[:, head.width :]
        _settle(new)
        heads.append({"head": InjectedHead(new)})
    wider_slots = dict(slots)
    for name, axis in axes.items():
        blank = torch.zeros_like(wider.get_parameter(name)).narrow(axis, head.width, units)
        if (full_name := f"head.live.{name}") in slots:
            wider_slots[full_name] = {
                slot: torch.cat([value, value.index_select(axis, twins) if preserve else blank], axis)
                if value.dim()
                else value
                for slot, value in slots[full_name].items()
            }
    per_unit = sum(parameter.numel() for name, parameter in head.live.named_parameters() if name in axes) // head.width
    return Replacement(modules=heads, slots=wider_slots, added_parameters=units * per_unit)


def _wider(live: nn.Module, units: int, generator: torch.Generator) -> tuple[nn.Module, dict[str, int]]:
    """A fresh head with `units` more hidden units, and the axis of the hidden units in each parameter that has one, by name."""
    linears = [(name, layer) for name, layer in live.named_modules() if isinstance(layer, nn.Linear)]
    (hidden_name, hidden), (output_name, output) = linears[-2:]
    width = hidden.out_features + units
    following = itertools.dropwhile(lambda each: each[1] is not hidden, live.named_modules())
    layers: dict[str, nn.Module] = {
        hidden_name: type(hidden)(hidden.in_features, width),
        **{name: nn.LayerNorm(width) for name, layer in following if isinstance(layer, nn.LayerNorm)},
    }
    axes = {f"{name}.{kind}": 0 for name in layers for kind in ("weight", "bias")} | {f"{output_name}.weight": 1}
    wider = copy.deepcopy(live)
    layers[output_name] = type(output)(width, output.out_features)
    for name, layer in layers.items():
        wider.set_submodule(name, layer.to(hidden.weight))
    return fresh_copy(wider, generator), axes


@torch.no_grad()
def redo(subject: Subject) -> Replacement:
    """Recycles the hidden units whose score is at most `config.redo_tau`: fresh incoming weights, zero outgoing ones, zero moments of both.

    At 0 only units that are zero on the whole probe batch are recycled, and on it no prediction changes by a bit, unless the layer
    is normalised. The target is left alone, as in the authors' code; it takes part at its next copy. An encoder that is frozen stays.

    Raises:
        ValueError: the head has been injected: its frozen heads read units that would no longer be what they were frozen on.
    """
    online, slots = subject.networks[0], subject.slots
    if head_of(online).num_injections or num_snapshots(online):
        raise ValueError(
            "redo would change what frozen heads read: use another intervention on a head that was injected"
        )
    scores = dormancy_scores(online, subject.observations)
    old = nn.ModuleDict({part: online.get_submodule(part) for part in ("encoder", "head")})
    fresh, new = fresh_copy(old, subject.generator), copy.deepcopy(old)
    dormant = {
        name: score <= subject.config.redo_tau for name, score in scores.items() if trains(old.get_submodule(name))
    }
    recycled = int(sum(mask.sum() for mask in dormant.values()))
    if not recycled:
        return Replacement(slots=slots, recycled_units=0)
    moments = {
        name: {slot: value.clone() if value.dim() else value for slot, value in values.items()}
        for name, values in slots.items()
    }
    following = dict(pairwise(_weighted(online)))
    for name, mask in dormant.items():
        for kind in ("weight", "bias"):
            new.get_parameter(f"{name}.{kind}")[mask] = fresh.get_parameter(f"{name}.{kind}")[mask]
            for value in _moments(moments, f"{name}.{kind}"):
                value[mask] = 0
    # After all incoming weights, so that what leads from one recycled unit to another is zero.
    for name, mask in dormant.items():
        outgoing = f"{following[name]}.weight"
        for value in (new.get_parameter(outgoing), *_moments(moments, outgoing)):
            _by_input(value, len(mask))[:, mask] = 0
    return Replacement(modules=[dict(new.items())], slots=moments, recycled_units=recycled)


@torch.no_grad()
def dormancy_scores(network: nn.Module, observations: Tensor) -> dict[str, Tensor]:
    """The score (units,) of every unit of each hidden layer, by the layer's name; a convolution's units are its channels.

    See `growtrain.diagnostics.dormancy`.
    """
    names, inputs = _weighted(network), dict[str, Tensor]()

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, arguments: inputs.update({name: arguments[0]})

    hooks = [network.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        network(observations)
    finally:
        for hook in hooks:
            hook.remove()
    scores = {}
    for name, following in pairwise(names):  # the activations of a layer are what the next one reads
        units = len(network.get_parameter(f"{name}.weight"))
        scores[name] = dormancy(inputs[following].reshape(len(observations), units, -1, 1))
    return scores


def _weighted(network: nn.Module) -> list[str]:
    """The names of the convolutions and linear layers of a network that has not been injected, in the order in which they are computed."""
    return [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def _by_input(weight: Tensor, units: int) -> Tensor:
    """A view (outputs, units, ...) of what leads from each unit below; a linear layer reads all pixels of a channel side by side."""
    return weight if weight.dim() == 4 else weight.view(len(weight), units, -1)


def _moments(slots: Slots, name: str) -> list[Tensor]:
    """The slots of a parameter that have its shape."""
    return [value for value in slots.get(name, {}).values() if value.dim()]
