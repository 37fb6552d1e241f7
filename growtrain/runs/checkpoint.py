"""Checkpoints: a run as it was between two steps, so that it goes on as if it had never stopped, or is evaluated.

    checkpoints/000005000000/manifest.json       size and sha256 of every file, replay segments, versions, device
    checkpoints/000005000000/state.json          counters, generators, configuration, architecture
    checkpoints/000005000000/state.safetensors   networks, optimizer slots, the replay's transitions
    checkpoints/replay/<sha256>                  frames of the replay (`replay.segments`), shared by successive checkpoints

A checkpoint is written under a partial name, synced, read back from the disk and compared with its manifest, and published by one rename;
older ones are dropped after that. Nothing is loaded before every file of it has been verified, and nothing in the format can run code:
JSON, safetensors and zlib, read from plain files whose names are not taken from what was read.

Units: frames; sizes in bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from growtrain.environments.base import Spec
from growtrain.environments.failures import RunFailed
from growtrain.learners.base import AbstractLearner
from growtrain.learners.make import make_learner
from growtrain.learners.saved import check_saved
from growtrain.replay import segments as replay_segments
from growtrain.replay.ring import LaneRing
from growtrain.replay.segments import Segment, is_segment_name
from growtrain.runfiles import (
    PARTIAL,
    Forbidden,
    Unreadable,
    published,
    read_plain,
    remove,
    sync_directory,
    verify_file,
    write_durably,
)
from growtrain.runs.frozen_values import check_saved_column
from growtrain.runs.provenance import describe_machine
from growtrain.settings.config import Config
from growtrain.settings.schedules import schedule_of
from growtrain.settings.text import ConfigError

SCHEMA = 5
_MAX_MANIFEST_BYTES = 1 << 28
_FILES = ("state.json", "state.safetensors")
_DAMAGED = ".damaged-"
_EXPECTED_COMPRESSION = (
    0.05  # of a replay of pictures that has not been compressed yet; vectors stay as large as they are
)
_SPARE_BYTES = 16 << 20


class NoCheckpoint(ConfigError):
    """The run has no checkpoint that can be loaded."""


class NeverSaved(NoCheckpoint):
    """The run ended before it made a checkpoint."""


class CheckpointFailed(RunFailed):
    """A checkpoint could not be written; nothing of it is left, and the ones before it are untouched."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that has been verified and read; the replay's frames stay on disk.

    Attributes:
        path: its directory.
        frames: frames played.
        config: of the run at that time.
        state: what the run's `state_dict` gave, tensors included.
        segments: of the replay's frames.
        machine: versions, device and threads it was made with.
        damaged: newer checkpoints that had to be passed over, each with what is wrong with it.
        num_bytes: of all files, those shared with other checkpoints included.
    """

    path: Path
    frames: int
    config: Config
    state: dict[str, Any]
    segments: tuple[Segment, ...]
    machine: dict[str, Any]
    damaged: tuple[str, ...] = ()
    num_bytes: int = 0

    def is_of(self, run_dir: Path) -> bool:
        """Whether it is a checkpoint of the run in this directory."""
        return self.path.parent.parent.resolve() == run_dir.resolve()

    def load_frames(self, ring: LaneRing) -> None:
        """Reads the replay's frames into a ring whose other state has been restored; raises `Unreadable`."""
        directory = self.path.parent / "replay"
        replay_segments.load_frames(list(self.segments), ring, directory, replay_segments.threads())


