"""What a user is told of hardware that was never measured: `plan --hardware`, and `doctor` of the machine that it finds."""

import re

import pytest

from growtrain.__main__ import main
from growtrain.commands.doctor import limit_of
from growtrain.planning.hardware import HARDWARE

SMALL = ["--no-timing", "--width", "32", "--encoder-width", "0.25", "--batch-size", "4", "--num-envs", "2"]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["plan", *SMALL, *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_plan_adds_a_model_of_each_hardware_named_and_leaves_the_rest_as_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = said(capsys)
    lines = said(capsys, "--hardware", "a100,L4")
    assert lines[: len(plain)] == plain
    headings = [line for line in lines if line.startswith("modelled, not measured: ")]
    assert ["A100 SXM 40 GB" in headings[0], "NVIDIA L4" in headings[1], len(headings)] == [True, True, 2]
    hours = [float(x) for line in lines if (found := re.match(r"limit +([\d.]+) h", line)) for x in found.groups()]
    assert 0 < hours[0] <= hours[1]  # an L4 has the lower peaks and bandwidth, and the same latencies
    assert not [line for line in plain if "modelled" in line]


def test_the_reference_stack_takes_longer(capsys: pytest.CaptureFixture[str]) -> None:
    hours = []
    for stack in ("fast", "reference"):
        lines = said(capsys, "--hardware", "h100", "--stack", stack, "--schedule", "fixed")
        (limit,) = [line for line in lines if line.startswith("limit")]
        assert "growing" not in limit  # it never grows
        hours.append(float(limit.split()[1]))
    assert hours[1] > 2 * hours[0]


def test_an_unknown_name_is_one_line_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "--hardware", "tpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert all(name in line for name in ("--hardware tpu", *HARDWARE))


def test_doctor_knows_the_limit_of_a_gpu_in_the_table_only() -> None:
    works, text = limit_of("NVIDIA H200")
    assert works
    assert re.fullmatch(
        r"modelled, not measured: --schedule grow3x, 200M frames of phoenix takes at least [\d.]+ h of training, "
        r"with full width [\d.]+ h",
        text,
    )
    for gpu, words in ((None, "no CPU"), ("NVIDIA T4", "NVIDIA T4 is not known")):
        works, text = limit_of(gpu)
        assert not works
        assert words in text
        assert all(name in text for name in HARDWARE)


def test_doctor_names_the_processor_and_says_that_the_table_has_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("growtrain.commands.doctor.cpu_name", lambda: "An Abacus 9000")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok") and line.endswith("An Abacus 9000") for line in lines)
    assert any(line.startswith("missing  limit ") and "no CPU" in line for line in lines)
