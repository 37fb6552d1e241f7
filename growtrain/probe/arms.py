"""What learns and what is done to it: networks, their updates, and the interventions that the arms of a probe make."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growtrain.diagnostics import dormant_fraction, effective_rank, weight_norm
from growtrain.growth.inject import inject
from growtrain.learners.optimizers import CenteredRMSProp
from growtrain.networks.build import QNetwork
from growtrain.networks.encoders import ConvolutionalEncoder
from growtrain.networks.heads import initialize, make_head
from growtrain.networks.injected import Initializer, InjectedHead
from growtrain.probe.settings import ProbeConfig, Setting
from growtrain.settings.config import Anchor

WARM, FRESH = "warm", "reset-all-every"  # the trunk, and the arm whose network is fresh in every task
SHRINK = 0.8  # share of the old weights after shrink-perturb (SR-SPR, D'Oro et al. 2023)
INIT_SCALES = (0.25, 1.0, 4.0)
DISTRIBUTIONS = ("uniform", "normal", "orthogonal")
BIASES = ("default", "zero")


@dataclass
class Learner:
    """A network that learns, `Sequential(QNetwork)` so that the whole of it can be injected, and its optimizer (encoder, head)."""

    network: nn.Sequential
    optimizer: torch.optim.Optimizer


Intervention = Callable[
    [Learner, torch.Generator, Tensor], None
]  # fresh weights from the generator; frames to verify on


@dataclass(frozen=True)
class Arm:
    """An intervention and the tasks before which it is made."""

    times: tuple[int, ...]
    intervene: Intervention


def make_learner(config: ProbeConfig, setting: Setting, generator: torch.Generator) -> Learner:
    """A fresh network with its optimizer."""
    network = _nature_network() if config.size == "nature" else _small_network()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack this overload
    initialize(network, generator)
    groups = [
        {"params": list(network.encoder.parameters()), "lr": setting.encoder_lr},
        {"params": list(network.head.parameters()), "lr": setting.head_lr},
    ]
    adam = setting.optimizer == "adam"
    return Learner(nn.Sequential(network), torch.optim.Adam(groups, fused=True) if adam else CenteredRMSProp(groups))


def _nature_network() -> QNetwork:
    """The trainer's: (B, 4, 84, 84) -> (B, 1), a head of one hidden layer."""
    encoder = ConvolutionalEncoder((4, 84, 84))
    return QNetwork(encoder, make_head(encoder.num_features, 512, 1))


def _small_network() -> QNetwork:
    """Small convolutions and a head of two hidden layers: (B, 4, 42, 42) -> (B, 1)."""
    layers: list[nn.Module] = []
    channels, side = 4, 42
    for out_channels, kernel, stride in ((16, 6, 3), (32, 4, 2), (32, 3, 1)):
        layers += [nn.Conv2d(channels, out_channels, kernel, stride), nn.ReLU(inplace=True)]
        channels, side = out_channels, (side - kernel) // stride + 1
    head = make_head(channels * side**2, 256, 256)
    return QNetwork(nn.Sequential(*layers, nn.Flatten()), nn.Sequential(*head, nn.ReLU(), nn.Linear(256, 1)))


def learn(learner: Learner, frames: Tensor, target: Tensor, batches: Tensor) -> None:
    """One gradient step on each batch of a task.

    Args:
        learner: changed in place.
        frames: (N, 4, S, S) float32.
        target: (N,).
        batches: (U, B) rows of both.
    """
    for rows in batches:
        loss = F.mse_loss(learner.network(frames[rows]).squeeze(1), target[rows])
        learner.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        learner.optimizer.step()


@torch.no_grad()
def error(network: nn.Module, frames: Tensor, target: Tensor) -> float:
    """Mean squared error over all frames, divided by the target's variance."""
    return float(F.mse_loss(network(frames).squeeze(1), target) / target.var(correction=0))


@torch.no_grad()
def diagnose(network: nn.Sequential, frames: Tensor) -> dict[str, float]:
    """Proxies of plasticity of the encoder's features (N, F) and the live head."""
    encoder, head = live_parts(network)
    features = encoder(frames)
    hidden = head[:-1](features)
    channels = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)][-1].out_channels
    return {
        "effective_rank": float(effective_rank(features)),
        "dormant_encoder": float(dormant_fraction(features.view(len(features), channels, -1, 1))),
        "dormant_head": float(dormant_fraction(hidden)),
        "weight_norm_encoder": float(weight_norm(encoder.parameters())),
        "weight_norm_head": float(weight_norm(head.parameters())),
    }


def live_parts(network: nn.Sequential) -> tuple[nn.Module, nn.Sequential]:
    """The encoder and the head that learn; those of the live network where the whole was injected."""
    whole = network[0]
    body = whole.live if isinstance(whole, InjectedHead) else whole
    head = body.get_submodule("head")
    live = head.live if isinstance(head, InjectedHead) else head
    assert isinstance(live, nn.Sequential)
    return body.get_submodule("encoder"), live


# Interventions


