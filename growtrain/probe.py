"""The supervised plasticity probe: one network learns task after task, and each intervention shows what it gives back.

Nikishin et al. 2023, section 3, regress the returns of successive policies on frames of Up'n'Down and find that a warm-started network
learns ever more slowly while a fresh one learns every task. Here the frames are real, too, and the tasks are cheap: a task is a target for
each of `num_frames` frames, learned for `num_updates` updates of `batch_size`. Its error is the mean squared error over all frames, divided
by the target's variance: 1 is nothing learned, what a fresh network reaches is plasticity kept.

Targets, one row per task:
    random: independent N(0, 1) for every frame and task (Lyle et al. 2022, "Understanding and Preventing Capacity Loss", section 3:
        target-fitting capacity). Whatever was learned before only interferes.
    value: discounted sums of rewards along the play, whose reward and horizon change from task to task as under a policy that improves
        (Dabney et al. 2021, "The Value-Improvement Path"; random cumulants as in Lyle et al. 2021, "On the Effect of Auxiliary Tasks").
        With xi independent N(0, 1) for every step of the play,
            r_0 = xi_0,   r_k = rho r_{k-1} + sqrt(1 - rho^2) xi_k,   gamma_k = 1 - 1 / h_k,   h_k = h_0 (h_last / h_0)^(k / (K - 1))
            G_k(t) = m + r_k(t) + gamma_k G_k(t + 1), and without the last term where an episode or the play ends.
        Neighbouring tasks correlate, and the scale grows with the horizon.

What an intervention does is in `arms`. All of them continue from one warm-started network, the trunk, see the same frames, targets and
batches in the same order and, where they draw fresh weights, draw from the same generator: differences between arms of one seed are paired.

Deviations: 1. Targets are not the returns of trained policies (the paper's 20 snapshots of a Double DQN). 2. The squared error, not Huber.
3. `small` is a network and a frame size of our own, for speed. 4. What the settings lose is measured, not assumed; see `SETTINGS`.

Units: tasks are counted from 0; `seconds` are of one thread.
"""

import contextlib
import copy
import dataclasses
import json
import math
import pickle
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growtrain.collection import epsilon_greedy
from growtrain.config import Anchor, ConfigError, OptimizerName, flag
from growtrain.environments.atari import FRAME_SHAPE, AtariEnvironment
from growtrain.growth.interventions import inject
from growtrain.networks.encoders import NatureEncoder, scale_frames
from growtrain.networks.heads import initialize, make_head
from growtrain.networks.injected import InjectedHead
from growtrain.networks.q_network import QNetwork
from growtrain.optimizers import CenteredRMSProp
from growtrain.provenance import describe_machine
from growtrain.runfiles import run_lock, write_json
from growtrain.telemetry.sinks import JsonlSink, read_jsonl

TargetKind = Literal["random", "value"]
Sweep = Literal["none", "init"]

WARM, FRESH = "warm", "reset-all-every"  # the trunk, and the arm whose network is fresh in every task
NUM_LANES = 8
SPACING = 8  # agent steps between the frames taken from a lane: neighbours differ visibly
CORRELATION = 0.5  # rho
HORIZONS = (1.0, 30.0)  # h_0 and h_last, agent steps
MEAN_REWARD = 0.0  # m
SHRINK = 0.8  # share of the old weights after shrink-perturb (SR-SPR, D'Oro et al. 2023)
INIT_SCALES = (0.25, 1.0, 4.0)
LEAST_TASKS = 8  # the first of three injections comes at an eighth


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An optimizer, and thereby what a warm start loses.

    Attributes:
        optimizer: `adam`, or the trainer's own `centered_rmsprop`.
        encoder_lr, head_lr: learning rates.
    """

    optimizer: OptimizerName
    encoder_lr: float
    head_lr: float


SETTINGS: dict[str, Setting] = {
    "encoder": Setting(optimizer="adam", encoder_lr=3e-4, head_lr=3e-4),
    "head": Setting(optimizer="adam", encoder_lr=3e-5, head_lr=1e-3),
    "rmsprop": Setting(optimizer="centered_rmsprop", encoder_lr=2.5e-4, head_lr=2.5e-4),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network and the frames it sees.

    Attributes:
        side: of the square frames; 42 are means of 2 x 2 pixels.
        width: hidden units of the head.
    """

    side: int
    width: int


