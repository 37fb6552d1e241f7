"""A head that grows by plasticity injection (Nikishin et al. 2023, section 4).

At an injection the live head theta is frozen, fresh weights theta' are drawn, and two copies are added: a live head that trains and, for
`anchor="frozen"`, an anchor that is subtracted and never moves. After n injections

    Q = h_theta + sum_{i<n} [h_theta'i,1 - h_theta'i,2] + [h_theta'n,1 - h_theta'n,2]        (all frozen but h_theta'n,1)

Two cheaper anchors keep both properties (predictions unchanged, trainable count unchanged) without a second head:
`zero` starts the live head's output layer at zero; `mirrored` pairs its last hidden units, equal incoming and opposite outgoing weights
(antisymmetric initialisation: Chizat et al. 2019; Zhang et al. 2020).

Every sum is grouped so that the new pair contributes an exact floating-point zero: `frozen + (live - anchor)`, and half minus half.
Frozen heads of one hidden layer are fused: one matrix product for the hidden units of all of them, whatever n is.

Deviations: 1. `zero`, `mirrored` and the fused bank are not in the paper; 2. the form for n > 1 is inferred (see `Anchor`).
"""

import contextlib
import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growtrain.networks.activations import CReLU, Fourier
from growtrain.networks.attachments import Attachments, copied
from growtrain.networks.heads import (
    BatchLinear,
    HiddenLinear,
    SharedBiasLinear,
    SpectralLinear,
    hidden_linear,
    initialize,
    seeded,
)
from growtrain.networks.injectable import check_alike_in_training, check_injectable, probe_features
from growtrain.networks.paired import ALIGNED, MirroredLinear, PairedLinear
from growtrain.settings.config import Anchor, TrainableHeads

# Matrix products of different sizes take different code paths, and may round differently.
_PROBE_BATCHES = (1, 8, 32, 256)
Initializer = Callable[[nn.Module, torch.Generator], None]  # draws fresh weights in place
POINTWISE = (nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU)
CONCATENATING = (CReLU, Fourier)


