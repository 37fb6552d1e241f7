"""What injection is compared with: the invariant that defines each alternative, on a live learner, and the way back from each."""

import copy
import dataclasses
import itertools
from typing import Any, get_args

import pytest
import torch
from growing import grow
from torch import Tensor, nn

from growtrain.environments.atari import make_spec
from growtrain.growth.alternatives import Subject, dormancy_scores, widen
from growtrain.growth.kinds import KINDS
from growtrain.growth.transaction import GrowthFailed, apply
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.networks.heads import initialize, make_head
from growtrain.networks.injected import InjectedHead
from growtrain.records import GrowthEvent
from growtrain.settings.config import Config
from growtrain.settings.schedules import Intervention

ACTIONS, WIDTH = 4, 32
INTERVENTIONS: tuple[Intervention, ...] = get_args(Intervention)
CPU = torch.device("cpu")


def make(**overrides: Any) -> DoubleDQN:
    """A learner that has learnt a little, with a target that lags behind."""
    config = Config(**({"width": WIDTH, "encoder_width": 0.25} | overrides))
    learner = DoubleDQN(config, make_spec(ACTIONS), width=WIDTH, device=CPU, generator=torch.Generator().manual_seed(0))
    learn(learner)
    return learner


def observations(count: int = 24, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 84, 84), dtype=torch.uint8, generator=g)


def learn(learner: DoubleDQN, steps: int = 2) -> None:
    for step in range(steps):
        loss = (learner.online(observations()) - torch.arange(4.0) * (step + 1)).square().mean()
        learner.optimizer.zero_grad()
        loss.backward()
        learner.optimizer.step()


def do(learner: DoubleDQN, intervention: Intervention, seed: int = 7) -> GrowthEvent:
    generator = torch.Generator().manual_seed(seed)
    return apply(learner, intervention, observations(), config=learner.config, generator=generator)


