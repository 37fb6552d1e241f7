"""Training: the only loop. Double DQN (van Hasselt et al. 2016) whose network grows by plasticity injection (Nikishin et al. 2023).

While the environments step in their own threads, the learner does the updates it owes. Everything periodic happens where the frame
counter crosses a multiple of its period. `train` writes the run's files and yields each record as it is made; what to show and when to
stop is up to whoever iterates.

Units: frames; seconds on a monotonic clock.
"""

import contextlib
import dataclasses
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from growtrain.environments.make import make_environment
from growtrain.growth.transaction import GrowthFailed, apply
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.foreign_weights import load_initial
from growtrain.learners.graph import make_captured, uses_graph
from growtrain.learners.make import resolve_device
from growtrain.planning.allocator import keep_freed_memory
from growtrain.planning.costs import make_plan
from growtrain.plasticity.adaptive import decide
from growtrain.plasticity.learning_test import LearningTest, compare_copies, mean_errors
from growtrain.plasticity.measurer import Measurer
from growtrain.records import Decision, Diagnostics, Evaluation, Metrics, Record
from growtrain.replay.frames import FrameRing, frame_replay
from growtrain.runfiles import Unreadable, run_lock, sync_file, write_json
from growtrain.runs.acting import Collector
from growtrain.runs.checkpoint import Checkpoint, CheckpointFailed, CheckpointWriter
from growtrain.runs.evaluation import evaluate
from growtrain.runs.provenance import describe
from growtrain.runs.resuming import resumption, take_up
from growtrain.settings.budget import epsilon_at, updates_due
from growtrain.settings.config import Config
from growtrain.settings.schedules import Intervention, Rule, schedule_of
from growtrain.telemetry.accounts import Accounts
from growtrain.telemetry.gpu import AbsentMonitor, AbstractMonitor, add_up, open_monitor
from growtrain.telemetry.sinks import RunSinks
from growtrain.telemetry.trackers import open_trackers

_PROBE_SIZE = 32  # observations on which a growth is verified
_REDO_PROBE_SIZE = 256  # and on which dormant units are found, as in the authors' code
_DECIDING = LearningTest(seeds=2)  # four fits of 450 updates
_PAUSES = ("growth", "evaluation", "checkpoint", "diagnostics", "decision")
_DECISION_STREAM = 0xDEC1DE  # sets the draws of decisions apart from the run's own streams, which are numbered from 0
_CHECKPOINT_ATTEMPTS = 3  # failures in a row, each with a longer wait after it, that end a run


def train(
    config: Config,
    run_dir: Path,
    *,
    should_stop: Callable[[], bool | str] = lambda: False,
    start: Checkpoint | None = None,
) -> Iterator[Record]:
    """Trains one agent and yields what happens, as it happens.

    Args:
        config: everything that decides the run.
        run_dir: where its files go, by the working directory of this call; made if missing.
        should_stop: asked once per environment step; True, or the reason, ends the run early, with a checkpoint to go on from.
        start: a checkpoint of this run, to go on from bit for bit, or of another, to fork.

    Yields:
        `Metrics`, `Evaluation`, `Diagnostics` and `GrowthEvent`, after they have been written.

    Raises:
        ConfigError: the configuration cannot be run, or another process runs in this directory.
        GrowthFailed: a growth was rolled back and `config.on_growth_failure` is "stop".
        CheckpointFailed: the last checkpoint, or several in a row, could not be written.
    """
    return _train(config, run_dir.absolute(), should_stop, start)


def _train(
    config: Config, run_dir: Path, should_stop: Callable[[], bool | str], start: Checkpoint | None
) -> Iterator[Record]:
    """The loop."""
    with run_lock(run_dir) as stale_lock, Run(config, run_dir, start).recording(stale_lock) as run:
        stopped: bool | str = False
        while run.collector.frames < config.total_frames and not (stopped := should_stop()):
            with run.phases("act"):
                run.collector.act(run.learner.q_values)  # the environments step from here on
            with run.phases("learn"):
                run.learn()
            with run.phases("environment"):
                run.collector.receive()
            if run.schedule.adaptive and run.crossed(run.schedule.adaptive.period):
                yield from run.decide(run.schedule.adaptive)
            if run.schedule.due(run.collector.frames, run.stage):
                yield from run.grow()
            if run.crossed(config.target_period) and run.learner.updates:
                run.learner.copy_target()
            if run.crossed(config.eval_period):
                yield run.evaluate()
            if run.crossed(config.diagnostics_period):
                yield run.diagnose("period")
            if run.crossed(config.log_period):
                yield run.report()
            if run.checkpoint_due():
                run.save()
        yield from run.finish(stopped)


