"""Growing against full width: time, GPU utilisation, energy, and what both come to over 200M frames.

    python benchmarks/run_wallclock.py --minutes 10 --output results/wallclock-cpu
    python benchmarks/run_wallclock.py --figures-from results/wallclock-cpu.json

Every stage of every arm is a *cell*: a learner grown to that stage by the training loop's own growth, played with the training loop's
own step (`Run.step`) on real games. The cells of a stack take turns, so that whatever disturbs the machine disturbs all
of them; they share one replay, filled beforehand by random play, whose speed is that of the frames before learning. Growth, evaluation,
checkpoints, records and start-up are timed apart and charged to the arm that causes them. `wallclock_cells.py` times a cell,
`wallclock_hours.py` turns the raw numbers into hours, `wallclock_report.py` into tables and a figure.

Deviations from a complete run: 1. the replay holds less than it would (`--cell-capacity`); checkpoints are scaled to what it would hold.
2. Copies of the target network, one in 30,000 agent steps, are left out.

A projection is compared with complete short runs, which come after the windows. A machine may be faster or slower by then: a gauge, the
same updates each time, is read before every round of windows and around every complete run.

Units: seconds on a monotonic clock that stands still in suspend; frames; transitions.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args
from unittest import mock

os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as `growtrain` does, before torch is imported

import torch
from recording import describe_machine, say, write_outputs
from wallclock_cells import (
    Cell,
    Gauge,
    build,
    cell_config,
    measure_busy,
    measure_window,
    open_stack,
    window_seconds,
)
from wallclock_hours import Work, costs_of, project, summary
from wallclock_report import figure, markdown

from growtrain.commands.commandline import Parser, add_config_flags, explicit_settings
from growtrain.environments.atari import FRAME_SKIP, make_spec
from growtrain.environments.base import Spec
from growtrain.environments.games import canonical_game
from growtrain.learners.gradient_step import MIN_UPDATES_TO_COMPILE
from growtrain.learners.make import resolve_device
from growtrain.planning.costs import full_width, make_plan
from growtrain.runs.loop import train
from growtrain.runs.run import Run
from growtrain.settings.config import Anchor, Config, Freeze
from growtrain.settings.presets import resolve
from growtrain.settings.schedules import make_schedule
from growtrain.settings.text import ConfigError, parse_count
from growtrain.telemetry.sinks import read_jsonl

MIN_WINDOW = 0.5  # seconds


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to spend the budget: `overrides` of the command line's settings, and one cell per stage."""

    name: str
    stack: str
    overrides: dict[str, Any]
    config: Config
    small_width: int
    full_width: int
    baseline: bool
    cells: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Cells that take turns; all of one stack and one small width."""

    stack: str
    kind: str
    arms: tuple[Arm, ...]
    repeats: int

    @property
    def weight(self) -> int:
        """Windows to measure."""
        return self.repeats * len({key for arm in self.arms for key in arm.cells})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    try:
        options = _parser().parse_strict(sys.argv[1:] if arguments is None else arguments)
        if options.figures_from:
            raw = json.loads(options.figures_from.read_text(encoding="utf-8"))
            write(options.output or options.figures_from.with_suffix(""), raw)
        else:
            measure(options)
        return 0
    except ConfigError as error:
        print(f"run_wallclock: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def measure(options: argparse.Namespace) -> None:
    """Measures everything asked for, writing the files as it goes."""
    start = time.perf_counter()
    explicit = explicit_settings(options)
    if "game" in explicit:
        explicit["game"] = canonical_game(explicit["game"])
    config, _ = resolve(explicit.get("preset", "paper"), explicit)
    device = resolve_device(config.device)
    torch.set_num_threads(config.threads)
    jobs = make_jobs(options, explicit)
    reserve = 1.2 * options.validate_seconds * options.validate_repeats * len(_validated_arms(options, jobs))
    raw: dict[str, Any] = {
        "game": config.game,
        "total_frames": config.total_frames,
        "main_width": config.width,
        "machine": describe_machine(device.type),
        "stacks": {},
        "arms": [],
        "machine_speed": [],
        "validation": [],
        "not_validated": "the measurement did not get that far",
        "stopped_early": False,
    }
    name = torch.cuda.get_device_name(device).lower().replace(" ", "-") if device.type == "cuda" else "cpu"
    output = options.output or Path("results") / f"wallclock-{name}"
    # Explicit seconds are kept to; otherwise each job gets its share of the time that is left.
    end = start + 60 * options.minutes - reserve
    with tempfile.TemporaryDirectory(prefix="wallclock-") as scratch:
        for stack in dict.fromkeys(job.stack for job in jobs):
            with ExitStack() as open_runs:
                run = _open_stack(jobs, stack, options, Path(scratch), raw, open_runs)
                for place, job in enumerate(jobs):
                    if job.stack == stack:
                        share = job.weight / sum(later.weight for later in jobs[place:])
                        now = time.perf_counter()
                        measure_job(run, job, raw, options, now + share * max(0.0, end - now), output, Path(scratch))
        validate(options, explicit, jobs, raw, Path(scratch))
    raw["seconds"] = time.perf_counter() - start
    write(output, raw)


def write(output: Path, raw: dict[str, Any], *, figures: bool = True) -> None:
    """Writes JSON and Markdown, and at the end prints it and draws the figure."""
    text = markdown(raw)
    if figures:
        print(text)
    write_outputs(output, raw | {"summary": summary(raw)}, text, partial(figure, raw) if figures else None)


# --- what is measured


def make_jobs(options: argparse.Namespace, explicit: dict[str, Any]) -> list[Job]:
    """Per stack: the arms at the width asked for, repeated, and once those of each other width of the sweep."""
    jobs = []
    for stack in ("fast", "reference") if options.stack == "both" else (options.stack,):
        regime = {"num_envs": 1, "execution": "eager"} if stack == "reference" else {}
        width = resolve(explicit.get("preset", "paper"), explicit)[0].width
        for small in dict.fromkeys([width, *options.width_sweep]):
            main = small == width
            anchors = options.anchors if main else options.sweep_anchors or options.anchors[:1]
            arms = make_arms(options, explicit | regime | {"width": small}, stack, anchors)
            jobs.append(
                Job(
                    stack=stack,
                    kind="main" if main else "sweep",
                    arms=arms,
                    repeats=options.repeats if main else 1,
                )
            )
    return jobs


def make_arms(
    options: argparse.Namespace, settings: dict[str, Any], stack: str, anchors: Sequence[Anchor]
) -> tuple[Arm, ...]:
    """The growing arms of one small width, one for each form of injection and choice of a frozen encoder, and their baselines."""
    preset = settings.get("preset", "paper")
    config, _ = resolve(preset, settings)
    injections = len(make_schedule(config.schedule, config.total_frames, config.learning_starts).injection_frames)
    if not injections or full_width(config) == config:
        raise ConfigError(f"--schedule {config.schedule} never grows: choose grow1x, grow3x or at:...")
    arms, baselines, small = [], {}, config.width
    forms = [{"freeze": "heads", "anchor": anchor} for anchor in anchors] if "heads" in options.forms else []
    if "network" in options.forms:
        forms.append({"freeze": "network"})
    for form in forms:
        full = full_width(resolve(preset, {**settings, **form})[0])
        # With a cold encoder full width is fewer units on a wider encoder.
        cold = f", encoder {full.encoder_width:g}" if full.encoder_width != config.encoder_width else ""
        baselines["full, cold" if cold else f"full{injections}x"] = (full, f"w{small} full width {full.width}{cold}")
        for freeze in options.freezes:
            name = form.get("anchor", "network")
            cells = [f"w{small} stage 0"]
            for stage in range(1, 1 + injections):
                cells.append(
                    f"w{small} {name} stage {stage}" + (f" encoder frozen@{freeze}" if 0 < freeze <= stage else "")
                )
            overrides = {**settings, **form, "freeze_encoder_at": freeze}
            suffix = f", encoder frozen from {freeze}" if freeze else ""
            arms.append((f"{config.schedule} {name}{suffix}", overrides, full.width, False, tuple(cells)))
    for name, (full, cell) in baselines.items():
        overrides = {**settings, "schedule": "fixed", "width": full.width, "encoder_width": full.encoder_width}
        arms.append((name, overrides, full.width, True, (cell,)))
    return tuple(
        Arm(
            name=name,
            stack=stack,
            overrides=overrides,
            config=resolve(preset, overrides)[0],
            small_width=small,
            full_width=width,
            baseline=baseline,
            cells=cells,
        )
        for name, overrides, width, baseline, cells in arms
    )


def work_of(config: Config, spec: Spec) -> Work:
    """What a run of a configuration does, counted as the training loop does it."""
    stages = make_plan(config, spec).stages
    period, capacity = config.checkpoint_period, config.replay_capacity
    frames = [*range(period, config.total_frames, period), config.total_frames] if period else [config.total_frames]
    new = [min(capacity, (b - a) // FRAME_SKIP) for a, b in zip([0, *frames], frames, strict=False)]
    warmup, every = min(config.learning_starts, stages[0].frames), config.diagnostics_period
    return Work(
        warmup_frames=warmup,
        stage_frames=[stage.frames - (warmup if stage.stage == 0 else 0) for stage in stages],
        evaluations=[stage.evaluations for stage in stages],
        eval_frames=config.expected_eval_frames,
        checkpoints=[sum(stage.start_frame < f <= stage.end_frame for f in frames) for stage in stages],
        checkpoint_transitions=sum(new),
        records=-(-config.total_frames // config.log_period),
        diagnostics=[stage.end_frame // every - stage.start_frame // every for stage in stages] if every else [],
        sweep_rows=[min(capacity, stage.start_frame // FRAME_SKIP) if stage.flops_of_sweep else 0 for stage in stages],
    )


# --- measuring


def _open_stack(
    jobs: Sequence[Job],
    stack: str,
    options: argparse.Namespace,
    scratch: Path,
    raw: dict[str, Any],
    open_runs: ExitStack,
) -> Run:
    config = next(job for job in jobs if job.stack == stack).arms[0].config
    say(f"{stack}: filling the replay with {options.fill} transitions")
    run, raw["stacks"][stack] = open_stack(
        cell_config(config, options.fill, options.cell_capacity), scratch / stack, open_runs
    )
    return run


def measure_job(
    run: Run, job: Job, raw: dict[str, Any], options: argparse.Namespace, end: float, output: Path, scratch: Path
) -> None:
    """Builds a job's cells and lets them take turns; without `--seconds`, until about `end`.

    The files are written after every turn of all cells, and again after the profiling: whatever ends the measurement, they hold what
    was measured until then.
    """
    with ExitStack() as open_cells:
        _take_turns(_build_cells(run, job, options, scratch, open_cells), run, job, raw, options, end, output)


def _build_cells(
    run: Run, job: Job, options: argparse.Namespace, scratch: Path, open_cells: ExitStack
) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for arm in job.arms:
        plan = make_plan(arm.config, run.learner.spec)
        config = cell_config(arm.config, options.fill, options.cell_capacity)
        for stage, key in enumerate(arm.cells):
            if key not in cells:
                run_dir = scratch / f"{job.stack}-{job.kind}-{arm.small_width}-{len(cells)}"
                cells[key] = build(run, config, stage, run_dir, open_cells)
                cells[key].record |= {
                    "live_width": plan.stages[stage].live_width,
                    "frozen_width": plan.stages[stage].frozen_width,
                    "flops_per_update": plan.stages[stage].flops_per_update,
                }
                say(f"{job.stack}: {key} is ready")
    return cells


def _take_turns(
    cells: dict[str, Cell],
    run: Run,
    job: Job,
    raw: dict[str, Any],
    options: argparse.Namespace,
    end: float,
    output: Path,
) -> None:
    seconds: float | None = options.seconds
    stack, left = raw["stacks"][job.stack], job.weight
    gauged = job.kind == "main" and job.stack == "fast" and options.validate
    gauge = Gauge(job.arms[0].config, run.learner.spec, run.device) if gauged else None
    for repeat in range(job.repeats):
        if gauge is not None:
            raw["machine_speed"].append(gauge())
        if repeat and seconds is None and time.perf_counter() > end:
            raw["stopped_early"] = True
            break
        for key, cell in cells.items():
            starts = [each["start_seconds"] for other in cells.values() for each in other.record["evaluations"]]
            share = window_seconds(end - time.perf_counter(), left, median(starts or [0.0]))
            left -= 1
            window = measure_window(cell, seconds or max(MIN_WINDOW, share))
            say(f"{job.stack} {repeat + 1}/{job.repeats}: {key}: {window['frames'] / window['seconds']:.0f} frames/s")
        if not repeat:
            stack["cells"] |= {key: cell.record for key, cell in cells.items()}
            raw["arms"] += [_described(arm, run.learner.spec) for arm in job.arms]
        write(output, raw, figures=False)
    for cell in cells.values():
        measure_busy(cell)
    write(output, raw, figures=False)


def _described(arm: Arm, spec: Spec) -> dict[str, Any]:
    return {
        "name": arm.name,
        "stack": arm.stack,
        "width": arm.small_width,
        "full_width": arm.full_width,
        "baseline": arm.baseline,
        "anchor": None if arm.baseline else "network" if arm.config.freeze == "network" else arm.config.anchor,
        "cells": list(arm.cells),
        "work": dataclasses.asdict(work_of(arm.config, spec)),
    }


# --- validation


def _validated_arms(options: argparse.Namespace, jobs: Sequence[Job]) -> list[Arm]:
    """The arms of the fast stack at the width asked for, which complete runs can be compared with."""
    if not options.validate:
        return []
    arms = [arm for job in jobs if job.kind == "main" and job.stack == "fast" for arm in job.arms]
    return arms if options.validate_all else [arms[0], *(arm for arm in arms if arm.baseline)] if arms else []


def validate(
    options: argparse.Namespace, explicit: dict[str, Any], jobs: Sequence[Job], raw: dict[str, Any], scratch: Path
) -> None:
    """Complete short runs by `growtrain.runs.loop.train`, to be compared with their projections."""
    raw["not_validated"] = (
        "complete runs have the fast stack's loop" if options.validate else "turned off with --no-validate"
    )
    arms = _validated_arms(options, jobs) * options.validate_repeats
    if not arms:
        return
    gauge = Gauge(
        arms[0].config, make_spec(raw["stacks"]["fast"]["num_actions"]), resolve_device(arms[0].config.device)
    )
    for arm in arms:
        place = next(i for i, a in enumerate(raw["arms"]) if a["name"] == arm.name and a["stack"] == "fast")
        stack = raw["stacks"]["fast"]
        config = _short_run(arm, stack, raw["arms"][place], options.validate_seconds)
        say(f"validation: {arm.name}, {config.total_frames} frames")
        start = time.perf_counter()
        number = len(raw["validation"])
        (scratch / f"startup-{number}").mkdir()
        with Run(config, scratch / f"startup-{number}").recording():
            pass
        startup = time.perf_counter() - start
        before = gauge()
        run_dir, start = scratch / f"validation-{number}", time.perf_counter()
        with mock.patch("growtrain.learners.gradient_step.MIN_UPDATES_TO_COMPILE_ALL", 0):  # as in a run of full length
            for _ in train(config, run_dir):
                pass
        wall = time.perf_counter() - start
        work = work_of(config, make_spec(stack["num_actions"]))
        if lengths := [record["eval_frames"] for record in read_jsonl(run_dir / "evaluations.jsonl")]:
            # Whole episodes, of any length.
            work = dataclasses.replace(work, eval_frames=round(sum(lengths) / len(lengths)))
        raw["validation"].append(
            {
                "arm": place,
                "frames": config.total_frames,
                "wall_seconds": wall,
                "machine_speed": [before, gauge()],
                "startup_seconds": startup,
                "work": dataclasses.asdict(work),
                "run_summary": json.loads((run_dir / "summary.json").read_text(encoding="utf-8")),
            }
        )


def _short_run(arm: Arm, stack: dict[str, Any], raw_arm: dict[str, Any], seconds: float) -> Config:
    """The arm's configuration with the budget that is projected to take about `seconds`; what shrinks with a budget does, flag or not.

    It is long enough for its optimizer's step to be compiled, as that of the long run and of the cells is.
    """
    shrinking = {item.name for item in dataclasses.fields(Config) if item.metadata["shrinks"]}
    settings = {name: value for name, value in arm.overrides.items() if name not in shrinking}
    costs = costs_of(stack, raw_arm, compiled=True)
    granule = 8 * FRAME_SKIP * arm.config.num_envs
    # A short run's warm-up is a twentieth at most.
    least = 1.25 * MIN_UPDATES_TO_COMPILE * FRAME_SKIP / arm.config.replay_ratio

    def at(frames: float) -> Config:
        total = math.ceil(max(least, frames) / granule) * granule
        return resolve(arm.config.preset, {**settings, "total_frames": total})[0]

    config = at(seconds * min(costs.speeds))
    for _ in range(4):
        projected = project(work_of(config, make_spec(stack["num_actions"])), costs)
        config = at(config.total_frames * seconds / max(1e-9, projected.total - projected.startup))
    return config


# --- command line


def _parser() -> Parser:
    parser = Parser(
        prog="run_wallclock",
        description="Growing against full width: time, GPU utilisation, energy, projection to 200M frames.",
        conflict_handler="resolve",  # two of Config's flags take lists here
    )
    add_config_flags(parser)
    parser.add_argument("--anchor", dest="anchors", type=_anchors, default=["frozen"], help="growing arms, as a,b,c")
    parser.add_argument(
        "--freeze-encoder-at", dest="freezes", type=_counts, default=[0], help="arms that freeze it, as 0,1 (0: never)"
    )
    parser.add_argument(
        "--freeze", dest="forms", type=_forms, default=["heads"], help="heads, network, or heads,network"
    )
    parser.add_argument("--stack", choices=("fast", "reference", "both"), default="fast")
    parser.add_argument("--width-sweep", type=_counts, default=[], help="small widths, as 512,1024,2048")
    parser.add_argument("--sweep-anchor", dest="sweep_anchors", type=_anchors, help="default: the first of --anchor")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10.0, help="budget of the whole measurement")
    parser.add_argument("--seconds", type=float, help="per cell and repeat, instead of a share of --minutes")
    parser.add_argument("--fill", type=parse_count, default=20_000, help="transitions in the replay beforehand")
    parser.add_argument("--cell-capacity", type=parse_count, default=50_000, help="transitions it holds")
    parser.add_argument("--validate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--validate-all", action="store_true", help="all arms, not just the first and the baseline")
    parser.add_argument("--validate-repeats", type=int, default=1, help="complete runs of each arm, in turn")
    parser.add_argument(
        "--validate-seconds", type=float, default=60.0, help="of each complete run, at least 10k updates long"
    )
    parser.add_argument("--output", type=Path, help="files without suffix (default: results/wallclock-<device>)")
    parser.add_argument("--figures-from", type=Path, metavar="JSON", help="measure nothing, make the files again")
    return parser


def _anchors(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in get_args(Anchor)]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown: choose from {', '.join(get_args(Anchor))}")
    return names


def _forms(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in get_args(Freeze)]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown: choose from {', '.join(get_args(Freeze))}")
    return names


def _counts(text: str) -> list[int]:
    try:
        return [parse_count(part) for part in text.split(",") if part]
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
