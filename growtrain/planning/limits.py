"""The least time that a run can take on named hardware, and what growing saves there: modelled, not measured.

The kernels of a stage's updates, of acting and of storing a step are counted from the real ones (`growtrain.planning.work`), of a
learner that was really grown. A kernel takes the longest of

    the least that any kernel takes,   its FLOPs / peak rate,   its bytes / bandwidth.

Bytes come from the second-level cache where they were used so lately that they are still there (least recently used goes first), else
from memory. Emulators take frames / (frames per second of a core), as many at once as there are cores.

`fast` is growtrain's own loop: an update is one CUDA graph, but for `--execution eager`, and emulators step while the learner learns.
`reference` is the paper's strict alternation of one environment and a learner that launches operator after operator: its times add up, and
a kernel takes at least what its launch takes.

Deviations: 1. peaks are had at any shape; 2. no Python but launches: drawing batches, records, checkpoints; 3. the target's copies are left
out; 4. the sweep of the replay after an injection of the whole network costs its FLOPs; 5. every game's emulator is as fast as Atari's.
All but the last make real runs slower. What growing saves is the difference of two least times: where everything takes twice as long, so
does what it saves.

Units: seconds unless a name says hours; FLOPs; bytes; frames.
"""

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from growtrain.environments.base import Spec
from growtrain.planning.costs import StageCost, full_width, make_plan
from growtrain.planning.hardware import Hardware
from growtrain.planning.kernels import Kernel
from growtrain.planning.work import Work, WorkByWidth
from growtrain.settings.config import Config

Stack = Literal["fast", "reference"]
Bound = Literal["latency", "arithmetic", "memory"]


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


class Model:
    """The limits of a run and of its full-width baseline, at any width and on any hardware.

    Args:
        config, spec: of the run.
        stack: how it is run.
    """

    def __init__(self, config: Config, spec: Spec, stack: Stack) -> None:
        if stack == "reference":
            config = dataclasses.replace(config, num_envs=1, execution="eager")
        self.config, self.spec, self.stack = config, spec, stack
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
    eager = config.execution == "eager"
    times = kernel_times(work.update, hardware, launch if eager else hardware.graph_kernel.value)
    least = hardware.graph_kernel.value if stack == "fast" else launch
    update = total(times)
    act, store, play = (total(kernel_times(part, hardware, least)) for part in (work.act, work.store, work.play))
    emulators, evaluated = _emulation(lanes, config, hardware), config.num_eval_lanes
    steps, decisions = cost.frames / config.frame_skip / lanes, cost.policy_steps / lanes
    if stack == "reference":
        seconds = cost.updates * update + decisions * act + steps * (emulators + store)
        bound = "both"
    else:
        # What Python launches one by one: of an update rows and graph, or every kernel, while emulators step; the rest between steps.
        calls = 1 + (len(work.update) if eager else 1)
        at_once = max(emulators, calls * launch * cost.updates / max(1.0, steps))
        # Actions are waited for, while what is launched for them is carried out.
        host = steps * (at_once + launch * len(work.store)) + decisions * max(launch * len(work.act), act)
        device = cost.updates * update + steps * store + decisions * act
        seconds = max(host, device)
        bound = "learning" if device >= host else "playing"
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
