"""What a person sees of a run: a live panel on a terminal, plain ASCII lines everywhere else.

A display only shows. When its stream fails (`| head`, a closed terminal, a full disk) it falls silent and the run goes on.

Units: frames are emulator frames, times are seconds; a value that is not known is shown as `-`.
"""

import contextlib
import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, pairwise
from time import perf_counter
from typing import IO, Final, Self, TextIO, cast

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from growtrain.records import Decision, Diagnostics, Evaluation, GrowthEvent, Metrics, Record
from growtrain.settings.text import format_count

_FEW_EPISODES: Final = 10
_SPEED_RECORDS: Final = 32  # records behind the measured speed: long enough to contain evaluations
_PANEL_WIDTH: Final = 100  # at most, in columns


class AbstractDisplay(ABC):
    """Shows a run from `__enter__` to `__exit__`; no method fails because of the stream."""

    def show(self, record: Record) -> None:
        """Any of the records that `train` yields; diagnostics are for the files."""
        match record:
            case Metrics():
                self.record(record)
            case Evaluation():
                self.evaluation(record)
            case Diagnostics():
                pass
            case Decision():
                self.note(f"at {record.frames} frames: {record.reason}")
            case _:
                self.growth(record)

    @abstractmethod
    def note(self, text: str) -> None:
        """A message, such as which settings shrank with the budget."""

    @abstractmethod
    def record(self, metrics: Metrics) -> None:
        """A new record."""

    @abstractmethod
    def evaluation(self, evaluation: Evaluation) -> None:
        """A new evaluation."""

    @abstractmethod
    def growth(self, event: GrowthEvent) -> None:
        """An intervention that was done."""

    @abstractmethod
    def __enter__(self) -> Self:
        """Begins to show."""

    @abstractmethod
    def __exit__(self, *exception: object) -> None:
        """Leaves the terminal as it was, with the last state on it."""


def open_display(
    *,
    game: str,
    schedule: str,
    device: str,
    stage_frames: Sequence[int],
    stage_costs: Sequence[float],
    run_name: str = "",
    plan: str = "",
    stream: TextIO | None = None,
) -> AbstractDisplay:
    """The display that suits the stream: live on a UTF-8 terminal, plain lines for pipes, files, `NO_COLOR` and dumb terminals.

    Args:
        game: shown as given, as are `schedule`, `device` and `run_name`.
        schedule: the growth schedule.
        device: where the run computes.
        stage_frames: length of each stage in frames; their sum is the budget.
        stage_costs: time per frame of each stage, in any unit.
        run_name: the run directory, if it should be shown.
        plan: what happens when, in words; by default injections where stages begin.
        stream: where to; None is standard output.

    Raises:
        ValueError: the stages and costs do not match, or are not positive.
    """
    progress = Progress(stage_frames, stage_costs)
    title = [printable(part) for part in (game, schedule, device, run_name) if part]
    safe = SafeStream(sys.stdout if stream is None else stream)
    if suits_live(safe):
        return LiveDisplay(Console(file=cast(IO[str], safe), force_terminal=True), title, progress)
    return PlainDisplay(safe, title, progress, plan)


def suits_live(stream: "SafeStream") -> bool:
    """Whether what is redrawn in place can be shown: on a UTF-8 terminal that is not dumb, without `NO_COLOR`."""
    utf8 = stream.encoding.lower().replace("-", "").startswith("utf8")
    dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown") and os.name != "nt"
    return stream.isatty() and utf8 and not dumb and not os.environ.get("NO_COLOR")


def eta_seconds(
    frames: int,
    total_frames: int,
    stage_edges: Sequence[int],
    stage_costs: Sequence[float],
    stage: int,
    seconds_per_frame: float,
) -> float:
    """Seconds until `total_frames`: the speed of one stage, scaled by the relative costs of the stages that are left.

    Args:
        frames: frames done.
        total_frames: frames to reach.
        stage_edges: frames at which stages 1, 2, ... begin, increasing.
        stage_costs: time per frame of stages 0, 1, ..., in any unit; one more than edges.
        stage: the stage in which the speed was measured.
        seconds_per_frame: that speed.
    """
    spans = zip(pairwise([0, *stage_edges, total_frames]), stage_costs, strict=True)
    cost_left = sum(max(0, min(end, total_frames) - max(start, frames)) * cost for (start, end), cost in spans)
    return cost_left / stage_costs[stage] * seconds_per_frame


