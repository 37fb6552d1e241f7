"""Going on from a checkpoint: what may change, what a fork may change as well, and what a checkpoint holds.

A resumed run is the same run: only settings that do not decide what is learned may differ. A fork is another run with the same past: it may
change what lies in its future, but nothing that what is already there was built with.

Units: frames; sizes in bytes.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from growtrain.environments.base import Spec
from growtrain.growth.kinds import kind_of
from growtrain.learners.foreign_weights import initial_sha256
from growtrain.learners.saved import begins_frozen, injections_of, read_saved
from growtrain.planning.costs import make_plan
from growtrain.records import record_files
from growtrain.runfiles import PARTIAL, cut_back, read_plain, require_new, sweep
from growtrain.runs.checkpoint import Checkpoint, examine, open_at, set_aside_newer
from growtrain.runs.provenance import describe_machine, differences, was_on_cpu
from growtrain.settings.config import Config, has_effect
from growtrain.settings.schedules import copy_of_last, schedule_of
from growtrain.settings.text import ConfigError, flag, format_count


def changed_config(checkpoint: Checkpoint, explicit: dict[str, Any], *, fork: bool) -> tuple[Config, list[str]]:
    """The configuration to go on with, and one line of text for each setting that differs.

    Args:
        checkpoint: where it goes on from.
        explicit: settings given on the command line, by field name.
        fork: whether a new run begins.

    Raises:
        ConfigError: a setting cannot differ; the line names it and the remedy.
    """
    before = checkpoint.config
    if not fork:
        return _changed(before, explicit, "begin another run from here with --fork NEWDIR")
    require_decided(checkpoint)
    changes = _differing(before, explicit)
    for name, value in changes.items():
        setting = Config.__dataclass_fields__[name].metadata
        if setting["identity"] and not setting["forkable"]:
            raise ConfigError(
                f"{flag(name)} {value}: a fork keeps {getattr(before, name)}, which its network, replay or episodes "
                "were made with: leave it out, or train a new run"
            )
    if (budget := changes.get("total_frames", before.total_frames)) <= checkpoint.frames:
        raise ConfigError(
            f"--total-frames {budget} is not beyond the checkpoint at {checkpoint.frames} frames: raise it"
        )
    kept: dict[str, Any] = {}
    if "total_frames" in changes and "switch_at" not in changes:  # a chain's past has its own switches
        kept = {"switch_at": before.switch_at or ",".join(map(str, before.switch_frames))}
    config, notes = _changed(before, explicit, kept=kept)
    _check_future(checkpoint, config)
    if not begins_frozen(checkpoint.state["learner"], config):  # it was given up, as by a reset
        config = dataclasses.replace(config, frozen_width=0, frozen_encoder_width=1.0)
    return config, notes


def require_decided(checkpoint: Checkpoint) -> None:
    """Raises `ConfigError` if it was saved within a decision, on which the network of these frames depends: no run can fork there."""
    if checkpoint.state.get("decision_owed"):
        run = checkpoint.path.parent.parent
        raise ConfigError(
            f"{run} was stopped within the decision at {checkpoint.frames} frames, on which its network there depends: fork from a later "
            f"checkpoint, which growtrain resume {run} makes where there is none"
        )


def _differing(before: Config, explicit: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in explicit.items() if getattr(before, name) != value}


def _changed(
    before: Config, explicit: dict[str, Any], otherwise: str = "", kept: dict[str, Any] | None = None
) -> tuple[Config, list[str]]:
    """What `changed_config` returns; with an `otherwise` to point to, nothing may differ that decides what is learned."""
    changes = _differing(before, explicit)
    for name, value in changes.items():
        if otherwise and Config.__dataclass_fields__[name].metadata["identity"]:
            raise ConfigError(
                f"{flag(name)} {value}: this run has {getattr(before, name)}, and it decides what is learned: "
                f"leave it out, or {otherwise}"
            )
    after = dataclasses.replace(before, **changes, **(kept or {}))
    notes = [
        f"{flag(name)} {getattr(before, name)} -> {value}{'' if has_effect(name, after) else ', without effect in this run'}"
        for name, value in changes.items()
    ]
    return after, notes


def done_injections(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The times of the schedule, in frames, that lie in a checkpoint's past."""
    schedule = schedule_of(checkpoint.config)
    if schedule.adaptive:
        return tuple(checkpoint.state["grown_at"])
    return schedule.injection_frames[: int(checkpoint.state["stage"])]


def next_time(checkpoint: Checkpoint) -> int:
    """The earliest time, in frames, of an intervention that a fork may add: after the last one, which may be as old as the checkpoint."""
    return max(checkpoint.frames, *(time + 1 for time in done_injections(checkpoint)), 0)


