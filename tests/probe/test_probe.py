"""The supervised plasticity probe: tasks by definition, a shared past bit for bit, interventions that do what they say, resuming."""

import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from growtrain.__main__ import main
from growtrain.networks.heads import initialize, make_head
from growtrain.networks.injected import InjectedHead
from growtrain.probe import arms as probe_arms
from growtrain.probe import cells as probe_cells
from growtrain.probe import tasks as probe_tasks
from growtrain.probe.arms import FRESH, WARM, Arm, arms
from growtrain.probe.cells import Data, Record, complete, learn_arm, learn_trunk
from growtrain.probe.settings import SETTINGS, Cell, ProbeConfig
from growtrain.runfiles import run_lock
from growtrain.settings.text import ConfigError
from growtrain.telemetry.sinks import read_jsonl

CONFIG = ProbeConfig(num_frames=48, num_tasks=8, num_updates=3, batch_size=16)
CELL = Cell(setting="encoder", targets="value", seed=1)
INJECTIONS = [name for name in arms(CONFIG) if name.startswith("inject")]


def data(config: ProbeConfig = CONFIG, cell: Cell = CELL) -> Data:
    return probe_tasks.play(config, cell.seed).frames, probe_tasks.make_targets(config, cell)


def learned(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("seconds", "arm", "intervened")}


# Tasks


def test_value_targets_are_discounted_sums_of_drifting_rewards() -> None:
    """Against the definition: every sum written out, rewards drawn again in the same order."""
    steps, lanes, tasks = 40, 2, 4
    ended = np.zeros((steps, lanes), dtype=np.bool_)
    ended[11, 0] = ended[12, 0] = ended[39, 1] = True
    values = probe_tasks.value_targets(tasks, ended, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    rewards = rng.standard_normal((steps, lanes))
    first, last = probe_tasks.HORIZONS
    for k in range(tasks):
        if k:
            fresh = rng.standard_normal((steps, lanes))
            rewards = probe_tasks.CORRELATION * rewards + math.sqrt(1 - probe_tasks.CORRELATION**2) * fresh
        discount = 1 - 1 / (first * (last / first) ** (k / (tasks - 1)))
        for t in range(steps):
            for lane in range(lanes):
                end = next((s for s in range(t, steps) if ended[s, lane]), steps - 1)
                expected = sum(
                    discount ** (s - t) * (probe_tasks.MEAN_REWARD + rewards[s, lane]) for s in range(t, end + 1)
                )
                assert values[k, t, lane] == pytest.approx(expected)


def test_value_targets_correlate_and_grow() -> None:
    values = probe_tasks.value_targets(20, np.zeros((4000, 8), dtype=np.bool_), np.random.default_rng(0)).reshape(
        20, -1
    )
    scales = values.std(1)
    assert scales[0] == pytest.approx(1, abs=0.02)
    assert (np.diff(scales) > 0).all()
    neighbours = [np.corrcoef(values[k], values[k + 1])[0, 1] for k in range(19)]
    assert np.mean(neighbours) == pytest.approx(probe_tasks.CORRELATION, abs=0.05)
    assert abs(np.corrcoef(values[0], values[10])[0, 1]) < 0.05


def test_frames_are_real_distinct_and_the_same_for_a_seed() -> None:
    frames, kept, ended = (getattr(probe_tasks.play(CONFIG, 1), name) for name in ("frames", "kept", "ended"))
    assert frames.shape == (48, 4, 42, 42)
    assert len(np.unique(frames.reshape(48, -1), axis=0)) == 48
    assert frames.std() > 10
    assert (np.diff(kept) > 0).all()
    assert kept.max() < ended.size
    probe_tasks.play.cache_clear()
    assert np.array_equal(probe_tasks.play(CONFIG, 1).frames, frames)
    assert not np.array_equal(probe_tasks.play(CONFIG, 2).frames, frames)


def test_too_few_distinct_frames_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_tasks.np, "unique", lambda *_, **__: (None, np.arange(9)))
    with pytest.raises(ConfigError, match="9 distinct frames: --num-frames 16 is too many"):
        probe_tasks.play(dataclasses.replace(CONFIG, num_frames=16), 1)


