"""Networks of other people's code in which an injection could go wrong without a word: it is right, or refused with a line."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from growtrain import InjectedNetwork, inject, inject_network
from growtrain.growth.inject import NotPreserved
from growtrain.networks.attachments import holds
from growtrain.networks.injected import InjectedHead
from growtrain.settings.config import Anchor

ANCHORS: tuple[Anchor, ...] = ("frozen", "zero", "mirrored")


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class SharedTrunk(nn.Module):
    """An actor and a critic on what the same layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.actor, self.critic = nn.Linear(32, 2), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.actor(hidden), self.critic(hidden)


def test_what_another_head_reads_is_not_taken_from_it() -> None:
    network, x = SharedTrunk(), torch.randn(8, 4)
    before, modules = network(x), list(network.modules())
    with pytest.raises(NotPreserved, match="something else uses a module of the head"):
        inject(network, head=("trunk.2", "trunk.3", "critic"), optimizer=sgd(network), observations=x)
    assert list(network.modules()) == modules
    assert all(map(torch.equal, network(x), before))


class Staged(nn.Module):
    """Reaches its head through a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 8), mlp(8, 8, 2)
        self.stages = [self.encoder, self.head]

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def test_a_head_that_is_reached_past_its_name_is_refused() -> None:
    network = Staged()
    for observations in (None, torch.randn(8, 4)):
        with pytest.raises(ValueError, match="'stages' holds a module of the head"):
            inject(network, optimizer=sgd(network), observations=observations)
    assert isinstance(network.head, nn.Sequential)


class Stages:
    """Something that holds modules."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules

    def run(self, x: Tensor) -> Tensor:
        for module in self.modules:
            x = module(x)
        return x


@pytest.mark.parametrize(
    "hold",
    [
        lambda network: {"all": [network.encoder, network.head]},
        lambda network: network.head.forward,
        lambda network: Stages(network.head).run,
        lambda network: (lambda head: lambda x: head(x))(network.head),
    ],
)
def test_a_head_that_is_held_deeper_is_refused(hold: Callable[[Any], Any]) -> None:
    network = Staged()
    network.stages = hold(network)
    with pytest.raises(ValueError, match="'stages' holds a module of the head"):
        inject(network, optimizer=sgd(network))


def test_a_head_that_is_held_by_an_object_is_seen_not_to_be_computed() -> None:
    class Hidden(Staged):
        def __init__(self) -> None:
            super().__init__()
            self.stages = []
            self.run = Stages(self.encoder, self.head)

        def forward(self, x: Tensor) -> Tensor:
            return self.run.run(x)

    network, x = Hidden(), torch.randn(8, 4)
    optimizer, modules = sgd(network), list(network.modules())
    with pytest.raises(
        NotPreserved, match=r"'head\.0\.weight' would leave, and the network would go on computing with it"
    ):
        inject(network, optimizer=optimizer, observations=x)
    assert list(network.modules()) == modules
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in network.parameters()]


