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

from growtrain.commandline import Parser, add_config_flags, explicit_settings, reader
from growtrain.config import Config, ConfigError, parse_count
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
    from growtrain.sweep.cells import progress

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
    if fork is None and checkpoint.frames >= config.total_frames and progress(run).finished:
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


def diagnose_command(words: Sequence[str]) -> int:
    """Says whether a run has lost plasticity, and where."""
    parser = Parser(
        prog="growtrain diagnose",
        description="Fork a run at a checkpoint, with and without a part made fresh, and say whether plasticity was lost, and where.",
        epilog="The same command again goes on with what was interrupted.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    parser.add_argument("--at", type=parse_count, help="frames of the checkpoint (default: the newest)")
    parser.add_argument("--frames", type=parse_count, help="of each fork (default: a tenth of what the run has played)")
    parser.add_argument("--seeds", type=parse_count, default=3, help="forks of each arm (default: 3)")
    parser.add_argument("--arms", help="of untouched,inject,reset-encoder,fresh-optimizer (default: all)")
    parser.add_argument("--threshold", type=float, default=0.1, help="least gain that counts (default: 0.1)")
    parser.add_argument("--learning-seeds", type=parse_count, default=5, help="of the learning test (default: 5)")
    parser.add_argument("--learning-updates", type=parse_count, default=400, help="of the learning test (default: 400)")
    parser.add_argument("--learning-test-only", action="store_true", help="no forks: minutes, instead of hours")
    parser.add_argument("--output", type=Path, help="where the answer goes (default: RUN/diagnosis-<frames>)")
    _add_stop_signal(parser)
    namespace = parser.parse_strict(words)
    run, stop = namespace.run, _StopSignals(namespace.stop_signal)

    from growtrain.checkpoint import open_at, open_newest
    from growtrain.diagnose import cost_lines, default_frames, diagnose
    from growtrain.diagnosis import ARMS, Settings, next_command, render
    from growtrain.learning_test import LearningTest
    from growtrain.resuming import at_own_width

    arms = tuple(namespace.arms.split(",")) if namespace.arms else ARMS
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ConfigError(f"--arms {unknown[0]} is unknown: choose from {', '.join(ARMS)}")
    if "untouched" not in arms:
        raise ConfigError("--arms lacks untouched, which the others are compared with: add it")
    for name in ("seeds", "learning_seeds", "learning_updates"):
        if getattr(namespace, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 < namespace.threshold < 1:
        raise ConfigError(f"--threshold {namespace.threshold:g} must lie between 0 and 1, such as 0.1")
    if not (run / "checkpoints").is_dir():
        raise ConfigError(f"{run} has no checkpoints: name the directory of a run that made one")
    checkpoint = at_own_width(open_newest(run) if namespace.at is None else open_at(run, namespace.at))
    settings = Settings(
        frames=namespace.frames if namespace.frames is not None else default_frames(checkpoint),
        seeds=namespace.seeds,
        arms=() if namespace.learning_test_only else arms,
        threshold=namespace.threshold,
        test=LearningTest(seeds=namespace.learning_seeds, updates=namespace.learning_updates),
    )
    output = namespace.output or run / f"diagnosis-{checkpoint.frames}"
    print("\n".join(cost_lines(run, checkpoint, settings)), flush=True)
    with stop:
        diagnosis = diagnose(
            run, checkpoint, settings, output, stop=lambda: stop.received, say=lambda line: print(line, flush=True)
        )
    if diagnosis is None:
        print("stopped: the same command again goes on from here", file=sys.stderr)
        return STOPPED
    print(f"\n{render(diagnosis)}\nwritten to {output}; next: {next_command(diagnosis)}")
    return 0


def rescue_command(words: Sequence[str]) -> int:
    """Goes on with an agent that has stopped improving, by interventions instead of from scratch."""
    parser = Parser(
        prog="growtrain rescue",
        description="Go on with a trained agent that has stopped improving, with plasticity injected, instead of training another.",
        epilog="Of a run, --schedule (grow1x, grow3x, at:...) counts from its checkpoint, of a file from its first update.",
    )
    parser.add_argument("agent", type=Path, metavar="RUN|FILE", help="a run, or weights (.pt, .pth, .safetensors)")
    parser.add_argument("--frames", type=parse_count, help="budget (default: half of what the run has played)")
    parser.add_argument("--run-dir", type=Path, help="where the new run's files go (default: as for training)")
    _add_stop_signal(parser)
    add_config_flags(parser)
    namespace = parser.parse_strict(words)
    explicit, stop, agent = _explicit(namespace), _StopSignals(namespace.stop_signal), namespace.agent
    if "total_frames" in explicit:
        raise ConfigError("--total-frames: a rescue's budget is what it adds: give it as --frames")
    if namespace.run_dir is not None and (namespace.run_dir / "config.json").exists():
        raise ConfigError(f"--run-dir {namespace.run_dir} already holds a run: choose another directory")
    if not agent.exists():
        raise ConfigError(f"{agent} does not exist: name the directory of a run, or a file of weights")

    from growtrain.rescue import default_frames, rescue_run, rescue_weights

    if agent.is_dir():
        from growtrain.checkpoint import open_newest
        from growtrain.resuming import at_own_width

        checkpoint = at_own_width(open_newest(agent))
        frames = namespace.frames if namespace.frames is not None else default_frames(checkpoint)
        config, notes = rescue_run(checkpoint, explicit, frames)
        notes = [f"from the checkpoint of {agent} at {checkpoint.frames} frames", *notes]
        num_actions, start = checkpoint.state["num_actions"], checkpoint
        run_dir = namespace.run_dir or default_run_dir(config)
    else:
        from growtrain.collection import num_actions_of
        from growtrain.weights import read_weights, save_initial

        if namespace.frames is None:
            raise ConfigError(
                "--frames is missing: a file of weights does not say how long it was trained; give for example 10M"
            )
        weights = read_weights(agent)
        num_actions, start = num_actions_of(explicit.get("game", Config.game)), None
        config, notes = rescue_weights(weights, explicit, namespace.frames, num_actions)
        run_dir = namespace.run_dir or default_run_dir(config)
        save_initial(weights, run_dir)
    return _run(config, run_dir, num_actions, stop, notes, start)


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
    from growtrain.telemetry.trackers import check_trackers
    from growtrain.training import resolve_device, train

    plan = make_plan(config, num_actions)
    device = resolve_device(config.device)
    check_memory(plan, device)
    check_trackers(config)
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
        learner, config, frames, stage = load_learner(namespace.run, device)
    except FileNotFoundError as error:
        raise ConfigError(f"{namespace.run} holds no run that can be evaluated ({error})") from error
    config = dataclasses.replace(config, **explicit_settings(namespace))
    record = evaluate(learner.q_values, config, frames=frames, stage=stage, device=device)
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
            code = driver.run(lambda: bool(stop.received), retry_failed=namespace.retry_failed)
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


def probe_command(words: Sequence[str]) -> int:
    """Measures which interventions give plasticity back, on supervised tasks made of the game's frames."""
    parser = Parser(
        prog="growtrain probe",
        description="Measure how much plasticity each intervention gives back: one network learns task after task on a game's frames. "
        "Only what the directory lacks is run.",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="records, table and figure (default: runs/probe-<game>)"
    )
    parser.add_argument(
        "--figures-from", type=Path, metavar="DIR", help="run nothing; make table and figure of DIR again"
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
    parser.add_argument("--setting", default="encoder,head", help="where a warm start loses (default: encoder,head)")
    parser.add_argument("--targets", default="random,value", help="kinds of targets (default: random,value)")
    parser.add_argument("--arms", default="", help="some arms, comma-separated (default: all)")
    for name, default, text in (
        ("seeds", "3", "seeds 0 to N - 1"),
        ("processes", "0", "workers of one thread each (0: one for each core)"),
        ("num-tasks", "20", "tasks"),
        ("num-updates", "800", "updates on each task"),
        ("num-frames", "64", "frames in the data set"),
    ):
        parser.add_argument(
            f"--{name}", type=reader(int), default=default, metavar="N", help=f"{text} (default: {default})"
        )
    namespace = parser.parse_strict(words)

    from growtrain.probe.settings import ProbeConfig, make_cells

    config = ProbeConfig(
        game=_explicit(namespace)["game"],
        policy=namespace.policy,
        size=namespace.size,
        sweep=namespace.sweep,
        num_frames=namespace.num_frames,
        num_tasks=namespace.num_tasks,
        num_updates=namespace.num_updates,
    )
    cells = make_cells(namespace.setting.split(","), namespace.targets.split(","), namespace.seeds)

    from growtrain.probe.cells import choose_arms, one_line, run
    from growtrain.probe.report import write_report

    if namespace.figures_from:
        print(write_report(namespace.figures_from))
        return 0
    names = choose_arms(config, namespace.arms.split(",") if namespace.arms else [])
    directory = namespace.output or Path("runs") / f"probe-{config.game}"
    processes = namespace.processes or len(os.sched_getaffinity(0))
    for records in run(config, cells, names, directory, processes):
        print(one_line(records), flush=True)
    print(write_report(directory))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "doctor": doctor_command,
    "train": train_command,
    "plan": plan_command,
    "evaluate": evaluate_command,
    "resume": resume_command,
    "inspect": inspect_command,
    "probe": probe_command,
    "sweep": sweep_command,
    "diagnose": diagnose_command,
    "rescue": rescue_command,
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
    """Notes the name of the first SIGINT, SIGTERM or `extra` as `received`; the second acts at once, as it would without us.

    Raises:
        ConfigError: `extra` is not a signal that can be caught.
    """

    def __init__(self, extra: str = "") -> None:
        self.received = ""
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
        self.received = signal.Signals(number).name
        for each in self._numbers:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
