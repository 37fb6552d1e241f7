"""The diagnostics of a live learner: a record of `growtrain.diagnostics`, on states drawn from its replay, at a moment of its run.

Measuring never intervenes: the states, and all else that is random, are drawn by generators made from the run's seed and the frames
played; gradients are not written to `.grad`; what is trained is a copy.

Policy churn is taken against the previous record: its states and their action values are kept, and the network of today is asked again.
(The target network will not do for it: it lags by a time that depends on the record's frames, and is equal right after a copy.)

Units: frames.
"""

import functools
import time
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from growtrain import diagnostics
from growtrain.growth.alternatives import head_of
from growtrain.growth.kinds import kind_of
from growtrain.learners.base import AbstractLearner
from growtrain.networks.build import QNetwork
from growtrain.networks.injected import CONCATENATING, POINTWISE
from growtrain.records import Diagnostics
from growtrain.replay.ring import LaneRing
from growtrain.settings.config import Config
from growtrain.settings.schedules import Intervention

STATES = 128  # Sokar et al. 2023 score neurons on 64; a rank cannot exceed it
# Fitting with Adam, whatever the run's optimizer: a fresh Nature network then leaves 0.2 of Phoenix's noise, the middle of the scale. Its
# head alone, on features that differ as little as those of Atari, leaves all of it even when fresh, and so is not asked.
_FIT_UPDATES, _FIT_BATCH, _FIT_LR = 200, 32, 3e-4
_STREAM = 0x6D656173  # sets these draws apart from the run's own streams, which are numbered from 0


class Measurer:
    """Measures one learner, and remembers what later measures compare with: initial weights, and the previous record's states.

    Args:
        config: the run's configuration.
        learner: as it is at the start of the run.
        ring: its replay.
    """

    def __init__(self, config: Config, learner: AbstractLearner, ring: LaneRing) -> None:
        self.config, self.learner, self.ring = config, learner, ring
        self._initial: dict[str, dict[str, Tensor]] = {}
        self._previous: dict[str, Any] = {}
        if config.diagnostics_period:
            self._initial = {name: _copy(module) for name, module in self._parts().items()}

    def _networks(self) -> dict[str, QNetwork]:
        """The networks that learn, by their names in the learner."""
        networks = {}
        for name, (online, _) in self.learner.networks.items():
            assert isinstance(online, QNetwork)
            networks[name] = online
        return networks

    def _prefix(self, name: str) -> str:
        """What the names of a network's layers and parts begin with; nothing where there is but one network."""
        return f"{name}." if len(self.learner.networks) > 1 else ""

    def _parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {}
        for name, network in self._networks().items():
            if not isinstance(network.encoder, nn.Identity):
                parts[f"{self._prefix(name)}encoder"] = network.encoder
            parts[f"{self._prefix(name)}live"] = head_of(network).live
        return parts

    def measure(
        self,
        frames: int,
        stage: int,
        when: Literal["period", "before growth", "after growth"],
        kind: Intervention | None = None,
    ) -> Diagnostics:
        """A record of now; after a growth it is also the birth of what the growth made anew. Waits for the device.

        Args:
            frames: frames played.
            stage: of the run's schedule, for the record.
            when: what the record is for.
            kind: of the growth that it is after.
        """
        start = time.perf_counter()
        rng = np.random.default_rng(np.random.SeedSequence(self.config.entropy, spawn_key=(_STREAM, frames)))
        valid = np.flatnonzero(self.ring.valid)
        rows = rng.choice(valid, size=min(STATES, len(valid)), replace=False)
        batch = self.ring.get(torch.from_numpy(rows))
        learner, parts = self.learner, self._parts()
        if kind:
            born = {
                f"{self._prefix(name)}{part}"
                for name in learner.plastic_parts
                for part in kind_of(kind, self.config).born
            }
            self._initial |= {name: _copy(part) for name, part in parts.items() if name in born}
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        inputs, outputs = learner.inputs(batch), dict[str, Tensor]()
        layers, ranked = dict[str, Tensor](), dict[str, Tensor]()
        for name, network in self._networks().items():
            prefix = self._prefix(name)
            features, outputs[name], own = _forward(network, inputs[name])
            layers |= {f"{prefix}{layer}": output for layer, output in own.items()}
            if f"{prefix}encoder" in parts:
                ranked[f"{prefix}features"] = features.flatten(1)
            hidden = [output for layer, output in own.items() if layer.startswith("head.live.")][-1]
            ranked[f"{prefix}hidden"] = hidden.flatten(1)
        first = next(iter(outputs))
        # A gradient's norm depends on the size of the batch: this is the size of an update's.
        loss = learner.compute_loss(batch[: self.config.batch_size], generator)
        trainable = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
        trained = {name: parameters for name, parameters in trainable.items() if parameters}
        norms = dict(zip(trained, diagnostics.gradient_norm(loss, *trained.values()).tolist(), strict=True))
        churn, since = self._churn(frames)
        if not self.config.continuous:  # no action is the greedy one of several
            self._previous = {
                "frames": frames,
                "observations": batch["observation"].contiguous(),
                "q": outputs[first],
            }
        full = self.config.diagnostics == "full"
        everything = [p for parameters in trained.values() for p in parameters]
        sharpness = diagnostics.hessian_top_eigenvalue(loss, everything, generator=generator) if full else None
        fit = self._fit(self._networks()[first], inputs[first], outputs[first], generator) if full else None
        return Diagnostics(
            frames=frames,
            updates=learner.updates,
            stage=stage,
            when=when,
            states=len(rows),
            dormant_fraction={name: float(diagnostics.dormant_fraction(layer)) for name, layer in layers.items()},
            srank={name: int(diagnostics.srank(each)) for name, each in ranked.items()},
            effective_rank={name: float(diagnostics.effective_rank(each)) for name, each in ranked.items()},
            stable_rank={name: float(diagnostics.stable_rank(each)) for name, each in ranked.items()},
            weight_norm={name: float(diagnostics.weight_norm(part.parameters())) for name, part in parts.items()},
            distance_from_initialization={name: self._distance(name, part) for name, part in parts.items()},
            gradient_norm={name: norms.get(name) for name in parts},
            policy_churn=churn,
            policy_churn_frames=since,
            hessian_top_eigenvalue=None if sharpness is None else float(sharpness),
            target_fit_error=fit,
            seconds=time.perf_counter() - start,
        )

    def _churn(self, frames: int) -> tuple[float | None, int | None]:
        """Policy churn since the previous record, and the frames between; None of the first."""
        if not self._previous:
            return None, None
        q_before, q_after = self._previous["q"], self.learner.act(self._previous["observations"])
        return float(diagnostics.policy_churn(q_before, q_after)), frames - self._previous["frames"]

    def _distance(self, name: str, part: nn.Module) -> float | None:
        initial = self._initial.get(name)
        if initial is None:
            return None
        return float(diagnostics.distance_from_initialization(dict(part.named_parameters()), initial))

    def _fit(self, network: QNetwork, observations: Tensor, q: Tensor, generator: torch.Generator) -> float:
        """Target-fit error of a network on noise around each action's mean value."""
        error = diagnostics.target_fit_error(
            network,
            observations,
            q.mean(0) + torch.randn(q.shape, generator=generator).to(q),
            make_optimizer=functools.partial(torch.optim.Adam, lr=_FIT_LR),
            updates=_FIT_UPDATES,
            batch_size=_FIT_BATCH,
            generator=generator,
        )
        return float(error)

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name and plain values; nothing where diagnostics are off."""
        return {"initial": self._initial, "previous": self._previous} if self.config.diagnostics_period else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, after the learner has been restored; what was off then is not known now.

        Raises:
            ValueError: a tensor does not fit the learner's networks.
        """
        if not self.config.diagnostics_period:
            return
        device = self.learner.device
        self._initial = {name: _copy(self._parts()[name], saved) for name, saved in state.get("initial", {}).items()}
        self._previous = {
            name: value.to(device) if isinstance(value, Tensor) else int(value)
            for name, value in state.get("previous", {}).items()
        }


