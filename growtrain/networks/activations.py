"""Activations of the hidden layers: ReLU, and two that never let a unit fall silent by giving two outputs for each.

CReLU (Shang et al. 2016; for lost plasticity Abbas et al. 2023): relu(x), relu(-x). The units stay as many, so what follows has twice the
inputs. Deep Fourier features (Lewandowski et al. 2025): sin(x), cos(x). Half the units, so that what follows has as many inputs as with a
ReLU; an odd number is rounded up.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growtrain.settings.config import Activation


class CReLU(nn.Module):
    """Positive and negative part, concatenated: (B, U, ...) -> (B, 2 U, ...)."""

    def forward(self, units: Tensor) -> Tensor:
        """relu(x), then relu(-x)."""
        return torch.cat([F.relu(units), F.relu(-units)], dim=1)


class Fourier(nn.Module):
    """Sine and cosine, concatenated: (B, U, ...) -> (B, 2 U, ...)."""

    def forward(self, units: Tensor) -> Tensor:
        """sin(x), then cos(x)."""
        return torch.cat([torch.sin(units), torch.cos(units)], dim=1)


def make_activation(activation: Activation, *, inplace: bool = False) -> nn.Module:
    """The module of that name; `inplace` is for the ReLU."""
    match activation:
        case "crelu":
            return CReLU()
        case "fourier":
            return Fourier()
        case "relu":
            return nn.ReLU(inplace=inplace)


def num_units(width: int, activation: Activation) -> int:
    """Units, before the activation, of a layer called `width` wide."""
    return -(-width // 2) if activation == "fourier" else width


def outputs_per_unit(activation: Activation) -> int:
    """Outputs of the activation for each unit."""
    return 1 if activation == "relu" else 2
