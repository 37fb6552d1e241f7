"""Trains every game with every schedule and every seed, each once, and goes on where it was interrupted."""

import os
import shlex
import sqlite3
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from growtrain.commands.commandline import Parser, add_config_flags, explicit_settings, given_path
from growtrain.commands.running import StopSignals, add_stop_signal, complain
from growtrain.settings.machine import usable_cores
from growtrain.settings.text import ConfigError

if TYPE_CHECKING:
    from growtrain.sweep.executor import AbstractExecutor


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="growtrain sweep",
        description="Train every game with every schedule and seed. The same command again runs only what is missing.",
        epilog="Every training flag but --game, --schedule, --seed and --run-dir is passed to every run.",
    )
    parser.add_argument("--dir", type=given_path, help="the sweep's directory, as sweeps/NAME: its ledger and its runs")
    parser.add_argument("--games", metavar="G,G", help="atari57, or a list")
    parser.add_argument("--schedules", metavar="S,S", default="fixed,grow3x,full3x", help="(default: %(default)s)")
    parser.add_argument(
        "--seeds", metavar="N", default="3", help="how many, or a list with a comma (default: %(default)s)"
    )
    parser.add_argument("--executor", choices=("local", "ray"), default="local", help="local processes, or Ray tasks")
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="runs at a time (local: one for each GPU, or 1; Ray: as many as fit)",
    )
    parser.add_argument("--cores-per-worker", type=_positive, metavar="N", help="(local: an equal share; Ray: 1)")
    parser.add_argument("--gpus-per-worker", type=_share, metavar="X", help="Ray alone (default: 1 where there is any)")
    parser.add_argument("--max-attempts", type=_positive, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--retry-failed", action="store_true", help="give failed runs all their attempts again")
    parser.add_argument("--print-commands", action="store_true", help="run nothing; print one line for each run")
    parser.add_argument("--status", type=given_path, metavar="DIR", help="run nothing; print the state of this sweep")
    add_stop_signal(parser)
    add_config_flags(parser)
    namespace = parser.parse_strict(words)
    stop = StopSignals(namespace.stop_signal)

    from growtrain.sweep.cells import expand, sweep_words
    from growtrain.sweep.driver import Driver
    from growtrain.sweep.ledger import Ledger
    from growtrain.sweep.table import open_table, render

    if namespace.status is not None:
        with Ledger(namespace.status) as ledger:
            print("\n".join(render(ledger.cells(), ledger.directory, ledger.is_stale)))
        return 0
    for name in ("dir", "games"):
        if getattr(namespace, name) is None:
            raise ConfigError(
                f"--{name} is missing: a sweep is --dir sweeps/NAME --games G,G --schedules S,S --seeds N"
            )
    settings = explicit_settings(namespace)
    cells = expand(namespace.games, namespace.schedules, namespace.seeds, settings)
    if namespace.print_commands:
        options = ["--max-attempts", str(namespace.max_attempts)]
        options += ["--stop-signal", namespace.stop_signal] if namespace.stop_signal else []
        for cell in cells:
            words = sweep_words(cell, namespace.dir.resolve(), settings)
            print(shlex.join([sys.executable, "-m", "growtrain", *words, *options]))
        return 0
    executor = _executor(namespace, settings.get("device", "auto"))
    try:
        with Ledger(namespace.dir, create=True) as ledger, open_table(ledger.directory, sys.stdout) as table, stop:
            driver = Driver(ledger, ledger.submit(cells), executor, table, max_attempts=namespace.max_attempts)
            code = driver.run(lambda: bool(stop.received), retry_failed=namespace.retry_failed)
    except sqlite3.Error as error:
        complain(f"{ledger.path}: {error}: the runs were stopped; the same command goes on")
        return 1
    if code == 1:
        complain(
            f"some runs failed, and why is in growtrain sweep --status {namespace.dir}; "
            "the same command with --retry-failed tries them again"
        )
    return code


def _executor(namespace: Namespace, device: str) -> "AbstractExecutor":
    """The executor asked for; raises `ConfigError` where it cannot be had."""
    workers, cores = namespace.workers, namespace.cores_per_worker
    if namespace.executor == "ray":
        try:
            from growtrain.sweep.ray import RayExecutor, connect
        except ImportError as error:
            raise ConfigError(f"--executor ray: {error}: pip install 'growtrain[ray]'") from error
        gpus = 0.0 if device == "cpu" else namespace.gpus_per_worker
        connect()
        return RayExecutor(workers=workers, cpus=cores or 1, gpus=gpus)

    from growtrain.sweep.local import LocalExecutor, make_slots, visible_gpus

    names = [] if device == "cpu" else visible_gpus()
    if device == "cuda" and not names:
        raise ConfigError(
            "--device cuda: no GPU is here; use --device cpu or auto, or --executor ray with a cluster that has one"
        )
    return LocalExecutor(make_slots(workers, cores, sorted(os.sched_getaffinity(0))[: usable_cores()], names))


def _positive(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if count <= 0:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return count


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number above 0 (none: --device cpu)")
    return share