class Progress:
    """Where a run is in its stages, and how fast it goes.

    The speed is of wall-clock between recent records of one stage, evaluations and checkpoints included. Frames before learning starts
    cost almost nothing and are not counted.
    """

    def __init__(self, stage_frames: Sequence[int], stage_costs: Sequence[float]) -> None:
        if len(stage_frames) != len(stage_costs) or not stage_frames:
            raise ValueError(f"{len(stage_frames)} stages have {len(stage_costs)} costs: give one cost for each stage")
        if min(stage_frames) <= 0 or min(stage_costs) <= 0:
            raise ValueError("stage frames and costs must be positive")
        *edges, self.total_frames = accumulate(stage_frames)
        self.edges = tuple(edges)
        self.costs = tuple(stage_costs)
        self.frames = 0
        self.stage = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=_SPEED_RECORDS)
        self._speed: tuple[int, float] | None = None  # stage, seconds per frame

    def update(self, metrics: Metrics) -> None:
        """Takes in a record."""
        if metrics.stage != self.stage or not metrics.updates_per_second:
            self._recent.clear()
        self.frames, self.stage = metrics.frames, metrics.stage
        if not metrics.updates_per_second:
            return
        self._recent.append((metrics.frames, metrics.wall_seconds))
        (first, begun), (last, ended) = self._recent[0], self._recent[-1]
        if last > first:
            self._speed = (self.stage, (ended - begun) / (last - first))
        elif self._speed is None and metrics.frames_per_second > 0:
            self._speed = (self.stage, 1 / metrics.frames_per_second)

    def seconds_to(self, frames: int) -> float | None:
        """Seconds from the last record until `frames`; None before a speed was measured."""
        if self._speed is None:
            return None
        stage, seconds_per_frame = self._speed
        to_total = eta_seconds(self.frames, self.total_frames, self.edges, self.costs, stage, seconds_per_frame)
        beyond = eta_seconds(frames, self.total_frames, self.edges, self.costs, stage, seconds_per_frame)
        return max(0.0, to_total - beyond)

    @property
    def next_injection(self) -> int | None:
        """Frames at which the next stage is planned to begin; None after the last, and once that has gone by."""
        following = self.edges[self.stage] if self.stage < len(self.edges) else 0
        return following if following > self.frames else None


class PlainDisplay(AbstractDisplay):
    """One short ASCII line per message; the first word says of what kind it is."""

    def __init__(self, stream: "SafeStream", title: Sequence[str], progress: Progress, plan: str) -> None:
        self._stream = stream
        self._title = title
        self._progress = progress
        self._plan = plan

    def note(self, text: str) -> None:
        """`note ...`."""
        self._line("note", printable(text))

    def record(self, metrics: Metrics) -> None:
        """`train ...`."""
        progress = self._progress
        progress.update(metrics)
        parts = [
            self._place(metrics.frames, metrics.stage),
            f"score {_score(metrics.episode_return):>8}{_few(metrics.episodes)}",
            f"loss {_small(metrics.loss):>7}",
            f"eps {metrics.epsilon:.3f}",
            f"{metrics.frames_per_second:>5.0f} frames/s",
            f"{metrics.updates_per_second:>4.0f} updates/s",
            f"eta {format_duration(progress.seconds_to(progress.total_frames)):>6}",
        ]
        if progress.next_injection is not None:
            parts.append(f"next in {format_duration(progress.seconds_to(progress.next_injection))}")
        self._line("train", *parts)

    def evaluation(self, evaluation: Evaluation) -> None:
        """`eval ...`."""
        self._line(
            "eval",
            self._place(evaluation.frames, evaluation.stage),
            f"score {_score(evaluation.episode_return):>8}",
            f"human-normalized {_small(evaluation.human_normalized_score)}",
            f"{_episodes(evaluation)} in {format_duration(evaluation.wall_seconds)}",
        )

    def growth(self, event: GrowthEvent) -> None:
        """`grow ...`."""
        self._line("grow", self._place(event.frames, event.stage), *_growth_parts(event))

    def __enter__(self) -> Self:
        edges = ", ".join(map(format_count, self._progress.edges))
        plan = self._plan or (f"injections at {edges}" if edges else "no injections")
        self._line("run", *self._title, f"{format_count(self._progress.total_frames)} frames, {plan}")
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def _place(self, frames: int | None, stage: int) -> str:
        total = self._progress.total_frames
        done = "-" if frames is None else format_count(frames)
        percent = "-" if frames is None else f"{100 * frames / total:.1f}"
        return f"{done:>6}/{format_count(total)} {percent:>5}%  stage {stage}/{len(self._progress.edges)}"

    def _line(self, kind: str, *parts: str) -> None:
        text = f"{kind:<5}  {'  '.join(parts)}\n"
        self._stream.write(text.encode("ascii", "backslashreplace").decode("ascii"))
        self._stream.flush()


