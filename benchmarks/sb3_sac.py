"""Stable-Baselines3's SAC, as the other side of `sac_speed.py` and `sac_returns.py`; importing it sets nothing.

Units: steps of the environment.
"""

from typing import Any

from growtrain.settings.config import Config


def sb3_model(config: Config, environment: Any) -> Any:
    """Stable-Baselines3's SAC with our settings, silent; raises `ImportError` where it is not installed."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    model = SAC(
        "MlpPolicy",
        environment,
        learning_rate=config.lr,
        buffer_size=config.replay_capacity,
        learning_starts=config.learning_starts,
        batch_size=config.batch_size,
        tau=config.target_tau,
        gamma=config.discount,
        train_freq=1,
        gradient_steps=1,
        policy_kwargs={"net_arch": [config.width, config.width]},
        seed=config.seed,
        device="cpu",
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model
