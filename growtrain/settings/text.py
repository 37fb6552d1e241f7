"""Counts, flags and complaints as text."""

from collections.abc import Sequence
from typing import Any, get_args


class ConfigError(ValueError):
    """A setting is wrong; the message is one line that names the setting and the remedy."""


def require_choice(name: str, value: object, choices: Any) -> None:
    """Raises `ConfigError` unless `value` is one of a `Literal`'s."""
    if value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}: choose one of {', '.join(get_args(choices))}")


def flag(name: str) -> str:
    """The command-line flag of a field: `replay_ratio` -> `--replay-ratio`."""
    return "--" + name.replace("_", "-")


def parse_count(text: str) -> int:
    """A whole number with an optional k, M or G suffix: `100k` -> 100000, `0.5M` -> 500000; raises `ConfigError`."""
    scale = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}.get(text[-1:].lower(), 1)
    digits = (text if scale == 1 else text[:-1]).replace("_", "")
    try:
        return int(digits) * scale  # exactly: a seed may have more digits than a float
    except ValueError:
        pass
    try:
        value = float(digits) * scale
        count = round(value)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{text!r} is not a count: write for example 200000, 200k or 0.2M") from error
    if abs(value - count) > 1e-6 * max(1.0, abs(value)):
        raise ConfigError(f"{text!r} is not a whole number: write for example 200000, 200k or 0.2M")
    return count


def format_hours(hours: float, sign: str = "") -> str:
    """Hours to the hundredth, below a tenth of one to the ten thousandth: 1.50, 0.31, 0.0042; `sign` is that of a format, "+" or ""."""
    return format(hours, f"{sign}.{2 if hours == 0 or abs(hours) >= 0.1 else 4}f")


def format_count(count: float) -> str:
    """A short form of a count: 100000 -> `100k`, 2500000 -> `2.5M`."""
    for scale, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if abs(count) >= scale:
            return f"{count / scale:.4g}{suffix}"
    return f"{count:.4g}"


def episodes_text(episodes: Sequence[float]) -> str:
    """`12 episodes`, `3 to 40 episodes`, of the numbers of episodes behind some scores."""
    least, most = (f"{value:.0f}" for value in (min(episodes), max(episodes)))
    return f"{least} episode{'' if most == '1' else 's'}" if least == most else f"{least} to {most} episodes"
