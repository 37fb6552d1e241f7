"""The driver of a sweep: claims cells from the ledger, has an executor run them, and writes down how they end.

Several drivers may share a ledger. One that finds nothing left to claim waits for the others' cells, and takes over those whose driver
is gone.

Units: seconds.
"""

import time
from collections.abc import Callable, Collection
from signal import SIGTERM
from typing import Final

from growtrain.runfiles import STOPPED, RunLocked, require_unlocked
from growtrain.sweep.cells import Cell, growtrain_words, has_other_settings, progress
from growtrain.sweep.executor import AbstractExecutor, Exit
from growtrain.sweep.ledger import Ledger
from growtrain.sweep.table import AbstractTable

_POLL: Final = 0.2  # how often children are looked at
_LOOK: Final = 2.0  # how often the ledger is read, and the table drawn
_BEATS_PER_LEASE: Final = 5


class Driver:
    """Runs cells until each is done or has failed, here or by another driver.

    Args:
        ledger: where the cells are.
        ids: which of its cells.
        executor: runs them.
        table: shows them.
        max_attempts: how often a cell is started before it counts as failed.
    """

    def __init__(
        self,
        ledger: Ledger,
        ids: Collection[int],
        executor: AbstractExecutor,
        table: AbstractTable,
        *,
        max_attempts: int,
    ) -> None:
        self._ledger, self._ids = ledger, frozenset(ids)
        self._executor, self._table = executor, table
        self._max_attempts = max_attempts
        self._running: dict[int, Cell] = {}
        self._next_beat = 0.0

    def run(self, should_stop: Callable[[], bool] = lambda: False, *, retry_failed: bool = False) -> int:
        """Does it.

        Args:
            should_stop: asked all the time; True stops what runs, each with a checkpoint.
            retry_failed: cells that had failed before get all their attempts back.

        Returns:
            0 if all are done, `STOPPED` if it was stopped before they were, 1 if any failed.
        """
        self._take_back()
        self._reconcile()
        if retry_failed:
            self._ledger.retry(self._ids)
        next_look = 0.0
        try:
            while not should_stop():
                exits = self._settle()
                if exits or time.monotonic() >= next_look:
                    next_look = time.monotonic() + _LOOK
                    self._beat()
                    if self._take_back():
                        self._reconcile()
                    self._claim()
                    if all(cell.status in ("done", "failed") for cell in self._show()):
                        break
                time.sleep(_POLL)
        finally:
            self._stop()
        statuses = {cell.status for cell in self._show()}
        if statuses & {"pending", "running"}:
            return STOPPED
        return 1 if "failed" in statuses else 0

    def _settle(self) -> list[Exit]:
        """Writes down what has ended; returns it."""
        exits = self._executor.take_exits()
        for exit in exits:
            self._end(exit)
        return exits

    def _stop(self) -> None:
        """Has all that runs end with a checkpoint; only then is it written down, because the ledger may be what failed."""
        exits: list[Exit] = []
        while len(exits) < len(self._running):
            self._executor.stop()  # again and again: what is just being started may not hear the first
            exits += self._executor.take_exits()
            time.sleep(_POLL)
        for exit in exits:
            self._end(exit, stopping=True)

    def _end(self, exit: Exit, *, stopping: bool = False) -> None:
        cell, directory = self._running.pop(exit.id), self._ledger.directory
        frames = progress(directory / cell.run_dir).frames
        if exit.code == 0 and has_other_settings(cell, directory):
            remedy = "growtrain was changed meanwhile; the same sweep again makes a new cell with the settings of now"
            self._ledger.fail(cell.id, f"its run has other settings: {remedy}", frames, max_attempts=0)
        elif exit.code == 0:
            self._ledger.done(cell.id)
        elif exit.code == STOPPED or (stopping and exit.code in (-SIGTERM, None)):
            self._ledger.release(cell.id, frames)
        else:
            self._ledger.fail(cell.id, str(exit), frames, self._max_attempts)
        self._table.ended(self._ledger.cells([cell.id])[0])

    def _claim(self) -> None:
        """Starts as many cells as there is room for."""
        while self._executor.has_room() and (cell := self._ledger.claim(self._ids, self._is_unlocked)):
            self._running[cell.id] = cell
            directory = self._ledger.directory
            if has_other_settings(cell, directory):  # before anything is computed
                self._end(Exit(id=cell.id, code=0, tail=""))
                continue
            self._table.started(cell)
            try:
                self._executor.start(cell.id, growtrain_words(cell, directory), directory / cell.run_dir)
            except OSError as error:
                self._end(Exit(id=cell.id, code=None, tail=str(error)))

    def _is_unlocked(self, cell: Cell) -> bool:
        """Whether no process has the run, such as a child that still writes its checkpoint after its driver was killed."""
        try:
            require_unlocked(self._ledger.directory / cell.run_dir)
        except RunLocked:
            return False
        except OSError:  # starting it will say what is wrong
            return True
        return True

    def _beat(self) -> None:
        """Renews the leases now and then; a cell whose lease is lost, as after a suspension, is stopped: another driver may have it."""
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + self._ledger.lease_seconds / _BEATS_PER_LEASE
            directory = self._ledger.directory
            frames = {id: progress(directory / cell.run_dir).frames for id, cell in self._running.items()}
            self._executor.stop(self._running.keys() - self._ledger.beat(frames))

    def _take_back(self) -> bool:
        """Frees the cells of drivers that are gone; whether there were any."""
        reclaimed = self._ledger.reclaim(self._max_attempts)
        for cell in reclaimed:
            self._table.reclaimed(cell)
        return bool(reclaimed)

    def _reconcile(self) -> None:
        """Brings the cells that nobody runs into line with their runs' own files."""
        directory = self._ledger.directory
        self._ledger.reconcile(
            self._ids,
            lambda cell: progress(directory / cell.run_dir).finished and not has_other_settings(cell, directory),
        )

    def _show(self) -> list[Cell]:
        cells = self._ledger.cells(self._ids)
        self._table.show(cells)
        return cells
