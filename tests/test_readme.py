"""README is true: its snippets run, its commands parse, its links lead somewhere, and CI runs the test command that it gives."""

import contextlib
import io
import re
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from growtrain.__main__ import main
from growtrain.commands.commandline import Parser
from growtrain.commands.running import explicit_with_game
from growtrain.settings.presets import resolve
from growtrain.settings.schedules import schedule_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
COMMANDS = sorted({words.strip() for words in re.findall(r"python -m growtrain\b([^`#\n|]*)", README)})


def slug(heading: str) -> str:
    """The anchor that a page's heading gets."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_no_line_is_too_long() -> None:
    assert [line for line in README.splitlines() if len(line) > 130] == []


def test_every_link_leads_to_a_file_and_a_heading_of_it() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if not link.startswith("https://")]
    assert len(links) > 10
    for link in links:
        path, _, heading = link.partition("#")
        text = (ROOT / path).read_text(encoding="utf-8") if path else README
        assert not heading or heading in map(slug, re.findall(r"^#+ (.*)$", text, re.M)), link


def test_there_is_a_snippet_for_each_kind_of_loop() -> None:
    for needed in ("gymnasium.make", "inject_network(", "DQNLoss(", "SoftUpdate(", "network.7:", "stable_baselines3"):
        assert any(needed in snippet for snippet in SNIPPETS), needed


@pytest.mark.filterwarnings("ignore")  # of TorchRL and Stable-Baselines3, about themselves
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs_and_prints_what_it_says(snippet: str) -> None:
    if "stable_baselines3" in snippet:
        pytest.importorskip("stable_baselines3")
    printed, said = io.StringIO(), re.findall(r"^ *print\(.*\)  # (.*)$", snippet, re.M)
    with contextlib.redirect_stdout(printed), torch.random.fork_rng():
        exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
    assert said
    assert [line for line in printed.getvalue().splitlines() if "[torchrl]" not in line] == said  # whose log is printed


class Parsed(BaseException):
    """Leaves a command once its words are read."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Namespace] = []
    parse = Parser.parse_strict

    def parse_and_leave(parser: Parser, arguments: Sequence[str]) -> Namespace:
        read.append(parse(parser, arguments))
        raise Parsed

    monkeypatch.setattr(Parser, "parse_strict", parse_and_leave)
    words = shlex.split(command)
    with pytest.raises(Parsed):
        main(words)
    if not words or words[0].startswith("-") or words[0] == "plan":
        explicit = explicit_with_game(read[0])
        schedule_of(resolve(explicit.get("preset"), explicit)[0])


def test_every_flag_exists() -> None:
    # Of all commands, which a test compares with them.
    frozen = (ROOT / "tests/commands/flags.txt").read_text(encoding="utf-8")
    known = {"--help-all", "--dist", *re.findall(r" (--[a-z-]+)", frozen)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - known == set()


def test_the_two_commands_of_a_first_run_are_there_and_ci_runs_the_second() -> None:
    train, test = (line.split(" && ") for line in README.split("```bash\n")[1].split("```")[0].strip().splitlines())
    assert train == ["python -m pip install -e .", "python -m growtrain --schedule grow3x --total-frames 100k"]
    ci = [line.strip().replace(" -q ", " ") for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()]
    assert ci.index(test[0]) < ci.index(test[1])
