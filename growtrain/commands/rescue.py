"""Goes on with an agent that has stopped improving, by interventions instead of from scratch."""

from collections.abc import Sequence

from growtrain.commands.commandline import Parser, add_config_flags, given_path, reader
from growtrain.commands.running import StopSignals, add_stop_signal, explicit_with_game, run_training
from growtrain.runfiles import require_new
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="growtrain rescue",
        description="Go on with a trained agent that has stopped improving, with plasticity injected, instead of training another.",
        epilog="Of a run, --schedule (grow1x, grow3x, at:...) counts from its checkpoint, of a file from its first update. Beside a "
        "file's network that is frozen whole (--freeze network) one of another --width and --encoder-width can learn, from the start.",
    )
    parser.add_argument(
        "agent",
        type=given_path,
        metavar="RUN|FILE",
        help="a run, or a file of weights, PyTorch's or safetensors, of any name (as CleanRL's .cleanrl_model)",
    )
    parser.add_argument("--frames", type=reader(int), help="budget (default: half of what the run has played)")
    parser.add_argument("--at", type=reader(int), help="of a run: frames of the checkpoint (default: the newest)")
    parser.add_argument("--run-dir", type=given_path, help="where the new run's files go (default: as for training)")
    add_stop_signal(parser)
    add_config_flags(parser, default_of="those of the run; for a file, its widths and its game's preset at this budget")
    namespace = parser.parse_strict(words)
    explicit, stop, agent = explicit_with_game(namespace), StopSignals(namespace.stop_signal), namespace.agent
    if "total_frames" in explicit:
        raise ConfigError("--total-frames: a rescue's budget is what it adds: give it as --frames")
    if namespace.frames is not None and namespace.frames < 1:
        raise ConfigError(f"--frames is {namespace.frames}: it must be positive")
    if namespace.run_dir is not None:
        require_new(namespace.run_dir, "--run-dir")
    if not agent.exists():
        raise ConfigError(f"{agent} does not exist: name the directory of a run, or a file of weights")

    from growtrain.diagnosis.rescue import default_frames, rescue_run, rescue_weights
    from growtrain.environments.base import Spec

    if agent.is_dir():
        from growtrain.runs.checkpoint import open_at, open_newest
        from growtrain.runs.resuming import at_own_width

        checkpoint = at_own_width(open_newest(agent) if namespace.at is None else open_at(agent, namespace.at))
        frames = namespace.frames if namespace.frames is not None else default_frames(checkpoint)
        config, notes = rescue_run(checkpoint, explicit, frames)
        notes = [f"from the checkpoint of {agent} at {checkpoint.frames} frames", *notes]
        spec, start = Spec.from_dict(checkpoint.state["spec"]), checkpoint
        weights = None
    else:
        from growtrain.environments.make import spec_of
        from growtrain.learners.foreign_weights import read_weights

        if namespace.at is not None:
            raise ConfigError("--at: a file of weights has no checkpoints: leave it out")
        if namespace.frames is None:
            raise ConfigError(
                "--frames is missing: a file of weights does not say how long it was trained; give for example 10M"
            )
        weights = read_weights(agent)
        played = {name: explicit[name] for name in ("game", "minimal_actions") if name in explicit}
        spec, start = spec_of(Config(**played)), None
        config, notes = rescue_weights(weights, explicit, namespace.frames, spec)
    return run_training(config, namespace.run_dir, spec, stop, notes, start, weights)
