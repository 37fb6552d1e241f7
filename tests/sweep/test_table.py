"""What a person sees of a sweep."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from growtrain.sweep.cells import Cell, Status
from growtrain.sweep.table import LiveTable, PlainTable, last_words, open_table, render
from growtrain.telemetry.display import SafeStream


def cell(id: int, status: Status, **changes: object) -> Cell:
    values = {"game": "pong", "schedule": "grow3x", "seed": id, "fingerprint": "0123456789ab", "words": (),
              "run_dir": f"runs/{id}", "total_frames": 2_000_000, "id": id, "status": status, "attempts": 1}  # fmt: skip
    return Cell(**values | changes)  # type: ignore[arg-type]


CELLS = [
    cell(0, "done", frames=2_000_000),
    cell(1, "running", pid=12, host="node"),
    cell(2, "running", pid=13, host="gone"),
    cell(3, "failed", attempts=3, frames=100_000, last_error="exit code 1: a\n\x1b[31mno\tmemory"),
    cell(4, "pending", attempts=0),
]


@pytest.fixture
def sweep_dir(tmp_path: Path) -> Path:
    (tmp_path / "runs/1").mkdir(parents=True)
    record = {"frames": 500_000, "frames_per_second": 1000.0}
    (tmp_path / "runs/1/metrics.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


def test_the_status_table(sweep_dir: Path) -> None:
    lines = render(CELLS, sweep_dir, lambda cell: cell.host == "gone")
    assert [" ".join(line.split()) for line in lines[:-1]] == [
        "status game schedule seed config frames done frames/s eta attempts",
        "done pong grow3x 0 0123456789ab 2M/2M 100% - - 1",
        "running pong grow3x 1 0123456789ab 500k/2M 25% 1000 25m00s 1 process 12 on node",
        "lost pong grow3x 2 0123456789ab 0/2M 0% - - 1 process 13 on gone, gone or silent",
        "failed pong grow3x 3 0123456789ab 100k/2M 5% - - 3 exit code 1: [31mno memory",
        "pending pong grow3x 4 0123456789ab 0/2M 0% - - 0",
    ]
    # 1.5M + 2M + 2M frames are left at 1000 a second; those of the failed cell are not waited for.
    assert lines[-1] == ("5 cells: 1 done, 2 running, 1 pending, 1 failed  2.6M/10M frames  1000 frames/s  eta 1h31m")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("", ""),
        ("exit code 2: growtrain: no memory: lower it", "exit code 2: growtrain: no memory: lower it"),
        ("exit code 1: Traceback\n  File\nError: why", "exit code 1: Error: why"),
        ("killed by SIGKILL: a warning\nof something else", "killed by SIGKILL"),
        ("lost: its node died", "lost: its node died"),
    ],
)
def test_the_last_words_of_an_attempt(error: str, says: str) -> None:
    assert last_words(cell(0, "failed", last_error=error)) == says


def test_plain_lines_are_ascii_and_the_totals_are_said_once(sweep_dir: Path) -> None:
    stream = io.StringIO()
    table = open_table(sweep_dir, stream)
    assert isinstance(table, PlainTable)
    with table:
        table.started(CELLS[1])
        table.ended(CELLS[3])
        table.reclaimed(replace(CELLS[2], last_error="its driver is gone"))
        table.show(CELLS)
        table.show(CELLS)
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["start", "fail", "lost", "sweep"]
    assert stream.getvalue().isascii()


def test_the_live_table_shows_what_runs_first_and_fits(sweep_dir: Path) -> None:
    stream = io.StringIO()
    many = [cell(id, "done") for id in range(10, 60)]
    table = LiveTable(Console(file=stream, force_terminal=True, width=120, height=20), sweep_dir)
    with table:
        table.ended(CELLS[3])
        table.show([*many, *CELLS])
    text = stream.getvalue()
    assert text.index("25m00s") < text.index("pending", text.index("frames/s"))
    assert "and 41 more" in text
    assert "[31mno memory" in text
    assert "\x1b[31mno memory" not in text


def test_a_closed_stream_stops_nothing(sweep_dir: Path) -> None:
    stream = io.StringIO()
    stream.close()
    with PlainTable(SafeStream(stream), sweep_dir) as table:
        table.started(CELLS[1])
        table.show(CELLS)
