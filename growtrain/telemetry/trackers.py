"""Weights & Biases and Trackio: copies of a run's records for whoever follows many runs. The JSONL files stay the record.

Whatever a tracker does may wait for a network, so it does all of it, from opening to finishing, in a thread of its own. Training puts
numbers into a queue and never waits; only the end of a run does, for a bounded time. The first failure is said once and ends the
tracking, not the run. Where W&B cannot be reached, it records on disk, for `wandb sync` to send later.

A resumed run goes on with the same run of the tracker, whose identifier lies in the run's directory; a fork has its own. What was logged
after the checkpoint cannot be taken back there: those frames are then shown twice. W&B drops what comes at a step below an earlier one,
so that frames are an axis of their own there; Trackio takes them as its step.

Units: frames; seconds.
"""

import contextlib
import importlib
import json
import logging
import queue
import threading
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final

from growtrain.runfiles import Unreadable, read_plain, write_json
from growtrain.settings.config import Config, Tracker
from growtrain.settings.text import ConfigError

_WAITING: Final = 10_000  # records that may wait for a tracker: some 10 MB, more than a run of 200M frames makes
_REACH_SECONDS: Final = 30.0  # W&B's wait for its server, at the beginning and at the end
_CLOSE_SECONDS: Final = 75.0  # the wait for a tracker at the end of a run: longer than both of these

_log = logging.getLogger(__name__)


class AbstractTracker(ABC):
    """One run of a tracker. Everything but `check` may block, and may raise anything.

    Args:
        config: of the run.
        run_dir: its directory.
        id: the same after a resume, and no other run's.
    """

    def __init__(self, config: Config, run_dir: Path, id: str) -> None:
        self.config, self.run_dir, self.id = config, run_dir, id
        self.name = f"{config.game}-{config.schedule}-s{config.seed}-{id}"

    @staticmethod
    @abstractmethod
    def check() -> None:
        """Raises `ImportError` or `AttributeError` without its package, and `ConfigError` if it cannot work; waits for no network."""

    @abstractmethod
    def open(self) -> None:
        """Begins the tracker's run, or goes on with it."""

    @abstractmethod
    def log(self, frames: int, scalars: dict[str, float]) -> None:
        """Takes the numbers of one record."""

    @abstractmethod
    def finish(self, failed: bool) -> None:
        """Sends what is left and ends the tracker's run; `failed` marks it so."""


class WandbTracker(AbstractTracker):
    """Weights & Biases; its own files are in the run's directory."""

    @staticmethod
    def check() -> None:
        """Asks for the login where there is a terminal, before a display is on it."""
        wandb = importlib.import_module("wandb")
        if wandb.setup().settings.mode == "online":
            try:
                wandb.login(verify=False)
            except Exception as error:
                raise ConfigError(f"--track wandb: {error} To record on disk instead: WANDB_MODE=offline") from error

    def open(self) -> None:
        """Offline where the server is not reached."""
        wandb = importlib.import_module("wandb")
        arguments: dict[str, Any] = {
            "project": self.config.track_project,
            "id": self.id,
            "name": self.name,
            "config": self.config.to_dict(),
            "dir": str(self.run_dir),
            "resume": "allow",
            "allow_val_change": True,
            "settings": wandb.Settings(
                console="off", quiet=True, init_timeout=_REACH_SECONDS, finish_timeout=_REACH_SECONDS
            ),
        }
        try:
            self._run = wandb.init(**arguments)
        except Exception as error:
            wandb.teardown()  # its service still has a run of this identifier in use
            self._run = wandb.init(**arguments, mode="offline")
            place = Path(self._run.dir).parent
            _log.warning("wandb records offline (%s): send it later by wandb sync %s", _one_line(error), place)
        self._run.define_metric("frames")
        self._run.define_metric("*", step_metric="frames")

    def log(self, frames: int, scalars: dict[str, float]) -> None:
        """Frames are an axis among the numbers; the step is W&B's own count."""
        self._run.log({"frames": frames, **scalars})

    def finish(self, failed: bool) -> None:
        """A run that was stopped counts as finished, until it is resumed."""
        self._run.finish(exit_code=int(failed))


class TrackioTracker(AbstractTracker):
    """Trackio; local unless `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` says otherwise."""

    @staticmethod
    def check() -> None:
        """Needs only the package."""
        _ = importlib.import_module("trackio").init  # which an empty folder of that name lacks

    def open(self) -> None:
        """Runs are told apart by their names alone."""
        trackio = importlib.import_module("trackio")
        self._run = trackio.init(
            self.config.track_project, name=self.name, config=self.config.to_dict(), resume="allow", embed=False
        )

    def log(self, frames: int, scalars: dict[str, float]) -> None:
        """The step is frames."""
        self._run.log(scalars, step=frames)

    def finish(self, failed: bool) -> None:
        """Trackio knows no failed runs."""
        self._run.finish()


TRACKERS: Final[dict[Tracker, type[AbstractTracker]]] = {"wandb": WandbTracker, "trackio": TrackioTracker}


class TrackerSink:
    """Hands records to a tracker, in a thread; no failure and no delay of the tracker reaches the run."""

    def __init__(self, name: Tracker, tracker: AbstractTracker) -> None:
        self._name, self._tracker = name, tracker
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_WAITING)
        self._off = self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def write(self, frames: int, scalars: dict[str, float]) -> None:
        """The numbers of one record, by name."""
        self._put((frames, scalars))

    def close(self, failed: bool = False) -> None:
        """Ends the tracker's run; waits until it has sent what it has, but not for ever."""
        self._failed = failed
        self._put(None)
        if not self._off:
            self._thread.join(_CLOSE_SECONDS)
            if self._thread.is_alive():
                self._give_up(f"it has not ended after {_CLOSE_SECONDS:.0f} s")

    def _put(self, item: tuple[int, dict[str, float]] | None) -> None:
        if not self._off:
            try:
                self._queue.put_nowait(item)
            except queue.Full:
                self._give_up(f"it hangs, with {_WAITING} records waiting")

    def _work(self) -> None:
        try:
            self._tracker.open()
            while (item := self._queue.get()) is not None:
                self._tracker.log(*item)
            self._tracker.finish(self._failed)
        except Exception as error:  # the run outlives any failure of a convenience
            self._give_up(f"{type(error).__name__}: {_one_line(error)}")

    def _give_up(self, reason: str) -> None:
        if not self._off:
            self._off = True
            _log.warning("%s is off from here on (%s); the JSONL files are complete", self._name, reason)


def check_trackers(config: Config) -> None:
    """Raises `ConfigError` where a tracker that was asked for is not installed, or not logged in."""
    for name in config.trackers:
        try:
            TRACKERS[name].check()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"--track {name}: {error}: install it by python -m pip install 'growtrain[{name}]', or leave --track out"
            ) from error


def open_trackers(config: Config, run_dir: Path) -> list[TrackerSink]:
    """The trackers of a run, each opening in its thread; raises `OSError` if the run's identifier cannot be written."""
    if not config.trackers:
        return []
    id = _run_id(run_dir)
    return [TrackerSink(name, TRACKERS[name](config, run_dir, id)) for name in config.trackers]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _run_id(run_dir: Path) -> str:
    """The run's identifier in its trackers, made with its first use: neither its path nor its settings are its alone."""
    path = run_dir / "trackers.json"
    with contextlib.suppress(Unreadable, ValueError, KeyError, TypeError):
        return str(json.loads(read_plain(path, 1 << 10))["id"])
    id = uuid.uuid4().hex[:12]
    write_json(path, {"id": id})
    return id
