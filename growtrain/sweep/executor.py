"""What runs cells: the interface of executors, and the child process that each of them starts for a cell.

A child is `python -m growtrain` with a command line, in a session of its own, so that Ctrl-C on a terminal reaches the driver alone. When
its parent is gone, however that happened, it gets SIGTERM, on which it writes a checkpoint and ends.

Deviations: 1. Linux only, as the affinity mask and the parent's death are told there.
"""

import ctypes
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

GROWTRAIN: Final = (sys.executable, "-m", "growtrain")
TAIL_LINES: Final = 20  # of what an attempt that failed said

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_LIBC: Final = ctypes.CDLL(None)  # loaded here, because little may be done between fork and exec
_TAIL_BYTES: Final = 4000


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How one attempt at a cell ended.

    Attributes:
        id: the cell.
        code: exit code, -N for a death by signal N; None if the process is lost with its worker.
        tail: the last lines it wrote on standard error, or why it was lost.
    """

    id: int
    code: int | None
    tail: str

    def __str__(self) -> str:
        if self.code is None:
            ending = "lost"
        elif self.code < 0:
            names = {number.value: number.name for number in signal.Signals}
            ending = f"killed by {names.get(-self.code, f'signal {-self.code}')}"
        else:
            ending = f"exit code {self.code}"
        return f"{ending}: {self.tail}" if self.tail else ending


class AbstractExecutor(ABC):
    """Runs cells, several at a time."""

    @abstractmethod
    def has_room(self) -> bool:
        """Whether another cell can be started now."""

    @abstractmethod
    def start(self, id: int, words: Sequence[str], run_dir: Path) -> None:
        """Starts `growtrain` with these words for the cell `id`; raises `OSError` where that cannot be done."""

    @abstractmethod
    def take_exits(self) -> list[Exit]:
        """The attempts that have ended since the last call."""

    @abstractmethod
    def stop(self, ids: Collection[int] | None = None) -> None:
        """Asks these cells, or all, to write their checkpoints and end; `take_exits` says when they have. May be asked again."""


class Child:
    """The process of one attempt; what it says goes to `stdout.log` and `stderr.log` in the run's directory.

    Args:
        command: all words.
        run_dir: made if missing.
        environment: set besides this process's own.
        cores: it is confined to these; () leaves it all of this process's.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        run_dir: Path,
        *,
        environment: Mapping[str, str] | None = None,
        cores: Collection[int] = (),
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._asked = False
        self._errors = run_dir / "stderr.log"
        parent = os.getpid()

        def prepare() -> None:
            # The driver's handler, inherited by the fork, would swallow it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before we asked to be told
                os.kill(os.getpid(), signal.SIGTERM)
            if cores:
                os.sched_setaffinity(0, cores)

        with (run_dir / "stdout.log").open("ab") as output, self._errors.open("ab") as errors:
            self._start = errors.tell()  # earlier attempts are above
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=os.environ | (environment or {}),
                start_new_session=True,
                preexec_fn=prepare,
            )

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Asks it to write a checkpoint and end; asking again does nothing, because a second signal would end it at once."""
        if not self._asked:
            self._asked = True
            self._process.send_signal(signal.SIGTERM)

    def tail(self) -> str:
        """The last lines of this attempt on standard error."""
        with self._errors.open("rb") as file:
            file.seek(max(self._start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
        return "\n".join(lines[-TAIL_LINES:])
