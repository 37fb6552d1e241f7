"""How fast a planned run would be on this machine: real updates of every stage, and real environments, are timed.

Units: seconds; hours where a name says so.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from growtrain.environments.base import Actions, Spec
from growtrain.environments.make import make_environment
from growtrain.growth.transaction import apply
from growtrain.learners.base import AbstractLearner
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.graph import CapturedUpdate, uses_graph
from growtrain.learners.make import make_learner
from growtrain.networks.snapshot import ROWS_AT_ONCE
from growtrain.planning.allocator import keep_freed_memory
from growtrain.planning.costs import Plan, full_width, make_plan, updates_at_once
from growtrain.replay.ring import Transitions
from growtrain.settings.config import Config
from growtrain.settings.schedules import schedule_of


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per stage, from `timed` updates.

    Attributes:
        update_seconds: of one update.
        act_seconds, eval_act_seconds: of one action of all lanes, and of those that an evaluation has.
        swept_row_seconds: of one row of the sweep that the stage begins with; 0 without one.
        timed: updates.
        spread: the worst stage's (slowest - fastest) / median over its blocks of updates: large where the machine is busy.
    """

    update_seconds: tuple[float, ...]
    act_seconds: tuple[float, ...]
    eval_act_seconds: tuple[float, ...]
    swept_row_seconds: tuple[float, ...]
    timed: int
    spread: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured on this machine.

    Attributes:
        machine: the device, in words.
        run, baseline: times of the run and of its full-width baseline.
        environment_seconds, eval_environment_seconds: one step of all lanes, and of those that an evaluation has.
        overlapped: updates on a GPU run while the environments step; on a CPU both use the same cores, so their times add up.
    """

    machine: str
    run: Timing
    baseline: Timing
    environment_seconds: float
    eval_environment_seconds: float
    overlapped: bool

    def projected_hours(self, plan: Plan, timing: Timing) -> list[float]:
        """Hours of training per stage: acting, environments, updates, sweeps; not evaluation, sampling, logging or checkpoints."""
        hours, lanes = [], plan.config.num_envs
        for stage, cost in enumerate(plan.stages):
            learning = cost.updates * timing.update_seconds[stage]
            playing = cost.frames / plan.config.frame_skip / lanes * self.environment_seconds
            both = max(learning, playing) if self.overlapped else learning + playing
            acting = cost.policy_steps / lanes * timing.act_seconds[stage]
            hours.append((acting + both + cost.rows_swept * timing.swept_row_seconds[stage]) / 3600)
        return hours

    def evaluation_hours(self, plan: Plan, *, at_most: bool = False) -> float:
        """Hours of all evaluations: if their episodes last as planned, or if every one is cut at its greatest length."""
        config, lanes = plan.config, plan.config.num_eval_lanes
        rounds = -(-config.num_eval_episodes // lanes) * config.max_episode_frames / config.frame_skip
        hours = 0.0
        for cost, act in zip(plan.stages, self.run.eval_act_seconds, strict=True):
            steps = cost.evaluations * rounds if at_most else cost.evaluation_frames / config.frame_skip / lanes
            hours += steps * (act + self.eval_environment_seconds) / 3600
        return hours


def measure_speed(config: Config, spec: Spec, device: torch.device, *, seconds: float = 6.0) -> Speed:
    """Times real updates of a learner grown stage by stage and of the full-width baseline, and steps real environments.

    Takes about `seconds`, longer on slow machines; batches are noise. Sets torch's number of threads as a run does.
    """
    torch.set_num_threads(config.threads)
    baseline = full_width(config)
    share = 0.75 * seconds / (len(make_plan(config, spec).stages) + (baseline != config))
    run = _time_stages(config, spec, device, share)
    cuda = device.type == "cuda"
    of_evaluation = dataclasses.replace(config, num_envs=config.num_eval_lanes)
    time_each = (0.25 if of_evaluation == config else 0.125) * seconds
    environment_seconds = eval_environment_seconds = _time_environments(config, time_each)
    if of_evaluation != config:
        eval_environment_seconds = _time_environments(of_evaluation, time_each)
    return Speed(
        machine=torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        run=run,
        baseline=run if baseline == config else _time_stages(baseline, spec, device, share),
        environment_seconds=environment_seconds,
        eval_environment_seconds=eval_environment_seconds,
        overlapped=cuda,
    )


def synthetic_batches(config: Config, spec: Spec, num_updates: int, generator: torch.Generator) -> TensorDict:
    """Batches of noise (num_updates, batch_size), laid out as the replay's, on the host."""
    count = num_updates * config.batch_size
    shape = (count, spec.stack_size + 1, *spec.frame_shape)
    if spec.is_vector:
        frames = torch.randn(shape, generator=generator)
    else:
        frames = torch.randint(round(spec.scale) + 1, shape, dtype=torch.uint8, generator=generator)
    if spec.continuous:
        action = 2 * torch.rand((count, spec.num_actions), generator=generator) - 1
    else:
        action = torch.randint(spec.num_actions, (count,), generator=generator)
    transitions = Transitions(
        frames=frames,
        action=action,
        reward=torch.randint(-1, 2, (count, 1), generator=generator).float(),
        terminated=torch.zeros((count, 1), dtype=torch.bool),
    )
    return transitions.to_tensordict().view(num_updates, config.batch_size)