class Run:
    """The parts of one run, built from its configuration, and the periodic work of the loop.

    Attributes:
        config, run_dir, device, schedule: what is run, where, when it grows.
        collector, ring, learner, measurer: acting, memory, learning, and how plastic it is.
        stage: schedule entries carried out, a growth that failed and was skipped included.
        interventions: those that did not fail.
        grown_at: frames at which entries were carried out.
        decision: the last one of an adaptive schedule.
        accounts: frames, updates and seconds, of every stage and since the last record.
        reason: in one line, why it failed, or was stopped, as far as that is known.
    """

    def __init__(self, config: Config, run_dir: Path, start: Checkpoint | None = None) -> None:
        run_dir = run_dir.absolute()  # the working directory may change while it runs
        self.config, self.run_dir, self._start = config, run_dir, start
        self.device = resolve_device(config.device)
        torch.set_num_threads(config.threads)
        if self.device.type == "cpu":
            keep_freed_memory()
        gc.collect()  # TorchRL's buffer and its writer hold each other: an earlier run's replay goes before this one takes memory
        self.schedule = schedule_of(config)
        streams = np.random.SeedSequence(config.entropy).spawn(5)
        weights, episodes, exploration, sampling, growth = (int(s.generate_state(1, np.uint64)[0]) for s in streams)
        environment = make_environment(config, seed=episodes)
        self.ring = FrameRing(
            config.replay_capacity,
            config.num_envs,
            rng=np.random.default_rng(sampling),
            frame_shape=environment.spec.frame_shape,
            stack_size=environment.spec.stack_size,
            device=self.device,
        )
        self.replay = frame_replay(self.ring)
        self.collector = Collector(environment, self.replay, config, np.random.default_rng(exploration))
        self.learner = DoubleDQN(
            config,
            environment.spec,
            width=config.width * self.schedule.width_multiplier,
            device=self.device,
            generator=torch.Generator().manual_seed(weights),
        )
        if start is None:
            load_initial(self.learner, run_dir)
        self.captured = make_captured(self.learner, self.ring) if uses_graph(config, self.device) else None
        self.measurer = Measurer(config, self.learner, self.ring)
        self.growth_generator = torch.Generator().manual_seed(growth)
        self.stage = self.interventions = 0
        self.grown_at: list[int] = []
        self.decision: Decision | None = None
        self.accounts = Accounts(self.schedule.num_stages, _PAUSES)
        self.phases = self.accounts.phases
        self.last_evaluation: Evaluation | None = None
        self.reason: str | None = None
        self._resumes: list[dict[str, Any]] = []
        self._gpu_before: dict[str, Any] | None = None
        self._monitor: AbstractMonitor = AbsentMonitor("nothing was recorded")
        self._failed_checkpoints, self._retry_at = 0, math.inf
        resumed = start is not None and start.path.parent.parent.resolve() == run_dir.resolve()
        self._forked = start is not None and not resumed
        self._writer = CheckpointWriter(run_dir, config.keep, start.segments if start is not None and resumed else ())
        if start is not None:
            self._restore(start)

    def crossed(self, period: int) -> bool:
        """Whether the last step went past a multiple of `period` frames (0: never)."""
        now = self.collector.frames
        return period > 0 and now // period > (now - self.config.frame_skip * self.config.num_envs) // period

    def learn(self) -> None:
        """Does the updates owed so far, their batches drawn in one call."""
        owed = updates_due(self.config, self.collector.agent_steps) - self.learner.updates
        if owed <= 0:
            return
        if self.captured is None:
            batches = self.replay.sample(owed * self.config.batch_size)
            self.learner.update(batches.view(owed, self.config.batch_size))
        else:
            self.captured.update(self.ring.sample_indices(owed * self.config.batch_size))

    def decide(self, rule: Rule) -> Iterator[Record]:
        """Measures whether plasticity is lost, on copies, which changes nothing in the run; grows if so."""
        if not self.learner.updates:
            return
        with self.phases("decision"):
            start, frames = time.perf_counter(), self.collector.frames
            seed = np.random.SeedSequence(self.config.entropy, spawn_key=(_DECISION_STREAM, frames))
            curves = compare_copies(self.learner, self.ring, _DECIDING, seed, ("current", "inject"))
            errors = {copy: sum(means) / len(means) for copy, means in mean_errors(curves).items()}
            self.decision = decide(
                rule,
                frames=frames,
                stage=self.stage,
                last_injection=self.grown_at[-1] if self.grown_at else 0,
                errors=(errors["current"], errors["inject"]),
                returns=list(self.collector.recent_returns),
                episodes=self.collector.num_episodes,
                before=self.decision,
                seconds=time.perf_counter() - start,
            )
        self.sinks.write("decisions", self.decision.to_dict())
        yield self.decision
        if self.decision.inject:
            yield from self.grow(self.decision.reason)

    def grow(self, reason: str = "schedule") -> Iterator[Record]:
        """Carries out the schedule entry that is due; a failure is rolled back, and ends the run if so configured."""
        measured = self._measures_growth()
        if measured:
            yield self.diagnose("before growth")
        self._charge()
        self.stage += 1
        self.grown_at.append(self.collector.frames)
        with self.phases("growth"):
            valid = torch.from_numpy(np.flatnonzero(self.ring.valid))
            size = _REDO_PROBE_SIZE if self.schedule.intervention == "redo" else _PROBE_SIZE
            chosen = valid[torch.randint(len(valid), (size,), generator=self.growth_generator)]
            try:
                event = apply(
                    self.learner,
                    self.schedule.intervention,
                    self.ring.get(chosen)["observation"],
                    config=self.config,
                    generator=self.growth_generator,
                    freeze_encoder=self.stage == self.config.freeze_encoder_at,
                    frames=self.collector.frames,
                    reason=reason,
                )
            except GrowthFailed as error:
                if self.config.on_growth_failure == "stop":
                    raise
                warnings.warn(f"{error}; training goes on ungrown", stacklevel=1)
                return
        self.interventions += 1
        event = dataclasses.replace(event, stage=self.schedule.stage_after(self.interventions))
        self.sinks.write("growth_events", event.to_dict())
        yield event
        if measured:
            yield self.diagnose("after growth", self.schedule.intervention)

    def _measures_growth(self) -> bool:
        """Whether diagnostics go around the next growth: of a periodic intervention around the first in each of their periods."""
        period = self.config.diagnostics_period
        if not (self.schedule.periodic and period and self.grown_at):
            return period > 0
        return self.collector.frames // period > self.grown_at[-1] // period

    def diagnose(
        self, when: Literal["period", "before growth", "after growth"], kind: Intervention | None = None
    ) -> Diagnostics:
        """Measures the online network's plasticity, which changes nothing in the run."""
        with self.phases("diagnostics"):
            record = self.measurer.measure(self.collector.frames, when, kind)
        self.sinks.write("diagnostics", record.to_dict())
        return record

    def evaluate(self) -> Evaluation:
        """Evaluates the online network."""
        with self.phases("evaluation"):
            record = evaluate(
                self.learner.q_values,
                self.config,
                frames=self.collector.frames,
                stage=self.schedule.stage_after(self.interventions),
                device=self.device,
            )
        self.last_evaluation = record
        self.sinks.write("evaluations", record.to_dict())
        return record

    def report(self) -> Metrics:
        """Writes and returns what happened since the last report; raises `Diverged` if the network stopped learning."""
        self._charge()
        self.learner.require_finite()
        if skipped := self.learner.report_skipped():
            warnings.warn(
                f"{skipped} updates up to {self.collector.frames} frames were not finite and not applied", stacklevel=1
            )
        returns, q_mean = self.collector.report()
        record = Metrics(
            frames=self.collector.frames,
            agent_steps=self.collector.agent_steps,
            updates=self.learner.updates,
            stage=self.schedule.stage_after(self.interventions),
            episode_return=sum(returns) / len(returns) if returns else None,
            episodes=len(returns),
            loss=self.learner.report_loss(),
            q_mean=q_mean,
            epsilon=epsilon_at(self.config, self.collector.frames),
            lr=self.config.lr,
            **self.accounts.close_interval(),
        )
        self.sinks.write("metrics", record.to_dict())
        return record

    def checkpoint_due(self) -> bool:
        """Whether a period has gone by, or the wait after a failed checkpoint; the end of the run makes its own."""
        frames = self.collector.frames
        return frames < self.config.total_frames and (
            self.crossed(self.config.checkpoint_period) or frames >= self._retry_at
        )

    def save(self, *, required: bool = False) -> None:
        """Writes a checkpoint, which changes nothing in the run; a failure is said aloud and tried again after a while.

        Raises:
            CheckpointFailed: it was the third failure in a row, or `required`.
            Diverged: what would be written is not worth going on from.
        """
        frames = self.collector.frames
        with self.phases("checkpoint"):
            self._charge()
            self.learner.require_finite()
            try:
                self._sync_records()
                self._writer.save(self.state_dict(), self.ring, self.config, frames=frames, device=self.device)
            except CheckpointFailed as error:
                self._failed_checkpoints += 1
                if required or self._failed_checkpoints >= _CHECKPOINT_ATTEMPTS:
                    raise
                wait = max(1, self.config.checkpoint_period // 8) * 2 ** (self._failed_checkpoints - 1)
                self._retry_at = frames + wait
                warnings.warn(f"{error}; the ones before are kept, the next attempt is in {wait} frames", stacklevel=1)
            else:
                self._failed_checkpoints, self._retry_at = 0, math.inf

    def _sync_records(self) -> None:
        """Waits until the disk has all records: those before a checkpoint outlive a power cut if it does."""
        try:
            self.sinks.flush()
            for path in self.run_dir.glob("*.jsonl"):
                sync_file(path)
        except OSError as error:
            raise CheckpointFailed(
                f"checkpoint at {self.collector.frames} frames was not written, nor the records before it: {error}"
            ) from error

    def finish(self, stopped: bool | str) -> Iterator[Record]:
        """The last updates, evaluation, record and checkpoint; of a run that was stopped only the checkpoint, so that it can go on.

        What was done before a kill that came before the summary is not done again.
        """
        self.reason = stopped if isinstance(stopped, str) and stopped else None
        if self.collector.frames >= self.config.total_frames:
            self.learn()
            evaluated_at = self.last_evaluation.frames if self.last_evaluation else 0
            if self.config.eval_period and evaluated_at < self.collector.frames:
                yield self.evaluate()
            if self.accounts.frames_reported < self.collector.frames:
                yield self.report()
        self.save(required=True)
        self._charge()

    @contextlib.contextmanager
    def recording(self, stale_lock: str | None = None) -> Iterator["Run"]:
        """Opens the run's files and the GPU monitor; always leaves a `summary.json` that says how the run ended."""
        if stale_lock:
            warnings.warn(f"{stale_lock} ended without letting go of {self.run_dir}; taken over", stacklevel=1)
        if self._start is not None:
            take_up(self.run_dir, self._start, forked=self._forked)
        write_json(self.run_dir / "config.json", describe(self.config, self.device) | {"resumes": self._resumes})
        frames = self.collector.frames if self._start is not None else None
        self.sinks = RunSinks(self.run_dir, frames, open_trackers(self.config, self.run_dir))
        self._monitor = open_monitor(self.device)
        self._monitor.start()
        status = "failed"
        try:
            self.accounts.skip()  # setting out, or taking up where it was left, is no training
            if self._forked:
                self.save(required=True)
            yield self
            status = "done" if self.collector.frames >= self.config.total_frames else "stopped"
        except GeneratorExit:
            status = "stopped"
            raise
        except BaseException as error:
            self.reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
            raise
        finally:
            self._monitor.stop()
            self.collector.environment.close(raise_if_closed=False)
            try:
                write_json(self.run_dir / "summary.json", self._summary(status) | {"gpu": self._gpu_so_far()})
            except OSError as error:  # a full disk must not hide how the run ended
                warnings.warn(f"summary.json was not written: {error}", stacklevel=1)
            self.sinks.close(failed=status == "failed")  # last, and outside of what was timed: trackers take their time

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on, between two steps; tensors are views, and the replay's frames are left out."""
        ring = self.ring.state_dict()
        del ring["frames"]
        return {
            "spec": self.learner.spec.to_dict(),
            "learner": self.learner.state_dict(),
            "collector": self.collector.state_dict(),
            "ring": ring,
            "measurer": self.measurer.state_dict(),
            "growth_generator": self.growth_generator.get_state(),
            "stage": self.stage,
            "interventions": self.interventions,
            "grown_at": self.grown_at,
            "decision": dataclasses.asdict(self.decision) if self.decision else None,
            "last_evaluation": self.last_evaluation.to_dict() if self.last_evaluation else None,
            "resumes": self._resumes,
            "gpu": self._gpu_so_far(),
            **self.accounts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, all but the frames of the replay; a changed seed keeps its own generators."""
        self.learner.load_state_dict(state["learner"])
        self.collector.load_state_dict(state["collector"])
        self.ring.load_state_dict(state["ring"])
        self.ring.check_valid()
        self.measurer.load_state_dict(state.get("measurer", {}))
        self.growth_generator.set_state(state["growth_generator"])
        self.stage, self.interventions = int(state["stage"]), int(state["interventions"])
        self.grown_at = [int(frames) for frames in state["grown_at"]]
        self.decision = Decision(**state["decision"]) if state["decision"] else None
        self.last_evaluation = Evaluation(**state["last_evaluation"]) if state["last_evaluation"] else None
        self.accounts.load_state_dict(state, self.collector.frames, self.learner.updates)
        self._resumes = list(state["resumes"])
        self._gpu_before = state.get("gpu")

    def _restore(self, start: Checkpoint) -> None:
        """Makes this run the one that was saved; raises `Unreadable` where the checkpoint does not fit."""
        state = start.state
        if start.config.seed != self.config.seed:  # a fork with another seed: the past is kept, the future is its own
            state["collector"]["exploration"] = dict(self.collector.generator.bit_generator.state)
            state["ring"]["rng"] = self.ring.state_dict()["rng"]
            state["growth_generator"] = self.growth_generator.get_state()
        try:
            self.load_state_dict(state)
            start.load_frames(self.ring)
            if self._forked:  # what is reported of it is of episodes that it has begun itself
                self.collector.disown_episodes()
                self.last_evaluation = None
        except (ValueError, KeyError, TypeError, IndexError, AssertionError, RuntimeError) as error:
            raise Unreadable(f"{start.path}: {error}") from error
        self._resumes.append(
            resumption(start, self.config, self.device, forked=self._forked, interventions=self.interventions)
        )
        state.clear()  # the networks and the transitions are in memory twice until here

    def _gpu_so_far(self) -> dict[str, Any]:
        """What the GPU has done for this run, before it was interrupted, too."""
        now = self._monitor.summary()
        return now if self._gpu_before is None else add_up(self._gpu_before, now)

    def _charge(self) -> None:
        """Charges what has happened since the last call to the current stage."""
        self.accounts.charge(self.schedule.stage_after(self.stage), self.collector.frames, self.learner.updates)

    def _summary(self, status: str) -> dict[str, Any]:
        plan = make_plan(self.config, self.learner.spec)
        wall_seconds = self.accounts.wall_seconds
        evaluation, recent = self.last_evaluation, list(self.collector.recent_returns)
        score = evaluation.episode_return if evaluation else None
        evaluated = score is not None
        if score is None and recent:
            score = sum(recent) / len(recent)
        planned = self.interventions == self.stage and not any(r.get("past_differs") for r in self._resumes)
        return {
            "status": status,
            "reason": self.reason,
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
                    "flops_per_update": cost.flops_per_update if planned else None,
                }
                for total, cost in zip(self.accounts.stages, plan.stages, strict=True)
            ],
            "final_return": score,
            "final_return_source": "evaluation" if evaluated else f"last {len(recent)} training episodes",
            "final_return_episodes": evaluation.episodes if evaluation and evaluated else len(recent),
            "human_normalized_score": evaluation.human_normalized_score if evaluation else None,
            "resumes": self._resumes,
        }
