"""Uniform experience replay that keeps every frame once and rebuilds the stacks when a batch is drawn.

Source: Mnih et al. 2015, "Human-level control through deep reinforcement learning" (Nature 518), Methods; the
replay of DQN Zoo. Single uint8 frames instead of stacks: 1M transitions are 7.06 GB, which a GPU can hold.

Deviations:
    1. DQN Zoo keeps compressed stacks in one list; here every lane (one environment) is a ring of raw frames.
    2. An episode's last frame takes a row too, though no transition leaves it: once a ring has wrapped,
       episodes of L agent steps fill it with about capacity * L / (L + 1) transitions.
    3. An episode that is cut off (truncated) bootstraps from its true last frame, which is kept.
    4. ("next", "done") is ("next", "terminated"): a one-step target needs nothing else.

Units: ages, rows and capacity are agent steps; rewards are as learned from (the caller clips); sizes, bytes.
"""

import numpy as np
import torch
from torch import Tensor

from growtrain.replay.ring import Column, LaneRing, Transitions, rows_per_lane

_WORD = torch.int64


def _columns(frame_shape: tuple[int, int, int]) -> dict[str, Column]:
    """What a row holds: its frame, and the transition that leaves it (action, reward, terminated, age), written in one piece."""
    # The row beyond the lanes' is read wherever a stack reaches back before its episode: padding then costs neither a pass over pixels nor
    # a branch on data.
    return {
        "frames": Column(frame_shape, torch.uint8, padded=True),
        "transitions": Column((4,), torch.float32),
    }


def replay_bytes(capacity: int, num_lanes: int, *, frame_shape: tuple[int, int, int], stack_size: int) -> int:
    """Returns the bytes that a `FrameRing` of these arguments allocates, without allocating them.

    All are on the ring's device but for 2 bytes a row and 8 a lane, which are always on the host.
    """
    rows = num_lanes * rows_per_lane(capacity, num_lanes, stack_size)
    return sum(column.num_bytes(rows) for column in _columns(frame_shape).values()) + rows * 2 + num_lanes * 8


class FrameRing(LaneRing):
    """The latest frames of `num_lanes` environments and the transitions between them: a `LaneRing` with a frame in every row.

    Attributes:
        frame_shape: (C, H, W) of a frame.
    """

    def __init__(
        self,
        capacity: int,
        num_lanes: int,
        *,
        rng: np.random.Generator,
        frame_shape: tuple[int, int, int],
        stack_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocates `replay_bytes(...)`; the CPU's memory is only committed as it fills.

        Args:
            capacity: transitions to hold, shared by the lanes (rounded up to a multiple of num_lanes).
            num_lanes: environments that write.
            rng: what indices are drawn with. Its bit generator must be PCG64, `numpy.random.default_rng`'s.
            frame_shape: (C, H, W): channels, and pixels.
            stack_size: frames per observation.
            device: where frames are kept and batches gathered.

        Raises:
            ValueError: see `rows_per_lane`.
            TypeError: `rng` has another bit generator, whose state might not be plain integers.
        """
        super().__init__(
            capacity,
            num_lanes,
            _columns(frame_shape),
            rng=rng,
            frame_shape=frame_shape,
            frame_dtype=np.uint8,
            stack_size=stack_size,
            device=device,
        )
        # A GPU gathers a row by a thread for each of its elements: eight pixels are one.
        whole = self._frames.shape[1] % _WORD.itemsize == 0
        self._words = self._frames.view(_WORD) if whole else self._frames
        self._zero_row = num_lanes * self.rows
        self._offsets = torch.arange(1 - stack_size, 2, device=self.device)
        self._min_age = -self._offsets.float()  # of a row whose episode has a frame at that offset

    def gather(self, flat: Tensor) -> Transitions:
        """Rebuilds transitions: device work of static shapes without a sync, fit for a CUDA graph, unless a column is on the host.

        Args:
            flat: (n,) int64 on the ring's device, valid flat rows (not checked).
        """
        transitions = self._transitions.index_select(0, flat)
        flat = flat[:, None]
        row = flat % self.rows
        source = flat - row + (row + self._offsets) % self.rows
        source.masked_fill_(transitions[:, 3:] < self._min_age, self._zero_row)
        frames = self._words.index_select(0, source.view(-1)).view(torch.uint8)
        return Transitions(
            frames=frames.view(-1, self.stack_size + 1, *self.frame_shape),
            action=transitions[:, 0].long(),
            reward=transitions[:, 1:2],
            terminated=transitions[:, 2:3] != 0,
            columns={name: self._pairs(column, source[:, -2:]) for name, column in self.added.items()},
        )

    def observations(self, flat: Tensor) -> Tensor:
        """Returns what is observed at flat rows, made of the frames that the ring holds, whether or not a transition leaves them.

        Args:
            flat: (n,) int64 on the host, of `rows_read` (not checked).

        Returns:
            (n, stack_size C, H, W) uint8 on the ring's device.
        """
        rows, back = flat.numpy()[:, None], np.arange(self.stack_size - 1, -1, -1)
        source = rows - rows % self.rows + (rows % self.rows - back) % self.rows
        source[self._age[rows] < back] = self._zero_row
        frames = self._frames.index_select(0, self._to(self.device, source.ravel()))
        return frames.view(-1, self.stack_size * self.frame_shape[0], *self.frame_shape[1:])

    def check_valid(self) -> None:
        """Asserts the ring's invariants; slow, since it looks at every row."""
        super().check_valid()
        assert not self._frames[self._zero_row].any(), "the zero row is not zero"
        on_device = self._transitions[:, 3].cpu().numpy()
        assert (on_device[self.valid] == self._age[self.valid]).all(), "ages on the host and on the device differ"
