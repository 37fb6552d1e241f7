"""The growth invariants of a head: function preservation, trainable count, what moves and what does not."""

import copy
import itertools
import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from growtrain.networks.heads import SharedBiasLinear, SpectralLinear, initialize, make_head
from growtrain.networks.injected import FrozenBank, InjectedHead

ANCHORS = ("frozen", "zero", "mirrored")
BATCH, FEATURES, ACTIONS = 32, 96, 6
DOES_NOT_FIT = {  # one silent layer cannot silence two streams, nor can units be paired that have two outputs each
    ("dueling", "zero"),
    ("dueling", "mirrored"),
    *((name, "mirrored") for name in ("crelu", "fourier", "crelu, spectral norm", "fourier, layer norm")),
}


class Dueling(nn.Module):
    """A head that is no `nn.Sequential` and has two output layers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 40)
        self.value, self.advantage = nn.Linear(40, 1), nn.Linear(40, ACTIONS)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(x))
        a = self.advantage(h)
        return self.value(h) + a - a.mean(-1, keepdim=True)


def heads() -> dict[str, nn.Module]:
    made = {
        "mlp": make_head(FEATURES, 64, ACTIONS),
        "shared bias": make_head(FEATURES, 64, ACTIONS, output_bias="shared"),
        "odd width": make_head(FEATURES, 33, ACTIONS),
        "layer norm": make_head(FEATURES, 64, ACTIONS, normalization="layer"),
        "spectral norm": make_head(FEATURES, 64, ACTIONS, normalization="spectral", output_bias="shared"),
        "no bias": nn.Sequential(nn.Linear(FEATURES, 48, bias=False), nn.Tanh(), nn.Linear(48, ACTIONS, bias=False)),
        "three layers": nn.Sequential(
            nn.Linear(FEATURES, 48), nn.ReLU(), nn.Linear(48, 30), nn.GELU(), nn.Linear(30, ACTIONS)
        ),
        "dueling": Dueling(),
        "wide": make_head(FEATURES, 1024, 18),
        "crelu": make_head(FEATURES, 64, ACTIONS, activation="crelu", output_bias="shared"),
        "fourier": make_head(FEATURES, 64, ACTIONS, activation="fourier"),
        "crelu, spectral norm": make_head(FEATURES, 64, ACTIONS, activation="crelu", normalization="spectral"),
        "fourier, layer norm": make_head(FEATURES, 64, ACTIONS, activation="fourier", normalization="layer"),
    }
    generator = torch.Generator().manual_seed(5)
    for head in made.values():
        initialize(head, generator)
    return made


def train_a_little(head: nn.Module, features: Tensor, steps: int = 3) -> None:
    parameters = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    for _ in range(steps):
        loss = (head(features) - torch.arange(head(features).shape[1])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def features(seed: int = 0, batch: int = BATCH) -> Tensor:
    return torch.relu(torch.randn(batch, FEATURES, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("name", heads())
def test_four_injections_change_no_bit_and_no_count(name: str, anchor: str) -> None:
    if (name, anchor) in DOES_NOT_FIT:
        pytest.skip("see test_anchor_that_does_not_fit")
    head = InjectedHead(heads()[name])
    trainable = sum(p.numel() for p in head.parameters() if p.requires_grad)
    generator = torch.Generator().manual_seed(1)
    for injection in range(1, 5):
        batches = [features(7, n) for n in (1, 8, 32, 100)]
        before = [head(x).detach() for x in batches]
        head.inject(generator, anchor=anchor)  # type: ignore[arg-type]
        for x, q in zip(batches, before, strict=True):
            assert torch.equal(head(x), q)
        assert head.num_injections == injection
        assert sum(p.numel() for p in head.parameters() if p.requires_grad) == trainable
        train_a_little(head, features(injection))
        assert not torch.equal(head(batches[2]), before[2])  # the live head does learn


@pytest.mark.parametrize("anchors", list(itertools.product(ANCHORS, repeat=3)))
def test_mixed_anchors(anchors: tuple[str, ...]) -> None:
    head, generator = InjectedHead(heads()["shared bias"]), torch.Generator().manual_seed(2)
    for anchor in anchors:
        before = head(features()).detach()
        head.inject(generator, anchor=anchor)  # type: ignore[arg-type]
        assert torch.equal(head(features()), before)
        train_a_little(head, features(1))


def test_naive_grouping_is_not_exact() -> None:
    """The negative control: (frozen + live) - anchor is not bit-equal, so the grouping in `forward` is doing something."""
    head, x = InjectedHead(heads()["wide"]), features()
    train_a_little(head, x)
    before = head(x).detach()
    head.inject(torch.Generator().manual_seed(0), "frozen")
    assert head.frozen is not None
    frozen, anchor = head.frozen(x)
    assert not torch.equal((frozen + head.live(x)) - anchor, before)
    assert torch.equal(frozen + (head.live(x) - anchor), before)


@pytest.mark.parametrize(
    ("name", "anchor"),
    [("mlp", "frozen"), ("mlp", "zero"), ("mlp", "mirrored"), ("crelu", "frozen"), ("fourier", "zero")],
)
def test_fused_bank_is_the_sum_of_the_heads(name: str, anchor: str) -> None:
    """Float64 oracle: heads kept apart by hand, summed with their signs."""
    head, generator = InjectedHead(heads()[name]), torch.Generator().manual_seed(3)
    x, terms = features(), []

    def in_float64(module: nn.Module) -> Tensor:
        return copy.deepcopy(module).double()(x.double()).detach()

    for _ in range(3):
        train_a_little(head, x)
        terms.append(in_float64(head.live))
        head.inject(generator, anchor=anchor)  # type: ignore[arg-type]
        if anchor == "frozen":
            terms.append(-in_float64(head.live))  # what the anchor is worth for ever
    train_a_little(head, x)
    assert isinstance(head.frozen, FrozenBank)
    assert head.frozen.fused
    oracle = sum(terms) + in_float64(head.live)
    assert torch.allclose(in_float64(head), oracle, rtol=0, atol=1e-12)
    assert (head(x) - oracle).abs().max() <= 1e-5 * oracle.abs().max()
    assert torch.equal(head(x).argmax(1), oracle.argmax(1))
    heads_frozen = 6 if anchor == "frozen" else 3
    units = 32 if name == "fourier" else 64
    assert head.frozen.hidden_weight.shape == (units * heads_frozen, FEATURES)


def test_heads_whose_outputs_are_not_aligned_in_memory_keep_every_bit_fused_where_they_can_be(by_onednn: bool) -> None:
    for seed in range(20):
        head = InjectedHead(heads()["odd width"])
        before = head(features(seed, batch=1)).detach()
        head.inject(torch.Generator().manual_seed(seed), "frozen")
        assert head.frozen is not None
        assert head.frozen.fused or not by_onednn
        assert torch.equal(head(features(seed, batch=1)), before)


@pytest.mark.parametrize("place", [0, -1])
def test_a_bank_that_would_round_a_head_or_the_new_anchor_otherwise_is_not_fused(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = FrozenBank.head_outputs

    def rounded(self: FrozenBank, x: Tensor) -> Iterator[Tensor]:
        outputs = list(exact(self, x))
        if self.fused:
            outputs[place] = outputs[place] * (1 + 1e-6)
        yield from outputs

    monkeypatch.setattr(FrozenBank, "head_outputs", rounded)
    head = InjectedHead(heads()["mlp"])
    before = head(features()).detach()
    head.inject(torch.Generator().manual_seed(0), "frozen")
    assert head.frozen is not None
    assert not head.frozen.fused
    assert torch.equal(head(features()), before)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_only_the_live_head_gets_gradients_and_the_encoder_gets_them_through_all_heads(anchor: str) -> None:
    head, x = InjectedHead(heads()["mlp"]), features().requires_grad_()
    train_a_little(head, features())
    head.inject(torch.Generator().manual_seed(0), anchor=anchor)  # type: ignore[arg-type]
    before = {name: p.clone() for name, p in head.named_parameters() if not name.startswith("live.")}
    assert before
    assert {name for name, p in head.named_parameters() if p.requires_grad} == {
        name for name, _ in head.named_parameters() if name.startswith("live.")
    }
    train_a_little(head, features(), steps=5)
    head(x).sum().backward()
    for name, frozen in before.items():
        assert torch.equal(head.get_parameter(name), frozen)
        assert head.get_parameter(name).grad is None
    assert head.frozen is not None
    assert x.grad is not None
    y = features().requires_grad_()
    frozen_sum, anchor_out = head.frozen(y)
    (frozen_sum + head.live(y) - (0 if anchor_out is None else anchor_out)).sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    z = features().requires_grad_()
    head.live(z).sum().backward()
    assert not torch.allclose(x.grad, z.grad, rtol=1e-2)  # the frozen heads carry gradient, too


def test_mirrored_head_pairs_its_last_hidden_units_and_both_last_layers_learn_at_once() -> None:
    head = InjectedHead(heads()["three layers"])
    head.inject(torch.Generator().manual_seed(0), "mirrored")
    live = head.live
    assert isinstance(live, nn.Sequential)
    hidden, output = live[2].weight, live[4].weight
    assert torch.equal(hidden[:15], hidden[15:])
    assert torch.equal(output[:, :15], -output[:, 15:])
    assert (output != 0).all()
    (head(features()) * torch.arange(ACTIONS)).sum().backward()
    assert all((p.grad != 0).any() for layer in (live[2], live[4]) for p in layer.parameters())
    assert (live[0].weight.grad == 0).all()  # below the paired layer the two halves' gradients cancel until they differ


def test_fresh_weights_are_fresh_and_come_from_the_generator() -> None:
    base = heads()["mlp"]

    def live_after(seed: int) -> Tensor:
        head = InjectedHead(copy.deepcopy(base))
        head.inject(torch.Generator().manual_seed(seed))
        return head.live[0].weight.detach()  # type: ignore[index,operator]

    assert torch.equal(live_after(1), live_after(1))
    assert not torch.equal(live_after(1), live_after(2))
    assert not torch.equal(live_after(1), base[0].weight)  # type: ignore[index]
    state = torch.get_rng_state()
    live_after(1)
    assert torch.equal(state, torch.get_rng_state())


def test_a_bank_that_was_kept_head_by_head_is_never_fused_on_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fusing makes plain layers of all, which may round otherwise."""
    grown = InjectedHead(make_head(64, 64, 3))
    for _ in range(2):
        grown.inject(torch.Generator().manual_seed(0))
    assert grown.frozen is not None
    assert grown.frozen.fused
    grown.rebuild_bank(fused=False)
    monkeypatch.setattr(FrozenBank, "_fuse", lambda bank: pytest.fail("it was fused"))
    again = InjectedHead(make_head(64, 64, 3)).grow_to(grown.spec())
    again.load_state_dict(grown.state_dict())
    given = torch.randn(5, 64)
    assert torch.equal(again(given), grown(given))


