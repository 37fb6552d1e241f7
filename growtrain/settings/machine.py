"""What the kernel allows this process, on Linux: cores, memory of control groups (cgroup v1 and v2), address space.

A limit of a control group holds for all that is below it, so those of every ancestor are read, as far as this cgroup namespace shows them.

Units: bytes; cores as a number, maybe a fraction.
"""

import contextlib
import os
import platform
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUP_MEMBERSHIP, CGROUP_ROOT, PROCESS_STATUS = (
    Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/self/status"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ProcessLimit:
    """A limit on what this process may map.

    Attributes:
        name: as a person knows it.
        limit: the most.
        used: of it.
    """

    name: str
    limit: int
    used: int


def cpu_name() -> str:
    """The processor's name; its architecture where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def usable_cores() -> int:
    """Cores that this process can keep busy: those in its affinity mask, as many as its CPU quotas pay for, and at least 1."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota() -> float | None:
    """The least CPU quota of this process's control groups, in cores; None without any."""
    quotas = []
    for version, directory in _cgroups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            if version == 2:
                quota, period = (directory / "cpu.max").read_text().split()
            else:
                quota, period = ((directory / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_headrooms() -> list[int]:
    """Limit less usage of each of this process's memory cgroups."""
    headrooms = []
    for version, directory in _cgroups("memory"):
        limit, usage, cache = (
            ("memory.max", "memory.current", "inactive_file")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        with contextlib.suppress(OSError, ValueError):
            most = int((directory / limit).read_text())  # not "max"
            statistics = dict(entry.split() for entry in (directory / "memory.stat").read_text().splitlines())
            # Page cache that can be dropped is not in use.
            headrooms.append(max(0, most - int((directory / usage).read_text()) + int(statistics.get(cache, 0))))
    return headrooms


def process_limits() -> list[ProcessLimit]:
    """The limits that a shell sets with `ulimit`, those that there are."""
    kinds = (("ulimit -v", resource.RLIMIT_AS, "VmSize"), ("ulimit -d", resource.RLIMIT_DATA, "VmData"))
    soft = {name: resource.getrlimit(kind)[0] for name, kind, _ in kinds}
    if all(limit == resource.RLIM_INFINITY for limit in soft.values()):
        return []
    status = dict(line.split(":", 1) for line in PROCESS_STATUS.read_text().splitlines() if ":" in line)
    return [
        ProcessLimit(name=name, limit=soft[name], used=1024 * int(status[field].split()[0]))
        for name, _, field in kinds
        if soft[name] != resource.RLIM_INFINITY
    ]


def _cgroups(controller: str) -> Iterator[tuple[int, Path]]:
    """Version and directory of the control groups of this process, and all above them, that may hold a controller's limits."""
    try:
        lines = CGROUP_MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            version, bases = 1, [CGROUP_ROOT / name for name in dict.fromkeys((controller, controllers))]
        elif number == "0":
            version, bases = 2, [CGROUP_ROOT, CGROUP_ROOT / "unified"]
        else:
            continue
        inside = Path() if ".." in path else Path(path.lstrip("/"))  # beyond this cgroup namespace nothing can be read
        for base in bases:
            for part in (inside, *inside.parents):
                yield version, base / part
