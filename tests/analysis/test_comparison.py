"""Where arms are compared, and what is said about it: each kind of verdict, from runs whose truth is known."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from growtrain.analysis import tables
from growtrain.analysis.aggregate import Estimate
from growtrain.analysis.comparison import (
    Comparison,
    compare,
    interval_text,
    limits,
    value_text,
    verdict,
)
from growtrain.analysis.study import Study, reference_of
from growtrain.analysis.tables import _time_rows, comparisons
from growtrain.runfiles import run_lock

from .conftest import ACTING, FLOPS, WriteRun, line, study_of, write_arms


def first(study: Study, arm: str = "grow1x") -> Comparison:
    reference = reference_of(study, arm)
    assert reference is not None
    return compare(study, arm, reference, np.random.default_rng(0))


def test_the_limit_is_what_every_healthy_run_has_reached(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("done", seed=0)
    running = write_run("running", seed=1, status=None, until=30_000)
    write_run("failed", seed=2, status="failed", until=12_000)
    write_run("other", game="breakout", status="failed", until=20_000)
    with run_lock(running):
        study = study_of(tmp_path)
    assert limits(study, study.arms, "frames") == {"pong": 30_000, "breakout": 20_000}
    assert limits(study, study.arms, "hours")["pong"] == pytest.approx(300 / 3600)


def test_verdict_equal_score_in_less_time(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"full3x": 1.0, "grow1x": 1.0})
    found = first(study_of(tmp_path))
    text = verdict(found)
    assert "grow1x reaches full3x's training score within the interval at equal frames (40k frames)" in text
    assert "at x0.800 of its time and x0.550 of its FLOPs" in text
    assert found.points["frames"].improvement.value == 0.5
    assert found.points["frames"].improvement.low is not None
    assert float(found.points["hours"].difference.value) > 0.1  # it had gone further by then
    assert found.points["frames"].paired is not None
    assert found.points["frames"].paired.value == 0


@pytest.mark.parametrize(
    ("slope", "outcome"), [(1.2, "scores higher in training than"), (0.8, "scores lower in training than")]
)
def test_verdict_clear_difference(write_run: WriteRun, tmp_path: Path, slope: float, outcome: str) -> None:
    write_arms(write_run, {"full3x": 1.0, "grow1x": slope})
    found = first(study_of(tmp_path))
    assert f"grow1x {outcome} full3x" in verdict(found)
    improvement = found.points["frames"].improvement  # every run beats every run, or none
    assert (float(improvement.value), improvement.low) == (float(slope > 1), None)


@pytest.mark.parametrize(
    ("slope", "outcome"), [(1.2, "score higher"), (1.0, "are not told apart"), (0.8, "score lower")]
)
def test_verdict_by_evaluations_stands_beside_that_of_training(
    write_run: WriteRun, tmp_path: Path, slope: float, outcome: str
) -> None:
    for schedule, steepness in (("full3x", 1.0), ("grow1x", slope)):
        for seed in range(3):
            evaluations = {frames: line(seed, steepness)(frames) for frames in (20_000, 40_000)}
            write_run(f"{schedule}-{seed}", "pong", schedule, seed, line(seed), evaluations=evaluations)
    study = study_of(tmp_path)
    evaluated = first(study.by_evaluation())
    text = verdict(first(study), evaluated)
    assert text.startswith("grow1x reaches full3x's training score")
    assert f"Its evaluations {outcome}: IQM" in text
    assert evaluated.points["frames"].paired is not None
    assert evaluated.points["frames"].paired.value == pytest.approx((slope - 1) * 35 / 35.3)


def test_evaluations_at_equal_flops_lie_between_two_of_them(write_run: WriteRun, tmp_path: Path) -> None:
    for schedule in ("full3x", "fixed"):
        for seed in range(3):
            evaluations = {frames: line(0)(frames) for frames in (10_000, 20_000, 40_000)}
            write_run(f"{schedule}-{seed}", "pong", schedule, seed, line(0), evaluations=evaluations)
    point = first(study_of(tmp_path).by_evaluation(), "fixed").points["flops"]
    whole = 40_000 // 16 * FLOPS["fixed"][0] + 40_000 * ACTING
    assert point.at == {"pong": whole}
    # full3x has had that much training when it had seen this share of its frames, to the record before.
    share = np.floor(whole / (40_000 // 16 * FLOPS["full3x"][0] + 40_000 * ACTING) * 40) / 40
    end = 34.7 / 35.3  # of the way from random to human
    assert point.arm.value == pytest.approx(end)
    assert point.reference.value == pytest.approx(share * end)


def test_verdict_an_interval_too_wide_to_say(write_run: WriteRun, tmp_path: Path) -> None:
    for schedule in ("full3x", "grow1x"):
        for seed, slope in enumerate((0.7, 1.0, 1.3)):
            write_run(f"{schedule}-{seed}", "pong", schedule, seed, line(0, slope))
    text = verdict(first(study_of(tmp_path)))
    assert text.startswith(
        "Cannot tell whether grow1x keeps up with full3x: no difference shows at 40k frames, at x1.000"
    )
    assert "but losing 82% of its score is not excluded. IQM" in text


def test_verdict_too_few_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"full3x": 1.0, "grow1x": 5.0}, seeds=2)
    text = verdict(first(study_of(tmp_path)))
    assert text.startswith(
        "Cannot tell whether grow1x keeps up with full3x: 2 runs of grow1x on pong; 2 runs of full3x"
    )
    assert "[" not in text


def test_verdict_failed_runs_make_too_few(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"full3x": 1.0})
    for seed in range(3):
        write_run(
            f"g{seed}",
            "pong",
            "grow1x",
            seed,
            line(seed),
            status="failed" if seed else "done",
            until=40_000 // (1 + seed),
        )
    text = verdict(first(study_of(tmp_path)))
    assert "1 run of grow1x on pong, and an interval needs 3" in text


def test_verdict_nothing_learned(write_run: WriteRun, tmp_path: Path) -> None:
    for schedule in ("full3x", "grow1x"):
        for seed in range(3):
            write_run(f"{schedule}{seed}", "pong", schedule, seed, lambda frames, seed=seed: -21 + 0.2 * seed)
    found = first(study_of(tmp_path))
    assert "neither is clearly better than a random policy" in verdict(found)
    assert found.times == []
    assert found.unlearned == ["pong"]


def test_verdict_no_common_game(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("a", "pong", "full3x")
    write_run("b", "breakout", "grow1x")
    found = first(study_of(tmp_path))
    assert verdict(found) == "Cannot tell how grow1x compares with full3x: no game was played by both."
    assert found.elsewhere == ["breakout", "pong"]


def test_verdict_of_a_game_without_reference_scores_says_so(write_run: WriteRun, tmp_path: Path) -> None:
    chain = "minatar/space_invaders+asterix"
    for schedule in ("full3x", "grow1x"):
        for seed in range(3):
            write_run(f"{schedule}-{seed}", chain, schedule, seed)
    assert verdict(first(study_of(tmp_path))).endswith(f"{chain} has no reference scores to normalise by.")


def test_a_run_of_a_chain_counts_once(write_run: WriteRun, tmp_path: Path) -> None:
    """In how many runs there are, and in how many diverged."""
    chain = "minatar/space_invaders+asterix"
    for schedule in ("full3x", "grow1x"):
        for seed in range(4):
            broken = (schedule, seed) == ("grow1x", 3)
            run = write_run(
                f"{schedule}-{seed}",
                chain,
                schedule,
                seed,
                line(seed),
                until=9_000 if broken else 40_000,
                status="failed" if broken else "done",
            )
            if broken:
                text = (run / "summary.json").read_text()
                (run / "summary.json").write_text(text.replace("OSError: no\\nspace", "Diverged: x"))
    comparison = first(study_of(tmp_path).by_part())
    assert comparison.diverged == {"grow1x": 1, "full3x": 0}
    assert "1 of grow1x diverged" in verdict(comparison)
    point = comparison.points["frames"]
    assert (len(comparison.games), point.difference.runs, point.difference.missing) == (2, 7, 1)
    assert point.paired is not None
    assert point.paired.runs == 3


def test_an_arm_that_was_stopped_everywhere_is_compared_at_what_it_reached(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"full3x": 1.0})
    for seed in range(3):
        write_run(f"grow1x-{seed}", "pong", "grow1x", seed, line(seed), until=36_000, status="stopped")
    study = study_of(tmp_path)
    found = first(study)
    assert found.points["frames"].at == {"pong": 36_000}
    assert found.points["frames"].difference.value == 0
    assert limits(study, study.arms, "frames") == {"pong": 40_000}  # which takes nothing from the others
    write_run("smoke", "pong", "fixed", 0, line(0), until=4_000, total_frames=4_000)
    assert first(study_of(tmp_path)).points["frames"].arm == found.points["frames"].arm
    ended = write_run("diverged", "pong", "grow1x", 3, line(3), until=6_000, status="failed")
    change_summary(ended, reason="Diverged: a weight is not finite")
    found = first(study_of(tmp_path))
    assert found.points["frames"].at == {"pong": 36_000}
    assert found.diverged == {"grow1x": 1, "full3x": 0}
    assert verdict(found).startswith("Cannot tell how grow1x compares with full3x: 1 of grow1x diverged, and only")


def test_wall_clock_of_different_machines_is_not_compared(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"full3x": 1.0, "grow1x": 1.0})
    for path in (tmp_path / "runs").glob("*grow1x*/config.json"):
        path.write_text(path.read_text(encoding="utf-8").replace("x86_64", "other"), encoding="utf-8")
    found = first(study_of(tmp_path))
    assert len(found.machines) == 2
    assert "of its time" not in verdict(found)


def test_time_to_score_of_an_arm_that_is_twice_as_fast(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"full3x": 1.0, "grow1x": 2.0})
    half = {time.axis: time for time in first(study_of(tmp_path)).times if time.level == 0.5}
    # Half of the way is at 10k against 20k frames, and the running mean over 4k frames gets there 2k later.
    assert half["frames"].ratio.value == pytest.approx(12 / 22, abs=0.05)
    assert half["hours"].ratio.value == pytest.approx(0.8 * 12 / 22, abs=0.05)  # 125 instead of 100 frames a second
    assert half["flops"].ratio.value < 0.3
    assert half["frames"].reached == half["frames"].reference_reached == (3, 3)


def test_time_to_score_that_is_never_reached_says_so(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"full3x": 1.0, "grow1x": 0.7})
    late = next(t for t in first(study_of(tmp_path)).times if t.level == 0.9 and t.axis == "frames")
    assert late.reached == (0, 3)
    assert interval_text(late.ratio) == "never [never, never]"


def test_times_that_ended_before_the_first_score_are_counted_and_said(write_run: WriteRun, tmp_path: Path) -> None:
    """An arm that is eight times as fast is there before a tenth of the budget: what is seen of it is less than that."""
    write_arms(write_run, {"full3x": 1.0, "grow1x": 8.0})
    half = next(t for t in first(study_of(tmp_path)).times if t.level == 0.5 and t.axis == "frames")
    assert (half.early, half.reference_early) == (3, 0)
    assert half.ratio.value > 2.5 / 22  # what it would be if times were seen from the start
    (row,) = [row for row in _time_rows(first(study_of(tmp_path))) if row[1:3] == ["50%", "frames"]]
    assert (
        "there at the first score already: 3 of 3 runs, 0 of 3 of reference, which draws the ratio towards 1" in row[-1]
    )


def test_a_ratio_of_times_of_which_none_was_seen_is_unknown(write_run: WriteRun, tmp_path: Path) -> None:
    for schedule in ("full3x", "grow1x"):
        for seed in range(3):
            write_run(
                f"{schedule}{seed}", "pong", schedule, seed, lambda frames, seed=seed: 10 + frames / 10_000 + seed / 100
            )
    rows = [row for row in _time_rows(first(study_of(tmp_path))) if row[1:3] == ["50%", "frames"]]
    assert [(row[3], row[4], row[5]) for row in rows] == [("unknown", "3 of 3", "3 of 3")]
    assert rows[0][-1] == "there at the first score already: 3 of 3 runs, 3 of 3 of reference"


def test_a_run_that_ended_early_is_not_taken_for_one_that_never_got_there(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"full3x": 1.0, "grow1x": 1.0})
    write_run("extra", "pong", "grow1x", 3, line(3), status="failed", until=8_000)
    late = next(t for t in first(study_of(tmp_path)).times if t.level == 0.5 and t.axis == "frames")
    assert late.reached == (3, 4)
    assert late.ratio.missing == 1
    assert np.isfinite(late.ratio.value)


def test_numbers_as_text() -> None:
    assert [value_text(x) for x in (0.12345, -0.0001, 12.34, 1234.5, np.inf, np.nan)] == [
        "0.123",
        "0.000",
        "12.3",
        "1,234",
        "never",
        "-",
    ]
    found = Estimate(value=np.array(0.5), low=np.array(0.25), high=np.array(1.0), reason="", runs=3, missing=0)
    assert interval_text(found) == "0.500 [0.250, 1.000]"


def test_without_a_done_run_flops_are_unknown_and_said_to_be(write_run: WriteRun, tmp_path: Path) -> None:
    """A stopped run has not paid for the stages that it did not reach: it knows its own FLOPs, and not those of others."""
    write_arms(write_run, {"full3x": 1.0})
    stopped = write_run("stopped", schedule="grow1x", seed=0, score=line(0), until=8_000, status="stopped")
    summary = json.loads((stopped / "summary.json").read_text())
    never = {"frames": 0, "updates": 0, "flops_per_update": FLOPS["grow1x"][1], "flops_of_acting": 0}
    (stopped / "summary.json").write_text(json.dumps(summary | {"stages": [*summary["stages"], never]}))
    with run_lock(write_run("running", schedule="grow1x", seed=1, score=line(1), status=None)):
        study = study_of(tmp_path)
    curves = {entry.run.name: entry.curve for entry in study.entries}
    assert curves["stopped"].flops[-1] == study.cell("grow1x", "pong")[1].run.total_flops > 0
    assert np.isnan(curves["running"].flops).all()
    compared = first(study)
    assert set(compared.points) == {"frames", "hours"}
    assert "FLOPs are unknown of some runs: before its end" in str(comparisons([compared]))
    # A done run that got no further, as an adaptive one may, knows what it got to.
    (stopped / "summary.json").write_text(
        json.dumps(summary | {"status": "done", "stages": [*summary["stages"], never]})
    )
    flops = {entry.run.name: entry.curve for entry in study_of(tmp_path).entries}["running"].flops
    assert np.isfinite(flops[curves["running"].frames <= 10_000]).all()
    assert np.isnan(flops[curves["running"].frames > 10_000]).all()


def change_summary(run_dir: Path, **values: object) -> None:
    path = run_dir / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_about(run_dir: Path, **values: object) -> None:
    path = run_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_settings(run_dir: Path, **values: object) -> None:
    about = json.loads((run_dir / "config.json").read_text())
    change_about(run_dir, config=about["config"] | values)


def test_an_arm_of_which_runs_diverged_is_not_said_to_be_better(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"full3x": 1.0, "grow1x": 1.2})
    for seed in (3, 4):
        write_run(f"pong-full3x-{seed}", "pong", "full3x", seed, line(seed))
        ended = write_run(f"pong-grow1x-{seed}", "pong", "grow1x", seed, lambda _: -20.7, until=20_000, status="failed")
        change_summary(ended, reason="Diverged: a weight is not finite" if seed == 3 else "OSError: no space")
    found = first(study_of(tmp_path))
    text = verdict(found)
    assert text.startswith(
        "Cannot tell how grow1x compares with full3x: 1 of grow1x diverged, and only the others have a score. IQM"
    )
    assert "2 of 5 runs of grow1x on pong have no score there" in text
    assert "2 of 5 runs of grow1x on pong have no score there: the scores are those of the others" in str(
        comparisons([found])
    )
    late = next(time for time in found.times if time.level == 0.9 and time.axis == "frames")
    assert (late.reached, late.reference_reached) == ((3, 5), (5, 5))


@pytest.mark.parametrize("until", [2_000, 20_000])
def test_a_game_on_which_an_arm_diverged_in_all_its_runs_is_not_left_out(
    write_run: WriteRun, tmp_path: Path, until: int
) -> None:
    write_arms(write_run, {"full3x": 1.0, "grow1x": 1.2})
    write_arms(write_run, {"full3x": 1.0}, game="breakout")
    for seed in range(3):
        ended = write_run(f"breakout-grow1x-{seed}", "breakout", "grow1x", seed, until=until, status="failed")
        change_summary(ended, reason="Diverged: a weight is not finite")
    found = first(study_of(tmp_path))
    text = verdict(found)
    assert found.games == ["pong"]
    assert text.startswith("Cannot tell how grow1x compares with full3x: 3 of grow1x diverged, and only the others")
    assert "3 of 3 runs of grow1x on breakout have no score there" in text
    for run in (tmp_path / "runs").glob("pong-*"):
        shutil.rmtree(run)
    assert verdict(first(study_of(tmp_path))) == (
        "Cannot tell how grow1x compares with full3x: no game has a score of both: 3 of grow1x diverged; "
        "3 of 3 runs of grow1x on breakout have no score there."
    )


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_arms_that_diverged_in_all_their_runs_are_not_compared_by_what_came_before(
    write_run: WriteRun, tmp_path: Path, status: str
) -> None:
    for schedule, until, how in (("full3x", 12_000, status), ("grow1x", 20_000, "failed")):
        for seed in range(3):
            slope = 1.6 if schedule == "grow1x" else 1.0
            ended = write_run(f"{schedule}-{seed}", "pong", schedule, seed, line(seed, slope), until=until, status=how)
            if how == "failed":
                change_summary(ended, reason="Diverged: a weight is not finite")
    wide = " and 3 of full3x" if status == "failed" else ""
    which = f"3 of grow1x{wide} diverged. IQM"
    assert verdict(first(study_of(tmp_path))).startswith(f"Cannot tell how grow1x compares with full3x: {which}")


def test_evaluations_say_of_what_they_are(write_run: WriteRun, tmp_path: Path) -> None:
    def evaluated_text() -> str:
        study = study_of(tmp_path)
        return verdict(first(study), first(study.by_evaluation())).split("Its evaluations")[1]

    write_arms(write_run, {"full3x": 1.0, "grow1x": 1.0})
    assert evaluated_text().startswith(" are not told apart: IQM")
    for seed in range(3):
        for schedule in ("full3x", "grow1x"):
            times = (20_000, 40_000) if schedule == "full3x" else (20_000,)
            evaluations = {frames: line(seed)(frames) for frames in times}
            write_run(f"long-{schedule}-{seed}", "breakout", schedule, seed, line(seed), evaluations=evaluations)
            (tmp_path / "runs" / f"pong-{schedule}-{seed}" / "evaluations.jsonl").write_text("")
    assert evaluated_text().startswith(" on breakout alone, at 20k frames are not told apart: IQM")
    ended = write_run("diverged", "breakout", "grow1x", 3, status="failed", until=3_000, evaluations={3_000: 1.0})
    change_summary(ended, reason="Diverged: a weight is not finite")
    assert "do not tell: 1 of grow1x diverged, and only the others have a score. IQM" in evaluated_text()
    change_settings(ended, eval_epsilon=0.1)
    assert "do not tell: 1 of grow1x diverged" in evaluated_text()  # that of a run without a score says nothing
    shutil.rmtree(ended)
    change_settings(tmp_path / "runs" / "long-grow1x-1", eval_epsilon=0.1)
    assert evaluated_text() == " are not compared: they are at epsilon 0.01 and 0.1."
    note = "evaluations are at epsilon 0.01 and 0.1: their difference is that of the epsilons, too"
    assert note in str(tables.evaluations([first(study_of(tmp_path).by_evaluation())]))


def test_a_short_run_of_another_arm_changes_no_comparison(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"full3x": 1.0, "grow1x": 1.05})
    before = first(study_of(tmp_path)).points["frames"]
    write_run("smoke", "pong", "fixed", 0, line(0), until=4_000, total_frames=4_000)
    study = study_of(tmp_path)
    assert study.budgets == {"pong": 4_000}
    after = first(study).points["frames"]
    assert (after.difference, after.arm) == (before.difference, before.arm)
    (smoke,) = (arm for arm in study.arms if study.schedules[arm] == "fixed")
    assert first(study, smoke).points["frames"].at == {"pong": 4_000}


def test_an_axis_on_which_a_run_has_no_score_yet_is_left_out(write_run: WriteRun, tmp_path: Path) -> None:
    """At the hours of a run that is ten times as fast, the others have played less than the tenth that their first score takes."""
    for seed in range(3):
        write_run(f"slow-{seed}", "pong", "full3x", seed, line(seed), speed=100.0)
        write_run(f"quick-{seed}", "pong", "grow1x", seed, line(seed), speed=2_000.0 if seed == 0 else 150.0)
    found = first(study_of(tmp_path))
    assert set(found.points) == {"frames", "flops"}
    note = "not compared at equal wall-clock: 2 of 3 runs of grow1x on pong; 3 of 3 runs of full3x on pong have their first score after"
    assert note in str(comparisons([found]))


def test_runs_of_different_budgets_are_judged_by_as_many_frames(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_run(f"short-{seed}", "pong", "full3x", seed, line(seed))
        write_run(f"long-{seed}", "pong", "grow1x", seed, line(seed), total_frames=400_000)
    found = first(study_of(tmp_path))
    assert found.points["frames"].difference.value == 0
    write_run("pilot", "pong", "fixed", 0, line(0), until=1_000, status="failed", total_frames=4_000)
    episodes = [entry.curve.episodes[-1] for entry in study_of(tmp_path).entries if entry.run.name != "pilot"]
    assert episodes == [8.0] * 6


def test_forks_of_one_run_are_no_other_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"full3x": 1.0, "grow1x": 1.0})
    parent = tmp_path / "runs" / "pong-grow1x-0"
    assert not first(study_of(tmp_path)).related
    fork = tmp_path / "runs" / "pong-grow1x-1"
    change_about(fork, resumes=[{"frames": 10_000, "forked_from": str(parent / "checkpoints" / "000000010000")}])
    found = first(study_of(tmp_path))
    assert found.related == ["grow1x on pong"]
    change_about(fork, resumes=[{"frames": 10_000, "forked_from": "pong-grow1x-0/checkpoints/000000010000"}])
    assert first(study_of(tmp_path)).related == ["grow1x on pong"]
    assert "runs of grow1x on pong share a past (forks)" in str(comparisons([found]))
    assert "; runs of grow1x on pong share a past, so intervals are too narrow." in verdict(found)


def test_a_run_that_moved_has_no_wall_clock_to_compare(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"full3x": 1.0, "grow1x": 1.0})
    moved = tmp_path / "runs" / "pong-grow1x-1"
    change_about(
        moved, git_commit="a", resumes=[{"frames": 10_000, "skew": ["num_threads 1 -> 2", "torch 2.11 -> 2.12"]}]
    )
    found = first(study_of(tmp_path))
    assert found.machines == ["cpu (x86_64), 2 threads", "cpu (x86_64), 2 threads (num_threads 1 -> 2 on the way)"]
    assert "of its time" not in verdict(found)
    change_about(moved, resumes=[])
    change_about(tmp_path / "runs" / "pong-grow1x-2", git_commit="b")
    assert "made by 2 versions of the code" in str(comparisons([first(study_of(tmp_path))]))
