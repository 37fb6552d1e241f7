"""The Soft-Actor-Critic learner against TorchRL's loss and naive oracles, before and after growth."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss

from growtrain.environments.base import Spec
from growtrain.growth.transaction import GrowthFailed, apply
from growtrain.learners.losses import tanh_gaussian
from growtrain.learners.make import make_learner
from growtrain.learners.sac import SAC
from growtrain.learners.saved import check_saved
from growtrain.planning.costs import full_width, make_plan
from growtrain.plasticity.learning_test import LearningTest, compare_copies
from growtrain.records import Decision, GrowthEvent
from growtrain.runs.loop import train
from growtrain.settings.config import Config
from growtrain.settings.presets import sac
from growtrain.settings.schedules import Intervention
from growtrain.settings.text import ConfigError

SIZE, ACTIONS, BATCH = 7, 3, 16
SPEC = Spec(frame_shape=(SIZE,), stack_size=1, num_actions=ACTIONS, frame_skip=1, scale=1.0, continuous=True)
NETWORKS = ("critic_1", "critic_2", "actor")


def make(seed: int = 0, **overrides: Any) -> SAC:
    config = sac(**{"width": 16, "batch_size": BATCH} | overrides)
    learner = make_learner(config, SPEC, device=torch.device("cpu"), generator=torch.Generator().manual_seed(seed))
    assert isinstance(learner, SAC)
    return learner


def batches(count: int = 1, seed: int = 0) -> TensorDict:
    g, shape = torch.Generator().manual_seed(seed), (count, BATCH)
    ended = torch.rand((*shape, 1), generator=g) < 0.3
    following = {
        "observation": torch.randn((*shape, SIZE), generator=g),
        "reward": torch.randn((*shape, 1), generator=g),
        "done": ended,
        "terminated": ended,
    }
    batch = {
        "observation": torch.randn((*shape, SIZE), generator=g),
        "action": torch.rand((*shape, ACTIONS), generator=g) * 2 - 1,
        "next": following,
    }
    return TensorDict(batch, shape)


def grow(learner: SAC, intervention: Intervention = "inject", seed: int = 5) -> GrowthEvent:
    generator = torch.Generator().manual_seed(seed)
    inputs = learner.inputs(batches(1, 9)[0])
    return apply(learner, intervention, inputs, config=learner.config, generator=generator)


def outputs(learner: SAC) -> dict[str, Tensor]:
    inputs = learner.inputs(batches(1, 11)[0])
    with torch.no_grad():
        values = {name: network(inputs[name]) for name, network in learner.online.items()}
        return values | {f"target of {name}": target(inputs[name]) for name, target in learner.targets.items()}


def weights(learner: SAC) -> dict[str, Tensor]:
    state = learner.state_dict()["networks"]
    return {
        f"{name}.{role}.{inside}": tensor.clone()
        for name, network in state.items()
        for role in ("online", "target")
        for inside, tensor in network[role].items()
    }


def torchrls_loss(learner: SAC) -> SACLoss:
    """TorchRL's loss over copies of the learner's networks."""

    class Parameters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = copy.deepcopy(learner.online["actor"])

        def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
            mean, log_std = self.network(observation).chunk(2, -1)
            return mean, log_std.clamp(-20, 2).exp()

    class Value(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.network = copy.deepcopy(learner.online[name])

        def forward(self, observation: Tensor, action: Tensor) -> Tensor:
            value: Tensor = self.network(torch.cat([observation, action], -1))
            return value

    actor = ProbabilisticActor(
        TensorDictModule(Parameters(), in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        spec=Bounded(-1, 1, (ACTIONS,)),
        return_log_prob=True,
    )
    critics = [ValueOperator(Value(name), in_keys=["observation", "action"]) for name in ("critic_1", "critic_2")]
    loss = SACLoss(actor, critics, loss_function="l2", target_entropy=-ACTIONS, deactivate_vmap=True)
    loss.make_value_estimator(gamma=learner.config.discount)
    loss._has_update_associated["qvalue_network"] = True
    with torch.no_grad():
        loss.log_alpha.copy_(learner.log_alpha)
        for name, target in loss.target_qvalue_network_params.flatten_keys(".").items():
            both = [
                learner.targets[each].state_dict()[name.removeprefix("module.network.")] for each in learner.targets
            ]
            target.data.copy_(torch.stack(both))
    return loss


@pytest.mark.parametrize(("injections", "anchor"), [(0, "frozen"), (2, "frozen"), (2, "mirrored")])
def test_losses_and_gradients_are_those_of_torchrl(injections: int, anchor: str) -> None:
    learner = make(anchor=anchor)
    learner.update(batches(4, 1))
    for seed in range(injections):
        grow(learner, seed=seed)
        learner.update(batches(4, 2 + seed))
    with torch.no_grad():
        learner.log_alpha.fill_(-0.7)
        for target in learner.targets.values():  # so that reading the wrong network shows
            for p in target.parameters():
                p.mul_(1.3)
    batch = batches(1, 20)[0]
    theirs = torchrls_loss(learner)
    torch.manual_seed(3)
    expected = theirs(batch.clone())
    torch.manual_seed(3)
    at_next, at_s = torch.randn(BATCH, ACTIONS), torch.randn(BATCH, ACTIONS)  # the order in which it draws
    learner.optimizer.zero_grad()
    losses, _ = learner.losses(batch, torch.stack([at_s, at_next]))
    expected["loss_qvalue"] = expected["loss_qvalue"] / 2
    for ours, name in (("critic", "loss_qvalue"), ("actor", "loss_actor"), ("alpha", "loss_alpha")):
        torch.testing.assert_close(losses[ours], expected[name], rtol=1e-4, atol=1e-5)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    (expected["loss_qvalue"] + expected["loss_actor"] + expected["loss_alpha"]).backward()
    torch.testing.assert_close(learner.log_alpha.grad, theirs.log_alpha.grad, rtol=1e-4, atol=1e-5)
    actor = theirs.actor_network_params.flatten_keys(".")
    critics = theirs.qvalue_network_params.flatten_keys(".")
    checked = 0
    for name, network in learner.online.items():
        for inside, parameter in network.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None
                continue
            if name == "actor":
                (key,) = [each for each in actor.keys() if each.endswith(f"network.{inside}")]  # noqa: SIM118
                wanted = actor[key].grad
            else:
                wanted = critics[f"module.network.{inside}"].grad[NETWORKS.index(name)]
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5)
            checked += 1
    assert checked == 3 * 6
    assert all(p.grad is None for target in learner.targets.values() for p in target.parameters())


def test_log_probabilities_are_those_of_a_squashed_gaussian_even_far_out() -> None:
    g = torch.Generator().manual_seed(0)
    parameters, noise = torch.randn((50, 6), generator=g).double() / 2, torch.randn((50, 3), generator=g).double()
    action, log_pi = tanh_gaussian(parameters, noise)
    mean, log_std = parameters.chunk(2, -1)
    base = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(base, torch.distributions.transforms.TanhTransform())
    torch.testing.assert_close(log_pi, squashed.log_prob(action).sum(-1), rtol=1e-6, atol=1e-6)
    far, log_far = tanh_gaussian(torch.tensor([[40.0, 0.0], [-40.0, 0.0]]), torch.zeros(2, 1))
    assert far.abs().eq(1).all()
    assert log_far.isfinite().all()


@pytest.mark.parametrize("anchor", ["frozen", "zero", "mirrored"])
@pytest.mark.parametrize("grown", ["both", "critic", "actor"])
def test_an_injection_keeps_every_output_to_the_bit_and_only_what_is_live_trains(grown: str, anchor: str) -> None:
    learner = make(grow=grown, anchor=anchor)
    learner.update(batches(5, 1))
    for stage in (1, 2, 3):
        before, slots = outputs(learner), len(learner.optimizer.state)
        event = grow(learner, seed=stage)
        after = outputs(learner)
        assert all(torch.equal(before[name], after[name]) for name in before)
        names = [name for name in NETWORKS if grown == "both" or name.startswith(grown)]
        assert event.changes == {name: [0.0, 0.0] if name != "actor" else [0.0] for name in names}
        assert event.parameters_trainable == event.parameters_trainable_before
        assert event.stage == stage
        held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in learner.trainable()}
        # Fresh slots for what is live, the others are kept.
        assert len(learner.optimizer.state) == slots - 6 * len(names)
        still, state = weights(learner), dict(learner.online)
        learner.update(batches(3, 30 + stage))
        moved = {name for name, tensor in weights(learner).items() if not torch.equal(tensor, still[name])}
        for name, network in state.items():
            live = {f"{name}.online.{inside}" for inside, p in network.named_parameters() if p.requires_grad}
            assert {each for each in moved if each.startswith(f"{name}.online.")} == live
            assert all("head.live." in each for each in live)
        assert any(not torch.equal(after[name], value) for name, value in outputs(learner).items())


def test_the_two_critics_get_fresh_weights_of_their_own_and_their_targets_the_same_as_they() -> None:
    learner = make()
    learner.update(batches(3, 1))
    grow(learner)
    live = {name: network.head.live[0].weight for name, network in learner.online.items()}  # type: ignore[union-attr,index]
    assert not torch.equal(live["critic_1"], live["critic_2"])
    for name, target in learner.targets.items():
        assert torch.equal(target.head.live[0].weight, live[name])  # type: ignore[union-attr,index]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_update_that_is_not_finite_moves_neither_networks_nor_targets(asynchronous: bool) -> None:
    learner = make(target_tau=0.1)
    learner.asynchronous = asynchronous  # as on a GPU, where nothing waits to know
    learner.update(batches(3, 0))
    bad = batches(1, 1)
    bad["next", "reward"][0, 0] = float("nan")
    networks = [*learner.online.values(), *learner.targets.values()]
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    learner.update(bad)
    for network, kept in zip(networks, before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in network.state_dict().items())
    assert learner.report().skipped == 1


def test_targets_follow_by_polyak_averaging_before_and_after_an_injection() -> None:
    learner = make(target_tau=0.1)
    for stage in range(3):
        for seed in range(3):
            before = {name: copy.deepcopy(target.state_dict()) for name, target in learner.targets.items()}
            learner.update(batches(1, 10 * stage + seed))
            for name, target in learner.targets.items():
                for inside, tensor in target.state_dict().items():
                    leading = learner.online[name].state_dict()[inside]
                    expected = before[name][inside].lerp(leading, 0.1)
                    torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)
        # What is frozen in a target has its lag, and loses it as it would have done.
        grow(learner, seed=stage)
        lag = [
            float((lagging - leading).detach().abs().max())
            for lagging, leading in zip(learner.gradient_step.lagging, learner.gradient_step.leading, strict=True)
        ]
        assert max(lag) > 0
    learner.update(batches(200, 5))
    names = [name for name, p in learner.online["critic_1"].named_parameters() if not p.requires_grad]
    states = [learner.online["critic_1"].state_dict(), learner.targets["critic_1"].state_dict()]
    assert names
    for name in names:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("intervention", "settings"),
    [
        ("inject", {}),
        ("inject", {"freeze": "network", "grow": "actor"}),
        ("inject", {"trainable_heads": "all"}),
        ("reset-head", {}),
        ("reset-all", {"grow": "critic"}),
        ("shrink-perturb", {}),
        ("widen", {"normalization": "layer"}),
        ("net2wider", {}),
        ("redo", {"redo_tau": 0.5}),
        ("fresh-optimizer", {"regularizer": "l2-init", "regularizer_strength": 1e-2}),
    ],
)
def test_a_learner_restored_after_an_intervention_goes_on_as_the_first_one(
    intervention: Intervention, settings: dict[str, Any]
) -> None:
    learner = make(**settings)
    learner.update(batches(4, 1))
    event = grow(learner, intervention)
    learner.update(batches(2, 2))
    if intervention == "redo":
        assert event.recycled_units
    restored = make(seed=7, **settings)
    restored.load_state_dict(copy.deepcopy(learner.state_dict()))
    for each in (learner, restored):
        each.update(batches(3, 3))
        grow(each, "fresh-optimizer" if "widen" in intervention else intervention, seed=8)
        each.update(batches(3, 4))
    ours, theirs = weights(learner), weights(restored)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(learner.log_alpha, restored.log_alpha)
    assert torch.equal(learner.noise_generator.get_state(), restored.noise_generator.get_state())


def test_a_failure_in_the_last_network_rolls_all_of_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make()
    learner.update(batches(4, 1))
    before, slots = weights(learner), {id(p): dict(s) for p, s in learner.optimizer.state.items()}
    twin = make()
    twin.load_state_dict(copy.deepcopy(learner.state_dict()))
    original = SAC.trainable

    def short(self: SAC) -> list[nn.Parameter]:
        return original(self)[:-1]  # the temperature is missing: found out after all three have been grown

    monkeypatch.setattr(SAC, "trainable", short)
    with pytest.raises(GrowthFailed, match="rolled back"):
        grow(learner)
    monkeypatch.undo()
    learner.rebuild()
    assert {id(p): s.keys() for p, s in learner.optimizer.state.items()} == {key: s.keys() for key, s in slots.items()}
    after = weights(learner)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for each in (learner, twin):
        each.update(batches(3, 2))
    assert all(torch.equal(value, weights(twin)[name]) for name, value in weights(learner).items())


def test_frozen_values_that_are_kept_give_the_update_that_computing_them_gives() -> None:
    learners = [make(freeze="network", grow="actor") for _ in range(2)]
    for learner in learners:
        learner.update(batches(3, 1))
        grow(learner)
    kept = batches(3, 2)
    for part in (kept, kept["next"]):
        values = learners[0].frozen_value(part["observation"].flatten(0, 1))
        assert values is not None
        part["frozen_value"] = values.view(3, BATCH, -1)
    learners[0].update(kept)
    learners[1].update(batches(3, 2))
    theirs = weights(learners[1])
    for name, value in weights(learners[0]).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_updates_that_are_not_finite_leave_everything_as_it_was() -> None:
    learner = make()
    learner.update(batches(2, 1))
    before, alpha = weights(learner), learner.log_alpha.detach().clone()
    broken = batches(1, 2)
    broken["next", "reward"][0, 3] = torch.nan
    learner.update(broken)
    assert all(torch.equal(before[name], value) for name, value in weights(learner).items())
    assert torch.equal(alpha, learner.log_alpha)
    assert learner.report().skipped == 1


def test_an_adaptive_run_asks_the_first_network_that_would_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mujoco")
    asked: list[Any] = []

    def compare(*arguments: Any, network: str) -> dict[str, list[list[float]]]:
        asked.append((network, compare_copies(*arguments, network=network)))
        return {"current": [[1.0]], "inject": [[0.5]]}

    monkeypatch.setattr("growtrain.runs.growing.compare_copies", compare)
    monkeypatch.setattr(
        "growtrain.runs.growing.DECIDING", LearningTest(seeds=1, transitions=16, updates=4, warm_up=1, marks=1)
    )
    config = sac(
        game="mujoco/Hopper-v5",
        schedule="adaptive",
        grow="actor",
        total_frames=300,
        width=16,
        batch_size=8,
        learning_starts=50,
        replay_ratio=0.25,
        adaptive_period=50,
        adaptive_min_gap=50,
        adaptive_patience=1,
        eval_period=0,
        diagnostics_period=0,
        device="cpu",
    )
    records = list(train(config, tmp_path / "run"))
    assert {name for name, _ in asked} == {"actor"}
    assert all(set(errors) == {"current", "inject"} for _, errors in asked)
    decisions = [record for record in records if isinstance(record, Decision)]
    assert len(decisions) == len(asked) > 2
    grown = [record for record in records if isinstance(record, GrowthEvent)]
    assert len(grown) == sum(decision.inject for decision in decisions)


@pytest.mark.parametrize("grown", ["both", "critic", "actor"])
def test_a_full_width_is_that_of_the_networks_that_would_grow(grown: str) -> None:
    full = make(schedule="full3x", grow=grown)
    wide = [name for name in NETWORKS if grown == "both" or name.startswith(grown)]
    widths = {name: network["width"] for name, network in full.state_dict()["networks"].items()}
    assert widths == {name: 64 if name in wide else 16 for name in NETWORKS}
    assert all(full.targets[name].head.width == widths[name] for name in full.targets)
    check_saved(full.state_dict(), full.config, SPEC, 0)
    others = make(schedule="full3x", grow="actor" if grown == "critic" else "critic")
    with pytest.raises(ValueError, match=r"width is (16|64) where this configuration has (64|16)"):
        check_saved(others.state_dict(), full.config, SPEC, 0)
    # The plan's baseline is that learner.
    growing = dataclasses.replace(full.config, schedule="grow3x", intervention="inject")
    assert full_width(growing) == full.config
    planned = make_plan(full_width(growing), SPEC).stages[0]
    assert planned.parameters_total == sum(p.numel() for network in full.online.values() for p in network.parameters())


def test_what_sac_cannot_do_is_said_in_a_line() -> None:
    with pytest.raises(
        ConfigError, match=r"--freeze is network: it cannot be kept in the replay for critics.*--grow actor"
    ):
        sac(freeze="network", schedule="grow1x")
    with pytest.raises(ConfigError, match="--normalization is spectral"):
        sac(normalization="spectral")
    with pytest.raises(ConfigError, match="has no encoder to reset"):
        sac(schedule="at:0.5", intervention="reset-encoder")
    assert Config(freeze="network").freeze == "network"
