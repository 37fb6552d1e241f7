"""A whole update in one CUDA graph: gather, loss, backward, clip, optimizer.

An update of a small network is hundreds of short kernels, which Python launches more slowly than a GPU runs them; a graph is one launch.
The rows to gather are drawn outside, so that no random number is drawn inside a graph, and copied to a fixed place before each replay.

Everything the graph reads must stay where it is: after a growth, or when the target begins to share a frozen encoder, the learner's
`version` changes and the next update captures anew. `torch.cuda.graph` is described in PyTorch's "CUDA semantics, CUDA Graphs".
"""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from growtrain.learners.base import AbstractLearner
from growtrain.replay.ring import LaneRing
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError

_WARM_UP_STEPS = 3


def uses_graph(config: Config, device: torch.device) -> bool:
    """Whether updates run in a CUDA graph; raises `ConfigError` where that was asked for and there is no GPU."""
    if config.execution == "graph" and device.type != "cuda":
        raise ConfigError(
            "--execution graph: CUDA graphs need a GPU; use --execution auto, or --device cuda where there is one"
        )
    return device.type == "cuda" and config.execution != "eager"


class CapturedUpdate:
    """Updates of a learner on a GPU, each one replay of a CUDA graph.

    Args:
        learner: on a CUDA device.
        gather: (B,) int64 rows on the device -> the batch, without a sync (`LaneRing.gather`).
        batch_size: B.
    """

    def __init__(self, learner: AbstractLearner, gather: Callable[[Tensor], TensorDict], batch_size: int) -> None:
        self.learner, self._gather, self.batch_size = learner, gather, batch_size
        self._rows = torch.zeros(batch_size, dtype=torch.int64, device=learner.device)
        # No other graph may be captured on it: when a graph goes, PyTorch drops the workspaces of cuBLAS that belong to its stream, and
        # another graph captured there would go on using their memory (PyTorch's issue 193402).
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph = torch.cuda.CUDAGraph()
        self._version = -1

    def update(self, rows: Tensor) -> None:
        """K updates.

        Args:
            rows: (K * B,) int64 on the CPU, valid rows of the replay.
        """
        on_device = rows.pin_memory().to(self.learner.device, non_blocking=True).view(-1, self.batch_size)
        if self._version != self.learner.version:
            self._rows.copy_(on_device[0])
            self._capture()
        for batch_rows in on_device.unbind(0):
            self._rows.copy_(batch_rows)
            self.learner.draw()
            self._graph.replay()
            self.learner.updates += 1

    def _capture(self) -> None:
        """Warms up and captures one step; the learner's tensors are what they were before, in the same places."""
        learner = self.learner
        tensors = learner.step_tensors()
        slots_before = {p: _clones(slots) for p, slots in learner.optimizer.state.items()}
        before = [tensor.detach().clone() for tensor in tensors]
        self._graph = torch.cuda.CUDAGraph()  # the old one and its workspaces go before the new one needs any
        try:
            self._warm_up_and_record()
        finally:
            _restore(tensors, before, learner.optimizer, slots_before)
        self._version = learner.version

    def _warm_up_and_record(self) -> None:
        learner = self.learner
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_STEPS):
                learner.step(self._gather(self._rows))
        torch.cuda.current_stream().wait_stream(self._stream)
        learner.optimizer.zero_grad(set_to_none=True)  # the graph's gradients live in its own memory
        with torch.cuda.graph(self._graph, stream=self._stream):
            learner.step(self._gather(self._rows))


def make_captured(learner: AbstractLearner, ring: LaneRing) -> CapturedUpdate:
    """The learner's update in a CUDA graph that gathers its batch from the ring."""
    return CapturedUpdate(learner, lambda rows: ring.gather(rows).to_tensordict(), learner.config.batch_size)


@torch.no_grad()
def _restore(
    tensors: list[Tensor],
    before: list[Tensor],
    optimizer: torch.optim.Optimizer,
    slots_before: dict[Tensor, dict[str, Tensor]],
) -> None:
    """Puts values back in place; slots that the warm-up made are fresh, which is zero in every optimizer here."""
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)
    for p, slots in optimizer.state.items():
        for name, tensor in slots.items():
            tensor.copy_(slots_before[p][name]) if p in slots_before else tensor.zero_()


def _clones(slots: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in slots.items()}
