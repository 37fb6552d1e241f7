"""Reading run directories, whole or not: whatever a run left behind is read, and what cannot be read is said.

A run is any directory that holds `config.json`, `metrics.jsonl` or `summary.json`. Nothing in it is trusted: files must be plain, records
must be JSON objects, numbers must be finite; everything else is left out and named in `Run.problems`.

Units: frames, seconds; FLOPs are those of training: updates, acting, and what an adaptive schedule measures; evaluations are not counted.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from growtrain.analysis.aggregate import FloatArray
from growtrain.environments.games import canonical_game
from growtrain.runfiles import RunLocked, Unreadable, read_plain, require_directory, require_unlocked
from growtrain.settings.text import ConfigError
from growtrain.sweep.ledger import Ledger
from growtrain.sweep.table import last_words

METRICS = ("frames", "wall_seconds", "updates", "episodes", "episode_return")
_MARKS = ("config.json", "metrics.jsonl", "summary.json")
_MAX_BYTES = 1 << 28
ENDED = ("done", "stopped", "failed")  # what summary.json says; without it a run is running or interrupted

Record = dict[str, Any]


class StagePrice(NamedTuple):
    """What a stage took: FLOPs of one update, of the acting (and sweeping) behind one frame, and how many there were of both.

    What is behind a frame is NaN, unknown, of a stage that had none.
    """

    update: float
    frame: float
    updates: float
    frames: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run left behind.

    Attributes:
        path: its directory.
        name: the directory's name, below the folder that was searched.
        settings: its configuration, by field name.
        about: the rest of `config.json`: versions, device, resumes.
        status: `done`, `stopped` (by a signal, can go on), `failed`, `running`, or `interrupted` (ended without a summary).
        summary: `summary.json`, empty while there is none.
        metrics: (P, 5) `METRICS` by rising frames, NaN where a record has no such number.
        evaluations, growth_events, decisions, diagnostics: records by rising frames.
        problems: what could not be read, one line each.
    """

    path: Path
    name: str
    settings: Record
    about: Record
    status: str
    summary: Record
    metrics: FloatArray
    evaluations: list[Record]
    growth_events: list[Record]
    decisions: list[Record]
    diagnostics: list[Record]
    problems: list[str]

    @property
    def game(self) -> str:
        """The game in its canonical spelling, or as it is written where nothing is known about it."""
        name = str(self.settings.get("game", self.summary.get("game", "unknown")))
        try:
            return canonical_game(name)
        except ValueError:
            return name

    @property
    def schedule(self) -> str:
        """The schedule, as it is written."""
        return str(self.settings.get("schedule", self.summary.get("schedule", "unknown")))

    @property
    def seed(self) -> int:
        """The seed; -1 where none can be read."""
        seed = self.settings.get("seed", self.summary.get("seed"))
        return seed if isinstance(seed, int) else -1

    @property
    def frames(self) -> int:
        """Frames of the newest record."""
        return int(max([number(self.summary, "frames", 0), *self.metrics[-1:, 0]]))

    @property
    def wall_seconds(self) -> float:
        """Time taken so far, over all resumes; NaN if unknown."""
        newest = float(self.metrics[-1, 1]) if len(self.metrics) else float("nan")
        return number(self.summary, "wall_seconds", newest)

    @property
    def budget(self) -> int:
        """Frames it was to run for; what it has run where that cannot be read."""
        return int(number(self.settings, "total_frames", self.frames))

    @property
    def stage_costs(self) -> list[StagePrice]:
        """What each stage costs, from the summary; empty where it does not know that."""
        stages = self.summary.get("stages")
        if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
            return []
        names = ("frames", "updates", "flops_per_update", "flops_of_acting")
        found = [tuple(number(stage, name, float("nan")) for name in names) for stage in stages]
        if np.isnan(found).any():
            return []
        return [
            StagePrice(update, acting / frames if frames else float("nan"), updates, frames)
            for frames, updates, update, acting in found
        ]

    @property
    def resumes(self) -> list[Record]:
        """How it was resumed or forked."""
        found = self.about.get("resumes")
        return [resume for resume in found if isinstance(resume, dict)] if isinstance(found, list) else []

    @property
    def has_other_past(self) -> bool:
        """Whether it went on from what other settings may have made: as a fork, or with other ways to grow."""
        return any("forked_from" in resume or resume.get("past_differs") for resume in self.resumes)

    @property
    def parent(self) -> str:
        """The directory of the run that it was forked from first, of a relative one its name; empty of a run that began from nothing."""
        forked_from = next((str(resume["forked_from"]) for resume in self.resumes if "forked_from" in resume), "")
        parent = Path(forked_from).parent.parent
        return "" if not forked_from else str(parent) if parent.is_absolute() else parent.name

    @property
    def total_flops(self) -> float:
        """FLOPs of all its training by its summary; NaN while there is none."""
        costs = self.stage_costs
        if not costs:
            return float("nan")
        updates = sum(each.updates * each.update for each in costs)
        return updates + sum(each.frames * each.frame for each in costs if each.frames) + sum(self.flops_of_decisions)

    @property
    def flops_of_decisions(self) -> list[float]:
        """FLOPs that each decision took to measure; NaN where the record does not say."""
        return [number(decision, "flops", float("nan")) for decision in self.decisions]


