"""The networks of a configuration: encoder, then a head that can be injected."""

from torch import Tensor, nn

from growtrain.networks.encoders import NatureEncoder
from growtrain.networks.heads import ConvolutionalHead, make_head
from growtrain.networks.injected import InjectedHead
from growtrain.settings.config import Config


class QNetwork(nn.Module):
    """Q(s, .) = head(encoder(s)): (B, stack, 84, 84) uint8 -> (B, A) float32."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, observation: Tensor) -> Tensor:
        """Action values of a batch of observations."""
        q: Tensor = self.head(self.encoder(observation))
        return q


_CONVOLUTIONS_BEFORE = {"conv1": 0, "conv2": 1, "conv3": 2}  # those of the encoder


def make_parts(config: Config, num_actions: int, width: int) -> tuple[NatureEncoder, nn.Sequential]:
    """The encoder of a configuration and its head `width` wide, parted at `config.split`; their weights are arbitrary.

    Where they are parted does not change what they compute, nor the order in which `initialize` draws their weights.
    """
    normalized = config.weight_projection == "nap"
    encoder = NatureEncoder(config.encoder_width, activation=config.activation, normalized=normalized)
    head = make_head(
        encoder.num_features,
        width,
        num_actions,
        normalization=config.normalization,
        output_bias=config.output_bias,
        activation=config.activation,
    )
    if config.split != "fc1":
        convolutions = encoder.split_off(_CONVOLUTIONS_BEFORE[config.split])
        head = ConvolutionalHead(encoder.feature_shape, *convolutions, nn.Flatten(), *head)
    return encoder, head


def make_network(config: Config, num_actions: int, width: int) -> QNetwork:
    """The Q-network of a configuration with a head `width` wide, ready to be injected; its weights are arbitrary."""
    encoder, head = make_parts(config, num_actions, width)
    return QNetwork(encoder, InjectedHead(head))