def _forward(network: QNetwork, observations: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Features (B, ...), outputs (B, A), and the output of every activation of the network by its module's name.

    Those of a fused bank are given head by head, under the names that they have in a bank that is not fused.
    """
    bank = head_of(network).frozen
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs.setdefault(name, []).append(output)

    handles = [
        module.register_forward_hook(functools.partial(keep, name))
        for name, module in network.named_modules()
        if isinstance(module, (*POINTWISE, *CONCATENATING)) and not name.startswith("snapshot.")
    ]
    try:
        with torch.no_grad():
            features = network.encoder(observations)
            q = network.head(features)
            if len(network.snapshot):
                q = network.snapshot(observations) + q
    finally:
        for handle in handles:
            handle.remove()
    if bank is not None and bank.fused:
        parts = outputs.pop("head.frozen.activation")  # all heads at once, or one after the other
        if isinstance(bank.activation, POINTWISE):
            parts = list(torch.split(parts[0], bank.widths, dim=1))
        outputs |= {f"head.frozen.heads.{index}.1": [part] for index, part in enumerate(parts)}
    return features, q, {name: kept[-1] for name, kept in outputs.items()}


def _copy(module: nn.Module, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A copy of a module's parameters by name, or of `values` in their place and memory format, on which sums depend in the last bits."""
    own = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    if values is not None:
        if {name: (t.shape, t.dtype) for name, t in own.items()} != {n: (t.shape, t.dtype) for n, t in values.items()}:
            raise ValueError(f"initial weights are those of another architecture: {', '.join(values)}")
        for name, tensor in own.items():
            tensor.copy_(values[name])
    return own
