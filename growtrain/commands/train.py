"""Trains (the default command)."""

from collections.abc import Sequence

from growtrain.commands.commandline import Parser, given_path
from growtrain.commands.running import (
    COMMANDS,
    StopSignals,
    add_stop_signal,
    read_configuration,
    run_training,
)
from growtrain.runfiles import require_new


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="growtrain",
        description="Train a Double DQN on an Atari or MinAtar game, or SAC on a task of MuJoCo or of the DeepMind Control Suite, growing "
        "it by plasticity injection.",
        epilog=f"Other commands: {', '.join(name for name in COMMANDS if name != 'train')}. Counts take k and M: 200k, 1.5M.",
    )
    parser.add_argument(
        "--run-dir", type=given_path, help="where the run's files go (default: runs/<game>-<schedule>-s<seed>-<time>)"
    )
    add_stop_signal(parser)
    config, notes, given = read_configuration(parser, words)
    stop = StopSignals(given.stop_signal)
    if given.run_dir is not None:
        require_new(given.run_dir, "--run-dir")

    from growtrain.environments.make import spec_of

    return run_training(config, given.run_dir, spec_of(config), stop, notes)
