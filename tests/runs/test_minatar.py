"""Whole runs on MinAtar: every tool works on it, and a chain of games goes on bit for bit wherever it was stopped."""

import dataclasses
import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("minatar")

from growtrain.__main__ import main
from growtrain.analysis.commands import command_of
from growtrain.environments.make import make_environment, spec_of
from growtrain.environments.minatar import MinAtarEnvironment
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.optimizers import make_optimizer
from growtrain.networks.build import make_parts
from growtrain.planning.costs import make_plan
from growtrain.planning.speed import synthetic_batches
from growtrain.runs.checkpoint import open_at, open_newest
from growtrain.runs.frozen_values import FrozenValues
from growtrain.runs.loop import train
from growtrain.runs.resuming import changed_config
from growtrain.runs.run import Run
from growtrain.settings.budget import updates_due
from growtrain.settings.config import Config
from growtrain.settings.presets import minatar, resolve
from growtrain.settings.text import ConfigError
from growtrain.telemetry.sinks import read_jsonl

CHAIN = "minatar/space_invaders+asterix"


def tiny(**overrides: Any) -> Config:
    values: dict[str, Any] = {
        "total_frames": 600,
        "width": 16,
        "learning_starts": 40,
        "replay_capacity": 300,
        "replay_ratio": 0.25,
        "batch_size": 8,
        "epsilon_decay_frames": 100,
        "target_period": 100,
        "eval_period": 300,
        "eval_episodes": 2,
        "max_episode_frames": 60,
        "log_period": 100,
        "diagnostics_period": 200,
        "checkpoint_period": 100,
        "schedule": "grow1x",
        "device": "cpu",
    }
    return minatar(**values | overrides)


def weights(run: Path) -> dict[str, torch.Tensor]:
    online: dict[str, torch.Tensor] = open_newest(run).state["learner"]["online"]
    return online


def run(config: Config, path: Path, *, until: int | None = None, start: Any = None) -> None:
    played = [0]

    def stop() -> bool:
        played[0] += 1
        return until is not None and played[0] > until

    for _ in train(config, path, should_stop=stop, start=start):
        pass


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_envs": 3},
        {"game": CHAIN, "schedule": "at-switch"},
        {"game": CHAIN, "schedule": "at-switch", "keep_replay": False, "num_envs": 3},
    ],
    ids=["one lane", "three lanes", "a chain", "a chain that forgets"],
)
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(eval_period=400, **settings)
    run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", until=330 // config.num_envs)
    start = open_newest(tmp_path / "parts")
    assert 300 < start.frames < 400
    run(config, tmp_path / "parts", start=start)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    events = read_jsonl(tmp_path / "parts" / "growth_events.jsonl")
    assert len(events) == 1
    evaluations = [read_jsonl(tmp_path / name / "evaluations.jsonl") for name in ("whole", "parts")]
    scores = [[(record["frames"], record["episode_return"]) for record in each] for each in evaluations]
    assert scores[0] == scores[1]
    assert all(record["human_normalized_score"] is None for record in evaluations[0])


def test_a_fork_of_a_chain_keeps_its_switches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny(game=CHAIN, schedule="fixed", checkpoint_period=200, keep=9), tmp_path / "run")
    early, late = (open_at(tmp_path / "run", frames) for frames in (200, 400))
    longer = changed_config(late, {"total_frames": 1200}, fork=True)[0]
    assert longer.switch_frames == late.config.switch_frames == (300,)
    shorter = changed_config(early, {"total_frames": 250}, fork=True)[0]
    assert shorter.switch_frames == ()
    assert dataclasses.replace(shorter, total_frames=600).switch_frames == (300,)
    assert changed_config(early, {"switch_at": "400"}, fork=True)[0].switch_frames == (400,)
    assert dataclasses.replace(early.config, switch_at="300").fingerprint() != early.config.fingerprint()

    fork = ["resume", str(tmp_path / "run"), "--fork", str(tmp_path / "fork"), "--total-frames", "1200"]
    assert main([*fork, "--switch-at", "350"]) == 2
    assert "--switch-at 350: up to 600 frames minatar/" in capsys.readouterr().err
    assert main([*fork, "--keep-replay", "no"]) == 2
    assert "--keep-replay no: how many updates were due follows from what a switch did" in capsys.readouterr().err
    assert main(fork) == 0
    assert json.loads((tmp_path / "fork" / "config.json").read_text())["config"]["switch_at"] == "300"
    arguments = ["diagnose", str(tmp_path / "run"), "--at", "200", "--frames", "80", "--seeds", "1"]
    assert main([*arguments, "--learning-seeds", "1", "--learning-updates", "8"]) == 0


