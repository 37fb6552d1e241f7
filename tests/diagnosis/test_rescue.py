"""Rescue of a file's network, frozen as it is, by a network of other widths beside it; on MinAtar, whose networks are small."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

pytest.importorskip("minatar")

from growtrain.__main__ import main
from growtrain.environments.make import spec_of
from growtrain.growth.inject import count_parameters
from growtrain.learners.foreign_weights import read_weights, recognise
from growtrain.networks.build import make_network
from growtrain.planning.costs import make_plan
from growtrain.runfiles import Unreadable, run_lock, write_durably
from growtrain.runs.checkpoint import load_learner, open_newest
from growtrain.runs.frozen_values import COLUMN
from growtrain.runs.loop import train, train_in
from growtrain.runs.run import Run
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError
from growtrain.telemetry.sinks import read_jsonl

WORDS = [
    f"--{name.replace('_', '-')}={value}"
    for name, value in {
        "game": "minatar/breakout", "frames": 640, "num_envs": 2, "batch_size": 8, "replay_capacity": 200, "target_period": 100,
        "replay_ratio": 0.5, "eval_period": 320, "eval_episodes": 1, "diagnostics_period": 160, "checkpoint_period": 320,
        "max_episode_frames": 60, "epsilon_end": 0.3, "num_threads": 1, "device": "cpu", "freeze": "network",
    }.items()
]  # fmt: skip


class Theirs(nn.Module):
    """The network of MinAtar's examples/dqn.py, half as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.fc_hidden = nn.Linear(512, 24)
        self.output = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.fc_hidden(self.conv(x).relu().flatten(1)).relu())


@pytest.fixture
def theirs() -> Theirs:
    torch.manual_seed(0)
    return Theirs()


@pytest.fixture
def file(theirs: Theirs, tmp_path: Path) -> Path:
    path, twin = tmp_path / "agent.pth", {name: tensor + 1 for name, tensor in theirs.state_dict().items()}
    torch.save({"policy_net_state_dict": theirs.state_dict(), "target_net_state_dict": twin, "frame": 7}, path)
    return path


def rescue(file: Path, run_dir: Path, *words: str) -> Path:
    assert main(["rescue", str(file), "--run-dir", str(run_dir), *WORDS, *words]) == 0
    return run_dir


def begun(run_dir: Path, directory: Path) -> Run:
    """A run of the same configuration, in a directory of its own, before its first step."""
    directory.mkdir()
    (directory / "initial.safetensors").write_bytes((run_dir / "initial.safetensors").read_bytes())
    return Run(open_newest(run_dir).config, directory)