class CheckpointWriter:
    """Writes the checkpoints of one run.

    Args:
        run_dir: the run's directory.
        keep: how many to keep besides the newest.
        segments: of the checkpoint that the run was resumed from; they are not written again.
    """

    def __init__(self, run_dir: Path, keep: int, segments: tuple[Segment, ...] = ()) -> None:
        self.run_dir, self.directory = run_dir, run_dir / "checkpoints"
        self._replay = self.directory / "replay"
        self._keep = keep
        self._segments = list(segments)

    def save(self, state: dict[str, Any], ring: LaneRing, config: Config, *, frames: int, device: torch.device) -> Path:
        """Writes, verifies and publishes one checkpoint; one that is there already is left, unless the run has got on since.

        Args:
            state: nested dictionaries of tensors, arrays and plain values.
            ring: the replay, whose `state_dict` is part of `state` without its frames.
            config: of the run.
            frames: frames played, the checkpoint's name.
            device: what it was made on.

        Raises:
            CheckpointFailed: the disk is full, read-only, or did not keep what was written.
        """
        final, partial = self.directory / f"{frames:012d}", self.directory / f"{PARTIAL}-{frames:012d}"
        if final.exists() and not _is_older(final, state):
            return final
        try:
            remove(partial)
            partial.mkdir(parents=True)
            self._replay.mkdir(exist_ok=True)
            segments = replay_segments.still_needed(self._segments, ring)
            plain, tensors = _split(state | {"config": config.to_dict()})
            contents = {"state.json": json.dumps(plain).encode(), "state.safetensors": save_tensors(tensors)}
            self._require_space(sum(map(len, contents.values())), segments, ring)
            for name, content in contents.items():
                write_durably(partial / name, content)
            new = replay_segments.write_new(segments, ring, partial, replay_segments.threads())
            files = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}
            manifest = {
                "schema": SCHEMA,
                "frames": frames,
                "files": files,
                "segments": [segment.to_list() for segment in (*segments, *new)],
                "machine": describe_machine(device),
            }
            write_durably(partial / "manifest.json", json.dumps(manifest | {"sha256": _digest(manifest)}).encode())
            # Read back from the disk: it costs a pass over what is new, and the ones before are dropped on the strength of it.
            for name, (num_bytes, sha256) in (files | {s.sha256: (s.num_bytes, s.sha256) for s in new}).items():
                verify_file(partial / name, num_bytes, sha256, from_disk=True)
            for segment in new:
                os.replace(partial / segment.sha256, self._replay / segment.sha256)
            for directory in (self._replay, partial):
                sync_directory(directory)
            older = self.directory / f"{PARTIAL}-older-{frames:012d}"
            if final.exists():
                remove(older)
                os.replace(final, older)
            os.replace(partial, final)
            sync_directory(self.directory)
            remove(older)
        except (OSError, Unreadable) as error:
            with contextlib.suppress(OSError):  # nothing can be removed from a disk that has become read-only
                remove(partial)
                self._drop_unreferenced()
            raise CheckpointFailed(f"checkpoint at {frames} frames was not written: {error}") from error
        self._segments = [*segments, *new]
        try:
            for old in published(self.run_dir)[self._keep + 1 :]:
                # Half-removed, it no longer bears the name of a whole one.
                going = self.directory / f"{PARTIAL}-{old.name}"
                os.replace(old, going)
                remove(going)
            self._drop_unreferenced()
        except OSError as error:  # the new one is whole, and the next save tries again
            warnings.warn(f"older checkpoints could not be removed: {error}", stacklevel=1)
        return final

    def _require_space(self, num_bytes: int, segments: list[Segment], ring: LaneRing) -> None:
        """Raises `OSError` if the disk lacks room for files of `num_bytes` and what `segments` lack, by the compression so far."""
        raw_bytes = replay_segments.new_bytes(segments, ring)
        saved = sum(chunk.count for segment in self._segments for chunk in segment.chunks)
        saved *= replay_segments.frame_bytes(ring)
        compressed = sum(segment.num_bytes for segment in self._segments)
        expected = _EXPECTED_COMPRESSION if ring.frame_dtype == np.uint8 else 1.0
        share = 1.5 * compressed / saved if saved else expected
        needed, free = num_bytes + int(share * raw_bytes) + _SPARE_BYTES, shutil.disk_usage(self.directory).free
        if needed > free:
            raise OSError(
                f"it needs some {needed / 1e6:.0f} MB in {self.directory}, where {free / 1e6:.0f} MB are free"
            )

    def _drop_unreferenced(self) -> None:
        """Removes the segments that no published checkpoint names; none if a manifest cannot be read."""
        try:
            named = {entry[0] for path in published(self.run_dir) for entry in _manifest(path)["segments"]}
        except Unreadable:
            return
        for path in self._replay.glob("*"):
            if path.name not in named and is_segment_name(path.name):  # what else is there is not ours
                path.unlink(missing_ok=True)


