"""Atari, played by ALE's C++ vector environment, with seeded lanes and exact snapshots.

The games as the baseline of "Deep Reinforcement Learning with Plasticity Injection" (arXiv 2305.15555) plays
them, with DQN Zoo's preprocessing: action repeat 4, maximum over the last 2 frames, 84 x 84 gray, stacks of 4
padded with zeros at an episode's start, minimal action set, no sticky actions, episodes of up to 108,000
frames. Rewards are the true ones; a lost life is reported and ends nothing.

What a lane plays is a function of its last seeding and of the actions since, whatever the other lanes play and
however many threads there are: one chain of episodes, whose no-ops and sticky actions are drawn from generators
that the seeding set and only this lane uses. Seeding and actions are therefore a lane's whole state. Lane i is
seeded with `lane_seed(seed, i, 0)`, `lane_seed(seed, i, 1)`, ...: at `start`, and then at the first end of an
episode that finds `reseed_steps` actions or more since the last time.

Not every episode is seeded because ALE loads the ROM again for each seed, and all lanes wait for that. The reset
of one of 8 lanes of Breakout took 101 ms with a seed and 6.7 ms without (medians; 2 cores, ale-py 0.12.1).
Nor is only the first, because the actions since the last seeding are what a snapshot holds and a resume plays
again.

ale-py 0.12 names a mode without automatic resets but refuses it. The mode is therefore NEXT_STEP, and every ended
lane is reset before ALE would.

Deviations:
    1. 0 to 29 no-ops at a reset; DQN Zoo: 1 to 30.
    2. Frames are gray by ALE's palette and resized by area; DQN Zoo: by its own luminance, and bilinear.
    3. ALE stops at the frame that ends an episode without capturing it, so the terminal frame mostly repeats
       the frame before; DQN Zoo shows the last one. Only the target of a truncated episode sees it.
    4. `life_lost` compares the lives before and after the 4 frames of an action; DQN Zoo: every frame.
    5. The cut at 108,000 frames does not count the no-ops.

Units: an agent step is 4 emulator frames; lengths are in agent steps; returns are in true game points.
"""

import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from ale_py.vector_env import AtariVectorEnv

from growtrain.environments.atari_scores import canonical_game
from growtrain.environments.base import Bools, EnvironmentHung, Screen, Settings, Spec, VectorStep
from growtrain.environments.lanes import LaneEnvironment, lane_seed

FRAME_SKIP: Final = 4
STACK_SIZE: Final = 4
FRAME_SHAPE: Final = (84, 84)
_SCREEN: Final = (210, 160)  # of the console

_Call = Callable[[], Any]


def make(settings: Settings, seed: int) -> "AtariEnvironment":
    """The lanes of a configuration."""
    return AtariEnvironment(
        game=settings.game,
        num_envs=settings.num_envs,
        seed=seed,
        repeat_action_probability=settings.sticky_actions,
        noop_max=settings.noop_max,
        max_episode_frames=settings.max_episode_frames,
        num_threads=min(settings.threads, settings.num_envs),
    )


def make_spec(num_actions: int) -> Spec:
    """What a network sees and may do in a game with so many actions."""
    return Spec(
        frame_shape=(1, *FRAME_SHAPE),
        stack_size=STACK_SIZE,
        num_actions=num_actions,
        frame_skip=FRAME_SKIP,
        scale=255.0,
    )


def spec_of(settings: Settings) -> Spec:
    """What a network sees and may do; loads the game for its actions."""
    environment = AtariEnvironment(game=settings.game, num_envs=1, seed=0)
    environment.close()
    return environment.spec


def screens(settings: Settings, seed: int, game: int, actions: npt.NDArray[np.int64]) -> Iterator[Screen]:
    """The T + 1 colour screens (210, 160, 3) of the first episode of lane 0, played again with its T actions."""
    assert game == 0, "there are no chains of Atari games"
    height, width = _SCREEN
    emulator = AtariVectorEnv(
        settings.game,
        1,
        num_threads=1,
        max_num_frames_per_episode=settings.max_episode_frames,
        repeat_action_probability=settings.sticky_actions,
        img_height=height,
        img_width=width,
        grayscale=False,
        stack_num=1,
        frameskip=FRAME_SKIP,
        noop_max=settings.noop_max,
        reward_clipping=False,
        use_fire_reset=False,
    )
    picture, _ = emulator.reset(seed=np.array([lane_seed(seed, 0, 0)]))
    yield Screen(picture[0, 0], 0.0, False)
    for t in range(len(actions)):
        picture, reward, terminated, truncated, _ = emulator.step(actions[t : t + 1])
        yield Screen(picture[0, 0], float(reward[0]), bool(terminated[0] or truncated[0]))


