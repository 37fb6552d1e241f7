"""Presets: functions that return a full `Config`, with the source of every default.

`paper`: the baseline of Nikishin et al. (2023), inferred to be DQN Zoo's `double_q` agent (Quan & Ostrovski 2020; van Hasselt et al. 2016).
`modern`: what later work made of it: sticky actions (Machado et al. 2018) and Adam (Obando-Ceron & Castro 2021; Dopamine).
`sac`: Soft Actor-Critic (Haarnoja et al. 2018b), the agent of MuJoCo's and the control suite's tasks, which are
played with it unless a preset is given.
`minatar`: the agent that comes with MinAtar (Young & Tian 2019), but for Double DQN, which `--double-dqn no` turns off. Its games are
played with it unless a preset is given: with the paper's numbers a run of theirs would be over before learning had begun.

Deviations from DQN Zoo: 1. environments are stepped as a vector and are not reset every 1M frames (with many lanes that would cut
most episodes short); 2. for budgets below 200M frames, warm-up, epsilon's decay, target period, replay, evaluation and periods shrink.
Deviations from SAC's authors: see `learners.sac`; below 250k frames, warm-up, replay and periods shrink.
Deviations from MinAtar's agent: 1. Double DQN; 2. batches are drawn with replacement; 3. below 1M frames, a fifth of its budget,
they shrink, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from growtrain.environments.games import family_of
from growtrain.settings.budget import shrunk
from growtrain.settings.config import Config, PresetName, has_effect
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


def minatar(**overrides: Any) -> Config:
    """The DQN of MinAtar's repository, `examples/dqn.py`; the names in capitals are its constants."""
    values: dict[str, Any] = {
        "preset": "minatar",
        "game": "minatar/breakout",
        "total_frames": 5_000_000,  # NUM_FRAMES
        "num_envs": 1,  # `dqn`: an update after every frame of one environment
        "sticky_actions": 0.1,  # `Environment`: sticky_action_prob; Young & Tian 2019, section 2
        "max_episode_frames": 10_000,  # ours, beyond any published agent's: the package cuts no episode
        "reward_clip": 0.0,  # `train` takes rewards as they are
        "width": 128,  # QNetwork: fc_hidden
        "output_bias": "per_action",  # QNetwork: output
        "optimizer": "rmsprop",  # optim.RMSprop(centered=True), whose epsilon is outside the root
        "lr": 2.5e-4,  # STEP_SIZE
        "optimizer_eps": 0.01,  # MIN_SQUARED_GRAD
        "optimizer_decay": 0.95,  # SQUARED_GRAD_MOMENTUM; GRAD_MOMENTUM is not used
        "batch_size": 32,  # BATCH_SIZE
        "replay_ratio": 1.0,  # TRAINING_FREQ
        "discount": 0.99,  # GAMMA
        "target_period": 1_000,  # TARGET_NETWORK_UPDATE_FREQ, in updates, of which each frame has one
        "replay_capacity": 100_000,  # REPLAY_BUFFER_SIZE
        "learning_starts": 5_000,  # REPLAY_START_SIZE
        "epsilon_start": 1.0,  # EPSILON
        "epsilon_end": 0.1,  # END_EPSILON
        "epsilon_decay_frames": 100_000,  # FIRST_N_FRAMES
        # Ours: what a person looks at; and on networks as small as this a second thread is waited for longer than it computes.
        "num_threads": 1,
        "eval_period": 250_000,
        "eval_frames": 15_000,
        "log_period": 10_000,
        "diagnostics_period": 50_000,
        "checkpoint_period": 500_000,
    }
    return Config(**values | overrides)