class TwoNames(nn.Module):
    """Its head, and what holds that, have two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 8), mlp(8, 8, 2)
        self.parts = nn.ModuleList([self.encoder, self.head])
        self.alias = self.parts

    def forward(self, x: Tensor) -> Tensor:
        for part in self.alias:
            x = part(x)
        return x


@pytest.mark.parametrize("head", ["head", "parts.1", "alias.1", "head.0:", "parts.1.0:"])
def test_a_head_with_two_names_is_injected_under_both(head: str) -> None:
    network, x = TwoNames(), torch.randn(8, 4)
    target, optimizer = copy.deepcopy(network).requires_grad_(False), sgd(network)
    for number in (1, 2):
        before = network(x)
        inject(network, head=head, optimizer=optimizer, target=target, observations=x if number == 2 else None)
        assert torch.equal(network(x), before)
        assert torch.equal(target(x), before)
        assert network.head is network.parts[1] is network.alias[1]
        live = [module for module in network.modules() if isinstance(module, InjectedHead)]
        assert [module.num_injections for module in live] == [number]
        optimizer.zero_grad()
        network(x).sum().backward()
        assert all(p.grad is not None for p in optimizer.param_groups[0]["params"])


def test_a_part_of_a_head_that_has_another_name_is_refused_and_the_remedy_works() -> None:
    network = TwoNames()
    with pytest.raises(ValueError, match=r"with 'parts\.1\.0': .* the same module under another name"):
        inject(network, head=("head.0", "head.1", "head.2"), optimizer=sgd(network), observations=torch.randn(8, 4))
    network.output = network.head[2]
    with pytest.raises(ValueError, match=r"with 'output': .* the same module under another name: keep that"):
        inject(network, optimizer=sgd(network))
    del network.output
    inject(network, optimizer=sgd(network))
    network = Staged()
    with pytest.raises(ValueError, match=r"in an nn.ModuleList, too, or .* a tail .*: head='head\.0:'"):
        inject(network, optimizer=sgd(network))
    inject(network, head="head.0:", optimizer=sgd(network), observations=torch.randn(8, 4))
    network = Staged()
    network.stages = nn.ModuleList(network.stages)
    inject(network, optimizer=sgd(network), observations=torch.randn(8, 4))


class Closed(nn.Module):
    """One of its functions is bound to it, which a copy is not."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(8, 8), nn.Linear(8, 2)
        self.activated = lambda x: F.relu(self.hidden(x))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.activated(x))
        return out


def with_forward_set(module: nn.Module) -> nn.Module:
    """As `module.forward = torch.compile(module.forward)` leaves it."""
    bound = module.forward
    module.forward = lambda *inputs: bound(*inputs)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("lags", [False, True])
@pytest.mark.parametrize("make", [Closed, lambda: with_forward_set(mlp(8, 8, 2))])
def test_a_copy_that_computes_with_the_old_head_is_refused(
    make: Callable[[], nn.Module], lags: bool, anchor: Anchor
) -> None:
    head = make()
    network: nn.Module = nn.ModuleDict({"head": head})
    target: nn.Module = nn.ModuleDict({"head": make()}).requires_grad_(False)
    if lags and isinstance(head, nn.Sequential):
        del head.forward
    with pytest.raises((NotPreserved, ValueError), match=r"would leave|cannot be seen that this head gives 0"):
        inject(network, optimizer=sgd(network), target=target if lags else None, anchor=anchor)
    assert network["head"] is head
    assert not any(p.requires_grad for p in target.parameters())


class InTwoParts(nn.Module):
    """A layer of the head's last part is there twice."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, 8)
        self.q = nn.Sequential(act, nn.Linear(8, 8), act, nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.q(self.fc(self.body(x)))
        return out


def test_a_layer_that_is_there_twice_is_computed_twice() -> None:
    network, x = InTwoParts(), torch.randn(8, 4)
    before = network(x)
    inject(network, head=("fc", "q"), optimizer=sgd(network), observations=x)
    assert torch.equal(network(x), before)
    act = nn.ReLU()
    network_of_layers = nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 2))
    before = network_of_layers(x)
    inject(network_of_layers, head="2:", optimizer=sgd(network_of_layers), observations=x)
    assert torch.equal(network_of_layers(x), before)


class Rectified(nn.Sequential):
    """Has a forward of its own, in which only the sign of its features shows."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = super().forward(F.relu(input))
        return out


@pytest.mark.parametrize("anchor", ANCHORS)
def test_a_sequential_with_a_forward_of_its_own_keeps_it(anchor: Anchor) -> None:
    network, x = (
        nn.Sequential(nn.Linear(4, 32), Rectified(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))),
        torch.randn(64, 4),
    )
    for _ in range(2):
        before = network(x)
        inject(network, head="1", optimizer=sgd(network), anchor=anchor)
        assert torch.equal(network(x), before)
        with torch.no_grad():
            for p in network[1].live.parameters():
                p.add_(torch.randn_like(p) / 10)


