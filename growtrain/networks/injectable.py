"""What plasticity injection asks of a head (Nikishin et al. 2023, section 4): a function of its features that is linear at its end.

An injected head answers a sum of outputs. That is an output of the same kind only if the head is linear in what its last weights give: of
action values or logits it is, of probabilities, or anything else that a non-linearity has the last word on, it is not.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

from growtrain.networks.heads import ConvolutionalHead
from growtrain.networks.paired import PairedLinear


@contextlib.contextmanager
def kept_buffers(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Meanwhile a forward pass may change buffers, as BatchNorm's in training mode does; then they are as before. Gives copies by name."""
    buffers = dict(network.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, buffer in buffers.items():
                path, _, own = name.rpartition(".")
                network.get_submodule(path)._buffers[own] = buffer
                if not torch.equal(buffer, before[name]):
                    buffer.copy_(before[name])


def check_deterministic(network: nn.Module, what: str = "layer") -> None:
    """Raises `ValueError`, with the remedy, if a layer's output depends on more than its own input and weights."""
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            raise ValueError(
                f"{what} {name!r} is BatchNorm in training mode: its copies would not agree; use LayerNorm, or .eval() "
                "(in a head with anchor='mirrored' or 'zero')"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"{what} {name!r} is dropout in training mode: its copies would not agree; remove it or use .eval()"
            )


def check_alike_in_training(head: nn.Module) -> None:
    """Raises `ValueError` if a live head and its anchor, which stays in evaluation mode, would part in training mode."""
    for name, module in head.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            raise ValueError(
                f"head layer {name!r} is {type(module).__name__}, whose live head would not be what its frozen anchor is after .train(): "
                "use anchor='mirrored' or 'zero', or LayerNorm"
            )


def check_injectable(head: nn.Module, features: Tensor | None = None) -> None:
    """Raises `ValueError`, with the remedy, if injection is pointless or wrong for this head.

    Pointless: no parameters, or an affine head (then it equals continuing with fresh optimizer slots). Wrong: BatchNorm or dropout in
    training mode, or anything else that a forward pass changes, since the copies would not agree; a non-linearity at the end.

    Args:
        head: any module from features to action values.
        features: a batch (B, F) as it takes them; None: drawn, where its first layer tells their shape.
    """
    if not any(True for _ in head.parameters()):
        raise ValueError(
            "this head has no parameters: nothing could be injected; name the module that holds the last layers"
        )
    check_deterministic(head, "head layer")
    features = probe_features(head) if features is None else features
    if features is None:
        return
    _check_purity(head, features)
    if _is_affine(head, features):
        raise ValueError(
            "this head is affine (one linear layer?): injection would equal continuing with fresh optimizer slots; "
            "name a head with a hidden layer and a non-linearity, with the layer before it if need be: "
            "head='network.7:' is a Sequential from its layer 7 on, head=('features.fc', 'q') two modules in a row"
        )
    if not _is_linear_at_its_end(head, features):
        raise ValueError(
            "this head ends in a non-linearity (softmax, tanh, a clamp?): a sum of its outputs is no longer of its kind; "
            "name a head that ends in a linear layer and apply the non-linearity to its output, outside it"
        )


@torch.no_grad()
def _is_affine(head: nn.Module, features: Tensor) -> bool:
    """Whether f(x + y) + f(0) is f(x) + f(y) everywhere it was tried; of a constant, as dead units make it, its architecture is asked."""

    def outputs(of: nn.Module) -> tuple[Tensor, Tensor]:
        x, y = features, features.flip(0)
        at_x, at_y, at_sum, at_0 = of(x.clone()), of(y.clone()), of(x + y), of(torch.zeros_like(x))
        return (at_sum + at_0 - at_x - at_y).abs().max(), (at_x - at_0).abs().max()

    bent, moved = outputs(head)
    if moved == 0:
        alive, generator = copy.deepcopy(head), torch.Generator().manual_seed(0)
        for tensor in (p for p in alive.parameters() if p.is_floating_point()):
            tensor.copy_(2 * torch.rand(tensor.shape, generator=generator, device="cpu") - 1)
        bent, moved = outputs(alive)
    return bool(bent <= 1e-5 * moved)


@torch.no_grad()
def _check_purity(head: nn.Module, features: Tensor) -> None:
    """Raises `ValueError` if the output is no tensor, or if a forward pass changes a buffer; the buffers are put back."""
    with kept_buffers(head) as before:
        try:
            output = head(features.clone())
        except TypeError as error:
            raise ValueError(
                f"this head does not take one tensor of features ({error}): hold the layers behind the place where its inputs are joined "
                "in an nn.Sequential, have forward() call that, and name it in head="
            ) from error
        except RuntimeError as error:
            raise ValueError(
                f"this head does not take features of shape {tuple(features.shape)}: "
                f"pass probe=, a batch of its input ({error})"
            ) from error
        changed = [name for name, buffer in head.named_buffers() if not torch.equal(buffer, before[name])]
    if changed:
        raise ValueError(
            f"head buffer {changed[0]!r} changes in every forward pass: copies of the head would not agree; "
            "use .eval(), or a layer whose forward pass changes nothing"
        )
    if not isinstance(output, Tensor):
        raise ValueError(
            f"this head returns {type(output).__name__}, not a tensor: name the module that gives the values (B, A)"
        )


def _is_linear_at_its_end(head: nn.Module, features: Tensor) -> bool:
    """Whether the output is affine in the products of which no other product is made: a + b in their place gives what a and b give.

    Any architecture: the products are found as they are computed. They are replaced by random numbers of several magnitudes, so that a
    clamp shows that these features would not reach.
    """
    products = _LastProducts()
    with torch.enable_grad(), products:
        leaf = features.detach().clone().requires_grad_(features.is_floating_point())
        products.found(head(leaf.clone()))  # whose first layer may work in place
    if not products.last:
        return True  # it computes by other means; the sum of its copies is verified, its kind cannot be
    generator = torch.Generator().manual_seed(0)
    like = next(head.parameters())
    finfo = torch.finfo(like.dtype)
    tolerance = min(1e3 * finfo.eps, 0.05)
    for magnitude in (each for each in (1.0, 1e2, 1e4, 1e6) if each < finfo.max**0.5):
        a, b = (
            [
                (magnitude * (2 * torch.rand(shape, generator=generator, device="cpu") - 1)).to(like)
                for shape in products.shapes
            ]
            for _ in range(2)
        )
        outputs = [
            _with_products(head, features, dict(zip(products.last, values, strict=True)))
            for values in (a, b, [x + y for x, y in zip(a, b, strict=True)], [torch.zeros_like(x) for x in a])
        ]
        at_a, at_b, at_sum, at_0 = outputs
        scale = max(float(output.abs().max()) for output in outputs)
        if not float((at_sum + at_0 - at_a - at_b).abs().max()) <= tolerance * scale:  # nor is NaN
            return False
    return True


@torch.no_grad()
def _with_products(head: nn.Module, features: Tensor, values: dict[int, Tensor]) -> Tensor:
    """The output with these values in place of products, by the order in which they are computed; randomness is drawn alike every time."""
    with torch.random.fork_rng(devices=[]), _Products(values):
        torch.default_generator.manual_seed(0)
        output: Tensor = head(features.clone())
    return output


_PRODUCTS: tuple[Callable[..., Any], ...] = (
    *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm),
)


