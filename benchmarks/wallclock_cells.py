"""One network in one stage, timed on the training loop's own parts: speed, pauses, evaluations, checkpoints, GPU.

Every cell is a `Run` of its own, which begins with the experience of its stack's, filled once by random play.

Units: seconds on a monotonic clock that stands still in suspend; frames; transitions.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from recording import covered, device_events, synchronize

from growtrain.environments.atari import FRAME_SKIP
from growtrain.environments.base import Spec
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.graph import uses_graph
from growtrain.learners.make import make_learner
from growtrain.planning.speed import make_update, synthetic_batches
from growtrain.runs.evaluation import evaluate
from growtrain.runs.run import Run
from growtrain.settings.budget import updates_due
from growtrain.settings.config import PAPER_TOTAL_FRAMES, Config
from growtrain.telemetry.gpu import open_monitor

WARM_SHARE = 0.15  # of a window, played before it
PROFILE_SECONDS = 0.3  # GPU only; the profiler keeps an event for every kernel
MONITOR_PERIOD = 0.1
EVALUATION_SHARE, MAX_EVALUATION = 0.3, 1.5  # of a window, and seconds at most, its start aside
MIN_EVALUATION_STEPS = 20
FILL_WINDOWS = 5
GAUGE_SECONDS = 1.0


@dataclass(kw_only=True)
class Cell:
    """A network in a stage: a run that has grown so far, and what was measured of it."""

    run: Run
    record: dict[str, Any] = field(default_factory=dict)


class Gauge:
    """How fast the machine is just now, in updates per second of a network and a batch that stay the same."""

    def __init__(self, config: Config, spec: Spec, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._learner = DoubleDQN(config, spec, width=config.width, device=device, generator=generator)
        self._update = make_update(self._learner, synthetic_batches(config, spec, 1, generator).to(device))

    def __call__(self, seconds: float = GAUGE_SECONDS) -> float:
        """Measures it, after a few updates of warm-up."""
        for warm in (True, False):
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < (0.2 if warm else 1.0) * seconds:
                self._update()
                count += 1
                synchronize(self._learner.device)
        return count / (time.perf_counter() - start)


def open_stack(config: Config, run_dir: Path, open_runs: ExitStack) -> tuple[Run, dict[str, Any]]:
    """A run whose replay is filled by random play, and what was measured in opening and filling it.

    Args:
        config: see `cell_config`; random play ends when its learning starts.
        run_dir: where the run's files go.
        open_runs: closes the run.
    """
    run_dir.mkdir(parents=True)
    start = time.perf_counter()
    run = Run(config, run_dir)
    open_runs.enter_context(run.recording())
    startup = time.perf_counter() - start
    play(run)
    run.save()
    checkpoints = [timed_checkpoint(run)]
    step = FRAME_SKIP * config.num_envs
    steps = -(-(config.learning_starts - run.collector.frames) // (step * FILL_WINDOWS))
    warmup = [play(run, steps=steps) for _ in range(FILL_WINDOWS - 1)]
    warmup.append(play(run, steps=max(1, -(-(config.learning_starts - run.collector.frames) // step))))
    checkpoints.append(timed_checkpoint(run))
    return run, {
        "num_envs": config.num_envs,
        "execution": "CUDA graph" if uses_graph(config, run.device) else config.execution,
        "num_actions": run.learner.spec.num_actions,
        "replay_capacity": config.replay_capacity,
        "filled": len(run.ring),
        "config": config.to_dict(),
        "startup_seconds": startup,
        "warmup": warmup,
        "checkpoints": checkpoints,
        "record_seconds": [timed_record(run) for _ in range(5)],
        "cells": {},
    }


def cell_config(config: Config, fill: int, capacity: int) -> Config:
    """An arm's settings for its cells: learning starts once the replay holds `fill` of `capacity` transitions, with the last epsilon."""
    return dataclasses.replace(
        config,
        total_frames=PAPER_TOTAL_FRAMES,
        learning_starts=FRAME_SKIP * max(fill, config.num_envs),
        epsilon_decay_frames=0,
        epsilon_start=1.0,
        replay_capacity=capacity,
    )


