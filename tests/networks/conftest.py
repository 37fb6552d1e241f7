"""Which library computes the products of hidden layers."""

import pytest
import torch

from growtrain.networks import heads


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN computes the products, whatever this processor would have chosen."""
    if request.param and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(heads, "_BY_ONEDNN", request.param)
    return bool(request.param)
