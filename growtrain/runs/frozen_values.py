"""The values of what is frozen whole, kept in the replay: a column beside the frames, with F(s) of every row that can be read.

F is a fixed function of the observation (see `networks.snapshot`), so it is computed once for every row: when the row is written, and for
what is there already in one sweep after an injection. A row whose F is missing holds NaN, which no update survives unseen.

Units: rows are agent steps.
"""

import time
import warnings

import torch
from torch import Tensor

from growtrain.growth.transaction import GrowthFailed
from growtrain.learners.base import AbstractLearner
from growtrain.replay.ring import Column, LaneRing

COLUMN = "frozen_value"
_CHUNK = 256  # rows of a sweep's forward pass
_LONG_SWEEP = 10.0  # seconds, from which it is announced


class FrozenValues:
    """Keeps the column of a learner's frozen network in its replay.

    Args:
        learner: whose `frozen_value` it holds.
        ring: gets the column, or has it from a checkpoint.
    """

    def __init__(self, learner: AbstractLearner, ring: LaneRing) -> None:
        self.learner, self.ring = learner, ring
        self._written = ring.written.copy()  # the rows that are taken account of

    @property
    def kept(self) -> bool:
        """Whether there is anything to keep."""
        return COLUMN in self.ring.columns

    def prepare(self) -> None:
        """Makes room for the column; raises `GrowthFailed` where there is no memory for it, before anything is frozen."""
        if self.kept:
            return
        try:
            self.ring.add_column(COLUMN, Column((self.learner.spec.num_outputs,), torch.float32))
        except (RuntimeError, MemoryError) as error:
            raise GrowthFailed(f"no memory for the frozen network's values in the replay: {error}") from error
        self.ring.columns[COLUMN].fill_(torch.nan)

    def release(self) -> None:
        """Gives up the column where nothing is frozen whole, as after a growth that was rolled back, or a reset."""
        if self.kept and self.learner.frozen_value(self.ring.newest()) is None:
            self.ring.drop_column(COLUMN)

    def sweep(self) -> None:
        """Computes the values of all rows that can be read anew, after an injection; nothing is kept where nothing is frozen whole."""
        self.release()
        if not self.kept:
            return
        self.restored()
        start, chunks = time.perf_counter(), torch.split(self.ring.rows_read(), _CHUNK)
        for done, rows in enumerate(chunks, start=1):
            self._write(rows)
            if done in (8, len(chunks)) and self.ring.device.type == "cuda":
                torch.cuda.synchronize()  # the pause is a wall-clock claim
            if done == 8 and (seconds := (time.perf_counter() - start) * len(chunks) / done) > _LONG_SWEEP:
                warnings.warn(
                    f"the frozen network's values of {len(chunks) * _CHUNK} rows take about {seconds:.0f} s",
                    stacklevel=2,
                )

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
        self.restored()
        if len(last := arrived[arrived != newest]):  # of episodes that ended, which nobody acts on
            self._write(last)

    def newest(self) -> Tensor | None:
        """F of the lanes' newest rows (num_lanes, A), None where nothing is frozen whole."""
        if not self.kept:
            return None
        if (
            self._written != self.ring.written
        ).any():  # episodes began on all lanes, as where a chain of games switches
            self._write(self.ring.newest_rows())
            self.restored()
        return self.ring.read(COLUMN, self.ring.newest_rows())

    def restored(self) -> None:
        """Takes the column to hold what belongs to every row of the ring, as after a ring was loaded."""
        self._written[:] = self.ring.written

    def _write(self, rows: Tensor) -> None:
        values = self.learner.frozen_value(self.ring.observations(rows))
        assert values is not None
        self.ring.write(COLUMN, rows, values)
