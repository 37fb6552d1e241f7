"""A network that grows by freezing all of itself: Q(s) = F(s) + live(s).

A plasticity injection (Nikishin et al. 2023) freezes heads, on an encoder that goes on learning. Here the whole network is frozen, encoder
and head, as a snapshot F, and a fresh head whose output is exactly 0 is put on the live encoder: predictions and the number of trainable
parameters stay what they were. At the next injection F becomes F + live.

F is a fixed function of the observation. So it passes no gradient to the live encoder, which the paper's frozen heads do (this is another
algorithm than the paper's), and whoever stores observations can store F beside them and never compute it again: an update then costs what
the small network's costs, however often it has grown. growtrain's own trainer does (`replay.frames`, column `frozen_value`).

Prior art: SEER (Chen et al. 2021) caches the latents of a frozen encoder; boosted fitted Q-iteration (Tosatto et al. 2017) adds value
functions that are fitted one after another.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from growtrain.networks.attachments import Attachments, copy_without_hooks
from growtrain.networks.injected import InjectedHead, any_weights, trains
from growtrain.networks.location import find_head

ROWS_AT_ONCE = 256  # observations of a forward pass where a replay is swept, which decides how much memory that takes


class Snapshot(nn.Module):
    """F: networks that were frozen one after another, whose outputs are added in that order; nothing in it ever trains or moves."""

    def __init__(self, networks: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.requires_grad_(False).eval()

    def __len__(self) -> int:
        """How many networks have been frozen."""
        return len(self.networks)

    def grown(self, network: nn.Module) -> "Snapshot":
        """F + network, with a copy of the network as it is; `self` stays as it was, and what is frozen already is shared with it.

        Hooks that others registered on the network's modules stay on these alone: what is frozen has none.

        Raises:
            ValueError: a weight is not finite, which F would be for ever, or a hook computes it.
        """
        buffers = [(name, ~buffer.isnan()) for name, buffer in network.named_buffers()]  # a mask may be infinite
        for name, good in [*((name, p.isfinite()) for name, p in network.named_parameters()), *buffers]:
            if not bool(good.all()):
                raise ValueError(f"{name} is not finite: a network frozen with it would stay so")
        return Snapshot([*self.networks, copy_without_hooks(network)])

    @torch.no_grad()
    def forward(self, *observation: Any, before: Tensor | None = None) -> Tensor:
        """F of a batch, (B, A), without a graph; the sum is taken as it was when each network was still live, so to the bit.

        Args:
            observation: as the networks take it.
            before: F of it (B, A) before the newest network was frozen, where the caller has kept it and there was one: only the newest is
                then computed.
        """
        total = before if len(self.networks) > 1 else None
        for network in self.networks if total is None else self.networks[-1:]:
            value: Tensor = network(*observation)
            total = value if total is None else total + value
        assert total is not None, "nothing is frozen"
        return total

    def train(self, mode: bool = True) -> Self:
        """What is frozen stays in evaluation mode."""
        del mode
        return super().train(False)


def num_snapshots(network: nn.Module) -> int:
    """How often a network was frozen whole."""
    snapshot = getattr(network, "snapshot", None)
    return len(snapshot) if isinstance(snapshot, Snapshot) else 0


class InjectedNetwork(nn.Module):
    """Any network, to be frozen as a whole in one's own training loop by `growtrain.inject_network`.

    Before the first injection it computes `live` and nothing else; afterwards F(s) + live(s). F is computed in every forward pass, without
    a graph: a target or a replay that keeps F(s) beside s saves that (see the module's text; `frozen_value` takes it from there).

    To restore one, keep `spec()` beside its state dict: `InjectedNetwork(live).grow_to(spec)`, with `live` built as it was before the first
    injection, takes the state dict. An optimizer that is made afterwards of the parameters that require a gradient, in the order of
    `parameters()`, takes the state dict of the one that went on through the injections.

    Args:
        live: the network that trains, from observations to (B, A).

    Attributes:
        heads: where the head was at each injection, as `growtrain.inject_network` was told.
    """

    def __init__(self, live: nn.Module) -> None:
        super().__init__()
        self.live = live
        self.snapshot = Snapshot()
        self.heads: list[str | list[str]] = []

    def forward(self, *observation: Any, frozen_value: Tensor | None = None) -> Tensor:
        """Values (B, A).

        Args:
            observation: as `live` takes it.
            frozen_value: F of it (B, A), where the caller has kept it.
        """
        live: Tensor = self.live(*observation)
        if not len(self.snapshot):
            return live
        return (self.snapshot(*observation) if frozen_value is None else frozen_value) + live

    @property
    def num_injections(self) -> int:
        """How often the network has been frozen."""
        return len(self.snapshot)

    def spec(self) -> dict[str, Any]:
        """What `grow_to` needs to rebuild this architecture; JSON-serialisable."""
        injected = [*self.snapshot.networks, self.live][1:]
        modules = [find_head(network, where).module for where, network in zip(self.heads, injected, strict=True)]
        specs = [module.spec() for module in modules if isinstance(module, InjectedHead)]
        return {"injections": [{"where": where, "head": spec} for where, spec in zip(self.heads, specs, strict=True)]}

    def grow_to(self, spec: dict[str, Any]) -> Self:
        """Grows a fresh `InjectedNetwork` to the architecture of `spec`, ready for `load_state_dict`; the weights are arbitrary.

        Raises:
            ValueError: the spec is malformed, asks for fewer injections than this network has, or is of another network.
        """
        injections, done = spec.get("injections") if isinstance(spec, dict) else None, self.spec()["injections"]
        if (
            not isinstance(injections, list)
            or injections[: len(done)] != done
            or not all(isinstance(each, dict) and each.keys() == {"where", "head"} for each in injections)
        ):
            raise ValueError(f"spec {spec!r} does not continue a network with injections {done}")
        for each in injections[len(done) :]:
            head = find_head(self.live, each["where"])
            attached = Attachments(head.module, head.live, head.names)
            with attached.aside():
                old = head.module if isinstance(head.module, InjectedHead) else InjectedHead(head.module, checked=True)
                new = old.silent(torch.Generator().manual_seed(0), any_weights).grow_to(each["head"])
            self.snapshot = self.snapshot.grown(self.live)
            attached.hand_over(new)
            if not trains(self.live):  # a target's
                new.requires_grad_(False)
            head.put(new)
            self.heads = [*self.heads, each["where"]]
        return self
