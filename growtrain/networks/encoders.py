"""Encoders phi: from observations to features, by convolutions that suit the size of what is observed.

Frames of a screen: the three of the Nature DQN (Mnih et al. 2015, "Human-level control", Methods). Grids too small for them: the one of
MinAtar's DQN (Young & Tian 2019, "MinAtar", section 3: "a single convolutional layer", 16 of 3x3, stride 1).

Normalised, every convolution is followed by a layer normalisation over channels and pixels, before its non-linearity (Lyle et al. 2024).

Units: observations are uint8, divided by the scale of their `Spec` inside the network; features are float32.
"""

import torch
from torch import Tensor, nn

from growtrain.networks.activations import make_activation, num_units, outputs_per_unit
from growtrain.settings.config import Activation

# channels, kernel, stride of each convolution
NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
MINATAR = ((16, 3, 1),)
_LEAST_SIDE = 36  # pixels, of what the Nature DQN's convolutions leave anything of


def scale_frames(observation: Tensor, scale: float) -> Tensor:
    """Frames (B, C, H, W) uint8 over `scale` as float32, channels last in memory; what is scaled already is returned as it is.

    Raises:
        TypeError: neither uint8 nor float32.
    """
    if observation.dtype == torch.float32:
        return observation
    if observation.dtype != torch.uint8:
        raise TypeError(f"observations are uint8 frames, got {observation.dtype}")
    if torch.compiler.is_compiling():
        return observation.to(torch.float32, memory_format=torch.channels_last) * (1 / scale)
    scaled = torch.empty_like(observation, dtype=torch.float32, memory_format=torch.channels_last)
    return torch.mul(observation, 1 / scale, out=scaled)  # converted, moved and scaled in one kernel


class ConvolutionalEncoder(nn.Module):
    """The convolutions for observations of a shape: (B, C, H, W) uint8 -> (B, features) float32.

    Args:
        shape: (C, H, W) of an observation.
        width: factor on the channels; of 84 x 84 pixels 1 gives 3136 features, of 10 x 10 cells 1024.
        scale: that which a pixel is divided by.
        activation: the non-linearity after each convolution.
        normalized: whether each convolution is normalised before it.

    Attributes:
        width: as given.
        num_convolutions: how many there are.
        feature_shape: (C, H, W) of what comes out of the last convolution, before it is flattened.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: float = 1.0,
        *,
        scale: float = 255.0,
        activation: Activation = "relu",
        normalized: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, rows, columns = shape
        self.width, self.scale = width, scale
        self._shapes = [shape]
        convolutions = NATURE if min(rows, columns) >= _LEAST_SIDE else MINATAR
        self.num_convolutions = len(convolutions)
        for full_channels, kernel, stride in convolutions:
            units = num_units(max(1, round(full_channels * width)), activation)
            norm = [nn.GroupNorm(1, units)] if normalized else []
            layers += [nn.Conv2d(channels, units, kernel, stride), *norm, make_activation(activation, inplace=True)]
            channels = outputs_per_unit(activation) * units
            rows, columns = ((side - kernel) // stride + 1 for side in (rows, columns))
            self._shapes.append((channels, rows, columns))
        self.layers = nn.Sequential(*layers)
        self.num_features = channels * rows * columns
        self.feature_shape, self._flat = self._shapes[-1], True
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack this overload

    def split_off(self, depth: int) -> list[nn.Module]:
        """Takes out the layers after the first `depth` convolutions, for a head; features are (B, C, H, W) from then on."""
        layers = list(self.layers)
        place = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)][depth]
        self.layers = nn.Sequential(*layers[:place])
        self.feature_shape, self._flat = self._shapes[depth], False
        return layers[place:]

    def forward(self, observation: Tensor) -> Tensor:
        """Features of a batch of observations, uint8 or already scaled by `scale_frames`."""
        features: Tensor = self.layers(scale_frames(observation, self.scale))
        # Flattened in channel-major order whatever the memory format, so that weights mean the same on every device.
        return features.flatten(1) if self._flat else features
