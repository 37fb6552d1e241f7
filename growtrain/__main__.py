"""The command line: parse, call, exit code.

Exit codes: 0 done; 2 bad input (one line that names the remedy); 75 stopped by a signal with a checkpoint written; 1 anything else.
"""

import errno
import os
import re
import shlex
import signal
import sys
import time
import warnings
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from growtrain.commandline import Parser, add_config_flags, explicit_settings
from growtrain.config import Config, ConfigError
from growtrain.growth.schedules import schedule_of
from growtrain.presets import resolve
from growtrain.tasks import canonical_game

if TYPE_CHECKING:
    from growtrain.checkpoint import Checkpoint
    from growtrain.sweep.executor import AbstractExecutor

STOPPED = 75
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

# Before torch is imported: a thread that waits for the others spins for some 50 microseconds and then sleeps. OpenMP's default spins
# far longer, which costs a factor of ten as soon as another process wants the core; sleeping at once (PASSIVE) costs a tenth on a quiet
# machine.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words.pop(0) if words and not words[0].startswith("-") else "train"
    warnings.showwarning = _show_warning
    try:
        if name not in COMMANDS:
            raise ConfigError(
                f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}, or give only flags to train"
            )
        return COMMANDS[name](words)
    except ConfigError as error:
        print(f"growtrain: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"growtrain: {error}: free some space, or choose another directory with --run-dir", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("growtrain: stopped at once; the checkpoints made before are whole", file=sys.stderr)
        return 1


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are for whoever watches the run; others keep the place they come from."""
    del file, line
    ours = "growtrain" in Path(filename).parts
    place = "" if ours else f"{filename}:{lineno}: {category.__name__}: "
    print(f"growtrain: warning: {place}{message}", file=sys.stderr)


def train_command(words: Sequence[str]) -> int:
    """Trains (the default command)."""
    parser = Parser(
        prog="growtrain",
        description="Train a Double DQN on an Atari game, growing it by plasticity injection.",
        epilog=f"Other commands: {', '.join(name for name in COMMANDS if name != 'train')}. Counts take k and M: 200k, 1.5M.",
    )
    parser.add_argument(
        "--run-dir", type=Path, help="where the run's files go (default: runs/<game>-<schedule>-s<seed>-<time>)"
    )
    _add_stop_signal(parser)
    config, notes, run_dir = _configuration(parser, words)
    stop = _StopSignals(parser.parse_known_args(list(words))[0].stop_signal)
    run_dir = default_run_dir(config) if run_dir is None else run_dir
    if (run_dir / "config.json").exists():
        raise ConfigError(
            f"--run-dir {run_dir} already holds a run: go on with it by growtrain resume {run_dir}, or choose another directory"
        )

    from growtrain.collection import num_actions_of

    text = f"below 200M frames these shrink with the budget: {', '.join(notes)}"
    return _run(config, run_dir, num_actions_of(config.game), stop, [text] if notes else [])


def resume_command(words: Sequence[str]) -> int:
    """Goes on with a run from its newest whole checkpoint, or forks it."""
    parser = Parser(
        prog="growtrain resume", description="Go on with a run from its newest checkpoint, as if it had never stopped."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    parser.add_argument(
        "--fork", type=Path, metavar="NEWDIR", help="begin another run there, with the past of this one"
    )
    _add_stop_signal(parser)
    add_config_flags(parser)
    namespace = parser.parse_strict(words)
    stop = _StopSignals(namespace.stop_signal)
    run, fork = namespace.run, namespace.fork
    if not (run / "config.json").exists() and not (run / "checkpoints").is_dir():
        raise ConfigError(
            f"{run} holds no run: name the directory that --run-dir was, or start one with growtrain train"
        )
    if fork is not None and (fork / "config.json").exists():
        raise ConfigError(f"--fork {fork} already holds a run: choose another directory")

    from growtrain.checkpoint import NeverSaved, open_newest
    from growtrain.resuming import changed_config, restart
    from growtrain.runfiles import require_unlocked

    if fork is None:
        require_unlocked(run)
    try:
        checkpoint = open_newest(run)
    except NeverSaved:
        if fork is not None:
            raise
        from growtrain.collection import num_actions_of

        config, note = restart(run), "it ended before its first checkpoint: from the start"
        return _run(config, run, num_actions_of(config.game), stop, [note])
    config, notes = changed_config(checkpoint, _explicit(namespace), fork=fork is not None)
    if fork is None and checkpoint.frames >= config.total_frames:
        print(f"{run} is done: {checkpoint.frames} frames; to go further, --fork NEWDIR --total-frames N")
        return 0
    notes = [f"from the checkpoint at {checkpoint.frames} frames", *notes]
    return _run(config, run if fork is None else fork, checkpoint.state["num_actions"], stop, notes, checkpoint)


def inspect_command(words: Sequence[str]) -> int:
    """Says what a run's checkpoints hold, and verifies every file of them."""
    parser = Parser(prog="growtrain inspect", description="Verify a run's checkpoints and say what they hold.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    run = parser.parse_strict(words).run

    from growtrain.resuming import render

    if not (run / "checkpoints").is_dir():
        raise ConfigError(f"{run} has no checkpoints: name the directory of a run that made one")
    lines, whole = render(run)
    print("\n".join(lines))
    return 0 if whole else 1


def _run(
    config: Config,
    run_dir: Path,
    num_actions: int,
    stop: "_StopSignals",
    notes: Sequence[str],
    start: "Checkpoint | None" = None,
) -> int:
    """Trains under the display; returns the exit code."""
    from growtrain.checkpoint import CheckpointFailed
    from growtrain.display import open_display
    from growtrain.environments.atari import EnvironmentHung
    from growtrain.growth.transaction import GrowthFailed
    from growtrain.learners.double_dqn import Diverged
    from growtrain.planning import check_memory, make_plan
    from growtrain.training import resolve_device, train

    plan = make_plan(config, num_actions)
    device = resolve_device(config.device)
    check_memory(plan, device)
    display = open_display(
        game=config.game,
        schedule=config.schedule,
        device=str(device),
        stage_frames=[stage.frames for stage in plan.stages],
        stage_costs=[stage.flops / stage.frames for stage in plan.stages],
        run_name=str(run_dir),
        plan=schedule_of(config).describe(),
    )
    try:
        with stop, display:
            for note in notes:
                display.note(note)
            for record in train(config, run_dir, should_stop=lambda: stop.received, start=start):
                display.show(record)
    except (CheckpointFailed, Diverged, EnvironmentHung, GrowthFailed) as error:
        print(f"growtrain: {' '.join(str(error).split())}; the checkpoints made before are whole", file=sys.stderr)
        return 1
    return STOPPED if stop.received else 0


def plan_command(words: Sequence[str]) -> int:
    """Prints stages, parameters, FLOPs, memory and projected hours of a run, before anything runs."""
    parser = Parser(prog="growtrain plan", description="What a run will cost, before anything runs.")
    parser.add_argument("--no-timing", action="store_true", help="do not time updates on this machine")
    parser.set_defaults(run_dir=None)
    config, _, _ = _configuration(parser, words)

    from growtrain import planning
    from growtrain.collection import num_actions_of
    from growtrain.training import resolve_device

    num_actions, device = num_actions_of(config.game), resolve_device(config.device)
    plan = planning.make_plan(config, num_actions)
    timed = not parser.parse_known_args(list(words))[0].no_timing
    print(planning.render(plan, planning.measure_speed(config, num_actions, device) if timed else None))
    return 0


def evaluate_command(words: Sequence[str]) -> int:
    """Evaluates a run's newest checkpoint."""
    parser = Parser(prog="growtrain evaluate", description="Play a run's newest checkpoint and report true scores.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    add_config_flags(parser)
    namespace = parser.parse_strict(words)

    import dataclasses
    import json

    from growtrain.checkpoint import load_learner
    from growtrain.evaluation import evaluate
    from growtrain.training import resolve_device

    try:
        device = resolve_device(getattr(namespace, "device", "auto"))
        learner, config, frames = load_learner(namespace.run, device)
    except FileNotFoundError as error:
        raise ConfigError(f"{namespace.run} holds no run that can be evaluated ({error})") from error
    config = dataclasses.replace(config, **explicit_settings(namespace))
    record = evaluate(learner.q_values, config, frames=frames, stage=learner.head.num_injections, device=device)
    print(json.dumps(record.to_dict()))
    return 0


def sweep_command(words: Sequence[str]) -> int:
    """Trains every game with every schedule and every seed, each once, and goes on where it was interrupted."""
    parser = Parser(
        prog="growtrain sweep",
        description="Train every game with every schedule and seed. The same command again runs only what is missing.",
        epilog="Every training flag but --game, --schedule, --seed and --run-dir is passed to every run.",
    )
    parser.add_argument("--dir", type=Path, help="the sweep's directory, as sweeps/NAME: its ledger and its runs")
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
    parser.add_argument("--status", type=Path, metavar="DIR", help="run nothing; print the state of this sweep")
    _add_stop_signal(parser)
    add_config_flags(parser)
    namespace = parser.parse_strict(words)
    stop = _StopSignals(namespace.stop_signal)

    import sqlite3

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
            code = driver.run(lambda: stop.received, retry_failed=namespace.retry_failed)
    except sqlite3.Error as error:
        print(f"growtrain: {ledger.path}: {error}: the runs were stopped; the same command goes on", file=sys.stderr)
        return 1
    if code == 1:
        print(
            f"growtrain: some runs failed, and why is in growtrain sweep --status {namespace.dir}; "
            "the same command with --retry-failed tries them again",
            file=sys.stderr,
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
    return LocalExecutor(make_slots(workers, cores, sorted(os.sched_getaffinity(0)), names))


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


def report_command(words: Sequence[str]) -> int:
    """Compares runs: one HTML page and its Markdown twin."""
    parser = Parser(
        prog="growtrain report", description="Compare runs, finished or not: one HTML page and its Markdown twin."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs, or directories that hold runs")
    parser.add_argument("--output", type=Path, default=Path("report"), help="where the report goes (default: report)")
    namespace = parser.parse_strict(words)

    from growtrain.analysis.report import write_report

    page, verdict = write_report(namespace.runs, namespace.output, ["python", "-m", "growtrain", "report", *words])
    print(f"{verdict}\n{page}")
    return 0


def doctor_command(words: Sequence[str]) -> int:
    """Says what works on this machine."""
    Parser(prog="growtrain doctor", description="What works on this machine.").parse_strict(words)

    from growtrain.doctor import examine

    for what, works, details in examine():
        print(f"{'ok     ' if works else 'missing'}  {what:12} {details}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "doctor": doctor_command,
    "train": train_command,
    "plan": plan_command,
    "evaluate": evaluate_command,
    "resume": resume_command,
    "inspect": inspect_command,
    "sweep": sweep_command,
    "report": report_command,
}


def _configuration(parser: Parser, words: Sequence[str]) -> tuple[Config, list[str], Path | None]:
    """The validated configuration, what its budget shrank, and the run directory if one was given."""
    add_config_flags(parser)
    namespace = parser.parse_strict(words)
    explicit = _explicit(namespace)
    config, notes = resolve(explicit.get("preset", "paper"), explicit)
    schedule_of(config)
    return config, notes, namespace.run_dir


def _explicit(namespace: Namespace) -> dict[str, Any]:
    """The settings given on the command line, the game by its own name."""
    explicit = explicit_settings(namespace)
    if "game" in explicit:
        try:
            explicit["game"] = canonical_game(explicit["game"])
        except ValueError as error:
            raise ConfigError(f"--game: {error}") from error
    return explicit


def _add_stop_signal(parser: Parser) -> None:
    parser.add_argument(
        "--stop-signal",
        default="",
        metavar="NAME",
        help="a signal to stop at besides INT and TERM, such as USR1 (Slurm's --signal=USR1@120)",
    )


def default_run_dir(config: Config) -> Path:
    """`runs/<game>-<schedule>-s<seed>-<time>`, safe as a file name."""
    name = f"{config.game}-{config.schedule}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path("runs") / re.sub(r"[^A-Za-z0-9._-]+", "_", name)


class _StopSignals:
    """Turns the first SIGINT, SIGTERM or `extra` into a flag; the second acts at once, as it would without us.

    Raises:
        ConfigError: `extra` is not a signal that can be caught.
    """

    def __init__(self, extra: str = "") -> None:
        self.received = False
        self._numbers = [signal.SIGINT, signal.SIGTERM]
        if extra:
            name = extra.upper().removeprefix("SIG")
            catchable = {s.name.removeprefix("SIG"): s for s in signal.Signals} | {
                str(s.value): s for s in signal.Signals
            }
            if name not in catchable or name in ("KILL", "STOP", "9", "19"):
                raise ConfigError(
                    f"--stop-signal is {extra!r}: give the name of a signal that can be caught, such as USR1"
                )
            self._numbers.append(catchable[name])

    def __enter__(self) -> "_StopSignals":
        self._previous = {number: signal.signal(number, self._handle) for number in self._numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = True
        for each in self._numbers:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
