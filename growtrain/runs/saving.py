"""Saving: when a checkpoint is due, with the records before it on the disk, and what follows when it cannot be written.

Units: frames.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from growtrain.learners.base import AbstractLearner
from growtrain.records import record_files
from growtrain.replay.ring import LaneRing
from growtrain.replay.segments import Segment
from growtrain.runfiles import sync_file
from growtrain.runs.checkpoint import CheckpointFailed, CheckpointWriter
from growtrain.settings.budget import crossed
from growtrain.settings.config import Config
from growtrain.telemetry.sinks import RunSinks

_ATTEMPTS = 3  # failures in a row, each with a longer wait after it, that end a run


class Saver:
    """Writes the checkpoints of one run; one that cannot be written is said aloud and tried again after a while.

    Args:
        config: of the run.
        run_dir: its directory.
        ring: its replay.
        segments: of the replay in the checkpoint that the run was resumed from.
    """

    def __init__(self, config: Config, run_dir: Path, ring: LaneRing, segments: tuple[Segment, ...]) -> None:
        self.config, self.ring = config, ring
        self._run_dir = run_dir
        self._writer = CheckpointWriter(run_dir, config.keep, segments)
        self._failed, self._retry_at = 0, math.inf

    def due(self, frames: int) -> bool:
        """Whether a period has gone by, or the wait after a failure; the end of the run makes its own."""
        return frames < self.config.total_frames and (
            crossed(self.config, self.config.checkpoint_period, frames) or frames >= self._retry_at
        )

    def save(
        self,
        learner: AbstractLearner,
        state: Callable[[], dict[str, Any]],
        sinks: RunSinks,
        *,
        frames: int,
        required: bool,
    ) -> bool:
        """Writes a checkpoint; whether it could be written.

        Args:
            learner: which must be worth going on from.
            state: what the run's `state_dict` gives.
            sinks: of the records before it.
            frames: played, by which it is called.
            required: a failure is raised at once.

        Raises:
            CheckpointFailed: it was the third failure in a row, or `required`.
            Diverged: what would be written is not worth going on from.
        """
        learner.require_finite()
        try:
            self._sync_records(sinks, frames)
            self._writer.save(state(), self.ring, self.config, frames=frames, device=learner.device)
        except CheckpointFailed as error:
            self._failed += 1
            if required or self._failed >= _ATTEMPTS:
                raise
            wait = max(1, self.config.checkpoint_period // 8) * 2 ** (self._failed - 1)
            self._retry_at = frames + wait
            warnings.warn(f"{error}; the ones before are kept, the next attempt is in {wait} frames", stacklevel=1)
            return False
        self._failed, self._retry_at = 0, math.inf
        return True

    def _sync_records(self, sinks: RunSinks, frames: int) -> None:
        """Waits until the disk has all records: those before a checkpoint outlive a power cut if it does."""
        try:
            sinks.flush()
            for path in record_files(self._run_dir):
                sync_file(path)
        except OSError as error:
            raise CheckpointFailed(
                f"checkpoint at {frames} frames was not written, nor the records before it: {error}"
            ) from error
