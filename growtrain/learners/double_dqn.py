"""Double DQN (van Hasselt et al. 2016), on TorchRL's `DQNLoss` or on the same arithmetic with less around it.

    y = r + gamma (1 - terminated) Q_target(s', argmax_a Q_online(s', a)),   loss = mean over the batch of Huber_1(Q_online(s, a) - y)

The Huber loss with delta 1 has the gradient of the squared error with per-sample gradients clipped to +-1, as in DQN Zoo.

`execution="eager"` computes the loss through TorchRL's `DQNLoss(double_dqn=True)`; the default calls the networks directly, which saves
about 2 ms per update on a CPU, and computes a frozen encoder's features once for both networks. Both give the same numbers (tested).

`DQNLoss` captures parameters when it is built, and so does an optimizer: after anything that changes the architecture, `rebuild` must run.
It keeps the target's lag: the loss reads the tensors of `target`, it never copies the online network into them.

Units: a batch is (K x B) transitions, K updates of B; `update` never reads a device value.
"""

import copy

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss

from growtrain.config import Config
from growtrain.networks.encoders import NatureEncoder
from growtrain.networks.heads import SpectralLinear, initialize, make_head
from growtrain.networks.injected import InjectedHead
from growtrain.networks.q_network import QNetwork
from growtrain.optimizers import make_optimizer


def make_network(config: Config, num_actions: int, width: int) -> QNetwork:
    """The Q-network of a configuration with a head `width` wide, ready to be injected; its weights are arbitrary."""
    encoder = NatureEncoder(config.encoder_width)
    head = make_head(
        encoder.num_features, width, num_actions, normalization=config.normalization, output_bias=config.output_bias
    )
    return QNetwork(encoder, InjectedHead(head))