def at_own_width(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, but of a network that started at the width it has: what was `full3x` of 512 is `fixed` of 2048.

    Any schedule can go on from that; nothing that was computed depends on it.
    """
    config = checkpoint.config
    multiplier = schedule_of(config).width_multiplier
    # Of SAC's networks only the last layer is wider: no other configuration has them.
    if multiplier == 1 or config.continuous:
        return checkpoint
    own = dataclasses.replace(config, schedule="fixed", width=config.width * multiplier)
    return dataclasses.replace(checkpoint, config=own)


def restart(run_dir: Path, explicit: dict[str, Any]) -> tuple[Config, Checkpoint | None, list[str]]:
    """How a run is begun again that ended before its first checkpoint.

    Args:
        run_dir: the run's.
        explicit: settings given on the command line, by field name.

    Returns:
        Its configuration, the checkpoint that it was forked from, if it was, and lines of text that say so.

    Raises:
        ConfigError: it has been saved, or is done, and its checkpoints are missing; what it began with is gone; its `config.json` is
            damaged; or a setting cannot differ.
    """
    try:
        about = json.loads(read_plain(run_dir / "config.json", 1 << 20))
        before, resumes = Config.from_dict(about["config"]), list(about.get("resumes", ()))
        parent = Path(resumes[-1]["forked_from"]) if resumes and "forked_from" in resumes[-1] else None
        # Of a version that did not note it, records may be all that is left.
        saved = about.get("saved", any(path.stat().st_size for path in record_files(run_dir)))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{run_dir / 'config.json'} is damaged, or of another version ({error}): train a new run in another directory"
        ) from error
    config, notes = _changed(before, explicit, "train a new run")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        saved |= json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["status"] == "done"
    if saved:
        raise ConfigError(
            f"{run_dir} has no checkpoint any more: its records are left as they are; train a new run in another directory"
        )
    if parent is not None:
        start = _forked_from(parent, run_dir, config)
        return config, start, [f"a fork that ended before it was saved: from {parent} again", *notes]
    if "initial_weights" in about and about["initial_weights"] != initial_sha256(run_dir):
        raise ConfigError(
            f"{run_dir} does not hold the weights that it began with any more: begin it again in another directory by growtrain rescue FILE"
        )
    return config, None, ["it ended before its first checkpoint: from the start", *notes]


def _forked_from(path: Path, run_dir: Path, config: Config) -> Checkpoint:
    """The checkpoint that a fork of this configuration began at; raises `ConfigError` if it is gone."""
    try:
        start = open_at(path.parent.parent, int(path.name))
    except (ConfigError, ValueError) as error:
        raise ConfigError(
            f"{run_dir} ended before it was saved, and the checkpoint that it was forked from cannot be loaded ({error}): begin it again "
            f"in another directory by growtrain resume {path.parent.parent} --fork NEWDIR, or rescue"
        ) from error
    return start if start.config.width == config.width else at_own_width(start)


def _check_future(checkpoint: Checkpoint, config: Config) -> None:
    """Raises `ConfigError` unless the switches and the schedule go on from the past that the checkpoint has."""
    reached, new_reached = (
        [frames for frames in each.switch_frames if frames < checkpoint.frames] for each in (checkpoint.config, config)
    )
    if reached != new_reached:
        raise ConfigError(
            f"--switch-at {config.switch_at}: up to {checkpoint.frames} frames {config.game} has switched at "
            f"{', '.join(map(str, reached)) or 'none'}: keep that"
        )
    if reached and config.keep_replay != checkpoint.config.keep_replay:
        raise ConfigError(
            f"--keep-replay {'yes' if config.keep_replay else 'no'}: how many updates were due follows from what a switch did to the "
            "replay: keep it as it was"
        )
    old, new = schedule_of(checkpoint.config), schedule_of(config)
    if old.width_multiplier != new.width_multiplier:
        wide = checkpoint.config.schedule
        raise ConfigError(
            f"--schedule {config.schedule}: the network has the width of {wide}: keep it"
            if not config.continuous
            else f"--schedule {config.schedule}: no other schedule goes on from {wide}, whose last layer alone is wider: diagnose or "
            "rescue a run of --schedule fixed with a larger --width"
        )
    if new.width_multiplier > 1 and config.continuous and config.grow != checkpoint.config.grow:
        raise ConfigError(
            f"--grow {config.grow}: {config.schedule} has widened the networks of --grow {checkpoint.config.grow}: keep it"
        )
    done = done_injections(checkpoint)
    coming = new.injection_frames[len(done) :]
    # One that is late waits for a copy of the target.
    planned = () if old.adaptive else old.injection_frames[len(done) :]
    if new.adaptive:  # what is to come is decided as it goes
        if len(done) > new.adaptive.max_injections:
            raise ConfigError(
                f"--adaptive-max {new.adaptive.max_injections}: {len(done)} injections are done: raise it"
            )
    elif new.injection_frames[: len(done)] != done or any(t < checkpoint.frames and t not in planned for t in coming):
        past = ",".join(map(str, done))
        keep = f"at:{past}" if past else "fixed"
        later = f"at:{past + ',' if past else ''}{checkpoint.frames}"
        raise ConfigError(
            f"--schedule {config.schedule}: at {checkpoint.frames} frames the past cannot change: use --schedule {keep} to go on "
            f"without another injection, or add later times, as in --schedule {later}"
        )
    kind = kind_of(new.intervention, config)
    if (
        coming
        and kind.at_target_copy
        and not new.adaptive
        and copy_of_last(coming, config.target_period, checkpoint.frames) >= config.total_frames
    ):
        raise ConfigError(
            f"--target-period {config.target_period} brings no copy of the target for every injection between {checkpoint.frames} frames "
            f"and the end at {config.total_frames}, at which --freeze network freezes: lower it, or give more frames"
        )
    learner, what = read_saved(checkpoint.state["learner"], config), f"--intervention {new.intervention}"
    if (learner.injections or learner.snapshots) and kind.needs_single_head:
        raise ConfigError(
            f"{what}: the head has been injected, and its frozen heads cannot follow: use another intervention, or fork a run that was not"
        )
    if learner.snapshots and kind.adds == "heads":
        raise ConfigError(
            "--freeze heads: the network was frozen whole, and its heads cannot be frozen alone: use --freeze network"
        )
    if learner.encoder_frozen and not config.continuous and config.split != "conv1" and "encoder" in kind.born:
        raise ConfigError(f"{what}: the encoder is frozen and would not learn again: use --intervention reset-head")


def resumption(
    start: Checkpoint, config: Config, device: torch.device, *, forked: bool, interventions: int
) -> dict[str, Any]:
    """What `summary.json` says of going on from `start`; warns where the machine is another one.

    Args:
        start: where the run goes on from.
        config: what it goes on with.
        device: where it goes on.
        forked: whether it is another run from here.
        interventions: those done before; if this configuration would have made others, or its past had cost something else, the record says
            that no plan counts it.
    """
    skew = differences(start.machine, describe_machine(device))
    if skew:
        # What SAC draws on its device cannot go on as it would have on a device of another kind.
        moved = config.continuous and was_on_cpu(start.machine) != (device.type == "cpu")
        differ = "the noise of updates is another from here on" if moved else "results may differ in the last bits"
        warnings.warn(f"the checkpoint was made with other {', '.join(skew)}: {differ}", stacklevel=1)
    before, spec = start.config.to_dict(), Spec.from_dict(start.state["spec"])
    changes = {name: value for name, value in config.to_dict().items() if before[name] != value}
    ways = [
        (schedule_of(c).intervention, c.anchor, c.trainable_heads, c.freeze_encoder_at, c.freeze, c.live_encoder)
        + ((c.grow,) if c.continuous else ())
        for c in (start.config, config)
    ]
    return (
        {"frames": start.frames, "changes": changes, "skew": skew}
        | ({"forked_from": str(start.path)} if forked else {})
        | (
            {"past_differs": True}
            if (interventions and ways[0] != ways[1]) or not _costs_alike(start, config, spec)
            else {}
        )
    )


def _costs_alike(start: Checkpoint, config: Config, spec: Spec) -> bool:
    """Whether what was done before the checkpoint would have cost as much with another configuration."""
    past = [
        [
            (cost.flops_per_update, cost.flops_per_action)
            for cost in make_plan(each, spec).stages[: int(start.state["stage"]) + 1]
        ]
        for each in (start.config, config)
    ]
    return past[0] == past[1] and start.config.epsilon_start == config.epsilon_start


def require_own(run_dir: Path, start: Checkpoint | None, *, again: bool) -> None:
    """Raises `ConfigError` if a directory, which is held from here on, holds another run, or more of this one than was read before.

    Args:
        run_dir: the directory.
        start: the checkpoint to go on from.
        again: the run that is there is begun again, because it had no checkpoint.
    """
    reached = start.frames if start is not None and start.is_of(run_dir) else -1
    if reached < 0 and not again:
        require_new(run_dir, "run_dir")
    for _, found in examine(run_dir, after=reached):
        if isinstance(found, Checkpoint):
            raise ConfigError(
                f"{run_dir} has a checkpoint at {found.frames} frames by now, of another process: go on by growtrain resume {run_dir}"
            )


def take_up(run_dir: Path, start: Checkpoint | None, *, forked: bool, last: Mapping[str, int]) -> None:
    """Brings a run's files back to where it begins: no record after it, nothing half-written; a fork begins with its parent's records.

    Args:
        run_dir: the run's.
        start: the checkpoint; None: it begins from nothing.
        forked: whether another run begins from it.
        last: frames of the last record that stays in each file, by its stem.
    """
    sweep(run_dir)
    (run_dir / "summary.json").unlink(missing_ok=True)
    if start is not None and forked:
        for path in record_files(start.path.parent.parent):
            partial = run_dir / f"{PARTIAL}-{path.name}"  # until none is of frames that the fork has not played
            shutil.copyfile(path, partial)
            cut_back(partial, start.frames)
            os.replace(partial, run_dir / path.name)
    for path in record_files(run_dir):
        cut_back(path, last[path.stem])
    if start is not None and (aside := set_aside_newer(run_dir, start.frames)):
        warnings.warn(f"damaged and set aside: {', '.join(aside)} ({'; '.join(start.damaged)})", stacklevel=1)


def render(run_dir: Path) -> tuple[list[str], bool]:
    """Lines that say what the checkpoints of a run hold, and whether all of them are whole; every file is read and verified."""
    lines: list[str] = [f"run         {run_dir}"]
    whole = True
    for path, found in examine(run_dir):
        lines.append("")
        if isinstance(found, Checkpoint):
            lines += _render_one(found)
        else:
            whole = False
            lines.append(f"checkpoint  {path.name}: DAMAGED: {found}")
    if len(lines) == 1:
        lines.append(f"checkpoint  none: train it first, or go on with growtrain resume {run_dir}")
    return lines, whole


def _render_one(checkpoint: Checkpoint) -> list[str]:
    state, config = checkpoint.state, checkpoint.config
    learner, ring, given = read_saved(state["learner"]), state["ring"], ""
    if begins_frozen(state["learner"], config):
        given = f" (first a file's, width {config.frozen_width}, encoder width {config.frozen_encoder_width:g})"
    injections = injections_of(state["learner"])[bool(given) :]
    replay = sum(segment.num_bytes for segment in checkpoint.segments)
    frames = sum(chunk.count for segment in checkpoint.segments for chunk in segment.chunks)
    raw = frames * Spec.from_dict(state["spec"]).frame_bytes
    stages = "; ".join(
        f"{index}: {frames} frames, {updates} updates, {seconds:.1f} s"
        for index, (frames, updates, seconds) in enumerate(state["totals"])
    )
    owed = "".join(
        f"; its {what} was still to be made" for what in ("decision", "evaluation") if state.get(f"{what}_owed")
    )
    versions = checkpoint.machine.get("versions", {})
    return [
        f"checkpoint  {checkpoint.path.name}: whole (sizes and sha256 of {2 + len(checkpoint.segments)} files verified)",
        f"config      {config.game}, {config.schedule}, seed {config.seed}, fingerprint {config.fingerprint()}",
        (
            f"counters    {checkpoint.frames} of {config.total_frames} frames, {state['collector']['agent_steps']} agent steps, "
            f"{learner.updates} updates, {state['wall_seconds']:.1f} s{owed}"
        ),
        (
            f"network     {len(injections)} injections ({', '.join(injections) or 'none'}), "
            f"frozen whole {learner.snapshots} times{given}, "
            f"width {learner.width}, "
            f"{format_count(learner.num_parameters)} parameters, encoder {'frozen' if learner.encoder_frozen else 'learning'}, "
            f"optimizer slots of {learner.num_slots} tensors"
        ),
        f"stages      {stages}",
        (
            f"replay      {int(ring['valid'].sum())} transitions, {len(checkpoint.segments)} segments, {replay / 1e6:.1f} MB "
            f"({replay / max(raw, 1):.1%} of its size)"
        ),
        f"disk        {checkpoint.num_bytes / 1e6:.1f} MB, of which {(checkpoint.num_bytes - replay) / 1e6:.1f} MB its own",
        (
            f"made with   torch {versions.get('torch')}, ale-py {versions.get('ale-py')}, {checkpoint.machine.get('device')}, "
            f"{checkpoint.machine.get('num_threads')} threads; resumed {len(state['resumes'])} times"
        ),
    ]
