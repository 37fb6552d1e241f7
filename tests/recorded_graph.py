"""A CUDA graph played on the CPU, so that `CapturedUpdate` can be tested where there is no GPU.

What sets a graph apart holds here, too: Python runs once, while it is recorded, and from then on the same operations run on the same
memory. Waiting for a value or drawing a random number while recording is an error, and so is playing what would use memory that has
been given back.

Deviations: operations are carried out while they are recorded, too; nothing runs beside Python.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

_FORBIDDEN = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


class _Place:
    """Where a tensor is that the graph does not own: as a kernel knows it, and without keeping its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._like = (tensor.dtype, tensor.device)
        self._place = (tensor.storage_offset(), tensor.size(), tensor.stride())

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        assert storage is not None, "a graph uses memory that has been given back"
        dtype, device = self._like
        return torch.empty(0, dtype=dtype, device=device).set_(storage, *self._place)


class RecordedGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`; records while it is entered.

    Attributes:
        replays: how often it was played.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self._own: set[int] = set()  # memory made while recording: kept, as by a graph's own pool
        self._operations: list[tuple[Any, list[Any], Any, list[Tensor | None]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carries an operation out and keeps it."""
        if any(tag in func.tags for tag in _FORBIDDEN):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        leaves, spec = tree_flatten((args, kwargs or {}))
        given = {_memory(x) for x in leaves if isinstance(x, Tensor)}
        kept = [self._kept(x) if isinstance(x, Tensor) else x for x in leaves]
        result = func(*args, **kwargs or {})
        outputs = _tensors(result)
        self._own |= {_memory(x) for x in outputs} - given
        results = [x.detach() if _memory(x) in self._own else None for x in outputs]
        self._operations.append((func, kept, spec, results))
        return result

    def _kept(self, argument: Tensor) -> Tensor | _Place:
        return argument.detach() if _memory(argument) in self._own else _Place(argument)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, kept, spec, results in self._operations:
            args, kwargs = tree_unflatten([x.tensor() if isinstance(x, _Place) else x for x in kept], spec)
            for own, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                if own is not None and _memory(own) != _memory(new):
                    own.copy_(new)


def _tensors(result: Any) -> Sequence[Tensor]:
    several = result if isinstance(result, tuple | list) else [result]
    return [x for x in several if isinstance(x, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    def wait_stream(self, other: "Stream") -> None:
        """Nothing runs beside Python."""


@contextlib.contextmanager
def record(graph: RecordedGraph, stream: Stream) -> Iterator[None]:
    """Stands in for `torch.cuda.graph`."""
    with graph:
        yield


STAND_INS = {
    "torch.cuda.CUDAGraph": RecordedGraph,
    "torch.cuda.Stream": Stream,
    "torch.cuda.current_stream": Stream,
    "torch.cuda.stream": lambda stream: contextlib.nullcontext(),
    "torch.cuda.graph": record,
    "torch.Tensor.pin_memory": lambda tensor: tensor,
}
