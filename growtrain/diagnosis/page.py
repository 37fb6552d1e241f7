"""A diagnosis and how it is told: as JSON, as a Markdown page, as a figure, and as the command to run next.

Units: frames; returns are true scores; gains are shares (see `verdicts`).
"""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from growtrain.analysis.plots import to_svg
from growtrain.plasticity.divergence import Divergence
from growtrain.plasticity.learning_test import COPIES, Copy, LearningTest, mean_errors
from growtrain.plasticity.verdicts import (
    FORKED,
    LEVEL,
    MIN_LEARNED,
    Basis,
    Gain,
    Verdict,
    explained_by_chance,
    learned_most,
)
from growtrain.settings.text import episodes_text, flag, format_count

Arm = Literal["untouched", "inject", "reset-encoder", "fresh-optimizer"]
ARMS: tuple[Arm, ...] = get_args(Arm)
_SAYS = {"gain": "a clear gain", "no gain": "clearly no gain", "unclear": "unclear"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a diagnosis does.

    Attributes:
        frames: budget of every fork.
        seeds: forks of every arm; the first has the run's own seed.
        arms: of the forks, `untouched` among them; empty for the learning test only.
        threshold: least gain that counts, see `verdicts`.
        test: the learning test.
    """

    frames: int
    seeds: int = 3
    arms: tuple[Arm, ...] = ARMS
    threshold: float = 0.1
    test: LearningTest = LearningTest()


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What a diagnosis found, as in `diagnosis.json`.

    Attributes:
        run: the run's directory.
        game: that it plays.
        frames: of the checkpoint.
        total_frames: budget of the run.
        settings: what was done.
        errors: of the learning test, by copy: one list a seed, one error a mark.
        curves: mean training return of every fork's own episodes by arm, one list a seed of (frames, return or None).
        returns: the same over the whole fork.
        evaluations: score of its last evaluation, None without one.
        return_scale: points that are a gain of 1: how far the untouched forks' mean return is from random play's.
        evaluation_scale: the same of evaluations.
        evaluation_episodes: how many each of `evaluations` is the mean of.
        epsilons: probability of a random action of the forks at their beginning and end; None where actions are drawn from a policy.
        eval_epsilon: the same of their evaluations.
        verdict: the answer.
        episodes: how many each of `returns` is the mean of.
        part: of the learner that was examined, "critic" or "actor"; empty of a Q-network.
        divergence: of the critics' values; None of a Q-network.
    """

    run: str
    game: str
    frames: int
    total_frames: int
    settings: Settings
    errors: dict[Copy, list[list[float]]]
    curves: dict[Arm, list[list[tuple[int, float | None]]]]
    returns: dict[Arm, list[float | None]]
    evaluations: dict[Arm, list[float | None]]
    return_scale: float
    verdict: Verdict
    evaluation_scale: float = 1.0
    evaluation_episodes: int = 0
    epsilons: tuple[float, float] | None = None
    eval_epsilon: float = 0.0
    episodes: dict[Arm, list[int]] = field(default_factory=dict)
    part: str = ""
    divergence: Divergence | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, and the next command."""
        values = dataclasses.asdict(self) | {"next_command": next_command(self)}
        if not self.part:
            del values["part"], values["divergence"]
        return values


def settings_of_part(part: str, intervention: str) -> dict[str, Any]:
    """What an intervention needs in order to act on one part of a learner alone, by field name: critics are never frozen whole."""
    if not part:
        return {}
    return {"grow": part} | ({"freeze": "heads"} if part == "critic" and intervention == "inject" else {})


def next_command(diagnosis: Diagnosis) -> str:
    """What to do about it: mend the place with the largest gain, leave the run alone, or ask again with more frames or seeds."""
    run, settings, found = shlex.quote(diagnosis.run), diagnosis.settings, diagnosis.verdict
    at = f"--at {diagnosis.frames}"
    if diagnosis.divergence and diagnosis.divergence.diverged:
        budget = max(settings.frames, diagnosis.frames // 2)
        return f"growtrain rescue {run} {at} --intervention reset-head --grow critic --frames {format_count(budget)}"
    if found.outcome == "lost" and found.located:
        mend, evidence = _mend(found)
        forked = {found.gains[basis][evidence].sign for basis in FORKED if evidence in found.gains[basis]}
        # It cannot learn, and to begin anew has cost more than that gave, so far.
        if "no gain" in forked and "gain" not in forked:
            return _ask_again(diagnosis, f"--arms untouched,{mend}", settings.seeds, settings.test)
        budget = max(settings.frames, diagnosis.frames // 2)
        only = "".join(f" {flag(name)} {value}" for name, value in settings_of_part(diagnosis.part, mend).items())
        return f"growtrain rescue {run} {at} --intervention {mend}{only} --frames {format_count(budget)}"
    if found.outcome == "not lost":
        done = diagnosis.frames >= diagnosis.total_frames
        return "leave it alone" if done else f"leave it alone: growtrain resume {run}"
    # The width of an interval falls with the root of the seeds, and the noise of a mean return with the root of the frames.
    test, learned = settings.test, learned_most(mean_errors(diagnosis.errors))
    updates = test.updates if learned >= MIN_LEARNED else 4 * test.updates
    more = dataclasses.replace(test, seeds=2 * test.seeds, updates=updates)
    return _ask_again(diagnosis, "", max(5, 2 * settings.seeds), more)


def _mend(found: Verdict) -> tuple[str, str]:
    """What mends the place with the largest gain, and the name of the evidence that it does."""
    place = found.places[0]
    shown = {
        name
        for gains in found.gains.values()
        for name, gain in gains.items()
        if gain.sign == "gain" and gain.place == place
    }
    return next((mend, evidence) for evidence, mend in COPIES.items() if mend and evidence in shown)


def _ask_again(diagnosis: Diagnosis, arms: str, seeds: int, test: LearningTest) -> str:
    """The command of a larger diagnosis of the same checkpoint, with a directory of its own."""
    run, settings = shlex.quote(diagnosis.run), diagnosis.settings
    frames = 4 * settings.frames
    forks = f"--frames {format_count(frames)} --seeds {seeds}" if settings.arms else "--learning-test-only"
    threshold = "" if settings.threshold == Settings.threshold else f"--threshold {settings.threshold:g}"
    asked = f"--learning-seeds {test.seeds} --learning-updates {test.updates}"
    size = f"{f'{seeds}x{format_count(frames)}-' if settings.arms else ''}{test.seeds}x{test.updates}"
    words = ("growtrain diagnose", run, f"--at {diagnosis.frames}", arms, forks, asked, threshold)
    return " ".join(filter(None, words)) + f" --output {run}/diagnosis-{diagnosis.frames}-{size}"


def render(diagnosis: Diagnosis) -> str:
    """The Markdown page: verdict, next command, findings, evidence, and how it was measured."""
    found, settings, test = diagnosis.verdict, diagnosis.settings, diagnosis.settings.test
    lines = [
        f"# {diagnosis.game} at {format_count(diagnosis.frames)} frames{f', the {diagnosis.part}' if diagnosis.part else ''}",
        "",
        f"**{found.sentence}**",
        "",
        f"Next: `{next_command(diagnosis)}`",
        "",
        "| place | was plasticity lost? | because |",
        "|---|---|---|",
        *(f"| {finding.place} | {finding.outcome} | {finding.reason} |" for finding in found.findings),
        "",
        *_table(diagnosis),
        "",
        (
            "A gain is over the network as it is, paired by seed, with its 95 % interval (Student's t). It is clear if the interval "
            f"excludes 0, the mean is at least {settings.threshold:.0%}, and p is at most {LEVEL:.0%}, adjusted by Holm's step-down over "
            "all gains of this page, those beyond fresh slots among them where these gain, too: that any is called clear where none is "
            "there is no likelier than that. "
            f"It is clearly absent if the interval lies below {settings.threshold:.0%}. "
            f"In the learning test ({test.transitions} transitions, {test.updates} updates, {test.n_steps}-step returns; an error is "
            "what is left over of the change asked for, in the mean on the way) it is a share of what the best copy learned."
        ),
    ]
    if diagnosis.returns:
        lines += [
            "",
            (
                f"Forks: {format_count(settings.frames)} frames each; returns are of episodes begun after the fork, and a gain in them is "
                f"a share of {diagnosis.return_scale:.4g} points: how far untouched forks are from random play, or if that is less "
                "a hundredth of the way to the reference score. "
                "An episode that was still going on is not among them: where few ended, those were the short ones."
            ),
        ]
        if diagnosis.evaluation_episodes:
            lines[-1] += (
                f" Evaluations are of {episodes_text([diagnosis.evaluation_episodes])} of each fork at its end, whole ones, and a gain in "
                f"them is a share of {diagnosis.evaluation_scale:.4g} points. They explore less than training, which can hide a "
                "difference: where one kind of evidence shows a gain and another shows none, both are named and nothing is claimed."
            )
    return "\n".join(lines) + "\n"


def _table(diagnosis: Diagnosis) -> list[str]:
    lines = ["| evidence | made fresh | error or score | gain | by seed | says |", "|---|---|---|---|---|---|"]
    gains, threshold = diagnosis.verdict.gains, diagnosis.settings.threshold
    for copy, means in mean_errors(diagnosis.errors).items():
        gain = gains["learning"].get(copy)
        name = "nothing" if gain is None else copy
        lines.append(f"| learning test | {name} | {np.mean(means):.3f} | {_gain_cells(gain, threshold)} |")
    for arm, returns in diagnosis.returns.items():
        gain = gains["returns"].get(arm)
        name = "nothing" if gain is None else arm
        episodes = diagnosis.episodes.get(arm)
        score = f"{_mean(returns)}{f' ({episodes_text(episodes)} each)' if episodes else ''}"
        lines.append(f"| returns, {explored(diagnosis)} | {name} | {score} | {_gain_cells(gain, threshold)} |")
    for arm, scores in diagnosis.evaluations.items() if diagnosis.evaluation_episodes else ():
        gain = gains["evaluations"].get(arm)
        name = "nothing" if gain is None else arm
        score = f"{_mean(scores)} ({episodes_text([diagnosis.evaluation_episodes])} each)"
        explores = explored(diagnosis, evaluated=True)
        lines.append(f"| evaluations, {explores} | {name} | {score} | {_gain_cells(gain, threshold)} |")
    return lines


def explored(diagnosis: Diagnosis, *, evaluated: bool = False) -> str:
    """How the forks explored in training, or in their evaluations: as in "epsilon 0.1"."""
    if diagnosis.epsilons is None:
        return "the policy's mode" if evaluated else "actions drawn from the policy"
    if evaluated:
        return f"epsilon {diagnosis.eval_epsilon:g}"
    first, last = (f"{epsilon:.3g}" for epsilon in diagnosis.epsilons)
    return f"epsilon {last}" if first == last else f"epsilon {first} to {last}"


def _gain_cells(gain: Gain | None, threshold: float) -> str:
    if gain is None:
        return "| |"
    mean = "-" if gain.mean is None else f"{gain.mean:+.1%}"
    ends = "" if gain.low is None else f" [{gain.low:+.1%}, {gain.high:+.1%}]"
    judged = gain.p is not None and (gain.sign == "gain" or explained_by_chance(gain, threshold))
    says = f"{_SAYS[gain.sign]}{f' (p {gain.p:.2g})' if judged else ''}"
    return f"{mean}{ends} | {', '.join(f'{value:+.1%}' for value in gain.values)} | {says}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.4g}" if known else "-"


def draw(diagnosis: Diagnosis, path: Path) -> None:
    """Writes the figure: the gains of each kind of evidence with their intervals, and the forks' returns over frames.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    forked = bool(diagnosis.returns)
    titles: dict[Basis, str] = {"learning": "learning test"}
    if forked:
        titles["returns"] = f"forks: mean training return\n{explored(diagnosis)}"
    if diagnosis.evaluation_episodes:
        titles["evaluations"] = f"forks: evaluation\n{explored(diagnosis, evaluated=True)}"
    panels_wide = len(titles) + forked
    figure = Figure(figsize=(4.4 * panels_wide if forked else 5.5, 3.6), layout="constrained")
    panels = figure.subplots(1, panels_wide, squeeze=False)[0]
    for axes, basis in zip(panels, titles, strict=False):
        gains = list(reversed(diagnosis.verdict.gains[basis].values()))
        for row, gain in enumerate(gains):
            axes.plot(gain.values, [row] * len(gain.values), "o", color="0.6", markersize=4)
            if gain.mean is not None:
                axes.plot(gain.mean, row, "D", color="C0")
            if gain.low is not None and gain.high is not None:
                axes.plot([gain.low, gain.high], [row, row], color="C0", linewidth=2)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.axvline(diagnosis.settings.threshold, color="C3", linestyle="--", linewidth=0.8)
        axes.set_yticks(range(len(gains)), [gain.name for gain in gains])
        axes.set_ylim(-0.6, len(gains) - 0.4)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set(title=titles[basis], xlabel="gain over the network as it is\n(dashed: threshold)")
    if forked:
        for number, (arm, curves) in enumerate(diagnosis.curves.items()):
            for curve in curves:
                points = [(frames, score) for frames, score in curve if score is not None]
                if points:
                    axes_label = arm if curve is curves[0] else None
                    panels[-1].plot(*zip(*points, strict=True), color=f"C{number}", alpha=0.7, label=axes_label)
        panels[-1].set(title="forks: running mean return", xlabel="frames", ylabel="score")
        panels[-1].locator_params(axis="x", nbins=4)
        panels[-1].xaxis.set_major_formatter(lambda frames, _: format_count(frames))
        if panels[-1].get_legend_handles_labels()[0]:
            panels[-1].legend(fontsize="small")
    figure.suptitle(diagnosis.verdict.sentence if len(diagnosis.verdict.sentence) < 90 else diagnosis.verdict.outcome)
    path.write_text(to_svg(figure), encoding="utf-8")
