"""The small configurations of a run, of Atari and of MuJoCo for real: networks and budgets that two cores take in seconds."""

from typing import Any

from growtrain.settings.config import Config
from growtrain.settings.presets import sac

TINY: dict[str, Any] = {
    "game": "pong",
    "schedule": "at:800",
    "total_frames": 1_600,
    "num_envs": 2,
    "width": 32,
    "encoder_width": 0.25,
    "batch_size": 8,
    "learning_starts": 200,
    "epsilon_decay_frames": 500,
    "target_period": 400,
    "replay_capacity": 300,
    "eval_period": 0,
    "log_period": 200,
    "checkpoint_period": 0,
}

SAC: dict[str, Any] = {
    "game": "mujoco/Hopper-v5",
    "schedule": "fixed",
    "total_frames": 400,
    "num_envs": 2,
    "width": 16,
    "learning_starts": 100,
    "replay_capacity": 500,
    "batch_size": 16,
    "replay_ratio": 0.25,
    "eval_period": 0,
    "eval_episodes": 1,
    "diagnostics_period": 0,
    "log_period": 100,
    "checkpoint_period": 0,
    "device": "cpu",
}


def tiny(**changes: Any) -> Config:
    return Config(**(TINY | changes))


def tiny_sac(**changes: Any) -> Config:
    return sac(**SAC | changes)


def words(**changes: Any) -> list[str]:
    """The same on the command line."""
    return [str(word) for name, value in (TINY | changes).items() for word in (f"--{name.replace('_', '-')}", value)]
