"""Commands in processes of their own, each forked from one that has loaded the libraries: a fresh interpreter takes seconds for that."""

import io
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

COMMAND = "import sys; from growtrain.__main__ import main; sys.exit(main(sys.argv[1:]))\n"
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["growtrain.commands.train", "growtrain.runs.run", "growtrain.sweep.cells"])


class Child:
    """A process that runs a script, and is used as one of `subprocess.Popen` is.

    Args:
        words: its command line.
        script: the source that it runs; left out, the command that the words name.
        environment: variables beside those of the first child's parent.
    """

    def __init__(self, words: list[str], script: str = COMMAND, environment: Mapping[str, str] | None = None) -> None:
        reading, writing = zip(*(_SERVER.Pipe(duplex=False) for _ in range(2)), strict=True)
        arguments = (script, words, dict(environment or {}), *writing)
        self._process = _SERVER.Process(target=_run, args=arguments)
        self._process.start()
        for each in writing:
            each.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(each.fileno()), encoding="utf-8") for each in reading)

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, a signal's number below 0; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it still says on standard output and standard error; raises `subprocess.TimeoutExpired`, and kills it, past `timeout` s."""
        said: dict[io.TextIOWrapper, str] = {}
        streams = (self.stdout, self.stderr)
        readers = [threading.Thread(target=lambda each=each: said.update({each: each.read()})) for each in streams]
        for reader in readers:
            reader.start()
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        for reader, stream in zip(readers, streams, strict=True):
            reader.join()
            stream.close()
        return said[self.stdout], said[self.stderr]


def run(words: list[str], script: str = COMMAND, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs a child to its end, within two minutes."""
    child = Child(words, script, environment)
    said, complained = child.communicate(timeout=120)
    assert child.returncode is not None
    return subprocess.CompletedProcess(words, child.returncode, said, complained)


def _run(script: str, words: list[str], environment: dict[str, str], stdout: Connection, stderr: Connection) -> None:
    os.environ.update(environment)
    for number, pipe in ((1, stdout), (2, stderr)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    sys.argv = ["-c", *words]
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(script, names)
