"""What a run reports: the records that `train` yields and the run's files hold, one dataclass per kind of line.

Units: frames are emulator frames; times are seconds on a monotonic clock.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from growtrain.settings.config import Anchor
from growtrain.settings.schedules import Intervention

Stem = Literal["metrics", "evaluations", "growth_events", "diagnostics", "decisions"]  # of the files of lines


def record_files(run_dir: Path) -> list[Path]:
    """The files of records that a run has; whatever else lies there is not its own."""
    return [path for stem in get_args(Stem) if (path := run_dir / f"{stem}.jsonl").is_file()]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One line of `metrics.jsonl`: what happened since the line before.

    Attributes:
        frames, agent_steps, updates, stage: counters at the time of the record.
        wall_seconds: time of training so far, over all resumes; evaluation, growth and checkpoints included.
        frames_per_second, updates_per_second: over the interval.
        episode_return: mean true score of the episodes that ended; None if none did.
        episodes: how many ended.
        loss: mean over the updates; None without any.
        q_mean: mean over the observations acted on of the greedy action's value, of SAC over the transitions learned from of the critics';
            None while acting is random, or without any.
        epsilon, lr: in force at the record.
        seconds: where the interval's time went, by phase.
    """

    stem: ClassVar[Stem] = "metrics"

    frames: int
    agent_steps: int
    updates: int
    stage: int
    wall_seconds: float
    frames_per_second: float
    updates_per_second: float
    episode_return: float | None
    episodes: int
    loss: float | None
    q_mean: float | None
    epsilon: float
    lr: float
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One line of `evaluations.jsonl`: true scores at the evaluation epsilon.

    Attributes:
        frames: training frames behind the evaluated network.
        stage: in which it was.
        episode_return: mean true score; None, as the two after it, if it is not known.
        episode_return_std: standard deviation over the episodes.
        human_normalized_score: 0 random, 1 human.
        episodes: episodes counted, by default in whole.
        unfinished: how many of them were not played to their end, and count with the score they had: none, where whole ones are played.
        eval_frames: frames played, with those of lanes that waited for the last episode.
        wall_seconds: time it took.
    """

    stem: ClassVar[Stem] = "evaluations"

    frames: int
    stage: int
    episode_return: float | None
    episode_return_std: float | None
    human_normalized_score: float | None
    episodes: int
    unfinished: int = 0
    eval_frames: int
    wall_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """One line of `diagnostics.jsonl`: measures of plasticity (`growtrain.diagnostics`) of the online network on states of its replay.

    Layers are named as modules: `encoder.layers.1`, `head.live.1`, `head.frozen.heads.0.1`. The first frozen head is the oldest. Of a
    learner with several networks all names begin with the network's: `critic_1.head.live.1`, `actor.live`; those have no encoder.

    Attributes:
        frames, updates, stage: counters at the time of the record.
        when: `period`; or `before growth` and `after growth`, two records of the same states around one intervention.
        states: how many states were drawn, without replacement.
        dormant_fraction: of each layer's units, by layer.
        srank, effective_rank, stable_rank: of `features` (the encoder's output) and `hidden` (the live head's hidden layer).
        weight_norm: of `encoder` and `live` (the live head).
        distance_from_initialization: of `encoder`, since the start of the run, and `live`, since the live head's birth; None where that
            was not seen because diagnostics were off.
        gradient_norm: of the loss on a batch of an update's size, with respect to `encoder` and `live`; None of an encoder that is frozen.
        policy_churn: share of the states of the previous record whose greedy action is another one now; None in the first, and of
            continuous actions.
        policy_churn_frames: frames since the previous record.
        hessian_top_eigenvalue: of the loss on the same batch as the gradient; None unless `--diagnostics full`.
        target_fit_error: what a copy of the network leaves of random targets after a fixed number of updates with Adam; None unless
            `--diagnostics full`. Of several networks the first.
        seconds: what measuring took.
    """

    stem: ClassVar[Stem] = "diagnostics"

    frames: int
    updates: int
    stage: int
    when: Literal["period", "before growth", "after growth"]
    states: int
    dormant_fraction: dict[str, float]
    srank: dict[str, int]
    effective_rank: dict[str, float]
    stable_rank: dict[str, float]
    weight_norm: dict[str, float]
    distance_from_initialization: dict[str, float | None]
    gradient_norm: dict[str, float | None]
    policy_churn: float | None
    policy_churn_frames: int | None
    hessian_top_eigenvalue: float | None
    target_fit_error: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class GrowthEvent:
    """One line of `growth_events.jsonl`.

    Attributes:
        frames: frames played when it happened; None outside a training run.
        stage: interventions done, this one included; 0 in a periodic schedule, which has one stage.
        kind: what was done: `inject` or one of its alternatives.
        reason: why now.
        anchor: `frozen`, `zero` or `mirrored`; None for what has none.
        parameters_total: parameters of the online network after it.
        parameters_trainable_before: parameters that required a gradient before it.
        parameters_trainable: parameters that require a gradient after it.
        max_abs_q_change_online: largest absolute change of an online action value on the probe batch; where several networks grow, of an
            output of any of them.
        max_abs_q_change_target: the same for the target network; None without one.
        changes: the largest change of each network that was grown by its name, online and then of its target if it has one; None, and left
            out of the file, of a learner with a single network.
        recycled_units: dormant units that `redo` recycled; None for the others.
        pause_seconds: time for which training stood still; what the next update takes longer (capture on a GPU) is not in it.
    """

    stem: ClassVar[Stem] = "growth_events"

    frames: int | None = None
    stage: int
    kind: Intervention = "inject"
    reason: str = ""
    anchor: Anchor | None = None
    parameters_total: int
    parameters_trainable_before: int
    parameters_trainable: int
    max_abs_q_change_online: float
    max_abs_q_change_target: float | None
    changes: dict[str, list[float]] | None = None
    recycled_units: int | None = None
    pause_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        values = dataclasses.asdict(self)
        if self.changes is None:
            del values["changes"]
        return values


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One line of `decisions.jsonl`: what was measured, and what was decided.

    Attributes:
        frames: frames played.
        stage: injections done before it.
        error, error_injected: mean errors that the network as it is and its injected copy reach.
        gain: of the injected copy over the network as it is, as a share of what the better of them learned (as in `verdicts`).
        score, score_error: mean of the last episodes' true scores and its standard error; None without episodes.
        score_episodes: how many they are, 100 at most.
        score_before: that of the decision before; None without one.
        score_since: mean of the episodes that ended after the decision before, of the last 100 at most; None without any.
        rise_error: standard error of `score_since` - `score_before`; None where it is not known.
        episodes: that have ended in the run.
        plateau: whether the score has stopped rising.
        streak: decisions in a row, this one included, in which both signals said that plasticity is lost.
        inject: the decision.
        reason: in words.
        seconds, flops: what the measurement took; no `flops` in records of earlier versions.
    """

    stem: ClassVar[Stem] = "decisions"

    frames: int
    stage: int
    error: float
    error_injected: float
    gain: float
    score: float | None
    score_error: float | None
    score_before: float | None
    episodes: int
    plateau: bool
    streak: int
    inject: bool
    reason: str
    seconds: float
    score_episodes: int = 0
    score_since: float | None = None
    rise_error: float | None = None
    flops: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)


Record = Metrics | Evaluation | Diagnostics | Decision | GrowthEvent
