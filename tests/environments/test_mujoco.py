"""MuJoCo's lanes against Gymnasium's own environments, their exact snapshots, and what ends an episode and what only cuts it."""

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("mujoco")

from growtrain.environments.games import MUJOCO, canonical_game
from growtrain.environments.lanes import lane_seed
from growtrain.environments.make import make_environment, spec_of
from growtrain.environments.mujoco import MujocoEnvironment
from growtrain.learners.losses import soft_target
from growtrain.learners.make import make_learner
from growtrain.learners.sac import SAC
from growtrain.replay.make import make_ring, replay_bytes
from growtrain.replay.vectors import VectorRing
from growtrain.runs.acting import Collector
from growtrain.settings.config import Config
from growtrain.settings.presets import sac


def lanes(game: str, num_envs: int = 1, **options: Any) -> MujocoEnvironment:
    return MujocoEnvironment(game=f"mujoco/{game}", num_envs=num_envs, seed=3, **options)


def draw(rng: np.random.Generator, environment: MujocoEnvironment) -> Any:
    return rng.uniform(-1, 1, (environment.num_envs, environment.spec.num_actions)).astype(np.float32)


@pytest.mark.parametrize("game", ["Hopper", "Reacher", "Humanoid"])
def test_a_lane_plays_what_gymnasium_plays(game: str) -> None:
    ours, rng = lanes(game, 2), np.random.default_rng(0)
    theirs = [gymnasium.make(f"{game}-v5") for _ in range(2)]
    low, high = theirs[0].action_space.low, theirs[0].action_space.high  # type: ignore[attr-defined]
    step = ours.start()
    first = [env.reset(seed=lane_seed(3, lane, 0))[0] for lane, env in enumerate(theirs)]
    np.testing.assert_array_equal(step.observation, np.float32(first))
    returns, ended = np.zeros(2), 0
    for _ in range(120):
        actions = draw(rng, ours)
        ours.send(actions)
        step = ours.recv()
        finished = []
        for lane, env in enumerate(theirs):
            seen, reward, terminated, truncated, _ = env.step((low + high) / 2 + actions[lane] * (high - low) / 2)
            returns[lane] += float(reward)
            assert step.reward[lane] == np.float32(reward)
            assert (step.terminated[lane], step.truncated[lane]) == (terminated, truncated and not terminated)
            np.testing.assert_array_equal(step.frame[lane], np.float32(seen))
            if terminated or truncated:
                seen, ended = env.reset()[0], ended + 1
                finished.append(returns[lane])
                returns[lane] = 0
            np.testing.assert_array_equal(step.observation[lane], np.float32(seen))
        np.testing.assert_array_equal(step.episode_returns, finished)
    assert ended


@pytest.mark.parametrize("game", [name.removesuffix("-v5") for name in MUJOCO.games])
def test_a_snapshot_goes_on_bit_for_bit(game: str) -> None:
    first, rng = lanes(game, 2), np.random.default_rng(0)
    first.start()
    for _ in range(70):
        first.send(draw(rng, first))
        first.recv()
    state = first.state_dict()
    second = MujocoEnvironment(game=f"mujoco/{game}", num_envs=2, seed=0)
    resumed = second.load_state_dict(state)
    np.testing.assert_array_equal(resumed.observation, first._quiet_step().observation)
    for _ in range(70):
        actions = draw(rng, first)
        for each in (first, second):
            each.send(actions)
        ours, theirs = first.recv(), second.recv()
        for item in dataclasses.fields(ours):
            np.testing.assert_array_equal(getattr(ours, item.name), getattr(theirs, item.name))
    elsewhere = state | {"observation": state["observation"] + 1e-12}
    with pytest.raises(ValueError, match="do not lead where they had led"):
        second.load_state_dict(elsewhere)
    with pytest.raises(ValueError, match=r"of shape"):
        second.load_state_dict(state | {"actions": state["actions"][1:]})


def collected(config: Config, steps: int) -> tuple[VectorRing, list[dict[str, Any]], list[Any]]:
    """A replay that a run's collector has filled with random play, naive transitions of the same play, and those that ended an episode."""
    environment = make_environment(config, seed=5)
    ring = make_ring(config, environment.spec, rng=np.random.default_rng(0), device=torch.device("cpu"))
    assert isinstance(ring, VectorRing)
    assert ring.nbytes == replay_bytes(config, environment.spec)
    collector = Collector(environment, ring, config, np.random.default_rng(2))
    env = gymnasium.make(config.game.removeprefix("mujoco/"))
    seen, naive = env.reset(seed=lane_seed(5, 0, 0))[0], []
    for _ in range(steps):
        collector.act(lambda _: torch.zeros(1, 2 * environment.spec.num_actions))
        assert collector._actions is not None
        action = collector._actions[0]
        collector.receive()
        following, reward, terminated, truncated, _ = env.step(action)
        naive.append(
            {"s": seen, "a": action, "r": reward, "next": following, "terminated": terminated, "cut": truncated}
        )
        seen = env.reset()[0] if terminated or truncated else following
    return ring, naive, [each for each in naive if each["terminated"] or each["cut"]]


