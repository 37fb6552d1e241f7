"""What learns and what is done to it: networks, their updates, and the interventions that the arms of a probe make."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growtrain.diagnostics import dormant_fraction, effective_rank, weight_norm
from growtrain.growth.alternatives import head_of
from growtrain.growth.inject import inject, injection
from growtrain.growth.kinds import KINDS, Kind
from growtrain.growth.transaction import intervene
from growtrain.learners.optimizers import CenteredRMSProp
from growtrain.networks.build import QNetwork
from growtrain.networks.encoders import ConvolutionalEncoder
from growtrain.networks.heads import initialize, make_head
from growtrain.networks.injected import Initializer, InjectedHead
from growtrain.probe.settings import ProbeConfig, Setting
from growtrain.settings.config import Anchor, Config
from growtrain.settings.schedules import Intervention

WARM, FRESH = "warm", "reset-all-every"  # the trunk, and the arm whose network is fresh in every task
INIT_SCALES = (0.25, 1.0, 4.0)
DISTRIBUTIONS = ("uniform", "normal", "orthogonal")
BIASES = ("default", "zero")


@dataclass
class Learner:
    """A network that learns, `Sequential(QNetwork)` so that the whole of it can be injected, and its optimizer (encoder, head)."""

    network: nn.Sequential
    optimizer: torch.optim.Optimizer


Act = Callable[[Learner, torch.Generator, Tensor], None]  # fresh weights from the generator; frames to verify on


@dataclass(frozen=True)
class Arm:
    """What is done to a learner, and the tasks before which it is."""

    times: tuple[int, ...]
    act: Act


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
    return QNetwork(encoder, InjectedHead(make_head(encoder.num_features, 512, 1)))


def _small_network() -> QNetwork:
    """Small convolutions and a head of two hidden layers: (B, 4, 42, 42) -> (B, 1)."""
    layers: list[nn.Module] = []
    channels, side = 4, 42
    for out_channels, kernel, stride in ((16, 6, 3), (32, 4, 2), (32, 3, 1)):
        layers += [nn.Conv2d(channels, out_channels, kernel, stride), nn.ReLU(inplace=True)]
        channels, side = out_channels, (side - kernel) // stride + 1
    head = make_head(channels * side**2, 256, 256)
    head = nn.Sequential(*head, nn.ReLU(), nn.Linear(256, 1))
    return QNetwork(nn.Sequential(*layers, nn.Flatten()), InjectedHead(head))


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
def measure(network: nn.Sequential, frames: Tensor) -> dict[str, float]:
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
    live = head_of(body).live
    assert isinstance(live, nn.Sequential)
    return body.get_submodule("encoder"), live


# Interventions


def arms(config: ProbeConfig) -> dict[str, Arm]:
    """The arms by name: `-every` before every task, `-3x` at the times of grow3x (1/8, 1/4, 1/2), the others once, half-way.

    Fresh weights come with fresh optimizer slots; shrink-perturb keeps the slots; an injection keeps the encoder's.
    """
    half, every = (config.num_tasks // 2,), tuple(range(1, config.num_tasks))
    thrice = tuple(config.num_tasks // part for part in (8, 4, 2))
    trunk = {WARM: Arm((), _nothing), FRESH: Arm(every, _doing("reset-all"))}
    if config.sweep == "init":
        return trunk | {
            f"scale={scale:g} {distribution} {bias}-bias": Arm(
                half, _initializing(partial(initialize_as, scale=scale, distribution=distribution, bias=bias))
            )
            for scale, distribution, bias in product(INIT_SCALES, DISTRIBUTIONS, BIASES)
        }
    injections = {f"inject-{anchor}": _doing("inject", Config(anchor=anchor)) for anchor in get_args(Anchor)}
    return (
        trunk
        | {f"{name}-every": Arm(every, _doing(name)) for name in _EVERY}
        | {name: Arm(half, _doing(name)) for name in _ONCE}
        | {name: Arm(half, act) for name, act in injections.items()}
        | {f"{name}-3x": Arm(thrice, act) for name, act in injections.items()}
        | {"inject-whole": Arm(half, _inject_whole), "inject-freeze-encoder": Arm(half, _inject_and_freeze)}
    )


_EVERY: tuple[Intervention, ...] = ("reset-head", "shrink-perturb")
_ONCE: tuple[Intervention, ...] = ("reset-encoder", "reset-head", "fresh-optimizer", "shrink-perturb")


def _nothing(learner: Learner, generator: torch.Generator, frames: Tensor) -> None:
    """The warm start."""


def _doing(intervention: Intervention | Kind, config: Config | None = None) -> Act:
    """An intervention of the trainer's."""
    kind = KINDS[intervention] if isinstance(intervention, str) else intervention

    def act(learner: Learner, generator: torch.Generator, frames: Tensor) -> None:
        intervene(kind, [learner.network[0]], learner.optimizer, frames, config or Config(), kind.stream(generator))

    return act


def _initializing(initializer: Initializer) -> Act:
    """An injection of a head that is initialized in its own way."""
    return _doing(dataclasses.replace(KINDS["inject"], make=partial(injection, initializer=initializer)))


def _inject_and_freeze(learner: Learner, generator: torch.Generator, frames: Tensor) -> None:
    """An injection with which the encoder stops learning."""
    _doing("inject")(learner, generator, frames)
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
