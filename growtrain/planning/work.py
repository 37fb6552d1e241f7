"""What a run has its GPU do: the kernels of a stage's updates, of acting and of storing a step, counted from the real ones.

A learner is built and grown as a run does it, on the CPU with a small head, and its work is counted while it is done (`kernels`). What
every kernel computes and moves is then known at any width.

Units: FLOPs; bytes.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from growtrain.environments.base import Spec
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.gradient_step import MIN_UPDATES_TO_COMPILE
from growtrain.networks.heads import multiplied_by_onednn
from growtrain.networks.injected import InjectedHead, can_fuse
from growtrain.planning.costs import make_plan
from growtrain.planning.kernels import Access, Kernel, KernelCounter
from growtrain.planning.speed import grown_stage_by_stage
from growtrain.replay.frames import FrameRing
from growtrain.replay.ring import Column
from growtrain.settings.config import Config

_WIDTH_STEP = 32  # of the widths that are counted: alignment, on which kernels depend, is the same at all of them


@dataclass(frozen=True, kw_only=True)
class Work:
    """The kernels of one stage.

    Attributes:
        update: one gradient step, with the gathering of its batch.
        act: the choice of all lanes' actions.
        store: of what a step of all lanes brought.
        play: the choice of all lanes' actions in an evaluation.
    """

    update: tuple[Kernel, ...]
    act: tuple[Kernel, ...]
    store: tuple[Kernel, ...]
    play: tuple[Kernel, ...]


class WorkByWidth:
    """The kernels of every stage at any width of the small head.

    They are counted at three small ones. Which kernels there are does not depend on the width, and what each computes and moves is a
    polynomial in it: of the first degree, or of the second where a regulariser multiplies a weight by itself.

    Args:
        config, spec: of the run; the width counts only by its remainder, to which others must be congruent.
    """

    def __init__(self, config: Config, spec: Spec) -> None:
        self._first = config.width % _WIDTH_STEP + _WIDTH_STEP
        widths = [self._first + place * _WIDTH_STEP for place in range(3)]
        self._counted = [count_work(dataclasses.replace(config, width=width), spec) for width in widths]

    def at(self, width: int) -> tuple[Work, ...]:
        """The work of each stage; raises `ValueError` for a width that is aligned otherwise than the configuration's."""
        if (width - self._first) % _WIDTH_STEP:
            raise ValueError(f"width {width} is aligned otherwise than {self._first}: count it anew")
        steps = (width - self._first) // _WIDTH_STEP

        def interpolated(values: Sequence[int]) -> int:
            first, second, third = values
            return first + steps * (second - first) + steps * (steps - 1) // 2 * (third - 2 * second + first)

        def kernel(same: Sequence[Kernel]) -> Kernel:
            accesses = zip(*(each.accesses for each in same), strict=True)
            return Kernel(
                same[0].name,
                same[0].arithmetic,
                interpolated([each.flops for each in same]),
                tuple(each[0]._replace(size=interpolated([one.size for one in each])) for each in accesses),
            )

        def phase(same: Iterable[tuple[Kernel, ...]]) -> tuple[Kernel, ...]:
            return tuple(kernel(each) for each in zip(*same, strict=True))

        names = [item.name for item in dataclasses.fields(Work)]
        return tuple(
            Work(**{name: phase([getattr(work, name) for work in same]) for name in names})
            for same in zip(*self._counted, strict=True)
        )


def count_work(config: Config, spec: Spec) -> tuple[Work, ...]:
    """The kernels of every stage, of a learner with the configuration's width, that a GPU would run; computes updates on the CPU."""
    planned = sum(stage.updates for stage in make_plan(config, spec).stages)
    compiled = config.execution != "eager" and planned >= MIN_UPDATES_TO_COMPILE
    stages = []
    # What is counted is known without compiling it, and has no products but a GPU's, whatever suits this processor.
    with torch.compiler.set_stance("force_eager"), multiplied_by_onednn(False):
        for learner, batches in grown_stage_by_stage(config, spec, torch.device("cpu")):
            assert isinstance(learner, DoubleDQN), "the kernels that are counted are those of a Q-network"
            learner.asynchronous = True  # as on a GPU: no value is read
            learner.rebuild()
            _fuse_banks(learner)
            ring = _filled_ring(config, spec)
            frozen = learner.frozen_value(ring.newest())
            if frozen is not None:
                ring.add_column("frozen_value", Column((spec.num_actions,), torch.float32))
            rows, newest = ring.sample_indices(config.batch_size), ring.newest_rows()
            index, values = 8 * config.num_envs, 4 * config.num_envs * spec.num_actions
            kept = [index] if frozen is not None else []  # rows whose frozen values are read or written
            learner.update(batches)  # optimizer slots exist
            stages.append(
                Work(
                    update=(
                        *_copies(8 * config.batch_size),
                        *count_update(learner, partial(_gather, ring, rows), gpu=True, compiled=compiled),
                    ),
                    act=(
                        *_copies(index * spec.stack_size, *kept),
                        *_counted(partial(_act, learner, ring, newest)),
                        *_copies(values),
                    ),
                    store=(
                        *_copies(index, 2 * index, index, config.num_envs * math.prod(spec.frame_shape), *kept),
                        *_counted(partial(_store, learner, ring, spec)),
                    ),
                    play=(
                        *_copies(config.num_envs * math.prod(spec.observation_shape)),
                        *_counted(partial(learner.act, ring.newest())),
                        *_copies(values),
                    ),
                )
            )
    return tuple(stages)


