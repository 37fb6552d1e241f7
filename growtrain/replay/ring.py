"""Rows of experience, lane by lane: a ring of *columns*, each a tensor with one entry a row.

A row has a *frame*, what is new in the observation (`frames`: pictures, `vectors`: all of it), and the transition that leaves it.

Every lane (one environment) is a ring of rows, written in order. A row is a moment of an episode: what is observed then, and the transition
that leaves it for the next row. An episode's last moment takes a row too, though no transition leaves it. What a row holds is up to whoever
builds on this: columns have names, shapes and types. One can be added at any time:

    ring.add_column("values", Column((num_actions,), torch.float32))
    for rows in ring.rows_read().split(4096):                            # what is there, in one sweep
        ring.write("values", rows, network(ring.observations(rows)))
    left = ring.extend(...)                                              # what comes, as it comes
    ring.write("values", ring.following(left), ...)                      # the step's frames, an ended episode's last one among them
    ring.write("values", ring.newest_rows(), ...)                        # what the policy sees next
    ring.gather(rows).columns["values"]                                  # (n, 2, num_actions), at s and at s'

A column is saved and restored with the rest of the ring, and a ring that a state is loaded into has the state's columns.

Units: rows, ages and capacity are agent steps; sizes are bytes.
"""

import contextlib
import mmap
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data.replay_buffers import Storage

Array = Tensor | npt.NDArray[Any]
Batch = dict[str, Any]  # tensors by name, and those of "next" in one of their own


@dataclass(frozen=True)
class Column:
    """What each row has in a column.

    Attributes:
        shape: of an entry.
        dtype: of its numbers.
        padded: there is one row beyond the lanes', which stays zero, to be read where there is nothing.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    padded: bool = False

    def num_bytes(self, rows: int) -> int:
        """Bytes of a column of so many rows."""
        return (rows + self.padded) * torch.Size(self.shape).numel() * self.dtype.itemsize


def _split(batch: Batch, size: int) -> list[Batch]:
    """A batch (n * size,) in n parts, as views."""
    parts = [_split(part, size) if isinstance(part, dict) else part.split(size) for part in batch.values()]
    return [dict(zip(batch, values, strict=True)) for values in zip(*parts, strict=True)]


class Transitions(NamedTuple):
    """A batch of n transitions on the ring's device.

    Attributes:
        frames: (n, stack_size + 1, C, H, W) uint8, or (n, 2, D) float32, newest last; s is made of all but the last of them, s' of all but
            the first.
        action: (n,) int64, or (n, A) float32.
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
        """S: (n, stack_size C, H, W), or (n, D), a view."""
        return self.frames[:, :-1].flatten(1, 2)

    @property
    def next_observation(self) -> Tensor:
        """S': (n, stack_size C, H, W), or (n, D), a view."""
        return self.frames[:, 1:].flatten(1, 2)

    def to_dict(self) -> Batch:
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


class Step(NamedTuple):
    """The flat rows of one step of all lanes.

    Attributes:
        left: (num_lanes,) int64, those that the completed transitions leave.
        age: (num_lanes,) uint8, their ages.
        arrived: (num_lanes,) int64, those that they lead to.
        first: (m,) int64, the first ones of the m episodes that began.
    """

    left: npt.NDArray[np.int64]
    age: npt.NDArray[np.uint8]
    arrived: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]


