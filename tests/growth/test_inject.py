"""`inject` on anyone's network, and growth as a transaction on a live learner."""

import copy
import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
from growing import grow
from torch import Tensor, nn

import growtrain
from growtrain import InjectedHead, inject
from growtrain.environments.atari import make_spec
from growtrain.growth.alternatives import Replacement, Subject
from growtrain.growth.inject import NotPreserved, injection, nearly_equal
from growtrain.growth.kinds import KINDS
from growtrain.growth.transaction import GrowthFailed
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.optimizers import CenteredRMSProp
from growtrain.settings.config import Config

ANCHORS = ("frozen", "zero", "mirrored")
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
    "centered": lambda p: CenteredRMSProp(p, lr=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


class TheirNetwork(nn.Module):
    """Somebody else's network, with its head two levels down."""

    def __init__(self, width: int = 100) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(10, 24), nn.ReLU())
        self.q = nn.ModuleDict({"head": nn.Sequential(nn.Linear(24, width), nn.ReLU(), nn.Linear(width, 4))})

    def forward(self, x: Tensor) -> Tensor:
        q: Tensor = self.q["head"](self.trunk(x))
        return q


def fit(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        x = torch.randn(16, 10, generator=torch.Generator().manual_seed(step))
        loss = (network(x) - x[:, :4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("width", [100, 64, 33])
def test_inject_again_and_again_in_anyones_loop(optimizer_name: str, anchor: Any, width: int) -> None:
    network = TheirNetwork(width)
    target = copy.deepcopy(network)
    optimizer = OPTIMIZERS[optimizer_name](network.parameters())
    x = torch.randn(64, 10)
    fit(network, optimizer)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    for stage in (1, 2, 3):
        trunk_slots = {id(p): {k: v for k, v in optimizer.state[p].items()} for p in network.trunk.parameters()}
        before, target_before = network(x), target(x)
        event = inject(network, head="q.head", optimizer=optimizer, target=target, anchor=anchor)
        assert torch.equal(network(x), before)
        assert torch.equal(target(x), target_before)
        assert (event.max_abs_q_change_online, event.max_abs_q_change_target) == (0, 0)
        assert event.stage == stage
        assert event.parameters_trainable == event.parameters_trainable_before == trainable
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in network.parameters() if p.requires_grad}
        assert len(held) == len({id(p) for p in held})
        for p in network.trunk.parameters():
            assert all(optimizer.state[p][k] is v for k, v in trunk_slots[id(p)].items())
        assert not any(p in optimizer.state for p in network.q["head"].live.parameters())
        fresh = {k: v.clone() for k, v in network.q["head"].live.state_dict().items()}
        assert all(torch.equal(fresh[k], v) for k, v in target.q["head"].live.state_dict().items())
        fit(network, optimizer)
        assert all(
            not torch.equal(fresh[k], v) for k, v in network.q["head"].live.state_dict().items() if "weight" in k
        )
        assert torch.equal(target(x), target_before)  # the target does not move when the online live head does


def test_two_parameter_groups_keep_their_settings() -> None:
    network = TheirNetwork()
    optimizer = torch.optim.Adam(
        [{"params": network.q.parameters(), "lr": 1e-2}, {"params": network.trunk.parameters(), "lr": 1e-4}]
    )
    inject(network, head="q.head", optimizer=optimizer)
    live = {id(p) for p in network.q["head"].live.parameters()}
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == live
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_bad_networks_get_a_clear_error_and_stay_as_they_were() -> None:
    network = TheirNetwork()
    optimizer = torch.optim.Adam(network.parameters())
    with pytest.raises(ValueError, match=r"no module 'head'.*trunk, q"):
        inject(network, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"optimizer does not hold q\.head"):
        inject(network, head="q.head", optimizer=torch.optim.Adam(network.trunk.parameters()))
    with pytest.raises(ValueError, match="hidden layer"):
        inject(network, head="q.head.2", optimizer=optimizer)
    tied = TheirNetwork(width=24)
    tied.trunk.append(nn.Linear(24, 24))
    tied.trunk[2].weight = tied.q["head"][0].weight
    with pytest.raises(ValueError, match=r"shares its parameters with 'trunk\.2\.weight'"):
        inject(tied, head="q.head", optimizer=torch.optim.Adam(tied.parameters()))
    assert isinstance(network.q["head"], nn.Sequential)
    assert isinstance(tied.q["head"], nn.Sequential)


def test_a_target_that_is_no_lagging_copy_is_refused() -> None:
    def network(width: int) -> nn.Sequential:
        head = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
        return nn.Sequential(OrderedDict(encoder=nn.Linear(4, 6), head=head))

    online = network(8)
    optimizer = torch.optim.Adam(online.parameters())
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    for target, says in ((online, "the network's own"), (network(16), "lagging copy")):
        with pytest.raises(ValueError, match=says):
            inject(online, head="head", optimizer=optimizer, target=target)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held == [id(p) for p in online.parameters()]


def test_a_head_that_computes_something_else_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4))

        def forward(self, x: Tensor) -> Tensor:
            q: Tensor = self.inner(x) + torch.rand(())
            return q

    network = TheirNetwork()
    network.q["head"] = Noisy()
    optimizer = torch.optim.Adam(network.parameters())
    params = [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(NotPreserved, match="nothing was changed"):
        inject(network, head="q.head", optimizer=optimizer)
    assert isinstance(network.q["head"], Noisy)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == params


# Growth of a live learner


def learner(**overrides: Any) -> DoubleDQN:
    config = Config(**({"width": 32, "encoder_width": 0.25} | overrides))
    return DoubleDQN(
        config, make_spec(4), width=32, device=torch.device("cpu"), generator=torch.Generator().manual_seed(0)
    )


def observations(count: int = 24) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 4, 84, 84), dtype=torch.uint8, generator=g)


