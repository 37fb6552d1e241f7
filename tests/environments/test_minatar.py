"""MinAtar against the package's own environment, its snapshots, chains of its games, and TorchRL's collector."""

import json
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchrl.envs.utils import check_env_specs

pytest.importorskip("minatar")

from growtrain.environments import minatar
from growtrain.environments.atari import AtariEnvironment
from growtrain.environments.base import VectorStep
from growtrain.environments.games import (
    MINATAR,
    Unplayable,
    canonical_game,
    games_of,
    human_normalized_score,
    parts_of,
    reference_scores,
)
from growtrain.environments.lanes import LaneEnvironment, lane_seed
from growtrain.environments.minatar import MinAtarEnvironment

CHAIN = "minatar/space_invaders+asterix+seaquest"


def make(game: str = "minatar/breakout", num_envs: int = 2, seed: int = 3, **settings: Any) -> MinAtarEnvironment:
    return MinAtarEnvironment(game=game, num_envs=num_envs, seed=seed, **settings)


def tape(steps: int, num_envs: int, num_actions: int = 6, seed: int = 0) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(num_actions, size=(steps, num_envs))


def play(environment: MinAtarEnvironment, actions: npt.NDArray[np.int64]) -> list[VectorStep]:
    steps = []
    for row in actions:
        environment.send(row)
        steps.append(environment.recv())
    return steps


@pytest.mark.parametrize("sticky", [0.0, 0.1])
@pytest.mark.parametrize("game", MINATAR.games)
def test_a_lane_plays_what_the_package_plays(game: str, sticky: float) -> None:
    from minatar.environment import Environment  # type: ignore[import-untyped]

    environment, actions = make(f"minatar/{game}", 2, sticky_actions=sticky), tape(400, 2)
    first = environment.start()
    steps = play(environment, actions)
    episodes = 0
    for lane in range(2):
        theirs = Environment(game, sticky_action_prob=sticky)
        theirs.seed(lane_seed(3, lane, 0))
        theirs.reset()
        np.testing.assert_array_equal(first.observation[lane], theirs.state().transpose(2, 0, 1))
        total = 0.0
        for t, step in enumerate(steps):
            reward, over = theirs.act(int(actions[t, lane]))
            total += reward
            assert (step.reward[lane], step.terminated[lane]) == (reward, over)
            np.testing.assert_array_equal(step.frame[lane], theirs.state().transpose(2, 0, 1))
            if over:
                assert step.started[lane]
                assert step.episode_returns[step.started[:lane].sum()] == total
                theirs.reset()
                total, episodes = 0.0, episodes + 1
            np.testing.assert_array_equal(step.observation[lane], theirs.state().transpose(2, 0, 1))
    assert episodes or game == "freeway"
    assert set(np.unique(steps[-1].observation)) == {0, 1}


@pytest.mark.parametrize("game", [*(f"minatar/{game}" for game in MINATAR.games), CHAIN])
def test_a_snapshot_goes_on_bit_for_bit(game: str) -> None:
    environment = make(game)
    environment.enter(len(environment.games) - 1)
    environment.start()
    play(environment, tape(123, 2))
    state = environment.state_dict()
    arrays = {name: value.copy() for name, value in state.items() if isinstance(value, np.ndarray)}
    plain = json.loads(json.dumps({name: value for name, value in state.items() if name not in arrays}))
    after = play(environment, tape(300, 2, seed=1))
    other = make(game, seed=9)
    step = other.load_state_dict(plain | arrays)
    np.testing.assert_array_equal(step.started, arrays["length"] == 0)
    for ours, theirs in zip(after, play(other, tape(300, 2, seed=1)), strict=True):
        for name in VectorStep.__slots__:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_a_state_of_another_game_or_number_of_lanes_is_refused() -> None:
    environment = make("minatar/breakout")
    environment.start()
    state = environment.state_dict()
    with pytest.raises(ValueError, match="not of asterix"):
        make("minatar/asterix").load_state_dict(state)
    with pytest.raises(ValueError, match="shape"):
        make("minatar/breakout", 3).load_state_dict(state)
    with pytest.raises(ValueError, match="chain of 1"):
        environment.load_state_dict(state | {"game": 1})
    for name in state:
        with pytest.raises(ValueError, match=name):
            environment.load_state_dict({key: value for key, value in state.items() if key != name})


def test_an_episode_is_cut_and_not_terminated() -> None:
    environment = make("minatar/freeway", max_episode_frames=20)
    environment.start()
    steps = play(environment, tape(45, 2))
    assert [bool(step.truncated.all()) for step in steps] == [t % 20 == 19 for t in range(45)]
    assert not any(step.terminated.any() for step in steps)
    assert steps[19].episode_lengths.tolist() == [20, 20]
    assert steps[19].started.all()


