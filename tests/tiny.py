"""The one small configuration of a run: Atari for real, a network and a budget that two cores take in seconds."""

from typing import Any

from growtrain.settings.config import Config

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


def tiny(**changes: Any) -> Config:
    return Config(**(TINY | changes))


def words(**changes: Any) -> list[str]:
    """The same on the command line."""
    return [str(word) for name, value in (TINY | changes).items() for word in (f"--{name.replace('_', '-')}", value)]
