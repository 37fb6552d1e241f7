"""The command line: parse, call, exit code.

Exit codes: 0 done; 2 bad input (one line that names the remedy); 75 stopped by a signal with a checkpoint written; 1 anything else.
"""

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TextIO

from growtrain.commands.running import COMMANDS, complain
from growtrain.environments.failures import RunFailed
from growtrain.environments.games import Unplayable
from growtrain.settings.machine import process_limits
from growtrain.settings.text import ConfigError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_PATH_ERRORS = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EPERM, errno.ENAMETOOLONG)

# Before torch is imported: a thread that waits for the others spins for some 50 microseconds and then sleeps. OpenMP's default spins
# far longer, which costs a factor of ten as soon as another process wants the core; sleeping at once (PASSIVE) costs a tenth on a quiet
# machine.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words.pop(0) if words and not words[0].startswith("-") else "train"
    warnings.showwarning = _warnings_once()
    try:
        if name not in COMMANDS:
            raise ConfigError(
                f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}, or give only flags to train"
            )
        command: Callable[[Sequence[str]], int] = import_module(f"growtrain.commands.{name}").main
        return command(words)
    except (ConfigError, Unplayable) as error:
        complain(" ".join(str(error).split()))
        return 2
    except RunFailed as error:
        complain(f"{' '.join(str(error).split())}; the checkpoints made before are whole")
        return 1
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, ImportError, RuntimeError, SystemError) as error:
        if not (reason := _out_of_memory(error)):
            raise
        complain(reason)
        return 2 if process_limits() else 1
    except OSError as error:
        if error.errno == errno.ENOMEM:
            complain(_out_of_memory(MemoryError()))
            return 2 if process_limits() else 1
        if error.errno == errno.EACCES and error.filename:
            complain(f"{error.filename}: {error.strerror}: give this user access to it, or name another path")
            return 2
        if error.errno in _PATH_ERRORS and error.filename:
            complain(f"{error.filename}: {error.strerror}: name another path")
            return 2
        if error.errno not in _DISK_ERRORS:
            raise
        complain(f"{error}: free some space, or choose another directory with --run-dir")
        return 1
    except KeyboardInterrupt:
        complain("stopped at once; the checkpoints made before are whole")
        return 1
    finally:
        _let_go_of_stderr()


def _let_go_of_stderr() -> None:
    """Drops what it does not take: Python flushes it once more at exit and would then end with code 120."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stderr.fileno())


def _out_of_memory(error: Exception) -> str:
    """Says that memory ran out, and under which limit, in one line; empty if it was something else."""
    limits = " and ".join(f"{limit.name} of {limit.limit / 1e9:.2f} GB" for limit in process_limits())
    if isinstance(error, SystemError):  # of a library that found no memory while it was loaded
        exhausted = bool(limits)
    elif isinstance(error, ImportError):  # a library that cannot be mapped
        exhausted = bool(limits) and any(
            text in str(error) for text in ("cannot map", "failed to map", "allocate memory")
        )
    else:
        texts = ("can't allocate memory", "can't start new thread", "out of memory")
        exhausted = isinstance(error, MemoryError) or any(text in str(error) for text in texts)
    if not exhausted:
        return ""
    remedy = f"raise {limits}" if limits else "free some"
    return f"out of memory ({type(error).__name__}): {remedy}, or lower --replay-capacity, --width or --batch-size"


def _warnings_once() -> Callable[..., None]:
    """What shows a warning, the same one only once: ours are for whoever watches the run; others keep the place they come from."""
    said: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del file, line
        ours = "growtrain" in Path(filename).parts
        text = f"{'' if ours else f'{filename}:{lineno}: {category.__name__}: '}{message}"
        if text not in said:
            said.add(text)
            complain(f"warning: {text}")

    return show


if __name__ == "__main__":
    sys.exit(main())
