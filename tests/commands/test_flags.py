"""The command line is frozen: `flags.txt` holds every flag of every command with its value and default, as `--help-all` says them.

A change that is meant is written down by `python tests/commands/test_flags.py`.
"""

import contextlib
import dataclasses
import io
import re
from pathlib import Path
from unittest import mock

import pytest

from growtrain.__main__ import main
from growtrain.commands.running import COMMANDS
from growtrain.settings.config import Config
from growtrain.settings.text import flag

FROZEN = Path(__file__).with_name("flags.txt")
SETTINGS = [item.name for item in dataclasses.fields(Config) if item.metadata["by_flag"]]
COMMON = [item.name for item in dataclasses.fields(Config) if item.metadata["common"]]


def help_of(command: str, option: str) -> str:
    """What a command prints for `option`, each flag on a line of its own."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), mock.patch.dict("os.environ", {"COLUMNS": "1000"}):
        with pytest.raises(SystemExit) as stopped:
            main([command, option])
        assert stopped.value.code == 0
    return re.sub(r"\n {6,}", "  ", text.getvalue())


def flags_of(text: str) -> list[str]:
    """`--flag VALUE = default` of every line of a help that describes an argument."""
    found = re.findall(r"^  ((?:--\w|[A-Z])\S*(?: \S+)*)  +(.*)$", text, re.M)
    defaults = [re.search(r"\(default: ([^()]*)\)$", words) for _, words in found]
    return [name + (f" = {default[1]}" if default else "") for (name, _), default in zip(found, defaults, strict=True)]


def every_flag() -> str:
    """The frozen text."""
    lines = []
    for command in COMMANDS:
        before, _, settings = help_of(command, "--help-all").partition("\nsettings")
        lines += [f"{command} {each}" for each in flags_of(before) if not each.startswith("--help-all")]
        if command in ("train", "evaluate"):
            lines += [f"{command} {each}" for each in flags_of(settings)]
        elif settings:
            assert re.findall(r"^  (--\S+)", settings, re.M) == [flag(name) for name in SETTINGS]
            lines.append(f"{command} and every setting of train")
    return "\n".join(lines) + "\n"


def test_every_flag_its_value_and_its_default_are_as_before() -> None:
    assert every_flag() == FROZEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["train", "plan", "sweep", "resume", "rescue"])
def test_help_shows_the_settings_most_used_and_help_all_every_one(command: str) -> None:
    assert 10 <= len(COMMON) <= 15
    short, whole = help_of(command, "--help"), help_of(command, "--help-all")
    shown = [set(re.findall(r"^  (--\S+)", text.partition("\nsettings")[2], re.M)) for text in (short, whole)]
    assert shown == [{flag(name) for name in COMMON}, {flag(name) for name in SETTINGS}]
    assert "--help-all" in short
    assert flag("replay_capacity") not in short.partition("\nsettings")[0]  # nor in the usage line


def test_the_help_of_training_names_every_kind_of_task_and_of_schedule() -> None:
    before, _, settings = help_of("train", "--help").partition("\nsettings")
    for word in ("Atari", "MinAtar", "MuJoCo", "DeepMind Control Suite"):
        assert word in " ".join(before.split())
    schedule = next(line for line in settings.splitlines() if line.startswith("  --schedule"))
    for name in ("fixed", "grow3x", "full3x", "at:", "every:", "at-switch", "reset", "redo", "adaptive"):
        assert name in schedule


def test_what_help_leaves_out_is_still_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--no-timing", "--batch-size", "0"]) == 2
    assert "--batch-size is 0" in capsys.readouterr().err


if __name__ == "__main__":
    FROZEN.write_text(every_flag(), encoding="utf-8")