SIZES: dict[str, Size] = {"small": Size(side=42, width=512), "nature": Size(side=84, width=512)}


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What all records of one directory have in common.

    Attributes:
        game: Atari game, in snake_case.
        policy: directory of the run whose newest checkpoint plays; empty: random play.
        size: a name in `SIZES`.
        sweep: `none`: the interventions; `init`: the initialisation of an injected head.
        num_frames: frames in the data set.
        num_tasks: K.
        num_updates: gradient steps on each task.
        batch_size: frames in one update.
    """

    game: str = "up_n_down"
    policy: str = ""
    size: str = "small"
    sweep: Sweep = "none"
    num_frames: int = 512
    num_tasks: int = 20
    num_updates: int = 250
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Checks the fields; raises `ConfigError`."""
        _require_known("--size", [self.size], SIZES)
        _require_known("--sweep", [self.sweep], get_args(Sweep))
        for name, least in (("num_tasks", LEAST_TASKS), ("num_updates", 1), ("batch_size", 1), ("num_frames", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}: it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A setting, a kind of targets and a seed: what the arms of one comparison share."""

    setting: str
    targets: TargetKind
    seed: int


@dataclass(frozen=True)
class Play:
    """Distinct frames of one stretch of play.

    Attributes:
        frames: (N, 4, S, S) uint8 stacks.
        kept: (N,) their positions in the flattened (T, L) steps of the play.
        ended: (T, L) bool, an episode ended with this step.
    """

    frames: npt.NDArray[np.uint8]
    kept: npt.NDArray[np.int64]
    ended: npt.NDArray[np.bool_]


@dataclass
class Learner:
    """A network that learns, `Sequential(QNetwork)` so that the whole of it can be injected, and its optimizer (encoder, head)."""

    network: nn.Sequential
    optimizer: torch.optim.Optimizer


Intervention = Callable[
    [Learner, torch.Generator, Tensor], None
]  # fresh weights from the generator; frames to verify on


@dataclass(frozen=True)
class Arm:
    """An intervention and the tasks before which it is made."""

    times: tuple[int, ...]
    intervene: Intervention


# Frames and targets


@cache
def play(config: ProbeConfig, seed: int) -> Play:
    """Plays the game, by chance or by the policy at its evaluation epsilon, and keeps `num_frames` distinct frames.

    Raises:
        ConfigError: the policy is of another game, or the play shows too few distinct frames.
    """
    policy, epsilon = None, 1.0
    if config.policy:
        from growtrain.checkpoint import load_learner

        learner, run, _ = load_learner(Path(config.policy), torch.device("cpu"))
        if run.game != config.game:
            raise ConfigError(f"--policy {config.policy} plays {run.game}: add --game {run.game}")
        policy, epsilon = learner.q_values, run.eval_epsilon
    rng = _rng(seed, "play")
    environment = AtariEnvironment(game=config.game, num_envs=NUM_LANES, seed=_seed(seed, "environment"))
    num_steps = -(-2 * config.num_frames // NUM_LANES) * SPACING
    stacks, ended = [], np.zeros((num_steps, NUM_LANES), dtype=np.bool_)
    try:
        step = environment.start()
        for t in range(num_steps):
            if t % SPACING == 0:
                stacks.append(step.observation)
            if policy is None:
                actions = rng.integers(environment.num_actions, size=NUM_LANES)
            else:
                actions = epsilon_greedy(policy(torch.from_numpy(step.observation)).numpy(), epsilon, rng)
            environment.send(actions)
            step = environment.recv()
            ended[t] = step.started
    finally:
        environment.close(raise_if_closed=False)
    frames = _resize(np.concatenate(stacks), SIZES[config.size].side)
    _, distinct = np.unique(frames.reshape(len(frames), -1), axis=0, return_index=True)
    if len(distinct) < config.num_frames:
        raise ConfigError(
            f"{config.game} showed {len(distinct)} distinct frames: --num-frames {config.num_frames} is too many"
        )
    chosen = np.sort(rng.permutation(np.sort(distinct))[: config.num_frames])
    positions = np.arange(num_steps * NUM_LANES).reshape(num_steps, NUM_LANES)[::SPACING].ravel()
    return Play(frames[chosen], positions[chosen], ended)


def _resize(frames: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Means over blocks of pixels: (N, 4, 84, 84) -> (N, 4, side, side); `side` divides 84."""
    block = FRAME_SHAPE[0] // side
    blocks = frames.reshape(*frames.shape[:2], side, block, side, block)
    return blocks.mean((3, 5), dtype=np.float32).round().astype(np.uint8)


def random_targets(num_tasks: int, num_frames: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Independent N(0, 1): (K, N)."""
    return rng.standard_normal((num_tasks, num_frames))


def value_targets(num_tasks: int, ended: npt.NDArray[np.bool_], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """G_k(t) of every step of a play, as the module defines it: (T, L) -> (K, T, L)."""
    first, last = HORIZONS
    rewards = rng.standard_normal(ended.shape)
    values = np.empty((num_tasks, *ended.shape))
    for k in range(num_tasks):
        if k:
            rewards = CORRELATION * rewards + math.sqrt(1 - CORRELATION**2) * rng.standard_normal(ended.shape)
        discount = 1 - 1 / (first * (last / first) ** (k / (num_tasks - 1)))
        value = np.zeros(ended.shape[1])
        for t in reversed(range(len(ended))):
            value = MEAN_REWARD + rewards[t] + discount * np.where(ended[t], 0.0, value)
            values[k, t] = value
    return values


def make_targets(config: ProbeConfig, cell: Cell) -> npt.NDArray[np.float32]:
    """The targets (K, N) of a cell's tasks."""
    rng, data = _rng(cell.seed, "targets"), play(config, cell.seed)
    if cell.targets == "random":
        targets = random_targets(config.num_tasks, config.num_frames, rng)
    else:
        targets = value_targets(config.num_tasks, data.ended, rng).reshape(config.num_tasks, -1)[:, data.kept]
    return targets.astype(np.float32)


# Learning


def make_learner(config: ProbeConfig, setting: Setting, generator: torch.Generator) -> Learner:
    """A fresh network with its optimizer."""
    encoder: nn.Module
    if config.size == "nature":
        encoder = NatureEncoder()
        num_features = encoder.num_features
    else:
        encoder, num_features = _small_encoder(), 32 * 3 * 3
    network = QNetwork(encoder, make_head(num_features, SIZES[config.size].width, 1))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack this overload
    initialize(network, generator)
    groups = [
        {"params": list(network.encoder.parameters()), "lr": setting.encoder_lr},
        {"params": list(network.head.parameters()), "lr": setting.head_lr},
    ]
    adam = setting.optimizer == "adam"
    return Learner(nn.Sequential(network), torch.optim.Adam(groups, fused=True) if adam else CenteredRMSProp(groups))


def _small_encoder() -> nn.Sequential:
    """Three convolutions: (B, 4, 42, 42) -> (B, 288)."""
    layers: list[nn.Module] = []
    channels = 4
    for out_channels, kernel, stride in ((16, 6, 3), (32, 4, 2), (32, 3, 1)):
        layers += [nn.Conv2d(channels, out_channels, kernel, stride), nn.ReLU(inplace=True)]
        channels = out_channels
    return nn.Sequential(*layers, nn.Flatten())


def learn(learner: Learner, frames: Tensor, target: Tensor, batches: Tensor) -> None:
    """One gradient step on each batch of a task.

    Args:
        learner: changed in place.
        frames: (N, 4, S, S) float32.
        target: (N,).
        batches: (U, B) rows of both.
    """
    for rows in batches:
        loss = F.mse_loss(learner.network(frames[rows]).squeeze(1), target[rows])
        learner.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        learner.optimizer.step()


@torch.no_grad()
def error(network: nn.Module, frames: Tensor, target: Tensor) -> float:
    """Mean squared error over all frames, divided by the target's variance."""
    return float(F.mse_loss(network(frames).squeeze(1), target) / target.var(correction=0))


@torch.no_grad()
def diagnose(network: nn.Sequential, frames: Tensor) -> dict[str, float]:
    """Proxies of plasticity of the encoder's features (N, F) and the live head."""
    encoder, head = live_parts(network)
    features = encoder(frames)
    hidden = head[:2](features)
    channels = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)][-1].out_channels
    return {
        "effective_rank": effective_rank(features),
        "dormant_encoder": dormant_fraction(features.view(len(features), channels, -1)),
        "dormant_head": dormant_fraction(hidden[..., None]),
        "weight_norm_encoder": weight_norm(encoder),
        "weight_norm_head": weight_norm(head),
    }


