"""An injection into anybody's network is done whole or not at all: whatever fails, network, target and optimizer are as they were."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor, nn

from growtrain import InjectedNetwork, inject, inject_network
from growtrain.environments.atari import make_spec
from growtrain.growth import freezing
from growtrain.growth.inject import NotPreserved
from growtrain.growth.membership import Membership
from growtrain.growth.transaction import GrowthFailed, apply
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.networks.attachments import Attachments
from growtrain.networks.heads import initialize
from growtrain.networks.location import Head
from growtrain.planning.speed import synthetic_batches
from growtrain.settings.schedules import Intervention


class Net(nn.Sequential):
    """A network with buffers that a forward pass in training mode changes, below its head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def no_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("out of memory")


def bits(tensor: Tensor) -> tuple[int, int, bytes]:
    return id(tensor), tensor.data_ptr(), tensor.detach().numpy().tobytes()


def state_of(optimizer: torch.optim.Optimizer, *networks: nn.Module) -> list[Any]:
    """All that an injection might change, the objects included."""
    state: list[Any] = []
    for network in networks:
        for name, module in network.named_modules():
            hooks = [
                {key: id(hook) for key, hook in value.items()} for key, value in vars(module).items() if "hooks" in key
            ]
            state.append((name, id(module), module.training, list(module._modules), hooks))
        for name, p in network.named_parameters():
            state.append((name, *bits(p), p.requires_grad, p.grad is None or bits(p.grad)))
        state += [(name, *bits(buffer)) for name, buffer in network.named_buffers()]
    for group in optimizer.param_groups:
        state.append({key: [id(p) for p in value] if key == "params" else value for key, value in group.items()})
    for p, slots in optimizer.state.items():
        state.append((id(p), {key: bits(value) for key, value in slots.items()}))
    return state


class Loop:
    """Somebody's loop: a network of a kind and its target, and the optimizer after some steps."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(16, 8)
        self.network = wrap(Net())
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.network.named_parameters(), lr=1e-2)
        for _ in range(3):
            self.optimizer.zero_grad()
            ((self.network(self.x) - 1) ** 2).mean().backward()
            self.optimizer.step()
        self.network.eval()
        self.target.eval()

    @property
    def state(self) -> list[Any]:
        return state_of(self.optimizer, self.network, self.target)


def not_finite(module: nn.Module, generator: torch.Generator) -> None:
    initialize(module, generator)
    with torch.no_grad():
        next(module.parameters()).fill_(torch.nan)


def only_heads_are_finite(module: nn.Module, generator: torch.Generator) -> None:
    (not_finite if isinstance(module, Net) else initialize)(module, generator)


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception] | tuple[type[Exception], ...]]] = {
    "fresh weights that are not finite": ({"initializer": not_finite}, (ValueError, NotPreserved)),
    "another optimizer": ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(2))])}, ValueError),
    "no optimizer": ({"optimizer": [3]}, ValueError),
    "probe's shape": ({"probe": torch.rand(4, 31)}, Exception),
    "observations' shape": ({"observations": torch.rand(4, 7)}, RuntimeError),
    "observations' type": ({"observations": "frames"}, TypeError),
    "another target": ({"target": InjectedNetwork(nn.Sequential(nn.Linear(8, 3)))}, (ValueError, AttributeError)),
    "no such head": ({"head": "tail"}, ValueError),
}
STEPS: dict[str, tuple[type, str]] = {
    "hooks go over": (Attachments, "hand_over"),
    "heads are put in place": (Head, "put"),
    "optimizer is mended": (Membership, "mend"),
}


@pytest.fixture(params=["inject", "warm", "cold"])
def injection(request: pytest.FixtureRequest) -> Iterator[tuple[Loop, Callable[..., object]]]:
    if request.param == "inject":
        yield Loop(nn.Identity().forward), inject
    else:
        yield (
            Loop(InjectedNetwork),
            lambda network, **given: inject_network(network, live_encoder=request.param, **given),
        )


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_that_fail_leave_all_as_it_was(
    what: str, stage: int, injection: tuple[Loop, Callable[..., object]]
) -> None:
    loop, call = injection
    given: dict[str, Any] = {"optimizer": loop.optimizer, "target": loop.target}
    for _ in range(stage):
        call(loop.network, **given)
    before, (arguments, error) = loop.state, ARGUMENTS[what]
    with pytest.raises(error):
        call(loop.network, **(given | arguments))
    assert loop.state == before


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_halfway_is_undone(
    step: str, count: int, injection: tuple[Loop, Callable[..., object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, call = injection
    owner, name = STEPS[step]
    does, calls = getattr(owner, name), iter(range(1, 100))

    def fails(*arguments: object) -> None:
        does(*arguments)
        if next(calls) >= min(count, 1 + (name != "mend")):
            no_memory()

    before = loop.state
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(torch.OutOfMemoryError):
        call(loop.network, optimizer=loop.optimizer, target=loop.target)
    assert loop.state == before


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_fresh_weights_that_cannot_be_drawn_change_nothing(
    nth: int, injection: tuple[Loop, Callable[..., object]]
) -> None:
    loop, call = injection
    before, needed = loop.state, 0

    def draw(module: nn.Module, generator: torch.Generator) -> None:
        nonlocal needed
        needed += 1
        if needed == nth:
            no_memory()
        initialize(module, generator)

    def do() -> None:
        call(loop.network, optimizer=loop.optimizer, target=loop.target, initializer=draw)

    with pytest.raises(torch.OutOfMemoryError) if nth < 3 else contextlib.suppress(torch.OutOfMemoryError):
        do()
    if nth < 3 or needed == 3:  # the third is the encoder's, where it begins anew
        assert loop.state == before


def test_a_cold_encoder_with_weights_that_are_not_finite_is_refused() -> None:
    loop = Loop(InjectedNetwork)
    before = loop.state
    with pytest.raises(NotPreserved, match=r"encoder\.0\.weight is not finite"):
        inject_network(loop.network, optimizer=loop.optimizer, live_encoder="cold", initializer=only_heads_are_finite)
    assert loop.state == before


def test_weights_that_were_overwritten_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, does = Loop(InjectedNetwork), freezing._begin_anew
    before = loop.state

    def fails(*arguments: Any) -> None:
        does(*arguments)
        no_memory()

    monkeypatch.setattr(freezing, "_begin_anew", fails)
    with pytest.raises(torch.OutOfMemoryError):
        inject_network(loop.network, optimizer=loop.optimizer, target=loop.target, live_encoder="cold")
    assert loop.state == before


class Wrapped:
    """An optimizer of no class of PyTorch's that holds another and shows what that has, as libraries' wrappers do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> dict[Any, Any]:
        return self.optimizer.state


