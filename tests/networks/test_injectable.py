"""What a head must be to be injected: its end is linear, and it trains whole."""

import itertools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from tiny import tiny, tiny_sac
from torch import Tensor, nn
from torch.nn import functional as F

from growtrain import InjectedHead, inject
from growtrain.environments.atari import make_spec
from growtrain.environments.base import Spec
from growtrain.networks.build import NETWORKS, make_parts, make_vector_part
from growtrain.networks.injectable import check_injectable
from growtrain.settings.config import Activation, Normalization, OutputBias, Split

FEATURES, ACTIONS = 16, 3


class Ending(nn.Module):
    """A head with a function of its last layer's output at its end."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(FEATURES, 32), nn.Linear(32, ACTIONS * 5)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.out(F.relu(self.hidden(x))))


class Streams(nn.Module):
    """A dueling head whose two streams are put together by a function."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 32)
        self.value, self.advantage = nn.Linear(32, 1), nn.Linear(32, ACTIONS)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.hidden(x))
        return self.join(self.value(hidden), self.advantage(hidden))


class Functional(nn.Module):
    """A head without layers."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 32)
        self.weight = nn.Parameter(torch.randn(32, ACTIONS))
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.relu(self.first(x)) @ self.weight)


def layers(*end: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, ACTIONS), *end)


def prelu() -> nn.Module:
    return nn.PReLU(init=0.3)


def h_inverse(x: Tensor) -> Tensor:
    """The value rescaling of R2D2, undone."""
    return torch.sign(x) * (((torch.sqrt(1 + 4e-3 * (x.abs() + 1 + 1e-3)) - 1) / 2e-3) ** 2 - 1)


NON_LINEAR: dict[str, Callable[[], nn.Module]] = {
    "softmax": lambda: Ending(lambda y: torch.softmax(y.view(-1, ACTIONS, 5), -1)),
    "log-softmax": lambda: layers(nn.LogSoftmax(-1)),
    "tanh": lambda: layers(nn.Tanh()),
    "scaled tanh": lambda: Ending(lambda y: 100 * torch.tanh(y / 100)),
    "sigmoid": lambda: layers(nn.Sigmoid()),
    "relu": lambda: layers(nn.ReLU()),
    "softplus": lambda: layers(nn.Softplus()),
    "prelu": lambda: layers(prelu()),
    "clamp": lambda: Ending(lambda y: y.clamp(-50, 50)),
    "layer norm": lambda: layers(nn.LayerNorm(ACTIONS)),
    "unit norm": lambda: Ending(lambda y: F.normalize(y, dim=-1)),
    "exp": lambda: Ending(torch.exp),
    "h": lambda: Ending(h_inverse),
    "maximum": lambda: Ending(lambda y: y.view(-1, ACTIONS, 5).amax(-1)),
    "one stream": lambda: Streams(lambda v, a: F.softplus(v) + a),
    "product of streams": lambda: Streams(lambda v, a: v * a),
    "functional": lambda: Functional(torch.tanh),
}
LINEAR: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: layers(),
    "logits": lambda: Ending(lambda y: y.view(-1, ACTIONS, 5)),
    "mean of quantiles": lambda: Ending(lambda y: y.view(-1, ACTIONS, 5).mean(-1)),
    "scale and offset": lambda: Ending(lambda y: 10 * y + 3),
    "dueling": lambda: Streams(lambda v, a: v + a - a.mean(-1, keepdim=True)),
    "unflatten": lambda: nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 6), nn.Unflatten(1, (3, 2))),
    "in place": lambda: nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(inplace=True), nn.Linear(32, 6)),
    "weight norm": lambda: nn.Sequential(
        nn.Linear(FEATURES, 32), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(32, 6))
    ),
    "functional": lambda: Functional(lambda y: y),
    "inner softmax": lambda: nn.Sequential(nn.Linear(FEATURES, 32), nn.Softmax(-1), nn.Linear(32, 6)),
}


@pytest.mark.parametrize("frozen", [False, True])  # as a target network's
@pytest.mark.parametrize("name", NON_LINEAR)
def test_a_head_that_ends_in_a_non_linearity_is_refused(name: str, frozen: bool) -> None:
    head = NON_LINEAR[name]().requires_grad_(not frozen)
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=r"ends in a non-linearity.*name a head that ends in a linear layer"):
        InjectedHead(head)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LINEAR)
def test_a_head_that_is_linear_at_its_end_is_taken(name: str, dtype: torch.dtype) -> None:
    check_injectable(LINEAR[name]().to(dtype))


def test_a_non_linearity_at_the_end_shows_in_half_precision() -> None:
    with pytest.raises(ValueError, match="ends in a non-linearity"):
        check_injectable(layers(nn.Tanh()).bfloat16())


def test_a_head_that_returns_several_tensors_is_refused() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    with pytest.raises(ValueError, match="returns tuple, not a tensor"):
        InjectedHead(nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), Pair(8, 2)))


@pytest.mark.parametrize("frozen", ["0.weight", "2.bias"])
def test_a_partly_frozen_head_is_refused(frozen: str) -> None:
    network = nn.ModuleDict({"head": layers()})
    network["head"].get_parameter(frozen).requires_grad_(False)
    optimizer, head = torch.optim.Adam(network.parameters()), network["head"]
    with pytest.raises(ValueError, match=rf"partly frozen \({frozen}\).*unfreeze it"):
        inject(network, optimizer=optimizer)
    assert network["head"] is head
    with pytest.raises(ValueError, match="partly frozen"):
        InjectedHead(head).inject()


def test_a_frozen_head_is_refused_and_so_is_one_that_is_frozen_after_an_injection() -> None:
    network = nn.ModuleDict({"head": layers()})
    optimizer = torch.optim.Adam(network.parameters())
    inject(network, optimizer=optimizer)
    network["head"].live[0].requires_grad_(False)
    with pytest.raises(ValueError, match="partly frozen"):
        inject(network, optimizer=optimizer)
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="the head is frozen: nothing of it trains"):
        inject(network, optimizer=optimizer)
    assert network["head"].num_injections == 1


def test_inside_inference_mode_nothing_is_made() -> None:
    network = nn.ModuleDict({"head": layers()})
    optimizer, head = torch.optim.Adam(network.parameters()), network["head"]
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"inference_mode.*outside it \(torch.no_grad\(\) is fine\)"):
            inject(network, optimizer=optimizer)
        with pytest.raises(ValueError, match="inference_mode"):
            InjectedHead(head).inject()
        probe = torch.rand(8, FEATURES)
    assert network["head"] is head
    with torch.no_grad():
        inject(network, optimizer=optimizer, probe=probe)
    network["head"](torch.rand(2, FEATURES)).sum().backward()
    assert all(p.grad is not None for p in network["head"].live.parameters())


ATARI, MINATAR = make_spec(6), Spec(frame_shape=(4, 10, 10), stack_size=1, num_actions=6, frame_skip=1, scale=1.0)
VECTORS = Spec(frame_shape=(5,), stack_size=1, num_actions=2, frame_skip=1, scale=1.0, continuous=True)
PARTED = [*((ATARI, split) for split in get_args(Split)), (MINATAR, "fc1"), (MINATAR, "conv1")]


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("normalization", get_args(Normalization))
def test_every_head_of_the_trainer_s_own_can_be_injected(activation: Activation, normalization: Normalization) -> None:
    """They are not looked at when they are built."""
    changes: dict[str, Any] = {"activation": activation, "normalization": normalization}
    for (spec, split), output_bias in itertools.product(PARTED, get_args(OutputBias)):
        check_injectable(make_parts(tiny(**changes, split=split, output_bias=output_bias), spec, 16)[1])
    if normalization != "spectral":  # is of networks with an encoder
        for name in NETWORKS:
            check_injectable(make_vector_part(tiny_sac(**changes), VECTORS, name, 16))
