"""The 57 Atari games, their reference scores, and the score that makes games comparable.

The random and human scores are those of DQN Zoo (`dqn_zoo/atari_data.py`), which describes them so:
undiscounted returns, averaged over at least 3 episodes of at most 108,000 frames that begin with 1 to 30
no-ops, of a uniformly random player and of a professional human game tester. "Deep Reinforcement Learning
with Plasticity Injection" (arXiv 2305.15555) aggregates human-normalised scores over the same 57 games.

Units: scores are true, unclipped, undiscounted returns in game points.
"""

import difflib
import re
from typing import Final

# game: (score of a random player, score of a human player)
REFERENCE_SCORES: Final[dict[str, tuple[float, float]]] = {
    "alien": (227.8, 7127.7),
    "amidar": (5.8, 1719.5),
    "assault": (222.4, 742.0),
    "asterix": (210.0, 8503.3),
    "asteroids": (719.1, 47388.7),
    "atlantis": (12850.0, 29028.1),
    "bank_heist": (14.2, 753.1),
    "battle_zone": (2360.0, 37187.5),
    "beam_rider": (363.9, 16926.5),
    "berzerk": (123.7, 2630.4),
    "bowling": (23.1, 160.7),
    "boxing": (0.1, 12.1),
    "breakout": (1.7, 30.5),
    "centipede": (2090.9, 12017.0),
    "chopper_command": (811.0, 7387.8),
    "crazy_climber": (10780.5, 35829.4),
    "defender": (2874.5, 18688.9),
    "demon_attack": (152.1, 1971.0),
    "double_dunk": (-18.6, -16.4),
    "enduro": (0.0, 860.5),
    "fishing_derby": (-91.7, -38.7),
    "freeway": (0.0, 29.6),
    "frostbite": (65.2, 4334.7),
    "gopher": (257.6, 2412.5),
    "gravitar": (173.0, 3351.4),
    "hero": (1027.0, 30826.4),
    "ice_hockey": (-11.2, 0.9),
    "jamesbond": (29.0, 302.8),
    "kangaroo": (52.0, 3035.0),
    "krull": (1598.0, 2665.5),
    "kung_fu_master": (258.5, 22736.3),
    "montezuma_revenge": (0.0, 4753.3),
    "ms_pacman": (307.3, 6951.6),
    "name_this_game": (2292.3, 8049.0),
    "phoenix": (761.4, 7242.6),
    "pitfall": (-229.4, 6463.7),
    "pong": (-20.7, 14.6),
    "private_eye": (24.9, 69571.3),
    "qbert": (163.9, 13455.0),
    "riverraid": (1338.5, 17118.0),
    "road_runner": (11.5, 7845.0),
    "robotank": (2.2, 11.9),
    "seaquest": (68.4, 42054.7),
    "skiing": (-17098.1, -4336.9),
    "solaris": (1236.3, 12326.7),
    "space_invaders": (148.0, 1668.7),
    "star_gunner": (664.0, 10250.0),
    "surround": (-10.0, 6.5),
    "tennis": (-23.8, -8.3),
    "time_pilot": (3568.0, 5229.2),
    "tutankham": (11.4, 167.6),
    "up_n_down": (533.4, 11693.2),
    "venture": (0.0, 1187.5),
    "video_pinball": (16256.9, 17667.9),
    "wizard_of_wor": (563.5, 4756.5),
    "yars_revenge": (3092.9, 54576.9),
    "zaxxon": (32.5, 9173.3),
}

ATARI_57: Final[tuple[str, ...]] = tuple(REFERENCE_SCORES)

# Titles as printed on the cartridge that differ from ALE's names by more than punctuation, case and spaces.
_TITLES: Final[dict[str, str]] = {
    "jamesbond007": "jamesbond",
    "montezumasrevenge": "montezuma_revenge",
    "robottank": "robotank",
}
_BY_LETTERS: Final[dict[str, str]] = {game.replace("_", ""): game for game in ATARI_57} | _TITLES
# What Gymnasium, old Gym and ALE put around a name: ALE/Phoenix-v5, Phoenix-ramNoFrameskip-v4, phoenix.bin
_DECORATION: Final = re.compile(r"^ale/|\.(bin|a26)$|(-ram)?(NoFrameskip|Deterministic)?([-_ ]v\d+)?$", re.IGNORECASE)


def canonical_game(name: str) -> str:
    """Returns the name in `ATARI_57` of a game spelt in any usual way.

    Args:
        name: such as "phoenix", "Phoenix", "ALE/Phoenix-v5", "PhoenixNoFrameskip-v4", "up n down", "Q*bert".

    Returns:
        The game in snake_case, which is also its ROM's name in ale-py.

    Raises:
        ValueError: no game has that name; one line that suggests the nearest ones.
    """
    if "+" in name:
        raise ValueError(f"unknown game {name[:60]!r}: chains are of MinAtar's games, as minatar/asterix+seaquest")
    letters = re.sub(r"[^a-z0-9]", "", _DECORATION.sub("", name.strip()).lower())
    if letters in _BY_LETTERS:
        return _BY_LETTERS[letters]
    near = dict.fromkeys(
        _BY_LETTERS[match] for match in difflib.get_close_matches(letters, _BY_LETTERS, n=3, cutoff=0.6)
    )
    remedy = f"did you mean {' or '.join(near)}?" if near else "give one of the 57 Atari games, such as phoenix"
    raise ValueError(f"unknown game {name[:60]!r}: {remedy}")
