"""The runs of a study: which arm each belongs to, and which arms are compared.

An arm is a schedule with the settings that decide what is learned; a cell is an arm on a game; its runs differ in their seed.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from growtrain.analysis.runs import Curve, Run, StagePrice, evaluation_curve, part_of, training_curve
from growtrain.environments.games import parts_of, reference_scores
from growtrain.settings.config import Config, has_effect
from growtrain.settings.text import ConfigError, flag

HEALTHY = ("done", "running")
_ORDER = ("full3x", "full1x", "grow3x", "grow1x", "adaptive", "fixed")
T = TypeVar("T")
_GROWING = ("grow", "at:", "adaptive")


@dataclass(frozen=True)
class Entry:
    """A run in a study: its arm, its curve, and the run that stands for it if the same cell and seed were run again.

    `curve` is of training scores, `evaluated` of evaluations; `prices` are what each stage of it takes.
    """

    run: Run
    arm: str
    curve: Curve
    evaluated: Curve
    superseded_by: str = ""
    prices: tuple[StagePrice, ...] = ()


@dataclass(frozen=True)
class Study:
    """Runs by arm and game.

    Attributes:
        entries: every run.
        arms: labels, the wide networks first, of them the one with the most runs that count.
        schedules: schedule of each arm.
        settings: of each arm, those that decide what is learned, as far as they have an effect in it.
        games: every game that any run plays, by name; a chain is one, until `by_part`, which has its games in order.
        budgets: of each game in frames, the least of the runs that count.
        evaluated: whether runs are judged by their evaluations.
        chains: of each part of a chain, the chain.
    """

    entries: list[Entry]
    arms: list[str]
    schedules: dict[str, str]
    settings: dict[str, dict[str, str]]
    games: list[str]
    budgets: dict[str, int]
    evaluated: bool = False
    chains: Mapping[str, str] = field(default_factory=dict)

    def cell(self, arm: str, game: str) -> list[Entry]:
        """The runs of an arm on a game, one for each seed."""
        return [e for e in self.entries if e.arm == arm and e.run.game == game and not e.superseded_by]

    def by_evaluation(self) -> "Study":
        """The same runs, judged by their evaluations."""
        return replace(self, entries=[replace(entry, curve=entry.evaluated) for entry in self.entries], evaluated=True)

    def by_part(self) -> "Study":
        """The same, the games of a chain each for itself, from the switch to it on."""
        split = [(entry, _parts(entry.run)) for entry in self.entries]
        if all(len(parts) == 1 for _, parts in split):
            return self
        budgets = least_budgets([part for entry, parts in split for part in parts if not entry.superseded_by])
        entries = [
            replace(
                entry,
                run=part,
                curve=training_curve(part, entry.prices, budgets.get(part.game, 0)),
                evaluated=evaluation_curve(part, entry.prices),
            )
            for entry, parts in split
            for part in parts
        ]
        in_order = sorted(split, key=lambda pair: pair[0].run.game)
        games = list(dict.fromkeys(part.game for _, parts in in_order for part in parts))
        chains = {part.game: entry.run.game for entry, parts in split for part in parts if part is not entry.run}
        return replace(self, entries=entries, games=games, budgets=budgets, chains=chains)

    def between(self, arms: Sequence[str]) -> "Study":
        """The same, these arms' training scores being of as many frames as the shortest budget among them allows, whatever others had."""
        budgets = least_budgets([e.run for e in self.entries if e.arm in arms and not e.superseded_by])
        if self.evaluated or all(budget == self.budgets[game] for game, budget in budgets.items()):
            return self
        entries = [
            replace(e, curve=training_curve(e.run, e.prices, budgets[e.run.game])) if e.arm in arms else e
            for e in self.entries
        ]
        return replace(self, entries=entries, budgets=self.budgets | budgets)

    @property
    def scored_games(self) -> list[str]:
        """The games whose scores can be normalised."""
        return [game for game in self.games if reference_scores(game)]


def make_study(runs: Sequence[Run]) -> Study:
    """Sorts runs into arms and games."""
    decided = [_decided(run) for run in runs]
    labels = _labels(runs, decided)
    # One that was stopped does not know what its last stages would have taken; of the others the one that got through most stages does.
    done = [(label, run) for label, run in zip(labels, runs, strict=True) if run.status == "done" and run.stage_costs]
    done.sort(key=lambda pair: sum(stage.frames > 0 for stage in pair[1].stage_costs))
    costs = {(label, run.game): run.stage_costs for label, run in done}
    best = _best(runs, labels)
    budgets = least_budgets(list(best.values()))
    entries = []
    for label, run in zip(labels, runs, strict=True):
        # What an update takes depends on arm and game alone, so a run without a summary has it from a done one, unless it is a fork.
        prices = run.stage_costs if run.summary or run.has_other_past else costs.get((label, run.game), ())
        chosen = best[label, run.game, run.seed]
        curves = training_curve(run, prices, budgets[run.game]), evaluation_curve(run, prices)
        entries.append(Entry(run, label, *curves, "" if chosen is run else chosen.name, tuple(prices)))
    schedules = {entry.arm: entry.run.schedule for entry in entries}
    settings = dict(zip(labels, decided, strict=True))
    num_runs = Counter(label for (label, _, _), run in best.items() if run.status in HEALTHY)
    first, *others = sorted(schedules, key=lambda arm: (_rank(schedules[arm]), -num_runs[arm], arm))
    # Of a schedule's arms those come first that differ least from what they are compared with.
    others.sort(key=lambda arm: (_rank(schedules[arm]), _distance(settings[arm], settings[first]), arm))
    return Study(entries, [first, *others], schedules, settings, sorted(budgets), budgets)