def count_update(learner: DoubleDQN, batch: Callable[[], Any], *, gpu: bool, compiled: bool) -> tuple[Kernel, ...]:
    """The kernels of one update, which is made.

    Args:
        learner: has its optimizer's slots.
        batch: gives the batch, (B,) transitions.
        gpu: count those of a GPU.
        compiled: the optimizer's step is compiled into one kernel.
    """
    counter, inside = KernelCounter(gpu=gpu), contextlib.ExitStack()
    hooks = []
    if compiled and learner.config.optimizer != "adam":  # PyTorch's own is one kernel already
        hooks.append(learner.optimizer.register_step_pre_hook(lambda *_: _enter(inside, counter)))
        hooks.append(learner.optimizer.register_step_post_hook(lambda *_: inside.close()))
    try:
        with torch.compiler.set_stance("force_eager"), counter:
            learner.step(batch())
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(counter.kernels)


def _enter(inside: contextlib.ExitStack, counter: KernelCounter) -> None:
    inside.enter_context(counter.fused("optimizer"))


def _counted(work: Callable[[], object]) -> tuple[Kernel, ...]:
    with KernelCounter(gpu=True) as counter:
        work()
    return tuple(counter.kernels)


def _copies(*sizes: int) -> tuple[Kernel, ...]:
    """Copies between host and device, of so many bytes each."""
    return tuple(Kernel("copy", "link", 0, (Access(None, size),)) for size in sizes)


def _fuse_banks(learner: DoubleDQN) -> None:
    """Fuses what a GPU would: rounding does not speak against it there, see `InjectedHead.grown`."""
    frozen = learner.head.frozen
    if frozen is None or frozen.fused or learner.head.beside or not can_fuse(frozen.unfused()):
        return
    for network in (learner.online, learner.target):
        head = network.head
        assert isinstance(head, InjectedHead)
        head.rebuild_bank(fused=True)
    learner.rebuild()


def _filled_ring(config: Config, spec: Spec) -> FrameRing:
    """A replay of the run's lanes with a few steps in it."""
    lanes, generator = config.num_envs, np.random.default_rng(0)
    capacity = 4 * max(lanes, config.batch_size)
    channels, height, width = spec.frame_shape
    shape = (channels, height, width)
    ring = FrameRing(capacity, lanes, rng=generator, frame_shape=shape, stack_size=spec.stack_size)
    ring.start(np.zeros((lanes, *shape), np.uint8))
    for _ in range(2):
        _step(ring, spec)
    return ring


def _step(ring: FrameRing, spec: Spec) -> Tensor:
    zeros = np.zeros(ring.num_lanes, np.int64)
    frames = np.zeros((ring.num_lanes, *spec.frame_shape), np.uint8)
    return ring.extend(action=zeros, reward=zeros, terminated=zeros, frame=frames, started=zeros.astype(bool))


def _gather(ring: FrameRing, rows: Tensor) -> TensorDict:
    return ring.gather(rows).to_tensordict()


def _act(learner: DoubleDQN, ring: FrameRing, newest: Tensor) -> Tensor:
    return learner.act(ring.newest(), ring.read("frozen_value", newest) if "frozen_value" in ring.columns else None)


def _store(learner: DoubleDQN, ring: FrameRing, spec: Spec) -> None:
    """What a run does with a step's frames where no episode ends; see `growtrain.runs.frozen_values` for the frozen values."""
    _step(ring, spec)
    if "frozen_value" in ring.columns:
        values = learner.frozen_value(ring.newest())
        assert values is not None
        ring.write("frozen_value", ring.newest_rows(), values)
