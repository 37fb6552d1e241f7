"""What an update costs at every stage of growth, for each way to grow, against a network that had the full width from the start.

Nikishin et al. (2023, section 5, "dynamic growth") report wall-clock saved by starting small. This measures one Double-DQN update of
real learners, grown by the real transaction, in one process and in turns: a few updates of each per round, so that a slower moment of the
machine hits all of them. A ratio is taken within a round; tables show the median over the rounds and the quartiles.

    python benchmarks/growth_cost.py --widths 512 --seconds 240 --output results/growth_cost_512

1. FLOPs are those of the formula that `growtrain plan` uses, which tests hold to the count of torch's `FlopCounterMode`.
2. The target has been copied since the last growth: but for the first frames of a stage, that is what a run's updates are like.
3. A schedule's figure weights its stages by their share of the frames; acting, environments, sampling and the growth itself are not in it.
4. Every learner has one batch of noise in memory. The first update of a turn is not timed: in a run, the update before was this learner's,
   too.

Units: seconds; FLOPs of one update (2 per multiply-add, matrix products and convolutions only); bytes.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as `python -m growtrain` does, before torch is imported

import argparse
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from recording import describe_machine, machine_lines, say, summarize, synchronize, table, with_spread, write_outputs
from tensordict import TensorDict

from growtrain.environments.base import Spec
from growtrain.environments.make import spec_of
from growtrain.growth.transaction import apply
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.make import resolve_device
from growtrain.planning.allocator import keep_freed_memory
from growtrain.planning.costs import FROZEN_HEADS_PER_INJECTION, network_shape, update_flops
from growtrain.planning.speed import keep_frozen_values, make_update, synthetic_batches
from growtrain.settings.config import PAPER_TOTAL_FRAMES, Anchor, Config, Execution
from growtrain.settings.machine import usable_cores
from growtrain.settings.presets import paper
from growtrain.settings.schedules import make_schedule
from growtrain.settings.text import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Ways to grow: the anchors of `--freeze heads`, then `--freeze network` with a warm and with a cold encoder.
FORMS: dict[str, dict[str, Any]] = {
    **{anchor: {"anchor": anchor} for anchor in get_args(Anchor)},
    "network": {"freeze": "network"},
    "cold": {"freeze": "network", "live_encoder": "cold"},
}
FULL_PARAMETERS = "full, cold"  # of as many parameters as a network has that grows by an encoder and a head each time
INJECTIONS = 3
WARM_UP_ROUNDS = 3
LEAST_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One learner to time: `stage` injections of a form, the encoder frozen from injection `freeze_encoder_at` on (0: never).

    `width` is that of one head; the references full1x and full3x are subjects at stage 0 with a wider head. `channels` is a factor on
    those of the encoder.
    """

    name: str
    width: int
    form: str | None = None
    stage: int = 0
    channels: float = 1.0
    freeze_encoder_at: int = 0

    @property
    def encoder_trains(self) -> bool:
        """Whether updates still change the encoder."""
        return not 0 < self.freeze_encoder_at <= self.stage


def stage_name(form: str, stage: int) -> str:
    """What the learner of a stage is called; stage 0 is the same for every form."""
    return f"{form} {stage}" if stage else "small"


def make_subjects(width: int, freeze_encoder_at: int) -> list[Subject]:
    """The references and all stages of all forms, for one small width and one time of freezing the encoder."""
    references = [
        Subject(name="small", width=width),
        Subject(name="full1x", width=2 * width),
        Subject(name="full3x", width=4 * width),
    ]
    forms = [form for form in FORMS if not (form == "cold" and freeze_encoder_at)]
    if "cold" in forms:
        references.append(Subject(name=FULL_PARAMETERS, width=2 * width, channels=2.0))
    return references + [
        Subject(
            name=stage_name(form, stage),
            width=width,
            form=form,
            stage=stage,
            freeze_encoder_at=freeze_encoder_at,
        )
        for form in forms
        for stage in range(1, INJECTIONS + 1)
    ]


def config_of(subject: Subject, config: Config) -> Config:
    """A configuration with the subject's encoder and way to grow."""
    form = FORMS[subject.form] if subject.form else {}
    return dataclasses.replace(config, encoder_width=config.encoder_width * subject.channels, **form)