class Noisy(nn.Module):
    """Random, in a way that no class tells."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Scaled(nn.Module):
    """Works on its input in place, as one does with pictures."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(1).div_(2)


@pytest.mark.parametrize("layer", [nn.RReLU, Noisy, Scaled])
def test_a_frozen_network_that_may_be_another_is_compared(layer: Callable[[], nn.Module]) -> None:
    network, x = InjectedNetwork(nn.Sequential(layer(), *mlp(4, 32, 32, 2))), torch.randn(64, 4)
    with pytest.raises(ValueError, match="pass observations="):
        inject_network(network, head="3:", optimizer=sgd(network))
    with pytest.raises((ValueError, NotPreserved), match=r"in evaluation mode|changes its input"):
        inject_network(network, head="3:", optimizer=sgd(network), observations=x)
    assert not network.num_injections


def test_a_network_that_rectifies_its_input_in_place_is_compared() -> None:
    network = InjectedNetwork(nn.Sequential(nn.SiLU(inplace=True), *mlp(4, 32, 32, 2)))
    with pytest.raises(ValueError, match="changes its input: pass observations="):
        inject_network(network, head="3:", optimizer=[])


def orthogonal(module: nn.Module, _: torch.Generator) -> None:
    """As CleanRL's `layer_init`, which knows no generator."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)


def test_an_initializer_that_draws_from_the_global_generator_gives_both_networks_the_same() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(len(drawn))
        network, target = mlp(4, 32, 32, 2), mlp(4, 32, 32, 2)
        inject(
            network,
            head="2:",
            optimizer=sgd(network),
            target=target,
            initializer=orthogonal,
            generator=torch.Generator().manual_seed(7),
        )
        weights = [each[2].live[0].weight for each in (network, target)]
        assert torch.equal(*weights)
        drawn.append(weights[0])
    assert torch.equal(*drawn)


class Gained(nn.Linear):
    """Has a parameter of which PyTorch's reset knows nothing."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.ones(outputs))


class Lapan(nn.Linear):
    """Noise whose size is learned, and which its reset leaves."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.sigma = nn.Parameter(torch.full((outputs, inputs), 0.017))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -0.1, 0.1)
        nn.init.zeros_(self.bias)


def test_what_a_reset_does_not_draw_is_not_taken_for_fresh() -> None:
    network = nn.Sequential(nn.Linear(4, 8), Gained(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"no reset_parameters\(\) of its own"):
        inject(network, head="1:", optimizer=sgd(network))
    network = nn.Sequential(nn.Linear(4, 8), Lapan(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        network[1].sigma.uniform_(0, 0.5)
    with pytest.raises(ValueError, match="leaves 'sigma' as it was"):
        inject(network, head="1:", optimizer=sgd(network))


class Critic(nn.Sequential):
    """As TorchRL's `MLP`: takes observation and action."""

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = super().forward(torch.cat(inputs, dim=-1))
        return out


def test_a_head_is_called_as_it_was() -> None:
    critic = nn.ModuleDict({"q": Critic(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))})
    observation, action = torch.randn(2, 4), torch.randn(2, 2)  # two rows: a pair that could be unpacked
    for anchor in ANCHORS:
        before = critic["q"](observation, action)
        inject(critic, head="q", optimizer=sgd(critic), anchor=anchor)
        assert torch.equal(critic["q"](observation, action), before)
    network = nn.ModuleDict({"head": mlp(4, 8, 2)})
    before = network["head"](input=observation)
    inject(network, optimizer=sgd(network))
    assert torch.equal(network["head"](input=observation), before)


