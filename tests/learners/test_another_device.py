"""An update on another device, as on a GPU but without one: on the `meta` device no value can be read."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from growtrain.environments.atari import make_spec
from growtrain.growth.transaction import apply
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.gradient_step import fresh_optimizer
from growtrain.replay.frames import FrameRing
from growtrain.settings.config import Config

ACTIONS, BATCH, ELSEWHERE = 5, 8, torch.device("meta")
SETTINGS: list[dict[str, Any]] = [
    {"anchor": "frozen"},
    {"anchor": "zero"},
    {"anchor": "mirrored"},
    {"anchor": "mirrored", "width": 33},
    {"anchor": "mirrored", "freeze_encoder_at": 1},
    {"anchor": "frozen", "freeze_encoder_at": 2},
    {"trainable_heads": "all"},
    {"split": "conv1"},
    {"split": "conv3", "anchor": "mirrored"},
    {"output_bias": "per_action"},
    {"max_grad_norm": 10.0},
    {"normalization": "layer"},
    {"normalization": "layer", "weight_projection": "nap"},
    {"normalization": "spectral"},
    {"activation": "crelu"},
    {"activation": "fourier"},
    {"regularizer": "l2", "regularizer_strength": 1e-4},
    {"regularizer": "l2-init", "regularizer_strength": 1e-4},
    {"regularizer": "parseval", "regularizer_strength": 1e-4},
]


class Elsewhere(TorchDispatchMode):
    """Refuses operators that get a tensor of this device; numbers, which a GPU takes from the host, may be here."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.device != ELSEWHERE:
                raise RuntimeError(f"{operator} got a tensor of another device")
        return operator(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


def grown_elsewhere(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> DoubleDQN:
    """A learner after two injections, moved."""
    config = Config(game="pong", **({"width": 32, "encoder_width": 0.25, "batch_size": BATCH} | settings))
    generator = torch.Generator().manual_seed(0)
    learner = DoubleDQN(config, make_spec(ACTIONS), width=config.width, device=torch.device("cpu"), generator=generator)
    observations = torch.randint(256, (24, 4, 84, 84), dtype=torch.uint8, generator=generator)
    for stage in (1, 2):
        freeze = stage == config.freeze_encoder_at
        apply(learner, "inject", observations, config=config, generator=generator, freeze_encoder=freeze)
        learner.copy_target()
    assert learner.bank_is_shared is (config.trainable_heads == "newest")
    for network in (learner.online, learner.target):
        network.to(ELSEWHERE)
    learner.device, learner.asynchronous = ELSEWHERE, True
    learner.optimizer = fresh_optimizer(learner)
    learner.loss_sum, learner.nonfinite = learner.loss_sum.to(ELSEWHERE), learner.nonfinite.to(ELSEWHERE)
    monkeypatch.setattr(learner, "_share_frozen", lambda: None)  # reads values, as it may between updates
    learner.rebuild()
    return learner


def filled_ring() -> FrameRing:
    """Two lanes of noise, on the other device."""
    rng = np.random.default_rng(0)
    ring = FrameRing(100, 2, rng=np.random.default_rng(1), frame_shape=(1, 84, 84), stack_size=4, device=ELSEWHERE)
    ring.start(rng.integers(256, size=(2, 1, 84, 84), dtype=np.uint8))
    for _ in range(20):
        ring.extend(
            action=rng.integers(ACTIONS, size=2),
            reward=rng.normal(size=2),
            terminated=rng.random(2) < 0.1,
            frame=rng.integers(256, size=(2, 1, 84, 84), dtype=np.uint8),
            started=rng.random(2) < 0.1,
            first_frame=rng.integers(256, size=(2, 1, 84, 84), dtype=np.uint8),
        )
    return ring


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_an_update_stays_on_its_device_and_reads_no_value(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, ring = grown_elsewhere(settings, monkeypatch), filled_ring()
    for _ in range(2):
        rows = ring.sample_indices(BATCH).to(ELSEWHERE)
        with Elsewhere():
            learner.step(ring.gather(rows).to_tensordict())
    held = [p for group in learner.optimizer.param_groups for p in group["params"]]
    assert all(p.grad is not None and p.grad.device == ELSEWHERE for p in held)
    assert learner.act(ring.newest()).shape == (2, ACTIONS)


def test_what_would_go_wrong_on_a_gpu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, ring = grown_elsewhere({}, monkeypatch), filled_ring()
    batch = ring.gather(ring.sample_indices(BATCH).to(ELSEWHERE)).to_tensordict()
    learner.asynchronous = False  # asks at once whether the loss is finite
    with pytest.raises(RuntimeError, match="meta"):
        learner.step(batch)
    learner.asynchronous = True
    with Elsewhere(), pytest.raises(RuntimeError, match="another device"):
        learner.step(batch.set("action", torch.zeros(BATCH, dtype=torch.int64)))
