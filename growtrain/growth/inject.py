"""Plasticity injection (Nikishin et al. 2023, section 4): `inject`, the drop-in for anyone's network, and what a run does to its own.

The encoder keeps learning through all heads; its optimizer slots are kept; the live head starts with fresh ones; the target network gets
the same fresh weights, so that neither its output nor its lag moves (the paper's "same intervention").
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growtrain.growth.alternatives import Replacement, Subject, head_of
from growtrain.growth.membership import Membership
from growtrain.growth.reached import reached, tensors_in
from growtrain.networks.attachments import Attachments
from growtrain.networks.heads import initialize, seeded
from growtrain.networks.injectable import check_injectable, kept_buffers, probe_features
from growtrain.networks.injected import Initializer, InjectedHead
from growtrain.networks.location import Head, Observations, as_inputs, copies_of_tensors, find_head
from growtrain.networks.snapshot import num_snapshots
from growtrain.records import GrowthEvent
from growtrain.settings.config import Anchor, TrainableHeads
from growtrain.settings.text import require_choice


class NotPreserved(RuntimeError):
    """An intervention that must not change predictions would have changed them; nothing was changed."""


def inject(
    network: nn.Module,
    *,
    head: str | Sequence[str] = "head",
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    target: nn.Module | None = None,
    generator: torch.Generator | None = None,
    anchor: Anchor = "frozen",
    trainable_heads: TrainableHeads = "newest",
    probe: Tensor | None = None,
    observations: Observations | None = None,
    initializer: Initializer = initialize,
) -> GrowthEvent:
    """Injects plasticity into `network.<head>`, in place and all or nothing.

    Replaces or grows the head in `network` and in `target` with the same fresh weights, and mends `optimizer` in place: the old head's
    parameters leave it, the live head's take their places by name with fresh slots, every other slot is kept, and each of its groups is in
    the order of `named_parameters()`. Hooks and attributes of the head's parameters and modules go over to the live head; the injected head
    is in shared memory if the old one was. Before anything is changed, both heads are compared with what they will become on `probe`:
    bit-equal on the CPU in float32, else within 1e-5 of the Q scale. Anything built from the old parameters (a CUDA graph, a loss module
    that captured them) must be rebuilt; what `torch.compile` made of the network compiles itself again.

    Frozen heads are parameters that require no gradient. A loop that switches gradients of the network off and on, as Spinning Up's does,
    must do so for those alone that require one, `[p for p in network.parameters() if p.requires_grad]`, and so must an optimizer that is
    built anew: set free, frozen heads do not train as long as no optimizer holds them, but their gradients count in `clip_grad_norm_`.

    What is not passed is not looked at: another network that holds modules of this one, as an actor on a critic's layers does, has them
    changed, too. Hold both in one module, inject into that, and give `observations`, on which the outputs of both are compared.

    Args:
        network: any module with a head: a module, or several, from features (B, F) to action values (B, A).
        head: path of the head; `path.7:`, an `nn.Sequential` from its layer 7 on, whose place the injected head takes as its last layer; or
            paths of modules that are computed one after the other, of which the last becomes the injected head and the others an identity.
            A tail is compared as its Sequential computes it: where `forward()` goes through the layers itself, pass `observations` too.
        optimizer: the optimizer that trains it, or several, each of any class; together they must hold all the head's trainable parameters.
            An empty list: those that train it are built anew afterwards.
        target: target network of the same structure.
        generator: source of the fresh weights (CPU); None draws a seed from torch's global generator.
        anchor: `frozen`, `zero` or `mirrored`.
        trainable_heads: `newest`, or `all`: the old live head goes on training beside the new one and keeps its slots (the appendix's
            ablation); anchors never train.
        probe: features to verify on, as the head takes them; needed only for heads that do not begin with a linear layer.
        observations: a batch as the network takes it, or one for each of its inputs, on which all of the network is compared, too, the head
            on what it is given for it, and the live head is seen to be what is computed; needed for a head of several modules, to see that
            they follow each other, and for a tail whose Sequential is not called as a whole.
        initializer: draws the fresh weights, in place, from the generator it is given or from the global one.

    Returns:
        What happened, with the largest changes measured.

    Raises:
        ValueError: the head cannot be injected, is partly frozen, shares parameters with the rest or with the target, differs from the
            target's, or has a hook that cannot go over; or its parameters are not in an optimizer, or in one that cannot be mended.
        NotPreserved: the outputs would have changed, or the live head would not be what computes them.
    """
    start = time.perf_counter()
    planned = plan_injection(
        network,
        head=head,
        optimizer=optimizer,
        target=target,
        generator=generator,
        anchor=anchor,
        trainable_heads=trainable_heads,
        probe=probe,
        observations=observations,
        initializer=initializer,
    )
    before = count_parameters(planned.networks[0], trainable=True)
    with undone_on_failure(planned.networks, planned.members.optimizers):
        wholes = [] if observations is None else [_Whole.of(each, observations) for each in planned.prepared]
        planned.carry_out()
        for whole in wholes:
            whole.check()
    return GrowthEvent(
        stage=planned.new.num_injections,
        anchor=anchor,
        parameters_total=count_parameters(planned.networks[0]),
        parameters_trainable_before=before,
        parameters_trainable=count_parameters(planned.networks[0], trainable=True),
        max_abs_q_change_online=planned.changes[0],
        max_abs_q_change_target=planned.changes[1] if target is not None else None,
        pause_seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class PlannedInjection:
    """All that an injection needs, beside the networks; none of it has been put in place.

    Attributes:
        prepared: of the network, then of its target if there is one.
        members: the optimizers.
        changes: the largest measured change of an output, for each of `prepared`.
    """

    prepared: Sequence["_Prepared"]
    members: Membership
    changes: Sequence[float]

    @property
    def networks(self) -> list[nn.Module]:
        """What is changed, out of its wrapper of `torch.compile`: the network, then its target."""
        return [each.head.network for each in self.prepared]

    @property
    def new(self) -> InjectedHead:
        """The network's injected head."""
        return self.prepared[0].new

    def carry_out(self) -> None:
        """Puts the heads in place and mends the optimizers, within `undone_on_failure`."""
        successors, leaving = dict[int, nn.Parameter](), set[int]()
        for each in self.prepared:
            successors |= {id(p): each.new.live.get_parameter(name) for name, p in each.head.live.named_parameters()}
            leaving |= {id(p) for p in each.head.module.parameters()} - {id(p) for p in each.new.parameters()}
        names = {key: name for each in reversed(self.prepared) for key, name in each.head.names.items()}
        for each in self.prepared:
            each.attached.hand_over(each.new)
            # A target's head that does not train (the usual case) stays so.
            if not any(p.requires_grad for p in each.head.live.parameters()):
                each.new.requires_grad_(False)
            each.head.put(each.new)
        after = [{id(p): name for name, p in network.named_parameters()} for network in self.networks]
        self.members.mend(successors, leaving, names, after)


