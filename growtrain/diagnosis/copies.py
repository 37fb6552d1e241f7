"""The learning test of a checkpoint: its learner and replay rebuilt, and copies of the network compared on them."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from growtrain.diagnosis.page import settings_of_part
from growtrain.environments.base import Spec
from growtrain.learners.base import AbstractLearner
from growtrain.learners.make import make_learner
from growtrain.learners.saved import read_saved
from growtrain.plasticity.learning_test import Copy, LearningTest, compare_copies, copies_of
from growtrain.replay.make import make_ring
from growtrain.replay.ring import LaneRing
from growtrain.runs.checkpoint import Checkpoint


def copies_of_checkpoint(checkpoint: Checkpoint, part: str = "") -> list[Copy]:
    """The copies of a checkpoint's network that its learning test compares; `part` is one of `parts_of`."""
    frozen = read_saved(checkpoint.state["learner"]).encoder_frozen
    return copies_of(checkpoint.config, encoder_frozen=frozen, network=part)


def parts_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The parts of a checkpoint's learner that are diagnosed apart: critic and actor; of a Q-network one without a name."""
    return ("critic", "actor") if checkpoint.config.continuous else ("",)


def agent_of(checkpoint: Checkpoint, device: torch.device) -> tuple[AbstractLearner, LaneRing]:
    """A checkpoint's learner and replay rebuilt; its state is read and kept."""
    config, state = checkpoint.config, checkpoint.state
    spec = Spec.from_dict(state["spec"])
    ring = make_ring(config, spec, rng=np.random.default_rng(0), device=device)
    ring.load_state_dict(state["ring"])
    checkpoint.load_frames(ring)
    learner = make_learner(config, spec, device=device)
    learner.load_state_dict(state["learner"])
    return learner, ring


def compare_copies_of(
    checkpoint: Checkpoint,
    test: LearningTest,
    device: torch.device,
    stop: Callable[[], bool | str] = lambda: False,
    part: str = "",
) -> dict[Copy, list[list[float]]]:
    """The errors of every copy of a checkpoint's network, see `copies_of_checkpoint`: one list a seed, one error a mark.

    The checkpoint's state is read and kept. `stop` is asked before each copy of each seed. `part` is one of `parts_of`; of the two critics
    the first is tested.

    Raises:
        ValueError: the replay holds too little.
        Interrupted: it was to stop.
    """
    learner, ring = agent_of(checkpoint, device)
    # What is tested is the intervention that a fork, or a rescue, has.
    learner.config = dataclasses.replace(learner.config, **settings_of_part(part, "inject"))
    network = next(name for name in learner.networks if name.startswith(part))
    seeds = np.random.SeedSequence(checkpoint.config.entropy)
    return compare_copies(learner, ring, test, seeds, copies_of_checkpoint(checkpoint, part), stop, network)