def test_nothing_that_was_handed_out_is_written_to() -> None:
    environment = make()
    steps = [environment.start()]
    copies = [steps[0].observation.copy()]
    for row in tape(60, 2):
        environment.send(row)
        steps.append(environment.recv())
        copies.append(steps[-1].frame.copy())
    for step, copy in zip(steps, copies, strict=True):
        np.testing.assert_array_equal(step.frame, copy)


def test_minimal_actions_are_those_of_the_package() -> None:
    assert make("minatar/breakout", minimal_actions=True).action_meanings == ("NOOP", "LEFT", "RIGHT")
    assert make("minatar/freeway", minimal_actions=True).action_meanings == ("NOOP", "UP", "DOWN")
    assert len(make("minatar/breakout").action_meanings) == 6
    chain = make("minatar/breakout+freeway", minimal_actions=True)
    assert chain.action_meanings == ("NOOP", "LEFT", "UP", "RIGHT", "DOWN")
    moved = make("minatar/breakout", 1, minimal_actions=True, sticky_actions=0.0)
    start = moved.start().frame[0, 0, 9].argmax()
    assert play(moved, np.array([[2]]))[0].frame[0, 0, 9].argmax() == start + 1  # the third is RIGHT


def test_a_chain_has_the_channels_of_all_games_those_of_one_name_once() -> None:
    chain, alone = make(CHAIN, 1), [make(f"minatar/{game}", 1) for game in games_of(CHAIN)]
    names = [name for environment in alone for name in environment.channels]
    assert len(names) == 6 + 4 + 10
    assert sorted(chain.channels) == sorted(set(names))
    assert chain.spec.frame_shape == (17, 10, 10)
    for index, single in enumerate(alone):
        chain.enter(index)
        first = chain.start()
        # Each start seeds a lane anew: the single game's lane comes to the same seeding.
        for _ in range(index):
            single.start()
        expected = single.start()
        assert chain.game == single.game
        for ours, theirs in [(first, expected), *zip(play(chain, tape(60, 1)), play(single, tape(60, 1)), strict=True)]:
            own = [chain.channels.index(name) for name in single.channels]
            np.testing.assert_array_equal(ours.observation[:, own], theirs.observation)
            assert not np.delete(ours.observation, own, axis=1).any()


@pytest.mark.parametrize("family", ["minatar", "atari"])
def test_a_torchrl_collector_runs_it(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what TorchRL itself imports
        from torchrl.collectors import Collector
    environment: LaneEnvironment = (
        make(num_envs=3) if family == "minatar" else AtariEnvironment(game="pong", num_envs=3, seed=0)
    )
    check_env_specs(environment)
    collector = Collector(environment, None, frames_per_batch=60, total_frames=120)
    try:
        batches = list(collector)
    finally:
        collector.shutdown(raise_on_error=False)
    assert [batch.shape for batch in batches] == [torch.Size([3, 20])] * 2
    shape = environment.spec.observation_shape
    assert batches[1]["next", "observation"].shape == (3, 20, *shape)
    if family == "minatar":
        assert any(batch["next", "terminated"].any() for batch in batches)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("MinAtar/SpaceInvaders-v1", "minatar/space_invaders"),
        ("minatar/space invaders", "minatar/space_invaders"),
        (" MINATAR/Breakout-v0", "minatar/breakout"),
        ("minatar/Space-Invaders+asterix + SEAQUEST", CHAIN),
    ],
)
def test_any_spelling(given: str, name: str) -> None:
    assert canonical_game(given) == name == canonical_game(name)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("minatar/pong", "'pong': choose one of breakout, asterix, freeway, seaquest, space_invaders"),
        ("minatar/asterix+phoenix", "'phoenix': choose one of breakout"),
        ("minatar/asterix+", "'asterix\\+' lacks a game: write two or more"),
        ("minatar/+", "lacks a game"),
    ],
)
def test_an_unknown_game_names_the_five(given: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        canonical_game(given)


def test_scores_have_no_human() -> None:
    assert reference_scores("minatar/breakout") == (0.49, 10.0)
    assert human_normalized_score("minatar/breakout", 10.0) is None
    assert human_normalized_score(CHAIN, 10.0) is None
    assert reference_scores(CHAIN) is None
    assert [reference_scores(part) for part in parts_of(CHAIN)] == [
        reference_scores(f"minatar/{game}") for game in games_of(CHAIN)
    ]


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    minatar._module.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unplayable, match=r"pip install 'growtrain\[minatar\]'"):
        make()


def test_a_picture_has_a_colour_for_each_channel() -> None:
    frame = make("minatar/seaquest", 1).start().frame[0]
    picture = minatar.picture(frame)
    assert picture.shape == (160, 160, 3)
    cells = picture[8::16, 8::16]
    assert ((cells != 0).any(-1) == (frame != 0).any(0)).all()
    one = np.zeros((10, 10, 10), np.uint8)
    one[np.arange(10), np.arange(10), 0] = 1
    assert len(np.unique(minatar.picture(one).reshape(-1, 3), axis=0)) == 11
