"""At which width would growing save 20 hours of an A100? What the model of `plan --hardware` says, nothing measured.

Nikishin et al. (2023, section 5) report that a network injected once at 50M of 200M frames saves about 20 hours of wall-clock on one A100
against a large one from the start. Neither the large network nor the training loop is described to the hour. Here the least times of
growing once and thrice, in growtrain's own loop and in the strict alternation of a reference implementation, are modelled over a range of
full widths; the width at which the difference is 20 hours is looked for, and how it moves with every constant.

    python benchmarks/limits_paper.py --output results/limits_paper

1. Hours are of training; evaluations, which the paper's hours may hold, are listed apart.
2. The least times are those of `growtrain.planning.limits`. Where everything is twice as slow as there, growing saves twice the hours.
3. Widths are of the head's hidden layer alone: the encoder is the Nature DQN's.

Units: hours; hidden units.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from recording import describe_machine, say, table, write_outputs

from growtrain.environments.make import spec_of
from growtrain.planning.costs import make_plan
from growtrain.planning.hardware import HARDWARE, Hardware, hardware_named
from growtrain.planning.limits import Model, Stack
from growtrain.settings.presets import paper
from growtrain.settings.text import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_HOURS = 20.0
WIDTHS = tuple(1024 * 2**step for step in range(9))  # full widths
GRANULE = 128  # of full widths: small ones are multiples of 32
SCHEDULES = {"grow1x": 2, "grow3x": 4}  # with the full width in small ones
WAYS: dict[str, dict[str, Any]] = {
    "the paper's anchors": {"anchor": "frozen"},
    "mirrored": {"anchor": "mirrored"},
    "network": {"freeze": "network"},
}
LANES = 64  # as many as a GPU needs
COMPARED = ("a100", "h100", "h200", "rtx4090")


def width_that_saves(model: Model, hardware: Hardware, hours: float, times: int) -> int | None:
    """The least full width from which on growing saves so many hours, to 128 units; None: it does not up to the widest.

    Args:
        model: of a schedule that ends with `times` the small width.
        hardware: what it is asked of.
        hours: to be saved.
        times: full widths in small ones.
    """

    def saves(full: int) -> bool:
        return model.limit(hardware, full // times).saved_hours >= hours

    if not saves(WIDTHS[-1]):
        return None
    low, high = 0, next(place for place, full in enumerate(WIDTHS) if all(map(saves, WIDTHS[place:])))
    if high == 0:
        return WIDTHS[0]
    low, top = WIDTHS[high - 1] // GRANULE, WIDTHS[high] // GRANULE
    while top - low > 1:
        middle = (low + top) // 2
        low, top = (low, middle) if saves(middle * GRANULE) else (middle, top)
    return top * GRANULE


def model_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Models everything; returns the record that goes into the JSON file."""
    hardware = hardware_named(arguments.hardware)
    spec = spec_of(paper())
    curves, jobs, moves = [], [], []
    for stack in get_args(Stack):
        for schedule, times in SCHEDULES.items():
            for way, settings in WAYS.items():
                say(f"{stack}, {schedule}, {way}")
                config = paper(schedule=schedule, **settings)
                model = Model(config, spec, stack)
                limits = [model.limit(hardware, full // times) for full in WIDTHS]
                at = width_that_saves(model, hardware, PAPER_HOURS, times)
                curve = {"stack": stack, "schedule": schedule, "way": way, "width_at_20h": at}
                curve["full_hours"] = [limit.baseline_hours for limit in limits]
                curve["saved_hours"] = [limit.saved_hours for limit in limits]
                if at is not None:
                    limit = model.limit(hardware, at // times)
                    plan = make_plan(paper(schedule=schedule, width=at // times, **settings), spec)
                    curve |= {
                        "hours_at_20h": limit.baseline_hours,
                        "gigabytes_at_20h": plan.memory.needed("cuda")["GPU"] / 1e9,
                    }
                curves.append(curve)
                if way == next(iter(WAYS)):
                    moved = {
                        name: [
                            width_that_saves(model, hardware.with_scaled(name, factor), PAPER_HOURS, times)
                            for factor in (0.5, 2.0)
                        ]
                        for name in hardware.constants
                    }
                    slower = [width_that_saves(model, hardware, PAPER_HOURS / factor, times) for factor in (2.0, 4.0)]
                    moves.append({"stack": stack, "schedule": schedule, "constants": moved, "slower": slower})
                if schedule == "grow3x":
                    many = [Model(paper(num_envs=LANES, **settings), spec, stack)] if stack == "fast" else []
                    for each in (model, *many):
                        jobs += [_job(each, HARDWARE[name], way) for name in COMPARED]
    machine = describe_machine()
    return {
        "benchmark": "limits_paper",
        "measured": False,
        "command": machine["command"],
        "date": machine["date"],
        "git_commit": machine["git_commit"],
        "hardware": hardware.title,
        "widths": WIDTHS,
        "curves": curves,
        "moves": moves,
        "jobs": jobs,
        "constants": {
            row.title: {name: {"value": c.value, "source": c.source} for name, c in row.constants.items()}
            for row in HARDWARE.values()
        },
    }


def _job(model: Model, hardware: Hardware, way: str) -> dict[str, Any]:
    limit = model.limit(hardware)
    return {
        "stack": model.stack,
        "num_envs": model.config.num_envs,
        "width": model.config.width,
        "hardware": hardware.title,
        "way": way,
        "hours": limit.training_hours,
        "full_hours": limit.baseline_hours,
        "evaluation_hours": limit.evaluation_hours,
        "bounds": [stage.bound for stage in limit.stages],
    }


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    widths, curves = record["widths"], record["curves"]
    first = next(c for c in curves if c["schedule"] == "grow1x" and c["stack"] == "fast")
    lines = [
        "# The least time on hardware that was not at hand: modelled, not measured",
        "",
        f"- Command: `{record['command']}`; commit {(record['git_commit'] or 'unknown')[:12]}; {record['date']}",
        "- Model: `growtrain/planning/limits.py`. Hours are of training 200M frames of Phoenix with the paper preset; no evaluation",
        "- **No GPU has measured any of this.** Constants and their sources: [below](#constants-and-sources)",
        "",
        f"## The paper's {PAPER_HOURS:.0f} hours of an A100",
        "",
        f"Hours that growing saves on one {record['hardware']}, by full width; negative: growing takes longer. The last columns:",
        f"the full width from which on it saves {PAPER_HOURS:.0f} hours, what a run of that width takes, and the device memory of growing.",
        "",
    ]
    header = ["stack", "schedule", "frozen", *map(_short, widths), f"{PAPER_HOURS:.0f} h from", "full width's h", "GB"]
    rows = []
    for curve in curves:
        at = curve["width_at_20h"]
        end = (
            [_width(at), f"{curve['hours_at_20h']:.0f}", f"{curve['gigabytes_at_20h']:.0f}"]
            if at
            else [_width(at), "", ""]
        )
        saved = (f"{hours:+.2f}" if abs(hours) < 10 else f"{hours:+.0f}" for hours in curve["saved_hours"])
        rows.append([curve["stack"], curve["schedule"], curve["way"], *saved, *end])
    lines += [table(header, rows)]
    lines.append(
        f"In the `fast` stack a run takes {', '.join(f'{hours:.2f}' for hours in first['full_hours'][:3])} h at full widths of "
        f"{', '.join(map(_short, widths[:3]))}, too short to save {PAPER_HOURS:.0f} hours of it."
    )
    lines += [
        "",
        "![Hours saved by width](limits_paper.svg)",
        "",
        "### What moves it",
        "",
        f"The full width from which on the paper's anchors save {PAPER_HOURS:.0f} hours, with one constant halved / doubled; `everything`",
        "is twice / four times as slow.",
        "",
    ]
    names = list(record["moves"][0]["constants"])
    rows = [
        [name.replace("_", " "), *(" / ".join(map(_width, move["constants"][name])) for move in record["moves"])]
        for name in names
    ]
    rows.append(["**everything**", *(" / ".join(map(_width, move["slower"])) for move in record["moves"])])
    lines += [table(["constant", *(f"{move['stack']}, {move['schedule']}" for move in record["moves"])], rows)]
    lines += [
        "## The main job",
        "",
        f"`--schedule grow3x`, width {record['jobs'][0]['width']}. What binds is what training waits for, stage by stage: learning, or",
        "playing, which is emulators and the launches of what acts and stores.",
        "",
    ]
    rows = [
        [
            f"{job['stack']}, {job['num_envs']} environment{'s' if job['num_envs'] > 1 else ''}",
            job["hardware"],
            job["way"],
            f"{job['hours']:.2f}",
            f"{job['full_hours']:.2f}",
            f"{job['full_hours'] - job['hours']:+.2f}",
            f"{1 - job['hours'] / job['full_hours']:+.0%}",
            f"{job['evaluation_hours']:.2f}",
            ", ".join(dict.fromkeys(job["bounds"])),
        ]
        for job in sorted(record["jobs"], key=lambda job: (job["stack"], job["num_envs"], job["hardware"]))
    ]
    header = ["stack", "hardware", "frozen", "grow3x, h", "full3x, h", "saved, h", "saved", "evaluation, h", "binds"]
    lines += [table(header, rows)]
    lines += ["## Constants and sources", "", "SI units: FLOP/s, bytes, bytes/s, seconds, frames/s.", ""]
    rows = [
        [title, name.replace("_", " "), f"{constant['value']:.3g}", constant["source"]]
        for title, constants in record["constants"].items()
        for name, constant in constants.items()
    ]
    shared = [
        row for row in rows if all(row[1:] in [r[1:] for r in rows if r[0] == title] for title in record["constants"])
    ]
    once = {tuple(row[1:]): ["all of them", *row[1:]] for row in shared}
    lines += [
        table(
            ["hardware", "constant", "value", "source"], [*(row for row in rows if row not in shared), *once.values()]
        )
    ]
    return "\n".join(lines)


def draw(record: dict[str, Any]) -> "Figure":
    """The figure: per stack, hours saved over the full width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    stacks = list(dict.fromkeys(curve["stack"] for curve in record["curves"]))
    axes = figure.subplots(1, len(stacks), sharey=True)
    colors = dict(zip(WAYS, ("#b5412b", "#1f6f8b", "#2a9d4a"), strict=True))
    titles = {
        "fast": "fast: CUDA graph, 8 environments beside it",
        "reference": "reference: operators launched one by one,\none environment in strict alternation",
    }
    for panel, stack in zip(axes, stacks, strict=True):
        for curve in (curve for curve in record["curves"] if curve["stack"] == stack):
            dash, marker = {"grow1x": ("--", "s"), "grow3x": ("-", "o")}[curve["schedule"]]
            label = f"{curve['schedule']}, {curve['way']}"
            color = colors[curve["way"]]
            panel.plot(
                record["widths"], curve["saved_hours"], dash, marker=marker, markersize=4, color=color, label=label
            )
        panel.axhline(PAPER_HOURS, color="black", linewidth=0.9, linestyle=":")
        panel.axhline(0, color="#888888", linewidth=0.6)
        panel.text(record["widths"][0], PAPER_HOURS * 1.12, "the paper's 20 hours", fontsize=8)
        panel.set_xscale("log", base=2)
        panel.set_yscale("symlog", linthresh=1)
        panel.set_xticks(record["widths"], [_short(width) for width in record["widths"]])
        panel.minorticks_off()
        panel.grid(axis="y", color="#e3e3e3")
        panel.set_xlabel("full width, hidden units")
        panel.set_title(titles[stack], fontsize=10)
    axes[0].set_yticks([-10, -1, 0, 1, 10, 100], ["-10", "-1", "0", "1", "10", "100"])
    axes[0].set_ylabel("hours saved by growing, 200M frames")
    figure.suptitle(f"Modelled, not measured: {record['hardware']}", fontsize=11, fontweight="bold")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _short(width: int) -> str:
    return f"{width // 1024}k" if width >= 10_000 else str(width)


def _width(width: int | None) -> str:
    return f"> {_short(WIDTHS[-1])}" if width is None else f"{width:,}"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--hardware", default="a100", help=f"of the widths: {', '.join(HARDWARE)}")
    parser.add_argument("--output", type=Path, help="path without suffix; .json, .md and .svg are added")
    parser.add_argument(
        "--figures-from", type=Path, metavar="JSON", help="written before: no modelling, .md and .svg anew"
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Models, or reads what was modelled; prints the report and writes the files."""
    arguments = parse(words)
    try:
        source: Path | None = arguments.figures_from
        record = json.loads(source.read_text(encoding="utf-8")) if source else model_all(arguments)
    except (ConfigError, OSError) as error:
        say(f"limits_paper: {error}")
        return 2
    text = report(record)
    print(text)
    output = arguments.output or (source and source.with_suffix(""))
    if output:
        write_outputs(output, record, text, partial(draw, record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
