"""Freezing a whole network: predictions stay to the bit, what trains is as much as before, and F never moves."""

import copy
import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tiny import tiny
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from torchrl.modules import NoisyLinear

from growtrain import InjectedNetwork, inject_network
from growtrain.environments.atari import make_spec
from growtrain.growth.transaction import GrowthFailed, apply
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.saved import check_saved
from growtrain.networks.activations import CReLU
from growtrain.networks.build import make_network
from growtrain.networks.heads import initialize
from growtrain.planning.speed import synthetic_batches
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError

SPEC, CPU = make_spec(6), torch.device("cpu")


def make_learner(**settings: object) -> DoubleDQN:
    config, generator = tiny(freeze="network", **settings), torch.Generator().manual_seed(0)
    return DoubleDQN(config, SPEC, width=config.width, device=CPU, generator=generator)


def make_beside() -> DoubleDQN:
    """A learner that begins beside a frozen network of other widths."""
    learner, generator = make_learner(frozen_width=48, frozen_encoder_width=0.5), torch.Generator().manual_seed(1)
    own = dataclasses.replace(learner.config, encoder_width=0.5)
    network = make_network(own, SPEC, 48)
    initialize(network, generator)
    learner.begin_beside(network.state_dict(), generator)
    return learner


def batches(config: Config, seed: int, count: int = 3) -> TensorDict:
    return synthetic_batches(config, SPEC, count, torch.Generator().manual_seed(seed))


def with_values(learner: DoubleDQN, batch: TensorDict) -> TensorDict:
    """The batches as the replay gives them, with the frozen network's values."""
    for part in (batch, batch["next"]):
        values = learner.frozen_value(part["observation"].flatten(0, 1))
        if values is not None:
            part["frozen_value"] = values.view(*part["observation"].shape[:2], -1)
    return batch


