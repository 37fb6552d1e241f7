"""Compares runs: one HTML page and its Markdown twin."""

from collections.abc import Sequence
from pathlib import Path

from growtrain.commands.commandline import Parser, given_path
from growtrain.runfiles import require_directory


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="growtrain report", description="Compare runs, finished or not: one HTML page and its Markdown twin."
    )
    parser.add_argument("runs", type=given_path, nargs="+", metavar="RUN", help="runs, or directories that hold runs")
    parser.add_argument(
        "--output", type=given_path, default=Path("report"), help="where the report goes (default: report)"
    )
    namespace = parser.parse_strict(words)
    for path in namespace.runs:
        require_directory(path, "runs, or a directory that holds runs")

    from growtrain.analysis.plots import require_matplotlib
    from growtrain.analysis.report import write_report

    require_matplotlib()
    page, verdict = write_report(namespace.runs, namespace.output, ["python", "-m", "growtrain", "report", *words])
    print(f"{verdict}\n{page}")
    return 0
