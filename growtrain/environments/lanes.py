"""What all environments share: lanes as a TorchRL environment, over the native interface of `base.VectorEnvironment`.

Native: `start()` once, then `send(actions)` and `recv()` in turn; `recv` begins the next episode of the lanes that ended. TorchRL: `reset`,
`step`, `rollout` with the keys "observation" and "life_lost"; a step returns the terminal observation, and TorchRL asks for the reset.

Units: an agent step is `Spec.frame_skip` emulator frames; lengths are in agent steps; returns are in true game points.
"""

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from growtrain.environments.base import Actions, Bools, Spec, VectorStep


def lane_seed(seed: int, lane: int, seeding: int) -> int:
    """The seed of a lane's seeding number `seeding`, in 0 .. 2**31 - 1, the range that ALE takes.

    Hashed from all three numbers: lanes of runs with neighbouring seeds have unrelated episodes, and a lane
    plays the same ones whatever the number of lanes.
    """
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=(lane, seeding))
    return int(sequence.generate_state(1)[0] >> 1)


class LaneEnvironment(EnvBase):  # type: ignore[misc]  # torchrl is not typed
    """N lanes of a game.

    Attributes:
        num_envs: N.
        spec: what is observed and can be done.
        action_meanings: names of the actions, such as "NOOP".
    """

    num_envs: int
    spec: Spec
    action_meanings: tuple[str, ...]

    def __init__(self, num_envs: int, seed: int) -> None:
        """Raises `ValueError` for fewer lanes than one, or a negative seed."""
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        super().__init__(device=torch.device("cpu"), batch_size=torch.Size([num_envs]))
        self.num_envs = num_envs
        self._lanes = np.arange(num_envs)
        # Of the running episodes:
        self._idle: Bools = np.ones(num_envs, dtype=np.bool_)  # lanes without one
        self._length = np.zeros(num_envs, dtype=np.int64)
        self._return = np.zeros(num_envs, dtype=np.float64)
        self._observation: npt.NDArray[Any] = np.zeros(0, dtype=np.uint8)
        self._set_seed(seed)

    # To be given

    @abstractmethod
    def send(self, actions: Actions) -> None:
        """Hands over the next actions and returns at once."""

    @abstractmethod
    def _collect(self) -> tuple[npt.NDArray[np.float32], Bools, Bools, Bools]:
        """Takes the step in: (N,) rewards, terminated, truncated, lives lost; ended lanes are idle."""

    @abstractmethod
    def _begin(self, mask: Bools) -> None:
        """Begins the next episode on the lanes of the mask (N,)."""

    # The native interface

    def enter(self, game: int) -> None:
        """Plays this game of a chain, counted from 0, from the next `start` on.

        Raises:
            ValueError: there is no such game.
        """
        if game:
            raise ValueError(f"game {game} of a chain was asked for, and this is a single game")

    def recv(self) -> VectorStep:
        """Waits for the step that `send` began, and begins the next episode of the lanes that it ended.

        Raises:
            RuntimeError: nothing was sent.
        """
        reward, terminated, truncated, life_lost = self._collect()
        ended, frame = self._idle, self._observation[:, -self.spec.frame_shape[0] :]
        returns, lengths = self._return[ended], self._length[ended]
        if ended.any():
            self._begin(ended)
        return VectorStep(
            observation=self._observation,
            frame=frame,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            life_lost=life_lost,
            started=ended,
            episode_returns=returns,
            episode_lengths=lengths,
        )

    def _quiet_step(self) -> VectorStep:
        """What is seen now, as a step in which nothing has happened."""
        nothing = np.zeros(self.num_envs, dtype=np.bool_)
        return VectorStep(
            observation=self._observation,
            frame=self._observation[:, -self.spec.frame_shape[0] :],
            reward=np.zeros(self.num_envs, dtype=np.float32),
            terminated=nothing,
            truncated=nothing,
            life_lost=nothing,
            started=self._length == 0,
            episode_returns=np.zeros(0, dtype=np.float64),
            episode_lengths=np.zeros(0, dtype=np.int64),
        )

    def _check_actions(self, actions: Actions, game: str) -> None:
        """Raises `ValueError` for actions of a wrong shape, type or range."""
        num_actions = self.spec.num_actions
        if self.spec.continuous:
            if actions.shape != (self.num_envs, num_actions) or actions.dtype != np.float32:
                raise ValueError(
                    f"need ({self.num_envs}, {num_actions}) float32 actions, got {actions.shape} {actions.dtype}"
                )
            if not (np.abs(actions) <= 1).all():  # nor is NaN
                lane = int((~(np.abs(actions) <= 1)).any(1).argmax())
                raise ValueError(f"lane {lane}: an action of {game} lies in [-1, 1], not {actions[lane].tolist()}")
            return
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(f"need ({self.num_envs},) integer actions, got {actions.shape} {actions.dtype}")
        if actions.min() < 0 or actions.max() >= num_actions:
            lane = int(((actions < 0) | (actions >= num_actions)).argmax())
            raise ValueError(f"lane {lane}: {game} has no action {actions[lane]}, but {num_actions}")

    # TorchRL's contract

    def _set_specs(self) -> None:
        lanes = self.batch_size
        flag = Categorical(2, shape=(*lanes, 1), dtype=torch.bool)
        shape = (*lanes, *self.spec.observation_shape)
        if self.spec.is_vector:
            seen = Unbounded(shape=shape, dtype=torch.float32)
        else:
            seen = Bounded(0, round(self.spec.scale), shape=shape, dtype=torch.uint8)
        self.observation_spec = Composite(observation=seen, life_lost=flag, shape=lanes)
        if self.spec.continuous:
            self.action_spec = Bounded(-1.0, 1.0, shape=(*lanes, self.spec.num_actions), dtype=torch.float32)
        else:
            self.action_spec = Categorical(self.spec.num_actions, shape=lanes, dtype=torch.int64)
        self.reward_spec = Unbounded(shape=(*lanes, 1), dtype=torch.float32)
        self.done_spec = Composite(done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=lanes)

    def _set_seed(self, seed: int | None) -> None:
        if seed is None or seed < 0:
            raise ValueError(f"an environment's seed must be an integer of 0 or more, got {seed}")
        self._seed = seed
        # The next reset is of all lanes and their seeding number 0.
        self._seeding = np.full(self.num_envs, -1, dtype=np.int64)
        self._idle = np.ones(self.num_envs, dtype=np.bool_)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        asked = None if tensordict is None else tensordict.get("_reset", None)
        every = np.ones(self.num_envs, dtype=np.bool_)
        self._begin(every if asked is None else asked.reshape(self.num_envs).numpy())
        # TorchRL keeps the old entries of the lanes that are not reset.
        nothing = np.zeros(self.num_envs, dtype=np.bool_)
        return self._tensordict(terminated=nothing, truncated=nothing, life_lost=nothing)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.send(tensordict["action"].numpy())
        reward, terminated, truncated, life_lost = self._collect()
        return self._tensordict(
            reward=reward, done=self._idle, terminated=terminated, truncated=truncated, life_lost=life_lost
        )

    def _tensordict(self, **per_lane: npt.NDArray[Any]) -> TensorDictBase:
        entries = {name: torch.from_numpy(values)[:, None] for name, values in per_lane.items()}
        observation = torch.from_numpy(self._observation)
        return TensorDict({"observation": observation, **entries}, batch_size=self.batch_size)
