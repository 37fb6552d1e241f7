"""The summary of a run: how it ended, what each stage took, and what it scores.

Units: frames; seconds on a monotonic clock.
"""

from typing import Any

from growtrain.planning.costs import flops_of_acting, make_plan
from growtrain.records import Evaluation
from growtrain.runs.acting import Collector
from growtrain.settings.config import Config
from growtrain.telemetry.accounts import Accounts


def summarize(
    config: Config,
    *,
    collector: Collector,
    updates: int,
    accounts: Accounts,
    stage: int,
    as_planned: bool,
    evaluation: Evaluation | None,
) -> dict[str, Any]:
    """What `summary.json` says of a run, but for how it ended.

    Args:
        config: of the run.
        collector: of its episodes.
        updates: that were done.
        accounts: of its stages.
        stage: that its network is in.
        as_planned: whether every stage had the network that the schedule plans for it.
        evaluation: the last one.
    """
    plan = make_plan(config, collector.environment.spec)
    acting = flops_of_acting(plan, [total.frames for total in accounts.stages], stage)
    wall_seconds, recent = accounts.wall_seconds, list(collector.recent_returns)
    score = evaluation.episode_return if evaluation else None
    evaluated = score is not None
    if score is None and recent:
        score = sum(recent) / len(recent)
    return {
        "schedule": config.schedule,
        "game": config.game,
        "seed": config.seed,
        "frames": collector.frames,
        "updates": updates,
        "wall_seconds": wall_seconds,
        "frames_per_second": collector.frames / wall_seconds,
        "stages": [
            {
                "frames": total.frames,
                "seconds": total.seconds,
                "updates": total.updates,
                "updates_per_second": total.updates / total.seconds if total.seconds else None,
                "flops_per_update": cost.flops_per_update if as_planned else None,
                "flops_of_acting": acted if as_planned else None,
            }
            for total, cost, acted in zip(accounts.stages, plan.stages, acting, strict=True)
        ],
        "final_return": score,
        "final_return_frames": evaluation.frames if evaluation and evaluated else collector.frames,
        "final_return_source": "evaluation" if evaluated else f"last {len(recent)} training episodes",
        "final_return_episodes": evaluation.episodes if evaluation and evaluated else len(recent),
        "human_normalized_score": evaluation.human_normalized_score if evaluation else None,
    }
