"""Losses as pure functions, in rlax's notation: `_tm1` is before the step, `_t` after it."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # of the Gaussian before the tanh, as in the authors' code (Haarnoja et al. 2018)


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


def tanh_gaussian(parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """An action and its log probability under a Gaussian squashed by a tanh (Haarnoja et al. 2018, "Soft Actor-Critic", appendix C).

        a = tanh(u),   u = mean + std noise,   log pi(a) = log N(u; mean, std) - sum log(1 - a^2)

    with log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), which no u makes infinite.

    Args:
        parameters: (B, 2 A), means and then log standard deviations, which are clamped to [-20, 2].
        noise: (B, A) standard normal.

    Returns:
        Actions (B, A) in [-1, 1], and log probabilities (B,).
    """
    mean, log_std = parameters.chunk(2, dim=-1)
    log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
    u = mean + log_std.exp() * noise
    normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    squashed = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return torch.tanh(u), (normal - squashed).sum(-1)


def soft_target(
    r_t: Tensor, discount_t: Tensor, q_t: tuple[Tensor, Tensor], log_pi_t: Tensor, temperature: Tensor
) -> Tensor:
    """Y = r + gamma (min Q_target(s', a') - alpha log pi(a')), (B, 1); clipped double Q as in Fujimoto et al. 2018 (TD3).

    Args:
        r_t: (B, 1) rewards.
        discount_t: (B, 1) discounts, 0 where the return ends.
        q_t: (B, 1) each, the target critics' values of s' and an action that the policy draws there.
        log_pi_t: (B,) of that action.
        temperature: () alpha.

    Raises:
        ValueError: shapes that would broadcast silently.
    """
    if {r_t.shape, discount_t.shape, *(q.shape for q in q_t)} != {(len(log_pi_t), 1)}:
        raise ValueError(f"need rewards, discounts and values {(len(log_pi_t), 1)}, got {tuple(r_t.shape)}")
    return r_t + discount_t * (torch.minimum(*q_t) - temperature * log_pi_t[:, None])
