"""Where records go: JSON lines, which are the record of a run; TensorBoard and trackers, which are conveniences.

What the disk does not take of a JSONL file waits in memory, in order, until it does: `flush` raises while anything waits, so that no
checkpoint outruns its records. A failing TensorBoard sink warns once and is quiet from then on.

Units: the step of every scalar is frames.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, get_args

from growtrain.records import Stem
from growtrain.runfiles import Unreadable
from growtrain.telemetry.trackers import TrackerSink

_log = logging.getLogger(__name__)


class JsonlSink:
    """Appends one JSON object per line to `path`; NaN and infinities become null. A line that cannot be written now waits, said once.

    A file whose writer was killed in mid-line is mended when it is opened: the torn line is cut.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        _mend(path)
        self._waiting = b""

    def write(self, values: dict[str, Any]) -> None:
        """One line, and before it those that wait."""
        quiet = bool(self._waiting)
        self._waiting += json.dumps(_finite(values), allow_nan=False).encode() + b"\n"
        try:
            self.flush()
        except OSError as error:
            if not quiet:
                _log.warning("%s: %s; records wait in memory until it can be written", self._file.name, error)

    def flush(self) -> None:
        """Writes what waits; raises `OSError` if some of it still does."""
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        """Closes the file; what still waits is lost."""
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file in order; a last line that was torn by a crash is left out.

    Raises:
        OSError: the file cannot be read.
        Unreadable: a line other than a torn last one is not a JSON object; the message names file and line.
    """
    *lines, tail = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            raise Unreadable(f"{path}, line {number}: not a JSON object: the file is damaged")
        records.append(record)
    last = _parse(tail)
    return records if last is None else [*records, last]


class TensorBoardSink:
    """Scalars for TensorBoard in `directory`. No failure of it, be it of the import, the disk or the library, reaches the run.

    Args:
        directory: of the event files.
        frames: where the run goes on from; TensorBoard then leaves out what an earlier part wrote after it.
    """

    def __init__(self, directory: Path, frames: int | None = None) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(directory), flush_secs=30, purge_step=None if frames is None else frames + 1
            )
        except Exception as error:  # the run outlives any failure of a convenience
            self._give_up(error)

    def write(self, prefix: str, values: dict[str, Any]) -> None:
        """The finite numbers among `values`, nested ones too, as scalars `prefix/name`; the step is `values["frames"]`."""
        if self._writer is None:
            return
        try:
            for tag, value in _scalars(prefix, values):
                self._writer.add_scalar(tag, value, values["frames"])
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Flushes and closes."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:
            self._give_up(error)
        self._writer = None

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        _log.warning(
            "TensorBoard is off from here on (%s: %s); the JSONL files are complete", type(error).__name__, error
        )


class RunSinks:
    """The sinks of one run directory: `metrics.jsonl`, `evaluations.jsonl`, `growth_events.jsonl`, `diagnostics.jsonl`,
    `decisions.jsonl` and `tensorboard/`; and its trackers.

    Args:
        run_dir: the run's directory.
        frames: of the checkpoint that the run goes on from; None from the start.
        trackers: which get the same numbers as TensorBoard, under the same names; closed with the other sinks.

    Raises:
        OSError: a JSONL file cannot be opened.
    """

    def __init__(self, run_dir: Path, frames: int | None = None, trackers: Sequence[TrackerSink] = ()) -> None:
        self._files = {stem: JsonlSink(run_dir / f"{stem}.jsonl") for stem in get_args(Stem)}
        self._tensorboard = TensorBoardSink(run_dir / "tensorboard", frames)
        self._trackers = trackers

    def write(self, stem: Stem, values: dict[str, Any]) -> None:
        """Puts a record's `to_dict()` in its file and then, the record being safe, elsewhere; `frames` is the step."""
        self._files[stem].write(values)
        self._tensorboard.write(stem, values)
        for tracker in self._trackers:
            tracker.write(values["frames"], dict(_scalars(stem, values)))

    def flush(self) -> None:
        """Writes the records that wait for the disk; raises `OSError` if some still do."""
        for file in self._files.values():
            file.flush()

    def close(self, failed: bool = False) -> None:
        """Closes all of them, trackers last, because they may take their time; `failed` is how they mark the run."""
        self._tensorboard.close()
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            tracker.close(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _mend(path: Path) -> None:
    """Ends the last line of a file whose writer was killed: completes it if only its newline is missing, else cuts it."""
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = size
        while start > 0:  # backwards in blocks: the file of a long run is not read whole
            block_start = max(0, start - 65536)
            file.seek(block_start)
            newline = file.read(start - block_start).rfind(b"\n")
            if newline >= 0:
                start = block_start + newline + 1
                break
            start = block_start
        if start == size:
            return
        file.seek(start)
        if _parse(file.read()) is None:
            file.truncate(start)
        else:
            file.write(b"\n")


def _parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is not one. No proper prefix of an object is an object, so a torn line never passes."""
    try:
        value = json.loads(line)
    except ValueError:  # also a multi-byte character cut in two
        return None
    return value if isinstance(value, dict) else None


def _finite(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by None, which JSON can say."""
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _scalars(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and name != "frames" and math.isfinite(value):
            yield f"{prefix}/{name}", value
