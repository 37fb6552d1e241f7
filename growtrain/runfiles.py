"""The files of a run directory: one writer at a time, whole files or none, and nothing read that is not a plain file.

A lock is `flock` on `run.lock`, which the kernel releases when its holder dies, however that happens; the host and process id in it are for
the message. On a file system that does not carry `flock` between hosts, the lock guards against processes of one host only; on one that has
no locks at all a run goes on without, which is said. Everything else that a run asks of a file system is tried when it is locked.

Units: sizes in bytes, frames in emulator frames.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TextIO

from growtrain.records import record_files
from growtrain.settings.text import ConfigError

STOPPED: Final = 75  # exit code of what a signal stopped, with something written to go on from
INITIAL_WEIGHTS: Final = "initial.safetensors"  # of a file, which a run begins with
PARTIAL = ".partial"  # what is being written bears this prefix or suffix until it is whole
_BLOCK = 1 << 22

# What file systems answer to a call that they do not have: FUSE, CIFS, 9p, NFS without a lock daemon, Lustre without `-o flock`.
_NO_SUCH_CALL = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_NO_LOCKS = _NO_SUCH_CALL | {errno.ENOLCK}
# Opening a directory to sync it, or syncing it, may be refused too where everything in it can be synced (as PostgreSQL's `fsync_fname`).
_NO_DIRECTORY_SYNC = _NO_SUCH_CALL | {errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES})  # which need no explanation


class RunLocked(ConfigError):
    """Another process is writing in the run directory."""


class Unreadable(ConfigError):
    """A file is missing, is not a plain file, or has another size or content than it should have; the message names it."""


class Forbidden(Unreadable):
    """A file may not be read by this user, whatever it holds."""


class Unusable(ConfigError):
    """A directory lacks something that a run needs of it; the message names what."""


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[str | None]:
    """Holds a run directory, made if missing, for this process, once everything that a run does there has been tried.

    Warns where there are no locks, and where names cannot be synced.

    Yields:
        None, or who held it and died without letting go (the lock was stale, and is taken over).

    Raises:
        RunLocked: another process holds it; nothing was touched.
        Unusable: a run could not be written there.
        OSError: the disk is full or read-only, or the directory may not be written in.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "run.lock").open("a+", encoding="utf-8", errors="replace") as file:
        try:
            without = _lock(file, run_dir, fcntl.LOCK_EX)
        except OSError as error:
            raise Unusable(f"{run_dir} cannot be locked ({error.strerror}): choose another directory") from error
        file.seek(0)
        content = file.read(1000)
        if without:
            named = f"; {_holder(content)} was the last to say that it does" if content else ""
            warnings.warn(
                f"{run_dir} cannot be locked ({without}), so the run goes on without a lock: make sure that no other process "
                f"writes there{named}",
                stacklevel=1,
            )
        for directory in (run_dir, run_dir / "checkpoints", run_dir / "checkpoints" / "replay"):
            if directory.is_dir():
                try_out(directory)
        if unsynced := sync_directory(run_dir):
            warnings.warn(
                f"{run_dir} is on a file system that cannot sync a directory ({unsynced}): files are synced, but after a power cut "
                "the newest may be missing",
                stacklevel=1,
            )
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        try:
            yield _holder(content) if content and not without else None
        finally:
            file.truncate(0)


def require_unlocked(run_dir: Path) -> None:
    """Raises `RunLocked` if another process is known to hold the run directory; takes nothing and leaves no trace."""
    try:
        file = (run_dir / "run.lock").open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    with file, contextlib.suppress(OSError):  # whoever wants to write there will hear of an error
        _lock(file, run_dir, fcntl.LOCK_SH)


def _lock(file: TextIO, run_dir: Path, operation: int) -> str | None:
    """Locks a file.

    Returns:
        None, or why the file system locks nothing.

    Raises:
        RunLocked: another process has it locked.
        OSError: it failed otherwise.
    """
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
            file.seek(0)
            raise RunLocked(f"{run_dir} is in use by {_holder(file.read(1000))}: stop it first") from error
        if error.errno not in _NO_LOCKS:
            raise
        return error.strerror
    return None


