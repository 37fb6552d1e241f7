"""An injection into a live learner's head, whose only setting is the anchor: what most tests of growth do."""

import torch

from growtrain.growth.transaction import Inputs, apply
from growtrain.learners.base import AbstractLearner
from growtrain.records import GrowthEvent
from growtrain.settings.config import Anchor, Config


def grow(
    learner: AbstractLearner,
    observations: Inputs,
    *,
    anchor: Anchor,
    generator: torch.Generator,
    freeze_encoder: bool = False,
    frames: int | None = None,
) -> GrowthEvent:
    return apply(
        learner,
        "inject",
        observations,
        config=Config(anchor=anchor),
        generator=generator,
        freeze_encoder=freeze_encoder,
        frames=frames,
    )
