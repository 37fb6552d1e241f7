"""Goes on with a run from its newest whole checkpoint, or forks it."""

from collections.abc import Sequence

from growtrain.commands.commandline import Parser, add_config_flags, given_path
from growtrain.commands.running import StopSignals, add_stop_signal, explicit_with_game, run_training
from growtrain.runfiles import require_new, require_unlocked
from growtrain.settings.text import ConfigError


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="growtrain resume", description="Go on with a run from its newest checkpoint, as if it had never stopped."
    )
    parser.add_argument("run", type=given_path, metavar="RUN", help="the run's directory")
    parser.add_argument(
        "--fork", type=given_path, metavar="NEWDIR", help="begin another run there, with the past of this one"
    )
    add_stop_signal(parser)
    add_config_flags(parser, default_of="those of the run")
    namespace = parser.parse_strict(words)
    stop = StopSignals(namespace.stop_signal)
    run, fork = namespace.run, namespace.fork
    if not (run / "config.json").exists() and not (run / "checkpoints").is_dir():
        raise ConfigError(
            f"{run} holds no run: name the directory that --run-dir was, or start one with growtrain train"
        )
    if fork is not None:
        require_new(fork, "--fork")

    from growtrain.environments.base import Spec
    from growtrain.runs.checkpoint import NeverSaved, open_newest
    from growtrain.runs.resuming import changed_config, done_injections, restart
    from growtrain.sweep.cells import progress

    if fork is None:
        require_unlocked(run)
    try:
        checkpoint = open_newest(run)
    except NeverSaved:
        if fork is not None:
            raise
        from growtrain.environments.make import spec_of

        config, start, notes = restart(run, explicit_with_game(namespace))
        spec = spec_of(config) if start is None else Spec.from_dict(start.state["spec"])
        return run_training(config, run, spec, stop, notes, start, again=True)
    config, notes = changed_config(checkpoint, explicit_with_game(namespace), fork=fork is not None)
    if fork is None and checkpoint.frames >= config.total_frames and progress(run).finished:
        done = ",".join(map(str, done_injections(checkpoint)))
        print(
            f"{run} is done: {checkpoint.frames} frames; to go further, --fork NEWDIR --total-frames N"
            + (f" --schedule at:{done}" if done and checkpoint.config.schedule != "adaptive" else "")
        )
        return 0
    notes = [f"from the checkpoint at {checkpoint.frames} frames", *notes]
    spec = Spec.from_dict(checkpoint.state["spec"])
    return run_training(config, run if fork is None else fork, spec, stop, notes, checkpoint)