def test_a_cold_encoder_loses_its_moments_in_an_optimizer_inside_another_of_any_class() -> None:
    loop = Loop(InjectedNetwork)
    before = loop.network(loop.x)
    inject_network(loop.network, optimizer=Wrapped(loop.optimizer), live_encoder="cold")  # type: ignore[arg-type]
    assert torch.equal(loop.network(loop.x), before)
    assert not loop.optimizer.state


class Skipping(Net):
    """A network whose output is not its head's alone."""

    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x)) + self.skip(x)
        return out


class Dueling(Net):
    """A network with a value stream beside its head."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        advantage: Tensor = self.head(features)
        out: Tensor = self.value(features) + advantage - advantage.mean(1, keepdim=True)
        return out


class Squashing(Net):
    """A network that has the last word on what its head gives."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)).softmax(1)


class Same(Net):
    """A network whose output is its head's, which only its forward says."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out


@pytest.mark.parametrize("kind", [Skipping, Dueling, Squashing, Same])
def test_a_network_that_may_give_something_else_than_its_head_needs_observations(kind: type[Net]) -> None:
    network, x = InjectedNetwork(kind()).eval(), torch.randn(4, 8)
    optimizer = torch.optim.Adam(network.parameters())
    before, values = state_of(optimizer, network), network(x)
    with pytest.raises(ValueError, match=r"something else than head 'head' does .*: pass observations="):
        inject_network(network, optimizer=optimizer)
    assert state_of(optimizer, network) == before
    if kind is Same:
        inject_network(network, optimizer=optimizer, observations=x)
        assert torch.equal(network(x), values)
        return
    with pytest.raises(NotPreserved, match="adds to what its head gives, or changes it"):
        inject_network(network, optimizer=optimizer, observations=x)
    assert state_of(optimizer, network) == before


@pytest.mark.parametrize(
    ("head", "alone"), [("2", True), ("2.0:", True), ("2.0", True), ("2.0.0:", True), ("1", False), ("1.0:", False)]
)
def test_the_end_of_nested_sequentials_needs_none_and_what_something_follows_does(head: str, alone: bool) -> None:
    def layers() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    network, x = InjectedNetwork(nn.Sequential(layers(), layers(), nn.Sequential(layers()))), torch.randn(4, 8)
    optimizer, before = torch.optim.Adam(network.parameters()), network(x)
    if alone:
        inject_network(network, head=head, optimizer=optimizer)
        assert torch.equal(network(x), before)
    else:
        with pytest.raises(ValueError, match="pass observations="):
            inject_network(network, head=head, optimizer=optimizer)
        assert not network.num_injections


def test_a_layer_that_computes_something_else_in_evaluation_mode_is_named_as_the_cause() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.training

    network = InjectedNetwork(nn.Sequential(Noisy(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    with pytest.raises(NotPreserved, match="something else in evaluation mode"):
        inject_network(network, head="1:", optimizer=[], observations=torch.randn(4, 8))


def test_observations_do_not_move_what_a_forward_pass_counts() -> None:
    network = Net()
    before = [bits(buffer) for buffer in network.buffers()]
    inject(network, optimizer=torch.optim.Adam(network.parameters()), observations=torch.randn(16, 8))
    assert [bits(buffer) for buffer in network.buffers()] == before


class ByProperty(nn.Module):
    """A network that gives its head by another name, as a property."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    @property
    def head(self) -> nn.Module:
        return self.inner.head

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def test_a_head_behind_a_property_is_named_where_it_is() -> None:
    network = ByProperty()
    optimizer = torch.optim.Adam(network.parameters())
    before = state_of(optimizer, network)
    with pytest.raises(ValueError, match=r"name 'inner\.head'"):
        inject(network, optimizer=optimizer)
    assert state_of(optimizer, network) == before


