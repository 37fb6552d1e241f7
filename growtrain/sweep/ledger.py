"""The ledger of a sweep: one SQLite file that says which cells there are, who runs each, and how it ended.

    pending --claim--> running --done--> done
       ^                  |
       +---- release -----+---- fail ---> failed, after the last attempt; before it, pending again
             reclaim

A running cell is leased to a driver, which renews the lease by heartbeats. A lease is stale when its time is over, or when its driver ran
on this host and is no more; anybody may then take the cell back. Every change is one transaction that begins with the write lock (`BEGIN
IMMEDIATE`), and what a driver writes about a cell counts only while it holds the lease, so that one that was given up cannot speak for a
cell that another has.

The journal is SQLite's rollback journal: unlike a write-ahead log it needs no memory shared between processes, which drivers on several
hosts do not have. Their file system must carry POSIX locks between hosts.

Units: times in seconds since 1970, because they are compared between hosts; frames.
"""

import contextlib
import json
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self

import psutil  # type: ignore[import-untyped]

from growtrain.settings.text import ConfigError
from growtrain.sweep.cells import Cell
from growtrain.telemetry.display import format_duration

LEASE_SECONDS: Final = 300.0

_APPLICATION: Final = 0x67726F77  # "grow" in the file's header says whose file it is
_SCHEMA: Final = 1
_PATIENCE_SECONDS: Final = 60.0  # how long to wait for another driver's transaction
_CREATE: Final = """
CREATE TABLE cells (
  id INTEGER PRIMARY KEY,
  game TEXT NOT NULL,
  schedule TEXT NOT NULL,
  seed TEXT NOT NULL,  -- text, because a seed may be any integer
  fingerprint TEXT NOT NULL,
  words TEXT NOT NULL,  -- a JSON list
  run_dir TEXT NOT NULL UNIQUE,
  total_frames INTEGER NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('pending', 'running', 'done', 'failed')),
  attempts INTEGER NOT NULL CHECK (attempts >= 0),
  host TEXT,
  pid INTEGER,
  token TEXT,
  heartbeat REAL,
  lease_until REAL,
  last_error TEXT NOT NULL,
  frames INTEGER NOT NULL,
  created REAL NOT NULL,
  started REAL,
  ended REAL,
  UNIQUE (game, schedule, seed, fingerprint),
  CHECK ((status = 'running') = (host IS NOT NULL AND pid IS NOT NULL AND token IS NOT NULL AND lease_until IS NOT NULL))
)
"""
_NO_LEASE: Final = "host = NULL, pid = NULL, token = NULL, heartbeat = NULL, lease_until = NULL"


class LedgerError(ConfigError):
    """A ledger is missing, damaged, or not one; the message names the file and the remedy."""


