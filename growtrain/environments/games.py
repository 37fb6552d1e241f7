"""The games that can be played: one row per family, and how a family's games are named.

Nothing here imports an emulator: names are checked, and wrong ones answered, before anything heavy is loaded. To add a family, write the
file that plays it, with a `make(settings, seed)` (see `base`), and add its row.

Units: scores are true, unclipped, undiscounted returns in the game's points.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from growtrain.environments import atari_scores


class Unplayable(ValueError):
    """The package that plays a game is not installed; the message is one line that says how to install it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Games that are played by one program.

    Attributes:
        name: of the family; all games but Atari's are named `family/game`.
        games: their names, without the family's.
        canonical: a game's name in any usual spelling -> its name in `games`; raises `ValueError` with a remedy for an unknown one.
        module: the file that plays them.
        frame_skip: emulator frames an agent step.
        continuous: whether an action is real numbers, and not one of several: its agents learn by SAC, and not by DQN.
        settings: of `Config`'s settings for environments, those that it has.
        preset: whose defaults suit it.
        early_episode_frames: about what an episode of an early agent lasts.
        reference_scores: game -> (score that counts as 0, score that counts as 1), where published.
        reference: whose score counts as 1, in a word.
        reference_source: the same in words, with its source.
        zero: whose score counts as 0, in a word.
        zero_source: the same in words.
    """

    name: str
    games: tuple[str, ...]
    canonical: Callable[[str], str]
    module: str
    frame_skip: int
    continuous: bool
    settings: frozenset[str]
    preset: str
    early_episode_frames: int
    reference_scores: Mapping[str, tuple[float, float]]
    reference: str
    reference_source: str
    zero: str = "random"
    zero_source: str = "a random policy"


ATARI: Final = Family(
    name="atari",
    games=atari_scores.ATARI_57,
    canonical=atari_scores.canonical_game,
    module="growtrain.environments.atari",
    frame_skip=4,
    continuous=False,
    settings=frozenset({"sticky_actions", "noop_max", "max_episode_frames", "life_loss_terminal"}),
    preset="paper",
    early_episode_frames=5_000,
    reference_scores=atari_scores.REFERENCE_SCORES,
    reference="human",
    reference_source="a human tester (scores of DQN Zoo)",
)


def _minatar_game(name: str) -> str:
    """A MinAtar game or chain of them by its own name, without the family's; raises `ValueError` that names the five."""
    parts = [re.sub(r"[^a-z]", "", re.sub(r"-v\d+$", "", part.strip().lower())) for part in name.split("+")]
    by_letters = {game.replace("_", ""): game for game in MINATAR.games}
    for part, given in zip(parts, name.split("+"), strict=True):
        if part not in by_letters and (part or len(parts) == 1):
            raise ValueError(f"unknown MinAtar game {given.strip()[:60]!r}: choose one of {', '.join(MINATAR.games)}")
    if "" in parts:
        raise ValueError(
            f"the chain {name.strip()[:60]!r} lacks a game: write two or more, as minatar/asterix+seaquest"
        )
    return "+".join(by_letters[part] for part in parts)


# A random player's scores: means of 10,000 whole episodes (Freeway, whose episodes are all of 2,500 frames: 1,024) of the six actions with
# sticky actions of 0.1, played by this program; standard errors 0.007, 0.009, 0.011, 0.004 and 0.023.
# DQN's: Young & Tian 2019, figure 3, after 5M frames (means of 30 seeds, in training at epsilon 0.1), read off the plot.
_MINATAR_SCORES: Final = {
    "breakout": (0.49, 10.0),
    "asterix": (0.49, 17.0),
    "freeway": (0.12, 50.0),
    "seaquest": (0.10, 20.0),
    "space_invaders": (2.84, 44.0),
}
MINATAR: Final = Family(
    name="minatar",
    games=tuple(_MINATAR_SCORES),
    canonical=_minatar_game,
    module="growtrain.environments.minatar",
    frame_skip=1,
    continuous=False,
    settings=frozenset({"sticky_actions", "minimal_actions", "max_episode_frames"}),
    preset="minatar",
    early_episode_frames=500,
    reference_scores=_MINATAR_SCORES,
    reference="DQN",
    reference_source="the DQN of Young & Tian (2019) after 5M frames, read off their plot",
)


def _mujoco_task(name: str) -> str:
    """A MuJoCo task by Gymnasium's name for it; raises `ValueError` that names them all."""
    version = re.search(r"[-_ ]v(\d+)$", name.strip(), re.IGNORECASE)
    letters = re.sub(r"[^a-z0-9]", "", re.sub(r"[-_ ]v\d+$", "", name.strip().lower()))
    task = {each.removesuffix("-v5").lower(): each for each in MUJOCO.games}.get(letters)
    if task is None:
        raise ValueError(
            f"unknown MuJoCo task {name.strip()[:60]!r}: choose one of "
            f"{', '.join(each.removesuffix('-v5') for each in MUJOCO.games)}"
        )
    if version and version[1] != "5":
        raise ValueError(f"{name.strip()[:60]} is of another version: {task} is the one that is played")
    return task