def arms(config: ProbeConfig) -> dict[str, Arm]:
    """The arms by name: `-every` before every task, `-3x` at the times of grow3x (1/8, 1/4, 1/2), the others once, half-way.

    Fresh weights come with fresh optimizer slots; shrink-perturb keeps the slots; an injection keeps the encoder's.
    """
    half, every = (config.num_tasks // 2,), tuple(range(1, config.num_tasks))
    thrice = tuple(config.num_tasks // part for part in (8, 4, 2))
    trunk = {WARM: Arm((), _nothing), FRESH: Arm(every, partial(_reset, parts=("encoder", "head")))}
    if config.sweep == "init":
        return trunk | {
            f"scale={scale:g} {distribution} {bias}-bias": Arm(
                half,
                partial(_inject, initializer=partial(initialize_as, scale=scale, distribution=distribution, bias=bias)),
            )
            for scale, distribution, bias in product(INIT_SCALES, DISTRIBUTIONS, BIASES)
        }
    anchors: tuple[Anchor, ...] = ("frozen", "zero", "mirrored")
    return (
        trunk
        | {
            "reset-head-every": Arm(every, partial(_reset, parts=("head",))),
            "shrink-perturb-every": Arm(every, _shrink_perturb),
            "reset-encoder": Arm(half, partial(_reset, parts=("encoder",))),
            "reset-head": Arm(half, partial(_reset, parts=("head",))),
            "fresh-optimizer": Arm(half, _fresh_optimizer),
            "shrink-perturb": Arm(half, _shrink_perturb),
        }
        | {f"inject-{anchor}": Arm(half, partial(_inject, anchor=anchor)) for anchor in anchors}
        | {f"inject-{anchor}-3x": Arm(thrice, partial(_inject, anchor=anchor)) for anchor in anchors}
        | {
            "inject-whole": Arm(half, _inject_whole),
            "inject-freeze-encoder": Arm(half, partial(_inject, freeze_encoder=True)),
        }
    )


def _nothing(learner: Learner, generator: torch.Generator, frames: Tensor) -> None:
    """The warm start."""


def _reset(learner: Learner, generator: torch.Generator, frames: Tensor, *, parts: tuple[str, ...]) -> None:
    """Fresh weights and slots for parts of the network (Nikishin et al. 2022)."""
    for part in parts:
        module = learner.network.get_submodule(f"0.{part}")
        initialize(module, generator)
        for parameter in module.parameters():
            learner.optimizer.state.pop(parameter, None)


@torch.no_grad()
def _shrink_perturb(learner: Learner, generator: torch.Generator, frames: Tensor) -> None:
    """All weights w <- SHRINK w + (1 - SHRINK) fresh (Ash & Adams 2020)."""
    fresh = copy.deepcopy(learner.network)
    initialize(fresh, generator)
    for parameter, other in zip(learner.network.parameters(), fresh.parameters(), strict=True):
        parameter.lerp_(other, 1 - SHRINK)


def _fresh_optimizer(learner: Learner, generator: torch.Generator, frames: Tensor) -> None:
    """The optimizer forgets its moments."""
    learner.optimizer.state.clear()


def _inject(
    learner: Learner,
    generator: torch.Generator,
    frames: Tensor,
    *,
    anchor: Anchor = "frozen",
    freeze_encoder: bool = False,
    initializer: Initializer = initialize,
) -> None:
    """Injects plasticity into the head; the encoder stops learning if asked."""
    inject(
        learner.network,
        head="0.head",
        optimizer=learner.optimizer,
        generator=generator,
        anchor=anchor,
        initializer=initializer,
    )
    if freeze_encoder:
        learner.network.get_submodule("0.encoder").requires_grad_(False)
        learner.optimizer.zero_grad(set_to_none=True)  # a parameter without a gradient is left alone


def _inject_whole(learner: Learner, generator: torch.Generator, frames: Tensor) -> None:
    """The other split: encoder and head together are what is injected."""
    inject(learner.network, head="0", optimizer=learner.optimizer, generator=generator, probe=frames)


@torch.no_grad()
def initialize_as(module: nn.Module, generator: torch.Generator, *, scale: float, distribution: str, bias: str) -> None:
    """Fresh weights of linear layers, in place: `initialize`, another distribution of the same variance, times `scale`.

    Args:
        module: changed.
        generator: source of the weights (CPU).
        scale: factor on weights and biases.
        distribution: of the weights, `uniform`, `normal` or `orthogonal` (Saxe et al. 2014).
        bias: `default`, U(+-scale / sqrt(fan_in)), or `zero`.
    """
    initialize(module, generator)
    for layer in module.modules():
        if not isinstance(layer, nn.Linear):
            continue
        std = (3 * layer.in_features) ** -0.5
        if distribution == "normal":
            nn.init.normal_(layer.weight, std=std, generator=generator)
        elif distribution == "orthogonal":
            nn.init.orthogonal_(layer.weight, generator=generator)
            layer.weight.mul_(std / layer.weight.square().mean().sqrt())
        layer.weight.mul_(scale)
        layer.bias.mul_(scale if bias == "default" else 0.0)