class DoubleDQN:
    """A Double-DQN learner.

    Args:
        config: the run's configuration (network, optimizer, loss).
        num_actions: A.
        width: hidden units of the head.
        device: where the networks live.
        generator: CPU generator of the initial weights.

    Attributes:
        online: the network that learns and acts.
        target: its lagging copy; nothing in it requires a gradient.
        optimizer: holds exactly the parameters of `online` that require a gradient.
        loss: TorchRL's loss over both.
        updates: gradient steps so far.
    """

    def __init__(
        self, config: Config, num_actions: int, *, width: int, device: torch.device, generator: torch.Generator
    ) -> None:
        self.config = config
        self.num_actions, self.width = num_actions, width
        self.device = device
        self.online = make_network(config, num_actions, width)
        initialize(self.online, generator)
        self.online.to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = make_optimizer(
            config.optimizer,
            self.online.parameters(),
            lr=config.lr,
            eps=config.optimizer_eps,
            decay=config.optimizer_decay,
        )
        self.updates = 0
        self._loss_sum = torch.zeros((), device=device)
        self._updates_at_report = 0
        self.rebuild()

    @property
    def head(self) -> InjectedHead:
        """The online network's head."""
        head = self.online.head
        assert isinstance(head, InjectedHead)
        return head

    def rebuild(self) -> None:
        """Rebuilds what has captured parameters, after a change of architecture; networks, optimizer and counters stay."""
        actor = QValueActor(self.online, in_keys=["observation"], action_space="categorical")
        self.loss = DQNLoss(
            actor,
            action_space="categorical",
            loss_function="smooth_l1",
            double_dqn=True,
            delay_value=True,
            use_prioritized_weights=False,
        )
        self.loss.make_value_estimator(gamma=self.config.discount)
        self.loss._has_update_associated["value_network"] = True  # as TorchRL's own updaters say: `copy_target` is ours
        # The loss made a copy of the online network as its target: let it read the lagging target's tensors instead.
        captured = self.loss.target_value_network_params.flatten_keys(".")
        lagging = dict(self.target.named_parameters()) | dict(self.target.named_buffers())
        for name, tensor in captured.items():
            tensor.data = lagging[name.removeprefix("module.0.module.")].data
        self._share_frozen()
        self._spectral = [m for m in self.online.modules() if isinstance(m, SpectralLinear) and m.weight.requires_grad]

    def update(self, batches: TensorDict) -> None:
        """One gradient step on each of K batches.

        Args:
            batches: (K, B) transitions with `observation`, `action` and `next` {`observation`, `reward`, `done`, `terminated`}.
        """
        for batch in batches.unbind(0):
            for layer in self._spectral:
                layer.power_iterate()
            loss = self.compute_loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.config.max_grad_norm:
                nn.utils.clip_grad_norm_(self.online.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
            self._loss_sum += loss.detach()
            self.updates += 1

    def compute_loss(self, batch: TensorDict) -> Tensor:
        """The loss () of one batch of B transitions, in the layout of `update`."""
        if self.config.execution == "eager":
            loss: Tensor = self.loss(batch)["loss"]
            return loss
        following = batch["next"]
        s_tm1, s_t = batch["observation"], following["observation"]
        with torch.no_grad():
            if self._encoder_is_shared:
                x_tm1, x_t = self.online.encoder(torch.cat([s_tm1, s_t])).chunk(2)
                q_t_value, q_t_selector = self.target.head(x_t), self.online.head(x_t)
            else:
                q_t_value, q_t_selector = self.target(s_t), self.online(s_t)
        q_tm1 = self.online.head(x_tm1) if self._encoder_is_shared else self.online(s_tm1)
        discount_t = self.config.discount * (~following["terminated"]).to(q_tm1.dtype)
        return double_dqn_loss(q_tm1, batch["action"], following["reward"], discount_t, q_t_value, q_t_selector)

    @torch.no_grad()
    def copy_target(self) -> None:
        """Copies the online network into the target."""
        torch._foreach_copy_(list(self.target.state_dict().values()), list(self.online.state_dict().values()))
        self._share_frozen()

    def _share_frozen(self) -> None:
        """Notes whether a frozen encoder is the same in both networks, so that its features can be computed once."""
        self._encoder_is_shared = not any(p.requires_grad for p in self.online.encoder.parameters()) and all(
            map(torch.equal, self.online.encoder.parameters(), self.target.encoder.parameters())
        )

    @torch.no_grad()
    def q_values(self, observation: Tensor) -> Tensor:
        """Online action values (B, A) of uint8 observations (B, stack, 84, 84)."""
        q: Tensor = self.online(observation)
        return q

    def report_loss(self) -> float | None:
        """Mean loss per update since the last call, None without any; reads the device."""
        count = self.updates - self._updates_at_report
        loss = float(self._loss_sum) / count if count else None
        self._loss_sum.zero_()
        self._updates_at_report = self.updates
        return loss


def double_dqn_loss(
    q_tm1: Tensor, a_tm1: Tensor, r_t: Tensor, discount_t: Tensor, q_t_value: Tensor, q_t_selector: Tensor
) -> Tensor:
    """Mean Huber loss (delta 1) of the Double-DQN error (van Hasselt et al. 2016, equation 4).

    Args:
        q_tm1: (B, A) online values of s, with a graph.
        a_tm1: (B,) int64 actions taken.
        r_t: (B, 1) rewards.
        discount_t: (B, 1) discounts, 0 where the return ends.
        q_t_value: (B, A) target network's values of s', without a graph.
        q_t_selector: (B, A) online values of s', without a graph.

    Raises:
        ValueError: shapes that would broadcast silently.
    """
    batch = (q_tm1.shape[0], 1)
    if r_t.shape != batch or discount_t.shape != batch or a_tm1.shape != batch[:1]:
        raise ValueError(f"need rewards and discounts {batch}, got {tuple(r_t.shape)} and {tuple(discount_t.shape)}")
    chosen = q_tm1.gather(1, a_tm1[:, None])
    target = r_t + discount_t * q_t_value.gather(1, q_t_selector.argmax(1, keepdim=True))
    return F.smooth_l1_loss(chosen, target)
