"""Says what works on this machine: one line for each thing that a run can use, with the reason where it is missing.

Units: bytes are shown in GB (10^9).
"""

import importlib
import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from growtrain.commands.commandline import Parser
from growtrain.environments.games import ATARI, FAMILIES, Family
from growtrain.settings.machine import cpu_name, cpu_quota, memory_headrooms, process_limits, usable_cores
from growtrain.settings.presets import resolve


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    Parser(prog="growtrain doctor", description="What works on this machine.").parse_strict(words)
    for what, works, details in examine():
        print(f"{'ok     ' if works else 'missing'}  {what:12} {details}")
    return 0


def examine() -> Iterator[tuple[str, bool, str]]:
    """Yields (what, whether it works, details or the reason why not)."""
    import psutil  # type: ignore[import-untyped]

    yield "python", True, platform.python_version()
    for package in ("torch", "torchrl", "tensordict", "ale-py", "gymnasium", "numpy"):
        yield package, *_import(package)
    quota = cpu_quota()
    paid = "no CPU quota" if quota is None else f"a CPU quota of {quota:g} (cgroup)"
    cores = f"{len(os.sched_getaffinity(0))} in the affinity mask, {os.cpu_count()} in the machine, {paid}"
    yield "cpu", True, cpu_name()
    yield "cores", True, f"{cores}: {usable_cores()} threads by default"
    memory = psutil.virtual_memory()
    rooms = [room for room in memory_headrooms() if room < memory.available]
    limits = [f"{min(rooms) / 1e9:.1f} GB of it left in a memory cgroup"] if rooms else []
    limits += [f"{each.name} leaves {(each.limit - each.used) / 1e9:.1f} GB" for each in process_limits()]
    text = f"{memory.available / 1e9:.1f} GB available of {memory.total / 1e9:.1f} GB"
    yield "memory", True, ", ".join([text, *limits])
    for family in FAMILIES:
        yield family.name, *_starts(family)
    yield "gpu", *_gpu()
    yield "limit", *_limit()
    yield "nvml", *_nvml()
    for package in ("tensorboard", "matplotlib"):
        yield package, *_import(package)


def _import(package: str) -> tuple[bool, str]:
    try:
        importlib.import_module(package.replace("-", "_"))
        return True, version(package)
    except Exception as error:  # whatever an import raises is the answer
        return False, f"unavailable: {error}"


def _starts(family: Family) -> tuple[bool, str]:
    from growtrain.environments.make import make_environment

    game = family.games[0] if family is ATARI else f"{family.name}/{family.games[0]}"
    try:
        environment = make_environment(resolve(None, {"game": game, "num_envs": 1})[0], seed=0)
        environment.start()
        environment.close()
        return True, f"{game} starts; {len(family.games)} games"
    except Exception as error:  # whatever stops it is the answer
        return False, f"unavailable: {error}"


def _gpu() -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "no device is visible to PyTorch" if built else "this PyTorch is built without CUDA"
        return False, f"unavailable: {reason}"
    properties = torch.cuda.get_device_properties(0)
    return True, f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"


def _limit() -> tuple[bool, str]:
    import torch

    return limit_of(torch.cuda.get_device_name(0) if torch.cuda.is_available() else None)


def limit_of(gpu: str | None) -> tuple[bool, str]:
    """The least time of the main job on a GPU by the name that its driver gives, or why there is none; None: there is no GPU."""
    from growtrain.planning.hardware import HARDWARE, hardware_of

    table = f"the table of plan --hardware has {', '.join(HARDWARE)}"
    if gpu is None:
        return False, f"{table}, and no CPU: plan times this machine instead"
    hardware = hardware_of(gpu)
    if hardware is None:
        return False, f"{gpu} is not known: {table}"

    from growtrain.environments.make import spec_of
    from growtrain.planning.limits import Model
    from growtrain.settings.config import Config

    config = Config()
    limit = Model(config, spec_of(config), "fast").limit(hardware)
    job = f"--schedule {config.schedule}, {config.total_frames / 1e6:.0f}M frames of {config.game}"
    least = f"at least {limit.training_hours:.2f} h of training, with full width {limit.baseline_hours:.2f} h"
    return True, f"modelled, not measured: {job} takes {least}"


def _nvml() -> tuple[bool, str]:
    import torch

    from growtrain.telemetry.gpu import open_monitor

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        return False, "unavailable: there is no GPU to watch; utilisation and energy will be reported as unavailable"
    monitor = open_monitor(device)
    monitor.start()
    monitor.stop()
    summary = monitor.summary()
    return bool(summary["available"]), str(summary.get("reason", f"driver {summary.get('driver_version')}"))
