"""Films: the episode in colour is the one that was played, and what is written can be read again."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from growtrain.__main__ import main
from growtrain.config import Config, ConfigError
from growtrain.environments.atari import AtariEnvironment, replay_in_color

Image = pytest.importorskip("PIL.Image")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")

from growtrain import video  # noqa: E402

CPU = torch.device("cpu")
CONFIG = Config(game="breakout", sticky_actions=0.25, eval_epsilon=0.8, num_envs=2)
LUMINANCE = np.array([0.2989, 0.587, 0.114])


def policy(observation: Tensor) -> Tensor:
    """Arbitrary values of four actions that depend on the screen."""
    mean = observation.float().mean((1, 2, 3))
    return torch.stack([torch.sin(mean * k) for k in (7.0, 11.0, 13.0, 17.0)], 1)


def play(episode: int = 0, max_frames: int = 18_000) -> video.Episode:
    return video.play(policy, CONFIG, frames=5, episode=episode, max_frames=max_frames, device=CPU)


def test_the_colour_screens_are_what_the_agent_saw() -> None:
    """With sticky actions, whose chance must be the same: rewards to the end, and each screen's luminance averaged to 84 x 84."""
    episode = next(each for each in map(play, range(10)) if each.score > 0)
    assert episode.ended
    environment = AtariEnvironment(game="breakout", num_envs=1, seed=episode.seed, repeat_action_probability=0.25)
    step = environment.start()
    replay = replay_in_color("breakout", episode.seed, episode.actions, noop_max=30, repeat_action_probability=0.25)
    for t, (screen, reward) in enumerate(replay):
        grey = Image.fromarray((screen @ LUMINANCE).astype(np.float32)).resize((84, 84), Image.Resampling.BOX)
        assert np.corrcoef(np.asarray(grey).ravel(), step.frame[0].ravel())[0, 1] > 0.98, t
        assert reward == (episode.rewards[t - 1] if t else 0)
        if t < len(episode.actions) - 1:  # the last step resets the lane
            environment.send(episode.actions[t : t + 1])
            step = environment.recv()
        else:
            break
    environment.close()
    assert t == len(episode.actions) - 1 > 100


def test_an_episode_is_the_same_whenever_it_is_played_and_another_is_another() -> None:
    one, same, other = play(max_frames=400), play(max_frames=400), play(1, max_frames=400)
    assert np.array_equal(one.q, same.q)
    assert not np.array_equal(one.q, other.q)
    assert not one.ended
    assert len(one.actions) == 100
    assert one.explored.any()
    greedy = one.q.argmax(1) == one.actions
    assert np.array_equal(one.explored, ~greedy)


def test_an_episode_that_goes_elsewhere_is_noticed() -> None:
    episode = play()
    rewards = episode.rewards.copy()
    rewards[50] += 1
    wrong = video.Episode(**{**vars(episode), "rewards": rewards})
    with pytest.raises(RuntimeError, match="played again"):
        list(video.pictures(wrong, CONFIG, "x"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("video") / "run"
    words = "--game breakout --total-frames 600 --schedule at:400 --width 32 --encoder-width 0.25 --num-envs 2"
    words += " --learning-starts 200 --replay-capacity 1000 --eval-period 0 --execution eager --device cpu"
    assert main([*words.split(), "--run-dir", str(directory)]) == 0
    return directory


def test_films_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["video", str(run), "--frames", "80"]) == 0
    path = run / "video-600-0.mp4"
    assert capsys.readouterr().out.startswith(f"{path}: score 0, 20 decisions, cut off at --frames 80; 1 s, ")
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
    assert frames == 21  # the first screen, and one after every decision
    assert seconds == pytest.approx(21 / 15, abs=0.05)
    gif = run / "film.gif"
    assert main(["video", str(run), "--frames", "80", "--output", str(gif)]) == 0
    with Image.open(gif) as film:
        assert film.size == (660, 420)
        still = np.asarray(film.convert("RGB"))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-frames:v", "1"]
    raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, stdout=subprocess.PIPE)
    first = np.frombuffer(raw.stdout, np.uint8).reshape(420, 660, 3)
    assert np.abs(first.astype(int) - still).mean() < 6  # two codecs, one picture
    assert [each.name for each in run.iterdir() if each.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--output", "film.avi"], ".mp4 or .gif"),
        (["--frames", "0"], "--frames"),
        (["--at", "7"], "choose one it has (600"),
        (["--episode", "first"], "--episode"),
    ],
)
def test_wrong_input_gets_one_line(words: list[str], says: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["video", str(run), *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_no_run_and_no_writer(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["video", str(run / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    assert main(["video", str(run), "--frames", "8"]) == 2
    assert "pip install 'growtrain[video]'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"\.gif"):
        video.write(run / "film.webm", iter(()))
