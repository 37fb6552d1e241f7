"""The whole update as one compiled function: it is the same update, and growing by frozen networks compiles it once more and no oftener."""

import copy
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
import torch._dynamo
from tensordict import TensorDict
from tiny import tiny
from torch import Tensor

from growtrain.environments.atari import make_spec
from growtrain.environments.base import Spec
from growtrain.growth.transaction import apply
from growtrain.learners.base import AbstractLearner
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.make import make_learner
from growtrain.learners.optimizers import CompilationFailed, can_compile
from growtrain.planning.speed import keep_frozen_values, synthetic_batches
from growtrain.settings.config import Config
from growtrain.settings.presets import sac

SPEC = make_spec(6)
CELLS = Spec(frame_shape=(4, 10, 10), stack_size=1, num_actions=6, frame_skip=1, scale=1.0)
VECTORS = Spec(frame_shape=(7,), stack_size=1, num_actions=3, frame_skip=1, scale=1.0, continuous=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def traced(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is traced and differentiated as it would be, and then run operation by operation, which takes a second less."""
    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    monkeypatch.setattr("growtrain.learners.gradient_step.MIN_UPDATES_TO_COMPILE", 10**9)
    monkeypatch.setattr("growtrain.learners.gradient_step.MIN_UPDATES_TO_COMPILE_ALL", 0)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def configured(**changes: Any) -> Config:
    """A small run's configuration: of SAC if it says so, otherwise of Double DQN."""
    if changes.get("preset") != "sac":
        return tiny(**changes)
    # Adam's first steps are signs of gradients, of which rounding turns the smallest around: epsilon must be larger than they are.
    return sac(**{"width": 16, "batch_size": 16, "optimizer_eps": 1e-3, "target_tau": 0.1} | changes)


def make(config: Config, spec: Spec = SPEC) -> Any:
    generator = torch.Generator().manual_seed(0)
    return make_learner(config, VECTORS if config.continuous else spec, device=torch.device("cpu"), generator=generator)


def plain(monkeypatch: pytest.MonkeyPatch, config: Config, spec: Spec = SPEC) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr("growtrain.learners.gradient_step.MIN_UPDATES_TO_COMPILE_ALL", 10**9)
        learner = make(config, spec)
    assert learner.gradient_step.compiled is None
    return learner


def batches(learner: AbstractLearner, count: int, seed: int) -> TensorDict:
    drawn = synthetic_batches(learner.config, learner.spec, count, torch.Generator().manual_seed(seed))
    keep_frozen_values(learner, drawn)
    return drawn


def probe(learner: AbstractLearner) -> dict[str, Tensor]:
    return learner.inputs(batches(learner, 1, 9)[0])


def copy_target(learner: AbstractLearner) -> None:
    if isinstance(learner, DoubleDQN):
        learner.copy_target()


def moved(learner: AbstractLearner) -> list[Tensor]:
    slots = [value for p in learner.trainable() for _, value in sorted(learner.optimizer.state[p].items())]
    return [*learner.step_tensors(), *slots]


def assert_same(compiled: Any, learner: AbstractLearner) -> None:
    assert compiled.gradient_step.compiled is not None
    for ours, theirs in zip(moved(compiled), moved(learner), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-6)


KINDS: dict[str, dict[str, object]] = {
    "double": {},
    "single": {"double_dqn": False},
    "adam": {"optimizer": "adam"},
    "rmsprop, clipped": {"optimizer": "rmsprop", "max_grad_norm": 0.01},
    "l2-init": {"regularizer": "l2-init", "regularizer_strength": 0.01, "optimizer": "adam"},
    "parseval": {"regularizer": "parseval", "regularizer_strength": 0.001},
    "nap": {"weight_projection": "nap", "normalization": "layer"},
    "spectral": {"normalization": "spectral"},
    "fourier": {"activation": "fourier"},
    "sac": {"preset": "sac"},
    "sac, rmsprop, clipped": {"preset": "sac", "optimizer": "centered_rmsprop", "max_grad_norm": 0.01},
    "sac, parseval, nap": {
        "preset": "sac",
        "regularizer": "parseval",
        "regularizer_strength": 0.001,
        "weight_projection": "nap",
        "normalization": "layer",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_update_is_the_same_update(kind: str, traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(**KINDS[kind])
    learner, compiled = plain(monkeypatch, config), make(config)
    for count, seed in ((1, 0), (3, 1)):  # several at once have the target's values from one product
        for each in (learner, compiled):
            each.update(batches(each, count, seed))
    assert not any(torch.equal(p, q) for p, q in zip(compiled.trainable(), make(config).trainable(), strict=True))
    assert_same(compiled, learner)


GROWN: dict[str, dict[str, object]] = {
    "frozen": {"anchor": "frozen"},
    "mirrored": {"anchor": "mirrored"},
    "network": {"freeze": "network"},
    "encoder": {"anchor": "mirrored", "freeze_encoder_at": 1},
    "sac": {"preset": "sac", "regularizer": "l2-init", "regularizer_strength": 0.01, "max_grad_norm": 0.5},
    "sac, network": {"preset": "sac", "freeze": "network", "grow": "actor"},
}


@pytest.mark.parametrize("kind", GROWN)
def test_it_is_the_same_after_injections(kind: str, traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(**GROWN[kind])
    learners = [plain(monkeypatch, config), make(config)]
    for stage in (1,) if config.continuous else (1, 2):  # three networks take three times as long
        for index, learner in enumerate(learners):
            learner.update(batches(learner, 2, stage))
            copy_target(learner)
            generator, freeze = torch.Generator().manual_seed(stage), stage == config.freeze_encoder_at
            with monkeypatch.context() as patch:
                patch.setattr("growtrain.learners.gradient_step.MIN_UPDATES_TO_COMPILE_ALL", 0 if index else 10**9)
                apply(learner, "inject", probe(learner), config=config, generator=generator, freeze_encoder=freeze)
            copy_target(learner)
            learner.update(batches(learner, 2, 10 + stage))
            learner.update(batches(learner, 1, 20 + stage))
    assert_same(learners[1], learners[0])


def test_a_restored_learner_goes_on_compiled_bit_for_bit(traced: None) -> None:
    config = configured(preset="sac", freeze="network", grow="actor")
    learner, restored = make(config), make(config)
    apply(learner, "inject", probe(learner), config=config, generator=torch.Generator().manual_seed(0))
    learner.update(batches(learner, 2, 0))
    restored.load_state_dict(copy.deepcopy(learner.state_dict()))
    for each in (learner, restored):
        each.update(batches(each, 2, 1))
        assert each.gradient_step.compiled is not None
    assert all(map(torch.equal, moved(learner), moved(restored)))


@pytest.mark.parametrize("settings", [{}, {"preset": "sac", "grow": "actor"}], ids=["dqn", "sac"])
def test_a_network_that_is_frozen_again_is_not_compiled_again(settings: dict[str, Any], traced: None) -> None:
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    learner = make(configured(freeze="network", **settings))
    stats = torch._dynamo.utils.counters["stats"]
    graphs = []
    for stage in range(4):
        copy_target(learner)
        if stage:
            generator = torch.Generator().manual_seed(stage)
            apply(learner, "inject", probe(learner), config=learner.config, generator=generator)
        before = stats["unique_graphs"]
        learner.update(batches(learner, 1, stage))
        learner.update(batches(learner, 1, 10 + stage))
        graphs.append(stats["unique_graphs"] - before)
    assert graphs == [1, 1, 0, 0]


BROKEN: dict[str, dict[str, object]] = {
    "centered_rmsprop": {},
    "adam": {"optimizer": "adam"},
    "sac": {"preset": "sac"},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_batch_that_is_not_finite_moves_no_parameter_and_is_counted(kind: str, traced: None) -> None:
    learner = make(configured(**BROKEN[kind]))
    learner.update(batches(learner, 1, 0))
    before, slots = [tensor.clone() for tensor in learner.step_tensors()[:-2]], moved(learner)
    slots_before = [slot.clone() for slot in slots[len(learner.step_tensors()) :]]
    broken = batches(learner, 1, 1)
    broken["next", "reward"][0, 0] = torch.inf
    learner.update(broken)
    assert all(map(torch.equal, learner.step_tensors()[:-2], before))  # but for the sums and the counts
    if kind != "centered_rmsprop":  # whose moments decay
        assert all(map(torch.equal, moved(learner)[len(learner.step_tensors()) :], slots_before))
    assert learner.nonfinite.tolist() == [1, 1, 1]
    learner.update(batches(learner, 1, 2))
    assert learner.nonfinite.tolist() == [1, 0, 1]
    assert not torch.equal(learner.step_tensors()[0], before[0])


@pytest.mark.parametrize("settings", [{}, {"preset": "sac"}], ids=["dqn", "sac"])
def test_a_compiler_that_fails_is_survived(
    settings: dict[str, Any], traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise CompilationFailed("no compiler")

    config = configured(**settings)
    learner, failing = plain(monkeypatch, config), make(config)
    assert failing.gradient_step.compiled is not None
    monkeypatch.setattr(failing.gradient_step.compiled, "_step", no_compiler)
    with pytest.warns(UserWarning, match="the update could not be compiled and runs uncompiled: no compiler"):
        failing.update(batches(failing, 1, 0))
    learner.update(batches(learner, 1, 0))
    assert all(map(torch.equal, moved(failing), moved(learner)))


def test_short_runs_and_eager_ones_are_not_compiled(compiling: None) -> None:
    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    # An update for each frame but the first 10,000.
    settings = {"width": 16, "schedule": "fixed", "total_frames": 60_000}
    many = {"schedule": "every:12k"}  # 4 injections
    assert make(sac(**settings)).gradient_step.compiled is not None
    assert make(sac(**settings | many | {"freeze": "network", "grow": "actor"})).gradient_step.compiled is not None
    assert make(sac(**settings | many | {"total_frames": 170_000, "schedule": "every:17k"})).gradient_step.compiled
    for changes in ({"total_frames": 59_999}, {"execution": "eager"}, many):
        assert make(sac(**settings | changes)).gradient_step.compiled is None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_learner_and_a_head_that_is_no_longer_live_are_freed_at_once(
    compiled: bool, traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the garbage collector: a learning test makes one learner after another, each with its networks and slots."""
    if not compiled:
        monkeypatch.setattr("growtrain.learners.gradient_step.MIN_UPDATES_TO_COMPILE_ALL", 10**9)
    config = configured()
    learner = make(config)
    assert (learner.gradient_step.compiled is not None) == compiled
    learner.update(batches(learner, 1, 0))
    gc.collect()
    gc.disable()
    try:
        head, network = weakref.ref(learner.head.live), weakref.ref(learner.online)
        learner.copy_target()
        apply(learner, "inject", probe(learner), config=config, generator=torch.Generator().manual_seed(0))
        assert head() is None
        del learner
        assert network() is None
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cells", "sac"])
def test_what_the_compiler_makes_of_it_is_the_same_too(
    kind: str, compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("growtrain.learners.gradient_step.MIN_UPDATES_TO_COMPILE_ALL", 0)
    config = tiny(width=128, encoder_width=1.0, optimizer="rmsprop") if kind == "cells" else configured(preset="sac")
    learner, compiled = plain(monkeypatch, config, CELLS), make(config, CELLS)
    for seed in range(3):
        for each in (learner, compiled):
            each.update(batches(each, 1 + seed, seed))
    assert_same(compiled, learner)