class FrozenBank(nn.Module):
    """The frozen heads of an `InjectedHead`, summed in the order in which they were frozen.

    Fused, the hidden layers of all heads are one: two matrix products whatever their number. That needs heads that are `Linear, activation,
    Linear` (`can_fuse`); any other architecture is kept head by head. Nothing here requires a gradient, and `train()` never reaches a
    frozen head. With `trainable`, never fused, the heads that train go on training: they are held as they are, not copied.
    """

    def __init__(self, heads: list[nn.Module], anchors: list[Anchor], *, fused: bool, trainable: bool = False) -> None:
        super().__init__()
        self.heads = nn.ModuleList(head if trainable and trains(head) else _frozen_copy(head) for head in heads)
        self.training = False
        self.anchors = anchors
        self.fused = fused
        if self.fused:
            self._fuse()

    def _fuse(self) -> None:
        """Moves the hidden layers of all heads into one weight (sum of widths, F) and one bias; output layers stay apart."""
        hiddens: list[nn.Linear] = [head[0] for head in self.heads]  # type: ignore[index]
        self.kind = _kind(hiddens[0])
        self.widths = [layer.weight.shape[0] for layer in hiddens]
        self.hidden_weight = nn.Parameter(torch.cat([layer.weight for layer in hiddens]).detach(), requires_grad=False)
        self.hidden_bias = nn.Parameter(
            torch.cat([_bias(layer.bias, layer.weight) for layer in hiddens]).detach(),
            requires_grad=False,
        )
        self.biased = [layer.bias is not None for layer in hiddens]
        self.names = [name for name, _ in self.heads[0].named_children()]  # of layers, as in the head's state dict
        self.activation: nn.Module = self.heads[0][1]  # type: ignore[index]
        self.outputs = nn.ModuleList(head[2] for head in self.heads)  # type: ignore[index]
        del self.heads

    def unfused(self) -> list[nn.Module]:
        """The frozen heads as they were before they were fused, sharing no memory with the bank; those that train are the bank's own."""
        if not self.fused:
            return [head if trains(head) else copied(head) for head in self.heads]
        heads: list[nn.Module] = []
        parts = zip(
            torch.split(self.hidden_weight, self.widths),
            torch.split(self.hidden_bias, self.widths),
            self.biased,
            self.outputs,
            strict=True,
        )
        for weight, bias, biased, output in parts:
            hidden = self.kind(weight.shape[1], weight.shape[0], bias=biased, device="meta")
            hidden.weight = nn.Parameter(weight.clone(), requires_grad=False)
            if biased:
                hidden.bias = nn.Parameter(bias.clone(), requires_grad=False)
            layers = (hidden, copy.deepcopy(self.activation), copy.deepcopy(output))
            heads.append(nn.Sequential(OrderedDict(zip(self.names, layers, strict=True))))
        return heads

    def head_outputs(self, *inputs: Any, **named: Any) -> Iterator[Tensor]:
        """The output (B, A) of each frozen head, in the order in which they are summed."""
        if not self.fused:
            yield from (head(*inputs, **named) for head in self.heads)
            return
        (features,) = (*inputs, *named.values())  # of an `nn.Sequential`
        product = hidden_linear if self.kind is HiddenLinear else F.linear
        hidden = product(features, self.hidden_weight, self.hidden_bias)
        if isinstance(self.activation, POINTWISE):
            parts: Iterable[Tensor] = torch.split(self.activation(hidden), self.widths, dim=-1)
            # Products of operands that are aligned alike round alike.
            if any(width % ALIGNED for width in self.widths):
                parts = map(torch.clone, parts)
        else:  # what concatenates does so head by head
            parts = map(self.activation, torch.split(hidden, self.widths, dim=-1))
        for part, output in zip(parts, self.outputs, strict=True):
            yield output(part)

    def forward(self, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """The sum of all frozen heads without the newest anchor (B, A), and the newest anchor's output (B, A) if there is one."""
        outputs = self.head_outputs(*inputs, **named)
        total = next(outputs)
        for anchor in self.anchors[:-1]:
            live = next(outputs)
            total = total + (live - next(outputs) if anchor == "frozen" else live)
        return total, next(outputs) if self.anchors[-1] == "frozen" else None

    def train(self, mode: bool = True) -> Self:
        """Frozen heads stay in evaluation mode."""
        del mode
        return super().train(False)


class InjectedHead(nn.Module):
    """A head with any number of plasticity injections: (B, F) -> (B, A), called as the head was.

    The parameters that require a gradient are exactly those of `live`, unless it was injected with `trainable_heads="all"`. Before the
    first injection it computes `head` and nothing else. What else the head can do, the live one can: `.live.reset_noise()`. A loop that
    switches `requires_grad` on and off must do so for `live` alone.

    Args:
        head: any module with a non-linearity, from features to action values.
        checked: whether it is known that it can be injected.

    Raises:
        ValueError: injection would be pointless or wrong for this head (see `check_injectable`).
    """

    def __init__(self, head: nn.Module, *, checked: bool = False) -> None:
        super().__init__()
        if not checked:
            check_injectable(head)
        self.live = head
        self.frozen: FrozenBank | None = None

    @property
    def anchors(self) -> list[Anchor]:
        """The anchor of each injection so far."""
        return [] if self.frozen is None else self.frozen.anchors

    @property
    def beside(self) -> list[nn.Module]:
        """Older live heads that train beside the newest."""
        if self.frozen is None or self.frozen.fused:
            return []
        return [head for head in self.frozen.heads if trains(head)]

    @property
    def num_injections(self) -> int:
        """How often this head has been injected."""
        return len(self.anchors)

    def forward(self, *inputs: Any, frozen_outputs: tuple[Tensor, Tensor | None] | None = None, **named: Any) -> Tensor:
        """Action values: frozen + (live - anchor).

        Args:
            inputs: features (B, F), or whatever the head takes.
            frozen_outputs: what the frozen bank gives for them, where the caller has it already.
            named: the same by name.
        """
        live: Tensor = self.live(*inputs, **named)
        if self.frozen is None:
            return live
        frozen, anchor = self.frozen(*inputs, **named) if frozen_outputs is None else frozen_outputs
        change = live if anchor is None else live - anchor
        q: Tensor = frozen + change
        return q

    @property
    def width(self) -> int:
        """Hidden units of the live head's last hidden layer."""
        kinds = nn.Linear | PairedLinear | MirroredLinear
        width: int = [module for module in self.live.modules() if isinstance(module, kinds)][-2].weight.shape[0]
        return width

    def inject(
        self,
        generator: torch.Generator | None = None,
        anchor: Anchor = "frozen",
        trainable_heads: TrainableHeads = "newest",
    ) -> None:
        """Freezes what is there and adds a live head of the same architecture with fresh weights; the output does not change.

        Args:
            generator: source of the fresh weights (a CPU generator); None draws a seed from torch's global generator.
            anchor: `frozen`, `zero` or `mirrored`.
            trainable_heads: `all` freezes nothing that trains: the older live heads go on (the paper's ablation), anchors never train.

        Raises:
            ValueError: the anchor is unknown or does not fit this head; nothing has changed then.
        """
        names = {id(each): name for name, each in (*self.named_modules(), *self.named_parameters())}
        attached = Attachments(self, self.live, names, beside=self.beside)
        attached.check_observing(probe_features(self.live))
        with attached.aside():
            grown = self.grown(_generator(generator), anchor, trainable_heads)
        attached.hand_over(grown)
        self.frozen, self.live = grown.frozen, grown.live

    def grown(
        self,
        generator: torch.Generator,
        anchor: Anchor,
        trainable_heads: TrainableHeads = "newest",
        initializer: Initializer = initialize,
        probe: Tensor | None = None,
        fused: bool | None = None,
    ) -> "InjectedHead":
        """A new head with one more injection; `self` keeps its tensors and can be gone back to.

        `probe` is a batch of features for heads whose first layer does not tell their shape. `fused` says how the bank is kept, by whoever
        restores it; None: fused where that can be done and computes the same bits.
        """
        if anchor not in ("frozen", "zero", "mirrored"):
            raise ValueError(f"anchor is {anchor!r}: choose frozen, zero or mirrored")
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "inside torch.inference_mode() fresh weights could never train: inject outside it (torch.no_grad() is fine)"
            )
        if anchor == "frozen" and initializer is not any_weights:
            check_alike_in_training(self.live)
        requires_grad = {name: p.requires_grad for name, p in self.live.named_parameters()}
        if len(set(requires_grad.values())) > 1:
            still = ", ".join(name for name, trains in requires_grad.items() if not trains)
            raise ValueError(
                f"the head is partly frozen ({still}) and a fresh one would train all of it: "
                "unfreeze it, register what never trains as a buffer, or name a head without it"
            )
        heads = [] if self.frozen is None else self.frozen.unfused()
        # The live head comes before its anchor, the order in which they are summed.
        place = len(heads) - 1 if self.anchors and self.anchors[-1] == "frozen" else len(heads)
        heads.insert(place, self.live)
        fresh = fresh_copy(self.live, generator, initializer)
        if anchor == "frozen":
            heads.append(copy.deepcopy(fresh).requires_grad_(False))
        else:
            _silence(fresh, anchor, probe, restoring=initializer is any_weights)
        grown = InjectedHead.__new__(InjectedHead)
        nn.Module.__init__(grown)
        grown.training = self.training
        grown.live = fresh
        trainable = trainable_heads == "all"
        can = can_fuse(heads) and not trainable
        if fused and not can:
            raise ValueError(f"these heads cannot be fused: {self.live}")
        fuses = can if fused is None else fused
        grown.frozen = FrozenBank(heads, [*self.anchors, anchor], fused=fuses, trainable=trainable)
        if fuses and fused is None and not self._keeps_bits(grown, place):
            grown.frozen = FrozenBank(heads, [*self.anchors, anchor], fused=False)
        if _is_shared(self):
            grown.share_memory()
        return grown

    def silent(self, generator: torch.Generator, initializer: Initializer = initialize) -> "InjectedHead":
        """A fresh head of the live one's architecture, with nothing frozen, whose output is exactly 0; `self` stays as it is."""
        fresh = InjectedHead.__new__(InjectedHead)
        nn.Module.__init__(fresh)
        fresh.training = self.training
        fresh.live = silent_copy(self.live, generator, initializer)
        fresh.frozen = None
        return fresh

    @torch.no_grad()
    def _keeps_bits(self, grown: "InjectedHead", place: int) -> bool:
        """Whether a fused bank computes every head as it was computed so far, and the newest anchor as the head from which it is
        subtracted, bit for bit; on a GPU rounding is allowed to differ."""
        assert grown.frozen is not None
        for batch in _PROBE_BATCHES:
            features = probe_features(self.live, batch)
            assert features is not None  # fused heads begin with a linear layer
            if features.device.type != "cpu":
                return True
            expected = [] if self.frozen is None else list(self.frozen.head_outputs(features))
            expected.insert(place, self.live(features))
            if grown.anchors[-1] == "frozen":
                expected.append(grown.live(features))
            if not all(map(torch.equal, expected, grown.frozen.head_outputs(features))):
                return False
        return True

    def rebuild_bank(self, *, fused: bool) -> None:
        """Rebuilds the frozen bank fused or head by head; the heads stay what they are."""
        if self.frozen is not None and self.frozen.fused != fused:
            shared = _is_shared(self.frozen)
            self.frozen = FrozenBank(self.frozen.unfused(), self.anchors, fused=fused)
            if shared:
                self.frozen.share_memory()

    def spec(self) -> dict[str, Any]:
        """What `grow_to` needs to rebuild this architecture; JSON-serialisable."""
        fused = self.frozen is not None and self.frozen.fused
        heads = [] if self.frozen is None or fused else list(self.frozen.heads)
        trainable = [index for index, head in enumerate(heads) if trains(head)]
        silent = self.frozen is None and any(isinstance(layer, MirroredLinear) for layer in self.live.modules())
        return {"injections": list(self.anchors), "fused": fused, "trainable": trainable, "silent": silent}

    def grow_to(self, spec: dict[str, Any]) -> Self:
        """Grows a fresh `InjectedHead` to the architecture of `spec`, ready for `load_state_dict`; the weights are arbitrary.

        Raises:
            ValueError: the spec is malformed or asks for fewer injections than this head has.
        """
        anchors = spec.get("injections") if isinstance(spec, dict) else None
        if not isinstance(anchors, list) or anchors[: self.num_injections] != self.anchors:
            raise ValueError(f"spec {spec!r} does not continue a head with injections {self.anchors}")
        if spec.get("silent"):
            self.live = silent_copy(self.live, torch.Generator().manual_seed(0), any_weights)
        fused = bool(spec.get("fused"))
        for anchor in anchors[self.num_injections :]:
            grown = self.grown(torch.Generator().manual_seed(0), anchor, initializer=any_weights, fused=fused)
            self.frozen, self.live = grown.frozen, grown.live
        self.rebuild_bank(fused=fused)
        for index in spec.get("trainable", ()):
            if self.frozen is None or self.frozen.fused or not 0 <= int(index) < len(self.frozen.heads):
                raise ValueError(f"spec {spec!r} trains head {index}, which it does not have apart")
            self.frozen.heads[int(index)].requires_grad_(True)
        return self


