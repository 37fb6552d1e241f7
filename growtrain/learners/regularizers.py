"""Penalties on the weights that train, and the projection of normalised layers: what injection is compared with that acts on every update.

- `l2`: sum of squares. It is part of the loss, so its gradient is divided by the optimizer's moments like any other: weights with large
  gradients decay less. Weight decay outside the loss would shrink all weights alike (Loshchilov & Hutter 2019).
- `l2-init`: the same from the initial weights instead of from zero (Kumar et al. 2023, "regenerative regularization").
- `parseval`: keeps rows of weight matrices orthogonal, ||W W^T - s I||^2 (Chung et al. 2024; their s = 2, the squared gain of a ReLU).
- `project`, the second half of Normalize-and-Project (Lyle et al. 2024): normalised layers keep the norm that they began with, so that
  growing weights do not lower the effective learning rate. The first half is a normalisation before every non-linearity.

Only what requires a gradient is penalised or projected, and a live head begins anew with its own fresh weights: frozen heads take no part.

Deviations: 1. Chung et al. scale the strength by (64 / width)^2 and begin orthogonal; here the strength is as given, and weights begin
as they always do; a layer with more units than inputs cannot reach zero; 2. the projection is done after every update, takes a layer's bias
with its weight as one vector, which leaves the normalised function as it is, and leaves the gains and offsets of the normalisation and the
output layer, whose scale is that of the values, free.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from growtrain.settings.config import Config, Regularizer

PARSEVAL_SCALE = 2.0


def regularized(loss: Tensor, config: Config, weights: Sequence[Tensor], initial: Sequence[Tensor]) -> Tensor:
    """The loss that is differentiated; what is reported, and compared between runs, is without the penalty on the weights."""
    if config.regularizer == "none" or not config.regularizer_strength:
        return loss
    return loss + config.regularizer_strength * penalty(config.regularizer, weights, initial)


def penalty(regularizer: Regularizer, weights: Sequence[Tensor], initial: Sequence[Tensor]) -> Tensor:
    """The penalty () of that name, with a graph.

    Args:
        regularizer: any but `none`.
        weights: all parameters that train; for `parseval` the `hidden_matrices`.
        initial: their initial values, for `l2-init`.

    Raises:
        ValueError: there is no such penalty.
    """
    match regularizer:
        case "l2":
            return l2(weights)
        case "l2-init":
            return l2([weight - start for weight, start in zip(weights, initial, strict=True)])
        case "parseval":
            return parseval(weights)
        case _:
            raise ValueError(f"regularizer is {regularizer!r}: choose l2, l2-init or parseval")


def l2(weights: Sequence[Tensor]) -> Tensor:
    """The sum of all squares ()."""
    return torch.stack([weight.square().sum() for weight in weights]).sum()


def parseval(matrices: Sequence[Tensor], scale: float = PARSEVAL_SCALE) -> Tensor:
    """The sum over layers of ||W W^T - scale I||^2 (); a convolution's kernel is one row for each output channel."""
    rows = [matrix.flatten(1) for matrix in matrices]
    identities = [torch.eye(len(row), dtype=row.dtype, device=row.device) for row in rows]
    grams = [torch.addmm(one, row, row.t(), beta=-scale) for one, row in zip(identities, rows, strict=True)]
    return l2(grams)


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """The weights of all linear and convolutional layers that train, but for output layers: those that end an `nn.Sequential`."""
    sequences = [module for module in network.modules() if isinstance(module, nn.Sequential)]
    own = [p for layers in sequences for layer in list(layers)[:-1] for p in layer.parameters()]
    return [p for p in own if p.dim() > 1 and p.requires_grad]


def normalized_layers(network: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Weight and bias of every layer that trains and is followed by a normalisation: scaling both leaves the function as it is."""
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            for layer, following in pairwise(module):
                own = list(layer.parameters())
                if isinstance(following, nn.LayerNorm | nn.GroupNorm) and all(p.requires_grad for p in own):
                    yield own


def joint_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm () of all tensors as one vector."""
    return l2(tensors).sqrt()


@torch.no_grad()
def project(layers: Sequence[Sequence[Tensor]], norms: Sequence[Tensor], *, unless: Tensor | None = None) -> None:
    """Rescales the tensors of each layer in place, so that their joint norm is the given one; reads no device value.

    Where `unless` () bool holds they are left as they are, to the bit.
    """
    for tensors, norm in zip(layers, norms, strict=True):
        factor = norm / joint_norm(tensors)
        if unless is not None:
            factor = factor.masked_fill(unless, 1.0)
        for tensor in tensors:
            tensor.mul_(factor)
