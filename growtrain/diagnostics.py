"""Measures of plasticity: pure functions of tensors; nothing they are given is changed, and no global random state is touched.

They are proxies: Nikishin et al. 2023 call dead units and feature rank weak ones, and diagnose by injecting. What each can say: a
network that has lost plasticity tends to have dormant units, features of low rank, large weights, a sharp loss, small gradients and
targets that it no longer fits.

Legend: B states, F features, H hidden units, A actions.

Units: fractions lie in 0..1, ranks count dimensions, norms are Euclidean over all parameters together. Every result is a () tensor on the
device of the input unless said otherwise: reading it is up to the caller.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TINY = torch.finfo(torch.float64).tiny


def dormancy(activations: Tensor) -> Tensor:
    """The score (H,) of each unit: E|h_i| over the mean of E|h_k| of its layer; 0 throughout a layer that is silent everywhere.

    Sokar et al. 2023, "The Dormant Neuron Phenomenon in Deep Reinforcement Learning", definition 3.1.

    Args:
        activations: (B, H) after the non-linearity, or (B, H, height, width) of a convolution: units are channels, E is over space too.

    Raises:
        ValueError: another rank.
    """
    _require_rank(activations, "activations", 2, 4)
    activity = activations.detach().abs().mean(dim=[axis for axis in range(activations.ndim) if axis != 1])
    return activity / activity.mean().clamp(min=torch.finfo(activity.dtype).tiny)


def dormant_fraction(activations: Tensor, tau: float = 0.025) -> Tensor:
    """Share of a layer's units that are tau-dormant: their `dormancy` is at most tau; a layer that is silent everywhere is all dormant.

    A fresh hidden layer is not at 0 on Atari but near a half: states share most of their pixels, so that a unit is on for nearly all of
    them or for none. What tells is how the share changes.

    Args:
        activations: as of `dormancy`.
        tau: threshold; 0 counts only units that are silent on the whole batch.

    Raises:
        ValueError: another rank.
    """
    return (dormancy(activations) <= tau).float().mean()


def srank(features: Tensor, delta: float = 0.01) -> Tensor:
    """Fewest singular values that sum to 1 - delta of all (Kumar et al. 2021, "Implicit Under-Parameterization", section 3); int64.

    Args:
        features: (B, F); the rank is at most min(B, F), and 0 for zeros.
        delta: share that may be left out.

    Raises:
        ValueError: another rank.
    """
    values = singular_values(features)
    return (values.cumsum(0) < (1 - delta) * values.sum()).sum() + (values[0] > 0)


def effective_rank(features: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values (Roy & Vetterli 2007, "The Effective Rank", definition 1).

    Args:
        features: (B, F); the rank lies in 1..min(B, F), and is 0 for zeros.

    Raises:
        ValueError: another rank.
    """
    values = singular_values(features)
    p = values / values.sum().clamp(min=_TINY)
    return torch.exp(-torch.xlogy(p, p).sum()) * (values[0] > 0)


