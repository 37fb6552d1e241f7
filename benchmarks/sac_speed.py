"""How fast SAC trains, beside Stable-Baselines3's SAC with the same settings in the same process, in turns.

Two pairs: whole loops (a step of the environment, and the update owed for it), and updates alone, their batches drawn each time. A turn of
every arm is a round; a ratio is taken within a round, so that a slower moment of the machine hits both sides.

    python benchmarks/sac_speed.py --seconds 8 --repeats 12 --output results/sac_speed_cpu

1. Both have networks of 256-256, Adam, batches of 256, an update for each step of one environment, and the same threads.
2. Stable-Baselines3 updates temperature, critics and actor one after the other, with three optimizers; ours takes one step of all.
3. Both replays hold real transitions of random play before the first turn; what is in them after that is each side's own.
4. Wall-clock is measured, and CPU time beside it: where other processes share the cores the second tells the truth.

Units: seconds; steps of the environment.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as `python -m growtrain` does, before torch is imported

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recording import describe_machine, machine_lines, say, summarize, table, with_spread, write_outputs
from sb3_sac import sb3_model

from growtrain.learners.make import make_learner
from growtrain.runs.run import Run
from growtrain.settings.config import Config
from growtrain.settings.presets import sac

Arm = Callable[[int], object]  # does so many steps, or updates
FEWEST = 20  # steps of a turn


def loop_arms(config: Config, run_dir: Path) -> dict[str, Arm]:
    """Our loop, and updates of another learner like the loop's, whose updates are those that its steps owe."""
    run = Run(config, run_dir)
    learner = make_learner(config, run.learner.spec, device=run.device, generator=torch.Generator().manual_seed(0))
    while run.frames < config.learning_starts:
        run.step()

    def steps(count: int) -> None:
        for _ in range(count):
            run.step()

    def updates(count: int) -> None:
        for _ in range(count):
            learner.update(run.ring.sample_batches(1, config.batch_size))

    return {"loop": steps, "update": updates}


def sb3_arms(config: Config) -> dict[str, Arm]:
    """Stable-Baselines3's loop and updates; raises `ImportError` where it is not installed."""
    import gymnasium

    model = sb3_model(config, gymnasium.make(config.game.removeprefix("mujoco/")))
    model.learn(config.learning_starts + 1, log_interval=None)

    def steps(count: int) -> None:
        model.learn(count, log_interval=None, reset_num_timesteps=False)

    def updates(count: int) -> None:
        for _ in range(count):
            model.train(gradient_steps=1, batch_size=config.batch_size)

    return {"sb3 loop": steps, "sb3 update": updates}


def timed(arm: Arm, count: int) -> dict[str, float]:
    """Seconds and CPU seconds of a turn, each for one step or update."""
    start, cpu = time.perf_counter(), time.process_time()
    arm(count)
    return {"seconds": (time.perf_counter() - start) / count, "cpu": (time.process_time() - cpu) / count}


def measure(arguments: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    """Builds everything, measures, and returns the record that goes into the JSON file."""
    config = sac(
        game=arguments.game,
        schedule="fixed",
        num_threads=arguments.num_threads,
        learning_starts=arguments.warm_up_steps,
        replay_capacity=100_000,
        eval_period=0,
        diagnostics_period=0,
        device="cpu",
    )
    machine = describe_machine("cpu")  # before it is this that uses the cores
    say("filling the replays")
    arms = loop_arms(config, run_dir)
    missing = None
    try:
        arms |= sb3_arms(config)
    except ImportError as error:
        missing = str(error)
    torch.set_num_threads(config.threads)  # whatever a library has done to it
    counts = {}
    for name, arm in arms.items():
        timed(arm, FEWEST)  # warm-up
        counts[name] = max(FEWEST, round(arguments.seconds / timed(arm, FEWEST)["seconds"]))
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for repeat in range(arguments.repeats):
        # Every other round the other way round, so that what comes first in one is last in the next.
        for name in list(arms)[:: 1 if repeat % 2 else -1]:
            samples[name].append(timed(arms[name], counts[name]))
        say(f"round {repeat + 1} of {arguments.repeats}")
    return {
        "benchmark": "sac_speed",
        "machine": machine,
        "settings": {name: value for name, value in vars(arguments).items() if name != "output"}
        | {"game": config.game, "width": config.width, "batch_size": config.batch_size},
        "counts": counts,
        "sb3_missing": missing,
        "samples": samples,
    }


def ratios(record: dict[str, Any], kind: str, clock: str) -> list[float]:
    """How many times as fast as Stable-Baselines3, round by round."""
    ours, theirs = (record["samples"][name] for name in (kind, f"sb3 {kind}"))
    return [their[clock] / our[clock] for our, their in zip(ours, theirs, strict=True)]


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    settings, samples = record["settings"], record["samples"]
    rows = []
    for kind in ("loop", "update"):
        row: list[Any] = [kind, with_spread([1 / each["seconds"] for each in samples[kind]], 1)]
        if record["sb3_missing"] is None:
            row.append(with_spread([1 / each["seconds"] for each in samples[f"sb3 {kind}"]], 1))
            row += [with_spread(ratios(record, kind, clock)) for clock in ("seconds", "cpu")]
        rows.append(row)
    header = ["", "ours, a second"]
    if record["sb3_missing"] is None:
        header += ["Stable-Baselines3", "ratio", "ratio of CPU time"]
    lines = [
        "# SAC beside Stable-Baselines3's",
        "",
        machine_lines(record["machine"])
        + f"- Measured: {settings['game']}, networks {settings['width']}-{settings['width']}, batch {settings['batch_size']}, one "
        f"environment, an update a step, {settings['num_threads']} threads; {settings['repeats']} rounds of some "
        f"{settings['seconds']:g} s for each arm",
        "- Cells: median over rounds [quartiles]; ratios are taken within a round",
        "",
        table(header, rows),
    ]
    if record["sb3_missing"] is not None:
        lines.append(f"\nStable-Baselines3 is missing: {record['sb3_missing']}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints the report, and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--game", default="mujoco/HalfCheetah-v5")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn of each arm (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="rounds (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=1, help="of both sides (default: %(default)s)")
    parser.add_argument("--warm-up-steps", type=int, default=2_000, help="random ones (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        record = measure(arguments, Path(directory) / "run")
    record["summary"] = (
        {
            f"{kind} {clock}": summarize(ratios(record, kind, clock))
            for kind in ("loop", "update")
            for clock in ("seconds", "cpu")
        }
        if record["sb3_missing"] is None
        else {}
    )
    print(report(record))
    if arguments.output is not None:
        write_outputs(arguments.output, record, report(record))


if __name__ == "__main__":
    main()
