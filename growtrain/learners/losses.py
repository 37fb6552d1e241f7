"""Losses as pure functions, in rlax's notation: `_tm1` is before the step, `_t` after it."""

from torch import Tensor
from torch.nn import functional as F


def double_dqn_loss(
    q_tm1: Tensor, a_tm1: Tensor, r_t: Tensor, discount_t: Tensor, q_t_value: Tensor, q_t_selector: Tensor
) -> Tensor:
    """Mean Huber loss (delta 1) of the Double-DQN error (van Hasselt et al. 2016, equation 4).

    Args:
        q_tm1: (B, A) online values of s, with a graph.
        a_tm1: (B,) int64 actions taken.
        r_t: (B, 1) rewards.
        discount_t: (B, 1) discounts, 0 where the return ends.
        q_t_value: (B, A) target network's values of s', without a graph.
        q_t_selector: (B, A) online values of s', without a graph.

    Raises:
        ValueError: shapes that would broadcast silently.
    """
    batch = (q_tm1.shape[0], 1)
    if r_t.shape != batch or discount_t.shape != batch or a_tm1.shape != batch[:1]:
        raise ValueError(f"need rewards and discounts {batch}, got {tuple(r_t.shape)} and {tuple(discount_t.shape)}")
    chosen = q_tm1.gather(1, a_tm1[:, None])
    target = r_t + discount_t * q_t_value.gather(1, q_t_selector.argmax(1, keepdim=True))
    return F.smooth_l1_loss(chosen, target)