class LastFirst(nn.Module):
    """The layer that is registered first is computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.hidden = nn.Linear(16, 3), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.hidden(x).relu())
        return out


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("head", "probe", "anchors"),
    [(LastFirst, torch.randn(32, 32), ("frozen",)), (convolutional, torch.randn(8, 2, 5, 5), ANCHORS)],
)
def test_a_probe_does_what_the_refusal_promises(
    head: Callable[[], nn.Module], probe: Tensor, anchors: tuple[Anchor, ...]
) -> None:
    for anchor in anchors:
        network = nn.ModuleDict({"head": head()})
        before = network["head"](probe)
        with pytest.raises(ValueError, match="pass probe="):
            inject(network, optimizer=sgd(network), anchor=anchor)
        inject(network, optimizer=sgd(network), anchor=anchor, probe=probe)
        assert torch.equal(network["head"](probe), before)
        again = InjectedHead(head(), checked=True).grow_to(network["head"].spec())
        again.load_state_dict(network["head"].state_dict())
        assert torch.equal(again(probe), before)


def test_what_was_grown_is_restored_whatever_draws_its_weights() -> None:
    class Bare(nn.Module):
        """A layer without a reset."""

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    def make() -> nn.Sequential:
        network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), Bare(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        nn.init.zeros_(network[-1].weight)  # as often of a last layer
        nn.init.zeros_(network[-1].bias)
        return network

    network, x = InjectedNetwork(make()), torch.randn(8, 4)
    with torch.no_grad():
        network.live[-1].weight.normal_()
    initializer: Any = lambda module, _: orthogonal(module, _)  # noqa: E731
    inject_network(network, head="2:", optimizer=[], initializer=initializer, observations=x)
    again = InjectedNetwork(make()).grow_to(network.spec())
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x), network(x))


@pytest.mark.parametrize("trainable", ["newest", "all"])
def test_a_head_without_biases_is_restored(trainable: Any) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 16, bias=False), nn.ReLU(), nn.Linear(16, 2))

    head, x = InjectedHead(make()), torch.randn(8, 4)
    head.inject(trainable_heads=trainable)
    again = InjectedHead(make()).grow_to(head.spec())
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(x), head(x))


def test_a_cold_encoder_keeps_no_estimate_of_its_old_weights() -> None:
    body = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 16)), nn.ReLU(), nn.BatchNorm1d(16), *mlp(16, 16, 2)
    )
    network, x = InjectedNetwork(body), 3 * torch.randn(256, 4) + 1
    for _ in range(20):
        network(x)
    network.eval()
    before = network(x)
    inject_network(network, head="3:", optimizer=[], live_encoder="cold", observations=x)
    assert torch.equal(network(x), before)
    assert float(torch.linalg.matrix_norm(body[0].weight.detach(), 2)) == pytest.approx(1, abs=0.05)
    assert torch.equal(body[2].running_mean, torch.zeros(16))


def test_a_head_whose_units_are_dead_is_who_needs_an_injection() -> None:
    network, x = mlp(4, 8, 8, 2), torch.randn(8, 4)
    with torch.no_grad():
        network[2].bias.fill_(-100.0)
    before = network(x)
    inject(network, head="2:", optimizer=sgd(network))
    assert torch.equal(network(x), before)
    with pytest.raises(ValueError, match="affine"):
        inject(nn.ModuleDict({"head": nn.Linear(4, 2)}), optimizer=[])
    zero = nn.Linear(4, 2)
    nn.init.zeros_(zero.weight)
    with pytest.raises(ValueError, match="affine"):
        inject(nn.ModuleDict({"head": zero}), optimizer=[])


def test_a_head_may_begin_in_place_and_a_network_have_two_inputs() -> None:
    network, x = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        torch.randn(8, 4),
    )
    before = network(x)
    inject(network, head="1:", optimizer=sgd(network), probe=torch.randn(8, 8))
    assert torch.equal(network(x), before)
    critic = InjectedNetwork(Joined())
    action = torch.randn(8, 2)
    before = critic(x, action)
    inject_network(critic, optimizer=[], observations=(x, action))
    assert torch.equal(critic(x, action), before)
    with pytest.raises(ValueError, match="returns tuple, not a tensor"):
        inject_network(
            InjectedNetwork(SharedTrunk()), head=("trunk.2", "trunk.3", "critic"), optimizer=[], observations=x
        )


class Joined(nn.Module):
    """A critic of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), mlp(8, 8, 1)

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(torch.cat([x, action], 1)).relu())
        return out


