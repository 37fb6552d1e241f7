"""The values of what is frozen whole, kept in the replay: a column beside the frames, with F(s) of every row that can be read.

F is a fixed function of the observation (see `networks.snapshot`), so it is computed once for every row: when the row is written. An
injection adds the values of the network that it freezes to those that are there, in one sweep that costs the same at every injection, as
part of the same transaction. A row whose F is missing holds NaN, which no update survives unseen.

Units: rows are agent steps.
"""

import time
import warnings
from typing import Any

import torch
from torch import Tensor

from growtrain.environments.base import Spec
from growtrain.growth.transaction import GrowthFailed
from growtrain.learners.base import AbstractLearner
from growtrain.learners.saved import read_saved
from growtrain.networks.snapshot import ROWS_AT_ONCE, num_snapshots
from growtrain.replay.ring import Column, LaneRing

COLUMN = "frozen_value"
_DTYPE = torch.float32
_LONG_SWEEP = 10.0  # seconds, from which it is announced


class FrozenValues:
    """Keeps the column of a learner's frozen network in its replay.

    Args:
        learner: whose `frozen_value` it holds.
        ring: gets the column, at once or at the first injection, or has it from a checkpoint.
    """

    def __init__(self, learner: AbstractLearner, ring: LaneRing) -> None:
        self.learner, self.ring = learner, ring
        self._written = ring.written.copy()  # the rows that are taken account of
        self._before: Tensor | None = None  # the column as it was before an injection that is being carried out
        if not self.kept and self._needed:  # something is frozen from the start, when episodes have begun
            self.prepare()
            self._written[:] = 0

    @property
    def kept(self) -> bool:
        """Whether there is anything to keep."""
        return COLUMN in self.ring.columns

    @property
    def _needed(self) -> bool:
        return any(num_snapshots(online) for online, _ in self.learner.networks.values())

    def prepare(self) -> None:
        """Makes room for what an injection computes; raises `GrowthFailed` where there is no memory for it, before anything is frozen."""
        try:
            if self.kept:
                self._before = self.ring.columns[COLUMN].clone()
                return
            self.ring.add_column(COLUMN, Column((self.learner.spec.num_outputs,), _DTYPE))
        except (RuntimeError, MemoryError, OSError) as error:  # an OSError is of a mapping
            raise GrowthFailed(f"no memory for the frozen network's values in the replay: {error}") from error
        self.ring.columns[COLUMN].fill_(torch.nan)

    def sweep(self) -> None:
        """Adds what a newly frozen network says to the values of all rows that can be read; where it raises, `undo` what it has done."""
        start, chunks = time.perf_counter(), torch.split(self.ring.rows_read(), ROWS_AT_ONCE)
        for done, rows in enumerate(chunks, start=1):
            self._write(rows, before=self.ring.read(COLUMN, rows))
            if done == 8:
                if self.ring.device.type == "cuda":
                    torch.cuda.synchronize()  # the estimate is of what has been done
                if (seconds := (time.perf_counter() - start) * len(chunks) / done) > _LONG_SWEEP:
                    warnings.warn(
                        f"the frozen network's values of {len(chunks) * ROWS_AT_ONCE} rows take about {seconds:.0f} s",
                        stacklevel=2,
                    )
        self._all_written()

    def undo(self) -> None:
        """Puts the column back as it was before an injection that was rolled back."""
        if self._before is not None:
            self.ring.columns[COLUMN].copy_(self._before)
        self.settle()

    def settle(self) -> None:
        """Gives up what an injection needed, and the column where nothing is frozen whole, as after a reset."""
        self._before = None
        if self.kept and not self._needed:
            self.ring.drop_column(COLUMN)

    def extend(self, left: Tensor) -> None:
        """Computes those of the rows that a step has written.

        Args:
            left: (num_lanes,) int64, the rows that the step's transitions leave, as `ring.extend` returns them.
        """
        if not self.kept:
            return
        arrived, newest = self.ring.following(left), self.ring.newest_rows()
        if (self._written != self.ring.written - 1 - (arrived != newest).numpy()).any():
            self._write(left)  # episodes began before the step, and nobody asked for their values
        self._write(newest)
        self._all_written()
        if len(last := arrived[arrived != newest]):  # of episodes that ended, which nobody acts on
            self._write(last)

    def newest(self) -> Tensor | None:
        """F of the lanes' newest rows (num_lanes, A), None where nothing is frozen whole."""
        if not self.kept:
            return None
        self.complete()
        return self.ring.read(COLUMN, self.ring.newest_rows())

    def complete(self) -> None:
        """Computes those of the newest rows where episodes began on all lanes, as where a chain of games switches, and nobody has asked."""
        if self.kept and (self._written != self.ring.written).any():
            self._write(self.ring.newest_rows())
            self._all_written()

    def loaded(self) -> None:
        """Takes over the column of a ring that was loaded; what the saved ring had not reached is missing, as in a ring that was not."""
        if self.kept:
            self.ring.unwritten(COLUMN).fill_(torch.nan)
        self._all_written()

    def check_valid(self) -> None:
        """Asserts that no value is missing of a row that can be read; slow, since it looks at every row."""
        if self.kept:
            missing = int(self.ring.read(COLUMN, self.ring.rows_read()).isnan().any(1).sum())
            assert not missing, f"the frozen network's values of {missing} rows are missing"

    def _all_written(self) -> None:
        """Takes the column to hold what belongs to every row of the ring."""
        self._written[:] = self.ring.written

    def _write(self, rows: Tensor, before: Tensor | None = None) -> None:
        values = self.learner.frozen_value(self.ring.observations(rows), before)
        assert values is not None
        self.ring.write(COLUMN, rows, values)


def check_saved_column(state: dict[str, Any]) -> None:
    """Raises `ValueError` unless a run's saved replay has the column that its learner needs, and no other.

    Args:
        state: what the run's `state_dict` gave.
    """
    ring, frozen = state["ring"], read_saved(state["learner"]).snapshots
    size = (*ring["transitions"].shape[:2], Spec.from_dict(state["spec"]).num_outputs)
    needed = {COLUMN: (size, _DTYPE)} if frozen else {}
    saved = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in ring.get("columns", {}).items()}
    if saved != needed:
        raise ValueError(
            f"the replay has the columns {saved or 'none'} where {frozen} frozen networks need {needed or 'none'}"
        )
