"""The supervised plasticity probe: one network learns task after task, and each intervention shows what it gives back.

Nikishin et al. 2023, section 3, regress the returns of successive policies on frames of Up'n'Down and find that a warm-started network
learns ever more slowly while a fresh one learns every task. Here the frames are real, too, and the tasks are cheap: a task is a target for
each of `num_frames` frames, learned for `num_updates` updates of `batch_size`. Its error is the mean squared error over all frames, divided
by the target's variance: 1 is nothing learned, what a fresh network reaches is plasticity kept.

Targets, one row per task:
    random: independent N(0, 1) for every frame and task (Lyle et al. 2022, "Understanding and Preventing Capacity Loss", section 3:
        target-fitting capacity). Whatever was learned before only interferes.
    value: discounted sums of rewards along the play, whose reward and horizon change from task to task as under a policy that improves
        (Dabney et al. 2021, "The Value-Improvement Path"; random cumulants as in Lyle et al. 2021, "On the Effect of Auxiliary Tasks").
        With xi independent N(0, 1) for every step of the play,
            r_0 = xi_0,   r_k = rho r_{k-1} + sqrt(1 - rho^2) xi_k,   gamma_k = 1 - 1 / h_k,   h_k = h_0 (h_last / h_0)^(k / (K - 1))
            G_k(t) = m + r_k(t) + gamma_k G_k(t + 1), and without the last term where an episode or the play ends.
        Neighbouring tasks correlate, and the scale grows with the horizon.

What an intervention does is in `arms`. All of them continue from one warm-started network, the trunk, see the same frames, targets and
batches in the same order and, where they draw fresh weights, draw from the same generator: differences between arms of one seed are paired.

Deviations: 1. Targets are not the returns of trained policies (the paper's 20 snapshots of a Double DQN). 2. The squared error, not Huber.
3. `small` is a network and a frame size of our own, for speed. 4. What the settings lose is measured, not assumed; see `SETTINGS`.

Units: tasks are counted from 0; `seconds` are of one thread.
"""

import itertools
import math
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from growtrain.environments.make import make_environment
from growtrain.probe.settings import SIDES, Cell, ProbeConfig
from growtrain.runs import acting
from growtrain.runs.checkpoint import load_learner
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError

NUM_LANES = 8
SPACING = 16  # agent steps between the frames taken from a lane: neighbours differ visibly
CORRELATION = 0.5  # rho
HORIZONS = (1.0, 30.0)  # h_0 and h_last, agent steps
MEAN_REWARD = 0.0  # m


@dataclass(frozen=True)
class Play:
    """Distinct frames of one stretch of play.

    Attributes:
        frames: (N, 4, S, S) uint8 stacks.
        kept: (N,) their positions in the flattened (T, L) steps of the play.
        ended: (T, L) bool, an episode ended with this step.
    """

    frames: npt.NDArray[np.uint8]
    kept: npt.NDArray[np.int64]
    ended: npt.NDArray[np.bool_]


@cache
def play(config: ProbeConfig, seed: int) -> Play:
    """Plays the game, by chance or by the policy at its evaluation epsilon, and keeps `num_frames` distinct frames.

    Raises:
        ConfigError: the policy is of another game, or the play shows too few distinct frames.
    """
    policy: acting.Policy = _unasked
    epsilon = 1.0
    if config.policy:
        learner, run, _, _ = load_learner(Path(config.policy), torch.device("cpu"))
        if run.game != config.game:
            raise ConfigError(f"--policy {config.policy} plays {run.game}: add --game {run.game}")
        policy, epsilon = learner.act, run.eval_epsilon
    rng = rng_of(seed, "play")
    environment = make_environment(Config(game=config.game, num_envs=NUM_LANES), seed=seed_of(seed, "environment"))
    num_steps = -(-2 * config.num_frames // NUM_LANES) * SPACING
    stacks, ended = [], np.zeros((num_steps, NUM_LANES), dtype=np.bool_)
    try:
        steps = acting.play(environment, policy, epsilon, rng)
        for t, played in enumerate(itertools.islice(steps, num_steps)):
            if t % SPACING == 0:
                stacks.append(played.before.observation)
            ended[t] = played.after.started
    finally:
        environment.close(raise_if_closed=False)
    frames = _resize(np.concatenate(stacks), SIDES[config.size])
    _, distinct = np.unique(frames.reshape(len(frames), -1), axis=0, return_index=True)
    if len(distinct) < config.num_frames:
        raise ConfigError(
            f"{config.game} showed {len(distinct)} distinct frames: --num-frames {config.num_frames} is too many"
        )
    chosen = np.sort(rng.permutation(np.sort(distinct))[: config.num_frames])
    positions = np.arange(num_steps * NUM_LANES).reshape(num_steps, NUM_LANES)[::SPACING].ravel()
    return Play(frames[chosen], positions[chosen], ended)


def _unasked(observation: torch.Tensor) -> torch.Tensor:
    """The policy of random play."""
    raise AssertionError("random play asks no policy")


def _resize(frames: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Means over blocks of pixels: (N, 4, 84, 84) -> (N, 4, side, side); `side` divides 84."""
    block = frames.shape[-1] // side
    blocks = frames.reshape(*frames.shape[:2], side, block, side, block)
    means: npt.NDArray[np.float32] = blocks.mean((3, 5), dtype=np.float32)
    return means.round().astype(np.uint8)


def random_targets(num_tasks: int, num_frames: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Independent N(0, 1): (K, N)."""
    return rng.standard_normal((num_tasks, num_frames))


def value_targets(num_tasks: int, ended: npt.NDArray[np.bool_], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """G_k(t) of every step of a play, as the module defines it: (T, L) -> (K, T, L)."""
    first, last = HORIZONS
    rewards = rng.standard_normal(ended.shape)
    values = np.empty((num_tasks, *ended.shape))
    for k in range(num_tasks):
        if k:
            rewards = CORRELATION * rewards + math.sqrt(1 - CORRELATION**2) * rng.standard_normal(ended.shape)
        discount = 1 - 1 / (first * (last / first) ** (k / (num_tasks - 1)))
        value = np.zeros(ended.shape[1])
        for t in reversed(range(len(ended))):
            value = MEAN_REWARD + rewards[t] + discount * np.where(ended[t], 0.0, value)
            values[k, t] = value
    return values


def make_targets(config: ProbeConfig, cell: Cell) -> npt.NDArray[np.float32]:
    """The targets (K, N) of a cell's tasks."""
    rng, data = rng_of(cell.seed, "targets"), play(config, cell.seed)
    if cell.targets == "random":
        targets = random_targets(config.num_tasks, config.num_frames, rng)
    else:
        targets = value_targets(config.num_tasks, data.ended, rng).reshape(config.num_tasks, -1)[:, data.kept]
    return targets.astype(np.float32)


def seed_of(seed: int, stream: str, task: int = 0) -> int:
    """A seed for one use: streams of different seeds, names and tasks are unrelated."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(stream.encode()), task])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def rng_of(seed: int, stream: str) -> np.random.Generator:
    """A generator of one use, for NumPy."""
    return np.random.default_rng(seed_of(seed, stream))


def generator_of(seed: int, stream: str, task: int = 0) -> torch.Generator:
    """A generator of one use, for torch on the CPU."""
    return torch.Generator().manual_seed(seed_of(seed, stream, task))
