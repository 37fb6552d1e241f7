"""Updates in a graph against updates without one, by a graph that is played on the CPU (`recorded_graph`)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recorded_graph
import torch

from growtrain.environments.atari import make_spec
from growtrain.growth.transaction import apply
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.graph import CapturedUpdate, make_captured
from growtrain.replay.frames import FrameRing
from growtrain.runs.checkpoint import load_learner
from growtrain.runs.loop import train
from growtrain.settings.config import Config
from growtrain.settings.schedules import Intervention
from growtrain.telemetry.sinks import read_jsonl

ACTIONS, BATCH = 5, 8
SMALL: dict[str, Any] = {"game": "pong", "width": 32, "encoder_width": 0.25, "batch_size": BATCH}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets graphs be recorded and played on the CPU; the graphs that were."""
    made: list[Any] = []

    def new() -> Any:
        made.append(recorded_graph.RecordedGraph())
        return made[-1]

    for name, stand_in in recorded_graph.STAND_INS.items():
        monkeypatch.setattr(name, stand_in)
    monkeypatch.setattr("torch.cuda.CUDAGraph", new)
    return made


def make(**options: Any) -> DoubleDQN:
    config, generator = Config(**(SMALL | options)), torch.Generator().manual_seed(0)
    return DoubleDQN(config, make_spec(ACTIONS), width=config.width, device=torch.device("cpu"), generator=generator)


def make_ring() -> FrameRing:
    """Two lanes of noise, with episodes of a few steps."""
    rng = np.random.default_rng(0)
    ring = FrameRing(100, 2, rng=np.random.default_rng(1), frame_shape=(1, 84, 84), stack_size=4)
    ring.start(rng.integers(256, size=(2, 1, 84, 84), dtype=np.uint8))
    for step in range(50):
        ring.extend(
            action=rng.integers(ACTIONS, size=2),
            reward=rng.normal(size=2),
            terminated=rng.random(2) < 0.1,
            frame=rng.integers(256, size=(2, 1, 84, 84), dtype=np.uint8),
            started=np.full(2, step % 7 == 6),
            first_frame=rng.integers(256, size=(2, 1, 84, 84), dtype=np.uint8),
        )
    return ring


def captured(learner: DoubleDQN, ring: FrameRing) -> CapturedUpdate:
    """As on a GPU: no value is read while updating."""
    learner.asynchronous = True
    return make_captured(learner, ring)


def train_both(learner: DoubleDQN, update: CapturedUpdate, ring: FrameRing) -> None:
    """Three updates of each on the same transitions."""
    rows = ring.sample_indices(3 * BATCH)
    learner.update(ring.get(rows).view(3, BATCH))
    update.update(rows)


def assert_equal(learner: DoubleDQN, in_graph: DoubleDQN) -> None:
    for network in ("online", "target"):
        expected, tensors = (getattr(each, network).state_dict() for each in (learner, in_graph))
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items()), network
    assert learner.report().loss == in_graph.report().loss


WAYS: list[tuple[Intervention, dict[str, Any]]] = [
    ("inject", {}),
    ("inject", {"anchor": "mirrored", "freeze_encoder_at": 2}),
    ("inject", {"anchor": "zero", "optimizer": "adam", "max_grad_norm": 10.0, "freeze_encoder_at": 1}),
    ("inject", {"trainable_heads": "all", "regularizer": "l2-init", "regularizer_strength": 0.01}),
    ("inject", {"normalization": "spectral", "regularizer": "parseval", "regularizer_strength": 0.01}),
    ("inject", {"weight_projection": "nap", "normalization": "layer", "activation": "crelu"}),
    ("inject", {"split": "conv2", "activation": "fourier"}),
    ("reset-head", {}),
    ("reset-encoder", {}),
    ("reset-all", {"optimizer": "adam"}),
    ("shrink-perturb", {"normalization": "spectral"}),
    ("redo", {"redo_tau": 0.2, "optimizer": "adam"}),
    ("widen", {}),
    ("net2wider", {}),
    ("fresh-optimizer", {"optimizer": "adam"}),
]