def planned_flops(subject: Subject, config: Config, spec: Spec) -> int:
    """FLOPs of an update by the formula of `growtrain plan`."""
    config = config_of(subject, config)
    shape = network_shape(config, spec, subject.width)
    num_frozen = subject.stage * FROZEN_HEADS_PER_INJECTION[config.anchor] if config.freeze == "heads" else 0
    return update_flops(shape, config.batch_size, num_frozen, subject.encoder_trains).total


def stage_shares(schedule: str) -> list[float]:
    """The share of the frames, and so of the updates, that each stage of a schedule has."""
    lengths = make_schedule(schedule, PAPER_TOTAL_FRAMES).stage_frames(PAPER_TOTAL_FRAMES)
    return [length / PAPER_TOTAL_FRAMES for length in lengths]


def schedule_ratios(
    stages: Sequence[Sequence[float]], shares: Sequence[float], reference: Sequence[float]
) -> list[float]:
    """A whole schedule's cost relative to a reference, round by round.

    Args:
        stages: for each stage, its cost in every round.
        shares: for each stage, its share of the updates; they sum to 1.
        reference: the reference's cost in every round.
    """
    rounds = zip(*stages, strict=True)
    costs = (sum(share * cost for share, cost in zip(shares, costs, strict=True)) for costs in rounds)
    return [cost / base for cost, base in zip(costs, reference, strict=True)]


def build(subject: Subject, config: Config, spec: Spec, device: torch.device) -> tuple[DoubleDQN, TensorDict]:
    """A learner grown to the subject's stage as a run grows it, with its own batch (1, B) on the device."""
    config, generator = config_of(subject, config), torch.Generator().manual_seed(0)
    learner = DoubleDQN(config, spec, width=subject.width, device=device, generator=generator)
    batches = synthetic_batches(config, spec, 1, generator).to(device)
    learner.update(batches)  # optimizer slots exist, and the target lags, as at a growth in a run
    for stage in range(1, subject.stage + 1):
        freeze, probe = stage == subject.freeze_encoder_at, batches["observation"][0]
        if config.freeze == "network":
            learner.copy_target()
        apply(learner, "inject", probe, config=config, generator=generator, freeze_encoder=freeze)
    learner.copy_target()
    keep_frozen_values(learner, batches)
    return learner, batches


