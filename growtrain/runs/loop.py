"""Training: the only loop. A deep-RL agent whose network grows by plasticity injection (Nikishin et al. 2023).

While the environments step in their own threads, the learner does the updates it owes. Everything periodic happens where the frame
counter crosses a multiple of its period. `train` writes the run's files and yields each record as it is made; what to show and when to
stop is up to whoever iterates.

Units: frames.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from growtrain.learners.foreign_weights import Weights, save_initial
from growtrain.records import Record
from growtrain.runfiles import run_lock
from growtrain.runs.checkpoint import Checkpoint
from growtrain.runs.resuming import require_own
from growtrain.runs.run import Run
from growtrain.settings.config import Config


def train(
    config: Config,
    run_dir: str | Path,
    *,
    should_stop: Callable[[], bool | str] = lambda: False,
    start: Checkpoint | None = None,
) -> Iterator[Record]:
    """Trains one agent and yields what happens, as it happens.

    Args:
        config: everything that decides the run.
        run_dir: where its files go, by the working directory of this call; made if missing; it holds the run that `start` is of, or none.
        should_stop: asked once per step of the environments, of an evaluation's, too, per piece of heavy priming, and per network that
            a decision trains; True, or the reason, ends the run early, with a checkpoint to go on from.
        start: a checkpoint of this run, to go on from bit for bit, or of another, to fork.

    Yields:
        `Metrics`, `Evaluation`, `Diagnostics`, `Decision` and `GrowthEvent`, after they have been written.

    Raises:
        ConfigError: the configuration cannot be run, another process runs in this directory or has gone on from `start`, or another run
            is there, of which nothing is touched.
        GrowthFailed: a growth was rolled back and `config.on_growth_failure` is "stop".
        CheckpointFailed: the last checkpoint, or several in a row, could not be written.
        Diverged: the learner cannot go on.
    """
    return train_in(Path(run_dir).absolute(), config, should_stop, start)


def train_in(
    run_dir: Path,
    config: Config,
    should_stop: Callable[[], bool | str],
    start: Checkpoint | None,
    *,
    weights: Weights | None = None,
    again: bool = False,
) -> Iterator[Record]:
    """What `train` does; with `weights`, left there for the run to begin with, or `again` what is there and has no checkpoint."""
    with run_lock(run_dir) as stale_lock:
        require_own(run_dir, start, again=again)
        if weights is not None:
            save_initial(weights, run_dir)
        with Run(config, run_dir, start).recording(stale_lock) as run:
            for record in _play(run, _for_good(should_stop)):
                run.write(record)
                yield record


def _play(run: Run, should_stop: Callable[[], bool | str]) -> Iterator[Record]:
    """The loop."""
    config = run.config
    if run.evaluation_owed:
        yield from run.evaluate(should_stop)
    while run.goes_on and not should_stop():
        if run.prime():
            continue
        if not run.growing.decision_owed:
            run.step()
        if run.growing.to_decide():
            yield from run.growing.decide(should_stop)
            if run.growing.decision_owed:
                break
        if run.growing.due():
            yield from run.growing.grow()
        run.learner.end_of_step(run.frames)
        if run.crossed(config.eval_period):
            yield from run.evaluate(should_stop)
        if run.crossed(config.diagnostics_period):
            yield run.diagnose()
        if run.crossed(config.log_period):
            yield run.report()
        if run.saver.due(run.frames):
            run.save()
    yield from run.finish(should_stop)


def _for_good(should_stop: Callable[[], bool | str]) -> Callable[[], bool | str]:
    """The same question, not asked again once the answer was to stop."""
    answer: bool | str = False

    def asked() -> bool | str:
        nonlocal answer
        answer = answer or should_stop()
        return answer

    return asked
