"""Kills a real run with SIGKILL again and again, resumes it each time, and compares its end with a run that was never interrupted.

    python benchmarks/crash_soak.py --kills 50 --output results/crash_soak
    python benchmarks/crash_soak.py --kills 20 --flags "--game minatar/breakout --freeze network" --output results/crash_soak_network

Half of the kills are aimed at checkpoint writes: the process dies within milliseconds of the moment when a partial checkpoint appears.
The others come at a random time in a life: while Python starts, while episodes are played again, while it learns, grows or publishes.
After each kill the newest checkpoint is verified and may not be older than it was. At the end parameters, optimizer slots, replay,
generators, counters and records must be equal bit for bit; only times may differ.

1. The run is small, so that lives are short and a checkpoint is made every few steps; what is saved is what a long run saves.
2. Equality is claimed for the CPU: on a GPU sums may be taken in another order.

Units: frames; seconds.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as `python -m growtrain` does, before torch is imported

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import describe_machine

from growtrain.environments.make import spec_of
from growtrain.replay.frames import FrameRing
from growtrain.runfiles import PARTIAL
from growtrain.runs.checkpoint import Checkpoint, NeverSaved, open_newest
from growtrain.telemetry.sinks import read_jsonl

TIMES = {
    "wall_seconds",
    "frames_per_second",
    "updates_per_second",
    "seconds",
    "pause_seconds",
    "since_report",
    "resumes",
}
STARTING_SECONDS = 6.0  # kills at a random time of the start come within this
CHECKPOINTS_PER_LIFE = 3  # on average
STEP_SECONDS = 0.0005  # how often the directory is looked at


def settings(total_frames: int, checkpoint_period: int) -> list[str]:
    """The flags of the run: a small network that grows three times, sticky actions, a replay that wraps."""
    flags = {
        "game": "breakout",
        "schedule": "grow3x",
        "freeze": "heads",
        "total-frames": total_frames,
        "num-envs": 4,
        "sticky-actions": 0.25,
        "width": 32,
        "encoder-width": 0.25,
        "batch-size": 8,
        "learning-starts": 400,
        "epsilon-decay-frames": total_frames // 4,
        "target-period": 640,
        "replay-capacity": 1_000,
        "eval-period": total_frames // 3,
        "eval-frames": 160,
        "log-period": 4 * checkpoint_period,
        "checkpoint-period": checkpoint_period,
        "device": "cpu",
    }
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def launch(*words: str) -> subprocess.Popen[str]:
    """`python -m growtrain` with these words; its output is kept for the case that it fails."""
    command = [sys.executable, "-m", "growtrain", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Waits for a process that must end well; raises `RuntimeError` with what it said."""
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run ended with exit code {process.returncode}: {errors[-2000:]}")


def kill_somewhere(process: subprocess.Popen[str], run_dir: Path, rng: np.random.Generator) -> dict[str, Any] | None:
    """Kills a life at a random moment; None if it ended by itself before."""
    started, checkpoints = time.perf_counter(), run_dir / "checkpoints"
    left = being_written(checkpoints)
    wanted = int(rng.integers(2 * CHECKPOINTS_PER_LIFE + 1))
    aimed = wanted > 0 and bool(rng.random() < 0.5)
    if wanted == 0:
        wait_until(process, lambda: False, rng.random() * STARTING_SECONDS)
    else:
        made = publications(process, checkpoints, wanted)
        if aimed:
            wait_until(process, lambda: being_written(checkpoints) - left)
            time.sleep(rng.random() ** 2 * 0.01)
        else:
            wait_until(process, lambda: False, rng.random() * (time.perf_counter() - started) / max(made, 1) / 4)
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    interrupted = sorted(being_written(checkpoints) - left)
    return {
        "aimed_at_a_write": aimed,
        "seconds": time.perf_counter() - started,
        "interrupted_a_write": bool(interrupted),
        "unfinished": interrupted,
    }


