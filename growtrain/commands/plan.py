"""Prints stages, parameters, FLOPs, memory and projected hours of a run, before anything runs, and the least time on other hardware."""

from collections.abc import Sequence

from growtrain.commands.commandline import Parser
from growtrain.commands.running import read_configuration
from growtrain.settings.text import ConfigError


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(prog="growtrain plan", description="What a run will cost, before anything runs.")
    parser.add_argument("--no-timing", action="store_true", help="do not time updates on this machine")
    parser.add_argument(
        "--hardware",
        default="",
        metavar="NAME",
        help="the least time on a100, a100-80gb, h100, h200, rtx4090 or l4, or several as a100,h100: modelled, not measured",
    )
    parser.add_argument(
        "--stack",
        choices=("fast", "reference"),
        default="fast",
        help="of that model: growtrain's own loop, or one environment and a learner, both in turn, every operator launched",
    )
    config, notes, options = read_configuration(parser, words)

    from growtrain.environments.make import spec_of
    from growtrain.learners.make import resolve_device
    from growtrain.planning.costs import make_plan
    from growtrain.planning.hardware import hardware_named
    from growtrain.planning.limits import Model
    from growtrain.planning.speed import measure_speed
    from growtrain.planning.table import render, render_limit

    if options.hardware and config.continuous:
        raise ConfigError(
            "--hardware: the model is of a Q-network's kernels, and this game is learned by SAC: leave it out"
        )
    hardware = [hardware_named(name) for name in options.hardware.split(",") if name]
    spec, device = spec_of(config), resolve_device(config.device)
    plan = make_plan(config, spec)
    print(*notes, sep="\n", end="\n\n" if notes else "")
    print(render(plan, None if options.no_timing else measure_speed(config, spec, device)))
    if hardware:
        model = Model(config, spec, options.stack)
        print(*("\n" + render_limit(model, each) for each in hardware), sep="\n")
    return 0
