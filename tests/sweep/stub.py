"""Stands in for `python -m growtrain` where what is tested is who starts it, when, and how often.

Its last word says what it does: `quick` and `slow` reach their end (a resumed `slow` at once), `fail` does not; `other` does, with other
settings than those of the cell.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from growtrain.runfiles import run_lock


def stop(number: int, frame: object) -> None:
    (run_dir / "stopped").open("a").write("once\n")
    sys.exit(75)


verb, mode = sys.argv[1], sys.argv[-1]
run_dir = Path(sys.argv[3] if verb == "train" else sys.argv[2])
signal.signal(signal.SIGTERM, stop)
with run_lock(run_dir):
    (run_dir / "config.json").write_text(json.dumps({"fingerprint": "g" if mode == "other" else "f"}))
    (run_dir / "metrics.jsonl").write_text('{"frames": 400, "frames_per_second": 100.0}\n')
    cores, gpu = sorted(os.sched_getaffinity(0)), os.environ.get("CUDA_VISIBLE_DEVICES")
    with (run_dir / "starts").open("a") as file:
        file.write(json.dumps({"verb": verb, "pid": os.getpid(), "cores": cores, "gpu": gpu}) + "\n")
    if mode == "fail":
        sys.exit("first line\nno such luck")
    if mode == "slow" and verb == "train":
        time.sleep(30)
    (run_dir / "summary.json").write_text('{"status": "done", "frames": 1000}')
