"""One evaluation episode of a run as a film: the game in colour, and beside it the values of its actions.

The agent plays on its own grey 84 x 84 frames; the emulator then plays the same seed and actions again in colour. Values are drawn on one
scale throughout, from the least to the greatest of the episode.

Units: 15 decisions a second, each of four frames, which is the speed of the console.
"""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from growtrain.collection import Policy, epsilon_greedy, make_environment
from growtrain.config import FRAME_SKIP, Config, ConfigError
from growtrain.environments.atari import replay_in_color

DECISIONS_PER_SECOND = 15
_GIF_MILLISECONDS = 70  # a GIF counts in hundredths of a second
MAX_FRAMES = {".mp4": 18_000, ".gif": 3_600}  # unless asked for; a GIF is put together in memory
_VIDEO_STREAM = 0xF11A  # keeps its random numbers apart from training's and evaluation's
_SCREEN = (320, 420)  # pixels, the game's screen twice as large
_PANEL = 340
_INK, _FAINT, _PAPER = "#222222", "#999999", "#ffffff"
_BAR, _CHOSEN, _CURVE = "#56B4E9", "#D55E00", "#0072B2"  # Okabe and Ito's


@dataclass(frozen=True)
class Episode:
    """An episode of T decisions.

    Attributes:
        seed: of its environment.
        actions: (T,).
        explored: (T,) whether the action was drawn by epsilon.
        q: (T, A) values from which each was chosen.
        rewards: (T,) true ones.
        meanings: (A,) names of the actions.
        ended: False if the budget of frames ended before the episode.
    """

    seed: int
    actions: npt.NDArray[np.int64]
    explored: npt.NDArray[np.bool_]
    q: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float32]
    meanings: tuple[str, ...]
    ended: bool

    @property
    def score(self) -> float:
        """The sum of its rewards."""
        return float(self.rewards.sum())


def play(
    policy: Policy, config: Config, *, frames: int, episode: int, max_frames: int, device: torch.device
) -> Episode:
    """Plays one episode as an evaluation does, at `config.eval_epsilon`.

    Args:
        policy: (1, stack, 84, 84) uint8 on `device` -> (1, A) action values.
        config: of the run.
        frames: training frames behind the policy; part of the seed.
        episode: which one, from 0.
        max_frames: after which it is cut off.
        device: where the policy takes observations.
    """
    seeds = np.random.SeedSequence(config.entropy, spawn_key=(_VIDEO_STREAM, frames, episode)).spawn(2)
    generator = np.random.default_rng(seeds[0])
    seed = int(seeds[1].generate_state(1, np.uint64)[0])
    environment = make_environment(dataclasses.replace(config, num_envs=1), seed=seed)
    actions: list[int] = []
    values: list[npt.NDArray[np.float32]] = []
    rewards: list[float] = []
    ended = False
    try:
        step = environment.start()
        while not ended and len(actions) * FRAME_SKIP < max_frames:
            q = policy(torch.from_numpy(step.observation).to(device)).cpu().numpy()
            action = epsilon_greedy(q, config.eval_epsilon, generator)
            environment.send(action)
            step = environment.recv()
            actions.append(int(action[0]))
            values.append(q[0])
            rewards.append(float(step.reward[0]))
            ended = bool(step.started[0])
    finally:
        environment.close(raise_if_closed=False)
    q = np.stack(values)
    chosen = np.array(actions)
    explored = q[np.arange(len(q)), chosen] < q.max(1)
    return Episode(seed, chosen, explored, q, np.array(rewards, dtype=np.float32), environment.action_meanings, ended)


def pictures(episode: Episode, config: Config, heading: str) -> Iterator[Image.Image]:
    """One picture for each decision: the screen on which it was made, and the values from which.

    Raises:
        RuntimeError: the same actions led elsewhere when they were played again.
    """
    replay = replay_in_color(
        config.game,
        episode.seed,
        episode.actions,
        noop_max=config.noop_max,
        repeat_action_probability=config.sticky_actions,
    )
    total = np.cumsum(episode.rewards)
    for t, (screen, reward) in enumerate(replay):
        if t and reward != episode.rewards[t - 1]:
            raise RuntimeError(f"decision {t - 1} was worth {episode.rewards[t - 1]:g}, and {reward:g} played again")
        picture = Image.new("RGB", (_SCREEN[0] + _PANEL, _SCREEN[1]), _PAPER)
        picture.paste(Image.fromarray(screen).resize(_SCREEN, Image.Resampling.NEAREST))
        _draw_panel(picture, episode, min(t, len(total) - 1), heading, float(total[t - 1]) if t else 0.0)
        yield picture