def time_rounds(
    updates: Sequence[Callable[[], object]],
    device: torch.device,
    seconds: float,
    updates_per_turn: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds per update of each learner in every round; the order of turns is reversed from round to round.

    Args:
        updates: one of each learner.
        device: waited for before and after a turn.
        seconds: how long to go on; at least `LEAST_ROUNDS` rounds are made after `WARM_UP_ROUNDS` that are not counted.
        updates_per_turn: updates of a learner before the next one's turn, after one that is not counted.
        clock: in seconds, what turns are timed by.
    """
    rounds: list[list[float]] = []
    deadline, number = float("inf"), 0
    while time.perf_counter() < deadline or len(rounds) < LEAST_ROUNDS:
        if number == WARM_UP_ROUNDS:
            deadline = time.perf_counter() + seconds
        taken = [0.0] * len(updates)
        order = range(len(updates)) if number % 2 else reversed(range(len(updates)))
        for index in order:
            updates[index]()
            synchronize(device)
            start = clock()
            for _ in range(updates_per_turn):
                updates[index]()
            synchronize(device)
            taken[index] = (clock() - start) / updates_per_turn
        if number >= WARM_UP_ROUNDS:
            rounds.append(taken)
        number += 1
    return [list(times) for times in zip(*rounds, strict=True)]


def measure(arguments: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Builds and times one group of learners after the other; returns the record that goes into the JSON file.

    Args:
        arguments: of the command line.
        keep: gets the record so far after every group.
    """
    device = resolve_device(arguments.device)
    torch.set_num_threads(arguments.num_threads or usable_cores())
    if device.type == "cpu":
        keep_freed_memory()  # as a run does
    machine = describe_machine(device.type)
    spec = spec_of(paper(game=arguments.game))
    config = paper(
        game=arguments.game,
        batch_size=arguments.batch_size,
        encoder_width=arguments.encoder_width,
        execution=arguments.execution,
        num_threads=arguments.num_threads,
    )
    groups = [(width, freeze_at) for width in arguments.widths for freeze_at in arguments.freeze_encoder_at]
    # Time in proportion to what a round costs gives every group the same number of rounds.
    work = {group: sum(planned_flops(subject, config, spec) for subject in make_subjects(*group)) for group in groups}
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "figures_from")}
    record: dict[str, Any] = {
        "benchmark": "growth_cost",
        "machine": machine,
        "settings": settings | {"device": device.type, "num_actions": spec.num_actions, "optimizer": config.optimizer},
        "warm_up_rounds": WARM_UP_ROUNDS,
        "peak_memory_bytes": 0,
        "groups": [],
    }
    for width, freeze_at in groups:
        subjects = make_subjects(width, freeze_at)
        rows: list[dict[str, Any]] = []
        updates: list[Callable[[], object]] = []
        for subject in subjects:
            learner, batches = build(subject, config, spec, device)
            rows.append(
                {
                    "name": subject.name,
                    "form": subject.form,
                    "stage": subject.stage,
                    "head_width": subject.width,
                    "encoder_trains": subject.encoder_trains,
                    "flops_planned": planned_flops(subject, config, spec),
                }
            )
            updates.append(make_update(learner, batches))
        seconds = arguments.seconds * work[width, freeze_at] / sum(work.values())
        say(
            f"width {width}, {encoder_name(freeze_at)}: {len(updates)} learners, {_peak_bytes(device) / 1e9:.2f} GB, {seconds:.0f} s"
        )
        times = time_rounds(updates, device, seconds, arguments.updates_per_turn)
        for row, row_times in zip(rows, times, strict=True):
            row["seconds"] = row_times
        record["groups"].append({"width": width, "freeze_encoder_at": freeze_at, "learners": rows})
        record["peak_memory_bytes"] = _peak_bytes(device)
        keep(record)
    return record


def analyze(group: dict[str, Any]) -> dict[str, Any]:
    """A group's ratios: per learner `time` (every round) and `flops` relative to full3x, and whole schedules by form.

    Returns:
        `stages` {name: {time, flops}} and `schedules` {(schedule, form): {time, flops}}; grow1x is relative to full1x, and left out
        where the encoder would freeze later than its only injection.
    """
    times = {row["name"]: row["seconds"] for row in group["learners"]}
    flops = {row["name"]: row["flops_planned"] for row in group["learners"]}
    stages = {
        name: {"time": schedule_ratios([times[name]], [1.0], times["full3x"]), "flops": flops[name] / flops["full3x"]}
        for name in times
    }
    schedules = {}
    for schedule, reference, last in (("grow3x", "full3x", 3), ("grow1x", "full1x", 1)):
        if group["freeze_encoder_at"] > last:
            continue
        for form in forms_of(group):
            base = FULL_PARAMETERS if form == "cold" else reference
            if form == "cold" and schedule == "grow1x":
                continue
            names, shares = [stage_name(form, stage) for stage in range(last + 1)], stage_shares(schedule)
            (flops_ratio,) = schedule_ratios([[flops[name]] for name in names], shares, [flops[base]])
            time_ratios = schedule_ratios([times[name] for name in names], shares, times[base])
            schedules[schedule, form] = {"time": time_ratios, "flops": flops_ratio}
    return {"stages": stages, "schedules": schedules}


def forms_of(group: dict[str, Any]) -> list[str]:
    """The ways to grow that a group has measured."""
    names = {row["name"] for row in group["learners"]}
    return [form for form in FORMS if stage_name(form, 1) in names]


def encoder_name(freeze_encoder_at: int) -> str:
    """How tables name a time of freezing the encoder."""
    return f"encoder frozen from injection {freeze_encoder_at}" if freeze_encoder_at else "learning encoder"


