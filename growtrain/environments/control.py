"""What tasks of continuous control share: lanes of simulators that are stepped in turn, and their exact snapshots.

A lane's next episode begins when it is asked to, so that the last observation of an episode, which a truncated one is bootstrapped from,
and the first of the next are never mixed up.

A snapshot is the generator's state at the episode's start and the actions since, and going back to it plays them again, as for Atari: the
integration state that MuJoCo gives (`mjSTATE_INTEGRATION`) leaves out positions and contact forces that the next reward and observation of
some tasks read (Ant, Humanoid), and an episode is some 1,000 steps, some tenths of a second. That it leads where it had led is checked.

Deviations:
    1. Actions lie in [-1, 1] and are scaled to the task's own range, as in Stable-Baselines3.
    2. Observations are float32; the simulators' are float64.

Units: an agent step is one frame, however often the simulator steps in it; returns are in the task's own rewards.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from growtrain.environments.base import Actions, Bools, Frames, Screen, Spec, Vectors, VectorStep
from growtrain.environments.games import Unplayable
from growtrain.environments.lanes import LaneEnvironment, lane_seed

PICTURE_SIDE = 160  # pixels

Numbers = npt.NDArray[np.float32] | npt.NDArray[np.float64]


class ControlEnvironment(LaneEnvironment):
    """N lanes of a task of continuous control, each a simulator of its own.

    Attributes:
        game: its name, without the family's.
    """

    def __init__(self, *, game: str, num_envs: int, seed: int, max_episode_frames: int) -> None:
        """The family's own simulators come after it, and then `_describe`.

        Args:
            game: its name, without the family's.
            num_envs: N, the number of lanes, at least 1.
            seed: of the run, 0 or more and of any size; see `lane_seed`.
            max_episode_frames: an episode is truncated at this many frames, or earlier where the task has it so.

        Raises:
            ValueError: an argument is out of its range.
        """
        if max_episode_frames < 1:
            raise ValueError(f"max_episode_frames must be at least 1, got {max_episode_frames}")
        super().__init__(num_envs, seed)
        self.game = game
        self._max_episode_frames = max_episode_frames

    def _describe(self, *, size: int, low: Numbers, high: Numbers, action_meanings: Sequence[str]) -> None:
        """Takes in what the task is: D numbers observed, actions between two arrays (A,), and their names."""
        self._scale, self._centre = (high - low) / 2, (high + low) / 2
        self.spec = Spec(
            frame_shape=(size,), stack_size=1, num_actions=len(low), frame_skip=1, scale=1.0, continuous=True
        )
        self.action_meanings = tuple(action_meanings)
        self._observation = np.zeros((self.num_envs, size), dtype=np.float32)
        self._exact = np.zeros((self.num_envs, size), dtype=np.float64)  # what was observed, as the task gave it
        self._origins: list[dict[str, Any]] = [{}] * self.num_envs  # generators at the start of the running episodes
        self._actions: list[list[Vectors]] = [[] for _ in range(self.num_envs)]  # since then
        self._sent: Vectors | None = None
        self._set_specs()

    # To be given

    @abstractmethod
    def _seed_lane(self, lane: int, seed: int) -> None:
        """Makes the lane's next episode the first of this seed."""

    @abstractmethod
    def _generator(self, lane: int) -> dict[str, Any]:
        """The state of the lane's generator, in plain values."""

    @abstractmethod
    def _set_generator(self, lane: int, state: dict[str, Any]) -> None:
        """Goes back to such a state."""

    @abstractmethod
    def _reset_lane(self, lane: int) -> npt.NDArray[np.float64]:
        """Begins the lane's next episode; returns its first observation (D,)."""

    @abstractmethod
    def _step_lane(self, lane: int, action: Numbers) -> tuple[npt.NDArray[np.float64], float, bool, bool]:
        """Does an action (A,) of the task's own range; returns observation (D,), reward, terminated, and whether its time is up."""

    @abstractmethod
    def _draw(self) -> Frames:
        """Lane 0 as it is now, (H, W, 3); raises whatever it likes where nothing can draw it."""

    # The native interface

    def start(self) -> VectorStep:
        """Seeds every lane and begins its first episode; the step's rewards are 0 and nothing has ended."""
        self._seeding += 1
        for lane in range(self.num_envs):
            self._seed_lane(lane, lane_seed(self._seed, lane, int(self._seeding[lane])))
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

    def screens(self, game: int, actions: Actions) -> Iterator[Screen]:
        """The T + 1 screens of lane 0's first episode, played again with its T actions; raises `Unplayable` without a renderer."""
        self.enter(game)
        self.start()
        picture = self.picture()

        def played() -> Iterator[Screen]:
            with closing(self):  # or the renderer outlives what it draws with
                yield Screen(picture, 0.0, False)
                for t in range(len(actions)):
                    self.send(actions[t : t + 1])
                    reward, terminated, truncated, _ = self._collect()
                    yield Screen(self.picture(), float(reward[0]), bool(terminated[0] or truncated[0]))

        return played()

    def picture(self) -> Frames:
        """Lane 0 as it is now, (H, W, 3); raises `Unplayable` where nothing can draw it."""
        try:
            return np.asarray(self._draw(), dtype=np.uint8)
        except Exception as error:  # OpenGL's loaders fail in many ways
            raise no_renderer(error) from error

    def _collect(self) -> tuple[npt.NDArray[np.float32], Bools, Bools, Bools]:
        if self._sent is None:
            raise RuntimeError("nothing was sent: send(actions) comes first")
        actions, self._sent = self._sent, None
        seen, rewards = np.empty_like(self._exact), np.zeros(self.num_envs)
        terminated, over = np.zeros(self.num_envs, dtype=np.bool_), np.zeros(self.num_envs, dtype=np.bool_)
        for lane, action in enumerate(actions):
            self._actions[lane].append(action)
            seen[lane], rewards[lane], terminated[lane], over[lane] = self._step_lane(lane, self._scaled(action))
        self._see(seen)
        self._length += 1
        self._return += rewards
        # A task can end in the very step in which its time is up: then it has ended.
        truncated = (over | (self._length >= self._max_episode_frames)) & ~terminated
        self._idle = terminated | truncated
        return rewards.astype(np.float32), terminated, truncated, np.zeros(self.num_envs, dtype=np.bool_)

    def _begin(self, mask: Bools) -> None:
        if (self._seeding[mask] < 0).any():
            if not mask.all():
                raise RuntimeError("the first reset must be of all lanes")
            self.start()
        else:
            self._next_episodes(mask)

    def _next_episodes(self, mask: Bools) -> None:
        seen = self._exact.copy()
        for lane in self._lanes[mask].tolist():
            self._origins[lane], self._actions[lane] = self._generator(lane), []
            seen[lane] = self._reset_lane(lane)
        self._see(seen)
        # Arrays that were handed out are never written to.
        self._length, self._return = (np.where(mask, 0, values) for values in (self._length, self._return))
        self._idle = self._idle & ~mask

    def _scaled(self, action: Vectors) -> Numbers:
        scaled: Numbers = action * self._scale + self._centre
        return scaled

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
        lengths, seeding = np.array(state["length"], dtype=np.int64), np.array(state["seeding"], dtype=np.int64)
        lanes, shape = (self.num_envs,), (int(lengths.sum()), self.spec.num_actions)
        shapes = {"seeding": lanes, "length": lanes, "episode_return": lanes, "actions": shape}
        for name, each in shapes.items():
            if np.shape(state[name]) != each:
                raise ValueError(f"{name} is of shape {np.shape(state[name])} and not {each}")
        if len(state["origins"]) != self.num_envs or (lengths < 0).any() or (seeding < 0).any():
            raise ValueError(
                f"the environment's state has {len(state['origins'])} lanes, lengths {lengths}, seedings {seeding}"
            )
        self._set_seed(int(state["seed"]))
        self._sent = None
        for lane, origin in enumerate(state["origins"]):
            self._seed_lane(lane, lane_seed(self._seed, lane, int(seeding[lane])))
            self._set_generator(lane, origin)
        self._next_episodes(np.ones(self.num_envs, dtype=np.bool_))
        returns, start = np.zeros(self.num_envs), 0
        observations = self._exact.copy()
        for lane, length in enumerate(lengths.tolist()):
            self._actions[lane] = list(np.array(state["actions"][start : start + length], dtype=np.float32))
            start += length
            for action in self._actions[lane]:
                observations[lane], reward, *_ = self._step_lane(lane, self._scaled(action))
                returns[lane] += reward
        same = np.array_equal(observations, state["observation"]) and np.array_equal(returns, state["episode_return"])
        if not same:
            raise ValueError(f"the episodes of {self.game} do not lead where they had led: another version of MuJoCo?")
        self._seeding, self._length, self._return = seeding, lengths, returns
        self._see(observations)
        self._idle[:] = False


def no_renderer(error: Exception) -> Unplayable:
    """What there is to say where nothing can draw."""
    return Unplayable(
        "nothing here can draw MuJoCo's tasks without a screen: install EGL, or OSMesa and set MUJOCO_GL=osmesa "
        f"({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """What MuJoCo has to say of the tasks' own files (a deprecated attribute) would go to the terminal, and into a file here."""
    import mujoco

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda _: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)