def part_of(run: Run, name: str, start: int, end: int) -> Run:
    """What a run of a chain left behind of one of its games, as a run of its own that began at the switch to it.

    All counts are from the switch on. A record that reaches across it tells nothing of either game's scores. Earlier growth events are
    kept, with frames below 0: they say at which stage it began.

    Args:
        run: the run.
        name: the game's, as a part of the chain.
        start: frames at the switch to it.
        end: frames at which it is left.
    """

    def within(records: Sequence[Record]) -> list[Record]:
        return [record | {"frames": record["frames"] - start} for record in records if start < record["frames"] <= end]

    def is_of_end(record: Record, frames: int) -> bool:
        grown = any(event["frames"] == frames for event in run.growth_events)
        when = record.get("when")
        return record["frames"] == frames and (when == "before growth" if grown else when != "after growth")

    # What is evaluated at an intervention's frames comes after it.
    changed = any(e["frames"] == end and e.get("max_abs_q_change_online") != 0 for e in run.growth_events)
    evaluations = [record for record in run.evaluations if not (changed and record["frames"] == end)]
    known = run.metrics[~np.isnan(run.metrics[:, :3]).any(axis=1)]
    at_start = [np.interp(start, np.append(0.0, known[:, 0]), np.append(0.0, counts)) for counts in known[:, :3].T]
    metrics = run.metrics[(run.metrics[:, 0] > start) & (run.metrics[:, 0] <= end)]
    metrics[:, :3] -= at_start
    if start and len(metrics) and start not in run.metrics[:, 0]:
        metrics[0, METRICS.index("episode_return")] = np.nan
    is_over = run.frames >= end
    return dataclasses.replace(
        run,
        settings=run.settings | {"game": name, "total_frames": end - start},
        status="done" if is_over else run.status,
        summary={} if is_over else {"reason": run.summary.get("reason")},
        metrics=metrics,
        evaluations=within(evaluations),
        growth_events=[e | {"frames": e["frames"] - start} for e in run.growth_events if e["frames"] < end],
        decisions=within(run.decisions),
        diagnostics=[
            record | {"frames": record["frames"] - start}
            for record in run.diagnostics
            if start <= record["frames"] <= end
            if not (start and is_of_end(record, start)) and (record["frames"] < end or is_of_end(record, end))
        ],
    )


@dataclass(frozen=True)
class Curve:
    """A run's score (game points) against what it took: frames, hours and FLOPs, each (P,) and rising; FLOPs NaN if unknown.

    `episodes` (P,) is how many each score is the mean of.
    """

    frames: FloatArray
    hours: FloatArray
    flops: FloatArray
    score: FloatArray
    episodes: FloatArray


