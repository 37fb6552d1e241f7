"""The environment of a configuration."""

from collections.abc import Iterator
from importlib import import_module

from growtrain.environments.base import Actions, Screen, Settings, Spec, VectorEnvironment
from growtrain.environments.games import family_of


def make_environment(settings: Settings, *, seed: int) -> VectorEnvironment:
    """The lanes of a configuration; `seed` decides their episodes.

    Raises:
        ValueError: a setting is out of its range.
        Unplayable: the package that plays the game is not installed.
    """
    environment: VectorEnvironment = import_module(family_of(settings.game).module).make(settings, seed)
    return environment


def spec_of(settings: Settings) -> Spec:
    """What a network sees and may do in a game; raises `ValueError` as `make_environment` does."""
    spec: Spec = import_module(family_of(settings.game).module).spec_of(settings)
    return spec


def replay_screens(settings: Settings, *, seed: int, game: int, actions: Actions) -> Iterator[Screen]:
    """Plays the first episode of a single lane again, in colour.

    Args:
        settings: as they were, with one lane.
        seed: the lanes'.
        game: of a chain, counted from 0.
        actions: (T,) or (T, A), what was done in it.

    Returns:
        An iterator of the T + 1 screens: before each action, and at the end.
    """
    screens: Iterator[Screen] = import_module(family_of(settings.game).module).screens(settings, seed, game, actions)
    return screens
