"""Has this run lost plasticity, and where? Forks of one checkpoint, with and without a part made fresh (Nikishin et al. 2023, figure 3).

All arms have the same past, and the arms of one seed the same random numbers; what differs is what is done at the first step:

    untouched        nothing: the run as it would go on (bit for bit, with the run's own seed)
    inject           plasticity injection into the head, or with `--live-encoder cold` into head and encoder
    reset-encoder    the encoder drawn anew
    fresh-optimizer  the optimizer's slots emptied

Every fork is judged by its training returns, and at its end by an evaluation, which explores less. A much cheaper and more sensitive test
on the checkpoint's replay goes with them (`learning_test`). What they say is put together in `verdicts`; `page` writes it down.

Deviations from the paper: 1. its diagnosis forks with and without an injection only; 2. the learning test is ours.

Units: frames; returns are true scores, of episodes that the fork has played from their beginning.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from growtrain.diagnosis.copies import agent_of, compare_copies_of, copies_of_checkpoint, parts_of
from growtrain.diagnosis.page import ARMS, Arm, Diagnosis, Settings, draw, render, settings_of_part
from growtrain.environments.games import reference_scores
from growtrain.growth.kinds import KINDS
from growtrain.learners.make import resolve_device
from growtrain.learners.saved import read_saved
from growtrain.plasticity.divergence import measure_divergence
from growtrain.plasticity.learning_test import Copy, Interrupted, kinds_of, mean_errors
from growtrain.plasticity.verdicts import Evidence, verdict
from growtrain.runfiles import read_plain, run_lock, write_json
from growtrain.runs.checkpoint import Checkpoint, NeverSaved, open_at, open_newest
from growtrain.runs.loop import train_in
from growtrain.runs.resuming import changed_config, done_injections, next_time
from growtrain.settings.budget import epsilon_at
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError, format_count
from growtrain.sweep.cells import progress
from growtrain.telemetry.sinks import read_jsonl

_RECORDS = 40  # in a fork's metrics
_LEAST_SHARE = 0.01  # of the way from the random to the reference score: what counts as a gain of 1 is at least this
_LEARNING_TEST = "learning_test{}.json"


def default_frames(checkpoint: Checkpoint) -> int:
    """A tenth of what the run has played: all forks together then take about as long as the run did."""
    return max(2 * checkpoint.config.frame_skip * checkpoint.config.num_envs, checkpoint.frames // 10)


def default_arms(checkpoint: Checkpoint) -> tuple[Arm, ...]:
    """All arms, less `reset-encoder` where no encoder learns: it was frozen, or all of the network is the head."""
    frozen = read_saved(checkpoint.state["learner"]).encoder_frozen
    return tuple(arm for arm in ARMS if arm == "untouched" or not (frozen and "encoder" in KINDS[arm].born))


def cost_lines(run: Path, checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """What the diagnosis will take, before it begins: updates, frames, hours at the run's own speed, and disk."""
    test, parts = settings.test, parts_of(checkpoint)
    arms = sum(len(parts) if arm == "inject" else 1 for arm in settings.arms)  # one for each part that is injected
    forks = arms * settings.seeds
    networks = sum(len(copies_of_checkpoint(checkpoint, part)) for part in parts)
    lines = [f"learning test: {test.seeds} seeds x {networks} networks x {test.warm_up + test.updates} updates"]
    if forks:
        speeds = [record["frames_per_second"] for record in read_jsonl(run / "metrics.jsonl")[-100:]]
        hours = f"{forks * settings.frames / np.median(speeds) / 3600:.2g} hours" if speeds else "an unknown time"
        lines.append(
            f"forks: {arms} arms x {settings.seeds} seeds x {format_count(settings.frames)} frames = "
            f"{format_count(forks * settings.frames)} frames, some {hours} at the run's own speed, up to "
            f"{forks * checkpoint.num_bytes / 1e9:.2g} GB of disk"
        )
    return lines


