"""The frames of a replay on disk: compressed once, in immutable files that successive checkpoints share.

A frame never changes after it was written, so a checkpoint only adds those that are new since the last one. Each *segment* file holds
*chunks*, runs of consecutive frames of one lane, each a zlib stream; it is named after its sha256 and dropped when the ring has overwritten
all its frames. Everything else in a ring (transitions, ages, what is valid) is a hundredth of its size and is saved whole elsewhere.

Units: frames are counted per lane since the start of the run, as `LaneRing.written` counts them; sizes are bytes.
"""

import hashlib
import math
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from growtrain.replay.ring import LaneRing
from growtrain.runfiles import Unreadable, read_plain, write_durably
from growtrain.settings.machine import usable_cores

_CHUNK_FRAMES = 1024  # 7 MB of 84 x 84 pixels, the piece of work of one thread
_SEGMENT_CHUNKS = 32  # a segment, the piece that is dropped, is at most 230 MB before compression
_LEVEL = 1  # leaves state vectors as large as they are; takes Atari frames to 1.5-4 % at about 500 MB/s a core; higher levels gain little


@dataclass(frozen=True)
class Chunk:
    """Frames `first` .. `first + count - 1` of `lane`: `num_bytes` of zlib data at `offset` of its file."""

    lane: int
    first: int
    count: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Segment:
    """One file: its name and content's sha256, its size, and what is in it."""

    sha256: str
    num_bytes: int
    chunks: tuple[Chunk, ...]

    def to_list(self) -> list[Any]:
        """Plain values."""
        return [self.sha256, self.num_bytes, [[c.lane, c.first, c.count, c.offset, c.num_bytes] for c in self.chunks]]

    @classmethod
    def from_list(cls, values: Any) -> Self:
        """The inverse of `to_list`; raises `Unreadable` for anything else."""
        try:
            sha256, num_bytes, chunks = values
            segment = cls(str(sha256), int(num_bytes), tuple(Chunk(*map(int, chunk)) for chunk in chunks))
        except (TypeError, ValueError) as error:
            raise Unreadable(f"a replay segment is not described as one: {str(values)[:80]}") from error
        inside = all(
            min(c.lane, c.first, c.offset, c.num_bytes) >= 0
            and 0 < c.count <= _CHUNK_FRAMES
            and c.offset + c.num_bytes <= segment.num_bytes
            for c in segment.chunks
        )
        if not (is_segment_name(segment.sha256) and inside):
            raise Unreadable(f"a replay segment names an impossible file or range: {str(values)[:80]}")
        return segment


def is_segment_name(name: str) -> bool:
    """Whether a file of that name can be a segment: it is a sha256 in lower-case hex."""
    return re.fullmatch("[0-9a-f]{64}", name) is not None


def oldest_frames(ring: LaneRing) -> npt.NDArray[np.int64]:
    """Per lane (num_lanes,), the first frame that the ring still holds."""
    oldest: npt.NDArray[np.int64] = np.maximum(ring.written - ring.rows, 0)
    return oldest


def still_needed(segments: list[Segment], ring: LaneRing) -> list[Segment]:
    """The segments of which the ring has not overwritten every frame."""
    oldest = oldest_frames(ring)
    return [s for s in segments if any(c.first + c.count > oldest[c.lane] for c in s.chunks)]


def frame_bytes(ring: LaneRing) -> int:
    """Bytes of a frame."""
    return math.prod(ring.frame_shape) * ring.frame_dtype.itemsize


def new_bytes(segments: list[Segment], ring: LaneRing) -> int:
    """Size of the frames that no segment holds, before compression."""
    return frame_bytes(ring) * sum(stop - first for _, first, stop in _missing(segments, ring))


def write_new(segments: list[Segment], ring: LaneRing, directory: Path, num_threads: int) -> list[Segment]:
    """Writes the frames that no segment holds as files in `directory`, named by their sha256, and returns their segments.

    The ring must not be written meanwhile. zlib runs outside Python's lock, so the threads share the work.

    Raises:
        OSError: the files cannot be written; what was is left to the caller to remove.
    """
    pieces = list(_pieces(segments, ring))
    written = []
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(pieces), _SEGMENT_CHUNKS):
            group = pieces[start : start + _SEGMENT_CHUNKS]
            streams = list(pool.map(lambda piece: _compress(ring, *piece), group))
            content = b"".join(streams)
            sha256 = hashlib.sha256(content).hexdigest()
            ends = np.cumsum([len(stream) for stream in streams]).tolist()
            chunks = [
                Chunk(*piece, end - len(stream), len(stream))
                for piece, stream, end in zip(group, streams, ends, strict=True)
            ]
            write_durably(directory / sha256, content)
            written.append(Segment(sha256, len(content), tuple(chunks)))
    return written


