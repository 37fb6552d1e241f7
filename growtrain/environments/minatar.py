"""MinAtar (Young & Tian 2019, "MinAtar: An Atari-Inspired Testbed"): five games of 10 x 10 cells, played by the package `minatar`.

The package's own game objects are stepped, all lanes in one thread; nothing of it is copied here. What surrounds them is
`minatar.environment.Environment`'s rule: with probability `sticky_actions` a lane repeats its last action, across episodes too, and game
and stickiness draw from one generator. A lane that is seeded with s therefore plays, bit for bit, what that class plays after `seed(s)` and
`reset()`. The package is loaded game by game, without the plotting libraries that its front door imports.

A snapshot needs no replay, unlike ALE's: a game is some integers, flags, short lists of them and 10 x 10 arrays, which are saved as plain
values, and its generator is Mersenne Twister's 624 words and their position.

A chain of games (`minatar/space_invaders+asterix`) has the channels of all its games, those of one name in one place ("enemy_bullet" is
Space Invaders' and Seaquest's), and the union of their actions; `enter` says which is played.

Deviations:
    1. The package has no end of an episode but the game's own, and an agent that does not lose plays for ever: here it is cut after
       `max_episode_frames`.
    2. Observations are (C, 10, 10) uint8 of 0 and 1, channels first; the package's are (10, 10, C) bool.

Units: an agent step is one frame; returns are in game points.
"""

import colorsys
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from growtrain.environments.base import Bools, Frames, Screen, Settings, Spec, VectorStep
from growtrain.environments.games import MINATAR, Unplayable, games_of
from growtrain.environments.lanes import LaneEnvironment, lane_seed

SIDE: Final = 10  # cells
_MEANINGS: Final = {"n": "NOOP", "l": "LEFT", "u": "UP", "r": "RIGHT", "d": "DOWN", "f": "FIRE"}
_CELL: Final = 16  # pixels a side, in pictures
_SHARED: Final = {"channels", "action_map", "random"}  # of a game object's attributes, those that are not its state


def make(settings: Settings, seed: int) -> "MinAtarEnvironment":
    """The lanes of a configuration."""
    return MinAtarEnvironment(
        game=settings.game,
        num_envs=settings.num_envs,
        seed=seed,
        sticky_actions=settings.sticky_actions,
        minimal_actions=settings.minimal_actions,
        max_episode_frames=settings.max_episode_frames,
    )


def spec_of(settings: Settings) -> Spec:
    """What a network sees and may do."""
    return make(settings, 0).spec


def screens(settings: Settings, seed: int, game: int, actions: npt.NDArray[np.int64]) -> Iterator[Screen]:
    """The T + 1 screens (160, 160, 3) of the first episode of lane 0, played again with its T actions; a colour for each channel."""
    environment = make(settings, seed)
    environment.enter(game)
    step = environment.start()
    yield Screen(picture(step.frame[0]), 0.0, False)
    for t in range(len(actions)):
        environment.send(actions[t : t + 1])
        step = environment.recv()
        yield Screen(picture(step.frame[0]), float(step.reward[0]), bool(step.started[0]))


def picture(frame: Frames) -> Frames:
    """Cells in the colours of their channels: (C, 10, 10) uint8 of 0 and 1 -> (160, 160, 3) uint8; of several channels the last shows."""
    shown = np.zeros((SIDE, SIDE, 3), np.uint8)
    for index, cells in enumerate(frame):
        hue = colorsys.hsv_to_rgb(index / len(frame), 0.75, 1.0 if index % 2 else 0.75)
        shown[cells != 0] = [round(255 * part) for part in hue]
    return shown.repeat(_CELL, 0).repeat(_CELL, 1)


