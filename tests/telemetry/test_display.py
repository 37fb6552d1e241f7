"""The display: what it says, on what, and that no stream can stop a run."""

import dataclasses
import io
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from growtrain.records import Evaluation, GrowthEvent, Metrics
from growtrain.telemetry.display import LiveDisplay, PlainDisplay, Progress, SafeStream, eta_seconds, open_display

M = 1_000_000


def metrics(frames: int, stage: int = 0, **changes: Any) -> Metrics:
    values: dict[str, Any] = {
        "frames": frames,
        "agent_steps": frames // 4,
        "updates": frames // 16,
        "stage": stage,
        "wall_seconds": frames / 5000,
        "frames_per_second": 5000.4,
        "updates_per_second": 312.5,
        "episode_return": 1234.56,
        "episodes": 12,
        "loss": 0.012345,
        "q_mean": 1.0,
        "epsilon": 0.125,
        "lr": 2.5e-4,
        "seconds": {},
    }
    return Metrics(**(values | changes))


EVALUATION = Evaluation(
    frames=25 * M,
    stage=0,
    episode_return=4321.0,
    episode_return_std=10.0,
    human_normalized_score=0.5512,
    episodes=31,
    eval_frames=500_000,
    wall_seconds=44.0,
)
EVENT = GrowthEvent(
    frames=25 * M,
    stage=1,
    anchor="frozen",
    parameters_total=4_900_000,
    parameters_trainable_before=1_687_206,
    parameters_trainable=1_687_206,
    max_abs_q_change_online=0.0,
    max_abs_q_change_target=2.4e-7,
    pause_seconds=0.123,
)


def plain(stream: Any, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "game": "phoenix",
        "schedule": "grow3x",
        "device": "cpu",
        "stage_frames": [25 * M, 25 * M, 50 * M, 100 * M],
        "stage_costs": [1.0, 1.0, 1.0, 1.0],
    }
    return open_display(**(values | changes), stream=stream)


# Time left


@pytest.mark.parametrize(
    ("frames", "edges", "costs", "stage", "speed", "expected"),
    [
        (0, [], [1.0], 0, 0.5, 50),  # one stage: 100 frames at 0.5 s
        (40, [], [3.0], 0, 0.5, 30),  # the unit of the costs does not matter
        (0, [25, 50], [1.0, 2.0, 4.0], 0, 1.0, 25 + 50 + 200),
        (10, [25, 50], [1.0, 2.0, 4.0], 0, 1.0, 15 + 50 + 200),
        (25, [25, 50], [1.0, 2.0, 4.0], 0, 1.0, 50 + 200),  # at an edge, measured before it
        (30, [25, 50], [1.0, 2.0, 4.0], 1, 1.0, 20 + 100),  # measured in stage 1: stage 2 takes twice as long
        (80, [25, 50], [1.0, 2.0, 4.0], 2, 1.0, 20),
        (100, [25, 50], [1.0, 2.0, 4.0], 2, 1.0, 0),
        (104, [25, 50], [1.0, 2.0, 4.0], 2, 1.0, 0),  # the last vector step may go past the budget
    ],
)
def test_eta_golden(
    frames: int, edges: list[int], costs: list[float], stage: int, speed: float, expected: float
) -> None:
    assert eta_seconds(frames, 100, edges, costs, stage, speed) == pytest.approx(expected)


def test_eta_needs_one_cost_for_each_stage() -> None:
    with pytest.raises(ValueError, match="argument"):
        eta_seconds(0, 100, [50], [1.0], 0, 1.0)


def test_progress_scales_the_measured_speed_by_stage() -> None:
    progress = Progress([100, 100], [1.0, 3.0])
    assert progress.seconds_to(200) is None
    progress.update(metrics(20, frames_per_second=10.0, wall_seconds=2.0))
    assert progress.seconds_to(200) == pytest.approx(8 + 30)
    assert progress.seconds_to(100) == pytest.approx(8)
    assert progress.next_injection == 100
    progress.update(metrics(40, frames_per_second=1000.0, wall_seconds=12.0))  # wall-clock: 2 frames/s
    assert progress.seconds_to(200) == pytest.approx(30 + 150)
    progress.update(metrics(100, wall_seconds=42.0))  # due, and not there yet, as of an adaptive schedule
    assert progress.next_injection is None
    progress.update(metrics(120, 1, frames_per_second=1000.0, wall_seconds=60.0))  # mixed interval: not measured
    assert progress.seconds_to(200) == pytest.approx(80 * 3 / 2)
    assert progress.next_injection is None
    progress.update(metrics(140, 1, wall_seconds=80.0))  # 1 s per frame in stage 1
    assert progress.seconds_to(200) == pytest.approx(60)


def test_frames_before_learning_measure_nothing() -> None:
    progress = Progress([100], [1.0])
    progress.update(metrics(10, updates_per_second=0.0, frames_per_second=1000.0, wall_seconds=0.01))
    assert progress.seconds_to(100) is None
    progress.update(metrics(20, frames_per_second=10.0, wall_seconds=1.0))
    assert progress.seconds_to(100) == pytest.approx(8)


