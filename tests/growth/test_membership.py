"""Optimizers across an injection: order, names, and those that keep their parameters in their own way."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from growtrain import InjectedHead, inject

X = torch.eye(8)


class Net(nn.Module):
    def __init__(self, actions: int = 2) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, actions))

    def forward(self, x: Tensor) -> Tensor:
        q: Tensor = self.head(self.encoder(x))
        return q


def step(network: nn.Module, *optimizers: Any) -> None:
    network.zero_grad()
    (network(X) - 1).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def names_held(network: nn.Module, optimizer: Any) -> list[str]:
    names = {id(p): name for name, p in network.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def assert_trains_what_requires_a_gradient(network: nn.Module, *optimizers: Any) -> None:
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(3):  # Rprop rests for a step where a gradient has changed its sign
        step(network, *optimizers)
    moved = [name for name, p in network.named_parameters() if not torch.equal(p, before[name])]
    assert moved == [name for name, p in network.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("trainable_heads", ["newest", "all"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("named", [False, True])
def test_a_loop_that_is_stopped_and_continued_goes_on_to_the_bit(trainable_heads: Any, times: int, named: bool) -> None:
    network = Net(32)  # its two layers have one shape: positions that are confused do not show as sizes
    optimizer = torch.optim.Adam(network.named_parameters() if named else network.parameters(), lr=1e-3)
    for _ in range(times):
        inject(network, optimizer=optimizer, trainable_heads=trainable_heads)
        step(network, optimizer)
    saved = copy.deepcopy((network.state_dict(), network.head.spec(), optimizer.state_dict()))
    again = Net(32)
    again.head = InjectedHead(again.head).grow_to(saved[1])
    again.load_state_dict(saved[0])
    trained = [(name, p) for name, p in again.named_parameters() if p.requires_grad]
    optimizer_again = torch.optim.Adam(trained if named else [p for _, p in trained], lr=1e-3)
    optimizer_again.load_state_dict(saved[2])
    for _ in range(3):
        step(network, optimizer)
        step(again, optimizer_again)
        assert torch.equal(network(X), again(X))
    expected = [name for name, p in network.named_parameters() if p.requires_grad]
    assert names_held(network, optimizer) == expected
    if named:
        assert optimizer.param_groups[0]["param_names"] == expected


@pytest.mark.parametrize("trainable_heads", ["newest", "all"])
def test_every_group_is_in_the_order_of_the_network(trainable_heads: Any) -> None:
    network, log_alpha = Net(), nn.Parameter(torch.zeros(()))
    weights = [p for p in network.parameters() if p.dim() == 2][::-1]
    biases = [p for p in network.parameters() if p.dim() == 1][::-1]
    optimizer = torch.optim.Adam([{"params": [log_alpha, *biases]}, {"params": weights, "weight_decay": 0.1}])
    inject(network, optimizer=optimizer, trainable_heads=trainable_heads)
    assert optimizer.param_groups[0]["params"][0] is log_alpha
    order = [id(p) for p in network.parameters() if p.requires_grad]
    for group, dim in zip(optimizer.param_groups, (1, 2), strict=True):
        places = [order.index(id(p)) for p in group["params"] if p is not log_alpha]
        assert places == [place for place, key in enumerate(order) if key in {id(p) for p in group["params"]}]
        assert len(places) == len(order) // 2
        assert all(p.dim() == dim for p in group["params"] if p is not log_alpha)


def test_names_with_another_prefix_move_along() -> None:
    network = Net()
    wrapped = nn.ModuleDict({"q": network})
    longer, shorter = torch.optim.SGD(wrapped.named_parameters()), torch.optim.SGD(network.head.named_parameters())
    for _ in range(2):
        inject(network, optimizer=[longer, shorter])
    assert longer.param_groups[0]["param_names"] == [f"q.{name}" for name in names_held(network, longer)]
    assert shorter.param_groups[0]["param_names"] == [n.removeprefix("head.") for n in names_held(network, shorter)]


def test_several_optimizers_over_one_head_are_mended_together() -> None:
    network = Net()
    parts = [list(network.encoder.parameters()), list(network.head.parameters())]
    optimizers = [torch.optim.SGD(parts[1], lr=0.1), torch.optim.Adam(parts[0] + parts[1])]
    step(network, *optimizers)
    inject(network, optimizer=optimizers)
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    assert {id(p) for p in optimizers[1].param_groups[0]["params"]} == trained
    assert names_held(network, optimizers[0]) == [n for n, _ in network.named_parameters() if n.startswith("head.live")]
    with pytest.raises(ValueError, match=r"the optimizer does not hold head\.live\.0\.weight"):
        inject(network, optimizer=torch.optim.SGD(parts[0]))
    with pytest.raises(ValueError, match="pass an optimizer, or several in a list"):
        inject(network, optimizer=network.parameters())
    inject(network, optimizer=(torch.optim.SGD(network.head.live.parameters()), *optimizers[1:]))


@pytest.mark.parametrize("trainable_heads", ["newest", "all"])
@pytest.mark.parametrize("lagging_trains", [True, False])
def test_an_optimizer_of_network_and_target_has_no_orphan(trainable_heads: Any, lagging_trains: bool) -> None:
    network = Net()
    target = copy.deepcopy(network).requires_grad_(lagging_trains)
    optimizer = torch.optim.Adam([*network.parameters(), *target.parameters()])
    (network(X).sum() + target(X).sum()).backward()
    optimizer.step()
    for _ in range(2):
        inject(network, optimizer=optimizer, target=target, trainable_heads=trainable_heads)
    known = {id(p) for p in (*network.parameters(), *target.parameters())}
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert set(held) <= known
    assert len(set(held)) == len(held)
    assert {id(p) for p in optimizer.state} <= set(held)
    assert {id(p) for p in network.parameters() if p.requires_grad} <= set(held)
    order = [id(p) for p in (*network.parameters(), *target.parameters())]
    assert held == sorted(held, key=order.index)


class Sam(torch.optim.Optimizer):
    """Keeps an optimizer inside that shares its groups."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 0.1})
        self.base = torch.optim.Adam(self.param_groups, lr=0.1)
        self.param_groups = self.base.param_groups

    def step(self) -> None:
        self.base.step()


