"""The injection that freezes a whole network: Q(s) = F(s) + live(s), see `networks.snapshot`.

It is an injection of the head with a `mirrored` anchor (`growth.inject`), whose frozen heads then make way for a frozen copy of everything:
the optimizer is mended by the same hands, the live head's output is exactly 0, and what was predicted is what the copy predicts.
"""

import torch
from torch import nn

from growtrain.networks.snapshot import Snapshot


@torch.no_grad()
def frozen_whole(snapshot: Snapshot, network: nn.Module) -> Snapshot:
    """F + network, the network copied as it is.

    Raises:
        ValueError: a weight is not finite, or the network computes something else at every call, so that F would be no function.
    """
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite: a snapshot of it would stay so for ever")
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"{name} is dropout, which draws anew at every call: a frozen network must be a function")
    return snapshot.grown(network)
