"""The least time that a run can take on named hardware, and what growing saves there: modelled, not measured.

The kernels of a stage's updates, of acting and of storing a step are counted from the real ones (`growtrain.planning.kernels`), of a
learner that was really grown. A kernel takes the longest of

    the least that any kernel takes,   its FLOPs / peak rate,   its bytes / bandwidth.

Bytes come from the second-level cache where they were used so lately that they are still there (least recently used goes first), else
from memory. Emulators take frames / (frames per second of a core), as many at once as there are cores.

`fast` is growtrain's own loop: an update is one CUDA graph, and emulators step while the learner learns. `reference` is the paper's strict
alternation of one environment and a learner that launches operator after operator: its times add up, and a kernel takes at least what its
launch takes.

Deviations: 1. peaks are had at any shape; 2. no Python but launches: drawing batches, records, checkpoints; 3. the target's copies are left
out; 4. the sweep of the replay after an injection of the whole network costs its FLOPs; 5. every game's emulator is as fast as Atari's.
All but the last make real runs slower. What growing saves is the difference of two least times: where everything takes twice as long, so
does what it saves.

Units: seconds unless a name says hours; FLOPs; bytes; frames.
"""

import contextlib
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from growtrain.environments.base import Spec
from growtrain.learners.double_dqn import MIN_UPDATES_TO_COMPILE, DoubleDQN
from growtrain.networks.injected import InjectedHead, can_fuse
from growtrain.planning.costs import StageCost, full_width, make_plan
from growtrain.planning.hardware import Hardware
from growtrain.planning.kernels import Access, Kernel, KernelCounter
from growtrain.planning.speed import grown_stage_by_stage
from growtrain.replay.frames import FrameRing
from growtrain.replay.ring import Column
from growtrain.settings.config import Config

Stack = Literal["fast", "reference"]
Bound = Literal["latency", "arithmetic", "memory"]

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
    for learner, batches in grown_stage_by_stage(config, spec, torch.device("cpu")):
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
    shape, stack = spec.frame_shape, spec.stack_size
    ring = FrameRing(capacity, lanes, rng=generator, frame_shape=shape, stack_size=stack)
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


# --- time


@dataclass(frozen=True)
class KernelTime:
    """How long a kernel takes, and what that is bound by."""

    seconds: float
    bound: Bound


def kernel_times(kernels: Sequence[Kernel], hardware: Hardware, least: float) -> list[KernelTime]:
    """The least time of each kernel of a sequence that is repeated again and again.

    Args:
        kernels: in their order.
        hardware: what they run on.
        least: seconds that any kernel takes.
    """
    peak = {"product": hardware.product_flops.value, "convolution": hardware.convolution_flops.value}
    times = []
    for kernel, missed in zip(kernels, missed_bytes(kernels, hardware.cache_bytes.value), strict=True):
        if kernel.arithmetic == "link":
            moving = missed / hardware.link_bandwidth.value
        else:
            hit = kernel.bytes_moved - missed
            moving = missed / hardware.memory_bandwidth.value + hit / hardware.cache_bandwidth.value
        computing = kernel.flops / peak[kernel.arithmetic] if kernel.flops else 0.0
        seconds = max(least, computing, moving)
        bound: Bound = "latency" if seconds == least else "arithmetic" if seconds == computing else "memory"
        times.append(KernelTime(seconds, bound))
    return times


def missed_bytes(kernels: Sequence[Kernel], cache_bytes: float) -> list[int]:
    """Bytes of each kernel that do not come from a cache that holds what was used last, in a sequence that is repeated.

    A buffer is there if it, and all that was used since its last use, fit into the cache.
    """
    recent: OrderedDict[int, int] = OrderedDict()  # least recently used first
    missed: list[int] = []
    for _ in range(2):  # the first time, nothing is there
        missed = []
        for kernel in kernels:
            misses = 0
            for buffer, size, times in kernel.accesses:
                if buffer is None:
                    misses += size * times
                    continue
                since = 0
                for other in reversed(recent):
                    if other == buffer or since > cache_bytes:
                        break
                    since += recent[other]
                # What is read and then written comes from memory once, and goes back there once.
                if buffer not in recent or since + size > cache_bytes:
                    misses += size * times
                recent[buffer] = max(size, recent.pop(buffer, 0))
            missed.append(misses)
    return missed


def total(times: Iterable[KernelTime]) -> float:
    """Seconds of all of them."""
    return sum(time.seconds for time in times)


@dataclass(frozen=True, kw_only=True)
class StageLimit:
    """The least time of one stage.

    Attributes:
        cost: what it costs otherwise.
        num_kernels, bytes_moved: of an update.
        update_seconds: of an update.
        shares: of that time, by what binds its kernels.
        training_hours, evaluation_hours: of the whole stage.
        bound: what its training waits for, `learning` or `playing` (emulators, and the launches of what acts and stores); `both` in the
            reference stack.
    """

    cost: StageCost
    num_kernels: int
    bytes_moved: int
    update_seconds: float
    shares: dict[Bound, float]
    training_hours: float
    evaluation_hours: float
    bound: str

    @property
    def frames_per_second(self) -> float:
        """Of training."""
        return self.cost.frames / (3600 * self.training_hours)


