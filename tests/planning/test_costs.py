"""What `plan` promises against what the real learner does: FLOPs, parameters, memory, and refusals."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from growing import grow
from torch.utils.flop_counter import FlopCounterMode

from growtrain.environments.atari import make_spec
from growtrain.growth.inject import count_parameters
from growtrain.growth.transaction import apply
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.networks.build import make_network
from growtrain.networks.snapshot import ROWS_AT_ONCE
from growtrain.planning.costs import (
    CHECKPOINTS,
    LINE_BYTES,
    SHARED_COPIES,
    full_width,
    make_plan,
    network_shape,
    update_flops,
)
from growtrain.planning.memory import check_memory
from growtrain.planning.speed import Speed, Timing, measure_speed, synthetic_batches
from growtrain.planning.table import render
from growtrain.replay.frames import FrameRing, replay_bytes
from growtrain.settings.budget import updates_due
from growtrain.settings.config import Config
from growtrain.settings.presets import paper, resolve
from growtrain.settings.schedules import schedule_of
from growtrain.settings.text import ConfigError

CPU = torch.device("cpu")


class _Everything(SimpleNamespace):
    """Stands in for the counter's module tracker, which compares modules for equality and so fails on tensordicts."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def counted() -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Everything(parents={"Global"})
    return counter


