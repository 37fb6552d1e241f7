"""A ring as TorchRL's `ReplayBuffer`: its sampler and its writer."""

from typing import Any

from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers import Sampler, Writer

from growtrain.replay.ring import LaneRing, no_files


class RingSampler(Sampler):  # type: ignore[misc]  # torchrl is untyped
    """Uniform draws from a `LaneRing`, which owns the random generator and its state."""

    dumps = loads = no_files

    def sample(self, storage: LaneRing, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """Returns (batch_size,) int64 flat rows, see `LaneRing.sample_indices`, and an empty info."""
        return storage.sample_indices(batch_size), {}

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: the generator's state is with the ring's."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: the ring restores the generator."""

    def _empty(self) -> None:
        pass


class RingWriter(Writer):  # type: ignore[misc]  # torchrl is untyped
    """Writes a step of all lanes at a time into the `LaneRing` it is registered with."""

    dumps = loads = no_files

    def __init__(self) -> None:
        """Starts counting at zero."""
        super().__init__()
        self._write_count = 0  # the name that ReplayBuffer.write_count reads

    def extend(self, data: TensorDictBase) -> Tensor:
        """Returns (num_lanes,) int64 flat rows; `data` has the arguments of `LaneRing.extend` as keys."""
        keys = ("action", "reward", "terminated", "frame", "started", "first_frame")
        index: Tensor = self._storage.extend(**{key: data.get(key) for key in keys})
        self._write_count += index.numel()
        return index

    def add(self, data: Any) -> int:
        """Raises NotImplementedError: a step comes from all lanes at once."""
        raise NotImplementedError("a ring takes a step of all lanes at once: use extend(...)")

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of transitions written."""
        return {"write_count": self._write_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the number of transitions written."""
        self._write_count = state_dict["write_count"]

    def _empty(self, empty_write_count: bool = True) -> None:
        if empty_write_count:
            self._write_count = 0


def ring_replay(ring: LaneRing, *, batch_size: int | None = None) -> ReplayBuffer:
    """Returns `ring` as a TorchRL buffer: `extend(tensordict)`, see `RingWriter`, and `sample(n)`.

    Begin the episodes with `ring.start(first_frames)`. The ring gathers whole batches, so nothing is left to
    collate, which TorchRL has to be told for a storage that is not its own.
    """
    return ReplayBuffer(
        storage=ring,
        sampler=RingSampler(),
        writer=RingWriter(),
        collate_fn=lambda batch: batch,
        batch_size=batch_size,
    )