def report(record: dict[str, Any]) -> str:
    """The record as Markdown: tables, and what was done."""
    settings = record["settings"]
    rounds = [len(group["learners"][0]["seconds"]) for group in record["groups"]]
    planned = len(settings["widths"]) * len(settings["freeze_encoder_at"])
    cut = f"; cut short: {len(rounds)} of {planned} groups" if len(rounds) < planned else ""
    turns = settings["updates_per_turn"]
    lines = [
        "# What an update costs at every stage of growth",
        "",
        machine_lines(record["machine"])
        + f"- Measured: `DoubleDQN.update` on {settings['device']}, execution {settings['execution']}, batch {settings['batch_size']}, "
        f"encoder width {settings['encoder_width']:g}, {settings['optimizer']}, {settings['num_actions']} actions ({settings['game']}); "
        f"{'one update' if turns == 1 else f'{turns} updates'} of each learner per round, after one that is not timed, "
        f"{_range(rounds)} rounds after {record['warm_up_rounds']} of warm-up; peak memory {record['peak_memory_bytes'] / 1e9:.1f} GB{cut}",
        "- Cells: median over rounds of the ratio within a round [quartiles] (ratio of FLOPs)",
        "",
    ]
    for width in dict.fromkeys(group["width"] for group in record["groups"]):
        groups = [group for group in record["groups"] if group["width"] == width]
        lines += [f"## Small width {width}", "", _reference_table(groups)]
        results = [(encoder_name(group["freeze_encoder_at"]), analyze(group)) for group in groups]
        rows = [
            [
                encoder,
                form,
                *(_cell(result["stages"][stage_name(form, stage)]) for stage in range(1, INJECTIONS + 1)),
            ]
            for group, (encoder, result) in zip(groups, results, strict=True)
            for form in forms_of(group)
        ]
        lines += ["Update time, relative to full3x in the same round:", ""]
        lines += [table(["encoder", "grows by", *(f"stage {stage}" for stage in range(1, INJECTIONS + 1))], rows)]
        rows = []
        for group, (encoder, result) in zip(groups, results, strict=True):
            for form in forms_of(group):
                grow3x, grow1x = (result["schedules"].get((schedule, form)) for schedule in ("grow3x", "grow1x"))
                name = f"{form}, against the same number of parameters" if form == "cold" else form
                rows.append([encoder, name, _cell(grow3x), _cell(grow1x) if grow1x else "-"])
        lines += ["Whole schedule, stages weighted by their share of the frames:", ""]
        lines += [table(["encoder", "grows by", "grow3x / full3x", "grow1x / full1x"], rows)]
    return "\n".join(lines)


def draw(record: dict[str, Any]) -> "Figure":
    """The figure: per small width, the stages with a learning encoder, and whole schedules by anchor and encoder."""
    from matplotlib.figure import Figure

    widths = list(dict.fromkeys(group["width"] for group in record["groups"]))
    figure = Figure(figsize=(10, 3.6 * len(widths)), layout="constrained")
    axes = figure.subplots(len(widths), 2, squeeze=False)
    colors = dict(zip(FORMS, ("#b5412b", "#7a8b99", "#1f6f8b", "#2a9d4a", "#c9a227"), strict=True))
    for (left, right), width in zip(axes, widths, strict=True):
        groups = [group for group in record["groups"] if group["width"] == width]
        first = analyze(groups[0])["stages"]
        for offset, form in enumerate(forms_of(groups[0])):
            names = [stage_name(form, stage) for stage in range(INJECTIONS + 1)]
            x = [stage + 0.08 * (offset - 1) for stage in range(INJECTIONS + 1)]
            left.errorbar(x, *_bars([first[name]["time"] for name in names]), fmt="o-", color=colors[form], label=form)
            left.plot(x, [first[name]["flops"] for name in names], "x", color=colors[form])
        left.axhline(1, color="black", linewidth=0.8, linestyle=":")
        left.set_xticks(range(INJECTIONS + 1), [f"stage {stage}" for stage in range(INJECTIONS + 1)])
        left.set_ylabel("update / full3x's update")
        left.set_title(f"small width {width}, {encoder_name(groups[0]['freeze_encoder_at'])}\n(cross: FLOPs)")
        forms = forms_of(groups[0])
        for offset, form in enumerate(forms):
            measured = [
                (at, analyze(group)["schedules"]["grow3x", form])
                for at, group in enumerate(groups)
                if form in forms_of(group)
            ]
            x, schedules = (
                [at + 0.8 / len(forms) * (offset - len(forms) / 2 + 0.5) for at, _ in measured],
                [s for _, s in measured],
            )
            middles, errors = _bars([schedule["time"] for schedule in schedules])
            right.bar(x, middles, 0.75 / len(forms), yerr=errors, color=colors[form], label=form)
            right.plot(x, [schedule["flops"] for schedule in schedules], "x", color="black")
        right.axhline(1, color="black", linewidth=0.8, linestyle=":")
        right.set_xticks(range(len(groups)), [_encoder_tick(group["freeze_encoder_at"]) for group in groups])
        right.set_ylabel("grow3x / full3x")
        right.set_title("updates of the whole schedule\n(cross: FLOPs)")
        for panel in (left, right):
            panel.set_ylim(bottom=0)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _encoder_tick(freeze_encoder_at: int) -> str:
    return f"encoder frozen\nfrom injection {freeze_encoder_at}" if freeze_encoder_at else "learning\nencoder"


