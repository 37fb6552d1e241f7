"""The control suite's lanes against the suite's own environments, their exact snapshots, and what ends an episode and what only cuts it."""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dm_control")

from growtrain.environments.base import VectorStep
from growtrain.environments.dmc import SuiteEnvironment, _suite
from growtrain.environments.games import (
    DMC,
    Unplayable,
    canonical_game,
    human_normalized_score,
    normalization,
    reference_scores,
    zeros_of,
)
from growtrain.environments.lanes import lane_seed

SEED = 3


def lanes(task: str, num_envs: int = 1, seed: int = SEED, **options: Any) -> SuiteEnvironment:
    return SuiteEnvironment(game=f"dmc/{task}", num_envs=num_envs, seed=seed, **options)


def draw(rng: np.random.Generator, environment: SuiteEnvironment) -> Any:
    return rng.uniform(-1, 1, (environment.num_envs, environment.spec.num_actions)).astype(np.float32)


def play(environment: SuiteEnvironment, actions: Any) -> VectorStep:
    environment.send(actions)
    return environment.recv()


def theirs(task: str, lane: int) -> Any:
    domain, name = task.split("-")
    return _suite().load(domain, name, task_kwargs={"random": lane_seed(SEED, lane, 0)})


def flat(observation: dict[str, Any]) -> Any:
    return np.float32(np.hstack([np.reshape(each, -1) for each in observation.values()]))


def assert_same(ours: VectorStep, others: VectorStep) -> None:
    for item in dataclasses.fields(ours):
        np.testing.assert_array_equal(getattr(ours, item.name), getattr(others, item.name))


def test_the_table_is_the_suites() -> None:
    tasks = [f"{domain}-{task}" for domain, task in _suite().ALL_TASKS]
    assert sorted(DMC.games) == sorted(tasks)


@pytest.mark.parametrize("task", ["quadruped-run", "finger-turn_hard", "lqr-lqr_6_2"])
def test_a_lane_plays_what_the_suite_plays(task: str) -> None:
    ours, rng, steps = lanes(task, 2), np.random.default_rng(0), 1_010 if task == "finger-turn_hard" else 60
    others = [theirs(task, lane) for lane in range(2)]
    bounds = others[0].action_spec()
    low, high = (bounds.minimum, bounds.maximum) if "lqr" not in task else (-np.ones(2), np.ones(2))
    step = ours.start()
    np.testing.assert_array_equal(step.observation, [flat(each.reset().observation) for each in others])
    returns = np.zeros(2)
    for number in range(1, steps + 1):
        actions = draw(rng, ours)
        step = play(ours, actions)
        played = [each.step((low + high) / 2 + actions[lane] * (high - low) / 2) for lane, each in enumerate(others)]
        np.testing.assert_array_equal(step.frame, [flat(each.observation) for each in played])
        np.testing.assert_array_equal(step.reward, np.float32([each.reward for each in played]))
        returns += [each.reward for each in played]
        assert not step.terminated.any()
        assert (step.truncated == (number == 1_000)).all()
        assert all(each.last() == (number == 1_000 and "lqr" not in task) for each in played)
        if number == 1_000:
            assert all(each.discount == 1 for each in played)
            np.testing.assert_array_equal(step.episode_returns, returns)
            np.testing.assert_array_equal(step.observation, [flat(each.reset().observation) for each in others])


def test_actions_reach_the_bounds_of_every_dimension() -> None:
    environment = lanes("quadruped-run")
    environment.start()
    for sign, bound in ((-1, "minimum"), (1, "maximum")):
        play(environment, np.full((1, 12), sign, dtype=np.float32))
        np.testing.assert_allclose(
            environment._envs[0].physics.control(), getattr(theirs("quadruped-run", 0).action_spec(), bound)
        )


def test_what_the_suite_ends_has_ended_and_is_not_cut() -> None:
    """LQR ends where it has come to rest."""
    environment = lanes("lqr-lqr_2_1", 2)
    environment.start()
    physics = environment._envs[1].physics
    with physics.reset_context():
        physics.data.qpos[:] = 0
    step = play(environment, np.zeros((2, 1), dtype=np.float32))
    np.testing.assert_array_equal(step.terminated, [False, True])
    assert not step.truncated.any()
    np.testing.assert_array_equal(step.started, [False, True])
    cut = lanes("lqr-lqr_2_1", 1, max_episode_frames=1)
    cut.start()
    physics = cut._envs[0].physics
    with physics.reset_context():
        physics.data.qpos[:] = 0
    step = play(cut, np.zeros((1, 1), dtype=np.float32))  # in the very step in which its time is up
    assert (step.terminated[0], step.truncated[0]) == (True, False)


def test_a_cap_cuts_an_episode_earlier() -> None:
    environment = lanes("pendulum-swingup", 2, max_episode_frames=5)
    environment.start()
    cut = [play(environment, np.zeros((2, 1), dtype=np.float32)).truncated.all() for _ in range(10)]
    assert cut == [False] * 4 + [True] + [False] * 4 + [True]