def plan_injection(
    network: nn.Module,
    *,
    head: str | Sequence[str],
    optimizer: Any,
    target: nn.Module | None,
    generator: torch.Generator | None,
    anchor: Anchor,
    trainable_heads: TrainableHeads,
    probe: Tensor | None,
    observations: Observations | None,
    initializer: Initializer,
) -> PlannedInjection:
    """What `inject` is to put in place, verified; arguments and errors are its own.

    Nothing has changed but the generator, and that what earlier injections froze is frozen again.
    """
    require_choice("anchor", anchor, Anchor)
    require_choice("trainable_heads", trainable_heads, TrainableHeads)
    fresh = own_stream(generator)
    online = find_head(network, head)
    if observations is None and len(online.parts) > 1 and not isinstance(head, str):
        raise ValueError(
            "a head of several modules needs observations=, a batch as the network takes it: "
            "it is run once to see that nothing else is computed between them"
        )
    if not isinstance(probe, Tensor | None):
        raise ValueError(
            f"probe is {type(probe).__name__}: pass one tensor, a batch of features (B, F) as the head takes them"
        )
    if observations is not None:
        probe = online.features(observations)
    members = Membership(optimizer)
    online.check_untied()
    online.check_reached_by_name()
    _freeze_again(online.module, members)
    trained = {online.names[id(p)]: p for p in online.module.parameters() if p.requires_grad}
    if not any(p.requires_grad for p in online.live.parameters()):
        raise ValueError("the head is frozen: nothing of it trains; unfreeze it with requires_grad_(True)")
    members.check(
        trained, [p for p in online.module.parameters() if trainable_heads == "newest" or not p.requires_grad]
    )
    prepared = [_prepare(online, members, fresh, anchor, trainable_heads, initializer, probe)]
    if target is not None:
        with _about_the_target():
            lagging = find_head(target, head)
            _check_target(online.module, lagging.module)
            lagging.check_untied()
            lagging.check_reached_by_name()
            theirs = [p for p in lagging.module.parameters() if trainable_heads == "newest" or not p.requires_grad]
            members.check({}, theirs)
            prepared.append(_prepare(lagging, members, fresh, anchor, trainable_heads, initializer, probe))
    _fuse_alike([each.new for each in prepared])
    return PlannedInjection(prepared, members, [each.verify(probe) for each in prepared])


