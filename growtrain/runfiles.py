"""The files of a run directory: one writer at a time, whole files or none, and nothing read that is not a plain file.

A lock is `flock` on `run.lock`, which the kernel releases when its holder dies, however that happens; the host and process id in it are for
the message. On a file system that does not carry `flock` between hosts, the lock guards against processes of one host only.

Units: sizes in bytes, frames in emulator frames.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growtrain.settings.text import ConfigError

PARTIAL = ".partial"  # what is being written bears this prefix or suffix until it is whole
_BLOCK = 1 << 22


class RunLocked(ConfigError):
    """Another process is writing in the run directory."""


class Unreadable(ConfigError):
    """A file is missing, is not a plain file, or has another size or content than it should have; the message names it."""


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[str | None]:
    """Holds a run directory, made if missing, for this process.

    Yields:
        None, or who held it and died without letting go (the lock was stale, and is taken over).

    Raises:
        RunLocked: another process holds it; nothing was touched.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "run.lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise RunLocked(f"{run_dir} is in use by {_holder(file.read(1000))}: stop it first") from error
        file.seek(0)
        content = file.read(1000)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        try:
            yield _holder(content) if content else None
        finally:
            file.truncate(0)


def require_unlocked(run_dir: Path) -> None:
    """Raises `RunLocked` if another process holds the run directory; takes nothing and leaves no trace."""
    try:
        with (run_dir / "run.lock").open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                raise RunLocked(f"{run_dir} is in use by {_holder(file.read(1000))}: stop it first") from error
    except FileNotFoundError:
        return


def _holder(content: str) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as JSON, at once and durably: a crash leaves the old file or the new one."""
    partial = path.with_name(path.name + PARTIAL)
    write_durably(partial, (json.dumps(value, indent=2) + "\n").encode())
    os.replace(partial, path)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Waits until the disk has what was written to a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Waits until the disk has the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_plain(path: Path, max_bytes: int) -> bytes:
    """The content of a plain file of at most `max_bytes`; raises `Unreadable` for anything else, links included."""
    with _open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise Unreadable(f"{path} has {size} bytes, more than the {max_bytes} it may have")
        content: bytes = file.read(max_bytes)
        return content


def verify_file(path: Path, num_bytes: int, sha256: str, *, from_disk: bool = False) -> None:
    """Raises `Unreadable`, naming the file, unless it is plain and has this size and hash.

    Args:
        path: the file.
        num_bytes: its size by the manifest.
        sha256: its hash by the manifest.
        from_disk: drop the cached pages of a file just synced, so that what is checked is what the disk holds.
    """
    with _open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != num_bytes:
            raise Unreadable(f"{path} has {size} bytes instead of {num_bytes}")
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
        if digest.hexdigest() != sha256:
            raise Unreadable(f"{path} is damaged: its content is not what was written (sha256)")


@contextlib.contextmanager
def _open_plain(path: Path) -> Iterator[Any]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise Unreadable(f"{path} is missing") from error
    except OSError as error:
        raise Unreadable(f"{path} cannot be read as a plain file ({error.strerror})") from error
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Unreadable(f"{path} is not a plain file")
        yield file


def cut_back(path: Path, frames: int) -> int:
    """Removes from a JSONL file the records after `frames`, and a torn last line; returns how many whole ones went.

    Records are in order of their `frames`; a line that cannot be read stays where a record that stays follows it.
    """
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        position, kept, cut = 0, 0, 0
        for line in file:
            position += len(line)
            try:
                beyond = json.loads(line)["frames"] > frames
            except (ValueError, KeyError, TypeError):
                continue
            if beyond or cut:
                cut += 1
            else:
                kept = position
        file.truncate(kept)
    return cut


def sweep(run_dir: Path) -> list[str]:
    """Removes what a killed process left half-written; returns the names."""
    litter = [*run_dir.glob(f"*{PARTIAL}"), *(run_dir / "checkpoints").glob(f"{PARTIAL}*")]
    litter += (run_dir / "checkpoints" / "replay").glob(f"{PARTIAL}*")
    for path in litter:
        remove(path)
    return [path.name for path in litter]


def remove(path: Path) -> None:
    """Removes a file, a link or a directory with all it holds; a missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
