"""The Double-DQN learner against naive oracles, before and after growth."""

import copy
import functools

import pytest
import torch
import torch._dynamo
from growing import grow
from tensordict import TensorDict
from torch import Tensor, nn

from growtrain.environments.atari import make_spec
from growtrain.growth.transaction import apply
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.graph import CapturedUpdate
from growtrain.learners.optimizers import CenteredRMSProp, can_compile
from growtrain.networks.heads import SpectralLinear
from growtrain.settings.config import Config

ACTIONS, BATCH = 5, 16


def small(**overrides: object) -> Config:
    return Config(**({"width": 32, "encoder_width": 0.25, "batch_size": BATCH} | overrides))  # type: ignore[arg-type]


def make(config: Config, seed: int = 0) -> DoubleDQN:
    generator = torch.Generator().manual_seed(seed)
    return DoubleDQN(config, make_spec(ACTIONS), width=config.width, device=torch.device("cpu"), generator=generator)


def batches(count: int = 1, seed: int = 0, size: int = BATCH) -> TensorDict:
    g = torch.Generator().manual_seed(seed)
    shape = (count, size)
    frames = torch.randint(0, 256, (*shape, 5, 84, 84), dtype=torch.uint8, generator=g)
    terminated = torch.rand((*shape, 1), generator=g) < 0.3
    return TensorDict(
        {
            "observation": frames[:, :, :4],
            "action": torch.randint(ACTIONS, shape, generator=g),
            "next": {
                "observation": frames[:, :, 1:],
                "reward": torch.randn((*shape, 1), generator=g).clamp(-1, 1),
                "done": terminated,
                "terminated": terminated,
            },
        },
        shape,
    )


def naive_loss(online: nn.Module, target: nn.Module, batch: TensorDict, discount: float) -> Tensor:
    """One transition at a time, as in van Hasselt et al. 2016."""
    losses = []
    for i in range(batch.shape[0]):
        s, s_next = batch["observation"][i : i + 1], batch["next", "observation"][i : i + 1]
        best = int(online(s_next)[0].argmax())
        bootstrap = 0.0 if batch["next", "terminated"][i] else float(target(s_next)[0, best])
        error = online(s)[0, batch["action"][i]] - (float(batch["next", "reward"][i]) + discount * bootstrap)
        losses.append(0.5 * error**2 if error.abs() <= 1 else error.abs() - 0.5)
    return torch.stack(losses).mean()


def different_target(learner: DoubleDQN) -> None:
    """Gives the target weights of its own, so that reading the wrong network shows."""
    with torch.no_grad():
        for p in learner.target.parameters():
            p.mul_(1.5)


@pytest.mark.parametrize("injections", [0, 2])
@pytest.mark.parametrize("execution", ["eager", "auto"])
def test_loss_and_gradients_equal_the_naive_oracle(injections: int, execution: str) -> None:
    learner = make(small(output_bias="per_action", execution=execution))
    learner.update(batches(2))
    for seed in range(injections):
        different_target(learner)
        grow(learner, batches(1, 9)["observation"][0], anchor="frozen", generator=torch.Generator().manual_seed(seed))
        learner.update(batches(1, seed))
    different_target(learner)
    batch = batches(1, 3)[0]
    expected = naive_loss(learner.online, learner.target, batch, 0.99)
    wanted = torch.autograd.grad(expected, [p for p in learner.online.parameters() if p.requires_grad])
    learner.optimizer.zero_grad()
    loss = learner.compute_loss(batch)
    loss.backward()
    got = [p.grad for p in learner.online.parameters() if p.requires_grad]
    assert torch.allclose(loss, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(got, wanted, strict=True):
        assert a is not None
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in learner.target.parameters())
    wrong = naive_loss(learner.target, learner.target, batch, 0.99)  # argmax of the target: the classic mistake
    assert not torch.allclose(wrong, expected, rtol=1e-3)