def build(stack: Run, config: Config, stage: int, run_dir: Path, open_runs: ExitStack) -> Cell:
    """A run grown to `stage` by itself; compilation, pauses, first step and a checkpoint are timed.

    Args:
        stack: whose experience it begins with.
        config: of its arm, see `cell_config`.
        stage: how often it grows.
        run_dir: where its files go.
        open_runs: closes it.
    """
    run_dir.mkdir(parents=True)
    run = Run(config, run_dir)
    open_runs.enter_context(run.recording())
    run.ring.load_state_dict(stack.ring.state_dict())
    run.collector.load_state_dict(stack.collector.state_dict())
    # It owes the updates of the last step, as it does between two steps of training.
    run.learner.updates = updates_due(config, run.collector.agent_steps - config.num_envs)
    compile_seconds = timed_compilation(run)
    growth_seconds, sweeps = [], []
    for _ in range(stage):
        play(run)  # so that the optimizer has what a growth must keep
        if run.growing.kind.at_target_copy:
            run.learner.copy_target()
        start = time.perf_counter()
        with timed_sweep(run) as sweep:
            events = list(run.growing.grow())
        growth_seconds.append(time.perf_counter() - start - sweep["seconds"])
        sweeps.append(sweep)
        assert events, "the growth was rolled back"
    first = [play(run)]
    run.learner.copy_target()  # what is frozen is shared with the target from its first copy on, and captured anew
    first.append(play(run))
    run.save()
    record = {
        "compile_seconds": compile_seconds,
        "growth_seconds": growth_seconds,
        "sweeps": sweeps,
        "first_step_seconds": [window["seconds"] / window["steps"] for window in first],
        "evaluations": [],
        "checkpoint_seconds": timed_checkpoint(run)["seconds"],
        "diagnostics_seconds": timed_diagnostics(run),
        "repeats": [],
        "busy": {
            "available": False,
            "reason": "the measurement ended before it was profiled"
            if run.device.type == "cuda"
            else f"the run computes on {run.device.type}, which CUDA does not profile",
        },
    }
    return Cell(run=run, record=record)


@contextmanager
def timed_sweep(run: Run) -> Iterator[dict[str, float]]:
    """Rows and seconds of the sweep that a growth in it does, which a complete run does over more rows; 0 and 0 without one."""
    values, measured = run.frozen_values, {"rows": 0, "seconds": 0.0}
    sweep = values.sweep

    def timed() -> None:
        start = time.perf_counter()
        sweep()
        synchronize(run.device)
        measured.update(rows=len(run.ring.rows_read()), seconds=time.perf_counter() - start)

    with mock.patch.object(values, "sweep", timed):
        yield measured


def timed_compilation(run: Run) -> float:
    """What the first update of an arm takes beyond its second, on a throw-away learner: later ones in this process find it compiled."""
    generator, seconds = torch.Generator().manual_seed(0), []
    learner = make_learner(run.config, run.learner.spec, device=run.device, generator=generator)
    for _ in range(2):
        batches = run.ring.sample_batches(1, run.config.batch_size)
        synchronize(run.device)
        start = time.perf_counter()
        learner.update(batches)
        synchronize(run.device)
        seconds.append(time.perf_counter() - start)
    return max(0.0, seconds[0] - seconds[1])


def window_seconds(left: float, windows: int, start: float = 0.0) -> float:
    """Seconds of a window such that so many fit into those that are left, each with its warm-up and its evaluation.

    Args:
        left: seconds.
        windows: how many.
        start: seconds that an evaluation takes before its first step.
    """
    return (left / windows - start) / (1 + WARM_SHARE + EVALUATION_SHARE)


def measure_window(cell: Cell, seconds: float) -> dict[str, Any]:
    """One window of a cell after warming up, and its evaluation."""
    run = cell.run
    play(run, WARM_SHARE * seconds)
    monitor = open_monitor(run.device, MONITOR_PERIOD)
    monitor.start()
    window = play(run, seconds)
    monitor.stop()
    cell.record["repeats"].append(window | {"gpu": monitor.summary()})
    step = (window["phases"]["act"] + window["phases"]["environment"]) / window["steps"]
    steps = round(min(EVALUATION_SHARE * seconds, MAX_EVALUATION) / step)
    cell.record["evaluations"].append(timed_evaluation(run, max(MIN_EVALUATION_STEPS, steps)))
    return window


