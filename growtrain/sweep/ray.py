"""Cells as Ray tasks, on one machine or many: each task runs the same command line in a child process where Ray puts it.

The driver alone writes the ledger; a task returns how its child ended. A task whose worker or node is lost is not repeated by Ray: its cell
is tried again like after any other failure, from its checkpoint. So the sweep's directory must be at the same path on every node.

Deviations: 1. Ray's CPUs are numbers, not cores: a child is told its threads by `--num-threads`.
"""

import os
import signal
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import ray

from growtrain.settings.machine import usable_cores
from growtrain.settings.text import ConfigError
from growtrain.sweep.executor import GROWTRAIN, TAIL_LINES, AbstractExecutor, Child, Exit

_OBJECT_STORE_BYTES: Final = 80 * 2**20  # about Ray's least: an exit code is all that is sent
_POLL: Final = 0.2  # seconds


def connect() -> None:
    """Joins the cluster that `RAY_ADDRESS` names or that runs on this machine, or starts one of this machine alone.

    Raises:
        ConfigError: the cluster of `RAY_ADDRESS` does not answer.
    """
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    try:
        ray.init(address="auto", **options)
    except ConnectionError as error:
        if address := os.environ.get("RAY_ADDRESS"):
            raise ConfigError(
                f"RAY_ADDRESS is {address}, where no Ray cluster answers: start it or unset it"
            ) from error
        cores = usable_cores()
        ray.init(address="local", num_cpus=cores, object_store_memory=_OBJECT_STORE_BYTES, **options)


class RayExecutor(AbstractExecutor):
    """Runs one task for each cell, as many at a time as the cluster has CPUs and GPUs for.

    Args:
        workers: so many at a time, for which an autoscaler may have to start nodes; None is as many as fit the nodes there are.
        cpus: of each task.
        gpus: of each task, maybe a fraction; None is 1 in a cluster that has any, else 0.
        prefix: what comes before the words of a cell, on every node.

    Raises:
        ConfigError: not even one task fits, and no autoscaler is counted on.
    """

    def __init__(
        self, *, workers: int | None, cpus: int, gpus: float | None, prefix: Sequence[str] = GROWTRAIN
    ) -> None:
        self._workers, self._cpus, self._prefix = workers, cpus, tuple(prefix)
        self._gpus = gpus if gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
        # Worker processes are not used twice, so that what is left of a cancelled task cannot reach the next.
        self._task = ray.remote(num_cpus=cpus, num_gpus=self._gpus, max_retries=0, max_calls=1)(_run)
        self._running: dict[Any, int] = {}
        if not self.has_room():
            have = ray.cluster_resources()
            raise ConfigError(
                f"no run of {cpus} CPUs and {self._gpus:g} GPUs fits a cluster of {have.get('CPU', 0):g} and {have.get('GPU', 0):g}: "
                "lower --cores-per-worker or --gpus-per-worker, or give --workers where an autoscaler starts nodes"
            )

    def has_room(self) -> bool:
        """Whether another task may be handed over, by the nodes that there are now."""
        if self._workers is not None:
            return len(self._running) < self._workers
        have = ray.cluster_resources()
        fit = int(have.get("CPU", 0) // self._cpus)
        if self._gpus:
            fit = min(fit, int(have.get("GPU", 0) // self._gpus))
        return len(self._running) < fit

    def start(self, id: int, words: Sequence[str], run_dir: Path) -> None:
        """Hands the task to Ray."""
        threads = [] if "--num-threads" in words else ["--num-threads", str(self._cpus)]
        task = self._task.remote([*self._prefix, *words, *threads], str(run_dir))
        self._running[task] = id

    def take_exits(self) -> list[Exit]:
        """The tasks that have ended or are lost."""
        if not self._running:
            return []
        exits = []
        ended, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        for task in ended:
            id = self._running.pop(task)
            try:
                code, tail = ray.get(task)
            except ray.exceptions.RayError as error:
                code, tail = None, "\n".join(str(error).strip().splitlines()[-TAIL_LINES:])
            exits.append(Exit(id=id, code=code, tail=tail))
        return exits

    def stop(self, ids: Collection[int] | None = None) -> None:
        """Cancels the tasks; one that runs passes it on to its child and waits for it."""
        for task, id in self._running.items():
            if ids is None or id in ids:
                ray.cancel(task)


def _run(command: Sequence[str], run_dir: str) -> tuple[int, str]:
    """Runs on a worker, in its main thread; returns the exit code and the last lines said."""
    cancelled = threading.Event()
    # Ray cancels by a made-up SIGINT, which does nothing where SIGINT is ignored, as it is in what a script starts in the background.
    signal.signal(signal.SIGINT, lambda number, frame: cancelled.set())
    child = Child(command, Path(run_dir))
    while (code := child.code) is None:
        if cancelled.is_set():
            child.stop()
        time.sleep(_POLL)
    return code, child.tail()