@cache
def _module(game: str) -> ModuleType:
    """The package's file of a game, loaded by itself; raises `Unplayable` where the package is missing."""
    package = importlib.util.find_spec("minatar")
    if package is None or not package.submodule_search_locations:
        raise Unplayable(
            f"{MINATAR.name}/{game} is played by the package minatar: pip install 'growtrain[minatar]' (or, without the plotting "
            "libraries that it asks for, pip install --no-deps minatar)"
        )
    path = Path(package.submodule_search_locations[0]) / "environments" / f"{game}.py"
    spec = importlib.util.spec_from_file_location(f"minatar.environments.{game}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def game_object(game: str, *, difficulty_ramping: bool = True) -> Any:
    """The package's own object of a game, without what surrounds it; raises `Unplayable` where the package is missing."""
    return _module(game).Env(ramping=difficulty_ramping)


class MinAtarEnvironment(LaneEnvironment):
    """N lanes of a MinAtar game, or of a chain of them.

    Attributes:
        games: their names; one but for a chain.
        game: the one that is played.
        channels: names of the channels, such as "enemy_bullet".
    """

    def __init__(
        self,
        *,
        game: str,
        num_envs: int,
        seed: int,
        sticky_actions: float = 0.1,
        minimal_actions: bool = False,
        difficulty_ramping: bool = True,
        max_episode_frames: int = 10_000,
    ) -> None:
        """Makes the games; nothing is played before `start` or `reset`.

        Args:
            game: "minatar/" and a game, or games joined by "+", in any spelling.
            num_envs: N, the number of lanes, at least 1.
            seed: of the run, 0 or more and of any size; see `lane_seed`.
            sticky_actions: probability that an action is the lane's last one again.
            minimal_actions: only those that do something in a game (of a chain: in any of its games), instead of all six.
            difficulty_ramping: the games get faster as they go on.
            max_episode_frames: an episode is truncated at this many frames.

        Raises:
            ValueError: an argument is out of its range, or the game is unknown.
            Unplayable: the package is not installed.
        """
        if max_episode_frames < 1:
            raise ValueError(f"max_episode_frames must be at least 1, got {max_episode_frames}")
        if not 0.0 <= sticky_actions <= 1.0:
            raise ValueError(f"sticky_actions must be in [0, 1], got {sticky_actions}")
        super().__init__(num_envs, seed)
        self.games = games_of(game)
        self._sticky, self._most, self._ramping = sticky_actions, max_episode_frames, difficulty_ramping
        each = [game_object(name, difficulty_ramping=difficulty_ramping) for name in self.games]
        self.channels = tuple(dict.fromkeys(name for env in each for name in env.channels))
        known = range(len(_MEANINGS))
        used = sorted({action for env in each for action in env.minimal_action_set()}) if minimal_actions else known
        self._actions = list(used)  # of the package, by ours
        self.action_meanings = tuple(_MEANINGS[each[0].action_map[action]] for action in self._actions)
        self._places = [np.array([self.channels.index(name) for name in env.channels]) for env in each]
        self.spec = Spec(
            frame_shape=(len(self.channels), SIDE, SIDE),
            stack_size=1,
            num_actions=len(self._actions),
            frame_skip=1,
            scale=1.0,
        )
        self._observation = np.zeros((num_envs, *self.spec.observation_shape), dtype=np.uint8)
        self._last = [0] * num_envs  # the package's actions
        self._sent: list[int] | None = None
        self.enter(0)
        self._set_specs()

    @property
    def game(self) -> str:
        """The game that is played."""
        return self.games[self._game]

    def enter(self, game: int) -> None:
        """Plays this game of the chain, counted from 0, from the next `start` on; raises `ValueError` if there is none."""
        if not 0 <= game < len(self.games):
            raise ValueError(f"game {game} of a chain of {len(self.games)} was asked for")
        self._game = game
        self._envs = [game_object(self.game, difficulty_ramping=self._ramping) for _ in range(self.num_envs)]
        self._randoms = [env.random for env in self._envs]
        self._idle[:] = True

    def start(self) -> VectorStep:
        """Seeds every lane and begins its first episode; the step's rewards are 0 and nothing has ended."""
        self._seeding += 1
        for lane, env in enumerate(self._envs):
            env.random = self._randoms[lane] = np.random.RandomState(
                lane_seed(self._seed, lane, int(self._seeding[lane]))
            )
        self._last, self._sent = [0] * self.num_envs, None
        self._next_episodes(np.ones(self.num_envs, dtype=np.bool_))
        return self._quiet_step()

    def send(self, actions: npt.NDArray[np.integer[Any]]) -> None:
        """Takes the next actions; the games are stepped by `recv`.

        Args:
            actions: (N,) integers in 0 .. num_actions - 1.

        Raises:
            ValueError: wrong shape or dtype, or an action out of range; nothing was sent.
            RuntimeError: recv() is due, or a lane has no running episode.
        """
        self._require_running()
        self._check_actions(actions, self.game)
        self._sent = [self._actions[action] for action in actions.tolist()]

    def _collect(self) -> tuple[npt.NDArray[np.float32], Bools, Bools, Bools]:
        if self._sent is None:
            raise RuntimeError("nothing was sent: send(actions) comes first")
        rewards, overs = [], []
        for lane, action in enumerate(self._sent):
            if self._randoms[lane].random_sample() >= self._sticky:
                self._last[lane] = action
            reward, over = self._envs[lane].act(self._last[lane])
            rewards.append(reward)
            overs.append(over)
        self._sent = None
        self._render(self._lanes, np.zeros_like(self._observation))
        reward, terminated = np.array(rewards, dtype=np.float32), np.array(overs, dtype=np.bool_)
        self._length += 1
        self._return += reward
        truncated = (self._length >= self._most) & ~terminated
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
        lanes = self._lanes[mask]
        for lane in lanes:
            self._envs[lane].reset()
        self._render(lanes, self._observation.copy())
        # Arrays that were handed out are never written to.
        self._length, self._return = (np.where(mask, 0, values) for values in (self._length, self._return))
        self._idle = self._idle & ~mask

    def _render(self, lanes: npt.NDArray[np.int64], observation: Frames) -> None:
        """Draws lanes over what an array (N, C, 10, 10) holds of them, and keeps it as what is observed."""
        places, alone = self._places[self._game], len(self.games) == 1
        for lane in lanes:
            cells = self._envs[lane].state().transpose(2, 0, 1)
            if alone:
                observation[lane] = cells
            else:
                observation[lane] = 0
                observation[lane, places] = cells
        self._observation = observation

    def _require_running(self) -> None:
        if self._sent is not None:
            raise RuntimeError("the games are running: recv() comes first")
        if self._idle.any():
            raise RuntimeError(f"lane {self._idle.argmax()} has no running episode: reset it first")

    # The exact snapshot

    def state_dict(self) -> dict[str, Any]:
        """A complete snapshot between two steps: some hundred numbers and a generator of 624 words a lane.

        Returns:
            Plain values and arrays. `seed`, `game`; (N,) each: `seeding`, `length` int64, `episode_return` float64, `last_action` int64,
            `random_position` int64; `random_words` (N, 624) int64; `lanes`, the state of each game by the names of its attributes.

        Raises:
            RuntimeError: recv() is due, or a lane has no running episode.
        """
        self._require_running()
        randoms = [random.get_state(legacy=False)["state"] for random in self._randoms]
        return {
            "seed": self._seed,
            "game": self._game,
            "seeding": self._seeding.copy(),
            "length": self._length.copy(),
            "episode_return": self._return.copy(),
            "last_action": np.array(self._last, dtype=np.int64),
            "random_words": np.stack([state["key"] for state in randoms]).astype(np.int64),
            "random_position": np.array([state["pos"] for state in randoms], dtype=np.int64),
            "lanes": [
                {name: _plain(value) for name, value in vars(env).items() if name not in _SHARED} for env in self._envs
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> VectorStep:
        """Goes back to a snapshot at once.

        Args:
            state: of an environment with the same games, number of lanes and settings; its seed is taken over.

        Returns:
            The step that the policy sees next: rewards are 0 and nothing has ended.

        Raises:
            ValueError: the state does not fit, and the environment has to be started or loaded again.
        """
        try:
            self._restore(state)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"the environment's state is not one of {self.game}: {error}") from error
        return self._quiet_step()

    def _restore(self, state: dict[str, Any]) -> None:
        per_lane = ("seeding", "length", "episode_return", "last_action", "random_position")
        shapes = dict.fromkeys(per_lane, (self.num_envs,)) | {"random_words": (self.num_envs, 624)}
        for name, shape in shapes.items():
            if np.shape(state[name]) != shape:
                raise ValueError(f"{name} is of shape {np.shape(state[name])} and not {shape}")
        if len(state["lanes"]) != self.num_envs:
            raise ValueError(f"the environment's state has {len(state['lanes'])} lanes and not {self.num_envs}")
        self._set_seed(int(state["seed"]))
        self.enter(int(state["game"]))
        for lane, (env, saved) in enumerate(zip(self._envs, state["lanes"], strict=True)):
            env.reset()  # some attributes are set by nothing else
            fresh = {name: _plain(value) for name, value in vars(env).items() if name not in _SHARED}
            if saved.keys() != fresh.keys():
                raise ValueError(f"lane {lane} is not of {self.game}: it has {', '.join(sorted(saved))}")
            for name, value in saved.items():
                if isinstance(value, dict) != isinstance(fresh[name], dict):
                    raise ValueError(f"lane {lane}: {name} is {str(value)[:40]!r}")
                setattr(env, name, _restored(value))
            words = np.asarray(state["random_words"][lane], dtype=np.uint32)
            where = {"key": words, "pos": int(state["random_position"][lane])}
            env.random = self._randoms[lane] = np.random.RandomState()
            env.random.set_state({"bit_generator": "MT19937", "state": where, "has_gauss": 0, "gauss": 0.0})
        self._seeding, self._length = (np.array(state[name], dtype=np.int64) for name in ("seeding", "length"))
        self._return = np.array(state["episode_return"], dtype=np.float64)
        self._last, self._sent = np.asarray(state["last_action"]).tolist(), None
        self._render(self._lanes, np.zeros_like(self._observation))
        self._idle[:] = False


def _plain(value: Any) -> Any:
    """A game's attribute as plain values; an array says its type."""
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": value.tolist()}
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _restored(value: Any) -> Any:
    """The inverse of `_plain`; a new object each time."""
    if isinstance(value, dict):
        return np.array(value["values"], dtype=np.dtype(value["dtype"]))
    return [_restored(each) for each in value] if isinstance(value, list) else value