def number(record: Record, name: str, default: float) -> float:
    """A finite number of a record, or the default."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return default  # NaN, infinite, or a whole number that no float holds
    return value


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs that the paths are or hold at any depth, by name, each once.

    Raises:
        ConfigError: a path does not exist or holds no run.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        require_directory(path, "runs, or a directory that holds runs")
        folders = list(_run_folders(path))
        if not folders:
            raise ConfigError(f"{path} holds no run: none of {', '.join(_MARKS)} is in it or below it")
        for folder in folders:
            name = path.resolve().name if folder == path else folder.relative_to(path).as_posix()
            found.setdefault(folder.resolve(), read_run(folder, name))
    return sorted(found.values(), key=lambda run: run.name)


def ledger_notes(paths: Sequence[Path]) -> list[str]:
    """What the ledgers of sweeps among the paths say is yet to be run, or why it failed."""
    notes = []
    for path in paths:
        if not (path / "ledger.sqlite").is_file():
            continue
        try:
            with Ledger(path) as ledger:
                cells = ledger.cells()
        except ConfigError as error:
            notes.append(str(error))
            continue
        # A later cell of the same flags is what they mean since growtrain's defaults changed.
        last = {cell.words: cell.id for cell in cells if cell.status == "done"}
        cells = [cell for cell in cells if cell.id >= last.get(cell.words, 0)]
        for cell in cells:
            if cell.status == "failed":
                attempts = f"{cell.attempts} attempt{'s' if cell.attempts > 1 else ''}"
                notes.append(f"the sweep gave up {' '.join(cell.name.split())} after {attempts}: {last_words(cell)}")
        waiting = [" ".join(cell.name.split()) for cell in cells if cell.status == "pending"]
        if waiting:
            shown = ", ".join([*waiting[:5], *(["..."] if len(waiting) > 5 else [])])
            notes.append(f"the sweep has yet to run, or go on with, {len(waiting)} of its {len(cells)} runs: {shown}")
    return notes


def _run_folders(top: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # what has gone meanwhile is no run
            raise error

    for folder, below, files in os.walk(top, onerror=refuse):  # what cannot be looked into may hold runs
        if "probe.jsonl" not in files and any(mark in files for mark in _MARKS):  # a probe is no run
            below.clear()  # a run's checkpoints have a configuration, too
            yield Path(folder)


def read_run(path: Path, name: str) -> Run:
    """Reads what there is of a run."""
    problems: list[str] = []
    about = _read_object(path / "config.json", problems, missing="its settings are unknown")
    summary = _read_object(path / "summary.json", problems)
    settings = about.pop("config", {})
    status = summary.get("status")
    if status not in ENDED:
        if summary:
            problems.append("summary.json: no status")
        status = _without_summary(path)
    records = {
        stem: _read_records(path / f"{stem}.jsonl", problems)
        for stem in ("evaluations", "growth_events", "decisions", "diagnostics")
    }
    metrics = _read_records(path / "metrics.jsonl", problems)
    return Run(
        path=path,
        name=name,
        settings=settings if isinstance(settings, dict) else {},
        about=about,
        status=status,
        summary=summary,
        metrics=np.array([[number(m, name, np.nan) for name in METRICS] for m in metrics]).reshape(-1, len(METRICS)),
        problems=problems,
        **records,
    )


def _without_summary(path: Path) -> str:
    try:
        require_unlocked(path)
    except RunLocked:
        return "running"
    except OSError:
        return "interrupted"
    return "interrupted"


def _read_object(path: Path, problems: list[str], missing: str = "") -> Record:
    try:
        value = json.loads(read_plain(path, _MAX_BYTES)) if path.exists() or path.is_symlink() else None
    except (Unreadable, ValueError, RecursionError, OSError) as error:
        problems.append(f"{path.name}: cannot be read ({_reason(error)})")
        return {}
    if value is None:
        if missing:
            problems.append(f"{path.name}: missing; {missing}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name}: not a JSON object")
        return {}
    return value


def _read_records(path: Path, problems: list[str]) -> list[Record]:
    """The records that have frames, by rising frames."""
    if not path.exists() and not path.is_symlink():
        return []
    try:
        *lines, tail = read_plain(path, _MAX_BYTES).split(b"\n")
    except (Unreadable, OSError) as error:
        problems.append(f"{path.name}: cannot be read ({_reason(error)})")
        return []
    parsed = [_parse(line) for line in [*lines, tail]]
    damaged = sum(record is None for record in parsed[:-1])  # a last line without its end is only being written
    if damaged:
        problems.append(f"{path.name}: {damaged} line{'s' if damaged > 1 else ''} cannot be read and are left out")
    return sorted((record for record in parsed if record is not None), key=lambda record: float(record["frames"]))


def _parse(line: bytes) -> Record | None:
    """A line's JSON object if it has frames, else None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and not np.isnan(number(record, "frames", np.nan)) else None


def _reason(error: Exception) -> str:
    return (
        "not JSON"
        if isinstance(error, ValueError) and not isinstance(error, Unreadable)
        else str(error).split(": ")[-1]
    )


