"""One evaluation episode as a video: the game in colour, and beside it what the network thinks of each action.

The episode is the first that `growtrain evaluate --num-envs 1` plays, at the same epsilon and from the same random numbers. It is played
twice: by the agent, which sees small gray frames, and then, from the same seed and with the same actions, by an emulator that shows the
whole screen. An episode is a function of its seed and actions, sticky actions and no-ops included; that rewards and end are the same is
checked at every decision. So the axes and the length of the plot are known before the first picture is drawn, and memory holds no frames.

An MP4 is H.264, by PyAV; a GIF needs Pillow alone, which keeps all its pictures in memory: hence its limit.

Units: frames are the emulator's, 60 a second; a decision is 4 of them, and one picture; layouts are in pixels of the game.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from growtrain.environments.base import Actions, Frames
from growtrain.environments.make import make_environment, replay_screens
from growtrain.learners.base import AbstractLearner
from growtrain.runfiles import PARTIAL
from growtrain.runs.acting import Policy
from growtrain.runs.acting import play as play_on
from growtrain.runs.checkpoint import load_learner
from growtrain.runs.evaluation import random_streams
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError, format_count

PICTURES_PER_SECOND = 15  # a decision each: real time where four frames of 60 a second are one
MAX_GIF_FRAMES = 3_600
_SCALES = {".mp4": 3, ".gif": 2}  # pixels of the picture for each of the game
_SCREEN, _SIZE = (160, 210), (300, 210)  # (W, H) of the largest screen, and of a picture
_PANEL, _BARS, _BARS_END, _RIGHT = 165, 217, 271, 295  # edges: of names, bars from low to high, and values
_TOP = 38  # of the bars
# Okabe and Ito's: told apart by colour-blind viewers, and by their lightness.
_BACK, _TEXT, _FAINT, _OTHER, _CHOSEN = "#101010", "#FFFFFF", "#505050", "#0072B2", "#E69F00"


@dataclass(frozen=True, kw_only=True)
class Episode:
    """What was played, T decisions with A actions.

    Attributes:
        config: of the run, with one environment.
        seed: of the environment that played the episode.
        game: of a chain, counted from 0.
        action_names: A names, such as "NOOP".
        actions: (T,) int64, what was chosen; or (T, A) float32.
        q: (T, A) float32, action values before each choice; or the continuous actions.
        values: (T,) float32, the greatest action value; or the value of the continuous action.
        rewards: (T,) float32, true ones.
        ended: whether the last decision ended it.
        ending: how it ended, or did not, in words.
    """

    config: Config
    seed: int
    game: int
    action_names: tuple[str, ...]
    actions: Actions
    q: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float32]
    ended: bool
    ending: str


def film(run: Path, output: Path | None, *, at: int | None, seed: int | None, frames: int | None) -> Iterator[str]:
    """Plays an episode and writes its video; yields a line when each of the two is done.

    Args:
        run: the run's directory.
        output: a path that ends in .mp4 or .gif, written over at once when the video is whole; None: in the run's directory.
        at: frames of the checkpoint; None: the newest.
        seed: in place of the run's.
        frames: the most that are played; None: the whole episode, or `MAX_GIF_FRAMES` of a GIF.

    Raises:
        ConfigError: there is no such checkpoint, or the video cannot be written as asked; nothing was played.
    """
    suffix = ".mp4" if output is None else output.suffix.lower()
    if suffix not in _SCALES:
        raise ConfigError(f"--output {output} must end in .mp4 or .gif, which says what to write")
    if suffix == ".mp4" and find_spec("av") is None:
        raise ConfigError("an MP4 needs PyAV: pip install 'growtrain[video]', or name an --output that ends in .gif")
    if suffix == ".gif" and frames is not None and frames > MAX_GIF_FRAMES:
        raise ConfigError(
            f"--frames {frames}: a GIF has at most {MAX_GIF_FRAMES}, a minute: lower it, or write an .mp4"
        )
    learner, config, trained, stage = load_learner(run, torch.device("cpu"), at=at)
    if frames is not None and frames < config.frame_skip:
        raise ConfigError(f"--frames {frames} must be at least {config.frame_skip}, one decision")
    game = config.game_after(trained)  # with the lanes of the run
    config = dataclasses.replace(config, num_envs=1, seed=config.seed if seed is None else seed)
    if config.continuous:  # whether anything here can draw it is known only once it is tried
        replay_screens(config, seed=0, game=0, actions=np.zeros((0, 0), np.float32))
    output = run / f"video-{trained}-s{config.seed}.mp4" if output is None else output
    if output.is_dir():
        raise ConfigError(f"--output {output} is a directory: name a file in it")
    return _film(learner, config, trained, stage, game, output.absolute(), frames)


def _film(
    learner: AbstractLearner, config: Config, trained: int, stage: int, game: int, output: Path, frames: int | None
) -> Iterator[str]:
    """The two parts of `film`, once it is known what to play and where the video goes."""
    suffix, partial = output.suffix.lower(), output.with_name(output.name + PARTIAL)
    try:
        partial.open("wb").close()
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written ({error.strerror}): choose another place") from error
    try:
        limit = MAX_GIF_FRAMES if suffix == ".gif" else config.max_episode_frames
        episode = play(learner.act, config, trained, limit if frames is None else frames, learner.values, game=game)
        played = len(episode.actions)
        yield (
            f"score {episode.rewards.sum():.0f} in {played} decisions, {played * config.frame_skip} frames: {episode.ending}; drawing it"
        )
        network = f"{config.schedule}, stage {stage}, after {format_count(trained)} frames"
        shown = pictures(episode, network, _SCALES[suffix])
        if suffix == ".gif":
            _write_gif(shown, played + PICTURES_PER_SECOND, partial)
        else:
            _write_mp4(shown, partial)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    seconds = played / PICTURES_PER_SECOND + 1
    yield f"{output}: {seconds:.1f} s, {output.stat().st_size / 1e6:.2f} MB"


def play(
    policy: Policy,
    config: Config,
    trained: int,
    max_frames: int,
    value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    *,
    game: int = 0,
) -> Episode:
    """Plays the first episode of the evaluation at `trained` frames of training, or `max_frames` of it.

    Args:
        policy: action values, or a distribution's parameters, of observations.
        config: of the run, with one environment.
        trained: frames of training.
        max_frames: the most that are played.
        value: of observations and continuous actions; needed only for those.
        game: of a chain, from 0.
    """
    generator, seed = random_streams(config, trained)
    environment = make_environment(config, seed=seed)
    environment.enter(game)
    actions, values, shown, rewards = [], [], [], []
    num_steps = max_frames // config.frame_skip
    ending = f"not over after {format_count(num_steps * config.frame_skip)} frames"
    try:
        for played in islice(play_on(environment, policy, config.eval_epsilon, generator), num_steps):
            step, q = played.after, played.decision.q
            actions.append(played.decision.actions)
            observation = torch.from_numpy(played.before.observation)
            if config.continuous:
                assert value is not None
                done = np.asarray(played.decision.actions, dtype=np.float32)
                values.append(value(observation, torch.from_numpy(done)).numpy())
                shown.append(done)
            else:
                shown.append(policy(observation).numpy() if q is None else q)
                values.append(shown[-1].max(1))
            rewards.append(step.reward)
            if step.started:
                ending = "game over" if step.terminated else f"cut at {format_count(config.max_episode_frames)} frames"
                break
    finally:
        environment.close(raise_if_closed=False)
    return Episode(
        config=config,
        seed=seed,
        game=game,
        action_names=environment.action_meanings,
        actions=np.concatenate(actions),
        q=np.concatenate(shown),
        values=np.concatenate(values),
        rewards=np.concatenate(rewards),
        ended=bool(step.started[0]),
        ending=ending,
    )


def screens(episode: Episode) -> Iterator[Frames]:
    """Plays an episode again and yields the T + 1 screens, (H, W, 3) uint8: before each decision, and at the end.

    Raises:
        RuntimeError: a reward or the end is not that of the episode.
    """
    last = len(episode.actions) - 1
    shown = replay_screens(episode.config, seed=episode.seed, game=episode.game, actions=episode.actions)
    yield next(shown).picture
    for t, screen in enumerate(shown):
        if screen.reward != episode.rewards[t] or screen.ended != (episode.ended and t == last):
            raise RuntimeError(
                f"decision {t} (action {episode.actions[t]}) did not lead where it had led: another emulator?"
            )
        yield screen.picture


def pictures(episode: Episode, network: str, scale: int) -> Iterator[Image.Image]:
    """Draws an episode: T pictures, and a second of how it ended.

    Args:
        episode: what was played.
        network: a line about it.
        scale: pixels for each of the game's; a picture has (300 x scale, 210 x scale).
    """
    panel = _Panel(episode, network, scale)
    scores = np.cumsum(episode.rewards, dtype=np.float64) - episode.rewards
    last, config = len(episode.actions) - 1, episode.config
    for t, screen in enumerate(screens(episode)):
        if t <= last:
            yield panel.draw(screen, t, float(scores[t]), t * config.frame_skip)
    end = panel.draw(screen, last, float(episode.rewards.sum()), (last + 1) * config.frame_skip, episode.ending)
    for _ in range(PICTURES_PER_SECOND):
        yield end


class _Panel:
    """Where everything is; the axes are those of the whole episode, so that nothing jumps."""

    def __init__(self, episode: Episode, network: str, scale: int) -> None:
        self.episode, self.scale = episode, scale
        q, best = episode.q, episode.values
        self.low, self.high = float(q.min()), float(q.max())
        self.row = min(9.5, 108 / q.shape[1])
        self.digits = min(max(2 - math.floor(math.log10((self.high - self.low) or 1)), 0), 4)
        # A point of the plot for each of its pixels, or for each decision where there are fewer.
        count = min(len(best), (_RIGHT - _BARS) * scale)
        edges = np.linspace(0, len(best), count + 1).astype(int)
        self.ends = edges[1:]
        means = [float(best[a:b].mean()) for a, b in pairwise(edges)]
        lowest, highest = min(means), max(means)
        xs = np.linspace(_BARS, _RIGHT, count)
        self.points = [
            (x * scale, (199 - 38 * (y - lowest) / ((highest - lowest) or 1)) * scale)
            for x, y in zip(xs.tolist(), means, strict=True)
        ]
        self.still = Image.new("RGB", (_SIZE[0] * scale, _SIZE[1] * scale), _BACK)
        draw = ImageDraw.Draw(self.still)
        self._text(draw, _PANEL, 3, episode.config.game, 10)
        self._text(draw, _PANEL, 15, network)
        bottom = _TOP + self.row * q.shape[1] + 1
        self._text(draw, _BARS, bottom, self._number(self.low), 5)
        self._text(draw, _BARS_END, bottom, self._number(self.high), 5, anchor="ra")
        self._text(draw, _BARS - 3, 159, self._number(highest), 5, anchor="ra")
        self._text(draw, _PANEL, 176, "Q" if episode.config.continuous else "max Q")
        self._text(draw, _BARS - 3, 196, self._number(lowest), 5, anchor="ra")
        self._text(draw, _BARS, 203, "0 s", 5)
        self._text(draw, _RIGHT, 203, f"{len(best) / PICTURES_PER_SECOND:.0f} s", 5, anchor="ra")
        for y in (160, 200):
            draw.line([(_BARS * scale, y * scale), (_RIGHT * scale, y * scale)], _FAINT)

    def draw(self, screen: Frames, t: int, score: float, frame: int, ending: str = "") -> Image.Image:
        """The picture of decision t, or of the end."""
        picture, scale = self.still.copy(), self.scale
        game = Image.fromarray(screen)
        times = min(_SCREEN[0] * scale // game.width, _SCREEN[1] * scale // game.height)
        picture.paste(game.resize((game.width * times, game.height * times), Image.Resampling.NEAREST))
        draw = ImageDraw.Draw(picture)
        self._text(draw, _PANEL, 24, f"score {score:.0f}")
        self._text(draw, _RIGHT, 24, f"frame {frame}", anchor="ra")
        for index, (name, q) in enumerate(zip(self.episode.action_names, self.episode.q[t].tolist(), strict=True)):
            chosen = not self.episode.config.continuous and index == self.episode.actions[t]
            color, bar = (_CHOSEN, _CHOSEN) if chosen else (_TEXT, _OTHER)
            top, size = _TOP + self.row * index, min(6, self.row)
            self._text(draw, _PANEL, top + self.row / 2, name, size, color, anchor="lm")
            self._text(draw, _RIGHT, top + self.row / 2, self._number(q), size, color, anchor="rm")
            end = _BARS + (_BARS_END - _BARS) * (q - self.low) / ((self.high - self.low) or 1)
            draw.rectangle([_BARS * scale, (top + 0.5) * scale, end * scale, (top + self.row - 1) * scale], bar)
        seen = self.points[: int(np.searchsorted(self.ends, t, side="right")) + 1]
        draw.line(seen, _CHOSEN, width=scale - 1)
        if ending:
            draw.rectangle([0, 95 * scale, 160 * scale - 1, 113 * scale], _BACK)
            self._text(draw, 80, 104, ending, 8, anchor="mm")
        return picture

    def _number(self, value: float) -> str:
        return f"{value:.{self.digits}f}"

    def _text(
        self,
        draw: ImageDraw.ImageDraw,
        x: float,
        y: float,
        text: str,
        size: float = 6.5,
        color: str = _TEXT,
        anchor: str = "la",
    ) -> None:
        draw.text((x * self.scale, y * self.scale), text, color, _font(size * self.scale), anchor)


@cache
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _write_mp4(shown: Iterator[Image.Image], path: Path) -> None:
    import av

    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=PICTURES_PER_SECOND, options={"crf": "20"})
        stream.width, stream.height = (pixels * _SCALES[".mp4"] for pixels in _SIZE)
        stream.pix_fmt = "yuv420p"  # what every player can show
        for picture in shown:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def _write_gif(shown: Iterator[Image.Image], count: int, path: Path) -> None:
    # A GIF counts in hundredths of a second: 7, 6 and 7 of them in turn are 15 pictures a second.
    ticks = [round(100 * index / PICTURES_PER_SECOND) for index in range(count + 1)]
    durations = [10 * (end - start) for start, end in pairwise(ticks)]
    next(shown).save(path, "GIF", save_all=True, append_images=shown, duration=durations, loop=0)
