"""The product of hidden layers: against float64 and against `F.linear`, forward, backward and twice backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import NoisyLinear

from growtrain.networks.heads import BatchLinear, HiddenLinear, hidden_linear, initialize, matrix_product

SHAPES = [(1, 96, 33), (8, 3136, 512), (32, 3136, 512), (32, 77, 130), (5, 1568, 1)]


def operands(batch: int, inputs: int, units: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + inputs + units)
    features, weight, bias = (
        torch.randn(size, generator=generator) for size in ((batch, inputs), (units, inputs), (units,))
    )
    return [tensor.requires_grad_() for tensor in (features, weight * inputs**-0.5, bias)]


def gradients(outputs: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs.square().sum(), inputs)


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_linear_and_its_gradients_are_those_of_a_linear_layer(shape: tuple[int, int, int]) -> None:
    given = [tensor.detach().requires_grad_() for tensor in operands(*shape)]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    out, expected = hidden_linear(*given), F.linear(*exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, oracle in zip(gradients(out, given), gradients(expected, exact), strict=True):
        torch.testing.assert_close(gradient.double(), oracle, rtol=1e-5, atol=1e-5 * float(oracle.abs().max()))


@pytest.mark.parametrize("shape", [(256, 256, 256), (256, 23, 256), (3, 256, 7)])
def test_a_layer_for_many_rows_and_its_gradients_are_those_of_a_linear_layer(
    shape: tuple[int, int, int], by_onednn: bool
) -> None:
    layer = BatchLinear(*shape[1:])
    given = operands(*shape)[0].detach()[:, torch.randperm(shape[1])].requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (given, *layer.parameters())]
    out, expected = layer(given), F.linear(*exact)
    assert (type(out.grad_fn).__name__ == "_BiasedProductBackward") == by_onednn
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, oracle in zip(gradients(out, [given, *layer.parameters()]), gradients(expected, exact), strict=True):
        torch.testing.assert_close(gradient.double(), oracle, rtol=1e-5, atol=1e-5 * float(oracle.abs().max()))


def test_operands_in_any_layout() -> None:
    a, b = torch.randn(24, 40), torch.randn(16, 80)
    for left, right in ((a, b[:, ::2]), (a.t().contiguous().t(), b[:, 40:]), (a[:, :1].expand(24, 40), b[:, :40])):
        torch.testing.assert_close(matrix_product(left, right), left @ right.t(), rtol=1e-5, atol=1e-4)
    column = torch.randn(16, 1).expand(16, 40)
    torch.testing.assert_close(matrix_product(a, column), a @ column.t(), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("by_onednn")
def test_gradients_of_gradients() -> None:
    def gradient_norms(product: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        features, weight, bias = (tensor.detach().requires_grad_() for tensor in operands(8, 64, 32))
        out = product(features, weight, bias).tanh()
        first = torch.autograd.grad(out.square().sum(), (features, weight, bias), create_graph=True)
        norm = sum((each.square().sum() for each in first), torch.zeros(()))
        return torch.autograd.grad(norm, (features, weight, bias))

    for own, reference in zip(gradient_norms(hidden_linear), gradient_norms(F.linear), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("by_onednn")
def test_only_what_needs_a_gradient_gets_one() -> None:
    features, weight, bias = operands(8, 64, 32)
    layer = HiddenLinear(64, 32).requires_grad_(False)
    leaf = features.detach().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None
    assert layer.weight.grad is None
    with torch.no_grad():
        assert not hidden_linear(features, weight, bias).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_pytorch(dtype: torch.dtype) -> None:
    given = [tensor.detach().to(dtype) for tensor in operands(8, 64, 32)]
    assert torch.equal(hidden_linear(*given), F.linear(*given))


@pytest.mark.usefixtures("compiling")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_compiled_has_one_operator_for_the_product_and_the_same_gradients(by_onednn: bool) -> None:
    """PyTorch's compiler cannot take a product by oneDNN that it has not made itself."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        del inputs
        graphs.append(graph.code)
        return graph

    layer, features = HiddenLinear(64, 32), operands(8, 64, 32)[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(features), layer(features))
    assert ("growtrain.matrix_product" in graphs[0]) == by_onednn
    assert "mkldnn" not in graphs[0]

    gradients = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        given = features.detach().requires_grad_()
        gradients.append(torch.autograd.grad(call(given).square().sum(), [given, *layer.parameters()]))
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, compiled)


@pytest.mark.parametrize("widths", [(64, 64), (512, 512, 512), (128, 32)])
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.usefixtures("by_onednn")
def test_layers_side_by_side_are_bit_for_bit_the_layers(widths: tuple[int, ...], batch: int) -> None:
    """What lets a frozen bank compute all its hidden layers in one product; of odd widths MKL rounds a single row differently."""
    parts = [operands(batch, 3136, width) for width in widths]
    features = parts[0][0]
    together = hidden_linear(features, torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]))
    apart = [hidden_linear(features, weight, bias) for _, weight, bias in parts]
    assert torch.equal(together, torch.cat(apart, dim=1))


class Orthogonal(nn.Conv2d):
    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def test_layers_that_initialize_themselves_otherwise_than_pytorch_s_do_so_from_the_generator() -> None:
    def fresh(seed: int) -> nn.Sequential:
        layers = nn.Sequential(NoisyLinear(16, 8), Orthogonal(4, 8, 1), nn.Linear(8, 8), nn.LayerNorm(8))
        with torch.no_grad():
            for parameter in layers.parameters():
                parameter.fill_(torch.nan)
        before = torch.get_rng_state()
        initialize(layers, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        return layers.requires_grad_(False)

    layers, again, other = fresh(0), fresh(0), fresh(1)
    noisy, orthogonal = layers[0], layers[1]
    assert torch.equal(noisy.weight_sigma, torch.full((8, 16), 0.5 / 4))
    assert 0 < float(noisy.weight_mu.abs().max()) <= 1 / 4
    torch.testing.assert_close(orthogonal.weight.flatten(1).T @ orthogonal.weight.flatten(1), torch.eye(4))
    assert torch.equal(orthogonal.bias, torch.zeros(8))
    assert all(map(torch.equal, layers.parameters(), again.parameters()))
    for index, name in ((0, "weight_mu"), (1, "weight"), (2, "weight")):
        assert not torch.equal(getattr(layers[index], name), getattr(other[index], name))