@pytest.mark.parametrize(("intervention", "options"), WAYS)
def test_a_graph_trains_the_same_network_bit_for_bit(
    intervention: Intervention, options: dict[str, Any], graphs: list[Any]
) -> None:
    """Through interventions and target copies, in either order."""
    ring = make_ring()
    learner, in_graph = make(**options), make(**options)
    update = captured(in_graph, ring)
    train_both(learner, update, ring)
    for stage in (1, 2):
        if intervention in ("widen", "net2wider") and stage == 2:
            break
        for each in (learner, in_graph):
            if stage == 1:
                each.copy_target()
            apply(
                each,
                intervention,
                ring.get(torch.from_numpy(np.flatnonzero(ring.valid)[:32]))["observation"],
                config=each.config,
                generator=torch.Generator().manual_seed(stage),
                freeze_encoder=stage == each.config.freeze_encoder_at,
            )
        train_both(learner, update, ring)
        for each in (learner, in_graph):
            each.copy_target()  # and lets it share what is frozen
        train_both(learner, update, ring)
        assert_equal(learner, in_graph)
    assert sum(graph.replays for graph in graphs) == in_graph.updates == learner.updates


def test_a_graph_is_recorded_again_only_after_what_makes_it_stale(graphs: list[Any]) -> None:
    ring, learner = make_ring(), make()
    update = captured(learner, ring)
    rows = ring.sample_indices(BATCH)
    for _ in range(3):
        update.update(rows)
        learner.copy_target()
    assert [graph.replays for graph in graphs if graph.replays] == [3]


def test_the_stand_in_sees_what_a_real_graph_would_get_wrong(graphs: list[Any]) -> None:
    ring, learner = make_ring(), make()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        make_captured(learner, ring).update(ring.sample_indices(BATCH))  # reads whether the loss is finite
    update = captured(learner, ring)
    update.update(ring.sample_indices(BATCH))
    learner.version -= 1  # a change that forgets to say so
    apply(
        learner,
        "reset-head",
        ring.get(ring.sample_indices(8))["observation"],
        config=learner.config,
        generator=torch.Generator(),
    )
    assert update._version == learner.version
    with pytest.raises(AssertionError, match="given back"):
        update.update(ring.sample_indices(BATCH))


def test_a_loss_that_is_not_finite_moves_nothing_in_a_graph_either(graphs: list[Any]) -> None:
    for optimizer in ("centered_rmsprop", "adam"):
        ring, learner = make_ring(), make(optimizer=optimizer, reward_clip=0)
        update = captured(learner, ring)
        update.update(ring.sample_indices(BATCH))
        before = {name: tensor.clone() for name, tensor in learner.online.state_dict().items()}
        rewards = ring._transitions[:, 1].clone()
        ring._transitions[:, 1] = float("inf")
        update.update(ring.sample_indices(3 * BATCH))
        assert all(torch.equal(before[name], tensor) for name, tensor in learner.online.state_dict().items())
        ring._transitions[:, 1] = rewards
        update.update(ring.sample_indices(BATCH))
        assert learner.nonfinite.tolist() == [3, 0, 3]
        assert not torch.equal(
            before["encoder.layers.0.weight"], learner.online.state_dict()["encoder.layers.0.weight"]
        )
        assert learner.updates == 5


def test_a_whole_run_in_a_graph_is_the_run_without_one(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = {"total_frames": 1_600, "num_envs": 4, "learning_starts": 160, "epsilon_decay_frames": 800}
    periods = {"target_period": 160, "eval_period": 0, "log_period": 400, "checkpoint_period": 0}
    options = {"replay_capacity": 400, "schedule": "grow3x", "anchor": "mirrored", "freeze_encoder_at": 2}
    config = Config(**(SMALL | short | periods | options))
    list(train(config, tmp_path / "plain"))
    assert not graphs
    monkeypatch.setattr("growtrain.runs.run.uses_graph", lambda config, device: True)
    monkeypatch.setattr("growtrain.runs.run.make_captured", captured)
    list(train(config, tmp_path / "graph"))
    assert sum(graph.replays for graph in graphs) == (1_600 - 160) // 4 // 4
    assert_equal(*(load_learner(tmp_path / name, torch.device("cpu"))[0] for name in ("plain", "graph")))
    losses = [[line["loss"] for line in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("plain", "graph")]
    assert losses[0] == losses[1]
