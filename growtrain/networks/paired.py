"""Linear layers over paired hidden units, whose halves cancel to an exact floating-point zero (the `mirrored` anchor).

Source: antisymmetric initialisation (Chizat et al. 2019; Zhang et al. 2020).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growtrain.networks.heads import SharedBiasLinear

ALIGNED = 16  # float32 values in 64 bytes, the alignment of every tensor's memory


class MirroredLinear(nn.Module):
    """An output layer over paired hidden units: (B, H) -> (B, A).

    The two halves of the hidden units are multiplied apart and added, so that equal halves with opposite weights give an exact zero.
    It takes over the parameters of the layer it is made from; an odd last unit is a third part.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.shared_bias = isinstance(layer, SharedBiasLinear)

    @torch.no_grad()
    def cancel(self) -> None:
        """Makes the output zero in place: opposite halves, a zero bias, a zero weight on an odd unit."""
        half = self.weight.shape[1] // 2
        self.weight[:, half : 2 * half] = -self.weight[:, :half]
        self.weight[:, 2 * half :] = 0
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Action values from the hidden units."""
        half = self.weight.shape[1] // 2
        odd = self.weight.shape[1] - 2 * half
        sizes = [half, half, odd] if odd else [half, half]
        parts = list(zip(torch.split(hidden, sizes, dim=-1), torch.split(self.weight, sizes, dim=1), strict=True))
        if half % ALIGNED:  # products of operands that are aligned alike round alike
            parts = [(units.clone(), weight.clone()) for units, weight in parts]
        products = [F.linear(units, weight) for units, weight in parts]
        out = products[0] + products[1]
        if odd:
            out = out + products[2]
        return out if self.bias is None else out + self.bias


class PairedLinear(nn.Module):
    """A hidden layer of paired units: (B, F) -> (B, H), the two halves multiplied apart so that equal weights give equal bits.

    Stands in for a linear layer of a width at which one matrix product rounds equal columns differently; same parameters, same names.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.kind = type(layer)

    def forward(self, features: Tensor) -> Tensor:
        """The product, half by half."""
        half = self.weight.shape[0] // 2
        sizes = [half, half, self.weight.shape[0] - 2 * half]
        weights = list(torch.split(self.weight, sizes))
        if half * self.weight.shape[1] % ALIGNED:  # products of operands that are aligned alike round alike
            weights = [weight.clone() for weight in weights]
        biases = [None] * 3 if self.bias is None else torch.split(self.bias, sizes)
        return torch.cat([F.linear(features, *parts) for parts in zip(weights, biases, strict=True)], dim=-1)
