"""What a person sees of a sweep: a live table on a terminal, plain ASCII lines everywhere else.

Units: frames; seconds. A value that is not known is shown as `-`.
"""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, Final, Self, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from growtrain.settings.text import format_count
from growtrain.sweep.cells import Cell, Progress, progress
from growtrain.telemetry.display import SafeStream, format_duration, printable, suits_live

COLUMNS: Final = ("status", "game", "schedule", "seed", "config", "frames", "done", "frames/s", "eta", "attempts", "")
_ORDER: Final = ("running", "failed", "pending", "done")  # what is seen first where there is not room for all
_STYLES: Final = {"running": "cyan", "failed": "bold red", "done": "green", "lost": "yellow"}
_TOTALS_SECONDS: Final = 60.0  # between two plain lines of totals


def progress_of(cells: Collection[Cell], sweep_dir: Path) -> dict[int, Progress]:
    """How far each cell is: by its files while it runs, else by the ledger."""
    return {
        cell.id: progress(sweep_dir / cell.run_dir) if cell.status == "running" else Progress(frames=cell.frames)
        for cell in cells
    }


def row(cell: Cell, at: Progress, *, stale: bool = False) -> tuple[str, ...]:
    """A cell in the order of `COLUMNS`; `stale` says that its driver is gone or silent."""
    about = ""
    if cell.status == "running":
        about = f"process {cell.pid} on {cell.host}{', gone or silent' if stale else ''}"
    elif cell.last_error and cell.status != "done":
        about = last_words(cell)
    speed = at.frames_per_second
    left = (cell.total_frames - at.frames) / speed if speed else None
    return (
        "lost" if stale else cell.status,
        cell.game,
        printable(cell.schedule),
        str(cell.seed),
        cell.fingerprint,
        f"{format_count(at.frames)}/{format_count(cell.total_frames)}",
        f"{100 * min(1.0, at.frames / cell.total_frames):.0f}%",
        "-" if speed is None else f"{speed:.0f}",
        format_duration(left),
        str(cell.attempts),
        about,
    )


def last_words(cell: Cell) -> str:
    """How its last failed attempt ended and, unless it was killed, the last line it said; on one line."""
    first, *more = cell.last_error.splitlines() or [""]
    ending = first.partition(": ")[0]
    text = ending if ending.startswith("killed") else f"{ending}: {more[-1]}" if more else first
    return printable(text)[:200]


def totals(cells: Collection[Cell], at: dict[int, Progress]) -> str:
    """One line: how many cells are in which state, frames, speed of all that runs, and time left at that speed."""
    count = Counter(cell.status for cell in cells)
    done, total = sum(min(at[c.id].frames, c.total_frames) for c in cells), sum(c.total_frames for c in cells)
    speed = sum(at[cell.id].frames_per_second or 0.0 for cell in cells if cell.status == "running")
    left = sum(
        cell.total_frames - min(at[cell.id].frames, cell.total_frames) for cell in cells if cell.status != "failed"
    )
    states = ", ".join(f"{count[status]} {status}" for status in ("done", "running", "pending", "failed"))
    return (
        f"{len(cells)} cells: {states}  {format_count(done)}/{format_count(total)} frames  {speed:.0f} frames/s  "
        f"eta {format_duration(left / speed if speed else None)}"
    )


def render(cells: Sequence[Cell], sweep_dir: Path, is_stale: Callable[[Cell], bool]) -> list[str]:
    """The whole table as lines of text, the totals last."""
    at = progress_of(cells, sweep_dir)
    # It has no speed any more.
    stale = {cell.id: Progress(frames=at[cell.id].frames) for cell in cells if is_stale(cell)}
    at |= stale
    rows = [COLUMNS, *(row(cell, at[cell.id], stale=cell.id in stale) for cell in cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(each, widths, strict=True)).rstrip() for each in rows]
    return [*lines, totals(cells, at)]


class AbstractTable(ABC):
    """Shows a sweep from `__enter__` to `__exit__`; no method fails because of the stream."""

    @abstractmethod
    def started(self, cell: Cell) -> None:
        """A cell that begins or goes on."""

    @abstractmethod
    def ended(self, cell: Cell) -> None:
        """A cell whose attempt ended, as it is now."""

    @abstractmethod
    def reclaimed(self, cell: Cell) -> None:
        """A cell that was taken back from a driver that is gone or silent, as it was, and what became of that."""

    @abstractmethod
    def show(self, cells: Sequence[Cell]) -> None:
        """All cells, as they are now."""

    @abstractmethod
    def __enter__(self) -> Self:
        """Begins to show."""

    @abstractmethod
    def __exit__(self, *exception: object) -> None:
        """Leaves the terminal as it was, with the last state on it."""


