"""MuJoCo's tasks as Gymnasium has them (Towers et al. 2024; MuJoCo: Todorov et al. 2012), version 5: continuous control of a state vector.

The lanes are a `gymnasium.vector.SyncVectorEnv` with `AutoresetMode.DISABLED`: a lane's next episode begins when it is asked to, so that
the last observation of an episode, which a truncated one is bootstrapped from, and the first of the next are never mixed up. A lane that is
seeded with s plays, bit for bit, what `gymnasium.make(name)` plays after `reset(seed=s)`.

A snapshot is the generator's state at the episode's start and the actions since, and going back to it plays them again, as for Atari: the
integration state that MuJoCo gives (`mjSTATE_INTEGRATION`) leaves out positions and contact forces that the next reward and observation of
some tasks read (Ant, Humanoid), and an episode is at most 1,000 steps, some tenths of a second. That it leads where it had led is checked.

Deviations:
    1. Actions lie in [-1, 1] and are scaled to the task's own range, as in Stable-Baselines3.
    2. Observations are float32; the task's are float64.

Units: an agent step is one frame, however often the simulator steps in it; returns are in the task's own rewards.
"""

import copy
import os
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.error import DependencyNotInstalled
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from growtrain.environments.base import Actions, Bools, Screen, Settings, Spec, Vectors, VectorStep
from growtrain.environments.games import MUJOCO, Unplayable, games_of
from growtrain.environments.lanes import LaneEnvironment, lane_seed


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
    environment.enter(game)
    environment.start()
    picture = environment.picture()

    def played() -> Iterator[Screen]:
        yield Screen(picture, 0.0, False)
        for t in range(len(actions)):
            environment.send(actions[t : t + 1])
            reward, terminated, truncated, _ = environment.collect()
            yield Screen(environment.picture(), float(reward[0]), bool(terminated[0] or truncated[0]))

    return played()