@pytest.mark.parametrize("anchor", ["frozen", "zero", "mirrored"])
@pytest.mark.parametrize(
    "settings",
    [
        {"width": 48, "encoder_width": 1.0},
        {"width": 33, "encoder_width": 0.5, "freeze_encoder_at": 1, "output_bias": "per_action"},
        {"width": 20, "encoder_width": 0.3, "freeze_encoder_at": 2, "normalization": "layer"},
        {"width": 16, "encoder_width": 0.25, "normalization": "spectral", "optimizer": "adam"},
        {"width": 20, "encoder_width": 0.3, "activation": "crelu", "regularizer": "l2", "freeze_encoder_at": 2},
        {"width": 22, "encoder_width": 0.2, "activation": "fourier", "regularizer": "l2-init"},
        {"width": 20, "encoder_width": 0.3, "regularizer": "parseval", "freeze_encoder_at": 2},
        {"width": 16, "encoder_width": 0.25, "normalization": "layer", "weight_projection": "nap"},
    ],
    ids=["trained", "frozen-at-1", "frozen-at-2-layer-norm", "spectral-adam", "crelu", "fourier", "parseval", "nap"],
)
def test_flops_and_parameters_are_the_real_learners(anchor, settings):
    if anchor == "mirrored" and settings.get("activation"):
        pytest.skip("refused by Config")
    config = Config(anchor=anchor, batch_size=3, **settings)
    plan, generator = make_plan(config, make_spec(5)), torch.Generator().manual_seed(0)
    learner = DoubleDQN(config, make_spec(5), width=config.width, device=CPU, generator=generator)
    batches = synthetic_batches(config, make_spec(5), 2, generator)
    assert len(plan.stages) == 4
    for cost in plan.stages:
        if cost.stage:
            freeze = cost.stage == config.freeze_encoder_at
            grow(learner, batches["observation"][0], anchor=anchor, generator=generator, freeze_encoder=freeze)
            learner.copy_target()  # the steady state: from here on both networks share what is frozen
        with counted() as update:
            learner.update(batches)
        with counted() as action:
            learner.act(batches["observation"][0, :1])
        assert update.get_total_flops() == 2 * cost.flops_per_update
        assert action.get_total_flops() == cost.flops_per_action
        assert count_parameters(learner.online) == cost.parameters_total
        assert count_parameters(learner.online, trainable=True) == cost.parameters_trainable


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable_heads": "all", "encoder_width": 0.3, "regularizer": "parseval"},
        {"trainable_heads": "all", "anchor": "zero", "freeze_encoder_at": 1},
        {"split": "conv3", "encoder_width": 0.5},
        {"split": "conv2", "anchor": "mirrored", "freeze_encoder_at": 2},
        {"split": "conv1", "anchor": "zero"},
        {"split": "conv1", "trainable_heads": "all"},
        {"schedule": "widen3x"},
        {"schedule": "at:0.1,0.5", "intervention": "widen", "normalization": "layer", "freeze_encoder_at": 1},
        {"schedule": "reset", "freeze_encoder_at": 1},
        {"schedule": "redo"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_flops_and_parameters_of_other_interventions_and_splits(settings):
    config = Config(**({"batch_size": 3, "width": 16, "encoder_width": 0.25} | settings))
    plan, generator = make_plan(config, make_spec(5)), torch.Generator().manual_seed(0)
    learner = DoubleDQN(config, make_spec(5), width=config.width, device=CPU, generator=generator)
    batches = synthetic_batches(config, make_spec(5), 1, generator)
    for cost in plan.stages:
        if cost.stage:
            freeze = cost.stage == config.freeze_encoder_at
            kind, probe = schedule_of(config).intervention, batches["observation"][0]
            apply(learner, kind, probe, config=config, generator=generator, freeze_encoder=freeze)
        if cost.stage or config.split == "conv1":
            learner.copy_target()
        with counted() as update:
            learner.update(batches)
        with counted() as action:
            learner.act(batches["observation"][0, :1])
        assert update.get_total_flops() == cost.flops_per_update
        assert action.get_total_flops() == cost.flops_per_action
        assert count_parameters(learner.online) == cost.parameters_total
        assert count_parameters(learner.online, trainable=True) == cost.parameters_trainable


@pytest.mark.parametrize(
    "settings",
    [{"freeze": "network"}, {"freeze_encoder_at": 2}, {"split": "conv1"}, {"freeze": "network", "double_dqn": False}],
)
def test_flops_of_the_loss_that_shares_nothing(settings):
    config = Config(**({"batch_size": 3, "width": 16, "encoder_width": 0.25, "execution": "eager"} | settings))
    plan, generator = make_plan(config, make_spec(5)), torch.Generator().manual_seed(0)
    learner = DoubleDQN(config, make_spec(5), width=config.width, device=CPU, generator=generator)
    batches = synthetic_batches(config, make_spec(5), 1, generator)
    for cost in plan.stages:
        if cost.stage:
            learner.copy_target()
            freeze = cost.stage == config.freeze_encoder_at
            apply(
                learner, "inject", batches["observation"][0], config=config, generator=generator, freeze_encoder=freeze
            )
        learner.copy_target()
        with counted() as update:
            learner.update(batches)
        assert update.get_total_flops() == cost.flops_per_update


def test_what_never_grows_is_its_own_baseline_and_the_plan_says_what_happens():
    reset = paper(schedule="reset")
    assert full_width(reset) is reset
    assert full_width(paper(intervention="fresh-optimizer")).schedule == "grow3x"
    wide = full_width(paper(schedule="grow1x", intervention="widen"))
    assert (wide.width, wide.schedule, wide.intervention) == (1024, "fixed", "inject")
    assert full_width(paper(schedule="widen3x")).width == 2048
    assert "does     net2wider at 25M, 50M, 100M" in render(make_plan(paper(schedule="widen3x"), make_spec(6)))
    assert "does     redo 12487 times from 208k to 200M" in render(make_plan(paper(schedule="redo"), make_spec(6)))
    assert "does" not in render(make_plan(paper(), make_spec(6)))
    adaptive = render(make_plan(paper(schedule="adaptive"), make_spec(6)))
    # every 4M frames, two copies by two seeds of 450 updates, beside an update for 16 frames
    assert "not counted below: 50 decisions, each of 1.8k updates of copies, beside 250k of training" in adaptive


def test_flops_of_the_nature_network_by_hand():
    # 84 -> 20 -> 9 -> 7 pixels a side; 7 x 7 x 64 = 3136 features; 6 actions; batch 32.
    conv1, conv2, conv3 = 20 * 20 * 32 * 8 * 8 * 4, 9 * 9 * 64 * 4 * 4 * 32, 7 * 7 * 64 * 3 * 3 * 64
    head, encoder = 3136 * 512 + 512 * 6, conv1 + conv2 + conv3
    stages = make_plan(paper(), make_spec(6)).stages
    assert stages[0].flops_per_action == 2 * (encoder + head)
    assert stages[0].flops_per_update == 64 * (4 * encoder + conv2 + conv3 + 5 * head)
    # Forward 3, backward into the encoder 1.
    assert stages[3].flops_per_update - stages[0].flops_per_update == 64 * 6 * 4 * head
    assert stages[0].parameters_total == (4 * 64 * 32 + 32) + (32 * 16 * 64 + 64) + (64 * 9 * 64 + 64) + head + 512 + 1


def test_a_frozen_encoder_leaves_only_the_live_heads_gradients():
    shape = network_shape(paper(), make_spec(6), 512)
    trained, frozen = (update_flops(shape, 32, 2, encoder_trains) for encoder_trains in (True, False))
    saved = {name for name, flops in dataclasses.asdict(frozen).items() if flops < dataclasses.asdict(trained)[name]}
    assert saved == {
        "encoder_forward",  # two passes, not three: online and target share it
        "frozen_forward",
        "encoder_weight_gradients",
        "encoder_input_gradients",
        "live_input_gradients",
        "frozen_input_gradients",
    }
    assert frozen.encoder_weight_gradients == frozen.encoder_input_gradients == frozen.frozen_input_gradients == 0
    assert frozen.live_input_gradients == 2 * 32 * 512 * 6


@pytest.mark.parametrize("total_frames", [200_000_000, 1_000_003])
@pytest.mark.parametrize("schedule", ["fixed", "grow1x", "grow3x", "full3x", "at:0.2,0.7"])
def test_stages_add_up_to_the_run(schedule, total_frames):
    config, _ = resolve("paper", {"schedule": schedule, "total_frames": total_frames})
    stages = make_plan(config, make_spec(6)).stages
    assert sum(stage.frames for stage in stages) == total_frames
    assert [stage.start_frame for stage in stages[1:]] == [stage.end_frame for stage in stages[:-1]]
    assert sum(stage.updates for stage in stages) == updates_due(config, total_frames // 4)
    assert sum(stage.policy_steps for stage in stages) == total_frames // 4 - config.learning_starts // 4
    evaluations = -(-total_frames // config.eval_period)
    assert sum(stage.evaluation_frames for stage in stages) == evaluations * config.eval_frames


def test_the_baseline_has_the_width_that_growth_ends_with():
    assert full_width(paper(width=128)).width == 512
    assert make_plan(full_width(paper(schedule="at:0.1,0.5")), make_spec(6)).stages[0].live_width == 3 * 512
    full = paper(schedule="full3x")
    assert full_width(full) is full
    grown, same = make_plan(full_width(paper()), make_spec(6)), make_plan(full, make_spec(6))
    assert grown.stages == same.stages


def test_memory_of_the_replay_is_what_it_allocates():
    config = paper(replay_capacity=999, num_envs=7)
    memory = make_plan(config, make_spec(6)).memory
    assert memory.replay == replay_bytes(999, 7, frame_shape=(1, 84, 84), stack_size=4)
    ring = FrameRing(999, 7, rng=np.random.default_rng(0), frame_shape=(1, 84, 84), stack_size=4)
    assert memory.replay_index == ring.valid.nbytes + ring._age.nbytes + ring._cursor.nbytes
    assert make_plan(paper(), make_spec(6)).memory.replay == pytest.approx(7.07e9, rel=1e-2)


@pytest.mark.parametrize("settings", [{}, {"regularizer": "l2-init", "activation": "crelu"}])
def test_networks_are_counted_with_gradients_and_slots(settings):
    config = Config(width=64, encoder_width=0.5, **settings)
    learner = DoubleDQN(config, make_spec(4), width=64, device=CPU, generator=torch.Generator().manual_seed(0))
    learner.update(synthetic_batches(config, make_spec(4), 1, torch.Generator().manual_seed(0)))
    tensors = [*learner.online.parameters(), *learner.target.parameters()]
    tensors += [p.grad for p in learner.online.parameters()]
    tensors += [slot for slots in learner.optimizer.state.values() for slot in slots.values()]
    tensors += learner.initial.values()
    held = sum(tensor.nbytes for tensor in tensors)
    planned = make_plan(dataclasses.replace(config, schedule="fixed"), make_spec(4)).memory.networks
    assert held <= planned <= 2 * held


def frozen_whole(config):
    """A learner whose network has been frozen whole at every injection of a configuration, and the plan."""
    learner = DoubleDQN(
        config, make_spec(4), width=config.width, device=CPU, generator=torch.Generator().manual_seed(0)
    )
    batches = synthetic_batches(config, make_spec(4), 1, torch.Generator().manual_seed(0))
    for seed in range(3):
        learner.update(batches)
        learner.copy_target()
        generator = torch.Generator().manual_seed(seed)
        apply(learner, "inject", batches["observation"][0], config=config, generator=generator)
    learner.update(batches)
    return learner, make_plan(config, make_spec(4))


def test_networks_that_were_frozen_whole_are_shared_and_saved_once():
    config = Config(width=512, encoder_width=0.5, freeze="network", replay_capacity=200, diagnostics_period=0)
    learner, plan = frozen_whole(config)
    state = learner.state_dict()
    slots = [slot for slots in state["optimizer"].values() for slot in slots.values()]
    saved = sum(tensor.nbytes for tensor in [*state["online"].values(), *state["target"].values(), *slots])
    checkpoints = plan.disk_bytes / (CHECKPOINTS + config.keep)
    assert saved <= checkpoints <= 1.1 * saved + LINE_BYTES * 10_000
    held = {p.data_ptr(): p.nbytes for network in (learner.online, learner.target) for p in network.parameters()}
    assert plan.stages[-1].parameters_shared == sum(p.numel() for p in learner.online.snapshot.parameters())
    trainable = 4 * plan.stages[-1].parameters_trainable
    expected = sum(held.values()) + (SHARED_COPIES - 1) * 4 * plan.stages[-1].parameters_shared + 4 * trainable
    assert plan.memory.networks == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "fixed"},
        {"schedule": "grow2x", "freeze": "network", "live_encoder": "cold"},
        {"schedule": "at:0.5", "intervention": "reset-encoder"},
        {"schedule": "at:0.5", "intervention": "reset-head"},
    ],
    ids=lambda settings: settings["schedule"] + settings.get("intervention", ""),
)
def test_a_network_that_is_frozen_from_the_start_is_counted_with_its_own_widths(settings):
    config = Config(width=24, encoder_width=0.25, frozen_width=64, frozen_encoder_width=1.0, batch_size=3, **settings)
    plan, generator = make_plan(config, make_spec(5)), torch.Generator().manual_seed(0)
    learner = DoubleDQN(config, make_spec(5), width=config.width, device=CPU, generator=generator)
    theirs = make_network(dataclasses.replace(config, encoder_width=1.0), make_spec(5), 64)
    learner.begin_beside(theirs.state_dict(), generator)
    batches = synthetic_batches(config, make_spec(5), 1, generator)
    for cost in plan.stages:
        if cost.stage:
            learner.copy_target()
            kind, probe = schedule_of(config).intervention, batches["observation"][0]
            apply(learner, kind, probe, config=config, generator=generator)
        for part in (batches, batches["next"]):
            if len(learner.online.snapshot):
                part["frozen_value"] = learner.frozen_value(part["observation"].flatten(0, 1)).unsqueeze(0)
            else:
                part.pop("frozen_value")
        with counted() as update:
            learner.update(batches)
        with counted() as action:
            learner.act(batches["observation"][0, :1])
        assert update.get_total_flops() == cost.flops_per_update
        assert action.get_total_flops() == cost.flops_per_action
        assert count_parameters(learner.online) == cost.parameters_total
        assert count_parameters(learner.online, trainable=True) == cost.parameters_trainable
        assert sum(p.numel() for p in learner.online.snapshot.parameters()) == cost.parameters_shared
        assert sum(network.head.width for network in learner.online.snapshot.networks) == cost.frozen_width
    alone = make_plan(dataclasses.replace(config, frozen_width=0), make_spec(5))
    own = 4 * plan.stages[0].parameters_shared
    assert plan.memory.networks - alone.memory.networks == SHARED_COPIES * own
    assert plan.memory.frozen_values == 4 * 5 * plan.memory.replay_index // 2 - 4 * 5 * 4 * config.num_envs
    assert plan.disk_bytes > alone.disk_bytes + own
    # What is frozen has the larger activations, where diagnostics look at many states.
    assert plan.memory.batch > alone.memory.batch


