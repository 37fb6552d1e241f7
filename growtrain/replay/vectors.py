"""Uniform experience replay of state vectors and continuous actions (Lin 1992), on the ring that frames are kept in, too.

An observation is kept once, though it is s' of one transition and s of the next. An episode's last one takes a row, too, so that an episode
that was cut off is bootstrapped from its true last observation.

Units: rows and capacity are agent steps; rewards are as learned from; sizes are bytes.
"""

import numpy as np
import torch
from torch import Tensor

from growtrain.replay.ring import Column, LaneRing, Transitions, rows_per_lane


def _columns(size: int, num_actions: int) -> dict[str, Column]:
    """What a row holds: what is observed, and the transition that leaves it (action, reward, terminated, age)."""
    return {
        "frames": Column((size,), torch.float32),
        "transitions": Column((num_actions + 3,), torch.float32),
    }


def replay_bytes(capacity: int, num_lanes: int, *, size: int, num_actions: int) -> int:
    """Returns the bytes that a `VectorRing` of these arguments allocates, without allocating them."""
    rows = num_lanes * rows_per_lane(capacity, num_lanes, 1)
    return sum(column.num_bytes(rows) for column in _columns(size, num_actions).values()) + rows * 2 + num_lanes * 8


class VectorRing(LaneRing):
    """The latest observations of `num_lanes` environments, vectors, and the transitions between them."""

    def __init__(
        self,
        capacity: int,
        num_lanes: int,
        *,
        rng: np.random.Generator,
        size: int,
        num_actions: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocates `replay_bytes(...)`; the CPU's memory is only committed as it fills.

        Args:
            capacity: transitions to hold, shared by the lanes (rounded up to a multiple of num_lanes).
            num_lanes: environments that write.
            rng: what indices are drawn with. Its bit generator must be PCG64, `numpy.random.default_rng`'s.
            size: numbers in an observation.
            num_actions: numbers in an action.
            device: where it is kept and batches gathered.

        Raises:
            ValueError: see `rows_per_lane`.
            TypeError: `rng` has another bit generator, whose state might not be plain integers.
        """
        super().__init__(
            capacity,
            num_lanes,
            _columns(size, num_actions),
            rng=rng,
            frame_shape=(size,),
            frame_dtype=np.float32,
            stack_size=1,
            device=device,
        )

    def gather(self, flat: Tensor) -> Transitions:
        """Transitions: device work of static shapes without a sync, unless a column is on the host.

        Args:
            flat: (n,) int64 on the ring's device, valid flat rows (not checked).
        """
        transitions = self._transitions.index_select(0, flat)
        rows = torch.stack([flat, self.following(flat)], dim=1)
        return Transitions(
            frames=self._pairs(self._frames, rows),
            action=transitions[:, :-3],
            reward=transitions[:, -3:-2],
            terminated=transitions[:, -2:-1] != 0,
            columns={name: self._pairs(column, rows) for name, column in self.added.items()},
        )

    def observations(self, flat: Tensor) -> Tensor:
        """Returns what is observed at flat rows, (n, size) float32 on the ring's device; `flat` is (n,) int64 on the host."""
        return self._frames.index_select(0, self._to(self.device, flat))
