"""Which library computes the products of hidden layers."""

from collections.abc import Iterator

import pytest
import torch

from growtrain.networks.heads import multiplied_by_onednn


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def by_onednn(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether oneDNN computes the products, whatever this processor would have chosen."""
    if request.param and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("PyTorch without oneDNN")
    with multiplied_by_onednn(request.param):
        yield bool(request.param)
