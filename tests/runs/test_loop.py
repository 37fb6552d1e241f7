"""Whole runs on real ALE games, small enough for two cores: the files, the counters, the null, determinism."""

import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import nn

from growtrain.__main__ import main
from growtrain.environments.atari import FRAME_SKIP
from growtrain.environments.make import make_environment
from growtrain.growth.kinds import KINDS
from growtrain.growth.transaction import GrowthFailed
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.networks.injected import trains
from growtrain.records import Evaluation, GrowthEvent, Metrics, Record
from growtrain.runs.acting import epsilon_greedy
from growtrain.runs.checkpoint import load_learner, open_newest
from growtrain.runs.loop import train
from growtrain.runs.run import Run
from growtrain.settings.budget import epsilon_at, updates_due
from growtrain.settings.config import Config
from growtrain.telemetry.gpu import AbsentMonitor
from growtrain.telemetry.sinks import read_jsonl

SETTINGS: dict[str, Any] = {
    "schedule": "grow3x",
    "total_frames": 6_400,
    "num_envs": 4,
    "learning_starts": 400,
    "epsilon_decay_frames": 2_000,
    "target_period": 800,
    "replay_capacity": 2_000,
    "eval_period": 3_200,
    "eval_frames": 320,
    "log_period": 1_600,
    "checkpoint_period": 3_200,
}


def config_of(**changes: Any) -> Config:
    return tiny(**SETTINGS | changes)


def final_weights(config: Config, run_dir: Path) -> dict[str, torch.Tensor]:
    for _ in train(config, run_dir):
        pass
    return load_learner(run_dir, torch.device("cpu"))[0].online.state_dict()


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    run_dir = tmp_path_factory.mktemp("grown") / "run"
    return run_dir, list(train(config_of(), run_dir))