def _freeze_again(head: nn.Module, members: Membership) -> None:
    """Freezes what was frozen and a loop has set free that switches a whole network off and on: what no optimizer holds never trains."""
    if isinstance(head, InjectedHead) and head.frozen is not None and not members.is_empty:
        held = {id(p) for group in members.groups for p in group["params"]}
        for p in head.frozen.parameters():
            if id(p) not in held:
                p.requires_grad_(False)


def output_of(network: nn.Module, observations: Observations, *, graph: bool = False) -> Any:
    """What a network gives, always with the same random numbers; buffers and generators are as before."""
    with torch.set_grad_enabled(graph), kept_buffers(network), seeded(network, torch.Generator().manual_seed(0)):
        return network(*as_inputs(observations))


@dataclass(frozen=True)
class _Whole:
    """What a network gives for observations before it is injected, and what that is computed from.

    Attributes:
        prepared: what is to take the place of its head.
        observations: a batch as it takes them.
        outputs: the tensors that it gives; None for those that are others each time, by a state or a generator of its own.
        reached: ids of the live head's parameters that they are computed from.
    """

    prepared: "_Prepared"
    observations: Observations
    outputs: Sequence[Tensor | None]
    reached: set[int]

    @classmethod
    def of(cls, prepared: "_Prepared", observations: Observations) -> "_Whole":
        """Of a network as it is.

        Raises:
            ValueError: it gives no tensor, or none that could be compared where nothing else would show a change.
        """
        network, head = prepared.head.network, prepared.head
        # The last pass is one without a graph: a module may keep what it computes.
        found = reached(lambda: _graph_of(network, observations), head.live.parameters())
        first, again = (tensors_in(output_of(network, copies_of_tensors(observations))) for _ in range(2))
        if not first:
            raise ValueError(
                "the network returns no tensor, on which it could be compared: leave observations= out, or return one"
            )
        alike = len(first) == len(again)
        outputs = [
            one if alike and equal_with_nan(one, other) else None for one, other in zip(first, again, strict=alike)
        ]
        if all(each is None for each in outputs) and len(head.parts) > 1 and not head.is_tail:
            raise ValueError(
                "the network gives other outputs each time, by a state or a generator of its own: it could not be seen that "
                "nothing else uses what is between a head's modules; have it return an output that the same input gives again"
            )
        return cls(prepared, observations, outputs, found)

    def check(self) -> None:
        """Raises `NotPreserved` if the injected network gives something else, or computes it from something else."""
        network = self.prepared.head.network
        try:
            found = self.prepared.reached(lambda: _graph_of(network, self.observations))
            after = tensors_in(output_of(network, copies_of_tensors(self.observations)))
        except Exception as error:
            raise NotPreserved(
                f"the network does not run with the injected head ({type(error).__name__}: {error}): something else uses a module of the "
                "head, or what holds its layers is not called as a whole; name each of them in head=; nothing was changed"
            ) from error
        _require_same(self.outputs, after)
        self.prepared.check_reached(self.reached, found)


