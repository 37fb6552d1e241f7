"""The command line that gives a run again, from its settings."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from growtrain.environments.games import family_of
from growtrain.settings.config import Config
from growtrain.settings.presets import resolve
from growtrain.settings.text import ConfigError, flag, format_count, parse_count


def command_of(settings: dict[str, Any]) -> list[str]:
    """The words of a command line that gives a run's settings, without those that its game, preset and budget imply."""
    flags = (item.name for item in dataclasses.fields(Config) if item.metadata["by_flag"])
    known: dict[str, Any] = {name: settings[name] for name in flags if name in settings}
    wanted = {"freeze": Config.freeze} | known  # a run of a version without it froze heads
    always: list[str] = [name for name in ("game", "schedule", "total_frames", "seed") if name in known]
    if known.get("preset") != family_of(str(known.get("game", Config.game))).preset:
        always = ["preset", *always]
    explicit: dict[str, Any] = {name: known[name] for name in always}
    try:
        while other := _differing(wanted, explicit):
            explicit |= other
        for name in explicit.keys() - set(always):  # one may have implied another
            fewer = {each: value for each, value in explicit.items() if each != name}
            explicit = explicit if _differing(wanted, fewer) else fewer
    except (ConfigError, TypeError, ValueError, AttributeError):  # settings of another version, or damaged
        explicit = known
    words = ["python", "-m", "growtrain"]
    for name, value in explicit.items():
        text = _setting_text(value)
        words += [f"{flag(name)}={text}"] if text.startswith("-") else [flag(name), text]
    return words


def _differing(known: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    """The settings that explicit ones do not imply."""
    implied, _ = resolve(explicit.get("preset"), explicit)
    return {name: value for name, value in known.items() if name != "preset" and getattr(implied, name) != value}


def _setting_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 1000 and parse_count(format_count(value)) == value:
        return format_count(value)
    return str(value)


def shell_line(words: Sequence[str]) -> str:
    """Words as one line for a POSIX shell (bash, where a word has characters that cannot be seen)."""
    return " ".join(shlex.quote(word) if word.isprintable() else _ansi_quoted(word) for word in words)


def _ansi_quoted(word: str) -> str:
    parts = []
    for c in word:
        code = ord(c)
        if c in "\\'":
            parts.append(f"\\{c}")
        elif c.isprintable():
            parts.append(c)
        elif 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python holds it in a path
            parts.append(f"\\x{code - 0xDC00:02x}")
        else:
            parts.append(f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return f"$'{''.join(parts)}'"