@pytest.mark.parametrize(("game", "steps", "cut"), [("Hopper", 400, False), ("HalfCheetah", 2_050, True)])
def test_what_is_cut_off_is_bootstrapped_from_its_true_last_observation_and_what_ends_is_not(
    game: str, steps: int, cut: bool
) -> None:
    config = sac(game=f"mujoco/{game}", width=8, learning_starts=5_000, replay_capacity=3_000)
    ring, naive, ends = collected(config, steps)
    ring.check_valid()
    assert len(ends) >= 2
    assert all(each["cut"] == cut and each["terminated"] != cut for each in ends)
    batch = ring.get(torch.from_numpy(np.flatnonzero(ring.valid)))  # in the order in which it was played
    assert len(batch) == len(naive)
    columns = {
        "s": batch["observation"],
        "a": batch["action"],
        "r": batch["next", "reward"][:, 0],
        "next": batch["next", "observation"],
        "terminated": batch["next", "terminated"][:, 0],
    }
    for name, column in columns.items():
        expected = np.array([each[name] for each in naive])
        np.testing.assert_array_equal(column.numpy(), expected.astype(column.numpy().dtype))
    learner = make_learner(config, spec_of(config), device=torch.device("cpu"), generator=torch.Generator())
    assert isinstance(learner, SAC)
    # Only the rows at which episodes ended, of the critics' loss: against a return that is written down by hand.
    places = [index for index, each in enumerate(naive) if each["terminated"] or each["cut"]]
    last: TensorDict = batch[torch.tensor(places)]
    noise = torch.zeros(2, len(places), learner.spec.num_actions)
    loss = learner.losses(last, noise)[0]["critic"].detach()
    total = 0.0
    with torch.no_grad():
        for each in ends:
            mean, log_std = learner.act(torch.tensor(each["next"]).float()[None]).chunk(2, -1)
            action = torch.tanh(mean)
            log_pi = (-log_std - 0.5 * np.log(2 * np.pi) - torch.log(1 - action**2)).sum()
            there = torch.cat([torch.tensor(each["next"]).float()[None], action], -1)
            value = min(float(target(there)) for target in learner.targets.values()) - float(log_pi)
            y = each["r"] + (0.0 if each["terminated"] else config.discount * value)
            here = torch.cat([torch.tensor(each["s"]).float(), torch.from_numpy(each["a"])])[None]
            total += sum((float(learner.online[name](here)) - y) ** 2 for name in ("critic_1", "critic_2"))
    assert float(loss) == pytest.approx(total / len(ends) / 2, rel=1e-4)
    flipped = last.clone()
    flipped["next", "terminated"] = ~flipped["next", "terminated"]
    wrong = learner.losses(flipped, noise)[0]["critic"].detach()
    assert float(wrong) != pytest.approx(total / len(ends) / 2, rel=1e-3)


def test_shapes_that_would_broadcast_are_refused() -> None:
    column = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="need rewards"):
        soft_target(torch.zeros(4), column, (column, column), torch.zeros(4), torch.zeros(()))


def test_actions_out_of_range_are_refused_and_nothing_is_sent() -> None:
    environment = lanes("Hopper", 2)
    environment.start()
    with pytest.raises(ValueError, match=r"lane 1: an action of Hopper-v5 lies in \[-1, 1\]"):
        environment.send(np.array([[0, 0, 0], [0, np.nan, 0]], np.float32))
    with pytest.raises(ValueError, match=r"need \(2, 3\) float32 actions"):
        environment.send(np.zeros((2, 2), np.float32))
    with pytest.raises(RuntimeError, match="nothing was sent"):
        environment.recv()


@pytest.mark.parametrize(
    "name", ["mujoco/HalfCheetah-v5", "MuJoCo/half_cheetah", "mujoco/halfcheetah", "mujoco/Half Cheetah v5"]
)
def test_any_spelling_is_the_same_task(name: str) -> None:
    assert canonical_game(name) == "mujoco/HalfCheetah-v5"


def test_other_names_and_versions_are_answered() -> None:
    with pytest.raises(ValueError, match="choose one of Ant, HalfCheetah, Hopper"):
        canonical_game("mujoco/frog")
    with pytest.raises(ValueError, match="Hopper-v5 is the one that is played"):
        canonical_game("mujoco/Hopper-v4")


def test_it_is_a_torchrl_environment() -> None:
    rollout = lanes("Hopper", 3).rollout(5)
    assert rollout["observation"].shape == (3, 5, 11)
    assert rollout["action"].shape == (3, 5, 3)
    assert rollout["observation"].dtype == torch.float32