class LiveDisplay(AbstractDisplay):
    """A panel that is redrawn in place every second, with messages scrolling above it."""

    def __init__(self, console: Console, title: Sequence[str], progress: Progress) -> None:
        self._console = console
        self._title = Text(" · ").join([Text("growtrain", "bold"), *(Text(part) for part in title)])
        self._progress = progress
        self._metrics: Metrics | None = None
        self._evaluation: Evaluation | None = None
        self._received = perf_counter()
        # A thread of rich redraws, so that the time left runs on between records; it reads only what is replaced as a whole.
        self._live = Live(console=console, get_renderable=self._panel, refresh_per_second=1)

    def note(self, text: str) -> None:
        """A line above the panel."""
        self._message("note", printable(text), "yellow")

    def record(self, metrics: Metrics) -> None:
        """Redraws the panel."""
        self._progress.update(metrics)
        self._metrics, self._received = metrics, perf_counter()
        self._live.refresh()

    def evaluation(self, evaluation: Evaluation) -> None:
        """Redraws the panel."""
        self._evaluation = evaluation
        self._live.refresh()

    def growth(self, event: GrowthEvent) -> None:
        """A line above the panel."""
        at = "" if event.frames is None else f" at {format_count(event.frames)} frames"
        text = "  ".join([f"stage {event.stage} of {len(self._progress.edges)}{at}", *_growth_parts(event)])
        self._message("grow", text, "green")

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def _message(self, kind: str, text: str, style: str) -> None:
        # A grid keeps the lines of a long message together. Text, not str: nothing in it is markup.
        line = Table.grid(padding=(0, 2))
        line.add_column(width=4)
        line.add_column()
        line.add_row(Text(kind, f"bold {style}"), Text(text))
        self._console.print(line)

    def _panel(self) -> Panel:
        progress = self._progress
        percent = 100 * progress.frames / progress.total_frames
        done, total = format_count(progress.frames), format_count(progress.total_frames)
        counts = Text.assemble((done, "bold"), f" / {total} frames  {percent:.1f} %")
        bar = _StageBar(progress.frames, progress.total_frames, progress.edges)
        facts = Text("no record yet", "dim") if self._metrics is None else self._facts(self._metrics, self._evaluation)
        width = min(self._console.width, _PANEL_WIDTH)
        return Panel(
            Group(counts, bar, Text(), facts), title=self._title, title_align="left", padding=(0, 1), width=width
        )

    def _facts(self, metrics: Metrics, evaluation: Evaluation | None) -> Table:
        left, elapsed = self._left(self._progress.total_frames), metrics.wall_seconds + perf_counter() - self._received
        score, evaluated, human = _score(metrics.episode_return), "-", "-"
        if metrics.episodes:
            score += f"  ({_count(metrics.episodes)})"
        if evaluation is not None:
            evaluated = f"{_score(evaluation.episode_return)}  at {format_count(evaluation.frames)}"
            evaluated += _few(evaluation.episodes)
            human = _small(evaluation.human_normalized_score)
        table = Table.grid(padding=(0, 2), expand=True)
        for style, ratio in (("dim", 2), ("bold", 5), ("dim", 3), ("bold", 2)):
            table.add_column(style=style, ratio=ratio, no_wrap=True, overflow="ellipsis")
        for fact in (
            ("stage", self._stage(), "time left", format_duration(left)),
            ("score", score, "elapsed", format_duration(elapsed)),
            ("evaluation", evaluated, "human-normalized", human),
            ("frames/s", f"{metrics.frames_per_second:.0f}", "updates/s", f"{metrics.updates_per_second:.0f}"),
            ("loss", _small(metrics.loss), "epsilon", f"{metrics.epsilon:.3f}"),
        ):
            table.add_row(*map(Text, fact))
        return table

    def _stage(self) -> str:
        text = f"{self._progress.stage} of {len(self._progress.edges)}"
        edge = self._progress.next_injection
        if edge is None:
            return text
        return f"{text}, next at {format_count(edge)} in {format_duration(self._left(edge))}"

    def _left(self, frames: int) -> float | None:
        seconds = self._progress.seconds_to(frames)
        return None if seconds is None else max(0.0, seconds - (perf_counter() - self._received))


