"""Draws the learning curves of finished runs and tabulates them: score against frames, one line a seed, growth events marked.

    python benchmarks/learning_curves.py results/learning

reads every run below the folder (`config.json`, `metrics.jsonl`, `evaluations.jsonl`, `growth_events.jsonl`) and writes `curves.svg` and
`curves.md` beside them. Nothing is left out and nothing is smoothed but by the running mean that the figure names.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from growtrain.environments.atari_scores import REFERENCE_SCORES
from growtrain.settings.text import episodes_text
from growtrain.telemetry.sinks import read_jsonl

WINDOW = 5  # records in the running mean


def load(folder: Path) -> list[dict[str, Any]]:
    """The runs below a folder, by name; each with its configuration and records."""
    runs = []
    for path in sorted(folder.rglob("config.json")):
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        run["name"] = path.parent.relative_to(folder).as_posix()
        for stem in ("metrics", "evaluations", "growth_events"):
            run[stem] = read_jsonl(path.parent / f"{stem}.jsonl")
        runs.append(run)
    return runs


def training_curve(run: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Frames and mean score of the episodes that ended, weighted over the last `WINDOW` records that had any."""
    scored = [m for m in run["metrics"] if m["episode_return"] is not None]
    frames, means = [], []
    for end in range(1, len(scored) + 1):
        window = scored[max(0, end - WINDOW) : end]
        weights = [m["episodes"] for m in window]
        frames.append(scored[end - 1]["frames"])
        means.append(float(np.average([m["episode_return"] for m in window], weights=weights)))
    return frames, means


def episodes_behind(run: dict[str, Any]) -> list[int]:
    """How many episodes each point of the training curve is the mean of."""
    episodes = [m["episodes"] for m in run["metrics"] if m["episode_return"] is not None]
    return [sum(episodes[max(0, end - WINDOW) : end]) for end in range(1, len(episodes) + 1)]


def draw(runs: list[dict[str, Any]]) -> Figure:
    """One panel a game: training scores as lines, evaluations as dots, injections as vertical lines."""
    games = sorted({run["config"]["game"] for run in runs})
    figure = Figure(figsize=(6.4 * len(games), 4), layout="constrained")
    for column, game in enumerate(games, start=1):
        axes = figure.add_subplot(1, len(games), column)
        for run in (r for r in runs if r["config"]["game"] == game):
            episodes = episodes_behind(run)
            label = f"{run['config']['schedule']}, seed {run['config']['seed']}"
            label += f", {episodes_text(episodes)} a point" if episodes else ""
            (line,) = axes.plot(*training_curve(run), label=label)
            points = [(e["frames"], e["episode_return"]) for e in run["evaluations"] if e["episode_return"] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o", color=line.get_color())
            for event in run["growth_events"]:
                axes.axvline(event["frames"], color="0.7", linestyle=":")
        axes.axhline(REFERENCE_SCORES[game][0], color="0.3", linestyle="--", label="random policy")
        axes.set(
            title=game, xlabel="frames", ylabel=f"score (lines: training, mean of {WINDOW} records; dots: evaluation)"
        )
        axes.legend(fontsize="small")
    return figure


def tabulate(runs: list[dict[str, Any]]) -> str:
    """A Markdown table, a line a run."""
    lines = [
        "| run | game | schedule | frames | random | first evaluation | last evaluation (std, episodes) | injections |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for run in runs:
        config = run["config"]
        evaluations = [e for e in run["evaluations"] if e["episode_return"] is not None]
        first = last = "none"
        if evaluations:
            at = evaluations[-1]
            first = f"{evaluations[0]['episode_return']:.0f} at {evaluations[0]['frames']:,}"
            last = f"**{at['episode_return']:.0f}** ({at['episode_return_std']:.0f}, {at['episodes']})"
        injections = ", ".join(f"{event['frames']:,}" for event in run["growth_events"]) or "none"
        lines.append(
            f"| {run['name']} | {config['game']} | {config['schedule']} | {run['metrics'][-1]['frames']:,} "
            f"| {REFERENCE_SCORES[config['game']][0]:g} | {first} | {last} | {injections} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Reads the folder named on the command line and writes the figure and the table."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python benchmarks/learning_curves.py FOLDER_OF_RUNS", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    runs = load(folder)
    if not runs:
        print(f"{folder} holds no run: no config.json below it", file=sys.stderr)
        return 2
    with matplotlib.rc_context({"svg.hashsalt": "learning_curves", "svg.fonttype": "none"}):
        draw(runs).savefig(folder / "curves.svg", metadata={"Date": None})
    (folder / "curves.md").write_text(tabulate(runs), encoding="utf-8")
    print(tabulate(runs), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