@dataclass(frozen=True, kw_only=True)
class RunLimit:
    """The least time of a run, `stages`, and of its full-width baseline."""

    hardware: Hardware
    stack: Stack
    stages: tuple[StageLimit, ...]
    baseline: tuple[StageLimit, ...]

    @property
    def training_hours(self) -> float:
        """Of the run."""
        return sum(stage.training_hours for stage in self.stages)

    @property
    def baseline_hours(self) -> float:
        """Of training the baseline."""
        return sum(stage.training_hours for stage in self.baseline)

    @property
    def evaluation_hours(self) -> float:
        """Of the run's evaluations."""
        return sum(stage.evaluation_hours for stage in self.stages)

    @property
    def saved_hours(self) -> float:
        """Of training, by growing; negative where it costs."""
        return self.baseline_hours - self.training_hours


def in_stack(config: Config, stack: Stack) -> Config:
    """A configuration as a stack runs it: the reference has one environment and no graph."""
    return dataclasses.replace(config, num_envs=1, execution="eager") if stack == "reference" else config


class Model:
    """The limits of a run and of its full-width baseline, at any width and on any hardware.

    Args:
        config, spec: of the run.
        stack: how it is run.
    """

    def __init__(self, config: Config, spec: Spec, stack: Stack) -> None:
        self.config, self.spec, self.stack = in_stack(config, stack), spec, stack
        baseline = full_width(self.config)
        self._run = WorkByWidth(self.config, spec)
        self._baseline = self._run if baseline == self.config else WorkByWidth(baseline, spec)

    def limit(self, hardware: Hardware, width: int | None = None) -> RunLimit:
        """The least time with a small head `width` wide, by default the configuration's.

        Raises:
            ValueError: the width is aligned otherwise than the configuration's.
        """
        config = dataclasses.replace(self.config, width=width or self.config.width)
        return RunLimit(
            hardware=hardware,
            stack=self.stack,
            stages=self._stages(config, self._run, hardware),
            baseline=self._stages(full_width(config), self._baseline, hardware),
        )

    def _stages(self, config: Config, work: WorkByWidth, hardware: Hardware) -> tuple[StageLimit, ...]:
        stages = zip(make_plan(config, self.spec).stages, work.at(config.width), strict=True)
        return tuple(stage_limit(config, cost, each, hardware, self.stack) for cost, each in stages)


def stage_limit(config: Config, cost: StageCost, work: Work, hardware: Hardware, stack: Stack) -> StageLimit:
    """The least time of one stage of a run."""
    lanes, launch = config.num_envs, hardware.eager_kernel.value
    least = hardware.graph_kernel.value if stack == "fast" else launch
    times = kernel_times(work.update, hardware, least)
    update = total(times)
    act, store, play = (total(kernel_times(part, hardware, least)) for part in (work.act, work.store, work.play))
    emulators, evaluated = _emulation(lanes, config, hardware), min(lanes, config.num_eval_episodes)
    steps, decisions = cost.frames / config.frame_skip / lanes, cost.policy_steps / lanes
    if stack == "reference":
        seconds = cost.updates * update + decisions * act + steps * (emulators + store)
        bound = "both"
    else:
        # What Python launches one by one: two calls an update, the rows and the graph, while the emulators step; the rest between steps.
        at_once = max(emulators, 2 * launch * cost.updates / max(1.0, steps))
        host = steps * (at_once + launch * len(work.store)) + decisions * launch * len(work.act)
        learning = cost.updates * update + steps * store
        seconds = max(host, learning) + decisions * act
        bound = "learning" if learning >= host else "playing"
        play = max(play, launch * len(work.play))
    seconds += cost.flops_of_sweep / min(hardware.product_flops.value, hardware.convolution_flops.value)
    play += _emulation(evaluated, config, hardware)
    evaluation = cost.evaluation_frames / config.frame_skip / evaluated * play
    shares: dict[Bound, float] = {each: 0.0 for each in get_args(Bound)}
    for time in times:
        shares[time.bound] += time.seconds / update
    return StageLimit(
        cost=cost,
        num_kernels=len(work.update),
        bytes_moved=sum(kernel.bytes_moved for kernel in work.update),
        update_seconds=update,
        shares=shares,
        training_hours=seconds / 3600,
        evaluation_hours=evaluation / 3600,
        bound=bound,
    )


def _emulation(lanes: int, config: Config, hardware: Hardware) -> float:
    """Seconds of a step of so many lanes."""
    return math.ceil(lanes / hardware.cores.value) * config.frame_skip / hardware.emulator_frames.value


def sensitivity(model: Model, hardware: Hardware, width: int | None = None) -> dict[str, tuple[float, float]]:
    """Hours that growing saves with each constant halved and doubled, by the constant's name."""
    return {
        name: (
            model.limit(hardware.with_scaled(name, 0.5), width).saved_hours,
            model.limit(hardware.with_scaled(name, 2.0), width).saved_hours,
        )
        for name in hardware.constants
    }
