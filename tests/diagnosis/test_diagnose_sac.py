"""Critic and actor are diagnosed and mended apart, whatever has been done to the other."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_sac

pytest.importorskip("mujoco")

from growtrain.__main__ import main
from growtrain.diagnosis.copies import compare_copies_of
from growtrain.diagnosis.forks import return_scale
from growtrain.diagnosis.page import Diagnosis, Settings, next_command
from growtrain.growth.kinds import Kind
from growtrain.growth.transaction import intervene
from growtrain.learners.saved import read_saved
from growtrain.plasticity.learning_test import LearningTest
from growtrain.plasticity.verdicts import Evidence, verdict
from growtrain.runs.checkpoint import open_newest
from growtrain.runs.loop import train
from growtrain.runs.resuming import resumption

CPU = torch.device("cpu")


def test_an_actor_that_was_frozen_whole_hinders_no_diagnosis_of_the_critics_nor_their_injection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, output = tmp_path / "run", tmp_path / "out"
    for _ in train(tiny_sac(schedule="at:150", freeze="network", grow="actor", total_frames=320), run):
        pass
    words = ["--seeds", "1", "--frames", "80", "--learning-seeds", "2", "--learning-updates", "10"]
    assert main(["diagnose", str(run), *words, "--output", str(output)]) == 0
    for part, (snapshots, injections) in {"critic": (1, 1), "actor": (2, 0)}.items():
        assert "plasticity was" in (output / f"diagnosis-{part}.md").read_text().lower()
        outcomes = json.loads((output / f"diagnosis-{part}.json").read_text())["verdict"]
        assert {finding["place"] for finding in outcomes["findings"]} >= {"head", "optimizer"}
        fork = open_newest(output / f"inject-{part}-s0")
        networks = fork.state["learner"]["networks"]
        assert len(networks["actor"]["snapshot"]) == snapshots
        assert [len(networks[name]["head"]["injections"]) for name in ("critic_1", "critic_2")] == [injections] * 2
        of_both = read_saved(fork.state["learner"])
        of_critics = read_saved(fork.state["learner"], dataclasses.replace(fork.config, grow="critic", freeze="heads"))
        assert (of_both.snapshots, of_critics.snapshots) == (snapshots, 0)
        assert len(of_critics.injections) == injections
    # A plan of other networks does not count what was done to these.
    assert fork.config.grow == "actor"
    other = dataclasses.replace(fork.config, grow="both", freeze="heads", intervention="reset-head")
    ways = [dataclasses.replace(other, grow=grow) for grow in ("both", "critic")]
    start = dataclasses.replace(fork, config=ways[0])
    assert ["past_differs" in resumption(start, way, CPU, forked=True, interventions=1) for way in ways] == [
        False,
        True,
    ]
    # Nor does one that prices what was done otherwise.
    for changes, differs in (({"batch_size": 2 * other.batch_size}, True), ({"lr": 1e-3}, False)):
        way = dataclasses.replace(start.config, **changes)
        assert ("past_differs" in resumption(start, way, CPU, forked=True, interventions=0)) == differs
    # The learning test is of the injection that the fork has had.
    added = list[str]()

    def noted(kind: Kind, *rest: Any) -> None:
        added.append(kind.adds)
        intervene(kind, *rest)

    monkeypatch.setattr("growtrain.plasticity.learning_test.intervene", noted)
    test = LearningTest(seeds=1, updates=2, warm_up=1, transitions=16)
    for part in ("critic", "actor"):
        compare_copies_of(open_newest(run), test, CPU, part=part)
    assert [what for what in added if what in ("heads", "snapshot")] == ["heads", "snapshot"]
    # What a page says of a critic that has lost its plasticity can be done as it stands.
    errors = {"current": [0.9] * 3, "inject": [0.4] * 3, "reset-head": [0.9] * 3}
    lost = Diagnosis(
        run=str(run), game="mujoco/Hopper-v5", frames=320, total_frames=320, settings=Settings(frames=160, arms=()),
        errors={}, curves={}, returns={}, evaluations={}, return_scale=1.0, part="critic",
        verdict=verdict(Evidence(errors=errors, returns={})),
    )  # fmt: skip
    words = shlex.split(next_command(lost))[1:]
    assert words[words.index("--intervention") + 1] == "inject"
    assert main([*words, "--run-dir", str(tmp_path / "rescue")]) == 0
    networks = open_newest(tmp_path / "rescue").state["learner"]["networks"]
    assert [len(networks[name]["head"]["injections"]) for name in ("critic_1", "critic_2", "actor")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("game", "untouched", "scale"),
    [
        ("mujoco/Reacher-v5", [-5.0, None, -7.0], 6.0),  # costs, and no scores are known
        ("mujoco/Swimmer-v5", [30.0, 50.0], 40.0),
        ("mujoco/Swimmer-v5", [None], 0.01),
        ("mujoco/HalfCheetah-v5", [-583.4], 300.0),  # worse than random play, -283.4
        ("mujoco/HalfCheetah-v5", [-283.4], 98.184),
        ("dmc/cheetah-run", [0.0], 10.0),
    ],
)
def test_a_gain_of_1_is_of_the_size_of_what_is_earned_or_paid(
    game: str, untouched: list[float | None], scale: float
) -> None:
    assert return_scale(game, untouched) == pytest.approx(scale)