def _draw_panel(picture: Image.Image, episode: Episode, t: int, heading: str, score: float) -> None:
    """Draws values and score of decision t to the right of the screen."""
    draw = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(15), ImageFont.load_default(11)
    left, right = _SCREEN[0] + 12, _SCREEN[0] + _PANEL - 12
    draw.text((left, 6), heading, _INK, small)
    draw.text((left, 24), f"score {score:,.0f}", _INK, large)
    time = t / DECISIONS_PER_SECOND
    draw.text((right, 24), f"{int(time // 60)}:{time % 60:04.1f}", _INK, large, anchor="ra")

    low, high = float(episode.q.min()), float(episode.q.max())
    span = max(high - low, 1e-9)
    bars = left + 112
    height = min(20, 250 // len(episode.meanings))
    for action, (name, value) in enumerate(zip(episode.meanings, episode.q[t], strict=True)):
        top = 54 + action * height
        chosen = action == episode.actions[t]
        draw.text((bars - 6, top + height // 2), name, _CHOSEN if chosen else _INK, small, anchor="rm")
        end = bars + 1 + (right - 50 - bars) * (float(value) - low) / span
        draw.rectangle((bars, top + 2, end, top + height - 2), _CHOSEN if chosen else _BAR)
        draw.text((end + 4, top + height // 2), f"{value:.3g}", _INK, small, anchor="lm")
    if episode.explored[t]:
        draw.text((right, 54 + len(episode.meanings) * height), "by chance", _CHOSEN, small, anchor="ra")

    top, bottom = 340, _SCREEN[1] - 22
    draw.text((left, top - 16), "greatest value", _INK, small)
    draw.line((left, bottom, right, bottom), _FAINT)
    curve = episode.q.max(1)
    across = np.linspace(left, right, len(curve))
    points = list(zip(across.tolist(), (bottom - (bottom - top) * (curve - low) / span).tolist(), strict=True))
    if t:
        draw.line(points[: t + 1], _CURVE)
    x, y = points[t]
    draw.ellipse((x - 3, y - 3, x + 3, y + 3), _CHOSEN)
    draw.text((left, bottom + 4), f"{low:.3g} to {high:.3g} in this episode", _FAINT, small)


def write(path: Path, frames: Iterator[Image.Image]) -> None:
    """Writes an MP4 (H.264) or a GIF; `path` appears when it is whole.

    Raises:
        ConfigError: another suffix, or what writes MP4 is not installed.
    """
    require_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix.lower()}")
    try:
        if path.suffix.lower() == ".gif":
            first = next(frames)
            first.save(partial, save_all=True, append_images=frames, duration=_GIF_MILLISECONDS, loop=0)
        else:
            _write_mp4(partial, frames)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def require_suffix(path: Path) -> None:
    """Raises `ConfigError` for a file that is neither .mp4 nor .gif."""
    if path.suffix.lower() not in MAX_FRAMES:
        raise ConfigError(f"--output {path}: give a file that ends in {' or '.join(MAX_FRAMES)}")


def _write_mp4(path: Path, frames: Iterator[Image.Image]) -> None:
    try:
        from imageio_ffmpeg import write_frames
    except ImportError as error:
        raise ConfigError(f"{error}: pip install 'growtrain[video]', or give an --output that ends in .gif") from error
    size = (_SCREEN[0] + _PANEL, _SCREEN[1])
    writer = write_frames(str(path), size, fps=DECISIONS_PER_SECOND, macro_block_size=4, quality=7)
    writer.send(None)
    for frame in frames:
        writer.send(frame.tobytes())
    writer.close()
