"""One run: its parts, built from its configuration, and its state, which is theirs.

Units: frames; seconds on a monotonic clock.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from growtrain.environments.make import make_environment
from growtrain.learners.base import AbstractLearner
from growtrain.learners.foreign_weights import initial_sha256, load_initial
from growtrain.learners.graph import make_captured, uses_graph
from growtrain.learners.make import make_learner, resolve_device
from growtrain.planning.allocator import keep_freed_memory
from growtrain.plasticity.measurer import Measurer
from growtrain.records import Diagnostics, Evaluation, Metrics, Record, Stem
from growtrain.replay.make import make_ring
from growtrain.runfiles import Unreadable, write_json
from growtrain.runs.acting import Collector
from growtrain.runs.checkpoint import Checkpoint
from growtrain.runs.evaluation import evaluate
from growtrain.runs.frozen_values import FrozenValues
from growtrain.runs.growing import Growing
from growtrain.runs.provenance import describe
from growtrain.runs.resuming import require_decided, resumption, take_up
from growtrain.runs.saving import Saver
from growtrain.runs.summary import summarize
from growtrain.settings.budget import PRIMING_AT_ONCE, crossed, epsilon_at, priming_due, updates_due
from growtrain.settings.config import Config
from growtrain.settings.schedules import schedule_of
from growtrain.telemetry.accounts import Accounts
from growtrain.telemetry.gpu import AbsentMonitor, AbstractMonitor, add_up, open_monitor
from growtrain.telemetry.sinks import RunSinks
from growtrain.telemetry.trackers import open_trackers

_PAUSES = ("growth", "evaluation", "checkpoint", "diagnostics", "decision")


class Run:
    """The parts of one run, and what it does between what is periodic.

    Attributes:
        config, run_dir, device, schedule: what is run, where, when it grows.
        collector, ring: acting and memory.
        learner, captured: learning, and its update in a CUDA graph, if it is in one.
        measurer, growing, saver: how plastic the learner is, its growth, and its checkpoints.
        accounts, phases: frames, updates and seconds, of every stage and since the last record; and their timers.
        last_evaluation: the newest.
        evaluation_owed: whether one at these frames was broken off, and is to be made before anything else.
        reason: in one line, why it failed, or was stopped, as far as that is known.
    """

    def __init__(self, config: Config, run_dir: Path, start: Checkpoint | None = None) -> None:
        run_dir = run_dir.absolute()  # the working directory may change while it runs
        self.config, self.run_dir, self._start = config, run_dir, start
        self.device = resolve_device(config.device)
        torch.set_num_threads(config.threads)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.schedule = schedule_of(config)
        streams = np.random.SeedSequence(config.entropy).spawn(5)
        weights, episodes, exploration, sampling, growth = (int(s.generate_state(1, np.uint64)[0]) for s in streams)
        environment = make_environment(config, seed=episodes)
        rng = np.random.default_rng(sampling)
        self.ring = make_ring(config, environment.spec, rng=rng, device=self.device)
        self.collector = Collector(environment, self.ring, config, np.random.default_rng(exploration))
        generator = torch.Generator().manual_seed(weights)
        learner = make_learner(config, environment.spec, device=self.device, generator=generator)
        if start is None:
            load_initial(learner, run_dir, generator)
        self.learner: AbstractLearner = learner
        self.captured = make_captured(learner, self.ring) if uses_graph(config, self.device) else None
        self.frozen_values = FrozenValues(learner, self.ring)
        self.measurer = Measurer(config, learner, self.ring)
        self.accounts = Accounts(self.schedule.num_stages, _PAUSES)
        self.phases = self.accounts.phases
        self.growing = Growing(
            config,
            self.schedule,
            measurer=self.measurer,
            frozen_values=self.frozen_values,
            collector=self.collector,
            accounts=self.accounts,
            generator=torch.Generator().manual_seed(growth),
        )
        self.last_evaluation: Evaluation | None = None
        self.evaluation_owed = False
        self.reason: str | None = None
        self._resumes: list[dict[str, Any]] = []
        self._gpu_before: dict[str, Any] | None = None
        self._monitor: AbstractMonitor = AbsentMonitor("nothing was recorded")
        resumed = start is not None and start.is_of(run_dir)
        self._forked = start is not None and not resumed
        self.saver = Saver(config, run_dir, self.ring, start.segments if start is not None and resumed else ())
        if start is not None:
            self._restore(start)

    @property
    def frames(self) -> int:
        """Frames played."""
        return self.collector.frames

    @property
    def goes_on(self) -> bool:
        """Whether the loop has anything left to do: frames, updates of heavy priming, or a decision that was broken off."""
        return self.frames < self.config.total_frames or self.growing.decision_owed or self._priming_owed() > 0

    @property
    def played_out(self) -> bool:
        """Whether all frames were played, with the decisions and evaluations on the way."""
        return not self.goes_on and not self.evaluation_owed

    def crossed(self, period: int) -> bool:
        """Whether the last step went past a multiple of `period` frames (0: never)."""
        return crossed(self.config, period, self.collector.frames)

    def step(self) -> None:
        """One step of every environment, and the updates owed, which are done while the environments step."""
        with self.phases("act"):
            self.collector.act(self.act)  # the environments step from here on
        with self.phases("learn"):
            self.learn()
        with self.phases("environment"):
            self.frozen_values.extend(self.collector.receive())

    def act(self, observation: Tensor) -> Tensor:
        """What acting chooses from, of the newest observations in the replay."""
        return self.learner.act(observation, self.frozen_values.newest())

    def prime(self) -> bool:
        """Does some updates of heavy priming, if any are owed: nothing is played until they are done. Says whether it did.

        The target is copied after as many updates as in play.
        """
        config, learner = self.config, self.learner
        owed = self._priming_owed()
        if owed <= 0:
            return False
        per_copy = max(1, int(config.replay_ratio * config.target_period / config.frame_skip))
        with self.phases("learn"):
            self._update(min(owed, per_copy - learner.updates % per_copy, PRIMING_AT_ONCE))
            if learner.updates % per_copy == 0:
                learner.end_of_step(config.target_period)
        return True

    def _priming_owed(self) -> int:
        return priming_due(self.config, self.collector.agent_steps) - self.learner.updates

    def learn(self) -> None:
        """Does the updates owed so far, their batches drawn in one call."""
        owed = updates_due(self.config, self.collector.agent_steps) - self.learner.updates
        if owed > 0:
            self._update(owed)

    def _update(self, owed: int) -> None:
        if self.captured is None:
            self.learner.update(self.ring.sample_batches(owed, self.config.batch_size))
        else:
            self.captured.update(self.ring.sample_indices(owed * self.config.batch_size))

    def evaluate(self, should_stop: Callable[[], bool | str]) -> Iterator[Evaluation]:
        """Evaluates the agent as it is; broken off by a stop, the evaluation is owed."""
        with self.phases("evaluation"):
            evaluation = evaluate(
                self.learner.act,
                self.config,
                frames=self.frames,
                stage=self.growing.stage,
                device=self.device,
                should_stop=should_stop,
            )
        self.evaluation_owed = evaluation is None
        if evaluation is not None:
            self.last_evaluation = evaluation
            yield evaluation

    def diagnose(self) -> Diagnostics:
        """Measures the learner's plasticity, which changes nothing in the run."""
        with self.phases("diagnostics"):
            return self.measurer.measure(self.frames, self.growing.stage, "period")

    def report(self) -> Metrics:
        """What happened since the last report; raises `Diverged` if the network stopped learning."""
        self.growing.charge()
        self.learner.require_finite()
        learned = self.learner.report()
        if learned.skipped:
            warnings.warn(
                f"{learned.skipped} updates up to {self.frames} frames were not finite and not applied", stacklevel=1
            )
        returns, q_mean = self.collector.report()
        return Metrics(
            frames=self.frames,
            agent_steps=self.collector.agent_steps,
            updates=self.learner.updates,
            stage=self.growing.stage,
            episode_return=sum(returns) / len(returns) if returns else None,
            episodes=len(returns),
            loss=learned.loss,
            q_mean=learned.q_mean if q_mean is None else q_mean,
            epsilon=epsilon_at(self.config, self.frames),
            lr=self.config.lr,
            **self.accounts.close_interval(),
        )

    def write(self, record: Record) -> None:
        """Puts a record into its file, and to whoever follows the run."""
        self.sinks.write(record.stem, record.to_dict())

    def save(self, *, required: bool = False) -> None:
        """Writes a checkpoint, which changes nothing in the run, see `Saver.save`."""
        with self.phases("checkpoint"):
            if self.saver.save(self.learner, self.state_dict, self.sinks, frames=self.frames, required=required):
                self._note_saved()

    def _note_saved(self) -> None:
        """Notes the first checkpoint in `config.json`: where there is none any more, the run is not begun again over its records."""
        if not self._about["saved"]:
            with contextlib.suppress(OSError):  # a disk that is full now: the next checkpoint is noted
                write_json(self.run_dir / "config.json", self._about | {"saved": True})
                self._about["saved"] = True

    def finish(self, should_stop: Callable[[], bool | str]) -> Iterator[Record]:
        """The last updates, evaluation, record and checkpoint; of a run that was stopped only the checkpoint, so that it can go on.

        What was done before a kill that came before the summary is not done again.
        """
        if self.played_out:
            self.learn()
            evaluated_at = self.last_evaluation.frames if self.last_evaluation else 0
            if self.config.eval_period and evaluated_at < self.frames:
                yield from self.evaluate(should_stop)
            if self.accounts.frames_reported < self.frames:
                yield self.report()
        if not self.played_out and isinstance(stopped := should_stop(), str):
            self.reason = stopped or None
        self.save(required=True)
        self.growing.charge()

    @contextlib.contextmanager
    def recording(self, stale_lock: str | None = None) -> Iterator["Run"]:
        """Opens the run's files and the GPU monitor; always leaves a `summary.json` that says how the run ended."""
        if stale_lock:
            warnings.warn(f"{stale_lock} ended without letting go of {self.run_dir}; taken over", stacklevel=1)
        # First what it began with: whatever comes between, it is begun again from that.
        began = {"initial_weights": initial_sha256(self.run_dir)} if self._start is None else {}
        saved = {"saved": self._start is not None and not self._forked}
        self._about = describe(self.config, self.device) | began | {"resumes": self._resumes} | saved
        write_json(self.run_dir / "config.json", self._about)
        owed = self.growing.decision_owed  # with everything that is recorded after it in a step
        last = dict.fromkeys(get_args(Stem), self.frames - owed) | {
            "metrics": self.accounts.frames_reported,
            "evaluations": self.frames - (owed or self.evaluation_owed),
        }
        take_up(self.run_dir, self._start, forked=self._forked, last=last)
        self.sinks = RunSinks(self.run_dir, self.frames - owed, open_trackers(self.config, self.run_dir))
        self._monitor = open_monitor(self.device)
        self._monitor.start()
        status = "failed"
        try:
            self.accounts.skip()  # setting out, or taking up where it was left, is no training
            if self._forked:
                self.save(required=True)
            yield self
            status = "done" if self.played_out else "stopped"
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
                write_json(self.run_dir / "summary.json", self._summary(status))
            except OSError as error:  # a full disk must not hide how the run ended
                warnings.warn(f"summary.json was not written: {error}", stacklevel=1)
            self.sinks.close(failed=status == "failed")  # last, and outside of what was timed: trackers take their time

    def _summary(self, status: str) -> dict[str, Any]:
        planned = self.growing.interventions == self.growing.entries
        summary = summarize(
            self.config,
            collector=self.collector,
            updates=self.learner.updates,
            accounts=self.accounts,
            stage=self.growing.stage,
            as_planned=planned and not any(resume.get("past_differs") for resume in self._resumes),
            evaluation=self.last_evaluation,
        )
        end = {"resumes": self._resumes, "gpu": self._gpu_so_far()}
        return {"status": status, "reason": self.reason} | summary | end

    def _gpu_so_far(self) -> dict[str, Any]:
        """What the GPU has done for this run, before it was interrupted, too."""
        now = self._monitor.summary()
        return now if self._gpu_before is None else add_up(self._gpu_before, now)

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on, between two steps; tensors are views, and the replay's frames are left out."""
        self.growing.charge()
        self.frozen_values.complete()
        ring = self.ring.state_dict()
        del ring["frames"]
        return {
            "spec": self.collector.environment.spec.to_dict(),
            "learner": self.learner.state_dict(),
            "collector": self.collector.state_dict(),
            "ring": ring,
            "measurer": self.measurer.state_dict(),
            "last_evaluation": self.last_evaluation.to_dict() if self.last_evaluation else None,
            "evaluation_owed": self.evaluation_owed,
            "resumes": self._resumes,
            "gpu": self._gpu_so_far(),
            **self.growing.state_dict(),
            **self.accounts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, all but the frames of the replay."""
        self.learner.load_state_dict(state["learner"])
        self.collector.load_state_dict(state["collector"])
        self.ring.load_state_dict(state["ring"])
        self.frozen_values.loaded()
        self.ring.check_valid()
        self.frozen_values.check_valid()
        self.measurer.load_state_dict(state.get("measurer", {}))
        self.growing.load_state_dict(state)
        self.last_evaluation = Evaluation(**state["last_evaluation"]) if state["last_evaluation"] else None
        self.evaluation_owed = bool(state.get("evaluation_owed")) and self.config.eval_period > 0
        self.accounts.load_state_dict(state, self.frames, self.learner.updates)
        self._resumes = list(state["resumes"])
        self._gpu_before = state.get("gpu")

    def _restore(self, start: Checkpoint) -> None:
        """Makes this run the one that was saved; raises `Unreadable` where the checkpoint does not fit."""
        state, reseeded = start.state, start.config.seed != self.config.seed
        if self._forked:
            require_decided(start)
        if reseeded:  # a fork with another seed: the past is kept, the future is its own
            state["collector"]["environment"] = self.collector.environment.state_dict()
            state["collector"]["exploration"] = dict(self.collector.generator.bit_generator.state)
            state["ring"]["rng"] = self.ring.state_dict()["rng"]
            state["growth_generator"] = self.growing.generator.get_state()
            own = self.learner.state_dict()
            state["learner"] |= {name: own[name] for name in ("noise",) if name in own}
        try:
            self.load_state_dict(state)
            start.load_frames(self.ring)
            if self._forked:  # what is reported of it is of episodes that it has begun itself
                self.collector.disown_episodes()
                self.last_evaluation, self.evaluation_owed = None, False
            if reseeded:  # what an emulator draws within an episode is decided where it is seeded
                self.collector.begin_episodes()
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, RuntimeError) as error:
            raise Unreadable(f"{start.path}: {error}") from error
        done = self.growing.interventions
        self._resumes.append(resumption(start, self.config, self.device, forked=self._forked, interventions=done))
        state.clear()  # the networks and the transitions are in memory twice until here
