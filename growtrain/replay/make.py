"""The replay of a configuration, and what it takes."""

import numpy as np
import torch

from growtrain.environments.base import Spec
from growtrain.replay import frames, vectors
from growtrain.replay.frames import FrameRing
from growtrain.replay.ring import LaneRing
from growtrain.replay.vectors import VectorRing
from growtrain.settings.config import Config


def make_ring(config: Config, spec: Spec, *, rng: np.random.Generator, device: torch.device) -> LaneRing:
    """The ring that a run writes and samples; `rng` is what indices are drawn with."""
    capacity, lanes = config.replay_capacity, config.num_envs
    if spec.is_vector:
        size = spec.frame_shape[0]
        return VectorRing(capacity, lanes, rng=rng, size=size, num_actions=spec.num_actions, device=device)
    channels, height, width = spec.frame_shape
    shape = (channels, height, width)
    return FrameRing(capacity, lanes, rng=rng, frame_shape=shape, stack_size=spec.stack_size, device=device)


def replay_bytes(config: Config, spec: Spec) -> int:
    """Bytes that it allocates, without allocating them."""
    capacity, lanes = config.replay_capacity, config.num_envs
    if spec.is_vector:
        return vectors.replay_bytes(capacity, lanes, size=spec.frame_shape[0], num_actions=spec.num_actions)
    channels, height, width = spec.frame_shape
    shape = (channels, height, width)
    return frames.replay_bytes(capacity, lanes, frame_shape=shape, stack_size=spec.stack_size)
