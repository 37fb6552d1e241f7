"""Compares `plan`'s estimate of memory with the peak that a run with a full replay really reaches.

    python benchmarks/memory.py [--replay-capacity 1M] [--num-envs 8] [--schedule grow3x] [--anchor frozen]

Builds the run's parts, touches every row of the replay, grows, does updates at every stage, one evaluation and a checkpoint, and reads the
process's peak resident size and, with `--device cuda`, the peak of what it holds of the GPU. Prints one JSON line.

Units: bytes.
"""

import dataclasses
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from growtrain.commands.commandline import Parser, add_config_flags, explicit_settings
from growtrain.environments.make import spec_of
from growtrain.planning.costs import make_plan
from growtrain.runs.checkpoint import CheckpointWriter
from growtrain.runs.evaluation import evaluate
from growtrain.runs.run import Run
from growtrain.settings.presets import paper


def main() -> int:
    """Measures one configuration."""
    parser = Parser(prog="memory.py", description=__doc__)
    add_config_flags(parser)
    explicit = {"device": "cpu"} | explicit_settings(parser.parse_strict(sys.argv[1:]))
    config = dataclasses.replace(paper(), **explicit)
    run = Run(config, Path(tempfile.mkdtemp()) / "run")
    run.ring.frames.fill_(7)
    while run.collector.agent_steps < 1_000:
        run.step()
    for stage in range(len(run.schedule.injection_frames) + 1):
        if stage:
            run.learner.copy_target()  # a network is frozen whole at a copy
            list(run.growing.grow())
            run.learner.copy_target()
        for _ in range(20):
            if run.captured is None:
                run.learner.update(run.ring.sample(2 * config.batch_size).view(2, config.batch_size))
            else:
                run.captured.update(run.ring.sample_indices(2 * config.batch_size))
    brief = dataclasses.replace(config, eval_episodes=config.num_envs, max_episode_frames=20_000 // config.num_envs)
    evaluate(run.learner.act, brief, frames=0, stage=run.growing.stage, device=run.device)
    writer = CheckpointWriter(run.run_dir, keep=0)
    writer.save(run.state_dict(), run.ring, config, frames=run.frames, device=run.device)
    needed = make_plan(config, spec_of(config)).memory.needed(run.device.type)
    record = _compare(needed["host"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if run.device.type == "cuda":
        record["gpu"] = _compare(needed["GPU"], _peak_gpu_bytes())
    print(json.dumps(record | {"config": explicit, "torch": torch.__version__}))
    return 0


def _compare(planned: int, peak: int) -> dict[str, Any]:
    return {"planned_bytes": planned, "peak_bytes": peak, "planned_over_peak": round(planned / peak, 4)}


def _peak_gpu_bytes() -> int:
    """Of a GPU that nothing else uses: the most that PyTorch has held, and what CUDA holds beside it."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()


if __name__ == "__main__":
    sys.exit(main())
