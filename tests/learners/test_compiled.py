"""The whole update as one compiled function: it is the same update, and growing by frozen networks compiles it once more and no oftener."""

import functools

import pytest
import torch
import torch._dynamo
from tensordict import TensorDict
from tiny import tiny
from torch import Tensor

from growtrain.environments.atari import make_spec
from growtrain.environments.base import Spec
from growtrain.growth.transaction import apply
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.optimizers import CompilationFailed, can_compile
from growtrain.planning.speed import keep_frozen_values, synthetic_batches
from growtrain.settings.config import Config

SPEC = make_spec(6)
CELLS = Spec(frame_shape=(4, 10, 10), stack_size=1, num_actions=6, frame_skip=1, scale=1.0)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def traced(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is traced and differentiated as it would be, and then run operation by operation, which takes a second less."""
    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    monkeypatch.setattr("growtrain.learners.double_dqn.MIN_UPDATES_TO_COMPILE", 10**9)
    monkeypatch.setattr("growtrain.learners.double_dqn.MIN_UPDATES_TO_COMPILE_ALL", 0)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def make(config: Config, spec: Spec = SPEC) -> DoubleDQN:
    return DoubleDQN(
        config, spec, width=config.width, device=torch.device("cpu"), generator=torch.Generator().manual_seed(0)
    )


def plain(monkeypatch: pytest.MonkeyPatch, config: Config, spec: Spec = SPEC) -> DoubleDQN:
    with monkeypatch.context() as patch:
        patch.setattr("growtrain.learners.double_dqn.MIN_UPDATES_TO_COMPILE_ALL", 10**9)
        learner = make(config, spec)
    assert learner._compiled is None
    return learner


def batches(learner: DoubleDQN, count: int, seed: int) -> TensorDict:
    drawn = synthetic_batches(learner.config, learner.spec, count, torch.Generator().manual_seed(seed))
    keep_frozen_values(learner, drawn)
    return drawn


def moved(learner: DoubleDQN) -> list[Tensor]:
    slots = [value for p in learner._trainable for value in learner.optimizer.state[p].values()]
    return [*learner._trainable, *slots, learner.loss_sum, learner.nonfinite]


def assert_same(compiled: DoubleDQN, learner: DoubleDQN) -> None:
    assert compiled._compiled is not None
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
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_update_is_the_same_update(kind: str, traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(**KINDS[kind])
    learner, compiled = plain(monkeypatch, config), make(config)
    for count, seed in ((1, 0), (3, 1)):  # several at once have the target's values from one product
        for each in (learner, compiled):
            each.update(batches(each, count, seed))
    assert not any(torch.equal(p, q) for p, q in zip(compiled._trainable, make(config)._trainable, strict=True))
    assert_same(compiled, learner)


GROWN: dict[str, dict[str, object]] = {
    "frozen": {"anchor": "frozen"},
    "mirrored": {"anchor": "mirrored"},
    "network": {"freeze": "network"},
    "encoder": {"anchor": "mirrored", "freeze_encoder_at": 1},
}


@pytest.mark.parametrize("kind", GROWN)
def test_it_is_the_same_after_injections(kind: str, traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(**GROWN[kind])
    learners = [plain(monkeypatch, config), make(config)]
    for stage in (1, 2):
        for index, learner in enumerate(learners):
            learner.update(batches(learner, 2, stage))
            learner.copy_target()
            probe = batches(learner, 1, 9)["observation"][0]
            generator, freeze = torch.Generator().manual_seed(stage), stage == config.freeze_encoder_at
            with monkeypatch.context() as patch:
                patch.setattr("growtrain.learners.double_dqn.MIN_UPDATES_TO_COMPILE_ALL", 0 if index else 10**9)
                apply(learner, "inject", probe, config=config, generator=generator, freeze_encoder=freeze)
            learner.copy_target()
            learner.update(batches(learner, 2, 10 + stage))
            learner.update(batches(learner, 1, 20 + stage))
    assert_same(learners[1], learners[0])


def test_a_network_that_is_frozen_again_is_not_compiled_again(traced: None) -> None:
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    learner = make(tiny(freeze="network"))
    stats = torch._dynamo.utils.counters["stats"]
    graphs = []
    for stage in range(4):
        learner.copy_target()
        probe = batches(learner, 1, 9)["observation"][0]
        if stage:
            apply(learner, "inject", probe, config=learner.config, generator=torch.Generator().manual_seed(stage))
        before = stats["unique_graphs"]
        learner.update(batches(learner, 1, stage))
        learner.update(batches(learner, 1, 10 + stage))
        graphs.append(stats["unique_graphs"] - before)
    assert graphs == [1, 1, 0, 0]


def test_a_batch_that_is_not_finite_moves_no_parameter_and_is_counted(traced: None) -> None:
    for optimizer in ("centered_rmsprop", "adam"):
        learner = make(tiny(optimizer=optimizer))
        learner.update(batches(learner, 1, 0))
        before = [p.detach().clone() for p in learner._trainable]
        broken = batches(learner, 1, 1)
        broken["next", "reward"][0, 0] = torch.inf
        learner.update(broken)
        assert all(torch.equal(p, old) for p, old in zip(learner._trainable, before, strict=True))
        assert learner.nonfinite.tolist() == [1, 1, 1]
        learner.update(batches(learner, 1, 2))
        assert learner.nonfinite.tolist() == [1, 0, 1]
        assert not torch.equal(learner._trainable[-2], before[-2])


def test_a_compiler_that_fails_is_survived(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise CompilationFailed("no compiler")

    config = tiny()
    learner, failing = plain(monkeypatch, config), make(config)
    assert failing._compiled is not None
    monkeypatch.setattr(failing._compiled, "_step", no_compiler)
    with pytest.warns(UserWarning, match="the update could not be compiled and runs uncompiled: no compiler"):
        failing.update(batches(failing, 1, 0))
    learner.update(batches(learner, 1, 0))
    assert all(torch.equal(p, q) for p, q in zip(failing._trainable, learner._trainable, strict=True))


@pytest.mark.slow
def test_what_the_compiler_makes_of_it_is_the_same_too(compiling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growtrain.learners.double_dqn.MIN_UPDATES_TO_COMPILE_ALL", 0)
    config = tiny(width=128, encoder_width=1.0, optimizer="rmsprop")
    learner, compiled = plain(monkeypatch, config, CELLS), make(config, CELLS)
    for seed in range(3):
        for each in (learner, compiled):
            each.update(batches(each, 1 + seed, seed))
    assert_same(compiled, learner)
