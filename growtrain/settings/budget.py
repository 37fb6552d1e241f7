"""What a budget of frames buys: settings that shrink with it, the exploration and the updates that are due in it."""

import dataclasses
from fractions import Fraction
from itertools import pairwise
from typing import Any

from growtrain.settings.config import Config, Shrinks, has_effect
from growtrain.settings.text import format_count

SHRINKING: dict[str, Shrinks] = {
    item.name: item.metadata["shrinks"] for item in dataclasses.fields(Config) if item.metadata["shrinks"]
}
PRIMING_AT_ONCE = 64  # updates of heavy priming whose batches are drawn together, after which a run can be stopped


def shrunk(full: Config, explicit: dict[str, Any], whole: int) -> tuple[Config, list[str]]:
    """A preset's configuration with explicitly given settings, the others shrunk to a smaller budget.

    Evaluation, logs and checkpoints stay at about what a person would look at; the rest leaves most of the run to learning.

    Args:
        full: the preset at its own budget.
        explicit: settings by field name; they always win and are never scaled.
        whole: the budget in frames below which they shrink.

    Returns:
        The configuration, and what there is to say of it.
    """
    total = int(explicit.get("total_frames", full.total_frames))
    if total <= 0 or total >= whole:
        return dataclasses.replace(full, **explicit), []
    scaled: dict[str, int] = {}
    for name, rule in SHRINKING.items():
        idle = full.continuous and not has_effect(name, full)
        if name not in explicit and not idle:
            value: int = getattr(full, name)
            least = max(rule.least, total // rule.at_least if rule.at_least else 0)
            if rule.at_most:
                least = min(least, max(1, total // rule.at_most))
            if name == "learning_starts":  # every environment steps before
                least = max(least, full.frame_skip * int(explicit.get("num_envs", full.num_envs)))
            scaled[name] = min(max(round(value * total / whole), least), value)
    changes = [
        f"{name} {format_count(value)} (of {format_count(getattr(full, name))})"
        for name, value in scaled.items()
        if value != getattr(full, name)
    ]
    notes = (
        [f"below {format_count(whole)} frames these shrink with the budget: {', '.join(changes)}"] if changes else []
    )
    return dataclasses.replace(full, **scaled | explicit), notes


def epsilon_at(config: Config, frames: int) -> float:
    """Exploration epsilon after `frames` frames: constant until learning starts, then linear, then constant."""
    if config.epsilon_decay_frames == 0:
        progress = float(frames >= config.learning_starts)
    else:
        progress = (frames - config.learning_starts) / config.epsilon_decay_frames
    return config.epsilon_start + min(max(progress, 0.0), 1.0) * (config.epsilon_end - config.epsilon_start)


def priming_due(config: Config, agent_steps: int) -> int:
    """Updates that must have been done by heavy priming (Nikishin et al. 2022, "The Primacy Bias", section 3) after these agent steps."""
    return config.priming_updates if agent_steps >= config.learning_starts // config.frame_skip else 0


def updates_due(config: Config, agent_steps: int) -> int:
    """Updates that must have been done after `agent_steps` agent steps: the replay ratio, exactly, of the steps in which it learned.

    It does not until `learning_starts`, nor for as long from where the replay is emptied, which comes before the updates of the step there.
    Those of heavy priming come on top.
    """
    warm_up, skip = config.learning_starts // config.frame_skip, config.frame_skip
    emptied = () if config.keep_replay else config.switch_frames
    lanes = config.num_envs
    # It is emptied at the first step of all lanes by which the frames of the switch are played.
    begun = (0, *((-(-frames // (skip * lanes)) - 1) * lanes for frames in emptied))
    waits = (min(end, agent_steps) - start for start, end in pairwise((*begun, agent_steps)))
    steps = agent_steps - sum(min(max(0, wait), warm_up) for wait in waits)
    in_play = int(Fraction(config.replay_ratio).limit_denominator(10**6) * steps)
    return in_play + priming_due(config, agent_steps)


def crossed(config: Config, period: int, frames: int) -> bool:
    """Whether the step of all environments after which `frames` were played went past a multiple of `period` frames (0: never)."""
    return period > 0 and frames // period > (frames - config.frame_skip * config.num_envs) // period
