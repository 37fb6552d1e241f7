"""What a run ran on: versions, device, commit; for `config.json` and for checkpoints."""

import os
import platform
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

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
    return about | describe_machine(device) | {"git_commit": git_commit()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One text for each version, device or number of threads that is not what it was."""
    texts = [
        f"{name} {before.get('versions', {}).get(name)} -> {now}"
        for name, now in after["versions"].items()
        if before.get("versions", {}).get(name) != now
    ]
    return texts + [
        f"{name} {before.get(name)} -> {after[name]}"
        for name in ("device", "num_threads")
        if before.get(name) != after[name]
    ]


def git_commit() -> str | None:
    """The commit of growtrain's own source tree; None for a package that is installed, wherever that is, or copied into another tree."""
    root = Path(__file__).resolve().parents[2]
    try:
        if tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"] != "growtrain":
            return None
        # Named, because git would look for a repository above as well, and a hook's environment may point it to another.
        command = ["git", f"--git-dir={root / '.git'}", "rev-parse", "--verify", "HEAD"]
        own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=own)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return None
