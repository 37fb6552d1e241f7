"""The kernels of real work, counted while it runs: what each computes, and which memory it reads and writes.

An operator of PyTorch is one kernel on a GPU, but for views and allocations, which are none, and for those that are known to be several
(`_EXTRA_KERNELS`, convolutions: their bias and each of their gradients). FLOPs are those of PyTorch's `flop_registry`, 2 per multiply-add,
products and convolutions only; a kernel's bytes are its operands, each read once, and its results, each written once.

Deviations: 1. what is compiled into one is one kernel that reads what was there before and writes what is there afterwards; 2. foreach
operators are one kernel on a GPU however many tensors there are, and one a tensor on a CPU; 3. of a large tensor from which rows are
drawn only those are read.

Units: FLOPs; bytes.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Arithmetic = Literal["product", "convolution", "none", "link"]

_EXTRA_KERNELS = {
    "_foreach_norm": 1,  # norms of chunks, then of tensors
    "masked_fill": 1,  # a copy, then the filling
    "smooth_l1_loss": 1,  # each loss, then their mean
}
_WRITES_ONLY = ("copy_", "fill_", "zero_", "_foreach_copy_")  # their operand is not read
_DRAWS_ROWS = ("index_select", "index_copy_")


class Access(NamedTuple):
    """A kernel's use of a piece of memory.

    Attributes:
        buffer: which one; None where it cannot be in a cache, as rows drawn at random from a large tensor.
        size: bytes of it that are used.
        times: 1 where it is read or written, 2 where both.
    """

    buffer: int | None
    size: int
    times: int = 1


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: the operator's, or what it is for.
        arithmetic: what its FLOPs are of, which decides at what rate they can be done; `link` is a copy between host and device.
        flops: of it.
        accesses: the memory it uses.
    """

    name: str
    arithmetic: Arithmetic
    flops: int
    accesses: tuple[Access, ...]

    @property
    def bytes_moved(self) -> int:
        """Read and written."""
        return sum(access.size * access.times for access in self.accesses)


class KernelCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # nor has it stubs
    """Counts kernels while it is entered; results are what they are without it.

    Args:
        gpu: count those that a GPU would run, whatever the work runs on now.

    Attributes:
        kernels: so far, in order.
    """

    def __init__(self, *, gpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu
        self.kernels: list[Kernel] = []
        self._buffers: dict[int, int] = {}
        self._alive: list[Any] = []  # storages, so that no address stands for two of them
        self._fused: _Fused | None = None

    @contextlib.contextmanager
    def fused(self, name: str) -> Iterator[None]:
        """What runs inside is one kernel."""
        self._fused = _Fused()
        try:
            yield
        finally:
            self.kernels.append(Kernel(name, "none", self._fused.flops, self._fused.accesses()))
            self._fused = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carries an operator out and counts it."""
        result = func(*args, **(kwargs or {}))
        outputs, name = _tensors(result), func.overloadpacket.__name__
        works = outputs or func._schema.is_mutable  # in place, foreach operators return nothing
        if works and func.namespace != "profiler" and "empty" not in name:
            self._count(func, name, args, kwargs or {}, result, outputs)
        return result

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, outputs: list[Tensor]) -> None:
        written = [
            tensor
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
        ]
        changed = {self._buffer(tensor) for tensor in written}
        inputs = _tensors((args, kwargs))
        if not written and {self._buffer(tensor) for tensor in outputs} <= {self._buffer(x) for x in inputs}:
            return  # a view
        reads = [tensor for tensor in inputs if self._buffer(tensor) not in changed]
        if written and name.endswith("_") and name not in _WRITES_ONLY:
            reads += written
        writes = written or outputs
        flops = (
            int(formula(*args, **kwargs, out_val=result)) if (formula := flop_registry.get(func.overloadpacket)) else 0
        )
        if name == "convolution":
            bias = [args[2]] if args[2] is not None else []
            self._add(name, "convolution", flops, args[:2], outputs)
            for each in bias:
                self._add("bias", "none", 0, [each, *outputs], outputs)
        elif name == "convolution_backward":
            above, below, weight = args[:3]
            to_input, to_weight, to_bias = result
            products = sum(gradient is not None for gradient in (to_input, to_weight))
            for gradient, operand in ((to_input, weight), (to_weight, below)):
                if gradient is not None:
                    self._add("convolution_gradient", "convolution", flops // products, [above, operand], [gradient])
            if to_bias is not None:
                self._add("bias_gradient", "none", 0, [above], [to_bias])
        elif name.startswith("_foreach_") and not self.gpu:
            lists = [value for value in (*args, *kwargs.values()) if isinstance(value, list)]
            for place, each in enumerate(written or outputs):
                operands = [tensors[place] for tensors in lists if isinstance(tensors[place], Tensor)]
                self._add(name, "none", 0, operands, [each])
        else:
            arithmetic: Arithmetic = "product" if flops else "none"
            self._add(name, arithmetic, flops, reads, writes, rows_only=name in _DRAWS_ROWS)
            for _ in range(_EXTRA_KERNELS.get(name, 0) if self.gpu and self._fused is None else 0):
                self.kernels.append(Kernel(name, "none", 0, ()))

    def _add(
        self,
        name: str,
        arithmetic: Arithmetic,
        flops: int,
        reads: Iterable[Tensor],
        writes: Iterable[Tensor],
        *,
        rows_only: bool = False,
    ) -> None:
        """Counts a kernel; of one that draws rows only as much of the large operand as there is of the small one."""
        read, wrote = ({self._buffer(tensor): _size(tensor) for tensor in tensors} for tensors in (reads, writes))
        sizes = read | wrote
        if rows_only:
            largest = max(sizes, key=lambda buffer: sizes[buffer])
            small = {buffer: size for buffer, size in sizes.items() if buffer != largest}
            accesses = [Access(None, max(small.values())), *(Access(buffer, size) for buffer, size in small.items())]
        else:
            accesses = [Access(b, size, (b in read) + (b in wrote)) for b, size in sizes.items()]
        if self._fused is not None:
            self._fused.see(read, wrote, flops)
            return
        self.kernels.append(Kernel(name, arithmetic, flops, tuple(accesses)))

    def _buffer(self, tensor: Tensor) -> int:
        """Which piece of memory a tensor is in."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._buffers:
            self._buffers[storage.data_ptr()] = len(self._buffers)
            self._alive.append(storage)
        return self._buffers[storage.data_ptr()]


class _Fused:
    """What is compiled into one kernel: memory that first appears as a result inside is none to it."""

    def __init__(self) -> None:
        self.flops = 0
        self._read: dict[int, int] = {}
        self._wrote: dict[int, int] = {}
        self._made: set[int] = set()

    def see(self, read: dict[int, int], wrote: dict[int, int], flops: int) -> None:
        """An operator inside."""
        self.flops += flops
        self._made |= {buffer for buffer in wrote if buffer not in self._read | read | self._wrote}
        self._read |= {buffer: size for buffer, size in read.items() if buffer not in self._wrote}
        self._wrote |= wrote

    def accesses(self) -> tuple[Access, ...]:
        """Of what was there before."""
        sizes = {buffer: size for buffer, size in (self._read | self._wrote).items() if buffer not in self._made}
        return tuple(Access(b, size, (b in self._read) + (b in self._wrote)) for b, size in sizes.items())


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor in memory: what is expanded is there once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()
