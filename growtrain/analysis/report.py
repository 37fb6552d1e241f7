"""The report on a set of runs: what they show first, then aggregates, curves, costs, what is missing, and the commands behind it.

Everything drawn or said is computed from the run directories; running and failed runs are part of it.

Units: frames; scores in game points for one game, normalised for several.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from growtrain.analysis import figures, tables
from growtrain.analysis.aggregate import MIN_RUNS, FloatArray, Scores, iqm, mean, median, optimality_gap, score_estimate
from growtrain.analysis.commands import command_of, shell_line
from growtrain.analysis.comparison import (
    MARGIN,
    Comparison,
    arm_cells,
    arm_scores,
    compare,
    episodes_at,
    interval_text,
    limits,
    score_at,
    verdict,
)
from growtrain.analysis.pages import (
    Block,
    Figure,
    Heading,
    Items,
    Listing,
    Paragraph,
    Table,
    compact,
    to_html,
    to_markdown,
)
from growtrain.analysis.runs import find_runs, ledger_notes
from growtrain.analysis.study import Study, make_study, pairs_of, reference_of
from growtrain.environments.games import normalization, reference_scores, references_of, zeros_of
from growtrain.settings.text import episodes_text, format_count

_BOOTSTRAP_SEED = 0  # the same runs give the same report
_AGGREGATES: dict[str, Callable[[Scores], FloatArray]] = {
    "IQM": iqm,
    "Median": median,
    "Mean": mean,
    "Optimality gap": optimality_gap,
}


def write_report(paths: Sequence[Path], output: Path, command: Sequence[str]) -> tuple[Path, str]:
    """Writes `report.html`, `report.md` and `figures/*.svg` into `output`, over an older report.

    Args:
        paths: runs, or directories that hold runs.
        output: made if missing.
        command: the words that asked for this report.

    Returns:
        The HTML file, and the verdict.

    Raises:
        ConfigError: a path holds no run.
    """
    title, blocks = compose(make_study(find_runs(paths)), command, ledger_notes(paths))
    folder = output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {f"{block.name}.svg": block.svg for block in blocks if isinstance(block, Figure)}
    for old in folder.glob("*.svg"):
        if old.name not in drawn:
            old.unlink()
    for name, svg in drawn.items():
        (folder / name).write_text(svg, encoding="utf-8")
    (output / "report.md").write_text(to_markdown(title, blocks, folder.name), encoding="utf-8")
    (output / "report.html").write_text(to_html(title, blocks), encoding="utf-8")
    return output / "report.html", next(b.text for b in blocks if isinstance(b, Paragraph) and b.strong)


def compose(whole: Study, command: Sequence[str], ledger_notes: Sequence[str]) -> tuple[str, list[Block]]:
    """The report's title and blocks."""
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    study = whole.by_part()
    by_evaluation = study.by_evaluation()
    compared, evaluated = (
        [compare(each, arm, reference, rng) for arm, reference in pairs_of(study)] for each in (study, by_evaluation)
    )
    at = limits(study, study.arms, "frames")
    games = ", ".join(whole.games) if len(whole.games) <= 4 else f"{len(whole.games)} games"
    blocks: list[Block] = [
        *_verdict(whole, compared, evaluated),
        *_aggregate(study, at, rng),
        *tables.comparisons(compared),
        *tables.evaluations(evaluated),
        *_evaluated_curves(by_evaluation, rng),
        *_games(study, at, rng),
        *tables.costs(whole),
        *_diagnostics(study),
        *tables.holdings(whole, ledger_notes),
        *tables.runs(
            whole,
            {entry.run.path for game in at for arm in study.arms for entry in figures.scored(study, arm, game, at)},
        ),
        *_commands(whole, command),
        *_method(study, at, has_chains=study is not whole),
    ]
    arms = ", ".join(study.arms) if len(study.arms) <= 3 else f"{len(study.arms)} arms"
    return f"{arms} on {games}", blocks


