"""The learning-curve script on the committed runs and by hand."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("learning_curves", ROOT / "benchmarks" / "learning_curves.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scores_are_weighted_by_episodes_and_records_without_any_are_left_out(script: ModuleType) -> None:
    metrics = [
        {"frames": 10, "episode_return": None, "episodes": 0},
        {"frames": 20, "episode_return": 4.0, "episodes": 3},
        {"frames": 30, "episode_return": 8.0, "episodes": 1},
    ]
    assert script.training_curve({"metrics": metrics}) == ([20, 30], [4.0, 5.0])
    assert script.episodes_behind({"metrics": metrics}) == [3, 4]


def test_the_committed_runs_are_read_and_rise_above_random(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "learning"
    shutil.copytree(ROOT / "results" / "learning", folder)
    runs = script.load(folder)
    assert len(runs) >= 2
    for run in runs:
        frames, scores = script.training_curve(run)
        assert scores[-1] > 20 * scores[0]
        assert frames[-1] == run["metrics"][-1]["frames"]
    committed = (ROOT / "results" / "learning" / "curves.md").read_text()
    assert script.tabulate(runs) == committed
    axes = script.draw(runs).axes
    assert [panel.get_title() for panel in axes] == ["road_runner"]
    assert len([line for line in axes[0].lines if line.get_label().startswith("grow1x")]) == len(runs)
    assert all(" episodes a point" in line.get_label() for line in axes[0].lines if "seed" in line.get_label())