def open_newest(run_dir: Path) -> Checkpoint:
    """The newest checkpoint of a run of which every file is what was written.

    Raises:
        NoCheckpoint: there is none; the message names what is wrong with those there are.
        Forbidden: a newer one may not be read.
    """
    damaged: list[str] = []
    for _, found in examine(run_dir):
        if isinstance(found, Checkpoint):
            return dataclasses.replace(found, damaged=tuple(damaged))
        if isinstance(found, Forbidden):  # it may be whole, and the run would go on from an older one
            raise found
        damaged.append(str(found))
    if not run_dir.is_dir():
        raise NoCheckpoint(f"{run_dir} is no directory: name that of a run")
    if not damaged:
        raise NeverSaved(f"{run_dir} has no checkpoint: train it first")
    raise NoCheckpoint(f"no checkpoint of {run_dir} can be loaded: {'; '.join(damaged)}")


def open_at(run_dir: Path, frames: int) -> Checkpoint:
    """The checkpoint of a run at these frames.

    Raises:
        NoCheckpoint: there is none; the message names those there are.
        Unreadable: it is damaged.
    """
    path = run_dir / "checkpoints" / f"{frames:012d}"
    if not path.is_dir():
        there = ", ".join(str(int(each.name)) for each in published(run_dir)) or "none"
        raise NoCheckpoint(f"{run_dir} has no checkpoint at {frames} frames: choose one it has ({there})")
    return _open(path)


def examine(run_dir: Path, *, after: int = -1) -> Iterator[tuple[Path, Checkpoint | Unreadable]]:
    """Every checkpoint of a run after these frames, newest first, verified and read, or what is wrong with it."""
    for path in published(run_dir):
        if int(path.name) > after:
            try:
                yield path, _open(path)
            except Unreadable as error:
                yield path, error


def set_aside_newer(run_dir: Path, frames: int) -> list[str]:
    """Takes the name from checkpoints after `frames`, which are damaged, so that the run can write them again; returns their new names."""
    names = []
    for path in published(run_dir):
        if int(path.name) > frames:
            aside = path.with_name(_DAMAGED + path.name)
            remove(aside)
            os.replace(path, aside)
            names.append(aside.name)
    return names


