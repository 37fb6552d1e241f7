"""Presets: functions that return a full `Config`, with the source of every default.

`paper`: the baseline of Nikishin et al. (2023), inferred to be DQN Zoo's `double_q` agent (Quan & Ostrovski 2020; van Hasselt et al. 2016).
`modern`: what later work made of it: sticky actions (Machado et al. 2018) and Adam (Obando-Ceron & Castro 2021; Dopamine).

Deviations from DQN Zoo: 1. environments are stepped as a vector and are not reset every 1M frames (with many lanes that would cut
most episodes short); 2. for budgets below 200M frames, warm-up, epsilon's decay, target period, replay, evaluation and periods shrink.
"""

from typing import Any

from growtrain.settings.budget import shrunk
from growtrain.settings.config import Config, PresetName
from growtrain.settings.text import ConfigError


def paper(**overrides: Any) -> Config:
    """DQN Zoo `double_q`: every default of `Config` (DQN Zoo `double_q/run_atari.py`), at 200M frames."""
    return Config(**{"preset": "paper"} | overrides)


def modern(**overrides: Any) -> Config:
    """Double DQN with the settings that later work settled on."""
    values: dict[str, Any] = {
        "preset": "modern",
        "sticky_actions": 0.25,  # Machado et al. 2018, section 5; Gymnasium's ALE v5
        "life_loss_terminal": False,  # Machado et al. 2018: no life-loss signal
        "optimizer": "adam",  # Obando-Ceron & Castro 2021 ("Revisiting Rainbow"), section 5
        "lr": 6.25e-5,  # Hessel et al. 2018, table 1; Dopamine's Adam setting
        "optimizer_eps": 1.5e-4,  # Hessel et al. 2018, table 1; Dopamine
        "output_bias": "per_action",  # Dopamine's Nature network
        "learning_starts": 80_000,  # Dopamine: 20k agent steps; Hessel et al. 2018
        "epsilon_decay_frames": 1_000_000,  # Dopamine: 250k agent steps
        "target_period": 32_000,  # Dopamine: 8k agent steps; Hessel et al. 2018: 32k frames
    }
    return Config(**values | overrides)


def resolve(preset: PresetName, explicit: dict[str, Any]) -> tuple[Config, list[str]]:
    """The configuration of a preset with explicitly given settings, scaled to its budget.

    Args:
        preset: `paper` or `modern`.
        explicit: settings by field name; they always win and are never scaled.

    Returns:
        The configuration, and what there is to say of it: which settings a budget below 200M frames has shrunk.
    """
    makers = {"paper": paper, "modern": modern}
    if preset not in makers:
        raise ConfigError(f"--preset is {preset!r}: choose one of {', '.join(makers)}")
    return shrunk(makers[preset](), explicit)
