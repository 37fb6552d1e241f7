"""What a run has by default: the preset of its game, and injections that freeze the whole network where no preset is named."""

from typing import Any

import pytest

from growtrain.settings.presets import resolve

WHOLE = "an injection freezes the whole network, so that updates stay cheap; the paper's is --freeze heads"


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "grow3x"},
        {"schedule": "adaptive", "game": "minatar/breakout"},
        {"schedule": "at-switch", "game": "minatar/breakout+asterix", "live_encoder": "cold"},
        {"schedule": "grow1x", "total_frames": 100_000, "freeze_encoder_at": 1},
    ],
)
def test_an_injection_freezes_the_whole_network_where_no_preset_is_named(settings: dict[str, Any]) -> None:
    config, notes = resolve(None, settings)
    assert config.freeze == "network"
    assert WHOLE in notes
    named, notes = resolve(config.preset, settings)
    assert named.freeze == "heads"
    assert WHOLE not in notes


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "fixed"},
        {"schedule": "full3x"},
        {"schedule": "reset"},
        {"schedule": "grow3x", "intervention": "shrink-perturb"},
        {"schedule": "grow3x", "freeze": "heads"},
        {"schedule": "grow3x", "anchor": "mirrored"},
        {"schedule": "grow3x", "trainable_heads": "all"},
        {"schedule": "grow3x", "activation": "crelu"},
        {"schedule": "at:199999000"},  # no copy of the target comes in time
        {"schedule": "grow3x", "game": "mujoco/HalfCheetah-v5"},
    ],
)
def test_what_was_given_wins_and_what_cannot_freeze_all_freezes_heads(settings: dict[str, Any]) -> None:
    config, notes = resolve(None, settings)
    assert config.freeze == "heads"
    assert WHOLE not in notes
    assert all(getattr(config, name) == value for name, value in settings.items())
