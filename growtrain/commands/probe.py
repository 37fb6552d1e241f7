"""Measures which interventions give plasticity back, on supervised tasks made of the game's frames."""

from collections.abc import Sequence
from pathlib import Path

from growtrain.commands.commandline import Parser, given_path, reader
from growtrain.commands.running import StopSignals, add_stop_signal, complain, explicit_with_game, say
from growtrain.runfiles import STOPPED, require_checkpoints
from growtrain.settings.machine import usable_cores
from growtrain.settings.text import ConfigError


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="growtrain probe",
        description="Measure how much plasticity each intervention gives back: one network learns task after task on a game's frames. "
        "Only what the directory lacks is run.",
    )
    parser.add_argument(
        "--output", type=given_path, metavar="DIR", help="records, table and figure (default: runs/probe-<game>)"
    )
    parser.add_argument(
        "--figures-from", type=given_path, metavar="DIR", help="run nothing; make table and figure of DIR again"
    )
    parser.add_argument("--game", default="up_n_down", help="whose frames (default: up_n_down, the paper's)")
    parser.add_argument(
        "--policy", default="", metavar="RUN", help="a run whose newest checkpoint plays (default: by chance)"
    )
    parser.add_argument(
        "--size", default="small", help="small: 42 x 42 frames; nature: the Nature network (default: small)"
    )
    parser.add_argument(
        "--sweep", default="none", help="none: all interventions; init: initialisations of an injected head"
    )
    settings = "encoder,head,rmsprop"
    parser.add_argument(
        "--setting",
        default=settings,
        help=f"where the small network loses, the trainer's optimizer, or such as adam:1e-3:1e-4, learning rates of encoder and head "
        f"(default: {settings})",
    )
    parser.add_argument("--targets", default="random,value", help="kinds of targets (default: random,value)")
    parser.add_argument("--arms", default="", help="some arms, comma-separated (default: all)")
    for name, default, text in (
        ("seeds", "3", "seeds 0 to N - 1"),
        ("processes", "0", "workers of one thread each (0: one for each core)"),
        ("num-tasks", "16", "tasks"),
        ("num-updates", "500", "updates on each task"),
        ("num-frames", "64", "frames in the data set"),
    ):
        parser.add_argument(
            f"--{name}", type=reader(int), default=default, metavar="N", help=f"{text} (default: {default})"
        )
    add_stop_signal(parser)
    namespace = parser.parse_strict(words)
    stop = StopSignals(namespace.stop_signal)

    from growtrain.probe.settings import ProbeConfig, make_cells

    config = ProbeConfig(
        game=explicit_with_game(namespace)["game"],
        policy=namespace.policy,
        size=namespace.size,
        sweep=namespace.sweep,
        num_frames=namespace.num_frames,
        num_tasks=namespace.num_tasks,
        num_updates=namespace.num_updates,
    )
    if config.policy:
        require_checkpoints(Path(config.policy))
    cells = make_cells(namespace.setting.split(","), namespace.targets.split(","), namespace.seeds)

    from growtrain.probe.cells import choose_arms, one_line, run
    from growtrain.probe.report import write_report

    if namespace.figures_from:
        print(write_report(namespace.figures_from))
        return 0
    names = choose_arms(config, namespace.arms.split(",") if namespace.arms else [])
    directory = namespace.output or Path("runs") / f"probe-{config.game}"
    if namespace.processes < 0:
        raise ConfigError(f"--processes {namespace.processes} must be 0, for one for each core, or more")
    processes = namespace.processes or usable_cores()
    with stop:
        for records in run(config, cells, names, directory, processes, lambda: bool(stop.received)):
            say(one_line(records))
    if stop.received:
        complain(f"stopped by {stop.received}: the same command again goes on with what is not done")
        return STOPPED
    say(write_report(directory))
    return 0
