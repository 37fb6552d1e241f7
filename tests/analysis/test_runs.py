"""What is read from run directories: curves and FLOPs by hand, and whatever a run can leave behind that is not whole."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from growtrain.analysis.runs import find_runs, flatten, ledger_notes, read_run, series, training_curve
from growtrain.runfiles import run_lock
from growtrain.settings.text import ConfigError
from growtrain.sweep.cells import Cell, expand
from growtrain.sweep.ledger import Ledger

from .conftest import ACTING, FLOPS, WriteRun


def append(path: Path, *lines: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def test_curve_is_the_mean_of_the_episodes_of_a_tenth_of_the_budget(write_run: WriteRun) -> None:
    run_dir = write_run("run")  # 40k frames: a window of 4k
    records = [
        {"frames": 1000, "updates": 0, "wall_seconds": 1.0, "episode_return": 100.0, "episodes": 50},
        {"frames": 3000, "updates": 1, "wall_seconds": 2.0, "episode_return": 1.0, "episodes": 1},
        {"frames": 4000, "updates": 2, "wall_seconds": 3.0, "episode_return": None, "episodes": 0},
        {"frames": 6000, "updates": 3, "wall_seconds": 4.0, "episode_return": 7.0, "episodes": 3},
        {"frames": 20000, "updates": 4, "wall_seconds": 5.0, "episode_return": None, "episodes": 0},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    curve = training_curve(read_run(run_dir, "run"))
    assert list(curve.frames) == [4000, 6000, 20000]
    # 4000: records in (0, 4000]; 6000: in (2000, 6000]; 20000: none in the window, so the newest that has any.
    np.testing.assert_allclose(curve.score, [(50 * 100 + 1) / 51, (1 + 3 * 7) / 4, 7])
    assert list(curve.episodes) == [51, 4, 3]
    np.testing.assert_allclose(curve.hours, np.array([3, 4, 5]) / 3600)
    assert np.isnan(curve.flops).all()


def test_flops_of_the_curve_end_at_those_of_the_summary(write_run: WriteRun) -> None:
    run = read_run(write_run("run", schedule="grow1x"), "run")
    curve = training_curve(run, run.stage_costs)
    before, after = FLOPS["grow1x"]
    assert run.total_flops == 625 * before + 1875 * after + ACTING * (10_000 + 2 * 30_000)
    np.testing.assert_allclose(curve.flops[-1], run.total_flops)
    np.testing.assert_allclose(curve.flops[curve.frames == 10_000], 625 * before + ACTING * 10_000)
    np.testing.assert_allclose(
        np.diff(curve.flops)[-1], (after / 16 + 2 * ACTING) * np.diff(curve.frames)[-1], rtol=0.02
    )


def test_real_runs_flops_agree_with_their_summaries() -> None:
    for folder in sorted(Path("results/learning").glob("*/")):
        run = read_run(folder, folder.name)
        curve = training_curve(run, run.stage_costs)
        np.testing.assert_allclose(curve.flops[-1], run.total_flops, rtol=1e-3)


@pytest.mark.parametrize("status", ["done", "stopped", "failed"])
def test_status_is_the_summarys(write_run: WriteRun, status: str) -> None:
    assert read_run(write_run("run", status=status), "run").status == status


def test_without_a_summary_a_run_is_running_or_interrupted(write_run: WriteRun) -> None:
    run_dir = write_run("run", status=None)
    assert read_run(run_dir, "run").status == "interrupted"
    with run_lock(run_dir):
        assert read_run(run_dir, "run").status == "running"
    assert read_run(run_dir, "run").status == "interrupted"


def test_damage_is_read_around_and_named(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run("run")
    append(
        run_dir / "metrics.jsonl",
        "{not json",
        '{"no": "frames"}',
        "[1]",
        f'{{"frames": 1{"0" * 400}}}',
        '{"frames": true}',
    )
    append(run_dir / "evaluations.jsonl", '{"frames": 50000, "episode_return": NaN}')
    (run_dir / "summary.json").write_text('{"status": "do', encoding="utf-8")
    (run_dir / "growth_events.jsonl").unlink()
    (run_dir / "growth_events.jsonl").symlink_to(tmp_path / "elsewhere")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"frames": 41000, "upd')  # being written: no problem
    run = read_run(run_dir, "run")
    assert len(run.metrics) == 40
    assert run.growth_events == []
    assert run.status == "interrupted"
    text = "\n".join(run.problems)
    assert "metrics.jsonl: 5 lines cannot be read" in text
    assert "summary.json: cannot be read (not JSON)" in text
    assert "growth_events.jsonl: cannot be read" in text
    assert len(run.problems) == 3
    assert len(training_curve(run).frames) == 37


@pytest.mark.parametrize(
    "content", ["[]", "null", '"x"', '{"config": 3}', '{"config": {"game": 7, "seed": "x"}}', "[" * 5000]
)
def test_odd_configurations_do_no_harm(write_run: WriteRun, content: str) -> None:
    run_dir = write_run("run")
    (run_dir / "config.json").write_text(content, encoding="utf-8")
    run = read_run(run_dir, "run")
    assert isinstance(run.game, str)
    assert isinstance(run.seed, int)
    assert len(training_curve(run).frames) > 0


def test_runs_are_found_at_any_depth_once_and_never_inside_a_run(write_run: WriteRun, tmp_path: Path) -> None:
    first, second = write_run("a/b"), write_run("c")
    (first / "checkpoints" / "0001").mkdir(parents=True)
    (first / "checkpoints" / "0001" / "config.json").write_text("{}", encoding="utf-8")
    assert [run.name for run in find_runs([tmp_path / "runs", second])] == ["a/b", "c"]
    assert [run.name for run in find_runs([second])] == ["c"]
    for path, says in ((tmp_path / "nowhere", "no directory"), (first / "checkpoints" / "..", "")):
        if says:
            with pytest.raises(ConfigError, match=says):
                find_runs([path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no run"):
        find_runs([tmp_path / "empty"])
    for name in ("config.json", "probe.jsonl"):  # a probe is no run
        (tmp_path / "empty" / name).write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no run"):
        find_runs([tmp_path / "empty"])


def test_what_may_not_be_looked_into_is_said_and_what_has_gone_is_not(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run("a")
    walk = os.walk

    def failing(error: OSError) -> Any:
        def failing_walk(top: Path, onerror: Callable[[OSError], None]) -> Any:
            onerror(error)
            return walk(top, onerror=onerror)

        return failing_walk

    monkeypatch.setattr(os, "walk", failing(FileNotFoundError("b")))
    assert [run.name for run in find_runs([tmp_path / "runs"])] == ["a"]
    monkeypatch.setattr(os, "walk", failing(PermissionError("b")))
    with pytest.raises(PermissionError):
        find_runs([tmp_path / "runs"])


def test_diagnostics_keep_every_record_of_a_moment_and_are_flattened(write_run: WriteRun) -> None:
    run_dir = write_run("run")
    records = [{"frames": 8, "srank": {"hidden": n}, "churn": None, "when": "period"} for n in (5, 4)]
    (run_dir / "diagnostics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    run = read_run(run_dir, "run")
    x, y = series(run, "srank/hidden")
    assert (list(x), list(y)) == ([8, 8], [5, 4])
    assert flatten(records[0]) == {"frames": 8, "srank/hidden": 5}


def test_a_sweeps_ledger_says_what_is_not_there_yet(tmp_path: Path) -> None:
    cells = expand("pong", "fixed", "2", {"total_frames": 40_000})
    with Ledger(tmp_path, create=True) as ledger:
        ids = ledger.submit(cells)
        ledger.claim(ids[:1], lambda cell: True)
        ledger.fail(ids[0], "exit code 1: log\nthe disk is full", 500, 1)
    gave_up, waits = ledger_notes([tmp_path, tmp_path / "other"])
    assert "gave up pong fixed seed 0 after 1 attempt: exit code 1: the disk is full" in gave_up
    assert waits == "the sweep has yet to run, or go on with, 1 of its 2 runs: pong fixed seed 1"
    (tmp_path / "ledger.sqlite").write_bytes(b"x" * 5000)
    assert "ledger.sqlite" in ledger_notes([tmp_path])[0]


def test_a_failed_cell_is_superseded_by_a_done_one_of_the_same_flags_under_other_defaults(tmp_path: Path) -> None:
    (cell,) = expand("pong", "fixed", "1", {"total_frames": 40_000})
    flags = {
        "newer": dataclasses.replace(cell, fingerprint="newer", run_dir="runs/newer"),
        "other": dataclasses.replace(cell, fingerprint="other", run_dir="runs/other", words=(*cell.words, "--lr", "1")),
    }
    with Ledger(tmp_path, create=True) as ledger:

        def end(cell: Cell, *, failed: bool) -> None:
            (id,) = ledger.submit([cell])
            ledger.claim([id], lambda cell: True)
            if failed:
                ledger.fail(id, "its run has other settings", 0, 0)
            else:
                ledger.done(id)

        end(cell, failed=True)
        end(flags["other"], failed=False)
        assert len(ledger_notes([tmp_path])) == 1
        end(flags["newer"], failed=False)
        assert ledger_notes([tmp_path]) == []
        end(dataclasses.replace(flags["newer"], fingerprint="newest", run_dir="runs/newest"), failed=True)
        assert "gave up pong fixed seed 0" in ledger_notes([tmp_path])[0]  # what was done before does not speak for it
