"""Heads h_theta: from features to action values; their layers and their initialisation.

Source: Nature DQN's two last layers (Mnih et al. 2015); the shared output bias of the tuned Double DQN (van Hasselt et al. 2016), as in
DQN Zoo; spectral normalisation of the penultimate layer (Gogianu et al. 2021).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.flop_counter import register_flop_formula

from growtrain.networks.activations import make_activation, num_units, outputs_per_unit
from growtrain.settings.config import Activation, Normalization, OutputBias

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
# Where there is AVX-512, which MKL leaves unused on AMD's processors. Elsewhere MKL is as fast for large layers; for a batch of 32 and 1024
# features it takes half as long with 32 units and three quarters with 128, and for 256 rows three quarters.
_by_onednn_here = _HAS_ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512"


@contextlib.contextmanager
def multiplied_by_onednn(wanted: bool) -> Iterator[None]:
    """Within it oneDNN computes the products of hidden layers on a CPU, or what computes all others, whatever suits this processor."""
    global _by_onednn_here
    suits, _by_onednn_here = _by_onednn_here, wanted
    try:
        yield
    finally:
        _by_onednn_here = suits


def _is_by_onednn(features: Tensor) -> bool:
    return _by_onednn_here and features.device.type == "cpu" and features.dtype == torch.float32


def _flops(a: torch.Size, b: torch.Size, *_: object, **__: object) -> int:
    return 2 * a[0] * a[1] * b[0]


_library = torch.library.Library("growtrain", "DEF")  # type: ignore[no-untyped-call]
_library.define("matrix_product(Tensor a, Tensor b) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.register_fake("growtrain::matrix_product", lib=_library)  # type: ignore[untyped-decorator]
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


def _product(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.ops.growtrain.matrix_product(a, b) if torch.compiler.is_compiling() else _by_onednn(a, b)
    return product


_library.impl("matrix_product", _by_onednn, "CPU")  # type: ignore[no-untyped-call]
# What differentiates it is around it.
_library.impl("matrix_product", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
if _HAS_ONEDNN:  # PyTorch's counter takes them for free
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
    register_flop_formula(torch.ops.growtrain.matrix_product)(_flops)


class _MatrixProduct(torch.autograd.Function):
    """The product with a graph; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _product(a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        return (
            matrix_product(gradient, b.t()) if needs_a else None,
            matrix_product(gradient.t(), a.t()) if needs_b else None,
        )


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """A B^T by oneDNN on a CPU: (M, K), (N, K) -> (M, N) float32.

    `torch.mm` asks MKL, which on AMD's processors does not use their AVX-512: for a hidden layer of 512 on 3136 features and 32 rows oneDNN
    takes less than half as long, forward and backward. For plain float32 tensors PyTorch offers it only
    through the operator that its compiler emits. What is compiled calls it through an operator of ours, which the compiler leaves as it is;
    its own it would give copies of transposed operands.
    """
    if not torch.is_grad_enabled():
        return _product(a, b)
    product: Tensor = _MatrixProduct.apply(a, b)  # type: ignore[no-untyped-call]
    return product


def hidden_linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` for few rows and a large weight: (B, F), (H, F), (H,) -> (B, H).

    On a CPU with AVX-512 oneDNN computes it, and the other way round, (H, F) x (F, B): at batch 32 and 3136 features a fifth
    faster than (B, F) x (F, H).
    """
    if not _is_by_onednn(features):
        return F.linear(features, weight, bias)
    return (matrix_product(weight, features) + bias[:, None]).t()


class HiddenLinear(nn.Linear):
    """A linear layer with a bias, computed by `hidden_linear`: (B, F) -> (B, H)."""

    def forward(self, input: Tensor) -> Tensor:
        """The product plus the bias."""
        return hidden_linear(input, self.weight, self.bias)


class _BiasedProduct(torch.autograd.Function):
    """A W^T + b by oneDNN on a CPU, (B, F), (H, F), (H,) -> (B, H) float32; see `_MatrixProduct`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(a, weight)
        if torch.compiler.is_compiling():  # which adds the bias on the way through memory
            return _product(a, weight) + bias
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a, weight = ctx.saved_tensors
        needs_a, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            matrix_product(gradient, weight.t()) if needs_a else None,
            matrix_product(gradient.t(), a.t()) if needs_weight else None,
            gradient.sum(0) if needs_bias else None,
        )


class BatchLinear(nn.Linear):
    """A linear layer with a bias for many rows: (B, F) -> (B, H), by oneDNN on a CPU with AVX-512.

    At 256 rows and 256 units that takes half as long as MKL there, forward and backward. Rows stay rows, which a non-linearity's backward
    pass wants, and must lie side by side, or oneDNN takes ten times as long.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The product plus the bias."""
        if not _is_by_onednn(input):
            return F.linear(input, self.weight, self.bias)
        product: Tensor = _BiasedProduct.apply(input.contiguous(), self.weight, self.bias)  # type: ignore[no-untyped-call]
        return product


class SharedBiasLinear(nn.Linear):
    """A linear layer whose outputs share one scalar bias: (B, F) -> (B, A)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        """The product plus the shared bias."""
        return F.linear(input, self.weight, self.bias.expand(self.out_features))


class SpectralLinear(nn.Linear):
    """A linear layer whose weight is divided by an estimate of its largest singular value: (B, F) -> (B, H).

    The forward pass is pure: the power iteration is a separate step, `power_iterate`, that the learner takes once per update for layers
    that train. A frozen layer therefore never moves.
    """

    left: Tensor
    right: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("left", F.normalize(torch.ones(out_features), dim=0))
        self.register_buffer("right", F.normalize(torch.ones(in_features), dim=0))

    @torch.no_grad()
    def power_iterate(self, steps: int = 1) -> None:
        """Improves the estimate of the leading singular vectors in place."""
        for _ in range(steps):
            self.right.copy_(F.normalize(self.weight.T @ self.left, dim=0))
            self.left.copy_(F.normalize(self.weight @ self.right, dim=0))

    def forward(self, input: Tensor) -> Tensor:
        """The product with the normalised weight, plus the bias."""
        sigma = torch.dot(self.left, self.weight @ self.right)
        return hidden_linear(input, self.weight / sigma, self.bias)


class ConvolutionalHead(nn.Sequential):
    """A head that begins with convolutions: (B, C, H, W) -> (B, A); it knows the (C, H, W) that its layers do not.

    Its convolutions are flattened in channel-major order before the first linear layer.
    """

    def __init__(self, input_shape: tuple[int, int, int], *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.input_shape = input_shape


def make_head(
    num_features: int,
    width: int,
    num_actions: int,
    *,
    normalization: Normalization = "none",
    output_bias: OutputBias = "per_action",
    activation: Activation = "relu",
) -> nn.Sequential:
    """The last two layers: Linear, normalisation, activation, Linear; (B, num_features) -> (B, num_actions)."""
    units = num_units(width, activation)
    hidden = SpectralLinear(num_features, units) if normalization == "spectral" else HiddenLinear(num_features, units)
    norm = [nn.LayerNorm(units)] if normalization == "layer" else []
    outputs = outputs_per_unit(activation) * units
    output = SharedBiasLinear(outputs, num_actions) if output_bias == "shared" else nn.Linear(outputs, num_actions)
    return nn.Sequential(hidden, *norm, make_activation(activation), output)


def make_vector_head(
    num_inputs: int,
    first_width: int,
    width: int,
    num_outputs: int,
    *,
    normalization: Normalization = "none",
    activation: Activation = "relu",
) -> nn.Sequential:
    """All of a network of vectors: a hidden layer of `first_width`, then those of `make_head`; (B, num_inputs) -> (B, num_outputs)."""
    units = num_units(first_width, activation)
    norm = [nn.LayerNorm(units)] if normalization == "layer" else []
    features = outputs_per_unit(activation) * units
    head = make_head(
        features, width, num_outputs, normalization=normalization, output_bias="per_action", activation=activation
    )
    hidden = BatchLinear(features, num_units(width, activation))
    return nn.Sequential(BatchLinear(num_inputs, units), *norm, make_activation(activation), hidden, *list(head)[1:])


_PLAIN_RESETS = (nn.Linear.reset_parameters, nn.Conv2d.reset_parameters)


def initialize(module: nn.Module, generator: torch.Generator) -> None:
    """Fresh weights in place, drawn from `generator` on the CPU, the same on every device.

    Linear and convolutional layers: weights and biases U(+-1/sqrt(fan_in)), which is DQN Zoo's initialisation and PyTorch's default;
    where `torch.nn.utils.parametrize` computes one from others, those that give it (an orthogonal one: the nearest that can be).
    Other layers with parameters, and subclasses of those that have a `reset_parameters` of their own: by that, within `seeded`.

    Raises:
        ValueError: a layer holds parameters and cannot be initialised (no `reset_parameters` that draws them all, a parametrization
            without `right_inverse`).
    """
    parametrizations: set[nn.Module] = set()
    for name, layer in module.named_modules():
        own = list(layer.parameters(recurse=False))
        if parametrize.is_parametrized(layer):
            assert isinstance(layer.parametrizations, nn.ModuleDict)
            parametrizations.update(layer.parametrizations.modules())
            with torch.no_grad():
                _initialize_parametrized(name, layer, generator)
        if not own or layer in parametrizations:
            continue
        with torch.no_grad():
            plain = isinstance(layer, nn.Linear | nn.Conv2d) and type(layer).reset_parameters in _PLAIN_RESETS
            if plain and layer._parameters.keys() <= {"weight", "bias"}:
                bound = layer.weight[0].numel() ** -0.5
                for tensor in own:
                    drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))
                if isinstance(layer, SpectralLinear):
                    for vector in (layer.left, layer.right):
                        drawn = torch.empty(vector.shape, device="cpu").normal_(generator=generator)
                        vector.copy_(F.normalize(drawn, dim=0))
                    layer.power_iterate(15)
            elif not plain and callable(reset := getattr(layer, "reset_parameters", None)):
                _reset(name or type(layer).__name__, layer, reset, generator)
            else:
                raise ValueError(
                    f"layer {name or type(layer).__name__!r} has parameters but no reset_parameters() of its own: add one"
                )


@contextlib.contextmanager
def seeded(module: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Meanwhile the global generator, and those of the GPUs that a module is on, are seeded from another; then they are as before."""
    gpus = sorted({p.device.index for p in module.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=gpus):
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        for each in (torch.default_generator, *(torch.cuda.default_generators[index] for index in gpus)):
            each.manual_seed(seed)
        yield


def _reset(name: str, layer: nn.Module, reset: Callable[[], object], generator: torch.Generator) -> None:
    """Resets a layer by its own means; raises `ValueError` where that leaves what was learned."""
    noise = torch.Generator().manual_seed(0)
    own = dict(layer.named_parameters(recurse=False))
    before = {path: torch.rand(p.shape, generator=noise, device="cpu").to(p) for path, p in own.items()}
    for path, drawn in before.items():
        own[path].copy_(drawn)
    with seeded(layer, generator):
        reset()
    for path, drawn in before.items():
        if drawn.numel() and torch.equal(layer.get_parameter(path), drawn):
            raise ValueError(f"reset_parameters() of layer {name!r} leaves {path!r} as it was: have it draw that, too")


def _initialize_parametrized(name: str, layer: nn.Module, generator: torch.Generator) -> None:
    """Gives every tensor that parametrizations compute for a linear or convolutional layer a fresh value, in place."""
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    training = layer.training
    for tensor_name in layer.parametrizations:
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(
                f"layer {name!r} has a parametrized {tensor_name}: parametrize linear or convolutional layers"
            )
        bound = layer.weight[0].numel() ** -0.5
        old = getattr(layer, tensor_name)
        drawn = torch.empty(old.shape, dtype=old.dtype, device="cpu").uniform_(-bound, bound, generator=generator)
        try:
            setattr(layer, tensor_name, drawn.to(old.device))
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"the parametrization of {tensor_name!r} of layer {name!r} cannot be given a fresh value: "
                f"add a right_inverse to it ({error})"
            ) from error
        layer.train()  # estimates that a parametrization keeps beside it, such as singular vectors, move in training mode
        for _ in range(15):
            getattr(layer, tensor_name)
    layer.train(training)
