"""Checkpoints: what a run leaves behind and can be evaluated or continued from.

A checkpoint is a directory `checkpoints/<frames>` with `networks.safetensors` and `state.json`; it is published by one rename, so that a
partial one never bears the final name. Nothing in it can execute code when it is loaded.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from growtrain.config import Config
from growtrain.learners.double_dqn import DoubleDQN


def save(run_dir: Path, learner: DoubleDQN, frames: int) -> Path:
    """Writes the networks as a new checkpoint and drops the one before the last."""
    directory = run_dir / "checkpoints"
    final = directory / f"{frames:012d}"
    partial = directory / f".partial-{frames:012d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {f"online.{k}": v.contiguous() for k, v in learner.online.state_dict().items()}
    tensors |= {f"target.{k}": v.contiguous() for k, v in learner.target.state_dict().items()}
    save_file(
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()},
        partial / "networks.safetensors",
    )
    state = {
        "schema": 1,
        "frames": frames,
        "updates": learner.updates,
        "head": learner.head.spec(),
        "width": learner.width,
    }
    (partial / "state.json").write_text(json.dumps(state | {"num_actions": learner.num_actions}), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in sorted(p for p in directory.iterdir() if p.name.isdigit())[:-2]:
        shutil.rmtree(old)
    return final


def load_learner(run_dir: Path, device: torch.device) -> tuple[DoubleDQN, Config, int]:
    """The networks of a run's newest checkpoint in a learner, its configuration, and its frames.

    Raises:
        FileNotFoundError: the run has no checkpoint.
    """
    config = Config.from_dict(json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["config"])
    found = sorted(p for p in (run_dir / "checkpoints").glob("*") if p.name.isdigit())
    if not found:
        raise FileNotFoundError(f"{run_dir} has no checkpoint: train it first")
    state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    learner = DoubleDQN(
        config, state["num_actions"], width=state["width"], device=torch.device("cpu"), generator=torch.Generator()
    )
    learner.head.grow_to(state["head"])
    learner.target.get_submodule("head").grow_to(state["head"])  # type: ignore[operator]  # an InjectedHead
    tensors = load_file(found[-1] / "networks.safetensors")
    for name in ("online", "target"):
        part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        getattr(learner, name).load_state_dict(part)
        getattr(learner, name).to(device)
    learner.device, learner.updates = device, state["updates"]
    learner.rebuild()
    return learner, config, state["frames"]
