"""What SAC earns, beside Stable-Baselines3's SAC with the same settings: returns at a number of steps, a seed after the other.

    python benchmarks/sac_returns.py --runs results/sac-oracle --output results/sac_returns

Our side is runs that a sweep has made. Theirs is trained here on one thread, some minutes for 100k steps of a seed. A seed is written down
when it is done, so the same command goes on where it was stopped. Two scores are compared: the mean return of the training episodes that
ended in the last tenth of the steps, and that of ten episodes of the policy's mode at their end.

Units: steps of the environment; returns in the task's own rewards.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import describe_machine, machine_lines, say, table, write_outputs
from sb3_sac import sb3_model
from scipy import stats

from growtrain.settings.config import Config, has_effect
from growtrain.settings.presets import sac
from growtrain.settings.text import ConfigError, parse_count
from growtrain.telemetry.sinks import read_jsonl

EPISODES = 10  # of an evaluation
SCORES = ("training", "evaluation")
SHARED = ("lr", "replay_capacity", "learning_starts", "batch_size", "target_tau", "discount", "width")  # with theirs
Returns = dict[str, float | None]


def last_tenth(episodes: list[tuple[int, float, int]], steps: int) -> float | None:
    """The mean return of episodes in the last tenth of so many steps; None without any.

    Args:
        episodes: (step at which they had ended, their mean return, their number) each.
        steps: the end.
    """
    late = [(mean, count) for step, mean, count in episodes if 0.9 * steps < step <= steps]
    total = sum(count for _, count in late)
    return sum(mean * count for mean, count in late) / total if total else None


def ours(run: Path, steps: int) -> Returns | None:
    """What one of our runs had earned after so many steps; None of a run that has not come so far."""
    metrics, evaluations = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "evaluations.jsonl")
    if not metrics or metrics[-1]["frames"] < steps:
        return None
    episodes = [(each["frames"], each["episode_return"], each["episodes"]) for each in metrics if each["episodes"]]
    evaluated = [each["episode_return"] for each in evaluations if each["frames"] == steps]
    return {"training": last_tenth(episodes, steps), "evaluation": evaluated[0] if evaluated else None}


def is_plain(config: Config) -> bool:
    """Whether a run differs from the preset in nothing but what Stable-Baselines3 is given, too."""
    plain = sac(**{name: getattr(config, name) for name in ("game", "total_frames", "seed", *SHARED)}, schedule="fixed")
    deciding = [item.name for item in dataclasses.fields(Config) if item.metadata["identity"]]
    return all(getattr(config, name) == getattr(plain, name) for name in deciding if has_effect(name, config))


def our_runs(directory: Path, steps: int) -> tuple[dict[str, dict[str, Returns]], dict[str, Config]]:
    """Of the runs of plain SAC below a directory: returns and configurations by game, and by seed.

    Raises:
        ConfigError: two runs of a game have the same seed, or other settings.
    """
    found: dict[str, dict[str, Returns]] = {}
    configs: dict[str, Config] = {}
    for file in sorted(directory.rglob("config.json")):
        config = Config.from_dict(json.loads(file.read_text())["config"])
        if not (config.continuous and is_plain(config)) or (returns := ours(file.parent, steps)) is None:
            continue
        first, known = configs.setdefault(config.game, config), found.setdefault(config.game, {})
        if (
            str(config.seed) in known
            or dataclasses.replace(config, seed=first.seed).fingerprint() != first.fingerprint()
        ):
            raise ConfigError(
                f"{file.parent} is of the seed of another run of {config.game} below {directory}, or has other settings: compare one sweep"
            )
        known[str(config.seed)] = returns
    return found, configs


def theirs(config: Config, seed: int, steps: int) -> Returns:
    """Trains Stable-Baselines3's SAC on a game with our settings."""
    import gymnasium
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    class Episodes(BaseCallback):
        """Keeps the returns of the episodes that end."""

        ended: list[tuple[int, float, int]]

        def _on_training_start(self) -> None:
            self.ended = []

        def _on_step(self) -> bool:
            self.ended += [
                (self.num_timesteps, info["episode"]["r"], 1) for info in self.locals["infos"] if "episode" in info
            ]
            return True

    name = config.game.removeprefix("mujoco/")
    model = sb3_model(dataclasses.replace(config, seed=seed), Monitor(gymnasium.make(name)))
    episodes = Episodes()
    model.learn(steps, callback=episodes, log_interval=None)
    test = Monitor(gymnasium.make(name))
    test.reset(seed=10_000 + seed)
    evaluated, _ = evaluate_policy(model, test, n_eval_episodes=EPISODES, deterministic=True)
    return {"training": last_tenth(episodes.ended, steps), "evaluation": float(np.mean(evaluated))}


