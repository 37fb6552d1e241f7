"""An action-value network: encoder, then head."""

from torch import Tensor, nn


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
