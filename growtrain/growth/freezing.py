"""The injection that freezes the whole network: Q(s) = F(s) + live(s), see `networks.snapshot`.

`whole_injection` is growtrain's own, of a `QNetwork`; `inject_network` is the drop-in for anybody's loop.
"""

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from growtrain.growth.alternatives import Replacement, Subject
from growtrain.growth.inject import count_parameters, inject
from growtrain.growth.location import find_head
from growtrain.networks.build import QNetwork
from growtrain.networks.heads import initialize
from growtrain.networks.injectable import check_deterministic
from growtrain.networks.injected import Initializer, InjectedHead, fresh_copy
from growtrain.networks.snapshot import InjectedNetwork
from growtrain.records import GrowthEvent
from growtrain.settings.config import LiveEncoder


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
    observations: Tensor | None = None,
    initializer: Initializer = initialize,
) -> GrowthEvent:
    """Freezes all of a network in one's own training loop, in place and all or nothing; predictions do not change.

    The network's head becomes a fresh one whose output is exactly 0, as `growtrain.inject` puts it in place with `anchor="mirrored"`; the
    encoder goes on from its weights and moments, or with `live_encoder="cold"` from fresh ones. A target that lags keeps its lag: it gets
    a snapshot of its own. Every forward pass computes F, without a graph; keep F(s) beside s in your replay and pass it as `frozen_value`,
    and an update costs what it cost before the first injection, however often the network has grown.

    Args:
        network: wraps the network that trains.
        head: path of the head in the wrapped network, as for `growtrain.inject`.
        optimizer: as for `growtrain.inject`.
        target: wraps a network of the same structure.
        generator: source of the fresh weights (CPU); None draws a seed from torch's global generator.
        live_encoder: `warm` or `cold`.
        probe: as for `growtrain.inject`.
        observations: as for `growtrain.inject`.
        initializer: draws fresh weights, in place.

    Returns:
        What happened; `anchor` is None.

    Raises:
        ValueError: as for `growtrain.inject`; or a weight is not finite, or a layer computes something else at every call (dropout,
            BatchNorm in training mode).
        NotPreserved: the outputs would have changed.
    """
    networks = [network] if target is None else [network, target]
    for each in networks:
        check_deterministic(each.live)
    frozen = [each.snapshot.grown(each.live) for each in networks]
    before = count_parameters(network, trainable=True)
    event = inject(
        network.live,
        head=head,
        optimizer=optimizer,
        target=None if target is None else target.live,
        generator=generator,
        anchor="mirrored",
        probe=probe,
        observations=observations,
        initializer=initializer,
    )
    # Nothing after this line can fail.
    heads = [find_head(each.live, head).module for each in networks]
    for each, snapshot, grown in zip(networks, frozen, heads, strict=True):
        assert isinstance(grown, InjectedHead)
        grown.frozen, each.snapshot = None, snapshot
    if live_encoder == "cold":
        _begin_anew(networks, heads, optimizer, generator, initializer)
    return dataclasses.replace(
        event,
        stage=network.num_injections,
        anchor=None,
        parameters_total=count_parameters(network),
        parameters_trainable_before=before,
        parameters_trainable=count_parameters(network, trainable=True),
    )


@torch.no_grad()
def _begin_anew(
    networks: Sequence[InjectedNetwork],
    heads: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    generator: torch.Generator | None,
    initializer: Initializer,
) -> None:
    """Fresh weights, the same in every network, and no moments, for all that is not the head."""
    inside = {id(p) for p in heads[0].parameters()}
    fresh = fresh_copy(
        networks[0].live, generator or torch.Generator().manual_seed(int(torch.randint(2**62, ()))), initializer
    )
    names = [name for name, p in networks[0].live.named_parameters() if id(p) not in inside]
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    for network in networks:
        for name in names:
            network.live.get_parameter(name).copy_(fresh.get_parameter(name))
    for name in names:
        for each in optimizers:
            each.state.pop(networks[0].live.get_parameter(name), None)
