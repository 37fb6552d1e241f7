"""Centred RMSProp with epsilon inside the square root, as the Nature DQN and DQN Zoo use it (Graves 2013, equations 38-45).

    m <- decay m + (1 - decay) g,   v <- decay v + (1 - decay) g^2,   w <- w - lr g / sqrt(max(v - m^2, 0) + eps)

`torch.optim.RMSprop(centered=True)` adds epsilon outside the root, w <- w - lr g / (sqrt(max(v - m^2, 0)) + eps), which is another
optimizer at the same epsilon: MinAtar's DQN has it, and `rmsprop` is it.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MAX_COMPILATIONS = 64
Slots = tuple[list[Tensor], ...]  # what an optimizer keeps of each parameter, slot by slot


class CompilationFailed(RuntimeError):
    """`torch.compile` could not do what was asked of it."""


class CenteredRMSProp(torch.optim.Optimizer):
    """Centred RMSProp.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        decay: decay of both moments, in [0, 1).
        eps: added to the variance, or to its root; positive.
        inside: which of the two.
        compiled: fuse the step's passes over memory into one with `torch.compile` (see `can_compile`); falls back with a warning where
            that fails.

    Attributes:
        found_inf: () float32, set by whoever checks gradients, as `torch.amp.GradScaler` does: unless it is 0, they count as zeros.

    Raises:
        ValueError: a hyperparameter is out of range.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2.5e-4,
        decay: float = 0.95,
        eps: float = 0.01 / 32**2,
        *,
        inside: bool = True,
        compiled: bool = False,
    ) -> None:
        if not (lr >= 0 and 0 <= decay < 1 and eps > 0):
            raise ValueError(f"lr {lr}, decay {decay}, eps {eps}: need lr >= 0, 0 <= decay < 1, eps > 0")
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps, "inside": inside})
        self._step = compiled_anew(centered_rmsprop_step) if compiled else centered_rmsprop_step

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy runs uncompiled; restored state leaves the step as it is."""
        super().__setstate__(state)
        self.__dict__.setdefault("_step", centered_rmsprop_step)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # losses are computed outside
        """One step on every parameter with a gradient; raises `ValueError` for a closure."""
        if closure is not None:
            raise ValueError("closures are not supported: compute the loss and its gradients before step()")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            self._apply(
                parameters,
                [parameter.grad for parameter in parameters],
                *self.slots(parameters),
                lr=group["lr"],
                decay=group["decay"],
                eps=group["eps"],
                inside=group["inside"],
                found_inf=self.found_inf,
            )

    def slots(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The means and mean squares of parameters, zeros where there were none."""
        for parameter in parameters:
            if not self.state[parameter]:
                for name in ("mean", "mean_square"):
                    self.state[parameter][name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return [self.state[p]["mean"] for p in parameters], [self.state[p]["mean_square"] for p in parameters]

    def _apply(self, *tensors: list[Tensor], **settings: Any) -> None:
        try:
            self._step(*tensors, **settings)
        except Exception as error:  # compilation happens before anything is changed, and can fail in many ways
            if self._step is centered_rmsprop_step:
                raise
            warnings.warn(f"the optimizer step could not be compiled and runs uncompiled: {error}", stacklevel=2)
            self._step = centered_rmsprop_step
            self._step(*tensors, **settings)


def centered_rmsprop_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    mean_squares: list[Tensor],
    *,
    lr: float,
    decay: float,
    eps: float,
    inside: bool = True,
    found_inf: Tensor | None = None,
) -> None:
    """The formula above on lists of tensors of equal shapes, in place; with gradients of zero where `found_inf` () is not zero."""
    if found_inf is not None:
        bad = found_inf != 0
        gradients = [gradient.masked_fill(bad, 0.0) for gradient in gradients]
    torch._foreach_lerp_(means, gradients, 1 - decay)
    torch._foreach_mul_(mean_squares, decay)
    torch._foreach_addcmul_(mean_squares, gradients, gradients, 1 - decay)
    roots = torch._foreach_addcmul(mean_squares, means, means, -1)
    # A variance, but for its rounding, which under gradients of 10 and more that hardly change is larger than eps.
    torch._foreach_clamp_min_(roots, 0.0)
    if inside:
        torch._foreach_add_(roots, eps)
        torch._foreach_sqrt_(roots)
    else:
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, eps)
    torch._foreach_addcdiv_(parameters, gradients, roots, -lr)


