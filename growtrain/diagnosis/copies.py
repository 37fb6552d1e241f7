"""The learning test of a checkpoint: its learner and replay rebuilt, and copies of the network compared on them."""

from collections.abc import Callable

import numpy as np
import torch

from growtrain.environments.base import Spec
from growtrain.learners.make import make_learner
from growtrain.learners.saved import read_saved
from growtrain.plasticity.learning_test import Copy, LearningTest, compare_copies, copies_of
from growtrain.replay.make import make_ring
from growtrain.runs.checkpoint import Checkpoint


def copies_of_checkpoint(checkpoint: Checkpoint) -> list[Copy]:
    """The copies of a checkpoint's network that its learning test compares."""
    return copies_of(checkpoint.config, encoder_frozen=read_saved(checkpoint.state["learner"]).encoder_frozen)


def compare_copies_of(
    checkpoint: Checkpoint, test: LearningTest, device: torch.device, stop: Callable[[], bool | str] = lambda: False
) -> dict[Copy, list[list[float]]]:
    """The errors of every copy of a checkpoint's network, see `copies_of_checkpoint`: one list a seed, one error a mark.

    The checkpoint's state is read and kept. `stop` is asked before each copy of each seed.

    Raises:
        ValueError: the replay holds too little.
        Interrupted: it was to stop.
    """
    config, state = checkpoint.config, checkpoint.state
    spec = Spec.from_dict(state["spec"])
    ring = make_ring(config, spec, rng=np.random.default_rng(0), device=device)
    ring.load_state_dict(state["ring"])
    checkpoint.load_frames(ring)
    learner = make_learner(config, spec, device=device)
    learner.load_state_dict(state["learner"])
    return compare_copies(
        learner, ring, test, np.random.SeedSequence(config.entropy), copies_of_checkpoint(checkpoint), stop
    )
