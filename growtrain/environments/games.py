"""The games that can be played: one row per family, and how a family's games are named.

Nothing here imports an emulator: names are checked, and wrong ones answered, before anything heavy is loaded. To add a family, write the
file that plays it, with a `make(settings, seed)` (see `base`), and add its row.

Units: scores are true, unclipped, undiscounted returns in the game's points.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from growtrain.environments import atari_scores


@dataclass(frozen=True, kw_only=True)
class Family:
    """Games that are played by one program.

    Attributes:
        name: of the family; all games but Atari's are named `family/game`.
        games: their names, without the family's.
        canonical: a game's name in any usual spelling -> its name in `games`; raises `ValueError` with a remedy for an unknown one.
        module: the file that plays them.
        frame_skip: emulator frames an agent step.
        settings: of `Config`'s settings for environments, those that it has.
        reference_scores: game -> (score that counts as 0, score that counts as 1), where published.
        reference: whose score counts as 1, in a word.
        reference_source: the same in words, with its source.
    """

    name: str
    games: tuple[str, ...]
    canonical: Callable[[str], str]
    module: str
    frame_skip: int
    settings: frozenset[str]
    reference_scores: Mapping[str, tuple[float, float]]
    reference: str
    reference_source: str


ATARI: Final = Family(
    name="atari",
    games=atari_scores.ATARI_57,
    canonical=atari_scores.canonical_game,
    module="growtrain.environments.atari",
    frame_skip=4,
    settings=frozenset({"sticky_actions", "noop_max", "max_episode_frames", "life_loss_terminal"}),
    reference_scores=atari_scores.REFERENCE_SCORES,
    reference="human",
    reference_source="a human tester (scores of DQN Zoo)",
)
FAMILIES: Final = (ATARI,)


def canonical_game(name: str) -> str:
    """A game's own name, from any usual spelling: "ALE/Phoenix-v5" -> "phoenix"; raises `ValueError` with the nearest names."""
    family, rest = _parted(name)
    game = family.canonical(rest)
    return game if family is ATARI else f"{family.name}/{game}"


def family_of(game: str) -> Family:
    """The family of a game in any spelling; whether it has the game is not asked."""
    return _parted(game)[0]


def reference_scores(game: str) -> tuple[float, float] | None:
    """The scores that count as 0 and as 1 in a game; None where there are none, or the game is unknown."""
    family, rest = _parted(game)
    return family.reference_scores.get(rest)


def references_of(games: Iterable[str]) -> str:
    """Whose score counts as 1 in games: "human", or "human and DQN" where they differ."""
    return " and ".join(dict.fromkeys(_parted(game)[0].reference for game in games)) or ATARI.reference


def normalization(games: Iterable[str]) -> str:
    """What normalised scores of games mean, in sentences."""
    families = dict.fromkeys(_parted(game)[0].name for game in games)
    rows = [family for family in FAMILIES if family.name in families] or [ATARI]
    return " ".join(
        f"{row.reference[0].upper()}{row.reference[1:]}-normalised: 0 is a random policy, 1 {row.reference_source}."
        for row in rows
    )


def human_normalized_score(game: str, score: float) -> float | None:
    """A game's score on the scale where 0 is a random player and 1 a human.

    Args:
        game: in any spelling.
        score: the mean true return of an episode, in game points.

    Returns:
        (score - random) / (human - random), which may lie below 0 or above 1; None in a game without a human score.

    Raises:
        ValueError: the game is unknown.
    """
    references = reference_scores(game := canonical_game(game))
    if references is None or _parted(game)[0].reference != "human":
        return None
    random_score, human_score = references
    return (score - random_score) / (human_score - random_score)


def _parted(name: str) -> tuple[Family, str]:
    """The family that a name says, Atari if it says none, and the rest of it."""
    prefix, _, rest = name.strip().partition("/")
    for family in FAMILIES:
        if rest and prefix.lower() == family.name:
            return family, rest
    return ATARI, name