def measure_busy(cell: Cell) -> None:
    """Profiles a cell on a GPU; after all windows, for what a profiler leaves in the driver may slow down those that follow."""
    if cell.run.device.type == "cuda":
        play(cell.run, PROFILE_SECONDS)
        cell.record["busy"] = profile(cell.run)


def play(run: Run, seconds: float = 0.0, *, steps: int = 1) -> dict[str, Any]:
    """A run's steps, without what is periodic, for `seconds` and at least `steps`, in whole cycles of updates.

    Args:
        run: to go on with.
        seconds: how long.
        steps: of all environments, at least.

    Returns:
        `frames, updates, steps, seconds, cpu_seconds` (of all threads) and `phases`.
    """
    cycle = Fraction(run.config.replay_ratio * run.config.num_envs).limit_denominator(10**6).denominator
    synchronize(run.device)
    run.phases.take()
    frames, updates, done = run.collector.frames, run.learner.updates, 0
    cpu_start, start = time.process_time(), time.perf_counter()
    while done < steps or done % cycle or time.perf_counter() - start < seconds:
        run.step()
        done += 1
    with run.phases("act"):
        synchronize(run.device)  # the next step's acting would
    elapsed = time.perf_counter() - start
    return {
        "frames": run.collector.frames - frames,
        "updates": run.learner.updates - updates,
        "steps": done,
        "seconds": elapsed,
        "cpu_seconds": time.process_time() - cpu_start,
        "phases": {name: value for name, value in run.phases.take().items() if name != "total"},
    }


def profile(run: Run) -> dict[str, Any]:
    """How long kernels and copies ran in a short window: what NVML's utilisation, 'some kernel was resident', does not say."""
    from torch.profiler import ProfilerActivity

    try:
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
            window = play(run, PROFILE_SECONDS)
        intervals = [(e.time_range.start / 1e6, e.time_range.end / 1e6) for e in device_events(profiler)]
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        return {"available": False, "reason": f"torch.profiler: {error}"}
    if not intervals:
        return {"available": False, "reason": "torch.profiler saw no kernels (CUPTI missing or not permitted)"}
    return window | {"available": True, "busy_seconds": covered(intervals), "events": len(intervals)}


def timed_evaluation(run: Run, steps: int) -> dict[str, float]:
    """Frames of an evaluation whose episodes are cut after so many steps; seconds from its first step on, and before it."""
    lanes = min(run.config.num_envs, run.config.num_eval_episodes)
    config = dataclasses.replace(run.config, eval_episodes=lanes, max_episode_frames=FRAME_SKIP * steps)
    asked: list[float] = []

    def policy(observation: torch.Tensor) -> torch.Tensor:
        asked.append(time.perf_counter())
        return run.learner.act(observation)

    start = time.perf_counter()
    record = evaluate(policy, config, frames=run.collector.frames, stage=run.growing.stage, device=run.device)
    return {
        "frames": record.eval_frames,
        "start_seconds": asked[0] - start,
        "seconds": time.perf_counter() - asked[0],
    }


def timed_checkpoint(run: Run) -> dict[str, float]:
    """Seconds of a checkpoint, and the transitions that the replay holds; most of its cost is what is new since the one before."""
    play(run)  # a checkpoint that is there already would be left as it is
    start = time.perf_counter()
    run.save()
    return {"transitions": len(run.ring), "seconds": time.perf_counter() - start}


def timed_record(run: Run) -> float:
    """Seconds of a line of metrics."""
    play(run)
    start = time.perf_counter()
    run.write(run.report())
    return time.perf_counter() - start


def timed_diagnostics(run: Run) -> float:
    """Seconds of a measure of the network's plasticity, as a run makes it every `diagnostics_period` frames; 0 if it makes none."""
    if not run.config.diagnostics_period:
        return 0.0
    play(run)
    run.write(run.diagnose())  # later ones compare with the one before
    play(run)
    start = time.perf_counter()
    run.write(run.diagnose())
    return time.perf_counter() - start
