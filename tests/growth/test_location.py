"""Heads that are not one module with a name: a Sequential's tail, modules in a row, what `torch.compile` wrapped; and their errors."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growtrain import InjectedHead, inject
from growtrain.growth.inject import NotPreserved


def small() -> nn.Sequential:
    """CleanRL's network on smaller frames, (B, 4, 36, 36)."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(8, 8, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 2, stride=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 48),
        nn.ReLU(),
        nn.Linear(48, 4),
    )


class CleanRL(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = small()

    def forward(self, x: Tensor) -> Tensor:
        q: Tensor = self.network(x / 255.0)
        return q


def frames(count: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 4, 36, 36), generator=torch.Generator().manual_seed(0)).float()


def fit(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        (network(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("where", ["network.7:", "network.-3:", "network.6:"])
@pytest.mark.parametrize("anchor", ["frozen", "zero", "mirrored"])
def test_the_tail_of_a_sequential_is_injected_again_and_again_and_rebuilt(where: str, anchor: Any) -> None:
    network = CleanRL()
    target, optimizer, x = copy.deepcopy(network), torch.optim.Adam(network.parameters()), frames()
    trainable = sum(p.numel() for p in network.parameters())
    for stage in (1, 2):
        fit(network, optimizer, x)
        before, target_before = network(x), target(x)
        event = inject(network, head=where, optimizer=optimizer, target=target, anchor=anchor)
        assert (event.stage, event.parameters_trainable) == (stage, trainable)
        assert torch.equal(network(x), before)
        assert torch.equal(target(x), target_before)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        expected = [p for p in network.parameters() if p.requires_grad]
        assert all(a is b for a, b in zip(held, expected, strict=True))
        assert network.network[:-1](x / 255).shape == ((16, 64) if "6" not in where else (16, 16, 2, 2))
    fit(network, optimizer, x)
    target.load_state_dict(network.state_dict())
    assert torch.equal(network(x), target(x))
    again = CleanRL()
    start = 6 if "6" in where else 7
    tail = InjectedHead(again.network[start:]).grow_to(network.network[start].spec())
    again.network = nn.Sequential(*again.network[:start], tail)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x), network(x))


def test_names_of_layers_outlive_a_fused_bank() -> None:
    def head() -> nn.Module:
        return nn.Sequential(OrderedDict(hidden=nn.Linear(6, 8), act=nn.ReLU(), out=nn.Linear(8, 2)))

    grown = InjectedHead(head())
    for seed in (0, 1):
        grown.inject(torch.Generator().manual_seed(seed))
    grown.rebuild_bank(fused=False)
    again = InjectedHead(head()).grow_to(grown.spec())
    again.load_state_dict(grown.state_dict())
    x = torch.rand(4, 6)
    assert torch.equal(again(x), grown(x))


def test_tails_by_name_and_of_the_network_itself() -> None:
    layers = OrderedDict(enc=nn.Linear(8, 16), act=nn.ReLU(), fc=nn.Linear(16, 16), act2=nn.ReLU(), q=nn.Linear(16, 2))
    network = nn.Sequential(layers)
    optimizer, x = torch.optim.Adam(network.parameters()), torch.eye(8)
    before = network(x)
    for where in ("fc:", "2:"):
        inject(network, head=where, optimizer=optimizer)
        assert torch.equal(network(x), before)
    assert list(network._modules) == ["enc", "act", "fc"]


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("network.9:", "this head is affine"),
        ("network.10:", "'network' has 10 layers: there is no layer 10"),
        ("network.fc:", "'network' has no layer 'fc': its layers are 0, 1"),
        ("network.0.1:", "is no plain nn.Sequential"),
        ("net.7:", "no module 'net'"),
        ("", "whole network: wrap it"),
        ((), "names no module"),
        (("network.7", "network.9"), "observations="),
    ],
)
def test_a_head_that_is_not_there_is_said(where: Any, says: str) -> None:
    network = CleanRL()
    before = list(network.network)
    with pytest.raises(ValueError, match=says):
        inject(network, head=where, optimizer=torch.optim.Adam(network.parameters()))
    assert list(network.network) == before