def learn(subject: DoubleDQN, steps: int = 2) -> None:
    for step in range(steps):
        target = torch.arange(4.0) * (step + 1)
        loss = (subject.online(observations()) - target).square().mean()
        subject.optimizer.zero_grad()
        loss.backward()
        subject.optimizer.step()


def snapshot(subject: DoubleDQN) -> dict[str, Any]:
    return {
        "online": copy.deepcopy(subject.online.state_dict()),
        "target": copy.deepcopy(subject.target.state_dict()),
        "optimizer": copy.deepcopy(subject.optimizer.state_dict()),
        "held": [id(p) for g in subject.optimizer.param_groups for p in g["params"]],
        "trainable": [n for n, p in subject.online.named_parameters() if p.requires_grad],
    }


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("anchor", ANCHORS)
def test_growth_keeps_predictions_lag_moments_and_count(anchor: Any) -> None:
    subject = learner()
    for stage in (1, 2, 3):
        learn(subject)
        online, target = subject.act(observations(64)), subject.target(observations(64))
        assert not torch.equal(online, target)  # there is a lag to keep
        event = grow(subject, observations(), anchor=anchor, generator=torch.Generator().manual_seed(stage), frames=7)
        assert torch.equal(subject.act(observations(64)), online)
        assert torch.equal(subject.target(observations(64)), target)
        assert (event.stage, event.frames, event.anchor) == (stage, 7, anchor)
        assert event.parameters_trainable == event.parameters_trainable_before
        assert event.pause_seconds > 0
        loss_tensors = {t.data_ptr() for t in subject.loss.target_value_network_params.flatten_keys(".").values()}
        assert loss_tensors == {t.data_ptr() for t in subject.target.state_dict().values()}
    learn(subject)
    subject.copy_target()
    assert torch.equal(subject.act(observations()), subject.target(observations()))