def _parts(run: Run) -> list[Run]:
    """A run's games each for itself; the run where that is a single one, or where its settings cannot be read."""
    config = _config_of(run)
    if config is None or not config.switch_frames:
        return [run]
    ends, names = config.game_ends, parts_of(config.game)
    return [part_of(run, *each) for each in zip(names, [0, *ends], ends, strict=False)]


def those_that_count(those: Sequence[T], run_of: Callable[[T], Run]) -> list[T]:
    """Of some runs the healthy ones; where there are none, those that did not fail, and where there are none of these, all."""
    healthy = [each for each in those if run_of(each).status in HEALTHY]
    return healthy or [each for each in those if run_of(each).status != "failed"] or list(those)


def least_budgets(runs: Sequence[Run]) -> dict[str, int]:
    """The least budget of the runs of each game that count; by as many frames are their scores compared."""
    found = {}
    for game in {run.game for run in runs}:
        counted = those_that_count([run for run in runs if run.game == game and run.budget > 0], lambda run: run)
        found[game] = min((run.budget for run in counted), default=0)
    return found


def _best(runs: Sequence[Run], labels: Sequence[str]) -> dict[tuple[str, str, int], Run]:
    """The run that stands for an arm, a game and a seed: a healthy one, the longest."""
    best: dict[tuple[str, str, int], Run] = {}
    for label, run in zip(labels, runs, strict=True):
        key = (label, run.game, run.seed)
        if key not in best or (run.status in HEALTHY, run.frames) > (best[key].status in HEALTHY, best[key].frames):
            best[key] = run
    return best


def _rank(schedule: str) -> int:
    return _ORDER.index(schedule) if schedule in _ORDER else len(_ORDER)


def _labels(runs: Sequence[Run], decided: Sequence[dict[str, str]]) -> list[str]:
    """Schedule, and the settings that say which runs of it are meant: those in which they differ, and those that most runs have otherwise.

    Args:
        runs: all of a study's.
        decided: what decides what each of them learns.
    """
    among_all: dict[str, Counter[str]] = defaultdict(Counter)
    of_schedule: dict[tuple[str, str], set[str]] = defaultdict(set)
    for run, each in zip(runs, decided, strict=True):
        for name, value in each.items():
            among_all[name][value] += 1
            of_schedule[run.schedule, name].add(value)
    usual = {name: values.most_common(1)[0][0] for name, values in among_all.items()}

    def is_named(schedule: str, name: str, value: str) -> bool:
        return value != usual[name] or len(of_schedule[schedule, name]) > 1

    return [
        ", ".join(
            [
                run.schedule,
                *(f"{flag(name)} {value}" for name, value in each.items() if is_named(run.schedule, name, value)),
            ]
        )
        for run, each in zip(runs, decided, strict=True)
    ]


def _decided(run: Run) -> dict[str, str]:
    """The settings that decide what a run learns, but for game, schedule and seed, as far as they have an effect in it."""
    config = _config_of(run)
    return {
        name: str(run.settings.get(name, item.default))
        for name, item in Config.__dataclass_fields__.items()
        if item.metadata["identity"] and name not in ("game", "schedule", "seed")
        if config is None or has_effect(name, config)  # of another version: all that it says counts
    }


def _config_of(run: Run) -> Config | None:
    """A run's settings, the default where one is not said; None of another version's."""
    with contextlib.suppress(ConfigError, TypeError):
        return Config(**{n: run.settings.get(n, item.default) for n, item in Config.__dataclass_fields__.items()})
    return None


def reference_of(study: Study, arm: str) -> str | None:
    """The arm to compare with, None for the first: of a growing network, or one that never grows, its full width, of an alternative
    to growth the growing one.
    """
    if arm == study.arms[0]:
        return None
    schedule = study.schedules[arm]
    if schedule.startswith(("full", "fixed")):
        wide = [each for each in study.arms if study.schedules[each].startswith("full")]
        return nearest(study, arm, wide) if wide and schedule == "fixed" else study.arms[0]
    growing = schedule.startswith(_GROWING)
    wanted = (
        (schedule.replace("grow", "full"), "full3x", "full1x", "fixed") if growing else ("grow3x", "grow1x", "fixed")
    )
    for candidate in (name for name in wanted if name != schedule):
        same = [each for each in study.arms if study.schedules[each] == candidate]
        if same:
            return nearest(study, arm, same)
    return study.arms[0]


def nearest(study: Study, arm: str, among: Sequence[str]) -> str:
    """Of some arms the first whose settings differ least from an arm's."""
    return min(among, key=lambda other: _distance(study.settings[arm], study.settings[other]))


def _distance(settings: Mapping[str, str], others: Mapping[str, str]) -> int:
    """How many settings differ, of those that have an effect in both."""
    return sum(settings.get(name, value) != value for name, value in others.items())


def pairs_of(study: Study) -> list[tuple[str, str]]:
    """Every arm with its reference; a growing one also with the first arm, the small network that does not grow, the first that grows, and
    its nearest.
    """
    found = [(arm, reference) for arm in study.arms if (reference := reference_of(study, arm)) is not None]
    growing = [arm for arm in study.arms if study.schedules[arm].startswith(_GROWING)]
    small = [arm for arm in study.arms if study.schedules[arm] == "fixed"]
    for place, arm in enumerate(growing):
        alike = (study.arms[:1], small, growing[:1], growing[:place][::-1])
        others = [nearest(study, arm, among) for among in alike if among]
        found += [(arm, other) for other in dict.fromkeys(others) if other != arm and (arm, other) not in found]
    # What the project is about comes first: growing against its full width.
    return sorted(found, key=lambda pair: not study.schedules[pair[0]].startswith("grow"))
