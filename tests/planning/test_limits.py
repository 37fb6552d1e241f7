"""The model of the least time: what is counted against hand computation and against the real learner, and what must hold of any limit."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from growtrain.environments.atari import make_spec
from growtrain.learners.gradient_step import compiles
from growtrain.learners.optimizers import can_compile
from growtrain.networks.heads import multiplied_by_onednn
from growtrain.planning.costs import StageCost, make_plan
from growtrain.planning.hardware import HARDWARE, Constant, hardware_named, hardware_of
from growtrain.planning.kernels import Access, Kernel, KernelCounter
from growtrain.planning.limits import Model, kernel_times, missed_bytes, sensitivity, stage_limit
from growtrain.planning.table import render_limit
from growtrain.planning.work import Work, WorkByWidth, count_work
from growtrain.settings.config import Config
from growtrain.settings.presets import paper
from growtrain.settings.text import ConfigError, format_hours

SPEC = make_spec(6)
A100 = HARDWARE["a100"]
SMALL: dict[str, Any] = {"batch_size": 4, "encoder_width": 0.25, "width": 32, "num_envs": 2}


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """Of the paper's job and of growing by the whole network, in both stacks."""
    return {
        "paper": Model(paper(), SPEC, "fast"),
        "reference": Model(paper(), SPEC, "reference"),
        "network": Model(paper(freeze="network"), SPEC, "fast"),
    }


def counted(work: Any, *, gpu: bool = True) -> list[Kernel]:
    with KernelCounter(gpu=gpu) as counter:
        work()
    return counter.kernels


# --- what is counted


def test_a_convolution_by_hand() -> None:
    layer, x = torch.nn.Conv2d(3, 5, 4, 2), torch.rand(7, 3, 10, 10, requires_grad=True)  # 10 -> 4 pixels a side
    convolution, bias = counted(lambda: layer(x))
    flops, below, weight, above = (
        2 * 7 * 5 * 4 * 4 * 3 * 4 * 4,
        4 * 7 * 3 * 10 * 10,
        4 * 5 * 3 * 4 * 4,
        4 * 7 * 5 * 4 * 4,
    )
    assert (convolution.flops, convolution.arithmetic) == (flops, "convolution")
    assert convolution.bytes_moved == below + weight + above
    assert (bias.flops, bias.bytes_moved) == (0, 2 * above + 4 * 5)
    backward = counted(layer(x).square().sum().backward)
    gradients = [kernel for kernel in backward if kernel.arithmetic == "convolution"]
    assert [kernel.flops for kernel in gradients] == [flops, flops]
    assert {kernel.bytes_moved for kernel in gradients} == {above + weight + below}
    assert [kernel.bytes_moved for kernel in backward if kernel.name == "bias_gradient"] == [above + 4 * 5]


def test_views_and_allocations_are_no_kernels_and_what_is_changed_in_place_moves_twice() -> None:
    x, y = torch.rand(6, 4), torch.rand(6, 4)
    assert not counted(lambda: (x[1:].t().reshape(4, 5), x.detach(), torch.empty_like(x), x.expand(2, 6, 4)))
    assert [kernel.bytes_moved for kernel in counted(lambda: x.add_(y))] == [3 * 4 * 24]
    assert [kernel.bytes_moved for kernel in counted(lambda: x.copy_(y))] == [2 * 4 * 24]
    assert [kernel.bytes_moved for kernel in counted(lambda: torch.add(x, y[:1].expand(6, 4)))] == [4 * (24 + 4 + 24)]


def test_rows_drawn_from_a_large_tensor_are_all_that_is_read_of_it() -> None:
    table, rows = torch.rand(1000, 8), torch.tensor([3, 900])
    (kernel,) = counted(lambda: table.index_select(0, rows))
    assert kernel.bytes_moved == 2 * (2 * 8 * 4) + 2 * 8
    assert missed_bytes([kernel], 1e9) == [2 * 8 * 4]  # wherever the rows lie, they are not in a cache


