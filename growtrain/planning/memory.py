"""Whether a planned run fits into the memory of this machine, before anything is allocated.

Units: bytes (GB = 10^9).
"""

import bisect
import dataclasses
import math
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from growtrain.planning.costs import Plan, format_bytes, make_plan
from growtrain.settings.text import ConfigError

SPARE_MEMORY = 0.03  # share of the free memory that a suggested capacity leaves alone, since what is free varies

_CGROUP_MEMBERSHIP, _CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def check_memory(plan: Plan, device: torch.device) -> None:
    """Refuses a run that cannot fit, before anything is allocated.

    What other processes take later is not foreseen: on the CPU the replay's memory is only committed as it fills.

    Raises:
        ConfigError: one line with the numbers and the largest `--replay-capacity` that fits.
    """
    free = {"host": _free_host_memory()}
    if device.type == "cuda":
        free["GPU"] = torch.cuda.mem_get_info(device)[0]
    config, needed = plan.config, plan.memory.needed(device.type)
    short = [name for name in free if needed[name] > free[name]]
    if not short:
        return

    def too_large(capacity: int) -> bool:
        memory = make_plan(dataclasses.replace(config, replay_capacity=capacity), plan.num_actions).memory
        return any(size > (1 - SPARE_MEMORY) * free[name] for name, size in memory.needed(device.type).items())

    granule = 1000 if config.replay_capacity >= 10_000 else 1
    smallest = -(-max(config.batch_size, config.num_envs) // granule) * granule
    capacities = range(smallest, config.replay_capacity, granule)
    fitting = bisect.bisect_left(capacities, True, key=too_large)
    remedy = (
        f"use --replay-capacity {capacities[fitting - 1]} or less"
        if fitting
        else "free memory, or lower --width or --batch-size"
    )
    shortage = " and ".join(
        f"{format_bytes(needed[name])} of {name} memory where {format_bytes(free[name])} is free" for name in short
    )
    replay = f"--replay-capacity {config.replay_capacity} ({format_bytes(plan.memory.replay)})"
    raise ConfigError(f"{replay} does not fit: the run needs {shortage}: {remedy}")


def _free_host_memory() -> int:
    """Bytes that this process may come to occupy, those it has included: by the machine and by its memory cgroups."""
    return int(
        min(psutil.virtual_memory().available, *_cgroup_headrooms(), math.inf) + psutil.Process().memory_info().rss
    )


def _cgroup_headrooms() -> list[int]:
    """Limit less usage of this process's memory cgroups (v1 and v2) and all above them."""
    headrooms = []
    for line in _CGROUP_MEMBERSHIP.read_text().splitlines() if _CGROUP_MEMBERSHIP.exists() else []:
        number, controllers, path = line.split(":", 2)
        names, bases = ("memory.max", "memory.current", "inactive_file"), (_CGROUP_ROOT, _CGROUP_ROOT / "unified")
        if "memory" in controllers.split(","):
            names, bases = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
                (_CGROUP_ROOT / "memory",) * 2,
            )
        elif number != "0":
            continue
        inside = Path() if ".." in path else Path(path.lstrip("/"))  # beyond this cgroup namespace nothing can be read
        for directory in (base / part for base in bases for part in (inside, *inside.parents)):
            if (directory / names[0]).exists() and (limit := (directory / names[0]).read_text().strip()) != "max":
                statistics = dict(entry.split() for entry in (directory / "memory.stat").read_text().splitlines())
                # Page cache that can be dropped is not in use.
                used = int((directory / names[1]).read_text()) - int(statistics.get(names[2], 0))
                headrooms.append(max(0, int(limit) - used))
    return headrooms
