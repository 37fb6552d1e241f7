"""What a run ran on."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch

from growtrain.runs import provenance


def test_a_package_that_was_never_installed_is_said_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(package: str) -> str:
        if package == "growtrain":  # imported from its directory
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(provenance, "version", installed)
    assert provenance.versions()["growtrain"] == "not installed"
    assert provenance.versions()["torch"] == version("torch")


def test_a_resume_on_another_instruction_set_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(capability: str) -> dict[str, Any]:
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
        return provenance.describe_machine(torch.device("cpu"))

    before, after = on("AVX512"), on("AVX2")
    assert provenance.differences(before, before) == []
    assert [("AVX512" in text, "AVX2" in text) for text in provenance.differences(before, after)] == [(True, True)]