def keep_frozen_values(learner: AbstractLearner, batches: TensorDict) -> None:
    """Puts into batches (K, B) what a replay keeps of a network that is frozen whole; nothing where none is."""
    for part in (batches, batches["next"]):
        if (values := learner.frozen_value(part["observation"].flatten(0, 1))) is not None:
            part["frozen_value"] = values.view(*batches.shape, -1)


def grown_stage_by_stage(
    config: Config, spec: Spec, device: torch.device, num_updates: int = 1
) -> Iterator[tuple[AbstractLearner, TensorDict]]:
    """A learner at its beginning and after each growth of its schedule, made as a run makes it, with batches (num_updates, B) of noise.

    It is the same learner every time, in the state that most updates of a stage find: the target has been copied since.
    """
    plan, generator = make_plan(config, spec), torch.Generator().manual_seed(0)
    learner = make_learner(config, spec, device=device, generator=generator)
    batches = synthetic_batches(config, spec, num_updates, generator).to(device)
    for stage in range(len(plan.stages)):
        if stage:
            probe, freeze = learner.inputs(batches[0]), stage == config.freeze_encoder_at
            _copy_target(learner)  # a network is frozen whole at a copy
            intervention = schedule_of(config).intervention
            apply(learner, intervention, probe, config=config, generator=generator, freeze_encoder=freeze)
            _copy_target(learner)  # what is frozen is shared with the target from its first copy on
            keep_frozen_values(learner, batches)
        yield learner, batches


def _time_stages(config: Config, spec: Spec, device: torch.device, seconds: float) -> Timing:
    num_updates = updates_at_once(config)
    if device.type == "cpu":
        keep_freed_memory()  # as a run does
    dtype, lanes = torch.float32 if spec.is_vector else torch.uint8, config.num_eval_lanes
    observation = torch.zeros((config.num_envs, *spec.observation_shape), dtype=dtype, device=device)
    rows = torch.zeros((ROWS_AT_ONCE, *spec.observation_shape), dtype=dtype, device=device)
    known = torch.zeros((ROWS_AT_ONCE, spec.num_outputs), device=device)
    updates, acts, eval_acts, sweeps, timed, spread = [], [], [], [], 0, 0.0
    update: Callable[[], object] | None = None
    learners = grown_stage_by_stage(config, spec, device, num_updates)
    for cost, (learner, batches) in zip(make_plan(config, spec).stages, learners, strict=True):
        update = update or make_update(learner, batches)
        blocks, calls = _block_seconds(update, device, 0.7 * seconds)
        updates.append(float(np.median(blocks)) / num_updates)
        acts.append(_median_seconds(partial(_act, learner, observation), device, 0.1 * seconds))
        few = partial(_act, learner, observation[:lanes])
        eval_acts.append(acts[-1] if lanes == config.num_envs else _median_seconds(few, device, 0.1 * seconds))
        sweep = partial(learner.frozen_value, rows, known)
        sweeps.append(_median_seconds(sweep, device, 0.1 * seconds) / ROWS_AT_ONCE if cost.flops_of_sweep else 0.0)
        timed += calls * num_updates
        spread = max(spread, float(np.ptp(blocks) / np.median(blocks)))
    return Timing(
        update_seconds=tuple(updates),
        act_seconds=tuple(acts),
        eval_act_seconds=tuple(eval_acts),
        swept_row_seconds=tuple(sweeps),
        timed=timed,
        spread=spread,
    )


def _median_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    return float(np.median(_block_seconds(call, device, seconds)[0]))


def _act(learner: AbstractLearner, observation: Tensor) -> Tensor:
    return learner.act(observation).cpu()


def _copy_target(learner: AbstractLearner) -> None:
    """Copies the target of a learner that does so at a period."""
    if isinstance(learner, DoubleDQN):
        learner.copy_target()


def make_update(learner: AbstractLearner, batches: TensorDict) -> Callable[[], object]:
    """As many updates as there are batches, as a run does them: on a GPU in a CUDA graph, unless the execution is eager."""
    if not uses_graph(learner.config, learner.device):
        return lambda: learner.update(batches)
    captured = CapturedUpdate(learner, lambda rows: batches[0], learner.config.batch_size)
    no_rows = torch.zeros(batches.numel(), dtype=torch.int64)
    return lambda: captured.update(no_rows)


def _block_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> tuple[list[float], int]:
    """Seconds per call of five blocks, and how many calls they were; the device is waited for once a block."""

    def block(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    block(2)  # warm-up: allocator, kernel choice, graph capture
    calls = max(1, int(seconds / (6 * block(1))))
    return [block(calls) for _ in range(5)], 5 * calls


def random_actions(spec: Spec, num_lanes: int, generator: np.random.Generator) -> Actions:
    """An action of every lane, uniformly drawn."""
    if spec.continuous:
        return generator.uniform(-1, 1, (num_lanes, spec.num_actions)).astype(np.float32)
    return generator.integers(spec.num_actions, size=num_lanes)


def _time_environments(config: Config, seconds: float) -> float:
    """Mean time of a random step of all lanes."""
    environment, generator, steps = make_environment(config, seed=0), np.random.default_rng(0), 0
    try:
        environment.start()
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or not steps:
            environment.send(random_actions(environment.spec, config.num_envs, generator))
            environment.recv()
            steps += 1
    finally:
        environment.close()
    return elapsed / steps