def test_another_tail_of_an_injected_sequential_is_refused() -> None:
    network = CleanRL()
    optimizer = torch.optim.Adam(network.parameters())
    inject(network, head="network.7:", optimizer=optimizer)
    with pytest.raises(ValueError, match=r"was injected from layer 7 on: name head='network\.7:'"):
        inject(network, head="network.6:", optimizer=optimizer)
    inject(network, head="network.7", optimizer=optimizer)


class TwoParts(nn.Module):
    """Stable-Baselines3's shape: the hidden layer is in the features' extractor."""

    def __init__(self) -> None:
        super().__init__()
        self.extractor = nn.ModuleDict({"cnn": small()[:7], "linear": nn.Sequential(nn.Linear(64, 48), nn.ReLU())})
        self.q_net = nn.Sequential(nn.Linear(48, 4))

    def forward(self, x: Tensor) -> Tensor:
        q: Tensor = self.q_net(self.between(self.extractor["linear"](self.extractor["cnn"](x))))
        return q

    def between(self, hidden: Tensor) -> Tensor:
        return hidden


WHERE = ("extractor.linear", "q_net")


def test_two_modules_in_a_row_are_one_head() -> None:
    network = TwoParts()
    target, optimizer, x = copy.deepcopy(network), torch.optim.Adam(network.parameters()), frames()
    for _ in range(2):
        fit(network, optimizer, x)
        before, target_before = network(x), target(x)
        inject(network, head=WHERE, optimizer=optimizer, target=target, observations=x)
        assert torch.equal(network(x), before)
        assert torch.equal(target(x), target_before)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        expected = [p for p in network.parameters() if p.requires_grad]
        assert all(a is b for a, b in zip(held, expected, strict=True))
    fit(network, optimizer, x)
    again = TwoParts()
    again.q_net = InjectedHead(nn.Sequential(*again.extractor["linear"], *again.q_net)).grow_to(network.q_net.spec())
    again.extractor["linear"] = nn.Identity()
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x), network(x))


def test_modules_between_which_something_is_computed_are_no_head() -> None:
    class Functional(TwoParts):
        def between(self, hidden: Tensor) -> Tensor:
            return F.layer_norm(hidden, hidden.shape[1:])

    network = Functional()
    optimizer, linear = torch.optim.Adam(network.parameters()), network.extractor["linear"]
    with pytest.raises(ValueError, match=r"'q_net' is not given what 'extractor\.linear' gives"):
        inject(network, head=WHERE, optimizer=optimizer, observations=frames())
    with pytest.raises(ValueError, match="computed in the order"):
        inject(network, head=WHERE[::-1], optimizer=optimizer, observations=frames())
    assert network.extractor["linear"] is linear


