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

import contextlib
import mmap
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers import Sampler, Storage, Writer

Array = Tensor | npt.NDArray[Any]


class Transitions(NamedTuple):
    """A batch of n transitions on the ring's device.

    Attributes:
        frames: (n, stack_size + 1, H, W) uint8; s is `frames[:, :-1]` and s' `frames[:, 1:]`, newest last.
        action: (n,) int64.
        reward: (n, 1) float32.
        terminated: (n, 1) bool, the discount is 0.
    """

    frames: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor

    def to_tensordict(self) -> TensorDict:
        """Returns the (n,) batch under the keys of TorchRL's losses; observations are views of `frames`."""
        following = {
            "observation": self.frames[:, 1:],
            "reward": self.reward,
            "done": self.terminated,
            "terminated": self.terminated,
        }
        batch = {"observation": self.frames[:, :-1], "action": self.action, "next": following}
        return TensorDict(batch, batch_size=[self.frames.shape[0]])


def rows_per_lane(capacity: int, num_lanes: int, stack_size: int = 4) -> int:
    """Returns the rows a lane needs to hold its share of `capacity` transitions while no episode ends.

    Beyond the share: the newest frame, which no transition leaves yet, and the `stack_size - 1` frames that
    only complete the stack of the lane's oldest transition.

    Raises:
        ValueError: an argument is out of range.
    """
    if capacity < 1 or num_lanes < 1:
        raise ValueError(f"capacity and num_lanes must be at least 1, got {capacity} and {num_lanes}")
    if not 1 <= stack_size <= 255:
        raise ValueError(f"stack_size must be in 1..255, got {stack_size}")
    return -(-capacity // num_lanes) + stack_size


def replay_bytes(capacity: int, num_lanes: int, *, frame_shape: tuple[int, int] = (84, 84), stack_size: int = 4) -> int:
    """Returns the bytes that a `FrameRing` of these arguments allocates, without allocating them.

    All are on the ring's device but for 2 bytes a row and 8 a lane, which are always on the host.
    """
    rows = num_lanes * rows_per_lane(capacity, num_lanes, stack_size)
    return (rows + 1) * frame_shape[0] * frame_shape[1] + rows * (4 * 4 + 2) + num_lanes * 8


def _no_files(self: object, path: Any) -> None:
    """Raises NotImplementedError: TorchRL's directories are not written."""
    raise NotImplementedError("a frame ring is saved with state_dict() and restored with load_state_dict(...)")


class FrameRing(Storage):  # type: ignore[misc]  # torchrl is untyped
    """The latest frames of `num_lanes` environments and the transitions between them.

    Every lane is a ring of rows. A row holds a frame, its age (frames since its episode's first, saturating
    at stack_size - 1) and the transition that leaves it for the next row. The row at the lane's cursor is the
    newest. A *flat* row is lane * rows + row. Frames and transitions are on `device`; ages and which rows are
    valid are on the host, so drawing indices never waits for the device. All work is on the current stream.

    Attributes:
        num_lanes, rows, stack_size: ints.
        valid: (num_lanes * rows,) bool numpy, the flat rows whose transition can be sampled.
        written: (num_lanes,) int64 numpy, the frames that each lane has ever taken; number k went to row k % rows.
    """

    def __init__(
        self,
        capacity: int,
        num_lanes: int,
        *,
        rng: np.random.Generator,
        frame_shape: tuple[int, int] = (84, 84),
        stack_size: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocates `replay_bytes(...)`; the CPU's memory is only committed as it fills.

        Args:
            capacity: transitions to hold, shared by the lanes (rounded up to a multiple of num_lanes).
            num_lanes: environments that write.
            rng: what indices are drawn with. Its bit generator must be PCG64, `numpy.random.default_rng`'s.
            frame_shape: (H, W) in pixels.
            stack_size: frames per observation.
            device: where frames are kept and batches gathered.

        Raises:
            ValueError: see `rows_per_lane`.
            TypeError: `rng` has another bit generator, whose state might not be plain integers.
        """
        if not isinstance(rng.bit_generator, np.random.PCG64):
            raise TypeError(f"rng must use PCG64 (numpy.random.default_rng(seed)), not {rng.bit_generator}")
        self.rows = rows_per_lane(capacity, num_lanes, stack_size)
        super().__init__(num_lanes * (self.rows - stack_size))
        self.num_lanes, self.stack_size, self.frame_shape = num_lanes, stack_size, tuple(frame_shape)
        self.device = torch.device(device)
        self._generator = rng
        total, pixels = num_lanes * self.rows, frame_shape[0] * frame_shape[1]
        # One row beyond the lanes' stays zero and is read wherever a stack reaches back before its episode:
        # padding then costs neither a pass over pixels nor a branch on data.
        self._zero_row = total
        if self.device.type == "cpu":  # a mapping is committed as it is written, and goes back to the kernel as a whole
            mapping = mmap.mmap(-1, (total + 1) * pixels, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError, AttributeError):  # a kernel without them
                mapping.madvise(mmap.MADV_HUGEPAGE)
            self._pixels = torch.from_numpy(np.frombuffer(mapping, np.uint8).reshape(total + 1, pixels))
        else:
            self._pixels = torch.zeros((total + 1, pixels), dtype=torch.uint8, device=self.device)
        # Columns action, reward, terminated, age: written in one piece once the transition is complete.
        self._transitions = torch.zeros((total, 4), device=self.device)
        self._offsets = torch.arange(1 - stack_size, 2, device=self.device)
        self._min_age = -self._offsets.float()  # of a row whose episode has a frame at that offset
        self._lane_start = np.arange(num_lanes) * self.rows
        self._age = np.zeros(total, np.uint8)
        self.valid = np.zeros(total, np.bool_)
        self.written = np.zeros(num_lanes, np.int64)
        self._filled = 0  # only rows below it have been written, in any lane
        self._num_valid = 0

    def __len__(self) -> int:
        """Returns the number of valid transitions."""
        return self._num_valid

    @property
    def _cursor(self) -> npt.NDArray[np.int64]:
        cursor: npt.NDArray[np.int64] = (self.written - 1) % self.rows
        return cursor

    @property
    def frames(self) -> Tensor:
        """The stored frames, (num_lanes, rows, H, W) uint8, as a view."""
        return self._pixels[:-1].view(self.num_lanes, self.rows, *self.frame_shape)

    @property
    def nbytes(self) -> int:
        """Bytes allocated on device and host, `replay_bytes` of the same arguments."""
        return sum(part.nbytes for part in (self._pixels, self._transitions, self._age, self.valid, self.written))

    def start(self, frames: Array) -> None:
        """Begins an episode on every lane; a lane's open transition, if any, is dropped.

        Args:
            frames: (num_lanes, H, W) uint8, the episodes' first frames.

        Raises:
            ValueError, TypeError: wrong shape or dtype.
        """
        checked = self._checked("frames", frames)
        flat = self._advance(np.arange(self.num_lanes))
        self._age[flat] = 0
        self._write_frames(flat, checked)

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
            frame: (num_lanes, H, W) uint8, the step's newest frame; the episode's last where it ended.
            started: bool, the episode ended, terminated or cut off, and another began.
            first_frame: (num_lanes, H, W) uint8, the next episode's first; only read where started.

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
        left = self._lane_start + self._cursor
        age = self._age[left]
        transitions = np.empty((self.num_lanes, 4), np.float32)  # exact for actions up to 2**24
        for column, values in enumerate((action, reward, terminated, age)):
            transitions[:, column] = np.reshape(np.asarray(values), self.num_lanes)

        # Valid first: in a tiny ring the second advance can overwrite what this very transition needs.
        self.valid[left] = True
        self._num_valid += self.num_lanes
        flat = self._advance(np.arange(self.num_lanes))
        self._age[flat] = np.minimum(age + 1, self.stack_size - 1)
        if new.size:
            first = self._advance(new)
            self._age[first] = 0
            flat = np.concatenate([flat, first])
        self._transitions.index_copy_(0, self._to_device(left), self._to_device(transitions))
        self._write_frames(flat, pixels)
        return torch.from_numpy(left)

    def _checked(self, name: str, frames: Array) -> npt.NDArray[np.uint8]:
        array = np.asarray(frames)
        if array.dtype != np.uint8:
            raise TypeError(f"{name} must be uint8, not {array.dtype}")
        if array.shape != (self.num_lanes, *self.frame_shape):
            raise ValueError(f"{name} must be {(self.num_lanes, *self.frame_shape)}, not {array.shape}")
        return array

    def _advance(self, lanes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Moves the cursors of `lanes` (m,) on, invalidates what that overwrites; returns (m,) flat rows."""
        row = self.written[lanes] % self.rows
        self.written[lanes] += 1
        if self._filled < self.rows:
            self._filled = max(self._filled, int(row.max()) + 1)
        start, ahead = self._lane_start[lanes], np.arange(self.stack_size)
        window = start[:, None] + (row[:, None] + ahead) % self.rows
        # A row that many `ahead` of an overwritten one is lost if it is at least that old: its stack has it.
        lost = window[self.valid[window] & (self._age[window] >= ahead)]
        self.valid[lost] = False
        self._num_valid -= lost.size
        return start + row

    def _write_frames(self, flat: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> None:
        self._pixels.index_copy_(0, self._to_device(flat), self._to_device(frames.reshape(flat.size, -1)))

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        if self.device.type == "cpu":
            return tensor
        # No sync: the cached page-locked block of pin_memory() is not reused before the copy is done.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def sample_indices(self, num: int) -> Tensor:
        """Draws transitions uniformly and independently (with replacement), on the host.

        Args:
            num: how many; those of several updates in one call cost little more than those of one.

        Returns:
            (num,) int64 on the CPU, flat rows.

        Raises:
            ValueError: no transition is complete, or num is not positive.
        """
        if not self._num_valid:
            raise ValueError("no transition is complete yet: extend the replay before sampling from it")
        if num < 1:
            raise ValueError(f"the number of transitions to sample must be at least 1, got {num}")
        chosen = np.empty(num, np.int64)
        candidates = self.num_lanes * self._filled
        found = 0
        while found < num:  # rejection: uniform over the rows written, hence over the valid ones among them
            tries = min((num - found) * candidates // self._num_valid * 9 // 8 + 8, 1 << 20)
            lane, row = np.divmod(self._generator.integers(candidates, size=tries), self._filled)
            flat = lane * self.rows + row
            flat = flat[self.valid[flat]][: num - found]
            chosen[found : found + flat.size] = flat
            found += flat.size
        return torch.from_numpy(chosen)

    def gather(self, flat: Tensor) -> Transitions:
        """Rebuilds transitions: device work of static shapes without a sync, fit for a CUDA graph.

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
        )

    def sample(self, num: int) -> TensorDict:
        """Returns (num,) transitions drawn uniformly, on the ring's device, in TorchRL's layout."""
        return self.gather(self._to_device(self.sample_indices(num).numpy())).to_tensordict()

    def newest(self) -> Tensor:
        """Returns the lanes' current observations, (num_lanes, stack_size, H, W) uint8 on its device, made of the frames that it holds."""
        back, cursor = np.arange(self.stack_size - 1, -1, -1), self._cursor
        source = self._lane_start[:, None] + (cursor[:, None] - back) % self.rows
        source[self._age[self._lane_start + cursor][:, None] < back] = self._zero_row
        frames = self._pixels.index_select(0, self._to_device(source.ravel()))
        return frames.view(self.num_lanes, self.stack_size, *self.frame_shape)

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
            flat = self._to_device(flat.numpy())
        return self.gather(flat).to_tensordict()

    def contains(self, item: int) -> bool:
        """Returns whether flat row `item` holds a transition that can be sampled."""
        return 0 <= item < self.valid.size and bool(self.valid[item])

    def set(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: rows are only written in order."""
        raise NotImplementedError("a frame ring is written with start(...) and extend(...), not by index")

    dumps = loads = _no_files

    def _empty(self) -> None:
        self._age[:] = 0
        self.valid[:] = False
        self.written[:] = 0
        self._filled = self._num_valid = 0

    def _written(self, filled: int) -> dict[str, Tensor]:
        per_row = {
            "transitions": self._transitions,
            "age": torch.from_numpy(self._age),
            "valid": torch.from_numpy(self.valid),
        }
        by_lane = {key: each.view(self.num_lanes, self.rows, *each.shape[1:]) for key, each in per_row.items()}
        by_lane["frames"] = self.frames
        return {key: each[:, :filled] for key, each in by_lane.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, ints and strings only; of the rows, those written so far.

        The tensors are views into the ring: write them out before it is extended again.
        """
        return {
            "rows": self.rows,
            "stack_size": self.stack_size,
            "filled": self._filled,
            "written": torch.from_numpy(self.written),
            "rng": dict(self._generator.bit_generator.state),
            **self._written(self._filled),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, so that the next samples are the same.

        A state without "frames" leaves the frames alone: whoever keeps them apart writes them through `frames`.

        Raises:
            ValueError: the state is of a ring of other sizes.
        """
        filled = int(state_dict["filled"])
        shapes = [tuple(state_dict[key].shape) for key in ("frames", "transitions") if key in state_dict]
        frame_shape = shapes[0][2:] if len(shapes) == 2 else self.frame_shape
        saved = (state_dict["rows"], state_dict["stack_size"], *shapes[-1][:2], *frame_shape)
        own = (self.rows, self.stack_size, self.num_lanes, filled, *self.frame_shape)
        if saved != own or filled > self.rows:
            raise ValueError(f"the saved (rows, stack, lanes, filled, H, W) is {saved}, not {own}: match the config")
        for key, each in self._written(filled).items():
            if key in state_dict:
                each.copy_(state_dict[key])
        self.valid.reshape(self.num_lanes, self.rows)[:, filled:] = False
        self.written[:] = state_dict["written"].numpy()
        self._filled, self._num_valid = filled, int(np.count_nonzero(self.valid))
        self._generator.bit_generator.state = state_dict["rng"]

    def check_valid(self) -> None:
        """Asserts the ring's invariants; slow, since it looks at every row."""
        shape = (self.num_lanes, self.rows)
        age, valid = self._age.reshape(shape).astype(np.int64), self.valid.reshape(shape)
        assert self._num_valid == np.count_nonzero(valid), "the count of valid rows is off"
        assert not valid[:, self._filled :].any(), "a row is valid that was never written"
        assert not self._pixels[self._zero_row].any(), "the zero row is not zero"
        behind = (self._cursor[:, None] - np.arange(self.rows)) % self.rows  # 0 at the cursor
        assert (behind[valid] >= 1).all(), "the newest row is valid, but no transition leaves it yet"
        assert (behind[valid] + age[valid] < self.rows).all(), "a valid stack reaches into overwritten rows"
        next_age = np.minimum(age + 1, self.stack_size - 1)
        assert (np.roll(age, -1, axis=1)[valid] == next_age[valid]).all(), "a transition leaves its episode"
        for back in range(1, self.stack_size):
            inside = valid & (age >= back)
            assert (np.roll(age, back, axis=1)[inside] >= age[inside] - back).all(), "a stack mixes episodes"
        on_device = self._transitions[:, 3].cpu().numpy().reshape(shape)
        assert (on_device[valid] == age[valid]).all(), "ages on the host and on the device differ"


class FrameSampler(Sampler):  # type: ignore[misc]  # torchrl is untyped
    """Uniform draws from a `FrameRing`, which owns the random generator and its state."""

    dumps = loads = _no_files

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

    dumps = loads = _no_files

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
