"""Diagnosis and rescue: positive controls with damage in a known place, forks that are the run itself."""

import dataclasses
import functools
import json
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import children
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from growtrain.__main__ import main
from growtrain.diagnosis.copies import compare_copies_of
from growtrain.diagnosis.forks import default_arms, diagnose, evaluations_of, fork_config, run_fork
from growtrain.diagnosis.page import ARMS, Arm, Diagnosis, Settings, next_command, render
from growtrain.diagnosis.rescue import rescue_weights
from growtrain.environments.atari import make_spec
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.foreign_weights import read_weights, recognise, save_initial
from growtrain.learners.regularizers import penalty
from growtrain.networks.build import make_network
from growtrain.networks.heads import initialize
from growtrain.plasticity.learning_test import (
    COPIES,
    Copy,
    LearningTest,
    Task,
    compare_copies,
    make_copy,
    make_task,
    mean_errors,
)
from growtrain.plasticity.verdicts import Evidence, verdict
from growtrain.runs.checkpoint import load_learner, open_at, open_newest
from growtrain.runs.loop import train
from growtrain.runs.run import Run
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError
from growtrain.telemetry.sinks import read_jsonl

# A run, and damage in it

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "results"
TINY = {
    "game": "breakout", "schedule": "fixed", "num_envs": 2, "width": 32, "encoder_width": 0.25, "batch_size": 8,
    "learning_starts": 200, "epsilon_decay_frames": 500, "target_period": 400, "replay_capacity": 300, "eval_period": 0,
    "num_threads": 1, "log_period": 200, "checkpoint_period": 0, "max_episode_frames": 400, "optimizer": "adam", "lr": 1e-3,
}  # fmt: skip
TEST = LearningTest(seeds=4, transitions=12, updates=80, lr=3e-4, warm_up=5, marks=4)


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


def noise(*arguments: Any) -> Task:
    """Frames that are easily told apart, and changes that no single bias can give."""
    task = make_task(*arguments)
    generator = torch.Generator().manual_seed(int(arguments[3].integers(2**31)))
    observation = torch.randint(256, task.observation.shape, dtype=torch.uint8, generator=generator)
    change = torch.randn(task.change.shape, generator=generator)
    return Task(observation, task.action, TEST.size * change / change.square().mean().sqrt(), task.scale)