class _StageBar:
    """A bar over the budget, as wide as there is room, with a mark at every injection."""

    def __init__(self, frames: int, total_frames: int, edges: Sequence[int]) -> None:
        self._frames = frames
        self._total = total_frames
        self._edges = edges

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        done = self._frames * width // self._total
        marks = {edge * width // self._total for edge in self._edges}
        bar = Text("".join("╋" if cell in marks else "━" for cell in range(width)), "bright_black", no_wrap=True)
        bar.stylize("cyan", 0, done)
        for mark in marks:
            bar.stylize("bold yellow", mark, mark + 1)
        yield bar


class SafeStream:
    """A text stream that cannot fail: what the encoding lacks is escaped, and after the first error everything is dropped.

    `stream` may be None, as `sys.stdout` is in a process without one.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding = (stream.encoding if stream is not None else None) or "ascii"

    def write(self, text: str) -> int:
        """Writes, or drops; returns the length of `text`."""
        if self._stream is not None:
            try:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except (OSError, ValueError) as error:  # ValueError: closed
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flushes, or not."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._fail(error)

    def isatty(self) -> bool:
        """Whether it is a terminal; False if it is closed."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """The descriptor; raises `OSError` without one, as streams do."""
        if self._stream is None:
            raise OSError("no stream")
        return self._stream.fileno()

    def _fail(self, error: Exception) -> None:
        if isinstance(error, BlockingIOError):  # a full non-blocking pipe: this text is lost, the next may pass
            return
        # Python flushes standard output once more at exit and would then end with code 120 (its manual: "Note on SIGPIPE").
        if self._stream is sys.__stdout__:
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), self.fileno())
        self._stream = None


def _growth_parts(event: GrowthEvent) -> list[str]:
    trainable, before = format_count(event.parameters_trainable), format_count(event.parameters_trainable_before)
    unchanged = event.parameters_trainable == event.parameters_trainable_before
    return [
        event.kind,
        f"max |dQ| online {_small(event.max_abs_q_change_online)} target {_small(event.max_abs_q_change_target)}",
        f"trainable {trainable} {'unchanged' if unchanged else f'(was {before})'} of {format_count(event.parameters_total)}",
        f"pause {event.pause_seconds:.2f}s",
    ]


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _episodes(evaluation: Evaluation) -> str:
    if evaluation.episodes and evaluation.episode_return is None:
        return f"none of {evaluation.episodes} episodes ended"
    return _count(evaluation.episodes)


def _few(episodes: int) -> str:
    """How many episodes a mean is of, where they are so few that it must not be read without."""
    return f" (n={episodes})" if 0 < episodes < _FEW_EPISODES else ""


def _count(episodes: int) -> str:
    return f"{episodes} episode{'' if episodes == 1 else 's'}"


def format_duration(seconds: float | None) -> str:
    """At most six characters: `45s`, `12m05s`, `9h34m`, `3d04h`."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def printable(text: str) -> str:
    """`text` on one line, without control characters (a run name may hold newlines or terminal escapes)."""
    return "".join(character if character.isprintable() else " " for character in text)