def compared(record: dict[str, Any]) -> list[list[Any]]:
    """A row for every game and score: both sides' means, and their difference with Welch's 95 % interval."""
    rows = []
    for game, sides in record["returns"].items():
        for score in SCORES:
            each = {
                side: [returns[score] for returns in sides[side].values() if returns[score] is not None]
                for side in ("ours", "theirs")
            }
            means = [f"{np.mean(values):.0f} (n={len(values)})" if values else "-" for values in each.values()]
            row: list[Any] = [game, score, *means]
            if min(map(len, each.values())) > 1:
                low, high = stats.ttest_ind(*each.values(), equal_var=False).confidence_interval()
                row.append(f"{np.mean(each['ours']) - np.mean(each['theirs']):.0f} [{low:.0f}, {high:.0f}]")
            else:
                row.append("-")
            rows.append(row)
    return rows


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    steps = record["settings"]["steps"]
    lines = [
        f"# What SAC earns in {steps} steps, beside Stable-Baselines3's",
        "",
        machine_lines(record["machine"])
        + f"- training: mean return of the episodes that ended in the last tenth of the steps; evaluation: of {EPISODES} episodes of the "
        "policy's mode",
        "- Difference of the means over seeds, with Welch's 95 % interval: where 0 lies in it, the two are not told apart",
        "",
        table(["game", "score", "ours", "Stable-Baselines3", "difference"], compared(record)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains what is missing, and writes it with the comparison where `--output` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="directory of our sweep's runs")
    parser.add_argument("--steps", type=parse_count, default=100_000, help="default: 100k")
    parser.add_argument("--output", type=Path, required=True, help="writes OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        found, configs = our_runs(arguments.runs, arguments.steps)
    except ConfigError as error:
        parser.error(f"--runs: {error}")
    if not found:
        parser.error(f"--runs: no run of plain SAC below {arguments.runs} has come to {arguments.steps} steps")
    file = arguments.output.with_suffix(".json")
    record: dict[str, Any] = {
        "benchmark": "sac_returns",
        "machine": describe_machine("cpu"),
        "settings": {"runs": str(arguments.runs), "steps": arguments.steps},
        "returns": {},
    }
    known = json.loads(file.read_text()) if file.exists() else record
    if known["settings"]["steps"] != arguments.steps:
        parser.error(f"--output: {file} is of {known['settings']['steps']} steps")
    trained = {game: sides["theirs"] for game, sides in known["returns"].items()}
    for seed in sorted({seed for seeds in found.values() for seed in seeds}, key=int):
        for game, seeds in found.items():
            done = trained.setdefault(game, {})
            if seed in seeds and seed not in done:
                say(f"{game}, seed {seed}")
                done[seed] = theirs(configs[game], int(seed), arguments.steps)
                record["returns"] = {
                    each: {"ours": found.get(each, {}), "theirs": values} for each, values in trained.items()
                }
                write_outputs(arguments.output, record, report(record))
    record["returns"] = {game: {"ours": found.get(game, {}), "theirs": values} for game, values in trained.items()}
    write_outputs(arguments.output, record, report(record))
    print(report(record))


if __name__ == "__main__":
    main()
