"""How well can this network still learn? A supervised test on a checkpoint's own replay, without an environment.

Copies of the network are asked for one and the same change of their predictions, in a fixed number of updates. What is asked for is what
the replay says the network should learn next: the distance from its action values to n-step returns, bootstrapped by the target network
as it is (value-like targets, as in section 3 of Nikishin et al. 2023, which regresses returns). The copies differ in one part each that
has been made fresh:

    current          nothing: what the run would go on with
    inject           the head, by plasticity injection; the encoder, too, where the run injects with one
    reset-head       the head
    reset-encoder    the encoder
    fresh-optimizer  the optimizer's slots, where the run's optimizer is Adam
    fresh-network    all of these

Every copy starts from its own predictions plus that change, so all have the same error at the start: what is compared is how far the
parameters can move the function, and a fresh part has no disadvantage for knowing nothing (the idea of injection itself).

Of a learner with several networks one is tested: of SAC a critic, whose value of the action that was taken is to move as above, or the
actor, one of whose means at each state is to move where the critics' gradient says. An actor's slots are fresh in all copies: those of the
run have seen the entropy's gradients, beside which such changes are small, and its optimizer is not judged.

All of them learn with Adam, whatever the run's optimizer: where TD errors are small, DQN's epsilon makes the steps of centred RMSProp so
small that no copy learns anything in a few hundred updates at the run's learning rate, and hardly one evenly at any. RMSProp's slots
forget within some 20 updates, so nothing can be lost in them; Adam's remember a thousand, and are taken over from the run if it has them.
The change is asked for at a root mean square of `size`, whatever the scale of the rewards, which is small enough for all copies to learn
evenly; the loss is scaled back, so that gradients fit the slots. Before the first update every optimizer takes in `warm_up` gradients
without moving anything: fresh slots would otherwise make larger first steps. Regularizers and weight projection, which act on the weights
and not on what is asked for, are left out.

Units: an error is the mean squared distance that is left over that at the start: 1 nothing was learned, 0 everything. Copies are compared
by the mean error on the way (`mean_errors`), which says how fast they learn: small networks do not get to the end, large ones all do.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from growtrain.growth.alternatives import head_of
from growtrain.growth.kinds import KINDS, Kind, kind_of
from growtrain.growth.transaction import intervene
from growtrain.learners.base import AbstractLearner
from growtrain.learners.make import make_learner
from growtrain.learners.optimizers import make_optimizer
from growtrain.learners.sac import SAC
from growtrain.networks.build import QNetwork
from growtrain.networks.heads import SpectralLinear
from growtrain.networks.injected import fresh_copy
from growtrain.replay.ring import LaneRing
from growtrain.settings.config import Config
from growtrain.settings.schedules import Intervention

Copy = str
# What is done to each copy.
COPIES: dict[Copy, Intervention | None] = {"current": None} | {
    kind.copy or intervention: intervention for intervention, kind in KINDS.items() if kind.is_evidence
}
_EPS = 1e-8  # Adam's own
_CHUNK = 256  # observations in one forward pass without a gradient


@dataclass(frozen=True, kw_only=True)
class LearningTest:
    """How the test is done.

    Attributes:
        seeds: repetitions, each with its own transitions, order of batches and fresh weights, the same for all copies.
        transitions: to fit.
        updates: gradient steps on batches of the run's size.
        n_steps: agent steps of reward in a target.
        size: root mean square of the change that is asked for.
        lr: learning rate.
        warm_up: gradients that the optimizer takes in before it may move anything.
        marks: errors measured on the way, evenly spaced, the last one at the end.
    """

    seeds: int = 10
    transitions: int = 128
    updates: int = 400
    n_steps: int = 10
    size: float = 0.25
    lr: float = 1.5e-4
    warm_up: int = 50
    marks: int = 8


@dataclass(frozen=True)
class Task:
    """What is to be fitted: `change` (n,) of output `action` (n,) at `observation` (n, ...), as the network takes it; `scale` times that
    is what the replay says, 0 if it says nothing.
    """

    observation: Tensor
    action: Tensor
    change: Tensor
    scale: float


class Interrupted(Exception):
    """The test was asked to stop before its end."""


def kinds_of(config: Config) -> dict[Copy, Kind]:
    """What is done to every copy but the current one, as a run of this configuration has it done."""
    return {copy: kind_of(intervention, config) for copy, intervention in COPIES.items() if intervention}


def copies_of(config: Config, *, encoder_frozen: bool, network: str = "") -> list[Copy]:
    """The copies that are tested: all but what the run could not have done to its network.

    Those are `reset-encoder` and `fresh-network` where no encoder learns, and `fresh-optimizer` where its optimizer is not Adam, or the
    network is an actor.
    """
    kinds = kinds_of(config)
    same = {copy for copy, kind in kinds.items() if encoder_frozen and "encoder" in kind.born}
    same |= {copy for copy, kind in kinds.items() if kind.place == "optimizer" and not _keeps_slots(config, network)}
    return [copy for copy in COPIES if copy not in same]


def _keeps_slots(config: Config, network: str) -> bool:
    """Whether the test's Adam goes on with the run's slots."""
    return config.optimizer == "adam" and network != "actor"


def compare_copies(
    learner: AbstractLearner,
    ring: LaneRing,
    test: LearningTest,
    seeds: np.random.SeedSequence,
    copies: Sequence[Copy],
    stop: Callable[[], bool | str] = lambda: False,
    network: str | None = None,
) -> dict[Copy, list[list[float]]]:
    """The errors of copies of a network of a live learner on its replay, neither of which is changed: one list a seed, one error a mark.

    Args:
        learner: live.
        ring: its replay.
        test: how it is done.
        seeds: of its repetitions.
        copies: those to compare.
        stop: asked before each copy of each seed.
        network: which of the learner's; None: its first.

    Raises:
        ValueError: the replay holds no transition.
        Interrupted: `stop`, which is asked before each copy of each seed, said so.
    """
    name = network or next(iter(learner.networks))
    errors: dict[Copy, list[list[float]]] = {copy: [] for copy in copies}
    for seed in seeds.spawn(test.seeds):
        generator = np.random.default_rng(seed)
        task = make_task(learner, ring, test, generator, name)
        order = generator.integers(test.transitions, size=(test.warm_up + test.updates, learner.config.batch_size))
        weights = int(generator.integers(2**62))
        for copy in copies:
            if stop():
                raise Interrupted
            twin, optimizer = make_copy(
                copy, _twin(learner), task.observation, torch.Generator().manual_seed(weights), name
            )
            errors[copy].append(
                _fit(twin, optimizer, task, torch.from_numpy(order).to(learner.device), learner.config, test)
            )
    return errors


def count_flops(
    learner: AbstractLearner, ring: LaneRing, test: LearningTest, copies: Sequence[Copy], network: str | None = None
) -> int:
    """FLOPs that `compare_copies` takes, of matrix products and convolutions; of three short tests, what a longer one repeats.

    Args:
        learner: as of `compare_copies`, like all that follows.
        ring: its replay.
        test: how it is done.
        copies: those to compare.
        network: which of the learner's.
    """

    def counted(updates: int, marks: int) -> int:
        short = dataclasses.replace(test, seeds=1, warm_up=0, updates=updates, marks=marks)
        with FlopCounterMode(display=False) as counter:
            compare_copies(learner, ring, short, np.random.SeedSequence(0), copies, network=network)
        total: int = counter.get_total_flops()
        return total

    one, longer, marked = counted(1, 1), counted(2, 1), counted(2, 2)
    more_updates, more_marks = test.warm_up + test.updates - 1, test.marks - 1
    return test.seeds * (one + more_updates * (longer - one) + more_marks * (marked - longer))


def mean_errors(errors: Mapping[Copy, Sequence[Sequence[float]]]) -> dict[Copy, list[float]]:
    """The mean error on the way of every copy, one a seed."""
    return {copy: [sum(curve) / len(curve) for curve in curves] for copy, curves in errors.items()}


def make_task(
    learner: AbstractLearner,
    ring: LaneRing,
    test: LearningTest,
    generator: np.random.Generator,
    network: str | None = None,
) -> Task:
    """Transitions drawn from the replay, and the change of their values that their n-step returns ask for, less its mean for each action.

    The return is sum_k<n gamma^k r_k + gamma^n Q_target(s_n, argmax_a Q_online(s_n, a)), cut at a terminal transition, and
    bootstrapped earlier where the replay or an episode that was cut off ends. The mean is left out because an output bias can learn it,
    in a network whose every unit is dead.

    Of an actor, the change of one of its means for each state, towards what the critics value more.

    Raises:
        ValueError: the replay holds no transition.
    """
    valid = np.flatnonzero(ring.valid)
    if not valid.size:
        raise ValueError("the replay of this checkpoint is empty: train longer before asking what it can still learn")
    start = generator.choice(valid, size=test.transitions, replace=valid.size < test.transitions)
    flat, discount = start.copy(), np.ones(start.size)
    running = np.ones(start.size, dtype=np.bool_)
    returns = np.zeros(start.size)
    for step in range(test.n_steps):
        if step:
            following = flat - flat % ring.rows + (flat % ring.rows + 1) % ring.rows
            running &= ring.valid[following]
            flat = np.where(running, following, flat)
        batch = ring.gather(torch.from_numpy(flat).to(ring.device))
        returns += np.where(running, discount * batch.reward[:, 0].cpu().numpy(), 0.0)
        terminated = batch.terminated[:, 0].cpu().numpy()
        discount = np.where(running, np.where(terminated, 0.0, discount * learner.config.discount), discount)
        running &= ~terminated
    last, first = (ring.gather(torch.from_numpy(rows).to(ring.device)) for rows in (flat, start))
    name = network or next(iter(learner.networks))
    online, observation = learner.networks[name][0], learner.inputs(first.to_tensordict())[name]
    if isinstance(learner, SAC) and name == "actor":
        output = torch.from_numpy(generator.integers(learner.spec.num_actions, size=start.size)).to(ring.device)
        change = learner.improvement(observation).gather(1, output[:, None])[:, 0]
    else:
        output = torch.zeros_like(first.action[:, 0], dtype=torch.int64) if learner.spec.continuous else first.action
        bootstrap = torch.cat([learner.bootstrap(part) for part in torch.split(last.next_observation, _CHUNK)])
        goal = torch.from_numpy(returns).to(bootstrap) + torch.from_numpy(discount).to(bootstrap) * bootstrap
        change = goal - _chosen(_values(online, observation), output)
    taken = F.one_hot(output, learner.spec.num_actions).to(change)
    change = change - taken @ ((change @ taken) / taken.sum(0).clamp(min=1))
    scale = float(change.square().mean().sqrt()) / test.size
    return Task(observation, output, change / scale if scale else change, scale)


def make_copy(
    copy: Copy, learner: AbstractLearner, observations: Tensor, generator: torch.Generator, name: str | None = None
) -> tuple[QNetwork, torch.optim.Optimizer]:
    """The network of a learner that is given up for it, with one part made fresh, and an Adam that has kept the run's slots of the rest.

    What is fresh in several copies is the same in them: a fresh network's parts, or beyond them the head of an injection.
    """
    config, network = learner.config, learner.networks[name or next(iter(learner.networks))][0]
    assert isinstance(network, QNetwork)
    if intervention := COPIES[copy]:
        kind = kind_of(intervention, config)
        for part in (network.encoder, head_of(network).live)[: 2 if kind.draws_once else "encoder" not in kind.born]:
            fresh_copy(part, generator)
        intervene(kind, [network], learner.optimizer, observations, config, generator)
    trainable = [p for p in network.parameters() if p.requires_grad]
    adam = _keeps_slots(config, name or "")
    optimizer = make_optimizer(
        "adam", trainable, lr=config.lr, eps=config.optimizer_eps if adam else _EPS, decay=config.optimizer_decay
    )
    if adam:
        optimizer.state.update(learner.optimizer.state)
    return network, optimizer


def _fit(
    network: QNetwork, optimizer: torch.optim.Optimizer, task: Task, order: Tensor, config: Config, test: LearningTest
) -> list[float]:
    """The errors at the marks, after the warm-up and `order[k]` as the transitions of update k."""
    frozen = _values(network.snapshot, task.observation) if len(network.snapshot) else None
    goal = _chosen(_values(network, task.observation), task.action) + task.change
    spectral = [m for m in network.modules() if isinstance(m, SpectralLinear) and m.weight.requires_grad]
    errors = []
    for update, rows in enumerate(order, start=-test.warm_up + 1):
        for group in optimizer.param_groups:
            group["lr"] = test.lr if update > 0 else 0.0
        for layer in spectral:
            layer.power_iterate()
        known = None if frozen is None else frozen[rows]
        q = _chosen(network(task.observation[rows], known), task.action[rows])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(task.scale * F.mse_loss(q, goal[rows]) / 2)
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        optimizer.step()
        if update > 0 and update * test.marks // test.updates > (update - 1) * test.marks // test.updates:
            left = _chosen(_values(network, task.observation), task.action) - goal
            # Where nothing was asked for, nothing was learned.
            errors.append(float(left.square().mean()) / test.size**2 if task.scale else 1.0)
    return errors


def _twin(learner: AbstractLearner) -> AbstractLearner:
    """A learner of its own in the same state."""
    twin = make_learner(learner.config, learner.spec, device=learner.device)
    twin.load_state_dict(learner.state_dict())
    return twin


@torch.no_grad()
def _values(network: nn.Module, observation: Tensor) -> Tensor:
    return torch.cat([network(part) for part in torch.split(observation, _CHUNK)])


def _chosen(q: Tensor, action: Tensor) -> Tensor:
    return q.gather(1, action[:, None])[:, 0]
