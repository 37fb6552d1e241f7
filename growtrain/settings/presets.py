"""Presets: functions that return a full `Config`, with the source of every default.

`paper`: the baseline of Nikishin et al. (2023), inferred to be DQN Zoo's `double_q` agent (Quan & Ostrovski 2020; van Hasselt et al. 2016).
`modern`: what later work made of it: sticky actions (Machado et al. 2018) and Adam (Obando-Ceron & Castro 2021; Dopamine).

Deviations from DQN Zoo: 1. environments are stepped as a vector and are not reset every 1M frames (with many lanes that would cut
most episodes short); 2. for budgets below 200M frames, warm-up, epsilon's decay, target period, replay, evaluation and periods shrink.
"""

import dataclasses
from typing import Any

from growtrain.settings.config import FRAME_SKIP, PAPER_TOTAL_FRAMES, Config, ConfigError, PresetName, format_count


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


# Settings that shrink with the budget, and the least that each may become (frames, except replay_capacity in transitions).
_SCALED_MINIMA = {
    "learning_starts": 4_000,
    "epsilon_decay_frames": 20_000,
    "target_period": 4_000,
    "replay_capacity": 25_000,
    "eval_period": 25_000,
    "eval_frames": 40_000,  # most episodes come to their end
    "log_period": 2_000,
    "diagnostics_period": 25_000,
    "checkpoint_period": 25_000,
}


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
    full = makers[preset]()
    total_frames = int(explicit.get("total_frames", full.total_frames))
    num_envs = int(explicit.get("num_envs", full.num_envs))
    if total_frames <= 0 or total_frames >= PAPER_TOTAL_FRAMES:
        return dataclasses.replace(full, **explicit), []
    scaled: dict[str, int] = {}
    for name, minimum in _SCALED_MINIMA.items():
        if name not in explicit:
            value: int = getattr(full, name)
            share = round(value * total_frames / PAPER_TOTAL_FRAMES)
            # Evaluation, logs and checkpoints stay at about what a person would look at; the rest leaves most of the run to learning.
            minimum = max(minimum, total_frames // 4) if name in ("eval_period", "checkpoint_period") else minimum
            if name != "replay_capacity":
                most = total_frames // (4 if "period" in name else 2 if name == "eval_frames" else 20)
                minimum = min(minimum, max(1, most))
            minimum = max(minimum, FRAME_SKIP * num_envs) if name == "learning_starts" else minimum
            scaled[name] = min(max(share, minimum), value)
    shrunk = [
        f"{name} {format_count(value)} (of {format_count(getattr(full, name))})"
        for name, value in scaled.items()
        if value != getattr(full, name)
    ]
    notes = [f"below 200M frames these shrink with the budget: {', '.join(shrunk)}"] if shrunk else []
    return dataclasses.replace(full, **scaled | explicit), notes
