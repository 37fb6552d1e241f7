"""The cells of a sweep: which runs a command asks for, how each is begun or gone on with, and how far it is.

Units: frames.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from growtrain.environments.games import ATARI, canonical_game
from growtrain.runfiles import published, read_plain
from growtrain.settings.config import Config
from growtrain.settings.presets import resolve
from growtrain.settings.text import ConfigError, flag, parse_count

Status = Literal["pending", "running", "done", "failed"]

_MOST_SEEDS: Final = 10_000  # that are only counted: each is a run
_TAIL_BYTES: Final = 1 << 16  # of metrics.jsonl: more than a record takes


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep, and what the ledger says about it.

    Attributes:
        game, schedule, seed, fingerprint: what it is; no two cells of a sweep share all four.
        words: its training flags.
        run_dir: where its files are, relative to the sweep's directory.
        total_frames: its budget.
        id, status: in the ledger; 0 for a cell that is not in one.
        attempts: how often it was started, less the times it was stopped on request.
        host, pid, token: the driver that runs it; None for a cell that is not running.
        heartbeat, lease_until: when that driver was last heard of, and until when it has to be heard of again, in seconds since 1970.
        last_error: how the last attempt that failed ended, and the last lines it said.
        frames: done at the last heartbeat or at the end.
        created, started, ended: in seconds since 1970.
    """

    game: str
    schedule: str
    seed: int
    fingerprint: str
    words: tuple[str, ...]
    run_dir: str
    total_frames: int
    id: int = 0
    status: Status = "pending"
    attempts: int = 0
    host: str | None = None
    pid: int | None = None
    token: str | None = None
    heartbeat: float | None = None
    lease_until: float | None = None
    last_error: str = ""
    frames: int = 0
    created: float | None = None
    started: float | None = None
    ended: float | None = None

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.game}  {self.schedule}  seed {self.seed}"


def expand(games: str, schedules: str, seeds: str, explicit: dict[str, Any]) -> list[Cell]:
    """The cells that a command asks for, every configuration of them validated; a whole seed before the next.

    Args:
        games: separated by commas, in any spelling; `atari57` is all of them.
        schedules: separated by commas.
        seeds: how many, from 0; or a list with a comma in it (`7,` is seed 7 alone).
        explicit: the training settings given for every cell, by field name.

    Raises:
        ConfigError: one line that names the entry and the remedy.
    """
    for name, instead in (("game", "--games"), ("schedule", "--schedules"), ("seed", "--seeds")):
        if name in explicit:
            raise ConfigError(f"{flag(name)}: a sweep takes a list, {instead}")
    listed = _listed(r",(?=\s*[^\s\d.])", schedules, "--schedules")  # not at the commas within at:0.1,0.5
    cells = []
    for seed, game, schedule in itertools.product(_seeds(seeds), _games(games), listed):
        settings = explicit | {"game": game, "schedule": schedule, "seed": seed}
        config, _ = resolve(explicit.get("preset"), settings)
        cells.append(_cell(config, settings))
    return cells


def setting_words(settings: dict[str, Any]) -> list[str]:
    """The flags that give these settings."""
    words = []
    for item in dataclasses.fields(Config):
        if item.name in settings:
            value = settings[item.name]
            words += [flag(item.name), {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)]
    return words


def growtrain_words(cell: Cell, sweep_dir: Path) -> list[str]:
    """The words of the command that brings a cell to its end: `resume` where its run has begun, `train` where not."""
    run_dir = sweep_dir / cell.run_dir
    begun = (run_dir / "config.json").exists() or published(run_dir)
    return [*(["resume", str(run_dir)] if begun else ["train", "--run-dir", str(run_dir)]), *cell.words]


def sweep_words(cell: Cell, sweep_dir: Path, settings: dict[str, Any]) -> list[str]:
    """The words of the command that is a sweep of this cell alone, in the same ledger, with the training settings given for all."""
    lists = ["--games", cell.game, "--schedules", cell.schedule, f"--seeds={cell.seed},"]
    return ["sweep", "--dir", str(sweep_dir), *lists, *setting_words(settings)]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is by its own files: frames, speed of its last record, and whether it reached its end."""

    frames: int = 0
    frames_per_second: float | None = None
    finished: bool = False


def progress(run_dir: Path) -> Progress:
    """What the newest record of a run says; nothing is known of a run without one."""
    try:
        summary = json.loads(read_plain(run_dir / "summary.json", 1 << 20))
        if summary["status"] == "done":
            return Progress(frames=int(summary["frames"]), finished=True)
    except (ValueError, KeyError, TypeError):
        pass
    for line in reversed(_last_lines(run_dir / "metrics.jsonl")):
        try:
            record = json.loads(line)
            return Progress(frames=int(record["frames"]), frames_per_second=float(record["frames_per_second"]))
        except (ValueError, KeyError, TypeError):  # a torn line
            continue
    return Progress()


def has_other_settings(cell: Cell, sweep_dir: Path) -> bool:
    """Whether the run in a cell's directory has other settings than the cell, as where growtrain's defaults changed while it waited."""
    try:
        about = json.loads(read_plain(sweep_dir / cell.run_dir / "config.json", 1 << 20))
        return bool(about["fingerprint"] != cell.fingerprint)
    except (ValueError, KeyError, TypeError):
        return False


def _last_lines(path: Path) -> Sequence[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().splitlines()
    except OSError:
        return ()


def _cell(config: Config, settings: dict[str, Any]) -> Cell:
    fingerprint = config.fingerprint()
    name = f"{config.game}-{config.schedule}-s{config.seed}-{fingerprint}"
    return Cell(
        game=config.game,
        schedule=config.schedule,
        seed=config.seed,
        fingerprint=fingerprint,
        words=tuple(setting_words(settings)),
        run_dir=f"runs/{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}",
        total_frames=config.total_frames,
    )


def _games(text: str) -> list[str]:
    games: list[str] = []
    for entry in _listed(",", text, "--games"):
        try:
            games += ATARI.games if entry.lower() == "atari57" else [canonical_game(entry)]
        except ValueError as error:
            raise ConfigError(f"--games: {error}") from error
    return list(dict.fromkeys(games))


def _seeds(text: str) -> list[int]:
    if "," in text:
        return [_seed(entry) for entry in _listed(",", text, "--seeds")]
    count = _seed(text)
    if not 0 < count <= _MOST_SEEDS:
        raise ConfigError(f"--seeds is {text}: give how many, as 3, at most {_MOST_SEEDS}, or a list, as 0,1,2")
    return list(range(count))


def _seed(text: str) -> int:
    try:
        return parse_count(text)
    except ConfigError as error:
        raise ConfigError(f"--seeds: {error}") from error


def _listed(separator: str, text: str, name: str) -> list[str]:
    """The entries of a list, each once."""
    entries = dict.fromkeys(entry.strip() for entry in re.split(separator, text) if entry.strip())
    if not entries:
        raise ConfigError(f"{name} is empty: give at least one")
    return list(entries)
