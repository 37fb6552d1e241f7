"""What a loop has attached to a head goes over to the fresh one, or is refused by name before anything changes."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from growtrain import InjectedHead, inject
from growtrain.networks.injected import fresh_copy

X = torch.eye(8)


class Net(nn.Module):
    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.head = head or nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor) -> Tensor:
        q: Tensor = self.head(self.encoder(x))
        return q


def adam(network: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=1e-3)


def backward(network: nn.Module, scale: float = 1e4) -> None:
    network.zero_grad()
    (scale * network(X)).sum().backward()


def largest_gradient(network: nn.Module) -> float:
    return max(float(p.grad.abs().max()) for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("trainable_heads", ["newest", "all"])
def test_gradient_hooks_go_over_to_every_fresh_head(trainable_heads: Any) -> None:
    network, calls = Net(), []
    handles = [p.register_hook(lambda g: calls.append(1) or g.clamp(-1, 1)) for p in network.parameters()]
    optimizer = adam(network)
    for stage in (1, 2):
        inject(network, optimizer=optimizer, trainable_heads=trainable_heads)
        calls.clear()
        backward(network)
        assert len(calls) == (6 if trainable_heads == "newest" else 6 + 4 * stage)
        assert largest_gradient(network) <= 1
    if trainable_heads == "newest":
        for handle in handles:  # what registering gave goes on removing them
            handle.remove()
        backward(network)
        assert largest_gradient(network) > 1


def test_hooks_after_the_gradient_is_accumulated_go_over() -> None:
    network = Net()
    for p in network.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", torch.zeros_like(p)))
    inject(network, optimizer=adam(network))
    backward(network)
    assert largest_gradient(network) == 0


def test_hooks_go_over_when_the_module_itself_is_injected() -> None:
    head = InjectedHead(Net().head)
    for p in head.parameters():
        p.register_hook(lambda g: g.clamp(-1, 1))
    head.inject(torch.Generator().manual_seed(0))
    (1e4 * head(torch.rand(4, 16))).sum().backward()
    assert largest_gradient(head) <= 1


def test_one_optimizer_a_parameter_steps_the_fresh_ones_in_its_hook() -> None:
    network = Net()
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in network.parameters()]

    def register(p: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        def step(_: Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)

    for p, optimizer in zip(network.parameters(), optimizers, strict=True):
        register(p, optimizer)
    with pytest.raises(
        ValueError, match=r"post-accumulate hook .* on 'head\.0\.weight' holds on to parts of the old head"
    ):
        inject(network, optimizer=adam(network))
    inject(network, optimizer=optimizers)
    before = {name: p.clone() for name, p in network.named_parameters()}
    backward(network, 1.0)
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in network.named_parameters() if p.requires_grad}


class Trainer:
    def __init__(self, network: Net) -> None:
        self.network, self.head, self.count = network, network.head, 0
        self.parameters = list(network.parameters())

    def counts(self, gradient: Tensor) -> None:
        self.count += 1

    def norm(self) -> Tensor:
        return torch.stack([p.norm() for p in self.parameters]).norm()

    def indirectly(self, gradient: Tensor) -> Tensor:
        return gradient / self.norm()

    def of_the_head(self, gradient: Tensor) -> Tensor:
        return gradient + self.head[0].weight.sum()


def test_a_method_that_does_not_use_the_old_head_goes_over_bound_to_the_same_object() -> None:
    network = Net()
    trainer = Trainer(network)
    network.head[0].weight.register_hook(trainer.counts)
    inject(network, optimizer=adam(network))
    backward(network)
    assert trainer.count == 1


HOLDING: dict[str, Callable[[Net], Callable[..., Any]]] = {
    "closure": lambda net: (lambda p: lambda g: g + 0.01 * p)(net.head[0].weight),
    "default": lambda net: lambda g, p=net.head[0].weight: g + 0.01 * p,
    "partial": lambda net: functools.partial(lambda p, g: g + 0.01 * p, net.head[0].weight),
    "module": lambda net: (lambda head: lambda g: g * head[2].weight.norm())(net.head),
    "dictionary": lambda net: (lambda scales: lambda g: g * scales[g])({net.head[0].weight: 2.0}),
    "method": lambda net: Trainer(net).indirectly,
    "attribute": lambda net: Trainer(net).of_the_head,
    "optimizer": lambda net: (lambda optimizer: lambda g: optimizer.step())(adam(net)),
}


@pytest.mark.parametrize("kind", HOLDING)
def test_a_hook_that_holds_on_to_the_old_head_is_refused_by_name(kind: str) -> None:
    network = Net()
    network.head[0].weight.register_hook(HOLDING[kind](network))
    optimizer, before = adam(network), network.head
    held = list(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=r"gradient hook .* on 'head\.0\.weight' holds on to parts of the old head"):
        inject(network, optimizer=optimizer)
    assert network.head is before
    assert all(a is b for a, b in zip(held, optimizer.param_groups[0]["params"], strict=True))


def test_hooks_of_several_gradients_are_refused() -> None:
    network = Net()
    torch.autograd.graph.register_multi_grad_hook(list(network.head.parameters()), lambda gradients: None)
    with pytest.raises(ValueError, match="holds on to parts of the old head"):
        inject(network, optimizer=adam(network))


def test_attributes_go_over_and_those_made_of_old_values_are_refused() -> None:
    network = Net()
    network.head[0].weight.lr_scale = 0.1
    inject(network, optimizer=adam(network))
    assert network.head.live[0].weight.lr_scale == 0.1
    network.head.live[2].weight.initial = network.head.live[2].weight.detach().clone()
    with pytest.raises(ValueError, match=r"attribute 'initial' of parameter 'head\.live\.2\.weight'"):
        inject(network, optimizer=adam(network))


@pytest.mark.parametrize("anchor", ["frozen", "mirrored"])
def test_a_head_in_shared_memory_stays_there(anchor: Any) -> None:
    network, target = Net().share_memory(), Net()
    for _ in range(2):
        inject(network, optimizer=adam(network), target=target, anchor=anchor)
        assert all(p.is_shared() for p in network.parameters())
        assert not any(p.is_shared() for p in target.parameters())


@pytest.mark.parametrize("trainable_heads", ["newest", "all"])
def test_hooks_on_modules_see_the_live_head_and_the_whole_once_each(trainable_heads: Any) -> None:
    network, inner, whole = Net(), [], []
    network.head[1].register_forward_hook(lambda _, inputs, output: inner.append(output))
    handle = network.head.register_forward_hook(lambda _, inputs, output: whole.append(output))
    network.head.register_full_backward_hook(lambda *_: None)
    optimizer = adam(network)
    for stage in (1, 2):
        inject(network, optimizer=optimizer, trainable_heads=trainable_heads)
        inner.clear(), whole.clear()
        output = network(X)
        assert len(whole) == 1
        assert torch.equal(whole[0], output)
        hidden = network.head.live[:2](network.encoder(X))
        assert any(torch.equal(hidden, each) for each in inner[:-1])
        # Once for the live head, once for each that trains beside it, and once more here.
        assert len(inner) == 2 + (stage if trainable_heads == "all" else 0)
    handle.remove()
    whole.clear()
    network(X)
    assert not whole


def test_a_hook_on_the_head_that_scales_its_output_scales_the_sum() -> None:
    network = Net()
    network.head.register_forward_hook(lambda _, inputs, output: 10 * output)
    before = network(X)
    for _ in range(2):
        inject(network, optimizer=adam(network))
        assert torch.equal(network(X), before)


def test_a_recorder_is_not_copied_and_sees_no_probe() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.seen.append(output)

    network, recorder = Net(), Recorder()
    network.head.register_forward_hook(recorder.hook)
    inject(network, optimizer=adam(network))
    assert not recorder.seen
    network(X)
    assert len(recorder.seen) == 1


def halved(network: Net) -> None:
    network.head[0].register_forward_hook(lambda _, inputs, output: output / 2)


def halved_gradient(network: Net) -> None:
    network.head[0].register_full_backward_hook(lambda _, inputs, outputs: (inputs[0] / 2,))


@pytest.mark.parametrize("register", [halved, halved_gradient])
def test_a_hook_that_takes_part_in_the_computation_is_refused_by_name(register: Callable[[Net], None]) -> None:
    network = Net()
    register(network)
    head, before = network.head, network(X)
    with pytest.raises(ValueError, match=r"hook on 'head\.0' changes what the head computes"):
        inject(network, optimizer=adam(network))
    assert network.head is head
    assert torch.equal(network(X), before)


class Counting(nn.Sequential):
    """A head with a hook of its own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.calls = 0
        self[0].register_forward_pre_hook(self.count)

    def count(self, module: nn.Module, inputs: Any) -> None:
        self.calls += 1