def sac(**overrides: Any) -> Config:
    """Soft Actor-Critic as in Haarnoja et al. 2018b, "Soft Actor-Critic Algorithms and Applications", table 1, unless a line says other."""
    values: dict[str, Any] = {
        "preset": "sac",
        "game": "mujoco/HalfCheetah-v5",
        "total_frames": 1_000_000,  # RL Baselines3 Zoo: n_timesteps of HalfCheetah, Hopper and Walker2d
        "num_envs": 1,
        "max_episode_frames": 1_000,  # Gymnasium's max_episode_steps, less of some; the control suite's
        "reward_clip": 0.0,  # rewards are as they are
        "width": 256,  # "number of hidden units per layer", two hidden layers
        "output_bias": "per_action",  # of a linear layer
        "optimizer": "adam",  # Adam, for critics, actor and temperature
        "lr": 3e-4,
        "optimizer_eps": 1e-8,  # PyTorch's and Stable-Baselines3's default
        "batch_size": 256,
        "replay_ratio": 1.0,  # "gradient steps" 1, for each environment step
        "discount": 0.99,
        "target_tau": 0.005,  # "target smoothing coefficient"
        "replay_capacity": 1_000_000,
        "learning_starts": 10_000,  # Spinning Up's start_steps, and RL Baselines3 Zoo's learning_starts
        "epsilon_start": 1.0,  # until then uniform actions, afterwards the policy's alone
        "epsilon_end": 0.0,
        "epsilon_decay_frames": 0,
        "eval_epsilon": 0.0,  # the mode of the policy
        # Ours: what a person looks at; and on networks as small as this a second thread is waited for longer than it computes.
        "num_threads": 1,
        "eval_period": 50_000,
        "eval_frames": 10_000,
        "log_period": 5_000,
        "diagnostics_period": 25_000,
        "checkpoint_period": 100_000,
    }
    return Config(**values | overrides)


@dataclass(frozen=True)
class Preset:
    """A preset: what makes its configuration, and the budget in frames below which its settings shrink (None: its own)."""

    make: Callable[..., Config]
    whole: int | None = None


PRESETS: dict[PresetName, Preset] = {
    "paper": Preset(paper),
    "modern": Preset(modern),
    "minatar": Preset(minatar, 1_000_000),
    "sac": Preset(sac, 250_000),
}


def resolve(preset: PresetName | None, explicit: dict[str, Any]) -> tuple[Config, list[str]]:
    """The configuration of a preset with explicitly given settings, scaled to its budget.

    Args:
        preset: its name; None: that of the game's family, which of Atari is the paper's but for what an injection freezes: all of the
            network, unless a setting asks for frozen heads.
        explicit: settings by field name; they always win and are never scaled.

    Returns:
        The configuration, and what there is to say of it: which preset the game has chosen, and which settings a short budget has shrunk.
    """
    if preset is None:
        chosen, default = family_of(explicit.get("game", Config.game)).preset, Config.preset
        if chosen == default:
            return _unasked(explicit)
        preset = cast(PresetName, chosen)
        config, notes = resolve(preset, explicit)
        return config, [f"the defaults are those of --preset {preset}, because of the game", *notes]
    if preset not in PRESETS:
        raise ConfigError(f"--preset is {preset!r}: choose one of {', '.join(PRESETS)}")
    row = PRESETS[preset]
    full = row.make(**({"game": explicit["game"]} if "game" in explicit else {}))
    return shrunk(full, explicit, row.whole or full.total_frames)


def _unasked(explicit: dict[str, Any]) -> tuple[Config, list[str]]:
    """Atari, without a preset: the paper's, with networks that are frozen whole where they can be."""
    config, notes = resolve(Config.preset, explicit)
    if not has_effect("freeze", config) or explicit.keys() & {"freeze", "anchor", "trainable_heads"}:
        return config, notes
    try:
        config, notes = resolve(Config.preset, explicit | {"freeze": "network"})
    except ConfigError as error:
        return config, [f"an injection freezes heads; it could not freeze the whole network: {error}", *notes]
    return config, [
        "an injection freezes the whole network (--freeze network); as in the paper: --preset paper",
        *notes,
    ]
