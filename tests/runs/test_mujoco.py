"""Whole runs on MuJoCo: they go on bit for bit wherever they were killed, grown or not, and every tool works on them."""

import dataclasses
import html
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import children
import pytest
import torch

pytest.importorskip("mujoco")

from growtrain.__main__ import main
from growtrain.diagnosis.forks import fork_config
from growtrain.diagnosis.page import Settings
from growtrain.environments.games import Unplayable
from growtrain.environments.make import spec_of
from growtrain.environments.mujoco import MujocoEnvironment
from growtrain.learners.optimizers import can_compile
from growtrain.learners.sac import SAC
from growtrain.planning.costs import full_width, make_plan
from growtrain.planning.speed import synthetic_batches
from growtrain.runs.checkpoint import load_learner, open_newest
from growtrain.runs.loop import train
from growtrain.runs.resuming import changed_config
from growtrain.runs.run import Run
from growtrain.settings.config import Config
from growtrain.settings.presets import resolve, sac
from growtrain.settings.text import ConfigError
from growtrain.telemetry.sinks import read_jsonl

FLAGS: dict[str, Any] = {
    "game": "mujoco/Hopper-v5",
    "schedule": "at:150,300",
    "total_frames": 480,
    "num_envs": 2,
    "width": 16,
    "learning_starts": 40,
    "replay_capacity": 300,
    "batch_size": 16,
    "replay_ratio": 0.25,
    "eval_period": 240,
    "eval_episodes": 2,
    "log_period": 80,
    "diagnostics_period": 160,
    "checkpoint_period": 80,
    "device": "cpu",
}


def words(**changes: Any) -> list[str]:
    return [str(word) for name, value in (FLAGS | changes).items() for word in (f"--{name.replace('_', '-')}", value)]


