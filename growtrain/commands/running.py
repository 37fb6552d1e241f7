"""What several commands share: the settings on the command line, a training run under its display, signals that stop it."""

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

from growtrain.commandline import Parser, add_config_flags, explicit_settings
from growtrain.config import Config, ConfigError, flag
from growtrain.growth.schedules import schedule_of
from growtrain.presets import resolve
from growtrain.tasks import canonical_game

if TYPE_CHECKING:
    from growtrain.checkpoint import Checkpoint

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
STOPPED = 75


def read_configuration(parser: Parser, words: Sequence[str]) -> tuple[Config, list[str], Path | None]:
    """The validated configuration, what there is to say of it, and the run directory if one was given."""
    add_config_flags(parser)
    namespace = parser.parse_strict(words)
    explicit = explicit_with_game(namespace)
    config, notes = resolve(explicit.get("preset", "paper"), explicit)
    if idle := [f"{flag(name)} {explicit[name]}" for name in explicit if not _has_effect(name, config)]:
        notes.append(f"without effect in this run: {', '.join(idle)}")
    return config, notes, namespace.run_dir


def _has_effect(name: str, config: Config) -> bool:
    """Whether a setting can make a difference beside the others."""
    schedule = schedule_of(config)
    intervenes = schedule.periodic or schedule.num_stages > 1
    if name.startswith("adaptive_"):
        return schedule.adaptive is not None
    needs = {
        "anchor": intervenes and schedule.intervention == "inject",
        "trainable_heads": intervenes and schedule.intervention == "inject",
        "intervention": intervenes and schedule.intervention == config.intervention,
        "shrink_alpha": intervenes and schedule.intervention == "shrink-perturb",
        "redo_tau": intervenes and schedule.intervention == "redo",
        "redo_period": schedule.periodic,
        "freeze_encoder_at": config.freeze_encoder_at < schedule.num_stages,
        "eval_frames": not config.eval_episodes,
        "regularizer_strength": config.regularizer != "none",
        "optimizer_decay": config.optimizer == "centered_rmsprop",
        "track_project": config.track != "none",
    }
    return needs.get(name, True)


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
    """`runs/<game>-<schedule>-s<seed>-<time>`, safe as a file name."""
    name = f"{config.game}-{config.schedule}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path("runs") / re.sub(r"[^A-Za-z0-9._-]+", "_", name)


class StopSignals:
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

    def __enter__(self) -> Self:
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


def run_training(
    config: Config,
    run_dir: Path,
    num_actions: int,
    stop: StopSignals,
    notes: Sequence[str],
    start: "Checkpoint | None" = None,
) -> int:
    """Trains under the display; returns the exit code."""
    from growtrain.checkpoint import CheckpointFailed
    from growtrain.display import open_display
    from growtrain.environments.atari import EnvironmentHung
    from growtrain.growth.transaction import GrowthFailed
    from growtrain.learners.double_dqn import Diverged
    from growtrain.memory import check_memory
    from growtrain.planning import make_plan
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
        stage_costs=[stage.flops_per_update for stage in plan.stages],  # updates a frame are the same in all of them
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
    if stop.received:
        print(
            f"growtrain: stopped by {stop.received}; go on with: growtrain resume {shlex.quote(str(run_dir))}",
            file=sys.stderr,
        )
    return STOPPED if stop.received else 0


def add_stop_signal(parser: Parser) -> None:
    """The flag that names a third signal."""
    parser.add_argument(
        "--stop-signal",
        default="",
        metavar="NAME",
        help="a signal to stop at besides INT and TERM, such as USR1 (Slurm's --signal=USR1@120)",
    )
