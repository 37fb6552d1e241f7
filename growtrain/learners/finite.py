"""Updates that are not finite: they are counted, never applied, and end a run when they go on."""

import torch
from torch import Tensor

from growtrain.learners.base import Diverged
from growtrain.settings.config import Config

MAX_NONFINITE = 10  # updates in a row that could not be applied, after which training stops


def new_counters(device: torch.device) -> Tensor:
    """(3,) int64, updates that were not applied: how many since the last report, how many in a row up to now, and the most in a row."""
    return torch.zeros(3, dtype=torch.int64, device=device)


def count_nonfinite(loss: Tensor, gradients: list[Tensor], counts: Tensor) -> Tensor:
    """Counts, and returns () bool, whether a loss () or a gradient is not finite.

    Args:
        loss: of a batch.
        gradients: of what trains.
        counts: `new_counters`; moved in place.
    """
    # Compiled, the largest number is found on the way through memory; run one by one, a norm of all gradients is the least to ask for.
    # Either is infinite where a square is, which the optimizers take.
    compiling = torch.compiler.is_compiling()
    sizes = [g.abs().amax().square() for g in gradients] if compiling else list(torch._foreach_norm(gradients))
    total = torch.stack([loss.detach(), *sizes]).sum()
    bad = total - total != 0  # so it is of infinities and NaN; `isfinite` is five kernels
    skipped, streak, longest = counts.unbind()
    skipped += bad
    streak.add_(1).mul_(bad)
    torch.maximum(longest, streak, out=longest)
    return bad


def require_finite(parameters: dict[str, Tensor], counters: Tensor, config: Config, updates: int) -> None:
    """Raises `Diverged` if a weight is not finite, or `MAX_NONFINITE` updates in a row could not be applied; reads all weights."""
    longest = int(counters[2])
    remedy = f"lower --lr (now {config.lr:g}), clip with --max-grad-norm 10, or clip rewards with --reward-clip 1"
    finite = torch.stack([parameter.detach().isfinite().all() for parameter in parameters.values()])
    if not bool(finite.all()):
        broken = [name for name, whole in zip(parameters, finite.tolist(), strict=True) if not whole]
        raise Diverged(
            f"{len(broken)} of {len(parameters)} weight tensors are not finite at update {updates}, the first of them "
            f"{broken[0]}, though every gradient that was applied was: go on from the last checkpoint, and {remedy}"
        )
    if longest >= MAX_NONFINITE:
        raise Diverged(
            f"the loss or a gradient was not finite in {longest} updates in a row, up to update {updates}; none was applied: "
            f"{remedy}"
        )