def test_a_spec_that_fuses_what_cannot_be_is_refused() -> None:
    head = InjectedHead(heads()["layer norm"])
    with pytest.raises(ValueError, match="cannot be fused"):
        head.grow_to({"injections": ["zero"], "fused": True})
    assert head.num_injections == 0


@pytest.mark.parametrize("name", ["mlp", "shared bias", "layer norm", "dueling", "odd width"])
def test_spec_rebuilds_the_architecture(name: str) -> None:
    head, generator = InjectedHead(heads()[name]), torch.Generator().manual_seed(4)
    for anchor in ("frozen",) if name == "dueling" else ("frozen", "mirrored", "zero", "frozen"):
        train_a_little(head, features())
        head.inject(generator, anchor=anchor)  # type: ignore[arg-type]
    spec = json.loads(json.dumps(head.spec()))
    fresh = InjectedHead(heads()[name]).grow_to(spec)
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh(features()), head(features()))
    assert fresh.spec() == head.spec()
    with pytest.raises(ValueError, match="does not continue"):
        fresh.grow_to({"injections": ["zero"]})


@pytest.mark.parametrize(
    ("head", "remedy"),
    [
        (nn.Linear(FEATURES, ACTIONS), "hidden layer"),
        (nn.Sequential(nn.Linear(FEATURES, 32), nn.Linear(32, ACTIONS)), "hidden layer"),
        (nn.Sequential(nn.Linear(FEATURES, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, ACTIONS)), "LayerNorm"),
        (nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, ACTIONS)), "dropout"),
        (nn.ReLU(), "no parameters"),
    ],
)
def test_heads_that_cannot_be_injected(head: nn.Module, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        InjectedHead(head)


def test_evaluation_mode_dropout_and_batchnorm_stay_frozen_under_train() -> None:
    base = nn.Sequential(
        nn.Linear(FEATURES, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, ACTIONS)
    )
    head = InjectedHead(base.eval())
    before = head(features()).detach()
    with pytest.raises(ValueError, match=r"'1' is BatchNorm1d.* after \.train\(\): use anchor='mirrored' or 'zero'"):
        head.inject(torch.Generator().manual_seed(0), "frozen")
    head.inject(torch.Generator().manual_seed(0), "zero")
    assert torch.equal(head(features()), before)
    head.train()
    assert head.live.training
    assert torch.equal(head(features()), before)
    assert head.frozen is not None
    assert not any(module.training for module in head.frozen.modules())


@pytest.mark.parametrize(("name", "anchor"), [*sorted(DOES_NOT_FIT), ("mlp", "sideways")])
def test_anchor_that_does_not_fit_changes_nothing(name: str, anchor: str) -> None:
    head = InjectedHead(heads()[name])
    before = {k: v.clone() for k, v in head.state_dict().items()}
    with pytest.raises(ValueError, match="frozen"):
        head.inject(torch.Generator().manual_seed(0), anchor)  # type: ignore[arg-type]
    assert head.num_injections == 0
    assert all(torch.equal(before[k], v) for k, v in head.state_dict().items())
    assert all(p.requires_grad for p in head.parameters())


def test_shared_bias_is_one_scalar() -> None:
    layer = SharedBiasLinear(8, ACTIONS)
    initialize(layer, torch.Generator().manual_seed(0))
    assert layer.bias.shape == (1,)
    x = torch.randn(3, 8)
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("anchor", ["frozen", "zero", "mirrored"])
def test_a_single_observation_needs_no_batch(anchor: str) -> None:
    head = InjectedHead(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)))
    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for seed in range(2):
        head.inject(torch.Generator().manual_seed(seed), anchor)
    torch.testing.assert_close(head(features[0]), head(features)[0], rtol=0, atol=1e-6)


def test_a_mirrored_head_begins_with_the_norm_of_the_weight_that_it_has() -> None:
    head = InjectedHead(make_head(1024, 128, ACTIONS, normalization="spectral"))
    initialize(head, torch.Generator().manual_seed(0))
    head.inject(torch.Generator().manual_seed(1), "mirrored")
    hidden = next(module for module in head.live.modules() if isinstance(module, SpectralLinear))
    sigma = torch.dot(hidden.left, hidden.weight @ hidden.right)
    assert torch.linalg.matrix_norm(hidden.weight, 2) / sigma < 1.1
