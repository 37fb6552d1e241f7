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

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers import Sampler, Writer

from growtrain.replay.ring import Array, Column, LaneRing, no_files, rows_per_lane

Batch = dict[str, Any]  # tensors by name, and those of "next" in one of their own


def _split(batch: Batch, size: int) -> list[Batch]:
    """A batch (n * size,) in n parts, as views."""
    parts = [_split(part, size) if isinstance(part, dict) else part.split(size) for part in batch.values()]
    return [dict(zip(batch, values, strict=True)) for values in zip(*parts, strict=True)]


class Transitions(NamedTuple):
    """A batch of n transitions on the ring's device.

    Attributes:
        frames: (n, stack_size + 1, C, H, W) uint8, newest last; s is made of all but the last of them, s' of all but the first.
        action: (n,) int64.
        reward: (n, 1) float32.
        terminated: (n, 1) bool, the discount is 0.
        columns: (n, 2, *shape) of each column that was added to the ring: at s and at s'.
    """

    frames: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    columns: dict[str, Tensor] = {}  # noqa: RUF012  # of a tuple, which is never written to

    @property
    def observation(self) -> Tensor:
        """S: (n, stack_size C, H, W) uint8, a view."""
        return self.frames[:, :-1].flatten(1, 2)

    @property
    def next_observation(self) -> Tensor:
        """S': (n, stack_size C, H, W) uint8, a view."""
        return self.frames[:, 1:].flatten(1, 2)

    def to_dict(self) -> dict[str, Any]:
        """Returns the batch under the keys of TorchRL's losses; observations are views of `frames`."""
        following = {
            "observation": self.next_observation,
            "reward": self.reward,
            "done": self.terminated,
            "terminated": self.terminated,
            **{name: values[:, 1] for name, values in self.columns.items()},
        }
        return {
            "observation": self.observation,
            "action": self.action,
            "next": following,
            **{name: values[:, 0] for name, values in self.columns.items()},
        }

    def to_tensordict(self) -> TensorDict:
        """Returns the batch (n,) under the keys of TorchRL's losses; observations are views of `frames`."""
        return TensorDict(self.to_dict(), batch_size=[self.frames.shape[0]])


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
        columns = _columns(frame_shape)
        super().__init__(capacity, num_lanes, columns, rng=rng, stack_size=stack_size, device=device)
        self.frame_shape = frame_shape
        self._pixels = self.columns["frames"].flatten(1)
        self._transitions = self.columns["transitions"]
        self._zero_row = num_lanes * self.rows
        self._offsets = torch.arange(1 - stack_size, 2, device=self.device)
        self._min_age = -self._offsets.float()  # of a row whose episode has a frame at that offset

    @property
    def frames(self) -> Tensor:
        """The stored frames, (num_lanes, rows, C, H, W) uint8, as a view."""
        return self._by_lane(self.columns["frames"], self.rows)

    def start(self, frames: Array) -> None:
        """Begins an episode on every lane; a lane's open transition, if any, is dropped.

        Args:
            frames: (num_lanes, C, H, W) uint8, the episodes' first frames.

        Raises:
            ValueError, TypeError: wrong shape or dtype.
        """
        checked = self._checked("frames", frames)
        self._write_frames(self._begin(), checked)

    def extend(
        self,
        *,
        action: Array,
        reward: Array,
        terminated: Array,
        frame: Array,
        started: Array,
        first_frame: Array | None = None,
    ) -> Tensor:
        """Completes every lane's open transition and, where an episode ended, begins the next one.

        All inputs are on the host, and (num_lanes,) or (num_lanes, 1) unless said.

        Args:
            action: integers, what was done at the newest frame.
            reward: float, as learned from.
            terminated: bool, the discount is 0: the game is over or, if the caller so decides, a life lost.
            frame: (num_lanes, C, H, W) uint8, the step's newest frame; the episode's last where it ended.
            started: bool, the episode ended, terminated or cut off, and another began.
            first_frame: (num_lanes, C, H, W) uint8, the next episode's first; only read where started.

        Returns:
            (num_lanes,) int64 on the CPU, the flat rows that the completed transitions leave.

        Raises:
            RuntimeError: `start` was not called.
            ValueError, TypeError: wrong shape or dtype, or an episode started and `first_frame` is missing.
        """
        if not self._filled:
            raise RuntimeError("no episode has begun in this ring: call start(first_frames) before extend(...)")
        pixels = self._checked("frame", frame)
        new = np.flatnonzero(np.reshape(np.asarray(started), self.num_lanes))
        if new.size:
            if first_frame is None:
                raise ValueError("an episode started: pass first_frame, the first frames of the lanes' episodes")
            pixels = np.concatenate([pixels, self._checked("first_frame", first_frame)[new]])
        transitions = np.empty((self.num_lanes, 4), np.float32)  # exact for actions up to 2**24
        for column, values in enumerate((action, reward, terminated)):
            transitions[:, column] = np.reshape(np.asarray(values), self.num_lanes)
        step = self._step(new)
        transitions[:, 3] = step.age
        self._transitions.index_copy_(0, self._to(self.device, step.left), self._to(self.device, transitions))
        self._write_frames(np.concatenate([step.arrived, step.first]) if new.size else step.arrived, pixels)
        return torch.from_numpy(step.left)

    def _checked(self, name: str, frames: Array) -> npt.NDArray[np.uint8]:
        array = np.asarray(frames)
        if array.dtype != np.uint8:
            raise TypeError(f"{name} must be uint8, not {array.dtype}")
        if array.shape != (self.num_lanes, *self.frame_shape):
            raise ValueError(f"{name} must be {(self.num_lanes, *self.frame_shape)}, not {array.shape}")
        return array

    def _write_frames(self, flat: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> None:
        pixels = frames.reshape(flat.size, -1)
        self._pixels.index_copy_(0, self._to(self.device, flat), self._to(self.device, pixels))

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
        frames = self._pixels.index_select(0, source.view(-1))
        return Transitions(
            frames=frames.view(-1, self.stack_size + 1, *self.frame_shape),
            action=transitions[:, 0].long(),
            reward=transitions[:, 1:2],
            terminated=transitions[:, 2:3] != 0,
            columns={name: self._pairs(column, source) for name, column in self.added.items()},
        )

    def _pairs(self, column: Tensor, source: Tensor) -> Tensor:
        """A column's entries at s and at s', the last two rows of each stack (n, stack_size + 1): (n, 2, *shape) on the ring's device."""
        rows = source[:, -2:].reshape(-1).to(column.device)
        return column.index_select(0, rows).to(self.device).view(-1, 2, *column.shape[1:])

    def sample(self, num: int) -> TensorDict:
        """Returns (num,) transitions drawn uniformly, on the ring's device, in TorchRL's layout."""
        return self._drawn(num).to_tensordict()

    def sample_batches(self, num: int, batch_size: int) -> list[Batch]:
        """Returns what `sample(num * batch_size)` does as dictionaries, which cost a small network's update less than a TensorDict."""
        return _split(self._drawn(num * batch_size).to_dict(), batch_size)

    def _drawn(self, num: int) -> Transitions:
        return self.gather(self._to(self.device, self.sample_indices(num)))

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
        frames = self._pixels.index_select(0, self._to(self.device, source.ravel()))
        return frames.view(-1, self.stack_size * self.frame_shape[0], *self.frame_shape[1:])

    def newest(self) -> Tensor:
        """Returns the lanes' current observations, (num_lanes, stack_size C, H, W) uint8 on its device, made of its frames."""
        return self.observations(self.newest_rows())

    def get(self, index: Array) -> TensorDict:
        """Returns the (n,) transitions that leave the (n,) int64 flat rows, in TorchRL's layout.

        Raises:
            TypeError: the index is not one-dimensional.
            IndexError: a row holds no complete transition (unchecked if the index is on a device: no sync).
        """
        if not isinstance(index, Tensor | np.ndarray) or index.ndim != 1:
            raise TypeError(f"a frame ring is indexed by flat rows, a 1-D int64 tensor, not by {index!r}")
        flat = torch.as_tensor(index)
        if flat.device.type == "cpu":
            if not self.valid[flat.numpy()].all():
                raise IndexError("a row holds no complete transition: take the index from sample_indices")
            flat = self._to(self.device, flat)
        return self.gather(flat).to_tensordict()

    def check_valid(self) -> None:
        """Asserts the ring's invariants; slow, since it looks at every row."""
        super().check_valid()
        assert not self._pixels[self._zero_row].any(), "the zero row is not zero"
        on_device = self._transitions[:, 3].cpu().numpy()
        assert (on_device[self.valid] == self._age[self.valid]).all(), "ages on the host and on the device differ"


class FrameSampler(Sampler):  # type: ignore[misc]  # torchrl is untyped
    """Uniform draws from a `FrameRing`, which owns the random generator and its state."""

    dumps = loads = no_files

    def sample(self, storage: FrameRing, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """Returns (batch_size,) int64 flat rows, see `FrameRing.sample_indices`, and an empty info."""
        return storage.sample_indices(batch_size), {}

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: the generator's state is with the ring's."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: the ring restores the generator."""

    def _empty(self) -> None:
        pass


class FrameWriter(Writer):  # type: ignore[misc]  # torchrl is untyped
    """Writes a step of all lanes at a time into the `FrameRing` it is registered with."""

    dumps = loads = no_files

    def __init__(self) -> None:
        """Starts counting at zero."""
        super().__init__()
        self._write_count = 0  # the name that ReplayBuffer.write_count reads

    def extend(self, data: TensorDictBase) -> Tensor:
        """Returns (num_lanes,) int64 flat rows; `data` has the arguments of `FrameRing.extend` as keys."""
        keys = ("action", "reward", "terminated", "frame", "started", "first_frame")
        index: Tensor = self._storage.extend(**{key: data.get(key) for key in keys})
        self._write_count += index.numel()
        return index

    def add(self, data: Any) -> int:
        """Raises NotImplementedError: a step comes from all lanes at once."""
        raise NotImplementedError("a frame ring takes a step of all lanes at once: use extend(...)")

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of transitions written."""
        return {"write_count": self._write_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the number of transitions written."""
        self._write_count = state_dict["write_count"]

    def _empty(self, empty_write_count: bool = True) -> None:
        if empty_write_count:
            self._write_count = 0


def frame_replay(ring: FrameRing, *, batch_size: int | None = None) -> ReplayBuffer:
    """Returns `ring` as a TorchRL buffer: `extend(tensordict)`, see `FrameWriter`, and `sample(n)`.

    Begin the episodes with `ring.start(first_frames)`. The ring gathers whole batches, so nothing is left to
    collate, which TorchRL has to be told for a storage that is not its own.
    """
    return ReplayBuffer(
        storage=ring,
        sampler=FrameSampler(),
        writer=FrameWriter(),
        collate_fn=lambda batch: batch,
        batch_size=batch_size,
    )
