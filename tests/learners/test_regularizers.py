"""Penalties against naive formulas, the projection's invariants, and both in a real learner across growth."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from growtrain.environments.atari import make_spec
from growtrain.growth.kinds import KINDS
from growtrain.growth.transaction import GrowthFailed, apply
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.regularizers import (
    PARSEVAL_SCALE,
    hidden_matrices,
    joint_norm,
    l2,
    normalized_layers,
    parseval,
    penalty,
    project,
)
from growtrain.planning.speed import synthetic_batches
from growtrain.settings.config import Config

ACTIONS = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "crelu": {"activation": "crelu"},
    "fourier": {"activation": "fourier"},
    "l2": {"regularizer": "l2"},
    "l2-init": {"regularizer": "l2-init"},
    "parseval": {"regularizer": "parseval", "anchor": "mirrored", "normalization": "spectral"},
    "nap": {"weight_projection": "nap", "normalization": "layer", "anchor": "mirrored"},
    "everything": {
        "activation": "crelu",
        "regularizer": "l2-init",
        "weight_projection": "nap",
        "normalization": "layer",
        "anchor": "zero",
        "optimizer": "adam",
        "max_grad_norm": 1.0,
    },
}


def make(**settings: Any) -> DoubleDQN:
    values: dict[str, Any] = {"width": 32, "encoder_width": 0.25, "batch_size": 8, "regularizer_strength": 1e-3}
    config = Config(**values | settings)
    generator = torch.Generator().manual_seed(0)
    return DoubleDQN(config, make_spec(ACTIONS), width=32, device=torch.device("cpu"), generator=generator)


def update(learner: DoubleDQN, count: int = 1, seed: int = 0) -> None:
    learner.update(synthetic_batches(learner.config, make_spec(ACTIONS), count, torch.Generator().manual_seed(seed)))


def inject(learner: DoubleDQN, seed: int = 0, *, freeze_encoder: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    probe = synthetic_batches(learner.config, make_spec(ACTIONS), 1, generator)["observation"][0]
    event = apply(learner, "inject", probe, config=learner.config, generator=generator, freeze_encoder=freeze_encoder)
    assert (event.max_abs_q_change_online, event.max_abs_q_change_target) == (0, 0)


def tensors(learner: DoubleDQN) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.online.state_dict().items()}


def random_weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 3, 4, 4), (6,), (5, 96), (5,), (2, 5), (1,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def gradients(loss: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True))


def test_l2_and_l2_init_are_sums_of_squares_of_everything() -> None:
    weights, initial = random_weights(), [w.detach().roll(1) for w in random_weights()]
    naive = sum(float(x) ** 2 for w in weights for x in w.detach().flatten())
    assert float(penalty("l2", weights, []).detach()) == pytest.approx(naive)
    moved = [w.detach() - start for w, start in zip(weights, initial, strict=True)]
    assert torch.equal(penalty("l2-init", weights, initial), l2(moved))
    for got, difference in zip(gradients(penalty("l2-init", weights, initial), weights), moved, strict=True):
        assert torch.allclose(got, 2 * difference)


def test_l2_init_has_no_gradient_at_the_start() -> None:
    weights = random_weights()
    loss = penalty("l2-init", weights, [w.detach().clone() for w in weights])
    assert float(loss.detach()) == 0
    assert not any(gradient.any() for gradient in gradients(loss, weights))


def test_parseval_is_zero_for_orthogonal_rows_and_differentiates_like_the_naive_formula() -> None:
    rows = torch.linalg.qr(torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0].T
    assert float(parseval([PARSEVAL_SCALE**0.5 * rows])) == pytest.approx(0, abs=1e-20)
    assert float(parseval([rows], scale=1.0)) == pytest.approx(0, abs=1e-20)
    assert float(parseval([rows])) == pytest.approx(12 * (PARSEVAL_SCALE - 1) ** 2)
    weights = random_weights()[:3:2]
    naive = torch.zeros((), dtype=torch.float64)
    for weight in weights:
        for i, row in enumerate(weight):
            for j, other in enumerate(weight):
                naive = naive + ((row * other).sum() - (2.0 if i == j else 0.0)) ** 2
    got = penalty("parseval", weights, [])
    assert torch.allclose(got, naive)
    for ours, theirs in zip(gradients(got, weights), gradients(naive, weights), strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("split", ["fc1", "conv2"])
def test_parseval_takes_every_hidden_layer_that_trains_and_no_output_layer(split: str) -> None:
    learner = make(regularizer="parseval", trainable_heads="all", split=split)
    for heads in (1, 2, 3):
        outputs = [p for p in learner.trainable() if p.dim() > 1 and p.shape[0] == ACTIONS]
        assert len(outputs) == heads
        hidden = {id(p) for p in learner.trainable() if p.dim() > 1} - {id(p) for p in outputs}
        assert (
            {id(p) for p in hidden_matrices(learner.online)}
            == {id(p) for p in learner.gradient_step.penalized}
            == hidden
        )
        update(learner)
        inject(learner, heads)


def test_an_unknown_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match="choose l2, l2-init or parseval"):
        penalty("none", random_weights(), [])


def test_projection_restores_the_norms_and_leaves_the_normalised_function_as_it_is() -> None:
    learner = make(**OPTIONS["nap"])
    layers = list(normalized_layers(learner.online))
    assert [tuple(layer[0].shape) for layer in layers] == [(8, 4, 8, 8), (16, 8, 4, 4), (16, 16, 3, 3), (32, 784)]
    norms = [joint_norm(layer).detach() for layer in layers]
    assert torch.allclose(norms[0], torch.cat([p.detach().flatten() for p in layers[0]]).norm())
    observation = synthetic_batches(learner.config, make_spec(ACTIONS), 1, torch.Generator().manual_seed(3))[
        "observation"
    ][0]
    before = learner.act(observation)
    with torch.no_grad():
        for factor, layer in zip((1.3, 0.9, 2.0, 1.7), layers, strict=True):
            for tensor in layer:
                tensor.mul_(factor)
    grown = learner.act(observation)
    project(layers, norms)
    for layer, norm in zip(layers, norms, strict=True):
        assert torch.allclose(joint_norm(layer), norm, rtol=1e-6)
    scale = before.abs().max()
    assert (learner.act(observation) - before).abs().max() <= 1e-5 * scale
    assert (grown - before).abs().max() <= 1e-2 * scale  # up to the normalisation's epsilon
    plain = make()  # the negative control: without normalisations, scale matters
    unscaled = plain.act(observation)
    with torch.no_grad():
        plain.head.live[0].weight.mul_(1.7)  # type: ignore[index,operator]
    assert (plain.act(observation) - unscaled).abs().max() > 0.05 * unscaled.abs().max()


def test_updates_keep_the_norms_of_a_live_heads_own_fresh_weights() -> None:
    learner, free = make(**OPTIONS["nap"], lr=1e-2), make(normalization="layer", lr=1e-2)
    seen = []
    for stage in range(3):
        layers = list(normalized_layers(learner.online))
        seen.append(joint_norm(layers[-1]).detach())
        norms = [joint_norm(layer).detach() for layer in layers]
        assert len(layers) == (4 if stage < 2 else 1)  # a frozen encoder is left alone
        update(learner, 3)
        update(free, 3)
        for layer, norm in zip(layers, norms, strict=True):
            assert torch.allclose(joint_norm(layer), norm, rtol=1e-6)
        inject(learner, stage, freeze_encoder=stage == 1)
    assert len({float(norm) for norm in seen}) == 3  # other weights, other norms
    first = free.head.live[0].weight  # type: ignore[index]
    assert float(first.detach().norm()) > 1.01 * float(make(normalization="layer").head.live[0].weight.detach().norm())  # type: ignore[index,operator,union-attr]


@pytest.mark.parametrize("regularizer", ["l2", "l2-init", "parseval"])
def test_strength_zero_is_no_regularizer_bit_for_bit(regularizer: str) -> None:
    plain, zero, some = (
        make(),
        make(regularizer=regularizer, regularizer_strength=0.0),
        make(regularizer=regularizer, regularizer_strength=1e-2),
    )
    for learner in (plain, zero, some):
        update(learner, 3)
    assert all(torch.equal(tensor, tensors(zero)[name]) for name, tensor in tensors(plain).items())
    moved = [name for name, tensor in tensors(plain).items() if not torch.equal(tensor, tensors(some)[name])]
    assert {"encoder.layers.0.weight", "head.live.0.weight"} <= set(moved)
    assert plain.report().loss == zero.report().loss


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_learns_across_growth_and_only_what_trains_moves(name: str) -> None:
    learner = make(**OPTIONS[name])
    for stage in range(3):
        before = tensors(learner)
        update(learner, 2, seed=stage)
        for key, parameter in learner.online.named_parameters():
            assert torch.equal(parameter, before[key]) != parameter.requires_grad, key
        if stage < 2:
            inject(learner, stage, freeze_encoder=stage == 1)
    assert learner.report().skipped == 0


@pytest.mark.parametrize("regularizer", ["l2", "l2-init", "parseval"])
def test_a_strong_penalty_wins(regularizer: str) -> None:
    """Every penalty shrinks when little else matters, on what trains and from where that began."""
    learner = make(regularizer=regularizer, regularizer_strength=1.0, optimizer="adam", lr=3e-3)
    update(learner)
    inject(learner)
    with torch.no_grad():
        for parameter in learner.trainable():
            parameter.add_(0.05)
    initial = [learner.initial[p] for p in learner.gradient_step.penalized] if regularizer == "l2-init" else []

    def now() -> float:
        return float(penalty(regularizer, learner.gradient_step.penalized, initial).detach())  # type: ignore[arg-type]

    start = now()
    update(learner, 10)
    assert now() < 0.7 * start


def test_a_live_head_begins_anew_and_the_encoder_does_not() -> None:
    learner = make(regularizer="l2-init")
    at_start = tensors(learner)
    update(learner, 3)
    inject(learner)
    fresh = tensors(learner)
    update(learner, 3)
    saved = learner.state_dict()["initial"]
    assert set(saved) == {name for name, p in learner.online.named_parameters() if p.requires_grad}
    for name, tensor in saved.items():
        assert torch.equal(tensor, at_start[name] if name.startswith("encoder.") else fresh[name]), name
    assert len(learner.initial) == len(saved)  # what belonged to the old live head has gone with it
    inject(learner, 1, freeze_encoder=True)
    assert all(name.startswith("head.live.") for name in learner.state_dict()["initial"])


def test_a_growth_that_is_rolled_back_keeps_the_initial_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make(**OPTIONS["everything"])
    untouched = copy.deepcopy(learner.state_dict()["initial"])
    update(learner, 2)

    # Noticed only after the learner was rebuilt.
    strict = dataclasses.replace(KINDS["inject"], keeps=(lambda before, after: False, None))
    monkeypatch.setitem(KINDS, "inject", strict)
    with pytest.raises(GrowthFailed):
        inject(learner)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in learner.state_dict()["initial"].items())
    update(learner)


@pytest.mark.parametrize("name", ["l2-init", "nap", "everything"])
def test_a_restored_learner_goes_on_bit_for_bit(name: str) -> None:
    learner = make(**OPTIONS[name])
    update(learner, 2)
    inject(learner)
    update(learner, 2, seed=1)
    restored = make(**OPTIONS[name])
    restored.load_state_dict(copy.deepcopy(learner.state_dict()))
    for each in (learner, restored):
        update(each, 2, seed=2)
    assert all(torch.equal(tensor, tensors(restored)[name]) for name, tensor in tensors(learner).items())
    other = make(**{**OPTIONS[name], "width": 32})
    state = learner.state_dict()
    with pytest.raises(ValueError, match="initial weights"):
        other.load_state_dict(state | {"initial": {}})


@pytest.mark.parametrize("name", ["fourier", "parseval", "everything"])
def test_both_ways_of_computing_the_loss_train_the_same_network(name: str) -> None:
    learners = [make(**OPTIONS[name], execution=execution) for execution in ("eager", "auto")]
    for learner in learners:
        update(learner, 2)
        inject(learner)
        update(learner, 2, seed=1)
    eager, fast = (tensors(learner) for learner in learners)
    for key, tensor in eager.items():
        assert torch.allclose(tensor, fast[key], rtol=1e-5, atol=1e-6), key