def wait_until(process: subprocess.Popen[str], holds: Callable[[], object], limit: float = 600.0) -> bool:
    """Looks until `holds()` or the process ends or the limit is over; whether it held."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end and process.poll() is None:
        if holds():
            return True
        time.sleep(STEP_SECONDS)
    return False


def publications(process: subprocess.Popen[str], checkpoints: Path, wanted: int) -> int:
    """Waits until that many checkpoints have been published, or the process ends; how many it saw."""
    made, before = 0, names(checkpoints)
    while made < wanted and wait_until(process, lambda known=before: names(checkpoints) - known):
        made, before = made + 1, before | names(checkpoints)
    return made


def being_written(checkpoints: Path) -> set[str]:
    """The checkpoints that are newer than those published, and not published themselves."""
    newest = max(names(checkpoints), default="")
    unfinished = {path.name.removeprefix(f"{PARTIAL}-") for path in checkpoints.glob(f"{PARTIAL}-0*")}
    return {name for name in unfinished if name > newest}  # an older one is being removed


def names(checkpoints: Path) -> set[str]:
    """The published checkpoints."""
    return {path.name for path in checkpoints.glob("0*")}


def newest_frames(run_dir: Path) -> int:
    """Frames of the newest checkpoint that is whole, 0 if none was ever made."""
    try:
        return open_newest(run_dir).frames
    except NeverSaved:
        return 0


def differences(one: Path, other: Path) -> list[str]:
    """Where two runs differ in anything but times, at most twenty places."""
    first, second = open_newest(one), open_newest(other)
    for checkpoint in (first, second):
        checkpoint.state["totals"] = [total[:2] for total in checkpoint.state["totals"]]
    found = list(compare(first.state, second.state, "state"))
    if not torch.equal(replay(first), replay(second)):
        found.append("frames of the replay")
    for stem in ("metrics", "growth_events", "evaluations", "diagnostics"):
        records = [dict(enumerate(read_jsonl(run / f"{stem}.jsonl"))) for run in (one, other)]
        found += compare(records[0], records[1], stem)
    return found[:20]


def compare(one: Any, other: Any, path: str) -> list[str]:
    """The paths at which two nested values differ, times left out."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{path}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [
            place for name in one if name not in TIMES for place in compare(one[name], other[name], f"{path}/{name}")
        ]
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(bits(one), bits(other))
    else:
        same = one == other
    return [] if same else [path]


def bits(values: torch.Tensor) -> torch.Tensor:
    """What is stored: a value that is not there is NaN, which equals nothing."""
    return values.contiguous().view(torch.int32) if values.dtype == torch.float32 else values


def replay(checkpoint: Checkpoint) -> torch.Tensor:
    """The frames in a checkpoint's replay."""
    config, spec = checkpoint.config, spec_of(checkpoint.config)
    ring = FrameRing(
        config.replay_capacity,
        config.num_envs,
        rng=np.random.default_rng(0),
        frame_shape=spec.frame_shape,
        stack_size=spec.stack_size,
    )
    ring.load_state_dict(checkpoint.state["ring"])
    checkpoint.load_frames(ring)
    return ring.frames


def soak(kills: int, frames_per_kill: int, seed: int, directory: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """Runs it all in `directory`; returns the record."""
    rng = np.random.default_rng(seed)
    checkpoint_period = max(16, frames_per_kill // (2 * CHECKPOINTS_PER_LIFE))
    flags = settings(4_000 + kills * frames_per_kill, checkpoint_period) + list(more)
    whole, killed = directory / "whole", directory / "killed"
    began = time.perf_counter()
    finish(launch("train", "--run-dir", str(whole), *flags))
    whole_seconds = time.perf_counter() - began

    deaths: list[dict[str, Any]] = []
    frames = 0
    process = launch("train", "--run-dir", str(killed), *flags)
    while len(deaths) < kills:
        death = kill_somewhere(process, killed, rng)
        if death is None:
            finish(process)
            break
        now = newest_frames(killed)
        if now < frames:
            raise RuntimeError(
                f"after kill {len(deaths) + 1} the newest checkpoint is at {now} frames, and it was at {frames}"
            )
        frames = now
        deaths.append(death | {"checkpoint_frames": frames})
        print(f"kill {len(deaths)}/{kills}: checkpoint at {frames} frames, {death}", flush=True)
        started = (killed / "config.json").exists()
        process = launch("resume", str(killed)) if started else launch("train", "--run-dir", str(killed), *flags)
    if len(deaths) == kills:
        finish(process)
    different = differences(whole, killed)
    return {
        "machine": describe_machine("cpu"),
        "flags": flags,
        "kills": len(deaths),
        "kills_that_interrupted_a_write": sum(death["interrupted_a_write"] for death in deaths),
        "frames": newest_frames(killed),
        "equal": not different,
        "differences": different,
        "seconds_uninterrupted": whole_seconds,
        "seconds": time.perf_counter() - began,
        "deaths": deaths,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if nothing was lost and as many kills were made as asked for, 1 otherwise."""
    parser = argparse.ArgumentParser(description="Kill a run again and again; compare it with one that was not.")
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs")
    parser.add_argument("--frames-per-kill", type=int, default=960, help="how much longer the run is for each kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--flags", default="", help="of the run, beside its own, in one string")
    parser.add_argument("--output", type=Path, help="writes the record to this path with .json added")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="crash_soak_") as directory:
        record = soak(options.kills, options.frames_per_kill, options.seed, Path(directory), shlex.split(options.flags))
    if options.output:
        options.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(
        f"{record['kills']} kills, {record['kills_that_interrupted_a_write']} of them in the middle of a checkpoint write, "
        f"{record['frames']} frames in {record['seconds']:.0f} s: {'equal bit for bit' if record['equal'] else 'DIFFERENT'}"
    )
    for place in record["differences"]:
        print(f"  {place}")
    return 0 if record["equal"] and record["kills"] == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
