"""Whether a planned run fits into the memory of this machine, before anything is allocated.

Units: bytes (GB = 10^9).
"""

import bisect
import dataclasses
import math

import psutil  # type: ignore[import-untyped]
import torch

from growtrain.planning.costs import Memory, Plan, format_bytes, make_plan
from growtrain.settings.machine import memory_headrooms, process_limits
from growtrain.settings.text import ConfigError

SPARE_MEMORY = 0.03  # share of the free memory that a suggested capacity leaves alone, since what is free varies

# Mapped beyond what is occupied, on the generous side of what was seen on Linux x86-64: libraries that a run loads as it sets out, and
# each thread's stack and share of malloc's arenas, among them those of the emulators.
MAPPED_BYTES, MAPPED_BYTES_PER_THREAD = 512 * 2**20, 192 * 2**20


def check_memory(plan: Plan, device: torch.device) -> None:
    """Refuses a run that cannot fit, before anything is allocated.

    What other processes take later is not foreseen: on the CPU the replay's memory is only committed as it fills.

    Raises:
        ConfigError: one line with the numbers and the largest `--replay-capacity` that fits.
    """
    free = _free(device)
    config, needed = plan.config, _needed(plan.memory, device, plan.config.threads)
    short = [name for name in free if needed[name] > free[name]]
    if not short:
        return

    def too_large(capacity: int) -> bool:
        memory = make_plan(dataclasses.replace(config, replay_capacity=capacity), plan.spec).memory
        sizes = _needed(memory, device, config.threads)
        return any(sizes[name] > (1 - SPARE_MEMORY) * most for name, most in free.items())

    granule = 1000 if config.replay_capacity >= 10_000 else 1
    smallest = -(-max(config.batch_size, config.num_envs) // granule) * granule
    capacities = range(smallest, config.replay_capacity, granule)
    fitting = bisect.bisect_left(capacities, True, key=too_large)
    if fitting:
        remedy = f"use --replay-capacity {capacities[fitting - 1]} or less"
    elif all("ulimit" in name for name in short):
        remedy = "no replay fits: raise the limit"
    else:
        remedy = "free memory, or lower --width or --batch-size"
    shortage = " and ".join(
        f"{format_bytes(needed[name])} of {name} where {format_bytes(free[name])} is free" for name in short
    )
    replay = f"--replay-capacity {config.replay_capacity} ({format_bytes(plan.memory.replay)})"
    raise ConfigError(f"{replay} does not fit: the run needs {shortage}: {remedy}")


def _needed(memory: Memory, device: torch.device, threads: int) -> dict[str, int]:
    """Bytes that a run comes to use, by what limits them."""
    needed = memory.needed(device.type)
    mapped = needed["host"] + MAPPED_BYTES + threads * MAPPED_BYTES_PER_THREAD
    return {f"{name} memory": size for name, size in needed.items()} | {
        f"address space ({limit.name})": mapped for limit in process_limits()
    }


def _free(device: torch.device) -> dict[str, int]:
    """Bytes that this process may come to use, those it occupies included, by what limits them."""
    resident = psutil.Process().memory_info().rss
    free = {"host memory": int(min(psutil.virtual_memory().available, *memory_headrooms(), math.inf)) + resident}
    if device.type == "cuda":
        free["GPU memory"] = torch.cuda.mem_get_info(device)[0]
    # What is mapped and not occupied stays so: libraries.
    return free | {
        f"address space ({limit.name})": max(0, limit.limit - limit.used) + resident for limit in process_limits()
    }
