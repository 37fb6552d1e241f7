"""The arithmetic from speeds to hours on numbers checked by hand, and a dry run of the whole script on a real game."""

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from growtrain.environments.atari import make_spec
from growtrain.settings.config import Config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script loaded by its path: other projects install packages named `benchmarks`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("run_wallclock", BENCHMARKS / "run_wallclock.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "run_wallclock", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def hours(script: ModuleType) -> ModuleType:
    return sys.modules["wallclock_hours"]


def window(frames: int, seconds: float) -> dict[str, Any]:
    gpu = {"available": True, "utilization_mean": frames / 10, "energy_joules": 300.0 * seconds, "seconds": seconds}
    return {"frames": frames, "updates": frames // 16, "steps": frames // 4, "seconds": seconds,
            "cpu_seconds": seconds, "phases": {"act": seconds / 4, "learn": seconds / 2}, "gpu": gpu}  # fmt: skip


def cell(*speeds: int, growth: tuple[float, ...] = (), **values: Any) -> dict[str, Any]:
    """Windows of 2 s at these frames per second; a step is 4 frames."""
    return {
        "repeats": [window(2 * speed, 2.0) for speed in speeds],
        "growth_seconds": list(growth),
        "compile_seconds": 0.0,
        "first_step_seconds": [4 / sorted(speeds)[len(speeds) // 2]] * 2,
        "evaluations": [{"frames": 1000, "start_seconds": 1.0, "seconds": 2.0}],
        "checkpoint_seconds": 2.0,
        "diagnostics_seconds": 0.5,
        "busy": {"available": True, "busy_seconds": 0.5, "frames": 500},
        "live_width": 8,
        "frozen_width": 0,
        "flops_per_update": 10**9,
    } | values


def raw() -> dict[str, Any]:
    """A growing arm of two stages at 200 and 100 frames per second against full width at 80."""
    work = {
        "warmup_frames": 4_000,
        "stage_frames": [36_000, 40_000],
        "evaluations": [1, 2],
        "eval_frames": 2_000,
        "checkpoints": [1, 1],
        "checkpoint_transitions": 10_000,
        "records": 10,
        "diagnostics": [2, 4],
    }
    arm = {"stack": "fast", "width": 8, "full_width": 16}
    return {
        "game": "pong",
        "total_frames": 80_000,
        "main_width": 8,
        "stopped_early": False,
        "not_validated": "turned off",
        "machine": {
            "command": "python x", "gpu": "NVIDIA A100-SXM4-40GB", "cuda": "12", "cpu": "Some CPU", "cores": 2, "threads": 2,
            "memory_bytes": 2**34, "environment": {}, "versions": {}, "git_commit": None, "git_modified": False, "date": "today",
            "load_average": 0.1,
            "busy_cores": 0.0,
        },
        "stacks": {
            "fast": {
                "num_envs": 1, "execution": "auto", "replay_capacity": 100, "filled": 100, "startup_seconds": 5.0,
                "warmup": [{"frames": 4_000, "seconds": 4.0}] * 3,
                "checkpoints": [{"transitions": 0, "seconds": 1.0}, {"transitions": 1_000, "seconds": 2.0}],
                "record_seconds": [0.1, 0.1, 9.0],
                "cells": {
                    "small": cell(200, 190, 210),
                    "grown": cell(100, 98, 110, growth=(3.0,)),
                    "full": cell(80, 75, 81),
                },
            }
        },
        "arms": [
            {**arm, "name": "grow1x", "baseline": False, "anchor": "frozen", "cells": ["small", "grown"], "work": work},
            {
                **arm, "name": "full1x", "baseline": True, "anchor": None, "cells": ["full"],
                "work": {**work, "stage_frames": [76_000], "evaluations": [3], "checkpoints": [2], "diagnostics": [6]},
            },
        ],
        "validation": [],
    }  # fmt: skip


def test_every_part_of_a_projection(hours: ModuleType) -> None:
    values = raw()
    p = hours.projection_of(values, values["arms"][0])
    assert p.startup == 5
    assert p.warmup == 4  # 4000 frames at 1000/s
    assert p.stages == [180, 400]  # 36000 / 200, 40000 / 100
    assert p.growth == 3
    assert p.evaluation == pytest.approx(3 * (1 + 2_000 * 2 / 1_000))  # 1 s to start, then 2 ms a frame
    assert p.checkpoints == pytest.approx(2 * 2 + 10_000 * 1e-3)
    assert p.records == pytest.approx(10 * 0.1 + 6 * 0.5)
    assert p.training == 584
    assert p.total == pytest.approx(5 + 584 + 3 + 15 + 14 + 4)


def test_what_the_first_steps_take_longer_is_charged_to_the_growth_or_the_start(hours: ModuleType) -> None:
    values = raw()
    cells = values["stacks"]["fast"]["cells"]
    cells["grown"]["first_step_seconds"] = [0.04 + 2.0, 0.04 + 0.5]  # a steady step of 4 frames takes 40 ms
    cells["small"]["first_step_seconds"] = [0.02 + 1.0, 0.0]
    cells["small"]["compile_seconds"] = 7.0
    p = hours.projection_of(values, values["arms"][0])
    assert (p.growth, p.startup) == (pytest.approx(3 + 2.5), pytest.approx(5 + 7 + 1))


def test_a_saving_is_taken_within_each_repeat(hours: ModuleType) -> None:
    values = raw()
    arm, base = values["arms"]
    # Extras differ by the pause of the growth alone: 3 s.
    saved = [
        76_000 / 80 - (36_000 / 200 + 40_000 / 100) - 3,
        76_000 / 75 - (36_000 / 190 + 40_000 / 98) - 3,
        76_000 / 81 - (36_000 / 210 + 40_000 / 110) - 3,
    ]
    assert [3600 * each for each in hours.saved_hours(values, arm)] == pytest.approx(saved)
    # Full width takes 5 + 4 s beside its training, and 15 for evaluations, 14 for checkpoints, 4 for records.
    full = [76_000 / speed + 42 for speed in (80, 75, 81)]
    shares = [each / total for each, total in zip(saved, full, strict=True)]
    assert hours.saved_shares(values, arm) == pytest.approx(shares)
    assert hours.saved_hours(values, base) == [0, 0, 0]


def test_what_is_stated_of_a_saving_is_the_median_of_the_repeats_savings(script: ModuleType, hours: ModuleType) -> None:
    values = raw()
    arm = values["arms"][0]
    grown, full = hours.summary(values)["arms"]
    # The third repeat's: neither that of the median speeds, 367 s, nor that of the median totals.
    expected = 76_000 / 81 - (36_000 / 210 + 40_000 / 110) - 3
    assert 3600 * grown["hours_saved"] == pytest.approx(expected)
    assert 3600 * (full["hours"] - grown["hours"]) != pytest.approx(expected, rel=0.02)
    assert grown["share_saved"] == sorted(grown["share_saved_each"])[1]
    low, high = min(hours.saved_hours(values, arm)), max(hours.saved_hours(values, arm))
    assert grown["hours_saved_interval"] == [low, high]
    for each in (grown, full):
        assert each["hours_interval"][0] <= each["hours"] <= each["hours_interval"][1]
    shares = [100 * share for share in grown["share_saved_each"]]
    row = next(line for line in script.markdown(values).splitlines() if line.startswith("| grow1x"))
    assert f"| {grown['hours_saved']:.2f} [{low:.2f} to {high:.2f}] |" in row
    assert f"| {100 * grown['share_saved']:.1f} [{min(shares):.1f} to {max(shares):.1f}] |" in row
    wide = copy.deepcopy(values["arms"])
    for each in wide:
        each["width"], each["full_width"] = 16, 32
    values["arms"] += wide
    (sweep,) = hours.sweeps(values)
    assert sweep["points"] == [(16, grown["hours_saved"]), (32, grown["hours_saved"])]


def test_a_repeat_has_its_own_evaluations(hours: ModuleType) -> None:
    values = raw()
    arm, cells = values["arms"][0], values["stacks"]["fast"]["cells"]
    cells["grown"]["evaluations"] = [
        {"frames": 1000, "start_seconds": 1.0, "seconds": seconds} for seconds in (2.0, 7.0, 3.0)
    ]
    # One in stage 0, two in stage 1, of 2,000 frames each.
    taken = [hours.projection_of(values, arm, repeat).evaluation for repeat in (0, 1, 2, None)]
    assert taken == pytest.approx([3 + 4 + 2 * 4, 3 + 4 + 2 * 14, 3 + 4 + 2 * 6, 3 + 4 + 2 * 6])


@pytest.mark.parametrize("seconds", [0.5, 5.0, 60.0])
def test_the_time_that_is_left_holds_all_windows_with_their_evaluations(script: ModuleType, seconds: float) -> None:
    cells = sys.modules["wallclock_cells"]
    whole = 0.8 + seconds * (1 + cells.WARM_SHARE + cells.EVALUATION_SHARE)
    assert script.window_seconds(12 * whole, 12, 0.8) == pytest.approx(seconds)


def test_an_arm_is_compared_with_the_full_width_that_is_its_own(script: ModuleType, hours: ModuleType) -> None:
    options = script._parser().parse_strict(["--freeze", "heads,network"])
    (job,) = script.make_jobs(options, {"schedule": "grow3x", "live_encoder": "cold"})
    heads, network, full, cold = job.arms
    assert (full.name, full.config.width, full.config.encoder_width) == ("full3x", 2048, 1.0)
    assert (cold.name, cold.config.width, cold.config.encoder_width) == ("full, cold", 1024, 2.0)
    assert full.config.schedule == cold.config.schedule == "fixed"
    assert full.cells != cold.cells
    described = [script._described(arm, make_spec(6)) for arm in job.arms]
    compared = [hours.baseline_of({"arms": described}, arm)["name"] for arm in described]
    assert compared == ["full3x", "full, cold", "full3x", "full, cold"]
    assert (heads.full_width, network.full_width) == (2048, 1024)


def test_gpu_means_are_weighted_by_time_and_say_why_they_are_missing(hours: ModuleType) -> None:
    values = raw()
    arm = values["arms"][0]
    assert hours.gpu_mean(values, arm, "utilization_mean") == pytest.approx((180 * 40 + 400 * 20) / 580)
    assert hours.gpu_mean(values, arm, "watts") == pytest.approx(300)
    # 1 ms of kernels per frame: 0.2 at 200 frames/s, 0.1 at 100.
    assert hours.busy_share(values, arm) == pytest.approx((180 * 0.2 + 400 * 0.1) / 580)
    for each in values["stacks"]["fast"]["cells"].values():
        each["busy"] = {"available": False, "reason": "no CUPTI"}
        for one in each["repeats"]:
            one["gpu"] = {"available": False, "reason": "no GPU"}
    assert hours.gpu_mean(values, arm, "watts") == "unavailable: no GPU"
    assert hours.busy_share(values, arm) == "unavailable: no CUPTI"


@pytest.mark.parametrize(
    ("points", "width", "how"),
    [
        ([(1000, 10.0), (2000, 30.0)], 1500, "interpolated"),
        ([(2000, 14.0), (1000, 10.0), (3000, 26.0)], 2500, "interpolated"),
        ([(1000, 5.0), (2000, 10.0)], 4000, "extrapolated"),
        ([(1000, 25.0), (2000, 50.0)], 1000, "at most"),
        ([(1000, 10.0), (2000, 9.0)], None, "does not grow"),
        ([(1000, -10.0)], None, "one width"),
    ],
)
def test_the_width_that_reaches_twenty_hours(
    hours: ModuleType, points: list[tuple[int, float]], width: float | None, how: str
) -> None:
    reaching = hours.width_reaching(points, 20.0)
    assert reaching.width == width
    assert how in reaching.how


def test_a_validation_compares_with_its_own_start(hours: ModuleType) -> None:
    values = raw()
    stack = values["stacks"]["fast"]
    stack["cells"]["small"]["compile_seconds"] = 7.0  # done before, in the same process
    # In which the grown network's update was compiled.
    stack["cells"]["grown"]["first_step_seconds"] = [0.04 + 2.0, 0.04]
    short = {
        **values["arms"][0]["work"],
        "warmup_frames": 1_000,
        "stage_frames": [2_000, 2_000],
        "evaluations": [0, 1],
        "diagnostics": [0, 0],
    }
    values["validation"] = [{"arm": 0, "frames": 5_000, "wall_seconds": 50.0, "startup_seconds": 1.0, "work": short}]
    found = hours.validated(values, values["validation"][0])
    assert found["projected_seconds"] == pytest.approx(1 + 1 + 10 + 20 + 3 + 5 + 14 + 1)
    assert found["error"] == pytest.approx(0.1)
    assert not found["holds"]
    graph = {**values, "stacks": {"fast": {**stack, "execution": "CUDA graph"}}}  # which a run captures anew
    assert hours.validated(graph, values["validation"][0])["projected_seconds"] == pytest.approx(55 + 2)
    assert found["machine_speed"] is found["error_at_that_speed"] is None  # a file from before there was a gauge
    values["machine_speed"] = [90.0, 100.0, 110.0]
    values["validation"][0]["machine_speed"] = [105.0, 115.0]
    found = hours.validated(values, values["validation"][0])
    assert found["machine_speed"] == pytest.approx(1.1)
    assert found["error_at_that_speed"] == pytest.approx(0.0)
    assert not found["holds"]  # which the gauge does not excuse


def test_the_paper_is_quoted_beside_an_a100_only(script: ModuleType) -> None:
    values = raw()
    wide = copy.deepcopy(values["arms"])
    for arm in wide:
        arm["width"], arm["full_width"] = 16, 32
    values["arms"] += wide
    assert "on an A100, as this GPU is" in script.markdown(values)
    values["machine"]["gpu"] = None
    text = script.markdown(values)
    assert "nothing is said here about hours on an A100" in text
    assert "as this GPU is" not in text


def test_the_figure_shows_the_gpu_where_there_is_one(script: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    values = raw()
    assert [axes.get_title() for axes in script.figure(values).axes][-1] == "GPU"
    for each in values["stacks"]["fast"]["cells"].values():
        for one in each["repeats"]:
            one["gpu"] = {"available": False, "reason": "no GPU"}
    assert len(script.figure(values).axes) == 2


def test_work_is_counted_as_the_loop_does_it(script: ModuleType) -> None:
    config = Config(schedule="grow1x", total_frames=100_000, learning_starts=10_000, eval_period=40_000, eval_frames=500,
                    log_period=30_000, checkpoint_period=25_000, replay_capacity=5_000, diagnostics_period=20_000)  # fmt: skip
    work = script.work_of(config, make_spec(6))
    assert work.warmup_frames == 10_000
    assert work.stage_frames == [15_000, 75_000]
    assert work.evaluations == [0, 3]  # at 40k, 80k and the end
    assert work.checkpoints == [1, 3]
    assert work.checkpoint_transitions == 4 * 5_000  # 6,250 new ones each, of which the replay holds 5,000
    assert work.records == 4
    assert work.diagnostics == [1, 4]  # at 20k; at 40k, 60k, 80k and the end


def test_cells_of_one_network_are_shared_by_the_arms(script: ModuleType) -> None:
    options = script._parser().parse_strict(["--anchor", "frozen,mirrored", "--freeze-encoder-at", "0,2"])
    (job,) = script.make_jobs(options, {"schedule": "grow3x", "width": 32})
    assert [arm.name for arm in job.arms] == [
        "grow3x frozen", "grow3x frozen, encoder frozen from 2", "grow3x mirrored", "grow3x mirrored, encoder frozen from 2", "full3x",
    ]  # fmt: skip
    assert job.weight == 5 * (1 + 2 * (3 + 2) + 1)
    assert [arm.config.width for arm in job.arms] == [32, 32, 32, 32, 128]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--schedule", "fixed"], "choose grow1x"),
        (["--schedule", "reset"], "choose grow1x"),
        (["--anchor", "golden"], "choose from frozen, zero, mirrored"),
        (["--minuets", "3"], "did you mean --minutes"),
    ],
)
def test_bad_input_ends_with_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], remedy: str
) -> None:
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert remedy in error


