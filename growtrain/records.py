"""What a run reports: the records that `train` yields and the run's files hold, one dataclass per kind of line.

Units: frames are emulator frames; times are seconds on a monotonic clock.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any


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
        q_mean: mean over the observations acted on of the greedy action's value; None while acting is random.
        epsilon, lr: in force at the record.
        seconds: where the interval's time went, by phase.
    """

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
        episode_return: mean true score.
        episode_return_std: standard deviation over the episodes.
        human_normalized_score: 0 random, 1 human.
        episodes: episodes counted.
        unfinished: how many of them had not ended when the budget did; they count with the score they had.
        eval_frames: frames played.
        wall_seconds: time it took.
    """

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