def test_a_hook_on_a_module_that_dissolves_is_refused() -> None:
    network = TwoParts()
    network.extractor["linear"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"hook is registered on 'extractor\.linear'"):
        inject(network, head=WHERE, optimizer=torch.optim.Adam(network.parameters()), observations=frames())


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor) -> Tensor:
        q: Tensor = self.head(self.encoder(x))
        return q


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler looks at it
@pytest.mark.parametrize("compiled", ["network", "in place", "head"])
def test_what_was_compiled_is_injected_and_compiles_itself_again(compiled: str) -> None:
    original = Mlp()
    target = (
        torch.compile(copy.deepcopy(original), backend="eager") if compiled == "network" else copy.deepcopy(original)
    )
    network: nn.Module = original
    if compiled == "network":
        network = torch.compile(original, backend="eager")
    elif compiled == "in place":
        original.compile(backend="eager")
    else:
        original.head = torch.compile(original.head, backend="eager")
        target.head = torch.compile(target.head, backend="eager")
    x, optimizer = torch.eye(8), torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(2):
        fit(network, optimizer, x)
        before = network(x)
        inject(network, head="head", optimizer=optimizer, target=target)
        assert isinstance(original.head, InjectedHead)
        torch.testing.assert_close(network(x), before)
        weight = original.head.live[0].weight.detach().clone()
        fit(network, optimizer, x)
        assert not torch.equal(original.head.live[0].weight, weight)
        torch.testing.assert_close(network(x), original.forward(x))


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (None, "name a module by its path"),
        (2, "name a module by its path"),
        (("head", 2), "name a module by its path"),
        ((), "names no module"),
        (("encoder.0:", "head.0:"), "a tail, 'encoder.0:', is a head of its own"),
    ],
)
def test_a_head_that_is_no_path_is_refused_in_one_line(head: Any, says: str) -> None:
    network = Mlp()
    with pytest.raises(ValueError, match=says):
        inject(network, head=head, optimizer=torch.optim.Adam(network.parameters()))


def test_outputs_that_are_no_numbers_are_named() -> None:
    network = Mlp()
    with torch.no_grad():
        network.head[0].weight.fill_(torch.nan)
    with pytest.raises(NotPreserved, match="an output of the head is not a number"):
        inject(network, head="head", optimizer=torch.optim.Adam(network.parameters()))


def test_a_data_parallel_network_and_a_target_that_lacks_its_head() -> None:
    network, target = Mlp(), Mlp()
    parallel = nn.DataParallel(network)
    optimizer = torch.optim.Adam(parallel.parameters())
    with pytest.raises(
        ValueError, match=r"^the target network: the network has no module 'module\.head'.*encoder, head"
    ):
        inject(parallel, head="module.head", optimizer=optimizer, target=target)
    inject(parallel, head="module.head", optimizer=optimizer, target=nn.DataParallel(target))


def test_every_error_about_the_target_names_it() -> None:
    network = Mlp()
    optimizer = torch.optim.Adam(network.parameters())
    dropout = Mlp()
    dropout.head.insert(1, nn.Dropout())
    partly = Mlp()
    partly.head[0].weight.requires_grad_(False)
    tied = Mlp()
    tied.extra = tied.head[2]
    for target in (nn.Sequential(nn.Linear(8, 2)), dropout, partly, tied):
        with pytest.raises(ValueError, match=r"^the target"):
            inject(network, head="head", optimizer=optimizer, target=target)
    assert isinstance(network.head, nn.Sequential)


def test_stable_baselines3_cnn_policy() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    gym = pytest.importorskip("gymnasium")

    class Noise(gym.Env):  # type: ignore[misc]
        observation_space = gym.spaces.Box(0, 255, (4, 84, 84), "uint8")
        action_space = gym.spaces.Discrete(4)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.left = 9
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> Any:
            self.left -= 1
            return self.observation_space.sample(), 1.0, not self.left, False, {}

    model = sb3.DQN("CnnPolicy", Noise(), buffer_size=64, learning_starts=8, batch_size=4, target_update_interval=16)
    model.learn(24)
    for stage in (1, 2):
        observations = model.replay_buffer.sample(16).observations
        before = model.q_net(observations), model.q_net_target(observations)
        inject(
            model.q_net,
            head=("features_extractor.linear", "q_net"),
            optimizer=model.policy.optimizer,
            target=model.q_net_target,
            observations=observations,
        )
        assert torch.equal(model.q_net(observations), before[0])
        assert torch.equal(model.q_net_target(observations), before[1])
        weight = model.q_net.q_net.live[0].weight.detach().clone()
        model.learn(24, reset_num_timesteps=False)
        assert not torch.equal(weight, model.q_net.q_net.live[0].weight)
        assert model.q_net.q_net.num_injections == stage
