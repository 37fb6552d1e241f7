"""The networks of a configuration: encoder, then a head that can be injected."""

from torch import Tensor, nn

from growtrain.environments.base import Spec
from growtrain.networks.encoders import ConvolutionalEncoder
from growtrain.networks.heads import ConvolutionalHead, make_head, make_vector_head
from growtrain.networks.injected import InjectedHead
from growtrain.networks.snapshot import Snapshot
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError


class QNetwork(nn.Module):
    """Q(s, .) = F(s) + head(encoder(s)): (B, *observation_shape) uint8 -> (B, A) float32; or another function of such a form.

    F is what was frozen by injections of the whole network, see `Snapshot`; before the first there is none.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.snapshot = Snapshot()

    def forward(self, observation: Tensor, frozen_value: Tensor | None = None) -> Tensor:
        """Action values of a batch of observations.

        Args:
            observation: (B, *observation_shape).
            frozen_value: F of them (B, A), where it is known already.
        """
        live: Tensor = self.head(self.encoder(observation))
        if frozen_value is not None:
            return frozen_value + live
        return self.snapshot(observation) + live if len(self.snapshot) else live

    def frozen_whole(self) -> Snapshot:
        """F + this network's live part, copied as it is; raises `ValueError` if a weight is not finite."""
        return self.snapshot.grown(QNetwork(self.encoder, self.head))


_CONVOLUTIONS_BEFORE = {"conv1": 0, "conv2": 1, "conv3": 2}  # those of the encoder


def make_parts(config: Config, spec: Spec, width: int) -> tuple[ConvolutionalEncoder, nn.Sequential]:
    """The encoder of a configuration and its head `width` wide, parted at `config.split`; their weights are arbitrary.

    Where they are parted does not change what they compute, nor the order in which `initialize` draws their weights.

    Raises:
        ConfigError: the encoder for what is observed has no such convolution to part it at.
    """
    channels, height, columns = spec.observation_shape
    encoder = ConvolutionalEncoder(
        (channels, height, columns),
        config.encoder_width,
        scale=spec.scale,
        activation=config.activation,
        normalized=config.weight_projection == "nap",
    )
    head = make_head(
        encoder.num_features,
        width,
        spec.num_actions,
        normalization=config.normalization,
        output_bias=config.output_bias,
        activation=config.activation,
    )
    if config.split != "fc1":
        before = _CONVOLUTIONS_BEFORE[config.split]
        if before >= encoder.num_convolutions:
            raise ConfigError(
                f"--split {config.split}: the encoder for {config.game} has no {config.split}: use --split fc1 or conv1"
            )
        convolutions = encoder.split_off(before)
        head = ConvolutionalHead(encoder.feature_shape, *convolutions, nn.Flatten(), *head)
    return encoder, head


CRITICS = ("critic_1", "critic_2")
NETWORKS = (*CRITICS, "actor")  # of SAC


def make_vector_part(config: Config, spec: Spec, name: str, width: int) -> nn.Sequential:
    """The head that one of SAC's networks is: a critic (B, D + A) -> (B, 1), the actor (B, D) -> (B, 2 A); its weights are arbitrary.

    Its first hidden layer has `config.width` units, the last one `width`.
    """
    (size,), num_actions = spec.observation_shape, spec.num_actions
    num_inputs, num_outputs = (size + num_actions, 1) if name in CRITICS else (size, spec.num_outputs)
    return make_vector_head(
        num_inputs,
        config.width,
        width,
        num_outputs,
        normalization=config.normalization,
        activation=config.activation,
    )


def make_vector_network(config: Config, spec: Spec, name: str, width: int) -> QNetwork:
    """One of SAC's networks, all of it a head that can be injected; its weights are arbitrary."""
    return QNetwork(nn.Identity(), InjectedHead(make_vector_part(config, spec, name, width), checked=True))


def make_network(config: Config, spec: Spec, width: int) -> QNetwork:
    """The Q-network of a configuration with a head `width` wide, ready to be injected; its weights are arbitrary."""
    encoder, head = make_parts(config, spec, width)
    return QNetwork(encoder, InjectedHead(head, checked=True))