@pytest.mark.parametrize(
    ("switch_at", "said"),
    [("100,200", "must be 1 increasing counts"), ("0", "must be 1 increasing"), ("soon", "'soon' is not a count")],
)
def test_switches_are_checked(switch_at: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny(game=CHAIN, switch_at=switch_at)


def test_a_chain_that_forgets_learns_from_the_new_game_alone(tmp_path: Path) -> None:
    config = tiny(game=CHAIN, schedule="at-switch", keep_replay=False, checkpoint_period=0, replay_capacity=600)
    run(config, tmp_path / "forgets")
    run(dataclasses.replace(config, keep_replay=True), tmp_path / "keeps")
    spec, states = spec_of(config), {name: open_newest(tmp_path / name).state for name in ("forgets", "keeps")}
    assert spec.frame_shape[0] == 10
    held = {name: int(state["ring"]["valid"].sum()) for name, state in states.items()}
    assert held["forgets"] == 300 < 500 < held["keeps"]
    assert states["forgets"]["learner"]["updates"] == updates_due(config, 600) == (600 - 2 * 40) // 4
    assert states["keeps"]["learner"]["updates"] == (600 - 40) // 4
    assert sum(stage.updates for stage in make_plan(config, spec).stages) == (600 - 2 * 40) // 4


@pytest.mark.parametrize(
    ("schedule", "keep_replay", "rows"),
    [("at:400", True, 400), ("at:400", False, 100), ("at-switch", False, 300)],  # which empties it after the injection
)
def test_a_plan_sweeps_the_rows_that_a_chain_has_kept(
    schedule: str, keep_replay: bool, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept, sweep = [], FrozenValues.sweep

    def counted(values: FrozenValues) -> None:
        swept.append(len(values.ring.rows_read()))
        sweep(values)

    monkeypatch.setattr(FrozenValues, "sweep", counted)
    config = tiny(
        game=CHAIN, schedule=schedule, keep_replay=keep_replay, freeze="network", target_period=50, replay_capacity=600
    )
    run(config, tmp_path)
    assert [stage.rows_swept for stage in make_plan(config, spec_of(config)).stages] == [0, rows]
    assert swept == [pytest.approx(rows, rel=0.05)]  # and the last rows of its episodes


def test_a_chain_that_forgets_learns_again_when_every_lane_has_played_from_the_switch_on(tmp_path: Path) -> None:
    """The switch at 300 frames falls into a step of 8 lanes, which ends at 304; learning starts with the first step of all."""
    config = tiny(game=CHAIN, keep_replay=False, num_envs=8, learning_starts=8, checkpoint_period=0, schedule="fixed")
    assert [updates_due(config, steps) for steps in (8, 296, 304, 312)] == [0, 72, 72, 74]
    run(config, tmp_path / "forgets")
    assert open_newest(tmp_path / "forgets").state["learner"]["updates"] == 72 + (600 - 304) // 4


def test_where_it_is_emptied_while_it_waits_it_begins_to_wait_anew() -> None:
    config = tiny(
        game="minatar/breakout+asterix+seaquest", keep_replay=False, num_envs=1, learning_starts=250, schedule="fixed",
        switch_at="100,200",
    )  # fmt: skip
    assert [updates_due(config, steps) for steps in (199, 449, 450, 600)] == [0, 0, 0, 150 // 4]


@pytest.mark.parametrize("game", ["minatar/breakout", CHAIN])
def test_a_fork_with_another_seed_draws_its_own_episodes(game: str, tmp_path: Path) -> None:
    """Two forks with the same actions see other sticky actions and other games; one with the run's seed goes on where it was."""
    run(tiny(game=game, schedule="fixed", sticky_actions=0.5), tmp_path / "run", until=400)
    saved, seen = open_newest(tmp_path / "run").state["collector"]["environment"], []
    for seed in range(3):
        start = open_newest(tmp_path / "run")
        config, _ = changed_config(start, {"seed": seed}, fork=True)
        fork = Run(config, tmp_path / f"fork {seed}", start)
        collector, state = fork.collector, fork.collector.environment.state_dict()
        assert (state["seed"] == saved["seed"]) == (seed == 0)
        assert np.array_equal(state["random_words"], saved["random_words"]) == (seed == 0)
        assert state["game"] == saved["game"] == len(config.games) - 1
        assert torch.equal(fork.ring.newest()[0].cpu(), torch.from_numpy(collector.environment._observation[0]))
        assert collector._inherited.tolist() == [seed == 0]  # of the others all are their own
        environment, observed = collector.environment, []
        for action in np.random.default_rng(0).integers(6, size=100):
            environment.send(np.array([action]))
            observed.append(environment.recv().observation.copy())
        seen.append(np.stack(observed))
    assert not any(np.array_equal(seen[a], seen[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_switch_comes_at_equal_shares_and_is_evaluated_on_the_game_before() -> None:
    config = tiny(game="minatar/space_invaders+asterix+seaquest", schedule="at-switch")
    assert config.switch_frames == config.growth.injection_frames == (200, 400)
    assert [config.game_after(frames) for frames in (0, 1, 200, 201, 400, 401, 600)] == [0, 0, 0, 1, 1, 2, 2]
    three = dataclasses.replace(config, num_envs=3)  # whose steps end at 201 and 402
    assert three.game_ends == (201, 402, 600)
    assert [three.game_after(frames) for frames in (198, 201, 204, 402, 405)] == [0, 0, 1, 1, 2]
    with pytest.raises(ConfigError, match="no game switches within the budget"):
        tiny(schedule="at-switch")
    with pytest.raises(ConfigError, match="or lower --switch-at"):
        tiny(game=CHAIN, schedule="at-switch", switch_at="600")
    with pytest.raises(ConfigError, match="comes before learning starts"):
        tiny(game=CHAIN, schedule="at-switch", learning_starts=350)


def test_the_game_that_is_evaluated_does_not_depend_on_the_lanes_of_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three lanes, whose steps end at 201 frames and not at the switch at 200: there the first game was played last."""
    run, entered = tmp_path / "run", []
    config = tiny(
        game="minatar/space_invaders+asterix+seaquest", num_envs=3, checkpoint_period=201, keep=3, schedule="fixed"
    )
    list(train(config, run))
    enter = MinAtarEnvironment.enter
    monkeypatch.setattr(MinAtarEnvironment, "enter", lambda self, game: (entered.append(game), enter(self, game))[1])
    for words in (["--num-envs", "1"], ["--num-envs", "8", "--eval-episodes", "8"], []):
        assert main(["evaluate", str(run), "--at", "201", *words]) == 0
    assert main(["video", str(run), "--at", "201", "--output", str(tmp_path / "a.gif")]) == 0
    assert set(entered) == {0}


def test_every_command_works_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    words = ["--game", "MinAtar/Breakout-v1", "--run-dir", str(path), "--noop-max", "3", "--device", "cpu"]
    config = tiny()
    for name in ("total_frames", "width", "learning_starts", "replay_capacity", "batch_size", "eval_episodes"):
        words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    assert main([*words, "--schedule", "grow1x", "--max-episode-frames", "60", "--eval-period", "300"]) == 0
    said = capsys.readouterr().out
    assert "the defaults are those of --preset minatar, because of the game" in said
    assert "without effect in this run: --noop-max 3" in said
    assert json.loads((path / "config.json").read_text())["config"]["preset"] == "minatar"
    assert main(["evaluate", str(path), "--eval-episodes", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["human_normalized_score"] is None
    assert main(["inspect", str(path)]) == 0
    assert main(["video", str(path), "--output", str(tmp_path / "x.gif"), "--frames", "20"]) == 0
    assert (
        main(["diagnose", str(path), "--learning-test-only", "--learning-seeds", "1", "--learning-updates", "8"]) == 0
    )
    assert main(["report", str(path), "--output", str(tmp_path / "report")]) == 0
    report = (tmp_path / "report" / "report.md").read_text().replace("\\", "")
    assert "DQN-normalised: 0 is a random policy, 1 the DQN of Young & Tian (2019) after 5M frames" in html.unescape(
        report
    )
    assert "random / DQN" in report
    capsys.readouterr()
    assert main(["plan", "--game", "minatar/pong"]) == 2
    assert "choose one of breakout, asterix, freeway, seaquest, space_invaders" in capsys.readouterr().err
    assert main(["plan", "--game", CHAIN, "--schedule", "at-switch", "--no-timing", "--keep-replay", "no"]) == 0
    said = capsys.readouterr().out
    assert "a chain of games: space_invaders until 2.5M, asterix until the end; its replay is emptied" in said


def test_the_preset_is_that_of_the_game_unless_one_is_given() -> None:
    config, _ = resolve(None, {"game": "minatar/asterix", "total_frames": 1_000_000, "double_dqn": False})
    assert (config.preset, config.replay_capacity, config.epsilon_decay_frames) == ("minatar", 100_000, 100_000)
    assert (config.learning_starts, config.target_period, config.replay_ratio) == (5_000, 1_000, 1.0)
    assert resolve(None, {"game": "minatar/asterix", "total_frames": 100_000})[0].epsilon_decay_frames < 100_000
    assert resolve("paper", {"game": "minatar/asterix"})[0].preset == "paper"
    assert resolve(None, {})[0].preset == "paper"
    assert "--preset" not in command_of(config.to_dict())
    paper = resolve("paper", {"game": "minatar/asterix"})[0]
    assert command_of(paper.to_dict())[3:7] == ["--preset", "paper", "--game", "minatar/asterix"]


def test_the_network_is_that_of_the_package() -> None:
    config = minatar()
    encoder, head = make_parts(config, spec_of(config), config.width)
    convolution = encoder.layers[0]
    assert isinstance(convolution, torch.nn.Conv2d)
    assert (tuple(convolution.weight.shape), convolution.stride) == ((16, 4, 3, 3), (1, 1))
    assert [tuple(layer.weight.shape) for layer in head if isinstance(layer, torch.nn.Linear)] == [
        (128, 1024),
        (6, 128),
    ]
    seen = torch.randint(2, (3, 4, 10, 10), dtype=torch.uint8)
    expected = F.relu(F.conv2d(seen.float(), convolution.weight, convolution.bias)).flatten(1)
    torch.testing.assert_close(encoder(seen), expected)
    with pytest.raises(ConfigError, match="has no conv2"):
        make_parts(dataclasses.replace(config, split="conv2"), spec_of(config), 128)


@pytest.mark.parametrize("execution", ["auto", "eager"])
def test_without_double_dqn_the_target_network_chooses(execution: str) -> None:
    config = tiny(double_dqn=False, execution=execution)
    spec = spec_of(config)
    learner = DoubleDQN(config, spec, width=16, device=torch.device("cpu"), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in learner.target.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    batch = synthetic_batches(config, spec, 1, torch.Generator().manual_seed(1))[0]
    with torch.no_grad():
        q = learner.online(batch["observation"]).gather(1, batch["action"][:, None])
        following = batch["next"]
        y = following["reward"] + config.discount * learner.target(following["observation"]).amax(1, keepdim=True)
    torch.testing.assert_close(learner.compute_loss(batch), F.smooth_l1_loss(q, y))
    double = DoubleDQN(
        dataclasses.replace(config, double_dqn=True),
        spec,
        width=16,
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
    )
    double.target.load_state_dict(learner.target.state_dict())
    chosen, elsewhere = (
        learner.target(following["observation"]).argmax(1),
        learner.online(following["observation"]).argmax(1),
    )
    assert not torch.equal(chosen, elsewhere)
    assert not torch.allclose(double.compute_loss(batch), learner.compute_loss(batch))


def test_rmsprop_is_that_of_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    own = make_optimizer("rmsprop", [ours], lr=2.5e-4, eps=0.01, decay=0.95)
    reference = torch.optim.RMSprop([theirs], lr=2.5e-4, alpha=0.95, eps=0.01, centered=True)
    for _ in range(50):
        ours.grad = torch.randn(20, generator=generator)
        theirs.grad = ours.grad.clone()
        own.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours, start)


def test_lanes_do_not_depend_on_their_number() -> None:
    wide, narrow = (make_environment(tiny(num_envs=count, learning_starts=40), seed=5) for count in (3, 1))
    first, alone = wide.start(), narrow.start()
    np.testing.assert_array_equal(first.frame[0], alone.frame[0])
    for action in np.random.default_rng(0).integers(6, size=80):
        wide.send(np.full(3, action))
        narrow.send(np.array([action]))
        np.testing.assert_array_equal(wide.recv().observation[0], narrow.recv().observation[0])