def test_a_hook_of_the_head_s_own_serves_each_copy() -> None:
    network = Net(Counting(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)))
    inject(network, optimizer=adam(network))
    for _ in range(2):
        inject(network, optimizer=adam(network), trainable_heads="all")
    before = network.head.live.calls
    network(X)
    assert network.head.live.calls == before + 1


@pytest.mark.parametrize("anchor", ["frozen", "zero"])
def test_a_parametrized_head_is_injected_with_its_parametrization(anchor: Any) -> None:
    hidden = parametrizations.weight_norm(nn.Linear(16, 32))
    network = Net(nn.Sequential(hidden, nn.ReLU(), nn.Linear(32, 2)))
    target, optimizer, before = copy.deepcopy(network), adam(network), network(X)
    for _ in range(2):
        inject(network, optimizer=optimizer, target=target, anchor=anchor)
        assert torch.equal(network(X), before)
        assert torch.equal(target(X), before)
        live = network.head.live[0]
        assert {name for name, _ in live.named_parameters()} == {name for name, _ in hidden.named_parameters()}
        assert not torch.equal(live.weight, hidden.weight)
        assert float(live.weight.detach().abs().max()) <= 16**-0.5 + 1e-6
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in trained} == {id(p) for p in network.parameters() if p.requires_grad}