# A random player's scores: means of whole episodes of uniform actions, played by this program; 300, 200, 1,000 and 1,000 of them, standard
# errors 5.2, 5.8, 0.6 and 0.2.
# SAC's: RL Baselines3 Zoo's benchmark (Raffin 2020), after 1M steps on the v3 tasks, of which v5 differs in some rewards.
_MUJOCO_SCORES: Final = {
    "Ant-v5": (-53.1, 4616.0),
    "HalfCheetah-v5": (-283.4, 9535.0),
    "Hopper-v5": (17.7, 2326.0),
    "Walker2d-v5": (1.7, 3863.0),
}
MUJOCO: Final = Family(
    name="mujoco",
    games=(
        *("Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "HumanoidStandup-v5", "InvertedDoublePendulum-v5"),
        *("InvertedPendulum-v5", "Pusher-v5", "Reacher-v5", "Swimmer-v5", "Walker2d-v5"),
    ),
    canonical=_mujoco_task,
    module="growtrain.environments.mujoco",
    frame_skip=1,
    continuous=True,
    settings=frozenset({"max_episode_frames"}),
    preset="sac",
    early_episode_frames=1_000,
    reference_scores=_MUJOCO_SCORES,
    reference="SB3's SAC",
    reference_source="Stable-Baselines3's SAC after 1M steps on the v3 tasks (RL Baselines3 Zoo)",
)


def _dmc_task(name: str) -> str:
    """A task of the control suite as "domain-task", in its own spelling; raises `ValueError` with the nearest names."""
    by_letters = {_letters(task): task for task in DMC.games}
    if (letters := _letters(name)) in by_letters:
        return by_letters[letters]
    near = [by_letters[each] for each in difflib.get_close_matches(letters, by_letters, n=3, cutoff=0.6)]
    remedy = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"give one of the suite's {len(DMC.games)} tasks, such as quadruped-run"
    )
    raise ValueError(f"unknown task of the control suite {name.strip()[:60]!r}: {remedy}")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_DMC_TASKS: Final = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse", "two_poles", "three_poles"),
    "cheetah": ("run",),
    "dog": ("stand", "walk", "trot", "run", "fetch"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("upright", "swim"),
    "hopper": ("stand", "hop"),
    "humanoid": ("stand", "walk", "run", "run_pure_state"),
    "humanoid_CMU": ("stand", "walk", "run"),
    "lqr": ("lqr_2_1", "lqr_6_2"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("walk", "run", "escape", "fetch"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer6", "swimmer15"),
    "walker": ("stand", "walk", "run"),
}
DMC: Final = Family(
    name="dmc",
    games=tuple(f"{domain}-{task}" for domain, tasks in _DMC_TASKS.items() for task in tasks),
    canonical=_dmc_task,
    module="growtrain.environments.dmc",
    frame_skip=1,
    continuous=True,
    settings=frozenset({"max_episode_frames"}),
    preset="sac",
    early_episode_frames=1_000,
    # LQR's rewards are costs, below any bound, and its episodes have no end of their own.
    reference_scores={
        f"{domain}-{task}": (0.0, 1_000.0) for domain, tasks in _DMC_TASKS.items() if domain != "lqr" for task in tasks
    },
    reference="maximum",
    reference_source="one of 1,000, all that 1,000 steps with rewards from 0 to 1 can earn (Tassa et al. 2018)",
    zero="0",
    zero_source="a return of 0",
)
FAMILIES: Final = (ATARI, MINATAR, MUJOCO, DMC)


def canonical_game(name: str) -> str:
    """A game's own name, from any usual spelling: "ALE/Phoenix-v5" -> "phoenix"; raises `ValueError` with the nearest names."""
    family, rest = _parted(name)
    if family is not ATARI:
        return f"{family.name}/{family.canonical(rest)}"
    try:
        return family.canonical(rest)
    except ValueError as error:
        for other in FAMILIES:
            if other is not ATARI and (game := _own_name(other, rest)):
                raise ValueError(f"unknown game {name[:60]!r}: did you mean {game}?") from error
        raise


def _own_name(family: Family, name: str) -> str | None:
    """What a family calls the game of that name, with the family's own; None if it has none."""
    try:
        return f"{family.name}/{family.canonical(name)}"
    except ValueError:
        return None


def games_of(game: str) -> tuple[str, ...]:
    """The games of a chain, in order and without their family's name; a single game is its own.

    Raises:
        ValueError: a game is unknown.
    """
    family, rest = _parted(game)
    return tuple(family.canonical(rest).split("+"))


def parts_of(game: str) -> tuple[str, ...]:
    """The games of a chain as parts of it: "minatar/asterix (2 of breakout+asterix)"; a single game is its own.

    Raises:
        ValueError: a game is unknown.
    """
    chain = canonical_game(game)
    games = games_of(chain)
    if len(games) == 1:
        return (chain,)
    family, rest = _parted(chain)
    return tuple(f"{family.name}/{each} ({place} of {rest})" for place, each in enumerate(games, start=1))


def family_of(game: str) -> Family:
    """The family of a game in any spelling; whether it has the game is not asked."""
    return _parted(game)[0]


def reference_scores(game: str) -> tuple[float, float] | None:
    """The scores that count as 0 and as 1 in a game, or in a part of a chain; None where there are none, or the game is unknown."""
    family, rest = _parted(game)
    return family.reference_scores.get(rest.partition(" (")[0])


def references_of(games: Iterable[str]) -> str:
    """Whose score counts as 1 in games: "human", or "human and DQN" where they differ."""
    return " and ".join(dict.fromkeys(_parted(game)[0].reference for game in games)) or ATARI.reference


def zeros_of(games: Iterable[str]) -> str:
    """Whose score counts as 0 in games: "random", or "random and 0" where they differ."""
    return " and ".join(dict.fromkeys(_parted(game)[0].zero for game in games)) or ATARI.zero


def normalization(games: Iterable[str]) -> str:
    """What normalised scores of games mean, in sentences."""
    families = dict.fromkeys(_parted(game)[0].name for game in games)
    rows = [family for family in FAMILIES if family.name in families] or [ATARI]
    return " ".join(
        f"{row.reference[0].upper()}{row.reference[1:]}-normalised: 0 is {row.zero_source}, 1 {row.reference_source}."
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
        if prefix.strip().lower() == family.name:
            return family, rest
    return ATARI, name
