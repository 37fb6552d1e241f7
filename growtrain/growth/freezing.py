"""The injection that freezes the whole network: Q(s) = F(s) + live(s), see `networks.snapshot`."""

import copy

import torch

from growtrain.growth.alternatives import Replacement, Subject
from growtrain.growth.inject import count_parameters
from growtrain.networks.build import QNetwork
from growtrain.networks.injected import InjectedHead, fresh_copy


def whole_injection(subject: Subject) -> Replacement:
    """A snapshot of the network as it is, a silent head, and with `config.live_encoder` "cold" a fresh encoder, the same in every network.

    Slots of a warm encoder are kept. Networks that lag must be equal to the first, as they are after a target's copy: all share F.

    Raises:
        ValueError: a lagging network differs, the encoder does not learn and was to begin anew, or a weight is not finite.
    """
    online, *lagging = subject.networks
    assert isinstance(online, QNetwork)
    for network in lagging:
        theirs = network.state_dict()
        if not all(torch.equal(tensor, theirs[name]) for name, tensor in online.state_dict().items()):
            raise ValueError("the target lags: a whole network is frozen right after a copy of the target")
    assert isinstance(online.head, InjectedHead)
    new = {"head": online.head.silent(subject.generator), "snapshot": online.frozen_whole()}
    cold = subject.config.live_encoder == "cold" and count_parameters(online.encoder)
    if cold:
        new["encoder"] = fresh_copy(online.encoder, subject.generator)
    shared = {"snapshot": new["snapshot"]}
    return Replacement(
        modules=[new, *(copy.deepcopy({k: m for k, m in new.items() if k not in shared}) | shared for _ in lagging)],
        slots={name: values for name, values in subject.slots.items() if name.split(".")[0] not in new},
        added_parameters=sum(
            count_parameters(new[part], trainable=True) - count_parameters(online.get_submodule(part), trainable=True)
            for part in new
        ),
    )
