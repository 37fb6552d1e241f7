"""Growing: when the schedule, or a measurement, says so, and what goes around it.

Units: frames; seconds on a monotonic clock.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from growtrain.growth.kinds import kind_of
from growtrain.growth.transaction import GrowthFailed, apply, freeze_encoder
from growtrain.plasticity.adaptive import DECIDING, decide
from growtrain.plasticity.learning_test import Interrupted, compare_copies, count_flops, mean_errors
from growtrain.plasticity.measurer import Measurer
from growtrain.records import Decision, Record
from growtrain.runs.acting import Collector
from growtrain.runs.frozen_values import FrozenValues
from growtrain.settings.budget import crossed
from growtrain.settings.config import Config
from growtrain.settings.schedules import Schedule
from growtrain.telemetry.accounts import Accounts

_DECISION_STREAM = 0xDEC1DE  # sets the draws of decisions apart from the run's own streams, which are numbered from 0


class Growing:
    """Decides whether to grow, and grows, the learner that `measurer` measures.

    Args:
        config: of the run.
        schedule: its schedule.
        measurer: of the learner, on the replay.
        frozen_values: kept in the replay, of networks that are frozen whole.
        collector: whose frames and scores count.
        accounts: charged.
        generator: of fresh weights, and of the observations on which a growth is verified.

    Attributes:
        entries: those of the schedule that were carried out, a growth that failed and was skipped included.
        interventions: those that did not fail.
        grown_at: frames at which entries were carried out.
        decision: the last one of an adaptive schedule.
        decision_owed: whether one at these frames was broken off, and is to be made before anything that comes after it in a step.
    """

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        *,
        measurer: Measurer,
        frozen_values: FrozenValues,
        collector: Collector,
        accounts: Accounts,
        generator: torch.Generator,
    ) -> None:
        self.config, self.schedule, self.measurer = config, schedule, measurer
        self.frozen_values, self.kind = frozen_values, kind_of(schedule.intervention, config)
        self.collector, self.accounts, self.generator = collector, accounts, generator
        self.entries = self.interventions = 0
        self.grown_at: list[int] = []
        self.decision: Decision | None = None
        self.decision_owed = False
        self._decided: str | None = None  # the reason of a growth that waits for a copy of the target

    @property
    def stage(self) -> int:
        """The stage of the schedule that the network is in."""
        return self.schedule.stage_after(self.interventions)

    def charge(self) -> None:
        """Charges what has happened since the last call to the stage of the schedule that was to be reached."""
        self.accounts.charge(
            self.schedule.stage_after(self.entries), self.collector.frames, self.measurer.learner.updates
        )

    def to_decide(self) -> bool:
        """Whether an adaptive schedule has to be decided on after this step."""
        rule = self.schedule.adaptive
        if rule is None or self._decided is not None:
            return False
        return self.decision_owed or crossed(self.config, rule.period, self.collector.frames)

    def decide(self, should_stop: Callable[[], bool | str]) -> Iterator[Record]:
        """Measures whether plasticity is lost, on copies, which changes nothing in the run; grows if so.

        Broken off by a stop, the decision is owed.
        """
        self.decision_owed = False
        learner, frames, rule = self.measurer.learner, self.collector.frames, self.schedule.adaptive
        if rule is None or not learner.updates:
            return
        with self.accounts.phases("decision"):
            start = time.perf_counter()
            seed = np.random.SeedSequence(self.config.entropy, spawn_key=(_DECISION_STREAM, frames))
            # The first of those that would grow.
            copies, network = ("current", "inject"), next(iter(learner.plastic_parts))
            try:
                curves = compare_copies(
                    learner, self.measurer.ring, DECIDING, seed, copies, should_stop, network=network
                )
            except Interrupted:
                self.decision_owed = True
                return
            flops = count_flops(learner, self.measurer.ring, DECIDING, copies, network)
            # Scores of another game tell nothing.
            before = self.decision if self.decision and self._is_same_game(self.decision.frames) else None
            errors = {copy: sum(means) / len(means) for copy, means in mean_errors(curves).items()}
            self.decision = decide(
                rule,
                frames=frames,
                stage=self.entries,
                last_injection=self.grown_at[-1] if self.grown_at else 0,
                errors=(errors["current"], errors["inject"]),
                returns=list(self.collector.recent_returns),
                episodes=self.collector.num_episodes,
                before=before,
                seconds=time.perf_counter() - start,
                flops=flops,
            )
        yield self.decision
        if self.decision.inject:
            self._decided = self.decision.reason

    def _is_same_game(self, frames: int) -> bool:
        """Whether the game that is played was played at so many frames, too."""
        return self.config.game_after(frames) == self.config.game_after(self.collector.frames)

    def due(self) -> bool:
        """Whether the network is to grow now; one that is frozen whole waits for a copy of the target."""
        frames = self.collector.frames
        if self._decided is None and not self.schedule.due(frames, self.entries):
            return False
        return not self.kind.at_target_copy or crossed(self.config, self.config.target_period, frames)

    def grow(self) -> Iterator[Record]:
        """Carries out the next entry of the schedule; an encoder that freezes with it does so even if the growth fails and is skipped.

        Raises:
            GrowthFailed: it was rolled back, and that is to end the run.
        """
        reason, self._decided = self._decided or "schedule", None
        frames, intervention, ring = self.collector.frames, self.schedule.intervention, self.measurer.ring
        measured = self._measured()
        if measured:
            with self.accounts.phases("diagnostics"):
                before = self.measurer.measure(frames, self.stage, "before growth")
            yield before
        self.charge()
        self.entries += 1
        self.grown_at.append(frames)
        with self.accounts.phases("growth"):
            if self.kind.at_target_copy:
                self.measurer.learner.end_of_step(frames)
            valid = torch.from_numpy(np.flatnonzero(ring.valid))
            size = (self.kind.num_observations,)
            chosen = valid[torch.randint(len(valid), size, generator=self.generator)]
            freezes_all, freezes_encoder = self.kind.adds == "snapshot", self.entries == self.config.freeze_encoder_at
            try:
                if freezes_all:
                    self.frozen_values.prepare()
                event = apply(
                    self.measurer.learner,
                    intervention,
                    self.measurer.learner.inputs(ring.get(chosen)),
                    config=self.config,
                    generator=self.generator,
                    freeze_encoder=freezes_encoder,
                    frames=frames,
                    reason=reason,
                    also=self.frozen_values.sweep if freezes_all else None,
                )
            except GrowthFailed as error:
                self.frozen_values.undo()
                if self.config.on_growth_failure == "stop":
                    raise
                warnings.warn(f"{error}; training goes on ungrown", stacklevel=1)
                if freezes_encoder:  # a promise of its own
                    try:
                        freeze_encoder(self.measurer.learner)
                    except GrowthFailed as also:
                        warnings.warn(f"the encoder goes on learning: {also}", stacklevel=1)
                return
            self.frozen_values.settle()
        self.interventions += 1
        yield dataclasses.replace(event, stage=self.stage)
        if measured:
            with self.accounts.phases("diagnostics"):
                after = self.measurer.measure(frames, self.stage, "after growth", intervention)
            yield after

    def _measured(self) -> bool:
        """Whether diagnostics go around the next growth: of a periodic intervention around the first in each of their periods."""
        period = self.config.diagnostics_period
        if not (self.schedule.periodic and period and self.grown_at):
            return period > 0
        return self.collector.frames // period > self.grown_at[-1] // period

    def state_dict(self) -> dict[str, Any]:
        """Everything that later growth depends on, the learner aside."""
        return {
            "growth_generator": self.generator.get_state(),
            "stage": self.entries,
            "interventions": self.interventions,
            "grown_at": self.grown_at,
            "decision": dataclasses.asdict(self.decision) if self.decision else None,
            "decided": self._decided,
            "decision_owed": self.decision_owed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.generator.set_state(state["growth_generator"])
        self.entries, self.interventions = int(state["stage"]), int(state["interventions"])
        self.grown_at = [int(frames) for frames in state["grown_at"]]
        self.decision = Decision(**state["decision"]) if state["decision"] else None
        self._decided = state.get("decided") if self.schedule.adaptive else None
        self.decision_owed = bool(state.get("decision_owed"))