def test_a_default_device_is_not_where_random_numbers_are_drawn() -> None:
    network, x = mlp(4, 8, 8, 2), torch.randn(8, 4)
    before = network(x)
    with torch.device("meta"):
        inject(network, head="2:", optimizer=sgd(network), anchor="mirrored")
    assert torch.equal(network(x), before)


class Iterated(nn.Module):
    """Never calls the `nn.Sequential` that holds its layers; takes a dictionary, and gives a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 8, 8, 2)
        self.kwargs = {"activation": self.net[3]}  # a ReLU, which has nothing that could be left behind

    def forward(self, x: Mapping[str, Tensor]) -> "Output":
        value = x["state"]
        for layer in self.net:
            value = layer(value)
        return Output(value, value.masked_fill(value < 0, -torch.inf))


@dataclass
class Output:
    """What it gives."""

    q: Tensor
    masked: Tensor


def test_observations_and_outputs_are_what_a_network_takes_and_gives() -> None:
    network, x = Iterated(), {"state": torch.randn(8, 4)}
    before = network(x)
    inject(network, head="net.2:", optimizer=sgd(network), observations=x)
    assert torch.equal(network(x).q, before.q)
    inject(network, head="net.2:", optimizer=sgd(network))
    assert torch.equal(network(x).q, before.q)


class Sliced(Iterated):
    """Takes the `nn.Sequential` apart by numbers."""

    def forward(self, x: Tensor) -> Any:
        return self.net[4](self.net[:4](x))


class Normed(Iterated):
    """Computes something between the layers of its `nn.Sequential`."""

    def forward(self, x: Tensor) -> Any:
        *hidden, last = self.net
        for layer in hidden:
            x = layer(F.layer_norm(x, x.shape[1:]))
        return last(x)


@pytest.mark.parametrize(
    ("kind", "says"), [(Sliced, "does not run with the injected head"), (Normed, "something else is computed between")]
)
def test_a_tail_whose_sequential_is_taken_apart_is_refused(kind: Callable[[], Iterated], says: str) -> None:
    network, x = kind(), torch.randn(8, 4)
    before = network(x)
    with pytest.raises((NotPreserved, ValueError), match=says):
        inject(network, head="net.2:", optimizer=sgd(network), observations=x)
    assert torch.equal(network(x), before)


class Silent(SharedTrunk):
    """What it gives is in a dataclass."""

    def forward(self, x: Tensor) -> Any:
        return Output(*super().forward(x))


def test_an_output_in_a_dataclass_is_compared_and_none_is_refused() -> None:
    network, x = Silent(), torch.randn(8, 4)
    where = ("trunk.2", "trunk.3", "critic")
    with pytest.raises(NotPreserved, match="something else uses a module of the head"):
        inject(network, head=where, optimizer=sgd(network), observations=x)
    network.forward = lambda x: print(SharedTrunk.forward(network, x)[0].shape)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="returns no tensor"):
        inject(network, head=where, optimizer=sgd(network), observations=x)


def test_a_network_that_never_gives_the_same_is_not_compared_as_a_whole() -> None:
    class Drawn(nn.Module):
        """Has a generator of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(x.shape, generator=self.generator)

    network, x = nn.Sequential(nn.Linear(4, 8), Drawn(), *mlp(8, 8, 2)), torch.randn(8, 4)
    inject(network, head="2:", optimizer=sgd(network), observations=x)
    assert isinstance(network[2], InjectedHead)


