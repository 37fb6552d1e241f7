"""What a checkpoint of a run with a full replay costs: seconds for which training stands still, bytes on the disk, seconds to resume.

    python benchmarks/checkpoint_cost.py [--replay-capacity 1M] [--num-envs 8] --output results/checkpoint_cost

Fills the replay by real random play, then saves: everything new (the first checkpoint of a run, or one a whole replay later), with a
twentieth of the replay new, and with nothing but a step new. Each saved checkpoint is opened, verified and restored into a fresh run.

Units: seconds; bytes; transitions.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from recording import describe_machine, machine_lines, table, write_outputs

from growtrain.commands.commandline import Parser, add_config_flags, explicit_settings
from growtrain.environments.atari import FRAME_SKIP
from growtrain.runs.checkpoint import open_newest
from growtrain.runs.run import Run
from growtrain.settings.presets import paper
from growtrain.settings.text import ConfigError


def main() -> int:
    """Measures one configuration."""
    parser = Parser(prog="checkpoint_cost", description=__doc__)
    add_config_flags(parser)
    parser.add_argument("--output", type=Path, default=Path("results/checkpoint_cost"))
    parser.add_argument(
        "--scratch",
        type=Path,
        help="where the checkpoints go: the disk that is measured (default: the temporary directory)",
    )
    try:
        options = parser.parse_strict(sys.argv[1:])
        settings = {"device": "cpu"} | explicit_settings(options)
        # Epsilon is 1 throughout: the replay fills at the speed of random play, and nothing is learned meanwhile.
        capacity = settings.get("replay_capacity", paper().replay_capacity)
        never = {"learning_starts": 4 * FRAME_SKIP * capacity, "total_frames": 8 * FRAME_SKIP * capacity}
        config = paper(**{"schedule": "fixed"} | settings | never)
    except ConfigError as error:
        print(f"checkpoint_cost: {error}", file=sys.stderr)
        return 2
    raw: dict[str, Any] = {"machine": describe_machine(), "settings": settings, "checkpoints": []}
    with tempfile.TemporaryDirectory(prefix="checkpoint-cost-", dir=options.scratch) as scratch:
        run_dir = Path(scratch) / "run"
        run_dir.mkdir()
        with Run(config, run_dir).recording() as run:
            # Beyond its capacity: an episode's last frame takes a row too, so the first lap holds a little less.
            for what, steps in (("all frames new", capacity), ("5 % new", capacity // 20), ("one step new", 1)):
                target = run.collector.agent_steps + steps
                while run.collector.agent_steps < target:
                    run.step()
                before = _disk_bytes(run_dir)
                start = time.perf_counter()
                run.save()
                saved = time.perf_counter() - start
                start = time.perf_counter()
                checkpoint = open_newest(run_dir)
                verified = time.perf_counter() - start
                num_bytes = checkpoint.num_bytes  # of which the state's tensors are dropped by the restore
                raw["checkpoints"].append(
                    {
                        "what": what,
                        "transitions": len(run.ring),
                        "save_seconds": saved,
                        "written_bytes": _disk_bytes(run_dir) - before,
                        "checkpoint_bytes": num_bytes,
                        "replay_bytes": sum(segment.num_bytes for segment in checkpoint.segments),
                        "open_seconds": verified,
                    }
                )
                print(json.dumps(raw["checkpoints"][-1]), file=sys.stderr, flush=True)
            pixels = run.ring.frames.clone() if capacity <= 200_000 else None
            written = run.ring.written.copy()
        del run  # two replays of this size do not fit into every machine
        start = time.perf_counter()
        resumed = Run(config, run_dir, open_newest(run_dir))
        raw["resume_seconds"] = time.perf_counter() - start
        if not (resumed.ring.written == written).all() or (
            pixels is not None and not torch.equal(resumed.ring.frames, pixels)
        ):
            raise AssertionError("the resumed replay is not the one that was saved")
        resumed.collector.environment.close(raise_if_closed=False)
    write_outputs(options.output, raw, markdown(raw))
    print(markdown(raw))
    return 0


def markdown(raw: dict[str, Any]) -> str:
    """The table."""
    header = (
        "checkpoint",
        "transitions",
        "training stands still [s]",
        "on disk [MB]",
        "of it replay [MB]",
        "open and verify [s]",
    )
    rows = [
        [
            row["what"],
            f"{row['transitions']:,}",
            f"{row['save_seconds']:.2f}",
            *(f"{row[name] / 1e6:.0f}" for name in ("checkpoint_bytes", "replay_bytes")),
            f"{row['open_seconds']:.2f}",
        ]
        for row in raw["checkpoints"]
    ]
    return (
        f"# What a checkpoint costs\n\n{machine_lines(raw['machine'])}\n{table(header, rows)}\n"
        f"A fresh process's parts, restored from the last one, verified and ready to go on: {raw['resume_seconds']:.1f} s.\n"
    )


def _disk_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    sys.exit(main())