def test_spectral_normalisation_that_moves_in_every_pass_is_refused_and_settles_in_evaluation() -> None:
    hidden = parametrizations.spectral_norm(nn.Linear(16, 32))
    network = Net(nn.Sequential(hidden, nn.ReLU(), nn.Linear(32, 2)))
    vector = hidden.parametrizations.weight[0]._u.clone()
    with pytest.raises(
        ValueError, match=r"buffer '0\.parametrizations\.weight\.0\._[uv]' changes in every forward pass"
    ):
        inject(network, optimizer=adam(network))
    assert torch.equal(hidden.parametrizations.weight[0]._u, vector)
    network.eval()
    fresh = fresh_copy(network.head, torch.Generator().manual_seed(0))
    norm = torch.linalg.matrix_norm(fresh[0].weight.detach(), 2)
    assert float(norm) == pytest.approx(1, abs=0.1)
    inject(network, optimizer=adam(network))


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "prune"])
def test_hooks_that_compute_a_weight_are_refused(name: str) -> None:
    network = Net()
    with torch.random.fork_rng():
        if name == "prune":
            prune.l1_unstructured(network.head[0], "weight", amount=0.5)
        else:
            hidden = network.head[0]
            kind = {"weight_norm": nn.utils.weight_norm, "spectral_norm": nn.utils.spectral_norm}[name]
            if name == "weight_norm":
                with pytest.warns(FutureWarning):
                    kind(hidden)
            else:
                kind(hidden)
    backward(network)
    with pytest.raises(
        ValueError, match=r"'head\.0' is computed by .*, a hook of torch\.nn\.utils: use torch\.nn\.utils\.par"
    ):
        inject(network, optimizer=adam(network))
