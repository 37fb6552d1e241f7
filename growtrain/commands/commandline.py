"""Flags: an argument parser made from the fields of `Config`, whose every complaint is one line that names the remedy."""

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Never, get_args, get_type_hints

from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError, flag, format_count, parse_count


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError` with one line, and suggests the nearest flag for an unknown one.

    `--help` leaves out the settings that are rarely given; `--help-all` shows every flag.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rare: dict[argparse.Action, str] = {}  # flags that only `--help-all` shows, with their texts
        self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every flag and exit")

    def error(self, message: str) -> Never:
        """Raises `ConfigError`."""
        message = message.replace("expected one argument", "needs a value (that does not begin with a dash)")
        raise ConfigError(message.removeprefix("argument "))

    def parse_strict(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses all arguments; an unknown one raises `ConfigError` that names the nearest flags."""
        namespace, unknown = self.parse_known_args(list(arguments))
        if unknown:
            name = unknown[0].split("=")[0]
            flags = [text for action in self._actions for text in action.option_strings]
            near = difflib.get_close_matches(name, flags, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"see {self.prog} --help"
            raise ConfigError(f"unknown {'flag' if name.startswith('-') else 'argument'} {name}: {hint}")
        return namespace


class _HelpAll(argparse.Action):
    """Prints the help with every flag, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        assert isinstance(parser, Parser)
        for action, text in parser.rare.items():
            action.help = text
        parser.print_help()
        parser.exit()


def add_config_flags(
    parser: Parser, names: Sequence[str] = (), *, default_of: str = "the paper preset at 200M frames"
) -> None:
    """One flag for each field of `Config` that has one, or for those named; a flag that is not given leaves no trace in the namespace.

    Args:
        parser: gets the flags.
        names: of fields; none is all, of which `--help` shows the common ones.
        default_of: where the values of flags that are not given come from, in words.
    """
    hints = get_type_hints(Config)
    preset = default_of.startswith("the paper preset")
    group = parser.add_argument_group(
        f"settings (default: {default_of}{'; shorter budgets shrink some' if preset else ''}"
        f"{'' if names else '; --help-all shows all of them'})"
    )
    for item in dataclasses.fields(Config):
        if not item.metadata["by_flag"] or (names and item.name not in names):
            continue
        unit = f" [{item.metadata['unit']}]" if item.metadata["unit"] else ""
        default: Any = item.default
        shown = format_count(default) if item.metadata["unit"] else default
        choices = get_args(hints[item.name])
        text = f"{item.metadata['doc']}{unit}{f' (default: {shown})' if preset else ''}".replace("%", "%%")
        action = group.add_argument(
            flag(item.name),
            dest=item.name,
            default=argparse.SUPPRESS,
            type=reader(hints[item.name]),
            metavar="{" + ",".join(choices) + "}" if choices else _METAVARS.get(hints[item.name], "TEXT"),
            help=text if names or item.metadata["common"] else argparse.SUPPRESS,
        )
        if action.help == argparse.SUPPRESS:
            parser.rare[action] = text


_METAVARS: dict[Any, str] = {int: "N", float: "X", bool: "yes|no"}


def reader(hint: Any) -> Callable[[str], Any]:
    """A function from a flag's text to its value; argparse puts the flag's name before the message of what it raises."""

    def read(text: str) -> Any:
        try:
            if hint is int:
                return parse_count(text)
            if hint is float:
                return float(text)
            if hint is bool:
                return {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}[text.lower()]
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        except (ValueError, KeyError) as error:
            wanted = "a number" if hint is float else "yes or no"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from error
        choices = get_args(hint)
        if choices and text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown: choose one of {', '.join(choices)}")
        return text

    return read


def given_path(text: str) -> Path:
    """A path that is not empty, as one of a variable that was never set is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: name a path")
    return Path(text)


def explicit_settings(namespace: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line, by field name."""
    names = {item.name for item in dataclasses.fields(Config)}
    return {name: value for name, value in vars(namespace).items() if name in names}