def training_curve(run: Run, costs: Sequence[StagePrice] = (), budget: int = 0) -> Curve:
    """A run's score and what it took, at each record from the first tenth of a budget on.

    The score is the mean of the training episodes that ended in the last tenth of the budget; where none did, of the newest that did.
    Runs of different budgets are compared by the same number of frames, or the longer ones' scores would be older. An episode that is still
    going on then is not among them, which favours the short ones where few end.

    Args:
        run: the run.
        costs: of each stage.
        budget: frames; 0: its own.
    """
    window = (budget or run.budget) / 10
    frames, seconds, updates, episodes, returns = run.metrics[~np.isnan(run.metrics[:, :3]).any(axis=1)].T
    episodes = np.where(np.isnan(returns), 0.0, np.nan_to_num(episodes))
    total = np.concatenate([[0.0], np.cumsum(episodes * np.nan_to_num(returns))])
    count = np.concatenate([[0.0], np.cumsum(episodes)])
    newest = np.maximum.accumulate(np.where(episodes > 0, np.arange(len(frames)), -1))
    start = np.minimum(np.searchsorted(frames, frames - window, side="right"), newest)  # of the records averaged over
    whole = (frames >= window) & (newest >= 0)
    behind = (count[1:] - count[start])[whole]
    score = (total[1:] - total[start])[whole] / behind
    flops = training_flops(run, frames, updates, costs)
    return Curve(frames[whole], seconds[whole] / 3600, flops[whole], score, behind)


def evaluation_curve(run: Run, costs: Sequence[StagePrice] = ()) -> Curve:
    """A run's evaluations and what training took until then; at records of training in between, the score between two evaluations.

    Args:
        run: the run.
        costs: of each stage.
    """
    frames, seconds, updates = run.metrics[~np.isnan(run.metrics[:, :3]).any(axis=1), :3].T
    found = [[number(e, name, np.nan) for name in ("frames", "episode_return", "episodes")] for e in run.evaluations]
    evaluated = np.array([point for point in found if not np.isnan(point).any()]).reshape(-1, 3).T
    at, index = np.unique(evaluated[0], return_index=True)
    if not len(frames) or not len(at):
        return Curve(*np.empty((5, 0)))
    x = np.union1d(frames[(frames > at[0]) & (frames < at[-1])], at)
    score, episodes = (np.interp(x, at, values[index]) for values in evaluated[1:])
    flops = training_flops(run, frames, updates, costs)
    hours, flops = (np.interp(x, np.append(0.0, frames), np.append(0.0, values)) for values in (seconds / 3600, flops))
    return Curve(x, hours, flops, score, episodes)


def training_flops(run: Run, frames: FloatArray, updates: FloatArray, costs: Sequence[StagePrice]) -> FloatArray:
    """FLOPs of a run's training up to each record, (P,); NaN if that is unknown.

    Each stage's updates and frames times what one takes, and the decisions up to then. A stage begins with its growth event, whose updates
    are interpolated between the records around it; one that began before the first frame, as in a part of a chain, begins with that.
    """
    stages = [int(number(event, "stage", -1)) for event in run.growth_events]
    if not len(frames) or not costs or not all(0 <= stage < len(costs) for stage in stages):
        return np.full(len(frames), np.nan)
    events = [0.0, *(max(float(event["frames"]), 0.0) for event in run.growth_events)]
    grid, at_grid = np.concatenate([[0.0], frames]), np.concatenate([[0.0], updates])
    measured = np.cumsum([0.0, *run.flops_of_decisions])
    total = measured[np.searchsorted([decision["frames"] for decision in run.decisions], frames, side="right")]
    for counts, starts, price in (
        (updates, np.interp(events, grid, at_grid), [cost.update for cost in costs]),
        (frames, np.array(events), [cost.frame for cost in costs]),
    ):
        for start, end, stage in zip(starts, [*starts[1:], np.inf], [0, *stages], strict=True):
            number_of = np.clip(counts - start, 0.0, end - start)
            total += np.where(number_of > 0, price[stage] * number_of, 0.0)  # what was not used may cost NaN
    return total


def series(run: Run, name: str) -> tuple[FloatArray, FloatArray]:
    """Frames and values of one diagnostic, named as `flatten` names it, where it is a number."""
    points = [(record["frames"], flatten(record).get(name)) for record in run.diagnostics]
    pairs = [(frames, value) for frames, value in points if value is not None]
    return np.array([frames for frames, _ in pairs], float), np.array([value for _, value in pairs], float)


def flatten(record: Record, prefix: str = "") -> dict[str, float]:
    """The finite numbers of a record, nested ones as `outer/inner`."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif not np.isnan(found := number(record, name, np.nan)):
            flat[f"{prefix}{name}"] = found
    return flat


def at_frames(curve: Curve, frames: float) -> Curve:
    """A curve up to a number of frames."""
    kept = curve.frames <= frames
    return Curve(*(getattr(curve, field.name)[kept] for field in dataclasses.fields(curve)))