def test_what_is_fused_reads_what_was_there_and_writes_what_is_left() -> None:
    parameters, gradients = [torch.rand(10), torch.rand(30)], [torch.rand(10), torch.rand(30)]
    counter = KernelCounter(gpu=True)
    with counter, counter.fused("step"):
        scaled = torch._foreach_mul(gradients, 2.0)
        torch._foreach_add_(scaled, 1.0)
        torch._foreach_sub_(parameters, scaled)
    (kernel,) = counter.kernels
    assert (kernel.name, kernel.bytes_moved) == ("step", 4 * 40 * (1 + 2))
    assert len(counted(lambda: torch._foreach_add_(parameters, 1.0))) == 1
    assert len(counted(lambda: torch._foreach_add_(parameters, 1.0), gpu=False)) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"anchor": "mirrored", "freeze_encoder_at": 2},
        {"anchor": "zero", "width": 33},
        {"freeze": "network"},
        {"freeze": "network", "live_encoder": "cold", "optimizer": "adam"},
        {"trainable_heads": "all", "schedule": "grow1x"},
        {"schedule": "widen3x"},
        {"regularizer": "parseval", "schedule": "fixed"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "paper",
)
def test_flops_are_those_of_the_plan_and_other_widths_are_as_if_counted(settings: dict[str, Any]) -> None:
    config = Config(**SMALL | settings)
    stages = make_plan(config, SPEC).stages
    for cost, work in zip(stages, count_work(config, SPEC), strict=True):
        assert sum(kernel.flops for kernel in work.update) == cost.flops_per_update
        assert sum(kernel.flops for kernel in work.play) == config.num_envs * cost.flops_per_action
    wider = dataclasses.replace(config, width=config.width + 160)
    assert WorkByWidth(config, SPEC).at(wider.width) == count_work(wider, SPEC)
    with pytest.raises(ValueError, match="aligned otherwise"):
        WorkByWidth(config, SPEC).at(config.width + 1)


def test_a_head_frozen_once_adds_its_passes_and_their_gradient() -> None:
    first, second = (total_of(work) for work in WorkByWidth(paper(schedule="grow1x"), SPEC).at(512))
    assert second["kernels"] > first["kernels"]
    # Two heads, three passes and one back.
    assert second["flops"] - first["flops"] == 64 * 2 * 4 * (3136 * 512 + 512 * 6)


