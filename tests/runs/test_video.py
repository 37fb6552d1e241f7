"""The video shows the very episode that the agent plays, in real time, and says what the network thinks of it."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from growtrain.__main__ import main
from growtrain.environments.base import Frames
from growtrain.runs.evaluation import evaluate
from growtrain.settings.config import Config

Image = pytest.importorskip("PIL.Image", reason="needs growtrain[video]")
av = pytest.importorskip("av", reason="needs growtrain[video]")
from growtrain.runs.video import Episode, _Panel, pictures, play, screens  # noqa: E402

BREAKOUT = Config(game="breakout", num_envs=1, sticky_actions=0.25)
ORANGE, BLUE = (0xE6, 0x9F, 0x00), (0x00, 0x72, 0xB2)


class Watcher:
    """A policy that draws its values from a seed and keeps what it saw, the newest frame of each stack."""

    def __init__(self, num_actions: int) -> None:
        self.generator, self.num_actions = torch.Generator().manual_seed(3), num_actions
        self.seen: list[Frames] = []

    def __call__(self, observation: torch.Tensor) -> torch.Tensor:
        self.seen.append(observation[0, -1].numpy())
        return torch.rand((1, self.num_actions), generator=self.generator)


def gray(screen: Frames) -> npt.NDArray[np.float64]:
    """A screen as the agent would see it: luminance, and means over areas, (210, 160, 3) -> (84, 84)."""
    fine = (screen @ np.array([0.2989, 0.5870, 0.1140])).repeat(2, 0).repeat(21, 1)
    means: npt.NDArray[np.float64] = fine.reshape(84, 5, 84, 40).mean((1, 3))
    return means


@pytest.mark.parametrize(("game", "num_actions", "flickers"), [("breakout", 4, False), ("road_runner", 18, True)])
def test_the_screens_are_those_of_the_agents_episode(game: str, num_actions: int, flickers: bool) -> None:
    policy = Watcher(num_actions)
    episode = play(policy, dataclasses.replace(BREAKOUT, game=game), 0, 600)
    shown = list(screens(episode))  # itself compares every reward, and the end
    assert len(shown) == len(policy.seen) + 1 == len(episode.actions) + 1
    assert shown[0].shape == (210, 160, 3)
    difference = np.array([gray(screen) for screen in shown[:-1]]) - policy.seen
    if flickers:
        # Of two frames the lighter pixel is kept: each channel's here, the luminance's there. Only what flickers can differ.
        assert difference.min() > -1
        assert (difference < 1).mean() > 0.999
    else:
        assert np.abs(difference).max() < 1  # two roundings
        assert len(np.unique(shown[-1].reshape(-1, 3), axis=0)) > 5  # in colour


def test_another_seed_or_other_settings_are_another_episode() -> None:
    episode = play(Watcher(4), BREAKOUT, 0, 2000)
    assert episode.ended
    for other in (
        dataclasses.replace(episode, seed=episode.seed + 1),
        dataclasses.replace(episode, config=dataclasses.replace(BREAKOUT, sticky_actions=0.0)),
        dataclasses.replace(episode, ended=False),
    ):
        with pytest.raises(RuntimeError, match="did not lead where it had led"):
            list(screens(other))


def test_the_episode_is_the_first_of_the_evaluation() -> None:
    config = dataclasses.replace(BREAKOUT, seed=5)
    episode = play(Watcher(4), config, 4000, 10_000)
    assert episode.ending == "game over"
    config = dataclasses.replace(config, eval_episodes=1)
    record = evaluate(Watcher(4), config, frames=4000, stage=0, device=torch.device("cpu"))
    assert (record.episodes, record.unfinished) == (1, 0)
    assert record.episode_return == episode.rewards.sum() > 0


def test_an_episode_that_goes_on_says_so_and_one_cut_by_the_game_too() -> None:
    assert play(Watcher(4), BREAKOUT, 0, 43).ending == "not over after 40 frames"
    cut = play(Watcher(4), dataclasses.replace(BREAKOUT, max_episode_frames=80), 0, 10_000)
    assert (cut.ending, cut.ended, len(cut.actions)) == ("cut at 80 frames", True, 20)
    assert len(list(pictures(cut, "", 2))) == 20 + 15


def of_values(q: list[list[float]], actions: list[int]) -> Episode:
    return Episode(
        config=BREAKOUT,
        seed=0,
        game=0,
        action_names=("NOOP", "FIRE", "RIGHT", "LEFT"),
        actions=np.array(actions),
        q=np.array(q, dtype=np.float32),
        values=np.array(q, dtype=np.float32).max(1),
        rewards=np.zeros(len(q), dtype=np.float32),
        ended=True,
        ending="game over",
    )


def widths(picture: npt.NDArray[np.uint8], color: tuple[int, int, int]) -> list[int]:
    """The length in pixels of each bar of a colour, from the top."""
    bars = (picture[2 * 38 : 2 * 155, 2 * 217 : 2 * 272] == color).all(-1).sum(1)
    return [int(n) for n, before in zip(bars, [0, *bars[:-1]], strict=True) if n and not before]


def test_bars_are_as_long_as_the_values_and_the_chosen_one_stands_out() -> None:
    panel = _Panel(of_values([[0.0, 1.0, 2.0, 4.0], [4.0, 4.0, 0.0, 0.0]], [1, 0]), "", 2)
    picture = np.asarray(panel.draw(np.zeros((210, 160, 3), dtype=np.uint8), 0, 0.0, 0))
    assert widths(picture, BLUE) == [1, 55, 109]  # a quarter, a half and the whole of 54 pixels of the game
    assert widths(picture, ORANGE) == [28]


@pytest.mark.parametrize("q", [[[0.0] * 4], [[-1e-9, 0, 0, 0]], [[1e6, -1e6, 0, 5.0]] * 3000])
def test_any_values_and_lengths_can_be_drawn(q: list[list[float]]) -> None:
    panel = _Panel(of_values(q, [0] * len(q)), "", 3)
    assert panel.draw(np.zeros((210, 160, 3), dtype=np.uint8), len(q) - 1, 0.0, 0, "game over").size == (900, 630)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    words = [
        "--game",
        "breakout",
        "--total-frames",
        "400",
        "--num-envs",
        "1",
        "--width",
        "16",
        "--encoder-width",
        "0.1",
    ]
    words += ["--batch-size", "2", "--eval-frames", "40", "--learning-starts", "100", "--schedule", "at:200"]
    assert main([*words, "--run-dir", str(path)]) == 0
    return path


@pytest.mark.parametrize(("name", "scale"), [("video.mp4", 3), ("video.GIF", 2)])
def test_a_video_as_a_user_makes_it(
    name: str, scale: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / name
    output.write_text("an older one")
    assert main(["video", str(run), "--frames", "40", "--seed", "7", "--output", str(output)]) == 0
    played, written = capsys.readouterr().out.splitlines()
    assert "in 10 decisions, 40 frames: not over after 40 frames" in played
    assert f"{output}: 1.7 s, {output.stat().st_size / 1e6:.2f} MB" == written
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if scale == 3:
        with av.open(str(output)) as container:
            shown = [frame.to_image() for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == 15
            assert len(shown) == 10 + 15
    else:
        with Image.open(output) as gif:
            shown, milliseconds = [], 0
            for index in range(gif.n_frames):
                gif.seek(index)
                milliseconds += gif.info["duration"]
                shown.append(gif.convert("RGB"))
        assert len(shown) == 10 + 1  # the last is held
        assert milliseconds == 1670
    assert shown[0].size == (300 * scale, 210 * scale)

    from growtrain.runs.checkpoint import load_learner

    learner, config, trained, _ = load_learner(run, torch.device("cpu"))
    episode = play(learner.act, dataclasses.replace(config, seed=7), trained, 40)
    drawn = list(pictures(episode, f"{config.schedule}, stage 1, after 400 frames", scale))
    for one, other in ((0, 0), (5, 5), (-1, -1)):
        difference = np.abs(np.asarray(shown[one], dtype=float) - np.asarray(drawn[other], dtype=float))
        assert difference.mean() < (2 if scale == 3 else 0.5)


def test_by_default_it_goes_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["video", str(run), "--frames", "4", "--at", "400"]) == 0
    assert (run / "video-400-s0.mp4").exists()
    assert str(run / "video-400-s0.mp4") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--output", "{tmp}/a.avi"], ".gif"),
        (["--output", "{tmp}/a"], ".mp4"),
        (["--output", "{tmp}/nowhere/a.gif"], "cannot be written (No such file or directory)"),
        (["--output", "{tmp}/directory.gif"], "is a directory: name a file"),
        (["--frames", "3"], "--frames"),
        (["--frames", "many"], "--frames"),
        (["--frames", "4k", "--output", "{tmp}/a.gif"], "3600"),
        (["--at", "399"], "choose one it has (400"),
        (["--epsilon", "0"], "did you mean"),
    ],
)
def test_wrong_input_gets_one_helpful_line(
    words: list[str], says: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "directory.gif").mkdir()
    assert main(["video", str(run), *(word.format(tmp=tmp_path) for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["directory.gif"]


def test_no_run_and_what_is_not_installed_are_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["video", str(tmp_path)]) == 2
    assert "has no checkpoint" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["video", str(run), "--output", str(tmp_path / "a.mp4")]) == 2
    assert "pip install 'growtrain[video]'" in capsys.readouterr().err
    assert main(["video", str(run), "--frames", "4", "--output", str(tmp_path / "a.gif")]) == 0  # Pillow alone
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "growtrain.runs.video")
    assert main(["video", str(run), "--output", str(tmp_path / "a.gif")]) == 2
    assert "pip install 'growtrain[video]'" in capsys.readouterr().err


def test_what_fails_half_way_leaves_the_older_video(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "a.gif"
    output.write_text("an older one")

    def fail(*_: object) -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr("growtrain.runs.video._write_gif", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        main(["video", str(run), "--frames", "4", "--output", str(output)])
    assert output.read_text() == "an older one"
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]
