"""Acting over a vector of environments, for training and for whoever only plays: epsilon-greedy on the values of discrete actions (Mnih et
al. 2015, algorithm 1); continuous ones drawn from the policy's distribution in training, and its mode otherwise (Haarnoja et al. 2018).

With probability epsilon an action is uniformly random, of either kind. Every action is chosen by `decide`. `play` yields step after step of
an environment: evaluation, video and the probe take what they need. In training, `Collector.act` hands the actions to the emulators'
threads; whoever calls it may compute until `receive` takes the step in and stores it. Nothing here touches the learner: it is given a
function from observations to what is chosen from.

Units: frames and agent steps are counted over all environments; rewards are stored clipped, returns are true scores.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from growtrain.environments.base import Actions, VectorEnvironment, Vectors, VectorStep
from growtrain.learners.losses import LOG_STD_MAX, LOG_STD_MIN
from growtrain.replay.ring import LaneRing
from growtrain.settings.budget import epsilon_at
from growtrain.settings.config import Config

# (N, *observation_shape) -> (N, num_outputs): action values, or a distribution's parameters.
Policy = Callable[[Tensor], Tensor]


class Decision(NamedTuple):
    """What was done at a step of N lanes, and why.

    Attributes:
        actions: (N,) int64, or (N, A) float32.
        q: (N, num_outputs) float32, action values or a distribution's parameters; None where they were not asked for: all is random.
    """

    actions: Actions
    q: npt.NDArray[np.float32] | None


class Played(NamedTuple):
    """A step: what the policy saw, what it did, and what that led to."""

    before: VectorStep
    decision: Decision
    after: VectorStep


def epsilon_greedy(q: npt.NDArray[np.float32], epsilon: float, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Actions (N,): the greedy one of q (N, A), or with probability `epsilon` one of all A, uniformly."""
    num_lanes, num_actions = q.shape
    explore = generator.random(num_lanes) < epsilon
    actions: npt.NDArray[np.int64] = np.where(explore, generator.integers(num_actions, size=num_lanes), q.argmax(1))
    return actions


def from_distribution(
    parameters: npt.NDArray[np.float32], epsilon: float, generator: np.random.Generator, *, sampled: bool
) -> Vectors:
    """Continuous actions (N, A) of a Gaussian squashed by a tanh, or with probability `epsilon` uniform ones.

    Args:
        parameters: (N, 2 A), means and log standard deviations, as the learner's losses read them.
        epsilon: probability of a uniform action.
        generator: of the draws.
        sampled: drawn from the distribution, not the tanh of its mean.
    """
    mean, log_std = np.split(parameters, 2, axis=1)
    if sampled:
        std = np.exp(np.clip(log_std, LOG_STD_MIN, LOG_STD_MAX))
        mean = (mean + std * generator.standard_normal(mean.shape, dtype=np.float32)).astype(np.float32)
    actions: Vectors = np.tanh(mean).astype(np.float32)
    if epsilon > 0:
        explore = generator.random((len(actions), 1)) < epsilon
        actions = np.where(explore, uniform(generator, actions.shape), actions)
    return actions


def uniform(generator: np.random.Generator, shape: tuple[int, ...]) -> Vectors:
    """Continuous actions drawn uniformly."""
    return (2 * generator.random(shape, dtype=np.float32) - 1).astype(np.float32)


def decide(
    policy: Policy,
    observe: Callable[[], Tensor],
    environment: VectorEnvironment,
    epsilon: float,
    generator: np.random.Generator,
    *,
    sampled: bool = False,
) -> Decision:
    """Chooses an action on every lane; neither observation nor policy is asked for when epsilon is 1.

    Args:
        policy: what is chosen from, of a batch of observations.
        observe: gives the observations of the lanes, where the policy takes them.
        environment: for its number of lanes and actions.
        epsilon: probability of a random action.
        generator: of exploration.
        sampled: continuous actions are drawn from the policy's distribution.
    """
    spec, num_lanes = environment.spec, environment.num_envs
    if epsilon >= 1 and spec.continuous:
        return Decision(uniform(generator, (num_lanes, spec.num_actions)), None)
    if epsilon >= 1:
        return Decision(generator.integers(spec.num_actions, size=num_lanes), None)
    q = policy(observe()).cpu().numpy()
    if spec.continuous:
        return Decision(from_distribution(q, epsilon, generator, sampled=sampled), q)
    return Decision(epsilon_greedy(q, epsilon, generator), q)


def play(
    environment: VectorEnvironment,
    policy: Policy,
    epsilon: float,
    generator: np.random.Generator,
    device: torch.device | str = "cpu",
) -> Iterator[Played]:
    """Starts an environment and plays on for ever, a step at a time; to be closed by whoever made it."""
    step = environment.start()

    def observe() -> Tensor:
        return torch.from_numpy(step.observation).to(device)

    while True:
        before, decision = step, decide(policy, observe, environment, epsilon, generator)
        environment.send(decision.actions)
        step = environment.recv()
        yield Played(before, decision, step)