def _bars(values: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """Medians, and the distances to the quartiles below and above."""
    summaries = [summarize(series) for series in values]
    below = [s["median"] - s["q1"] for s in summaries]
    above = [s["q3"] - s["median"] for s in summaries]
    return [s["median"] for s in summaries], [below, above]


def _reference_table(groups: Sequence[dict[str, Any]]) -> str:
    cells = []
    for name in ("small", "full1x", "full3x"):
        rows = [next(row for row in group["learners"] if row["name"] == name) for group in groups]
        milliseconds = [1e3 * seconds for row in rows for seconds in row["seconds"]]
        stages = [analyze(group)["stages"][name] for group in groups]
        ratio = _cell({"time": [seconds for stage in stages for seconds in stage["time"]], "flops": stages[0]["flops"]})
        gflop = f"{rows[0]['flops_planned'] / 1e9:.3f}"
        cells.append([name, rows[0]["head_width"], with_spread(milliseconds, 1), gflop, ratio])
    return table(["reference", "head", "ms per update", "GFLOP per update", "/ full3x"], cells)


def _cell(ratio: dict[str, Any]) -> str:
    return f"{with_spread(ratio['time'])} ({ratio['flops']:.2f})"


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(min(counts))


def _peak_bytes(device: torch.device) -> int:
    """Most memory used so far: what PyTorch has allocated of a GPU, or the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 2048], help="small widths")
    parser.add_argument("--freeze-encoder-at", type=int, nargs="+", default=[0, 1, 2], choices=range(INJECTIONS + 1))
    parser.add_argument("--seconds", type=float, default=240.0, help="of timing in all; building comes on top")
    parser.add_argument(
        "--updates-per-turn", type=int, default=3, help="on a GPU take 20 or more: a turn is waited for"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--encoder-width", type=float, default=1.0, help="factor on the convolutions' channels")
    parser.add_argument("--game", default="phoenix", help="decides the number of actions")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--execution", default="auto", choices=get_args(Execution))
    parser.add_argument("--num-threads", type=int, default=0, help="0: all that this process may use")
    parser.add_argument("--output", type=Path, help="path without suffix; .json, .md and .svg are added")
    parser.add_argument("--figures-from", type=Path, help="a .json written before: no measuring, .md and .svg anew")
    arguments = parser.parse_args(words)
    if arguments.seconds <= 0 or arguments.updates_per_turn < 1 or min(arguments.widths) < 1:
        parser.error("--seconds, --updates-per-turn and --widths must be positive")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Measures, or reads what was measured; prints the report and writes the files, those of numbers after every group."""
    arguments = parse(words)
    output = arguments.output or (arguments.figures_from and arguments.figures_from.with_suffix(""))

    def keep(record: dict[str, Any]) -> None:
        if output:
            write_outputs(output, record, report(record))

    try:
        record = (
            json.loads(arguments.figures_from.read_text(encoding="utf-8"))
            if arguments.figures_from
            else measure(arguments, keep)
        )
    except (ConfigError, OSError) as error:
        say(f"growth_cost: {error}")
        return 2
    text = report(record)
    print(text)
    if output:
        write_outputs(output, record, text, partial(draw, record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
