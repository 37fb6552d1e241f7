"""Evaluation: true scores of whole episodes at a small epsilon, beside training and without touching it (DQN Zoo, section "eval").

An evaluation has its own environments and random numbers, derived from the run's seed and the frames at which it is made, so that it is
the same whenever it is repeated.

Its number of episodes is fixed beforehand, and those that count are the first that are *begun*, each played to its end: what an
episode scores has no part in whether it counts, and its expectation does not depend on the number of lanes. (The first that *end*
would favour the short ones, and so would a number of frames.) With fewer episodes than lanes, as many lanes are made as there are
episodes; a lane without one left plays on unseen until the last is over. An episode that is cut at `max_episode_frames` is whole: that is
the game's rule, and it bounds the cost.

Of a chain of games it is the one that was played last.

Deviations from DQN Zoo: it plays 500k frames, and counts the episodes that end in them, in one environment.

Units: frames.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch

from growtrain.environments.games import human_normalized_score
from growtrain.environments.make import make_environment
from growtrain.records import Evaluation
from growtrain.runs.acting import Policy, play
from growtrain.settings.config import Config

_EVALUATION_STREAM = 0xE7A1  # keeps evaluation's random numbers apart from training's


def random_streams(config: Config, frames: int) -> tuple[np.random.Generator, int]:
    """The generator of exploration and the environments' seed of the evaluation at `frames` training frames."""
    seeds = np.random.SeedSequence(config.entropy, spawn_key=(_EVALUATION_STREAM, frames)).spawn(2)
    return np.random.default_rng(seeds[0]), int(seeds[1].generate_state(1, np.uint64)[0])


def evaluate(
    policy: Policy,
    config: Config,
    *,
    frames: int,
    stage: int,
    device: torch.device,
    game: int | None = None,
    should_stop: Callable[[], bool | str] = lambda: False,
) -> Evaluation | None:
    """Plays `config.num_eval_episodes` whole episodes at `config.eval_epsilon` and reports the true scores.

    Args:
        policy: (N, C, H, W) uint8 on `device` -> (N, A) action values; N is the number of lanes or less.
        config: game, environment settings, epsilon, lanes and number of episodes.
        frames: training frames behind the policy; part of the seed.
        stage: its injections, for the record.
        device: where the policy takes observations.
        game: of a chain, from 0; None: the one that a run with the lanes of `config` has played last.
        should_stop: asked after every step of the environments, until the last episode is over.

    Returns:
        The scores; None if it was to stop: what was played counts for nothing, and the evaluation can be made again as a whole.
    """
    start = time.perf_counter()
    generator, seed = random_streams(config, frames)
    num_episodes, num_lanes = config.num_eval_episodes, config.num_eval_lanes
    environment = make_environment(dataclasses.replace(config, num_envs=num_lanes), seed=seed)
    environment.enter(config.game_after(frames) if game is None else game)
    scores: dict[int, float] = {}
    playing = list(range(num_lanes))  # the number of each lane's episode, in the order in which they are begun
    num_begun, num_steps = num_lanes, 0
    try:
        for played in play(environment, policy, config.eval_epsilon, generator, device):
            num_steps += 1
            for lane, score in zip(np.flatnonzero(played.after.started), played.after.episode_returns, strict=True):
                if playing[lane] < num_episodes:
                    scores[playing[lane]] = float(score)
                playing[lane] = num_begun
                num_begun += 1
            if len(scores) == num_episodes:
                break
            if should_stop():
                return None
    finally:
        environment.close(raise_if_closed=False)
    counted = list(scores.values())
    mean = float(np.mean(counted))
    return Evaluation(
        frames=frames,
        stage=stage,
        episode_return=mean,
        episode_return_std=float(np.std(counted)),
        human_normalized_score=human_normalized_score(config.game, mean),
        episodes=num_episodes,
        eval_frames=num_steps * config.frame_skip * num_lanes,
        wall_seconds=time.perf_counter() - start,
    )
