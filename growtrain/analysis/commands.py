"""The command line that gives a run again, from its settings."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from growtrain.settings.config import Config
from growtrain.settings.presets import resolve
from growtrain.settings.text import ConfigError, flag, format_count, parse_count

_ALWAYS = ("game", "schedule", "total_frames", "seed")


def command_of(settings: dict[str, Any]) -> list[str]:
    """The words of a command line that gives a run's settings, without those that the others imply.

    Of settings of another version, or damaged ones, all are given.
    """
    flags = {item.name for item in dataclasses.fields(Config) if item.metadata["by_flag"]}
    wanted = {name: settings[name] for name in settings if name in flags}
    wanted.setdefault("freeze", Config.freeze)  # a run of a version without it froze heads
    explicit = {name: wanted[name] for name in ("preset", *_ALWAYS) if name in wanted} | wanted
    # Whether an anchor has to be named depends on what is frozen, which is tried last.
    for name in sorted(explicit.keys() - set(_ALWAYS), key=lambda name: name == "freeze"):
        fewer = {each: value for each, value in explicit.items() if each != name}
        explicit = fewer if _gives(fewer, wanted) else explicit
    words = ["python", "-m", "growtrain"]
    for name, value in explicit.items():
        text = _setting_text(value)
        words += [f"{flag(name)}={text}"] if text.startswith("-") else [flag(name), text]
    return words


def _gives(explicit: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether explicit settings imply all that is wanted."""
    try:
        implied, _ = resolve(explicit.get("preset"), explicit)
    except (ConfigError, TypeError, ValueError, AttributeError):
        return False
    return all(getattr(implied, name) == value for name, value in wanted.items() if name != "game")


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