def _answer_calls(calls: "queue.SimpleQueue[_Call | None]", answers: "queue.SimpleQueue[Any]") -> None:
    while (call := calls.get()) is not None:
        try:
            answer = call()
        except Exception as error:  # handed to the caller, which raises it
            answer = error
        answers.put(answer)
        del call, answer  # an idle thread must not keep the emulator alive


class AtariEnvironment(LaneEnvironment):
    """N lanes of one Atari game, as a TorchRL environment and with a faster, native interface (`LaneEnvironment`).

    Between `send` and `recv` the emulators run in their C++ threads; either raises `EnvironmentHung` when they do not answer. Every reset
    begins a lane's next episode; one that breaks a running episode off also seeds the lane.

    Attributes:
        game: in snake_case.
        num_envs: N.
        action_meanings: names of the minimal action set, such as "NOOP".
    """

    def __init__(
        self,
        *,
        game: str,
        num_envs: int,
        seed: int,
        repeat_action_probability: float = 0.0,
        noop_max: int = 30,
        max_episode_frames: int = 108_000,
        reseed_steps: int = 25_000,
        num_threads: int | None = None,
        watchdog_seconds: float = 60.0,
    ) -> None:
        """Loads the game; nothing is played before `start` or `reset`.

        Args:
            game: any spelling that `growtrain.environments.atari_scores.canonical_game` accepts.
            num_envs: N, the number of lanes, at least 1.
            seed: of the run, 0 or more and of any size; see `lane_seed`.
            repeat_action_probability: of a sticky action, at every frame.
            noop_max: an episode starts with 0 to noop_max - 1 no-ops.
            max_episode_frames: an episode is truncated at this many frames.
            reseed_steps: a lane is seeded again at the first end of an episode after this many agent steps;
                0: at every end.
            num_threads: of the emulators; None: as many as this process has cores, at most N.
            watchdog_seconds: how long the emulators may take to answer.

        Raises:
            ValueError: an argument is out of its range, or the game is unknown.
        """
        self.game = canonical_game(game)
        if max_episode_frames < 1:
            raise ValueError(f"max_episode_frames must be at least 1, got {max_episode_frames}")
        if not 0.0 <= repeat_action_probability <= 1.0:
            raise ValueError(f"repeat_action_probability must be in [0, 1], got {repeat_action_probability}")
        if noop_max < 0 or reseed_steps < 0 or watchdog_seconds <= 0:
            raise ValueError("noop_max and reseed_steps must be at least 0 and watchdog_seconds above 0")
        super().__init__(num_envs, seed)
        # hardware_concurrency, ALE's default, knows nothing of the cores this process may use.
        threads = min(num_envs, len(os.sched_getaffinity(0))) if num_threads is None else num_threads
        self._vector: AtariVectorEnv | None = AtariVectorEnv(
            self.game,
            num_envs,
            num_threads=threads,
            max_num_frames_per_episode=max_episode_frames,
            repeat_action_probability=repeat_action_probability,
            img_height=FRAME_SHAPE[0],
            img_width=FRAME_SHAPE[1],
            stack_num=STACK_SIZE,
            frameskip=FRAME_SKIP,
            noop_max=noop_max,
            reward_clipping=False,
            use_fire_reset=False,
        )
        self.action_meanings = tuple(action.name for action in self._vector.ale.get_action_set())
        self.spec = make_spec(len(self.action_meanings))

        self._watchdog_seconds = watchdog_seconds
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # A daemon: a hung emulator must not keep the process from ending.
        threading.Thread(target=_answer_calls, args=(self._calls, self._answers), daemon=True).start()

        self._reseed_steps = reseed_steps
        # A lane's actions since its seeding, and their number. An episode that begins just before a seeding is due
        # is still played to its end.
        longest = reseed_steps + -(-max_episode_frames // FRAME_SKIP) + 1
        self._actions = np.zeros((num_envs, longest), dtype=np.uint8)
        self._history = np.zeros(num_envs, dtype=np.int64)
        self._lives = np.zeros(num_envs, dtype=np.int32)
        self._observation = np.zeros((num_envs, *self.spec.observation_shape), dtype=np.uint8)
        self._asked: Callable[[], str] | None = None  # says what the outstanding answer is about
        self._set_specs()

    # The native interface

    def start(self) -> VectorStep:
        """Seeds every lane and begins its next episode; the step's rewards are 0 and nothing has ended."""
        every = np.ones(self.num_envs, dtype=np.bool_)
        self._next_episodes(every, seeded=every)
        return self._quiet_step()

    def send(self, actions: npt.NDArray[np.integer[Any]]) -> None:
        """Hands the emulators their next actions and returns at once.

        Args:
            actions: (N,) integers in 0 .. num_actions - 1.

        Raises:
            ValueError: wrong shape or dtype, or an action out of range; nothing was sent.
            RuntimeError: recv() is due, a lane has no running episode, or the environment is closed.
        """
        self._require_running()
        # ALE's thread would drop a wrong action, and its recv() wait for that lane for ever.
        self._check_actions(actions, self.game)
        self._dispatch(actions)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Ends the threads; an emulator that hangs is left behind. Closing twice is allowed."""
        self._calls.put(None)
        self._vector = None
        super().close(raise_if_closed=raise_if_closed)

    # The exact snapshot

    def state_dict(self) -> dict[str, Any]:
        """A complete snapshot between two steps: some bytes per lane, and one per action since its seeding.

        Not `nn.Module`'s `state_dict`: an environment has no parameters.

        Returns:
            Plain integers and arrays. `seed`; (N,) each: `seeding` (how many came before the lane's last one),
            `history` (its actions since), `length` (of these, in the running episode), `observation_crc32`
            int64 and `episode_return` float64; `actions` (sum of `history`,) uint8.

        Raises:
            RuntimeError: recv() is due, a lane has no running episode, or the environment is closed.
        """
        self._require_running()
        return {
            "seed": self._seed,
            "seeding": self._seeding.copy(),
            "history": self._history.copy(),
            "length": self._length.copy(),
            "episode_return": self._return.copy(),
            "observation_crc32": self._checksums(),
            "actions": np.concatenate([self._actions[lane, : self._history[lane]] for lane in self._lanes]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> VectorStep:
        """Plays every lane again from its last seeding, side by side, and verifies where they arrive.

        Takes as long as emulating N times the longest `history`, which is at most `reseed_steps` and an episode:
        with 8 lanes of Breakout on 2 cores some 3 ms per step of it, or 70 s for 25,000. Lanes that all were
        last seeded at `start` waste little of it. Later their histories spread between 0 and `reseed_steps`, and
        about half of it is the shorter ones' waiting.

        Args:
            state: of an environment with the same game, number of lanes and settings; its seed is taken over.

        Returns:
            The step that the policy sees next: rewards are 0 and nothing has ended.

        Raises:
            ValueError: the state is malformed, and nothing has changed; or it does not lead to the
                observations, lengths and returns it was saved with, and the environment has to be started or
                loaded again.
            RuntimeError: recv() is due, or the environment is closed.
            EnvironmentHung: no answer within `watchdog_seconds`.
        """
        self._require_answered()
        seeding, history, actions = self._checked(state)
        self._set_seed(int(state["seed"]))
        # The lanes are to arrive together, so that none steps past its end: shorter ones are seeded later, and
        # press no-op in episodes of no consequence until then.
        longest = int(history.max())
        wait = longest - history
        replayed = np.zeros((self.num_envs, longest), dtype=np.uint8)
        replayed[np.arange(longest) >= wait[:, None]] = actions
        for step in range(longest + 1):
            seeded = wait == step
            self._seeding[seeded] = seeding[seeded]
            if (begin := seeded | self._idle).any():
                self._begin_episodes(begin, seeded)
            if step < longest:
                self._dispatch(replayed[:, step])
                self._collect()
        wrong = self._checksums() != state["observation_crc32"]
        wrong |= (self._return != state["episode_return"]) | (self._length != state["length"])
        if wrong.any():
            self._set_seed(self._seed)
            raise ValueError(f"lane {wrong.argmax()} did not arrive where it was saved: other settings or ale-py?")
        return self._quiet_step()

    def _checked(
        self, state: dict[str, Any]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        # Everything that could hang or overrun the emulator is refused before anything is played.
        per_lane = ("seeding", "history", "length", "episode_return", "observation_crc32")
        missing = {"seed", "actions", *per_lane} - set(state)
        if missing:
            raise ValueError(f"the environment's state lacks {', '.join(sorted(missing))}")
        for name in per_lane:
            if np.shape(state[name]) != (self.num_envs,):
                raise ValueError(f"{name} is of shape {np.shape(state[name])}; lanes: {self.num_envs}")
        seeding, history, length = (np.array(state[name], dtype=np.int64) for name in per_lane[:3])
        actions = np.asarray(state["actions"])
        if int(state["seed"]) < 0 or seeding.min() < 0:
            raise ValueError("the seed or the number of a seeding in the environment's state is below 0")
        if history.min() < 0 or history.max() >= self._actions.shape[1] or actions.shape != (history.sum(),):
            raise ValueError("the number of actions in the environment's state does not fit its histories")
        if (history - length >= max(self._reseed_steps, 1)).any():
            raise ValueError(f"by its history a lane was due a seeding, with reseed_steps = {self._reseed_steps}")
        if actions.dtype != np.uint8 or (actions >= self.spec.num_actions).any():
            raise ValueError(f"the environment's state holds an action that {self.game} does not have")
        return seeding, history, actions

    def _checksums(self) -> npt.NDArray[np.int64]:
        return np.array([zlib.crc32(stack.tobytes()) for stack in self._observation], dtype=np.int64)

    # What all of them are made of

    def _seeding_due(self) -> Bools:
        # Only an episode that ended by itself can be told from the actions, and may be carried on from.
        due: Bools = ~self._idle | (self._seeding < 0) | (self._history >= self._reseed_steps)
        return due

    def _begin(self, mask: Bools) -> None:
        self._next_episodes(mask, seeded=mask & self._seeding_due())

    def _next_episodes(self, mask: Bools, *, seeded: Bools) -> None:
        if (self._seeding[~mask] < 0).any():
            raise RuntimeError("the first reset must be of all lanes")
        self._seeding[seeded] += 1
        self._begin_episodes(mask, seeded)

    def _begin_episodes(self, mask: Bools, seeded: Bools) -> None:
        # Through the guarded thread as well: a reset runs the emulators and waits for them.
        vector = self._require_answered()
        seeds = np.full(self.num_envs, -1, dtype=np.int64)  # to ALE: no seed
        seeds[seeded] = [lane_seed(self._seed, int(i), int(self._seeding[i])) for i in self._lanes[seeded]]
        self._ask(
            partial(vector.reset, seed=seeds[mask], options={"reset_mask": mask}),
            lambda: f"a reset of lanes {self._lanes[mask].tolist()}",
        )
        self._observation, info = self._answer()
        self._history[seeded] = 0
        self._length[mask] = 0
        self._return[mask] = 0.0
        self._lives = info["lives"]
        self._idle = self._idle & ~mask

    def _dispatch(self, actions: npt.NDArray[np.integer[Any]]) -> None:
        vector = self._require_answered()
        self._actions[self._lanes, self._history] = actions
        vector.send(actions.astype(np.int64, copy=False))
        # The guarded thread begins to wait now, so that its waking up overlaps with the emulation.
        self._ask(vector.recv, self._describe_actions)

    def _collect(self) -> tuple[npt.NDArray[np.float32], Bools, Bools, Bools]:
        self._observation, reward, terminated, truncated, info = self._answer()
        life_lost = info["lives"] < self._lives
        self._lives = info["lives"]
        self._history += 1
        self._length += 1
        self._return += reward
        self._idle = terminated | truncated
        return reward.astype(np.float32), terminated, truncated, life_lost

    def _ask(self, call: _Call, about: Callable[[], str]) -> None:
        self._asked = about
        self._calls.put(call)

    def _answer(self) -> Any:
        if self._asked is None or self._vector is None:
            raise RuntimeError("nothing was sent, or the environment is closed")
        try:
            answer = self._answers.get(timeout=self._watchdog_seconds)
        except queue.Empty:
            self.close()
            late = f"{self.game}: no answer within {self._watchdog_seconds:g} s"
            raise EnvironmentHung(f"{late} to {self._asked()}") from None
        self._asked = None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _describe_actions(self) -> str:
        names = (self.action_meanings[action] for action in self._actions[self._lanes, self._history])
        return ", ".join(f"{name} in lane {lane}" for lane, name in enumerate(names))

    def _require_answered(self) -> AtariVectorEnv:
        if self._vector is None:
            raise RuntimeError("the environment is closed")
        if self._asked is not None:
            raise RuntimeError("the emulators are running: recv() comes first")
        return self._vector

    def _require_running(self) -> None:
        self._require_answered()
        if self._idle.any():
            raise RuntimeError(f"lane {self._idle.argmax()} has no running episode: reset it first")