def _verdict(study: Study, compared: list[Comparison], evaluated: list[Comparison]) -> list[Block]:
    others: list[str] = []
    more: list[str] = []
    if compared:
        first, *rest = map(verdict, compared, evaluated)
        for pair, text in zip(compared[1:], rest, strict=True):
            (others if pair.reference == reference_of(study, pair.arm) else more).append(text)
    elif any(len(entry.curve.frames) for entry in study.entries):
        first = f"Only {study.arms[0]} was run: there is nothing to compare it with."
    else:
        first = "No run has a score yet: none has trained for a tenth of its budget and seen an episode end."
    statuses = Counter(entry.run.status for entry in study.entries)
    holds = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    empty = [f"{arm} on {game}" for game in study.games for arm in study.arms if not study.cell(arm, game)]
    lacks = (
        f" No run of {', '.join(empty[:3])}{f' and {len(empty) - 3} more cells' if len(empty) > 3 else ''}."
        if empty
        else ""
    )
    read = time.strftime("%Y-%m-%d %H:%M")
    about = f"{len(study.entries)} runs: {holds}.{lacks} Brackets are 95 % intervals over seeds. Read {read}."
    blocks: list[Block] = [Paragraph(first, strong=True)]
    blocks += [Items(others)] if others else []
    blocks += [Items(more, f"{len(more)} more {'pairs' if len(more) > 1 else 'pair'} of arms")] if more else []
    return [*blocks, Paragraph(about)]


def _aggregate(study: Study, at: dict[str, float], rng: np.random.Generator) -> list[Block]:
    games = [game for game in study.scored_games if game in at]
    blocks: list[Block] = [Heading("All games together")]
    unscored = [game for game in study.games if game not in study.scored_games]
    if unscored:
        blocks.append(Paragraph(f"Left out, for want of reference scores: {', '.join(unscored)}."))
    if not games:
        return [*blocks, Paragraph("No game has a score that can be normalised yet.")]
    rows, found = [], {}
    for arm in study.arms:
        scores = arm_scores(study, arm, "frames", at, games)
        empty = [game for game, values in zip(games, scores, strict=True) if np.isnan(values).all()]
        if empty:
            rows.append([arm, *["-"] * (1 + len(_AGGREGATES)), f"no aggregate: no score on {', '.join(empty)}"])
            continue
        cells = arm_cells(study, arm, "frames", at, games)
        estimates = [score_estimate(statistic, cells, rng=rng) for statistic in _AGGREGATES.values()]
        found[arm] = estimates
        runs = f"{estimates[0].runs}" + (f" ({estimates[0].missing} missing)" if estimates[0].missing else "")
        note = f"no interval: {estimates[0].reason}" if estimates[0].reason else ""
        rows.append([arm, runs, *map(interval_text, estimates), note])
    blocks.append(compact(["arm", "runs", *_AGGREGATES, "note"], rows))
    frames = ", ".join(sorted({format_count(at[game]) for game in games}))
    how = references_of(games)
    scope = f"{how[0].upper()}{how[1:]}-normalised scores at {frames} frames over {len(games)} game{'s' if len(games) > 1 else ''}"
    if found:
        arms = list(found)
        blocks += [
            figures.aggregate_figure(study, list(_AGGREGATES), found, scope),
            figures.curves_figure(study, arms, games, at, rng),
            figures.profiles_figure(study, arms, games, rng),
        ]
    return blocks


def _evaluated_curves(study: Study, rng: np.random.Generator) -> list[Block]:
    """Of the arms that were evaluated on every game, if there are two."""
    at = limits(study, study.arms, "frames")
    games = [game for game in study.scored_games if game in at]
    arms = [
        arm
        for arm in study.arms
        if games and not any(np.isnan(values).all() for values in arm_scores(study, arm, "frames", at, games))
    ]
    if len(arms) < 2:
        return []
    return [figures.curves_figure(study, arms, games, at, rng, name="evaluation-curves", of="evaluations")]


def _games(study: Study, at: dict[str, float], rng: np.random.Generator) -> list[Block]:
    rows = []
    for game in study.games:
        row = [game, format_count(at[game]) if game in at else "-"]
        for arm in study.arms:
            cell = study.cell(arm, game) if game in at else []
            scores = np.array([score_at(entry, "frames", at[game]) for entry in cell])
            found = score_estimate(mean, [scores], rng=rng)
            missing = f", {found.missing} missing" if found.missing else ""
            behind = [n for entry in cell if not np.isnan(n := episodes_at(entry, "frames", at[game]))]
            each = f" ({episodes_text(behind)} each)" if behind else ""
            row.append(f"{interval_text(found)} n={found.runs}{missing}{each}" if cell else "-")
        known = reference_scores(game)
        rows.append([*row, "{:g} / {:g}".format(*known) if known else "-"])
    text = (
        "Mean score in game points over seeds, of the training episodes that ended in the last tenth of the budget. n is the "
        f"number of seeds, beside it are the episodes behind the score of each; below {MIN_RUNS} seeds there is no interval, because "
        "so few runs hardly tell how much they spread."
    )
    drawn = [figures.game_figure(study, index, game, at, rng) for index, game in enumerate(study.games)]
    table = Table(["game", "at frames", *study.arms, f"{zeros_of(study.games)} / {references_of(study.games)}"], rows)
    return [Heading("Each game"), Paragraph(text), table, *drawn]


