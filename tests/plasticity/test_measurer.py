"""Measuring a live run: what is measured is true, and measuring changes nothing, bit for bit."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from growing import grow
from tiny import tiny
from torch import Tensor

from growtrain import diagnostics
from growtrain.environments.atari import make_spec
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.networks.injected import InjectedHead
from growtrain.plasticity import measurer as measuring
from growtrain.plasticity.measurer import Measurer
from growtrain.records import Diagnostics
from growtrain.replay.frames import FrameRing
from growtrain.runs.checkpoint import Checkpoint, open_newest
from growtrain.runs.loop import train
from growtrain.settings.config import Config
from growtrain.telemetry.sinks import read_jsonl

CPU = torch.device("cpu")


SETTINGS: dict[str, Any] = {
    "game": "breakout",
    "schedule": "at:480",
    "total_frames": 960,
    "num_envs": 4,
    "learning_starts": 320,
    "epsilon_decay_frames": 400,
    "replay_capacity": 200,  # wraps within the run
    "log_period": 240,
    "diagnostics_period": 0,
}


def config_of(**changes: Any) -> Config:
    return tiny(**SETTINGS | changes)


def play(config: Config, run_dir: Path, *stops: int) -> Checkpoint:
    """Plays a run, stopped and resumed after each of these numbers of steps."""
    start = None
    for stop in (*stops, 10**9):
        steps = iter(range(10**9))
        list(train(config, run_dir, should_stop=lambda: next(steps) >= stop, start=start))  # noqa: B023
        start = open_newest(run_dir)
    assert start is not None
    return start


def contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """Networks, optimizer, counters, replay with its frames, episodes and every generator; by path."""
    config = checkpoint.config
    ring = FrameRing(
        config.replay_capacity, config.num_envs, rng=np.random.default_rng(0), frame_shape=(1, 84, 84), stack_size=4
    )
    ring.load_state_dict(checkpoint.state["ring"])
    checkpoint.load_frames(ring)
    tree = {name: checkpoint.state[name] for name in ("learner", "collector", "ring", "growth_generator", "stage")}
    flat: dict[str, Any] = {"frames": ring.frames}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                walk(item, f"{path}/{name}")
        else:
            flat[path] = value

    walk(tree, "")
    return flat


def differing(one: Checkpoint, other: Checkpoint) -> list[str]:
    a, b = contents(one), contents(other)
    assert a.keys() == b.keys()
    return [n for n in a if not (torch.equal(a[n], b[n]) if isinstance(a[n], Tensor) else a[n] == b[n])]


@pytest.fixture(scope="module", autouse=True)
def _few_states() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "STATES", 16)
        yield


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return play(config_of(), tmp_path_factory.mktemp("unmeasured"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checkpoint]:
    run_dir = tmp_path_factory.mktemp("measured")
    return run_dir, play(config_of(diagnostics_period=16), run_dir)


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_jsonl(run_dir / "diagnostics.jsonl")]


def test_measuring_at_every_step_changes_nothing(unmeasured: Checkpoint, measured: tuple[Path, Checkpoint]) -> None:
    run_dir, checkpoint = measured
    assert differing(unmeasured, checkpoint) == []
    records = read_jsonl(run_dir / "diagnostics.jsonl")
    assert [r["frames"] for r in records if r["when"] == "period"] == list(range(16, 961, 16))
    assert [r["when"] for r in records if r["frames"] == 480] == ["before growth", "after growth", "period"]


def test_a_measure_that_draws_from_the_run_would_be_noticed(
    unmeasured: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Measurer.measure

    def intervening(self: Measurer, *arguments: Any) -> Diagnostics:
        self.ring.sample_indices(1)
        return measure(self, *arguments)

    monkeypatch.setattr(Measurer, "measure", intervening)
    changed = differing(unmeasured, play(config_of(diagnostics_period=400), tmp_path))
    assert "/learner/online/encoder.layers.0.weight" in changed


def test_a_resumed_run_measures_what_the_uninterrupted_one_does(
    unmeasured: Checkpoint, measured: tuple[Path, Checkpoint], tmp_path: Path
) -> None:
    resumed = play(config_of(diagnostics_period=16), tmp_path, 25, 15)  # before and after the injection, at step 30
    assert differing(unmeasured, resumed) == []
    assert records_of(tmp_path) == records_of(measured[0])


def test_the_expensive_measures_change_nothing_either(unmeasured: Checkpoint, tmp_path: Path) -> None:
    assert differing(unmeasured, play(config_of(diagnostics_period=960, diagnostics="full"), tmp_path)) == []
    for record in read_jsonl(tmp_path / "diagnostics.jsonl"):
        assert np.isfinite(record["hessian_top_eigenvalue"])
        assert record["hessian_top_eigenvalue"] != 0
        assert 0 < record["target_fit_error"] < 2


def test_the_records_are_true(measured: tuple[Path, Checkpoint]) -> None:
    records = read_jsonl(measured[0] / "diagnostics.jsonl")
    by_time = {(r["frames"], r["when"]): r for r in records}
    assert records[0]["policy_churn"] is records[0]["policy_churn_frames"] is None
    untrained = by_time[320, "period"]
    assert untrained["distance_from_initialization"] == {"encoder": 0, "live": 0}
    assert untrained["policy_churn"] == 0
    assert untrained["policy_churn_frames"] == 16
    assert [r["states"] for r in records[:5]] == [4, 8, 12, 16, 16]

    # The same states around an injection: the function is kept, a new head is born, the old one is frozen.
    before, after = by_time[480, "before growth"], by_time[480, "after growth"]
    for kept in ("srank", "effective_rank", "stable_rank"):
        assert before[kept]["features"] == after[kept]["features"]
    assert after["policy_churn"] == after["policy_churn_frames"] == 0
    assert before["distance_from_initialization"]["live"] > after["distance_from_initialization"]["live"] == 0
    encoder = [r["distance_from_initialization"]["encoder"] for r in (before, after)]
    assert encoder[0] == encoder[1] > 0
    assert set(after["dormant_fraction"]) - set(before["dormant_fraction"]) == {
        "head.frozen.heads.0.1",
        "head.frozen.heads.1.1",
    }
    assert after["dormant_fraction"]["head.frozen.heads.0.1"] == before["dormant_fraction"]["head.live.1"]
    assert after["dormant_fraction"]["head.frozen.heads.1.1"] == after["dormant_fraction"]["head.live.1"]  # its anchor


def test_distances_norms_and_churn_are_those_of_the_networks() -> None:
    config = config_of(diagnostics_period=1, lr=0.005)
    learner = DoubleDQN(config, make_spec(4), width=32, device=CPU, generator=torch.Generator().manual_seed(0))
    ring = filled_ring(config)
    measurer, start = Measurer(config, learner, ring), copy.deepcopy(learner.online)
    first = measurer.measure(0, 0, "period")
    batches = ring.sample(8 * config.batch_size)
    learner.update(batches.view(8, config.batch_size))
    record = measurer.measure(4, 0, "period")
    assert isinstance(start.head, InjectedHead)
    for name, now, then in (
        ("encoder", learner.online.encoder, start.encoder),
        ("live", learner.head.live, start.head.live),
    ):
        a, b = (torch.cat([p.detach().flatten() for p in part.parameters()]) for part in (now, then))
        assert record.weight_norm[name] == pytest.approx(float(a.norm()), rel=1e-5)
        assert record.distance_from_initialization[name] == pytest.approx(float((a - b).norm()), rel=1e-5)
        assert 0 == first.distance_from_initialization[name] < 1e-4 < record.distance_from_initialization[name]  # type: ignore[operator]
    # The states of the first record, drawn again: asked of both networks.
    measurer.measure(0, 0, "period")
    observations = measurer.state_dict()["previous"]["observations"]
    with torch.no_grad():
        changed = start(observations).argmax(1) != learner.online(observations).argmax(1)
    assert record.policy_churn == float(changed.float().mean()) > 0
    assert record.policy_churn_frames == 4


def test_what_was_off_is_not_known_and_a_frozen_encoder_has_no_gradient(tmp_path: Path) -> None:
    """Turned on by a resume before the injection: the live head's birth is seen, the encoder's was not."""
    config = config_of(freeze_encoder_at=1)
    steps = iter(range(10**9))
    list(train(config, tmp_path, should_stop=lambda: next(steps) >= 25))
    config = dataclasses.replace(config, diagnostics_period=320)
    list(train(config, tmp_path, start=open_newest(tmp_path)))
    records = read_jsonl(tmp_path / "diagnostics.jsonl")
    assert [r["frames"] for r in records] == [480, 480, 640, 960]
    assert [r["distance_from_initialization"]["encoder"] for r in records] == [None] * 4
    assert [r["distance_from_initialization"]["live"] is None for r in records] == [True, False, False, False]
    assert records[0]["gradient_norm"]["encoder"] > 0
    assert [r["gradient_norm"]["encoder"] for r in records[1:]] == [None] * 3
    assert all(r["gradient_norm"]["live"] > 0 for r in records)


def filled_ring(config: Config) -> FrameRing:
    generator = np.random.default_rng(3)
    ring = FrameRing(config.replay_capacity, 2, rng=np.random.default_rng(4), frame_shape=(1, 84, 84), stack_size=4)
    frames = generator.integers(0, 256, (60, 2, 1, 84, 84), dtype=np.uint8)
    ring.start(frames[0])
    for frame in frames[1:]:
        ring.extend(
            action=generator.integers(4, size=2),
            reward=generator.normal(size=2),
            terminated=np.zeros(2, np.bool_),
            frame=frame,
            started=np.zeros(2, np.bool_),
        )
    return ring


@pytest.mark.parametrize("anchor", ["frozen", "zero", "mirrored"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"width": 33}, {"normalization": "layer"}, {"normalization": "spectral"}, {"execution": "eager"}],
    ids=["plain", "odd width", "layer", "spectral", "eager"],
)
def test_every_head_is_seen_whatever_it_is_built_of(anchor: Any, settings: dict[str, Any]) -> None:
    config = config_of(diagnostics_period=1, anchor=anchor, **settings)
    generator = torch.Generator().manual_seed(0)
    learner = DoubleDQN(config, make_spec(4), width=config.width, device=CPU, generator=generator)
    ring = filled_ring(config)
    measurer = Measurer(config, learner, ring)
    observations = ring.get(torch.from_numpy(np.flatnonzero(ring.valid)[:32]))["observation"]
    for stage in range(3):
        features, q, layers = measuring._forward(learner.online, observations)
        assert torch.equal(q, learner.act(observations))
        assert torch.equal(features, learner.online.encoder(observations).detach())
        assert [name for name in layers if name.startswith("encoder")] == [f"encoder.layers.{n}" for n in (1, 3, 5)]
        assert torch.equal(layers["encoder.layers.5"].flatten(1), features)
        # Each head's hidden units, from the head itself as it was before any bank fused it.
        bank = learner.head.frozen
        heads = [] if bank is None else bank.unfused()
        found = [layer for name, layer in layers.items() if name.startswith("head.frozen")]
        assert len(heads) == len(found) == stage * (2 if anchor == "frozen" else 1)
        position = 2 if config.normalization == "layer" else 1
        for head, layer in zip([*heads, learner.head.live], [*found, layers[f"head.live.{position}"]], strict=True):
            with torch.no_grad():
                hidden = head[: position + 1](features)  # type: ignore[index]
            torch.testing.assert_close(layer, hidden)
        assert not any(module._forward_hooks for module in learner.online.modules())
        record = measurer.measure(stage, stage, "period")
        assert record.states == 16 < np.count_nonzero(ring.valid)
        assert record.dormant_fraction.keys() == layers.keys()
        assert all(p.grad is None for p in learner.online.parameters())
        grow(learner, observations, anchor=anchor, generator=generator)
        assert isinstance(learner.online.head, InjectedHead)


@pytest.mark.parametrize(
    ("settings", "hidden"),
    [({"split": "conv3"}, 2), ({"split": "conv1"}, 4), ({"activation": "crelu"}, 1), ({"activation": "fourier"}, 1)],
    ids=["conv3", "conv1", "crelu", "fourier"],
)
@pytest.mark.parametrize("anchor", ["frozen", "zero"])
def test_other_networks_are_measured_whole(anchor: Any, settings: dict[str, Any], hidden: int) -> None:
    """Heads that begin in the encoder, whose features are maps, and activations that give two outputs a unit."""
    config = config_of(diagnostics_period=1, anchor=anchor, **settings)
    generator = torch.Generator().manual_seed(0)
    learner = DoubleDQN(config, make_spec(4), width=32, device=CPU, generator=generator)
    ring = filled_ring(config)
    measurer = Measurer(config, learner, ring)
    for injections in range(3):
        record = measurer.measure(injections, injections, "period")
        layers = list(record.dormant_fraction)
        heads = injections * (2 if anchor == "frozen" else 1)
        assert sum(name.startswith("head.live") for name in layers) == hidden
        assert sum(name.startswith("head.frozen") for name in layers) == heads * hidden
        for rank in (record.srank, record.effective_rank, record.stable_rank):
            assert all(1 <= value <= 16 for value in rank.values())
        grow(learner, ring.sample(4)["observation"], anchor=anchor, generator=generator)


def test_the_states_depend_on_the_seed_and_the_frames_alone() -> None:
    config = config_of(diagnostics_period=1)
    generator = torch.Generator().manual_seed(0)
    learner = DoubleDQN(config, make_spec(4), width=32, device=CPU, generator=generator)
    ring = filled_ring(config_of(replay_capacity=400))
    records = []
    for frames, seed in ((100, 0), (100, 0), (101, 0), (100, -1)):
        torch.rand(3)
        measurer = Measurer(dataclasses.replace(config, seed=seed), learner, ring)
        records.append(dataclasses.replace(measurer.measure(frames, 0, "period"), seconds=0, frames=0))
    assert records[0] == records[1]
    assert records[0] != records[2] != records[3] != records[0]


def test_a_saved_measurer_of_another_architecture_is_refused() -> None:
    learners = {
        width: DoubleDQN(config_of(), make_spec(4), width=width, device=CPU, generator=torch.Generator().manual_seed(0))
        for width in (32, 16)
    }
    config, ring = config_of(diagnostics_period=1), filled_ring(config_of())
    state = Measurer(config, learners[16], ring).state_dict()
    with pytest.raises(ValueError, match="another architecture"):
        Measurer(config, learners[32], ring).load_state_dict(state)
    assert Measurer(config_of(), learners[32], ring).state_dict() == {}
    assert diagnostics.weight_norm(state["initial"]["live"].values()) > 0
