"""Interventions on anyone's network: `inject`, the drop-in plasticity injection (Nikishin et al. 2023, section 4).

The encoder keeps learning through all heads; its optimizer slots are kept; the live head starts with fresh ones; the target network gets
the same fresh weights, so that neither its output nor its lag moves (the paper's "same intervention").
"""

import time

import torch
from torch import Tensor, nn

from growtrain.networks.heads import initialize
from growtrain.networks.injected import Initializer, InjectedHead, check_injectable, probe_features
from growtrain.records import GrowthEvent
from growtrain.settings.config import Anchor, TrainableHeads


class NotPreserved(RuntimeError):
    """An intervention that must not change predictions would have changed them; nothing was changed."""


def inject(
    network: nn.Module,
    *,
    head: str = "head",
    optimizer: torch.optim.Optimizer,
    target: nn.Module | None = None,
    generator: torch.Generator | None = None,
    anchor: Anchor = "frozen",
    trainable_heads: TrainableHeads = "newest",
    probe: Tensor | None = None,
    initializer: Initializer = initialize,
) -> GrowthEvent:
    """Injects plasticity into `network.<head>`, in place and all or nothing.

    Replaces or grows the head in `network` and in `target` with the same fresh weights, and mends `optimizer` in place: the old head's
    parameters leave it, the live head's take their places by name with fresh slots, every other slot is kept. Before anything is changed,
    both heads are compared with what they will become on `probe`: bit-equal on the CPU in float32, else within 1e-5 of the Q scale.
    Anything built from the old parameters (a compiled function, a CUDA graph, a loss module that captured them) must be rebuilt.

    Args:
        network: any module with a head at the dotted path `head`, a module from features (B, F) to action values (B, A).
        head: path of the head.
        optimizer: the optimizer that trains it; must hold all the head's trainable parameters.
        target: target network of the same structure.
        generator: source of the fresh weights (CPU); None draws a seed from torch's global generator.
        anchor: `frozen`, `zero` or `mirrored`.
        trainable_heads: `newest`, or `all`: the old live head goes on training beside the new one and keeps its slots (the appendix's
            ablation); anchors never train.
        probe: features to verify on, as the head takes them; needed only for heads that do not begin with a linear layer.
        initializer: draws the fresh weights, in place.

    Returns:
        What happened, with the largest changes measured.

    Raises:
        ValueError: the head cannot be injected, shares parameters with the rest or with the target, differs from the target's, or is
            not in the optimizer.
        NotPreserved: the outputs would have changed.
    """
    start = time.perf_counter()
    seed = int(torch.randint(2**62, (), generator=generator))
    old = _submodule(network, head)
    _check_membership(network, old, head, optimizer)
    before = count_parameters(network, trainable=True)
    new = _grow(old, seed, anchor, trainable_heads, initializer)
    new_target, target_change = None, None
    if target is not None:
        old_target = _submodule(target, head)
        _check_target(old, old_target)
        new_target = _grow(old_target, seed, anchor, trainable_heads, initializer)
        both_fused = (
            new.spec()["fused"] and new_target.spec()["fused"]
        )  # each was fused only if that keeps its own bits
        new.rebuild_bank(fused=both_fused)
        new_target.rebuild_bank(fused=both_fused)
        target_change = _verify(old_target, new_target, probe)
    change = _verify(old, new, probe)
    old_live = old.live if isinstance(old, InjectedHead) else old
    old_names, new_names = (
        {name: p for name, p in live.named_parameters() if p.requires_grad} for live in (old_live, new.live)
    )
    if {k: p.shape for k, p in old_names.items()} != {k: p.shape for k, p in new_names.items()}:
        raise NotPreserved(f"the new live head trains {sorted(new_names)} and the old one {sorted(old_names)}")
    # Nothing before this line changed anything, and nothing after it can fail.
    successors = {id(p): new_names[k] for k, p in old_names.items()}
    _enter_optimizer(optimizer, successors, {id(p) for p in old.parameters()} - {id(p) for p in new.parameters()})
    network.set_submodule(head, new)
    if target is not None and new_target is not None:
        # A target whose parameters do not train (the usual case) stays so.
        if not any(p.requires_grad for p in target.parameters()):
            new_target.requires_grad_(False)
        target.set_submodule(head, new_target)
    return GrowthEvent(
        stage=new.num_injections,
        anchor=anchor,
        parameters_total=count_parameters(network),
        parameters_trainable_before=before,
        parameters_trainable=count_parameters(network, trainable=True),
        max_abs_q_change_online=change,
        max_abs_q_change_target=target_change,
        pause_seconds=time.perf_counter() - start,
    )


