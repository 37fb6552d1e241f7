"""Names of games whose family is not said, or is all that is said."""

import pytest

from growtrain.environments.games import canonical_game


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("HalfCheetah-v5", "mujoco/HalfCheetah-v5"),
        ("humanoid", "mujoco/Humanoid-v5"),
        ("quadruped_run", "dmc/quadruped-run"),
        ("walker-walk", "dmc/walker-walk"),
        ("space-invaders + asterix", "minatar/space_invaders+asterix"),
    ],
)
def test_a_game_without_its_family_is_named_with_it(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match="unknown game") as caught:
        canonical_game(name)
    assert str(caught.value).endswith(f"did you mean {meant}?")
    assert canonical_game(meant) == meant


@pytest.mark.parametrize(
    ("name", "remedy"), [("phoenix+pong", "minatar/asterix[+]seaquest"), ("alien+tetris", "chains are of MinAtar's")]
)
def test_a_chain_of_atari_games_is_told_which_games_have_chains(name: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        canonical_game(name)


@pytest.mark.parametrize(
    ("name", "remedy"), [("minatar/", "breakout, asterix"), ("mujoco", "Ant"), ("dmc/", "quadruped-run")]
)
def test_a_family_alone_is_told_its_games(name: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        canonical_game(name)
