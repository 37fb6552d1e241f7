"""The learner of a configuration, and the device that it lives on."""

import torch

from growtrain.settings.text import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device of `--device`; raises `ConfigError` where `cuda` was asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no GPU is available to PyTorch here; use --device cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