def test_small_frames_are_means_of_blocks() -> None:
    frames = np.random.default_rng(0).integers(256, size=(1, 4, 84, 84), dtype=np.uint8)
    small = probe_tasks._resize(frames, 42)
    assert small[0, 2, 5, 40] == round(float(frames[0, 2, 10:12, 80:82].mean()))
    assert np.array_equal(probe_tasks._resize(frames, 84), frames)


def test_error_is_one_for_the_mean_and_zero_for_the_target() -> None:
    target = torch.tensor([1.0, 2.0, 6.0])
    assert probe_arms.error(nn.Flatten(), torch.full((3, 1), 3.0), target) == pytest.approx(1)
    assert probe_arms.error(nn.Flatten(), target[:, None], target) == 0


# Arms


def test_arms_share_the_trunk_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm that does nothing where it leaves the trunk goes on as the trunk does; and so does a second trunk."""
    table = arms(CONFIG) | {"nothing": Arm((3,), lambda *_: None)}
    monkeypatch.setattr(probe_cells, "arms", lambda config: table)
    trunk, forks = learn_trunk(CONFIG, CELL, data(), ["nothing", "reset-head"])
    assert set(forks) == {3, 4}
    again, _ = learn_trunk(CONFIG, CELL, data(), [])
    nothing = learn_arm(CONFIG, CELL, data(), "nothing", trunk, forks[3])
    reset = learn_arm(CONFIG, CELL, data(), "reset-head", trunk, forks[4])
    assert [learned(r) for r in trunk] == [learned(r) for r in again] == [learned(r) for r in nothing]
    assert [learned(r) for r in trunk[:4]] == [learned(r) for r in reset[:4]]
    assert trunk[4]["first_error"] != reset[4]["first_error"]
    assert [r["arm"] for r in reset] == ["reset-head"] * 8
    assert [r["task"] for r in reset if r["intervened"]] == [4]


@pytest.mark.parametrize("name", INJECTIONS)
def test_an_injection_changes_no_prediction(name: str) -> None:
    trunk, forks = learn_trunk(CONFIG, CELL, data(), [name, "reset-head"])
    start = arms(CONFIG)[name].times[0]
    records = learn_arm(CONFIG, CELL, data(), name, trunk, forks[start])
    assert records[start]["first_error"] == pytest.approx(trunk[start]["first_error"], rel=1e-6)
    assert records[start]["error"] != trunk[start]["error"]


def test_three_injections_and_the_whole_network() -> None:
    _, forks = learn_trunk(CONFIG, CELL, data(), ["inject-zero-3x", "inject-whole"])
    for name, path, count in (("inject-zero-3x", "0.head", 3), ("inject-whole", "0", 1)):
        learner = copy.deepcopy(forks[arms(CONFIG)[name].times[0]])
        probe_cells._learn_tasks(CONFIG, CELL, data(), name, learner, range(arms(CONFIG)[name].times[0], 8))
        head = learner.network.get_submodule(path)
        assert isinstance(head, InjectedHead)
        assert head.num_injections == count
        held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in learner.network.parameters() if p.requires_grad}


def test_what_each_intervention_touches() -> None:
    """Which parts keep their weights and their optimizer slots; fresh weights are the same in every arm."""
    frames = torch.rand(4, 4, 42, 42)
    weights = {}
    for name in ("reset-encoder", "reset-head", FRESH, "fresh-optimizer", "shrink-perturb", "inject-freeze-encoder"):
        learner = probe_arms.make_learner(CONFIG, SETTINGS["encoder"], torch.Generator().manual_seed(0))
        probe_arms.learn(learner, frames, torch.randn(4), torch.zeros(2, 4, dtype=torch.int64))
        encoder, head = probe_arms.live_parts(learner.network)
        before = {"encoder": encoder.get_submodule("0").weight.clone(), "head": head[0].weight.clone()}
        arms(CONFIG)[name].act(learner, torch.Generator().manual_seed(1), frames)
        encoder, head = probe_arms.live_parts(learner.network)
        parts = {"encoder": encoder.get_submodule("0").weight, "head": head[0].weight}
        weights[name] = parts
        kept = {part for part, weight in parts.items() if torch.equal(weight, before[part])}
        slots = {part for part, weight in parts.items() if weight in learner.optimizer.state}
        trains = {part for part, weight in parts.items() if weight.requires_grad}
        expected = {
            "reset-encoder": ({"head"}, {"head"}, {"encoder", "head"}),
            "reset-head": ({"encoder"}, {"encoder"}, {"encoder", "head"}),
            FRESH: (set(), set(), {"encoder", "head"}),
            "fresh-optimizer": ({"encoder", "head"}, set(), {"encoder", "head"}),
            "shrink-perturb": (set(), {"encoder", "head"}, {"encoder", "head"}),
            "inject-freeze-encoder": ({"encoder"}, {"encoder"}, {"head"}),
        }[name]
        assert (kept, slots, trains) == expected
    assert torch.equal(weights["reset-encoder"]["encoder"], weights[FRESH]["encoder"])


@pytest.mark.parametrize("distribution", probe_arms.DISTRIBUTIONS)
def test_initializations_differ_in_what_they_say_alone(distribution: str) -> None:
    head = make_head(256, 128, 1)
    probe_arms.initialize_as(head, torch.Generator().manual_seed(0), scale=4.0, distribution=distribution, bias="zero")
    head.requires_grad_(False)
    hidden, output = head[0], head[2]
    assert float(hidden.weight.square().mean().sqrt()) == pytest.approx(4 * (3 * 256) ** -0.5, rel=0.02)
    assert float(output.weight.square().mean().sqrt()) == pytest.approx(4 * (3 * 128) ** -0.5, rel=0.15)
    assert hidden.bias.abs().max() == output.bias.abs().max() == 0
    gram = hidden.weight @ hidden.weight.T
    off_diagonal = (gram - torch.diag(gram.diagonal())).abs().max() / gram.diagonal().mean()
    assert (off_diagonal < 1e-5) == (distribution == "orthogonal")
    assert (hidden.weight.abs().max() <= 4 / 16) == (distribution == "uniform")


def test_the_default_initialization_is_the_trainers() -> None:
    ours, theirs = make_head(32, 16, 1), make_head(32, 16, 1)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    probe_arms.initialize_as(ours, generators[0], scale=1.0, distribution="uniform", bias="default")
    initialize(theirs, generators[1])
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    config = dataclasses.replace(CONFIG, sweep="init")
    names = [name for name in arms(config) if name not in (WARM, FRESH)]
    assert len(names) == 18
    assert "scale=1 uniform default-bias" in names


# Runs


def run(directory: Path, names: list[str], config: ProbeConfig = CONFIG, processes: int = 1) -> list[list[Record]]:
    return list(probe_cells.run(config, [CELL], names, directory, processes))


def test_run_again_and_only_what_is_missing_is_run(tmp_path: Path) -> None:
    names = [WARM, "reset-head", "inject-mirrored"]
    whole = run(tmp_path / "whole", names)
    assert [records[0]["arm"] for records in whole] == names
    directory = tmp_path / "cut"
    assert len(run(directory, names[:2])) == 2
    path = directory / "probe.jsonl"
    path.write_bytes(path.read_bytes()[:-300])  # killed while the last arm was written
    again = run(directory, names)
    assert [records[0]["arm"] for records in again] == names[1:]
    found, expected = (complete(CONFIG, read_jsonl(d / "probe.jsonl")) for d in (directory, tmp_path / "whole"))
    assert found.keys() == expected.keys()
    for key in expected:
        assert [learned(r) for r in found[key]] == [learned(r) for r in expected[key]]
    assert run(directory, names) == []


@pytest.mark.slow
def test_records_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    names = list(arms(CONFIG))
    one, two = (
        {r[0]["arm"]: [learned(x) for x in r] for r in run(tmp_path / str(n), names, processes=n)} for n in (1, 2)
    )
    assert one == two


def test_damaged_records_are_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "--output", str(tmp_path), "--setting", "head", "--targets", "random", "--arms", "warm"]
    assert main(words) == 0
    records, about = (tmp_path / "probe.jsonl").read_text(), (tmp_path / "config.json").read_text()
    for name, damaged, says in (
        ("probe.jsonl", "junk\n" + records, "line 1"),
        ("config.json", "{}", "lacks 'game'"),
    ):
        (tmp_path / "probe.jsonl").write_text(records)
        (tmp_path / "config.json").write_text(about)
        (tmp_path / name).write_text(damaged)
        capsys.readouterr()
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


def test_a_directory_holds_one_configuration_and_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, [WARM])
    with pytest.raises(ConfigError, match="--num-updates 3"):
        run(tmp_path, [WARM], dataclasses.replace(CONFIG, num_updates=4))
    with monkeypatch.context() as other:
        other.setitem(SETTINGS, "encoder", dataclasses.replace(SETTINGS["encoder"], head_lr=1.0))
        with pytest.raises(ConfigError, match="learning rates"):
            run(tmp_path, [WARM])
    with run_lock(tmp_path), pytest.raises(ConfigError, match="in use"):
        run(tmp_path, [WARM])


TINY = ["probe", "--num-tasks", "8", "--num-updates", "2", "--num-frames", "32", "--seeds", "1", "--processes", "1"]


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "--output", str(tmp_path), "--setting", "head", "--targets", "random"]
    assert main(words) == 0
    out = capsys.readouterr().out
    for name in arms(CONFIG):
        assert out.count(f"head random seed 0 {name} ") == 1
    assert "nothing follows from fewer than 3 seeds" in out
    records = read_jsonl(tmp_path / "probe.jsonl")
    assert len(records) == 8 * len(arms(CONFIG))
    assert json.loads((tmp_path / "config.json").read_text())["num_updates"] == 2
    files = {name: (tmp_path / name).read_text() for name in ("probe.md", "probe.svg")}
    for name in files:
        (tmp_path / name).unlink()
    assert main(["probe", "--figures-from", str(tmp_path)]) == 0
    assert {name: (tmp_path / name).read_text() for name in files} == files


@pytest.mark.parametrize(("processes", "number"), [("1", signal.SIGTERM), ("2", signal.SIGINT)])
def test_a_signal_stops_a_probe_with_what_it_has_done_and_75(
    processes: str, number: signal.Signals, tmp_path: Path
) -> None:
    """Sent to all of its processes, as a terminal does; an arm takes far longer than stopping does."""
    words = ["probe", "--num-tasks", "8", "--num-frames", "32", "--seeds", "2", "--processes", processes]
    words += ["--output", str(tmp_path), "--setting", "head", "--targets", "random", "--arms", "warm,reset-head"]
    command = [sys.executable, "-m", "growtrain", *words, "--num-updates", "1000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "probe.jsonl").exists():
        time.sleep(0.1)
        assert process.poll() is None
    time.sleep(6)  # workers load their libraries
    os.killpg(process.pid, number)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert time.monotonic() - start < 20
    assert f"stopped by {number.name}: the same command again goes on" in errors
    assert "Traceback" not in errors
    # No worker is left.
    while any(os.getpgid(each) == process.pid for each in psutil.pids() if psutil.pid_exists(each)):
        assert time.monotonic() - start < 30
        time.sleep(0.1)


def test_a_setting_can_be_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "--output", str(tmp_path), "--targets", "random", "--arms", "warm"]
    written_out = ["adam:6e-4:6e-4", "centered_rmsprop:2.5e-4:1e-2"]
    assert main([*words, "--setting", ",".join([written_out[1], "encoder", written_out[0]])]) == 0
    out = capsys.readouterr().out
    assert "optimizer centered_rmsprop, encoder_lr 0.00025, head_lr 0.01." in out
    assert out.index("Setting `encoder`") < out.index(f"Setting `{written_out[0]}`")
    by_setting: dict[str, list[dict[str, Any]]] = {}
    for record in read_jsonl(tmp_path / "probe.jsonl"):
        by_setting.setdefault(record.pop("setting"), []).append(learned(record))
    assert by_setting["encoder"] == by_setting[written_out[0]] != by_setting[written_out[1]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--setting", "tail"], "encoder, head"),
        (["--setting", "adam:1e-3"], "adam:1e-3:1e-4"),
        (["--setting", "adam:1e-3:-1"], "adam:1e-3:1e-4"),
        (["--setting", "sgd:1e-3:1e-4"], "adam:1e-3:1e-4"),
        (["--targets", "moving"], "random, value"),
        (["--arms", "inject-rope"], "inject-mirrored"),
        (["--size", "huge"], "nature"),
        (["--sweep", "lr"], "init"),
        (["--seeds", "0"], "--seeds"),
        (["--processes", "-1"], "--processes -1"),
        (["--num-tasks", "4"], "at least 8"),
        (["--num-updates", "many"], "--num-updates"),
        (["--game", "upndwn"], "up_n_down"),
        (["--figures-from", "nowhere"], "--output"),
        (["--policy", "nowhere"], "nowhere"),
    ],
)
def test_wrong_flags_get_one_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err
