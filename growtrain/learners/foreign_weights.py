"""Weights of a Nature or MinAtar DQN from elsewhere: a PyTorch or safetensors file of any name, its tensors found by their shapes.

    CleanRL              network.0, .2, .4 (convolutions), network.7 and .9 (linear); also q_network.*
    Stable-Baselines3    q_net.features_extractor.cnn.0, .2, .4, q_net.features_extractor.linear.0, q_net.q_net.0  (policy.pth of its .zip)
    Dopamine's shape     any names: conv 8x8, 4x4 and 3x3, then linear and linear
    MinAtar              conv, fc_hidden, output: conv 3x3 on as many channels as the game has, then linear and linear

What they have in common with `QNetwork`: frames / 255, the newest of four frames last, or MinAtar's channels, and features flattened
channel by channel. A network with other conventions has the same shapes and is taken without complaint; that its scores hold in the new
run is how to know.

Nothing in a file can run code: PyTorch's are read with `weights_only=True`. So no exported program is taken. `torch.jit.load` runs the
`__setstate__` of a TorchScript file, which can write files; `torch.export.load` falls back to a pickle where a safe one fails, takes
pickled weights if the file says so, and evaluates its symbolic sizes (torch 2.13, `_export/serde/serialize.py`).

Units: tensors are float32.
"""

import hashlib
import io
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from growtrain.learners.base import AbstractLearner
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.networks.encoders import MINATAR, NATURE
from growtrain.runfiles import INITIAL_WEIGHTS, Unreadable, read_plain, write_durably
from growtrain.settings.text import ConfigError

