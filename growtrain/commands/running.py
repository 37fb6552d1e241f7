"""What several commands share: the settings on the command line, a training run under its display, signals that stop it."""

import contextlib
import itertools
import os
import re
import shlex
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from growtrain.commands.commandline import Parser, add_config_flags, explicit_settings
from growtrain.environments.games import canonical_game
from growtrain.runfiles import STOPPED
from growtrain.settings.budget import updates_due
from growtrain.settings.config import Config, has_effect
from growtrain.settings.presets import resolve
from growtrain.settings.schedules import schedule_of
from growtrain.settings.text import ConfigError, flag, format_count

if TYPE_CHECKING:
    from growtrain.environments.base import Spec
    from growtrain.learners.foreign_weights import Weights
    from growtrain.runs.checkpoint import Checkpoint

COMMANDS = (
    "train",
    "resume",
    "inspect",
    "plan",
    "evaluate",
    "diagnose",
    "rescue",
    "probe",
    "sweep",
    "report",
    "video",
    "doctor",
)


def read_configuration(parser: Parser, words: Sequence[str]) -> tuple[Config, list[str], Namespace]:
    """The validated configuration, what there is to say of it, and all that was given."""
    add_config_flags(parser)
    namespace = parser.parse_strict(words)
    explicit = explicit_with_game(namespace)
    config, notes = resolve(explicit.get("preset"), explicit)
    if config.switch_frames:
        ends = (*map(format_count, config.switch_frames), "the end")
        parts = ", ".join(f"{game} until {end}" for game, end in zip(config.games, ends, strict=False))
        notes.append(
            f"a chain of games: {parts}; its replay is {'kept' if config.keep_replay else 'emptied at a switch'}"
        )
    if not updates_due(config, config.total_frames // config.frame_skip):
        notes.append(
            f"it makes no update in the frames after --learning-starts {format_count(config.learning_starts)}: raise --replay-ratio"
        )
    if idle := [f"{flag(name)} {explicit[name]}" for name in explicit if not has_effect(name, config)]:
        notes.append(f"without effect in this run: {', '.join(idle)}")
    return config, notes, namespace


def explicit_with_game(namespace: Namespace) -> dict[str, Any]:
    """The settings given on the command line, the game by its own name."""
    explicit = explicit_settings(namespace)
    if "game" in explicit:
        try:
            explicit["game"] = canonical_game(explicit["game"])
        except ValueError as error:
            raise ConfigError(f"--game: {error}") from error
    return explicit


def default_run_dir(config: Config) -> Path:
    """Makes `runs/<game>-<schedule>-s<seed>-<time>`, safe as a file name; the next that begins in the same second gets `-2` after it."""
    name = f"{config.game}-{config.schedule}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    first = Path("runs") / re.sub(r"[^A-Za-z0-9._-]+", "_", name)
    first.parent.mkdir(exist_ok=True)
    for number in itertools.count(1):
        run_dir = first if number == 1 else first.with_name(f"{first.name}-{number}")
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir()  # that it is made here and now is what nobody else can have done
            return run_dir
    raise AssertionError("there is always a next number")


def complain(text: str) -> None:
    """Says something on standard error; what cannot be shown there is lost, and nothing else is."""
    if sys.stderr is not None:  # as in a process without one: `print` would take standard output instead
        with contextlib.suppress(OSError, ValueError):
            print(f"growtrain: {text}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Prints a line of a command that goes on whether or not anybody reads it."""
    from growtrain.telemetry.display import SafeStream

    print(text, file=SafeStream(sys.stdout), flush=True)


class StopSignals:
    """Notes the name of the first SIGINT, SIGTERM, SIGHUP or `extra` as `received`; the second acts at once, as it would without us.

    SIGHUP, a terminal's end, is left alone where it is ignored, as under `nohup`.

    Raises:
        ConfigError: `extra` is not a signal that can be caught.
    """

    def __init__(self, extra: str = "") -> None:
        self.received = ""
        self._numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._numbers.append(signal.SIGHUP)
        if extra:
            name = extra.upper().removeprefix("SIG")
            catchable = {s.name.removeprefix("SIG"): s for s in signal.Signals} | {
                str(s.value): s for s in signal.Signals
            }
            if name not in catchable or name in ("KILL", "STOP", "9", "19"):
                raise ConfigError(
                    f"--stop-signal is {extra!r}: give the name of a signal that can be caught, such as USR1"
                )
            if catchable[name] not in self._numbers:
                self._numbers.append(catchable[name])

    def __enter__(self) -> Self:
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self._previous = {number: signal.signal(number, self._handle) for number in self._numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = signal.Signals(number).name
        for descriptor in self._terminals:
            if not os.isatty(descriptor):  # it has hung up, and every further line would be an error
                with open(os.devnull, "wb") as nothing:
                    os.dup2(nothing.fileno(), descriptor)
        for each in self._numbers:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)


def run_training(
    config: Config,
    run_dir: Path | None,
    spec: "Spec",
    stop: StopSignals,
    notes: Sequence[str],
    start: "Checkpoint | None" = None,
    weights: "Weights | None" = None,
    *,
    again: bool = False,
) -> int:
    """Trains under the display.

    Args:
        config: what is run.
        run_dir: where; None makes `default_run_dir`, once the run is known to fit.
        spec: of its game.
        stop: what ends it early.
        notes: lines of text to begin with.
        start: the checkpoint it goes on from.
        weights: those it begins with.
        again: whether it is there, was never saved, and is begun again.

    Returns:
        The exit code.
    """
    from growtrain.learners.make import resolve_device
    from growtrain.planning.costs import make_plan
    from growtrain.planning.memory import check_memory
    from growtrain.runs.loop import train_in
    from growtrain.sweep.cells import progress
    from growtrain.telemetry.display import open_display
    from growtrain.telemetry.trackers import check_trackers

    plan = make_plan(config, spec)
    device = resolve_device(config.device)
    check_memory(plan, device)
    check_trackers(config)
    run_dir = default_run_dir(config) if run_dir is None else run_dir
    home = run_dir.absolute()
    display = open_display(
        game=config.game,
        schedule=config.schedule,
        device=str(device),
        stage_frames=[stage.frames for stage in plan.stages],
        stage_costs=[stage.flops_per_update for stage in plan.stages],  # updates a frame are the same in all of them
        run_name=str(run_dir),
        plan=_what_happens(config),
    )
    with stop, display:
        for note in notes:
            display.note(note)
        for record in train_in(home, config, lambda: stop.received, start, weights=weights, again=again):
            display.show(record)
    if not stop.received or progress(home).finished:  # too late to stop anything: nothing is left to go on with
        return 0
    complain(f"stopped by {stop.received}; go on with: growtrain resume {shlex.quote(str(run_dir))}")
    return STOPPED


def _what_happens(config: Config) -> str:
    from growtrain.growth.kinds import kind_of

    schedule = schedule_of(config)
    parts = [schedule.describe()]
    if schedule.intervenes and kind_of(schedule.intervention, config).at_target_copy:
        parts[0] += f", each at the target's next copy (every {format_count(config.target_period)})"
    if config.priming_updates:
        begins = format_count(config.learning_starts)
        parts.insert(0, f"primed by {format_count(config.priming_updates)} updates at {begins}")
    if config.frozen_width:
        parts.insert(0, f"beside a frozen network of width {config.frozen_width}")
    return ", ".join(parts)


def add_stop_signal(parser: Parser) -> None:
    """The flag that names a third signal."""
    parser.add_argument(
        "--stop-signal",
        default="",
        metavar="NAME",
        help="a signal to stop at besides INT, TERM and HUP, such as USR1 (Slurm's --signal=USR1@120)",
    )