def adam_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    steps: list[Tensor],
    means: list[Tensor],
    mean_squares: list[Tensor],
    scales: Sequence[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    found_inf: Tensor,
) -> None:
    """Adam (Kingma & Ba 2015, algorithm 1) as PyTorch's fused kernel computes it, to be compiled; nothing moves where `found_inf` () holds.

    Args:
        parameters: moved in place, as are steps, means and mean squares.
        gradients: of the parameters' shapes.
        steps: () each, how many there were before.
        means: of gradients.
        mean_squares: of gradients.
        scales: `adam_scales` of N parameters, (N,) each; not moved.
        betas: decays of the means and mean squares.
        eps: added to the root.
        found_inf: () bool.
    """
    decay, decay_square = betas
    sizes, corrections = (scale.unbind() for scale in scales)
    moving = zip(parameters, gradients, means, mean_squares, sizes, corrections, strict=True)
    for parameter, gradient, mean, mean_square, size, correction in moving:
        new_mean = mean.lerp(gradient, 1 - decay)
        new_square = mean_square * decay_square + gradient * gradient * (1 - decay_square)
        moved = parameter - size * new_mean / (new_square.sqrt() / correction + eps)
        for old, new in ((parameter, moved), (mean, new_mean), (mean_square, new_square)):
            old.copy_(torch.where(found_inf, old, new))
    for step in steps:
        step.add_(~found_inf)


def adam_scales(steps: list[Tensor], lr: float, betas: tuple[float, float]) -> list[Tensor]:
    """The step's size and the correction of the root (N,) each, of N parameters after `steps` () steps of each, on a CPU.

    Inside of what is compiled they would be computed once for every sixteen elements of a parameter; as tensors they take six times NumPy's
    time, a twentieth of a small network's update.
    """
    powers = np.array([step.item() for step in steps]) + 1
    scales = lr / (1 - betas[0] ** powers), np.sqrt(1 - betas[1] ** powers)
    return [torch.from_numpy(scale.astype(np.float32)) for scale in scales]


def slots_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Slots:
    """What `step_of` takes beside parameters and gradients: their slots, fresh where there were none, and what follows from them."""
    if isinstance(optimizer, CenteredRMSProp):
        return optimizer.slots(parameters)
    for parameter in parameters:
        if not (slots := optimizer.state[parameter]):
            slots["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                slots[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    steps, *moments = ([optimizer.state[p][name] for p in parameters] for name in ("step", "exp_avg", "exp_avg_sq"))
    group = optimizer.param_groups[0]
    return steps, *moments, adam_scales(steps, group["lr"], group["betas"])


def step_of(optimizer: torch.optim.Optimizer) -> Callable[..., None]:
    """An optimizer's step as a function of parameters, gradients, its `slots_of` them, and `found_inf`, fit for being compiled."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, CenteredRMSProp):
        return partial(centered_rmsprop_step, **{name: group[name] for name in ("lr", "decay", "eps", "inside")})
    return partial(adam_step, betas=group["betas"], eps=group["eps"])


def compiled_anew(function: Callable[..., Any], *, on_cpu: bool = False) -> Callable[..., Any]:
    """A function compiled anew for every set of shapes; past PyTorch's limit, 8 in a process, it would go on uncompiled, unsaid.

    Args:
        function: what is compiled.
        on_cpu: all of its tensors are there. What calls its kernels is C++, too, then, which takes a twentieth to a tenth off an update.

    Raises:
        CompilationFailed: what it returns, before it has changed anything: it could not be compiled, or has been too often.
    """
    compiled = torch.compile(function, dynamic=False, options={"cpp_wrapper": on_cpu})
    # Made once: it makes a class of its own.
    settled = torch._dynamo.config.patch(
        recompile_limit=_MAX_COMPILATIONS, fail_on_recompile_limit_hit=True, trace_autograd_ops=True
    )

    def call(*arguments: Any, **settings: Any) -> Any:
        with settled:
            try:
                return compiled(*arguments, **settings)
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                raise CompilationFailed(str(error)) from error

    return call


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, lr: float, eps: float, decay: float, compiled: bool = False
) -> torch.optim.Optimizer:
    """`centered_rmsprop`, `rmsprop`, whose epsilon is outside the root, or `adam` (Kingma & Ba 2015).

    Adam is PyTorch's fused kernel, in a form that a CUDA graph can hold.
    """
    if name in ("centered_rmsprop", "rmsprop"):
        inside = name == "centered_rmsprop"
        return CenteredRMSProp(parameters, lr=lr, decay=decay, eps=eps, inside=inside, compiled=compiled)
    if name == "adam":
        listed = list(parameters)
        return torch.optim.Adam(listed, lr=lr, eps=eps, fused=True, capturable=listed[0].is_cuda)
    raise ValueError(f"optimizer is {name!r}: choose centered_rmsprop, rmsprop or adam")


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` is allowed, and has what it needs: a C++ compiler for the CPU, Triton and a C compiler for a GPU."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return False
    if device.type == "cuda":
        return find_spec("triton") is not None and any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang"))
    return device.type == "cpu" and any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++"))
