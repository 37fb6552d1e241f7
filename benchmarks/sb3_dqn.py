"""Stable-Baselines3's DQN on Atari in steady state, as the other side of `throughput.py`.

Its best setting depends on the machine, so how its environments are stepped and how many there are is left to the caller.

Units: seconds; emulator frames, 4 per agent step; Stable-Baselines3 counts agent steps over all environments.
"""

import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from growtrain.environments.atari import FRAME_SKIP
from growtrain.environments.games import canonical_game
from growtrain.settings.config import Config

Sample = dict[str, Any]  # of one turn: `seconds`, and what was done in them: `updates`, `frames`, `flops`, `calls`
Arm = Callable[[float], Sample]  # takes about that many seconds


def sb3_schedule(num_envs: int, replay_ratio: float) -> tuple[int, int]:
    """`train_freq` (in steps of all environments) and `gradient_steps` that give exactly this many updates per agent step."""
    per_step = num_envs * Fraction(replay_ratio).limit_denominator(10**6)
    return per_step.denominator, per_step.numerator


def sb3_arm(kind: str, num_envs: int, config: Config, warm_up_updates: int) -> Arm:
    """A learner with a filled replay; a turn is a piece of `learn` that goes on where the last one ended.

    Args:
        kind: `dummy`, environments one after the other in this process, or `subproc`, each in a process.
        num_envs: environments.
        config: of our loop; game, network, batch, replay and target are taken from it.
        warm_up_updates: done before the first turn.

    Raises:
        ImportError: it or what it needs for Atari is not installed.
    """
    import ale_py
    import cv2  # noqa: F401  # its wrappers need it, and say so only when they are used
    import gymnasium
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack

    gymnasium.register_envs(ale_py)
    game = "".join(part.capitalize() for part in canonical_game(config.game).split("_"))
    vec_env_cls = {"dummy": DummyVecEnv, "subproc": SubprocVecEnv}[kind]
    environments = make_atari_env(f"{game}NoFrameskip-v4", n_envs=num_envs, seed=0, vec_env_cls=vec_env_cls)
    train_freq, gradient_steps = sb3_schedule(num_envs, config.replay_ratio)
    learning_starts = config.learning_starts // FRAME_SKIP
    model = DQN(
        "CnnPolicy",
        VecFrameStack(environments, 4),
        buffer_size=config.replay_capacity,
        learning_starts=learning_starts,
        batch_size=config.batch_size,
        train_freq=(train_freq, "step"),
        gradient_steps=gradient_steps,
        target_update_interval=config.target_period // FRAME_SKIP,
        exploration_initial_eps=config.epsilon_end,
        exploration_final_eps=config.epsilon_end,
        optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},
        policy_kwargs={"features_extractor_kwargs": {"features_dim": config.width}},
        device="cpu",
    )
    model.set_logger(Logger(folder=None, output_formats=[]))

    def learn(steps: int) -> Sample:
        before, updates = model.num_timesteps, model._n_updates
        start = time.perf_counter()
        model.learn(steps, log_interval=None, reset_num_timesteps=False)
        seconds, done = time.perf_counter() - start, model.num_timesteps - before
        return {"seconds": seconds, "frames": FRAME_SKIP * done, "updates": model._n_updates - updates}

    learn(learning_starts + num_envs)
    last = learn(round(warm_up_updates / config.replay_ratio))

    def arm(seconds: float) -> Sample:
        nonlocal last
        last = learn(max(1, round(last["frames"] / FRAME_SKIP / last["seconds"] * seconds)))
        return last

    return arm