def rows_per_lane(capacity: int, num_lanes: int, stack_size: int) -> int:
    """Returns the rows a lane needs to hold its share of `capacity` transitions while no episode ends.

    Beyond the share: the newest row, which no transition leaves yet, and the `stack_size - 1` rows that only complete the observation of
    the lane's oldest transition.

    Raises:
        ValueError: an argument is out of range.
    """
    if capacity < 1 or num_lanes < 1:
        raise ValueError(f"capacity and num_lanes must be at least 1, got {capacity} and {num_lanes}")
    if not 1 <= stack_size <= 255:
        raise ValueError(f"stack_size must be in 1..255, got {stack_size}")
    return -(-capacity // num_lanes) + stack_size


def no_files(self: object, path: Any) -> None:
    """Raises NotImplementedError: TorchRL's directories are not written."""
    raise NotImplementedError("a ring is saved with state_dict() and restored with load_state_dict(...)")


class LaneRing(Storage):  # type: ignore[misc]  # torchrl is untyped
    """Rows of `num_lanes` environments, and which of them a transition leaves.

    The row at a lane's cursor is the newest. A *flat* row is lane * rows + row. Ages and which rows are valid are on the host, so drawing
    indices never waits for the device. All work is on the current stream.

    Attributes:
        num_lanes, rows: ints.
        stack_size: rows that an observation is made of, the row's own and those before it in its episode.
        frame_shape, frame_dtype: of a frame.
        num_actions: numbers that an action is written as.
        columns: by name, (num_lanes * rows, *shape), and a row more where it is padded.
        valid: (num_lanes * rows,) bool numpy, the flat rows whose transition can be sampled.
        written: (num_lanes,) int64 numpy, the rows that each lane has ever taken; number k went to row k % rows.
    """

    def __init__(
        self,
        capacity: int,
        num_lanes: int,
        columns: Mapping[str, Column],
        *,
        rng: np.random.Generator,
        frame_shape: tuple[int, ...],
        frame_dtype: type[np.uint8] | type[np.float32],
        stack_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocates the columns; the CPU's memory is only committed as it fills.

        Args:
            capacity: transitions to hold, shared by the lanes (rounded up to a multiple of num_lanes).
            num_lanes: environments that write.
            columns: those to begin with; "frames" and "transitions" are among them.
            rng: what indices are drawn with. Its bit generator must be PCG64, `numpy.random.default_rng`'s.
            frame_shape: of a frame.
            frame_dtype: of its numbers.
            stack_size: rows of an observation.
            device: where columns are kept and batches gathered.

        Raises:
            ValueError: see `rows_per_lane`.
            TypeError: `rng` has another bit generator, whose state might not be plain integers.
        """
        if not isinstance(rng.bit_generator, np.random.PCG64):
            raise TypeError(f"rng must use PCG64 (numpy.random.default_rng(seed)), not {rng.bit_generator}")
        self.rows = rows_per_lane(capacity, num_lanes, stack_size)
        super().__init__(num_lanes * (self.rows - stack_size))
        self.num_lanes, self.stack_size = num_lanes, stack_size
        self.frame_shape, self.frame_dtype = frame_shape, np.dtype(frame_dtype)
        self.device = torch.device(device)
        self._generator = rng
        self._lane_start = np.arange(num_lanes) * self.rows
        self._age = np.zeros(num_lanes * self.rows, np.uint8)  # rows since the episode's first, at most stack_size - 1
        self.valid = np.zeros(num_lanes * self.rows, np.bool_)
        self.written = np.zeros(num_lanes, np.int64)
        self._filled = 0  # only rows below it have been written, in any lane
        self._num_valid = 0
        self.columns: dict[str, Tensor] = {}
        for name, column in columns.items():
            self.add_column(name, column)
        self._own = frozenset(columns)
        self._frames = self.columns["frames"].flatten(1)
        self._transitions = self.columns["transitions"]
        self.num_actions = self._transitions.shape[1] - 3  # columns of an action, beside reward, terminated and age

    def __len__(self) -> int:
        """Returns the number of valid transitions."""
        return self._num_valid

    @property
    def nbytes(self) -> int:
        """Bytes allocated on device and host."""
        return sum(tensor.nbytes for tensor in self.columns.values()) + sum(
            array.nbytes for array in (self._age, self.valid, self.written)
        )

    # Columns

    @property
    def added(self) -> dict[str, Tensor]:
        """The columns that were added to those the ring began with."""
        return {name: tensor for name, tensor in self.columns.items() if name not in self._own}

    def add_column(self, name: str, column: Column) -> None:
        """Adds a column of zeros.

        Raises:
            ValueError: there is one of that name.
        """
        if name in self.columns:
            raise ValueError(f"the ring has a column {name!r} already: drop it first")
        rows = self.num_lanes * self.rows + column.padded
        self.columns[name] = _zeros((rows, *column.shape), column.dtype, self.device)

    def drop_column(self, name: str) -> None:
        """Drops a column that was added.

        Raises:
            ValueError: there is none.
        """
        if name not in self.added:
            raise ValueError(f"the ring has no column {name!r} that was added")
        del self.columns[name]

    def write(self, name: str, flat: Tensor, values: Tensor) -> None:
        """Writes a column's entries.

        Args:
            name: of the column.
            flat: (n,) int64 flat rows on the host, each once.
            values: (n, *shape) of the column's type, anywhere.
        """
        column = self.columns[name]
        column.index_copy_(0, self._to(column.device, flat), self._to(column.device, values))

    def read(self, name: str, flat: Tensor) -> Tensor:
        """Returns a column's entries (n, *shape) of (n,) int64 flat rows on the host."""
        column = self.columns[name]
        return column.index_select(0, self._to(column.device, flat))

    def unwritten(self, name: str) -> Tensor:
        """A column's entries of rows that were never written, (num_lanes, rows, *shape), as a view."""
        return self._by_lane(self.columns[name], self.rows)[:, self._filled :]

    def _to(self, device: torch.device, values: Array) -> Tensor:
        """A host array where a column is. No sync: the cached page-locked block of pin_memory() is not reused before the copy is done."""
        if isinstance(values, np.ndarray):
            values = torch.from_numpy(np.require(values, requirements=["C", "W"]))
        if values.device == device or values.device.type != "cpu":
            return values.to(device)
        return values.pin_memory().to(device, non_blocking=True)

    def forget(self) -> None:
        """Lets no transition be sampled that is there; rows are counted on, and a new episode has to begin."""
        self.valid[:] = False
        self._num_valid = 0

    # What is written and read: frames, and transitions between them

    @property
    def frames(self) -> Tensor:
        """The stored frames, (num_lanes, rows, *frame_shape), as a view."""
        return self._by_lane(self.columns["frames"], self.rows)

    def start(self, frames: Array) -> None:
        """Begins an episode on every lane; a lane's open transition, if any, is dropped.

        Args:
            frames: (num_lanes, *frame_shape), the episodes' first frames.

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
            action: integers, what was done at the newest frame; continuous ones (num_lanes, A) float32.
            reward: float, as learned from.
            terminated: bool, the discount is 0: the game is over or, if the caller so decides, a life lost.
            frame: (num_lanes, *frame_shape), the step's newest frame; the episode's last where it ended.
            started: bool, the episode ended, terminated or cut off, and another began.
            first_frame: (num_lanes, *frame_shape), the next episode's first; only read where started.

        Returns:
            (num_lanes,) int64 on the CPU, the flat rows that the completed transitions leave.

        Raises:
            RuntimeError: `start` was not called.
            ValueError, TypeError: wrong shape or dtype, or an episode started and `first_frame` is missing.
        """
        if not self._filled:
            raise RuntimeError("no episode has begun in this ring: call start(first_frames) before extend(...)")
        frames = self._checked("frame", frame)
        new = np.flatnonzero(np.reshape(np.asarray(started), self.num_lanes))
        if new.size:
            if first_frame is None:
                raise ValueError("an episode started: pass first_frame, the first frames of the lanes' episodes")
            frames = np.concatenate([frames, self._checked("first_frame", first_frame)[new]])
        transitions = np.empty((self.num_lanes, self.num_actions + 3), np.float32)  # exact for actions up to 2**24
        transitions[:, :-3] = np.reshape(np.asarray(action), (self.num_lanes, self.num_actions))
        for column, values in enumerate((reward, terminated), start=-3):
            transitions[:, column] = np.reshape(np.asarray(values), self.num_lanes)
        step = self._step(new)
        transitions[:, -1] = step.age
        self._transitions.index_copy_(0, self._to(self.device, step.left), self._to(self.device, transitions))
        self._write_frames(np.concatenate([step.arrived, step.first]) if new.size else step.arrived, frames)
        return torch.from_numpy(step.left)

    def _checked(self, name: str, frames: Array) -> npt.NDArray[Any]:
        array = np.asarray(frames)
        if array.dtype != self.frame_dtype:
            raise TypeError(f"{name} must be {self.frame_dtype}, not {array.dtype}")
        if array.shape != (self.num_lanes, *self.frame_shape):
            raise ValueError(f"{name} must be {(self.num_lanes, *self.frame_shape)}, not {array.shape}")
        return array

    def _write_frames(self, flat: npt.NDArray[np.int64], frames: npt.NDArray[Any]) -> None:
        numbers = frames.reshape(flat.size, -1)
        self._frames.index_copy_(0, self._to(self.device, flat), self._to(self.device, numbers))

    @abstractmethod
    def gather(self, flat: Tensor) -> Transitions:
        """Transitions: device work of static shapes without a sync, fit for a CUDA graph.

        Args:
            flat: (n,) int64 on the ring's device, valid flat rows (not checked).
        """

    @abstractmethod
    def observations(self, flat: Tensor) -> Tensor:
        """Returns what is observed at flat rows, made of the frames that the ring holds, whether or not a transition leaves them.

        Args:
            flat: (n,) int64 on the host, of `rows_read` (not checked).

        Returns:
            (n, *observation_shape) on the ring's device.
        """

    def _pairs(self, column: Tensor, rows: Tensor) -> Tensor:
        """A column's entries at s and at s', rows (n, 2): (n, 2, *shape) on the ring's device."""
        return column.index_select(0, rows.reshape(-1)).view(-1, 2, *column.shape[1:])

    def sample(self, num: int) -> TensorDict:
        """Returns (num,) transitions drawn uniformly, on the ring's device, in TorchRL's layout."""
        return self._drawn(num).to_tensordict()

    def sample_batches(self, num: int, batch_size: int) -> list[Batch]:
        """Returns what `sample(num * batch_size)` does as dictionaries, which cost a small network's update less than a TensorDict."""
        return _split(self._drawn(num * batch_size).to_dict(), batch_size)

    def _drawn(self, num: int) -> Transitions:
        return self.gather(self._to(self.device, self.sample_indices(num)))

    def rewards(self, flat: Tensor) -> Tensor:
        """Returns the rewards (n,) of the transitions that leave (n,) int64 flat rows on the host, on its device."""
        return self._transitions[:, -3].index_select(0, self._to(self.device, flat))

    def newest(self) -> Tensor:
        """Returns the lanes' current observations, (num_lanes, *observation_shape) on its device, made of its frames."""
        return self.observations(self.newest_rows())

    def get(self, index: Array) -> TensorDict:
        """Returns the (n,) transitions that leave the (n,) int64 flat rows, in TorchRL's layout.

        Raises:
            TypeError: the index is not one-dimensional.
            IndexError: a row holds no complete transition (unchecked if the index is on a device: no sync).
        """
        if not isinstance(index, Tensor | np.ndarray) or index.ndim != 1:
            raise TypeError(f"a ring is indexed by flat rows, a 1-D int64 tensor, not by {index!r}")
        flat = torch.as_tensor(index)
        if flat.device.type == "cpu":
            if not self.valid[flat.numpy()].all():
                raise IndexError("a row holds no complete transition: take the index from sample_indices")
            flat = self._to(self.device, flat)
        return self.gather(flat).to_tensordict()

    # Which rows there are

    def newest_rows(self) -> Tensor:
        """Returns the lanes' newest flat rows, (num_lanes,) int64 on the CPU."""
        return torch.from_numpy(self._lane_start + self._cursor)

    def following(self, flat: Tensor) -> Tensor:
        """Returns the flat rows after (n,) flat rows in their lanes: those of s' where a transition leaves them."""
        return flat - flat % self.rows + (flat % self.rows + 1) % self.rows

    def rows_read(self) -> Tensor:
        """Returns the flat rows of which a batch or the policy may read the observation, (n,) int64 on the CPU, in order.

        Those are s and s' of every valid transition, and the newest rows of lanes that have any.
        """
        valid = torch.from_numpy(np.flatnonzero(self.valid))
        newest = self.newest_rows()[torch.from_numpy(self.written > 0)]
        rows = torch.cat([valid, self.following(valid), newest]).numpy()
        return torch.from_numpy(np.unique(rows))

    @property
    def _cursor(self) -> npt.NDArray[np.int64]:
        cursor: npt.NDArray[np.int64] = (self.written - 1) % self.rows
        return cursor

    def _begin(self) -> npt.NDArray[np.int64]:
        """The first row of an episode on every lane, (num_lanes,) flat; open transitions are dropped."""
        flat = self._advance(np.arange(self.num_lanes))
        self._age[flat] = 0
        return flat

    def _step(self, started: npt.NDArray[np.int64]) -> Step:
        """Completes every lane's open transition and, on the lanes `started`, begins an episode."""
        left = self._lane_start + self._cursor
        age = self._age[left]
        # Valid first: in a tiny ring the second advance can overwrite what this very transition needs.
        self.valid[left] = True
        self._num_valid += self.num_lanes
        arrived = self._advance(np.arange(self.num_lanes))
        self._age[arrived] = np.minimum(age + 1, self.stack_size - 1)
        first = self._advance(started) if started.size else started
        self._age[first] = 0
        return Step(left, age, arrived, first)

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

    # TorchRL's contract

    def contains(self, item: int) -> bool:
        """Returns whether flat row `item` holds a transition that can be sampled."""
        return 0 <= item < self.valid.size and bool(self.valid[item])

    def set(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: rows are only written in order."""
        raise NotImplementedError("a ring is written with start(...) and extend(...), not by index")

    dumps = loads = no_files

    def _empty(self) -> None:
        self._age[:] = 0
        self.valid[:] = False
        self.written[:] = 0
        self._filled = self._num_valid = 0

    # Saved and restored

    def _by_lane(self, tensor: Tensor, filled: int) -> Tensor:
        """The rows of a column that have been written, (num_lanes, filled, *shape), as a view."""
        rows = tensor[: self.num_lanes * self.rows]
        return rows.view(self.num_lanes, self.rows, *tensor.shape[1:])[:, :filled]

    def _written(self, filled: int) -> dict[str, Tensor]:
        """What there is of the ring's own rows, by name, as views."""
        own = {name: self.columns[name] for name in self._own}
        own |= {"age": torch.from_numpy(self._age), "valid": torch.from_numpy(self.valid)}
        return {name: self._by_lane(tensor, filled) for name, tensor in own.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, ints and strings only; of the rows, those written so far, and under "columns" those of columns that were added.

        The tensors are views into the ring: write them out before it is extended again.
        """
        return {
            "rows": self.rows,
            "stack_size": self.stack_size,
            "filled": self._filled,
            "written": torch.from_numpy(self.written),
            "rng": dict(self._generator.bit_generator.state),
            "columns": {name: self._by_lane(tensor, self._filled) for name, tensor in self.added.items()},
            **self._written(self._filled),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, so that the next samples are the same; of columns that were added it has the state's.

        What is missing of the ring's own columns is left alone: whoever keeps it apart writes it.

        Raises:
            ValueError: the state is of a ring of other sizes.
        """
        filled = int(state_dict["filled"])
        own = self._written(filled)
        sizes: dict[str, tuple[Any, Any]] = {
            "rows": (state_dict["rows"], self.rows),
            "stack_size": (state_dict["stack_size"], self.stack_size),
        }
        sizes["written"] = (tuple(state_dict["written"].shape), self.written.shape)
        sizes |= {k: (tuple(state_dict[k].shape), tuple(v.shape)) for k, v in own.items() if k in state_dict}
        wrong = [f"{name} is {saved}, not {here}" for name, (saved, here) in sizes.items() if saved != here]
        columns: dict[str, Tensor] = state_dict.get("columns", {})
        wrong += [
            f"column {name} is {tuple(tensor.shape)}"
            for name, tensor in columns.items()
            if tensor.shape[:2] != (self.num_lanes, filled)
        ]
        if wrong or not 0 <= filled <= self.rows:
            raise ValueError(f"the saved ring has other sizes: {', '.join(wrong) or filled}: match the config")
        for key, each in own.items():
            if key in state_dict:
                each.copy_(state_dict[key])
        for name in self.added:
            self.drop_column(name)
        for name, saved in columns.items():
            self.add_column(name, Column(tuple(saved.shape[2:]), saved.dtype))
            self._by_lane(self.columns[name], filled).copy_(saved)
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
        behind = (self._cursor[:, None] - np.arange(self.rows)) % self.rows  # 0 at the cursor
        assert (behind[valid] >= 1).all(), "the newest row is valid, but no transition leaves it yet"
        assert (behind[valid] + age[valid] < self.rows).all(), "a valid stack reaches into overwritten rows"
        next_age = np.minimum(age + 1, self.stack_size - 1)
        assert (np.roll(age, -1, axis=1)[valid] == next_age[valid]).all(), "a transition leaves its episode"
        for back in range(1, self.stack_size):
            inside = valid & (age >= back)
            assert (np.roll(age, back, axis=1)[inside] >= age[inside] - back).all(), "a stack mixes episodes"


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros; on the CPU it is a mapping, committed as it is written, and going back to the kernel as a whole."""
    count = torch.Size(shape).numel()
    if device.type != "cpu" or count == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    mapping = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=dtype, count=count).view(shape)