def _diagnostics(study: Study) -> list[Block]:
    drawn = [figures.diagnostics_figure(study, index, game) for index, game in enumerate(study.games)]
    found = [figure for figure in drawn if figure is not None]
    return [Heading("Diagnostics"), *found] if found else []


def _commands(study: Study, command: Sequence[str]) -> list[Block]:
    lines = ["# this report", shell_line(command)]
    for entry in study.entries:
        known = bool(entry.run.settings)
        given = (
            ", which began beside the network of a file (rescue FILE)" if entry.run.settings.get("frozen_width") else ""
        )
        lines += [
            f"# {entry.run.name}{given}",
            shell_line(command_of(entry.run.settings)) if known else "# settings unknown",
        ]
    text = (
        "Each run by the settings in its config.json. A run that was forked, or resumed with changes, has a longer history "
        "than its command; the table above says so."
    )
    return [Heading("Commands"), Paragraph(text), Listing(lines)]


def _method(study: Study, at: dict[str, float], *, has_chains: bool) -> list[Block]:
    frames = ", ".join(sorted({format_count(value) for value in at.values()})) or "no"
    score = (
        "Score of a run at a moment: mean true return of the training episodes that ended in the last tenth of its budget, of the least of "
        "a game's where they differ (where none did, of the newest), at the exploration epsilon of the time. Where few episodes ended, "
        "those that did are the shorter ones, and such a score swings: their number n is beside it. Evaluations play the learned policy "
        "alone, at the epsilon of evaluations: each judges one snapshot, and swings more."
    )
    where = (
        f"All arms together are compared at {frames} frames, pairs at equal frames, wall-clock and FLOPs: each time the "
        "greatest value that every run of the arms has reached that is done or running. Runs that ended before are missing "
        "there, and counted as missing. An axis on which a run has no score yet by then is left out."
    )
    normalized = (
        f"{normalization(study.games)} The mean over games hangs on games "
        "with a small span between the two, such as Video Pinball: prefer the interquartile mean (IQM)."
    )
    intervals = (
        "Intervals: 95 %; of scores, of their differences, and of paired ones by Student's t with Welch's degrees of freedom, the standard "
        "error of an IQM being the bootstrap's with runs resampled within each game; of ratios, of P(improvement) and in the figures "
        f"percentiles of that bootstrap (seed {_BOOTSTRAP_SEED}), which are too narrow with few seeds. In simulations those of IQMs missed "
        "in 1 to 6 cases of 100, but in 8 where one arm had 3 seeds, the other 10, and one game spread much more than the other, and in 9 "
        "where runs either succeeded or failed. They speak of other seeds on these "
        "games, not of other games, and are not corrected for the number of comparisons. An interval that contains 0 does not show that "
        f"two arms are equal: an arm is said to reach the other's score only where a loss of {MARGIN:.0%} of it is excluded."
    )
    axes = (
        "At equal wall-clock or FLOPs the dearer arm has played fewer frames, and the tenth of the budget behind its score is a larger "
        "share of them: where scores still rise, that is to its disadvantage."
    )
    chains = (
        "Each game of a chain is judged for itself, from the switch to it on: frames, time and FLOPs are counted from there. All games "
        "together have the first one, too, in which arms that intervene at switches have done nothing yet. What is said of several games "
        "counts each run once, with all that it has played (in the figures' bands each game as if by another run), and leaves out those "
        "that lack a score of one of them."
    )
    source = "Statistics after Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, NeurIPS 2021."
    return [
        Heading("How to read this"),
        Items([score, where, axes, *([chains] if has_chains else []), normalized, intervals, source]),
    ]