def load_frames(segments: list[Segment], ring: LaneRing, directory: Path, num_threads: int) -> None:
    """Fills the frames of a ring whose `written` has been restored.

    Raises:
        Unreadable: a frame that the ring holds is in no segment or in two, or a file does not hold what it should.
    """
    check_cover(segments, ring.written, ring.rows)
    oldest = oldest_frames(ring)
    with ThreadPoolExecutor(num_threads) as pool:
        for segment in segments:
            content = memoryview(read_plain(directory / segment.sha256, segment.num_bytes))

            def restore(chunk: Chunk, content: memoryview = content, name: str = segment.sha256) -> None:
                if chunk.first + chunk.count > oldest[chunk.lane]:
                    _restore(ring, chunk, content[chunk.offset : chunk.offset + chunk.num_bytes], name)

            list(pool.map(restore, segment.chunks))


def check_cover(segments: list[Segment], written: npt.NDArray[np.int64], rows: int) -> None:
    """Raises `Unreadable` unless the segments hold each frame of the last `rows` of every lane exactly once."""
    chunks = sorted((c.lane, c.first, c.count) for segment in segments for c in segment.chunks)
    if any(lane >= len(written) for lane, _, _ in chunks):
        raise Unreadable("a replay segment belongs to a lane that this run does not have")
    for lane, total in enumerate(written.tolist()):
        start = at = max(total - rows, 0)
        for first, count in ((first, count) for owner, first, count in chunks if owner == lane):
            if first + count <= start:
                continue
            if first > at or (first < at and at > start):
                break
            at = first + count
        else:
            if at == total:
                continue
        raise Unreadable(f"the replay segments do not hold frame {at} of lane {lane} exactly once; {total} were taken")


def _missing(segments: list[Segment], ring: LaneRing) -> Iterator[tuple[int, int, int]]:
    """(lane, first, stop) of the frames that the ring holds and no segment does."""
    known = np.zeros(ring.num_lanes, np.int64)
    for chunk in (chunk for segment in segments for chunk in segment.chunks):
        known[chunk.lane] = max(known[chunk.lane], chunk.first + chunk.count)
    for lane, (first, stop) in enumerate(zip(np.maximum(known, oldest_frames(ring)), ring.written, strict=True)):
        yield lane, int(first), int(stop)


def _pieces(segments: list[Segment], ring: LaneRing) -> Iterator[tuple[int, int, int]]:
    """(lane, first, count) of the chunks to write: no longer than a chunk may be, and never across the ring's end."""
    for lane, first, stop in _missing(segments, ring):
        while first < stop:
            count = min(stop - first, _CHUNK_FRAMES, ring.rows - first % ring.rows)
            yield lane, first, count
            first += count


def _compress(ring: LaneRing, lane: int, first: int, count: int) -> bytes:
    row = first % ring.rows
    frames: npt.NDArray[Any] = ring.frames[lane, row : row + count].cpu().numpy()
    return zlib.compress(frames.data, _LEVEL)


def _restore(ring: LaneRing, chunk: Chunk, stream: memoryview, name: str) -> None:
    expected = chunk.count * frame_bytes(ring)
    decompressor = zlib.decompressobj()
    try:
        numbers = decompressor.decompress(stream, expected + 1)  # never more, whatever the stream claims
    except zlib.error as error:
        raise Unreadable(f"replay segment {name} is not zlib data: {error}") from error
    if len(numbers) != expected or not decompressor.eof:
        raise Unreadable(f"replay segment {name} holds {len(numbers)} bytes of frames where {expected} are due")
    frames = torch.from_numpy(
        np.frombuffer(bytearray(numbers), ring.frame_dtype).reshape(chunk.count, *ring.frame_shape)
    )
    # A chunk of a ring of the same size never crosses its end; frames overwritten since are older than those kept.
    skip = max(int(oldest_frames(ring)[chunk.lane]) - chunk.first, 0)
    row = (chunk.first + skip) % ring.rows
    if row + chunk.count - skip > ring.rows:
        raise Unreadable(f"replay segment {name} crosses the end of the ring: it is of a replay of another size")
    ring.frames[chunk.lane, row : row + chunk.count - skip] = frames[skip:]


def threads() -> int:
    """Threads for compression: the cores this process may use, at most 8."""
    return min(8, usable_cores())