def total_of(work: Work) -> dict[str, int]:
    return {"kernels": len(work.update), "flops": sum(kernel.flops for kernel in work.update)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_counting_compiles_nothing(compiling: None) -> None:
    """Of a run that is long enough for its updates to be compiled."""
    config = paper(schedule="grow1x", width=32, encoder_width=0.1, batch_size=2)
    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    assert compiles(config, torch.device("cpu"), whole=True)
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    count_work(config, SPEC)
    assert stats["unique_graphs"] == before


# --- how long that takes


def test_a_kernel_takes_the_longest_of_its_three_times() -> None:
    memory, cache, peak = A100.memory_bandwidth.value, A100.cache_bandwidth.value, A100.product_flops.value
    large = Access(0, 10**9)
    kernels = [
        Kernel("add", "none", 0, (Access(1, 1000),)),
        Kernel("mm", "product", 10**12, (large,)),
        Kernel("copy", "none", 0, (large,)),
        Kernel("copy", "link", 0, (Access(None, 10**9),)),
    ]
    times = kernel_times(kernels, A100, 1e-6)
    assert [time.bound for time in times] == ["latency", "arithmetic", "memory", "memory"]
    seconds = [time.seconds for time in times]
    assert seconds == pytest.approx([1e-6, 10**12 / peak, 10**9 / memory, 10**9 / A100.link_bandwidth.value])
    (resident,) = kernel_times([Kernel("add", "none", 0, (Access(0, 10**7, 2),))], A100, 0.0)
    assert resident.seconds == pytest.approx(2 * 10**7 / cache)  # used a moment ago, in the round before


def test_a_cache_holds_what_was_used_last() -> None:
    kernels = [Kernel(str(buffer), "none", 0, (Access(buffer, 10),)) for buffer in (0, 1, 2, 1)]
    assert missed_bytes(kernels, 30) == [0, 0, 0, 0]
    assert missed_bytes(kernels, 29) == [10, 0, 10, 0]  # between two uses of 0 and of 2, all three are used
    assert missed_bytes(kernels, 19) == [10, 10, 10, 10]
    assert missed_bytes(kernels, 20) == [10, 0, 10, 0]


@pytest.mark.parametrize("stack", ["paper", "reference"])
@pytest.mark.parametrize("hardware", HARDWARE.values(), ids=HARDWARE)
def test_a_limit_grows_with_the_width_and_with_the_stages(models: dict[str, Model], stack: str, hardware: Any) -> None:
    limits = [models[stack].limit(hardware, width) for width in (128, 512, 2048, 8192)]
    for narrow, wide in itertools.pairwise(limits):
        for before, after in zip((*narrow.stages, *narrow.baseline), (*wide.stages, *wide.baseline), strict=True):
            assert before.update_seconds <= after.update_seconds
            assert before.training_hours <= after.training_hours
    for limit in limits:
        updates = [stage.update_seconds for stage in limit.stages]
        assert updates == sorted(updates)  # anchors of the paper: every stage has two heads more


def test_small_networks_are_bound_by_latency_and_large_ones_are_not(models: dict[str, Model]) -> None:
    small, large = (models["paper"].limit(HARDWARE["h100"], width).stages[0] for width in (32, 65536))
    assert small.shares["latency"] > 0.8 > 0.2 > large.shares["latency"]
    assert small.update_seconds >= small.num_kernels * A100.graph_kernel.value
    for stage in (small, large):
        assert sum(stage.shares.values()) == pytest.approx(1)
    assert models["reference"].limit(A100, 32).stages[0].update_seconds > 5 * small.update_seconds


def test_a_network_frozen_whole_costs_the_same_at_every_stage(models: dict[str, Model]) -> None:
    limit = models["network"].limit(A100)
    first, *grown = limit.stages
    assert len({stage.update_seconds for stage in grown}) == 1
    assert {stage.cost.flops_per_update for stage in limit.stages} == {first.cost.flops_per_update}
    # The values are gathered and added; pairs of units are put together.
    assert grown[0].num_kernels > first.num_kernels
    assert limit.evaluation_hours > models["paper"].limit(A100).evaluation_hours  # acting computes all that is frozen


def test_growing_saves_more_the_wider_the_network_where_memory_binds(models: dict[str, Model]) -> None:
    saved = [models["network"].limit(A100, width).saved_hours for width in (512, 2048, 8192)]
    assert saved == sorted(saved)
    assert saved[-1] > 1
    never = Model(paper(schedule="full1x"), SPEC, "fast").limit(A100)
    assert never.saved_hours == 0
    assert never.stages == never.baseline


def test_stages_of_the_fast_stack_overlap_and_those_of_the_reference_add_up(models: dict[str, Model]) -> None:
    slow = A100.with_scaled("emulator_frames", 1e-3)
    for name in ("paper", "reference"):
        quick, waiting = (models[name].limit(hardware) for hardware in (A100, slow))
        emulating = 200e6 / ((1 if name == "reference" else 8) * slow.emulator_frames.value) / 3600
        assert waiting.training_hours > emulating
        if name == "paper":  # nothing but the acting comes on top
            assert {stage.bound for stage in waiting.stages} == {"playing"}
            assert waiting.training_hours < 1.05 * emulating
        else:
            assert waiting.training_hours - quick.training_hours == pytest.approx(0.999 * emulating)
    assert models["reference"].config.num_envs == 1
    eager = Model(paper(execution="eager", schedule="fixed"), SPEC, "fast").limit(A100).stages[0]
    assert eager.update_seconds == models["reference"].limit(A100).stages[0].update_seconds
    assert eager.training_hours < models["reference"].limit(A100).baseline[0].training_hours


SECONDS = dataclasses.replace(
    A100,
    product_flops=Constant(1.0, "by hand"),
    convolution_flops=Constant(0.5, "by hand"),
    graph_kernel=Constant(1.0, "by hand"),
    eager_kernel=Constant(10.0, "by hand"),
    emulator_frames=Constant(1.0, "by hand"),
    cores=Constant(8.0, "by hand"),
)


@pytest.mark.parametrize(
    ("seconds", "settings", "emulator", "training", "evaluation"),
    [
        # 100 steps of all lanes: two launches for each of two updates, longer than the emulators' 4, and one that stores; 80 decisions.
        ({}, {}, 1.0, 100 * (40 + 10) + 80 * 20, 40 + 4),
        ({}, {}, 0.05, 100 * (80 + 10) + 80 * 20, 40 + 80),
        ({"act": 30}, {}, 1.0, 100 * (40 + 10) + 80 * 60, 40 + 4),  # acting is waited for
        ({"update": 50}, {}, 1.0, 200 * 150 + 100 * 1 + 80 * 2, 40 + 4),  # learning is waited for
        ({"play": 100}, {}, 1.0, 100 * (40 + 10) + 80 * 20, 400 + 4),
        ({}, {"execution": "eager"}, 1.0, 100 * (80 + 10) + 80 * 20, 40 + 4),  # four launches an update
    ],
)
def test_a_stage_by_hand(
    seconds: dict[str, int], settings: dict[str, Any], emulator: float, training: float, evaluation: float
) -> None:
    work = work_of(**seconds)
    config, hardware = paper(num_envs=8, eval_episodes=4, **settings), SECONDS.with_scaled("emulator_frames", emulator)
    limit = stage_limit(config, cost_of(), work, hardware, "fast")
    assert limit.training_hours * 3600 == pytest.approx(training + 10 / 0.5)  # and the sweep
    assert limit.evaluation_hours * 3600 == pytest.approx(1600 / 4 / 4 * evaluation)
    assert limit.bound == ("learning" if "update" in seconds else "playing")


def test_a_stage_of_the_reference_by_hand() -> None:
    config = paper(num_envs=1, eval_episodes=4, execution="eager")
    limit = stage_limit(config, cost_of(), work_of(), SECONDS, "reference")
    assert limit.training_hours * 3600 == pytest.approx(200 * 30 + 640 * 20 + 800 * (4 + 10) + 10 / 0.5)
    assert limit.evaluation_hours * 3600 == pytest.approx(1600 / 4 * (40 + 4))


def work_of(**seconds: int) -> Work:
    """Kernels of so many seconds each, by default of no more than one takes at least."""
    counts = {"update": 3, "act": 2, "store": 1, "play": 4}
    kernels = {name: (Kernel("k", "product", seconds.get(name, 0), ()),) * count for name, count in counts.items()}
    return Work(**kernels)


def cost_of() -> StageCost:
    """Of 3200 frames, 800 agent steps."""
    cost = make_plan(paper(schedule="fixed"), SPEC).stages[0]
    own = {"start_frame": 0, "end_frame": 3200, "updates": 200, "policy_steps": 640, "evaluation_frames": 1600}
    return dataclasses.replace(cost, **own, flops_per_swept_row=2, rows_swept=5)


def test_what_is_launched_one_by_one_is_carried_out_meanwhile(models: dict[str, Model]) -> None:
    """Of a stage that waits for launches a GPU whose kernels take half as long shortens nothing."""
    h200 = HARDWARE["h200"]
    faster = h200.with_scaled("graph_kernel", 0.5)
    before, after = (models["paper"].limit(each).stages[-1] for each in (h200, faster))
    assert before.bound == after.bound == "playing"
    assert after.update_seconds < before.update_seconds
    assert after.training_hours == before.training_hours


def test_every_constant_counts_for_something_and_names_its_source(models: dict[str, Model]) -> None:
    for hardware in HARDWARE.values():
        assert all(constant.source and constant.value > 0 for constant in hardware.constants.values())
    moved = {
        "paper": sensitivity(models["paper"], A100, 4096),
        "reference": sensitivity(models["reference"], A100, 4096),
    }
    still = {name: models[name].limit(A100, 4096).saved_hours for name in moved}
    matters = {
        constant for name in moved for constant, ends in moved[name].items() if any(end != still[name] for end in ends)
    }
    assert matters >= {
        "product_flops",
        "memory_bandwidth",
        "graph_kernel",
        "eager_kernel",
        "cache_bytes",
        "cache_bandwidth",
    }
    for name, factor in ((name, factor) for name in A100.constants for factor in (0.5, 2.0)):
        faster = models["paper"].limit(A100.with_scaled(name, factor)).training_hours
        better = (factor > 1) != (name in ("graph_kernel", "eager_kernel"))
        base = models["paper"].limit(A100).training_hours
        assert faster <= base if better else faster >= base, name


def test_more_environments_share_launches_and_cores(models: dict[str, Model]) -> None:
    few, many = (Model(paper(num_envs=lanes), SPEC, "fast").limit(A100) for lanes in (1, 64))
    assert few.training_hours > models["paper"].limit(A100).training_hours > many.training_hours


# --- names and text


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(device: str, name: str | None) -> None:
    found = hardware_of(device)
    assert (found and found.name) == name


def test_an_h200_has_all_of_its_chips_cache_and_an_h100_five_sixths() -> None:
    assert [HARDWARE[name].cache_bytes.value for name in ("h100", "h200")] == [50e6, 60e6]
    assert HARDWARE["h200"].cache_bandwidth.value > HARDWARE["h100"].cache_bandwidth.value


@pytest.mark.gpu
def test_the_cache_is_as_large_as_the_driver_says() -> None:
    device = torch.cuda.get_device_properties(0)
    if (hardware := hardware_of(device.name)) is None:
        pytest.skip(f"the table has no {device.name}")
    assert hardware.cache_bytes.value == pytest.approx(device.L2_cache_size, rel=0.05)  # its MB are of 1024^2 bytes


def test_what_suits_this_processor_decides_nothing_of_a_gpu() -> None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("PyTorch without oneDNN")
    works = []
    for suits in (True, False):
        with multiplied_by_onednn(suits):
            works.append(count_work(paper(schedule="grow1x", **SMALL), SPEC))
    assert works[0] == works[1]
    assert any(kernel.name == "addmm" for kernel in works[0][0].update)


def test_an_unknown_name_lists_those_that_there_are() -> None:
    assert hardware_named("RTX4090").title == "NVIDIA GeForce RTX 4090"
    with pytest.raises(ConfigError, match="a100, a100-80gb, h100, h200, rtx4090, l4") as refusal:
        hardware_named("tpu")
    assert "\n" not in str(refusal.value)


def test_the_text_says_that_nothing_was_measured(models: dict[str, Model]) -> None:
    text = render_limit(models["paper"], A100)
    assert text.splitlines()[0].startswith("modelled, not measured: ")
    assert "NVIDIA A100 SXM 40 GB" in text
    assert all(line == line.rstrip() and len(line) <= 130 and line.isascii() for line in text.splitlines())
    limit = models["paper"].limit(A100)
    assert f"{limit.training_hours:.2f} h" in text
    assert f"growing saves {format_hours(limit.saved_hours)} h" in text
    cost = models["reference"].limit(A100).saved_hours
    assert f"growing costs {-cost:.2f} h" in render_limit(models["reference"], A100)
    assert "updates in a CUDA graph, 8 environments beside them" in text
    eager = Model(paper(execution="eager", schedule="fixed"), SPEC, "fast")
    assert "every operator launched, 8 environments beside them" in render_limit(eager, A100)
