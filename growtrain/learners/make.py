"""The learner of a configuration, and the device that it lives on."""

import torch

from growtrain.environments.base import Spec
from growtrain.learners.base import AbstractLearner
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.sac import SAC
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device of `--device`; raises `ConfigError` where `cuda` was asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no GPU is available to PyTorch here; use --device cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def make_learner(
    config: Config, spec: Spec, *, device: torch.device, generator: torch.Generator | None = None
) -> AbstractLearner:
    """The learner of a configuration at its beginning: SAC of continuous actions, Double DQN of others.

    Args:
        config: of the run.
        spec: what is observed and can be done.
        device: where it lives.
        generator: CPU generator of the initial weights; None where a saved state will replace them.
    """
    generator = generator or torch.Generator()
    if spec.continuous:
        return SAC(config, spec, device=device, generator=generator)
    return DoubleDQN(config, spec, width=config.start_width(), device=device, generator=generator)
