"""An evaluation's expected score is the policy's, whatever the number of lanes and however the lengths of episodes are spread."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from growtrain.environments.atari import make_spec
from growtrain.environments.base import VectorStep
from growtrain.runs.evaluation import evaluate, random_streams
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError

CPU = torch.device("cpu")
Lengths = Callable[[np.random.Generator], int]
# Lengths in agent steps with their means: short, long, and a heavy tail, in the proportions of 10k, 24k and (2k, 32k) frames.
KINDS: dict[str, tuple[Lengths, float]] = {
    "short": (lambda rng: int(rng.geometric(1 / 5)), 5.0),
    "long": (lambda rng: int(rng.geometric(1 / 12)), 12.0),
    "tail": (lambda rng: 1 if rng.random() < 0.8 else 16, 4.0),
}


class Toy:
    """Lanes whose episodes score 1 a step, of random lengths; it counts what was made, played and closed."""

    spec = make_spec(4)

    def __init__(self, lengths: Lengths, num_envs: int, seed: int) -> None:
        self.lengths, self.num_envs, self.rng = lengths, num_envs, np.random.default_rng(seed)
        self.left = np.array([lengths(self.rng) for _ in range(num_envs)])
        self.total = self.left.copy()
        self.steps = 0
        self.closed = False

    def enter(self, game: int) -> None:
        assert game == 0

    def start(self) -> VectorStep:
        return self._step(np.zeros(self.num_envs, np.bool_), np.zeros(0))

    def send(self, actions: np.ndarray) -> None:
        assert actions.shape == (self.num_envs,)

    def recv(self) -> VectorStep:
        self.steps += 1
        self.left -= 1
        ended = self.left == 0
        returns = self.total[ended].astype(np.float64)
        self.left[ended] = self.total[ended] = [self.lengths(self.rng) for _ in range(int(ended.sum()))]
        return self._step(ended, returns)

    def close(self, **_: Any) -> None:
        self.closed = True

    def _step(self, ended: np.ndarray, returns: np.ndarray) -> VectorStep:
        nothing = np.zeros(self.num_envs, np.bool_)
        observation = np.zeros((self.num_envs, 1), np.uint8)
        return VectorStep(
            observation=observation, frame=observation, reward=np.ones(self.num_envs, np.float32), terminated=ended,
            truncated=nothing, life_lost=nothing, started=ended, episode_returns=returns,
            episode_lengths=returns.astype(np.int64),
        )  # fmt: skip


def still(observation: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(observation), 2)


def config_of(num_envs: int, **settings: Any) -> Config:
    return Config(game="breakout", num_envs=num_envs, **settings)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Toy]:
    toys: list[Toy] = []

    def make(config: Config, *, seed: int) -> Toy:
        toys.append(Toy(request.param, config.num_envs, seed))
        return toys[-1]

    monkeypatch.setattr("growtrain.runs.evaluation.make_environment", make)
    return toys


@pytest.mark.parametrize(
    ("made", "mean"), [pytest.param(*kind, id=name) for name, kind in KINDS.items()], indirect=["made"]
)
@pytest.mark.parametrize("lanes", [1, 8, 64])
def test_the_expected_score_does_not_depend_on_the_lanes(lanes: int, made: list[Toy], mean: float) -> None:
    """Within 3 %: of 9,600 episodes for each, in evaluations of 30, whose standard error is 1.0 to 1.6 %."""
    scores = []
    for frames in range(320):
        config = config_of(lanes, eval_frames=1_000, eval_episodes=30)  # the lengths are a 500th of a game's, too
        record = evaluate(still, config, frames=frames, stage=0, device=CPU)
        assert (record.episodes, record.unfinished) == (30, 0)
        scores.append(record.episode_return)
    assert np.mean(np.array(scores)) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("made", [KINDS["tail"][0]], indirect=True)
@pytest.mark.parametrize("lanes", [1, 3, 64])
def test_exactly_the_first_episodes_that_begin_count(lanes: int, made: list[Toy]) -> None:
    config = config_of(lanes, eval_episodes=5)
    record = evaluate(still, config, frames=7, stage=2, device=CPU)
    (toy,) = made
    assert toy.num_envs == min(lanes, 5)
    assert toy.closed
    assert record.eval_frames == 4 * toy.steps * toy.num_envs
    # The toy draws a length as an episode begins: its first five draws are what the score is made of.
    rng = np.random.default_rng(random_streams(config, 7)[1])
    drawn = [KINDS["tail"][0](rng) for _ in range(5)]
    assert record.episode_return == np.mean(drawn)
    assert record.episode_return_std == np.std(drawn)


@pytest.mark.parametrize("made", [KINDS["long"][0]], indirect=True)
def test_told_to_stop_it_does_so_after_the_step_and_says_nothing(made: list[Toy]) -> None:
    asked = iter(range(99))
    config = config_of(3, eval_episodes=60)
    assert evaluate(still, config, frames=7, stage=0, device=CPU, should_stop=lambda: next(asked) == 4) is None
    (toy,) = made
    assert (toy.steps, toy.closed) == (5, True)


def test_an_episode_that_never_ends_by_itself_is_cut_and_counts() -> None:
    """Breakout without a shot, at epsilon 0: the game never begins."""
    config = Config(game="breakout", num_envs=8, eval_epsilon=0.0, eval_episodes=3, max_episode_frames=400)

    def waits(observation: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(len(observation), 4)

    record = evaluate(waits, config, frames=0, stage=0, device=CPU)
    assert (record.episode_return, record.episodes, record.unfinished) == (0.0, 3, 0)
    assert record.eval_frames == config.max_eval_frames == 1_200


@pytest.mark.parametrize(
    ("settings", "episodes", "expected", "most"),
    [
        ({}, 30, 500_000, 30 * 108_000),
        ({"eval_frames": 40_000}, 8, 40_000, 8 * 108_000),
        ({"eval_frames": 1}, 1, 1, 108_000),
        ({"eval_episodes": 60}, 60, 1_000_000, 60 * 108_000),
        ({"eval_frames": 40_000, "eval_episodes": 2}, 2, 10_000, 216_000),
        ({"max_episode_frames": 400}, 30, 12_000, 12_000),
    ],
)
def test_the_number_of_episodes_is_known_beforehand(
    settings: dict[str, int], episodes: int, expected: int, most: int
) -> None:
    config = Config(**settings)  # type: ignore[arg-type]
    assert (config.num_eval_episodes, config.expected_eval_frames, config.max_eval_frames) == (episodes, expected, most)


def test_fewer_than_no_episodes_are_refused() -> None:
    with pytest.raises(ConfigError, match="--eval-episodes"):
        dataclasses.replace(Config(), eval_episodes=-1)