def stable_rank(features: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm (Rudelson & Vershynin 2007, "Sampling from Large Matrices").

    Args:
        features: (B, F); the rank lies in 1..min(B, F), and is 0 for zeros.

    Raises:
        ValueError: another rank.
    """
    squares = singular_values(features).square()
    return squares.sum() / squares[0].clamp(min=_TINY)


def singular_values(matrix: Tensor) -> Tensor:
    """All min(N, M) singular values of (N, M), descending, in float64.

    They are the roots of the eigenvalues of the smaller Gram matrix, several times faster than a decomposition of the matrix; what lies
    below 1e-8 of the largest is rounding.

    Raises:
        ValueError: another rank.
    """
    _require_rank(matrix, "a matrix", 2)
    tall = matrix.detach().double()
    tall = tall if tall.shape[0] >= tall.shape[1] else tall.T
    squares: Tensor = torch.linalg.eigvalsh(tall.T @ tall)
    return squares.clamp(min=0).sqrt().flip(0)


def weight_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all parameters together (Lyle et al. 2023, "Understanding Plasticity", section 3); 0 of none.

    Args:
        parameters: of any shapes.
    """
    return nn.utils.get_total_norm([parameter.detach() for parameter in parameters])


def distance_from_initialization(parameters: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> Tensor:
    """Euclidean distance of parameters from what they were initialised with (Nagarajan & Kolter 2019).

    Args:
        parameters: by name, of any shapes.
        initial: the same names and shapes.

    Raises:
        ValueError: names or shapes differ.
    """
    if {name: p.shape for name, p in parameters.items()} != {name: p.shape for name, p in initial.items()}:
        raise ValueError("the initial parameters have other names or shapes: give those of the same architecture")
    return weight_norm(parameter.detach() - initial[name] for name, parameter in parameters.items())


def gradient_norm(loss: Tensor, *groups: Sequence[Tensor]) -> Tensor:
    """Euclidean norms (G,) of a loss's gradient with respect to G groups of parameters, from one backward pass.

    No `.grad` is written. The graph of the loss is kept.

    Args:
        loss: () with a graph.
        groups: parameters that require a gradient; those that the loss does not depend on count as 0.

    Raises:
        ValueError: the loss is not a scalar.
    """
    _require_rank(loss, "a loss", 0)
    everything = [parameter for group in groups for parameter in group]
    gradients = iter(torch.autograd.grad(loss, everything, retain_graph=True, materialize_grads=True))
    return torch.stack([weight_norm([next(gradients) for _ in group]).to(loss) for group in groups])


def policy_churn(q_before: Tensor, q_after: Tensor) -> Tensor:
    """Share of states whose greedy action changed (Schaul et al. 2022, "The Phenomenon of Policy Churn", section 2).

    Args:
        q_before: (B, A) action values.
        q_after: (B, A), of the same states later.

    Raises:
        ValueError: shapes that differ or are not (B, A).
    """
    _require_rank(q_before, "q_before", 2)
    if q_before.shape != q_after.shape:
        raise ValueError(
            f"q_before is {tuple(q_before.shape)} and q_after {tuple(q_after.shape)}: compare the same states"
        )
    return (q_before.argmax(1) != q_after.argmax(1)).float().mean()


def hessian_top_eigenvalue(
    loss: Tensor,
    parameters: Sequence[Tensor],
    *,
    generator: torch.Generator,
    iterations: int = 20,
    tolerance: float = 1e-3,
) -> Tensor:
    """The eigenvalue of largest magnitude, with its sign, of a loss's Hessian: its sharpness (Lyle et al. 2023, section 4).

    Power iteration with Hessian-vector products (Pearlmutter 1994), never the Hessian; the estimate is the Rayleigh quotient, which never
    exceeds the true magnitude. Waits for the device once an iteration. No `.grad` is written, and the graph of the loss is kept.

    Args:
        loss: () with a graph that can be differentiated twice.
        parameters: that require a gradient.
        generator: CPU generator of the first vector; the same one gives the same estimate.
        iterations: at most; each costs about two backward passes.
        tolerance: relative change of the estimate below which it stops.

    Raises:
        ValueError: the loss is not a scalar.
    """
    _require_rank(loss, "a loss", 0)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    vector = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    eigenvalue = loss.new_zeros(())
    for _ in range(iterations):
        norm = weight_norm(vector).clamp(min=torch.finfo(loss.dtype).tiny)
        vector = [each / norm for each in vector]
        slope = torch.stack([(g * v).sum() for g, v in zip(gradients, vector, strict=True)]).sum()
        if not slope.requires_grad:  # a loss without curvature has a constant gradient
            break
        product = torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True)
        previous, eigenvalue = (
            eigenvalue,
            torch.stack([(p * v).sum() for p, v in zip(product, vector, strict=True)]).sum(),
        )
        vector = list(product)
        if abs(eigenvalue - previous) <= tolerance * abs(eigenvalue):
            break
    return eigenvalue


def target_fit_error(
    network: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    updates: int,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """What is left of given targets after a fixed number of updates on a copy: mean squared error over variance, 1 = nothing learned.

    Target-fitting capacity (Lyle et al. 2022, "Understanding and Preventing Capacity Loss", definition 1), normalised. Spectral layers
    keep their estimate of the singular vectors.

    Args:
        network: copied; of the copy, what requires a gradient is trained. A whole network on observations, or a head on features.
        inputs: (B, ...) as the network takes them.
        targets: (B, A).
        make_optimizer: from the copy's parameters to a fresh optimizer.
        updates: gradient steps.
        batch_size: inputs in each, drawn with replacement.
        generator: CPU generator of the batches.

    Raises:
        ValueError: targets are not (B, A) for B inputs, or do not vary.
    """
    _require_rank(targets, "targets", 2)
    variance = (targets - targets.mean(0)).square().mean()
    if len(inputs) != len(targets) or not variance > 0:
        raise ValueError(
            f"{len(inputs)} inputs and {len(targets)} targets: give one target for each input, not all equal"
        )
    student = copy.deepcopy(network)
    optimizer = make_optimizer([parameter for parameter in student.parameters() if parameter.requires_grad])
    for _ in range(updates):
        rows = torch.randint(len(inputs), (batch_size,), generator=generator).to(inputs.device)
        optimizer.zero_grad()
        torch.autograd.backward(F.mse_loss(student(inputs[rows]), targets[rows]))
        optimizer.step()
    with torch.no_grad():
        return F.mse_loss(student(inputs), targets) / variance


def _require_rank(tensor: Tensor, name: str, *ranks: int) -> None:
    if tensor.ndim not in ranks:
        raise ValueError(f"{name} must have rank {' or '.join(map(str, ranks))}, got shape {tuple(tensor.shape)}")
