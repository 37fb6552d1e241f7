"""Says what works on this machine."""

from collections.abc import Sequence

from growtrain.commands.commandline import Parser


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    Parser(prog="growtrain doctor", description="What works on this machine.").parse_strict(words)

    from growtrain.commands.doctor_report import examine

    for what, works, details in examine():
        print(f"{'ok     ' if works else 'missing'}  {what:12} {details}")
    return 0