def fork_config(checkpoint: Checkpoint, arm: Arm, seed: int, settings: Settings, part: str = "") -> Config:
    """The configuration of one fork: the past of the run, one intervention now or none, and nothing else that was still to come.

    Args:
        checkpoint: where it begins.
        arm: what is done at its first step.
        seed: 0 for the run's own seed, 1 for the next, ...
        settings: the budget.
        part: of the learner that is injected, see `parts_of`.

    Raises:
        ConfigError: the budget is too short, or the run cannot be forked.
    """
    config, step = checkpoint.config, checkpoint.config.frame_skip * checkpoint.config.num_envs
    if settings.frames < 2 * step:
        raise ConfigError(
            f"--frames {settings.frames} is below two steps of every environment: give {2 * step} or more"
        )
    done = done_injections(checkpoint)
    times = [*done, *([] if arm == "untouched" else [next_time(checkpoint)])]
    total = checkpoint.frames + settings.frames
    explicit: dict[str, Any] = {
        "schedule": "at:" + ",".join(map(str, times)) if times else "fixed",
        "intervention": "inject" if arm == "untouched" else arm,
        "total_frames": total,
        "seed": config.seed + seed,
        "freeze_encoder_at": config.freeze_encoder_at if config.freeze_encoder_at <= len(done) else 0,
        "log_period": max(step, settings.frames // _RECORDS),
        "eval_period": total,  # once, at the end
        "eval_frames": max(step, min(config.eval_frames, settings.frames // 4)),
        "keep": 0,
        "track": "none",
    }
    if arm == "inject":
        explicit |= settings_of_part(part, arm)
    return changed_config(checkpoint, explicit, fork=True)[0]


def run_fork(
    run: Path,
    checkpoint: Checkpoint,
    arm: Arm,
    seed: int,
    settings: Settings,
    fork: Path,
    stop: Callable[[], bool | str],
    part: str = "",
) -> None:
    """Runs one fork to its end, goes on with it where it was interrupted, or does nothing where it is done.

    Raises:
        ConfigError: its directory holds another run.
    """
    config = fork_config(checkpoint, arm, seed, settings, part)
    start, begun = None, (fork / "config.json").exists()
    if begun:
        with contextlib.suppress(NeverSaved):  # it ended before the fork itself was saved
            start = open_newest(fork)
    if start is None:
        # Opened anew: a run empties the state that it starts from.
        start = dataclasses.replace(open_at(run, checkpoint.frames), config=checkpoint.config)
    elif start.config.fingerprint() != config.fingerprint():
        raise ConfigError(f"{fork} is a fork with other settings: give the same again, or another --output")
    elif progress(fork).finished:
        return
    for _ in train_in(fork, config, stop, start, again=begun):
        pass


def diagnose(
    run: Path,
    checkpoint: Checkpoint,
    settings: Settings,
    output: Path,
    *,
    stop: Callable[[], bool | str] = lambda: False,
    say: Callable[[str], None] = print,
    part: str = "",
) -> Diagnosis | None:
    """Does what is not done yet, and writes `diagnosis.json`, `diagnosis.md` and `diagnosis.svg` into `output`.

    Of a part of a learner the files are `diagnosis-critic.json` and so on; forks that do not depend on the part are made once.

    Args:
        run: the run's directory.
        checkpoint: of it.
        settings: what to do; what an interrupted diagnosis with the same settings has done is taken over.
        output: where the forks and the answer go; made if missing.
        stop: asked once per environment step, and per copy of the learning test, which then begins anew; True, or the
            reason, ends it early, to be gone on with.
        say: takes lines of progress.
        part: of the learner, one of `parts_of`.

    Returns:
        The diagnosis; None if it was stopped.

    Raises:
        ConfigError: the settings do not fit the run, or `output` holds another diagnosis.
    """
    for arm in settings.arms:
        fork_config(checkpoint, arm, 0, settings, part)  # what is wrong is said before any work
    source, output = run.absolute(), output.absolute()  # `say` and `stop` may change the working directory
    torch.set_num_threads(checkpoint.config.threads)
    with run_lock(output):
        try:
            errors = _learning_test_once(checkpoint, settings, output, stop, say, part)
        except Interrupted:
            return None
        forks: dict[Arm, list[Path]] = {arm: [] for arm in settings.arms}
        for seed in range(settings.seeds):  # seed by seed: whatever is there when it is stopped is paired
            for arm in settings.arms:
                if stop():
                    return None
                fork = output / f"{arm}{f'-{part}' if part and arm == 'inject' else ''}-s{seed}"
                run_fork(source, checkpoint, arm, seed, settings, fork, stop, part)
                forks[arm].append(fork)
                score = mean_return(fork, checkpoint.frames)
                say(
                    f"fork {arm} seed {seed}: mean return {'none, no episode ended' if score is None else f'{score:.4g}'}"
                )
        if stop():
            return None
        diagnosis = _concluded(run, checkpoint, settings, errors, forks, part)
        stem = f"diagnosis-{part}" if part else "diagnosis"
        write_json(output / f"{stem}.json", diagnosis.to_dict())
        (output / f"{stem}.md").write_text(render(diagnosis), encoding="utf-8")
        try:
            draw(diagnosis, output / f"{stem}.svg")
        except ImportError as error:
            say(f"no figure, {error}: python -m pip install 'growtrain[report]', and repeat this command")
    return diagnosis


def _concluded(
    run: Path,
    checkpoint: Checkpoint,
    settings: Settings,
    errors: dict[Copy, list[list[float]]],
    forks: dict[Arm, list[Path]],
    part: str,
) -> Diagnosis:
    config, now = checkpoint.config, checkpoint.frames
    returns = {arm: [mean_return(fork, now) for fork in each] for arm, each in forks.items()}
    scale = return_scale(config.game, returns.get("untouched", []))
    evaluations, evaluated = evaluations_of(forks, now)
    evaluation_scale = return_scale(config.game, evaluations.get("untouched", []))
    evidence = Evidence(
        errors=mean_errors(errors),
        returns=returns,
        return_scale=scale,
        evaluations=evaluations if evaluated else {},
        evaluation_scale=evaluation_scale,
        kinds=kinds_of(config),
    )
    found, divergence = verdict(evidence, threshold=settings.threshold), None
    if part:
        divergence = measure_divergence(*agent_of(checkpoint, resolve_device(config.device)))
        if divergence.diverged:
            found = dataclasses.replace(found, outcome="cannot tell", places=(), sentence=divergence.sentence)
    return Diagnosis(
        run=str(run),
        game=config.game,
        frames=now,
        total_frames=config.total_frames,
        settings=settings,
        errors=errors,
        curves={arm: [running_return(fork, now) for fork in each] for arm, each in forks.items()},
        returns=returns,
        evaluations=evaluations,
        return_scale=scale,
        evaluation_scale=evaluation_scale,
        evaluation_episodes=evaluated,
        epsilons=None if config.continuous else (epsilon_at(config, now), epsilon_at(config, now + settings.frames)),
        eval_epsilon=config.eval_epsilon,
        episodes={arm: [num_episodes(fork, now) for fork in each] for arm, each in forks.items()},
        verdict=found,
        part=part,
        divergence=divergence,
    )


def _learning_test_once(
    checkpoint: Checkpoint,
    settings: Settings,
    output: Path,
    stop: Callable[[], bool | str],
    say: Callable[[str], None],
    part: str,
) -> dict[Copy, list[list[float]]]:
    """The learning test, or what it gave when it was done before with the same settings."""
    path = output / _LEARNING_TEST.format(f"_{part}" if part else "")
    asked = {
        "frames": checkpoint.frames,
        "test": dataclasses.asdict(settings.test),
        "anchor": checkpoint.config.anchor,
    }
    with contextlib.suppress(ValueError, KeyError, TypeError):  # missing or damaged: it is done again
        done = json.loads(read_plain(path, 1 << 24))
        if done["asked"] == asked:
            errors: dict[Copy, list[list[float]]] = done["errors"]
            return errors
    errors = compare_copies_of(checkpoint, settings.test, resolve_device(checkpoint.config.device), stop, part)
    write_json(path, {"asked": asked, "errors": errors})
    for copy, means in mean_errors(errors).items():
        say(f"learning test {f'{part} ' if part else ''}{copy}: mean error {np.mean(means):.3f}")
    return errors


def mean_return(fork: Path, after: int) -> float | None:
    """The mean true score of the training episodes that the fork has begun and ended; None without any."""
    curve = running_return(fork, after)
    return curve[-1][1] if curve else None


def num_episodes(fork: Path, after: int) -> int:
    """How many training episodes the fork has begun and ended."""
    return sum(record["episodes"] for record in read_jsonl(fork / "metrics.jsonl") if record["frames"] > after)


def running_return(fork: Path, after: int) -> list[tuple[int, float | None]]:
    """At every record after `after` frames: the frames, and the mean true score of the fork's own episodes so far."""
    curve: list[tuple[int, float | None]] = []
    total, episodes = 0.0, 0
    for record in read_jsonl(fork / "metrics.jsonl"):
        if record["frames"] > after:
            total += record["episodes"] * (record["episode_return"] or 0.0)
            episodes += record["episodes"]
            curve.append((record["frames"], total / episodes if episodes else None))
    return curve


def return_scale(game: str, untouched: list[float | None]) -> float:
    """Points that are a gain of 1: how far the untouched forks are from random play, but at least a hundredth of how far the reference is.

    Where no scores of a game are known, random play is taken to earn 0: returns that are costs are their own scale, too.
    """
    random_score, reference_score = reference_scores(game) or (0.0, 1.0)
    known = [score for score in untouched if score is not None]
    least = _LEAST_SHARE * abs(reference_score - random_score)
    return max(least, abs(float(np.mean(known)) - random_score)) if known else least


def evaluations_of(forks: Mapping[Arm, Sequence[Path]], after: int) -> tuple[dict[Arm, list[float | None]], int]:
    """The scores of the forks' last evaluations, None of one that lacks it, and of how many episodes each is the mean; 0 without any.

    An evaluation of fewer episodes than others have is not compared with them: it counts as missing.
    """
    last = {
        arm: [
            next((r for r in reversed(read_jsonl(f / "evaluations.jsonl")) if r["frames"] > after), None) for f in each
        ]
        for arm, each in forks.items()
    }
    episodes = max((record["episodes"] for each in last.values() for record in each if record), default=0)
    scores = {
        arm: [record["episode_return"] if record and record["episodes"] == episodes else None for record in each]
        for arm, each in last.items()
    }
    return scores, episodes
