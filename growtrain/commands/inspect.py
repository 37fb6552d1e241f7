"""Says what a run's checkpoints hold, and verifies every file of them."""

from collections.abc import Sequence

from growtrain.commands.commandline import Parser, given_path
from growtrain.runfiles import require_checkpoints


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(prog="growtrain inspect", description="Verify a run's checkpoints and say what they hold.")
    parser.add_argument("run", type=given_path, metavar="RUN", help="the run's directory")
    run = parser.parse_strict(words).run

    require_checkpoints(run)

    from growtrain.runs.resuming import render

    lines, whole = render(run)
    print("\n".join(lines))
    return 0 if whole else 1