@pytest.mark.parametrize(("frames", "costs"), [([], []), ([1, 2], [1.0]), ([0], [1.0]), ([1], [0.0])])
def test_impossible_stages(frames: list[int], costs: list[float]) -> None:
    with pytest.raises(ValueError, match="cost"):
        Progress(frames, costs)


# Plain lines


def test_plain_lines() -> None:
    stream = io.StringIO()
    with plain(stream, run_name="runs/a") as display:
        display.note("replay shrinks\nto 500k")
        display.show(metrics(100_000, episode_return=None, episodes=0, loss=None, updates_per_second=0.0))
        display.show(metrics(24_900_000))
        display.show(EVALUATION)
        display.show(EVENT)
        display.show(metrics(125 * M, 3))
    run, note, warm_up, train, evaluation, growth, last = stream.getvalue().splitlines()
    assert run == "run    phoenix  grow3x  cpu  runs/a  200M frames, injections at 25M, 50M, 100M"
    assert note == "note   replay shrinks to 500k"
    head, tail = (
        "train    100k/200M   0.1%  stage 0/3  score        -",
        "frames/s     0 updates/s  eta      -  next in -",
    )
    assert warm_up == f"{head}  loss       -  eps 0.125   5000 {tail}"
    head, tail = (
        "train   24.9M/200M  12.4%  stage 0/3  score   1234.6",
        "frames/s   312 updates/s  eta  9h43m  next in 20s",
    )
    assert train == f"{head}  loss  0.0123  eps 0.125   5000 {tail}"
    assert evaluation == (
        "eval      25M/200M  12.5%  stage 0/3  score   4321.0  human-normalized 0.551  31 episodes in 44s"
    )
    assert growth == (
        "grow      25M/200M  12.5%  stage 1/3  inject  max |dQ| online 0 target 2.4e-07"
        "  trainable 1.687M unchanged of 4.9M  pause 0.12s"
    )
    head, tail = "train    125M/200M  62.5%  stage 3/3  score   1234.6", "frames/s   312 updates/s  eta  4h09m"
    assert last == f"{head}  loss  0.0123  eps 0.125   5000 {tail}"


def test_an_evaluation_says_how_many_episodes_ended() -> None:
    stream = io.StringIO()
    with plain(stream, stage_frames=[100], stage_costs=[1.0]) as display:
        display.evaluation(dataclasses.replace(EVALUATION, episodes=8))
        display.evaluation(dataclasses.replace(EVALUATION, episodes=8, episode_return=None))
    assert "8 episodes in" in stream.getvalue()
    assert "none of 8 episodes ended in" in stream.getvalue()


def test_a_mean_of_few_episodes_says_of_how_many() -> None:
    stream = io.StringIO()
    with plain(stream, stage_frames=[100], stage_costs=[1.0]) as display:
        display.record(metrics(10, episodes=2))
        display.record(metrics(20, episodes=30))
        display.evaluation(dataclasses.replace(EVALUATION, episodes=1))
    first, second, evaluation = stream.getvalue().splitlines()[1:]
    assert "score   1234.6 (n=2)  loss" in first
    assert "score   1234.6  loss" in second
    assert "  1 episode in 44s" in evaluation


def test_unknown_values_are_dashes() -> None:
    stream = io.StringIO()
    display = plain(stream, stage_frames=[100], stage_costs=[1.0])
    with display:
        display.evaluation(
            Evaluation(
                frames=40,
                stage=0,
                episode_return=None,
                episode_return_std=None,
                human_normalized_score=None,
                episodes=0,
                eval_frames=4,
                wall_seconds=90061.0,
            )
        )
    assert stream.getvalue().splitlines() == [
        "run    phoenix  grow3x  cpu  100 frames, no injections",
        "eval       40/100  40.0%  stage 0/0  score        -  human-normalized -  0 episodes in 1d01h",
    ]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_plain_output_is_ascii_in_every_encoding(encoding: str) -> None:
    raw = io.BytesIO()
    with plain(io.TextIOWrapper(raw, encoding=encoding), run_name="Phönix \x1b[31m\n\udcff ✓") as display:
        display.note("größer")
    run, note = raw.getvalue().decode("ascii").splitlines()
    assert run.startswith(r"run    phoenix  grow3x  cpu  Ph\xf6nix  [31m   \u2713  200M")
    assert note == r"note   gr\xf6\xdfer"


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class AsciiTty(Tty):
    encoding = "ANSI_X3.4-1968"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.usefixtures("terminal")
