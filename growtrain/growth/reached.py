"""Which parameters an output is computed from, as its autograd graph tells.

Its values cannot tell: a fresh head and its anchor that both compute with the old head's weights cancel, too.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def reached(run: Callable[[], Any], parameters: Iterable[nn.Parameter]) -> set[int]:
    """The ids of those of these parameters that what `run` gives is computed from; those that do not train are looked at, too."""
    still = [p for p in parameters if not p.requires_grad and p.is_floating_point() and not p.is_inference()]
    try:
        for p in still:
            p.requires_grad_(True)
        with torch.enable_grad():
            outputs = tensors_in(run())
    finally:
        for p in still:
            p.requires_grad_(False)
    found, seen, waiting = set[int](), set[Any](), [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))  # a leaf's node has it
            waiting += [following for following, _ in node.next_functions]
    return found


def tensors_in(value: Any, depth: int = 4) -> list[Tensor]:
    """All tensors that a value holds, in containers and attributes, as of a dataclass or a distribution."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return [tensor for part in parts if depth for tensor in tensors_in(part, depth - 1)]