@pytest.mark.parametrize("fails_at", ["verify", "mend"])
def test_heads_that_train_on_keep_their_mode(fails_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(nn.Identity().forward)
    loop.network.train()
    before = loop.state
    if fails_at == "mend":
        monkeypatch.setattr(Membership, "mend", no_memory)
    else:
        monkeypatch.setattr("growtrain.growth.inject.same_function", lambda *_: False)
    with pytest.raises((NotPreserved, torch.OutOfMemoryError)):
        inject(loop.network, optimizer=loop.optimizer, trainable_heads="all")
    assert loop.state == before


# A run's own learner

SPEC = make_spec(6)
INTERVENTIONS: dict[str, tuple[Intervention, dict[str, Any]]] = {
    "paper": ("inject", {}),
    "all heads": ("inject", {"trainable_heads": "all", "anchor": "mirrored"}),
    "warm": ("inject", {"freeze": "network"}),
    "cold": ("inject", {"freeze": "network", "live_encoder": "cold"}),
    "reset-head": ("reset-head", {}),
    "reset-all": ("reset-all", {}),
    "shrink-perturb": ("shrink-perturb", {}),
    "widen": ("widen", {"normalization": "spectral"}),
    "net2wider": ("net2wider", {}),
    "redo": ("redo", {"redo_tau": 0.1}),
    "fresh-optimizer": ("fresh-optimizer", {}),
}


@pytest.mark.parametrize("step", ["rebuild", "_check_membership", "_check_outputs", "also"])
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_a_learner_is_as_it_was_whatever_step_fails(name: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    intervention, settings = INTERVENTIONS[name]
    config, generator = tiny(**settings), torch.Generator().manual_seed(0)
    learner = DoubleDQN(config, SPEC, width=config.width, device=torch.device("cpu"), generator=generator)
    learner.update(synthetic_batches(config, SPEC, 2, generator))
    learner.copy_target()
    learner.online.train()
    probe = torch.randint(256, (32, *SPEC.observation_shape), dtype=torch.uint8, generator=generator)
    before, rebuild = state_of(learner.optimizer, learner.online, learner.target), learner.rebuild
    if step == "rebuild":  # which the way back needs as well
        calls = iter((no_memory, rebuild))
        monkeypatch.setattr(learner, "rebuild", lambda: next(calls)())
    elif step != "also":
        monkeypatch.setattr(f"growtrain.growth.transaction.{step}", no_memory)
    with pytest.raises(GrowthFailed, match="rolled back: out of memory"):
        apply(
            learner,
            intervention,
            probe,
            config=config,
            generator=generator,
            freeze_encoder=name in ("paper", "all heads", "reset-head"),
            also=no_memory if step == "also" else None,
        )
    assert state_of(learner.optimizer, learner.online, learner.target) == before
