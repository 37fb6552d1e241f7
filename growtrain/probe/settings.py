"""What a probe is run with; light, so that a wrong flag is answered at once."""

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from growtrain.environments.games import family_of
from growtrain.settings.config import OptimizerName
from growtrain.settings.text import ConfigError, flag

TargetKind = Literal["random", "value"]
Sweep = Literal["none", "init"]

LEAST_TASKS = 8  # the first of three injections comes at an eighth


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An optimizer, and thereby what a warm start loses.

    Attributes:
        optimizer: `adam`, or the trainer's own `centered_rmsprop`.
        encoder_lr, head_lr: learning rates.
    """

    optimizer: OptimizerName
    encoder_lr: float
    head_lr: float


SETTINGS: dict[str, Setting] = {
    "encoder": Setting(optimizer="adam", encoder_lr=6e-4, head_lr=6e-4),
    "head": Setting(optimizer="adam", encoder_lr=1e-5, head_lr=3e-3),
    "rmsprop": Setting(optimizer="centered_rmsprop", encoder_lr=2.5e-4, head_lr=2.5e-4),
}


def setting_of(name: str) -> Setting:
    """A setting by its name, or as written out: `adam:1e-3:1e-4`, optimizer and learning rates of encoder and head.

    Raises:
        ConfigError: neither.
    """
    if name in SETTINGS:
        return SETTINGS[name]
    optimizer, *rates = name.split(":")
    if optimizer in get_args(OptimizerName):
        with contextlib.suppress(ValueError):
            encoder_lr, head_lr = (float(rate) for rate in rates)
            if 0 < encoder_lr < math.inf and 0 < head_lr < math.inf:
                return Setting(optimizer=cast(OptimizerName, optimizer), encoder_lr=encoder_lr, head_lr=head_lr)
    raise ConfigError(
        f"--setting: {name!r} is unknown: choose from {', '.join(SETTINGS)}, or write optimizer and learning rates of encoder and "
        "head, such as adam:1e-3:1e-4"
    )


SIDES = {"small": 42, "nature": 84}  # of the square frames of each size; 42 are means of 2 x 2 pixels


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What all records of one directory have in common.

    Attributes:
        game: Atari game, in snake_case.
        policy: directory of the run whose newest checkpoint plays; empty: random play.
        size: a name in `SIDES`; decides the network, too.
        sweep: `none`: the interventions; `init`: the initialisation of an injected head.
        num_frames: frames in the data set.
        num_tasks: K.
        num_updates: gradient steps on each task.
        batch_size: frames in one update.
    """

    game: str = "up_n_down"
    policy: str = ""
    size: str = "small"
    sweep: Sweep = "none"
    num_frames: int = 64
    num_tasks: int = 16
    num_updates: int = 500
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Checks the fields; raises `ConfigError`."""
        if family_of(self.game).name != "atari":
            raise ConfigError(
                f"--game {self.game}: the probe's networks see screens of 84 x 84 pixels: name an Atari game"
            )
        require_known("--size", [self.size], SIDES)
        require_known("--sweep", [self.sweep], get_args(Sweep))
        for name, least in (("num_tasks", LEAST_TASKS), ("num_updates", 1), ("batch_size", 1), ("num_frames", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}: it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A setting (see `setting_of`), a kind of targets and a seed: what the arms of one comparison share."""

    setting: str
    targets: TargetKind
    seed: int


def make_cells(settings: Sequence[str], kinds: Sequence[str], num_seeds: int) -> list[Cell]:
    """All combinations, seed by seed; raises `ConfigError` for an unknown name or no seed."""
    for setting in settings:
        setting_of(setting)
    require_known("--targets", kinds, get_args(TargetKind))
    if num_seeds < 1:
        raise ConfigError(f"--seeds is {num_seeds}: it must be at least 1")
    return [
        Cell(setting=setting, targets=kind, seed=seed)
        for seed in range(num_seeds)
        for setting in settings
        for kind in get_args(TargetKind)
        if kind in kinds
    ]


def require_known(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises `ConfigError` for the first name that is not known."""
    for value in given:
        if value not in known:
            raise ConfigError(f"{name}: {value!r} is unknown: choose from {', '.join(known)}")
