"""Double DQN (van Hasselt et al. 2016), by TorchRL's `DQNLoss` or by the same arithmetic with less around it.

    y = r + gamma (1 - terminated) Q_target(s', argmax_a Q_online(s', a)),   loss = mean over the batch of Huber_1(Q_online(s, a) - y)

With `double_dqn` off it is DQN (Mnih et al. 2015): the target network chooses the action, too, and the online network never sees s'.
The Huber loss with delta 1 has the gradient of the squared error with per-sample gradients clipped to +-1, as in DQN Zoo.

`execution="eager"` computes the loss through TorchRL (`learners.torchrl`); the default calls the networks directly, which saves about 2 ms
per update on a CPU, and computes a frozen encoder's features once for both networks. Both give the same numbers (tested). All of a long
run's update is one compiled function there (see `compiled`).

What captures parameters, as an optimizer and a loss of TorchRL's do, is stale after anything that changes the architecture: `rebuild` must
run. It keeps the target's lag.

Units: a batch is (K x B) transitions, K updates of B; `update` never reads a device value.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from growtrain.environments.base import Spec
from growtrain.learners.base import AbstractLearner, LearnerReport
from growtrain.learners.finite import MAX_NONFINITE, new_counters, require_finite
from growtrain.learners.gradient_step import GradientStep, fresh_optimizer
from growtrain.learners.losses import double_dqn_loss
from growtrain.learners.saved_tensors import built_with, copy_into, grown_to, restore_slots, slots_by_name, spec_of
from growtrain.networks.build import make_network
from growtrain.networks.encoders import scale_frames
from growtrain.networks.heads import SpectralLinear, initialize
from growtrain.networks.injected import InjectedHead
from growtrain.networks.snapshot import Snapshot
from growtrain.replay.ring import Batch
from growtrain.settings.budget import crossed
from growtrain.settings.config import Config

if TYPE_CHECKING:
    from torchrl.objectives import DQNLoss

_BATCHES_AT_ONCE = 16  # that the target network sees, which bounds the memory that this takes


class DoubleDQN(AbstractLearner):
    """A Double-DQN learner.

    Args:
        config: the run's configuration (network, optimizer, loss).
        spec: what is observed and can be done.
        width: hidden units of the head.
        device: where the networks live.
        generator: CPU generator of the initial weights.

    Attributes:
        online: the network that learns and acts.
        target: its lagging copy; nothing in it requires a gradient.
        optimizer: holds exactly the parameters of `online` that require a gradient.
        updates: gradient steps so far.
        initial: for `l2-init` and `nap`, the values with which each parameter that trains began to do so.
        version: counts changes after which a captured update is stale.
        asynchronous: the device works behind Python's back, so that reading one of its values means waiting for it.
        loss_sum: () sum of the losses since the last report, on the device.
        nonfinite: (3,) int64 on the device, updates that were not applied because a loss or gradient was not finite, see `finite`.
    """

    def __init__(
        self, config: Config, spec: Spec, *, width: int, device: torch.device, generator: torch.Generator
    ) -> None:
        self.config = config
        self.spec = spec
        self.device, self.asynchronous = device, device.type != "cpu"
        self.online = make_network(config, spec, width)
        initialize(self.online, generator)
        self.online.to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = fresh_optimizer(self)
        # Weak, because a growth that is rolled back needs what belongs to the old live head, and one that is not, drops it.
        self.initial = WeakTensorKeyDictionary()
        self.updates = 0
        self.version = 0
        self.encoder_is_shared = self.bank_is_shared = False
        self.loss_sum = torch.zeros((), device=device)
        self.nonfinite = new_counters(device)
        self._updates_at_report = 0
        self.rebuild()

    @property
    def head(self) -> InjectedHead:
        """The online network's head."""
        head = self.online.head
        assert isinstance(head, InjectedHead)
        return head

    @property
    def width(self) -> int:
        """Width of the live head's hidden layer, as `Config.width` counts it."""
        return self.head.width * (2 if self.config.activation == "fourier" else 1)

    def rebuild(self) -> None:
        """Rebuilds what has captured parameters, after a change of architecture; networks, optimizer and counters stay."""
        self.version += 1
        self._loss: DQNLoss | None = None
        self._share_frozen()
        self._spectral = [m for m in self.online.modules() if isinstance(m, SpectralLinear) and m.weight.requires_grad]
        self.gradient_step = GradientStep(self, self.online, sums=self.loss_sum, initial=self.initial)

    @property
    def networks(self) -> dict[str, tuple[nn.Module, nn.Module | None]]:
        """The Q-network and its target."""
        return {"q_network": (self.online, self.target)}

    def inputs(self, batch: TensorDict | Batch) -> dict[str, Tensor]:
        """The observations of a batch."""
        return {"q_network": batch["observation"]}

    def trainable(self) -> list[nn.Parameter]:
        """What trains of the Q-network."""
        return [parameter for parameter in self.online.parameters() if parameter.requires_grad]

    @property
    def loss(self) -> "DQNLoss":
        """TorchRL's loss over both networks, constructed when it is asked for, and anew when what it has captured is stale."""
        if self._loss is None:
            from growtrain.learners.torchrl import make_dqn_loss

            self._loss = make_dqn_loss(
                self.online, self.target, discount=self.config.discount, double_dqn=self.config.double_dqn
            )
        return self._loss

    def update(self, batches: TensorDict | Sequence[Batch]) -> None:
        """One gradient step on each of K batches.

        Args:
            batches: (K, B) transitions with `observation`, `action` and `next` {`observation`, `reward`, `done`, `terminated`}, or K
                such batches (B,) as plain mappings.
        """
        for batch in self._with_target_values(batches.unbind(0) if isinstance(batches, TensorDict) else batches):
            self.step(batch)
            self.updates += 1
        # Otherwise whoever makes records asks then.
        if not self.asynchronous and int(self.nonfinite[2]) >= MAX_NONFINITE:
            self.require_finite()

    def draw(self) -> None:
        """Nothing: no update is random."""

    def _with_target_values(self, batches: Sequence[TensorDict | Batch]) -> Sequence[TensorDict | Batch]:
        """Several batches with the target's values of s', which stay the same between them: one large product costs less."""
        if len(batches) < 2 or self.asynchronous or self.encoder_is_shared or self.config.execution == "eager":
            return batches
        following = [batch["next"] for batch in batches]
        frozen = [part["frozen_value"] for part in following if "frozen_value" in part]
        values: list[Tensor] = []
        with torch.no_grad():
            for start in range(0, len(batches), _BATCHES_AT_ONCE):
                some = slice(start, start + _BATCHES_AT_ONCE)
                seen = [part["observation"] for part in following[some]]
                value = self.target(torch.cat(seen), torch.cat(frozen[some]) if frozen else None)
                values += value.split([len(each) for each in seen])
        return [
            {**dict(batch), "next": {**dict(part), "target_value": value}}
            for batch, part, value in zip(batches, following, values, strict=True)
        ]

    def step(self, batch: TensorDict | Batch) -> None:
        """One gradient step on one batch (B,); device work only, fit for a CUDA graph."""
        vectors = [vector for layer in self._spectral for vector in (layer.left, layer.right)]
        vectors_before = [vector.clone() for vector in vectors]
        for layer in self._spectral:
            layer.power_iterate()
        bad = self.gradient_step(self, batch)
        for vector, before in zip(vectors, vectors_before, strict=True):
            vector.copy_(torch.where(bad, before, vector))

    def objective(self, batch: TensorDict | Batch) -> tuple[Tensor, Tensor]:
        """The loss () of a batch, twice."""
        loss = self.compute_loss(batch)
        return loss, loss.detach()

    def step_tensors(self) -> list[Tensor]:
        """What `step` moves in place, the optimizer's slots aside."""
        return [*self.online.parameters(), *self.online.buffers(), self.loss_sum, self.nonfinite]

    def require_finite(self) -> None:
        """Raises `Diverged` if a weight is not finite, or `MAX_NONFINITE` updates in a row could not be applied; reads all weights."""
        require_finite(dict(self.online.named_parameters()), self.nonfinite, self.config, self.updates)

    def _make_snapshot(self, specs: list[dict[str, Any]]) -> Snapshot:
        """Frozen networks of these architectures; their weights are arbitrary."""
        made = ((make_network(built_with(self.config, each), self.spec, int(each["width"])), each) for each in specs)
        return Snapshot([grown_to(network, each["head"]).to(self.device) for network, each in made])

    def begin_beside(self, frozen: Mapping[str, Tensor], generator: torch.Generator) -> None:
        """Freezes a network of these weights whole before anything is learned; the live one beside it is exactly 0 at first.

        It learns on the frozen network's encoder, or with `live_encoder` "cold", or where that has another width, on its own.

        Args:
            frozen: of a network of `config.frozen_width` and `config.frozen_encoder_width`, by name.
            generator: source of the live head's weights (CPU).

        Raises:
            RuntimeError: the weights are not of such a network.
        """
        config = self.config
        widths = {"width": config.frozen_width, "encoder_width": config.frozen_encoder_width}
        snapshot = self._make_snapshot([widths | {"head": {"injections": []}}])
        snapshot.networks[0].load_state_dict(frozen)
        self.online.snapshot = snapshot
        self.online.head = self.head.silent(generator)
        if config.live_encoder == "warm" and config.frozen_encoder_width == config.encoder_width:
            self.online.encoder.load_state_dict(
                {name.removeprefix("encoder."): t for name, t in frozen.items() if name.startswith("encoder.")}
            )
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.target.snapshot = snapshot
        self.optimizer = fresh_optimizer(self)
        self.rebuild()

    def report(self) -> LearnerReport:
        """The mean loss since the last call, and how many updates were not applied; reads the device."""
        count = self.updates - self._updates_at_report
        report = LearnerReport(float(self.loss_sum) / count if count else None, int(self.nonfinite[0]))
        self.loss_sum.zero_()
        self.nonfinite[0] = 0
        self._updates_at_report = self.updates
        return report

    def compute_loss(self, batch: TensorDict | Batch, generator: torch.Generator | None = None) -> Tensor:
        """The loss () of one batch of B transitions, in the layout of `update`; nothing in it is random."""
        del generator
        if self.config.execution == "eager":
            loss: Tensor = self.loss(TensorDict(batch, batch_size=batch["action"].shape))["loss"]
            return loss
        following = batch["next"]
        s_tm1, s_t = batch["observation"], following["observation"]
        frozen_tm1, frozen_t = self._frozen_values(batch)
        if self.encoder_is_shared:
            q_tm1, q_t_value, q_t_selector = self._q_on_shared_features(s_tm1, s_t)
            if frozen_tm1 is not None and frozen_t is not None:
                q_tm1, q_t_value, q_t_selector = frozen_tm1 + q_tm1, frozen_t + q_t_value, frozen_t + q_t_selector
        else:
            q_tm1 = self.online(s_tm1, frozen_tm1)
            s_t = scale_frames(s_t, self.spec.scale)  # once for both networks
            with torch.no_grad():
                q_t_value = following["target_value"] if "target_value" in following else self.target(s_t, frozen_t)
                q_t_selector = self.online(s_t, frozen_t) if self.config.double_dqn else q_t_value
        discount_t = self.config.discount * (~following["terminated"]).to(q_tm1.dtype)
        return double_dqn_loss(q_tm1, batch["action"], following["reward"], discount_t, q_t_value, q_t_selector)

    def _frozen_values(self, batch: TensorDict | Batch) -> tuple[Tensor | None, Tensor | None]:
        """F of s and s' (B, A): those that the replay has kept, or computed where it keeps none; None where nothing is frozen whole."""
        if "frozen_value" in batch:
            return batch["frozen_value"], batch["next"]["frozen_value"]
        if not len(self.online.snapshot):
            return None, None
        return self.online.snapshot(batch["observation"]), self.online.snapshot(batch["next"]["observation"])

    def _q_on_shared_features(self, s_tm1: Tensor, s_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three values of the loss; a frozen encoder, and a frozen bank that is shared, too, see each observation once."""
        with torch.no_grad():
            features = self.online.encoder(torch.cat([s_tm1, s_t]))
            x_tm1, x_t = features.chunk(2)
            bank_tm1 = bank_t = None
            if self.bank_is_shared and self.head.frozen is not None:
                total, anchor = self.head.frozen(features)
                anchors = (None, None) if anchor is None else anchor.chunk(2)
                bank_tm1, bank_t = zip(total.chunk(2), anchors, strict=True)
            q_t_value = self.target.head(x_t, frozen_outputs=bank_t)
            q_t_selector = self.online.head(x_t, frozen_outputs=bank_t) if self.config.double_dqn else q_t_value
        return self.online.head(x_tm1, frozen_outputs=bank_tm1), q_t_value, q_t_selector

    def end_of_step(self, frames: int) -> None:
        """Copies the target where its period has gone by."""
        if self.updates and crossed(self.config, self.config.target_period, frames):
            self.copy_target()

    @torch.no_grad()
    def copy_target(self) -> None:
        """Copies the online network into the target; what is frozen is shared from then on."""
        pairs = zip(self.target.state_dict().values(), self.online.state_dict().values(), strict=True)
        apart = [(lagging, current) for lagging, current in pairs if lagging.data_ptr() != current.data_ptr()]
        torch._foreach_copy_([lagging for lagging, _ in apart], [current for _, current in apart])
        self._share_frozen()

    def _share_frozen(self) -> None:
        """Lets the target read the online network's frozen parameters where both are equal: they never move again.

        That halves their memory, and a frozen encoder that is shared need compute its features only once for both networks.
        """
        before, moved = (self.encoder_is_shared, self.bank_is_shared), False
        for current, lagging in zip(self.online.parameters(), self.target.parameters(), strict=True):
            apart = current.data_ptr() != lagging.data_ptr()
            if apart and not current.requires_grad and torch.equal(current, lagging):
                lagging.data = current.data
                moved = True  # what has captured it would go on reading the memory that this has freed
        self.encoder_is_shared = _same_tensors(self.online.encoder, self.target.encoder)
        self.bank_is_shared = self.head.frozen is not None and _same_tensors(
            self.head.frozen, self.target.get_submodule("head.frozen")
        )
        if moved or (self.encoder_is_shared, self.bank_is_shared) != before:
            self.version += 1
            self._loss = None

    @torch.no_grad()
    def act(self, observation: Tensor, frozen_value: Tensor | None = None) -> Tensor:
        """Online action values (B, A) of observations (B, C, H, W) uint8."""
        q: Tensor = self.online(observation, frozen_value)
        return q

    @torch.no_grad()
    def values(self, observation: Tensor, action: Tensor) -> Tensor:
        """Online values (B,) of actions (B,) at observations."""
        q: Tensor = self.online(observation)
        return q.gather(1, action[:, None])[:, 0]

    @torch.no_grad()
    def bootstrap(self, observation: Tensor) -> Tensor:
        """Target values (B,) of the actions that the online network, or without `double_dqn` the target, finds best."""
        chooser = self.online if self.config.double_dqn else self.target
        best = chooser(observation).argmax(1, keepdim=True)
        q: Tensor = self.target(observation)
        return q.gather(1, best)[:, 0]

    @torch.no_grad()
    def frozen_value(self, observation: Tensor, before: Tensor | None = None) -> Tensor | None:
        """F of observations, (B, A), which never changes until the next injection; None where no network was frozen whole."""
        return self.online.snapshot(observation, before=before) if len(self.online.snapshot) else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that later updates depend on: tensors by name (views), plain values, and the head's spec, which rebuilds it.

        Optimizer slots are kept by parameter name, never by position.
        """
        return {
            "online": self.online.state_dict(),
            "target": {name: t for name, t in self.target.state_dict().items() if not name.startswith("snapshot.")},
            "optimizer": slots_by_name(dict(self.online.named_parameters()), self.optimizer),
            "width": self.width,
            "initial": {
                name: self.initial[p]
                for name, p in self.online.named_parameters()
                if p.requires_grad and p in self.initial
            },
            "head": self.head.spec(),
            "snapshot": [spec_of(network) for network in self.online.snapshot.networks],
            "encoder_frozen": not any(p.requires_grad for p in self.online.encoder.parameters()),
            "loss_sum": self.loss_sum,
            "nonfinite": self.nonfinite,
            "updates": self.updates,
            "updates_at_report": self._updates_at_report,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, in a fresh learner of the same configuration; its networks are built anew, with the saved width.

        Raises:
            ValueError: a tensor is missing, left over, or of another shape or dtype than this configuration's.
        """
        made = (make_network(self.config, self.spec, int(state["width"])) for _ in range(2))
        self.online, self.target = (grown_to(network, state["head"]).to(self.device) for network in made)
        self.target.requires_grad_(False)
        self.online.snapshot = self.target.snapshot = self._make_snapshot(state.get("snapshot", []))
        self.online.encoder.requires_grad_(not state["encoder_frozen"])
        self.optimizer = fresh_optimizer(self)
        copy_into(self.online.state_dict(), state["online"], "online")
        shared = {name: tensor for name, tensor in self.online.state_dict().items() if name.startswith("snapshot.")}
        copy_into(self.target.state_dict(), state["target"] | shared, "target")
        trainable = {name: p for name, p in self.online.named_parameters() if p.requires_grad}
        restore_slots(trainable, self.optimizer, state["optimizer"], self.loss_sum)
        kept = trainable if self.config.keeps_initial_weights else {}
        initial = {name: torch.empty_like(p) for name, p in kept.items()}
        copy_into(initial, state["initial"], "initial weights")
        self.initial.update({kept[name]: tensor for name, tensor in initial.items()})
        accumulators = {"loss_sum": self.loss_sum, "nonfinite": self.nonfinite}
        copy_into(accumulators, {name: state[name] for name in accumulators}, "accumulators")
        self.updates, self._updates_at_report = int(state["updates"]), int(state["updates_at_report"])
        self.rebuild()


def _same_tensors(a: nn.Module, b: nn.Module) -> bool:
    return all(x.data_ptr() == y.data_ptr() for x, y in zip(a.parameters(), b.parameters(), strict=True))