def trains(module: nn.Module) -> bool:
    """Whether any parameter requires a gradient."""
    return any(p.requires_grad for p in module.parameters())


def _frozen_copy(head: nn.Module) -> nn.Module:
    """A copy that never trains, and leaves the features as they are, of which the live head needs them for its gradients."""
    frozen = copied(head).requires_grad_(False).eval()
    leaves = (module for module in frozen.modules() if not module._modules)
    for leaf in itertools.takewhile(lambda leaf: not leaf._parameters, leaves):
        if getattr(leaf, "inplace", False):
            leaf.inplace = False  # type: ignore[assignment]
    return frozen


def _is_shared(module: nn.Module) -> bool:
    """Whether any parameter is in memory that processes share."""
    return any(p.device.type == "cpu" and p.is_shared() for p in module.parameters())  # type: ignore[no-untyped-call]


def _generator(generator: torch.Generator | None) -> torch.Generator:
    return (
        torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu"))) if generator is None else generator
    )


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias


def can_fuse(heads: list[nn.Module]) -> bool:
    """Whether all heads are `Linear, activation, Linear`, with an activation that is pointwise or concatenates its parts."""
    return all(
        isinstance(head, nn.Sequential)
        and type(head).forward is nn.Sequential.forward
        and len(head) == 3
        and type(head[0]) in (nn.Linear, HiddenLinear, PairedLinear)
        and isinstance(head[1], (*POINTWISE, *CONCATENATING))
        and type(head[2]) in (nn.Linear, SharedBiasLinear, MirroredLinear)
        for head in heads
    )


