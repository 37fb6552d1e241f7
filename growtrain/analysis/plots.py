"""Figures as SVG text, drawn by matplotlib: the one way of plotting of the package and of the benchmarks, which save theirs by `to_svg`.

matplotlib, because bars, ticks, legends and layout are no business of this project. Training never draws: only `report`, `probe`,
`diagnose` and the benchmarks need it, from the `report` extra.

Arms differ in colour (Okabe and Ito's palette, safe for colour-blind readers), in dashes and in markers.

Units: panels are laid out in CSS pixels of 1/96 inch at full width.
"""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from growtrain.analysis.aggregate import FloatArray
from growtrain.analysis.pages import visible
from growtrain.settings.text import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 1060
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = ("-", (0, (7, 3)), (0, (2, 2.5)), (0, (9, 3, 2, 3)), (0, (12, 3)))
_MARKERS = ("o", "s", "D", "^")
_GREY, _GRID = "#555555", "#e3e3e3"
_MAX_LABEL = 42
_MAX_POINTS = 240  # of a line: more are not seen, and pages of long runs stay small
_MARKS = 6  # markers along a line


@dataclass(frozen=True)
class Style:
    """How an arm is drawn, in matplotlib's words."""

    color: str
    dash: Any
    marker: str


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each name; the first seven differ in colour, and all neighbours in dash and marker."""
    return {
        name: Style(PALETTE[i % len(PALETTE)], _DASHES[i % len(_DASHES)], _MARKERS[i % len(_MARKERS)])
        for i, name in enumerate(names)
    }


@dataclass(frozen=True)
class Line:
    """A line of a panel; `low` and `high` make a band, `thin` is one run among several, `broken` puts a cross at its end."""

    x: FloatArray
    y: FloatArray
    style: Style
    low: FloatArray | None = None
    high: FloatArray | None = None
    thin: bool = False
    broken: bool = False
    marked: bool = True


@dataclass(frozen=True)
class Panel:
    """Axes with lines.

    Attributes:
        title, x_label, y_label: texts.
        lines: thin ones are drawn below the others.
        events: (x, style) of vertical marks.
        levels: (y, name) of horizontal reference lines; drawn where the data's range comes near.
        message: shown instead of lines.
    """

    title: str
    x_label: str
    y_label: str
    lines: list[Line] = field(default_factory=list)
    events: list[tuple[float, Style]] = field(default_factory=list)
    levels: list[tuple[float, str]] = field(default_factory=list)
    message: str = ""


@dataclass(frozen=True)
class Row:
    """One line of an interval panel."""

    value: float
    low: float | None
    high: float | None
    style: Style


def require_matplotlib() -> None:
    """Raises `ConfigError` that names the extra where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"figures: {error}: python -m pip install 'growtrain[report]'") from error


def to_svg(figure: "Figure") -> str:
    """A figure as one `<svg>` element for a page or a file; the same figure gives the same text."""
    import matplotlib

    text = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "growtrain", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has fonts of its own
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    # Half the size, and none of the look.
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+|\n", r"\1", path[0]), svg)


def curves(
    panels: Sequence[Panel], legend: dict[str, Style], columns: int, height: int = 230, shared_y: bool = False
) -> str:
    """Panels side by side, `columns` in a row, below a legend; `shared_y` gives all the same range."""
    from matplotlib.lines import Line2D

    rows = math.ceil(len(panels) / columns)
    figure, grid = _panels(rows, columns, rows * height + 30)
    common = _y_range([p for p in panels if p.lines]) if shared_y else None
    for axes, panel in zip_longest(grid, panels):
        if panel is None:
            axes.set_axis_off()
        else:
            _draw(axes, panel, common or _y_range([panel]))
    handles = [Line2D([], [], color=s.color, linestyle=s.dash, marker=s.marker, markersize=5) for s in legend.values()]
    labels = [_label(name) for name in legend]
    if any(panel.events for panel in panels):
        handles.append(Line2D([], [], color=_GREY, linestyle=":", marker="^", markersize=5))
        labels.append("intervention")
    if handles:
        columns = max(1, WIDTH // (60 + 7 * max(len(label) for label in labels)))
        drawn = figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=4
        )
        for text in drawn.get_texts():
            text.set_parse_math(False)
    return to_svg(figure)


