"""Evaluates a run's newest checkpoint."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from growtrain.commandline import Parser, add_config_flags, explicit_settings
from growtrain.config import ConfigError


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(prog="growtrain evaluate", description="Play a run's newest checkpoint and report true scores.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    add_config_flags(parser)
    namespace = parser.parse_strict(words)

    import torch

    from growtrain.checkpoint import load_learner
    from growtrain.evaluation import evaluate
    from growtrain.training import resolve_device

    try:
        device = resolve_device(getattr(namespace, "device", "auto"))
        learner, config, frames, stage = load_learner(namespace.run, device)
    except FileNotFoundError as error:
        raise ConfigError(f"{namespace.run} holds no run that can be evaluated ({error})") from error
    config = dataclasses.replace(config, **explicit_settings(namespace))
    torch.set_num_threads(config.threads)
    record = evaluate(learner.q_values, config, frames=frames, stage=stage, device=device)
    print(json.dumps(record.to_dict()))
    return 0
