"""The arithmetic of the growth-cost benchmark by hand, and one tiny measurement."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from growtrain.environments.atari import make_spec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def growth_cost(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("growth_cost", BENCHMARKS / "growth_cost.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "growth_cost", module)
    spec.loader.exec_module(module)
    return module


def group_of(growth_cost, width: int, freeze_at: int, seconds: dict[str, list[float]]) -> dict:
    """A measured group in which a learner's FLOPs are ten times its first time."""
    subjects = growth_cost.make_subjects(width, freeze_at)
    learners = [
        {
            "name": s.name,
            "head_width": s.width,
            "flops_planned": 10 * seconds[s.name][0],
            "seconds": seconds[s.name],
        }
        for s in subjects
    ]
    return {"width": width, "freeze_encoder_at": freeze_at, "learners": learners}


def test_a_schedule_weights_its_stages_round_by_round(growth_cost):
    ratios = growth_cost.schedule_ratios([[1.0, 2.0], [2.0, 4.0]], [0.25, 0.75], [2.0, 1.0])
    assert ratios == [(0.25 * 1 + 0.75 * 2) / 2, 0.25 * 2 + 0.75 * 4]
    with pytest.raises(ValueError, match="argument 2"):
        growth_cost.schedule_ratios([[1.0], [1.0]], [1.0], [1.0])


def test_stages_are_weighted_by_their_share_of_the_frames(growth_cost):
    assert growth_cost.stage_shares("grow3x") == [1 / 8, 1 / 8, 1 / 4, 1 / 2]
    assert growth_cost.stage_shares("grow1x") == [1 / 4, 3 / 4]


def test_every_stage_of_every_form_is_measured_beside_its_full_width(growth_cost):
    subjects = {subject.name: subject for subject in growth_cost.make_subjects(512, 2)}
    assert len(subjects) == 3 + 4 * 3  # fresh weights are not frozen: no cold encoder
    whole = {subject.name: subject for subject in growth_cost.make_subjects(512, 0)}
    assert len(whole) == 4 + 5 * 3
    full, config = whole[growth_cost.FULL_PARAMETERS], growth_cost.paper()
    shapes = [
        growth_cost.network_shape(growth_cost.config_of(whole[name], config), make_spec(6), whole[name].width)
        for name in ("small", full.name)
    ]
    small, large = (shape.encoder_parameters + shape.head_parameters for shape in shapes)
    assert large / small == pytest.approx(4, rel=0.02)  # as many parameters as four small networks
    assert (subjects["full1x"].width, subjects["full3x"].width) == (1024, 2048)
    assert [subjects[f"zero {stage}"].encoder_trains for stage in (1, 2, 3)] == [True, False, False]
    assert all(subject.encoder_trains for subject in growth_cost.make_subjects(512, 0))


def test_ratios_of_a_group_by_hand(growth_cost):
    seconds = {subject.name: [3.0, 3.0] for subject in growth_cost.make_subjects(512, 0)}
    seconds |= {"small": [1.0, 1.0], "full1x": [2.0, 4.0], "full3x": [4.0, 8.0]}
    seconds |= {"mirrored 1": [2.0, 2.0], "mirrored 2": [4.0, 4.0], "mirrored 3": [5.0, 1.0]}
    group = group_of(growth_cost, 512, 0, seconds)
    result = growth_cost.analyze(group)
    assert result["stages"]["mirrored 3"] == {"time": [5 / 4, 1 / 8], "flops": 5 / 4}
    first, second = 1 / 8 + 2 / 8 + 4 / 4 + 5 / 2, 1 / 8 + 2 / 8 + 4 / 4 + 1 / 2
    assert result["schedules"]["grow3x", "mirrored"] == {"time": [first / 4, second / 8], "flops": first / 4}
    assert result["schedules"]["grow1x", "mirrored"]["time"] == [1.75 / 2, 1.75 / 4]
    late = growth_cost.analyze({**group, "freeze_encoder_at": 2})["schedules"]
    assert ("grow1x", "mirrored") not in late
    assert ("grow3x", "mirrored") in late


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_a_tiny_measurement_and_its_figures_again(growth_cost, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output = tmp_path / "new" / "growth"
    sizes = ["--widths", "6", "--freeze-encoder-at", "2", "--batch-size", "2", "--encoder-width", "0.1"]
    assert growth_cost.main([*sizes, "--updates-per-turn", "1", "--seconds", "0.1", "--output", str(output)]) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    learners = [learner for group in record["groups"] for learner in group["learners"]]
    assert len(learners) == 15
    assert all(learner["flops_planned"] > 0 for learner in learners)
    assert all(len(learner["seconds"]) >= growth_cost.LEAST_ROUNDS for learner in learners)
    assert min(seconds for learner in learners for seconds in learner["seconds"]) > 0
    written = [output.with_suffix(suffix).read_bytes() for suffix in (".json", ".md", ".svg")]
    printed = capsys.readouterr().out
    assert printed.rstrip() == written[1].decode().rstrip()
    assert growth_cost.main(["--figures-from", str(output.with_suffix(".json"))]) == 0
    assert [output.with_suffix(suffix).read_bytes() for suffix in (".json", ".md", ".svg")] == written


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_what_is_cut_short_keeps_the_groups_that_it_had(growth_cost, tmp_path, monkeypatch):
    rounds, times = iter([1, 2]), growth_cost.time_rounds

    def cut(*arguments):
        if next(rounds) == 2:
            raise KeyboardInterrupt
        return times(*arguments)

    monkeypatch.setattr(growth_cost, "time_rounds", cut)
    output = tmp_path / "growth"
    sizes = ["--widths", "6", "--freeze-encoder-at", "2", "3", "--batch-size", "2", "--encoder-width", "0.1"]
    with pytest.raises(KeyboardInterrupt):
        growth_cost.main([*sizes, "--updates-per-turn", "1", "--seconds", "0.1", "--output", str(output)])
    record = json.loads(output.with_suffix(".json").read_text())
    assert [group["freeze_encoder_at"] for group in record["groups"]] == [2]
    assert record["peak_memory_bytes"] > 0
    assert "cut short: 1 of 2 groups" in output.with_suffix(".md").read_text()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]


def test_bad_input_is_one_line(growth_cost, tmp_path, capsys):
    assert growth_cost.main(["--figures-from", str(tmp_path / "none.json")]) == 2
    assert growth_cost.main(["--batch-size", "0"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
