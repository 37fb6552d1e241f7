"""What a run ran on."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from growtrain import provenance


def test_a_package_that_was_never_installed_is_said_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(package: str) -> str:
        if package == "growtrain":  # imported from its directory
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(provenance, "version", installed)
    assert provenance.versions()["growtrain"] == "not installed"
    assert provenance.versions()["torch"] == version("torch")
