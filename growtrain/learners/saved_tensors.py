"""Tensors of a learner by name, as they are saved and put back: all of them fit, or none is copied."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from growtrain.networks.build import QNetwork
from growtrain.networks.encoders import ConvolutionalEncoder
from growtrain.networks.injected import InjectedHead
from growtrain.settings.config import Config


@torch.no_grad()
def copy_into(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copies saved tensors over those of the same name; raises `ValueError`, and copies nothing, unless all of them fit."""
    mine, theirs = ({name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (own, saved))
    wrong = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if wrong:
        found, needed = theirs.get(wrong[0], "nothing"), mine.get(wrong[0], "nothing")
        raise ValueError(f"{what}: {wrong[0]} is {found} where this configuration has {needed}")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def slots_by_name(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's slots of these parameters, by name and never by position."""
    return {
        name: {slot: value for slot, value in optimizer.state[parameter].items()}
        for name, parameter in parameters.items()
        if parameter in optimizer.state
    }


def restore_slots(
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Mapping[str, Tensor]],
    scalar: Tensor,
) -> None:
    """Puts slots back that `slots_by_name` gave.

    Args:
        trainable: what trains, by name.
        optimizer: fresh.
        saved: the slots.
        scalar: () such as a slot that is a number and no tensor of its parameter's shape has.

    Raises:
        ValueError: they are of unknown parameters, or of other shapes.
    """
    if not set(saved) <= set(trainable):
        raise ValueError(f"optimizer slots of unknown parameters: {sorted(set(saved) - set(trainable))}")
    for name, values in saved.items():
        # A slot has its parameter's shape and memory format, or is a scalar.
        slots = {slot: torch.empty_like(trainable[name] if value.dim() else scalar) for slot, value in values.items()}
        copy_into(slots, values, f"optimizer slots of {name}")
        optimizer.state[trainable[name]] = slots


def spec_of(network: nn.Module) -> dict[str, Any]:
    """What rebuilds a network that is frozen."""
    head, encoder = network.get_submodule("head"), network.get_submodule("encoder")
    assert isinstance(head, InjectedHead)
    channels = {"encoder_width": encoder.width} if isinstance(encoder, ConvolutionalEncoder) else {}
    return {"width": head.width, "head": head.spec()} | channels


def grown_to(network: QNetwork, head: dict[str, Any]) -> QNetwork:
    """A network as it was made, grown to the architecture of a saved head."""
    assert isinstance(network.head, InjectedHead)
    network.head.grow_to(head)
    return network


def built_with(config: Config, spec: Mapping[str, Any]) -> Config:
    """The configuration that makes a network of this spec at its width; one that was saved without its encoder's has the run's."""
    return dataclasses.replace(config, encoder_width=spec.get("encoder_width", config.encoder_width))
