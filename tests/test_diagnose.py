"""Diagnosis and rescue: verdicts by hand, positive controls with damage in a known place, forks that are the run itself."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from growtrain.__main__ import main
from growtrain.checkpoint import open_newest
from growtrain.config import Config, ConfigError
from growtrain.diagnose import diagnose, fork_config
from growtrain.diagnosis import Settings
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learning_test import LearningTest, Task, compare_copies, make_task
from growtrain.telemetry.sinks import read_jsonl
from growtrain.training import Run, train
from growtrain.verdicts import Evidence, interval, verdict
from growtrain.weights import read_weights, recognise

FLAT = [1.0, 1.02, 0.98]


def errors(**gains: float) -> dict[str, list[float]]:
    """Errors of the learning test: `current` near 1, and every copy better by its gain (0 if not named)."""
    copies = ("inject", "reset-head", "reset-encoder", "fresh-optimizer", "fresh-network")
    named = {name.replace("_", "-"): gain for name, gain in gains.items()}
    wobble = np.array([0.01, -0.01, 0.005])  # differences are never exact
    return {"current": FLAT} | {
        copy: [float(v) for v in np.array(FLAT) - named.get(copy, 0.0) + wobble] for copy in copies
    }


@pytest.mark.parametrize(
    ("gains", "outcome", "places"),
    [
        ({}, "not lost", ()),
        ({"inject": 0.4, "reset_head": 0.3}, "lost", ("head",)),
        ({"reset_encoder": 0.4, "fresh_network": 0.5}, "lost", ("encoder",)),
        ({"inject": 0.3, "reset_encoder": 0.5}, "lost", ("encoder", "head")),
        ({"fresh_network": 0.4}, "lost", ("network",)),
        ({"fresh_optimizer": 0.4}, "lost", ("optimizer",)),
        # Fresh parts have fresh slots, which explain their gain unless it is larger still.
        ({"fresh_optimizer": 0.4, "inject": 0.42, "reset_encoder": 0.35}, "lost", ("optimizer",)),
        ({"fresh_optimizer": 0.3, "inject": 0.6}, "lost", ("head", "optimizer")),
    ],
)
def test_the_learning_test_names_the_place(gains: dict[str, float], outcome: str, places: tuple[str, ...]) -> None:
    found = verdict(Evidence(errors=errors(**gains), returns={}), threshold=0.1)
    assert (found.outcome, found.places) == (outcome, places)


def test_contradicting_and_insufficient_evidence_is_no_verdict() -> None:
    forks = {"untouched": [10.0, 10.0, 10.0], "inject": [10.1, 9.9, 10.0]}
    contradicting = verdict(Evidence(errors=errors(inject=0.5), returns=forks, return_scale=10.0))
    assert contradicting.outcome == "cannot tell"
    assert "contradict" in contradicting.sentence
    few = verdict(Evidence(errors={name: values[:2] for name, values in errors(inject=0.5).items()}, returns={}))
    assert few.outcome == "cannot tell"
    assert "fewer than 3 seeds" in few.sentence
    noisy = errors() | {"inject": [0.2, 1.7, 0.6]}
    assert verdict(Evidence(errors=noisy, returns={})).outcome == "cannot tell"
    silent = {"untouched": [None, None, None], "inject": [1.0, None, None]}
    assert verdict(Evidence(errors={}, returns=silent)).outcome == "cannot tell"


def test_intervals_are_students() -> None:
    from scipy import stats

    values = [0.1, 0.4, 0.2, 0.25]
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx(expected, rel=1e-3)
    assert interval(values[:2]) is None


# A run, and damage in it

CPU = torch.device("cpu")
TINY = {
    "game": "breakout", "schedule": "fixed", "num_envs": 2, "width": 32, "encoder_width": 0.25, "batch_size": 8,
    "learning_starts": 200, "epsilon_decay_frames": 500, "target_period": 400, "replay_capacity": 300, "eval_period": 0,
    "log_period": 200, "checkpoint_period": 0, "max_episode_frames": 400, "optimizer": "adam", "lr": 1e-3,
}  # fmt: skip
TEST = LearningTest(seeds=4, transitions=12, updates=80, warm_up=5, marks=1)


def config(**changes: Any) -> Config:
    return Config(**{"total_frames": 1_600, **TINY, **changes})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("diagnose") / "run"
    list(train(config(), run_dir))
    return run_dir


@pytest.fixture
def run_dir(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def kill_head(learner: DoubleDQN) -> None:
    learner.head.live[0].bias.data.fill_(-100)  # type: ignore[index,union-attr]


def kill_encoder(learner: DoubleDQN) -> None:
    next(m for m in learner.online.encoder.modules() if isinstance(m, nn.Conv2d)).bias.data.fill_(-100)  # type: ignore[union-attr]


def poison_optimizer(learner: DoubleDQN) -> None:
    for slots in learner.optimizer.state.values():
        slots["exp_avg_sq"].fill_(1e9)


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (kill_head, "head"),
        (kill_encoder, "encoder"),
        pytest.param(poison_optimizer, "optimizer", marks=pytest.mark.slow),
    ],
)
def test_damage_is_found_where_it_was_done(
    damage: Callable[[DoubleDQN], None], place: str, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noise(*arguments: Any) -> Task:  # frames that are easily told apart, and changes that no single bias can give
        task = make_task(*arguments)
        generator = torch.Generator().manual_seed(int(arguments[-1].integers(2**31)))
        observation = torch.randint(256, task.observation.shape, dtype=torch.uint8, generator=generator)
        return Task(observation, task.action, torch.randn(task.change.shape, generator=generator))

    monkeypatch.setattr("growtrain.learning_test.make_task", noise)
    checkpoint = open_newest(original)
    run = Run(config(), original, checkpoint)
    damage(run.learner)
    before = [p.detach().clone() for p in run.learner.online.parameters()]
    copies = ("current", "inject", "reset-head", "reset-encoder", "fresh-optimizer", "fresh-network")
    test = dataclasses.replace(TEST, updates=250) if place == "optimizer" else TEST
    found = compare_copies(run.learner, run.ring, test, np.random.SeedSequence(1), copies)
    assert all(map(torch.equal, before, run.learner.online.parameters()))
    last = {copy: [curve[-1] for curve in curves] for copy, curves in found.items()}
    assert verdict(Evidence(errors=last, returns={})).places[:1] == (place,), last
    run.collector.environment.close()


def test_a_target_is_the_n_step_return(original: Path) -> None:
    checkpoint = open_newest(original)
    run = Run(config(), original, checkpoint)
    test = LearningTest(seeds=1, transitions=16, updates=1, n_steps=3)
    task = make_task(run.learner, run.ring, test, np.random.default_rng(5))
    valid = np.flatnonzero(run.ring.valid)
    start = np.random.default_rng(5).choice(valid, size=16, replace=False)
    for index, row in enumerate(start.tolist()):  # step by step, one transition at a time
        value, discount = 0.0, 1.0
        for _ in range(3):
            one = run.ring.gather(torch.tensor([row]))
            value += discount * float(one.reward)
            discount *= 0.0 if bool(one.terminated) else 0.99
            following = row - row % run.ring.rows + (row % run.ring.rows + 1) % run.ring.rows
            last = one
            if discount == 0 or not run.ring.valid[following]:
                break
            row = following
        with torch.no_grad():
            best = run.learner.online(last.frames[:, 1:]).argmax(1)
            value += discount * float(run.learner.target(last.frames[:, 1:])[0, best])
            q = float(run.learner.online(task.observation[index : index + 1])[0, task.action[index]])
        assert float(task.change[index]) == pytest.approx(value - q, abs=1e-5)
    run.collector.environment.close()


# The commands


def test_the_untouched_fork_is_the_run_itself(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = open_newest(run_dir)
    brief = LearningTest(seeds=1, transitions=8, updates=2, warm_up=1, marks=1)
    settings = Settings(frames=400, seeds=1, arms=("untouched",), test=brief)
    said: list[str] = []
    output = tmp_path / "out"
    found = diagnose(run_dir, checkpoint, settings, output, say=said.append)
    assert found is not None
    assert found.verdict.outcome == "cannot tell"
    longer = tmp_path / "longer"
    start = open_newest(run_dir)
    list(train(fork_config(start, "untouched", 0, settings), longer, start=start))
    first, second = (open_newest(d).state["learner"]["online"] for d in (output / "untouched-s0", longer))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_diagnose_answers_is_resumable_and_names_the_next_command(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["diagnose", str(run_dir), "--frames", "320", "--seeds", "1", "--learning-seeds", "2", "--learning-updates", "3"]  # fmt: skip
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "forks: 4 arms x 1 seeds x 320 frames" in text
    assert "Cannot tell" in text
    assert "growtrain diagnose" in text
    output = run_dir / "diagnosis-1600"
    written = json.loads((output / "diagnosis.json").read_text())
    assert written["next_command"] in text
    assert (output / "diagnosis.svg").read_text().startswith("<?xml")
    events = {arm: read_jsonl(output / f"{arm}-s0" / "growth_events.jsonl") for arm in written["returns"]}
    assert {arm: [event["kind"] for event in each] for arm, each in events.items()} == {
        "untouched": [], "inject": ["inject"], "reset-encoder": ["reset-encoder"], "fresh-optimizer": ["fresh-optimizer"],
    }  # fmt: skip
    stamps = {path: path.stat().st_mtime_ns for path in output.glob("*/summary.json")}
    assert main(words) == 0  # nothing is run twice
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/summary.json")} == stamps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["diagnose", "nowhere"], "no checkpoints"),
        (["diagnose", "RUN", "--arms", "inject"], "lacks untouched"),
        (["diagnose", "RUN", "--arms", "untouched,x"], "--arms x is unknown"),
        (["diagnose", "RUN", "--frames", "8"], "--frames 8"),
        (["diagnose", "RUN", "--threshold", "2"], "between 0 and 1"),
        (["diagnose", "RUN", "--at", "77"], "no checkpoint at 77"),
        (["rescue", "nowhere"], "does not exist"),
        (["rescue", "RUN", "--total-frames", "9k"], "--frames"),
        (["rescue", "RUN", "--schedule", "fixed"], "rescues nothing"),
        (["rescue", "RUN", "--game", "pong"], "--game"),
        (["rescue", "weights.txt"], "neither a run's directory"),
        (["rescue", "weights.safetensors", "--frames", "4k"], "no convolution"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("weights.txt").write_text("x")
    save_file({"a.weight": torch.zeros(3, 3)}, "weights.safetensors")
    extra = ["--frames", "4k"] if words[1] == "weights.txt" else []
    assert main([str(run_dir) if word == "RUN" else word for word in words] + extra) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_rescue_goes_on_with_a_run_and_injects_at_once(run_dir: Path, tmp_path: Path) -> None:
    rescued = tmp_path / "rescued"
    assert main(["rescue", str(run_dir), "--frames", "320", "--anchor", "mirrored", "--run-dir", str(rescued)]) == 0
    (event,) = read_jsonl(rescued / "growth_events.jsonl")
    assert (event["frames"], event["kind"], event["max_abs_q_change_online"]) == (1_608, "inject", 0.0)
    assert open_newest(rescued).frames == 1_920


def cleanrl() -> nn.Sequential:
    """The network of CleanRL's dqn_atari.py, as `network` of its QNetwork."""
    layers = [nn.Conv2d(4, 8, 8, 4), nn.ReLU(), nn.Conv2d(8, 16, 4, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 4))