def test_a_dry_run_writes_its_files_and_makes_them_again(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "results" / "wallclock"
    before_profiling: list[dict[str, Any]] = []
    read = lambda *_: before_profiling.append(json.loads(output.with_suffix(".json").read_text()))  # noqa: E731
    monkeypatch.setattr(script, "measure_busy", read)  # on a GPU it may end the process
    tiny = "--game pong --schedule grow1x --width 8 --encoder-width 0.125 --batch-size 4 --num-envs 4 --device cpu"
    small = "--fill 200 --cell-capacity 400 --repeats 2 --seconds 0.05 --no-validate"
    assert script.main([*tiny.split(), *small.split(), "--output", str(output)]) == 0
    json_text, markdown = (output.with_suffix(f".{suffix}").read_text() for suffix in ("json", "md"))
    assert markdown in capsys.readouterr().out
    values = json.loads(json_text)
    for early in before_profiling:
        assert early["arms"] == values["arms"]
        assert early["stacks"]["fast"]["cells"] == values["stacks"]["fast"]["cells"]
    assert len(before_profiling) == 3
    assert values["machine"]["instruction_set"] == torch.backends.cpu.get_cpu_capability()
    assert values["machine"]["tf32"] is None
    assert f"{torch.backends.cpu.get_cpu_capability()}, " in markdown
    cells = values["stacks"]["fast"]["cells"]
    assert list(cells) == ["w8 stage 0", "w8 frozen stage 1", "w8 full width 16"]
    for each in cells.values():
        assert [one["updates"] * 16 for one in each["repeats"]] == [one["frames"] for one in each["repeats"]]
        assert len(each["evaluations"]) == len(each["repeats"]) == 2
        assert each["repeats"][0]["gpu"]["available"] is False
        assert each["diagnostics_seconds"] > 0
        assert sum(each["repeats"][0]["phases"].values()) <= each["repeats"][0]["seconds"]
    assert len(cells["w8 frozen stage 1"]["growth_seconds"]) == 1
    assert values["stacks"]["fast"]["filled"] >= 200
    grown, full = values["summary"]["arms"]
    assert grown["hours"] > 0
    assert full["hours_saved"] == 0
    assert str(grown["gpu_watts"]).startswith("unavailable: ")
    assert "unavailable: the run computes on cpu" in markdown

    again = tmp_path / "again"
    assert script.main(["--figures-from", str(output.with_suffix(".json")), "--output", str(again)]) == 0
    assert again.with_suffix(".md").read_text() == markdown
    assert again.with_suffix(".json").read_text() == json_text


@pytest.mark.slow
def test_a_complete_run_is_compared_with_its_projection(script: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "wallclock"
    tiny = "--game pong --width 8 --encoder-width 0.125 --batch-size 4 --num-envs 4 --device cpu --stack both --replay-ratio 1"
    small = "--width-sweep 16 --fill 200 --cell-capacity 400 --repeats 1 --seconds 0.2 --validate-seconds 1"
    assert script.main([*tiny.split(), *small.split(), "--output", str(output)]) == 0
    values = json.loads(output.with_suffix(".json").read_text())
    assert [v["name"] for v in values["summary"]["validation"]] == ["grow3x frozen", "full3x"]
    assert all(v["run_summary"]["status"] == "done" for v in values["validation"])
    assert all(v["machine_speed"] > 0 for v in values["summary"]["validation"])
    assert len(values["machine_speed"]) == 1
    assert {(sweep["stack"], len(sweep["points"])) for sweep in values["summary"]["reaching"]} == {
        ("fast", 2),
        ("reference", 2),
    }