def count_parameters(module: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters, or of those that require a gradient; each tensor once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def same_function(before: Tensor, after: Tensor) -> bool:
    """Bit-equal on the CPU in float32 or float64; elsewhere `nearly_equal`, for the same sum may be taken in another order. (B, A) each."""
    if before.device.type == "cpu" and before.dtype in (torch.float32, torch.float64):
        return torch.equal(before, after)
    return nearly_equal(before, after)


def nearly_equal(before: Tensor, after: Tensor) -> bool:
    """Within 1e-5 of the Q scale, (B, A) each: greedy actions are the same, but for actions whose values tie within twice that.

    The scale is at least 0.1, about what a fresh head answers: rounding errors are as large as the heads that cancel, however small Q is.
    """
    return float((after - before).abs().max()) <= 1e-5 * float(before.abs().max().clamp(min=0.1))


def _submodule(network: nn.Module, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError as error:
        names = ", ".join(name for name, _ in network.named_children())
        raise ValueError(
            f"the network has no module {path!r}: name its head with head=..., its children are {names}"
        ) from error


def _check_target(old: nn.Module, old_target: nn.Module) -> None:
    if {id(p) for p in old.parameters()} & {id(p) for p in old_target.parameters()}:
        raise ValueError("the target's head is the network's own: pass a lagging copy of the network, or no target")
    shapes, theirs = ({name: p.shape for name, p in head.named_parameters()} for head in (old, old_target))
    if shapes != theirs:
        raise ValueError(f"the target's head has {theirs} where the network's has {shapes}: pass a lagging copy of it")


def _check_membership(network: nn.Module, old: nn.Module, path: str, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(old, InjectedHead):
        check_injectable(old)
    inside = {id(p) for p in old.parameters()}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if id(parameter) in inside and not name.startswith(f"{path}."):
            raise ValueError(
                f"head {path!r} shares its parameters with {name!r}: freezing it would freeze that too; untie them first"
            )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in old.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise ValueError(f"the optimizer does not hold {path}.{name}: pass the optimizer that trains this head")


def _grow(
    old: nn.Module, seed: int, anchor: Anchor, trainable_heads: TrainableHeads, initializer: Initializer
) -> InjectedHead:
    """`old` with one more injection, as a new module; the same seed gives the same fresh weights for online and target."""
    injected = old if isinstance(old, InjectedHead) else InjectedHead(old)
    return injected.grown(torch.Generator().manual_seed(seed), anchor, trainable_heads, initializer)


@torch.no_grad()
def _verify(old: nn.Module, new: nn.Module, probe: Tensor | None) -> float:
    features = probe_features(old) if probe is None else probe
    if features is None:
        raise ValueError(
            "this head does not begin with a linear layer: pass probe=, a batch of its input features (B, F)"
        )
    before, after = old(features), new(features)
    change = float((after - before).abs().max())
    if not same_function(before, after):
        raise NotPreserved(f"injection would have changed an output by {change:g}; nothing was changed")
    return change


def _enter_optimizer(optimizer: torch.optim.Optimizer, successors: dict[int, nn.Parameter], leaving: set[int]) -> None:
    """Puts each successor in the place of the parameter it succeeds or, where that one stays, beside it; both are named by id."""
    for group in optimizer.param_groups:
        old, group["params"] = group["params"], []
        for p in old:
            if id(p) in successors:
                group["params"].append(successors[id(p)])
            if id(p) in leaving:
                optimizer.state.pop(p, None)
            else:
                group["params"].append(p)