def test_a_cold_encoder_leaves_what_is_frozen_of_it() -> None:
    frozen = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    frozen(torch.randn(64, 4))
    network = InjectedNetwork(nn.Sequential(frozen.requires_grad_(False).eval(), *mlp(8, 8, 8, 2)))
    x, before = torch.randn(8, 4), {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    inject_network(network, head="3:", optimizer=[], live_encoder="cold", observations=x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())


@pytest.mark.parametrize("lags", [False, True])
@pytest.mark.parametrize(
    ("make", "observed"),
    [
        (lambda: nn.Sequential(Closed(), nn.ReLU(), *mlp(2, 16, 2)), True),
        (lambda: nn.Sequential(with_forward_set(mlp(8, 8, 8)), nn.ReLU(), *mlp(8, 16, 2)), False),
        (lambda: with_forward_set(nn.Sequential(mlp(8, 8, 8), nn.ReLU(), *mlp(8, 16, 2))), False),
    ],
)
def test_a_frozen_network_that_computes_with_the_live_one_is_refused(
    make: Callable[[], nn.Module], observed: bool, lags: bool
) -> None:
    network, target, x = InjectedNetwork(make()), InjectedNetwork(make()).requires_grad_(False), torch.randn(16, 8)
    if lags:
        head = list(network.live)[2:]
        network = InjectedNetwork(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, head[0].in_features), *head))
    before = list(network.modules())
    if not observed:
        with pytest.raises(ValueError, match="pass observations="):
            inject_network(network, head="2:", optimizer=[], target=target)
    with pytest.raises(ValueError, match="the frozen copy would go on computing with '0"):
        inject_network(network, head="2:", optimizer=[], target=target if lags else None, observations=x)
    assert list(network.modules()) == before
    assert not network.num_injections


def test_a_sequential_whose_forward_was_compiled_keeps_it() -> None:
    network, x = with_forward_set(mlp(4, 8, 8, 2)), torch.randn(8, 4)
    before = network(x)
    for observations in (None, x):
        inject(network, head="2:", optimizer=sgd(network), observations=observations)
        assert torch.equal(network(x), before)
    network(x).sum().backward()
    assert network[2].live[0].weight.grad is not None


class Explorer(SharedTrunk):
    """Adds noise from a generator of its own to one of its outputs, or to all."""

    def __init__(self, noisy: int) -> None:
        super().__init__()
        self.noisy, self.generator = noisy, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Any:
        outputs = super().forward(x)
        noise = [torch.rand((), generator=self.generator) for _ in range(self.noisy)]
        return tuple(output + (noise.pop() if noise else 0) for output in reversed(outputs))


def test_what_a_network_gives_again_is_compared_though_not_all_is() -> None:
    where, x = ("trunk.2", "trunk.3", "critic"), torch.randn(8, 4)
    network = Explorer(noisy=1)
    with pytest.raises(NotPreserved, match="something else uses a module of the head"):
        inject(network, head=where, optimizer=sgd(network), observations=x)
    network = Explorer(noisy=2)
    with pytest.raises(ValueError, match="gives other outputs each time"):
        inject(network, head=where, optimizer=sgd(network), observations=x)
    assert isinstance(network.trunk[2], nn.Linear)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_a_loop_that_sets_all_of_a_network_free_injects_again(anchor: Anchor) -> None:
    network, x = mlp(4, 8, 8, 2), torch.randn(8, 4)
    optimizer = sgd(network)
    for _ in range(3):
        event = inject(network, head="2:", optimizer=optimizer, anchor=anchor)
        assert event.parameters_trainable_before == event.parameters_trainable
        held = {id(p) for p in optimizer.param_groups[0]["params"]}
        assert {id(p) for p in network.parameters() if p.requires_grad} == held
        for trains in (False, True):  # Spinning Up's: the critic rests while the actor learns
            for p in network.parameters():
                p.requires_grad_(trains)
        before = network(x)
        before.sum().backward()
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="the head is frozen"):
        inject(network, head="2:", optimizer=optimizer, anchor=anchor)


def test_older_heads_that_train_go_on() -> None:
    network = mlp(4, 8, 8, 2)
    optimizer = sgd(network)
    for number in (1, 2, 3):
        inject(network, head="2:", optimizer=optimizer, trainable_heads="all")
        assert len(network[2].beside) == number
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
            id(p) for p in network.parameters() if p.requires_grad
        }
        network.requires_grad_(True)  # the anchors, too


