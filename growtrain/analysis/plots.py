"""Figures as SVG text, drawn directly: no dependency, the page's own fonts, sharp on a screen and in print.

Arms differ in colour (Okabe and Ito's palette, safe for colour-blind readers), in dashes and in markers.

Units: panels are laid out in SVG user units of 1/96 inch at full width.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from growtrain.analysis.aggregate import FloatArray
from growtrain.analysis.pages import visible

WIDTH = 1060
_PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "12 3")
_MARKERS = ("circle", "square", "diamond", "triangle")
_Scale = Callable[[ArrayLike], FloatArray]
_GREY, _GRID = "#555555", "#e3e3e3"
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 22, 26, 44
_MAX_LABEL = 42
_CHARACTER = 7.0  # a character's width at the most, nearly
_LINE = 26
_MAX_POINTS = 240  # of a line: more are not seen, and pages of long runs stay small


@dataclass(frozen=True)
class Style:
    """How an arm is drawn."""

    color: str
    dash: str
    marker: str


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each name; the first seven differ in colour, and all neighbours in dash and marker."""
    return {
        name: Style(_PALETTE[i % len(_PALETTE)], _DASHES[i % len(_DASHES)], _MARKERS[i % len(_MARKERS)])
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


def curves(
    panels: Sequence[Panel], legend: dict[str, Style], columns: int, height: int = 230, shared_y: bool = False
) -> str:
    """Panels side by side, `columns` in a row, below a legend; `shared_y` gives all the same range."""
    width = WIDTH / columns
    rows = math.ceil(len(panels) / columns)
    common = (
        _range([line for p in panels for line in p.lines], [p for p in panels if p.lines], "y") if shared_y else None
    )
    body, legend_height = _legend(legend, has_events=any(panel.events for panel in panels))
    for index, panel in enumerate(panels):
        x, y = index % columns * width, legend_height + index // columns * height
        body.append(f'<g transform="translate({x:.1f} {y:.1f})">')
        body += _panel(panel, width, height, common)
        body.append("</g>")
    return _svg(legend_height + rows * height, body)


def intervals(titles: Sequence[str], rows: dict[str, list[Row]]) -> str:
    """Dots with intervals: a panel for each title, a line for each name with a `Row` for each panel."""
    label_width = 24 + _CHARACTER * max(min(len(name), _MAX_LABEL) for name in rows)
    width = (WIDTH - label_width) / len(titles)
    centers = [_TOP + _LINE * (i + 0.5) for i in range(len(rows))]
    body = [_text(label_width - 14, y + 4, name, anchor="end") for y, name in zip(centers, rows, strict=True)]
    for column, title in enumerate(titles):
        cells = [row[column] for row in rows.values()]
        body.append(f'<g transform="translate({label_width + column * width:.1f} 0)">')
        body += [_text(0, 14, title, bold=True), *_interval_panel(cells, centers, width - 28)]
        body.append("</g>")
    return _svg(_TOP + _LINE * len(rows) + 30, body)


def _interval_panel(cells: Sequence[Row], centers: Sequence[float], width: float) -> list[str]:
    ends = [v for row in cells for v in (row.value, row.low, row.high) if v is not None and math.isfinite(v)]
    low, high = _padded(ends)
    bottom = centers[-1] + _LINE / 2

    def at(value: float) -> float:
        return (min(max(value, low), high) - low) / (high - low) * width

    body = []
    for tick in _ticks(low, high, 4):
        body.append(_rule(at(tick), _TOP, at(tick), bottom, _GRID))
        body.append(_text(at(tick), bottom + 15, short(tick), anchor="middle", color=_GREY, size=11))
    for row, y in zip(cells, centers, strict=True):
        if row.low is not None and row.high is not None:
            body.append(_rule(at(row.low), y, at(row.high), y, row.style.color, width=5, opacity=0.35))
        if math.isfinite(row.value):
            body.append(_marker(at(row.value), y, row.style, 5))
    return body


def short(value: float) -> str:
    """A number short enough for an axis: 1.5M, 2.4P, 0.05."""
    for scale, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{suffix}"
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"


def _panel(panel: Panel, width: float, height: float, common: tuple[float, float] | None) -> list[str]:
    body = [_text(_LEFT, 14, panel.title, bold=True)]
    left, right, top, bottom = _LEFT, width - _RIGHT, _TOP, height - _BOTTOM
    body.append(_text((left + right) / 2, height - 10, panel.x_label, anchor="middle", color=_GREY))
    if panel.y_label:
        middle = (top + bottom) / 2
        body.append(
            f'<g transform="translate(13 {middle:.1f}) rotate(-90)">'
            + _text(0, 0, panel.y_label, anchor="middle", color=_GREY)
            + "</g>"
        )
    if panel.message or not panel.lines:
        body.append(
            _text((left + right) / 2, (top + bottom) / 2, panel.message or "no data", anchor="middle", color=_GREY)
        )
        return body
    x_low, x_high = _range(panel.lines, [panel], "x")
    y_low, y_high = common or _range(panel.lines, [panel], "y")

    def at_x(value: ArrayLike) -> FloatArray:
        return left + (np.asarray(value, float) - x_low) / (x_high - x_low) * (right - left)

    def at_y(value: ArrayLike) -> FloatArray:
        return bottom - (np.clip(value, y_low, y_high) - y_low) / (y_high - y_low) * (bottom - top)

    for tick in _ticks(y_low, y_high, 5):
        y = float(at_y(tick))
        body.append(_rule(left, y, right, y, _GRID))
        body.append(_text(left - 6, y + 4, short(tick), anchor="end", color=_GREY, size=11))
    for tick in _ticks(x_low, x_high, 5):
        x = float(at_x(tick))
        body.append(_rule(x, bottom, x, bottom + 4, _GREY))
        body.append(_text(x, bottom + 16, short(tick), anchor="middle", color=_GREY, size=11))
    body.append(_rule(left, bottom, right, bottom, _GREY))
    for level, name in panel.levels:
        if y_low <= level <= y_high:
            y = float(at_y(level))
            body.append(_rule(left, y, right, y, _GREY, dash="1 3"))
            body.append(_text(left + 3, y + 12 if y + 16 < bottom else y - 4, name, color=_GREY, size=11))
    for x_event, style in panel.events:
        x = float(at_x(x_event))
        body.append(_rule(x, top, x, bottom, style.color, dash="1.5 3", opacity=0.8))
        body.append(_marker(x, bottom - 5, Style(style.color, "", "triangle"), 4.5))
    for line in sorted(panel.lines, key=lambda line: not line.thin):
        body += _draw(line, at_x, at_y)
    return body


def _draw(line: Line, at_x: _Scale, at_y: _Scale) -> list[str]:
    body: list[str] = []
    known = np.flatnonzero(np.isfinite(line.x) & np.isfinite(line.y))
    if not len(known):
        return body
    known = known[np.unique(np.linspace(0, len(known) - 1, _MAX_POINTS).round().astype(np.int64))]
    x, y = at_x(line.x[known]), at_y(line.y[known])
    if line.low is not None and line.high is not None:
        high, low = at_y(line.high[known]), at_y(line.low[known])
        around = np.concatenate([np.stack([x, high], 1), np.stack([x, low], 1)[::-1]])
        body.append(f'<polygon points="{_points(around)}" fill="{line.style.color}" opacity="0.15"/>')
    width, opacity = (1.0, 0.4) if line.thin else (2.2, 1.0)
    dash = f' stroke-dasharray="{line.style.dash}"' if line.style.dash and not line.thin else ""
    body.append(
        f'<polyline points="{_points(np.stack([x, y], 1))}" fill="none" stroke="{line.style.color}" stroke-width="{width}" '
        f'opacity="{opacity}" stroke-linejoin="round"{dash}/>'
    )
    if line.broken:
        a, b = float(x[-1]), float(y[-1])
        for sign in (1, -1):
            body.append(_rule(a - 4, b - 4 * sign, a + 4, b + 4 * sign, line.style.color, width=2))
    if line.marked and not line.thin:
        body += [_marker(float(x[i]), float(y[i]), line.style, 3.4) for i in _spread(len(x))]
    return body


def _spread(count: int, wanted: int = 6) -> list[int]:
    return sorted({round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)}) if count else []