def observations() -> Tensor:
    return torch.randint(
        256, (32, *SPEC.observation_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(7)
    )


@pytest.mark.parametrize("optimizer", ["centered_rmsprop", "adam"])
@pytest.mark.parametrize("live_encoder", ["warm", "cold"])
def test_three_injections_keep_predictions_trainable_count_and_what_is_frozen(
    live_encoder: str, optimizer: str
) -> None:
    learner = make_learner(live_encoder=live_encoder, optimizer=optimizer)
    config, seen, generator = learner.config, observations(), torch.Generator().manual_seed(3)
    frozen: Tensor | None = None
    for stage in range(1, 4):
        learner.update(batches(config, stage))
        learner.copy_target()
        before, slots = learner.act(seen), dict(learner.optimizer.state)
        encoder = list(learner.online.encoder.parameters())
        event = apply(learner, "inject", seen, config=config, generator=generator)
        assert torch.equal(learner.act(seen), before)
        assert torch.equal(learner.target(seen), before)
        assert (event.max_abs_q_change_online, event.max_abs_q_change_target, event.stage) == (0.0, 0.0, stage)
        assert event.parameters_trainable == event.parameters_trainable_before
        assert event.parameters_total == (1 + stage) * event.parameters_trainable
        # The snapshot is one for both networks, without gradients; the head's slots are fresh, a warm encoder's are those it had.
        assert learner.online.snapshot is learner.target.snapshot
        assert not any(p.requires_grad for p in learner.online.snapshot.parameters())
        kept = set(learner.optimizer.state)
        assert kept == (set(encoder) if live_encoder == "warm" else set())
        assert all(learner.optimizer.state[p] is slots[p] for p in kept)
        assert torch.equal(learner.online.head(learner.online.encoder(seen)), torch.zeros_like(before))
        if frozen is not None:
            assert not torch.equal(learner.frozen_value(seen), frozen)
        frozen = learner.frozen_value(seen)
        # Training goes on and moves the live network, never what is frozen.
        learner.update(batches(config, 10 + stage))
        assert torch.equal(learner.frozen_value(seen), frozen)
        assert not torch.equal(learner.act(seen), before)


def test_the_encoder_learns_beside_a_frozen_network_and_gets_no_gradient_from_it() -> None:
    learner = make_learner()
    apply(learner, "inject", observations(), config=learner.config, generator=torch.Generator().manual_seed(0))
    before = [p.clone() for p in learner.online.encoder.parameters()]
    for seed in range(3):  # at birth the halves cancel in the encoder's gradient, too
        learner.update(batches(learner.config, seed))
    assert all(not torch.equal(p, old) for p, old in zip(learner.online.encoder.parameters(), before, strict=True))
    seen = observations().float().requires_grad_()
    learner.online.snapshot(seen)
    assert seen.grad is None and not learner.online.snapshot(seen).requires_grad  # noqa: PT018


def flops_and_shapes(learner: DoubleDQN) -> tuple[int, list[tuple[int, ...]]]:
    batch = with_values(learner, batches(learner.config, 0, 1))
    with FlopCounterMode(display=False) as counter:
        learner.step(batch[0])
    return counter.get_total_flops(), [tuple(p.shape) for p in learner.online.parameters() if p.requires_grad]


def test_an_update_costs_the_same_at_every_stage() -> None:
    learner = make_learner()
    costs = [flops_and_shapes(learner)]
    for seed in range(3):
        learner.copy_target()
        apply(learner, "inject", observations(), config=learner.config, generator=torch.Generator().manual_seed(seed))
        costs.append(flops_and_shapes(learner))
    assert costs[1:] == costs[:1] * 3


def test_an_update_on_kept_values_is_the_update_on_computed_ones() -> None:
    learners = make_learner(), make_learner()
    for learner in learners:
        apply(learner, "inject", observations(), config=learner.config, generator=torch.Generator().manual_seed(0))
        learner.update(batches(learner.config, 0))
    kept, computed = learners
    batch = batches(kept.config, 1)
    # A wrong value is seen: the loss reads it.
    wrong = with_values(kept, batches(kept.config, 1))
    wrong["next", "frozen_value"] += 1.0
    assert not torch.equal(kept.compute_loss(wrong[0]), computed.compute_loss(batch[0]))
    kept.update(with_values(kept, batches(kept.config, 1)))
    computed.update(batch)
    torch.testing.assert_close(kept.act(observations()), computed.act(observations()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("execution", ["auto", "eager"])
def test_torchrl_s_loss_gives_the_same_numbers(execution: str) -> None:
    learner = make_learner(execution=execution)
    apply(learner, "inject", observations(), config=learner.config, generator=torch.Generator().manual_seed(0))
    direct = make_learner()
    direct.load_state_dict(learner.state_dict())
    batch = with_values(learner, batches(learner.config, 1))[0]
    torch.testing.assert_close(learner.compute_loss(batch), direct.compute_loss(batch), rtol=0, atol=1e-7)


def test_a_saved_learner_goes_on_to_the_bit() -> None:
    learner = make_learner()
    for seed in range(2):
        learner.update(batches(learner.config, seed))
        learner.copy_target()
        apply(learner, "inject", observations(), config=learner.config, generator=torch.Generator().manual_seed(seed))
    learner.update(batches(learner.config, 3))
    again = make_learner()
    again.load_state_dict(copy.deepcopy(learner.state_dict()))
    for each in (learner, again):
        each.update(batches(learner.config, 4))
    assert torch.equal(again.act(observations()), learner.act(observations()))
    assert len(again.online.snapshot) == 2
    assert again.online.snapshot is again.target.snapshot


def test_networks_of_several_widths_are_saved_and_those_saved_without_an_encoder_s_width_have_the_run_s() -> None:
    learner, own = make_beside(), make_learner()
    learner.copy_target()
    apply(learner, "inject", observations(), config=learner.config, generator=torch.Generator().manual_seed(0))
    state = copy.deepcopy(learner.state_dict())
    check_saved(state, learner.config, SPEC, 1)
    again = make_learner(frozen_width=48, frozen_encoder_width=0.5)
    again.load_state_dict(state)
    for each in (learner, again):
        each.update(with_values(each, batches(each.config, 4)))
    assert torch.equal(again.act(observations()), learner.act(observations()))

    own.copy_target()
    apply(own, "inject", observations(), config=own.config, generator=torch.Generator().manual_seed(0))
    older = copy.deepcopy(own.state_dict())
    assert older["snapshot"][0].pop("encoder_width") == own.config.encoder_width
    check_saved(older, own.config, SPEC, 1)
    again = make_learner()
    again.load_state_dict(older)
    assert torch.equal(again.act(observations()), own.act(observations()))


@pytest.mark.parametrize("change", [{"width": 49}, {"encoder_width": 100.0}, {"head": {"injections": ["frozen"]}}])
def test_a_network_that_a_run_began_with_has_the_configuration_s_widths(change: dict[str, object]) -> None:
    """With others, or injected, it would be one more injection than there were."""
    learner = make_beside()
    state = learner.state_dict()
    check_saved(state, learner.config, SPEC, 0)
    with pytest.raises(ValueError, match="1 injections in 0"):
        check_saved(state | {"snapshot": [state["snapshot"][0] | change]}, learner.config, SPEC, 0)


def test_networks_of_other_shapes_than_the_checkpoint_claims_are_refused() -> None:
    learner = make_beside()
    state = learner.state_dict()
    tensors = state["online"] | {"snapshot.networks.0.encoder.layers.0.weight": torch.zeros(8, 4, 8, 8)}
    with pytest.raises(ValueError, match=r"snapshot\.networks\.0\.encoder.*by the tensors"):
        check_saved(state | {"online": tensors}, learner.config, SPEC, 0)
    learner.copy_target()
    apply(learner, "inject", observations(), config=learner.config, generator=torch.Generator().manual_seed(0))
    state = learner.state_dict()
    second = [state["snapshot"][0], state["snapshot"][1] | {"encoder_width": 100.0}]
    with pytest.raises(ValueError, match=r"encoder width is 100\.0 where this configuration has 0\.25"):
        check_saved(state | {"snapshot": second}, learner.config, SPEC, 1)


def test_a_target_that_lags_and_a_weight_that_is_not_finite_are_refused_and_nothing_changes() -> None:
    learner = make_learner()
    learner.update(batches(learner.config, 0))
    before, generator = learner.act(observations()), torch.Generator().manual_seed(0)
    with pytest.raises(GrowthFailed, match="right after a copy of the target"):
        apply(learner, "inject", observations(), config=learner.config, generator=generator)
    assert torch.equal(learner.act(observations()), before)
    assert not len(learner.online.snapshot)
    with torch.no_grad():
        next(learner.online.encoder.parameters())[0, 0, 0, 0] = torch.nan
    learner.copy_target()
    with pytest.raises(GrowthFailed, match="not finite"):
        apply(learner, "inject", observations(), config=learner.config, generator=generator)
    assert not len(learner.online.snapshot)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"activation": "crelu"}, "--activation relu"),
        ({"trainable_heads": "all"}, "--trainable-heads newest"),
        ({"live_encoder": "cold", "freeze_encoder_at": 1}, "fresh weights"),
    ],
)
def test_what_does_not_go_with_a_frozen_network_gets_one_line(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tiny(freeze="network", **settings)


def test_a_reset_gives_up_what_was_frozen_and_heads_are_not_frozen_alone_any_more() -> None:
    learner = make_learner()
    apply(learner, "inject", observations(), config=learner.config, generator=torch.Generator().manual_seed(0))
    with pytest.raises(GrowthFailed, match="--freeze network"):
        apply(learner, "inject", observations(), config=tiny(), generator=torch.Generator().manual_seed(1))
    apply(learner, "reset-head", observations(), config=learner.config, generator=torch.Generator().manual_seed(1))
    assert learner.frozen_value(observations()) is None


# In anybody's loop


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def train(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    ((network(x) - 1) ** 2).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("live_encoder", ["warm", "cold"])
def test_the_drop_in_keeps_both_networks_predictions_and_the_lag(live_encoder: str) -> None:
    torch.manual_seed(0)
    network, x = InjectedNetwork(Net()), torch.randn(16, 8)
    target = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for stage in range(1, 4):
        for _ in range(5):
            train(network, optimizer, x)
        before, lagging = network(x), target(x)
        assert not torch.equal(before, lagging)
        moments = [optimizer.state[p]["exp_avg"].clone() for p in network.live.encoder.parameters()]
        event = inject_network(network, optimizer=optimizer, target=target, live_encoder=live_encoder)
        assert torch.equal(network(x), before)
        assert torch.equal(target(x), lagging)
        assert (event.stage, event.anchor, event.parameters_trainable) == (
            stage,
            None,
            event.parameters_trainable_before,
        )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in network.parameters() if p.requires_grad}
        if live_encoder == "warm":
            kept = [optimizer.state[p]["exp_avg"] for p in network.live.encoder.parameters()]
            assert all(map(torch.equal, kept, moments))
        else:
            assert not any(p in optimizer.state for p in network.live.encoder.parameters())
        frozen = network.snapshot(x)
        train(network, optimizer, x)
        assert torch.equal(network.snapshot(x), frozen)
        assert torch.equal(network(x, frozen_value=frozen), network(x))


def test_a_layer_that_draws_at_every_call_cannot_be_frozen() -> None:
    net = Net()
    net.encoder.append(nn.Dropout(0.5))
    network = InjectedNetwork(net)
    with pytest.raises(ValueError, match="dropout in training mode"):
        inject_network(network, optimizer=torch.optim.Adam(network.parameters()))
    assert not network.num_injections


def test_a_cold_encoder_begins_anew_as_far_as_it_trains() -> None:
    net = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    net[0].requires_grad_(False)
    network, x = InjectedNetwork(net), torch.randn(16, 4)
    kept, fresh, before = net[0].weight.clone(), net[2].weight.clone(), network(x)
    inject_network(network, head="4:", optimizer=[], live_encoder="cold")
    assert torch.equal(net[0].weight, kept)
    assert not torch.equal(net[2].weight, fresh)
    assert torch.equal(network(x), before)
    net[2].requires_grad_(False)
    with pytest.raises(ValueError, match="leave it 'warm'"):
        inject_network(network, head="4:", optimizer=[], live_encoder="cold")
    assert network.num_injections == 1


class Dueling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.advantage, self.value = nn.Linear(32, 32), nn.Linear(32, 3), nn.Linear(32, 1)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.hidden(features).relu()
        advantage = self.advantage(hidden)
        out: Tensor = self.value(hidden) + advantage - advantage.mean(1, keepdim=True)
        return out


class Halved(nn.Linear):
    """A linear layer that computes something of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class Orthogonal(nn.Linear):
    """A linear layer that is drawn in a way of its own."""

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "dueling": Dueling,
    "computed its own way": lambda: nn.Sequential(nn.Linear(32, 16), nn.ReLU(), Halved(16, 3)),
    "drawn its own way": lambda: nn.Sequential(nn.Linear(32, 16), nn.ReLU(), Orthogonal(16, 3)),
    "noisy": lambda: nn.Sequential(NoisyLinear(32, 32), nn.ReLU(), NoisyLinear(32, 3)),
    "noisy below": lambda: nn.Sequential(NoisyLinear(32, 32), nn.ReLU(), nn.Linear(32, 3)),
    "not in a row": lambda: nn.Sequential(nn.Linear(32, 16), CReLU(), nn.Linear(32, 3)),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_whose_fresh_copy_cannot_begin_at_0_gets_a_remedy(head: str) -> None:
    net = Net()
    net.head = HEADS[head]()
    network = InjectedNetwork(net)
    with pytest.raises(ValueError, match=r"ends in two plain linear layers in a row, or use growtrain\.inject with"):
        inject_network(network, optimizer=[])
    assert not network.num_injections


class Agent:
    """Keeps what a layer gives, as a graph, beside things that are not to be copied."""

    def __init__(self, network: InjectedNetwork) -> None:
        self.network, self.features, self.calls = network, torch.zeros(()), 0
        network.live.encoder[1].register_forward_hook(self.keep)
        network.live.encoder[1].register_full_backward_hook(lambda *_: None)

    def __deepcopy__(self, memo: object) -> "Agent":
        raise AssertionError("the agent was copied")

    def keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.features, self.calls = output, self.calls + 1


@pytest.mark.parametrize("live_encoder", ["warm", "cold"])
def test_hooks_stay_on_the_live_network_alone_and_what_they_hold_is_not_copied(live_encoder: str) -> None:
    torch.manual_seed(0)
    network, x = InjectedNetwork(Net()), torch.randn(16, 8)
    optimizer, agent = torch.optim.Adam(network.parameters()), Agent(network)
    for _ in range(2):
        train(network, optimizer, x)
        before = network(x)
        with pytest.raises(ValueError, match=r"hook on 'encoder\.1' may change .*: pass observations="):
            inject_network(network, optimizer=optimizer, live_encoder=live_encoder)
        inject_network(network, optimizer=optimizer, live_encoder=live_encoder, observations=x)
        agent.calls = 0
        assert torch.equal(network(x), before)
        assert agent.calls == 1
        assert torch.equal(agent.features, network.live.encoder(x))
        assert agent.features.requires_grad


def test_a_hook_that_changes_what_is_frozen_is_refused_and_one_on_the_whole_is_not() -> None:
    network, x = InjectedNetwork(Net()), torch.randn(16, 8)
    handle = network.live.encoder[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=r"the hook on 'encoder\.1' changes what the network computes"):
        inject_network(network, optimizer=[], observations=x)
    assert not network.num_injections
    handle.remove()
    network.register_forward_hook(lambda module, inputs, output: 2 * output)
    before = network(x)
    inject_network(network, optimizer=[], observations=x)
    assert torch.equal(network(x), before)


def test_a_weight_that_an_old_hook_of_pytorch_computes_is_refused() -> None:
    net = Net()
    prune.random_unstructured(net.encoder[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"'encoder\.0' is computed by RandomUnstructured.*parametrizations"):
        inject_network(InjectedNetwork(net), optimizer=[], observations=torch.randn(4, 8))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()), nn.Linear(4 * 36, 48), nn.ReLU(), nn.Linear(48, 3)
    )


@pytest.mark.parametrize("live_encoder", ["warm", "cold"])
@pytest.mark.parametrize(
    ("make", "head", "shape"),
    [(Net, "head", (8,)), (convolutional, "1:", (1, 8, 8)), (convolutional, ("1", "2", "3"), (1, 8, 8))],
)
def test_network_target_and_optimizer_are_restored_from_spec_and_states_and_go_on_to_the_bit(
    make: Callable[[], nn.Module], head: str | tuple[str, ...], shape: tuple[int, ...], live_encoder: str
) -> None:
    torch.manual_seed(0)
    network, x = InjectedNetwork(make()), torch.randn(16, *shape)
    target = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)

    def inject_and_train(
        network: InjectedNetwork, target: InjectedNetwork, optimizer: torch.optim.Optimizer, seed: int
    ) -> None:
        given = {"generator": torch.Generator().manual_seed(seed), "live_encoder": live_encoder, "observations": x}
        inject_network(network, head=head, optimizer=optimizer, target=target, **given)
        for _ in range(3):
            train(network, optimizer, x)

    for seed in range(2):
        train(network, optimizer, x)
        inject_and_train(network, target, optimizer, seed)
    spec = json.loads(json.dumps(network.spec()))
    assert len(spec["injections"]) == 2
    again = InjectedNetwork(make()).grow_to(spec)
    target_again = InjectedNetwork(make()).requires_grad_(False).grow_to(target.spec())
    again.load_state_dict(network.state_dict())
    target_again.load_state_dict(target.state_dict())
    optimizer_again = torch.optim.Adam((p for p in again.parameters() if p.requires_grad), lr=1e-2)
    optimizer_again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.spec() == network.spec()
    assert [(n, p.requires_grad) for n, p in again.named_parameters()] == [
        (n, p.requires_grad) for n, p in network.named_parameters()
    ]
    assert not any(p.requires_grad for p in target_again.parameters())
    assert torch.equal(target_again(x), target(x))
    for each in ((network, target, optimizer), (again, target_again, optimizer_again)):
        train(each[0], each[2], x)
        inject_and_train(*each, seed=9)
    assert torch.equal(again(x), network(x))
    assert torch.equal(again.snapshot(x), network.snapshot(x))


def test_a_network_grows_to_a_spec_in_steps_and_refuses_what_it_does_not_continue() -> None:
    network, fresh = InjectedNetwork(Net()), InjectedNetwork(Net())
    for _ in range(2):
        inject_network(network, optimizer=[])
        fresh.grow_to(network.spec())
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(torch.ones(2, 8)), network(torch.ones(2, 8)))
    for wrong in ({}, {"injections": 2}, {"injections": network.spec()["injections"][:1]}, {"injections": [{}] * 3}):
        with pytest.raises(ValueError, match="does not continue"):
            fresh.grow_to(wrong)
    with pytest.raises(ValueError, match="no module 'head'"):
        InjectedNetwork(nn.Sequential(nn.Linear(8, 3))).grow_to(network.spec())
