"""Says whether a run has lost plasticity, and where."""

from collections.abc import Sequence

from growtrain.commands.commandline import Parser, given_path, reader
from growtrain.commands.running import StopSignals, add_stop_signal, complain, say
from growtrain.runfiles import STOPPED, require_checkpoints
from growtrain.settings.text import ConfigError


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="growtrain diagnose",
        description="Fork a run at a checkpoint, with and without a part made fresh, and say whether plasticity was lost, and where.",
        epilog="The same command again goes on with what was interrupted.",
    )
    parser.add_argument("run", type=given_path, metavar="RUN", help="the run's directory")
    parser.add_argument("--at", type=reader(int), help="frames of the checkpoint (default: the newest)")
    parser.add_argument("--frames", type=reader(int), help="of each fork (default: a tenth of what the run has played)")
    parser.add_argument("--seeds", type=reader(int), default=3, help="forks of each arm (default: 3)")
    parser.add_argument("--arms", help="of untouched,inject,reset-encoder,fresh-optimizer (default: all that fit)")
    parser.add_argument("--threshold", type=float, default=0.1, help="least gain that counts (default: 0.1)")
    parser.add_argument("--learning-seeds", type=reader(int), default=10, help="of the learning test (default: 10)")
    parser.add_argument("--learning-updates", type=reader(int), default=400, help="of the learning test (default: 400)")
    parser.add_argument("--learning-test-only", action="store_true", help="no forks: minutes, instead of hours")
    parser.add_argument("--output", type=given_path, help="where the answer goes (default: RUN/diagnosis-<frames>)")
    add_stop_signal(parser)
    namespace = parser.parse_strict(words)
    run, stop = namespace.run, StopSignals(namespace.stop_signal)

    given = tuple(namespace.arms.split(",")) if namespace.arms else None
    if given is not None and "untouched" not in given:
        raise ConfigError("--arms lacks untouched, which the others are compared with: add it")
    for name in ("frames", "seeds", "learning_seeds", "learning_updates"):
        if (value := getattr(namespace, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 < namespace.threshold < 1:
        raise ConfigError(f"--threshold {namespace.threshold:g} must lie between 0 and 1, such as 0.1")
    require_checkpoints(run)

    from growtrain.diagnosis.copies import parts_of
    from growtrain.diagnosis.forks import cost_lines, default_arms, default_frames, diagnose
    from growtrain.diagnosis.page import ARMS, Settings, next_command, render
    from growtrain.plasticity.learning_test import LearningTest
    from growtrain.runs.checkpoint import open_at, open_newest
    from growtrain.runs.resuming import at_own_width

    if unknown := [arm for arm in given or () if arm not in ARMS]:
        raise ConfigError(f"--arms {unknown[0]} is unknown: choose from {', '.join(ARMS)}")
    checkpoint = at_own_width(open_newest(run) if namespace.at is None else open_at(run, namespace.at))
    settings = Settings(
        frames=namespace.frames if namespace.frames is not None else default_frames(checkpoint),
        seeds=namespace.seeds,
        arms=() if namespace.learning_test_only else given or default_arms(checkpoint),
        threshold=namespace.threshold,
        test=LearningTest(seeds=namespace.learning_seeds, updates=namespace.learning_updates),
    )
    output = namespace.output or run / f"diagnosis-{checkpoint.frames}"
    say("\n".join(cost_lines(run, checkpoint, settings)))
    for part in parts_of(checkpoint):
        with stop:
            diagnosis = diagnose(run, checkpoint, settings, output, stop=lambda: stop.received, say=say, part=part)
        if diagnosis is None:
            complain("stopped: the same command again goes on with what is not done")
            return STOPPED
        say(f"\n{render(diagnosis)}\nwritten to {output}; next: {next_command(diagnosis)}")
    return 0