@pytest.mark.usefixtures("compiling")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_tail_that_was_compiled_after_its_injection_is_injected_again() -> None:
    network, x = mlp(4, 8, 8, 2), torch.randn(8, 4)
    optimizer = sgd(network)
    inject(network, head="2:", optimizer=optimizer)
    network[2] = torch.compile(network[2], backend="eager")
    with pytest.raises(ValueError, match="was injected from layer 2 on"):
        inject(network, head="1:", optimizer=optimizer)
    before = network(x)
    assert inject(network, head="2:", optimizer=optimizer).stage == 2
    assert torch.equal(network(x), before)
    assert isinstance(network[2], InjectedHead)


class SoftQ(nn.Module):
    """CleanRL's critic, which joins its inputs itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        out: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(torch.cat([x, action], 1))))))
        return out


class SoftQs(nn.Module):
    """Holds one."""

    def __init__(self) -> None:
        super().__init__()
        self.q = SoftQ()

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        out: Tensor = self.q(x, action)
        return out


@pytest.mark.parametrize("given", ["nothing", "probe", "pair", "observations"])
def test_a_head_of_two_inputs_is_refused_with_what_to_do(given: str) -> None:
    network, x = SoftQs(), (torch.randn(8, 4), torch.randn(8, 2))
    what: dict[str, Any] = {
        "nothing": {},
        "probe": {"probe": torch.cat(x, 1)},
        "pair": {"probe": x},
        "observations": {"observations": x},
    }[given]
    with pytest.raises(
        ValueError, match=r"probe is tuple|does not take one tensor of features .* in an nn\.Sequential"
    ):
        inject(network, head="q", optimizer=sgd(network), **what)
    assert isinstance(network.q, SoftQ)
    network = Joined()
    inject(network, optimizer=sgd(network), observations=x)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_a_head_that_begins_in_place_trains(anchor: Anchor) -> None:
    network, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), *mlp(8, 8, 2)), torch.randn(8, 4)
    optimizer = sgd(network)
    for _ in range(2):
        before = network(x)
        inject(network, head="1:", optimizer=optimizer, anchor=anchor, probe=torch.randn(8, 8))
        assert torch.equal(network(x), before)
        network(x).sum().backward()
        optimizer.step()


class Keeping(nn.Module):
    """Keeps what it computed last."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(inputs, 8), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = {"hidden": F.relu(self.hidden(x))}
        out: Tensor = self.out(self.kept["hidden"])
        return out


def test_what_a_forward_pass_left_in_an_attribute_is_no_hindrance() -> None:
    network, x = nn.Sequential(Keeping(4, 8), nn.ReLU(), Keeping(8, 2)), torch.randn(8, 4)
    optimizer = sgd(network)
    for _ in range(2):
        before = network(x)
        before.sum().backward()
        inject(network, head="2", optimizer=optimizer)
        assert torch.equal(network(x), before)
    whole = InjectedNetwork(nn.Sequential(Keeping(4, 8), nn.ReLU(), *mlp(8, 8, 2)))
    for live_encoder in ("warm", "cold"):
        before = whole(x)
        inject_network(whole, head="2:", optimizer=[], observations=x, live_encoder=live_encoder)
        assert torch.equal(whole(x), before)


class Pair(NamedTuple):
    """Two observations."""

    first: Tensor
    second: Tensor


