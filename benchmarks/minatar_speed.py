"""How fast MinAtar trains on one core, beside its own DQN written in plain PyTorch: frames per second at one update a frame.

    python benchmarks/minatar_speed.py [--seconds 120] [--repeats 10] --output results/minatar_speed

Four arms take turns in one process, with one thread: the plain loop, growtrain's loop with one lane and with eight, and its bare
update. Ratios are taken within a turn. With one lane both sides do the same, a frame and an update in turn; eight lanes do eight frames,
then the eight updates that they owe. Building, filling the replays and compiling come on top, about a minute.

Units: seconds; frames.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from minatar_dqn import PlainDQN
from recording import describe_machine, machine_lines, say, table, with_spread, write_outputs
from sb3_dqn import Arm, Sample
from throughput import Loop, divided, profile, rates, take_turns, timed, update_arm

from growtrain.environments.games import games_of
from growtrain.settings.config import Config
from growtrain.settings.presets import minatar

NAMES = {
    "plain": "MinAtar's DQN in plain PyTorch",
    "lanes 1": "growtrain, 1 lane",
    "lanes 8": "growtrain, 8 lanes",
    "update": "growtrain's update alone, at one a frame",
}


def configuration(arguments: argparse.Namespace, num_envs: int) -> Config:
    """The preset, without Double DQN, which the plain loop does not have; the network is asked from the first update on."""
    return minatar(
        game=arguments.game,
        double_dqn=False,
        num_envs=num_envs,
        learning_starts=arguments.fill,
        epsilon_decay_frames=0,
        schedule="fixed",
        eval_period=0,
        device="cpu",
    )


def plain_arm(config: Config) -> Arm:
    """The plain loop, filled and warm."""
    loop = PlainDQN(config, *games_of(config.game))
    while loop.updates < 100:
        loop.step()

    def arm(seconds: float) -> Sample:
        frames, updates = loop.frames, loop.updates
        sample = timed(loop.step, torch.device("cpu"), seconds)
        return sample | {"frames": loop.frames - frames, "updates": loop.updates - updates}

    return arm


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Builds everything, measures, and returns the record."""
    machine = describe_machine()
    torch.set_num_threads(1)
    say("filling the replays, and compiling")
    loops = {f"lanes {n}": Loop(configuration(arguments, n), directory / str(n)) for n in (1, 8)}
    arms: dict[str, Arm] = {"plain": plain_arm(configuration(arguments, 1)), **loops}
    arms["update"] = partial(_with_frames, update_arm(loops["lanes 1"]))
    for arm in arms.values():
        arm(1.0)
    samples = take_turns(arms, arguments.seconds, arguments.repeats)
    return {
        "benchmark": "minatar_speed",
        "machine": machine,
        "settings": {name: value for name, value in vars(arguments).items() if name != "output"},
        "samples": samples,
        "profile": profile(loops["lanes 1"], arguments.profile_steps),
    }


def _with_frames(arm: Arm, seconds: float) -> Sample:
    sample = arm(seconds)
    return sample | {"frames": sample["updates"]}


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    settings, samples, profiled = record["settings"], record["samples"], record["profile"]
    plain = rates(samples["plain"], "frames")
    rows = [
        [
            name,
            with_spread(rates(samples[arm], "frames"), 0),
            with_spread(rates(samples[arm], "updates"), 0),
            with_spread(divided(rates(samples[arm], "frames"), plain)),
        ]
        for arm, name in NAMES.items()
    ]
    phases = ", ".join(
        f"{name} {with_spread([1e3 * sample['phases'].get(name, 0.0) / sample['calls'] for sample in samples['lanes 1']])}"
        for name in ("act", "learn", "environment")
    )
    operators = [
        [
            f"`{name[:70]}`".replace("|", "\\|"),
            f"{calls / profiled['steps']:.1f}",
            f"{1e6 * seconds / profiled['steps']:.0f}",
        ]
        for name, calls, seconds in profiled["operators"]
    ]
    return "\n".join(
        [
            "# MinAtar on one core: frames per second at one update a frame",
            "",
            machine_lines(record["machine"])
            + f"- Measured: {settings['game']}, batch 32, network of 128, DQN, one thread; {settings['repeats']} turns within "
            f"{settings['seconds']:g} s",
            "- Cells: median over turns [quartiles]; ratios are taken within a turn",
            "",
            table(["arm", "frames/s", "updates/s", "frames/s / plain"], rows),
            f"A frame with one lane, milliseconds by phase: {phases}.",
            "",
            f"Profile of {profiled['steps']} frames with one lane in {profiled['seconds']:.2f} s, which profiling slows down:",
            "",
            table(["operator, self time", "calls per frame", "us per frame"], operators),
        ]
    )


def main(words: Sequence[str] | None = None) -> int:
    """Measures, prints the report and writes the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--game", default="minatar/breakout")
    parser.add_argument("--seconds", type=float, default=120.0, help="of measuring in all; building comes on top")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--fill", type=int, default=5_000, help="random frames before, on every side")
    parser.add_argument("--profile-steps", type=int, default=500, help="frames")
    parser.add_argument("--output", type=Path, help="path without suffix; .json and .md are added")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as directory:
        record = measure(arguments, Path(directory))
    text = report(record)
    print(text)
    if arguments.output:
        write_outputs(arguments.output, record, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
