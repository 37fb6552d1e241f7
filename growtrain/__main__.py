"""The command line: parse, call, exit code.

Exit codes: 0 done; 2 bad input (one line that names the remedy); 75 stopped by a signal with a checkpoint written; 1 anything else.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from growtrain.commandline import Parser, add_config_flags, explicit_settings
from growtrain.config import Config, ConfigError
from growtrain.growth.schedules import make_schedule
from growtrain.presets import resolve
from growtrain.tasks import canonical_game

STOPPED = 75

# Before torch is imported: a thread that waits for others must not spin on a core that the emulators could use.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words.pop(0) if words and not words[0].startswith("-") else "train"
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
    config, notes, run_dir = _configuration(parser, words)
    run_dir = default_run_dir(config) if run_dir is None else run_dir
    if (run_dir / "config.json").exists():
        raise ConfigError(f"--run-dir {run_dir} already holds a run: choose another directory")

    from growtrain.collection import num_actions_of
    from growtrain.display import open_display
    from growtrain.planning import check_memory, make_plan
    from growtrain.training import resolve_device, train

    plan = make_plan(config, num_actions_of(config.game))
    device = resolve_device(config.device)
    check_memory(plan, device)
    stop = _StopSignals()
    display = open_display(
        game=config.game,
        schedule=config.schedule,
        device=str(device),
        stage_frames=[stage.frames for stage in plan.stages],
        stage_costs=[stage.flops / stage.frames for stage in plan.stages],
        run_name=str(run_dir),
    )
    with stop, display:
        if notes:
            display.note(f"below 200M frames these shrink with the budget: {', '.join(notes)}")
        for record in train(config, run_dir, should_stop=lambda: stop.received):
            display.show(record)
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


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command,
    "plan": plan_command,
    "evaluate": evaluate_command,
}


def _configuration(parser: Parser, words: Sequence[str]) -> tuple[Config, list[str], Path | None]:
    """The validated configuration, what its budget shrank, and the run directory if one was given."""
    add_config_flags(parser)
    namespace = parser.parse_strict(words)
    explicit = explicit_settings(namespace)
    if "game" in explicit:
        try:
            explicit["game"] = canonical_game(explicit["game"])
        except ValueError as error:
            raise ConfigError(f"--game: {error}") from error
    config, notes = resolve(explicit.get("preset", "paper"), explicit)
    make_schedule(config.schedule, config.total_frames, config.learning_starts)
    return config, notes, namespace.run_dir


def default_run_dir(config: Config) -> Path:
    """`runs/<game>-<schedule>-s<seed>-<time>`, safe as a file name."""
    name = f"{config.game}-{config.schedule}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path("runs") / re.sub(r"[^A-Za-z0-9._-]+", "_", name)


class _StopSignals:
    """Turns the first SIGINT or SIGTERM into a flag; the second acts as it would without us."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "_StopSignals":
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = True
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
