"""The DeepMind Control Suite (Tassa et al. 2018; dm_control: Tunyasuvunakool et al. 2020), played by the package `dm_control`.

A lane that is seeded with s plays, bit for bit, what `suite.load(domain, task, task_kwargs={"random": s})` plays after `reset()`. What is
observed are the numbers of the suite's observation, in its order. Episodes are of 1,000 steps; whether one has ended or only its time is
up is what the suite's own discount says, 0 or 1. Lanes, snapshots and units are those of `control`.

Deviations, beside those of `control`:
    1. An actuator without a range (LQR's) is given -1 to 1.
    2. LQR has no time limit: its episodes, too, are cut after `max_episode_frames`.
"""

import os
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from growtrain.environments.base import Actions, Frames, Screen, Settings, Spec
from growtrain.environments.control import PICTURE_SIDE, ControlEnvironment, Numbers, no_renderer, quiet
from growtrain.environments.games import DMC, Unplayable, games_of


def make(settings: Settings, seed: int) -> "SuiteEnvironment":
    """The lanes of a configuration."""
    return SuiteEnvironment(
        game=settings.game, num_envs=settings.num_envs, seed=seed, max_episode_frames=settings.max_episode_frames
    )


def spec_of(settings: Settings) -> Spec:
    """What a network sees and may do."""
    return SuiteEnvironment(game=settings.game, num_envs=1, seed=0).spec


def screens(settings: Settings, seed: int, game: int, actions: Actions) -> Iterator[Screen]:
    """The T + 1 screens of the first episode of lane 0, played again with its T actions; raises `Unplayable` without a renderer."""
    return make(settings, seed).screens(game, actions)


class SuiteEnvironment(ControlEnvironment):
    """N lanes of a task of the suite, such as "quadruped-run"."""

    def __init__(self, *, game: str, num_envs: int, seed: int, max_episode_frames: int = 1_000) -> None:
        """Looks at the task; the lanes' simulators are made by `start` or `reset`, each from its seed (LQR's springs are drawn from it).

        Args:
            game: "dmc/", a domain and a task, in any spelling.
            num_envs: N, the number of lanes, at least 1.
            seed: of the run, 0 or more and of any size; see `lane_seed`.
            max_episode_frames: an episode is truncated at this many frames, or earlier where the task has it so.

        Raises:
            ValueError: an argument is out of its range, or the task is unknown.
            Unplayable: the package is not installed, or the task (quadruped-escape) cannot be played where nothing can draw.
        """
        (task,) = games_of(game)
        super().__init__(game=task, num_envs=num_envs, seed=seed, max_episode_frames=max_episode_frames)
        try:
            from mujoco import mjMAXVAL

            env = self._load(0)
        except Exception as error:  # a missing package, or one that does not go with the installed MuJoCo
            raise Unplayable(
                f"{DMC.name}/{self.game} is played by the package dm_control: pip install 'growtrain[dmc]' ({error})"
            ) from error
        try:
            seen = _flat(env.reset().observation)
        except Exception as error:
            raise no_renderer(error) from error
        bounds, model = env.action_spec(), env.physics.model
        limited = bounds.maximum < mjMAXVAL
        self._describe(
            size=len(seen),
            low=np.where(limited, bounds.minimum, -1.0),
            high=np.where(limited, bounds.maximum, 1.0),
            action_meanings=[model.id2name(i, "actuator") or f"action {i}" for i in range(model.nu)],
        )
        self._envs: list[Any] = [env] * num_envs

    def _load(self, seed: int) -> Any:
        domain, _, task = self.game.partition("-")
        suite = _suite()
        with quiet():
            return suite.load(domain, task, task_kwargs={"random": seed})

    def _seed_lane(self, lane: int, seed: int) -> None:
        self._envs[lane] = self._load(seed)

    def _generator(self, lane: int) -> dict[str, Any]:
        state = self._envs[lane].task.random.get_state(legacy=False)
        return {
            "words": state["state"]["key"].tolist(),
            "position": int(state["state"]["pos"]),
            "has_gauss": int(state["has_gauss"]),
            "gauss": float(state["gauss"]),
        }

    def _set_generator(self, lane: int, state: dict[str, Any]) -> None:
        words = {"key": np.array(state["words"], dtype=np.uint32), "pos": int(state["position"])}
        self._envs[lane].task.random.set_state(
            {
                "bit_generator": "MT19937",
                "state": words,
                "has_gauss": int(state["has_gauss"]),
                "gauss": float(state["gauss"]),
            }
        )

    def _reset_lane(self, lane: int) -> npt.NDArray[np.float64]:
        return _flat(self._envs[lane].reset().observation)

    def _step_lane(self, lane: int, action: Numbers) -> tuple[npt.NDArray[np.float64], float, bool, bool]:
        step = self._envs[lane].step(action)
        return _flat(step.observation), float(step.reward), bool(step.last() and step.discount == 0), bool(step.last())

    def _draw(self) -> Frames:
        # The first camera is what the suite shows a task by.
        return np.asarray(self._envs[0].physics.render(PICTURE_SIDE, PICTURE_SIDE, camera_id=0), dtype=np.uint8)


def _flat(observation: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """(D,), the numbers of an observation in its own order."""
    return np.concatenate([np.ravel(each) for each in observation.values()])


@cache
def _suite() -> Any:
    """`dm_control.suite`, drawn by `MUJOCO_GL`'s renderer, a window system's or EGL's; where that cannot be loaded, by none.

    The package chooses its renderer when it is imported, and one that cannot be loaded would keep it from being played at all.
    """
    asked = os.environ.get("MUJOCO_GL")
    screen = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    try:
        os.environ["MUJOCO_GL"] = asked or ("glfw" if screen else "egl")
        try:
            from dm_control import suite
        except Exception:  # OpenGL's loaders fail in many ways
            os.environ["MUJOCO_GL"] = "disable"
            from dm_control import suite
    finally:
        if asked is None:
            del os.environ["MUJOCO_GL"]
        else:
            os.environ["MUJOCO_GL"] = asked
    return suite
