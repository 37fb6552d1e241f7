"""Which runs are compared with which: arms, references, and what a run's curve costs by others of its arm."""

import json
from pathlib import Path

import numpy as np
import pytest

from growtrain.analysis.figures import _interventions
from growtrain.analysis.study import pairs_of, reference_of

from .conftest import ACTING, FLOPS, WriteRun, line, study_of, write_arms


def test_every_arm_of_a_schedule_is_named_by_what_differs_within_it(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        write_run(f"a{seed}", schedule="grow3x", seed=seed, device="cpu")
        write_run(f"b{seed}", schedule="grow3x", seed=seed, anchor="mirrored", lr=0.5)
        write_run(f"c{seed}", schedule="full3x", seed=seed, log_period=7)
    study = study_of(tmp_path)
    assert study.arms == ["full3x", "grow3x, --anchor frozen, --lr 0.00025", "grow3x, --anchor mirrored, --lr 0.5"]
    assert len(study.cell("full3x", "pong")) == 2


def test_an_arm_is_named_by_what_is_not_usual_in_other_schedules(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        write_run(f"a{seed}", schedule="grow3x", seed=seed)
    write_run("b", schedule="full3x", lr=0.5)
    assert study_of(tmp_path).arms == ["full3x, --lr 0.5", "grow3x"]


def test_a_setting_without_an_effect_is_not_named(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        write_run(f"a{seed}", schedule="grow3x", seed=seed, freeze="network", anchor="zero", target_period=100)
    write_run("b", schedule="full3x", freeze="heads", target_period=100)
    write_run("c", schedule="grow3x", freeze="heads", target_period=100)
    assert study_of(tmp_path).arms == ["full3x", "grow3x, --freeze heads", "grow3x, --freeze network"]


def test_the_reference_is_the_one_whose_settings_are_nearest(write_run: WriteRun, tmp_path: Path) -> None:
    for width in (32, 64):
        write_run(f"full{width}", schedule="full3x", width=width)
        write_run(f"grow{width}", schedule="grow3x", width=width, freeze="network")
        write_run(f"fixed{width}", schedule="fixed", width=width)
    write_run("heads", schedule="grow3x", width=64, freeze="heads")
    pairs = pairs_of(study_of(tmp_path))
    for arm in ("grow3x, --width 64, --freeze network", "grow3x, --width 64, --freeze heads"):
        assert {(arm, "full3x, --width 64"), (arm, "fixed, --width 64")} <= set(pairs)
        assert (arm, "fixed, --width 32") not in pairs
        assert (arm, "full3x, --width 32") in pairs  # the first arm, which all that grow are compared with
    assert ("fixed, --width 64", "full3x, --width 64") in pairs
    assert ("full3x, --width 64", "full3x, --width 32") in pairs


def test_of_two_full_widths_the_one_with_more_runs_leads(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("wider", schedule="full3x", width=128)
    for seed in range(2):
        write_run(f"full{seed}", schedule="full3x", width=32, seed=seed)
        write_run(f"fixed{seed}", schedule="fixed", width=32, seed=seed)
    assert study_of(tmp_path).arms == ["full3x, --width 32", "full3x, --width 128", "fixed"]
    for seed in range(1, 4):
        write_run(f"failed{seed}", schedule="full3x", width=128, seed=seed, status="failed", until=5_000)
    assert study_of(tmp_path).arms[0] == "full3x, --width 32"


def test_the_reference_of_growing_is_its_full_width_and_of_an_alternative_growing(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for schedule in ("full3x", "full1x", "grow1x", "grow3x", "reset", "fixed", "at:0.5"):
        write_run(schedule, schedule=schedule)
    study = study_of(tmp_path)
    found = {arm: reference_of(study, arm) for arm in study.arms}
    assert found == {
        "full3x": None,
        "full1x": "full3x",
        "grow3x": "full3x",
        "grow1x": "full1x",
        "fixed": "full3x",
        "at:0.5": "full3x",
        "reset": "grow3x",
    }


def test_of_two_runs_of_one_seed_one_stands_for_both(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("first", status="failed", until=39_000)
    write_run("second")
    study = study_of(tmp_path)
    assert {entry.run.name: entry.superseded_by for entry in study.entries} == {"first": "second", "second": ""}
    assert [entry.run.name for entry in study.cell("fixed", "pong")] == ["second"]


CHAIN = "minatar/asterix+breakout"
FIRST, SECOND = "minatar/asterix (1 of asterix+breakout)", "minatar/breakout (2 of asterix+breakout)"


def test_games_of_a_chain_are_judged_each_from_its_switch_on(write_run: WriteRun, tmp_path: Path) -> None:
    """Two games of 20k frames; the network grows at 10k, in the middle of the first."""
    run = write_run("a", CHAIN, "grow1x", score=lambda frames: frames / 1000, evaluations={20_000: 5.0, 40_000: 7.0})
    whole = study_of(tmp_path)
    assert whole.games == [CHAIN]
    study = whole.by_part()
    assert study.games == study.scored_games == [FIRST, SECOND]
    assert study.budgets == {FIRST: 20_000, SECOND: 20_000}
    ((first,), (second,)) = (study.cell("grow1x", game) for game in study.games)
    for part, score, evaluation in ((first, 19.5, 5.0), (second, 39.5, 7.0)):
        np.testing.assert_array_equal(part.curve.frames, np.arange(2_000, 20_001, 1_000))
        assert part.curve.score[-1] == score  # of the last 2k frames
        assert part.curve.hours[-1] == pytest.approx(200 / 3600)
        assert (part.evaluated.frames.tolist(), part.evaluated.score[-1]) == ([20_000], evaluation)
    assert first.curve.flops[-1] + second.curve.flops[-1] == pytest.approx(whole.entries[0].run.total_flops)
    update, acting = FLOPS["grow1x"][1], 2 * ACTING
    assert second.curve.flops[-1] == pytest.approx(20_000 // 16 * update + 20_000 * acting)
    # A record that reaches across the switch is of no game's episodes.
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:19], lines[20].replace("21.0", "1e6"), *lines[21:], ""]))
    (second,) = study_of(tmp_path).by_part().cell("grow1x", SECOND)
    assert (second.curve.frames[0], second.curve.score[0]) == (2_000, 22.0)


@pytest.mark.parametrize("change", [0.0, 0.5])
def test_what_happens_at_a_switch_belongs_to_the_game_that_it_happens_to(
    change: float, write_run: WriteRun, tmp_path: Path
) -> None:
    """Three lanes, whose steps do not end at the switch at 20k frames nor at 40k: the games end with the steps that get there.

    The loop intervenes before it evaluates: if that changed the policy, the evaluation is of neither game.
    """
    run = write_run("a", CHAIN, "at-switch", score=lambda frames: frames / 1000, num_envs=3)
    end, last = 20_001, 40_002
    for stem, records in {
        "growth_events": [{"frames": end, "stage": 1, "max_abs_q_change_online": change}],
        "decisions": [{"frames": frames} for frames in (10_000, 30_000)],
        "diagnostics": [
            {"frames": frames, "when": when}
            for frames, when in (
                (end, "before growth"),
                (end, "after growth"),
                (end, "period"),
                (30_000, "period"),
                (last, "period"),
            )
        ],
        "evaluations": [{"frames": f, "episode_return": r, "episodes": 4} for f, r in ((end, 3.0), (last, 5.0))],
    }.items():
        (run / f"{stem}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = (run / "metrics.jsonl").read_text()
    for nominal, actual in ((20_000, end), (40_000, last)):
        lines = lines.replace(f'"frames": {nominal},', f'"frames": {actual},')
    (run / "metrics.jsonl").write_text(lines)
    study = study_of(tmp_path).by_part()
    ((first,), (second,)) = (study.cell("at-switch", game) for game in study.games)
    assert study.chains == {FIRST: CHAIN, SECOND: CHAIN}
    assert [first.run.budget, second.run.budget] == [end, last - end]
    assert [each.curve.frames[-1] for each in (first, second)] == [end, last - end]
    assert [each.evaluated.score.tolist() for each in (first, second)] == [[] if change else [3.0], [5.0]]
    assert len(first.run.metrics) == len(second.run.metrics) == 20
    assert not np.isnan(first.run.metrics[0]).any()  # it reaches across no switch
    assert [event["frames"] for event in second.run.growth_events] == [0]
    assert first.run.growth_events == []
    assert [_interventions([second], axis) for axis in ("frames", "hours")] == [[0.0], [0.0]]  # where it is drawn
    assert [[each["frames"] for each in part.run.decisions] for part in (first, second)] == [[10_000], [30_000 - end]]
    measured = [[(each["frames"], each["when"]) for each in part.run.diagnostics] for part in (first, second)]
    assert measured[0] == [(end, "before growth")]
    assert measured[1] == [(0, "after growth"), (0, "period"), (30_000 - end, "period"), (last - end, "period")]


def test_a_game_that_a_chain_had_ended_is_done_whatever_became_of_the_run(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("a", CHAIN, status="failed", until=30_000)
    write_run("b", "pong")
    study = study_of(tmp_path).by_part()
    assert study.games == [FIRST, SECOND, "pong"]
    ((first,), (second,), (other,)) = (study.cell("fixed", game) for game in study.games)
    assert [each.run.status for each in (first, second, other)] == ["done", "failed", "done"]
    assert (first.run.frames, second.run.frames) == (20_000, 10_000)
    assert second.run.summary["reason"] == "OSError: no\nspace"
    assert other.run.budget == 40_000


def test_growing_is_also_compared_with_the_small_network_and_with_other_forms_of_it(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for schedule, settings in (
        ("full3x", {}),
        ("grow3x", {}),
        ("grow3x", {"freeze": "network"}),
        ("fixed", {}),
        ("reset", {}),
    ):
        write_run(f"{schedule}{len(settings)}", schedule=schedule, **settings)
    heads, network = "grow3x, --freeze heads", "grow3x, --freeze network"
    assert pairs_of(study_of(tmp_path)) == [
        (heads, "full3x"),
        (network, "full3x"),
        (heads, "fixed"),
        (network, "fixed"),
        (network, heads),
        ("fixed", "full3x"),
        ("reset", heads),
    ]


@pytest.mark.parametrize(
    ("resume", "known"),
    [
        ({"frames": 5_000, "changes": {}, "skew": []}, True),
        ({"frames": 5_000, "forked_from": "runs/other/checkpoints/5000"}, False),
        ({"frames": 5_000, "past_differs": True}, False),
    ],
    ids=["resumed", "forked", "other-past"],
)
def test_a_running_run_borrows_flops_unless_its_past_is_anothers(
    write_run: WriteRun, tmp_path: Path, resume: dict[str, object], known: bool
) -> None:
    write_arms(write_run, {"grow1x": 1.0}, seeds=1)
    running = write_run("running", "pong", "grow1x", 1, status=None)
    about = json.loads((running / "config.json").read_text(encoding="utf-8"))
    resumes = [{"frames": 3_000, "changes": {}, "skew": []}, resume]
    (running / "config.json").write_text(json.dumps(about | {"resumes": resumes}), encoding="utf-8")
    curves = {entry.run.name: entry.curve for entry in study_of(tmp_path).entries}
    expected = curves["pong-grow1x-0"].flops if known else np.full(len(curves["running"].frames), np.nan)
    np.testing.assert_allclose(curves["running"].flops, expected)


def test_a_run_without_a_summary_costs_what_one_that_is_done_does(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("a", schedule="grow1x", seed=0, score=line(0, 1.0))
    running = write_run("b", schedule="grow1x", seed=1, score=line(1, 1.0), status=None)
    stopped = write_run("c", schedule="grow1x", seed=2, score=line(2, 1.0), until=8_000, status="stopped")
    summary = json.loads((stopped / "summary.json").read_text())
    never = {"frames": 0, "updates": 0, "flops_per_update": FLOPS["grow1x"][1], "flops_of_acting": 0}
    (stopped / "summary.json").write_text(json.dumps(summary | {"stages": [*summary["stages"], never]}))
    curves = {entry.run.path.name: entry.curve for entry in study_of(tmp_path).entries}
    assert curves[running.name].flops[-1] == curves["a"].flops[-1]


def test_those_arms_of_a_schedule_come_first_that_differ_least_from_the_full_width(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for seed in range(2):
        write_run(f"full{seed}", schedule="full3x", width=32, seed=seed)
    write_run("wide", schedule="grow3x", width=128)
    write_run("small", schedule="grow3x", width=32)
    assert study_of(tmp_path).arms == ["full3x", "grow3x, --width 32", "grow3x, --width 128"]
