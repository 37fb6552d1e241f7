"""Sinks: the JSONL files are whole whatever happens; TensorBoard never stops a run."""

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from growtrain.telemetry.sinks import JsonlSink, RunSinks, TensorBoardSink, read_jsonl

LINES: list[dict[str, Any]] = [{"frames": 4, "game": 'Phönix "x"\n'}, {"frames": 8, "seconds": {"learn": 0.5}}]


def write(path: Path, *values: dict[str, Any]) -> None:
    sink = JsonlSink(path)
    for value in values:
        sink.write(value)
    sink.close()


def test_round_trip_and_append(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    write(path, LINES[0])
    write(path, LINES[1])
    assert read_jsonl(path) == LINES


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "a.jsonl")
    sink.write(LINES[0])
    assert read_jsonl(tmp_path / "a.jsonl") == LINES[:1]
    sink.close()


def test_nan_and_infinities_become_null(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    write(tmp_path / "a.jsonl", {"loss": nan, "q": -inf, "list": [inf, 1.5], "seconds": {"x": nan}, "name": "nan"})
    (line,) = (tmp_path / "a.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values == {"loss": None, "q": None, "list": [None, 1.5], "seconds": {"x": None}, "name": "nan"}


def test_crash_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, *LINES)
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        expected = LINES[: sum(size >= end for end in ends)]  # a line that lacks only its newline is whole
        assert read_jsonl(path) == expected, size
        write(path, {"frames": 12})
        assert read_jsonl(path) == [*expected, {"frames": 12}], size


def test_a_torn_line_longer_than_a_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, LINES[0])
    with path.open("ab") as file:
        file.write(b'{"text": "' + b"x" * 200_000)
    write(path, LINES[1])
    assert read_jsonl(path) == LINES


def test_torn_multibyte_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + "ö".encode()[:1])
    assert read_jsonl(path) == [{"a": 1}]


@pytest.mark.parametrize("damage", [b"\0\0\0", b"[1]", b"", b'{"a": 1'])
def test_damage_before_the_end_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + damage + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        read_jsonl(path)


def test_records_wait_for_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = JsonlSink(tmp_path / "a.jsonl")
    sink.write({"n": 0})
    working = sink._file
    with Path("/dev/full").open("ab", buffering=0) as sink._file:
        for n in (1, 2, 3):
            sink.write({"n": n})
        with pytest.raises(OSError, match="No space"):
            sink.flush()
    (warning,) = warnings_of(caplog)
    assert "/dev/full" in warning
    sink._file = working
    sink.write({"n": 4})
    sink.close()
    assert [record["n"] for record in read_jsonl(tmp_path / "a.jsonl")] == [0, 1, 2, 3, 4]


def test_a_disk_that_takes_half_a_line_gets_the_other_half_later(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "a.jsonl")

    class Short:
        """Takes three bytes, then nothing, as a disk that fills up does."""

        name = "short"
        taken = False

        def write(self, data: bytes) -> int:
            if self.taken:
                raise OSError(28, "No space left on device")
            self.taken = True
            return working.write(data[:3])

    working = sink._file
    sink._file = Short()  # type: ignore[assignment]
    sink.write({"first": 1})
    sink._file = working
    sink.write({"second": 2})
    sink.close()
    assert read_jsonl(tmp_path / "a.jsonl") == [{"first": 1}, {"second": 2}]


def test_points_after_the_checkpoint_are_left_out_by_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one second are ordered by the text of this process's count of them, in which 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", type(event_file_writer._global_uid)(0))
    with RunSinks(tmp_path) as sinks:
        for frames in (100, 200, 300):
            sinks.write("metrics", {"frames": frames, "loss": 1.0})
    with RunSinks(tmp_path, frames=200) as sinks:
        sinks.write("metrics", {"frames": 300, "loss": 2.0})
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("metrics/loss")
    assert [(event.step, event.value) for event in shown] == [(100, 1.0), (200, 1.0), (300, 2.0)]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of an event directory by tag: (step, value)."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(directory.glob("events.*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_run_sinks_put_records_where_they_belong(tmp_path: Path) -> None:
    sinks = RunSinks(tmp_path)
    metrics = {"frames": 400, "loss": 0.5, "episode_return": None, "q_mean": float("nan"), "seconds": {"learn": 2.0}}
    event = {"frames": 500, "stage": 1, "kind": "inject"}
    with sinks:
        sinks.write("metrics", metrics)
        sinks.write("evaluations", {"frames": 450, "episode_return": 7.0})
        sinks.write("growth_events", event)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [metrics | {"q_mean": None}]
    assert read_jsonl(tmp_path / "evaluations.jsonl") == [{"frames": 450, "episode_return": 7.0}]
    assert read_jsonl(tmp_path / "growth_events.jsonl") == [event]
    assert scalars(tmp_path / "tensorboard") == {
        "metrics/loss": [(400, 0.5)],
        "metrics/seconds/learn": [(400, 2.0)],
        "evaluations/episode_return": [(450, 7.0)],
        "growth_events/stage": [(500, 1.0)],
    }


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_tensorboard_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    sinks = RunSinks(tmp_path)

    def full(writer: RecordWriter, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    # TensorBoard's writer thread dies of it, and would report that to pytest, perhaps after this test.
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    for frames in range(200):
        sinks.write("metrics", {"frames": frames, "loss": 1.0})
    sinks.close()
    for thread in threading.enumerate():
        if type(thread).__name__ == "_AsyncWriterThread":
            thread.join(3)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 200
    (warning,) = warnings_of(caplog)
    assert "No space left on device" in warning


def test_tensorboard_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunSinks(tmp_path) as sinks:
        sinks.write("metrics", {"frames": 4})
        sinks.write("metrics", {"frames": 8})
    assert [record["frames"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [4, 8]
    assert len(warnings_of(caplog)) == 1


def test_tensorboard_directory_in_the_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    sink = TensorBoardSink(tmp_path / "tensorboard")
    sink.write("metrics", {"frames": 4, "loss": 1.0})
    sink.close()
    assert len(warnings_of(caplog)) == 1
