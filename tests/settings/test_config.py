"""Configuration: validation with remedies, JSON round trip, presets, the scaling of short budgets."""

import dataclasses
import json
from typing import Any, get_args

import numpy as np
import pytest

from growtrain.settings.config import Config, Grow
from growtrain.settings.presets import modern, paper, resolve, sac
from growtrain.settings.text import ConfigError, format_count, format_hours, parse_count

M = 10**6


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("200M", 200 * M),
        ("100k", 100_000),
        ("0.5M", M // 2),
        ("1_000", 1000),
        ("7", 7),
        ("2.5K", 2500),
        ("1G", 10**9),
        ("1e6", M),
    ],
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count
    assert parse_count(format_count(count)) == count


def test_short_hours_are_not_said_to_be_none() -> None:
    assert [format_hours(hours) for hours in (0, 0.00123, 0.0999, 0.1, 12.345)] == [
        "0.00",
        "0.0012",
        "0.0999",
        "0.10",
        "12.35",
    ]
    assert [format_hours(hours, "+") for hours in (-0.004, 3)] == ["-0.0040", "+3.00"]


@pytest.mark.parametrize("text", ["9007199254740993", "-9007199254740993", "123456789012345678901234567890"])
def test_whole_numbers_are_read_exactly(text: str) -> None:
    """2 ** 53 + 1 is the first that a float is not."""
    assert parse_count(text) == int(text)
    assert parse_count(text + "M") == int(text) * M


@pytest.mark.parametrize("text", ["", "k", "many", "1.5", "nan", "inf", "1e400", "10kk"])
def test_what_is_not_a_count(text: str) -> None:
    with pytest.raises(ConfigError, match="write for example"):
        parse_count(text)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_envs", 0),
        ("total_frames", -1),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("replay_ratio", -0.25),
        ("epsilon_end", 1.5),
        ("epsilon_start", -0.1),
        ("sticky_actions", 2.0),
        ("discount", 1.1),
        ("learning_starts", 200 * M),
        ("learning_starts", 8),
        ("replay_capacity", 4),
        ("eval_frames", 0),
        ("anchor", "sideways"),
        ("normalization", "batch"),
        ("max_episode_frames", 1),
        ("optimizer_decay", 1.0),
        ("activation", "swish"),
        ("regularizer", "l3"),
        ("regularizer_strength", -1e-4),
        ("regularizer_strength", float("inf")),
        ("weight_projection", "nap"),  # without normalised layers there is nothing to project
    ],
)
def test_bad_values_name_the_flag_and_the_remedy_in_one_line(setting: str, value: object) -> None:
    with pytest.raises(ConfigError) as raised:
        dataclasses.replace(Config(), **{setting: value})  # type: ignore[arg-type]
    message = str(raised.value)
    assert "--" + setting.replace("_", "-") in message
    assert "\n" not in message


@pytest.mark.parametrize("activation", ["crelu", "fourier"])
def test_an_anchor_that_pairs_units_is_refused_where_units_have_two_outputs(activation: str) -> None:
    with pytest.raises(
        ConfigError, match=f"--anchor is mirrored: it needs --activation relu, not {activation}: use --anchor zero"
    ):
        Config(anchor="mirrored", activation=activation)  # type: ignore[arg-type]


@pytest.mark.parametrize(("activation", "width"), [("relu", 1), ("crelu", 1), ("fourier", 2)])
def test_a_layer_of_one_unit_is_not_normalized(activation: Any, width: int) -> None:
    """It would be a constant."""
    with pytest.raises(ConfigError, match=f"--width is {width}: it gives one unit"):
        Config(normalization="layer", activation=activation, width=width)
    Config(normalization="layer", activation=activation, width=2 * width)
    Config(normalization="layer", activation=activation, width=width, schedule="full1x")
    Config(activation=activation, width=width)


def test_json_round_trip_and_fingerprint() -> None:
    config = modern(game="pong", seed=-3)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="flavour"):
        Config.from_dict(config.to_dict() | {"flavour": 1})
    older = {name: value for name, value in config.to_dict().items() if name not in ("grow", "target_tau")}
    assert Config.from_dict(older) == config  # neither has an effect on discrete actions
    with pytest.raises(ConfigError, match="target_tau"):
        Config.from_dict(older | {"game": "mujoco/Hopper-v5", "schedule": "fixed"})
    with pytest.raises(ConfigError, match="lr"):
        Config.from_dict({name: value for name, value in config.to_dict().items() if name != "lr"})
    assert dataclasses.replace(config, log_period=5).fingerprint() == config.fingerprint()
    assert dataclasses.replace(config, lr=1e-3).fingerprint() != config.fingerprint()
    # A flag that came later leaves the cells of a sweep what they were, where it has no effect.
    assert dataclasses.replace(config, target_tau=0.1).fingerprint() == config.fingerprint()
    assert Config().fingerprint() == "d2a4bf71821a"
    continuous = dataclasses.replace(config, game="mujoco/Hopper-v5", schedule="fixed")
    assert dataclasses.replace(continuous, target_tau=0.1).fingerprint() != continuous.fingerprint()


def test_what_grows_is_part_of_what_a_sac_run_is_where_something_grows_or_is_wide_from_the_start() -> None:
    def fingerprint(schedule: str, grow: Grow) -> str:
        return sac(game="mujoco/HalfCheetah-v5", schedule=schedule, grow=grow).fingerprint()

    # Those of runs that were made when fullNx widened all networks, whatever `grow` was.
    assert fingerprint("full3x", "both") == "0f07d907e912"
    assert fingerprint("grow3x", "both") == "181bec54fe93"
    for schedule, others in (("full3x", 3), ("grow3x", 3), ("fixed", 1)):
        assert len({fingerprint(schedule, grow) for grow in get_args(Grow)}) == others


