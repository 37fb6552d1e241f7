"""Cells as processes of this machine, each with cores and a GPU of its own as far as there are enough.

Cores are dealt from this process's affinity mask, GPUs from what CUDA shows it. Drivers do not know of each other: several on one host
are kept apart by `taskset` and `CUDA_VISIBLE_DEVICES`.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pynvml

from growtrain.sweep.executor import GROWTRAIN, AbstractExecutor, Child, Exit


@dataclass(frozen=True)
class Slot:
    """What one process at a time may use: cores, and the GPU as `CUDA_VISIBLE_DEVICES` names it (None: all there are)."""

    cores: frozenset[int]
    gpu: str | None


def make_slots(
    workers: int | None, cores_per_worker: int | None, cores: Sequence[int], gpus: Sequence[str]
) -> list[Slot]:
    """Deals cores and GPUs round robin; with more workers than there are, some share.

    Args:
        workers: None is one for each GPU, or one.
        cores_per_worker: None is an equal share.
        cores: the cores there are.
        gpus: the GPUs there are.
    """
    workers = workers or max(1, len(gpus))
    share = min(cores_per_worker or max(1, len(cores) // workers), len(cores))
    return [
        Slot(
            frozenset(cores[(worker * share + index) % len(cores)] for index in range(share)),
            gpus[worker % len(gpus)] if gpus else None,
        )
        for worker in range(workers)
    ]


def visible_gpus() -> list[str]:
    """The GPUs that CUDA shows here, as `CUDA_VISIBLE_DEVICES` names them; none without a driver."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, listed.split(","))))
    try:
        pynvml.nvmlInit()
        try:
            return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return []


class LocalExecutor(AbstractExecutor):
    """Runs one child in each slot."""

    def __init__(self, slots: Sequence[Slot], prefix: Sequence[str] = GROWTRAIN) -> None:
        self._free, self._prefix = list(slots), tuple(prefix)
        self._running: dict[int, tuple[Slot, Child]] = {}

    def has_room(self) -> bool:
        """Whether a slot is free."""
        return bool(self._free)

    def start(self, id: int, words: Sequence[str], run_dir: Path) -> None:
        """Starts it in the next free slot."""
        slot = self._free[0]
        environment = {} if slot.gpu is None else {"CUDA_VISIBLE_DEVICES": slot.gpu}
        child = Child([*self._prefix, *words], run_dir, environment=environment, cores=slot.cores)
        self._running[id] = (self._free.pop(0), child)

    def take_exits(self) -> list[Exit]:
        """The children that have ended."""
        exits = []
        for id, (slot, child) in list(self._running.items()):
            if (code := child.code) is not None:
                exits.append(Exit(id=id, code=code, tail=child.tail()))
                del self._running[id]
                self._free.append(slot)
        return exits

    def stop(self, ids: Collection[int] | None = None) -> None:
        """Sends SIGTERM."""
        for id, (_, child) in self._running.items():
            if ids is None or id in ids:
                child.stop()