@pytest.mark.parametrize("injections", [0, 2])
@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_fast_path_trains_the_same_network_as_torchrls_loss(injections: int, freeze_encoder: bool) -> None:
    learners = [make(small(execution=execution)) for execution in ("eager", "auto")]
    for learner in learners:
        learner.update(batches(2, 1))
        for seed in range(injections):
            generator = torch.Generator().manual_seed(seed)
            frozen = freeze_encoder and seed == 1
            grow(learner, batches(1)["observation"][0], anchor="mirrored", generator=generator, freeze_encoder=frozen)
            learner.update(batches(2, 2 + seed))
            learner.copy_target()
        learner.update(batches(3, 7))
    eager, fast = (learner.online.state_dict() for learner in learners)
    for name, tensor in eager.items():
        assert torch.allclose(tensor, fast[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("execution", ["eager", "auto"])
def test_batches_are_mappings_as_the_ring_draws_them_too(execution: str) -> None:
    learners = [make(small(execution=execution)) for _ in range(2)]
    drawn = batches(2, 1)
    learners[0].update(drawn)
    learners[1].update([batch.to_dict() for batch in drawn.unbind(0)])
    for a, b in zip(*(learner.online.parameters() for learner in learners), strict=True):
        assert torch.equal(a, b)


def test_centered_rmsprop_is_dqn_zoos_formula() -> None:
    """Golden values by hand: g = 1 then 3, decay 0.5, eps 0.25, lr 0.1."""
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = CenteredRMSProp([p], lr=0.1, decay=0.5, eps=0.25)
    p.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    # m = 0.5, v = 0.5: 0.1 / sqrt(0.5 - 0.25 + 0.25)
    assert torch.allclose(p.detach(), torch.tensor([1 - 0.1 / 0.5**0.5, -2.0]))
    before = p.detach().clone()
    p.grad = torch.tensor([3.0, 0.0])
    optimizer.step()
    # m = 1.75, v = 4.75: 0.3 / sqrt(4.75 - 3.0625 + 0.25)
    assert torch.allclose(p.detach(), before - torch.tensor([0.3 / 1.9375**0.5, 0.0]))


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_constant_gradients_of_any_size_keep_the_weights_finite(compiled: bool, name: str, compiling: None) -> None:
    """V - m^2 then is nothing but rounding, and of either sign."""
    device = torch.device(name)
    if compiled and not can_compile(device):
        pytest.skip("no compiler")
    gradient = torch.logspace(1, 4, 64, device=device)
    gradient = torch.cat([gradient, -gradient])
    parameter = nn.Parameter(torch.zeros(128, device=device))
    optimizer = CenteredRMSProp([parameter], lr=1e-3, compiled=compiled)
    for step in range(400):
        parameter.grad = gradient * (1 + 1e-6 * (step % 2))
        optimizer.step()
        assert parameter.isfinite().all(), f"step {step}"


def test_a_positive_variance_gives_the_same_bits_as_the_bare_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter, mean, square = (torch.zeros(1000) for _ in range(3))
    weight = nn.Parameter(parameter.clone())
    optimizer = CenteredRMSProp([weight], lr=0.1)
    for _ in range(20):
        gradient = torch.randn(1000, generator=generator)
        weight.grad = gradient.clone()
        optimizer.step()
        mean.lerp_(gradient, 1 - 0.95)
        square.mul_(0.95).addcmul_(gradient, gradient, value=1 - 0.95)
        variance = torch.addcmul(square, mean, mean, value=-1)
        assert (variance > 0).all()
        parameter.addcdiv_(gradient, (variance + 0.01 / 32**2).sqrt(), value=-0.1)
        assert torch.equal(weight, parameter)


def test_a_fused_bank_can_be_followed_by_heads_that_all_train() -> None:
    learner = make(small())
    generator, probe = torch.Generator().manual_seed(1), batches(1)["observation"][0]
    for config in (Config(), Config(trainable_heads="all")):
        apply(learner, "inject", probe, config=config, generator=generator)
    learner.update(batches(1))


def test_a_captured_update_is_stale_when_the_target_reads_other_memory() -> None:
    learner = make(small(normalization="layer"))
    generator, probe = torch.Generator().manual_seed(1), batches(1)["observation"][0]
    learner.update(batches(2))
    for config in (Config(), Config(trainable_heads="all")):
        apply(learner, "inject", probe, config=config, generator=generator)
    storage, version = [p.data_ptr() for p in learner.target.parameters()], learner.version
    learner.copy_target()
    assert storage != [p.data_ptr() for p in learner.target.parameters()]  # what is frozen is shared from now on
    assert learner.version > version


def test_a_copied_optimizer_goes_on_as_the_original() -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = CenteredRMSProp([p], lr=0.1)
    for _ in range(2):
        p.grad = torch.tensor([1.0, 0.5])
        optimizer.step()
        twin = copy.deepcopy(optimizer)
    (q,) = twin.param_groups[0]["params"]
    assert q is not p
    for each, its in ((optimizer, p), (twin, q)):
        its.grad = torch.tensor([3.0, -1.0])
        each.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_is_the_same_step_and_a_failing_compiler_is_survived(
    name: str, compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device(name)
    if not can_compile(device):
        pytest.skip("no compiler")
    parameters = [
        [nn.Parameter(torch.ones(7, 5, device=device)), nn.Parameter(torch.zeros(3, device=device))] for _ in range(3)
    ]

    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    plain, compiled, failing = (CenteredRMSProp(p, lr=0.1, compiled=i == 1) for i, p in enumerate(parameters))
    monkeypatch.setattr(failing, "_step", no_compiler)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for index in range(2):
            gradient = torch.randn(parameters[0][index].shape, generator=generator).to(device)
            for copies in parameters:
                copies[index].grad = gradient.clone()
        plain.step()
        compiled.step()
        if step == 0:
            with pytest.warns(UserWarning, match="could not be compiled"):
                failing.step()
        else:
            failing.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it was compiled
    for expected, got, survived in zip(*parameters, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(survived, expected)


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gradients_that_are_not_finite_move_nothing_if_the_optimizer_is_told(
    compiled: bool, name: str, compiling: None
) -> None:
    device = torch.device(name)
    if compiled and not can_compile(device):
        pytest.skip("no compiler")
    parameter = nn.Parameter(torch.ones(2, device=device))
    optimizer = CenteredRMSProp([parameter], lr=0.1, compiled=compiled)
    parameter.grad = torch.tensor([1.0, -1.0], device=device)
    optimizer.step()
    before = parameter.detach().clone()
    parameter.grad = torch.tensor([float("nan"), float("inf")], device=device)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    assert torch.equal(parameter, before)
    assert all(slot.isfinite().all() for slot in optimizer.state[parameter].values())
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    assert parameter.isnan().all()


def test_the_step_is_compiled_for_more_shapes_than_pytorch_would(
    compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # traced, but not compiled
    stats, num_shapes = torch._dynamo.utils.counters["stats"], torch._dynamo.config.recompile_limit + 2
    before = stats["unique_graphs"]
    for size in range(101, 101 + num_shapes):
        parameter = nn.Parameter(torch.ones(size))
        parameter.grad = torch.ones(size)
        CenteredRMSProp([parameter], compiled=True).step()
    assert stats["unique_graphs"] - before == num_shapes


def test_target_moves_only_when_it_is_copied_and_bit_for_bit() -> None:
    learner = make(small())
    before = copy.deepcopy(learner.target.state_dict())
    learner.update(batches(2))
    assert all(torch.equal(before[k], v) for k, v in learner.target.state_dict().items())
    learner.copy_target()
    online = learner.online.state_dict()
    assert all(torch.equal(online[k], v) for k, v in learner.target.state_dict().items())
    assert not all(torch.equal(before[k], online[k]) for k in before)


def test_the_end_of_a_step_copies_the_target_once_a_period_and_never_before_the_first_update() -> None:
    learner = make(small(target_period=100, num_envs=2))  # 8 frames a step
    ((online, target),) = learner.plastic_parts.values()
    assert target is not None

    def copied(frames: int) -> bool:
        before = [p.clone() for p in target.parameters()]
        learner.end_of_step(frames)
        return not all(map(torch.equal, before, target.parameters()))

    with torch.no_grad():
        next(online.parameters()).add_(1)
    assert not copied(104)
    learner.update(batches(1))
    assert [frames for frames in range(8, 320, 8) if copied(frames)] == [104]
    learner.update(batches(1))
    assert [frames for frames in range(112, 320, 8) if copied(frames)] == [200]


def test_same_seed_same_parameters_and_k_updates_in_one_call_equal_k_calls() -> None:
    together, apart = make(small()), make(small())
    together.update(batches(3))
    for batch in batches(3).unbind(0):
        apart.update(batch.unsqueeze(0))
    other = make(small(), seed=1)
    for k, v in together.online.state_dict().items():
        assert torch.equal(v, apart.online.state_dict()[k])
    assert not torch.equal(together.online.encoder.layers[0].weight, other.online.encoder.layers[0].weight)  # type: ignore[union-attr,index]


@pytest.mark.parametrize("optimizer", ["centered_rmsprop", "adam"])
@pytest.mark.parametrize("normalization", ["none", "layer", "spectral"])
def test_updates_fit_a_fixed_batch(optimizer: str, normalization: str) -> None:
    learner = make(small(optimizer=optimizer, normalization=normalization, lr=1e-3, optimizer_eps=1e-4))
    batch = batches(1, 4)
    first = float(learner.compute_loss(batch[0]).detach())
    for _ in range(80):
        learner.update(batch)
    assert float(learner.compute_loss(batch[0]).detach()) < 0.7 * first


def test_spectral_norm_approaches_one_while_training() -> None:
    learner = make(small(normalization="spectral"))
    learner.update(batches(5))
    layer = next(m for m in learner.online.modules() if isinstance(m, SpectralLinear))
    sigma = torch.dot(layer.left, layer.weight @ layer.right)
    assert float(torch.linalg.matrix_norm(layer.weight / sigma, 2).detach()) == pytest.approx(1, rel=0.05)


def test_gradient_norm_is_clipped() -> None:
    free, clipped = make(small()), make(small(max_grad_norm=1e-3))
    free.update(batches(1))
    clipped.update(batches(1))
    norms = [
        torch.cat([p.grad.flatten() for p in x.online.parameters() if p.grad is not None]).norm()
        for x in (free, clipped)
    ]
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["centered_rmsprop", "adam"])
@pytest.mark.parametrize("freeze_encoder", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"regularizer": "l2-init", "activation": "crelu", "anchor": "zero"},
        {"regularizer": "parseval", "weight_projection": "nap", "normalization": "layer"},
    ],
)
def test_captured_updates_train_the_same_network_as_uncaptured_ones(
    optimizer: str, freeze_encoder: bool, options: dict[str, str]
) -> None:
    """Across growth and a target copy, within the rounding of atomics and other kernels: 1e-3 of each tensor's scale."""
    device = torch.device("cuda")
    config = small(optimizer=optimizer, optimizer_eps=1e-4, max_grad_norm=10.0, **{"anchor": "mirrored"} | options)
    pool = batches(1, 5, size=64)[0].to(device)
    plain, graphed = (
        DoubleDQN(config, make_spec(ACTIONS), width=32, device=device, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    captured = CapturedUpdate(graphed, lambda rows: pool[rows], BATCH)
    for stage in range(3):
        rows = torch.randint(64, (4 * BATCH,), generator=torch.Generator().manual_seed(stage))
        plain.update(pool[rows.to(device)].view(4, BATCH))
        captured.update(rows)
        assert graphed.updates == plain.updates
        for learner in (plain, graphed):
            if stage == 1:
                learner.copy_target()
            generator = torch.Generator().manual_seed(stage)
            frozen = freeze_encoder and stage == 0
            grow(learner, pool["observation"], anchor=config.anchor, generator=generator, freeze_encoder=frozen)
    assert graphed.report().loss == pytest.approx(plain.report().loss, rel=1e-3)
    for name, tensor in plain.online.state_dict().items():
        scale = float(tensor.abs().max())
        assert torch.allclose(graphed.online.state_dict()[name], tensor, rtol=0, atol=1e-3 * scale + 1e-6), name
