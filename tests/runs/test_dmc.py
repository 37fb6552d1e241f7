"""Whole runs on the control suite: every tool works on them, and a run that was stopped ends as one that never was."""

import html
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("dm_control")

from growtrain.__main__ import main
from growtrain.environments.dmc import SuiteEnvironment
from growtrain.environments.games import Unplayable
from growtrain.runs.checkpoint import open_newest
from growtrain.runs.loop import train
from growtrain.settings.presets import resolve, sac
from growtrain.telemetry.sinks import read_jsonl

FLAGS: dict[str, Any] = {
    "game": "dmc/cartpole-swingup",
    "schedule": "at:150,300",
    "total_frames": 480,
    "num_envs": 2,
    "width": 16,
    "learning_starts": 40,
    "replay_capacity": 300,
    "batch_size": 16,
    "replay_ratio": 0.25,
    "max_episode_frames": 70,
    "eval_period": 240,
    "eval_episodes": 2,
    "log_period": 80,
    "diagnostics_period": 160,
    "checkpoint_period": 80,
    "device": "cpu",
}


def words(**changes: Any) -> list[str]:
    return [str(word) for name, value in (FLAGS | changes).items() for word in (f"--{name.replace('_', '-')}", value)]


def tensors(tree: dict[str, Any], path: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= tensors(value, f"{path}{name}/")
        elif isinstance(value, torch.Tensor):
            found[path + name] = value
    return found


# Two lanes of 70 steps: stopped just when episodes were cut, at 280 frames, and within the next.
@pytest.mark.parametrize(("game", "stop"), [("dmc/cartpole-swingup", 280), ("dmc/quadruped-run", 300)])
def test_stopped_and_resumed_it_ends_bit_for_bit_as_one_never_stopped(game: str, stop: int, tmp_path: Path) -> None:
    config = sac(**FLAGS | {"game": game, "checkpoint_period": 0, "diagnostics_period": 0, "eval_period": 0})
    whole, parts, steps = tmp_path / "whole", tmp_path / "parts", itertools.count(2, 2)
    list(train(config, whole))
    list(train(config, parts, should_stop=lambda: next(steps) > stop))
    assert open_newest(parts).frames == stop
    list(train(config, parts, start=open_newest(parts)))
    ours, theirs = (tensors(open_newest(run).state) for run in (whole, parts))
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    returns = [[record["episode_return"] for record in read_jsonl(run / "metrics.jsonl")] for run in (whole, parts)]
    assert returns[0][-1] == returns[1][-1] is not None


def test_every_command_works_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    assert main([*words(), "--run-dir", str(path)]) == 0
    assert "the defaults are those of --preset sac, because of the game" in capsys.readouterr().out
    assert main(["evaluate", str(path), "--eval-episodes", "3"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert (evaluation["episodes"], evaluation["human_normalized_score"]) == (3, None)
    assert (
        main(["diagnose", str(path), "--learning-test-only", "--learning-seeds", "2", "--learning-updates", "20"]) == 0
    )
    assert "actor" in capsys.readouterr().out
    assert main(["report", str(path), "--output", str(tmp_path / "report")]) == 0
    report = html.unescape((tmp_path / "report" / "report.md").read_text().replace("\\", ""))
    assert "Maximum-normalised: 0 is a return of 0, 1 one of 1,000" in report
    assert "0 / maximum" in report
    assert "0 / 1000" in report
    assert "random policy" not in report
    capsys.readouterr()
    assert main(["plan", *words(), "--no-timing"]) == 0
    capsys.readouterr()
    assert main(["--game", "dmc/quadruped-rum"]) == 2
    line = capsys.readouterr().err
    assert "did you mean quadruped-run" in line
    assert line.count("\n") == 1


def test_a_video_shows_what_was_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = SuiteEnvironment(game="dmc/cartpole-swingup", num_envs=1, seed=0)
    environment.start()
    path, video = tmp_path / "run", tmp_path / "x.gif"
    for _ in train(sac(**FLAGS | {"total_frames": 160, "schedule": "fixed"}), path):
        pass
    code = main(["video", str(path), "--frames", "10", "--output", str(video)])
    try:
        assert environment.picture().std() > 0
    except Unplayable:
        assert code == 2
        assert "nothing here can draw MuJoCo's tasks" in capsys.readouterr().err.splitlines()[-1]
    else:
        assert code == 0
        assert video.stat().st_size > 1000


def test_the_preset_is_that_of_the_task() -> None:
    config, _ = resolve(None, {"game": "dmc/quadruped-run"})
    assert (config.preset, config.game, config.total_frames) == ("sac", "dmc/quadruped-run", 1_000_000)
    assert config.max_episode_frames == 1_000