def _graph_of(network: nn.Module, observations: Observations) -> Any:
    return output_of(network, copies_of_tensors(observations), graph=True)


def equal_with_nan(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaN where the other has it."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def _require_same(before: Sequence[Tensor | None], after: Sequence[Tensor]) -> None:
    """Raises `NotPreserved` if an output of the network has changed."""
    for old, new in zip(before, after, strict=all(each is not None for each in before)):
        if old is None:
            continue
        if old.shape != new.shape or not (equal_with_nan(old, new) or _nearly_equal_each(old, new)):
            raise NotPreserved(
                "an output of the network would have changed, though the head's is the same: something else uses a module of the head, "
                "or what is computed between them; nothing was changed"
            )


def _nearly_equal_each(old: Tensor, new: Tensor) -> bool:
    """Whether every number is nearly what it was, where rounding may differ; some may be large to mask others."""
    if not old.is_floating_point() or (old.device.type == "cpu" and old.dtype in (torch.float32, torch.float64)):
        return False
    usual = float(old[old.isfinite()].abs().median()) if bool(old.isfinite().any()) else 0.0
    return torch.allclose(old, new, rtol=1e-5, atol=1e-5 * max(usual, 0.1), equal_nan=True)


@contextlib.contextmanager
def undone_on_failure(
    networks: Sequence[nn.Module], optimizers: Sequence[Any], values: Sequence[tuple[Tensor, Tensor]] = ()
) -> Iterator[None]:
    """Puts networks and optimizers back as they were if the body raises.

    Args:
        networks: their modules, hooks and modes, and whether parameters train; what is written into a parameter is not undone.
        optimizers: their groups and slots.
        values: tensors that are written into, each with a copy of its values.
    """
    modules = [(each, dict(vars(each)), dict(each._modules)) for network in networks for each in network.modules()]
    trainable = [(p, p.requires_grad) for network in networks for p in network.parameters()]
    groups = [(group, dict(group)) for optimizer in optimizers for group in optimizer.param_groups]
    slots = [(optimizer, dict(optimizer.state)) for optimizer in optimizers]
    try:
        yield
    except BaseException:
        for module, attributes, children in modules:
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for group, entries in groups:
            group.update(entries)
        for optimizer, state in slots:
            optimizer.state.clear()
            optimizer.state.update(state)
        with torch.no_grad():
            for tensor, before in values:
                tensor.copy_(before)
        raise


def injection(subject: Subject, *, initializer: Initializer = initialize) -> Replacement:
    """Heads with one more injection, the same fresh weights in every network; no network changes.

    All slots are kept but those of the old live head, which keeps its own where it goes on training (`config.trainable_heads` "all").
    """
    config = subject.config
    if any(map(num_snapshots, subject.networks)):
        raise ValueError("this network was frozen whole, and its heads cannot be frozen alone: use --freeze network")
    old = [head_of(network) for network in subject.networks]
    new = [
        head.grown(subject.generator.clone_state(), config.anchor, config.trainable_heads, initializer) for head in old
    ]
    _fuse_alike(new)
    names = {id(p): f"head.{name}" for name, p in old[0].named_parameters()}
    slots = {name: values for name, values in subject.slots.items() if not name.startswith("head.")}
    for name, parameter in new[0].named_parameters():
        if (before := names.get(id(parameter))) in subject.slots:
            slots[f"head.{name}"] = subject.slots[before]
    frozen = count_parameters(old[0], trainable=True) if config.trainable_heads == "newest" else 0
    added = count_parameters(new[0].live) - frozen
    return Replacement(modules=[{"head": head} for head in new], slots=slots, added_parameters=added)


def own_stream(generator: torch.Generator | None) -> torch.Generator:
    """A generator that one draw of another seeds, of torch's global one if that is None."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator, device="cpu")))


def _fuse_alike(heads: Sequence[InjectedHead]) -> None:
    """Fuses all frozen banks or none: each was fused only if that keeps its own bits."""
    fused = all(head.spec()["fused"] for head in heads)
    for head in heads:
        head.rebuild_bank(fused=fused)


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


@dataclass(frozen=True)
class _Prepared:
    """What takes the place of a head, and what goes over to it."""

    head: Head
    new: InjectedHead
    attached: Attachments

    @property
    def leaving(self) -> list[nn.Parameter]:
        """The old head's parameters that the injected one does not have."""
        stay = {id(p) for p in self.new.parameters()}
        return [p for p in self.head.module.parameters() if id(p) not in stay]

    def reached(self, run: Callable[[], Any]) -> set[int]:
        """The ids of the parameters that leave, and of those of the fresh live head, that what `run` gives is computed from."""
        return reached(run, [*self.leaving, *self.new.live.parameters()])

    def check_reached(self, before: set[int], after: set[int]) -> None:
        """Raises `NotPreserved` if an output is still computed from the old head, or not from what takes its place.

        Args:
            before: ids of the old live head's parameters that it was computed from.
            after: ids of those that it is now.
        """
        for p in self.leaving:
            if id(p) in after:
                raise NotPreserved(
                    f"{self.attached.names[id(p)]!r} would leave, and the network would go on computing with it: a function set on a "
                    "module (forward = torch.compile(...), a lambda) holds on to the old head; make it a method, or use module.compile(); "
                    "nothing was changed"
                )
        for name, p in self.head.live.named_parameters():
            if id(p) in before and id(self.new.live.get_parameter(name)) not in after:
                raise NotPreserved(
                    f"what takes the place of {self.attached.names[id(p)]!r} would never be computed: the network reaches the head past "
                    "its name, or a function that is set on one of its modules holds on to it; nothing was changed"
                )

    @torch.no_grad()
    def verify(self, probe: Tensor | None) -> float:
        """The largest change of an output; raises `NotPreserved` if it is more than rounding, or as `check_reached` does."""
        old = self.head.module
        features = probe_features(old) if probe is None else probe
        if features is None:
            raise ValueError(
                "this head does not begin with a linear layer: pass probe=, a batch of its input features (B, F)"
            )
        with self.attached.aside():
            live = reached(lambda: old(features.clone()), self.head.live.parameters())
            self.check_reached(live, self.reached(lambda: self.new(features.clone())))
            before, after = old(features.clone()), self.new(features.clone())
        change = float((after - before).abs().max())
        if not same_function(before, after):
            if math.isnan(change):
                raise NotPreserved(
                    "an output of the head is not a number: weights or observations are not; nothing was changed"
                )
            remedy = "if a layer works in place (inplace=True), make it not; "
            remedy += "if one is random in training mode, use .eval(); " if old.training else ""
            raise NotPreserved(f"injection would have changed an output by {change:g}; {remedy}nothing was changed")
        return change


def _prepare(
    head: Head,
    members: Membership,
    generator: torch.Generator,
    anchor: Anchor,
    trainable_heads: TrainableHeads,
    initializer: Initializer,
    probe: Tensor | None,
) -> _Prepared:
    """A head with one more injection, beside it; the generator is copied: online and target get the same fresh weights."""
    beside = head.module.beside if isinstance(head.module, InjectedHead) else []
    attached = Attachments(head.module, head.live, head.names, beside=beside, mended=members.optimizers)
    attached.check_observing(probe_features(head.module) if probe is None else probe)
    with attached.aside():
        old = head.module
        if not isinstance(old, InjectedHead):
            check_injectable(old, probe)
            old = InjectedHead(old, checked=True)
        new = old.grown(generator.clone_state(), anchor, trainable_heads, initializer, probe)
    return _Prepared(head, new, attached)


@contextlib.contextmanager
def _about_the_target() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the target network: {error}") from error


def _check_target(old: nn.Module, old_target: nn.Module) -> None:
    if {id(p) for p in old.parameters()} & {id(p) for p in old_target.parameters()}:
        raise ValueError("the target's head is the network's own: pass a lagging copy of the network, or no target")
    shapes, theirs = ({name: p.shape for name, p in head.named_parameters()} for head in (old, old_target))
    if shapes != theirs:
        raise ValueError(f"the target's head has {theirs} where the network's has {shapes}: pass a lagging copy of it")
