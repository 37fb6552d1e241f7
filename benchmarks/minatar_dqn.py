"""MinAtar's own DQN as a user would write it in plain PyTorch, the other side of `minatar_speed.py`.

What its repository's `examples/dqn.py` does, written anew: one environment, one network of 16 3x3 convolutions and 128 hidden units, a list
of transitions as tensors, batches put together by `torch.cat`, centred `torch.optim.RMSprop`, an update after every frame.

Units: frames, of which each is an agent step.
"""

import random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growtrain.environments.minatar import game_object
from growtrain.settings.config import Config


class Transition(NamedTuple):
    """One of them, each with a batch dimension of 1."""

    state: Tensor
    next_state: Tensor
    action: Tensor
    reward: Tensor
    is_terminal: Tensor


class QNetwork(nn.Module):
    """(B, C, 10, 10) -> (B, A)."""

    def __init__(self, in_channels: int, num_actions: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3)
        self.hidden = nn.Linear(16 * 8 * 8, 128)
        self.output = nn.Linear(128, num_actions)

    def forward(self, x: Tensor) -> Tensor:
        """Action values."""
        x = F.relu(self.conv(x))
        q: Tensor = self.output(F.relu(self.hidden(x.flatten(1))))
        return q


class PlainDQN:
    """The example's loop, a frame at a time.

    Args:
        config: game, sticky actions, batch, replay, discount, optimizer; epsilon is its last.
        game: of the family.
    """

    def __init__(self, config: Config, game: str) -> None:
        self.config = config
        self.env = game_object(game)
        self.env.random = np.random.RandomState(0)
        self.env.reset()
        self.last_action = 0
        self.num_actions = len(self.env.action_map)
        self.policy_net, self.target_net = (QNetwork(len(self.env.channels), self.num_actions) for _ in range(2))
        self.target_net.load_state_dict(self.policy_net.state_dict())
        self.optimizer = torch.optim.RMSprop(
            self.policy_net.parameters(),
            lr=config.lr,
            alpha=config.optimizer_decay,
            eps=config.optimizer_eps,
            centered=True,
        )
        self.buffer: list[Transition] = []
        self.frames = self.updates = 0
        self.state = self._observe()

    def _observe(self) -> Tensor:
        return torch.tensor(self.env.state()).permute(2, 0, 1).unsqueeze(0).float()

    def step(self) -> None:
        """One frame, and once there are enough of them an update."""
        config = self.config
        if random.random() < config.epsilon_end or self.frames < config.learning_starts:
            action = torch.tensor([[random.randrange(self.num_actions)]])
        else:
            with torch.no_grad():
                action = self.policy_net(self.state).max(1)[1].view(1, 1)
        if self.env.random.rand() >= config.sticky_actions:
            self.last_action = int(action)
        reward, is_terminal = self.env.act(self.last_action)
        next_state = self._observe()
        transition = Transition(
            self.state, next_state, action, torch.tensor([[reward]]).float(), torch.tensor([[is_terminal]])
        )
        if len(self.buffer) < config.replay_capacity:
            self.buffer.append(transition)
        else:
            self.buffer[self.frames % config.replay_capacity] = transition
        self.frames += 1
        if self.frames >= config.learning_starts:
            self.train(random.sample(self.buffer, config.batch_size))
            if self.updates % config.target_period == 0:
                self.target_net.load_state_dict(self.policy_net.state_dict())
        if is_terminal:
            self.env.reset()
            next_state = self._observe()
        self.state = next_state

    def train(self, sample: list[Transition]) -> None:
        """One update."""
        batch = Transition(*(torch.cat(tensors) for tensors in zip(*sample, strict=True)))
        q = self.policy_net(batch.state).gather(1, batch.action)
        bootstrap = torch.zeros(len(sample), 1)
        alive = (~batch.is_terminal[:, 0]).nonzero()[:, 0]
        if len(alive):
            with torch.no_grad():
                bootstrap[alive] = self.target_net(batch.next_state[alive]).max(1)[0][:, None]
        loss = F.smooth_l1_loss(batch.reward + self.config.discount * bootstrap, q)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.updates += 1