def test_a_sweep_is_counted_with_its_flops_and_what_it_holds():
    config = Config(width=32, encoder_width=0.5, freeze="network", batch_size=2, replay_capacity=1_000)
    learner, plan = frozen_whole(dataclasses.replace(config, diagnostics_period=0))
    rows = torch.zeros(ROWS_AT_ONCE, *make_spec(4).observation_shape, dtype=torch.uint8)
    sizes = []
    hooks = [
        layer.register_forward_hook(lambda _, given, out: sizes.append(given[0].nbytes + out.nbytes))
        for layer in learner.online.snapshot.networks[-1].modules()
        if not list(layer.children())
    ]
    with counted() as counter:
        learner.frozen_value(rows, torch.zeros(ROWS_AT_ONCE, 4))
    for hook in hooks:
        hook.remove()
    assert [stage.flops_of_sweep for stage in plan.stages] == [0, *[counter.get_total_flops() * 1_000 // 256] * 3]
    heads = make_plan(dataclasses.replace(plan.config, freeze="heads", anchor="mirrored"), make_spec(4))
    assert heads.memory.batch < max(sizes) <= plan.memory.batch


def limit_memory(monkeypatch, tmp_path: Path, version: int, limit: str, used: int, cache: int = 0) -> None:
    """A machine with much memory and a cgroup two levels up that has little."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=0))
    root = tmp_path / "cgroup"
    group = root / "job" if version == 2 else root / "memory" / "job"
    (group / "step" / "task").mkdir(parents=True)
    limit_file, usage_file, counter = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    for directory, value in ((group, limit), (group / "step", "max" if version == 2 else str(2**63 - 4096))):
        (directory / limit_file).write_text(f"{value}\n")
        (directory / usage_file).write_text(f"{used}\n")
        (directory / "memory.stat").write_text(f"anon 1\n{counter} {cache}\n")
    membership = tmp_path / "membership"
    membership.write_text("0::/job/step/task\n" if version == 2 else "5:cpu:/job\n4:memory:/job/step/task\n0::/\n")
    monkeypatch.setattr("growtrain.settings.machine.CGROUP_ROOT", root)
    monkeypatch.setattr("growtrain.settings.machine.CGROUP_MEMBERSHIP", membership)


@pytest.mark.parametrize("version", [1, 2])
def test_refuses_what_a_cgroup_does_not_allow_and_names_what_fits(monkeypatch, tmp_path, version):
    limit_memory(monkeypatch, tmp_path, version, limit=str(5 * 10**9), used=2 * 10**9, cache=10**9)
    with pytest.raises(ConfigError, match=r"7\.07 GB.*8\.\d\d GB of host memory where 4\.00 GB is free") as refusal:
        check_memory(make_plan(paper(), make_spec(6)), CPU)
    assert "\n" not in str(refusal.value)
    capacity = int(re.search(r"--replay-capacity (\d+) or less", str(refusal.value)).group(1))
    check_memory(make_plan(paper(replay_capacity=capacity), make_spec(6)), CPU)  # the remedy works
    needed = [
        make_plan(paper(replay_capacity=c), make_spec(6)).memory.needed("cpu")["host"]
        for c in (capacity, capacity + 1000)
    ]
    assert needed[0] <= 0.97 * 4e9 < needed[1]  # and is the largest, but for what is left spare


@pytest.mark.parametrize(("limit", "version"), [("max", 2), (str(2**63 - 4096), 1), (str(10**11), 2)])
def test_accepts_what_fits(monkeypatch, tmp_path, limit, version):
    limit_memory(monkeypatch, tmp_path, version, limit=limit, used=2 * 10**9)
    check_memory(make_plan(paper(), make_spec(6)), CPU)


def test_refuses_what_the_machine_does_not_have(monkeypatch, tmp_path):
    limit_memory(monkeypatch, tmp_path, 2, limit="max", used=0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**8))
    with pytest.raises(ConfigError, match=r"0\.10 GB is free: free memory, or lower --width"):
        check_memory(make_plan(paper(), make_spec(6)), CPU)


def test_refuses_what_the_gpu_does_not_have(monkeypatch, tmp_path):
    limit_memory(monkeypatch, tmp_path, 2, limit=str(4 * 10**9), used=0)  # enough for a host without the replay
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 10**9, 8 * 10**9))
    with pytest.raises(ConfigError, match=r"needs 8\.\d\d GB of GPU memory where 6\.00 GB is free") as refusal:
        check_memory(make_plan(paper(), make_spec(6)), torch.device("cuda"))
    assert "host" not in str(refusal.value)
    capacity = int(re.search(r"--replay-capacity (\d+) or less", str(refusal.value)).group(1))
    check_memory(make_plan(paper(replay_capacity=capacity), make_spec(6)), torch.device("cuda"))


@pytest.mark.parametrize("total_frames", [200_000_000, 123_456_789])
def test_the_table_fits_a_terminal_and_says_what_was_measured(total_frames):
    timing = Timing(
        update_seconds=(0.9,) * 4,
        act_seconds=(0.9,) * 4,
        eval_act_seconds=(0.9,) * 4,
        swept_row_seconds=(0.0,) * 4,
        timed=80,
        spread=0.1,
    )
    slower = Timing(
        update_seconds=(1.8,),
        act_seconds=(0.9,),
        eval_act_seconds=(0.9,),
        swept_row_seconds=(0.0,),
        timed=20,
        spread=0.7,
    )
    speed = Speed(
        machine="CPU, 2 threads",
        run=timing,
        baseline=slower,
        environment_seconds=0.9,
        eval_environment_seconds=0.9,
        overlapped=False,
    )
    plan = make_plan(paper(total_frames=total_frames), make_spec(18))
    text = render(plan, speed)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100
    assert "projected from 80 timed updates on this machine: CPU, 2 threads" in text
    assert "spread of the timings 70%: the machine is busy, time it again" in text
    rows = [line.split() for line in text.splitlines()[1:5]]
    assert [(row[0], row[2]) for row in rows] == [("0", "512"), ("1", "512+1024"), ("2", "512+2048"), ("3", "512+3072")]
    assert [row[7] for row in rows] == ["64%", "83%", "102%", "121%"]
    assert "hours" not in render(plan)


def test_projected_hours_add_on_a_cpu_and_overlap_on_a_gpu():
    config = paper(schedule="fixed", learning_starts=32, total_frames=32 + 4 * 4 * 3600, num_envs=8, eval_period=0)
    plan = make_plan(config, make_spec(6))
    assert plan.stages[0].updates == 3600
    timing = Timing(
        update_seconds=(2.0,),
        act_seconds=(8.0,),
        eval_act_seconds=(8.0,),
        swept_row_seconds=(0.0,),
        timed=1,
        spread=0.0,
    )
    speed = Speed(
        machine="", run=timing, baseline=timing, environment_seconds=3.0, eval_environment_seconds=3.0, overlapped=False
    )
    environment = (4 * 3600 + 8) / 8 * 3 / 3600
    assert speed.projected_hours(plan, timing) == pytest.approx([4 + 2 + environment])
    overlapped = dataclasses.replace(speed, overlapped=True)
    assert overlapped.projected_hours(plan, timing) == pytest.approx([4 + 2])
    assert speed.evaluation_hours(plan) == 0


def test_what_evaluation_takes_is_planned_and_bounded():
    config = paper(schedule="fixed", num_envs=64)
    plan = make_plan(config, make_spec(6))
    assert plan.stages[0].evaluations == 200
    line = "evaluate 200 times 30 whole episodes: 500k frames each time as planned, 3.24M at most"
    assert line in render(plan)
    assert "evaluate" not in render(make_plan(paper(eval_period=0), make_spec(6)))
    timing = Timing(
        update_seconds=(0.0,),
        act_seconds=(2.0,),
        eval_act_seconds=(1.0,),
        swept_row_seconds=(0.0,),
        timed=1,
        spread=0.0,
    )
    speed = Speed(
        machine="", run=timing, baseline=timing, environment_seconds=4.0, eval_environment_seconds=2.0, overlapped=False
    )
    assert speed.evaluation_hours(plan) == pytest.approx(200 * 500_000 / 4 / 30 * 3 / 3600)  # in 30 lanes of the 64
    assert speed.evaluation_hours(plan, at_most=True) == pytest.approx(200 * 108_000 / 4 * 3 / 3600)
    eight = make_plan(paper(schedule="fixed"), make_spec(6))  # which take four turns
    assert speed.evaluation_hours(eight, at_most=True) == pytest.approx(4 * 200 * 108_000 / 4 * 3 / 3600)


def test_a_sweep_takes_its_time_once_whether_environments_step_beside_updates_or_not():
    config = paper(
        schedule="at:8000",
        total_frames=16_000,
        learning_starts=800,
        replay_capacity=1_500,
        freeze="network",
        target_period=800,
    )
    plan = make_plan(config, make_spec(6))
    assert [stage.rows_swept for stage in plan.stages] == [0, 1_500]
    timing = Timing(
        update_seconds=(0.0,) * 2, act_seconds=(0.0,) * 2, eval_act_seconds=(0.0,) * 2, swept_row_seconds=(0.0, 2.4),
        timed=1, spread=0.0,
    )  # fmt: skip
    speed = Speed(
        machine="", run=timing, baseline=timing, environment_seconds=0.0, eval_environment_seconds=0.0, overlapped=False
    )
    for overlapped in (False, True):
        hours = dataclasses.replace(speed, overlapped=overlapped).projected_hours(plan, timing)
        assert hours == pytest.approx([0, 1_500 * 2.4 / 3600])


def test_lanes_of_an_evaluation_and_rows_of_a_sweep_are_timed_as_they_are(monkeypatch):
    """An evaluation of fewer episodes than lanes has as many lanes as episodes; a sweep reads its rows 256 at a time."""
    asked, played, swept = set(), [], []

    def act(learner, observation):
        asked.add(len(observation))
        return torch.zeros(())

    def environments(config, seconds):
        played.append(config.num_envs)
        return float(config.num_envs)

    own = DoubleDQN.frozen_value

    def frozen_value(learner, observation, before=None):
        swept.append((len(observation), before is None))
        return own(learner, observation, before)

    monkeypatch.setattr("growtrain.planning.speed._act", act)
    monkeypatch.setattr("growtrain.planning.speed._time_environments", environments)
    monkeypatch.setattr(DoubleDQN, "frozen_value", frozen_value)
    config = paper(
        width=16,
        encoder_width=0.1,
        batch_size=2,
        num_envs=5,
        eval_episodes=3,
        game="pong",
        schedule="grow1x",
        freeze="network",
    )
    speed = measure_speed(config, make_spec(6), CPU, seconds=0.2)
    assert (asked, played) == ({5, 3}, [5, 3])
    assert (speed.environment_seconds, speed.eval_environment_seconds) == (5.0, 3.0)
    assert (ROWS_AT_ONCE, False) in swept
    assert speed.run.swept_row_seconds[0] == 0 < speed.run.swept_row_seconds[1]
    assert speed.baseline.swept_row_seconds == (0.0,)
    played.clear()
    even = measure_speed(dataclasses.replace(config, eval_episodes=5), make_spec(6), CPU, seconds=0.2)
    assert played == [5]
    assert even.run.eval_act_seconds == even.run.act_seconds


def test_speed_is_measured_on_a_learner_grown_to_the_last_stage(monkeypatch):
    grown = []
    monkeypatch.setattr(
        "growtrain.planning.speed.apply",
        lambda learner, *a, **k: grown.append((apply(learner, *a, **k), k["freeze_encoder"])),
    )
    config = paper(width=16, encoder_width=0.1, batch_size=2, num_envs=2, freeze_encoder_at=2, game="pong")
    speed = measure_speed(config, make_spec(6), CPU, seconds=0.2)
    assert [event.stage for event, _ in grown] == [1, 2, 3]
    assert [freeze for _, freeze in grown] == [False, True, False]
    assert len(speed.run.update_seconds) == len(speed.run.act_seconds) == 4
    assert len(speed.baseline.update_seconds) == 1
    assert min(*speed.run.update_seconds, *speed.run.act_seconds, speed.environment_seconds) > 0
    assert speed.run.timed >= 4 * 5
    assert sum(speed.projected_hours(make_plan(config, make_spec(6)), speed.run)) > 0


@pytest.mark.parametrize(
    ("changes", "least", "most"),
    [({}, 160, 170), ({"freeze": "network"}, 101, 106), ({"schedule": "full3x"}, 0, 0), ({"schedule": "fixed"}, 0, 0)],
)
def test_a_plan_says_what_growing_adds_to_the_network_it_begins_with(
    changes: dict[str, Any], least: int, most: int
) -> None:
    text = render(make_plan(paper(**changes), make_spec(6)))
    said = re.search(r"(\d+)% of the network that it begins with, left alone", text)
    assert least <= (int(said[1]) if said else 0) <= most
