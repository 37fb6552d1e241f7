"""Prints stages, parameters, FLOPs, memory and projected hours of a run, before anything runs."""

from collections.abc import Sequence

from growtrain.commands.commandline import Parser
from growtrain.commands.running import read_configuration


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(prog="growtrain plan", description="What a run will cost, before anything runs.")
    parser.add_argument("--no-timing", action="store_true", help="do not time updates on this machine")
    parser.set_defaults(run_dir=None)
    config, notes, _ = read_configuration(parser, words)

    from growtrain.environments.make import spec_of
    from growtrain.learners.make import resolve_device
    from growtrain.planning.costs import make_plan
    from growtrain.planning.speed import measure_speed
    from growtrain.planning.table import render

    spec, device = spec_of(config), resolve_device(config.device)
    plan = make_plan(config, spec)
    timed = not parser.parse_known_args(list(words))[0].no_timing
    print(*notes, sep="\n", end="\n\n" if notes else "")
    print(render(plan, measure_speed(config, spec, device) if timed else None))
    return 0
