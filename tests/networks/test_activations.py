"""Activations with two outputs for each unit: what defines them, and the widths they give."""

import pytest
import torch
from torch import Tensor, nn

from growtrain.networks.activations import CReLU, Fourier, num_units
from growtrain.networks.encoders import ConvolutionalEncoder
from growtrain.networks.heads import make_head

SHAPES = [(32, 7), (4, 6, 5, 5)]


def units(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_crelu_is_both_parts_and_swaps_them_with_the_sign(shape: tuple[int, ...]) -> None:
    x = units(*shape)
    positive, negative = CReLU()(x).chunk(2, dim=1)
    assert positive.shape == x.shape
    assert (positive >= 0).all()
    assert (negative >= 0).all()
    assert torch.equal(positive - negative, x)  # nothing is lost: no unit can fall silent
    assert torch.equal(CReLU()(-x), torch.cat([negative, positive], dim=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_fourier_features_lie_on_the_unit_circle(shape: tuple[int, ...]) -> None:
    x = units(*shape)
    sine, cosine = Fourier()(x).chunk(2, dim=1)
    assert torch.allclose(sine.square() + cosine.square(), torch.ones(()))
    assert torch.allclose(torch.atan2(sine, cosine), torch.remainder(x + torch.pi, 2 * torch.pi) - torch.pi, atol=1e-6)


def test_widths_by_hand() -> None:
    """(units, inputs) of every layer: CReLU doubles what follows; Fourier features halve the units, so that what follows stays."""
    expected = {
        "relu": [(32, 4), (64, 32), (64, 64), (512, 3136), (6, 512)],
        "crelu": [(32, 4), (64, 64), (64, 128), (512, 6272), (6, 1024)],
        "fourier": [(16, 4), (32, 32), (32, 64), (256, 3136), (6, 512)],
    }
    for activation, widths in expected.items():
        encoder = ConvolutionalEncoder((4, 84, 84), activation=activation)  # type: ignore[arg-type]
        head = make_head(encoder.num_features, 512, 6, activation=activation)  # type: ignore[arg-type]
        layers = [m for part in (encoder, head) for m in part.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert [tuple(layer.weight.shape[:2]) for layer in layers] == widths
        frames = torch.zeros((2, 4, 84, 84), dtype=torch.uint8)
        assert head(encoder(frames)).shape == (2, 6)
    assert num_units(33, "fourier") == 17


def test_a_normalized_encoder_normalizes_before_every_non_linearity() -> None:
    encoder = ConvolutionalEncoder((4, 84, 84), 0.25, normalized=True)
    kinds = [type(layer) for layer in encoder.layers]
    assert kinds == [nn.Conv2d, nn.GroupNorm, nn.ReLU] * 3
    frames = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = []
    encoder.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    encoder(frames)
    assert torch.allclose(seen[0].flatten(1).mean(1), torch.zeros(()), atol=1e-5)
    assert torch.allclose(seen[0].flatten(1).std(1), torch.ones(()), rtol=1e-2)
