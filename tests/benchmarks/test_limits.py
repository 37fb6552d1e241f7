"""The scripts about the modelled least time: their search and arithmetic by hand, and what they write, once and again."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from growtrain.planning.hardware import HARDWARE

BENCHMARKS, RESULTS = (Path(__file__).parents[2] / name for name in ("benchmarks", "results"))


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def limits_paper(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("limits_paper", monkeypatch)


@pytest.fixture
def limits_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("limits_check", monkeypatch)


class Saving:
    """A model that saves hours by a function of the small width."""

    def __init__(self, hours: Any) -> None:
        self.hours = hours

    def limit(self, hardware: Any, width: int) -> SimpleNamespace:
        return SimpleNamespace(saved_hours=self.hours(width))


def test_the_width_from_which_on_growing_saves_so_much(limits_paper: ModuleType) -> None:
    search, a100 = limits_paper.width_that_saves, HARDWARE["a100"]
    assert search(Saving(lambda width: width / 1000), a100, 20.0, 4) == 80_000  # the full width is four small ones
    assert search(Saving(lambda width: width / 1000 - 0.001), a100, 20.0, 4) == 80_128  # to 128 units
    assert search(Saving(lambda width: 21.0), a100, 20.0, 2) == limits_paper.WIDTHS[0]
    assert search(Saving(lambda width: -math.inf), a100, 20.0, 2) is None
    dips = Saving(lambda width: 30.0 if width < 2000 or width > 40_000 else 0.0)
    assert search(dips, a100, 20.0, 2) == 80_128  # from there on, not for once


def test_the_report_of_the_paper_and_its_figure_are_made_again_of_the_raw_numbers(
    limits_paper: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    record = json.loads((RESULTS / "limits_paper.json").read_text())
    copy = tmp_path / "limits_paper.json"
    copy.write_text((RESULTS / "limits_paper.json").read_text())
    assert limits_paper.main(["--figures-from", str(copy)]) == 0
    text = copy.with_suffix(".md").read_text()
    assert text == (RESULTS / "limits_paper.md").read_text()
    assert "modelled, not measured" in text.splitlines()[0]
    assert "svg" in copy.with_suffix(".svg").read_text()[:1000]
    assert limits_paper.main(["--hardware", "tpu"]) == 2
    for curve in record["curves"]:
        saved = dict(zip(record["widths"], curve["saved_hours"], strict=True))
        at = curve["width_at_20h"]
        assert all((hours >= 20) == (width >= at) for width, hours in saved.items())
    sources = {constant["source"] for constants in record["constants"].values() for constant in constants.values()}
    assert all(source in text for source in sources)


def test_a_model_of_this_cpu_is_set_against_real_updates(
    limits_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def constants(batch_size: int, clock: Any) -> dict[str, float]:  # of a CPU that gets slower meanwhile
        calls.append(batch_size)
        return {
            "product_flops": 1e11,
            "convolution_flops": 1e11 / len(calls),
            "memory_bandwidth": 1e10,
            "cache_bandwidth": 1e11,
            "cache_bytes": 1e7,
            "eager_kernel": 1e-6,
        }

    monkeypatch.setattr(limits_check, "measure_constants", constants)
    monkeypatch.setattr(limits_check, "FORMS", (("frozen", 1),))
    monkeypatch.setattr("growth_cost.WARM_UP_ROUNDS", 0)
    output = tmp_path / "check"
    words = ["--widths", "16", "--seconds", "0.01", "--updates-per-turn", "1", "--uncompiled", "--output", str(output)]
    assert limits_check.main(words) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    assert [row["name"] for row in record["networks"]] == ["small", "full3x", "frozen 1"]
    assert record["constants"]["used"]["convolution_flops"] == pytest.approx(1e11 / math.sqrt(2))
    assert record["drift"] == pytest.approx(0.5)
    assert record["quiet"] is False
    for row in record["networks"]:
        seconds = sorted(row["seconds"])[len(row["seconds"]) // 2]
        assert row["error"] == pytest.approx(row["modelled_seconds"] / seconds - 1, abs=0.3)
        assert row["modelled_seconds"] >= row["flops"] / 1e11
    text = output.with_suffix(".md").read_text()
    assert "**the machine was not quiet**" in text
    assert len(re.findall(r"^\| 16 \| ", text, re.M)) == 3
    assert limits_check.main(["--again", str(output.with_suffix(".json"))]) == 0
    assert output.with_suffix(".md").read_text() == text
    capsys.readouterr()


def test_constants_are_of_this_machine(limits_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_check.typical, "__defaults__", (0.01,))
    constants = limits_check.measure_constants(4)
    hardware = limits_check.as_hardware(constants)
    assert hardware.memory_bandwidth.value == constants["memory_bandwidth"]
    assert all(value > 0 for value in constants.values())
    assert 2**18 <= constants["cache_bytes"] <= 2**31
    # Three calls of 5, 9 and 2 s, of which the first is not counted; the clock is read before and after each, and for the end.
    clock = iter([0.0, 10, 15, 15, 20, 29, 29, 30, 32, 32])
    assert limits_check.typical(lambda operand: operand, [torch.zeros(1)], lambda: next(clock), seconds=1.0) == 5.5
