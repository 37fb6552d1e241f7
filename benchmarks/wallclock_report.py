"""Tables and a figure of what `run_wallclock.py` measured, made of its raw JSON alone; the same JSON gives the same bytes.

Units: hours, frames per second, GPU utilisation in percent, kilowatt-hours.
"""

from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from recording import machine_lines, summarize, table, with_spread
from wallclock_hours import (
    PAPER_HOURS,
    TOLERANCE,
    Raw,
    busy_share,
    gpu_mean,
    projection_of,
    saved_hours,
    saved_shares,
    speeds,
    sweeps,
    total_hours,
    validated,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BUSY_CORES = 0.2  # used by others at the start, from which the timings are said to be disturbed
PHASES = ("act", "learn", "environment")


def markdown(raw: Raw) -> str:
    """The report."""
    parts = [
        f"# Growing against full width: {raw['game']}, {raw['total_frames'] / 1e6:g}M frames, on {hardware(raw)}\n",
        machine_lines(raw["machine"]) + _setting_lines(raw),
    ]
    for name in raw["stacks"]:
        parts += [f"## Stack: {name}\n", _STACKS[name] + "\n", _projection_table(raw, name), _stage_table(raw, name)]
    parts += [_sweep_section(raw), _validation_section(raw)]
    return "\n".join(part for part in parts if part)


def hardware(raw: Raw) -> str:
    """The GPU, or else the CPU, in words."""
    machine = raw["machine"]
    return str(machine["gpu"]) if machine["gpu"] else f"{machine['cpu']} ({machine['cores']} cores)"


_STACKS = {
    "fast": "Vector environments that step while the learner works, as `growtrain` trains.",
    "reference": "One environment and eager execution: the paper's regime.",
}


def _setting_lines(raw: Raw) -> str:
    machine = raw["machine"]
    total = raw["total_frames"]
    lines = [f"- Numbers are medians of the repeats, brackets are quartiles unless said; hours are for {total} frames."]
    for name, stack in raw["stacks"].items():
        lines.append(
            f"- {name}: {stack['num_envs']} environments, execution {stack['execution']}; a replay of {stack['replay_capacity']} "
            f"transitions shared by all cells, {stack['filled']} in it before the first window"
        )
    if machine.get("busy_cores", 0.0) > BUSY_CORES:
        lines.append(
            f"- **The machine was busy** ({machine['busy_cores']:.1f} cores in use): the timings are disturbed."
        )
    if raw["stopped_early"]:
        lines.append("- Time ran out before all repeats were done.")
    return "\n".join(lines) + "\n"


def _arms(raw: Raw, stack: str) -> list[Raw]:
    return [arm for arm in raw["arms"] if arm["stack"] == stack]


def _projection_table(raw: Raw, stack: str) -> str:
    rows = []
    for arm in _arms(raw, stack):
        p, saved, shares = projection_of(raw, arm), saved_hours(raw, arm), [100 * s for s in saved_shares(raw, arm)]
        watts = gpu_mean(raw, arm, "watts")
        energy = watts if isinstance(watts, str) else f"{watts * p.training / 3.6e6:.2f}"
        hours = (p.warmup, sum(p.stages), p.growth, p.evaluation, p.checkpoints, p.records + p.startup)
        rows.append(
            [
                arm["name"],
                arm["full_width"],
                *(f"{_hours(seconds / 3600)}" for seconds in hours),
                f"{median(total_hours(raw, arm)):.2f}",
                *(
                    ("-", "-", "-")
                    if arm["baseline"]
                    else (_extremes(saved, 2), _extremes(shares, 1), _quartiles(shares))
                ),
                _short(gpu_mean(raw, arm, "utilization_mean"), "%"),
                _short(busy_share(raw, arm), share=True),
                _short(energy),
            ]
        )
    header = (
        "arm", "full width", "warm-up", "training", "growth", "evaluation", "checkpoints", "rest", "total h",
        "saved h [least to greatest]", "saved % [least to greatest]", "quartiles %", "GPU util", "GPU busy", "GPU kWh",
    )  # fmt: skip
    return (
        "### Projected hours\n\n"
        + table(header, rows)
        + "\nTotals and savings are medians of what each repeat comes to, parts are of each cell's median speed: they need not add up.\n"
        + _reasons(
            [gpu_mean(raw, arm, field) for arm in _arms(raw, stack) for field in ("utilization_mean", "watts")]
            + [busy_share(raw, arm) for arm in _arms(raw, stack)]
        )
    )


def _stage_table(raw: Raw, stack_name: str) -> str:
    stack, rows = raw["stacks"][stack_name], []
    for key, cell in stack["cells"].items():
        windows = cell["repeats"]
        seconds = sum(w["seconds"] for w in windows)
        split = [sum(w["phases"].get(phase, 0.0) for w in windows) / seconds for phase in PHASES]
        rows.append(
            [
                key,
                f"{cell['live_width']}+{cell['frozen_width']}" if cell["frozen_width"] else cell["live_width"],
                f"{cell['flops_per_update'] / 1e9:.2f}",
                len(windows),
                with_spread(speeds(cell), 1),
                with_spread([w["updates"] / w["seconds"] for w in windows], 1),
                *(f"{share:.0%}" for share in split),
                f"{median(w['cpu_seconds'] / w['seconds'] for w in windows):.2f}",
                f"{median(cell['growth_seconds'][-1:]):.3f}" if cell["growth_seconds"] else "-",
            ]
        )
    header = (
        "cell", "live+frozen width", "GFLOP/update", "n", "frames/s", "updates/s", "act", "learn", "environment wait",
        "CPU-s/s", "growth s",
    )  # fmt: skip
    note = "\nShares of the wall-clock. On a GPU work is only enqueued in `learn` and waited for in `act`.\n"
    return "### Stages in steady state\n\n" + table(header, rows) + note


def _sweep_section(raw: Raw) -> str:
    found = sweeps(raw)
    if not found:
        return ""
    rows = []
    for sweep in found:
        points = "; ".join(f"{width}: {hours:.1f}" for width, hours in sweep["points"])
        width = "none" if sweep["width"] is None else f"{sweep['width']:.0f}"
        rows.append([sweep["stack"], sweep["name"], points, width, sweep["how"]])
    name = hardware(raw)
    if "A100" in name:
        remark = f"The paper saves about {PAPER_HOURS:.0f} hours on an A100, as this GPU is; its full width is not published."
    else:
        remark = f"Measured on {name}, which is not an A100: nothing is said here about hours on an A100."
    title = f"## Full width at which growing saves {PAPER_HOURS:.0f} hours\n\n"
    header = ("stack", "arm", "full width: hours saved", f"{PAPER_HOURS:.0f} h at", "how")
    return (
        title
        + table(header, rows)
        + f"\n{remark}\nWidths other than {raw['main_width']} are measured coarsely, once.\n"
    )


def _validation_section(raw: Raw) -> str:
    if not raw["validation"]:
        return f"## Validation\n\nNot done: {raw['not_validated']}\n"
    rows = []
    for v in (validated(raw, each) for each in raw["validation"]):
        verdict = "yes" if v["holds"] else "**no**"
        drift = ["-", "-"]
        if v["machine_speed"] is not None:
            drift = [f"{v['machine_speed']:.2f}", f"{v['error_at_that_speed']:+.1%}"]
        rows.append(
            [v["name"], v["frames"], f"{v['projected_seconds']:.1f}", f"{v['wall_seconds']:.1f}", f"{v['error']:+.1%}", verdict, *drift]
        )  # fmt: skip
    header = (
        "arm", "frames", "projected s", "complete run s", "error", f"within {TOLERANCE:.0%}", "machine's speed then", "error at that speed",
    )  # fmt: skip
    return (
        "## Validation: complete short runs of `growtrain.runs.loop.train`, projected from the same measurements\n\n"
        + table(header, rows)
    )


def _hours(hours: float) -> str:
    return f"{hours:.2f}" if hours >= 0.1 else f"{hours:.4f}"


def _extremes(values: Sequence[float], digits: int) -> str:
    """The median, and between which values it lies if there are several."""
    interval = f" [{min(values):.{digits}f} to {max(values):.{digits}f}]" if len(values) > 1 else ""
    return f"{median(values):.{digits}f}{interval}"


def _quartiles(values: Sequence[float]) -> str:
    spread = summarize(values)
    return f"{spread['q1']:.1f} to {spread['q3']:.1f}" if len(values) > 1 else "-"


def _short(value: float | str, unit: str = "", share: bool = False) -> str:
    """A number with its unit; only the word where it is unavailable, since the reason is below the table."""
    if isinstance(value, str):
        return "unavailable" if value.startswith("unavailable") else value
    return f"{value:.0%}" if share else f"{value:.0f}{unit}"


def _reasons(values: Sequence[float | str]) -> str:
    reasons = sorted({value for value in values if isinstance(value, str)})
    return "".join(f"\nGPU {reason}\n" for reason in reasons)


# --- figure


def figure(raw: Raw) -> "Figure":
    """Per stack: speed of each stage, projected hours, and where measured savings over width and the GPU's use."""
    from matplotlib.figure import Figure

    panels: list[Callable[[Axes, Raw, str], None]] = [_draw_speeds, _draw_hours]
    if sweeps(raw):
        panels.append(_draw_sweep)
    if not isinstance(gpu_mean(raw, raw["arms"][0], "utilization_mean"), str):
        panels.append(_draw_gpu)
    stacks = list(raw["stacks"])
    drawn = Figure(figsize=(6 * len(panels), 0.6 + 4.5 * len(stacks)), layout="constrained")
    grid = drawn.subplots(len(stacks), len(panels), squeeze=False)
    for row, stack in zip(grid, stacks, strict=True):
        for axes, draw in zip(row, panels, strict=True):
            draw(axes, raw, stack)
    drawn.suptitle(f"{raw['game']}, growing against full width, on {hardware(raw)}")
    return drawn


def _label_bars(axes: "Axes", labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()


def _legend(axes: "Axes", columns: int) -> None:
    axes.legend(fontsize="x-small", ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def _main_arms(raw: Raw, stack: str) -> list[Raw]:
    return [arm for arm in _arms(raw, stack) if arm["width"] == raw["main_width"]]


def _main_cells(raw: Raw, stack: str) -> list[str]:
    return list(dict.fromkeys(key for arm in _main_arms(raw, stack) for key in arm["cells"]))


def _draw_speeds(axes: "Axes", raw: Raw, stack: str) -> None:
    keys = _main_cells(raw, stack)
    for place, key in enumerate(keys):
        each = speeds(raw["stacks"][stack]["cells"][key])
        axes.barh(place, median(each), color="0.8")
        axes.plot(each, [place] * len(each), ".", color="black", markersize=4)
    _label_bars(axes, keys)
    axes.set_xlabel("frames/s (dots: repeats)")
    axes.set_title(f"{stack} stack: speed of each stage")


def _draw_hours(axes: "Axes", raw: Raw, stack: str) -> None:
    arms = _main_arms(raw, stack)
    longest = max(len(arm["cells"]) for arm in arms)
    for place, arm in enumerate(arms):
        p, left = projection_of(raw, arm), 0.0
        rest = p.startup + p.warmup + p.growth + p.checkpoints + p.records
        shades = [(str(0.85 - 0.6 * i / max(1, longest - 1)), f"stage {i}") for i in range(len(p.stages))]
        for seconds, (color, label) in zip(
            [*p.stages, p.evaluation, rest], [*shades, ("tab:blue", "evaluation"), ("tab:red", "rest")], strict=True
        ):
            axes.barh(place, seconds / 3600, left=left, color=color, label=label if place == 0 else None)
            left += seconds / 3600
        totals = total_hours(raw, arm)
        axes.plot([min(totals), max(totals)], [place, place], color="black", linewidth=1.5)
    _label_bars(axes, [arm["name"] for arm in arms])
    axes.set_xlabel(f"hours for {raw['total_frames'] / 1e6:g}M frames (line: least to greatest of the repeats)")
    axes.set_title("projected wall-clock")
    _legend(axes, 3)


def _draw_sweep(axes: "Axes", raw: Raw, stack: str) -> None:
    for sweep in sweeps(raw):
        if sweep["stack"] == stack:
            widths, hours = zip(*sweep["points"], strict=True)
            axes.plot(widths, hours, "o-", label=sweep["name"])
    axes.axhline(PAPER_HOURS, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("full width")
    axes.set_ylabel("hours saved")
    axes.set_title(f"saving over width (dotted: {PAPER_HOURS:.0f} hours)")
    axes.legend(fontsize="x-small")


def _draw_gpu(axes: "Axes", raw: Raw, stack: str) -> None:
    arms = _main_arms(raw, stack)
    for place, arm in enumerate(arms):
        used, busy, watts = gpu_mean(raw, arm, "utilization_mean"), busy_share(raw, arm), gpu_mean(raw, arm, "watts")
        for value, offset, color, label in (
            (used, -0.2, "0.8", "NVML utilisation (some kernel was resident)"),
            (busy if isinstance(busy, str) else 100 * busy, 0.2, "0.4", "kernels and copies (profiled)"),
        ):
            shown = 0.0 if isinstance(value, str) else value
            axes.barh(place + offset, shown, height=0.4, color=color, label=label if place == 0 else None)
        if not isinstance(watts, str):
            energy = f"{watts * projection_of(raw, arm).training / 3.6e6:.2f} kWh"
            axes.text(99, place, energy, va="center", ha="right", fontsize="small")
    _label_bars(axes, [arm["name"] for arm in arms])
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of training time (text: energy of training)")
    axes.set_title("GPU")
    _legend(axes, 1)
