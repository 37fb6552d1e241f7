"""A learner's saved state, read without building the learner: what it is, and whether its sizes are those of its configuration."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from growtrain.environments.base import Spec
from growtrain.learners.saved_tensors import built_with
from growtrain.networks.build import make_parts, make_vector_part
from growtrain.settings.config import Config


@dataclass(frozen=True, kw_only=True)
class SavedLearner:
    """What a saved learner is.

    Attributes:
        updates: gradient steps.
        injections: the anchor of each that froze heads, in order; of several networks, of the one that has most.
        snapshots: networks that were frozen whole, of the one that has most.
        width: hidden units of the live head.
        num_parameters: of the online networks, buffers included.
        num_slots: parameters of which the optimizer has slots.
        encoder_frozen: whether no encoder learns.
    """

    updates: int
    injections: tuple[str, ...]
    snapshots: int
    width: int
    num_parameters: int
    num_slots: int
    encoder_frozen: bool


def read_saved(state: dict[str, Any], config: Config | None = None) -> SavedLearner:
    """What a learner is whose `state_dict` was saved.

    Args:
        state: what it gave.
        config: whose interventions act on some of its networks, which alone are described; None: all are.

    Raises:
        KeyError, TypeError: it is not one.
    """
    networks = {name: each for name, each in _networks(state).items() if config is None or config.grows(name)}
    grown = max(networks.values(), key=lambda each: len(each["head"]["injections"]))
    return SavedLearner(
        updates=state["updates"],
        injections=tuple(grown["head"]["injections"]),
        snapshots=max(len(each["snapshot"]) for each in networks.values()),
        width=grown["width"],
        num_parameters=sum(tensor.numel() for each in networks.values() for tensor in each["online"].values()),
        num_slots=len(state["optimizer"]),
        encoder_frozen=all(each.get("encoder_frozen", True) for each in networks.values()),
    )


def injections_of(state: dict[str, Any]) -> list[str]:
    """What the network that had most injections had each time: "network", frozen whole, as is a file's that it began with, or an anchor."""
    each = _networks(state).values()
    return max((["network"] * len(one["snapshot"]) + list(one["head"]["injections"]) for one in each), key=len)


def _networks(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The saved networks by name; of a Q-network, whose state is the learner's own, without one."""
    networks: dict[str, dict[str, Any]] = state.get("networks", {"": state})
    return networks


def check_saved(state: dict[str, Any], config: Config, spec: Spec, entries: int) -> None:
    """Raises `ValueError` where a size that decides how much is allocated is not that of a tensor.

    Args:
        state: what the learner's `state_dict` gave.
        config: of its run.
        spec: what is observed and can be done.
        entries: of the schedule that were carried out.
    """
    for name, network in _networks(state).items():
        _check_network(name, network, config, spec, entries)


def _check_network(name: str, state: dict[str, Any], config: Config, spec: Spec, entries: int) -> None:
    networks = {"": state} | {f"snapshot.networks.{index}.": each for index, each in enumerate(state["snapshot"])}
    injections = len(networks) - 1 + sum(len(each["head"]["injections"]) for each in networks.values())
    given = begins_frozen(state, config)
    if injections > entries + given:
        raise ValueError(f"{injections - given} injections in {entries} interventions")
    first = config.start_width(name)
    for index, (prefix, each) in enumerate(networks.items()):
        width, own = each["width"], built_with(config, each)
        if not (given and index == 1):
            if own.encoder_width != config.encoder_width:
                raise ValueError(
                    f"encoder width is {own.encoder_width} where this configuration has {config.encoder_width}"
                )
            if not (isinstance(width, int) and first <= width <= first + entries * config.width):
                raise ValueError(f"width is {width} where this configuration has {first}, or has been widened from it")
        with torch.device("meta"):  # the shapes of a network, without its memory
            parts = _parts(name, own, spec, width)
        for part, module in parts.items():
            for tensor_name, tensor in module.state_dict().items():
                saved = state["online"][f"{prefix}{part}.{tensor_name}"]
                said, found = tuple(tensor.shape), tuple(saved.shape)
                if said != found:
                    raise ValueError(
                        f"{prefix}{part}.{tensor_name}: {said} by the configuration, {found} by the tensors"
                    )


def begins_frozen(state: dict[str, Any], config: Config) -> bool:
    """Whether the first of the frozen networks is that which the run began with, whose widths are never those of its own."""
    snapshots, widths = state.get("snapshot"), (config.frozen_width, config.frozen_encoder_width)
    if not (snapshots and config.frozen_width):
        return False
    return (snapshots[0]["width"], snapshots[0].get("encoder_width")) == widths


def _parts(name: str, config: Config, spec: Spec, width: int) -> dict[str, nn.Module]:
    """The parts of a network of that name, whose shapes are to be those that were saved."""
    if not name:
        return dict(zip(("encoder", "head.live"), make_parts(config, spec, width), strict=True))
    return {"head.live": make_vector_part(config, spec, name, width)}
