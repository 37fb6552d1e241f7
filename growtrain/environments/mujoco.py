"""MuJoCo's tasks as Gymnasium has them (Towers et al. 2024; MuJoCo: Todorov et al. 2012), version 5: continuous control of a state vector.

A lane that is seeded with s plays, bit for bit, what `gymnasium.make(name)` plays after `reset(seed=s)`. Lanes, snapshots, deviations and
units are those of `control`.
"""

import os
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.error import DependencyNotInstalled
from gymnasium.utils.seeding import np_random

from growtrain.environments.base import Actions, Frames, Screen, Settings, Spec
from growtrain.environments.control import PICTURE_SIDE, ControlEnvironment, Numbers, quiet
from growtrain.environments.games import MUJOCO, Unplayable, games_of


def make(settings: Settings, seed: int) -> "MujocoEnvironment":
    """The lanes of a configuration."""
    return MujocoEnvironment(
        game=settings.game, num_envs=settings.num_envs, seed=seed, max_episode_frames=settings.max_episode_frames
    )


def spec_of(settings: Settings) -> Spec:
    """What a network sees and may do."""
    return MujocoEnvironment(game=settings.game, num_envs=1, seed=0).spec


def screens(settings: Settings, seed: int, game: int, actions: Actions) -> Iterator[Screen]:
    """The T + 1 screens of the first episode of lane 0, played again with its T actions; raises `Unplayable` without a renderer."""
    if not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")  # or a window system is tried, and what it loads stays in EGL's way
    environment = MujocoEnvironment(
        game=settings.game, num_envs=1, seed=seed, max_episode_frames=settings.max_episode_frames, render=True
    )
    return environment.screens(game, actions)


class MujocoEnvironment(ControlEnvironment):
    """N lanes of a MuJoCo task, such as "HalfCheetah-v5"."""

    def __init__(
        self, *, game: str, num_envs: int, seed: int, max_episode_frames: int = 1_000, render: bool = False
    ) -> None:
        """Makes the simulators; nothing is played before `start` or `reset`.

        Args:
            game: "mujoco/" and a task, in any spelling.
            num_envs: N, the number of lanes, at least 1.
            seed: of the run, 0 or more and of any size; see `lane_seed`.
            max_episode_frames: an episode is truncated at this many frames, or earlier where the task has it so.
            render: lanes can be drawn.

        Raises:
            ValueError: an argument is out of its range, or the task is unknown.
            Unplayable: the package is not installed.
        """
        (task,) = games_of(game)
        super().__init__(game=task, num_envs=num_envs, seed=seed, max_episode_frames=max_episode_frames)
        options: dict[str, Any] = {}
        if render:
            options = {"render_mode": "rgb_array", "width": PICTURE_SIDE, "height": PICTURE_SIDE}
        try:
            with quiet():
                self._envs: list[gymnasium.Env[Any, Any]] = [
                    gymnasium.make(task, disable_env_checker=True, **options) for _ in range(num_envs)
                ]
        except (DependencyNotInstalled, ImportError) as error:
            raise Unplayable(
                f"{MUJOCO.name}/{self.game} is played by the package mujoco: pip install 'growtrain[mujoco]' ({error})"
            ) from error
        space, seen = self._envs[0].action_space, self._envs[0].observation_space
        assert isinstance(space, gymnasium.spaces.Box)
        assert seen.shape is not None
        model = self._envs[0].unwrapped.model  # type: ignore[attr-defined]
        meanings = [model.actuator(i).name or f"action {i}" for i in range(model.nu)]
        self._describe(size=seen.shape[0], low=space.low, high=space.high, action_meanings=meanings)

    def _seed_lane(self, lane: int, seed: int) -> None:
        self._envs[lane].unwrapped.np_random, _ = np_random(seed)

    def _generator(self, lane: int) -> dict[str, Any]:
        return dict(self._envs[lane].unwrapped.np_random.bit_generator.state)

    def _set_generator(self, lane: int, state: dict[str, Any]) -> None:
        self._envs[lane].unwrapped.np_random.bit_generator.state = state

    def _reset_lane(self, lane: int) -> npt.NDArray[np.float64]:
        seen: npt.NDArray[np.float64] = self._envs[lane].reset()[0]
        return seen

    def _step_lane(self, lane: int, action: Numbers) -> tuple[npt.NDArray[np.float64], float, bool, bool]:
        seen, reward, terminated, truncated, _ = self._envs[lane].step(action)
        return seen, float(reward), terminated, truncated

    def _draw(self) -> Frames:
        return np.asarray(self._envs[0].render(), dtype=np.uint8)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Ends the simulators, and the renderer while there is still what it draws with."""
        for env in self._envs:
            env.close()
        super().close(raise_if_closed=raise_if_closed)