class _Products(TorchFunctionMode):
    """Counts the products that are computed, and puts given values in the place of some."""

    def __init__(self, values: dict[int, Tensor] | None = None) -> None:
        super().__init__()
        self.values = values or {}
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            output = self.see(args, self.values.get(self.count, output))
            self.count += 1
        return output

    def see(self, operands: tuple[Any, ...], output: Tensor) -> Tensor:
        """The product as it is to be."""
        del operands
        return output


class _LastProducts(_Products):
    """Finds the products of which no other product is made: their places in the order of computation, and their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.operands: list[Tensor] = []
        self.last: list[int] = []
        self.shapes: list[torch.Size] = []

    def see(self, operands: tuple[Any, ...], output: Tensor) -> Tensor:
        self.operands += [each for each in operands if isinstance(each, Tensor) and each.grad_fn is not None]
        self.outputs.append(output)
        return output

    def found(self, output: Tensor) -> None:
        """Looks through the graph of the head's output."""
        for place, product in enumerate(self.outputs):
            if product.grad_fn is None or not _depends(output, product):
                continue
            if not any(_depends(operand, product) for operand in self.operands):
                self.last.append(place)
                self.shapes.append(product.shape)


def _depends(tensor: Tensor, on: Tensor) -> bool:
    """Whether the autograd graph leads from one tensor to the other."""
    goal, seen, waiting = on.grad_fn, set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is goal:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return False


def probe_features(head: nn.Module, batch: int = 32) -> Tensor | None:
    """Random features (batch, F), or (batch, C, H, W) for a `ConvolutionalHead`; None where their shape cannot be known.

    Every other row is non-negative, as features behind a ReLU are.
    """
    kinds = ConvolutionalHead | nn.Linear | PairedLinear | nn.Conv2d
    first = next((module for module in head.modules() if isinstance(module, kinds)), None)
    if first is None or isinstance(first, nn.Conv2d):
        return None
    if isinstance(first, ConvolutionalHead):
        shape: tuple[int, ...] = first.input_shape
    else:  # asked of a weight that is parametrized, its shape would cost its computation
        shape = (first.in_features if isinstance(first, nn.Linear) else first.weight.shape[1],)
    drawn = torch.rand((batch, *shape), generator=torch.Generator().manual_seed(0), device="cpu")
    drawn[1::2] = 2 * drawn[1::2] - 1
    return drawn.to(next(first.parameters()))
