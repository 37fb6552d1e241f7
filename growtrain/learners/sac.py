"""Soft Actor-Critic (Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications"), by the direct path alone.

    y        = r + gamma (1 - terminated) (min_i Q_target_i(s', a') - alpha log pi(a'|s')),   a' ~ pi(.|s')
    critics  sum_i mean (Q_i(s, a) - y)^2 / 2
    actor    mean (alpha log pi(a~|s) - min_i Q_i(s, a~)),   a~ = tanh(mean(s) + std(s) noise)
    alpha    mean -log alpha (log pi(a~|s) + target entropy)

TorchRL's `SACLoss` gives the same losses and gradients, but for the factor 1/2, which it leaves out (tested). Two critics, each with a
target that follows it by Polyak averaging, and an actor: three networks without an encoder, each of which can be grown. An injection adds
to the actor's mean and log standard deviation before they are clamped and squashed, and to a critic's value: the outputs are linear at
their end, as injection asks.

On a CPU all of a long run's update is one compiled function, losses, Adam and targets (see `compiled`).

A target's frozen heads go on following the critic's, which stand still: they were frozen as lagging as they were. Anchors never differ.

Deviations:
    1. All losses are taken at the same weights, and one optimizer step follows, as in TorchRL's example; the authors' code and
       Stable-Baselines3 update critics and temperature first, and the actor against the critics as they are then.

Units: a batch is (K x B) transitions, K updates of B; actions lie in [-1, 1].
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from growtrain.environments.base import Spec
from growtrain.learners.base import AbstractLearner, LearnerReport
from growtrain.learners.finite import MAX_NONFINITE, new_counters, require_finite
from growtrain.learners.gradient_step import GradientStep, fresh_optimizer
from growtrain.learners.losses import soft_target, tanh_gaussian
from growtrain.learners.saved_tensors import copy_into, grown_to, restore_slots, slots_by_name, spec_of
from growtrain.networks.build import CRITICS, NETWORKS, QNetwork, make_vector_network
from growtrain.networks.heads import initialize
from growtrain.networks.injected import InjectedHead
from growtrain.networks.snapshot import Snapshot
from growtrain.replay.ring import Batch
from growtrain.settings.config import Config

_NOISE_STREAM = 0x4E015E  # sets this noise apart from the run's own streams, which are numbered from 0


class SAC(AbstractLearner):
    """A Soft Actor-Critic learner.

    Args:
        config: the run's configuration (networks, optimizer, losses).
        spec: what is observed and can be done.
        device: where the networks live.
        generator: CPU generator of the initial weights, and of the seed of the noise that updates draw.

    Attributes:
        online: the networks that learn, by name: two critics, (B, D + A) -> (B, 1), and an actor, (B, D) -> (B, 2 A).
        targets: the critics' lagging copies; nothing in them requires a gradient.
        log_alpha: () the temperature's logarithm, which learns, too.
        target_entropy: -A.
        optimizer: holds exactly what trains.
        updates: gradient steps so far.
        initial: for `l2-init` and `nap`, the values with which each parameter that trains began to do so.
        version: counts changes after which a captured update is stale.
        noise_generator: of the noise of updates, on the device.
        sums: (2,) since the last report, on the device: of the losses, and of the critics' mean values.
        nonfinite: (3,) int64 on the device, updates that were not applied, see `finite`.
    """

    def __init__(self, config: Config, spec: Spec, *, device: torch.device, generator: torch.Generator) -> None:
        self.config, self.spec = config, spec
        self.device, self.asynchronous = device, device.type != "cpu"
        self.online = {name: self._make_network(name, config.start_width(name)) for name in NETWORKS}
        for network in self.online.values():
            initialize(network, generator)
            network.to(device)
        self.targets = {name: copy.deepcopy(self.online[name]).requires_grad_(False) for name in CRITICS}
        self.log_alpha = nn.Parameter(torch.zeros((), device=device))
        self.target_entropy = -float(spec.num_actions)
        self.optimizer = fresh_optimizer(self)
        # Weak, because a growth that is rolled back needs what belongs to the old live head, and one that is not, drops it.
        self.initial = WeakTensorKeyDictionary()
        self.noise_generator = torch.Generator(device)
        self.noise_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        self._noise = torch.zeros((2, config.batch_size, spec.num_actions), device=device)
        self.updates = self.version = self._updates_at_report = 0
        self.sums = torch.zeros(2, device=device)
        self.nonfinite = new_counters(device)
        self.rebuild()

    def _make_network(self, name: str, width: int) -> QNetwork:
        return make_vector_network(self.config, self.spec, name, width)

    def _named(self) -> dict[str, nn.Parameter]:
        """Every parameter that learns or has learned, by name."""
        return {
            f"{name}.{inside}": p for name, network in self.online.items() for inside, p in network.named_parameters()
        } | {"log_alpha": self.log_alpha}

    def trainable(self) -> list[nn.Parameter]:
        """What trains of the networks, and the temperature."""
        return [parameter for parameter in self._named().values() if parameter.requires_grad]

    @property
    def networks(self) -> dict[str, tuple[nn.Module, nn.Module | None]]:
        """The critics with their targets, and the actor."""
        return {name: (network, self.targets.get(name)) for name, network in self.online.items()}

    @property
    def plastic_parts(self) -> dict[str, tuple[nn.Module, nn.Module | None]]:
        """Those that `--grow` names."""
        return {name: pair for name, pair in self.networks.items() if self.config.grows(name)}

    def inputs(self, batch: TensorDict | Batch) -> dict[str, Tensor]:
        """Observations for the actor, and the critics' with the actions that were taken there."""
        observation = batch["observation"]
        both = torch.cat([observation, batch["action"]], dim=-1)
        return {name: both for name in CRITICS} | {"actor": observation}

    @property
    def temperature(self) -> Tensor:
        """Alpha (), without a graph."""
        return self.log_alpha.detach().exp()

    def rebuild(self) -> None:
        """Rebuilds what has captured parameters, after a change of architecture; networks, optimizer and counters stay."""
        self.version += 1
        # The temperature is no weight, and is not penalised.
        networks = nn.ModuleDict(self.online)
        self.gradient_step = GradientStep(self, networks, sums=self.sums, initial=self.initial, pairs=self._apart())

    def _apart(self) -> list[tuple[Tensor, Tensor]]:
        """The targets' parameters that follow the critics', and those: all but what is frozen and equal in both, as anchors are."""
        return [
            (lagging, leading)
            for name, target in self.targets.items()
            for lagging, leading in zip(target.parameters(), self.online[name].parameters(), strict=True)
            if leading.requires_grad or not torch.equal(lagging, leading)
        ]

    def update(self, batches: TensorDict | Sequence[Batch]) -> None:
        """One gradient step on each of K batches, and a step of the targets after each.

        Args:
            batches: (K, B) transitions with `observation`, `action` and `next` {`observation`, `reward`, `done`, `terminated`}, or K
                such batches (B,) as plain mappings.
        """
        for batch in batches.unbind(0) if isinstance(batches, TensorDict) else batches:
            self.draw()
            self.step(batch)
            self.updates += 1
        if not self.asynchronous and int(self.nonfinite[2]) >= MAX_NONFINITE:
            self.require_finite()

    def draw(self) -> None:
        """Draws the noise of the next step."""
        self._noise.normal_(generator=self.noise_generator)

    def step(self, batch: TensorDict | Batch) -> None:
        """One gradient step on one batch (B,) with the noise that was drawn, then one of the targets; fit for a CUDA graph."""
        self.gradient_step(self, batch)

    def objective(self, batch: TensorDict | Batch) -> tuple[Tensor, Tensor]:
        """The sum of all losses (), with the noise that was drawn; and the critics' loss and their mean value (2,)."""
        losses, q_mean = self.losses(batch, self._noise)
        return torch.stack(list(losses.values())).sum(), torch.stack([losses["critic"].detach(), q_mean])

    def step_tensors(self) -> list[Tensor]:
        """What `step` moves in place, the optimizer's slots aside."""
        return [*self._named().values(), *self.gradient_step.lagging, self.sums, self.nonfinite]

    def losses(self, batch: TensorDict | Batch, noise: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The losses () of critics, actor and temperature, each with a gradient for its own parameters alone; and the mean of Q(s, a).

        Args:
            batch: (B,), in the layout of `update`.
            noise: (2, B, A) standard normal, of the actions drawn at s and at s'.
        """
        following, size = batch["next"], len(batch["action"])
        observation, alpha = batch["observation"], self.temperature
        frozen = self._frozen_values(batch)
        parameters_tm1 = self.online["actor"](observation, frozen[0])
        action, log_pi = tanh_gaussian(parameters_tm1, noise[0, :size])
        with torch.no_grad():
            parameters_t = self.online["actor"](following["observation"], frozen[1])
            action_t, log_pi_t = tanh_gaussian(parameters_t, noise[1, :size])
            there = torch.cat([following["observation"], action_t], dim=-1)
            q_t = self.targets["critic_1"](there), self.targets["critic_2"](there)
            discount_t = self.config.discount * (~following["terminated"]).to(log_pi_t.dtype)
            y = soft_target(following["reward"], discount_t, q_t, log_pi_t, alpha)
        taken = torch.cat([observation, batch["action"]], dim=-1)
        values = [self.online[name](taken) for name in CRITICS]
        own = torch.cat([observation, action], dim=-1)
        q = torch.minimum(*(_held(self.online[name], own) for name in CRITICS))
        losses = {
            "critic": (F.mse_loss(values[0], y) + F.mse_loss(values[1], y)) / 2,
            "actor": (alpha * log_pi - q[:, 0]).mean(),
            "alpha": -(self.log_alpha * (log_pi.detach() + self.target_entropy)).mean(),
        }
        return losses, (values[0].detach().mean() + values[1].detach().mean()) / 2

    def _frozen_values(self, batch: TensorDict | Batch) -> tuple[Tensor | None, Tensor | None]:
        """F of the actor at s and s' (B, 2 A): those that the replay has kept, or computed; None where nothing is frozen whole."""
        if "frozen_value" in batch:
            return batch["frozen_value"], batch["next"]["frozen_value"]
        snapshot = self.online["actor"].snapshot
        if not len(snapshot):
            return None, None
        return snapshot(batch["observation"]), snapshot(batch["next"]["observation"])

    def compute_loss(self, batch: TensorDict | Batch, generator: torch.Generator | None = None) -> Tensor:
        """The sum of all losses (); the noise comes from `generator` (CPU), or is zero."""
        shape = (2, len(batch["action"]), self.spec.num_actions)
        noise = torch.zeros(shape) if generator is None else torch.randn(shape, generator=generator)
        losses, _ = self.losses(batch, noise.to(self.device))
        return torch.stack(list(losses.values())).sum()

    def end_of_step(self, frames: int) -> None:
        """Nothing: the targets move with every update."""

    @torch.no_grad()
    def act(self, observation: Tensor, frozen_value: Tensor | None = None) -> Tensor:
        """The distribution's parameters (N, 2 A) at observations (N, D): means and log standard deviations, before the tanh."""
        parameters: Tensor = self.online["actor"](observation, frozen_value)
        return parameters

    @torch.no_grad()
    def values(self, observation: Tensor, action: Tensor) -> Tensor:
        """The lesser of the critics' values (B,) of actions (B, A) at observations (B, D)."""
        both = torch.cat([observation, action], dim=-1)
        return torch.minimum(*(self.online[name](both) for name in CRITICS))[:, 0]

    @torch.no_grad()
    def bootstrap(self, observation: Tensor) -> Tensor:
        """The lesser of the targets' values (B,) of the mode of the policy at observations (B, D)."""
        action = torch.tanh(self.act(observation)[:, : self.spec.num_actions])
        both = torch.cat([observation, action], dim=-1)
        return torch.minimum(*(self.targets[name](both) for name in CRITICS))[:, 0]

    @property
    def bonus(self) -> float:
        """The temperature times the entropy that it aims at, whose size is the number of dimensions."""
        return float(self.temperature) * abs(self.target_entropy)

    def improvement(self, observation: Tensor) -> Tensor:
        """Where the critics say that the actor's means should go (B, A): the gradient of the value of the policy's mode."""
        mean = self.act(observation)[:, : self.spec.num_actions].requires_grad_()
        both = torch.cat([observation, torch.tanh(mean)], dim=-1)
        value = torch.minimum(*(self.online[name](both) for name in CRITICS)).sum()
        return torch.autograd.grad(value, mean)[0]

    @torch.no_grad()
    def frozen_value(self, observation: Tensor, before: Tensor | None = None) -> Tensor | None:
        """What was frozen whole of the actor at observations, (B, 2 A); None without any.

        Args:
            observation: (B, D).
            before: what it was of them before the newest injection, where that is known.
        """
        snapshot = self.online["actor"].snapshot
        return snapshot(observation, before=before) if len(snapshot) else None

    def require_finite(self) -> None:
        """Raises `Diverged` if a weight is not finite, or `MAX_NONFINITE` updates in a row could not be applied; reads all weights."""
        require_finite(dict(self._named()), self.nonfinite, self.config, self.updates)

    def report(self) -> LearnerReport:
        """The critics' mean loss, their mean value, and how many updates were not applied, since the last call; reads the device."""
        count = self.updates - self._updates_at_report
        loss, q_mean = (self.sums / count).tolist() if count else (None, None)
        report = LearnerReport(loss, int(self.nonfinite[0]), q_mean=q_mean)
        self.sums.zero_()
        self.nonfinite[0] = 0
        self._updates_at_report = self.updates
        return report

    def state_dict(self) -> dict[str, Any]:
        """Everything that later updates depend on: tensors by name (views), plain values, and the networks' specs, which rebuild them."""
        named = self._named()
        return {
            "networks": {name: self._network_state(name) for name in self.online},
            "optimizer": slots_by_name(named, self.optimizer),
            "initial": {name: self.initial[p] for name, p in named.items() if p.requires_grad and p in self.initial},
            "log_alpha": self.log_alpha,
            "noise": self.noise_generator.get_state(),
            "sums": self.sums,
            "nonfinite": self.nonfinite,
            "updates": self.updates,
            "updates_at_report": self._updates_at_report,
        }

    def _network_state(self, name: str) -> dict[str, Any]:
        network, target = self.online[name], self.targets.get(name)
        assert isinstance(network.head, InjectedHead)
        return {
            "online": network.state_dict(),
            "target": {} if target is None else target.state_dict(),
            "width": network.head.width * (2 if self.config.activation == "fourier" else 1),
            "head": network.head.spec(),
            "snapshot": [spec_of(frozen) for frozen in network.snapshot.networks],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, in a fresh learner of the same configuration; its networks are built anew, with the saved width.

        Raises:
            ValueError: a tensor is missing, left over, or of another shape or dtype than this configuration's.
        """
        for name in self.online:
            saved = state["networks"][name]
            self.online[name] = self._restored(name, saved)
            copy_into(self.online[name].state_dict(), saved["online"], name)
            if name in self.targets:
                self.targets[name] = self._restored(name, saved).requires_grad_(False)
                copy_into(self.targets[name].state_dict(), saved["target"], f"target of {name}")
        self.optimizer = fresh_optimizer(self)
        copy_into({"log_alpha": self.log_alpha}, {"log_alpha": state["log_alpha"]}, "temperature")
        trainable = {name: p for name, p in self._named().items() if p.requires_grad}
        restore_slots(trainable, self.optimizer, state["optimizer"], self.log_alpha)
        kept = {n: p for n, p in trainable.items() if n != "log_alpha"} if self.config.keeps_initial_weights else {}
        initial = {name: torch.empty_like(p) for name, p in kept.items()}
        copy_into(initial, state["initial"], "initial weights")
        self.initial.update({kept[name]: tensor for name, tensor in initial.items()})
        accumulators = {"sums": self.sums, "nonfinite": self.nonfinite}
        copy_into(accumulators, {name: state[name] for name in accumulators}, "accumulators")
        self.updates, self._updates_at_report = int(state["updates"]), int(state["updates_at_report"])
        self._restore_noise(state["noise"].cpu())
        self.rebuild()

    def _restore_noise(self, saved: Tensor) -> None:
        """Goes on with the saved noise, or with a stream of its own where that was drawn on a device of another kind, it does not fit."""
        if saved.shape == self.noise_generator.get_state().shape:
            self.noise_generator.set_state(saved)
            return
        stream = np.random.SeedSequence(self.config.entropy, spawn_key=(_NOISE_STREAM, self.updates))
        self.noise_generator.manual_seed(int(stream.generate_state(1, np.uint64)[0]))

    def _restored(self, name: str, saved: dict[str, Any]) -> QNetwork:
        """A network of the saved architecture; its weights are arbitrary."""
        specs = (saved, *saved["snapshot"])
        network, *frozen = (grown_to(self._make_network(name, int(spec["width"])), spec["head"]) for spec in specs)
        network.snapshot = Snapshot(frozen)
        return network.to(self.device)


def _held(network: nn.Module, inputs: Tensor) -> Tensor:
    """What a network gives, with no gradient for its weights, nor the time that it takes."""
    outputs: Tensor
    if torch.compiler.is_compiling():  # what is compiled cannot switch gradients off; otherwise this takes longer
        constants = {name: parameter.detach() for name, parameter in network.named_parameters()}
        outputs = functional_call(network, constants, (inputs,))
        return outputs
    live = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in live:
        parameter.requires_grad_(False)
    try:
        outputs = network(inputs)
    finally:
        for parameter in live:
            parameter.requires_grad_(True)
    return outputs
