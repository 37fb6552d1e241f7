"""What every benchmark records beside its numbers: the machine, the versions, the command; and how its files are written.

A benchmark's `--output results/name` gives `name.json` (everything measured, nothing rounded), `name.md` (the table) and `name.svg`.

Units: seconds; bytes.
"""

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch

from growtrain.analysis.plots import to_svg
from growtrain.runfiles import PARTIAL
from growtrain.runs.source_tree import git_state
from growtrain.settings.machine import cpu_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("growtrain", "torch", "torchrl", "tensordict", "gymnasium", "ale-py", "numpy", "stable-baselines3")
THREAD_SETTINGS = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a measurement; call it once torch's number of threads is set.

    Args:
        device: `cpu` or `cuda`; names the GPU if it is the latter.

    Returns:
        JSON-serialisable: `date` (UTC), `command`, `git_commit`, `git_modified` (tracked files differ from it), `cpu`, `instruction_set`
        (that torch's kernels use), `cores` (that this process may use), `threads` (torch's), `load_average` (of the minute before),
        `busy_cores` (that others use, over half a second in which this process sleeps), `memory_bytes`, `gpu`, `cuda`, `tf32` (of the GPU's
        convolutions), `platform`, `environment` (thread settings, null if unset) and `versions`.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        **git_state(),
        "cpu": cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "busy_cores": psutil.cpu_percent(0.5) / 100 * psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "tf32": torch.backends.cudnn.allow_tf32 if device == "cuda" else None,
        "platform": platform.platform(),
        "environment": {name: os.environ.get(name) for name in THREAD_SETTINGS},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, extremes and number of some repeats."""
    q1, median, q3 = (float(q) for q in np.percentile(values, (25, 50, 75)))
    return {"median": median, "q1": q1, "q3": q3, "min": min(values), "max": max(values), "count": len(values)}


def with_spread(values: Sequence[float], digits: int = 2) -> str:
    """`median [q1-q3]`, as tables show it."""
    s = summarize(values)
    return f"{s['median']:.{digits}f} [{s['q1']:.{digits}f}-{s['q3']:.{digits}f}]"


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def machine_lines(machine: dict[str, Any]) -> str:
    """`describe_machine`'s answer as Markdown lines for the head of a report."""
    settings = ", ".join(f"{k}={v}" for k, v in machine["environment"].items() if v is not None) or "none set"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    tf32 = ", TF32 convolutions" if machine.get("tf32") else ""
    gpu = f"{machine['gpu']} (CUDA {machine['cuda']}{tf32}), " if machine["gpu"] else ""
    cpu = " ".join(filter(None, (machine["cpu"], machine.get("instruction_set"))))
    busy = (
        f"{machine['busy_cores']:.1f} cores in use"
        if "busy_cores" in machine
        else f"load average {machine['load_average']:.1f}"
    )
    modified = " with local modifications" if machine["git_modified"] else ""
    return (
        f"- Command: `{machine['command']}`\n"
        f"- Machine: {gpu}{cpu}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB; "
        f"{machine['threads']} threads; {settings}; {busy} at the start\n"
        f"- Versions: {versions}; commit {(machine['git_commit'] or 'unknown')[:12]}{modified}; {machine['date']}\n"
    )


def write_outputs(
    output: Path, record: dict[str, Any], markdown: str, draw: "Callable[[], Figure] | None" = None
) -> None:
    """Writes `output` + `.json`, `.md` and, where matplotlib is, what `draw` draws as `.svg`; the same input gives the same bytes.

    Args:
        output: path without a suffix; its directory is made.
        record: JSON-serialisable.
        markdown: the report.
        draw: makes the figure.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    paths = [output.with_name(f"{output.name}.{suffix}") for suffix in ("json", "md")]
    for path, text in zip(paths, (json.dumps(record, indent=1) + "\n", markdown), strict=True):
        partial = path.with_name(path.name + PARTIAL)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)  # a measurement that is ended here keeps what it had
    if draw is not None:
        try:
            svg = to_svg(draw())
        except ImportError as error:
            say(f"no figure: {error}: python -m pip install 'growtrain[report]'")
        else:
            paths.append(output.with_name(f"{output.name}.svg"))
            paths[-1].write_text(svg, encoding="utf-8")
    say(f"wrote {', '.join(map(str, paths))}")


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def say(text: str) -> None:
    """Progress, away from the report."""
    print(text, file=sys.stderr, flush=True)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_events(profiler: torch.profiler.profile) -> list[Any]:
    """The kernels and copies that a profiler saw on a GPU."""
    return [e for e in profiler.events() or () if e.device_type.name == "CUDA" and not e.is_user_annotation]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