class Collector:
    """Plays `environment` into a ring.

    Args:
        environment: the lanes; started here.
        ring: takes what is played; the policy's observations are read from it, too: each frame is copied once.
        config: for clipping, life loss and epsilon.
        generator: of exploration.

    Attributes:
        agent_steps: actions taken over all lanes.
        episode_returns: true scores of the episodes that ended since the last `report`, less those that another run began.
        recent_returns: the last 100 of them, reported or not.
        num_episodes: how many there have been.
    """

    def __init__(
        self,
        environment: VectorEnvironment,
        ring: LaneRing,
        config: Config,
        generator: np.random.Generator,
    ) -> None:
        self.environment, self._ring, self.config = environment, ring, config
        self.generator = generator
        self.agent_steps = 0
        self.episode_returns: list[float] = []
        self.recent_returns: deque[float] = deque(maxlen=100)
        self.num_episodes = 0
        self._inherited = np.zeros(config.num_envs, np.bool_)  # lanes whose episode another run began
        self._greedy_sum, self._greedy_count = 0.0, 0
        self._actions: Actions | None = None
        self._game, self._switches = 0, config.switch_frames
        self._ring.start(environment.start().frame)

    @property
    def frames(self) -> int:
        """Emulator frames played over all lanes."""
        return self.config.frame_skip * self.agent_steps

    def act(self, policy: Policy) -> None:
        """Chooses every lane's action and lets the environments step; the policy is not asked when epsilon is 1.

        Where a chain of games switches, its next game begins here.
        """
        if (game := sum(self.frames >= switch for switch in self._switches)) != self._game:
            self._enter(game)
        epsilon = epsilon_at(self.config, self.frames)
        self._actions, q = decide(policy, self._ring.newest, self.environment, epsilon, self.generator, sampled=True)
        if q is not None and not self.config.continuous:
            self._greedy_sum += float(q.max(1).mean())
            self._greedy_count += 1
        self.environment.send(self._actions)

    def _enter(self, game: int) -> None:
        """Goes on to a chain's next game."""
        self._game = game
        if not self.config.keep_replay:
            self._ring.forget()
        self.begin_episodes()

    def begin_episodes(self) -> None:
        """Seeds every lane and begins an episode there; those that are open are broken off, and count for nothing."""
        self.environment.enter(self._game)
        self._ring.start(self.environment.start().frame)
        self.recent_returns.clear()
        self._inherited[:] = False

    def receive(self) -> Tensor:
        """Waits for the environments and stores their step; returns the rows (N,) int64 that its transitions leave."""
        step = self.environment.recv()
        clip = self.config.reward_clip
        lost = step.terminated | step.life_lost if self.config.life_loss_terminal else step.terminated
        assert self._actions is not None
        left = self._ring.extend(
            action=self._actions,
            reward=np.clip(step.reward, -clip, clip) if clip else step.reward,
            terminated=lost,
            frame=step.frame,
            started=step.started,
            first_frame=step.observation[:, -step.frame.shape[1] :],
        )
        self.agent_steps += self.config.num_envs
        ended = step.episode_returns[~self._inherited[step.started]].tolist()
        self.episode_returns.extend(ended)
        self.recent_returns.extend(ended)
        self.num_episodes += len(ended)
        self._inherited &= ~step.started
        return left

    def disown_episodes(self) -> None:
        """Leaves out what another run has played: scores reported or not, and the episodes that are open now."""
        self.episode_returns = []
        self.recent_returns.clear()
        self._inherited[:] = True

    def report(self) -> tuple[list[float], float | None]:
        """The scores of the episodes that ended and the mean greedy value acted on (None without any), since the last call."""
        returns = self.episode_returns
        q_mean = self._greedy_sum / self._greedy_count if self._greedy_count else None
        self.episode_returns, self._greedy_sum, self._greedy_count = [], 0.0, 0
        return returns, q_mean

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps and reports depend on, between two steps; without the replay."""
        return {
            "environment": self.environment.state_dict(),
            "exploration": dict(self.generator.bit_generator.state),
            "game": self._game,
            "agent_steps": self.agent_steps,
            "episode_returns": list(self.episode_returns),
            "recent_returns": list(self.recent_returns),
            "num_episodes": self.num_episodes,
            "inherited": self._inherited.tolist(),
            "greedy_sum": self._greedy_sum,
            "greedy_count": self._greedy_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, the environments by playing their episodes again.

        Raises:
            ValueError: the environments do not arrive where they were saved, or the state is malformed.
        """
        environment = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in state["environment"].items()}
        self.environment.load_state_dict(environment)
        self.generator.bit_generator.state = state["exploration"]
        self._game = int(state["game"])
        self.agent_steps = int(state["agent_steps"])
        self.episode_returns = [float(score) for score in state["episode_returns"]]
        self.recent_returns.extend(float(score) for score in state.get("recent_returns", ()))
        self.num_episodes = int(state.get("num_episodes", 0))
        self._inherited[:] = state["inherited"]
        self._greedy_sum, self._greedy_count = float(state["greedy_sum"]), int(state["greedy_count"])