_NATURE_SHAPE: Final = (4, 84, 84)  # of an observation: frames, height, width
_MINATAR_SIDE: Final = 10  # cells
_MAX_BYTES = 1 << 30
_ELSEWHERE = {"target", "targets", "optim", "optims", "optimizer", "optimizers", "optimiser"}  # words of a name
_PROGRAMS = {"/constants.pkl": "TorchScript", "/archive_format": "torch.export"}  # by a file that no other archive has
# What numpy's numbers are made of, which lie beside weights in many checkpoints; NumPy 1 and 2 name the function differently.
_NUMBERS: Final[list[Any]] = [
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *{type(np.dtype(kind)) for kind in (*np.typecodes["AllInteger"], *np.typecodes["Float"], "?")},
]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A network's weights under the names of `QNetwork`.

    Attributes:
        tensors: by name, as its `state_dict` has them before any injection.
        width: hidden units of the head.
        encoder_width: factor on the channels.
        num_actions: A.
        observation_shape: (C, H, W) of what it sees.
        shared_bias: whether the output layer has one bias for all actions.
        sources: the name in the file of each.
    """

    tensors: dict[str, Tensor]
    width: int
    encoder_width: float
    num_actions: int
    observation_shape: tuple[int, int, int]
    shared_bias: bool
    sources: dict[str, str]


def read_weights(path: Path) -> Weights:
    """Reads and recognises a file of weights.

    Raises:
        ConfigError: it cannot be read safely, or holds no such network; the line says which tensors it has.
    """
    return recognise(_read(path), path)


def recognise(tensors: dict[str, Tensor], path: Path) -> Weights:
    """Finds the layers of a Nature DQN, or of MinAtar's, which has a single convolution, among `tensors` by their shapes.

    What a whole word of its path names a target network's or an optimizer's is passed over (`q_net_target`, not `retargeted`), and
    single numbers that are no layer's, such as a step or a temperature.

    Raises:
        ConfigError: a layer is missing, there are two that fit, or there are tensors beside them.
    """
    own = {name: tensor for name, tensor in tensors.items() if not _ELSEWHERE & _words(name)}
    layers: tuple[tuple[int, int, int], ...]
    convolutions = [tensor for tensor in own.values() if tensor.dim() == 4]
    if len(convolutions) == 1:
        kind, layers, shape = "MinAtar", MINATAR, (convolutions[0].shape[1], _MINATAR_SIDE, _MINATAR_SIDE)
        wanted = "a convolution (3x3) and two linear layers"
    else:
        kind, layers, shape = "Nature", NATURE, _NATURE_SHAPE
        wanted = "three convolutions (8x8, 4x4, 3x3) on 4 frames and two linear layers"

    def find(what: str, *shape: int | None) -> str:
        fitting = [
            name
            for name, tensor in own.items()
            if tensor.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        ]
        if len(fitting) != 1:
            found = ", ".join(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in own.items())
            raise ConfigError(
                f"{path} is not a {kind} DQN: it has {len(fitting) or 'no'} {what}; wanted are {wanted}, found: "
                f"{found[:600] or 'no tensor'}"
            )
        return fitting[0]

    sources: dict[str, str] = {}
    (channels, side, _), widths = shape, []
    for index, (_, kernel, stride) in enumerate(layers):
        name = find(f"convolution of {channels} channels, {kernel}x{kernel}", None, channels, kernel, kernel)
        sources[f"encoder.layers.{2 * index}"] = name
        channels, side = own[name].shape[0], (side - kernel) // stride + 1
        widths.append(channels)
    hidden = find(f"linear layer of {channels * side**2} features", None, channels * side**2)
    width = own[hidden].shape[0]
    output = find(f"linear layer of {width} features", None, width)
    sources |= {"head.live.0": hidden, "head.live.2": output}
    encoder_width = widths[0] / layers[0][0]
    if widths != [max(1, round(full * encoder_width)) for full, _, _ in layers]:
        raise ConfigError(
            f"{path} has convolutions of {widths} channels: wanted are 32, 64 and 64, or a multiple of them"
        )
    found: dict[str, Tensor] = {}
    for layer, name in sources.items():
        *module, last = name.split(".")
        bias = ".".join((*module, "bias"))
        if last != "weight" or bias not in own:
            raise ConfigError(f"{path}: {name} has no bias beside it: every layer of a {kind} DQN has one")
        found |= {f"{layer}.weight": own.pop(name), f"{layer}.bias": own.pop(bias)}
    own = {name: t for name, t in own.items() if t.numel() != 1 or name.split(".")[-1] in ("weight", "bias")}
    if own:
        raise ConfigError(
            f"{path} has tensors that a {kind} DQN does not have, and would play otherwise: {', '.join(own)[:300]}"
        )
    for name, tensor in found.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ConfigError(f"{path}: {name} holds values that are not finite numbers: take an earlier file")
    return Weights(
        tensors={name: tensor.to(torch.float32).contiguous() for name, tensor in found.items()},
        width=width,
        encoder_width=encoder_width,
        num_actions=found["head.live.2.weight"].shape[0],
        observation_shape=shape,
        shared_bias=found["head.live.2.bias"].numel() == 1,
        sources=sources,
    )


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, whatever the file is called."""
    content = read_plain(path.resolve(), _MAX_BYTES)  # caches of downloads are full of links
    if content[8:9] == b"{" and content[:2] != b"PK":  # the length of its header, then the header
        try:
            return load_safetensors(content)
        except SafetensorError as error:
            raise ConfigError(f"{path} is not a whole safetensors file: {error}") from error
    members = _members(content) if content[:2] == b"PK" else []
    if "policy.pth" in members:
        raise ConfigError(f"{path} is an archive of Stable-Baselines3: take policy.pth out of it first")
    for ending, kind in _PROGRAMS.items():
        if any(member.endswith(ending) for member in members):
            raise ConfigError(
                f"{path} is a program of {kind}, and to read it is to run what it brings along: save the model's state_dict() by "
                "torch.save or safetensors"
            )
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            return _flatten(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception as error:  # what is not a file of weights fails in many ways
        raise ConfigError(
            f"{path} is not a file of weights alone ({_first_line(error)}): save model.state_dict() by torch.save or safetensors"
        ) from error


def _members(content: bytes) -> list[str]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.namelist()
    except zipfile.BadZipFile:
        return []


def _words(name: str) -> set[str]:
    """The words of a dotted path: `agent.qNet_target.0` -> agent, q, net, target."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def _first_line(error: Exception) -> str:
    """What went wrong in a line of plain text."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _flatten(tree: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of nested dictionaries by dotted path."""
    if isinstance(tree, Tensor):
        return {path: tree}
    if not isinstance(tree, dict):
        return {}
    found: dict[str, Tensor] = {}
    for name, value in tree.items():
        found |= _flatten(value, f"{path}.{name}" if path else str(name))
    return found


def save_initial(weights: Weights, run_dir: Path) -> None:
    """Puts the weights into a run's directory, for the run to begin with, however often it has to begin."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_durably(run_dir / INITIAL_WEIGHTS, save_safetensors(weights.tensors))


def initial_sha256(run_dir: Path) -> str | None:
    """What tells the weights that `save_initial` left from others; None where there are none."""
    try:
        return hashlib.sha256(read_plain(run_dir / INITIAL_WEIGHTS, _MAX_BYTES)).hexdigest()
    except Unreadable:
        return None


def load_initial(learner: AbstractLearner, run_dir: Path, generator: torch.Generator) -> None:
    """Begins with the weights that `save_initial` left, in both networks of a DQN; does nothing where there are none.

    Args:
        learner: as it was made.
        run_dir: of the run.
        generator: source of fresh weights (CPU), where those of the file are frozen from the start.

    Raises:
        Unreadable: the file is missing where it is needed, damaged, or not of this configuration.
    """
    path, config = run_dir / INITIAL_WEIGHTS, learner.config
    if not isinstance(learner, DoubleDQN) or not (path.exists() or config.frozen_width):
        return
    try:
        tensors = load_safetensors(read_plain(path, _MAX_BYTES))
        learner.initial.clear()  # what it keeps to, if to anything, is what it begins with
        if config.frozen_width:
            learner.begin_beside(tensors, generator)
        else:
            for network in (learner.online, learner.target):
                network.load_state_dict(tensors)
            learner.rebuild()
    except (SafetensorError, RuntimeError) as error:
        raise Unreadable(f"{path} does not fit this run: {str(error).splitlines()[0]}") from error