class Ledger:
    """An open ledger, for one driver.

    Attributes:
        directory: the sweep's.
        host, pid, token: this driver; the token is new each time, because process ids come again.
    """

    def __init__(self, directory: Path, *, create: bool = False, lease_seconds: float = LEASE_SECONDS) -> None:
        """Opens `ledger.sqlite` in `directory`; raises `LedgerError` unless it is whole, or missing and `create`."""
        self.directory = directory.resolve()
        self.host, self.pid, self.token = socket.gethostname(), os.getpid(), uuid.uuid4().hex
        self.lease_seconds = lease_seconds
        self.path = self.directory / "ledger.sqlite"
        if not create and not self.path.exists():
            raise LedgerError(f"{directory} holds no sweep: name the directory that --dir was")
        with self._naming_the_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            # No implicit transactions: they would begin by reading and could then not be made to write.
            self._database = sqlite3.connect(self.path, timeout=_PATIENCE_SECONDS, isolation_level=None)
            self._database.row_factory = sqlite3.Row
            try:
                if create:
                    self._create()
                self.check_valid()
            except BaseException:
                self._database.close()
                raise

    def check_valid(self) -> None:
        """Raises `LedgerError` unless the file is a whole ledger of this version and every row makes sense."""
        with self._naming_the_file():
            if self._pragma("application_id") != _APPLICATION:
                raise LedgerError(f"{self.path} is not a growtrain ledger: choose another --dir")
            if self._pragma("user_version") != _SCHEMA:
                raise LedgerError(
                    f"{self.path} has schema {self._pragma('user_version')}, and this version reads {_SCHEMA}: use the one that made it"
                )
            if (found := self._pragma("integrity_check")) != "ok":  # constraints included
                raise sqlite3.DatabaseError(" ".join(found.split()))
            for cell in self.cells():
                path = PurePosixPath(cell.run_dir)
                if path.is_absolute() or ".." in path.parts or not all(isinstance(word, str) for word in cell.words):
                    raise sqlite3.DatabaseError(f"cell {cell.id} is not one")

    def submit(self, cells: Collection[Cell]) -> list[int]:
        """Adds the cells that are new, gives those that wait or failed the flags they come with now, and returns the ids of all."""
        with self._transaction():
            for cell in cells:
                self._database.execute(
                    "INSERT INTO cells (game, schedule, seed, fingerprint, words, run_dir, total_frames, "
                    "status, attempts, last_error, frames, created) VALUES (?, ?, ?, ?, ?, ?, ?, 'pending', 0, '', 0, ?) "
                    "ON CONFLICT (game, schedule, seed, fingerprint) DO UPDATE SET words = excluded.words WHERE status != 'running'",
                    (*_key(cell), json.dumps(cell.words), cell.run_dir, cell.total_frames, time.time()),
                )
            ids = {_key(cell): cell.id for cell in self.cells()}
        return [ids[_key(cell)] for cell in cells]

    def cells(self, ids: Collection[int] | None = None) -> list[Cell]:
        """All cells, or those, by id."""
        return [cell for cell in self._select("TRUE ORDER BY id") if ids is None or cell.id in ids]

    def reconcile(self, ids: Collection[int], finished: Callable[[Cell], bool]) -> None:
        """Brings those of these cells that nobody runs into line with their files: done is what has `finished` by them, and only that."""
        with self._transaction():
            for cell in self.cells(ids):
                if cell.status == "running" or finished(cell) == (cell.status == "done"):
                    continue
                if cell.status == "done":
                    self._set(cell.id, "status = 'pending', attempts = 0, frames = 0")
                else:
                    self._set(cell.id, "status = 'done', last_error = '', frames = total_frames")

    def retry(self, ids: Collection[int]) -> None:
        """Gives those of these cells that have failed all their attempts back."""
        with self._transaction():
            for cell in self.cells(ids):
                if cell.status == "failed":
                    self._set(cell.id, "status = 'pending', attempts = 0")

    def reclaim(self, max_attempts: int) -> list[Cell]:
        """Takes back the cells whose lease is stale; returns them as they were, with what became of the driver as their last error."""
        if not self._stale():  # looked at often, and the write lock is everybody's
            return []
        with self._transaction():
            stale = self._stale()
            lost = [replace(cell, last_error=self._what_became_of(cell)) for cell in stale]
            for cell in lost:
                self._set(cell.id, f"{_failed(max_attempts)}, last_error = ?", cell.last_error)
        return lost

    def is_stale(self, cell: Cell) -> bool:
        """Whether a running cell's driver is gone, or silent for longer than its lease."""
        if cell.token in (None, self.token):
            return False
        return self._is_gone(cell) or (cell.lease_until or 0.0) < time.time()

    def _is_gone(self, cell: Cell) -> bool:
        """Whether a driver other than this one is known not to run: what runs on another machine cannot be told."""
        return cell.host == self.host and (cell.pid == self.pid or not _is_alive(cell.pid or 0))

    def _what_became_of(self, cell: Cell) -> str:
        who = f"its driver, process {cell.pid} on {cell.host},"
        silent = time.time() - (cell.heartbeat or 0.0)
        return f"{who} is gone" if self._is_gone(cell) else f"{who} has been silent for {format_duration(silent)}"

    def claim(self, ids: Collection[int], is_free: Callable[[Cell], bool]) -> Cell | None:
        """Leases the next of these cells that is pending and free, those with the fewest attempts first; None without one."""
        if not self._pending(ids):
            return None
        with self._transaction():
            for cell in self._pending(ids):
                if is_free(cell):
                    now = time.time()
                    self._database.execute(
                        "UPDATE cells SET status = 'running', attempts = attempts + 1, host = ?, pid = ?, token = ?, heartbeat = ?, "
                        "lease_until = ?, started = ?, ended = NULL WHERE id = ?",
                        (self.host, self.pid, self.token, now, now + self.lease_seconds, now, cell.id),
                    )
                    return self.cells([cell.id])[0]
        return None

    def beat(self, frames: dict[int, int]) -> set[int]:
        """Renews this driver's leases and notes the frames done, by id; returns the ids that it still holds."""
        now = time.time()
        with self._transaction():
            for id, done in frames.items():
                self._set_mine(id, "frames = ?, heartbeat = ?, lease_until = ?", done, now, now + self.lease_seconds)
            return {cell.id for cell in self._select("token = ?", self.token)}

    def done(self, id: int) -> None:
        """A cell has reached its end."""
        with self._transaction():
            self._set_mine(
                id, f"status = 'done', last_error = '', frames = total_frames, ended = ?, {_NO_LEASE}", time.time()
            )

    def fail(self, id: int, error: str, frames: int, max_attempts: int) -> None:
        """An attempt failed: the cell waits for the next, or has failed if it was the last of `max_attempts` (0: there is no next)."""
        with self._transaction():
            self._set_mine(
                id, f"{_failed(max_attempts)}, last_error = ?, frames = ?, ended = ?", error, frames, time.time()
            )

    def release(self, id: int, frames: int) -> None:
        """A cell was stopped on request: it waits, and the attempt does not count."""
        with self._transaction():
            self._set_mine(
                id,
                f"status = 'pending', attempts = attempts - 1, frames = ?, ended = ?, {_NO_LEASE}",
                frames,
                time.time(),
            )

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _create(self) -> None:
        with self._transaction():
            if not self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._database.execute(_CREATE)
                self._database.execute(f"PRAGMA application_id = {_APPLICATION}")
                self._database.execute(f"PRAGMA user_version = {_SCHEMA}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise LedgerError(
                f"{self.path} cannot be opened ({error}): check its permissions, its disk and who else has it"
            ) from error
        except (sqlite3.Error, ValueError, TypeError) as error:
            if isinstance(error, LedgerError):
                raise
            raise LedgerError(
                f"{self.path} is damaged or no ledger ({error}): move it away and submit again; the runs beside it are taken up"
            ) from error

    def _select(self, where: str, *values: Any) -> list[Cell]:
        # All rows at once: a cursor that is left open holds a lock.
        rows = self._database.execute(f"SELECT * FROM cells WHERE {where}", values).fetchall()
        return [
            Cell(**dict(row) | {"seed": int(row["seed"]), "words": tuple(json.loads(row["words"]))}) for row in rows
        ]

    def _stale(self) -> list[Cell]:
        return [cell for cell in self._select("status = 'running'") if self.is_stale(cell)]

    def _pending(self, ids: Collection[int]) -> list[Cell]:
        pending = self._select("status = 'pending' ORDER BY attempts, id")
        return [cell for cell in pending if cell.id in ids]

    def _set(self, id: int, assignments: str, *values: Any) -> None:
        self._database.execute(f"UPDATE cells SET {assignments} WHERE id = ?", (*values, id))

    def _set_mine(self, id: int, assignments: str, *values: Any) -> None:
        self._database.execute(f"UPDATE cells SET {assignments} WHERE id = ? AND token = ?", (*values, id, self.token))

    def _pragma(self, name: str) -> Any:
        return self._database.execute(f"PRAGMA {name}").fetchone()[0]


def _key(cell: Cell) -> tuple[str, str, str, str]:
    return cell.game, cell.schedule, str(cell.seed), cell.fingerprint


def _failed(max_attempts: int) -> str:
    return f"status = CASE WHEN attempts >= {max_attempts:d} THEN 'failed' ELSE 'pending' END, {_NO_LEASE}"


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
