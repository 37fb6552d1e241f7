"""What a probe showed: paired differences between arms as a table with intervals, sentences made from them, and a figure.

The late error of an arm is its mean error over the tasks from half-way on, where every arm has been intervened in. Arms of one seed share
frames, targets, batches and their past, so differences are taken within a seed. Intervals are 95 % t intervals over seeds; below
`MIN_SEEDS` seeds there is none.

Units: errors are mean squared errors divided by the target's variance.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growtrain.analysis.plots import PALETTE, to_svg
from growtrain.plasticity.verdicts import LEVEL, MIN_SEEDS, holm, interval, upper_tail
from growtrain.probe.arms import FRESH, WARM, arms
from growtrain.probe.cells import Record, complete, read_config
from growtrain.probe.settings import SETTINGS, Cell, ProbeConfig, setting_of
from growtrain.settings.text import ConfigError
from growtrain.telemetry.sinks import read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEFAULT_INIT = "scale=1 uniform default-bias"
ANCHORS = ("frozen", "zero", "mirrored")

Scores = Mapping[int, float]  # by seed


@dataclass(frozen=True)
class Difference:
    """A paired difference over seeds.

    Attributes:
        mean: over the seeds that both have.
        low, high: 95 % t interval; None below `MIN_SEEDS` seeds.
        p: probability of such a mean, or one farther from 0, where there is no difference (Student's t, two-sided).
        num_seeds: how many seeds.
    """

    mean: float
    low: float | None
    high: float | None
    p: float
    num_seeds: int

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval excludes zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        interval = f"no interval: n = {self.num_seeds}" if self.low is None else f"{self.low:+.3f}, {self.high:+.3f}"
        return f"{self.mean:+.3f} [{interval}]"


def paired(scores: Scores, reference: Scores) -> Difference | None:
    """Scores minus reference over the seeds that both have; None without any."""
    seeds = sorted(scores.keys() & reference.keys())
    if not seeds:
        return None
    values = [scores[seed] - reference[seed] for seed in seeds]
    mean = statistics.fmean(values)
    if (ends := interval(values)) is None:
        return Difference(mean, None, None, 1.0, len(values))
    error = statistics.stdev(values) / math.sqrt(len(values))
    p = 2 * upper_tail(abs(mean) / error, len(values) - 1) if error else float(mean == 0)
    return Difference(mean, *ends, p, len(values))


@dataclass(frozen=True)
class Comparison:
    """All arms of one setting and kind of targets.

    Attributes:
        setting, targets: which.
        records: of every complete arm by seed, one per task.
        half: the first of the late tasks.
    """

    setting: str
    targets: str
    records: Mapping[str, Mapping[int, Sequence[Record]]]
    half: int

    def late(self, arm: str) -> dict[int, float]:
        """The late error by seed."""
        return {
            seed: statistics.fmean(r["error"] for r in rs[self.half :])
            for seed, rs in self.records.get(arm, {}).items()
        }

    def versus(self, arm: str, reference: str) -> Difference | None:
        """The paired difference of late errors."""
        return paired(self.late(arm), self.late(reference))

    def last(self, arm: str, name: str) -> float:
        """A diagnostic after the last task, mean over seeds."""
        return statistics.fmean(rs[-1][name] for rs in self.records[arm].values())


def comparisons(config: ProbeConfig, records: Sequence[Record]) -> list[Comparison]:
    """The complete arms, by setting and targets, in the order of `SETTINGS` and of `arms`."""
    done = complete(config, records)
    found: dict[tuple[str, str], dict[str, dict[int, Sequence[Record]]]] = {}
    for cell, arm in sorted(done, key=lambda key: _order(config, *key)):
        found.setdefault((cell.setting, cell.targets), {}).setdefault(arm, {})[cell.seed] = done[cell, arm]
    return [Comparison(*key, by_arm, config.num_tasks // 2) for key, by_arm in found.items()]


def _order(config: ProbeConfig, cell: Cell, arm: str) -> tuple[int, str, str, int, int]:
    named = list(SETTINGS)
    place = named.index(cell.setting) if cell.setting in named else len(named)
    return place, cell.setting, cell.targets, list(arms(config)).index(arm), cell.seed


def report(config: ProbeConfig, records: Sequence[Record], about: Mapping[str, Any]) -> str:
    """The Markdown report.

    Args:
        config: of the records.
        records: all there are; incomplete arms are left out.
        about: what `config.json` holds.
    """
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    per_arm = [r["seconds"] for r in records]
    lines = [
        "# What gives plasticity back"
        if config.sweep == "none"
        else "# Which initialisation of the injected head matters",
        "",
        f"- Probe: {', '.join(f'{name} {value}' for name, value in dataclasses.asdict(config).items() if value != '')}",
        f"- Machine: {about['device']}; {versions}",
        f"- {len(per_arm)} records; one task takes {statistics.fmean(per_arm):.2f} s of one thread"
        if per_arm
        else "- no records yet",
        f"- Late error: mean over tasks {config.num_tasks // 2} to {config.num_tasks - 1}, then over seeds; 1 is nothing learned.",
        "- Differences are paired by seed, with 95 % t intervals, each by itself; better or worse is said by Holm's step-down over arms.",
        "",
    ]
    for comparison in comparisons(config, records):
        lines += [f"## Setting `{comparison.setting}`, targets `{comparison.targets}`", ""]
        optimizer = about["settings"].get(comparison.setting) or dataclasses.asdict(setting_of(comparison.setting))
        lines += [f"{', '.join(f'{name} {value}' for name, value in optimizer.items())}.", ""]
        lines += [f"- {sentence}" for sentence in conclusions(comparison)] + ["", *table(comparison), ""]
        if config.sweep == "init":
            lines += [*_effects_table(comparison), ""]
    return "\n".join(lines)


def table(comparison: Comparison) -> list[str]:
    """Every arm against the warm start and against its reference, as Markdown lines."""
    reference = "the default" if DEFAULT_INIT in comparison.records else "the frozen anchor"
    lines = [
        f"| arm | seeds | late error | minus warm start | minus {reference} | effective rank | dormant encoder | dormant head |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in comparison.records:
        late = comparison.late(arm)
        other = _reference(arm)
        against = comparison.versus(arm, other) if other else None
        lines.append(
            f"| {arm} | {len(late)} | {statistics.fmean(late.values()):.3f} | {_cell(arm, comparison.versus(arm, WARM))} | "
            f"{_cell(other, against) if arm != other else ''} | {comparison.last(arm, 'effective_rank'):.1f} | "
            f"{comparison.last(arm, 'dormant_encoder'):.2f} | {comparison.last(arm, 'dormant_head'):.2f} |"
        )
    return lines


def _reference(arm: str) -> str:
    """What an arm is compared with besides the warm start."""
    if arm.startswith("scale="):
        return DEFAULT_INIT
    return next((arm.replace(anchor, "frozen") for anchor in ANCHORS if arm.startswith(f"inject-{anchor}")), "")


def _cell(name: str, difference: Difference | None) -> str:
    return "" if difference is None or name == WARM else str(difference)


def effects(comparison: Comparison) -> dict[tuple[str, str], Difference]:
    """For each property of the initialisation and each value but the default: the mean over all arms that have it, minus the default's.

    Seeds that lack an arm are left out.
    """
    names = [name for name in comparison.records if name.startswith("scale=")]
    seeds = set.intersection(*(set(comparison.records[name]) for name in names)) if names else set()
    found = {}
    for place, (kind, default) in enumerate(zip(("scale", "distribution", "bias"), DEFAULT_INIT.split(), strict=True)):
        by_value: dict[str, list[dict[int, float]]] = {}
        for name in names:
            by_value.setdefault(name.split()[place], []).append(comparison.late(name))
        means = {
            value: {seed: statistics.fmean(late[seed] for late in lates) for seed in seeds}
            for value, lates in by_value.items()
        }
        for value in means:
            difference = paired(means[value], means.get(default, {}))
            if value != default and difference is not None:
                found[kind, value] = difference
    return found


def _effects_table(comparison: Comparison) -> list[str]:
    rows = [f"| {kind} | {value} | {difference} |" for (kind, value), difference in effects(comparison).items()]
    return ["| property | value | minus the default, mean over the other properties |", "|---|---|---|", *rows]


def conclusions(comparison: Comparison) -> list[str]:
    """What the differences say, in sentences; nothing is said that an interval does not."""
    sentences = [
        text
        for text in (_loss(comparison), _sorted_arms(comparison), *(_anchor(comparison, *key) for key in _PAIRS))
        if text
    ]
    found = effects(comparison)
    for kind in ("scale", "distribution", "bias"):
        told = [f"{value} {d}" for (k, value), d in found.items() if k == kind and d.sign]
        if any(k == kind for k, _ in found):
            sentences.append(f"The {kind} matters: {'; '.join(told)}." if told else f"No effect of the {kind} shows.")
    return sentences


_PAIRS = [(f"inject-{anchor}{times}", f"inject-frozen{times}") for times in ("", "-3x") for anchor in ANCHORS[1:]]


def _loss(comparison: Comparison) -> str:
    """Whether the warm start has lost plasticity."""
    difference = comparison.versus(WARM, FRESH)
    if difference is None:
        return ""
    warm, fresh = (statistics.fmean(comparison.late(arm).values()) for arm in (WARM, FRESH))
    said = {1: "learns less than", 0: "is not told apart from", -1: "learns more than"}[difference.sign]
    return f"A warm start {said} a fresh network: late error {warm:.3f} against {fresh:.3f}, difference {difference}."


def _sorted_arms(comparison: Comparison) -> str:
    """Which arms are better or worse than the warm start, where chance does not explain it among so many (Holm's step-down)."""
    found = {arm: comparison.versus(arm, WARM) for arm in comparison.records if arm != WARM}
    known = {arm: difference for arm, difference in found.items() if difference is not None}
    by_sign: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    for (arm, difference), p in zip(known.items(), holm([each.p for each in known.values()]), strict=True):
        by_sign[difference.sign if p <= LEVEL else 0].append(f"{arm} {difference.mean:+.3f}")
    names = {-1: "Better than a warm start", 0: "Not told apart from it", 1: "Worse"}
    return " ".join(f"{names[sign]}: {', '.join(by_sign[sign]) or 'none'}." for sign in names)


def _anchor(comparison: Comparison, arm: str, reference: str) -> str:
    """Whether a cheap anchor restores what the paper's does."""
    difference = comparison.versus(arm, reference)
    if difference is None:
        return ""
    text = f"{arm} minus {reference}: {difference}: "
    if difference.low is None or difference.high is None:
        return text + f"nothing follows from fewer than {MIN_SEEDS} seeds."
    if difference.sign:
        return text + ("it restores less." if difference.sign > 0 else "it restores more.")
    gain = comparison.versus(reference, WARM)
    scale = f"; {reference} itself gains {-gain.mean:.3f} over the warm start" if gain else ""
    largest = max(-difference.low, difference.high)
    return text + f"no difference shows; one beyond {largest:.3f} is excluded{scale}."


# The figure

_CURVES = {
    "resets": (WARM, FRESH, "reset-head-every", "reset-encoder", "reset-head", "fresh-optimizer", "shrink-perturb"),
    "injections": (WARM, "inject-frozen", "inject-zero", "inject-mirrored", "inject-whole", "inject-freeze-encoder"),
    "three injections": (WARM, FRESH, "inject-frozen-3x", "inject-zero-3x", "inject-mirrored-3x"),
}


def draw(config: ProbeConfig, records: Sequence[Record]) -> "Figure":
    """One row per setting and targets: errors against tasks (mean and range over seeds), and all differences to the warm start."""
    from matplotlib.figure import Figure

    found = comparisons(config, records)
    curves = _CURVES if config.sweep == "none" else {}
    figure = Figure(figsize=(4.6 * (len(curves) + 1), 3.8 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), len(curves) + 1, squeeze=False)
    for row, comparison in zip(rows, found, strict=True):
        for axes, (title, names) in zip(row, curves.items(), strict=False):
            _draw_curves(axes, comparison, names)
            axes.set_title(f"{comparison.setting}, {comparison.targets}: {title}", fontsize=10)
        _draw_differences(row[-1], comparison)
    return figure


def _draw_curves(axes: "Axes", comparison: Comparison, names: Sequence[str]) -> None:
    styles = ("-", "--", "-.", ":")
    present = [name for name in names if name in comparison.records]
    for index, name in enumerate(present):
        curves = [[r["error"] for r in rs] for rs in comparison.records[name].values()]
        tasks = range(len(curves[0]))
        color = PALETTE[index % len(PALETTE)]
        low, high, mean = (
            [pick(column) for column in zip(*curves, strict=True)] for pick in (min, max, statistics.fmean)
        )
        axes.fill_between(tasks, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(tasks, mean, styles[index % len(styles)], color=color, label=name)
    once_or_thrice = [name for name in present if name.startswith("inject")]
    for task in sorted(
        {
            r["task"]
            for name in once_or_thrice
            for rs in comparison.records[name].values()
            for r in rs
            if r["intervened"]
        }
    ):
        axes.axvline(task, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="task (dotted: injections)", ylabel="error / variance")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def _draw_differences(axes: "Axes", comparison: Comparison) -> None:
    pairs = [(arm, d) for arm in comparison.records if arm != WARM and (d := comparison.versus(arm, WARM))]
    for place, (_, d) in enumerate(pairs):
        color = {-1: PALETTE[3], 0: "0.5", 1: PALETTE[2]}[d.sign]
        axes.plot(d.mean, place, {-1: "o", 0: "s", 1: "^"}[d.sign], color=color)
        if d.low is not None and d.high is not None:
            axes.hlines(place, d.low, d.high, color=color)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(pairs)), [arm for arm, _ in pairs], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("late error minus warm start's (left is better)", fontsize=8)
    axes.set_title(f"{comparison.setting}, {comparison.targets}: 95 % intervals", fontsize=10)


def write_report(directory: Path) -> str:
    """Makes `probe.md` and, where matplotlib is installed, `probe.svg` from a directory's records; returns the report.

    Raises:
        ConfigError: the directory holds no probe.
    """
    import importlib.util

    config = read_config(directory)
    try:
        records = read_jsonl(directory / "probe.jsonl")
    except OSError as error:
        raise ConfigError(f"{directory} holds no records: run growtrain probe --output {directory}") from error
    text = report(config, records, json.loads((directory / "config.json").read_text(encoding="utf-8")))
    (directory / "probe.md").write_text(text, encoding="utf-8")
    if comparisons(config, records) and importlib.util.find_spec("matplotlib") is not None:
        (directory / "probe.svg").write_text(to_svg(draw(config, records)), encoding="utf-8")
    return text