def stop_after(frames: int, config: Config, run_dir: Path, file: Path) -> None:
    steps, weights = iter(range(10**6)), read_weights(file)
    list(train_in(run_dir, config, lambda: next(steps) == frames // config.num_envs, None, weights=weights))


def is_the_files(frozen: dict[str, Tensor], file: Path) -> bool:
    given = read_weights(file).tensors
    names = [name for name in frozen if name.startswith("snapshot.networks.0.")]
    return len(names) == len(given) and all(
        torch.equal(frozen[f"snapshot.networks.0.{name}"], tensor) for name, tensor in given.items()
    )


def test_weights_are_not_put_where_another_run_is_being_set_up(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has nothing there yet but its lock, and would begin with them."""
    with run_lock(tmp_path / "run"):
        assert main(["rescue", str(file), "--run-dir", str(tmp_path / "run"), *WORDS]) == 2
    assert "is in use by process" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


def test_of_two_rescues_at_a_time_in_one_directory_the_second_is_refused(
    file: Path, theirs: Theirs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun when the first leaves its weights there: it would leave its own, for either to begin with."""
    run_dir, other, codes = tmp_path / "run", tmp_path / "other.pth", list[int]()
    torch.save({name: tensor + 1 for name, tensor in theirs.state_dict().items()}, other)

    def meanwhile(path: Path, content: bytes) -> None:
        monkeypatch.undo()
        codes.append(main(["rescue", str(other), "--run-dir", str(run_dir), *WORDS]))
        write_durably(path, content)

    monkeypatch.setattr("growtrain.learners.foreign_weights.write_durably", meanwhile)
    rescue(file, run_dir)
    assert codes == [2]
    assert "is in use by process" in capsys.readouterr().err
    begun = load_safetensors((run_dir / "initial.safetensors").read_bytes())
    assert all(torch.equal(begun[name], tensor) for name, tensor in read_weights(file).tensors.items())


def test_a_minatar_network_is_recognised(theirs: Theirs, file: Path, tmp_path: Path) -> None:
    weights = read_weights(file)
    assert (weights.width, weights.encoder_width, weights.num_actions, weights.shared_bias) == (24, 0.5, 6, False)
    assert weights.observation_shape == (4, 10, 10)
    config = Config(game="minatar/breakout", width=24, encoder_width=0.5, output_bias="per_action")
    network = make_network(config, spec_of(config), 24)
    network.load_state_dict(weights.tensors)
    observation = torch.randint(2, (5, 4, 10, 10), dtype=torch.uint8)
    assert torch.allclose(network(observation), theirs(observation.float()), atol=1e-6)
    with pytest.raises(
        ConfigError, match="not a MinAtar DQN: it has no linear layer of 512 features; wanted are a con"
    ):
        recognise({"conv.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / "x")


def test_a_network_of_the_minimal_actions_is_rescued(theirs: Theirs, tmp_path: Path) -> None:
    theirs.output = nn.Linear(24, 3)
    torch.save(theirs.state_dict(), tmp_path / "agent.pth")
    state = open_newest(rescue(tmp_path / "agent.pth", tmp_path / "run", "--minimal-actions", "yes")).state
    assert state["spec"]["num_actions"] == 3


@pytest.mark.parametrize(
    ("width", "encoder_width", "live_encoder"),
    [(32, 0.5, "warm"), (32, 0.5, "cold"), (16, 2.0, None), (24, 0.25, "cold")],
)
def test_another_network_learns_beside_that_of_a_file(
    width: int, encoder_width: float, live_encoder: str | None, theirs: Theirs, file: Path, tmp_path: Path
) -> None:
    words = [f"--width={width}", *([] if encoder_width == 0.5 else [f"--encoder-width={encoder_width}"])]
    words += [f"--live-encoder={live_encoder}"] if live_encoder else []
    words += ["--epsilon-start=1"] if encoder_width == 0.25 else []  # nobody asks for values before learning starts
    run_dir = rescue(file, tmp_path / "run", *words)
    config, state = open_newest(run_dir).config, open_newest(run_dir).state
    assert (config.width, config.encoder_width, config.schedule) == (width, encoder_width, "fixed")
    assert config.live_encoder == (live_encoder or "warm")  # of later injections, too
    assert read_jsonl(run_dir / "growth_events.jsonl") == []
    assert {record["stage"] for record in read_jsonl(run_dir / "diagnostics.jsonl")} == {0}

    # At its start it is the file's, to the bit: the network, its target, and the values that the replay begins with.
    run = begun(run_dir, tmp_path / "fresh")
    seen = torch.randint(2, (5, 4, 10, 10), dtype=torch.uint8)
    own = make_network(dataclasses.replace(config, width=24, encoder_width=0.5), run.learner.spec, 24)
    own.load_state_dict(read_weights(file).tensors)
    for network in (run.learner.online, run.learner.target):
        assert torch.equal(network(seen), own(seen))
        assert is_the_files(network.state_dict(), file)
    assert torch.allclose(own(seen), theirs(seen.float()), atol=1e-6)
    assert torch.equal(run.learner.online.encoder.layers[0].weight, own.encoder.layers[0].weight) == (
        live_encoder == "warm"
    )
    run.step()
    run.frozen_values.check_valid()
    assert torch.equal(run.frozen_values.newest(), run.learner.frozen_value(run.ring.newest()))
    run.collector.environment.close()

    # It learns, and F stays.
    learner, _, frames, stage = load_learner(run_dir, torch.device("cpu"))
    assert (frames, stage, is_the_files(state["learner"]["online"], file)) == (640, 0, True)
    assert learner.updates > 0
    assert not torch.equal(learner.online(seen), own(seen))
    alone = make_network(config, learner.spec, width)
    (cost,) = make_plan(config, learner.spec).stages
    trainable = count_parameters(learner.online, trainable=True)
    assert trainable == count_parameters(alone, trainable=True) == cost.parameters_trainable
    assert count_parameters(learner.online) == trainable + count_parameters(own) == cost.parameters_total


def test_it_is_resumed_to_the_bit_grows_further_and_is_inspected_diagnosed_and_rescued(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The injections of its schedule come beside the file's network, each of the live network's widths."""
    words = ["--width=32", "--encoder-width=1", "--schedule=grow2x"]
    whole = rescue(file, tmp_path / "whole", *words)
    start = open_newest(whole)
    assert [event["stage"] for event in read_jsonl(whole / "growth_events.jsonl")] == [1, 2]
    assert [event["max_abs_q_change_online"] for event in read_jsonl(whole / "growth_events.jsonl")] == [0.0, 0.0]
    assert is_the_files(start.state["learner"]["online"], file)
    widths = [(each["width"], each["encoder_width"]) for each in start.state["learner"]["snapshot"]]
    assert widths == [(24, 0.5), (32, 1.0), (32, 1.0)]

    for frozen, frames in (
        (1, 0),
        (1, 40),
        (2, 340),
    ):  # before it plays, before its first update, and between its injections
        parted = tmp_path / f"parted-{frames}"
        stop_after(frames, start.config, parted, file)
        assert len(open_newest(parted).state["learner"]["snapshot"]) == frozen
        list(train(start.config, parted, start=open_newest(parted)))
        again = open_newest(parted).state
        for name, tensor in start.state["learner"]["online"].items():
            assert torch.equal(tensor, again["learner"]["online"][name])
        assert torch.equal(start.state["ring"]["columns"][COLUMN], again["ring"]["columns"][COLUMN])

    capsys.readouterr()
    assert main(["inspect", str(whole)]) == 0
    says = "frozen whole 3 times (first a file's, width 24, encoder width 0.5), width 32"
    assert says in capsys.readouterr().out
    arms = "untouched,inject,reset-encoder,fresh-optimizer"
    asked = ["--frames=120", "--seeds=1", "--learning-seeds=1", "--learning-updates=20", f"--arms={arms}"]
    assert main(["diagnose", str(whole), *asked]) == 0
    further = ["--frames=200", "--target-period=50"]
    assert main(["rescue", str(whole), *further, "--run-dir", str(tmp_path / "on")]) == 0
    assert len(open_newest(tmp_path / "on").state["learner"]["snapshot"]) == 4
    # A head that is drawn anew gives up all that was frozen, the file's network, too.
    assert (
        main(["rescue", str(whole), *further, "--intervention=reset-head", "--run-dir", str(tmp_path / "reset")]) == 0
    )
    reset = open_newest(tmp_path / "reset")
    assert (reset.state["learner"]["snapshot"], reset.state["ring"].get("columns", {})) == ([], {})
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "reset")]) == 0
    assert "frozen whole 0 times, width 32" in capsys.readouterr().out
    # What is frozen after that is no file's.
    assert (
        main(["rescue", str(tmp_path / "reset"), *further, "--intervention=inject", f"--run-dir={tmp_path / 'again'}"])
        == 0
    )
    assert "beside a frozen network" not in capsys.readouterr().out
    assert open_newest(tmp_path / "again").config.frozen_width == 0
    after = [each for each in read_jsonl(tmp_path / "again" / "diagnostics.jsonl") if each["when"] == "after growth"]
    event = read_jsonl(tmp_path / "again" / "growth_events.jsonl")[-1]
    assert (event["kind"], after[-1]["stage"]) == ("inject", event["stage"])


def test_a_file_of_the_live_networks_widths_goes_on_as_the_live_network(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is frozen then is frozen by an injection, at the first copy of the target."""
    run_dir = rescue(file, tmp_path / "run", "--width=24", "--encoder-width=0.5")
    says = capsys.readouterr().out
    assert "these shrink with the budget: eval_frames" in says  # and not what a rescue has of its own
    assert "learning_starts" not in says
    assert "epsilon_decay_frames" not in says
    assert open_newest(run_dir).config.frozen_width == 0
    (event,) = read_jsonl(run_dir / "growth_events.jsonl")
    assert event["max_abs_q_change_online"] == 0.0
    assert is_the_files(open_newest(run_dir).state["learner"]["online"], file)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--width=32", "--freeze=heads"], "leave it out, or add --freeze network to"),
        (["--width=32", "--intervention=reset-head"], "--width 32: the file's network has 24: leave it out"),
        (["--encoder-width=2", "--activation=crelu"], "--activation crelu: the file's network has relu: leave it out"),
        (["--game=minatar/seaquest"], "sees (4, 10, 10): name the game"),
    ],
)
def test_what_does_not_go_together_gets_one_line(
    words: list[str], says: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rescue", str(file), "--run-dir", str(tmp_path / "run"), *WORDS, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "run").exists()


def test_a_rescue_that_begins_again_begins_with_the_same_weights(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = rescue(file, tmp_path / "run", "--width=24", "--encoder-width=0.5")
    expected = open_newest(run_dir).state["learner"]["online"]
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "summary.json").unlink()
    about = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(about | {"saved": False}))
    initial = run_dir / "initial.safetensors"
    for harm in (lambda: initial.rename(run_dir / "aside"), lambda: initial.write_bytes(b"other")):
        harm()
        assert main(["resume", str(run_dir)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "growtrain rescue FILE" in line
    (run_dir / "aside").rename(initial)
    assert main(["resume", str(run_dir)]) == 0
    again = open_newest(run_dir).state["learner"]["online"]
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())


def test_a_run_without_the_file_that_it_freezes_is_refused(file: Path, tmp_path: Path) -> None:
    config: Any = open_newest(rescue(file, tmp_path / "run", "--width=32")).config
    with pytest.raises(Unreadable, match=r"initial\.safetensors"):
        Run(config, tmp_path / "empty")
