"""What a run ran on: versions, device, commit; for `config.json` and for checkpoints."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from growtrain.runs.source_tree import git_state
from growtrain.settings.config import Config

_PACKAGES = ("torch", "torchrl", "tensordict", "gymnasium", "ale-py", "numpy", "safetensors", "nvidia-ml-py")


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what the numbers depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in ("growtrain", *_PACKAGES)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # imported from a directory that was never installed
        return "not installed"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads: what the last bits of a result may depend on."""
    return {
        "versions": versions(),
        "device": _device_name(device),
        "num_threads": torch.get_num_threads(),
        **git_state(),
    }


def _device_name(device: torch.device) -> str:
    """With what kernels round differently for: a CPU's instruction set, a GPU's convolutions in TF32."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) + (", TF32 convolutions" if torch.backends.cudnn.allow_tf32 else "")
    return f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def was_on_cpu(machine: dict[str, Any]) -> bool:
    """Whether what `describe_machine` described had its tensors on a CPU."""
    return str(machine.get("device")).startswith("cpu ")


def describe(config: Config, device: torch.device) -> dict[str, Any]:
    """What `config.json` holds: the configuration and what it ran on."""
    about = {"config": config.to_dict(), "fingerprint": config.fingerprint()}
    return about | describe_machine(device)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One text for each version, device, number of threads or commit that is not what it was."""
    texts = [
        f"{name} {before.get('versions', {}).get(name)} -> {now}"
        for name, now in after["versions"].items()
        if before.get("versions", {}).get(name) != now
    ]
    return texts + [
        f"{name} {before.get(name)} -> {after[name]}"
        for name in ("device", "num_threads", "git_commit", "git_modified")
        if name in before and before[name] != after[name]
    ]