@pytest.mark.parametrize(
    ("damage", "places"),
    [
        (lambda learner: None, ()),
        (kill_head, ("head",)),
        (kill_encoder, ("encoder",)),
        (poison_optimizer, ("optimizer",)),
    ],
    ids=["healthy", "head", "encoder", "optimizer"],
)
def test_damage_is_found_where_it_was_done(
    damage: Callable[[DoubleDQN], None],
    places: tuple[str, ...],
    original: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("growtrain.plasticity.learning_test.make_task", noise)
    checkpoint = open_newest(original)
    run = Run(config(), original, checkpoint)
    initialize(run.learner.online, torch.Generator().manual_seed(7))  # healthy, because it is fresh
    damage(run.learner)
    before = [p.detach().clone() for p in run.learner.online.parameters()]
    found = compare_copies(run.learner, run.ring, TEST, np.random.SeedSequence(1), tuple(COPIES))
    assert all(map(torch.equal, before, run.learner.online.parameters()))
    errors = mean_errors(found)
    assert verdict(Evidence(errors=errors, returns={})).places == places, errors
    run.collector.environment.close()


def test_a_dead_network_learns_nothing_of_what_is_asked_for(original: Path) -> None:
    """On the replay's own targets: what its output bias alone could learn is not asked for, or it would pass for healthy."""
    run = Run(config(), original, open_newest(original))
    kill_head(run.learner)
    test = dataclasses.replace(TEST, transitions=64)
    for seed in range(3):
        task = make_task(run.learner, run.ring, test, np.random.default_rng(seed))
        for action in range(run.learner.spec.num_actions):
            assert float(task.change[task.action == action].sum()) == pytest.approx(0, abs=1e-4)
    found = compare_copies(run.learner, run.ring, test, np.random.SeedSequence(1), ("current",))
    assert all(curve[-1] > 0.99 for curve in found["current"]), found
    run.collector.environment.close()


def test_every_copy_keeps_all_but_its_part(original: Path) -> None:
    observation = torch.randint(256, (8, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, *_ = load_learner(original, CPU)
    slots_kept = {
        "current": {"encoder", "head"},
        "inject": {"encoder"},
        "reset-head": {"encoder"},
        "reset-encoder": {"head"},
    }
    for copy in COPIES:
        learner, *_ = load_learner(original, CPU)
        slots = dict(learner.optimizer.state)
        network, optimizer = make_copy(copy, learner, observation, torch.Generator().manual_seed(1))
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in network.parameters() if p.requires_grad}
        same_encoder = torch.equal(before.online.encoder(observation), network.encoder(observation))
        assert same_encoder == (copy not in ("reset-encoder", "fresh-network"))
        same_values = torch.equal(before.online(observation), network(observation))
        assert same_values == (copy in ("current", "inject", "fresh-optimizer"))
        with_slots = {name.split(".")[0] for name, p in network.named_parameters() if p in optimizer.state}
        assert with_slots == slots_kept.get(copy, set()), copy
        assert all(optimizer.state[p] is slots[p] for p in held if p in optimizer.state)


def test_all_copies_start_from_the_same_error(original: Path) -> None:
    found = compare_copies_of(open_newest(original), dataclasses.replace(TEST, seeds=1, updates=4, lr=1e-20), CPU)
    assert all(curve == pytest.approx([1.0] * 4, abs=1e-4) for curves in found.values() for curve in curves)


def test_nothing_moves_while_the_optimizers_take_in_gradients(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growtrain.plasticity.learning_test.make_task", noise)
    run = Run(config(), original, open_newest(original))
    initialize(run.learner.online, torch.Generator().manual_seed(7))
    left = {}
    for warm_up, updates in ((0, 200), (200, 1)):
        test = dataclasses.replace(TEST, seeds=1, warm_up=warm_up, updates=updates, marks=1, lr=3e-3)
        left[warm_up] = compare_copies(run.learner, run.ring, test, np.random.SeedSequence(1), ("current",))["current"]
    assert left[0][0][0] < 0.5
    assert left[200][0][0] > 0.8
    run.collector.environment.close()


@pytest.mark.parametrize("optimizer", ["adam", "centered_rmsprop"])
def test_the_scale_of_rewards_and_the_runs_optimizer_do_not_decide_what_is_learned(
    optimizer: Literal["adam", "centered_rmsprop"], original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes 1,024 times as large, with the slots that go with them, are learned bit for bit alike; RMSProp has none to take over."""
    run = Run(config(), original, open_newest(original))
    run.learner.config = dataclasses.replace(run.learner.config, optimizer=optimizer, optimizer_eps=1e-30)
    monkeypatch.setattr("growtrain.plasticity.learning_test._EPS", 1e-30)
    found, test = [], dataclasses.replace(TEST, seeds=1, updates=200, lr=1e-3)
    for scale in (1, 1024):
        for slots in run.learner.optimizer.state.values():
            slots["exp_avg"].mul_(scale)
            slots["exp_avg_sq"].mul_(scale**2)

        def scaled(*arguments: Any, scale: int = scale) -> Task:
            task = make_task(*arguments)
            return dataclasses.replace(task, scale=scale * task.scale)

        monkeypatch.setattr("growtrain.plasticity.learning_test.make_task", scaled)
        found.append(
            compare_copies(run.learner, run.ring, test, np.random.SeedSequence(2), ("current", "fresh-network"))
        )
    for copy, errors in mean_errors(found[0]).items():
        assert errors == mean_errors(found[1])[copy]
        assert min(errors) < 0.8
    run.collector.environment.close()


def test_a_target_is_the_n_step_return(original: Path) -> None:
    checkpoint = open_newest(original)
    run = Run(config(), original, checkpoint)
    test = LearningTest(seeds=1, transitions=16, updates=1, n_steps=3)
    task = make_task(run.learner, run.ring, test, np.random.default_rng(5))
    valid = np.flatnonzero(run.ring.valid)
    start = np.random.default_rng(5).choice(valid, size=16, replace=False)
    changes = []
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
            best = run.learner.online(last.next_observation).argmax(1)
            value += discount * float(run.learner.target(last.next_observation)[0, best])
            q = float(run.learner.online(task.observation[index : index + 1])[0, task.action[index]])
        changes.append(value - q)
    actions = task.action.tolist()
    means = {action: np.mean([c for c, a in zip(changes, actions, strict=True) if a == action]) for action in actions}
    centred = [change - means[action] for change, action in zip(changes, actions, strict=True)]
    assert (task.scale * task.change).tolist() == pytest.approx(centred, abs=1e-5)
    assert float(task.change.square().mean().sqrt()) == pytest.approx(test.size)
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


@pytest.mark.parametrize(("live_encoder", "place"), [("cold", "network"), ("warm", "head")])
def test_an_injection_is_evidence_of_what_the_run_injects(live_encoder: str, place: str, tmp_path: Path) -> None:
    cold = config(freeze="network", live_encoder=live_encoder)
    list(train(cold, tmp_path / "run"))
    brief = LearningTest(seeds=3, transitions=8, updates=2, warm_up=1, marks=1)
    settings = Settings(frames=400, arms=(), test=brief)
    found = diagnose(tmp_path / "run", open_newest(tmp_path / "run"), settings, tmp_path / "out", say=str)
    assert found is not None
    places = {name: gain.place for name, gain in found.verdict.gains["learning"].items()}
    assert places == {
        "inject": place,
        "reset-head": "head",
        "reset-encoder": "encoder",
        "fresh-optimizer": "optimizer",
        "fresh-network": "network",
    }


def test_forks_of_a_tracked_run_are_not_tracked(run_dir: Path) -> None:
    checkpoint = open_newest(run_dir)
    tracked = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, track="wandb"))
    assert fork_config(tracked, "inject", 0, Settings(frames=400)).trackers == ()


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
    assert (output / "diagnosis.svg").read_text().startswith("<svg")
    # Each arm's evaluation beside the untouched fork's, of as many episodes, at an epsilon of its own.
    (end,) = read_jsonl(output / "inject-s0" / "evaluations.jsonl")
    assert written["evaluations"]["inject"] == [end["episode_return"]]
    assert written["evaluation_episodes"] == end["episodes"] > 0
    (gain,) = written["verdict"]["gains"]["evaluations"]["inject"]["values"]
    difference = end["episode_return"] - written["evaluations"]["untouched"][0]
    assert gain == pytest.approx(difference / written["evaluation_scale"])
    assert (written["epsilons"], written["eval_epsilon"]) == (pytest.approx([0.01, 0.01]), 0.01)
    assert "| returns, epsilon 0.01 | inject |" in text
    assert f"| evaluations, epsilon 0.01 | inject | {end['episode_return']:.4g} ({end['episodes']} episode" in text
    events = {arm: read_jsonl(output / f"{arm}-s0" / "growth_events.jsonl") for arm in written["returns"]}
    assert {arm: [event["kind"] for event in each] for arm, each in events.items()} == {
        "untouched": [], "inject": ["inject"], "reset-encoder": ["reset-encoder"], "fresh-optimizer": ["fresh-optimizer"],
    }  # fmt: skip
    stamps = {path: path.stat().st_mtime_ns for path in output.glob("*/summary.json")}
    assert main(words) == 0  # nothing is run twice
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/summary.json")} == stamps


def test_evaluations_of_fewer_episodes_are_not_compared(tmp_path: Path) -> None:
    forks: dict[Arm, list[Path]] = {"untouched": [], "inject": []}
    for number, episodes in enumerate((25, 25, 10, 25)):
        fork = tmp_path / str(number)
        fork.mkdir()
        lines = [{"frames": at, "episode_return": float(10 * number + at), "episodes": episodes} for at in (5, 6, 7)]
        (fork / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        forks["inject" if number % 2 else "untouched"].append(fork)
    assert evaluations_of(forks, 6) == ({"untouched": [7.0, None], "inject": [17.0, 37.0]}, 25)
    assert evaluations_of(forks, 7) == ({"untouched": [None, None], "inject": [None, None]}, 0)


def test_a_page_shows_the_interval_of_every_kind_of_evidence_and_how_likely_chance_is() -> None:
    forks: dict[Arm, list[float | None]] = {arm: [100.0, 110.0, 120.0] for arm in ARMS}
    better: dict[Arm, list[float | None]] = forks | {"inject": [150.0, 162.0, 173.0]}
    learning = {copy: [[0.8], [0.81], [0.79]] for copy in COPIES}
    evidence = Evidence(
        errors=mean_errors(learning), returns=forks, return_scale=100.0, evaluations=better, evaluation_scale=50.0
    )
    found = Diagnosis(
        run="RUN", game="pong", frames=10_000, total_frames=20_000, settings=Settings(frames=1_000), errors=learning, curves={},
        returns=forks, evaluations=better, return_scale=100.0, verdict=verdict(evidence), evaluation_scale=50.0,
        evaluation_episodes=25, epsilons=(0.2, 0.1), eval_epsilon=0.01, episodes={arm: [3, 4] for arm in ARMS},
    )  # fmt: skip
    page = render(found)
    gain = found.verdict.gains["evaluations"]["inject"]
    assert gain.p is not None
    assert gain.p < 0.05
    assert (
        f"| evaluations, epsilon 0.01 | inject | 161.7 (25 episodes each) | +103.3% [+95.7%, +110.9%] | +100.0%, +104.0%, +106.0% | "
        f"a clear gain (p {gain.p:.2g}) |"
    ) in page
    assert "| evaluations, epsilon 0.01 | nothing | 110 (25 episodes each) | | | |" in page
    assert "| returns, epsilon 0.2 to 0.1 | inject | 110 (3 to 4 episodes each) | +0.0% [+0.0%, +0.0%] |" in page
    assert "p is at most 5%, adjusted by Holm's step-down over all gains of this page" in page
    assert (
        "| head | cannot tell | the forks' evaluations show a gain and the learning test and the forks' returns show none"
        in page
    )


def test_a_diagnosis_that_is_stopped_ends_with_75_and_is_gone_on_with(run_dir: Path) -> None:
    words = ["diagnose", str(run_dir), "--frames", "320", "--seeds", "1", "--learning-seeds", "1", "--learning-updates", "3"]  # fmt: skip
    process = children.Child(words)
    next(line for line in process.stdout if line.startswith("learning test "))
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert not (run_dir / "diagnosis-1600" / "diagnosis.json").exists()
    assert main(words) == 0


def test_the_learning_test_alone_makes_no_forks_and_has_the_threads_of_the_run(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["diagnose", str(run_dir), "--learning-test-only", "--learning-seeds", "1", "--learning-updates", "8"]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main([*words, "--output", str(tmp_path / "answer")]) == 0
        assert torch.get_num_threads() == TINY["num_threads"] == 1
    finally:
        torch.set_num_threads(threads)
    assert "forks" not in capsys.readouterr().out
    written = json.loads((tmp_path / "answer" / "diagnosis.json").read_text())
    assert (written["returns"], written["curves"]) == ({}, {})
    assert not [path for path in (tmp_path / "answer").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("errors", "returns", "command"),
    [
        ({"inject": 0.4}, {}, "growtrain rescue RUN --at 10000 --intervention inject --frames 5k"),
        ({"inject": 0.4, "reset-head": 0.3}, {}, "growtrain rescue RUN --at 10000 --intervention inject --frames 5k"),
        ({"reset-head": 0.4}, {}, "growtrain rescue RUN --at 10000 --intervention reset-head --frames 5k"),
        ({"reset-encoder": 0.4}, {}, "growtrain rescue RUN --at 10000 --intervention reset-encoder --frames 5k"),
        ({"reset-encoder": 0.4}, {"reset-encoder": 140.0}, "growtrain rescue RUN --at 10000 --intervention reset-encoder --frames 5k"),
        (
            {"reset-encoder": 0.4}, {"reset-encoder": 70.0},
            ("growtrain diagnose RUN --at 10000 --arms untouched,reset-encoder --frames 4k --seeds 3 --learning-seeds 10 "
            "--learning-updates 400 --output RUN/diagnosis-10000-3x4k-10x400"),
        ),
        ({"fresh-network": 0.4}, {}, "growtrain rescue RUN --at 10000 --intervention reset-all --frames 5k"),
        ({}, {}, "leave it alone: growtrain resume RUN"),
        (
            {}, {"inject": 140.0},
            ("growtrain diagnose RUN --at 10000 --frames 4k --seeds 6 --learning-seeds 20 --learning-updates 400 "
            "--output RUN/diagnosis-10000-6x4k-20x400"),
        ),
        (
            {"current": 1.0, "inject": 1.0}, {},
            ("growtrain diagnose RUN --at 10000 --learning-test-only --learning-seeds 20 --learning-updates 1600 "
            "--output RUN/diagnosis-10000-20x1600"),
        ),
    ],
)  # fmt: skip
def test_the_next_command_follows_from_the_verdict(
    errors: dict[Copy, float], returns: dict[Arm, float], command: str
) -> None:
    """Errors are 0.8 and returns some 100 but where they are named; `nothing` learned where that is 1."""
    copies: dict[Copy, float] = {copy: errors.get("current", 0.8) for copy in COPIES} | errors
    learning = {copy: [[error]] * 3 for copy, error in copies.items()}
    seeds = range(3)
    forks: dict[Arm, list[float | None]] = {
        arm: [returns.get(arm, 100.0) + k for k in seeds] for arm in ARMS if returns
    }
    evidence = Evidence(errors=mean_errors(learning), returns=forks, return_scale=100.0)
    found = Diagnosis(
        run="RUN", game="pong", frames=10_000, total_frames=20_000,
        settings=Settings(frames=1_000, arms=ARMS if forks else ()), errors=learning, curves={},
        returns=forks, evaluations={}, return_scale=100.0, verdict=verdict(evidence),
    )  # fmt: skip
    assert next_command(found) == command


def test_what_the_next_command_repeats_is_another_diagnosis_with_the_same_threshold() -> None:
    learning = {copy: [[0.2 * seed]] * 3 for seed, copy in enumerate(COPIES)}
    learning["fresh-network"] = [[0.1], [0.9], [0.2]]
    settings, outputs = Settings(frames=1_000, seeds=2, threshold=0.05), set[str]()
    for _ in range(2):
        found = Diagnosis(
            run="RUN", game="pong", frames=10_000, total_frames=20_000, settings=settings, errors=learning, curves={}, returns={},
            evaluations={}, return_scale=100.0, verdict=verdict(Evidence(errors={}, returns={})),
        )  # fmt: skip
        words = next_command(found).split()
        assert words[words.index("--threshold") + 1] == "0.05"
        outputs.add(words[words.index("--output") + 1])
        settings = dataclasses.replace(settings, frames=4_000, seeds=int(words[words.index("--seeds") + 1]))
    assert len(outputs) == 2


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
        (["rescue", "RUN", "--schedule", "at-switch"], "is of a run's own switches"),
        (["rescue", "RUN", "--schedule", "reset"], "--intervention reset-head"),
        (["rescue", "RUN", "--schedule", "redo", "--frames", "9k"], "--intervention redo"),
        (["rescue", "RUN", "--at", "77"], "no checkpoint at 77"),
        (["rescue", "weights.safetensors", "--frames", "4k", "--at", "77"], "--at"),
        (["rescue", "RUN", "--game", "pong"], "--game"),
        (["rescue", "weights.txt"], "not a file of weights"),
        (["rescue", "empty.pt", "--frames", "4k"], "not a file of weights"),
        (["diagnose", "RUN", "--frames", "-4"], "--frames"),
        (["diagnose", "RUN", "--seeds", "x"], "--seeds"),
        (["rescue", "weights.safetensors", "--frames", "4k"], "no convolution"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("weights.txt").write_text("x")
    Path("empty.pt").touch()
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


def test_a_checkpoint_made_at_an_injection_can_be_forked(tmp_path: Path) -> None:
    """The injection is as old as the checkpoint: the next one comes after it, at the fork's first step."""
    grown = tmp_path / "grown"
    list(train(config(schedule="at:800", total_frames=1_200, checkpoint_period=800), grown))
    checkpoint = open_at(grown, 800)
    assert fork_config(checkpoint, "inject", 0, Settings(frames=80)).schedule == "at:800,801"
    assert fork_config(checkpoint, "untouched", 0, Settings(frames=80)).schedule == "at:800"
    rescued = tmp_path / "rescued"
    assert main(["rescue", str(grown), "--at", "800", "--frames", "80", "--run-dir", str(rescued)]) == 0
    assert [event["frames"] for event in read_jsonl(rescued / "growth_events.jsonl")] == [800, 808]


def test_a_learning_test_stops_before_the_next_copy_and_begins_anew(run_dir: Path, tmp_path: Path) -> None:
    checkpoint, asked = open_newest(run_dir), iter(range(99))
    settings = Settings(frames=80, arms=(), test=TEST)
    assert diagnose(run_dir, checkpoint, settings, tmp_path, stop=lambda: next(asked) == 2) is None
    assert next(asked) == 3  # two copies were fitted, and no more
    assert not (tmp_path / "diagnosis.json").exists()
    assert diagnose(run_dir, checkpoint, settings, tmp_path) is not None


def rounded(value: Any) -> Any:
    """Plain values to twelve digits: from Python 3.12 on, `sum` rounds less."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("diagnosis.json")), ids=lambda path: path.parents[1].name)
def test_a_page_under_results_says_what_its_numbers_say(path: Path) -> None:
    stored = json.loads(path.read_text())
    options = stored["settings"]
    settings = Settings(**(options | {"arms": tuple(options["arms"]), "test": LearningTest(**options["test"])}))
    evidence = Evidence(
        errors=mean_errors(stored["errors"]),
        returns=stored["returns"],
        return_scale=stored["return_scale"],
        evaluations=stored["evaluations"] if stored["evaluation_episodes"] else {},
        evaluation_scale=stored["evaluation_scale"],
    )
    own = stored | {"settings": settings, "verdict": verdict(evidence, threshold=settings.threshold)}
    del own["next_command"]
    found = Diagnosis(**own)
    assert rounded(json.loads(json.dumps(found.to_dict()))) == rounded(stored)
    assert render(found) == path.with_suffix(".md").read_text()


def test_a_damaged_test_is_done_again_and_damaged_records_are_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "diagnose",
        str(run_dir),
        "--learning-seeds",
        "1",
        "--learning-updates",
        "20",
        "--output",
        str(tmp_path / "d"),
    ]
    path = tmp_path / "d" / "learning_test.json"
    assert main([*words, "--learning-test-only"]) == 0
    done = path.read_bytes()
    path.write_bytes(done[:-9])
    assert main([*words, "--learning-test-only"]) == 0
    assert path.read_bytes() == done
    metrics = run_dir / "metrics.jsonl"
    metrics.write_bytes(b"nonsense\n" + metrics.read_bytes())
    capsys.readouterr()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{metrics}, line 1: not a JSON object" in line


def test_a_network_that_is_all_head_is_diagnosed_and_reset(tmp_path: Path) -> None:
    """There is no encoder to ask about: no arm for it by default, and all of the network can be made fresh."""
    whole = tmp_path / "whole"
    list(train(config(split="conv1", total_frames=1_000), whole))
    checkpoint = open_newest(whole)
    assert default_arms(checkpoint) == ("untouched", "inject", "fresh-optimizer")
    assert set(compare_copies_of(checkpoint, TEST, CPU)) == {"current", "inject", "reset-head", "fresh-optimizer"}
    for arm in default_arms(checkpoint):
        fork_config(checkpoint, arm, 0, Settings(frames=80))
    rescued = tmp_path / "rescued"
    assert main(["rescue", str(whole), "--intervention", "reset-all", "--frames", "80", "--run-dir", str(rescued)]) == 0
    (event,) = read_jsonl(rescued / "growth_events.jsonl")
    assert event["kind"] == "reset-all"
    assert event["max_abs_q_change_online"] > 0


def test_a_fork_reports_no_score_of_its_parent(tmp_path: Path) -> None:
    parent, fork = tmp_path / "parent", tmp_path / "fork"
    list(train(config(eval_period=800, eval_frames=1_600, total_frames=1_200), parent))
    assert json.loads((parent / "summary.json").read_text())["final_return_source"] == "evaluation"
    assert main(["resume", str(parent), "--fork", str(fork), "--total-frames", "1208", "--eval-period", "0"]) == 0
    summary = json.loads((fork / "summary.json").read_text())
    assert (summary["frames"], summary["final_return"], summary["human_normalized_score"]) == (1_208, None, None)


def test_a_fork_whose_last_evaluation_was_broken_off_goes_on_with_it(run_dir: Path, tmp_path: Path) -> None:
    checkpoint, fork, asked = open_newest(run_dir), tmp_path / "fork", iter(range(99))
    go_on = functools.partial(run_fork, run_dir, checkpoint, "untouched", 0, Settings(frames=80), fork)
    go_on(lambda: next(asked) >= 10)  # once for each of ten steps
    assert open_newest(fork).frames == 1_680
    assert read_jsonl(fork / "evaluations.jsonl") == []
    go_on(lambda: False)
    assert [record["frames"] for record in read_jsonl(fork / "evaluations.jsonl")] == [1_680]
    written = (fork / "summary.json").stat().st_mtime_ns
    go_on(lambda: False)
    assert (fork / "summary.json").stat().st_mtime_ns == written  # it is done, and is left alone


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
    # What it begins with is what its distance from initialisation is measured from.
    assert run.measurer._distance("encoder", run.learner.online.encoder) == 0.0
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


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_is_what_it_holds_and_not_what_it_is_called(kind: str, tmp_path: Path) -> None:
    """CleanRL saves `torch.save(q_network.state_dict(), "dqn_atari.cleanrl_model")`; caches of downloads keep links to nameless files."""
    tensors = {f"network.{name}": tensor for name, tensor in cleanrl().state_dict().items()}
    blob = tmp_path / "0f3a"
    if kind == "safetensors":
        save_file(tensors, blob)
    else:
        torch.save(tensors, blob, _use_new_zipfile_serialization=kind == "zip")
    for name in ("dqn_atari.cleanrl_model", "model.safetensors", "model.pth", "model.zip"):
        (tmp_path / name).symlink_to(blob)
        assert torch.equal(read_weights(tmp_path / name).tensors["head.live.2.bias"], tensors["network.9.bias"])


def test_cleanrls_own_file_is_rescued(tmp_path: Path) -> None:
    file = tmp_path / "dqn_atari.cleanrl_model"
    torch.save({f"network.{name}": tensor for name, tensor in cleanrl().state_dict().items()}, file)
    words = ["--game=breakout", "--num-envs=2", "--batch-size=8", "--replay-capacity=300", "--eval-period=0"]
    assert main(["rescue", str(file), "--frames", "1600", "--run-dir", str(tmp_path / "run"), *words]) == 0
    assert [event["kind"] for event in read_jsonl(tmp_path / "run" / "growth_events.jsonl")] == ["inject"]


@pytest.mark.parametrize("live_encoder", ["warm", "cold"])
def test_the_network_of_a_file_is_frozen_as_it_is(live_encoder: str, tmp_path: Path) -> None:
    """At a copy of the target, before any update; its period is no multiple of the environments' step."""
    torch.manual_seed(0)
    file, run = tmp_path / "agent.pth", tmp_path / "run"
    torch.save({f"network.{name}": tensor for name, tensor in cleanrl().state_dict().items()}, file)
    words = ["--game=breakout", "--num-envs=2", "--batch-size=8", "--replay-capacity=300", "--eval-period=0"]
    words += ["--freeze=network", f"--live-encoder={live_encoder}", "--target-period=300"]
    assert main(["rescue", str(file), "--frames", "800", "--run-dir", str(run), *words]) == 0
    (event,) = read_jsonl(run / "growth_events.jsonl")
    assert (event["frames"], event["max_abs_q_change_online"]) == (304, 0.0)
    saved = open_newest(run).state["learner"]
    assert saved["updates"] > 0
    for name, tensor in read_weights(file).tensors.items():
        assert torch.equal(saved["online"][f"snapshot.networks.0.{name}"], tensor)
    wider = ["--width", "64"]
    assert main(["rescue", str(file), "--frames", "800", "--run-dir", str(tmp_path / "wider"), *words, *wider]) == 0
    saved = open_newest(tmp_path / "wider").state["learner"]
    assert saved["width"] == 64
    for name, tensor in read_weights(file).tensors.items():
        assert torch.equal(saved["online"][f"snapshot.networks.0.{name}"], tensor)


def test_an_archive_of_stable_baselines3_is_told_by_its_content(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "agent", "w") as archive:
        archive.writestr("policy.pth", b"")
    with pytest.raises(ConfigError, match=r"take policy\.pth out"):
        read_weights(tmp_path / "agent")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_programs_are_refused_unread_since_reading_them_runs_what_they_bring_along(tmp_path: Path) -> None:
    written = tmp_path / "written"

    class Writes(nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.path = path

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        @torch.jit.export
        def __getstate__(self) -> tuple[str, bool]:
            return self.path, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]) -> None:
            self.path = state[0]
            self.training = state[1]
            torch.save(torch.ones(1), self.path)

    torch.jit.script(Writes(str(written))).save(str(tmp_path / "script.pt"))
    with pytest.raises(ConfigError, match=r"program of TorchScript.*state_dict\(\)"):
        read_weights(tmp_path / "script.pt")
    assert not written.exists()
    torch.jit.load(tmp_path / "script.pt")
    assert written.exists(), "reading such a file does not run it any more: it could be taken"
    exported = torch.export.export(nn.Linear(3, 2), (torch.zeros(1, 3),))
    torch.export.save(exported, tmp_path / "program.pt2")
    with pytest.raises(ConfigError, match=r"program of torch\.export.*state_dict\(\)"):
        read_weights(tmp_path / "program.pt2")


def test_single_numbers_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    tensors = {f"network.{name}": tensor for name, tensor in cleanrl().state_dict().items()}
    numbers = {"log_alpha": torch.zeros(1), "step": torch.tensor(3), "running.mean": torch.tensor(0.5)}
    beside = {"best": np.float64(3.5), "frames": np.int64(7), "done": np.bool_(True), "epsilon": 0.1}
    torch.save({"model": tensors | numbers, **beside}, tmp_path / "agent.pt")
    assert read_weights(tmp_path / "agent.pt").width == 32
    with pytest.raises(ConfigError, match=r"would play otherwise: network\.1\.weight"):
        recognise(tensors | {"network.1.weight": torch.ones(1)}, tmp_path / "x")  # of a PReLU


@pytest.mark.parametrize("name", ["retargeted", "optimistic_q", "Optimus", "non-optimal"])
def test_names_are_matched_by_whole_words(name: str, tmp_path: Path) -> None:
    """An agent of such a name is no target network and no optimizer; those beside it are."""
    own = {f"{name}.network.{key}": tensor for key, tensor in cleanrl().state_dict().items()}
    for other in ("target", "q_net_target", "targetNetwork", "optimizer.state", "q_optim"):
        beside = {f"{other}.{key}": tensor + 1 for key, tensor in cleanrl().state_dict().items()}
        found = recognise(own | beside, tmp_path / "x")
        assert torch.equal(found.tensors["head.live.2.bias"], own[f"{name}.network.9.bias"])
    with pytest.raises(ConfigError, match="no bias beside it"):
        recognise({key.replace(".0.weight", ".0.reweight"): t for key, t in own.items()}, tmp_path / "x")


def test_a_rescued_agent_is_pulled_towards_its_own_weights_in_any_memory_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(cleanrl().to(memory_format=torch.channels_last).state_dict(), tmp_path / "agent.pth")  # type: ignore[call-overload]
    run_dir = tmp_path / "run"
    save_initial(read_weights(tmp_path / "agent.pth"), run_dir)
    own = config(
        optimizer="centered_rmsprop", regularizer="l2-init", regularizer_strength=1e-2, output_bias="per_action"
    )
    run = Run(own, run_dir)
    trainable = [p for p in run.learner.online.parameters() if p.requires_grad]
    assert penalty("l2-init", trainable, [run.learner.initial[p] for p in trainable]).item() == 0.0
    run.collector.environment.close()


def test_names_and_targets_of_stable_baselines3(tmp_path: Path) -> None:
    """Its policy holds the target network, too; an optimizer beside it has tensors of the same shapes."""
    names = {"0": "features_extractor.cnn.0", "2": "features_extractor.cnn.2", "4": "features_extractor.cnn.4"}
    names |= {"7": "features_extractor.linear.0", "9": "q_net.0"}
    tensors = {}
    for name, tensor in cleanrl().state_dict().items():
        index, kind = name.split(".")
        tensors[f"q_net.{names[index]}.{kind}"] = tensor
        tensors[f"q_net_target.{names[index]}.{kind}"] = tensor + 1
    optimizer = {"state": {0: {"exp_avg": tensors["q_net.q_net.0.weight"]}}}
    torch.save({"policy": tensors, "optimizer": optimizer, "step": 3}, tmp_path / "agent.pt")
    weights = read_weights(tmp_path / "agent.pt")
    assert torch.equal(weights.tensors["head.live.2.weight"], tensors["q_net.q_net.0.weight"])
    assert weights.sources["encoder.layers.4"] == "policy.q_net.features_extractor.cnn.4.weight"
    for name, value in (("activation", "crelu"), ("width", 64)):
        with pytest.raises(ConfigError, match=f"--{name} {value}: the file's network has"):
            rescue_weights(weights, {"game": "breakout", name: value}, 20_000, 4)


@pytest.mark.slow
def test_a_real_stable_baselines3_agent_has_its_own_values(tmp_path: Path) -> None:
    """Trained for a moment, saved as it saves, on frames it has seen: its own values, within rounding."""
    sb3 = pytest.importorskip("stable_baselines3")
    pytest.importorskip("cv2")
    import ale_py
    import gymnasium
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    environment = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=1, seed=0), 4)
    model = sb3.DQN("CnnPolicy", environment, buffer_size=1_000, learning_starts=100, learning_rate=1e-3, device="cpu")
    model.learn(400)
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        (tmp_path / "policy.pth").write_bytes(archive.read("policy.pth"))
    weights = read_weights(tmp_path / "policy.pth")
    assert (weights.width, weights.encoder_width, weights.num_actions) == (512, 1.0, 6)
    own = make_network(Config(output_bias="per_action"), make_spec(6), weights.width)
    own.load_state_dict(weights.tensors)
    observations = model.replay_buffer.sample(64).observations
    assert observations.shape == (64, 4, 84, 84)
    frames = observations.to(torch.uint8)
    assert torch.equal(frames.to(observations.dtype), observations)
    with torch.no_grad():
        theirs = model.q_net(observations)
        torch.testing.assert_close(own(frames), theirs, atol=1e-5, rtol=1e-4)
        # The negative control: frames in the other order are another function.
        assert not torch.allclose(own(frames.flip(1)), theirs, atol=1e-5, rtol=1e-4)
    environment.close()