def open_table(sweep_dir: Path, stream: TextIO | None) -> AbstractTable:
    """Live on a UTF-8 terminal; plain lines for pipes, files, `NO_COLOR` and dumb terminals."""
    safe = SafeStream(stream)
    if suits_live(safe):
        return LiveTable(Console(file=cast(IO[str], safe), force_terminal=True), sweep_dir)
    return PlainTable(safe, sweep_dir)


class PlainTable(AbstractTable):
    """One short ASCII line for each event, the first word says of what kind it is; now and then the totals."""

    def __init__(self, stream: SafeStream, sweep_dir: Path) -> None:
        self._stream, self._sweep_dir = stream, sweep_dir
        self._next, self._shown = 0.0, ""

    def started(self, cell: Cell) -> None:
        """`start ...`."""
        self._line("start", cell.name, f"attempt {cell.attempts}", cell.run_dir)

    def ended(self, cell: Cell) -> None:
        """`done`, `fail`, `retry` or `stop`."""
        self._line(*_event(cell))

    def reclaimed(self, cell: Cell) -> None:
        """`lost ...`."""
        self._line("lost", cell.name, cell.last_error)

    def show(self, cells: Sequence[Cell]) -> None:
        """`sweep ...`, once a minute and at the end."""
        ended = all(cell.status in ("done", "failed") for cell in cells)
        if ended or time.monotonic() >= self._next:
            self._next = time.monotonic() + _TOTALS_SECONDS
            text = totals(cells, progress_of(cells, self._sweep_dir))
            if text != self._shown:
                self._line("sweep", text)
            self._shown = text

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def _line(self, kind: str, *parts: str) -> None:
        text = f"{kind:<5}  {printable('  '.join(parts))}\n"
        self._stream.write(text.encode("ascii", "backslashreplace").decode("ascii"))
        self._stream.flush()


class LiveTable(AbstractTable):
    """A table that is redrawn in place, as many cells as there is room for, with failures scrolling above it."""

    def __init__(self, console: Console, sweep_dir: Path) -> None:
        self._console, self._sweep_dir = console, sweep_dir
        # No thread of rich redraws: a process that starts others by fork had better have one thread only.
        self._live = Live(console=console, auto_refresh=False)

    def started(self, cell: Cell) -> None:
        """Nothing: the table shows it."""

    def ended(self, cell: Cell) -> None:
        """A line above the table, unless all is well."""
        if cell.status != "done":
            kind, *parts = _event(cell)
            self._console.print(Text(f"{kind:<5}  {printable('  '.join(parts))}", _STYLES["lost"]))

    def reclaimed(self, cell: Cell) -> None:
        """A line above the table."""
        self._console.print(Text(f"lost   {printable(cell.name)}  {printable(cell.last_error)}", _STYLES["lost"]))

    def show(self, cells: Sequence[Cell]) -> None:
        """Redraws the table."""
        at = progress_of(cells, self._sweep_dir)
        room = max(1, self._console.height - 6)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in COLUMNS:
            right = name in ("seed", "frames", "done", "frames/s", "eta", "attempts")
            table.add_column(name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
        for cell in sorted(cells, key=lambda cell: _ORDER.index(cell.status))[:room]:
            table.add_row(*map(Text, row(cell, at[cell.id])), style=_STYLES.get(cell.status, ""))
        title = Text.assemble(("growtrain sweep", "bold"), f" · {printable(str(self._sweep_dir))}")
        hidden = Text(f"and {len(cells) - room} more" if len(cells) > room else "", "dim")
        self._live.update(Group(title, Text(totals(cells, at)), table, hidden), refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()


def _event(cell: Cell) -> tuple[str, ...]:
    if cell.status == "done":
        return "done", cell.name, f"{format_count(cell.frames)} frames"
    if cell.status == "failed":
        return "fail", cell.name, f"attempt {cell.attempts}, the last: {last_words(cell)}", f"{cell.run_dir}/stderr.log"
    if cell.last_error:
        return "retry", cell.name, f"attempt {cell.attempts}: {last_words(cell)}"
    return "stop", cell.name, f"at {format_count(cell.frames)} frames"