class Masked(nn.Module):
    """Forbids an action; takes a named tuple; has a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.dropout, self.head = nn.Linear(4, 8), nn.Dropout(0.5), mlp(8, 8, 2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x: Mapping[str, Pair]) -> Tensor:
        pair = x["pair"]
        out: Tensor = self.head(self.dropout(self.encoder(pair.first + pair.second)).relu()) + self.mask
        return out

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"steps": 3}


def test_infinite_masks_extra_state_and_named_tuples() -> None:
    network, x = Masked(), {"pair": Pair(torch.randn(8, 4), torch.randn(8, 4))}
    state = torch.get_rng_state()
    inject(network, optimizer=sgd(network), observations=x, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)
    whole = InjectedNetwork(Masked().eval())
    before = whole(x)
    inject_network(whole, optimizer=[], observations=x)
    assert torch.equal(whole(x), before)
    with torch.no_grad():
        whole.live.mask[0] = torch.nan
    with pytest.raises(ValueError, match="mask is not finite"):
        inject_network(whole, optimizer=[], observations=x)


def test_a_targets_head_that_does_not_train_stays_so_on_an_encoder_that_does() -> None:
    network = mlp(4, 8, 8, 2)
    target = nn.Sequential(*network[:2], *copy.deepcopy(network[2:]).requires_grad_(False))
    inject(network, head="2:", optimizer=sgd(network), target=target)
    assert [name for name, p in target.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]


def test_a_head_that_is_random_in_training_mode_is_refused_with_the_remedy() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), Noisy(), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(NotPreserved, match=r"random in training mode, use \.eval\(\)"):
        inject(network, head="2:", optimizer=sgd(network))
    inject(network.eval(), head="2:", optimizer=sgd(network))


def test_what_lies_far_behind_an_attribute_is_not_looked_for() -> None:
    """A network that holds a replay of a million transitions."""
    network = mlp(4, 8, 8, 2)
    objects = [*(object() for _ in range(1_000)), network[2]]
    assert holds(objects, {id(network[2])})
    assert not holds(objects, {id(network[2])}, at_most=100)
    numbers = [*map(float, range(1_000)), network[2]]
    assert holds(numbers, {id(network[2])}, at_most=2_000)
    assert not holds(numbers, {id(network[2])}, at_most=1_000)
    nested: Any = network[2]
    for _ in range(5_000):  # deeper than Python's stack
        nested = [nested]
    assert holds(nested, {id(network[2])}, at_most=10_000)
    network.replay = [(number, "s") for number in range(20_000)] + [network[4]]  # type: ignore[assignment]
    assert inject(network, head="2:", optimizer=sgd(network)).max_abs_q_change_online == 0


def test_a_choice_that_there_is_not_is_refused() -> None:
    network = mlp(4, 8, 8, 2)
    for choice in ({"trainable_heads": "ALL"}, {"anchor": "rope"}):
        with pytest.raises(ValueError, match="choose one of"):
            inject(network, head="2:", optimizer=sgd(network), **choice)  # type: ignore[arg-type]
    wrapped = InjectedNetwork(network)
    with pytest.raises(ValueError, match="live_encoder is 'Cold': choose one of warm, cold"):
        inject_network(wrapped, head="2:", optimizer=sgd(wrapped), live_encoder="Cold")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"wrap it, InjectedNetwork\(network\)"):
        inject_network(network, head="2:", optimizer=sgd(network))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="spec None"):
        wrapped.grow_to(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [("head", "replay"), ("replay", "head")])
def test_what_lies_near_behind_an_attribute_is_found_whatever_lies_beside_it(names: tuple[str, str]) -> None:
    network = mlp(4, 8, 8, 2)
    parts = {"head": network[4], "replay": [(number, "s") for number in range(20_000)]}
    network.agent = {name: parts[name] for name in names}  # type: ignore[assignment]
    with pytest.raises(ValueError, match="agent"):
        inject(network, head="2:", optimizer=sgd(network))


def test_a_mapping_is_read_no_further_than_it_is_looked_at() -> None:
    read = []

    class Lazy(Mapping[int, object]):
        def __getitem__(self, key: int) -> object:
            read.append(key)
            return (key,)

        def __iter__(self) -> Iterator[int]:
            return iter(range(100_000))

        def __len__(self) -> int:
            return 100_000

    assert not holds(Lazy(), {0}, at_most=1_000)
    assert len(read) < 1_000
