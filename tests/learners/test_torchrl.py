"""TorchRL's loss over a learner's networks: constructed on demand, with the same numbers; and injection under one that is in use."""

from typing import Any

import pytest
import torch
from growing import grow
from tensordict import TensorDict
from tiny import tiny
from torch import Tensor, nn
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

from growtrain import inject
from growtrain.environments.atari import make_spec
from growtrain.learners import torchrl
from growtrain.learners.make import make_learner
from growtrain.learners.torchrl import read_target, target_of
from growtrain.planning.speed import synthetic_batches

ACTIONS, CPU = 5, torch.device("cpu")
FEATURES, BATCH = 6, 16


def batches(count: int, seed: int) -> TensorDict:
    return synthetic_batches(tiny(), make_spec(ACTIONS), count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_the_direct_path_has_the_numbers_of_torchrls_loss_through_growth_and_copies(freeze_encoder: bool) -> None:
    learner = make_learner(tiny(), make_spec(ACTIONS), device=CPU, generator=torch.Generator().manual_seed(0))

    def same() -> None:
        batch, trainable = batches(1, 9)[0], [p for p in learner.online.parameters() if p.requires_grad]
        ours, theirs = learner.compute_loss(batch), learner.loss(batch)["loss"]
        assert torch.allclose(ours, theirs, rtol=1e-6)
        gradients = (torch.autograd.grad(loss, trainable) for loss in (ours, theirs))
        for one, other in zip(*gradients, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-8)

    for stage in (1, 2):
        learner.update(batches(2, stage))
        same()
        generator, frozen = torch.Generator().manual_seed(stage), freeze_encoder and stage == 2
        grow(learner, batches(1, 7)["observation"][0], anchor="mirrored", generator=generator, freeze_encoder=frozen)
        same()
        learner.update(batches(2, 4 + stage))
        same()
        learner.copy_target()  # from here on what is frozen is shared
        same()
        learner.update(batches(1, 6 + stage))
        same()


def test_only_eager_execution_constructs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    constructed = []
    original = torchrl.make_dqn_loss

    def counted(*networks: nn.Module, **options: Any) -> DQNLoss:
        constructed.append(networks)
        return original(*networks, **options)

    monkeypatch.setattr(torchrl, "make_dqn_loss", counted)
    for execution, count in (("auto", 0), ("eager", 2)):
        constructed.clear()
        learner = make_learner(tiny(execution=execution), make_spec(ACTIONS), device=CPU)
        assert not constructed
        for _ in range(3):
            learner.update(batches(2, 0))
        grow(learner, batches(1, 7)["observation"][0], anchor="zero", generator=torch.Generator())
        for _ in range(3):
            learner.update(batches(2, 0))
        assert len(constructed) == count  # once for each architecture


# A loss in somebody's own loop


def transitions(seed: int) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    ended = torch.rand((BATCH, 1), generator=generator) < 0.2
    following = {"done": ended, "terminated": ended, "reward": torch.randn((BATCH, 1), generator=generator)}
    following["observation"] = torch.randn((BATCH, FEATURES), generator=generator)
    observation = torch.randn((BATCH, FEATURES), generator=generator)
    action = torch.randint(ACTIONS, (BATCH,), generator=generator)
    return TensorDict({"observation": observation, "action": action, "next": following}, [BATCH])


def make_loss(network: nn.Module) -> tuple[DQNLoss, SoftUpdate]:
    actor = QValueActor(network, in_keys=["observation"], action_space="categorical")
    loss = DQNLoss(actor, action_space="categorical", double_dqn=True, delay_value=True)
    loss.make_value_estimator(gamma=0.9)
    return loss, SoftUpdate(loss, tau=0.1)


def learn(loss: DQNLoss, updater: SoftUpdate, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    loss(transitions(seed))["loss"].backward()
    optimizer.step()
    updater.step()


def user() -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    torch.manual_seed(0)

    class Network(nn.ModuleDict):
        def forward(self, observation: Tensor) -> Tensor:
            q: Tensor = self["head"](self["encoder"](observation))
            return q

    encoder = nn.Sequential(nn.Linear(FEATURES, 12), nn.ReLU())
    head = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, ACTIONS))
    network = Network({"encoder": encoder, "head": head})
    return network, torch.optim.Adam(network.parameters(), lr=1e-2)


def test_injection_under_a_live_loss_keeps_its_value_and_the_targets_lag() -> None:
    network, optimizer = user()
    loss, updater = make_loss(network)
    for seed in range(5):
        learn(loss, updater, optimizer, seed)
    lagging, value = target_of(loss, network), loss(transitions(9))["loss"].detach()
    probe = transitions(10)["observation"]
    assert not torch.allclose(lagging(probe), network(probe), atol=1e-3)

    target = target_of(loss, network)  # a module again, as lagging as it was
    inject(network, optimizer=optimizer, target=target)
    loss, updater = make_loss(network)
    assert not torch.allclose(loss(transitions(9))["loss"], value, rtol=1e-3)  # its target does not lag
    read_target(loss, target)
    assert torch.allclose(loss(transitions(9))["loss"], value)
    assert torch.equal(target(probe), lagging(probe))

    before = {name: p.clone() for name, p in network.named_parameters()}
    for seed in range(5, 8):
        learn(loss, updater, optimizer, seed)
    moved = {name for name, p in network.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name for name in moved if name.startswith("head")} == {n for n in before if n.startswith("head.live.")}
    assert not torch.equal(target(probe), lagging(probe))  # the updater moves what the loss reads


def test_a_loss_from_before_the_injection_is_stale_and_says_so() -> None:
    network, optimizer = user()
    loss, updater = make_loss(network)
    learn(loss, updater, optimizer, 0)
    target = target_of(loss, network)
    inject(network, optimizer=optimizer, target=target)
    with pytest.raises(KeyError, match="head"):
        read_target(loss, target)