def _kind(layer: nn.Module) -> type[nn.Linear]:
    """The class of a linear layer, or of the one that a paired or mirrored layer stands in for."""
    if isinstance(layer, PairedLinear):
        return layer.kind
    return next((kind for kind in (HiddenLinear, BatchLinear) if isinstance(layer, kind)), nn.Linear)


def any_weights(module: nn.Module, generator: torch.Generator) -> None:
    """The initializer of what is to be overwritten: it may stay as it is."""
    with contextlib.suppress(ValueError):
        initialize(module, generator)


def fresh_copy(network: nn.Module, generator: torch.Generator, initializer: Initializer = initialize) -> nn.Module:
    """The same architecture with fresh weights that train; mirrored and paired layers become ordinary ones again.

    Another's initializer may draw from the global generator, too: it is seeded from `generator` meanwhile.
    """
    fresh = copied(network)
    for name, module in list(fresh.named_modules()):
        if isinstance(module, MirroredLinear | PairedLinear):
            units, inputs = module.weight.shape
            if isinstance(module, MirroredLinear) and module.shared_bias:
                layer: nn.Linear = SharedBiasLinear(inputs, units)
            else:
                layer = _kind(module)(inputs, units, bias=module.bias is not None)
            fresh.set_submodule(name, layer.to(module.weight))
    with contextlib.nullcontext() if initializer in (initialize, any_weights) else seeded(fresh, generator):
        initializer(fresh, generator)
    return fresh.requires_grad_(True)


