"""What every environment is to the rest of the code: a `Spec`, and lanes that are stepped together.

Units: an agent step is `Spec.frame_skip` emulator frames; lengths are in agent steps; returns are in true game points.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from growtrain.environments.failures import RunFailed

Bools = npt.NDArray[np.bool_]
Frames = npt.NDArray[np.uint8]
Vectors = npt.NDArray[np.float32]
Actions = npt.NDArray[Any]  # (N,) integers, or (N, A) float32 of continuous ones


class EnvironmentHung(RunFailed):
    """The emulator did not answer in time; the environment is closed and cannot be used again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a network sees and may do.

    Attributes:
        frame_shape: (C, H, W) of what one agent step adds to an observation, a picture, uint8; or (D,), a vector, float32.
        stack_size: frames in an observation, side by side along the channels, newest last.
        num_actions: A; of continuous ones the dimensions of an action, each in [-1, 1].
        frame_skip: emulator frames an agent step.
        scale: that which a pixel is divided by before a network sees it.
        continuous: whether an action is A real numbers, and not one of A.
    """

    frame_shape: tuple[int, ...]
    stack_size: int
    num_actions: int
    frame_skip: int
    scale: float
    continuous: bool = False

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """(stack_size C, H, W), or (stack_size D,)."""
        return self.stack_size * self.frame_shape[0], *self.frame_shape[1:]

    @property
    def is_vector(self) -> bool:
        """Whether a frame is a vector, float32."""
        return len(self.frame_shape) == 1

    @property
    def frame_bytes(self) -> int:
        """Bytes of a frame."""
        return math.prod(self.frame_shape) * (4 if self.is_vector else 1)

    @property
    def num_outputs(self) -> int:
        """Numbers that acting chooses from: a value for each action, or mean and log standard deviation of each dimension."""
        return 2 * self.num_actions if self.continuous else self.num_actions

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`, which JSON may have been in between; raises `TypeError` or `ValueError` for anything else."""
        spec = cls(**values | {"frame_shape": tuple(map(int, values["frame_shape"]))})
        if (
            len(spec.frame_shape) not in (1, 3)
            or min(*spec.frame_shape, spec.stack_size, spec.num_actions, spec.frame_skip) < 1
        ):
            raise ValueError(f"no environment is of {spec}")
        return spec


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorStep:
    """What one step of all N lanes brought. No later step writes to the arrays, nor may the receiver.

    Attributes:
        observation: (N, *observation_shape) uint8, or float32 of vectors, newest frame last: what the policy sees next. Where an episode
            has just ended it is the first observation of the next one.
        frame: (N, *frame_shape), the newest frame of the step: the terminal one where an episode ended.
        reward: (N,) float32, the true reward, not clipped.
        terminated: (N,) bool, the game is over.
        truncated: (N,) bool, the episode was cut at its maximum length.
        life_lost: (N,) bool, the lives fell during the step, whether or not the episode went on.
        started: (N,) bool, `observation` is the first of an episode.
        episode_returns: (K,) float64, true returns of the K episodes that ended at this step, in lane order.
        episode_lengths: (K,) int64, their lengths in agent steps.
    """

    observation: Frames | Vectors
    frame: Frames | Vectors
    reward: npt.NDArray[np.float32]
    terminated: Bools
    truncated: Bools
    life_lost: Bools
    started: Bools
    episode_returns: npt.NDArray[np.float64]
    episode_lengths: npt.NDArray[np.int64]


class Screen(NamedTuple):
    """What a person sees of a step.

    Attributes:
        picture: (H, W, 3) uint8, in colour, at most 210 high and 160 wide, or to be made so.
        reward: the true reward of the step that led there, 0 at the start.
        ended: that step ended the episode.
    """

    picture: Frames
    reward: float
    ended: bool


class VectorEnvironment(Protocol):
    """N lanes of one game: `start()`, then `send(actions)` and `recv()` in turn; a lane whose episode ended begins the next."""

    num_envs: int
    spec: Spec
    action_meanings: tuple[str, ...]

    def enter(self, game: int) -> None:
        """Plays this game of a chain, counted from 0, from the next `start` on; raises `ValueError` if there is none."""

    def start(self) -> VectorStep:
        """Begins an episode on every lane."""

    def send(self, actions: Actions) -> None:
        """Hands over the next actions, (N,) or continuous ones (N, A), and returns at once."""

    def recv(self) -> VectorStep:
        """Waits for the step that `send` began."""

    def state_dict(self) -> dict[str, Any]:
        """An exact snapshot between two steps: plain numbers and arrays."""

    def load_state_dict(self, state: dict[str, Any]) -> VectorStep:
        """Goes back to a snapshot; raises `ValueError` if it does not fit."""

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Ends its threads."""


class Settings(Protocol):
    """The settings that an environment may have, each with `Config`'s name and meaning; a family reads those of its row in `games`."""

    @property
    def game(self) -> str:
        """In its own name."""

    @property
    def num_envs(self) -> int:
        """Lanes."""

    @property
    def threads(self) -> int:
        """CPU threads."""

    @property
    def sticky_actions(self) -> float:
        """Probability that an action is repeated."""

    @property
    def minimal_actions(self) -> bool:
        """Only the actions that do something in the game."""

    @property
    def noop_max(self) -> int:
        """Bound of the no-ops at an episode's start."""

    @property
    def max_episode_frames(self) -> int:
        """Cap of an episode."""