# A target's place, terrain and a gripper's objects are drawn anew each episode; LQR's springs once for each seed; cart-poles start from
# normal numbers, of which a generator keeps every second for later.
@pytest.mark.parametrize(
    ("task", "options", "before"),
    [
        ("cartpole-swingup", {}, 30),
        ("cartpole-swingup", {"max_episode_frames": 25}, 30),
        ("cartpole-swingup", {"max_episode_frames": 25}, 25),
        ("cartpole-swingup", {}, 1_003),
        ("quadruped-run", {}, 30),
        ("quadruped-run", {"max_episode_frames": 25}, 40),
        ("lqr-lqr_6_2", {"max_episode_frames": 25}, 40),
        ("point_mass-hard", {"max_episode_frames": 25}, 40),
        ("manipulator-insert_peg", {"max_episode_frames": 25}, 40),
        ("swimmer-swimmer6", {"max_episode_frames": 25}, 40),
    ],
)
def test_a_snapshot_goes_on_bit_for_bit(task: str, options: dict[str, Any], before: int) -> None:
    first, rng = lanes(task, 2, **options), np.random.default_rng(0)
    first.start()
    for _ in range(before):
        play(first, draw(rng, first))
    state = first.state_dict()
    second = lanes(task, 2, seed=0, **options)
    second.start()
    resumed = second.load_state_dict(state)
    assert_same(resumed, first._quiet_step())
    ended = 0
    for _ in range(40):
        actions = draw(rng, first)
        ours = play(first, actions)
        assert_same(ours, play(second, actions))
        ended += len(ours.episode_returns)
    assert (ended > 0) == bool(options)
    with pytest.raises(ValueError, match="do not lead where they had led"):
        second.load_state_dict(state | {"observation": state["observation"] + 1e-12})
    with pytest.raises(ValueError, match=r"of shape"):
        second.load_state_dict(state | {"actions": np.pad(state["actions"], ((0, 1), (0, 0)))})


def test_a_new_seeding_plays_other_episodes() -> None:
    environment = lanes("cartpole-swingup")
    first, second = environment.start(), environment.start()
    assert not np.array_equal(first.observation, second.observation)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("dmc/quadruped-run", "dmc/quadruped-run"),
        ("DMC/Quadruped_Run", "dmc/quadruped-run"),
        ("dmc/quadrupedrun", "dmc/quadruped-run"),
        ("dmc/Ball in cup catch", "dmc/ball_in_cup-catch"),
        ("dmc/cartpole-swingup_sparse", "dmc/cartpole-swingup_sparse"),
        ("dmc/point-mass-easy", "dmc/point_mass-easy"),
        ("dmc/humanoid_cmu/walk", "dmc/humanoid_CMU-walk"),
    ],
)
def test_any_spelling_is_the_same_task(name: str, task: str) -> None:
    assert canonical_game(name) == task


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("dmc/quadruped-rum", "did you mean quadruped-run"),
        ("dmc/walker", "did you mean .*walker-"),
        ("dmc/tetris", r"give one of the suite's 51 tasks, such as quadruped-run"),
        ("dmc/quadruped-run+cartpole-swingup", "unknown task of the control suite"),
    ],
)
def test_an_unknown_task_names_near_ones(name: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        canonical_game(name)


def test_every_task_is_found_by_its_letters_alone() -> None:
    for task in DMC.games:
        assert canonical_game("dmc/" + task.replace("_", "").replace("-", "").upper()) == f"dmc/{task}"


def test_scores_are_shares_of_the_greatest() -> None:
    assert reference_scores("dmc/quadruped-run") == (0, 1_000)
    assert reference_scores("dmc/lqr-lqr_2_1") is None
    assert human_normalized_score("dmc/quadruped-run", 500.0) is None
    assert normalization(["dmc/quadruped-run"]).startswith("Maximum-normalised: 0 is a return of 0, 1 one of 1,000")
    assert zeros_of(["dmc/quadruped-run", "mujoco/Hopper-v5", "dmc/fish-swim"]) == "0 and random"


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _suite.cache_clear()
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(Unplayable, match=r"pip install 'growtrain\[dmc\]'"):
        lanes("cartpole-swingup")


@pytest.mark.parametrize("renderer", [{"MUJOCO_GL": "disable"}, {"PYOPENGL_PLATFORM": "glx"}], ids=["none", "no EGL"])
def test_where_nothing_can_draw_it_is_played_all_the_same(renderer: dict[str, str]) -> None:
    script = (
        "import os, pytest\n"
        "from growtrain.environments.dmc import SuiteEnvironment\n"
        "from growtrain.environments.games import Unplayable\n"
        "environment = SuiteEnvironment(game='dmc/cartpole-swingup', num_envs=1, seed=0)\n"
        "environment.start()\n"
        "for draws in (environment.picture, lambda: SuiteEnvironment(game='dmc/quadruped-escape', num_envs=1, seed=0)):\n"
        "    with pytest.raises(Unplayable, match='install EGL, or OSMesa'):\n"
        "        draws()\n"
        "print(os.environ.get('MUJOCO_GL'))\n"
    )
    kept = {
        name: value for name, value in os.environ.items() if name not in {"MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"}
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=kept | renderer)
    assert done.stdout == f"{renderer.get('MUJOCO_GL')}\n", done.stderr