def test_a_grown_run_leaves_what_the_design_says(grown: tuple[Path, list[Record]]) -> None:
    run_dir, records = grown
    events = read_jsonl(run_dir / "growth_events.jsonl")
    assert [e["frames"] for e in events] == [800, 1600, 3200]
    assert [e["stage"] for e in events] == [1, 2, 3]
    assert all(e["max_abs_q_change_online"] == e["max_abs_q_change_target"] == 0 for e in events)
    assert all(e["parameters_trainable"] == e["parameters_trainable_before"] for e in events)
    metrics = read_jsonl(run_dir / "metrics.jsonl")
    assert [m["frames"] for m in metrics] == [1600, 3200, 4800, 6400]
    assert metrics[-1]["stage"] == 3
    assert all(m["agent_steps"] * FRAME_SKIP == m["frames"] for m in metrics)
    assert all(m["episode_return"] is None for m in metrics if m["episodes"] == 0)
    assert all(np.isfinite(m["loss"]) for m in metrics)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["frames"] == 6400
    assert summary["updates"] == (6400 - 400) // 4 // 4
    assert [s["frames"] for s in summary["stages"]] == [800, 800, 1600, 3200]
    assert sum(s["updates"] for s in summary["stages"]) == summary["updates"]
    assert summary["gpu"]["available"] is torch.cuda.is_available()
    flops = [s["flops_per_update"] for s in summary["stages"]]
    assert flops == sorted(flops)
    assert {"config", "versions", "device", "git_commit", "fingerprint"} <= set(
        json.loads((run_dir / "config.json").read_text())
    )
    assert len([r for r in records if isinstance(r, GrowthEvent)]) == 3
    assert len([r for r in records if isinstance(r, Evaluation)]) == 2
    assert len([r for r in records if isinstance(r, Metrics)]) == 4
    assert list((run_dir / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("schedule", "kind", "width"),
    [
        ("reset", "reset-head", 1),
        ("shrink-perturb", "shrink-perturb", 1),
        ("widen3x", "net2wider", 4),
        ("redo", "redo", 1),
    ],
)
def test_a_run_of_every_schedule_to_compare_with(
    schedule: str, kind: str, width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(
        schedule=schedule,
        total_frames=2_400,
        learning_starts=200,
        redo_period=600,
        redo_tau=0.2,
        eval_period=0,
        diagnostics_period=1_600,
    )
    list(train(config, tmp_path))
    events = read_jsonl(tmp_path / "growth_events.jsonl")
    assert [e["frames"] for e in events] == ([608, 1200, 1808] if kind == "redo" else [304, 608, 1200])
    assert [e["stage"] for e in events] == ([0, 0, 0] if kind == "redo" else [1, 2, 3])  # redo has one stage
    assert {e["kind"] for e in events} == {kind}
    changes = [(e["max_abs_q_change_online"], e["max_abs_q_change_target"]) for e in events]
    if kind == "net2wider":
        assert all(max(change) < 1e-4 for change in changes)
        assert all(e["parameters_trainable"] > e["parameters_trainable_before"] for e in events)
    else:
        assert all(online > 0 for online, _ in changes)
        assert all((target > 0) == (kind != "redo") for _, target in changes)
        assert all(e["parameters_trainable"] == e["parameters_trainable_before"] for e in events)
    measured = {(d["frames"], d["when"]): d["stage"] for d in read_jsonl(tmp_path / "diagnostics.jsonl")}
    around = events[0::2] if kind == "redo" else events  # once in a period
    assert measured == (
        {(e["frames"], "before growth"): e["stage"] - (kind != "redo") for e in around}
        | {(e["frames"], "after growth"): e["stage"] for e in around}
        | {(m["frames"], "period"): m["stage"] for m in read_jsonl(tmp_path / "metrics.jsonl") if m["frames"] == 1600}
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [s["frames"] for s in summary["stages"]] == ([2400] if kind == "redo" else [304, 304, 592, 1200])
    assert summary["updates"] == (2400 - 200) // 16
    assert load_learner(tmp_path, torch.device("cpu"))[0].width == 32 * width
    assert main(["evaluate", str(tmp_path), "--eval-frames", "80"]) == 0
    assert json.loads(capsys.readouterr().out)["stage"] == events[-1]["stage"]  # though nothing was injected


def test_what_recurs_often_is_measured_around_once_in_a_period(tmp_path: Path) -> None:
    config = tiny(
        schedule="redo", total_frames=2_400, learning_starts=200, redo_period=320, diagnostics_period=960, eval_period=0
    )
    list(train(config, tmp_path))
    around = [d for d in read_jsonl(tmp_path / "diagnostics.jsonl") if d["when"] == "before growth"]
    grown = [e["frames"] for e in read_jsonl(tmp_path / "growth_events.jsonl")]
    assert grown == [320, 640, 960, 1280, 1600, 1920, 2240]
    assert [d["frames"] for d in around] == [320, 960, 1920]
    summary = json.loads((tmp_path / "summary.json").read_text())
    ended = sum(m["episodes"] for m in read_jsonl(tmp_path / "metrics.jsonl"))
    assert summary["final_return_episodes"] == ended
    assert summary["final_return_source"] == f"last {ended} training episodes"


def test_the_saved_network_is_rebuilt_with_its_heads(grown: tuple[Path, list[Record]]) -> None:
    learner, config, frames, _ = load_learner(grown[0], torch.device("cpu"))
    assert (config, frames) == (config_of(), 6400)
    assert learner.head.spec()["injections"] == ["frozen"] * 3
    assert learner.updates == 375


def test_the_null_a_schedule_that_never_fires_is_plain_double_dqn(tmp_path: Path) -> None:
    """Bit for bit the parameters of a plain network, stepped by hand with nothing of growth in it."""
    config = config_of(schedule="fixed", eval_period=0, checkpoint_period=0)
    trained = final_weights(config, tmp_path / "run")

    streams = np.random.SeedSequence(config.entropy).spawn(5)
    weights, episodes, exploration, sampling, _ = (int(s.generate_state(1, np.uint64)[0]) for s in streams)
    from growtrain.replay.frames import FrameRing
    from growtrain.runs.acting import Collector

    ring = FrameRing(
        config.replay_capacity,
        config.num_envs,
        rng=np.random.default_rng(sampling),
        frame_shape=(1, 84, 84),
        stack_size=4,
    )
    environment = make_environment(config, seed=episodes)
    collector = Collector(environment, ring, config, np.random.default_rng(exploration))
    generator = torch.Generator().manual_seed(weights)
    learner = DoubleDQN(config, environment.spec, width=32, device=torch.device("cpu"), generator=generator)
    plain = nn.Sequential(learner.online.encoder, learner.head.live)  # no InjectedHead anywhere
    lagging = nn.Sequential(learner.target.encoder, learner.target.head.live)  # type: ignore[arg-type]
    updates = 0

    def learn() -> None:
        nonlocal updates
        for _ in range(updates_due(config, collector.agent_steps) - updates):
            batch = ring.sample(config.batch_size)
            with torch.no_grad():
                best = plain(batch["next", "observation"]).argmax(1, keepdim=True)
                value = lagging(batch["next", "observation"]).gather(1, best)
                goal = batch["next", "reward"] + config.discount * (~batch["next", "terminated"]).float() * value
            loss = nn.functional.smooth_l1_loss(plain(batch["observation"]).gather(1, batch["action"][:, None]), goal)
            learner.optimizer.zero_grad()
            loss.backward()
            learner.optimizer.step()
            updates += 1

    while collector.frames < config.total_frames:
        with torch.no_grad():
            collector.act(plain)
        learn()
        collector.receive()
        if collector.frames % config.target_period == 0 and updates:
            lagging.load_state_dict(plain.state_dict())
    learn()
    environment.close()
    for name, tensor in learner.online.state_dict().items():
        assert torch.equal(tensor, trained[name]), name


def test_same_seed_same_parameters_and_measuring_changes_nothing(
    grown: tuple[Path, list[Record]], tmp_path: Path
) -> None:
    first = load_learner(grown[0], torch.device("cpu"))[0].online.state_dict()
    unmeasured = config_of(eval_period=0, log_period=6_400, checkpoint_period=0)
    second = final_weights(unmeasured, tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    third = final_weights(dataclasses.replace(unmeasured, seed=1), tmp_path / "third")
    assert not torch.equal(first["encoder.layers.0.weight"], third["encoder.layers.0.weight"])


@pytest.mark.parametrize("num_envs", [1, 8, 64])
@pytest.mark.parametrize("replay_ratio", [0.25, 1.0, 1 / 3, 0.1, 2.0])
def test_updates_owed_are_exact(num_envs: int, replay_ratio: float) -> None:
    config = config_of(num_envs=num_envs, replay_ratio=replay_ratio, learning_starts=FRAME_SKIP * 64)
    total, done = 0, 0
    for _ in range(1_000):
        total += num_envs
        done += updates_due(config, total) - done
    exact = max(0, total - 64) * replay_ratio
    assert done == int(exact + 1e-9)


def test_epsilon_is_the_presets_line() -> None:
    config = Config()
    assert epsilon_at(config, 0) == epsilon_at(config, 200_000) == 1.0
    assert epsilon_at(config, 2_200_000) == pytest.approx(1 - 0.99 / 2)
    assert epsilon_at(config, 4_200_000) == pytest.approx(0.01)
    assert epsilon_at(config, 200_000_000) == pytest.approx(0.01)


def test_epsilon_greedy_has_its_distribution() -> None:
    q = np.tile(np.array([0.0, 3.0, 1.0], dtype=np.float32), (60_000, 1))
    counts = np.bincount(epsilon_greedy(q, 0.3, np.random.default_rng(0)), minlength=3) / 60_000
    assert counts == pytest.approx([0.1, 0.8, 0.1], abs=0.01)
    assert (epsilon_greedy(q, 0.0, np.random.default_rng(0)) == 1).all()


def test_stopping_early_leaves_a_checkpoint_and_says_so(tmp_path: Path) -> None:
    calls = iter(range(10**6))
    list(train(config_of(), tmp_path / "run", should_stop=lambda: next(calls) >= 150))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["reason"], summary["frames"]) == ("stopped", None, 150 * 16)
    assert load_learner(tmp_path / "run", torch.device("cpu"))[2] == 150 * 16


def test_a_failed_growth_stops_or_goes_on_as_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory for heads")

    monkeypatch.setitem(KINDS, "inject", dataclasses.replace(KINDS["inject"], make=fails))
    with pytest.raises(GrowthFailed, match="no memory"):
        list(train(config_of(), tmp_path / "stop"))
    summary = json.loads((tmp_path / "stop" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["reason"].startswith("GrowthFailed: ")
    assert "no memory for heads" in summary["reason"]
    with pytest.warns(UserWarning, match="goes on ungrown"):
        list(train(config_of(on_growth_failure="continue", total_frames=2_400, schedule="grow1x"), tmp_path / "go"))
    summary = json.loads((tmp_path / "go" / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("done", None)
    assert read_jsonl(tmp_path / "go" / "growth_events.jsonl") == []
    # Not those of a head that never came.
    assert [stage["flops_per_update"] for stage in summary["stages"]] == [None, None]


@pytest.mark.parametrize("fails_too", [False, True])
def test_a_growth_that_is_skipped_freezes_the_encoder_that_was_to_freeze_with_it(
    fails_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or, where that is what fails, says that it goes on learning."""

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    settings = {"on_growth_failure": "continue", "total_frames": 2_400, "schedule": "grow1x", "freeze_encoder_at": 1}
    monkeypatch.setitem(KINDS, "inject", dataclasses.replace(KINDS["inject"], make=fails))
    if fails_too:
        monkeypatch.setattr("growtrain.growth.transaction._check_membership", fails)
    with pytest.warns(UserWarning, match="goes on") as warned:
        list(train(config_of(**settings), tmp_path / "run"))
    said = [str(each.message) for each in warned]
    learner = load_learner(tmp_path / "run", torch.device("cpu"))[0]
    goes_on = any("the encoder goes on learning" in line for line in said)
    assert trains(learner.networks["q_network"][0].get_submodule("encoder")) == goes_on == fails_too
    held = sum(len(group["params"]) for group in learner.optimizer.param_groups)
    assert held == len(learner.trainable())
    assert len(learner.state_dict()["optimizer"]) == held


class FakeMonitor(AbsentMonitor):
    """A GPU that was watched for 2 s."""

    def summary(self) -> dict[str, Any]:
        watched = {"seconds": 2.0, "utilization_mean": 50.0, "utilization_samples": 5, "power_watts_mean": 100.0}
        energy = {"energy_joules": 200.0, "energy_source": "NVML energy counter"}
        return {"available": True, **watched, **energy, "memory_peak_bytes": 7, "lost": None}


def test_energy_is_that_of_the_whole_run_however_often_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("growtrain.runs.run.open_monitor", lambda device: FakeMonitor("fake"))
    config, start = config_of(schedule="fixed", total_frames=1_600, eval_period=0, log_period=200), None
    for stop_at in (400, 800, 10_000):
        seen = [0]
        for record in train(config, tmp_path, should_stop=lambda: seen[-1] >= stop_at, start=start):  # noqa: B023
            seen.append(record.frames)
        start = open_newest(tmp_path)
        gpu = json.loads((tmp_path / "summary.json").read_text())["gpu"]
    assert (gpu["energy_joules"], gpu["seconds"], gpu["utilization_samples"]) == (600.0, 6.0, 15)
    assert (gpu["utilization_mean"], gpu["power_watts_mean"], gpu["memory_peak_bytes"]) == (50.0, 100.0, 7)


def test_a_run_gives_its_memory_back_before_the_next_takes_any(tmp_path: Path) -> None:
    gc.disable()
    try:
        first = Run(config_of(), tmp_path / "first")
        first.collector.environment.close()
        replay = weakref.ref(first.ring)
        del first
        Run(config_of(), tmp_path / "second").collector.environment.close()
        assert replay() is None
    finally:
        gc.enable()
