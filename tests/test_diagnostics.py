"""Measures of plasticity: values checked by hand, oracles, and what must not change them."""

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn

from growtrain.diagnostics import (
    distance_from_initialization,
    dormant_fraction,
    effective_rank,
    gradient_norm,
    hessian_top_eigenvalue,
    policy_churn,
    singular_values,
    srank,
    stable_rank,
    target_fit_error,
    weight_norm,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def orthogonal(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed).double()).Q


def small_net(seed: int = 0) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(seed), dtype=p.dtype))
    return net


def test_dormant_fraction_by_hand() -> None:
    # E|h| is 2, 0, 0.02, 1.98: a mean of 1, so these are the scores.
    activations = torch.tensor([[4.0, 0.0, 0.04, -1.98], [0.0, 0.0, 0.0, 1.98]])
    assert dormant_fraction(activations, tau=0.025) == 0.5
    assert dormant_fraction(activations, tau=0.0) == 0.25
    assert dormant_fraction(activations, tau=0.0199) == 0.25
    assert dormant_fraction(torch.zeros(3, 4)) == 1
    assert dormant_fraction(torch.ones(3, 4)) == 0


def test_dormant_channels_are_averaged_over_batch_and_space() -> None:
    maps = normal(6, 8, 5, 4).relu()
    maps[:, 3] = 0
    maps[1:, 5] = 0
    maps[0, 5] = 1e-3  # alive in one state, and still dormant
    assert dormant_fraction(maps) == 2 / 8
    assert dormant_fraction(maps, tau=0) == 1 / 8
    pixels = maps.permute(0, 2, 3, 1).reshape(-1, 8)  # every place a state of its own
    assert dormant_fraction(pixels) == dormant_fraction(maps)
    assert dormant_fraction(maps.to(memory_format=torch.channels_last)) == dormant_fraction(maps)


def test_dormancy_does_not_depend_on_scale_or_order() -> None:
    activations = normal(64, 40).relu() * torch.logspace(-4, 0, 40)
    fraction = dormant_fraction(activations)
    assert 0.2 < fraction < 0.8
    for scale in (1e-3, 3.0, 1e4):
        assert dormant_fraction(scale * activations) == fraction
    assert dormant_fraction(activations[:, torch.randperm(40, generator=seeded())]) == fraction
    assert dormant_fraction(activations[torch.randperm(64, generator=seeded())]) == fraction
    one_layer = activations.clone()
    one_layer[:, 0] *= 1e6  # one unit alone is no scaling of the layer
    assert dormant_fraction(one_layer) != fraction


RANKS = (srank, effective_rank, stable_rank)


def test_ranks_by_hand() -> None:
    diagonal = torch.diag(torch.tensor([4.0, 2.0, 2.0, 0.0]))
    assert srank(diagonal) == 3
    assert srank(diagonal, delta=0.25) == 2  # 4 + 2 of 8 is 1 - 0.25
    assert srank(diagonal, delta=0.3) == 2
    assert srank(diagonal, delta=0.5) == 1
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert float(effective_rank(diagonal)) == pytest.approx(math.exp(entropy))
    assert float(stable_rank(diagonal)) == pytest.approx((16 + 4 + 4) / 16)
    for rank in RANKS:
        assert float(rank(torch.eye(7))) == pytest.approx(7)
        assert float(rank(torch.outer(torch.arange(1.0, 6), torch.ones(9)))) == pytest.approx(1, abs=1e-4)
        assert float(rank(torch.zeros(5, 3))) == 0


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (1, 9)])
def test_singular_values_are_those_of_the_decomposition(shape: tuple[int, int]) -> None:
    features = normal(*shape).relu()
    torch.testing.assert_close(singular_values(features), torch.linalg.svdvals(features.double()))


