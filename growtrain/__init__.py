"""growtrain: deep-RL training that starts with a small network and grows it by plasticity injection."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growtrain import diagnostics as diagnostics
    from growtrain.growth.freezing import inject_network as inject_network
    from growtrain.growth.inject import inject as inject
    from growtrain.networks.injected import InjectedHead as InjectedHead
    from growtrain.networks.snapshot import InjectedNetwork as InjectedNetwork
    from growtrain.records import GrowthEvent as GrowthEvent
    from growtrain.runs.loop import train as train
    from growtrain.settings.config import Config as Config

_PUBLIC = {
    "Config": "growtrain.settings.config",
    "GrowthEvent": "growtrain.records",
    "InjectedHead": "growtrain.networks.injected",
    "InjectedNetwork": "growtrain.networks.snapshot",
    "inject_network": "growtrain.growth.freezing",
    "inject": "growtrain.growth.inject",
    "train": "growtrain.runs.loop",
}
__all__ = [
    "Config",
    "GrowthEvent",
    "InjectedHead",
    "InjectedNetwork",
    "diagnostics",
    "inject",
    "inject_network",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used, so that `--help` and wrong flags answer at once."""
    import importlib

    if name == "diagnostics":
        return importlib.import_module("growtrain.diagnostics")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
