"""Cells of a probe: a trunk and the arms that fork from it, run by worker processes and kept as they finish."""

import contextlib
import copy
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from growtrain.networks.encoders import scale_frames
from growtrain.probe.arms import WARM, Learner, arms, error, learn, make_learner, measure
from growtrain.probe.settings import SETTINGS, Cell, ProbeConfig, require_known, setting_of
from growtrain.probe.tasks import generator_of, make_targets, play
from growtrain.runfiles import run_lock, write_json
from growtrain.runs.provenance import describe_machine
from growtrain.settings.text import ConfigError, flag
from growtrain.telemetry.sinks import JsonlSink, read_jsonl

Record = dict[str, Any]
_POLL = 0.5  # seconds between two questions whether to stop
Data = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]  # frames (N, 4, S, S) and targets (K, N)


class Interrupted(Exception):  # it is told to
    """An arm was told to stop before its end."""


def _never() -> bool:
    return False


def learn_trunk(
    config: ProbeConfig, cell: Cell, data: Data, names: Sequence[str], should_stop: Callable[[], bool] = _never
) -> tuple[list[Record], dict[int, Learner]]:
    """Learns all tasks warm.

    Returns:
        The records of `WARM`, and a copy of the learner before each task at which one of the named arms leaves the trunk.

    Raises:
        Interrupted: `should_stop` said so before a task.
    """
    fork_tasks = {times[0] for name in names if (times := arms(config)[name].times)}
    forks: dict[int, Learner] = {}
    learner = make_learner(config, setting_of(cell.setting), generator_of(cell.seed, "initial"))
    records: list[Record] = []
    for task in range(config.num_tasks):
        if task in fork_tasks:
            forks[task] = copy.deepcopy(learner)
        records += _learn_tasks(config, cell, data, WARM, learner, range(task, task + 1), should_stop)
    return records, forks


def learn_arm(
    config: ProbeConfig,
    cell: Cell,
    data: Data,
    name: str,
    trunk: Sequence[Record],
    fork: Learner,
    should_stop: Callable[[], bool] = _never,
) -> list[Record]:
    """An arm's records: the trunk's until its first intervention, then its own; raises `Interrupted` as `learn_trunk` does."""
    start = arms(config)[name].times[0]
    own = _learn_tasks(config, cell, data, name, copy.deepcopy(fork), range(start, config.num_tasks), should_stop)
    return [record | {"arm": name} for record in trunk[:start]] + own


def _learn_tasks(
    config: ProbeConfig,
    cell: Cell,
    data: Data,
    name: str,
    learner: Learner,
    tasks: range,
    should_stop: Callable[[], bool] = _never,
) -> list[Record]:
    torch.set_num_threads(1)
    arm = arms(config)[name]
    frames = scale_frames(torch.from_numpy(data[0]), 255.0)
    records = []
    for task in tasks:
        if should_stop():
            raise Interrupted
        start = time.thread_time()
        target = torch.from_numpy(data[1][task])
        if task in arm.times:
            arm.act(learner, generator_of(cell.seed, "fresh", task), frames)
        first_error = error(learner.network, frames, target)
        shape = (config.num_updates, config.batch_size)
        batches = torch.randint(config.num_frames, shape, generator=generator_of(cell.seed, "batches", task))
        learn(learner, frames, target, batches)
        records.append(
            {
                "setting": cell.setting,
                "targets": cell.targets,
                "arm": name,
                "seed": cell.seed,
                "task": task,
                "intervened": task in arm.times,
                "first_error": first_error,
                "error": error(learner.network, frames, target),
                "seconds": time.thread_time() - start,
                **measure(learner.network, frames),
            }
        )
    return records


def run(
    config: ProbeConfig,
    cells: Sequence[Cell],
    names: Sequence[str],
    directory: Path,
    processes: int,
    should_stop: Callable[[], bool] = _never,
) -> Iterator[list[Record]]:
    """Runs what `directory` lacks, and adds each arm's records to its `probe.jsonl` when the arm is done.

    Args:
        config: kept in `config.json`; a directory holds records of one configuration.
        cells: in the order in which they are run.
        names: of arms.
        directory: made if missing.
        processes: workers of one thread each; the records do not depend on their number.
        should_stop: asked often; True ends it early, without the arms under way.

    Yields:
        The records of each arm that was run, one per task.

    Raises:
        ConfigError: the directory holds another configuration, or another process works there.
    """
    return _run(config, cells, names, directory.absolute(), processes, should_stop)


def _run(
    config: ProbeConfig,
    cells: Sequence[Cell],
    names: Sequence[str],
    directory: Path,
    processes: int,
    should_stop: Callable[[], bool],
) -> Iterator[list[Record]]:
    with run_lock(directory), contextlib.closing(open_records(config, directory)) as sink:
        done = complete(config, _read_records(directory))
        missing = {cell: wanted for cell in cells if (wanted := [n for n in names if (cell, n) not in done])}
        for records in _run_cells(config, missing, processes, should_stop):
            for record in records:
                sink.write(record)
            yield records