def test_seeds_of_any_sign_and_size_stay_different() -> None:
    seeds = [0, 1, -1, 2**31, -(2**31), 2**70]
    entropies = [Config(seed=seed).entropy for seed in seeds]
    assert len(set(entropies)) == len(seeds)
    assert min(entropies) >= 0


def test_the_paper_preset_is_dqn_zoos() -> None:
    """Every value of the baseline agent, written down a second time."""
    config = paper()
    expected = {
        "total_frames": 200 * M,
        "replay_capacity": M,
        "learning_starts": 200_000,
        "batch_size": 32,
        "replay_ratio": 0.25,
        "target_period": 120_000,
        "optimizer": "centered_rmsprop",
        "lr": 2.5e-4,
        "optimizer_decay": 0.95,
        "optimizer_eps": 0.01 / 32**2,
        "discount": 0.99,
        "reward_clip": 1.0,
        "life_loss_terminal": True,
        "epsilon_start": 1.0,
        "epsilon_end": 0.01,
        "epsilon_decay_frames": 4 * M,
        "eval_epsilon": 0.01,
        "eval_period": M,
        "eval_frames": M // 2,
        "max_episode_frames": 108_000,
        "noop_max": 30,
        "sticky_actions": 0.0,
        "output_bias": "shared",
        "width": 512,
        "encoder_width": 1.0,
        "max_grad_norm": 0.0,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_short_budgets_shrink_what_was_not_given() -> None:
    assert resolve("paper", {}) == (paper(), [])
    config, notes = resolve("paper", {"total_frames": 100_000})
    assert config.learning_starts < 100_000 / 8  # the first injection of grow3x comes after it
    assert config.replay_capacity == 25_000
    assert 0 < config.eval_period <= 25_000
    assert any("learning_starts" in note for note in notes)
    config, notes = resolve("paper", {"total_frames": 100_000, "learning_starts": 9_000, "target_period": 120_000})
    assert (config.learning_starts, config.target_period) == (9_000, 120_000)
    assert not any("learning_starts" in note for note in notes)
    half, _ = resolve("paper", {"total_frames": 100 * M})
    assert (half.learning_starts, half.epsilon_decay_frames, half.target_period) == (100_000, 2 * M, 60_000)


@pytest.mark.parametrize(
    ("explicit", "freeze"),
    [
        ({}, "network"),
        ({"total_frames": 100_000, "schedule": "adaptive"}, "network"),
        ({"freeze": "heads"}, "heads"),
        ({"anchor": "mirrored"}, "heads"),
        ({"trainable_heads": "all"}, "heads"),
        ({"activation": "crelu"}, "heads"),  # a live head of which cannot begin at 0
        ({"schedule": "every:1k", "total_frames": 50_000}, "heads"),  # without a copy of the target for each
        ({"schedule": "fixed"}, "heads"),  # without an effect, as in the paper's preset
        ({"intervention": "reset-head"}, "heads"),
        ({"game": "minatar/breakout"}, "heads"),
    ],
)
def test_without_a_preset_atari_freezes_networks_whole_where_nothing_asks_for_heads(
    explicit: dict[str, Any], freeze: str
) -> None:
    config, notes = resolve(None, explicit)
    assert config.freeze == freeze
    assert any("an injection freezes the whole network" in note for note in notes) == (freeze == "network")
    cannot = explicit.keys() == {"activation"} or ("schedule" in explicit and explicit["schedule"].startswith("every"))
    assert any("it could not freeze the whole network: --" in note for note in notes) == cannot
    assert dataclasses.replace(config, freeze="heads") == resolve(None, explicit | {"freeze": "heads"})[0]
    assert resolve("paper", explicit)[0].freeze == "heads"


@pytest.mark.parametrize("total_frames", [10_000, 20_000, 100_000, M, 10 * M, 199 * M])
@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_every_budget_gives_a_run_that_grows_after_it_learns(preset: str, total_frames: int) -> None:
    from growtrain.settings.schedules import make_schedule

    config, _ = resolve(preset, {"total_frames": total_frames})  # type: ignore[arg-type]
    make_schedule("grow3x", config.total_frames, config.learning_starts)
    assert config.log_period <= total_frames / 4


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("life_loss_terminal", "no", "give True or False"),
        ("seed", 1.5, "give a whole number"),
        ("seed", "x", "give a whole number"),
        ("num_envs", True, "give a whole number"),
        ("width", [], "give a whole number"),
        ("lr", "fast", "give a number"),
        ("schedule", None, "give text"),
        ("game", None, "give text"),
        ("track", 3, "give text"),
    ],
)
def test_a_value_of_another_kind_names_its_field(name: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        Config(**{name: value})
    assert str(refusal.value).startswith(f"--{name.replace('_', '-')} is {value!r}: ")


def test_numbers_of_other_kinds_are_taken_as_such() -> None:
    config = Config(total_frames=2e8, seed=np.int64(3), lr=np.float32(0.5))  # type: ignore[arg-type]
    assert (config.total_frames, config.seed, config.lr) == (200 * M, 3, 0.5)
    assert [type(value) for value in (config.total_frames, config.seed, config.lr)] == [int, int, float]
    assert config.fingerprint() == Config(seed=3, lr=0.5).fingerprint()