class MujocoEnvironment(LaneEnvironment):
    """N lanes of a MuJoCo task.

    Attributes:
        game: its name, such as "HalfCheetah-v5".
    """

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
        if max_episode_frames < 1:
            raise ValueError(f"max_episode_frames must be at least 1, got {max_episode_frames}")
        super().__init__(num_envs, seed)
        (self.game,) = games_of(game)
        task = copy.deepcopy(gymnasium.spec(self.game))
        assert task.max_episode_steps is not None
        task.max_episode_steps = min(task.max_episode_steps, max_episode_frames)
        options: dict[str, Any] = {"render_mode": "rgb_array", "width": 160, "height": 160} if render else {}
        try:
            import mujoco

            # What it has to say of the tasks' own files (a deprecated attribute) would go to the terminal, and into a file here.
            mujoco.set_mju_user_warning(lambda _: None)
            self._vector = SyncVectorEnv(
                [lambda: gymnasium.make(task, disable_env_checker=True, **options)] * num_envs,
                autoreset_mode=AutoresetMode.DISABLED,
            )
            mujoco.set_mju_user_warning(None)
        except (DependencyNotInstalled, ImportError) as error:
            raise Unplayable(
                f"{MUJOCO.name}/{self.game} is played by the package mujoco: pip install 'growtrain[mujoco]' ({error})"
            ) from error
        space, seen = self._vector.single_action_space, self._vector.single_observation_space
        assert isinstance(space, gymnasium.spaces.Box)
        assert seen.shape is not None
        self._scale, self._centre = (space.high - space.low) / 2, (space.high + space.low) / 2
        self.spec = Spec(
            frame_shape=seen.shape,
            stack_size=1,
            num_actions=space.shape[0],
            frame_skip=1,
            scale=1.0,
            continuous=True,
        )
        model = self._vector.envs[0].unwrapped.model  # type: ignore[attr-defined]
        self.action_meanings = tuple(model.actuator(i).name or f"action {i}" for i in range(model.nu))
        self._observation = np.zeros((num_envs, *seen.shape), dtype=np.float32)
        self._exact = np.zeros((num_envs, *seen.shape), dtype=np.float64)  # what was observed, as the task gave it
        self._origins: list[dict[str, Any]] = [{}] * num_envs  # generators at the start of the running episodes
        self._actions: list[list[Vectors]] = [[] for _ in range(num_envs)]  # since then
        self._sent: Vectors | None = None
        self._set_specs()

    def start(self) -> VectorStep:
        """Seeds every lane and begins its first episode; the step's rewards are 0 and nothing has ended."""
        self._seeding += 1
        for lane, env in enumerate(self._vector.envs):
            env.unwrapped.np_random, _ = np_random(lane_seed(self._seed, lane, int(self._seeding[lane])))
        self._sent = None
        self._next_episodes(np.ones(self.num_envs, dtype=np.bool_))
        return self._quiet_step()

    def send(self, actions: Actions) -> None:
        """Takes the next actions; the simulators are stepped by `recv`.

        Args:
            actions: (N, A) float32 in [-1, 1].

        Raises:
            ValueError: wrong shape or dtype, or an action out of range; nothing was sent.
            RuntimeError: recv() is due, or a lane has no running episode.
        """
        self._require_running()
        self._check_actions(actions, self.game)
        self._sent = np.array(actions, dtype=np.float32)

    def collect(self) -> tuple[npt.NDArray[np.float32], Bools, Bools, Bools]:
        """What `recv` takes in, without the next episodes of the lanes that ended."""
        return self._collect()

    def picture(self) -> npt.NDArray[np.uint8]:
        """Lane 0 as it is now, (H, W, 3); raises `Unplayable` where nothing can draw it."""
        try:
            return np.asarray(self._vector.envs[0].render(), dtype=np.uint8)
        except Exception as error:  # OpenGL's loaders fail in many ways
            raise Unplayable(
                "nothing here can draw MuJoCo's tasks without a screen: install EGL, or OSMesa and set MUJOCO_GL=osmesa "
                f"({type(error).__name__}: {' '.join(str(error).split())[:120]})"
            ) from error

    def _collect(self) -> tuple[npt.NDArray[np.float32], Bools, Bools, Bools]:
        if self._sent is None:
            raise RuntimeError("nothing was sent: send(actions) comes first")
        actions, self._sent = self._sent, None
        for lane, done in enumerate(self._actions):
            done.append(actions[lane])
        seen, rewards, terminated, over = self._vector.step(actions * self._scale + self._centre)[:4]
        self._see(seen)
        reward = rewards.astype(np.float32)
        self._length += 1
        self._return += rewards
        # A task can end in the very step in which its time is up: then it has ended.
        truncated = over & ~terminated
        self._idle = terminated | truncated
        return reward, terminated, truncated, np.zeros(self.num_envs, dtype=np.bool_)

    def _begin(self, mask: Bools) -> None:
        if (self._seeding[mask] < 0).any():
            if not mask.all():
                raise RuntimeError("the first reset must be of all lanes")
            self.start()
        else:
            self._next_episodes(mask)

    def _next_episodes(self, mask: Bools) -> None:
        for lane in self._lanes[mask]:
            self._origins[lane] = self._vector.envs[lane].unwrapped.np_random.bit_generator.state
            self._actions[lane] = []
        self._see(self._vector.reset(options={"reset_mask": mask})[0])
        # Arrays that were handed out are never written to.
        self._length, self._return = (np.where(mask, 0, values) for values in (self._length, self._return))
        self._idle = self._idle & ~mask

    def _see(self, seen: npt.NDArray[np.float64]) -> None:
        self._exact, self._observation = seen, seen.astype(np.float32)

    def _require_running(self) -> None:
        if self._sent is not None:
            raise RuntimeError("the simulators are running: recv() comes first")
        if self._idle.any():
            raise RuntimeError(f"lane {self._idle.argmax()} has no running episode: reset it first")

    # The exact snapshot

    def state_dict(self) -> dict[str, Any]:
        """A complete snapshot between two steps.

        Returns:
            Plain values and arrays. `seed`; (N,) each: `seeding`, `length` int64, `episode_return` float64; `origins`, generators of
            the lanes at the start of their episodes; `actions` (sum of the lengths, A) float32, lane by lane; `observation` (N, D) float64.

        Raises:
            RuntimeError: recv() is due, or a lane has no running episode.
        """
        self._require_running()
        done = [action for lane in self._actions for action in lane]
        return {
            "seed": self._seed,
            "seeding": self._seeding.copy(),
            "length": self._length.copy(),
            "episode_return": self._return.copy(),
            "origins": list(self._origins),
            "actions": np.array(done, dtype=np.float32).reshape(-1, self.spec.num_actions),
            "observation": self._exact.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> VectorStep:
        """Goes back to a snapshot by playing the episodes again.

        Args:
            state: of an environment with the same task, number of lanes and settings; its seed is taken over.

        Returns:
            The step that the policy sees next: rewards are 0 and nothing has ended.

        Raises:
            ValueError: the state does not fit, or they do not lead where they had led; the environment has to be started or loaded again.
        """
        try:
            self._restore(state)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"the environment's state is not one of {self.game}: {error}") from error
        return self._quiet_step()

    def _restore(self, state: dict[str, Any]) -> None:
        lengths = np.array(state["length"], dtype=np.int64)
        lanes, shape = (self.num_envs,), (int(lengths.sum()), self.spec.num_actions)
        shapes = {"seeding": lanes, "length": lanes, "episode_return": lanes, "actions": shape}
        for name, each in shapes.items():
            if np.shape(state[name]) != each:
                raise ValueError(f"{name} is of shape {np.shape(state[name])} and not {each}")
        if len(state["origins"]) != self.num_envs or (lengths < 0).any():
            raise ValueError(f"the environment's state has {len(state['origins'])} lanes, and lengths {lengths}")
        self._set_seed(int(state["seed"]))
        self._sent = None
        for env, origin in zip(self._vector.envs, state["origins"], strict=True):
            generator, _ = np_random(0)
            generator.bit_generator.state = origin
            env.unwrapped.np_random = generator
        self._next_episodes(np.ones(self.num_envs, dtype=np.bool_))
        returns, start = np.zeros(self.num_envs), 0
        observations = self._exact.copy()
        for lane, length in enumerate(lengths.tolist()):
            self._actions[lane] = list(np.array(state["actions"][start : start + length], dtype=np.float32))
            start += length
            for action in self._actions[lane]:
                seen, reward, *_ = self._vector.envs[lane].step(action * self._scale + self._centre)
                observations[lane], returns[lane] = seen, returns[lane] + float(reward)
        same = np.array_equal(observations, state["observation"]) and np.array_equal(returns, state["episode_return"])
        if not same:
            raise ValueError(f"the episodes of {self.game} do not lead where they had led: another version of MuJoCo?")
        self._seeding, self._length, self._return = np.array(state["seeding"], dtype=np.int64), lengths, returns
        self._see(observations)
        self._idle[:] = False
