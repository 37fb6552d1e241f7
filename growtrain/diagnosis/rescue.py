"""Going on with an agent that has stopped improving, instead of training another from scratch (Nikishin et al. 2023, section 4).

Of a growtrain run, a rescue is a fork from its newest checkpoint with interventions ahead: replay, optimizer and episodes are all there, so
the first is at the first step. Of a bare file of weights it is a new run whose two networks begin with them. It fills its replay by
acting with its own policy, at the small epsilon of a trained agent, before it learns, and the first intervention comes right after that: an
update or a fresh head on a handful of transitions would ruin what is there. Where whole networks are frozen and the one that is to learn
has other widths, the file's is frozen from the start, and the other, whose output is 0 at first, learns beside it.

Units: frames; the times of a rescue's schedule count from where it begins.
"""

import dataclasses
from typing import Any

from growtrain.environments.base import Spec
from growtrain.growth.kinds import kind_of
from growtrain.learners.foreign_weights import Weights
from growtrain.runs.checkpoint import Checkpoint
from growtrain.runs.resuming import changed_config, done_injections, next_time
from growtrain.settings.config import Config
from growtrain.settings.presets import resolve
from growtrain.settings.schedules import copy_of_last, make_schedule
from growtrain.settings.text import ConfigError, flag


def default_frames(checkpoint: Checkpoint) -> int:
    """Half of what the run has played."""
    return max(2 * checkpoint.config.frame_skip * checkpoint.config.num_envs, checkpoint.frames // 2)


def rescue_schedule(name: str | None, past: tuple[int, ...], begin: int, frames: int) -> str:
    """The `at:` schedule of a rescue.

    Args:
        name: `grow1x`, `grow3x` or `at:...`, over `frames`; None for one intervention at the start.
        past: times in the past of the run.
        begin: the earliest time.
        frames: its budget from there.

    Raises:
        ConfigError: it is no such schedule.
    """
    if name is None:
        times: tuple[int, ...] = (begin,)
    else:
        if name == "at-switch":
            raise ConfigError(f"--schedule {name} is of a run's own switches: a rescue takes grow1x, grow3x or at:...")
        schedule = make_schedule(name, frames)
        if not schedule.injection_frames:
            raise ConfigError(f"--schedule {name} rescues nothing: choose grow1x, grow3x or at:..., or leave it out")
        if schedule.intervention != "inject":
            raise ConfigError(
                f"--schedule {name}: a rescue takes grow1x, grow3x or at:..., and what is to happen at these times by "
                f"--intervention {schedule.intervention}"
            )
        times = tuple(begin + time for time in schedule.injection_frames)
    return "at:" + ",".join(map(str, (*past, *times)))


def rescue_run(checkpoint: Checkpoint, explicit: dict[str, Any], frames: int) -> tuple[Config, list[str]]:
    """The configuration of a fork that rescues a run, and one line of text for each setting that differs.

    Args:
        checkpoint: the newest of the run, at its own width (`at_own_width`).
        explicit: settings given on the command line; `schedule` counts from the checkpoint.
        frames: budget from the checkpoint on.

    Raises:
        ConfigError: a setting cannot differ, or the schedule does not fit.
    """
    past, begin = done_injections(checkpoint), next_time(checkpoint)
    schedule = rescue_schedule(explicit.get("schedule"), past, begin, frames - (begin - checkpoint.frames))
    return changed_config(
        checkpoint, explicit | {"schedule": schedule, "total_frames": checkpoint.frames + frames}, fork=True
    )


def rescue_weights(weights: Weights, explicit: dict[str, Any], frames: int, spec: Spec) -> tuple[Config, list[str]]:
    """The configuration of a run that begins with a file's weights, and lines of text on what follows from that.

    Args:
        weights: what was read.
        explicit: settings given on the command line; `schedule` counts from the first update.
        frames: budget.
        spec: of the game.

    Raises:
        ConfigError: the weights are not of an agent of this game, or a setting contradicts them.
    """
    widths: dict[str, Any] = {"width": weights.width, "encoder_width": weights.encoder_width}
    shape: dict[str, Any] = {
        "output_bias": "shared" if weights.shared_bias else "per_action",
        "activation": "relu",
        "normalization": "none",
        "split": "fc1",
    }
    whole = explicit.get("freeze") == "network" and explicit.get("intervention", "inject") == "inject"
    given = {name: explicit.get(name, value) for name, value in (widths | shape).items()}
    for name, value in (shape if whole else widths | shape).items():
        if given[name] != value:
            remedy = "leave it out"
            if name in widths and explicit.get("intervention", "inject") == "inject":
                remedy += ", or add --freeze network to have such a network learn beside it"
            raise ConfigError(f"{flag(name)} {given[name]}: the file's network has {value}: {remedy}")
    beside = any(given[name] != value for name, value in widths.items())
    frozen = {f"frozen_{name}": value for name, value in widths.items()} if beside else {}
    settings = {"freeze": "heads"} | explicit | given | frozen | {"total_frames": frames, "schedule": "fixed"}
    config, _ = resolve(explicit.get("preset"), settings)
    if spec.observation_shape != weights.observation_shape:
        raise ConfigError(
            f"{config.game} shows {spec.observation_shape}, the file's network sees {weights.observation_shape}: name the game it was "
            "trained on by --game"
        )
    if weights.num_actions != spec.num_actions:
        raise ConfigError(
            f"the file has {weights.num_actions} actions and {config.game} has {spec.num_actions}: name the game it was trained on by "
            "--game (agents of the full action set cannot be used)"
        )
    warm: dict[str, Any] = {
        "learning_starts": max(
            config.frame_skip * config.num_envs, min(config.frame_skip * config.replay_capacity, frames // 10)
        ),
        "epsilon_start": config.epsilon_end,
        "epsilon_decay_frames": 0,
    }
    config, notes = resolve(explicit.get("preset"), warm | settings)
    step = config.frame_skip * config.num_envs
    begin = config.learning_starts + step
    if "learning_starts" not in explicit and not beside and kind_of(config.intervention, config).at_target_copy:
        # The first update comes after that copy, too, so that what is frozen is the file's network.
        begin = copy_of_last((begin,), config.target_period)
        config = dataclasses.replace(config, learning_starts=-(-begin // step) * step - step)
    schedule = config.schedule
    if "schedule" in explicit or not beside:
        schedule = rescue_schedule(explicit.get("schedule"), (), begin, frames - begin)
    make_schedule(schedule, frames, config.learning_starts)
    if beside:
        goes_on = config.live_encoder == "warm" and config.encoder_width == weights.encoder_width
        encoder = "the file's" if goes_on else "a fresh"
        notes.append(
            f"the file's network, width {weights.width} and encoder width {weights.encoder_width:g}, is frozen whole from the start; "
            f"beside it one of width {config.width} and encoder width {config.encoder_width:g} learns, on {encoder} encoder"
        )
    notes.append(
        f"its replay is filled by its own policy at epsilon {config.epsilon_start:g} until {config.learning_starts} frames"
    )
    return dataclasses.replace(config, schedule=schedule), notes