def silent_copy(head: nn.Module, generator: torch.Generator, initializer: Initializer = initialize) -> nn.Module:
    """The same architecture with fresh weights that train, whose output is exactly 0 at first: `mirrored`, without an anchor.

    Raises:
        ValueError: the head does not end in two linear layers that follow each other.
    """
    fresh = fresh_copy(head, generator, initializer)
    _silence(fresh, "mirrored", restoring=initializer is any_weights)
    return fresh


def _silence(head: nn.Module, anchor: Anchor, probe: Tensor | None = None, *, restoring: bool = False) -> None:
    """Makes a fresh head's output exactly zero, in place, by its last linear layer (`zero`) or its last two (`mirrored`).

    Whether it is zero is not looked at where only the architecture is wanted.
    """
    unknown = probe_features(head) is None
    linears = [(name, module) for name, module in head.named_modules() if isinstance(module, nn.Linear)]
    needed, ends = (2, "two plain linear layers in a row") if anchor == "mirrored" else (1, "a plain linear layer")
    remedy = f"a fresh one cannot begin at exactly 0; name a head that ends in {ends}, or use growtrain.inject with anchor='frozen'"
    computed = any("weight" not in layer._parameters for _, layer in linears[-needed:])  # parametrized, or with noise
    if len(linears) < needed or linears[-1][0] == "" or computed:
        raise ValueError(f"this head does not end in {ends}: {remedy}")
    output_name, output = linears[-1]
    if anchor == "mirrored" and not _is_plain(output):
        raise ValueError(f"this head ends in a {type(output).__name__}, which is no plain linear layer: {remedy}")
    with torch.no_grad():
        if anchor == "zero":
            output.weight.zero_()
            if output.bias is not None:
                output.bias.zero_()
        else:
            hidden_name, hidden = linears[-2]
            if hidden.out_features != output.in_features:
                raise ValueError(f"this head does not end in {ends}: {remedy}")
            half = hidden.out_features // 2
            for tensor in (hidden.weight, hidden.bias):
                if tensor is not None:
                    tensor[half : 2 * half] = tensor[:half]
            if isinstance(hidden, SpectralLinear):  # which had found the singular vectors of another weight
                hidden.power_iterate(15)
            mirrored = MirroredLinear(output)
            mirrored.cancel()
            head.set_submodule(output_name, mirrored)
            if (unknown or not _is_silent(head, probe)) and type(hidden) in (nn.Linear, HiddenLinear, BatchLinear):
                head.set_submodule(hidden_name, PairedLinear(hidden))
        if restoring:
            return
        if probe is None and unknown:
            raise ValueError(
                "this head does not begin with a linear layer: pass probe=, a batch of its input features (B, F)"
            )
        if not _is_silent(head, probe):
            raise ValueError(f"it cannot be seen that this head gives 0 where its last linear layers do: {remedy}")


def _is_plain(layer: nn.Linear) -> bool:
    """Whether nothing is in a layer but a weight and a bias, and both are drawn, and multiplied, as PyTorch does it."""
    kind = type(layer)
    ours = kind in (SharedBiasLinear, HiddenLinear, BatchLinear)
    theirs = (kind.forward, kind.reset_parameters) == (nn.Linear.forward, nn.Linear.reset_parameters)
    return (
        (ours or theirs) and layer._parameters.keys() == {"weight", "bias"} and not (layer._buffers or layer._modules)
    )


@torch.no_grad()
def _is_silent(head: nn.Module, probe: Tensor | None = None) -> bool:
    """Whether the output is exactly zero, on the CPU; what another device rounds away is for `inject` to verify."""
    if any(p.device.type != "cpu" for p in head.parameters()):
        head = copy.deepcopy(head).cpu()
    if probe is not None:
        batches: list[Tensor | None] = [probe.cpu(), probe[:1].cpu()]
    else:
        batches = [probe_features(head, batch) for batch in _PROBE_BATCHES]
    return all(features is not None and bool(head(features.clone()).abs().max() == 0) for features in batches)
