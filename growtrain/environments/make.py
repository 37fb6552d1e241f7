"""The environment of a configuration."""

from importlib import import_module

from growtrain.environments.base import Settings, Spec, VectorEnvironment
from growtrain.environments.games import family_of


def make_environment(settings: Settings, *, seed: int) -> VectorEnvironment:
    """The lanes of a configuration; `seed` decides their episodes.

    Raises:
        ValueError: a setting is out of its range, or the package that plays the game is missing.
    """
    environment: VectorEnvironment = import_module(family_of(settings.game).module).make(settings, seed)
    return environment


def spec_of(settings: Settings) -> Spec:
    """What a network sees and may do in a game; raises `ValueError` as `make_environment` does."""
    spec: Spec = import_module(family_of(settings.game).module).spec_of(settings)
    return spec


def num_actions_of(settings: Settings) -> int:
    """The actions of a game."""
    return spec_of(settings).num_actions