def _run_cells(
    config: ProbeConfig, missing: dict[Cell, list[str]], processes: int, should_stop: Callable[[], bool]
) -> Iterator[list[Record]]:
    """Trunks are learned while arms of the cell before still are; at most one more cell than workers is in memory."""
    stopping = threading.Event()
    executor: Executor
    ending: tuple[Callable[[], bool], ...] = ()
    if processes > 1:
        with _unheard():  # first, because it is begun with the pool otherwise, and hears
            resource_tracker.ensure_running()
        executor = ProcessPoolExecutor(processes, get_context("spawn"))
    else:
        executor, ending = ThreadPoolExecutor(1), (stopping.is_set,)
    others = set(active_children())
    waiting, pending = iter(missing), dict[Future[Any], Cell | None]()

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        with _unheard():
            return executor.submit(function, *arguments, *ending)

    def begin() -> None:
        if (cell := next(waiting, None)) is not None:
            data = play(config, cell.seed).frames, make_targets(config, cell)
            pending[submit(learn_trunk, config, cell, data, missing[cell])] = cell

    try:
        for _ in range(processes):
            begin()
        while pending and not should_stop():
            for future in wait(pending, _POLL, return_when=FIRST_COMPLETED).done:
                cell = pending.pop(future)
                if cell is None:
                    yield future.result()
                    continue
                trunk, forks = future.result()
                data = play(config, cell.seed).frames, make_targets(config, cell)
                for name in missing[cell]:
                    if name != WARM:
                        fork = forks[arms(config)[name].times[0]]
                        pending[submit(learn_arm, config, cell, data, name, trunk, fork)] = None
                begin()
                if WARM in missing[cell]:
                    yield trunk
    except BrokenProcessPool:
        if not should_stop():  # else the workers have got the signal, too
            raise
    finally:
        stopping.set()
        if pending:  # what is under way is done again by whoever goes on
            for worker in set(active_children()) - others:
                worker.terminate()
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Processes that begin in here do not hear what a terminal sends to all, which their parent answers: a mask is inherited."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def choose_arms(config: ProbeConfig, names: Sequence[str]) -> list[str]:
    """These arms, or all without any; raises `ConfigError` for an unknown one."""
    require_known("--arms", names, arms(config))
    return list(names or arms(config))


def one_line(records: Sequence[Record]) -> str:
    """What an arm reached, for whoever watches."""
    first, late = records[0], records[len(records) // 2 :]
    mean = sum(r["error"] for r in late) / len(late)
    name = f"{first['setting']} {first['targets']} seed {first['seed']} {first['arm']}"
    return f"{name:56} late error {mean:.3f}  {sum(r['seconds'] for r in records):.0f} s"


def _read_records(directory: Path) -> list[Record]:
    try:
        return read_jsonl(directory / "probe.jsonl")
    except ValueError as error:
        raise ConfigError(f"{error}: remove the line, or choose another --output") from error


def complete(config: ProbeConfig, records: Sequence[Record]) -> dict[tuple[Cell, str], list[Record]]:
    """The records of every arm of every cell that has one for each task, in the order of the tasks."""
    found: dict[tuple[Cell, str], dict[int, Record]] = {}
    for r in records:
        cell = Cell(setting=r["setting"], targets=r["targets"], seed=r["seed"])
        found.setdefault((cell, r["arm"]), {})[r["task"]] = r
    return {key: [rs[task] for task in sorted(rs)] for key, rs in found.items() if len(rs) == config.num_tasks}


def open_records(config: ProbeConfig, directory: Path) -> JsonlSink:
    """The sink of a directory's records, after its `config.json` has been compared or written."""
    path = directory / "config.json"
    settings = {name: dataclasses.asdict(setting) for name, setting in SETTINGS.items()}
    if path.exists():
        theirs, ours = dataclasses.asdict(read_config(directory)), dataclasses.asdict(config)
        if differ := ", ".join(f"{flag(name)} {theirs[name]}" for name in ours if theirs[name] != ours[name]):
            raise ConfigError(f"{directory} holds a probe with {differ}: give the same, or choose another --output")
        if json.loads(path.read_text(encoding="utf-8")).get("settings") != settings:
            raise ConfigError(f"{directory} holds a probe with other learning rates: choose another --output")
    else:
        write_json(path, dataclasses.asdict(config) | {"settings": settings} | describe_machine(torch.device("cpu")))
    return JsonlSink(directory / "probe.jsonl")


def read_config(directory: Path) -> ProbeConfig:
    """The configuration of a directory's records; raises `ConfigError` if it holds none."""
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return ProbeConfig(**{item.name: values[item.name] for item in dataclasses.fields(ProbeConfig)})
    except KeyError as error:
        raise ConfigError(f"{directory / 'config.json'} lacks {error}: choose another --output") from error
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{directory} holds no probe ({error}): name the --output of growtrain probe") from error
