"""The arithmetic of the throughput benchmark by hand, its GPU report on made-up samples, and tiny measurements."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from growtrain.environments.atari import make_spec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--num-envs", "2", "--batch-size", "2", "--width", "8", "--warm-up-steps", "8", "--replay-capacity", "64"]


@pytest.fixture
def throughput(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("throughput", BENCHMARKS / "throughput.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "throughput", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PRODUCT_SIZE", 32)
    return module


def test_efficiency_by_hand(throughput):
    loop = [{"seconds": 10.0, "updates": 90}, {"seconds": 5.0, "updates": 40}]
    bare = [{"seconds": 2.0, "updates": 20}, {"seconds": 1.0, "updates": 16}]
    assert throughput.efficiency(loop, bare) == pytest.approx([90 * 0.1 / 10, 40 / 16 / 5])


def test_time_over_flops_by_hand(throughput):
    # 3 GFLOP at 100 GFLOP/s are 30 ms; the update takes 45 ms.
    bare, product = [{"seconds": 0.9, "updates": 20}], [{"seconds": 2.0, "flops": 200e9}]
    assert throughput.flop_ratios(bare, product, 3 * 10**9) == pytest.approx([1.5])


def test_covered_time_counts_overlaps_once(throughput):
    assert throughput.covered([]) == 0
    assert throughput.covered([(5, 6), (0, 2), (1, 3), (1, 2), (3, 4)]) == 5


@pytest.mark.parametrize(
    ("num_envs", "replay_ratio", "schedule"), [(1, 0.25, (4, 1)), (8, 0.25, (1, 2)), (6, 0.25, (2, 3)), (1, 2, (1, 2))]
)
def test_the_other_side_keeps_the_replay_ratio(throughput, num_envs, replay_ratio, schedule):
    train_freq, gradient_steps = sys.modules["sb3_dqn"].sb3_schedule(num_envs, replay_ratio)
    assert (train_freq, gradient_steps) == schedule
    assert gradient_steps == train_freq * num_envs * replay_ratio


def test_the_other_sides_best_setting_is_compared_with(throughput):
    samples = {
        "loop": [{"seconds": 1.0, "frames": 900}],
        "sb3 dummy:1": [{"seconds": 1.0, "frames": f} for f in (100, 200, 900)],
        "sb3 dummy:8": [{"seconds": 1.0, "frames": f} for f in (300, 300, 300)],
    }
    assert throughput.best_sb3(samples) == "sb3 dummy:8"
    assert throughput.best_sb3({"loop": samples["loop"]}) is None


def test_turns_alternate_their_order_and_share_the_time(throughput):
    turns = []
    arms = {
        n: lambda s, n=n: turns.append((n, round(s, 6))) or {"seconds": s} for n in ("loop", "update", "sb3 dummy:1")
    }
    samples = throughput.take_turns(arms, seconds=5.2, repeats=2)
    assert turns == [
        *(("loop", 1.0), ("update", 0.6), ("sb3 dummy:1", 1.0)),
        *(("sb3 dummy:1", 1.0), ("update", 0.6), ("loop", 1.0)),
    ]
    assert {len(of_arm) for of_arm in samples.values()} == {2}


def gpu_record(throughput) -> dict:
    machine = sys.modules["recording"].describe_machine() | {"gpu": "a GPU", "cuda": "13.0"}
    phases = {"act": 0.5, "learn": 1.0, "environment": 0.25}
    return {
        "device": "cuda",
        "machine": machine,
        "settings": vars(throughput.parse([])),
        "in_graph": True,
        "warm_up_updates": 20,
        "sb3_missing": "",
        "samples": {
            # 32 frames per step of 8 environments, 2 updates per step
            "loop": [{"seconds": 2.0, "frames": 64_000, "updates": 4_000, "calls": 2_000, "phases": phases}],
            "update": [{"seconds": 1.0, "updates": 4_000}],
            "environments": [{"seconds": 1.0, "frames": 40_000, "calls": 1_250}],
            "act": [{"seconds": 1.0, "frames": 320_000, "calls": 10_000}],
        },
        "profile": {
            "steps": 100,
            "seconds": 0.2,
            "busy_seconds": 0.04,
            "busy_seconds_per_step": 4e-4,
            "kernels_per_step": 250.0,
            "kernels": [["gemm|kernel", 200, 0.03]],
            "operators": [["cudaGraphLaunch", 200, 0.01]],
        },
        "modelled": {"kernels_per_step": 240.4, "update_seconds": 1e-4},
    }


def test_the_model_counts_a_step_of_all_environments(throughput):
    config, spec = throughput.paper(schedule="fixed", num_envs=8, width=32, encoder_width=0.25), make_spec(6)
    known, unknown = (throughput.modelled(config, spec, gpu) for gpu in ("NVIDIA H200", "a GPU"))
    assert known["kernels_per_step"] == unknown["kernels_per_step"] > 2 * 90  # two updates, and acting
    assert 0 < known["update_seconds"] < 1e-3
    assert unknown["update_seconds"] is None


def test_the_gpu_report_by_hand(throughput):
    text = throughput.report(gpu_record(throughput))
    assert "| updates alone, frames/s at the replay ratio | 64000 [64000-64000] |" in text
    assert "| loop / the slower of environments and updates | 0.80 [0.80-0.80] |" in text  # 32,000 of 40,000
    assert "| GPU busy in the loop (busy time of a profiled step x steps/s) | 0.40 [0.40-0.40] |" in text
    assert "acting 0.25 [0.25-0.25], learning (drawing batches and updates) 0.50" in text
    assert "the GPU busy for 20% of it" in text
    assert "| kernels and copies of a step, profiled / modelled | 250 / 240 |" in text
    assert "| modelled least time of an update / measured | 0.40 [0.40-0.40] |" in text
    assert r"| `gemm\|kernel` | 2.0 | 0.300 |" in text
    assert "Stable-Baselines3" not in text.replace("stable-baselines3", "")


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_a_tiny_measurement(throughput, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    output = tmp_path / "throughput"
    how = ["--seconds", "0.6", "--repeats", "2", "--encoder-width", "0.1", "--profile-steps", "2", "--device", "cpu"]
    assert throughput.main([*TINY, *how, "--output", str(output)]) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    assert {name: len(turns) for name, turns in record["samples"].items()} == dict.fromkeys(throughput.SHARES, 2)
    assert all(turn["seconds"] > 0 for turns in record["samples"].values() for turn in turns)
    loop = record["samples"]["loop"]
    assert sum(t["updates"] for t in loop) == pytest.approx(sum(t["frames"] for t in loop) / 4 / 4, abs=1)
    assert loop[0]["phases"]["total"] <= loop[0]["seconds"] * 1.5
    assert record["profile"]["busy_seconds"] == 0
    assert record["profile"]["operators"]
    text = output.with_suffix(".md").read_text()
    assert "No comparison with Stable-Baselines3: stable_baselines3 is not installed: pip install" in text
    assert text.rstrip() == capsys.readouterr().out.rstrip()


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_what_is_cut_short_keeps_the_repeats_that_it_had(throughput, monkeypatch, tmp_path):
    taken, act_arm = [], throughput.act_arm

    def cut(loop):
        arm = act_arm(loop)

        def turn(seconds):
            taken.append(seconds)
            if len(taken) == 2:
                raise KeyboardInterrupt
            return arm(seconds)

        return turn

    monkeypatch.setattr(throughput, "act_arm", cut)
    output = tmp_path / "throughput"
    how = ["--seconds", "0.6", "--repeats", "3", "--encoder-width", "0.1", "--device", "cpu", "--sb3"]
    with pytest.raises(KeyboardInterrupt):
        throughput.main([*TINY, *how, "--output", str(output)])
    record = json.loads(output.with_suffix(".json").read_text())
    assert {len(turns) for turns in record["samples"].values()} == {1}
    assert "1 of 3 repeats" in output.with_suffix(".md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_other_side_learns_in_pieces_at_the_same_ratio(throughput):
    pytest.importorskip("stable_baselines3")
    from growtrain.settings.presets import paper

    config = paper(num_envs=2, batch_size=2, width=8, learning_starts=32, replay_capacity=64, schedule="fixed")
    arms: dict = {}
    missing = throughput.add_sb3(arms, ["dummy:2"], config)
    assert missing is None
    turns = [arms["sb3 dummy:2"](0.2) for _ in range(3)]
    steps, updates = sum(t["frames"] for t in turns) / 4, sum(t["updates"] for t in turns)
    assert updates == pytest.approx(steps / 4, abs=1)
    assert min(t["updates"] for t in turns) > 0


def test_bad_input_is_refused(throughput, capsys):
    with pytest.raises(SystemExit, match="2"):
        throughput.parse(["--sb3", "threads:2"])
    assert "write dummy:N or subproc:N" in capsys.readouterr().err
    assert throughput.main(["--num-envs", "0", "--sb3"]) == 2
    assert "--num-envs is 0" in capsys.readouterr().err
    assert isinstance(throughput.parse(["--sb3"]), argparse.Namespace)