@pytest.mark.parametrize("rank", RANKS)
def test_ranks_do_not_depend_on_rotation_order_or_scale(rank) -> None:  # type: ignore[no-untyped-def]
    features = normal(24, 60).double() @ torch.diag(torch.logspace(0, -3, 60).double())
    value = float(rank(features))
    assert 1 < value < 24
    for same in (
        features @ orthogonal(60),
        orthogonal(24) @ features,
        features[torch.randperm(24, generator=seeded())],
        features[:, torch.randperm(60, generator=seeded())],
        -1e-3 * features,
        features.T,
        torch.cat([features, features]),
    ):
        assert float(rank(same)) == pytest.approx(value, rel=1e-6)
    assert float(rank(features @ torch.diag(torch.logspace(0, 3, 60).double()))) > 1.05 * value  # no rotation


def test_norms_by_hand_and_against_one_long_vector() -> None:
    assert weight_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]) == 5
    assert weight_norm([]) == 0
    net = small_net()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert distance_from_initialization(dict(net.named_parameters()), start) == 0
    with torch.no_grad():
        net[0].weight[0, 0] += 3
        net[2].bias[1] -= 4
    named = dict(net.named_parameters())
    assert float(distance_from_initialization(named, start)) == pytest.approx(5)
    assert float(distance_from_initialization(start, named)) == pytest.approx(5)
    vector = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert float(weight_norm(net.parameters())) == pytest.approx(float(vector.norm()))
    assert float(weight_norm([orthogonal(vector.numel()) @ vector])) == pytest.approx(float(vector.norm()))
    with pytest.raises(ValueError, match="other names or shapes"):
        distance_from_initialization(named, {name: p[:1] for name, p in start.items()})


def test_gradient_norm_by_hand_and_by_group() -> None:
    w, b, unused = (torch.tensor(v, requires_grad=True) for v in ([1.0, 2.0], [0.5], [7.0]))
    loss = (3 * w[0] + 4 * w[1] + 2 * b[0]) ** 2 / 2  # the gradient is (3, 4, 2) times the inner value, 12
    norms = gradient_norm(loss, [w], [b], [unused], [w, b])
    assert norms.tolist() == pytest.approx([60, 24, 0, 12 * math.sqrt(29)])
    assert all(p.grad is None for p in (w, b, unused))
    assert gradient_norm(-2 * loss, [b]).tolist() == pytest.approx([48])  # the graph is kept, the norm is homogeneous


def test_churn_counts_greedy_actions_only() -> None:
    before = torch.tensor([[1.0, 2.0, 0.0], [5.0, 1.0, 2.0], [0.0, 0.1, 0.2], [3.0, 2.0, 1.0]])
    after = torch.tensor([[1.0, 0.9, 0.0], [9.0, 8.0, 7.0], [0.2, 0.1, 0.0], [3.0, 2.0, 1.0]])
    assert policy_churn(before, after) == 0.5
    q = normal(100, 6)
    assert policy_churn(q, q + 3) == policy_churn(q, q + normal(100, 1, seed=2)) == policy_churn(q, 2 * q) == 0
    assert policy_churn(q, -q) == 1
    with pytest.raises(ValueError, match="same states"):
        policy_churn(q, q[:50])


def test_the_top_eigenvalue_of_a_quadratic_is_exact() -> None:
    rotation = orthogonal(6)
    for eigenvalues, top in (([9.0, 2, 1, 1, 0, -3], 9), ([1.0, 0.5, 0, 0, 0, -4], -4)):
        matrix = rotation @ torch.diag(torch.tensor(eigenvalues).double()) @ rotation.T
        w = normal(6).double().requires_grad_()
        loss = w @ matrix @ w / 2 + w.sum()
        found = [
            float(hessian_top_eigenvalue(loss, [w], generator=seeded(seed), iterations=100, tolerance=0))
            for seed in (0, 1)
        ]
        assert found == pytest.approx([top, top], rel=1e-9)
    assert hessian_top_eigenvalue(3 * w.sum(), [w], generator=seeded()) == 0
    assert hessian_top_eigenvalue((w * 0).square().sum(), [w], generator=seeded()) == 0


