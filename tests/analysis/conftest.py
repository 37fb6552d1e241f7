"""Run directories as a run leaves them, written without running anything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from growtrain.analysis.runs import find_runs
from growtrain.analysis.study import Study, make_study
from growtrain.settings.presets import resolve

ACTING = 100  # FLOPs a frame
FLOPS = {"fixed": [2_000_000], "grow1x": [2_000_000, 3_000_000], "full3x": [5_000_000]}
WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """`write_run(name, game=..., schedule=..., seed=..., score=...)` writes a run of 40k frames and returns its directory.

    Args of the function:
        name: directory below `tmp_path / "runs"`.
        game, schedule, seed: of the run; grow1x grows at 10k frames.
        score: true score as a function of frames; None while no episode ended.
        speed: frames per second.
        status: of the summary; None writes none.
        until: frames at which its records end.
        evaluations: scores of its evaluations by frames; one at the end, unless given.
        settings: further settings.
    """

    def write(
        name: str,
        game: str = "pong",
        schedule: str = "fixed",
        seed: int = 0,
        score: Callable[[int], float | None] = lambda frames: frames / 1000 - 21,
        *,
        speed: float = 100.0,
        status: str | None = "done",
        until: int = 40_000,
        evaluations: dict[int, float] | None = None,
        **settings: Any,
    ) -> Path:
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        explicit = {"total_frames": 40_000, "seed": seed, "schedule": "fixed", "log_period": 1000} | settings
        config = resolve("paper", explicit)[0].to_dict() | {"game": game, "schedule": schedule}
        about = {"config": config, "device": "cpu (x86_64)", "num_threads": 2, "resumes": []}
        (run_dir / "config.json").write_text(json.dumps(about), encoding="utf-8")
        costs = FLOPS.get(schedule, [1_000_000])
        metrics = [
            {
                "frames": frames,
                "updates": frames // 16,
                "wall_seconds": frames / speed,
                "episode_return": score(frames),
                "episodes": 2 if score(frames) is not None else 0,
            }
            for frames in range(1000, until + 1, 1000)
        ]
        _write_lines(run_dir / "metrics.jsonl", metrics)
        grown = len(costs) == 2 and until >= 10_000
        _write_lines(run_dir / "growth_events.jsonl", [{"frames": 10_000, "stage": 1}] if grown else [])
        _write_lines(
            run_dir / "evaluations.jsonl",
            [
                {"frames": frames, "episode_return": found, "episode_return_std": 1.0, "episodes": 4}
                for frames, found in (evaluations or {until: score(until)}).items()
            ],
        )
        if status is not None:
            stages = [625, until // 16 - 625] if grown else [until // 16]
            summary = {
                "status": status,
                "reason": "OSError: no\nspace" if status == "failed" else None,
                "frames": until,
                "wall_seconds": until / speed,
                "stages": [
                    {
                        "frames": 16 * n,
                        "updates": n,
                        "flops_per_update": c,
                        "flops_of_acting": ACTING * 16 * n * (k + 1),
                    }
                    for k, (n, c) in enumerate(zip(stages, costs, strict=False))
                ],
                "gpu": {"available": False, "reason": "the run computes on cpu, which NVML does not watch"},
            }
            (run_dir / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return run_dir

    return write


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def line(seed: int, slope: float = 1.0, spread: float = 0.3) -> Callable[[int], float]:
    """A score on Pong that rises linearly to about human level at 40k frames, a little different for each seed."""
    return lambda frames: -20.7 + slope * frames / 40_000 * (35 + spread * (seed - 1))


def write_arms(write_run: WriteRun, slopes: dict[str, float], seeds: int = 3, game: str = "pong") -> None:
    for schedule, slope in slopes.items():
        for seed in range(seeds):
            speed = {"full3x": 100.0, "grow1x": 125.0, "grow3x": 125.0}.get(schedule, 200.0)
            write_run(f"{game}-{schedule}-{seed}", game, schedule, seed, line(seed, slope), speed=speed)


def study_of(tmp_path: Path) -> Study:
    return make_study(find_runs([tmp_path / "runs"]))