def test_what_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(plain(Tty()), LiveDisplay)
    assert isinstance(plain(io.StringIO()), PlainDisplay)
    assert isinstance(plain(AsciiTty()), PlainDisplay)
    with monkeypatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        assert isinstance(plain(Tty()), PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(plain(Tty()), PlainDisplay)


# Streams that fail


def show_everything(display: Any) -> None:
    with display:
        display.note("a")
        display.show(metrics(100_000))
        display.show(EVALUATION)
        display.show(EVENT)


class BrokenPipe(Tty):
    """Breaks at the n-th write."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.writes = 0
        self.after = after

    def write(self, text: str) -> int:
        self.writes += 1
        if self.writes > self.after:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_broken_stream_is_not_written_again(term: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    stream = BrokenPipe(after)
    show_everything(plain(stream))
    assert stream.writes == after + 1


def test_closed_stream() -> None:
    stream = io.StringIO()
    display = plain(stream)
    stream.close()
    show_everything(display)
    show_everything(plain(stream))


def test_no_stream_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    show_everything(plain(None))


def test_a_full_nonblocking_pipe_loses_a_line_only() -> None:
    class Full(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            return super().write(text)

    stream = Full()
    safe = SafeStream(stream)
    safe.write("a")
    stream.full = False
    safe.write("b")
    assert stream.getvalue() == "b"


def test_reader_gone_in_a_real_process() -> None:
    """`... | head`: nothing on stderr, exit code 0, also at Python's last flush."""
    program = """if True:
        from growtrain.telemetry.display import open_display
        with open_display(game="a", schedule="b", device="c", stage_frames=[1], stage_costs=[1.0]) as display:
            input()
            display.note("x")
            display.note("y")
    """
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "run    a  b  c  1 frames, no injections\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait(10) == 0


# Live


@pytest.fixture
def console(terminal: None) -> Console:
    return Console(file=Tty(), force_terminal=True, width=100, height=40, record=True, color_system=None)


def live(console: Console, *title: str) -> LiveDisplay:
    return LiveDisplay(console, title, Progress([25 * M, 25 * M, 50 * M, 100 * M], [1.0] * 4))


def last_panel(text: str) -> list[str]:
    return [line.strip("│ ") for line in text[text.rindex("╭") :].splitlines()]


@pytest.fixture
def panel(console: Console, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("growtrain.telemetry.display.perf_counter", lambda: 0.0)
    with live(console, "phoenix", "grow3x", "cpu") as display:
        display.show(EVALUATION)
        display.show(metrics(30 * M, 1))
    return last_panel(console.export_text())


def test_panel_contains_the_numbers(panel: list[str]) -> None:
    title, counts, bar, _, *facts, bottom = panel
    assert title.startswith("╭─ growtrain · phoenix · grow3x · cpu ─")
    assert counts == "30M / 200M frames  15.0 %"
    assert (len(bar), [i for i, cell in enumerate(bar) if cell == "╋"]) == (96, [12, 24, 48])
    assert [" ".join(fact.split()) for fact in facts] == [
        "stage 1 of 3, next at 50M in 1h06m time left 9h26m",
        "score 1234.6 (12 episodes) elapsed 1h40m",
        "evaluation 4321.0 at 25M human-normalized 0.551",
        "frames/s 5000 updates/s 312",
        "loss 0.0123 epsilon 0.125",
    ]
    assert bottom.startswith("╰──")


def test_time_left_runs_on_between_records(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("growtrain.telemetry.display.perf_counter", lambda: now)
    with live(console) as display:
        display.record(metrics(30 * M, 1, frames_per_second=170 * M / 100))
        now = 30.0
    panel = " ".join(last_panel(console.export_text()))
    assert "time left" in panel
    assert " 1m10s " in panel


def test_no_score_yet_is_a_dash(console: Console) -> None:
    with live(console) as display:
        assert "no record yet" in "".join(last_panel(console.export_text(clear=False)))
        display.record(metrics(4, episode_return=None, episodes=0, loss=None, updates_per_second=0.0))
    facts = [line.split() for line in last_panel(console.export_text())]
    assert ["score", "-", "elapsed", "0s"] in facts
    assert ["loss", "-", "epsilon", "0.125"] in facts


def test_messages_stay_above_the_panel(console: Console) -> None:
    with live(console) as display:
        display.note("replay shrinks")
        display.growth(EVENT)
    text = " ".join(console.export_text().split())
    assert "note replay shrinks" in text
    assert "grow stage 1 of 3 at 25M frames inject max |dQ| online 0 target 2.4e-07 trainable 1.687M unchanged" in text


@pytest.mark.usefixtures("terminal")
def test_markup_is_shown_as_written() -> None:
    stream = Tty()
    with plain(stream, run_name="[red]a[/nothing] :smile:\x1b[2J", stage_frames=[M], stage_costs=[1.0]) as display:
        display.note("[bold]b[/x]")
    assert "[red]a[/nothing] :smile: [2J" in stream.getvalue()
    assert "[bold]b[/x]" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()


@pytest.mark.usefixtures("terminal")
def test_a_hung_up_terminal() -> None:
    """A real pseudo-terminal whose other end goes away."""
    parent, child = pty.openpty()
    with open(child, "w", encoding="utf-8") as stream:
        display = plain(stream)
        assert isinstance(display, LiveDisplay)
        with display:
            display.note("a")
            assert os.read(parent, 100)
            os.close(parent)
            for frames in range(100_000, 1_000_000, 100_000):
                display.record(metrics(frames))