def intervals(titles: Sequence[str], rows: dict[str, list[Row]]) -> str:
    """Dots with intervals: a panel for each title, a line for each name with a `Row` for each panel."""
    figure, grid = _panels(1, len(titles), 26 * len(rows) + 70)
    for column, (axes, title) in enumerate(zip(grid, titles, strict=True)):
        for place, row in enumerate(cells[column] for cells in rows.values()):
            if row.low is not None and row.high is not None:
                axes.hlines(place, row.low, row.high, color=row.style.color, linewidth=4, alpha=0.35)
            axes.plot(row.value, place, row.style.marker, color=row.style.color, markersize=7)
        axes.set_yticks(range(len(rows)), [_label(name) if column == 0 else "" for name in rows], parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x", color=_GRID)
        axes.locator_params(axis="x", nbins=4)
        axes.set_title(_label(title), loc="left", fontsize=9, fontweight="bold", parse_math=False)
    return to_svg(figure)


def short(value: float) -> str:
    """A number short enough for an axis: 1.5M, 2.4P, 0.05."""
    for scale, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{suffix}"
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"


def _panels(rows: int, columns: int, height: float) -> tuple["Figure", list["Axes"]]:
    """A figure of empty axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 96, height / 96), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GREY)
        axes.tick_params(colors=_GREY, labelsize=8)
        axes.set_axisbelow(True)
    return figure, grid


def _draw(axes: "Axes", panel: Panel, y_range: tuple[float, float]) -> None:
    axes.set_title(_label(panel.title), loc="left", fontsize=9, fontweight="bold", parse_math=False)
    axes.set_xlabel(panel.x_label, fontsize=9, color=_GREY, parse_math=False)
    axes.set_ylabel(panel.y_label, fontsize=9, color=_GREY, parse_math=False)
    if panel.message or not panel.lines:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, panel.message or "no data", ha="center", color=_GREY, transform=axes.transAxes)
        return
    for line in sorted(panel.lines, key=lambda line: not line.thin):
        _draw_line(axes, line)
    for x, style in panel.events:
        axes.axvline(x, color=style.color, linestyle=":", linewidth=1, alpha=0.8)
        axes.plot(x, 0.03, "^", color=style.color, markersize=5, transform=axes.get_xaxis_transform())
    for level, name in panel.levels:
        if y_range[0] <= level <= y_range[1]:
            axes.axhline(level, color=_GREY, linestyle=":", linewidth=1)
            axes.text(0.01, level, name, va="bottom", fontsize=8, color=_GREY, transform=axes.get_yaxis_transform())
    axes.set_ylim(*y_range)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(axis="y", color=_GRID)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: short(value))
        axis.get_major_locator().set_params(nbins=5)  # type: ignore[call-arg]


def _draw_line(axes: "Axes", line: Line) -> None:
    known = np.flatnonzero(np.isfinite(line.x) & np.isfinite(line.y))
    if not len(known):
        return
    known = known[np.unique(np.linspace(0, len(known) - 1, _MAX_POINTS).round().astype(np.int64))]
    x, y, style = line.x[known], line.y[known], line.style
    if line.low is not None and line.high is not None:
        axes.fill_between(x, line.low[known], line.high[known], color=style.color, alpha=0.15, linewidth=0)
    if line.thin:
        axes.plot(x, y, color=style.color, linewidth=0.8, alpha=0.4)
    else:
        marks = np.unique(np.linspace(0, len(x) - 1, _MARKS).round().astype(np.int64)).tolist() if line.marked else []
        axes.plot(x, y, color=style.color, linestyle=style.dash, marker=style.marker, markevery=marks, markersize=4)
    if line.broken:
        axes.plot(x[-1], y[-1], "x", color=style.color, markersize=6)


def _y_range(panels: Sequence[Panel]) -> tuple[float, float]:
    """What the lines span, of a band only as much as doubles the lines' own span, and the levels near it."""
    lines = [line for panel in panels for line in panel.lines]
    values = np.concatenate([np.empty(0), *(line.y for line in lines)])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    least, most = float(values.min()), float(values.max())
    span = max(most - least, 1e-9)
    bands = np.concatenate([values, *(end for line in lines for end in (line.low, line.high) if end is not None)])
    low, high = max(float(np.nanmin(bands)), least - span), min(float(np.nanmax(bands)), most + span)
    near = [level for panel in panels for level, _ in panel.levels if low - span / 2 <= level <= high + span / 2]
    low, high = min([low, *near]), max([high, *near])
    pad = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - pad, high + pad


def _label(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= _MAX_LABEL else shown[: _MAX_LABEL - 1] + "…"