def load_learner(
    run_dir: Path, device: torch.device, *, at: int | None = None
) -> tuple[AbstractLearner, Config, int, int]:
    """The learner of a run's checkpoint, its configuration, its frames, and its stage.

    Args:
        run_dir: the run's.
        device: where the networks go.
        at: frames of the checkpoint; None: the newest.

    Raises:
        NoCheckpoint: the run has none that can be loaded.
        Unreadable: what it holds does not fit its configuration.
    """
    checkpoint = open_newest(run_dir) if at is None else open_at(run_dir, at)
    if checkpoint.damaged:
        warnings.warn(
            f"damaged, so that the checkpoint at {checkpoint.frames} frames is taken: {'; '.join(checkpoint.damaged)}",
            stacklevel=2,
        )
    state, config = checkpoint.state, checkpoint.config
    try:
        learner = make_learner(config, Spec.from_dict(state["spec"]), device=device)
        learner.load_state_dict(state["learner"])
        stage = schedule_of(config).stage_after(int(state["interventions"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"{checkpoint.path}: {error}") from error
    return learner, config, checkpoint.frames, stage


def _is_older(path: Path, state: dict[str, Any]) -> bool:
    """Whether a checkpoint was made before what a run has done without a frame: updates where it primes, what was owed."""
    try:
        saved = json.loads(read_plain(path / "state.json", _MAX_MANIFEST_BYTES))
    except (Unreadable, ValueError):  # damaged
        return True
    before, now = (
        (int(each.get("learner", {}).get("updates", 0)), not each.get("decision_owed"), not each.get("evaluation_owed"))
        for each in (saved, state)
    )
    return before < now


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, whole and of this schema; raises `Unreadable`."""
    if path.is_symlink():
        raise Unreadable(f"{path} is a link: a checkpoint is a plain directory")
    file = path / "manifest.json"
    content = read_plain(file, _MAX_MANIFEST_BYTES)
    try:
        manifest: dict[str, Any] = json.loads(content)
        sha256 = manifest.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(f"{file} is damaged: it is not a manifest") from error
    if manifest.get("schema") != SCHEMA:
        raise Unreadable(f"{file} is of schema {manifest.get('schema')}, and this version reads schema {SCHEMA}")
    if sha256 != _digest(manifest):
        raise Unreadable(f"{file} is damaged: its content is not what was written (sha256)")
    return manifest


def _open(path: Path) -> Checkpoint:
    """Verifies every file of a checkpoint, then reads its state; raises `Unreadable`."""
    manifest = _manifest(path)
    try:
        files = {name: (int(entry[0]), str(entry[1])) for name, entry in manifest["files"].items()}
        segments = tuple(Segment.from_list(entry) for entry in manifest["segments"])
        machine, frames = dict(manifest["machine"]), int(manifest["frames"])
        machine["versions"] = dict(machine.get("versions", {}))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise Unreadable(f"{path / 'manifest.json'} lacks what a manifest holds: {error}") from error
    if set(files) != set(_FILES) or frames != int(path.name):
        raise Unreadable(f"{path / 'manifest.json'} is of other files or frames: {', '.join(sorted(files))[:200]}")
    for name in _FILES:
        verify_file(path / name, *files[name])
    for segment in segments:
        verify_file(path.parent / "replay" / segment.sha256, segment.num_bytes, segment.sha256)
    try:
        # safetensors checks its header against the size of the file before it takes any memory for tensors.
        tensors = load_tensors(read_plain(path / "state.safetensors", files["state.safetensors"][0]))
        state = _merge(json.loads(read_plain(path / "state.json", files["state.json"][0])), tensors)
        config = Config.from_dict(state.pop("config"))
        _check_sizes(config, state, frames)
        replay_segments.check_cover(list(segments), state["ring"]["written"].numpy(), int(state["ring"]["rows"]))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(f"{path}: {type(error).__name__}: {error}") from error
    num_bytes = sum(size for size, _ in files.values()) + sum(segment.num_bytes for segment in segments)
    return Checkpoint(
        path=path.absolute(),
        frames=frames,
        config=config,
        state=state,
        segments=segments,
        machine=machine,
        num_bytes=num_bytes,
    )


def _check_sizes(config: Config, state: dict[str, Any], frames: int) -> None:
    """Raises `ValueError` where a size that decides how much is allocated is not that of a tensor, or a counter is not one."""
    ring, stage, totals = state["ring"], state["stage"], state["totals"]
    schedule = schedule_of(config)
    interventions = len(schedule.injection_frames)
    if not (isinstance(stage, int) and 0 <= stage <= interventions and len(totals) == schedule.num_stages):
        raise ValueError(
            f"stage {stage} and {len(totals)} totals are not those of a schedule with {interventions} interventions in "
            f"{schedule.num_stages} stages"
        )
    check_saved(state["learner"], config, Spec.from_dict(state["spec"]), stage)
    check_saved_column(state)
    sizes = {
        "num_envs": ((config.num_envs,), tuple(ring["written"].shape)),
        "filled rows": (ring["filled"], ring["transitions"].shape[1]),
    }
    for name, (said, found) in sizes.items():
        if said != found:
            raise ValueError(f"{name}: {said} by the configuration, {found} by the tensors")
    counters = [state["wall_seconds"], *(number for total in totals for number in total)]
    if not all(isinstance(number, int | float) for number in counters) or any(len(total) != 3 for total in totals):
        raise ValueError("a counter is not a number")
    records = [*state["resumes"], state["seconds"], state.get("gpu") or {}]
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("a record is none")
    if state["collector"]["agent_steps"] * config.frame_skip != frames:
        raise ValueError(f"{state['collector']['agent_steps']} agent steps are not {frames} frames")


def _split(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plain values in their nesting, and the tensors and arrays among them, contiguous and on the CPU, by path."""
    tensors: dict[str, Tensor] = {}
    held = set[int]()

    def plain(tree: dict[str, Any], path: str) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                kept[name] = plain(value, f"{path}{name}/")
            elif isinstance(value, Tensor) or hasattr(value, "__array__"):
                tensor = torch.as_tensor(value).detach().cpu().contiguous()
                # Tensors that share memory (a frozen encoder, views) cannot be saved as one; the others need no copy.
                memory = tensor.untyped_storage().data_ptr()
                tensors[path + name] = tensor.clone() if memory in held else tensor
                held.add(memory)
            else:
                kept[name] = value
        return kept

    return plain(tree, ""), tensors


def _merge(plain: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The inverse of `_split`; raises `ValueError` for a tensor where there is something else."""
    for path, tensor in tensors.items():
        *parents, name = path.split("/")
        place = plain
        for parent in parents:
            place = place.setdefault(parent, {})
        if not isinstance(place, dict) or name in place:
            raise ValueError(f"tensor {path} is where something else is")
        place[name] = tensor
    return plain