class Wrapper:
    """No `torch.optim.Optimizer`, but one inside."""

    def __init__(self, params: Iterable[Any]) -> None:
        self.inside = torch.optim.AdamW(params, lr=0.1)
        self.param_groups, self.state = self.inside.param_groups, self.inside.state

    def step(self) -> None:
        self.inside.step()


MENDED: dict[str, Callable[[Iterable[Any]], Any]] = {
    "foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "for-loop": lambda p: torch.optim.NAdam(p, foreach=False),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.RMSprop(p),
    "rate as a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
    "rprop": lambda p: torch.optim.Rprop(p),
    "sam": Sam,
    "wrapper": Wrapper,
}


@pytest.mark.parametrize("trainable_heads", ["newest", "all"])
@pytest.mark.parametrize("name", MENDED)
def test_optimizers_of_many_kinds_train_exactly_what_requires_a_gradient(name: str, trainable_heads: Any) -> None:
    network = Net()
    optimizer = MENDED[name](network.parameters())
    for _ in range(2):
        step(network, optimizer)
        step(network, optimizer)
        inject(network, optimizer=optimizer, trainable_heads=trainable_heads)
        assert_trains_what_requires_a_gradient(network, optimizer)
        inner = getattr(optimizer, "base", getattr(optimizer, "inside", optimizer))
        assert len(inner.state_dict()["state"]) == sum(p.requires_grad for p in network.parameters())


def test_an_optimizer_under_a_scheduler_goes_on() -> None:
    network = Net()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    step(network, optimizer)
    scheduler.step()
    inject(network, optimizer=optimizer)
    assert_trains_what_requires_a_gradient(network, optimizer)
    scheduler.step()


class OwnList(torch.optim.SGD):
    """Keeps a list of its own."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, lr=0.1)
        self.mine = tuple(p for group in self.param_groups for p in group["params"])


class OwnClosure(torch.optim.SGD):
    """Keeps parameters where only a function knows them."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, lr=0.1)
        mine = [p for group in self.param_groups for p in group["params"]]
        self.apply = lambda: [p.add_(p.grad, alpha=-0.1) for p in mine]


class Flat(torch.optim.Optimizer):
    """Steps on one vector of all parameters."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {})
        self.vector = parameters_to_vector(self.param_groups[0]["params"]).detach()

    def step(self) -> None:
        params = self.param_groups[0]["params"]
        self.vector -= 0.1 * torch.cat([p.grad.flatten() for p in params])
        vector_to_parameters(self.vector, params)


class FlatState(torch.optim.Optimizer):
    """Keeps one momentum for all parameters, in the state of the first."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {})

    def step(self) -> None:
        params = self.param_groups[0]["params"]
        gradient = torch.cat([p.grad.flatten() for p in params])
        state = self.state[params[0]]
        state["momentum"] = gradient + 0.9 * state.get("momentum", 0)
        vector_to_parameters(parameters_to_vector(params).detach() - 0.1 * state["momentum"], params)


class Lookahead(torch.optim.SGD):
    """Keeps slow copies of the parameters, by position."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, lr=0.1)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


REFUSED = {
    "lbfgs": (torch.optim.LBFGS, "_params"),
    "own list": (OwnList, "mine"),
    "closure": (OwnClosure, "apply"),
    "flat": (Flat, "vector"),
    "flat state": (FlatState, "one state for several parameters"),
    "lookahead": (Lookahead, "slow"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_keeps_parameters_elsewhere_is_refused_before_anything_changes(name: str) -> None:
    network = Net()
    kind, says = REFUSED[name]
    optimizer = kind(network.parameters())
    if name == "flat state":
        step(network, optimizer)
    head, held = network.head, list(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=rf"{kind.__name__} keeps .*{says}.*optimizer=\[\].*build it anew"):
        inject(network, optimizer=optimizer)
    assert network.head is head
    assert all(a is b for a, b in zip(held, optimizer.param_groups[0]["params"], strict=True))
    inject(network, optimizer=[])
    anew = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    assert_trains_what_requires_a_gradient(network, anew)


def test_a_hook_of_an_optimizer_that_holds_the_old_head_is_refused() -> None:
    network = Net()
    optimizer = torch.optim.Adam(network.parameters())
    weight = network.head[0].weight
    optimizer.register_step_post_hook(lambda *_: weight.data.clamp_(-1, 1))
    with pytest.raises(ValueError, match="'_optimizer_step_post_hooks'"):
        inject(network, optimizer=optimizer)
