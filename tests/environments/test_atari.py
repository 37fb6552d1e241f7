"""The Atari environment against ALE itself: rewards, lives, frames, seeds, failures, and exact snapshots.

Loading a game takes 0.1 s per lane, and so does seeding it: the tests share environments and two recorded runs.
"""

import dataclasses
import io
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import ale_py
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from growtrain.environments import atari
from growtrain.environments.atari import AtariEnvironment, lane_seed
from growtrain.environments.base import EnvironmentHung, VectorStep

Make = Callable[..., AtariEnvironment]
Pool = defaultdict[tuple[tuple[str, Any], ...], list[AtariEnvironment]]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Environments by their settings: the games are loaded once, not once per test."""
    environments: Pool = defaultdict(list)
    yield environments
    for environment in itertools.chain.from_iterable(environments.values()):
        environment.close()


def lend(pool: Pool, lent: list[Callable[[], None]], **changes: Any) -> AtariEnvironment:
    """An environment as if it were new, whatever was played in it before."""
    defaults = {"game": "breakout", "num_envs": 2, "reseed_steps": 190, "watchdog_seconds": 20.0}
    settings = defaults | {"seed": 7} | changes
    shelf = pool[tuple(sorted((name, value) for name, value in settings.items() if name != "seed"))]
    environment = shelf.pop() if shelf else AtariEnvironment(**settings)
    environment.set_seed(settings["seed"])

    def give_back() -> None:
        if environment._asked is None:
            shelf.append(environment)
        elif not environment.is_closed:
            environment.close()

    lent.append(give_back)
    return environment


@pytest.fixture
def make(pool: Pool) -> Iterator[Make]:
    lent: list[Callable[[], None]] = []
    yield lambda **changes: lend(pool, lent, **changes)
    for give_back in lent:
        give_back()


def random_actions(environment: AtariEnvironment, steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, environment.spec.num_actions, (steps, environment.num_envs))


def play(environment: AtariEnvironment, actions: np.ndarray) -> list[VectorStep]:
    steps = []
    for row in actions:
        environment.send(row)
        steps.append(environment.recv())
    return steps


@dataclasses.dataclass
class Recording:
    """A run: `steps[t]` and `states[t]` are what `actions[:t]` led to."""

    actions: np.ndarray
    steps: list[VectorStep]
    states: list[dict[str, Any]]


@pytest.fixture(scope="module")
def record(pool: Pool) -> Callable[[float], Recording]:
    made: dict[float, Recording] = {}

    def recording(sticky: float) -> Recording:
        if sticky not in made:
            lent: list[Callable[[], None]] = []
            environment = lend(pool, lent, repeat_action_probability=sticky)
            actions = random_actions(environment, 260, seed=9)
            steps = [environment.start()]
            states = [environment.state_dict()]
            for row in actions:
                steps += play(environment, row[None])
                states.append(environment.state_dict())
            made[sticky] = Recording(actions, steps, states)
            for give_back in lent:
                give_back()
        return made[sticky]

    return recording


def assert_same(left: VectorStep, right: VectorStep) -> None:
    for field in dataclasses.fields(VectorStep):
        ours, theirs = getattr(left, field.name), getattr(right, field.name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs, err_msg=field.name)


@pytest.mark.parametrize("max_episode_frames", [108_000, 22])
def test_torchrl_contract(make: Make, max_episode_frames: int) -> None:
    check_env_specs(make(max_episode_frames=max_episode_frames))


@pytest.mark.parametrize(("sticky", "num_steps", "episodes", "seedings"), [(0.0, 320, 2, 1), (0.25, 590, 3, 2)])
def test_rewards_lives_and_ends_are_those_of_ale(
    make: Make, sticky: float, num_steps: int, episodes: int, seedings: int
) -> None:
    settings = {"game": "qbert", "num_envs": 1, "noop_max": 0, "reseed_steps": 350}
    environment = make(**settings, repeat_action_probability=sticky)
    environment.start()
    actions = np.random.default_rng(0).choice([2, 3], (num_steps, 1))  # UP or RIGHT: the game is soon over
    steps = play(environment, actions)

    reference = ale_py.ALEInterface()
    reference.setFloat("repeat_action_probability", sticky)

    def begin(seeding: int | None) -> None:
        if seeding is not None:
            reference.setInt("random_seed", lane_seed(7, 0, seeding))
            reference.loadROM(ale_py.roms.get_rom_path("qbert"))
        reference.reset_game()

    begin(0)
    returns, lengths, lives_lost, seeded_at = [0.0], [0], 0, [0]
    for now, (action, step) in enumerate(zip(actions[:, 0], steps, strict=True), start=1):
        lives, reward = reference.lives(), 0
        for _ in range(4):
            reward += reference.act(reference.getMinimalActionSet()[action])
            if reference.game_over():
                break
        returns[-1] += reward
        lengths[-1] += 1
        lives_lost += reference.lives() < lives
        assert step.reward.tolist() == [reward]
        assert step.life_lost.tolist() == [reference.lives() < lives]
        assert step.terminated.tolist() == step.started.tolist() == [reference.game_over()]
        assert not step.truncated.any()
        if reference.game_over():
            assert (step.episode_returns.tolist(), step.episode_lengths.tolist()) == (
                [returns[-1]],
                [lengths[-1]],
            )
            if now - seeded_at[-1] >= 350:
                begin(len(seeded_at))
                seeded_at.append(now)
            else:
                begin(None)
            returns.append(0.0)
            lengths.append(0)
        else:
            assert step.episode_returns.size == step.episode_lengths.size == 0
    # The run has seen what the test is about.
    assert (len(returns), len(seeded_at)) == (episodes, seedings)
    assert lives_lost >= 3
    assert max(step.reward.max() for step in steps) > 1


def test_torchrl_and_native_driving_play_the_same_game(make: Make, record: Callable[[float], Recording]) -> None:
    native = record(0.0)
    feed = iter(torch.from_numpy(native.actions))
    wrapped = make()
    rollout = wrapped.rollout(180, lambda td: td.set("action", next(feed)), break_when_any_done=False)

    first, steps = native.steps[0], native.steps[1:181]
    ends = np.stack([step.started for step in steps])
    assert ends.any(axis=0).tolist() == [True, False], "only one of the lanes should end"
    observations = np.stack([first.observation, *(step.observation for step in steps[:-1])], axis=1)
    np.testing.assert_array_equal(rollout["observation"].numpy(), observations)
    after = rollout["next"]
    np.testing.assert_array_equal(
        after["observation"][:, :, -1:].numpy(), np.stack([step.frame for step in steps], axis=1)
    )
    for key in ("reward", "terminated", "truncated", "life_lost"):
        expected = np.stack([getattr(step, key) for step in steps], axis=1)
        np.testing.assert_array_equal(after[key][..., 0].numpy(), expected, err_msg=key)
    np.testing.assert_array_equal(after["done"][..., 0].numpy(), ends.T)
    assert snapshot_bytes(wrapped.state_dict()) == snapshot_bytes(native.states[180])


def test_frames_at_the_seam_of_two_episodes(make: Make) -> None:
    environment = make(max_episode_frames=22)
    start = environment.start()
    assert start.started.all()
    assert not start.observation[:, :3].any()
    assert start.observation[:, 3].any(axis=(1, 2)).all()
    previous = start
    for number, step in enumerate(play(environment, random_actions(environment, 12)), start=1):
        ended = number % 6 == 0  # 22 frames are cut within the 6th action
        assert step.truncated.tolist() == step.started.tolist() == [ended, ended]
        assert step.episode_lengths.tolist() == ([6, 6] if ended else [])
        assert not step.terminated.any()
        if ended:
            assert not step.observation[:, :3].any()
            assert (step.frame != step.observation[:, 3:]).any(axis=(1, 2, 3)).all()
        else:
            np.testing.assert_array_equal(step.observation[:, :3], previous.observation[:, 1:])
            np.testing.assert_array_equal(step.observation[:, 3:], step.frame)
        previous = step


def test_seeds_are_in_range_and_do_not_line_up() -> None:
    grid = [(seed, lane, seeding) for seed in (0, 1, 2, 2**40) for lane in range(9) for seeding in range(9)]
    seeds = [lane_seed(*point) for point in grid]
    assert len(set(seeds)) == len(grid)
    assert min(seeds) >= 0
    assert max(seeds) < 2**31
    assert lane_seed(1, 2, 3) == 345318725


@pytest.mark.parametrize(("reseed_steps", "ends_that_seed"), [(0, [1, 2, 3]), (7, [2])])
def test_a_lane_is_seeded_at_the_first_end_when_it_is_due(
    make: Make, reseed_steps: int, ends_that_seed: list[int]
) -> None:
    environment = make(num_envs=1, max_episode_frames=22, reseed_steps=reseed_steps)  # 6 actions an episode
    environment.start()
    seeded = []
    for number in range(1, 4):
        before = environment.state_dict()["seeding"]
        play(environment, random_actions(environment, 6))
        state = environment.state_dict()
        if state["seeding"] != before:
            assert state["seeding"] == before + 1
            assert state["history"] == 0
            seeded.append(number)
    assert seeded == ends_that_seed
    # A start always seeds; so does a reset that breaks an episode off.
    for reset in (environment.start, environment.reset):
        play(environment, random_actions(environment, 2))
        reset()
        assert environment.state_dict()["history"] == 0


def test_a_lane_plays_its_own_episodes_whatever_surrounds_it(make: Make, record: Callable[[float], Recording]) -> None:
    run = record(0.25)
    wide = make(repeat_action_probability=0.25, num_envs=3, num_threads=1)
    # Every lane presses the same buttons, so that it is by their seeds that they differ.
    actions = run.actions[:160, :1].repeat(3, axis=1)
    steps = [wide.start(), *play(wide, actions[:50])]
    wide.reset(TensorDict({"_reset": torch.tensor([False, False, True])[:, None]}, batch_size=[3]))
    steps += play(wide, actions[50:])
    for left, right in zip(steps, run.steps, strict=False):
        for name in ("observation", "frame", "reward", "terminated", "life_lost", "started"):
            np.testing.assert_array_equal(getattr(left, name)[0], getattr(right, name)[0])
    assert any(step.terminated[0] for step in steps)
    assert wide.state_dict()["seeding"].tolist() == [0, 0, 1]
    films = {b"".join(step.frame[lane].tobytes() for step in steps[:41]) for lane in range(3)}
    assert len(films) == 3


def test_a_received_step_is_never_written_to_again(make: Make) -> None:
    environment = make(max_episode_frames=22)
    steps = [environment.start()]
    copies = []
    for row in random_actions(environment, 15):
        copies.append(VectorStep(**{f.name: getattr(steps[-1], f.name).copy() for f in dataclasses.fields(VectorStep)}))
        steps += play(environment, row[None])
    for step, copy in zip(steps, copies, strict=False):
        assert_same(step, copy)


def snapshot_bytes(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **state)
    return file.getvalue()


def reload(snapshot: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(snapshot), allow_pickle=False) as file:
        return {name: file[name] for name in file}


@pytest.mark.parametrize("sticky", [0.0, 0.25])
def test_continuing_from_a_snapshot_equals_never_having_stopped(
    make: Make, record: Callable[[float], Recording], sticky: float
) -> None:
    run = record(sticky)
    history = np.stack([state["history"] for state in run.states])
    length = np.stack([state["length"] for state in run.states])
    (carried_on,) = np.flatnonzero((length[1:, 0] == 0) & (history[1:, 0] > 0)) + 1
    (seeded,) = np.flatnonzero(history[1:, 1] == 0) + 1
    assert carried_on < seeded < len(run.actions) - 20
    # The end of an episode is the last thing to be played again; one lane has just been seeded, and the other
    # plays through an end; one lane is seeded while the other is already playing.
    moments = {0.0: [seeded + 15], 0.25: [carried_on, seeded, seeded + 15]}[sticky]
    # Into an environment of another seed: first one that has not been started, then one in the middle of a run.
    resumed = make(repeat_action_probability=sticky, seed=99)
    for now in moments:
        snapshot, step = snapshot_bytes(run.states[now]), run.steps[now]
        loaded = resumed.load_state_dict(reload(snapshot))
        np.testing.assert_array_equal(loaded.observation, step.observation)
        np.testing.assert_array_equal(loaded.started, length[now] == 0)
        assert not loaded.reward.any()
        assert not loaded.terminated.any()
        assert loaded.episode_returns.size == 0
        assert snapshot_bytes(resumed.state_dict()) == snapshot
        for left, right in zip(play(resumed, run.actions[now:]), run.steps[now + 1 :], strict=True):
            assert_same(left, right)
        assert snapshot_bytes(resumed.state_dict()) == snapshot_bytes(run.states[-1])


def test_a_snapshot_that_does_not_fit_is_refused(make: Make, record: Callable[[float], Recording]) -> None:
    run = record(0.0)
    environment, state = make(), run.states[20]
    environment.load_state_dict(state)

    def changed(name: str, lane: int, value: int) -> dict[str, Any]:
        array = np.array(state[name])
        array[lane] = value
        return state | {name: array}

    malformed = {
        "lacks actions": {name: value for name, value in state.items() if name != "actions"},
        "lanes: 2": state | {"length": state["length"][:1]},
        "action that breakout does not have": changed("actions", 3, 4),
        "does not fit its histories": changed("history", 1, 19),
        "was due a seeding": run.states[230] | {"length": np.zeros(2, dtype=np.int64)},
        "below 0": changed("seeding", 0, -1),
    }
    for message, bad in malformed.items():
        with pytest.raises(ValueError, match=message):
            environment.load_state_dict(bad)
    # Nothing has changed so far.
    assert snapshot_bytes(environment.state_dict()) == snapshot_bytes(state)

    for bad in (changed("episode_return", 1, 3), changed("length", 1, 19)):
        with pytest.raises(ValueError, match="lane 1 did not arrive"):
            environment.load_state_dict(bad)
        with pytest.raises(RuntimeError, match="no running episode"):
            environment.state_dict()
    with pytest.raises(ValueError, match="did not arrive"):
        make(repeat_action_probability=0.25).load_state_dict(run.states[60])
    np.testing.assert_array_equal(environment.load_state_dict(state).observation, run.steps[20].observation)


def test_an_impossible_action_is_refused_and_the_game_goes_on(make: Make, record: Callable[[float], Recording]) -> None:
    environment, run = make(), record(0.0)
    environment.start()
    for number, (actions, message) in enumerate(
        (
            (np.array([0, 4]), "lane 1: breakout has no action 4"),
            (np.array([-1, 0]), "lane 0: breakout has no action -1"),
            (np.array([0.0, 1.0]), r"\(2,\) integer actions"),
            (np.array([0]), r"\(2,\) integer actions"),
        )
    ):
        with pytest.raises(ValueError, match=message):
            environment.send(actions)
        turn = slice(3 * number, 3 * number + 3)
        for left, right in zip(play(environment, run.actions[turn]), run.steps[1:][turn], strict=True):
            assert_same(left, right)


def test_a_hung_emulator_is_reported_with_lanes_and_actions(make: Make) -> None:
    environment = make()
    environment.start()
    environment._watchdog_seconds = 0.3  # only now: on a busy machine a reset may take longer
    # An action that ALE does not know makes it wait for ever; the range check is what normally keeps it away.
    environment.spec = dataclasses.replace(environment.spec, num_actions=5)
    environment.action_meanings = (*environment.action_meanings, "BOGUS")
    emulators = environment._vector.ale
    environment.send(np.array([1, 4]))
    with pytest.raises(EnvironmentHung, match=r"breakout: no answer within 0\.3 s to FIRE in lane 0, BOGUS in lane 1"):
        environment.recv()
    for use in (environment.recv, environment.start, lambda: environment.send(np.array([0, 0]))):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    emulators.send([0, 0], [1.0, 1.0])  # completes the batch, which frees the waiting thread


def test_calls_out_of_turn_are_refused(make: Make) -> None:
    environment = make(max_episode_frames=22)
    noop = np.zeros(2, dtype=np.int64)
    for early in (environment.state_dict, lambda: environment.send(noop)):
        with pytest.raises(RuntimeError, match="lane 0 has no running episode"):
            early()
    with pytest.raises(RuntimeError, match="nothing was sent"):
        environment.recv()
    environment.start()
    environment.send(noop)
    for late in (environment.state_dict, environment.start, lambda: environment.send(noop)):
        with pytest.raises(RuntimeError, match="recv"):
            late()
    environment.recv()
    # TorchRL resets by itself what has ended; who drives `step` alone has to.
    tensordict = environment.rand_action(environment.reset())
    for _ in range(6):
        tensordict = environment.step(tensordict)["next"].set("action", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="reset it first"):
        environment.step(tensordict)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"game": "phenix"}, "did you mean phoenix"),
        ({"num_envs": 0}, "num_envs"),
        ({"seed": -1}, "seed"),
        ({"repeat_action_probability": 1.5}, "repeat_action_probability"),
        ({"max_episode_frames": 0}, "max_episode_frames"),
        ({"reseed_steps": -1}, "reseed_steps"),
        ({"watchdog_seconds": 0}, "watchdog_seconds"),
    ],
)
def test_impossible_settings_are_refused(make: Make, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**change)


@pytest.mark.parametrize(("num_envs", "cores", "threads"), [(1, 4, 1), (3, 2, 2), (3, 8, 3)])
def test_threads_follow_the_cores_of_this_process(
    monkeypatch: pytest.MonkeyPatch, num_envs: int, cores: int, threads: int
) -> None:
    class Asked(Exception):
        """Instead of loading a game."""

    def vector(*_: Any, num_threads: int, **__: Any) -> None:
        raise Asked(num_threads)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(atari, "AtariVectorEnv", vector)
    for setting, expected in ({}, threads), ({"num_threads": 5}, 5):
        with pytest.raises(Asked, match=f"^{expected}$"):
            AtariEnvironment(game="breakout", num_envs=num_envs, seed=0, **setting)