def test_freezing_the_encoder_takes_it_out_of_the_optimizer() -> None:
    subject = learner()
    learn(subject)
    event = grow(
        subject, observations(), anchor="mirrored", generator=torch.Generator().manual_seed(0), freeze_encoder=True
    )
    encoder = sum(p.numel() for p in subject.online.encoder.parameters())
    assert event.parameters_trainable == event.parameters_trainable_before - encoder
    before = copy.deepcopy(subject.online.encoder.state_dict())
    learn(subject)
    assert_same(before, subject.online.encoder.state_dict())
    grow(subject, observations(), anchor="mirrored", generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("after", "accepted"),
    [
        ([[-2.0, 1.0], [0.5, 0.50001]], True),  # a near tie, decided the other way
        ([[-2.0, 1.0], [0.5001, 0.5]], False),
        ([[-2.0, 1.0], [0.5, float("nan")]], False),
    ],
)
def test_where_sums_are_reordered_a_near_tie_refuses_no_growth(after: list[list[float]], accepted: bool) -> None:
    before = torch.tensor([[-2.0, 1.0], [0.50001, 0.5]])
    assert nearly_equal(before, torch.tensor(after)) is accepted


@pytest.mark.parametrize(("error", "accepted"), [(5e-7, True), (5e-6, False)])
def test_rounding_of_heads_that_cancel_refuses_no_growth_where_q_is_small(error: float, accepted: bool) -> None:
    before = torch.tensor([[1e-3, -2e-3]])
    assert nearly_equal(before, before + error) is accepted


@pytest.mark.parametrize("broken", ["rebuild", "verification", "optimizer", "no memory"])
def test_a_failed_growth_is_rolled_back_whole(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = learner()
    grow(subject, observations(), anchor="frozen", generator=torch.Generator().manual_seed(0))
    learn(subject)
    before = snapshot(subject)
    if broken == "rebuild":
        original, calls = subject.rebuild, []

        def rebuild() -> None:
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("compile error")
            original()

        monkeypatch.setattr(subject, "rebuild", rebuild)
    elif broken == "verification":

        def changes_the_function(subject: Subject) -> Replacement:
            replacement = injection(subject)
            with torch.no_grad():
                replacement.modules[0]["head"].get_parameter("live.2.weight").add_(1)
            return replacement

        monkeypatch.setitem(KINDS, "inject", dataclasses.replace(KINDS["inject"], make=changes_the_function))
    elif broken == "optimizer":

        def trains_the_old_head(subject: Subject) -> Replacement:
            replacement = injection(subject)
            replacement.modules[0]["head"].requires_grad_(True)
            return replacement

        monkeypatch.setitem(KINDS, "inject", dataclasses.replace(KINDS["inject"], make=trains_the_old_head))
    else:

        def out_of_memory(self: InjectedHead, *_: Any) -> None:
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(InjectedHead, "grown", out_of_memory)
    with pytest.raises(GrowthFailed, match="rolled back"):
        grow(subject, observations(), anchor="frozen", generator=torch.Generator().manual_seed(1))
    assert_same(before, snapshot(subject))
    monkeypatch.undo()
    learn(subject)  # and it still learns
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(subject))
    grow(subject, observations(), anchor="frozen", generator=torch.Generator().manual_seed(1))


def test_an_encoder_whose_freezing_is_rolled_back_goes_on_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = learner()  # its target equals it, and would share a frozen encoder at once
    for parameter in subject.online.encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    strict = dataclasses.replace(KINDS["inject"], keeps=(lambda before, after: False, None))
    monkeypatch.setitem(KINDS, "inject", strict)
    with pytest.raises(GrowthFailed):
        grow(subject, observations(), anchor="frozen", generator=torch.Generator().manual_seed(0), freeze_encoder=True)
    assert not subject.encoder_is_shared
    assert all(p.grad is not None for p in subject.online.encoder.parameters())
    before, lagging = copy.deepcopy(subject.online.encoder.state_dict()), copy.deepcopy(subject.target.state_dict())
    learn(subject)
    assert all(not torch.equal(before[name], p) for name, p in subject.online.encoder.named_parameters())
    assert_same(lagging, subject.target.state_dict())


def test_the_public_names_are_there() -> None:
    assert set(growtrain.__all__) >= {"Config", "GrowthEvent", "InjectedHead", "inject", "train"}
    for name in growtrain.__all__:
        assert getattr(growtrain, name) is not None
    with pytest.raises(AttributeError):
        growtrain.nothing  # noqa: B018