def weights(network: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(network.state_dict())


def slots(learner: DoubleDQN) -> dict[str, dict[str, Tensor]]:
    state = learner.optimizer.state
    return {name: state[p] for name, p in learner.online.named_parameters() if p in state}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


VARIANTS: dict[str, tuple[Intervention, dict[str, Any]]] = {
    **{intervention: (intervention, {"redo_tau": 0.5}) for intervention in INTERVENTIONS},
    "all heads": ("inject", {"trainable_heads": "all", "anchor": "frozen"}),
    "conv3": ("inject", {"split": "conv3", "anchor": "mirrored"}),
    "conv1": ("inject", {"split": "conv1", "anchor": "frozen"}),
    "spectral": ("widen", {"normalization": "spectral", "optimizer": "adam"}),
    "layer": ("widen", {"normalization": "layer", "output_bias": "per_action"}),
    "wider conv2": ("net2wider", {"split": "conv2", "optimizer": "adam"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_afterwards_the_learner_is_whole_and_learns(variant: str) -> None:
    """The optimizer holds what trains, the target has the same tensors and moves only when it is copied."""
    intervention, settings = VARIANTS[variant]
    learner = make(**settings)
    version = learner.version
    event = do(learner, intervention)
    assert (event.kind, event.anchor) == (intervention, learner.config.anchor if intervention == "inject" else None)
    assert learner.version > version  # a captured update is stale
    held = [p for group in learner.optimizer.param_groups for p in group["params"]]
    trainable = {name: p for name, p in learner.online.named_parameters() if p.requires_grad}
    assert {id(p) for p in held} == {id(p) for p in trainable.values()}
    assert len(held) == len(trainable)
    assert event.parameters_trainable == sum(p.numel() for p in held)
    assert not any(p.requires_grad for p in learner.target.parameters())
    read = {t.data_ptr() for t in learner.loss.target_value_network_params.flatten_keys(".").values()}
    assert read == {t.data_ptr() for t in learner.target.state_dict().values()}
    before, lagging = weights(learner.online), weights(learner.target)
    learn(learner)
    assert all(not torch.equal(before[name], p) for name, p in trainable.items())
    assert equal(lagging, weights(learner.target))
    learner.copy_target()
    assert equal(weights(learner.online), weights(learner.target))


@pytest.mark.parametrize("intervention", ["reset-head", "reset-all"])
def test_a_reset_of_heads_that_all_train_leaves_one(intervention: Intervention) -> None:
    learner = make(trainable_heads="all")
    do(learner, "inject")
    event = do(learner, intervention)
    assert learner.head.num_injections == 0
    assert event.parameters_trainable < event.parameters_trainable_before
    learn(learner)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_learner_restored_afterwards_goes_on_as_the_first_one(variant: str) -> None:
    intervention, settings = VARIANTS[variant]
    learner = make(**settings)
    do(learner, intervention)
    learn(learner)
    restored = DoubleDQN(learner.config, make_spec(ACTIONS), width=WIDTH, device=CPU, generator=torch.Generator())
    restored.load_state_dict(learner.state_dict())
    for subject in (learner, restored):
        learn(subject)
        do(subject, intervention, seed=8)
        learn(subject)
    assert equal(weights(learner.online), weights(restored.online))
    assert equal(weights(learner.target), weights(restored.target))
    assert slots(learner).keys() == slots(restored).keys()
    assert all(equal(slots(learner)[name], slots(restored)[name]) for name in slots(learner))


@pytest.mark.parametrize(
    ("intervention", "broken"),
    [*itertools.product(INTERVENTIONS, ["rebuild", "verification"]), ("reset-all", "optimizer")],
)
def test_a_failed_intervention_is_rolled_back_whole(
    intervention: Intervention, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(redo_tau=0.5, trainable_heads="all")
    parameters = {name: (id(p), p.detach().clone()) for name, p in learner.online.named_parameters()}
    before = weights(learner.target), copy.deepcopy(slots(learner)), [id(p) for p in learner.online.parameters()]
    original, calls = learner.rebuild, iter(range(9))

    def rebuild() -> None:
        if next(calls) == 0:
            if broken == "rebuild":
                raise RuntimeError("compile error")
            learner.optimizer.param_groups[0]["params"].pop()
        original()

    if broken == "verification":
        strict = dataclasses.replace(KINDS[intervention], keeps=(None, lambda before, after: False))
        monkeypatch.setitem(KINDS, intervention, strict)
    else:
        monkeypatch.setattr(learner, "rebuild", rebuild)
    with pytest.raises(GrowthFailed, match="rolled back"):
        do(learner, intervention)
    for name, p in learner.online.named_parameters():
        assert id(p) == parameters[name][0]
        assert torch.equal(p, parameters[name][1])
    assert equal(before[0], weights(learner.target))
    assert all(equal(before[1][name], slots(learner)[name]) for name in parameters)
    assert [id(p) for g in learner.optimizer.param_groups for p in g["params"]] == before[2]
    monkeypatch.undo()
    do(learner, intervention)
    learn(learner)


def test_every_intervention_has_a_row() -> None:
    assert set(KINDS) == set(INTERVENTIONS)


# Resets


@pytest.mark.parametrize("parts", [("head",), ("encoder",), ("encoder", "head")], ids=["head", "encoder", "all"])
def test_a_reset_forgets_these_parts_and_their_slots_and_nothing_else(parts: tuple[str, ...]) -> None:
    learner = make()
    online, target, moments = weights(learner.online), weights(learner.target), copy.deepcopy(slots(learner))
    event = do(learner, "reset-all" if len(parts) == 2 else f"reset-{parts[0]}")  # type: ignore[arg-type]
    for name, tensor in learner.online.state_dict().items():
        lagging = learner.target.state_dict()[name]
        if name.split(".")[0] in parts:
            assert not torch.equal(tensor, online[name])
            assert torch.equal(tensor, lagging)
            assert name not in slots(learner)
            bound = learner.online.get_parameter(name.replace("bias", "weight"))[0].numel() ** -0.5
            assert tensor.abs().max() <= bound
            assert tensor.abs().max() > bound / 2 or tensor.numel() == 1
        else:
            assert torch.equal(tensor, online[name])
            assert torch.equal(lagging, target[name])
            assert equal(slots(learner)[name], moments[name])
    assert event.max_abs_q_change_online > 1e-2
    assert event.max_abs_q_change_target is not None
    assert event.max_abs_q_change_target > 1e-2
    assert event.parameters_trainable == event.parameters_trainable_before
    other = make()
    do(other, event.kind, seed=1)
    changed = f"{parts[0]}.{'layers.0' if parts[0] == 'encoder' else 'live.0'}.weight"
    assert not torch.equal(other.online.state_dict()[changed], learner.online.state_dict()[changed])


def test_a_reset_head_has_no_frozen_heads() -> None:
    learner = make()
    grow(learner, observations(), anchor="mirrored", generator=torch.Generator().manual_seed(0))
    event = do(learner, "reset-head")
    assert learner.head.num_injections == 0
    plain = make().online
    assert {name: p.shape for name, p in learner.online.state_dict().items()} == {
        name: p.shape for name, p in plain.state_dict().items()
    }
    assert event.parameters_total == sum(p.numel() for p in plain.parameters())


def test_a_frozen_encoder_is_not_reset() -> None:
    learner, generator = make(), torch.Generator().manual_seed(0)
    apply(learner, "reset-head", observations(), config=learner.config, generator=generator, freeze_encoder=True)
    with pytest.raises(GrowthFailed, match="the encoder does not learn any more"):
        do(learner, "reset-all")


# Shrink and perturb


@pytest.mark.parametrize("normalization", ["none", "layer", "spectral"])
def test_shrink_perturb_keeps_a_share_of_everything_learned(normalization: str) -> None:
    def moved(alpha: float) -> DoubleDQN:
        learner = make(normalization=normalization, shrink_alpha=alpha)
        do(learner, "shrink-perturb")
        return learner

    old, fresh, new = make(normalization=normalization), moved(0.0), moved(0.8)
    drawn = dict(fresh.online.named_parameters())
    assert all(torch.equal(p, drawn[name]) for name, p in fresh.target.named_parameters())
    for before, after in ((old.online, new.online), (old.target, new.target)):
        for name, p in after.named_parameters():
            expected = 0.8 * before.get_parameter(name) + 0.2 * drawn[name]
            assert torch.allclose(p, expected, rtol=1e-5, atol=1e-7), name
    for name, p in new.online.named_parameters():  # the lag shrinks as well
        lag = old.online.get_parameter(name) - old.target.get_parameter(name)
        assert torch.allclose(p - new.target.get_parameter(name), 0.8 * lag, atol=1e-6)
    kept, before = moved(1.0), slots(old)  # the control: nothing is added, and nothing moves
    assert equal(dict(kept.online.named_parameters()), dict(old.online.named_parameters()))
    assert all(equal(slots(new)[name], before[name]) for name in before)
    assert slots(new).keys() == before.keys()


# Widening


def test_widening_adds_fresh_units_beside_the_old_ones() -> None:
    learner = make()
    online, target, moments = weights(learner.online), weights(learner.target), copy.deepcopy(slots(learner))
    features = learner.online.encoder.num_features
    for event in (do(learner, "widen"), do(learner, "widen", seed=1)):
        assert event.parameters_trainable - event.parameters_trainable_before == WIDTH * (features + 1 + ACTIONS)
        assert event.max_abs_q_change_online > 1e-3  # predictions are not kept
    assert learner.width == 3 * WIDTH
    for network, before in ((learner.online, online), (learner.target, target)):
        hidden, _, output = network.head.live  # type: ignore[misc,union-attr]
        assert torch.equal(hidden.weight[:WIDTH], before["head.live.0.weight"])
        assert torch.equal(hidden.bias[:WIDTH], before["head.live.0.bias"])
        assert torch.equal(output.weight[:, :WIDTH], before["head.live.2.weight"])
        assert torch.equal(output.bias, before["head.live.2.bias"])
        assert hidden.weight[WIDTH:].abs().max() <= features**-0.5
    assert torch.equal(learner.online.head.live[0].weight[WIDTH:], learner.target.head.live[0].weight[WIDTH:])  # type: ignore[index,union-attr]
    for slot, value in slots(learner)["head.live.2.weight"].items():
        assert torch.equal(value[:, :WIDTH], moments["head.live.2.weight"][slot])
        assert (value[:, WIDTH:] == 0).all()
    assert equal(slots(learner)["encoder.layers.0.weight"], moments["encoder.layers.0.weight"])


def test_net2wider_keeps_the_predictions_of_both_networks() -> None:
    learner, x = make(), observations(64, seed=9)
    for width in (WIDTH, 2 * WIDTH, 3 * WIDTH):
        learn(learner)
        online, target = learner.online(x), learner.target(x)
        event = do(learner, "net2wider", seed=width)
        assert learner.width == width + WIDTH
        for before, after in ((online, learner.online(x)), (target, learner.target(x))):
            assert (after - before).abs().max() <= 1e-5 * before.abs().max()
        assert event.max_abs_q_change_online <= 1e-5 * online.abs().max()


@pytest.mark.parametrize("optimizer", ["centered_rmsprop", "adam"])
def test_twins_are_the_same_units_in_both_networks_and_part_as_halves_do_not(optimizer: str) -> None:
    learner, halved = make(optimizer=optimizer), make(optimizer=optimizer)
    moments = copy.deepcopy(slots(learner))
    for subject in (learner, halved):
        do(subject, "net2wider")
    weight, lagging = (network.get_parameter("head.live.0.weight") for network in (learner.online, learner.target))
    twins = (weight[WIDTH:, None] == weight[None, :WIDTH]).all(-1).int().argmax(1)
    assert len(set(twins.tolist())) == WIDTH
    assert torch.equal(lagging[WIDTH:], lagging[:WIDTH][twins])
    for name, take in (
        ("head.live.0.weight", lambda value: value[twins]),
        ("head.live.2.weight", lambda v: v[:, twins]),
    ):
        for slot, value in moments[name].items():
            if value.dim():
                doubled = torch.cat([value, take(value)], 1 if "2" in name else 0)
                assert torch.equal(slots(learner)[name][slot], doubled)
    with torch.no_grad():  # the control: what Net2Net does before it adds noise
        output = halved.online.get_parameter("head.live.2.weight")
        output[:, twins] = output[:, WIDTH:] = (output[:, twins] + output[:, WIDTH:]) / 2
    apart = []
    for subject in (learner, halved):
        learn(subject, 4)
        hidden = subject.online.get_parameter("head.live.0.weight")
        apart.append((hidden[twins] - hidden[WIDTH:]).abs().amax(1))
    assert (apart[0] > 1e-5).float().mean() > 0.5
    assert apart[1].max() < 1e-6


@pytest.mark.parametrize("preserve", [True, False])
def test_net2wider_is_exact_in_float64_and_naive_widening_is_not(preserve: bool) -> None:
    heads = [InjectedHead(make_head(50, 16, 5, output_bias="shared")).double() for _ in range(2)]
    for head in heads:
        initialize(head, torch.Generator().manual_seed(3))
    online, target = (nn.ModuleDict({"head": head}) for head in heads)
    generator, x = torch.Generator().manual_seed(0), torch.rand(40, 50, dtype=torch.float64)
    subject = Subject(networks=(online, target), slots={}, observations=x, config=Config(width=16), generator=generator)
    for part in widen(subject, preserve=preserve).modules:
        change = (part["head"](x) - heads[0](x)).abs().max()
        assert change < 1e-14 if preserve else change > 1e-3
    assert heads[0].width == 16  # what there was is untouched


def test_an_injected_head_is_neither_widened_nor_recycled() -> None:
    learner = make()
    do(learner, "inject")
    for intervention in ("widen", "net2wider", "redo"):
        with pytest.raises(GrowthFailed, match="use another intervention"):
            do(learner, intervention)  # type: ignore[arg-type]


# ReDo


def kill(learner: DoubleDQN) -> dict[str, list[int]]:
    """Makes some units of every hidden layer zero whatever they see; returns which."""
    dead = {"encoder.layers.0": [1], "encoder.layers.2": [0, 5], "encoder.layers.4": [3], "head.live.0": [2, 7, 31]}
    with torch.no_grad():
        for name, units in dead.items():
            learner.online.get_parameter(f"{name}.weight")[units] = 0
            learner.online.get_parameter(f"{name}.bias")[units] = -1
    return dead


def test_scores_are_sokars_by_hand() -> None:
    learner, x = make(), observations(5)
    scores = dormancy_scores(learner.online, x)
    assert list(scores) == ["encoder.layers.0", "encoder.layers.2", "encoder.layers.4", "head.live.0"]
    with torch.no_grad():
        first = torch.relu(nn.functional.conv2d(x / 255, learner.online.encoder.layers[0].weight,
                                                learner.online.encoder.layers[0].bias, stride=4))  # fmt: skip
        hidden = torch.relu(learner.online.head.live[0](learner.online.encoder(x)))
    for name, activity in (("encoder.layers.0", first), ("head.live.0", hidden)):
        means = [float(activity[:, unit].abs().mean()) for unit in range(activity.shape[1])]
        expected = torch.tensor(means) / (sum(means) / len(means))
        assert torch.allclose(scores[name], expected, rtol=1e-4, atol=1e-6)
    assert scores["encoder.layers.4"].mean() == pytest.approx(1)
    assert not learner.online.encoder.layers[0]._forward_pre_hooks


@pytest.mark.parametrize("split", ["fc1", "conv2"])
@pytest.mark.parametrize("optimizer", ["centered_rmsprop", "adam"])
def test_redo_at_tau_0_recycles_dead_units_and_changes_no_prediction(optimizer: str, split: str) -> None:
    learner, x = make(redo_tau=0.0, optimizer=optimizer, split=split), observations()
    if split == "fc1":
        kill(learner)
    else:
        with torch.no_grad():
            learner.head.live[5].bias[:3] = -1e3  # type: ignore[index,union-attr]
            learner.head.live[0].bias[:2] = -1e3  # type: ignore[index,union-attr]
    scores = dormancy_scores(learner.online, x)
    masks = {name: score == 0 for name, score in scores.items()}
    before, moments, q, target = (
        weights(learner.online),
        copy.deepcopy(slots(learner)),
        learner.online(x),
        learner.target,
    )
    lagging = weights(target)
    event = do(learner, "redo")
    assert event.recycled_units == sum(int(mask.sum()) for mask in masks.values()) >= 5
    assert torch.equal(learner.online(x), q)
    assert event.max_abs_q_change_online == event.max_abs_q_change_target == 0
    assert equal(weights(target), lagging)
    after, names = learner.online.state_dict(), list(scores)
    consumers = [*names[1:], "head.live.2" if split == "fc1" else "head.live.7"]
    incoming = {f"{name}.{kind}": masks[name] for name in names for kind in ("weight", "bias")}
    outgoing = {
        f"{consumer}.weight": masks[name].repeat_interleave(before[f"{consumer}.weight"].shape[1] // len(masks[name]))
        for name, consumer in zip(names, consumers, strict=True)
    }
    for name in before:
        rows, columns = torch.zeros(()).bool(), torch.zeros(()).bool()
        if name in incoming:
            rows = incoming[name].view(-1, *[1] * (before[name].dim() - 1))
        if name in outgoing:
            columns = outgoing[name].view(1, -1, *[1] * (before[name].dim() - 2))
        columns, rows = columns.expand_as(before[name]), (rows & ~columns).expand_as(before[name])
        assert (after[name][columns] == 0).all()
        assert torch.equal(after[name][~(rows | columns)], before[name][~(rows | columns)])
        if rows.any():
            assert (after[name][rows] != before[name][rows]).float().mean() > 0.99
        for slot, value in moments[name].items():
            if value.dim():
                now = slots(learner)[name][slot]
                assert (now[rows | columns] == 0).all()
                assert torch.equal(now[~(rows | columns)], value[~(rows | columns)])
    revived = dormancy_scores(learner.online, x)
    assert sum(int((revived[name][masks[name]] > 0).sum()) for name in names) > 0
    with torch.no_grad():  # the control: had their outgoing weights been kept, predictions would have changed
        learner.online.get_parameter(f"{consumers[-1]}.weight")[:, masks[names[-1]]] = 1
    assert not torch.equal(learner.online(x), q)


def test_redo_above_0_moves_predictions_and_below_every_score_nothing() -> None:
    learner = make(redo_tau=0.7)
    event = do(learner, "redo")
    assert event.recycled_units is not None
    assert event.recycled_units > 0
    assert event.max_abs_q_change_online > 0
    assert event.max_abs_q_change_target == 0
    alive = make(redo_tau=0.0)
    with torch.no_grad():
        for p in alive.online.parameters():
            p.abs_()
    modules = list(alive.online.modules())
    assert do(alive, "redo").recycled_units == 0
    assert list(alive.online.modules()) == modules  # no module was replaced


def test_redo_leaves_a_frozen_encoder_alone() -> None:
    learner, generator = make(redo_tau=0.5), torch.Generator().manual_seed(0)
    kill(learner)
    apply(learner, "fresh-optimizer", observations(), config=learner.config, generator=generator, freeze_encoder=True)
    before = weights(learner.online.encoder)
    event = do(learner, "redo")
    assert event.recycled_units is not None
    assert 3 <= event.recycled_units < WIDTH
    assert equal(before, weights(learner.online.encoder))


# Fresh optimizer


def test_a_fresh_optimizer_changes_no_bit_but_the_next_update() -> None:
    learner, control, x = make(), make(), observations()
    before, q = weights(learner.online), learner.online(x)
    event = do(learner, "fresh-optimizer")
    assert torch.equal(learner.online(x), q)
    assert event.max_abs_q_change_online == event.max_abs_q_change_target == 0
    assert equal(before, weights(learner.online))
    assert not learner.optimizer.state
    learn(learner, 1)
    learn(control, 1)
    assert not equal(weights(learner.online), weights(control.online))


# All heads trainable


@pytest.mark.parametrize("anchor", ["frozen", "zero", "mirrored"])
def test_with_all_heads_trainable_an_injection_adds_a_head_and_freezes_none(anchor: str) -> None:
    learner, x = make(anchor=anchor, trainable_heads="all"), observations(64, seed=5)
    for stage in (1, 2):
        q, target, moments = learner.online(x), learner.target(x), slots(learner)
        old = dict(learner.head.live.named_parameters())
        names = {id(p): name for name, p in learner.online.named_parameters()}
        event = do(learner, "inject", seed=stage)
        assert torch.equal(learner.online(x), q)
        assert torch.equal(learner.target(x), target)
        head = sum(p.numel() for p in old.values())
        assert event.parameters_trainable == event.parameters_trainable_before + head
        now = {id(p): name for name, p in learner.online.named_parameters()}
        for p in old.values():  # the same parameters, under other names, with the slots they had
            assert now[id(p)].startswith("head.frozen.heads.")
            state = learner.optimizer.state[p]
            assert all(state[slot] is value for slot, value in moments[names[id(p)]].items())
        before, lagging = weights(learner.online), weights(learner.target)
        learn(learner)
        # Frozen heads lie in the order of their sum: first the oldest, then each old live head before its anchor.
        still = (("1.",), ("2.", "3."))[stage - 1] if anchor == "frozen" else ()
        for name, p in learner.online.named_parameters():
            frozen = name.removeprefix("head.frozen.heads.").startswith(still)
            assert torch.equal(before[name], p) == frozen == (not p.requires_grad), name
        assert equal(lagging, weights(learner.target))
    trainable = event.parameters_trainable
    event = grow(learner, observations(), anchor="frozen", generator=torch.Generator().manual_seed(9))
    assert event.parameters_trainable == trainable - 2 * head  # the newest alone again
    assert all(p.requires_grad == name.startswith("live.") for name, p in learner.head.named_parameters())


# Splits


@pytest.mark.parametrize("split", ["conv3", "conv2", "conv1"])
def test_where_the_network_is_split_changes_nothing_until_it_is_injected(split: str) -> None:
    default, deeper = (
        DoubleDQN(
            Config(width=WIDTH, encoder_width=0.25, split=name),  # type: ignore[arg-type]
            make_spec(ACTIONS),
            width=WIDTH,
            device=CPU,
            generator=torch.Generator().manual_seed(4),
        )
        for name in ("fc1", split)
    )
    for one, other in zip(default.online.parameters(), deeper.online.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(default.online(observations()), deeper.online(observations()))
    assert deeper.width == WIDTH
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in deeper.online.encoder.modules())
    assert convolutions == int(split[-1]) - 1


@pytest.mark.parametrize("anchor", ["frozen", "zero", "mirrored"])
@pytest.mark.parametrize("split", ["conv3", "conv1"])
def test_injecting_at_a_deeper_split_keeps_predictions_bit_for_bit(split: str, anchor: str) -> None:
    learner, x = make(split=split, anchor=anchor), observations(40, seed=3)
    for stage in (1, 2):
        q, target = learner.online(x), learner.target(x)
        moments = slots(learner)
        event = do(learner, "inject", seed=stage)
        assert torch.equal(learner.online(x), q)
        assert torch.equal(learner.target(x), target)
        assert event.parameters_trainable == event.parameters_trainable_before
        assert set(slots(learner)) == {name for name in moments if name.startswith("encoder.")}
        learn(learner)
        assert not torch.equal(learner.online(x), q)
        assert torch.equal(learner.target(x), target)
    kernels = [p for name, p in learner.head.named_parameters() if p.dim() == 4]
    assert sum(p.requires_grad for p in kernels) == (1 if split == "conv3" else 3)
    assert sum(not p.requires_grad for p in kernels) == (1 if split == "conv3" else 3) * (
        4 if anchor == "frozen" else 2
    )
