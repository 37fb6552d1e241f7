"""What TorchRL offers for a learner's networks, built on demand: its `DQNLoss`, which gives the numbers of the direct path (tested).

A `DQNLoss` captures parameters where it is constructed, and makes a copy of the online network as its target. After anything that changes
the architecture it must be constructed anew, and its target must be given back its lag:

    target = target_of(loss, network)  # a module again, as lagging as it was
    inject(network, optimizer=optimizer, target=target)
    loss = DQNLoss(QValueActor(network, ...), ...)
    read_target(loss, target)
    updater = SoftUpdate(loss, ...)
"""

import copy

import torch
from torch import nn
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss

_NETWORK = "module.0.module."  # where a `QValueActor` has the network that it was made of


def make_dqn_loss(online: nn.Module, target: nn.Module, *, discount: float, double_dqn: bool = True) -> DQNLoss:
    """TorchRL's loss of Double DQN, or of DQN, over two networks, `observation` -> (B, A) action values; it reads their own tensors."""
    loss = DQNLoss(
        QValueActor(online, in_keys=["observation"], action_space="categorical"),
        action_space="categorical",
        loss_function="smooth_l1",
        double_dqn=double_dqn,
        delay_value=True,
        use_prioritized_weights=False,
    )
    loss.make_value_estimator(gamma=discount)
    loss._has_update_associated["value_network"] = True  # as TorchRL's own updaters say: the target is copied elsewhere
    read_target(loss, target)
    return loss


def read_target(loss: DQNLoss, target: nn.Module) -> None:
    """Lets a loss over a `QValueActor` read the tensors of `target` in place of its own copy; what moves one moves the other.

    Raises:
        KeyError: the loss was constructed before the architecture changed, or of another network.
    """
    tensors = dict(target.named_parameters()) | dict(target.named_buffers())
    for name, tensor in loss.target_value_network_params.flatten_keys(".").items():
        tensor.data = tensors[name.removeprefix(_NETWORK)].data


@torch.no_grad()
def target_of(loss: DQNLoss, network: nn.Module) -> nn.Module:
    """A copy of `network`, over whose `QValueActor` the loss was constructed, with the values of the loss's target."""
    target = copy.deepcopy(network).requires_grad_(False)
    values = loss.target_value_network_params.flatten_keys(".")
    for name, tensor in (*target.named_parameters(), *target.named_buffers()):
        tensor.copy_(values[_NETWORK + name])
    return target