def everything(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint."""

    def flat(tree: dict[str, Any], path: str = "") -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                found |= flat(value, f"{path}{name}/")
            elif isinstance(value, torch.Tensor):
                found[path + name] = value
        return found

    return flat(open_newest(run).state)


@pytest.mark.parametrize(
    "settings",
    [{}, {"anchor": "mirrored", "grow": "critic"}, {"freeze": "network", "grow": "actor", "normalization": "layer"}],
    ids=["both", "critics", "actor frozen whole"],
)
def test_killed_and_resumed_it_ends_bit_for_bit_as_one_never_killed(settings: dict[str, Any], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*words(**settings), "--run-dir", str(whole)]) == 0
    script = (
        "import os, signal, sys\n"
        "from growtrain.__main__ import main\n"
        "from growtrain.runs.run import Run\n"
        "step = Run.step\n"
        "def dying(run):\n"
        "    if run.frames == 370: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    step(run)\n"
        "Run.step = dying\n"
        "main(sys.argv[1:])\n"
    )
    command = [*words(**settings), "--run-dir", str(killed)]
    assert children.run(command, script).returncode == -signal.SIGKILL
    assert open_newest(killed).frames == 320
    assert children.run(["resume", str(killed)]).returncode == 0
    ours, theirs = everything(whole), everything(killed)
    assert ours.keys() == theirs.keys()
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert not different
    for stem in ("evaluations", "growth_events", "diagnostics"):
        records = [read_jsonl(run / f"{stem}.jsonl") for run in (whole, killed)]
        timed = {"wall_seconds", "pause_seconds", "seconds"}
        kept = [[{k: v for k, v in record.items() if k not in timed} for record in each] for each in records]
        assert kept[0] == kept[1]
        assert kept[0]
    events = read_jsonl(killed / "growth_events.jsonl")
    assert len(events) == 2
    for event in events:
        assert all(change == 0 for each in event["changes"].values() for change in each)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_with_compiled_updates_it_ends_bit_for_bit_as_one_never_stopped(
    tmp_path: Path, compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    monkeypatch.setattr("growtrain.learners.gradient_step.MIN_UPDATES_TO_COMPILE_ALL", 0)
    config, counters = sac(**FLAGS | {"checkpoint_period": 0}), torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    list(train(config, whole))
    steps = itertools.count()
    list(train(config, parts, should_stop=lambda: next(steps) >= 115))  # between the two injections
    assert open_newest(parts).frames == 230
    list(train(config, parts, start=open_newest(parts)))
    assert counters["unique_graphs"] > before  # it was compiled
    ours, theirs = everything(whole), everything(parts)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_fork_with_another_seed_draws_its_own_noise(tmp_path: Path) -> None:
    """And one with the run's seed goes on with the run's, so that nothing but the intervention differs."""
    path = tmp_path / "run"
    for _ in train(sac(**FLAGS | {"total_frames": 160, "schedule": "fixed"}), path):
        pass
    saved = open_newest(path)
    before = saved.state["learner"]["noise"].clone()
    weights = {name: tensor.clone() for name, tensor in everything(path).items() if name.startswith("learner/networks")}
    drawn = []
    for seed in (0, 1, 2):
        config = fork_config(saved, "untouched", seed, Settings(frames=80, seeds=3, arms=("untouched",)))
        fork = Run(config, tmp_path / f"fork{seed}", open_newest(path))
        learner = fork.learner
        assert isinstance(learner, SAC)
        tensors = learner.state_dict()["networks"]
        assert all(
            torch.equal(weights[f"learner/networks/{name}/online/{inside}"], tensor)
            for name, network in tensors.items()
            for inside, tensor in network["online"].items()
        )
        learner.draw()
        drawn.append(learner._noise.clone())
        own = Run(config, tmp_path / f"fresh{seed}").learner
        assert isinstance(own, SAC)
        expected = torch.Generator()
        expected.set_state(own.noise_generator.get_state() if seed else before)
        assert torch.equal(drawn[-1], torch.empty_like(drawn[-1]).normal_(generator=expected))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_a_run_of_a_gpu_is_looked_at_and_goes_on_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sac(**FLAGS | {"total_frames": 240, "schedule": "full3x", "grow": "critic", "eval_period": 0})
    path, saved = tmp_path / "run", SAC.state_dict
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr("growtrain.runs.provenance._device_name", lambda _: "NVIDIA H200")
        # The state of a CUDA generator: seed and offset.
        noise = torch.arange(16, dtype=torch.uint8)
        on_gpu.setattr(SAC, "state_dict", lambda learner: saved(learner) | {"noise": noise})
        for _ in train(config, path, should_stop=lambda: (path / "checkpoints" / f"{160:012d}").exists()):
            pass
    assert open_newest(path).frames < 240
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner, *_ = load_learner(path, torch.device("cpu"))
        assert main(["evaluate", str(path), "--eval-episodes", "1"]) == 0
    with pytest.raises(ConfigError, match="--grow actor: full3x has widened the networks of --grow critic: keep it"):
        changed_config(open_newest(path), {"grow": "actor", "total_frames": 480}, fork=True)
    assert main(["rescue", str(path)]) == 2
    assert "no other schedule goes on from full3x, whose last layer alone is wider" in capsys.readouterr().err
    assert isinstance(learner, SAC)
    drawn = []
    for seed in (0, 0, 1):
        with pytest.warns(UserWarning, match="the noise of updates is another"):
            fork = Run(dataclasses.replace(config, seed=seed), tmp_path / "fork", open_newest(path)).learner
        assert isinstance(fork, SAC)
        fork.draw()
        drawn.append(fork._noise.clone())
    learner.draw()
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], learner._noise)
    assert not torch.equal(drawn[0], drawn[2])
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # said on stderr, not raised
        assert main(["resume", str(path)]) == 0
    said = capsys.readouterr().err
    assert re.search(r"device NVIDIA H200 -> cpu.*: the noise of updates is another from here on", said)
    assert open_newest(path).frames == 240


def test_reset_all_is_reset_head_which_is_all_of_each_network(tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("reset-all", "reset-head")}
    for name, path in runs.items():
        assert main([*words(intervention=name), "--run-dir", str(path)]) == 0
        events = read_jsonl(path / "growth_events.jsonl")
        assert [(event["kind"], event["stage"]) for event in events] == [(name, 1), (name, 2)]
        assert all(min(each) > 0 for event in events for each in event["changes"].values())
    ours, theirs = (everything(path) for path in runs.values())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_every_command_works_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    assert main([*words(), "--run-dir", str(path), "--noop-max", "3", "--split", "conv1", "--target-period", "9"]) == 0
    said = capsys.readouterr().out
    assert "the defaults are those of --preset sac, because of the game" in said
    assert "without effect in this run: --split conv1, --noop-max 3, --target-period 9" in said.replace("\n", " ") or (
        "without effect" in said
        and all(name in said for name in ("--split conv1", "--noop-max 3", "--target-period 9"))
    )
    metrics = read_jsonl(path / "metrics.jsonl")
    assert metrics[-1]["q_mean"] is not None
    assert metrics[-1]["epsilon"] == 0
    assert main(["evaluate", str(path), "--eval-episodes", "3"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(path), "--eval-episodes", "3"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert first["human_normalized_score"] is None
    assert {k: v for k, v in first.items() if k != "wall_seconds"} == {
        k: v for k, v in again.items() if k != "wall_seconds"
    }
    assert main(["inspect", str(path)]) == 0
    assert "2 injections (frozen, frozen)" in capsys.readouterr().out
    assert main(["report", str(path), "--output", str(tmp_path / "report")]) == 0
    report = html.unescape((tmp_path / "report" / "report.md").read_text().replace("\\", ""))
    assert "Stable-Baselines3's SAC after 1M steps on the v3 tasks" in report
    assert "human" not in report.lower()
    capsys.readouterr()
    assert main(["plan", *words(), "--no-timing"]) == 0
    assert "state vectors" not in capsys.readouterr().err
    assert main(["plan", "--game", "mujoco/frog"]) == 2
    assert "choose one of Ant, HalfCheetah" in capsys.readouterr().err


def test_a_video_is_drawn_or_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    path, video = tmp_path / "run", tmp_path / "x.mp4"
    for _ in train(sac(**FLAGS | {"total_frames": 160, "schedule": "fixed"}), path):
        pass
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    command = [sys.executable, "-m", "growtrain", "video", str(path), "--frames", "10", "--output", str(video)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    if done.returncode:
        assert done.returncode == 2
        assert "nothing here can draw MuJoCo's tasks" in done.stderr.splitlines()[-1]
    else:
        assert video.stat().st_size > 1000
    assert "Traceback" not in done.stderr


def test_where_nothing_can_draw_it_the_picture_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = MujocoEnvironment(game="mujoco/hopper", num_envs=1, seed=0, render=True)
    environment.start()

    def fails() -> None:
        raise RuntimeError("no EGL\nat all")

    monkeypatch.setattr(environment._envs[0], "render", fails)
    with pytest.raises(Unplayable, match=r"install EGL, or OSMesa.*RuntimeError: no EGL at all"):
        environment.picture()


def test_the_preset_is_that_of_the_task_and_shrinks_below_a_quarter_of_its_budget() -> None:
    config, notes = resolve(None, {"game": "mujoco/HalfCheetah-v5"})
    assert (config.preset, config.total_frames, config.learning_starts) == ("sac", 1_000_000, 10_000)
    assert resolve(None, {"game": "mujoco/HalfCheetah-v5", "total_frames": 300_000})[0].learning_starts == 10_000
    config, notes = resolve(None, {"game": "mujoco/HalfCheetah-v5", "total_frames": 30_000})
    assert config.learning_starts < 2_000
    assert not any("target_period" in note for note in notes)
    assert config.target_period == sac().target_period  # without effect, it is the same whatever the budget


@pytest.mark.parametrize(
    "changes",
    [{}, {"grow": "critic", "anchor": "zero"}, {"schedule": "full3x"}, {"grow": "actor", "freeze": "network"}],
)
def test_planned_parameters_and_flops_are_those_of_the_learner(changes: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from growtrain.growth.transaction import apply
    from growtrain.learners.make import make_learner
    from growtrain.planning.speed import keep_frozen_values

    config = sac(**FLAGS | changes)
    spec, generator = spec_of(config), torch.Generator().manual_seed(0)
    plan = make_plan(config, spec)
    learner = make_learner(config, spec, device=torch.device("cpu"), generator=generator)
    batches = synthetic_batches(config, spec, 1, generator)
    for stage in plan.stages:
        if stage.stage:
            apply(learner, "inject", learner.inputs(batches[0]), config=config, generator=generator)
            keep_frozen_values(learner, batches)
        online = [network for network, _ in learner.networks.values()]
        assert stage.parameters_total == sum(p.numel() for network in online for p in network.parameters())
        assert stage.parameters_trainable == sum(p.numel() for p in learner.trainable()) - 1  # the temperature
        with FlopCounterMode(display=False) as counter:
            learner.update(batches)
        # The first layer's input needs a gradient in one pass of three, which the plan takes as all of it.
        assert counter.get_total_flops() == pytest.approx(stage.flops_per_update, rel=0.05)
    full = full_width(Config(**config.to_dict()))
    assert full.schedule in ("full2x", "full3x")
