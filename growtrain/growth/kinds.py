"""The interventions, one row each: all that the rest of the code must know of them.

To add one, add a row here, its function in `alternatives`, and its name to `settings.schedules.Intervention`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from growtrain.growth.alternatives import (
    Replacement,
    Subject,
    forget_moments,
    redo,
    reset,
    shrink_perturb,
    widen,
)
from growtrain.growth.freezing import whole_injection
from growtrain.growth.inject import injection, nearly_equal, own_stream, same_function
from growtrain.settings.config import Config, LiveEncoder
from growtrain.settings.schedules import Intervention

Place = Literal["head", "encoder", "optimizer", "network"]
Part = Literal["encoder", "live"]
Agree = Callable[[Tensor, Tensor], bool]  # whether action values (B, A) before and after are as they must be


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An intervention.

    Attributes:
        make: what takes the place of parts of the networks; changes none of them.
        keeps: how the values of the network that learns, and of its target, must agree with those before; None: they are forgotten.
        kept_slots: beginning of the names of parameters whose optimizer slots are handed on untouched; None: of no parameter.
        born: parts that begin anew, from which a distance from initialization is measured.
        adds: what every stage adds: the frozen heads of an injection, a frozen copy of the network, or as many hidden units as the head
            had at first.
        is_evidence: a network that learns better afterwards had lost plasticity in its `place`.
        copy: its name in the learning test, if not its own.
        needs_single_head: it cannot be done to a head that has been injected.
        draws_once: its fresh weights come from a generator that one draw seeds.
        at_target_copy: it waits for a target's copy, after which the networks are equal.
        num_observations: on which it is verified, and finds what is dormant.
    """

    make: Callable[[Subject], Replacement]
    keeps: tuple[Agree | None, Agree | None] = (None, None)
    kept_slots: str | None = None
    born: tuple[Part, ...] = ()
    adds: Literal["nothing", "heads", "snapshot", "units"] = "nothing"
    is_evidence: bool = False
    copy: str | None = None
    needs_single_head: bool = False
    draws_once: bool = False
    at_target_copy: bool = False
    num_observations: int = 32

    @property
    def place(self) -> Place | None:
        """Where plasticity had been lost if a network learns better afterwards: in what begins anew, or else in the optimizer's state.

        None: it is no evidence of that.
        """
        if not self.is_evidence:
            return None
        places: dict[tuple[Part, ...], Place] = {(): "optimizer", ("live",): "head", ("encoder",): "encoder"}
        return places.get(self.born, "network")

    def stream(self, generator: torch.Generator) -> torch.Generator:
        """Where its fresh weights are drawn from, given a run's generator."""
        return own_stream(generator) if self.draws_once else generator


KINDS: dict[Intervention, Kind] = {
    "inject": Kind(
        make=injection,
        keeps=(same_function, same_function),
        kept_slots="encoder.",
        born=("live",),
        adds="heads",
        is_evidence=True,
        draws_once=True,
    ),
    "reset-head": Kind(make=partial(reset, parts=("head",)), kept_slots="encoder.", born=("live",), is_evidence=True),
    "reset-encoder": Kind(
        make=partial(reset, parts=("encoder",)), kept_slots="head.", born=("encoder",), is_evidence=True
    ),
    "fresh-optimizer": Kind(make=forget_moments, keeps=(same_function, same_function), is_evidence=True),
    "reset-all": Kind(
        make=partial(reset, parts=("encoder", "head")),
        born=("encoder", "live"),
        is_evidence=True,
        copy="fresh-network",
    ),
    "shrink-perturb": Kind(make=shrink_perturb, kept_slots=""),
    "widen": Kind(
        make=partial(widen, preserve=False),
        kept_slots="encoder.",
        born=("live",),
        adds="units",
        needs_single_head=True,
    ),
    "net2wider": Kind(
        make=partial(widen, preserve=True),
        keeps=(nearly_equal, nearly_equal),
        kept_slots="encoder.",
        born=("live",),
        adds="units",
        needs_single_head=True,
    ),
    "redo": Kind(  # the target takes part at its next copy; as many observations as in the authors' code
        make=redo, keeps=(None, same_function), needs_single_head=True, num_observations=256
    ),
}
# What `inject` is with `--freeze network`, by `--live-encoder`.
_WHOLE: dict[LiveEncoder, Kind] = {
    "warm": dataclasses.replace(KINDS["inject"], make=whole_injection, adds="snapshot", at_target_copy=True),
    "cold": dataclasses.replace(
        KINDS["inject"],
        make=whole_injection,
        kept_slots=None,
        born=("encoder", "live"),
        adds="snapshot",
        at_target_copy=True,
    ),
}


def kind_of(intervention: Intervention, config: Config) -> Kind:
    """The row of an intervention as a configuration has it done."""
    if intervention == "inject" and config.freeze == "network":
        if config.continuous:  # the actor, which has neither an encoder nor a target
            return dataclasses.replace(_WHOLE["warm"], at_target_copy=False)
        if config.split == "conv1":  # all of the network is the head
            return _WHOLE["warm"]
        return _WHOLE[config.live_encoder]
    return KINDS[intervention]
