"""Evaluates a checkpoint of a run."""

import dataclasses
import json
from collections.abc import Sequence

from growtrain.commands.commandline import Parser, add_config_flags, explicit_settings, given_path, reader
from growtrain.runfiles import require_directory
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    played = [item.name for item in dataclasses.fields(Config) if item.metadata["evaluation"]]
    parser = Parser(
        prog="growtrain evaluate", description="Play whole episodes with a run's checkpoint and report true scores."
    )
    parser.add_argument("run", type=given_path, metavar="RUN", help="the run's directory")
    parser.add_argument("--at", type=reader(int), metavar="N", help="frames of the checkpoint (default: the newest)")
    add_config_flags(parser, played, default_of="those of the run")
    namespace = parser.parse_strict(words)
    require_directory(namespace.run, "that of a run")

    import torch

    from growtrain.learners.make import resolve_device
    from growtrain.runs.checkpoint import load_learner
    from growtrain.runs.evaluation import evaluate

    try:
        device = resolve_device(getattr(namespace, "device", "auto"))
        learner, config, frames, stage = load_learner(namespace.run, device, at=namespace.at)
    except FileNotFoundError as error:
        raise ConfigError(f"{namespace.run} holds no run that can be evaluated ({error})") from error
    game = config.game_after(frames)  # with the lanes of the run
    config = dataclasses.replace(config, **explicit_settings(namespace))
    torch.set_num_threads(config.threads)
    record = evaluate(learner.act, config, frames=frames, stage=stage, device=device, game=game)
    assert record is not None  # nothing stops it
    print(json.dumps(record.to_dict()))
    return 0
