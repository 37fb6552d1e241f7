"""Names and reference scores of the Atari games."""

import pytest
from ale_py import roms

from growtrain.environments.atari_scores import ATARI_57, REFERENCE_SCORES, canonical_game
from growtrain.environments.games import human_normalized_score


@pytest.mark.parametrize(
    "spelling",
    [
        "up_n_down",
        "up n down",
        "up-n-down",
        "UpNDown",
        "UPNDOWN",
        "Up'n'Down",
        " Up 'n Down\n",
        "ALE/UpNDown-v5",
        "ale/upndown",
        "UpNDown-v4",
        "UpNDownNoFrameskip-v4",
        "UpNDownDeterministic-v0",
        "UpNDown-ram-v5",
        "UpNDown-ramNoFrameskip-v4",
        "up_n_down.bin",
    ],
)
def test_every_usual_spelling_is_accepted(spelling: str) -> None:
    assert canonical_game(spelling) == "up_n_down"


@pytest.mark.parametrize(
    ("title", "game"),
    [
        ("Q*bert", "qbert"),
        ("H.E.R.O.", "hero"),
        ("Ms. Pac-Man", "ms_pacman"),
        ("Montezuma's Revenge", "montezuma_revenge"),
        ("Robot Tank", "robotank"),
        ("James Bond 007", "jamesbond"),
        ("River Raid", "riverraid"),
        ("Yars' Revenge", "yars_revenge"),
    ],
)
def test_titles_on_the_cartridge_are_accepted(title: str, game: str) -> None:
    assert canonical_game(title) == game


@pytest.mark.parametrize("game", ATARI_57)
def test_gymnasium_and_rom_names_lead_back_to_the_game(game: str) -> None:
    camel = game.title().replace("_", "")
    assert {canonical_game(name) for name in (game, camel, f"ALE/{camel}-v5", f"{camel}-ram-v4")} == {game}
    assert roms.get_rom_path(game) is not None


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("phenix", "phoenix"), ("Space Invader", "space_invaders"), ("pacman", "ms_pacman")],
)
def test_a_near_miss_is_answered_with_the_nearest_names(name: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=f"unknown game '{name}': did you mean .*{suggestion}"):
        canonical_game(name)


@pytest.mark.parametrize("name", ["", "zzz", "../../etc/passwd", "a\nb\x1b[2J" * 1000])
def test_a_hopeless_name_is_answered_with_one_short_printable_line(name: str) -> None:
    with pytest.raises(ValueError, match="unknown game") as caught:
        canonical_game(name)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 300


def test_the_table_is_atari_57() -> None:
    assert len(ATARI_57) == len(set(ATARI_57)) == 57
    assert list(ATARI_57) == sorted(ATARI_57)
    assert all(human > random for random, human in REFERENCE_SCORES.values())
    # Sums of the published columns: a mistyped digit changes one of them.
    random, human = (sum(column) for column in zip(*REFERENCE_SCORES.values(), strict=True))
    assert (round(random, 1), round(human, 1)) == (50864.9, 606494.2)


@pytest.mark.parametrize(
    ("game", "score", "normalized"),
    [
        ("phoenix", 761.4, 0.0),
        ("Phoenix", 7242.6, 1.0),
        ("ALE/Phoenix-v5", 4002.0, 0.5),
        ("pong", -38.35, -0.5),
        ("skiing", -4336.9, 1.0),
    ],
)
def test_human_normalized_score_by_hand(game: str, score: float, normalized: float) -> None:
    assert human_normalized_score(game, score) == pytest.approx(normalized, abs=1e-12)


def test_an_unknown_game_has_no_normalized_score() -> None:
    with pytest.raises(ValueError, match="unknown game"):
        human_normalized_score("chess", 1.0)
