"""The model of `plan --hardware` against what can be measured here: with a CPU's constants, its update times against real ones.

The constants are measured on the spot, before and after the updates: rates of a product and of a convolution, bandwidths of memory and of
the last-level cache, the least time of an operator. None of them is fitted to an update. Then updates of twelve real learners, grown by
the real transaction, are timed in turns as `growth_cost.py` does, and the same kernels are given to the model.

    python benchmarks/limits_check.py --seconds 120 --output results/limits_cpu

1. On a CPU a kernel begins when the one before has ended, and the model counts one operator a tensor where a GPU has one a list.
2. A machine that others use, too, says so: `quiet` is whether their cores stayed below a quarter and the constants stayed within a tenth.
3. With `--cpu-time` one thread's CPU time is counted instead of the wall's: others who share its core are left out, if not its caches.
4. Updates are those of a run of some 25,000, operator by operator with the optimizer's step compiled; `--uncompiled` leaves that out, too,
which takes seconds for each learner. A longer run compiles all of an update, of which the model knows nothing.

Units: seconds; FLOPs; bytes.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as `python -m growtrain` does, before torch is imported

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from growth_cost import Subject, build, config_of, stage_name, time_rounds
from recording import describe_machine, machine_lines, say, summarize, table, write_outputs
from torch import Tensor, nn
from torch.nn import functional as F

from growtrain.environments.make import spec_of
from growtrain.networks.heads import hidden_linear, make_head
from growtrain.planning.allocator import keep_freed_memory
from growtrain.planning.hardware import Constant, Hardware
from growtrain.planning.kernels import KernelCounter
from growtrain.planning.limits import kernel_times, total
from growtrain.planning.work import count_update
from growtrain.settings.machine import usable_cores
from growtrain.settings.presets import resolve

AIM = 0.2  # error
FORMS = (("frozen", 1), ("frozen", 3), ("mirrored", 3), ("network", 3))
LEVEL = Path("/sys/devices/system/cpu/cpu0/cache")


def subjects_of(width: int) -> list[Subject]:
    """The networks of one small width: the small one, the full one, and four that have grown."""
    plain = [Subject(name="small", width=width), Subject(name="full3x", width=4 * width)]
    return plain + [Subject(name=stage_name(form, at), width=width, form=form, stage=at) for form, at in FORMS]


def measure_constants(batch_size: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """The constants of this CPU. Operands take turns, so that they come from where an update's come from, not from a core's own cache."""
    width, channels, side = 1024, 64, 20
    inner = torch.channels_last
    weights, rows, bias = torch.rand(16, width, width), torch.rand(batch_size, width), torch.zeros(width)
    images = torch.rand(16, batch_size, channels, side, side)
    kernel = torch.rand(channels, channels, 3, 3).contiguous(memory_format=inner).requires_grad_()
    above = torch.rand(batch_size, channels, side - 2, side - 2).contiguous(memory_format=inner)
    convolved = [image.contiguous(memory_format=inner).requires_grad_() for image in images]
    large, resident = torch.rand(2, 2**25), torch.rand(2, 2**19)
    tiny = make_head(4 * 4 * 4, 8, 4)  # a network whose arithmetic takes no time
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), *tiny)
    network.to(memory_format=inner)  # type: ignore[call-overload]
    small = torch.rand(batch_size, 4, 8, 8).contiguous(memory_format=inner)

    def convolve(image: Tensor) -> object:
        return torch.autograd.grad(F.conv2d(image, kernel), (image, kernel), above)

    def pass_through(x: Tensor) -> None:
        network.zero_grad(set_to_none=True)
        network(x).sum().backward()

    with KernelCounter(gpu=False) as counter:
        pass_through(small)
    with torch.no_grad():
        product = typical(lambda weight: hidden_linear(rows, weight, bias), list(weights), clock)
        memory, cache = (typical(lambda pair: pair[0].copy_(pair[1]), [pair], clock) for pair in (large, resident))
    convolution = typical(convolve, convolved, clock)
    return {
        "product_flops": 2 * batch_size * width * width / product,
        "convolution_flops": 3 * 2 * batch_size * channels**2 * 9 * (side - 2) ** 2 / convolution,
        "memory_bandwidth": 2 * large[0].nbytes / memory,
        "cache_bandwidth": 2 * resident[0].nbytes / cache,
        "cache_bytes": cache_bytes(),
        "eager_kernel": typical(pass_through, [small], clock) / len(counter.kernels),
    }


def typical(
    call: Callable[[Tensor], object], operands: Sequence[Tensor], clock: Callable[[], float], seconds: float = 0.5
) -> float:
    """Median seconds of many calls, each with the next of the operands."""
    times: list[float] = []
    end = clock() + seconds
    for operand in itertools.cycle(operands):
        start = clock()
        call(operand)
        times.append(clock() - start)
        if clock() > end and len(times) > 2 * len(operands):
            return statistics.median(times[len(operands) :])
    raise AssertionError("there are operands")


def cache_bytes() -> float:
    """Size of the last-level cache, as Linux tells it."""
    sizes = [path.read_text().strip() for path in LEVEL.glob("index*/size")]
    return float(max(int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes))


def as_hardware(constants: dict[str, float]) -> Hardware:
    """This CPU as the model takes it; it has no link, no graph and no emulators that matter to an update."""
    unused = dict.fromkeys(("link_bandwidth", "graph_kernel", "emulator_frames", "cores"), Constant(1.0, "not used"))
    measured = {name: Constant(value, "measured here") for name, value in constants.items()}
    return Hardware(name="here", title="this CPU", pattern="", **unused, **measured)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures constants and updates, and models the updates; returns the record that goes into the JSON file."""
    torch.set_num_threads(1 if arguments.cpu_time else arguments.num_threads or usable_cores())
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    keep_freed_memory()  # as a run does
    machine, device = describe_machine("cpu"), torch.device("cpu")
    # What is compiled depends on how many updates a run has.
    config, _ = resolve("paper", {"total_frames": 100_000 if arguments.uncompiled else 400_000})
    spec = spec_of(config)
    before = measure_constants(config.batch_size, clock)
    rows: list[dict[str, Any]] = []
    updates, kernels = [], []
    for width in arguments.widths:
        for subject in subjects_of(width):
            learner, batches = build(subject, config_of(subject, config), spec, device)
            kernels.append(count_update(learner, lambda: batches[0], gpu=False, compiled=not arguments.uncompiled))  # noqa: B023
            updates.append(lambda learner=learner, batches=batches: learner.update(batches))
            rows.append({"name": subject.name, "width": width, "head_width": subject.width})
            say(f"width {width}, {subject.name}: {len(kernels[-1])} kernels")
    psutil.cpu_percent()
    others = psutil.Process().cpu_times()
    start = time.perf_counter()
    times = time_rounds(updates, device, arguments.seconds, arguments.updates_per_turn, clock)
    wall = time.perf_counter() - start
    own = psutil.Process().cpu_times()
    busy = (
        psutil.cpu_percent() / 100 * psutil.cpu_count() - (own.user + own.system - others.user - others.system) / wall
    )
    after = measure_constants(config.batch_size, clock)
    constants = {name: (before[name] * after[name]) ** 0.5 for name in before}
    hardware = as_hardware(constants)
    for row, seconds, each in zip(rows, times, kernels, strict=True):
        modelled = kernel_times(each, hardware, hardware.eager_kernel.value)
        row["seconds"], row["modelled_seconds"] = seconds, total(modelled)
        row["num_kernels"], row["flops"] = len(each), sum(kernel.flops for kernel in each)
        row["bytes_moved"] = sum(kernel.bytes_moved for kernel in each)
        row["error"] = row["modelled_seconds"] / summarize(seconds)["median"] - 1
        row["shares"] = {
            bound: sum(t.seconds for t in modelled if t.bound == bound) / row["modelled_seconds"]
            for bound in ("latency", "memory", "arithmetic")
        }
    drift = max(abs(after[name] / before[name] - 1) for name in before)
    return {
        "benchmark": "limits_check",
        "machine": machine,
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("output", "again")},
        "constants": {"before": before, "after": after, "used": constants},
        "busy_cores_of_others": busy,
        "drift": drift,
        "quiet": bool(busy < 0.25 and machine["busy_cores"] < 0.25 and drift < 0.1),
        "networks": rows,
    }


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    constants, rows = record["constants"]["used"], record["networks"]
    errors = [row["error"] for row in rows]
    within = sum(abs(error) <= AIM for error in errors)
    units = {
        "product_flops": ("product, 1024 x 1024 by the batch, by oneDNN", 1e-9, "GFLOP/s"),
        "convolution_flops": ("convolution 64 x 64 x 3 x 3 on 20 x 20 pixels, with both gradients", 1e-9, "GFLOP/s"),
        "memory_bandwidth": ("copy of 128 MiB", 1e-9, "GB/s"),
        "cache_bandwidth": ("copy of 2 MiB, which stays in the cache", 1e-9, "GB/s"),
        "cache_bytes": ("last-level cache, as Linux tells it", 1e-6, "MB"),
        "eager_kernel": ("an operator of a tiny network of such layers, forward and backward", 1e6, "us"),
    }
    measured = [
        [
            what,
            f"{factor * constants[name]:.3g} {unit}",
            *(f"{factor * record['constants'][at][name]:.3g}" for at in ("before", "after")),
        ]
        for name, (what, factor, unit) in units.items()
    ]
    networks = []
    for row in rows:
        times, shares = summarize([1e3 * seconds for seconds in row["seconds"]]), row["shares"]
        networks.append(
            [
                row["width"],
                row["name"],
                f"{row['flops'] / 1e9:.2f}",
                f"{row['bytes_moved'] / 1e6:.0f}",
                row["num_kernels"],
                f"{times['median']:.1f} [{times['q1']:.1f}-{times['q3']:.1f}]",
                f"{1e3 * row['modelled_seconds']:.1f}",
                f"{row['error']:+.0%}",
                *(f"{shares[bound]:.0%}" for bound in ("latency", "memory", "arithmetic")),
            ]
        )
    quiet = (
        "the machine was quiet"
        if record["quiet"]
        else f"**the machine was not quiet** (others used {record['busy_cores_of_others']:.2f} cores, a constant moved by "
        f"{record['drift']:.0%}): measure it again"
    )
    step = "not compiled" if record["settings"]["uncompiled"] else "compiled"
    clock = "CPU time of one thread" if record["settings"]["cpu_time"] else "wall-clock"
    error = (
        f"- Error: modelled / median of the measured - 1, from {min(errors):+.0%} to {max(errors):+.0%}; {within} of {len(rows)} "
        f"networks within the aim of {AIM:.0%}"
    )
    rounds = len(rows[0]["seconds"])
    header = ["width", "network", "GFLOP", "MB", "kernels", "measured, ms", "modelled, ms", "error"]
    return "\n".join(
        [
            "# The model of the least time against measured updates, on a CPU",
            "",
            machine_lines(record["machine"])
            + f"- Measured: {rounds} rounds of {record['settings']['updates_per_turn']} updates of each network, the optimizer's step "
            f"{step}, by {clock}; {quiet}",
            error,
            "",
            table([*header, "latency", "memory", "arithmetic"], networks),
            "The last three columns are shares of the modelled time, by what binds an operator.",
            "",
            table(["constant", "used", "before", "after"], measured),
        ]
    )


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 2048], help="small widths")
    parser.add_argument("--seconds", type=float, default=120.0, help="of timing updates; building comes on top")
    parser.add_argument("--updates-per-turn", type=int, default=3)
    parser.add_argument("--num-threads", type=int, default=0, help="0: all that this process may use")
    parser.add_argument("--cpu-time", action="store_true", help="one thread's CPU time, where others share its core")
    parser.add_argument("--uncompiled", action="store_true", help="do not compile the optimizer's step")
    parser.add_argument("--output", type=Path, help="path without suffix; .json and .md are added")
    parser.add_argument("--again", type=Path, metavar="JSON", help="a .json written before: no measuring, .md anew")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Measures, or reads what was measured; prints the report and writes the files."""
    arguments = parse(words)
    record = json.loads(arguments.again.read_text(encoding="utf-8")) if arguments.again else measure(arguments)
    text = report(record)
    print(text)
    output = arguments.output or (arguments.again and arguments.again.with_suffix(""))
    if output:
        write_outputs(output, record, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