def _legend(legend: dict[str, Style], has_events: bool) -> tuple[list[str], float]:
    """The legend in as many rows as it takes, and its height."""
    body: list[str] = []
    x, y = float(_LEFT), 12.0
    for name, style in legend.items():
        width = 62 + _CHARACTER * min(len(name), _MAX_LABEL)
        if x > _LEFT and x + width > WIDTH:
            x, y = float(_LEFT), y + 20
        body.append(_rule(x, y, x + 34, y, style.color, width=2.2, dash=style.dash))
        body += [_marker(x + 17, y, style, 3.8), _text(x + 40, y + 4, name)]
        x += width
    if has_events:
        body += [_marker(x + 6, y, Style(_GREY, "", "triangle"), 4.5), _text(x + 16, y + 4, "intervention")]
    return body, y + 14


def _marker(x: float, y: float, style: Style, r: float) -> str:
    look = f'fill="{style.color}" stroke="#ffffff" stroke-width="1"'
    if style.marker == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {look}/>'
    shapes: dict[str, list[tuple[float, float]]] = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
        "triangle": [(0, -1.2), (1.15, 0.95), (-1.15, 0.95)],
    }
    corners = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in shapes[style.marker])
    return f'<polygon points="{corners}" {look}/>'


def _range(lines: Sequence[Line], panels: Sequence[Panel], axis: str) -> tuple[float, float]:
    """What the lines span; of a band only as much as doubles the lines' own span."""
    values = np.concatenate([np.empty(0), *(getattr(line, axis) for line in lines)])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    if axis == "x":
        extra = [x for panel in panels for x, _ in panel.events]
        low, high = min(0.0, *values, *extra), max([*values, *extra], default=1.0)
        return (low, high) if high > low else (low, low + 1)
    bands = [b for line in lines for b in (line.low, line.high) if b is not None]
    banded = np.concatenate([values, *bands])
    span = max(float(np.ptp(values)), 1e-9)
    low, high = float(np.min(banded)), float(np.max(banded))
    low, high = max(low, float(np.min(values)) - span), min(high, float(np.max(values)) + span)
    near = [level for panel in panels for level, _ in panel.levels if low - span / 2 <= level <= high + span / 2]
    return _padded([low, high, *near])


def _padded(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - pad, high + pad


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers within the range, about as many as wanted."""
    raw = (high - low) / wanted
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _points(points: FloatArray) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _rule(
    x1: float, y1: float, x2: float, y2: float, color: str, *, width: float = 1, dash: str = "", opacity: float = 1
) -> str:
    style = (f' stroke-dasharray="{dash}"' if dash else "") + (f' opacity="{opacity}"' if opacity != 1 else "")
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width}"{style}/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", color: str = "#111111", size: int = 12, bold: bool = False
) -> str:
    shown = visible(text)
    shown = shown if len(shown) <= _MAX_LABEL else shown[: _MAX_LABEL - 1] + "…"
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}"{weight}>'
        f"{html.escape(shown)}</text>"
    )


def _svg(height: float, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )
