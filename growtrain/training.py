"""Training: the only loop. Double DQN (van Hasselt et al. 2016) whose network grows by plasticity injection (Nikishin et al. 2023).

While the environments step in their own threads, the learner does the updates it owes. Everything periodic happens where the frame counter
crosses a multiple of its period. `train` writes the run's files and yields each record as it is made; what to show and when to stop is up to
whoever iterates.

Units: frames; seconds on a monotonic clock.
"""

import contextlib
import json
import os
import platform
import subprocess
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from growtrain import checkpoint
from growtrain.collection import Collector, epsilon_at, make_environment, updates_due
from growtrain.config import FRAME_SKIP, Config, ConfigError
from growtrain.evaluation import evaluate
from growtrain.growth.interventions import GrowthEvent
from growtrain.growth.schedules import make_schedule
from growtrain.growth.transaction import GrowthFailed, grow
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.planning import make_plan
from growtrain.records import Evaluation, Metrics
from growtrain.replay.frame_ring import FrameRing, frame_replay
from growtrain.telemetry.gpu import open_monitor
from growtrain.telemetry.phases import Phases
from growtrain.telemetry.sinks import RunSinks

Record = Metrics | Evaluation | GrowthEvent
_PROBE_SIZE = 32  # observations on which a growth is verified
_PAUSES = ("growth", "evaluation", "checkpoint")


def train(config: Config, run_dir: Path, *, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Record]:
    """Trains one agent and yields what happens, as it happens.

    Args:
        config: everything that decides the run.
        run_dir: where its files go; made if missing.
        should_stop: asked once per environment step; True ends the run early, with a checkpoint.

    Yields:
        `Metrics`, `Evaluation` and `GrowthEvent`, after they have been written.

    Raises:
        ConfigError: the configuration cannot be run.
        GrowthFailed: a growth was rolled back and `config.on_growth_failure` is "stop".
    """
    run = Run(config, run_dir)
    with run.recording():
        while run.collector.frames < config.total_frames and not should_stop():
            with run.phases("act"):
                run.collector.act(run.learner.q_values)  # the environments step from here on
            with run.phases("learn"):
                run.learn()
            with run.phases("environment"):
                run.collector.receive()
            if run.schedule.due(run.collector.frames, run.stage):
                yield from run.grow()
            if run.crossed(config.target_period) and run.learner.updates:
                run.learner.copy_target()
            if run.crossed(config.eval_period):
                yield run.evaluate()
            if run.crossed(config.log_period):
                yield run.report()
            if run.crossed(config.checkpoint_period):
                run.save()
        run.learn()
        yield from run.finish()


def resolve_device(name: str) -> torch.device:
    """The device of `--device`; raises `ConfigError` where `cuda` was asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no GPU is available to PyTorch here; use --device cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


@dataclass
class StageTotals:
    """What one stage has taken: frames, updates, and seconds of training (growth, evaluation and checkpoints excluded)."""

    frames: int = 0
    updates: int = 0
    seconds: float = 0.0


class Run:
    """The parts of one run, built from its configuration, and the periodic work of the loop.

    Attributes:
        config, run_dir, device, schedule: what is run, where, when it grows.
        collector, ring, learner: acting, memory, learning.
        phases: where the time goes.
        stage: schedule entries carried out, a growth that failed and was skipped included.
        totals: per stage.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.device = resolve_device(config.device)
        num_threads = config.num_threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(num_threads)
        self.schedule = make_schedule(config.schedule, config.total_frames, config.learning_starts)
        streams = np.random.SeedSequence(config.entropy).spawn(5)
        weights, episodes, exploration, sampling, growth = (int(s.generate_state(1, np.uint64)[0]) for s in streams)
        environment = make_environment(config, seed=episodes)
        self.ring = FrameRing(
            config.replay_capacity, config.num_envs, rng=np.random.default_rng(sampling), device=self.device
        )
        self.replay = frame_replay(self.ring)
        self.collector = Collector(environment, self.replay, config, np.random.default_rng(exploration), self.device)
        self.learner = DoubleDQN(
            config,
            environment.num_actions,
            width=config.width * self.schedule.width_multiplier,
            device=self.device,
            generator=torch.Generator().manual_seed(weights),
        )
        self.growth_generator = torch.Generator().manual_seed(growth)
        self.stage = 0
        self.totals = [StageTotals() for _ in range(len(self.schedule.injection_frames) + 1)]
        self.phases = Phases()
        self.last_evaluation: Evaluation | None = None
        self._recent_returns: deque[float] = deque(maxlen=100)
        self._wall_start = self._accounted = self._reported = time.perf_counter()
        self._frames_accounted = self._updates_accounted = 0
        self._frames_reported = self._updates_reported = 0
        self._seconds: dict[str, float] = {}

    def crossed(self, period: int) -> bool:
        """Whether the last step went past a multiple of `period` frames (0: never)."""
        now = self.collector.frames
        return period > 0 and now // period > (now - FRAME_SKIP * self.config.num_envs) // period

    def learn(self) -> None:
        """Does the updates owed so far, their batches drawn in one call."""
        owed = updates_due(self.config, self.collector.agent_steps) - self.learner.updates
        if owed > 0:
            batches = self.replay.sample(owed * self.config.batch_size)
            self.learner.update(batches.view(owed, self.config.batch_size))

    def grow(self) -> Iterator[GrowthEvent]:
        """Carries out the schedule entry that is due; a failure is rolled back, and ends the run if so configured."""
        self._account()
        self.stage += 1
        with self.phases("growth"):
            valid = torch.from_numpy(np.flatnonzero(self.ring.valid))
            chosen = valid[torch.randint(len(valid), (_PROBE_SIZE,), generator=self.growth_generator)]
            freeze_at = self.config.freeze_encoder_at
            try:
                event = grow(
                    self.learner,
                    self.ring.get(chosen)["observation"],
                    anchor=self.config.anchor,
                    generator=self.growth_generator,
                    freeze_encoder=self.stage == freeze_at,
                    frames=self.collector.frames,
                )
            except GrowthFailed as error:
                if self.config.on_growth_failure == "stop":
                    raise
                warnings.warn(f"{error}; training goes on ungrown", stacklevel=2)
                return
        self.sinks.write("growth_events", event.to_dict())
        yield event

    def evaluate(self) -> Evaluation:
        """Evaluates the online network."""
        with self.phases("evaluation"):
            record = evaluate(
                self.learner.q_values,
                self.config,
                frames=self.collector.frames,
                stage=self.learner.head.num_injections,
                device=self.device,
            )
        self.last_evaluation = record
        self.sinks.write("evaluations", record.to_dict())
        return record

    def report(self) -> Metrics:
        """Writes and returns what happened since the last report."""
        self._account()
        now, frames, updates = time.perf_counter(), self.collector.frames, self.learner.updates
        seconds = now - self._reported
        returns, q_mean = self.collector.report()
        self._recent_returns.extend(returns)
        record = Metrics(
            frames=frames,
            agent_steps=self.collector.agent_steps,
            updates=updates,
            stage=self.learner.head.num_injections,
            wall_seconds=now - self._wall_start,
            frames_per_second=(frames - self._frames_reported) / seconds,
            updates_per_second=(updates - self._updates_reported) / seconds,
            episode_return=sum(returns) / len(returns) if returns else None,
            episodes=len(returns),
            loss=self.learner.report_loss(),
            q_mean=q_mean,
            epsilon=epsilon_at(self.config, frames),
            lr=self.config.lr,
            seconds={name: round(value, 4) for name, value in self._seconds.items()},
        )
        self._reported, self._frames_reported, self._updates_reported, self._seconds = now, frames, updates, {}
        self.sinks.write("metrics", record.to_dict())
        return record

    def save(self) -> None:
        """Writes a checkpoint."""
        with self.phases("checkpoint"):
            checkpoint.save(self.run_dir, self.learner, self.collector.frames)

    def finish(self) -> Iterator[Record]:
        """The last evaluation, record and checkpoint, where the loop has not just made them."""
        if self.config.eval_period and not self.crossed(self.config.eval_period):
            yield self.evaluate()
        if self._frames_reported < self.collector.frames:
            yield self.report()
        self.save()
        self._account()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Opens the run's files and the GPU monitor; always leaves a `summary.json` that says how the run ended."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        _write_json(self.run_dir / "config.json", describe(self.config, self.device))
        self.sinks = RunSinks(self.run_dir)
        monitor = open_monitor(self.device)
        monitor.start()
        status = "failed"
        try:
            yield
            status = "done" if self.collector.frames >= self.config.total_frames else "stopped"
        except GeneratorExit:
            status = "stopped"
            raise
        finally:
            monitor.stop()
            self.sinks.close()
            self.collector.environment.close(raise_if_closed=False)
            _write_json(self.run_dir / "summary.json", self._summary(status) | {"gpu": monitor.summary()})

    def _account(self) -> None:
        """Charges the time since the last call to the current stage, less the phases in which training stood still."""
        now, phases = time.perf_counter(), self.phases.take()
        for name, seconds in phases.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        paused = sum(phases.get(name, 0.0) for name in _PAUSES)
        total = self.totals[self.stage]
        total.seconds += now - self._accounted - paused
        total.frames += self.collector.frames - self._frames_accounted
        total.updates += self.learner.updates - self._updates_accounted
        self._accounted, self._frames_accounted, self._updates_accounted = (
            now,
            self.collector.frames,
            self.learner.updates,
        )

    def _summary(self, status: str) -> dict[str, Any]:
        plan = make_plan(self.config, self.learner.num_actions)
        wall_seconds = time.perf_counter() - self._wall_start
        evaluation, recent = self.last_evaluation, list(self._recent_returns)
        return {
            "status": status,
            "schedule": self.config.schedule,
            "game": self.config.game,
            "seed": self.config.seed,
            "frames": self.collector.frames,
            "updates": self.learner.updates,
            "wall_seconds": wall_seconds,
            "frames_per_second": self.collector.frames / wall_seconds,
            "stages": [
                {
                    "frames": total.frames,
                    "seconds": total.seconds,
                    "updates": total.updates,
                    "updates_per_second": total.updates / total.seconds if total.seconds else None,
                    "flops_per_update": cost.flops_per_update,
                }
                for total, cost in zip(self.totals, plan.stages, strict=True)
            ],
            "final_return": evaluation.episode_return
            if evaluation
            else (sum(recent) / len(recent) if recent else None),
            "final_return_source": "evaluation" if evaluation else "last 100 training episodes",
            "human_normalized_score": evaluation.human_normalized_score if evaluation else None,
        }


def describe(config: Config, device: torch.device) -> dict[str, Any]:
    """What `config.json` holds: the configuration and what it ran on."""
    packages = ("torch", "torchrl", "tensordict", "gymnasium", "ale-py", "numpy", "nvidia-ml-py")
    return {
        "config": config.to_dict(),
        "fingerprint": config.fingerprint(),
        "versions": {"growtrain": version("growtrain"), "python": platform.python_version()}
        | {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "num_threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the source tree, None for an installed package."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