def try_out(directory: Path) -> None:
    """Does once what a checkpoint does: writes a file, syncs it, reads it back, and renames it and a directory; leaves nothing.

    Raises:
        Unusable: one of these cannot be done in this directory.
        OSError: the disk is full or read-only, or the directory may not be written in.
    """
    content, step = os.urandom(64), "write a file"
    old, new = (directory / f"{PARTIAL}-{name}-{os.getpid()}" for name in ("try", "tried"))
    try:
        old.mkdir()
        write_durably(old / "file", content)
        step = "replace a file by another"
        (old / "renamed").touch()
        os.replace(old / "file", old / "renamed")
        step = "rename a directory"
        os.replace(old, new)
        step = "read back what was written"
        if read_plain(new / "renamed", 2 * len(content)) != content:
            raise Unusable(f"{directory} gives back other bytes than were written: choose another directory")
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise
        raise Unusable(
            f"{directory} cannot hold a run, because one cannot {step} there ({error.strerror}): choose another directory"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            remove(old)
            remove(new)


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
        _sync(file.fileno())


def sync_file(path: Path) -> None:
    """Waits until the disk has what was written to a file."""
    with path.open("rb") as file:
        _sync(file.fileno())


def _sync(descriptor: int) -> None:
    """Waits for the disk, where the file system has anything to wait for."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise


def sync_directory(path: Path) -> str | None:
    """Waits until the disk has the names in a directory; returns None, or why this file system cannot be asked to."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
        return error.strerror
    return None


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
            with contextlib.suppress(OSError):  # advice that not every file system takes
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
    except PermissionError as error:
        raise Forbidden(f"{path} may not be read ({error.strerror}): give this user access to it") from error
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


def published(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that bear a final name, their frames in twelve digits or more, newest first; nothing else there is one.

    Raises:
        OSError: what is there cannot be read.
    """
    try:
        paths = list((run_dir / "checkpoints").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((p for p in paths if re.fullmatch("[0-9]{12,}", p.name)), key=lambda path: -int(path.name))


def require_directory(path: Path, wanted: str) -> None:
    """Raises `ConfigError` unless `path` is a directory; commands ask before they load libraries, which takes seconds."""
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory: name {wanted}")


def require_checkpoints(run_dir: Path) -> None:
    """Raises `ConfigError` unless a run has a directory for its checkpoints."""
    if not (run_dir / "checkpoints").is_dir():
        raise ConfigError(f"{run_dir} has no checkpoints: name the directory of a run that made one")


def require_new(run_dir: Path, given_by: str) -> None:
    """Raises `ConfigError` if a run is in a directory, or what is left of one, which a new run would be mixed with."""
    if (run_dir / "config.json").exists():
        raise ConfigError(
            f"{given_by} {run_dir} already holds a run: go on with it by growtrain resume {run_dir}, or choose another directory"
        )
    others = (run_dir / "summary.json", run_dir / INITIAL_WEIGHTS)
    left = [*record_files(run_dir), *(path for path in others if path.exists()), *published(run_dir)]
    if left:
        raise ConfigError(
            f"{given_by} {run_dir} holds what is left of another run ({left[0].relative_to(run_dir)}): choose another directory or empty it"
        )


def sweep(run_dir: Path) -> list[str]:
    """Removes what a killed process left half-written; returns the names."""
    checkpoints = run_dir / "checkpoints"
    litter = [*run_dir.glob(f"*.json{PARTIAL}")]
    litter += [path for each in (run_dir, checkpoints, checkpoints / "replay") for path in each.glob(f"{PARTIAL}*")]
    for path in litter:
        remove(path)
    return [path.name for path in litter]


def remove(path: Path) -> None:
    """Removes a file, a link or a directory with all it holds; a missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