def live_parts(network: nn.Sequential) -> tuple[nn.Module, nn.Sequential]:
    """The encoder and the head that learn; those of the live network where the whole was injected."""
    whole = network[0]
    body = whole.live if isinstance(whole, InjectedHead) else whole
    head = body.get_submodule("head")
    live = head.live if isinstance(head, InjectedHead) else head
    assert isinstance(live, nn.Sequential)
    return body.get_submodule("encoder"), live


def effective_rank(features: Tensor) -> float:
    """The exponential of the entropy of the normalised singular values (Roy & Vetterli 2007): (N, F)."""
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))


def dormant_fraction(activations: Tensor, tau: float = 0.025) -> float:
    """Share of units whose mean activation is at most `tau` times the layer's (Sokar et al. 2023): (N, units, pixels)."""
    scores = activations.abs().mean((0, 2))
    return float((scores <= tau * scores.mean()).float().mean())


def weight_norm(module: nn.Module) -> float:
    """Euclidean norm of all parameters together."""
    return float(nn.utils.get_total_norm([p.detach() for p in module.parameters()]))


# Interventions


def arms(config: ProbeConfig) -> dict[str, Arm]:
    """The arms by name: `-every` before every task, `-3x` at the times of grow3x (1/8, 1/4, 1/2), the others once, half-way.

    Fresh weights come with fresh optimizer slots; shrink-perturb keeps the slots; an injection keeps the encoder's.
    """
    half, every = (config.num_tasks // 2,), tuple(range(1, config.num_tasks))
    thrice = tuple(config.num_tasks // part for part in (8, 4, 2))
    trunk = {WARM: Arm((), _nothing), FRESH: Arm(every, partial(_reset, parts=("encoder", "head")))}
    if config.sweep == "init":
        return trunk | {
            f"scale={scale:g} {distribution} {bias}-bias": Arm(
                half,
                partial(_inject, initializer=partial(initialize_as, scale=scale, distribution=distribution, bias=bias)),
            )
            for scale, distribution, bias in product(INIT_SCALES, DISTRIBUTIONS, BIASES)
        }
    anchors: tuple[Anchor, ...] = ("frozen", "zero", "mirrored")
    return (
        trunk
        | {
            "reset-head-every": Arm(every, partial(_reset, parts=("head",))),
            "shrink-perturb-every": Arm(every, _shrink_perturb),
            "reset-encoder": Arm(half, partial(_reset, parts=("encoder",))),
            "reset-head": Arm(half, partial(_reset, parts=("head",))),
            "fresh-optimizer": Arm(half, _fresh_optimizer),
            "shrink-perturb": Arm(half, _shrink_perturb),
        }
        | {f"inject-{anchor}": Arm(half, partial(_inject, anchor=anchor)) for anchor in anchors}
        | {f"inject-{anchor}-3x": Arm(thrice, partial(_inject, anchor=anchor)) for anchor in anchors}
        | {
            "inject-whole": Arm(half, _inject_whole),
            "inject-freeze-encoder": Arm(half, partial(_inject, freeze_encoder=True)),
        }
    )


def _nothing(learner: Learner, generator: torch.Generator, frames: Tensor) -> None:
    """The warm start."""


def _reset(learner: Learner, generator: torch.Generator, frames: Tensor, *, parts: tuple[str, ...]) -> None:
    """Fresh weights and slots for parts of the network (Nikishin et al. 2022)."""
    for part in parts:
        module = learner.network.get_submodule(f"0.{part}")
        initialize(module, generator)
        for parameter in module.parameters():
            learner.optimizer.state.pop(parameter, None)


@torch.no_grad()
def _shrink_perturb(learner: Learner, generator: torch.Generator, frames: Tensor) -> None:
    """All weights w <- SHRINK w + (1 - SHRINK) fresh (Ash & Adams 2020)."""
    fresh = copy.deepcopy(learner.network)
    initialize(fresh, generator)
    for parameter, other in zip(learner.network.parameters(), fresh.parameters(), strict=True):
        parameter.lerp_(other, 1 - SHRINK)


def _fresh_optimizer(learner: Learner, generator: torch.Generator, frames: Tensor) -> None:
    """The optimizer forgets its moments."""
    learner.optimizer.state.clear()


def _inject(
    learner: Learner,
    generator: torch.Generator,
    frames: Tensor,
    *,
    anchor: Anchor = "frozen",
    freeze_encoder: bool = False,
    initializer: Callable[[nn.Module, torch.Generator], None] = initialize,
) -> None:
    """Injects plasticity into the head; the encoder stops learning if asked."""
    inject(
        learner.network,
        head="0.head",
        optimizer=learner.optimizer,
        generator=generator,
        anchor=anchor,
        initializer=initializer,
    )
    if freeze_encoder:
        learner.network.get_submodule("0.encoder").requires_grad_(False)
        learner.optimizer.zero_grad(set_to_none=True)  # a parameter without a gradient is left alone


def _inject_whole(learner: Learner, generator: torch.Generator, frames: Tensor) -> None:
    """The other split: encoder and head together are what is injected."""
    inject(learner.network, head="0", optimizer=learner.optimizer, generator=generator, probe=frames)


DISTRIBUTIONS = ("uniform", "normal", "orthogonal")
BIASES = ("default", "zero")


@torch.no_grad()
def initialize_as(module: nn.Module, generator: torch.Generator, *, scale: float, distribution: str, bias: str) -> None:
    """Fresh weights of linear layers, in place: `initialize`, another distribution of the same variance, times `scale`.

    Args:
        module: changed.
        generator: source of the weights (CPU).
        scale: factor on weights and biases.
        distribution: of the weights, `uniform`, `normal` or `orthogonal` (Saxe et al. 2014).
        bias: `default`, U(+-scale / sqrt(fan_in)), or `zero`.
    """
    initialize(module, generator)
    for layer in module.modules():
        if not isinstance(layer, nn.Linear):
            continue
        std = (3 * layer.in_features) ** -0.5
        if distribution == "normal":
            nn.init.normal_(layer.weight, std=std, generator=generator)
        elif distribution == "orthogonal":
            nn.init.orthogonal_(layer.weight, generator=generator)
            layer.weight.mul_(std / layer.weight.square().mean().sqrt())
        layer.weight.mul_(scale)
        layer.bias.mul_(scale if bias == "default" else 0.0)


# Cells: a trunk and the arms that fork from it

Record = dict[str, Any]
Data = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]  # frames (N, 4, S, S) and targets (K, N)


def learn_trunk(
    config: ProbeConfig, cell: Cell, data: Data, names: Sequence[str]
) -> tuple[list[Record], dict[int, bytes]]:
    """Learns all tasks warm.

    Returns:
        The records of `WARM`, and the pickled learner before each task at which one of the named arms leaves the trunk.
    """
    forks = {times[0]: b"" for name in names if (times := arms(config)[name].times)}
    learner = make_learner(config, SETTINGS[cell.setting], _generator(cell.seed, "initial"))
    records: list[Record] = []
    for task in range(config.num_tasks):
        if task in forks:
            forks[task] = pickle.dumps(learner)
        records += _learn_tasks(config, cell, data, WARM, learner, range(task, task + 1))
    return records, forks


def learn_arm(
    config: ProbeConfig, cell: Cell, data: Data, name: str, trunk: Sequence[Record], fork: bytes
) -> list[Record]:
    """An arm's records: the trunk's until its first intervention, then its own."""
    start = arms(config)[name].times[0]
    own = _learn_tasks(config, cell, data, name, pickle.loads(fork), range(start, config.num_tasks))
    return [record | {"arm": name} for record in trunk[:start]] + own


def _learn_tasks(
    config: ProbeConfig, cell: Cell, data: Data, name: str, learner: Learner, tasks: range
) -> list[Record]:
    torch.set_num_threads(1)
    arm = arms(config)[name]
    frames = scale_frames(torch.from_numpy(data[0]))
    records = []
    for task in tasks:
        start = time.thread_time()
        target = torch.from_numpy(data[1][task])
        if task in arm.times:
            arm.intervene(learner, _generator(cell.seed, "fresh", task), frames)
        first_error = error(learner.network, frames, target)
        shape = (config.num_updates, config.batch_size)
        batches = torch.randint(config.num_frames, shape, generator=_generator(cell.seed, "batches", task))
        learn(learner, frames, target, batches)
        records.append(
            {
                "setting": cell.setting,
                "targets": cell.targets,
                "arm": name,
                "seed": cell.seed,
                "task": task,
                "intervened": task in arm.times,
                "first_error": first_error,
                "error": error(learner.network, frames, target),
                "seconds": time.thread_time() - start,
                **diagnose(learner.network, frames),
            }
        )
    return records


def run(
    config: ProbeConfig, cells: Sequence[Cell], names: Sequence[str], directory: Path, processes: int
) -> Iterator[list[Record]]:
    """Runs what `directory` lacks, and adds each arm's records to its `probe.jsonl` when the arm is done.

    Args:
        config: kept in `config.json`; a directory holds records of one configuration.
        cells: in the order in which they are run.
        names: of arms.
        directory: made if missing.
        processes: workers of one thread each; the records do not depend on their number.

    Yields:
        The records of each arm that was run, one per task.

    Raises:
        ConfigError: the directory holds another configuration, or another process works there.
    """
    with run_lock(directory), contextlib.closing(open_records(config, directory)) as sink:
        done = complete(config, read_jsonl(directory / "probe.jsonl"))
        missing = {cell: wanted for cell in cells if (wanted := [n for n in names if (cell, n) not in done])}
        for records in _run_cells(config, missing, processes):
            for record in records:
                sink.write(record)
            yield records


def _run_cells(config: ProbeConfig, missing: dict[Cell, list[str]], processes: int) -> Iterator[list[Record]]:
    """Trunks are learned while arms of the cell before still are; at most one more cell than workers is in memory."""
    executor: Executor = (
        ProcessPoolExecutor(processes, get_context("spawn")) if processes > 1 else ThreadPoolExecutor(1)
    )
    waiting, pending = iter(missing), dict[Future[Any], Cell | None]()

    def begin() -> None:
        if (cell := next(waiting, None)) is not None:
            data = play(config, cell.seed).frames, make_targets(config, cell)
            pending[executor.submit(learn_trunk, config, cell, data, missing[cell])] = cell

    try:
        for _ in range(processes):
            begin()
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                cell = pending.pop(future)
                if cell is None:
                    yield future.result()
                    continue
                trunk, forks = future.result()
                data = play(config, cell.seed).frames, make_targets(config, cell)
                for name in missing[cell]:
                    if name != WARM:
                        fork = forks[arms(config)[name].times[0]]
                        pending[executor.submit(learn_arm, config, cell, data, name, trunk, fork)] = None
                begin()
                if WARM in missing[cell]:
                    yield trunk
    finally:
        executor.shutdown(cancel_futures=True)


def make_cells(settings: Sequence[str], kinds: Sequence[str], num_seeds: int) -> list[Cell]:
    """All combinations, seed by seed; raises `ConfigError` for an unknown name or no seed."""
    _require_known("--setting", settings, SETTINGS)
    _require_known("--targets", kinds, get_args(TargetKind))
    if num_seeds < 1:
        raise ConfigError(f"--seeds is {num_seeds}: it must be at least 1")
    return [
        Cell(setting=setting, targets=kind, seed=seed)
        for seed in range(num_seeds)
        for setting in settings
        for kind in get_args(TargetKind)
        if kind in kinds
    ]


def choose_arms(config: ProbeConfig, names: Sequence[str]) -> list[str]:
    """These arms, or all without any; raises `ConfigError` for an unknown one."""
    _require_known("--arms", names, arms(config))
    return list(names or arms(config))


def _require_known(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    for value in given:
        if value not in known:
            raise ConfigError(f"{name}: {value!r} is unknown: choose from {', '.join(known)}")


def one_line(records: Sequence[Record]) -> str:
    """What an arm reached, for whoever watches."""
    first, late = records[0], records[len(records) // 2 :]
    mean = sum(r["error"] for r in late) / len(late)
    name = f"{first['setting']} {first['targets']} seed {first['seed']} {first['arm']}"
    return f"{name:56} late error {mean:.3f}  {sum(r['seconds'] for r in records):.0f} s"


def complete(config: ProbeConfig, records: Sequence[Record]) -> dict[tuple[Cell, str], list[Record]]:
    """The records of every arm of every cell that has one for each task, in the order of the tasks."""
    found: dict[tuple[Cell, str], dict[int, Record]] = {}
    for r in records:
        cell = Cell(setting=r["setting"], targets=r["targets"], seed=r["seed"])
        found.setdefault((cell, r["arm"]), {})[r["task"]] = r
    return {key: [rs[task] for task in sorted(rs)] for key, rs in found.items() if len(rs) == config.num_tasks}


def open_records(config: ProbeConfig, directory: Path) -> JsonlSink:
    """The sink of a directory's records, after its `config.json` has been compared or written."""
    path = directory / "config.json"
    if path.exists() and read_config(directory) != config:
        theirs, ours = dataclasses.asdict(read_config(directory)), dataclasses.asdict(config)
        differ = ", ".join(f"{flag(name)} {theirs[name]}" for name in ours if theirs[name] != ours[name])
        raise ConfigError(f"{directory} holds a probe with {differ}: give the same, or choose another --output")
    write_json(path, dataclasses.asdict(config) | describe_machine(torch.device("cpu")))
    return JsonlSink(directory / "probe.jsonl")


def read_config(directory: Path) -> ProbeConfig:
    """The configuration of a directory's records; raises `ConfigError` if it holds none."""
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return ProbeConfig(**{item.name: values[item.name] for item in dataclasses.fields(ProbeConfig)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{directory} holds no probe ({error}): name the --output of growtrain probe") from error


def _seed(seed: int, stream: str, task: int = 0) -> int:
    """A seed for one use: streams of different seeds, names and tasks are unrelated."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(stream.encode()), task])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def _rng(seed: int, stream: str) -> np.random.Generator:
    return np.random.default_rng(_seed(seed, stream))


def _generator(seed: int, stream: str, task: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, stream, task))
