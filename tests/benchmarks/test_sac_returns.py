"""The comparison of SAC's returns by hand, on runs as they are on disk, and a tiny training of the other side."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scipy import stats

from growtrain.settings.presets import sac
from growtrain.settings.text import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def sac_returns(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("sac_returns", BENCHMARKS / "sac_returns.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(directory: Path, seed: int, frames: int, **settings: object) -> None:
    directory.mkdir(parents=True)
    config = sac(game="mujoco/HalfCheetah-v5", seed=seed, **{"schedule": "fixed"} | settings)
    (directory / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    metrics = [(900, None, 0), (910, -3.0, 1), (960, 1.0, 3), (1_000, 9.0, 1), (1_100, 50.0, 2)]
    for stem, records in {
        "metrics": [{"frames": at, "episode_return": mean, "episodes": n} for at, mean, n in metrics if at <= frames],
        "evaluations": [{"frames": at, "episode_return": at / 100} for at in (500, 1_000)],
    }.items():
        (directory / f"{stem}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_it_records_the_thread_settings_that_it_has(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """It loads torch first: whatever sets `GOMP_SPINCOUNT` later is recorded without having had an effect."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "to be restored")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    for name in ("sac_speed", "sb3_sac"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    request.getfixturevalue("sac_returns")
    assert "GOMP_SPINCOUNT" not in os.environ


def test_scores_are_of_the_last_tenth_and_of_the_end(sac_returns: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", 0, 1_100)
    write_run(tmp_path / "runs" / "b", 1, 960)  # has not come so far
    for index, changes in enumerate(
        ({"schedule": "grow1x"}, {"priming_updates": 9}, {"regularizer": "l2"}, {"replay_ratio": 2.0})
    ):
        write_run(tmp_path / "runs" / f"c{index}", 0, 1_100, **changes)  # is not the plain algorithm
    found, configs = sac_returns.our_runs(tmp_path, 1_000)
    assert found == {"mujoco/HalfCheetah-v5": {"0": {"training": pytest.approx(9 / 5), "evaluation": 10.0}}}
    assert configs["mujoco/HalfCheetah-v5"].seed == 0
    assert sac_returns.last_tenth([(900, 1.0, 1), (1_001, 1.0, 1)], 1_000) is None


@pytest.mark.parametrize(("seed", "settings"), [(0, {}), (1, {"lr": 1e-3})])
def test_one_sweep_is_compared_at_a_time(
    seed: int, settings: dict[str, object], sac_returns: ModuleType, tmp_path: Path
) -> None:
    write_run(tmp_path / "a", 0, 1_100)
    write_run(tmp_path / "b", seed, 1_100, **settings)
    with pytest.raises(ConfigError, match="compare one sweep"):
        sac_returns.our_runs(tmp_path, 1_000)


def test_differences_have_welch_s_interval(sac_returns: ModuleType) -> None:
    ours, theirs = (10.0, 14.0, 12.0), (11.0, 9.0)
    sides = {
        name: {str(seed): {"training": value, "evaluation": None} for seed, value in enumerate(values)}
        for name, values in {"ours": ours, "theirs": theirs}.items()
    }
    training, evaluation = sac_returns.compared({"returns": {"game": sides}})
    # By hand: variances 4 / 3 and 2 / 2 of the means, the difference 2, and Welch's degrees of freedom.
    variances = 4 / 3, 2 / 2
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 1)
    half = stats.t.ppf(0.975, freedom) * sum(variances) ** 0.5
    assert training == ["game", "training", "12 (n=3)", "10 (n=2)", f"2 [{2 - half:.0f}, {2 + half:.0f}]"]
    assert evaluation == ["game", "evaluation", "-", "-", "-"]


def test_the_other_side_trains_with_our_settings(sac_returns: ModuleType) -> None:
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("mujoco")
    config = sac(game="mujoco/HalfCheetah-v5", width=16, learning_starts=50, batch_size=8, replay_capacity=2_000)
    returns = sac_returns.theirs(config, 0, 1_010)
    assert -2_000 < returns["training"] < 0  # its first episode, which ended at 1,000
    assert returns["evaluation"] < 500
