"""Encoders phi: from observations to features (Mnih et al. 2015, "Human-level control", Methods).

Normalised, every convolution is followed by a layer normalisation over channels and pixels, before its non-linearity (Lyle et al. 2024).

Units: observations are uint8 in 0..255, scaled by 1/255 inside the network; features are float32.
"""

import torch
from torch import Tensor, nn

from growtrain.networks.activations import make_activation, num_units, outputs_per_unit
from growtrain.settings.config import Activation

_CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel, stride


def scale_frames(observation: Tensor) -> Tensor:
    """Stacked uint8 frames (B, stack, H, W) as float32 in 0..1, channels last in memory; what is scaled already is returned as it is.

    Raises:
        TypeError: neither uint8 nor float32.
    """
    if observation.dtype == torch.float32:
        return observation
    if observation.dtype != torch.uint8:
        raise TypeError(f"observations are uint8 frames, got {observation.dtype}")
    scaled = torch.empty_like(observation, dtype=torch.float32, memory_format=torch.channels_last)
    return torch.mul(observation, 1 / 255, out=scaled)  # converted, moved and scaled in one kernel


class NatureEncoder(nn.Module):
    """The three convolutions of the Nature DQN: (B, stack, 84, 84) uint8 -> (B, features) float32.

    Args:
        width: factor on the channels (32, 64, 64); 1 gives 3136 features.
        stack: frames in an observation.
        activation: the non-linearity after each convolution.
        normalized: whether each convolution is normalised before it.

    Attributes:
        feature_shape: (C, H, W) of what comes out of the last convolution, before it is flattened.
    """

    def __init__(
        self, width: float = 1.0, stack: int = 4, *, activation: Activation = "relu", normalized: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, side = stack, 84
        self._shapes = [(channels, side, side)]
        for full_channels, kernel, stride in _CONVOLUTIONS:
            units = num_units(max(1, round(full_channels * width)), activation)
            norm = [nn.GroupNorm(1, units)] if normalized else []
            layers += [nn.Conv2d(channels, units, kernel, stride), *norm, make_activation(activation, inplace=True)]
            channels, side = outputs_per_unit(activation) * units, (side - kernel) // stride + 1
            self._shapes.append((channels, side, side))
        self.layers = nn.Sequential(*layers)
        self.num_features = channels * side * side
        self.feature_shape, self._flat = self._shapes[-1], True
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack this overload

    def split_off(self, depth: int) -> list[nn.Module]:
        """Takes out the layers after the first `depth` convolutions (0, 1 or 2), for a head; features are (B, C, H, W) from then on."""
        layers = list(self.layers)
        place = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)][depth]
        self.layers = nn.Sequential(*layers[:place])
        self.feature_shape, self._flat = self._shapes[depth], False
        return layers[place:]

    def forward(self, observation: Tensor) -> Tensor:
        """Features of a batch of stacked frames, uint8 or already scaled by `scale_frames`."""
        features: Tensor = self.layers(scale_frames(observation))
        # Flattened in channel-major order whatever the memory format, so that weights mean the same on every device.
        return features.flatten(1) if self._flat else features
