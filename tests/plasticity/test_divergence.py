"""Values beyond any return are told from lost plasticity."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_sac

pytest.importorskip("mujoco")

from growtrain.diagnosis.copies import agent_of
from growtrain.diagnosis.forks import diagnose
from growtrain.diagnosis.page import Settings, next_command, render
from growtrain.learners.sac import SAC
from growtrain.plasticity.divergence import Divergence, largest_return, measure_divergence
from growtrain.plasticity.learning_test import LearningTest, compare_copies, copies_of, make_task
from growtrain.runs.checkpoint import open_newest
from growtrain.runs.loop import train

CPU = torch.device("cpu")
TEST = LearningTest(seeds=3, updates=30, warm_up=5, transitions=64, lr=1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("runs") / "run"
    for _ in train(tiny_sac(), path):
        pass
    return path


def test_the_largest_return_is_that_of_the_largest_reward_for_ever() -> None:
    assert largest_return(2.0, 0.5, 0.9) == pytest.approx(25)
    assert largest_return(2.0, 0.0, 1.0) == float("inf")
    for healthy in (25, 27, 50):  # approximations of the bound itself are above it
        assert not Divergence(value=healthy, bound=25).diverged
    assert Divergence(value=51, bound=25).diverged
    assert Divergence(value=float("nan"), bound=25).diverged
    assert not Divergence(value=1, bound=0).diverged  # no reward was seen: nothing is known


def test_an_agents_values_are_within_the_bound_until_they_are_not(run: Path) -> None:
    learner, ring = agent_of(open_newest(run), CPU)
    assert isinstance(learner, SAC)
    rewards = ring.get(torch.from_numpy(ring.valid.nonzero()[0]))["next", "reward"]
    alpha = float(learner.log_alpha.detach().exp())
    found = measure_divergence(learner, ring)
    assert found.bound == pytest.approx((float(rewards.abs().max()) + 3 * alpha) / 0.01, rel=1e-5)
    assert not found.diverged
    for times, diverged in ((1.2, False), (1.8, False), (2.2, True)):
        with torch.no_grad():
            for name in ("critic_1", "critic_2"):
                learner.online[name].head.live[-1].bias.fill_(times * found.bound)  # type: ignore[union-attr,index,operator]
        moved = measure_divergence(learner, ring)
        assert moved.value == pytest.approx(times * found.bound, rel=0.1)
        assert moved.diverged is diverged


def test_critic_and_actor_have_verdicts_of_their_own_and_share_the_forks_that_they_can(
    run: Path, tmp_path: Path
) -> None:
    checkpoint = open_newest(run)
    settings = Settings(frames=80, seeds=1, arms=("untouched", "inject", "fresh-optimizer"), test=TEST)
    found = {
        part: diagnose(run, checkpoint, settings, tmp_path, say=lambda _: None, part=part)
        for part in ("critic", "actor")
    }
    made = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert made == {"untouched-s0", "fresh-optimizer-s0", "inject-critic-s0", "inject-actor-s0"}
    for part, each in found.items():
        assert each is not None
        judged = {"fresh-optimizer"} if part == "critic" else set()
        assert set(each.errors) == {"current", "inject", "reset-head"} | judged
        assert each.divergence is not None
        assert not each.divergence.diverged
        assert f", the {part}" in render(each)
        assert (tmp_path / f"diagnosis-{part}.json").exists()
        config = open_newest(tmp_path / f"inject-{part}-s0").config
        assert config.grow == part
    assert found["critic"].errors != found["actor"].errors  # type: ignore[union-attr]


def test_diverged_values_are_said_instead_of_lost_plasticity(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("growtrain.diagnosis.forks.measure_divergence", lambda *_: Divergence(value=4e5, bound=1e3))
    settings = Settings(frames=80, arms=(), test=TEST)
    found = diagnose(run, open_newest(run), settings, tmp_path, say=lambda _: None, part="critic")
    assert found is not None
    assert found.verdict.outcome == "cannot tell"
    assert "values have diverged: |Q| is up to 4e+05" in render(found)
    assert "--intervention reset-head --grow critic" in next_command(found)


@pytest.mark.parametrize("network", ["critic_1", "actor"])
def test_the_learning_test_asks_of_each_network_what_the_replay_says(run: Path, network: str) -> None:
    learner, ring = agent_of(open_newest(run), CPU)
    assert isinstance(learner, SAC)
    before = {name: value.clone() for name, value in learner.online[network].state_dict().items()}
    task = make_task(learner, ring, TEST, np.random.default_rng(0), network)
    assert float(task.change.square().mean().sqrt()) == pytest.approx(TEST.size, rel=1e-4)
    copies = copies_of(learner.config, encoder_frozen=True, network=network)
    test = dataclasses.replace(TEST, updates=100, lr=3e-3)
    curves = compare_copies(learner, ring, test, np.random.SeedSequence(0), copies, network=network)
    assert all(curve[-1] < 0.9 for each in curves.values() for curve in each)  # every copy learns
    assert all(torch.equal(value, before[name]) for name, value in learner.online[network].state_dict().items())
    if network == "actor":  # against the difference quotient of the critics' value
        state, output = task.observation[:1], int(task.action[0])
        mean = learner.act(state)[:, : learner.spec.num_actions]
        step = torch.zeros_like(mean)
        step[0, output] = 1e-3
        values = [float(learner.values(state, torch.tanh(mean + sign * step))) for sign in (1, -1)]
        slope = float(learner.improvement(state)[0, output])
        assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.05, abs=2e-3)