def test_weights_from_elsewhere_play_as_they_did_and_are_rescued(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = cleanrl()
    torch.save({f"network.{name}": tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "agent.pth")
    weights = read_weights(tmp_path / "agent.pth")
    assert (weights.width, weights.encoder_width, weights.num_actions, weights.shared_bias) == (32, 0.25, 4, False)
    rescued = tmp_path / "rescued"
    same = ("game", "num_envs", "batch_size", "replay_capacity", "eval_period")
    words = [f"--{name.replace('_', '-')}={TINY[name]}" for name in same]
    assert main(["rescue", str(tmp_path / "agent.pth"), "--frames", "1600", "--run-dir", str(rescued), *words]) == 0
    first = read_jsonl(rescued / "metrics.jsonl")[0]
    assert first["epsilon"] < 0.1  # its replay is filled by its own policy
    assert [event["kind"] for event in read_jsonl(rescued / "growth_events.jsonl")] == ["inject"]
    # A run that begins in this directory begins with their function.
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(rescued / "initial.safetensors", fresh)
    run = Run(open_newest(rescued).config, fresh)
    observation = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs(observation.float() / 255)
    for network in (run.learner.online, run.learner.target):
        assert torch.allclose(network(observation), expected, atol=1e-5)
    run.collector.environment.close()


def test_what_is_no_nature_network_is_refused(tmp_path: Path) -> None:
    tensors = {f"network.{name}": tensor for name, tensor in cleanrl().state_dict().items()}
    for change, message in (
        ({"network.11.weight": torch.zeros(2, 2)}, "tensors that a Nature DQN does not have"),
        ({"network.9.bias": torch.full((4,), float("nan"))}, "not finite"),
        ({"network.4.weight": torch.zeros(16, 16, 5, 5)}, "no convolution of 16 channels, 3x3"),
    ):
        with pytest.raises(ConfigError, match=message):
            recognise(tensors | change, tmp_path / "x.pth")
    (tmp_path / "bomb.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ConfigError, match="not a file of weights"):
        read_weights(tmp_path / "bomb.pt")