def test_the_top_eigenvalue_of_a_network_is_its_dense_hessians() -> None:
    net = small_net()
    names, values = zip(*net.named_parameters(), strict=True)
    x, y = normal(12, 3).double(), normal(12, 2, seed=1).double()

    def loss_of(*parameters: Tensor) -> Tensor:
        out = torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), x)
        return nn.functional.smooth_l1_loss(out, y)

    blocks = torch.autograd.functional.hessian(loss_of, values)
    sizes = [p.numel() for p in values]
    rows = [torch.cat([b.reshape(n, -1) for b in row], 1) for n, row in zip(sizes, blocks, strict=True)]
    eigenvalues = torch.linalg.eigvalsh(torch.cat(rows))
    top = float(eigenvalues[eigenvalues.abs().argmax()])
    loss = loss_of(*values)
    exact = functools.partial(hessian_top_eigenvalue, loss, values, iterations=500, tolerance=1e-9)
    assert float(exact(generator=seeded())) == pytest.approx(top, rel=1e-4)
    rough = [float(hessian_top_eigenvalue(loss, values, generator=seeded(7))) for _ in range(2)]
    assert rough[0] == rough[1] == pytest.approx(top, rel=0.1)
    assert all(p.grad is None for p in values)
    # Twice the loss is twice as sharp.
    assert float(hessian_top_eigenvalue(2 * loss, values, generator=seeded(7))) == pytest.approx(2 * rough[0])


def fit(network: nn.Module, inputs: Tensor, targets: Tensor, updates: int, lr: float = 0.25, seed: int = 0) -> float:
    sgd = functools.partial(torch.optim.SGD, lr=lr)
    generator = seeded(seed)
    return float(
        target_fit_error(
            network, inputs, targets, make_optimizer=sgd, updates=updates, batch_size=4, generator=generator
        )
    )


def test_target_fit_error_by_hand() -> None:
    line = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(line.weight)
    inputs, targets = torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [-2.0]])
    # Each step halves the distance of the weight, 0, to 2: after n steps (2 / 2**n)**2 is left of a variance of 4.
    for updates in range(4):
        assert fit(line, inputs, targets, updates) == pytest.approx(4.0**-updates)
        assert fit(line, inputs, 10 * targets, updates) == pytest.approx(4.0**-updates)  # the unit cancels
    assert line.weight.item() == 0
    assert line.weight.grad is None
    with pytest.raises(ValueError, match="not all equal"):
        fit(line, inputs, torch.ones(2, 1), 1)


def test_a_network_of_dead_units_cannot_fit_and_a_frozen_one_is_not_trained() -> None:
    inputs, targets = normal(16, 3), normal(16, 2, seed=1)
    healthy = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 2))
    for p in healthy.parameters():
        nn.init.normal_(p, std=0.5, generator=seeded(2))
    dead = copy.deepcopy(healthy)
    nn.init.constant_(dead[0].bias, -100.0)
    errors = [fit(net, inputs, targets, 300, lr=0.05) for net in (healthy, dead)]
    assert errors[0] < 0.5 < 0.9 < errors[1]
    assert fit(healthy, inputs, targets, 300, lr=0.05) == errors[0]
    assert fit(healthy, inputs, targets, 300, lr=0.05, seed=1) != errors[0]
    healthy[0].requires_grad_(False)
    assert fit(healthy, inputs, targets, 300, lr=0.05) > errors[0]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: dormant_fraction(torch.ones(3)),
        lambda: dormant_fraction(torch.ones(2, 3, 4)),
        lambda: srank(torch.ones(3)),
        lambda: effective_rank(torch.ones(2, 3, 4)),
        lambda: stable_rank(torch.ones(2, 3, 4, 5)),
        lambda: policy_churn(torch.ones(3), torch.ones(3)),
        lambda: gradient_norm(torch.ones(3, requires_grad=True), []),
        lambda: hessian_top_eigenvalue(torch.ones(3, requires_grad=True), [], generator=seeded()),
        lambda: fit(nn.Linear(1, 1), torch.ones(3, 1), torch.arange(3.0), 1),
    ],
)
def test_wrong_ranks_are_refused(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="must have rank"):
        wrong()


def test_the_public_name() -> None:
    import growtrain

    assert growtrain.diagnostics.srank is srank
