"""Evaluation: true scores of complete episodes at a small epsilon, beside training and without touching it (DQN Zoo, section "eval").

An evaluation has its own environments and random numbers, derived from the run's seed and the frames at which it is made, so that it is
the same whenever it is repeated. Episodes that end within the budget count, and so does the first episode of a lane that has not ended by
then, with the score it has (`unfinished`): dropping the long episodes would favour the short ones. Where no episode
has ended there is no score.

Units: frames.
"""

import time

import numpy as np
import torch

from growtrain.environments.atari_scores import human_normalized_score
from growtrain.environments.make import make_environment
from growtrain.records import Evaluation
from growtrain.runs.acting import Policy, epsilon_greedy
from growtrain.settings.config import Config

_EVALUATION_STREAM = 0xE7A1  # keeps evaluation's random numbers apart from training's


def random_streams(config: Config, frames: int) -> tuple[np.random.Generator, int]:
    """The generator of exploration and the environments' seed of the evaluation at `frames` training frames."""
    seeds = np.random.SeedSequence(config.entropy, spawn_key=(_EVALUATION_STREAM, frames)).spawn(2)
    return np.random.default_rng(seeds[0]), int(seeds[1].generate_state(1, np.uint64)[0])


def evaluate(policy: Policy, config: Config, *, frames: int, stage: int, device: torch.device) -> Evaluation:
    """Plays `config.eval_frames` frames at `config.eval_epsilon` and reports the true scores.

    Args:
        policy: (N, stack, 84, 84) uint8 on `device` -> (N, A) action values.
        config: game, environment settings, epsilon and budget.
        frames: training frames behind the policy; part of the seed.
        stage: its injections, for the record.
        device: where the policy takes observations.
    """
    start = time.perf_counter()
    generator, seed = random_streams(config, frames)
    environment = make_environment(config, seed=seed)
    scores: list[float] = []
    running = np.zeros(config.num_envs)
    complete = np.zeros(config.num_envs, dtype=np.bool_)
    try:
        step = environment.start()
        num_steps = max(1, config.eval_frames // (config.frame_skip * config.num_envs))
        for _ in range(num_steps):
            q = policy(torch.from_numpy(step.observation).to(device)).cpu().numpy()
            environment.send(epsilon_greedy(q, config.eval_epsilon, generator))
            step = environment.recv()
            running = np.where(step.started, 0.0, running + step.reward)
            complete |= step.started
            scores += [float(score) for score in step.episode_returns]
    finally:
        environment.close(raise_if_closed=False)
    scores += [
        float(score) for score in running[~complete]
    ]  # a lane's first episode only: later ones are left out whole
    mean = float(np.mean(scores)) if complete.any() else None
    return Evaluation(
        frames=frames,
        stage=stage,
        episode_return=mean,
        episode_return_std=None if mean is None else float(np.std(scores)),
        human_normalized_score=None if mean is None else human_normalized_score(config.game, mean),
        episodes=len(scores),
        unfinished=int((~complete).sum()),
        eval_frames=num_steps * config.frame_skip * config.num_envs,
        wall_seconds=time.perf_counter() - start,
    )
