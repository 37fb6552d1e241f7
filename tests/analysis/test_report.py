"""The report as its reader meets it: self-contained, escaped, the same numbers in both forms, and commands that work."""

import dataclasses
import html
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from growtrain.__main__ import main
from growtrain.analysis import plots
from growtrain.analysis.commands import command_of, shell_line
from growtrain.analysis.pages import Figure, Heading, Items, Listing, Paragraph, Table, to_html, to_markdown, visible
from growtrain.analysis.report import compose
from growtrain.commands.commandline import Parser, add_config_flags, explicit_settings
from growtrain.settings.config import Config
from growtrain.settings.presets import resolve

from .conftest import WriteRun, write_arms

VOID = {"meta", "br", "img", "link", "hr", "input"}
HOSTILE = "<script>alert('x')</script> & \"q\" | `a` *b*\n[c](javascript:d) \u202etxt é日"


class Page(HTMLParser):
    """Checks that every tag is closed in order; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def rising(level: float) -> Callable[[int], float]:
    return lambda frames: -20.7 + level * frames / 1000


def write_sweep(write_run: WriteRun) -> None:
    """Two games, three arms, three seeds; one run failed, one interrupted, one cell missing."""
    for game in ("pong", "breakout"):
        for schedule, level in (("full3x", 0.8), ("grow1x", 0.81), ("fixed", 0.5)):
            for seed in range(3):
                if (game, schedule) == ("breakout", "fixed"):
                    continue
                name = f"{game}-{schedule}-{seed}"
                score = rising(level + 0.01 * seed)
                if name == "pong-fixed-2":
                    write_run(name, game, schedule, seed, score, status="failed", until=12_000)
                elif name == "pong-fixed-1":
                    write_run(name, game, schedule, seed, score, status=None, until=20_000)
                else:
                    write_run(name, game, schedule, seed, score)


def report(tmp_path: Path) -> tuple[str, str]:
    """Runs the command; returns the HTML and the Markdown."""
    out = tmp_path / "out"
    assert main(["report", str(tmp_path / "runs"), "--output", str(out)]) == 0
    return (out / "report.html").read_text(encoding="utf-8"), (out / "report.md").read_text(encoding="utf-8")


def test_the_verdict_comes_first_and_failures_are_shown(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(write_run)
    text, _ = report(tmp_path)
    verdict, path = capsys.readouterr().out.splitlines()
    assert path.endswith("report.html")
    assert verdict.startswith("grow1x reaches full3x's training score within the interval at equal frames (40k frames)")
    plain = html.unescape(re.sub("<[^>]+>", "", text))
    assert text.index('class="strong"') < text.index("<h2")
    for said in (
        "Cannot tell whether fixed keeps up with full3x: 1 run of fixed on pong, and an interval needs 3",
        "15 runs: 13 done",
        "No run of fixed on breakout.",
        "fixed on breakout: not run",
        "pong-fixed-2: failed (OSError: no space) at 12,000 of 40,000 frames",
        "pong-fixed-1: interrupted at 20,000 of 40,000 frames",
        "no aggregate: no score on breakout",
        "n=1, 2 missing",
        "unavailable: the run computes on cpu, which NVML does not watch (13 runs)",
    ):
        assert said in plain, said


def test_the_page_is_self_contained_and_both_forms_say_the_same(write_run: WriteRun, tmp_path: Path) -> None:
    write_sweep(write_run)
    text, markdown = report(tmp_path)
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "img", "object", "embed", "base"})
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "srcset", "action")
        assert name not in ("href", "xlink:href") or value.startswith("#")
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"' <]+", text)) == {
        "http://www.w3.org/2000/svg",  # names, not addresses
        "http://www.w3.org/1999/xlink",
    }
    unescaped = re.sub(r"\\([\\`*_{}\[\]<>|~#&$])", r"\1", markdown)
    for cell in page.cells:
        assert cell in unescaped, cell
    numbers = re.compile(r"-?\d[\d,]*\.?\d*")
    without_figures = re.sub(r"<svg.*?</svg>|<style>.*?</style>|<[^>]+>", " ", text, flags=re.DOTALL)
    only = re.sub(r"!\[.*?\]\(figures/.*?\)", "", unescaped)
    assert set(numbers.findall(html.unescape(without_figures))) == set(numbers.findall(only))
    drawn = re.findall(r"\]\((figures/[^)]+)\)", markdown)
    assert len(drawn) == text.count("<svg") == 6
    for name in drawn:
        ElementTree.parse(tmp_path / "out" / name)


def test_the_same_runs_give_the_same_report(write_run: WriteRun, tmp_path: Path) -> None:
    write_sweep(write_run)
    first = [re.sub(r"Read [\d: -]+", "", text) for text in report(tmp_path)]
    second = [re.sub(r"Read [\d: -]+", "", text) for text in report(tmp_path)]
    assert first == second


def test_hostile_names_are_text(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_run(f"{HOSTILE.replace('/', '')}{seed}", HOSTILE, f"../{HOSTILE}", seed, rising(1.0))
        write_run(f"pong{seed}", "pong", "full3x", seed, rising(1.0))
    (tmp_path / "runs" / "bad\udcff").mkdir()
    (tmp_path / "runs" / "bad\udcff" / "metrics.jsonl").write_text("")
    text, markdown = report(tmp_path)
    page = Page(text)
    assert "script" not in page.tags
    assert "\u202e" not in text + markdown
    assert "日" in text
    assert any("<script>alert('x')</script>" in cell and "\\n[c]" in cell for cell in page.cells)
    assert not re.search(r"(?<!\\)<script", markdown.split("```")[0])
    assert not any(line.startswith("[c]") for line in markdown.splitlines())
    for line in markdown.splitlines():
        if line.startswith("| "):
            assert line.endswith(" |")
    names = [path.name for path in (tmp_path / "out").rglob("*")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names)
    for path in (tmp_path / "out" / "figures").iterdir():
        ElementTree.parse(path)


def test_markdown_tables_keep_their_columns_whatever_is_in_them() -> None:
    table = to_markdown("t", [Table(["a", "b"], [["x|y", "1\n2"], ["\\|", "`"]])], "figures").splitlines()[2:]
    assert [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table] == [3, 3, 3, 3]


def test_blocks_in_both_forms() -> None:
    blocks: list[Any] = [
        Heading("A & b"),
        Paragraph("p", strong=True),
        Items(["i"]),
        Table(["name", "number"], [["x", "1.5 [1, 2]"], ["y", "-"]]),
        Figure("f", "<svg></svg>\n", "caption"),
        Listing(["echo ```"]),
    ]
    page = to_html("T", blocks)
    Page(page)
    assert '<h2 id="a-b">A &amp; b</h2>' in page
    assert '<th class="number">number</th>' in page
    markdown = to_markdown("T", blocks, "figures")
    assert "| --- | ---: |" in markdown
    assert "````bash\necho ```\n````" in markdown
    assert "![caption](figures/f.svg)" in markdown


def test_rows_that_begin_alike_are_grouped_and_flags_keep_to_a_line() -> None:
    table = Table(["arm", "n"], [["a, --freeze heads", "1"], ["a, --freeze heads", "2"], ["b", "3"]], grouped=True)
    page = to_html("t", [table])
    Page(page)
    first = '<td rowspan="2">a, <span class="flag">--freeze heads</span></td>'
    assert f'<tr>{first}<td class="number">1</td></tr>\n<tr><td class="number">2</td></tr>\n<tr><td>b</td>' in page
    assert to_markdown("t", [table], "figures").count("--freeze heads") == 2
    assert "rowspan" not in to_html("t", [Table(table.header, table.rows)])


@pytest.mark.parametrize(
    "text", ["plain", "a b", "it's", "a\nb", "tab\there", "\u202e", "\\'", "é日", "", "bad\udcff", "$x `y`"]
)
def test_a_shell_reads_back_what_is_written(text: str) -> None:
    line = shell_line(["printf", "%s", text])
    assert line.isprintable()
    out = subprocess.run(["bash", "-c", line], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}).stdout
    assert out == text.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    "explicit",
    [
        {"game": "pong", "total_frames": 100_000},
        {"game": "phoenix", "schedule": "at:0.1,0.5", "seed": -3, "preset": "modern", "total_frames": 100_000_000},
        {"game": "up_n_down", "num_envs": 64, "total_frames": 40_000, "life_loss_terminal": False, "lr": 1e-5},
        {"seed": 2**70, "learning_starts": 4321, "anchor": "mirrored", "device": "cpu"},
        {"game": "pong", "schedule": "grow3x", "freeze": "heads"},
        {"game": "pong", "schedule": "grow3x"},
        {"game": "minatar/asterix", "schedule": "grow3x", "preset": "modern"},
        {"game": "minatar/asterix", "schedule": "grow3x"},
        {"game": "mujoco/Hopper-v5", "schedule": "grow3x", "freeze": "network", "grow": "actor"},
        {"game": "pong", "normalization": "layer", "weight_projection": "nap"},
        {"game": "pong", "epsilon_start": 0.005, "epsilon_end": 0.001},
    ],
)
def test_the_command_gives_the_settings_again(explicit: dict[str, Any]) -> None:
    config, _ = resolve(explicit.get("preset"), explicit)
    words = command_of(config.to_dict())
    assert words[:3] == ["python", "-m", "growtrain"]
    parser = Parser()
    add_config_flags(parser)
    given = explicit_settings(parser.parse_strict(words[3:]))
    assert resolve(given.get("preset"), given)[0] == config
    assert set(given) <= set(explicit) | {"game", "schedule", "seed", "total_frames"}


def test_a_run_that_did_not_know_another_form_of_injection_froze_heads() -> None:
    settings = resolve("paper", {"game": "pong", "schedule": "grow3x"})[0].to_dict()
    del settings["freeze"]
    assert command_of(settings)[-2:] == ["--freeze", "heads"]


def test_settings_of_another_version_are_all_written() -> None:
    words = command_of({"game": "pong", "preset": "future", "lr": "fast", "unknown": 1})
    assert words == [
        "python",
        "-m",
        "growtrain",
        "--preset",
        "future",
        "--game",
        "pong",
        "--lr",
        "fast",
        "--freeze",
        "heads",
    ]
    damaged = command_of(Config().to_dict() | {"width": -1})
    assert "--width=-1" in damaged
    assert len([word for word in damaged if word.startswith("--")]) == sum(
        f.metadata["by_flag"] for f in dataclasses.fields(Config)
    )


@pytest.mark.parametrize("missing", ["preset", "seed", "total_frames", "game"])
def test_a_setting_that_a_run_does_not_name_is_not_in_its_command(missing: str) -> None:
    settings = resolve("paper", {"game": "pong", "schedule": "grow3x"})[0].to_dict()
    del settings[missing]
    words = command_of(settings)
    assert f"--{missing.replace('_', '-')}" not in words
    assert "--freeze" in words


def test_a_game_in_another_spelling_is_given_as_it_is_written() -> None:
    settings = resolve("paper", {"game": "pong", "schedule": "fixed", "width": 64})[0].to_dict()
    words = command_of(settings | {"game": "PongNoFrameskip-v4"})
    assert words[3:] == [
        "--game",
        "PongNoFrameskip-v4",
        "--schedule",
        "fixed",
        "--total-frames",
        "200M",
        "--seed",
        "0",
        "--width",
        "64",
    ]


def test_running_and_empty_runs_make_a_report(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("begun", schedule="grow1x", status=None, until=0)
    _, markdown = report(tmp_path)
    assert "No run has a score yet" in markdown
    write_run("one", schedule="grow1x", seed=1)
    _, markdown = report(tmp_path)
    assert "Only grow1x was run" in markdown
    (tmp_path / "runs" / "odd").mkdir()
    (tmp_path / "runs" / "odd" / "summary.json").write_text('{"status": "failed", "seed": 1e400, "stages": [3]}')
    _, markdown = report(tmp_path)
    assert "its settings are unknown" in markdown
    write_run("unknown game", game="tetris", seed=1)
    _, markdown = report(tmp_path)
    assert "for want of reference scores: tetris" in markdown


def test_gpu_measurements_are_averaged_and_refusals_explained(write_run: WriteRun, tmp_path: Path) -> None:
    for seed, energy in enumerate((3.6e6, 7.2e6, "unavailable: MIG")):
        path = write_run(f"r{seed}", seed=seed) / "summary.json"
        gpu = {"available": True, "utilization_mean": 40.0 + seed, "energy_joules": energy}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"gpu": gpu}))
    _, markdown = report(tmp_path)
    assert "41 %" in markdown
    assert "1.5 kWh (of 2)" in markdown
    assert re.sub(r"\\", "", markdown).count("unavailable: energy_joules, MIG (1 run)") == 1
    gpu = {"available": True, "utilization_mean": 99.0, "energy_joules": 1.0, "lost": "after 10.0 s: GPU is lost"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gpu": gpu}))
    _, markdown = report(tmp_path)
    assert "40 % (of 2)" in markdown
    assert "1.5 kWh (of 2)" in markdown
    assert "unavailable: energy_joules, the monitor was lost after 10.0 s: GPU is lost (1 run)" in re.sub(
        r"\\", "", markdown
    )


def test_diagnostics_are_drawn_where_there_are_any(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run("r")
    records = [{"frames": f, "srank": {"hidden": f / 10, "x/head.frozen.y": 1}, "seconds": 1} for f in (10, 20, 30)]
    (run_dir / "diagnostics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text, _ = report(tmp_path)
    assert "srank/hidden" in text
    assert "head.frozen" not in text


def test_wrong_input_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (([str(tmp_path)], "holds no run"), ([str(tmp_path / "x")], "no directory"), ([], "RUN")):
        assert main(["report", *words, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert says in error
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run("r")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'growtrain[report]'" in error
    assert not (tmp_path / "out").exists()


def test_old_figures_go_and_other_files_stay(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("r")
    (tmp_path / "out" / "figures").mkdir(parents=True)
    (tmp_path / "out" / "figures" / "game-09-old.svg").write_text("")
    (tmp_path / "out" / "mine.txt").write_text("")
    report(tmp_path)
    assert (tmp_path / "out" / "mine.txt").exists()
    assert not (tmp_path / "out" / "figures" / "game-09-old.svg").exists()


def test_every_arm_looks_different_without_colour() -> None:
    looks = plots.styles([str(i) for i in range(7)])
    assert len({style.color for style in looks.values()}) == 7
    assert len({(str(style.dash), style.marker) for style in looks.values()}) == 7


def test_a_panel_of_extreme_data_is_still_drawn() -> None:
    style = plots.styles(["a"])["a"]
    for y in ([0.0, 0.0], [1e12, 1e12], [np.nan, 1.0], [-1e-9, 1e-9]):
        line = plots.Line(np.array([0.0, 1.0]), np.array(y), style)
        svg = plots.curves([plots.Panel("t", "x", "y", [line], levels=[(5.0, "far")])], {"a": style}, 1)
        ElementTree.fromstring(svg)
        assert "nan" not in svg
    assert "…" in plots.curves([plots.Panel("t" * 99, "x", "y")], {}, 1)


def test_visible_text() -> None:
    assert visible("a\x00\n\u202e\udcff é日") == "a\\x00\\n\\u202e\\udcff é日"


def test_compose_needs_no_files(write_run: WriteRun, tmp_path: Path) -> None:
    from growtrain.analysis.runs import find_runs
    from growtrain.analysis.study import make_study

    write_run("r")
    title, blocks = compose(make_study(find_runs([tmp_path / "runs"])), ["x"], ["a note"])
    assert title == "fixed on pong"
    assert any(isinstance(block, Items) and "a note" in block.texts for block in blocks)


def test_verdicts_beyond_an_arms_own_reference_are_folded(write_run: WriteRun, tmp_path: Path) -> None:
    from growtrain.analysis.runs import find_runs
    from growtrain.analysis.study import make_study

    write_arms(write_run, {"full3x": 1.0, "grow1x": 1.0, "fixed": 0.9, "reset": 0.8})
    title, blocks = compose(make_study(find_runs([tmp_path / "runs"])), ["x"], [])
    assert title == "4 arms on pong"
    assert isinstance(blocks[0], Paragraph)
    assert blocks[0].text.startswith("grow1x reaches full3x's")
    open_ones, folded = (block for block in blocks if isinstance(block, Items) and "IQM" in block.texts[0])
    assert [text.split(" ")[0] for text in open_ones.texts] == ["fixed", "reset"]
    assert open_ones.summary == ""
    assert (len(folded.texts), folded.summary) == (1, "1 more pair of arms")
    assert " than fixed " in folded.texts[0]
    assert "<details><summary>1 more pair of arms</summary>" in to_html(title, blocks)
    assert "1 more pair of arms:\n\n- grow1x" in to_markdown(title, blocks, "figures")
