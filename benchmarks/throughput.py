"""How fast the training loop is: against its own bare update, against the machine, and against Stable-Baselines3's DQN.

    python benchmarks/throughput.py --seconds 200 --output results/throughput_cpu

Everything runs in one process and in turns of a few seconds, in every repeat all of it, so that a slower moment of the machine hits all;
a ratio is taken within a repeat, and tables show the median over repeats and the quartiles. On a CPU:

1. efficiency: updates of the real loop x time of a bare update / wall-clock of the loop. A bare update has its batch in memory.
2. bare update: its time against its FLOPs (the formula of `growtrain plan`) at the rate of a large matrix product: PyTorch's own,
   and oneDNN's, which may be much faster and which hidden layers use.
3. frames per second against Stable-Baselines3's DQN with the same game, preprocessing, batch, replay ratio and threads.

On a GPU: environments alone, updates alone, the real loop, its share of the slower of the two, and a profile of where the rest goes.

The loop is what `train` repeats: act, learn, receive, and the target's copies; without what is periodic beside it (evaluations, records,
checkpoints).

Units: seconds; emulator frames (4 per agent step); FLOPs, 2 per multiply-add.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as `python -m growtrain` does, before torch is imported

import argparse
import importlib.util
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from recording import (
    covered,
    describe_machine,
    device_events,
    machine_lines,
    say,
    summarize,
    synchronize,
    table,
    with_spread,
    write_outputs,
)
from sb3_dqn import Arm, Sample, sb3_arm

from growtrain.environments.atari import FRAME_SKIP
from growtrain.environments.base import Spec
from growtrain.environments.games import canonical_game
from growtrain.environments.make import make_environment
from growtrain.learners.double_dqn import DoubleDQN
from growtrain.learners.graph import make_captured, uses_graph
from growtrain.networks.heads import matrix_product
from growtrain.planning.costs import network_shape, update_flops
from growtrain.planning.hardware import hardware_of
from growtrain.planning.limits import kernel_times, total
from growtrain.planning.work import count_work
from growtrain.runs.run import Run
from growtrain.settings.config import Config, Execution
from growtrain.settings.presets import paper
from growtrain.settings.text import ConfigError

PRODUCT_SIZE = 2048
PRODUCTS = {"product": f"torch.mm ({PRODUCT_SIZE}^3)", "product oneDNN": f"oneDNN's product ({PRODUCT_SIZE}^3)"}
WARM_UP_UPDATES = 20
# Of a turn; the others: 1.
SHARES = {"loop": 1.0, "update": 0.6, "product": 0.2, "product oneDNN": 0.2, "environments": 0.2, "act": 0.1}
CALLS_PER_WAIT = 64
TOP = 12  # rows of the profile's tables


class Loop:
    """The real loop, ready to go on from where it was."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        """Builds the run, fills the replay with random play, and does the first updates."""
        self.run = Run(config, run_dir)
        while self.run.learner.updates < WARM_UP_UPDATES:
            self.step()

    def step(self) -> None:
        """A step of the environments, the updates that it owes, and the target's copy where it is due."""
        self.run.step()
        self.run.learner.end_of_step(self.run.frames)

    def __call__(self, seconds: float) -> Sample:
        """Runs it; `phases` are its timers, which never wait for a GPU."""
        run = self.run
        run.phases.take()
        frames, updates = run.collector.frames, run.learner.updates
        sample = timed(self.step, run.device, seconds)
        sample |= {"frames": run.collector.frames - frames, "updates": run.learner.updates - updates}
        return sample | {"phases": run.phases.take()}


def timed(call: Callable[[], object], device: torch.device, seconds: float) -> Sample:
    """Calls until the time is over; a GPU is waited for at both ends, and now and then so that no long queue builds up."""
    synchronize(device)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        call()
        calls += 1
        if calls % CALLS_PER_WAIT == 0:
            synchronize(device)
    synchronize(device)
    return {"seconds": time.perf_counter() - start, "calls": calls}


def update_arm(loop: Loop) -> Arm:
    """Bare updates of another learner like the loop's, on real transitions that are drawn once."""
    run, config = loop.run, loop.run.config
    learner = DoubleDQN(
        config,
        run.learner.spec,
        width=config.width,
        device=run.device,
        generator=torch.Generator().manual_seed(0),
    )
    num_updates = max(1, round(config.num_envs * config.replay_ratio))
    if uses_graph(config, run.device):
        captured, rows = make_captured(learner, run.ring), run.ring.sample_indices(num_updates * config.batch_size)
        update: Callable[[], object] = partial(captured.update, rows)  # the gather is part of the graph
    else:
        batches = run.ring.sample(num_updates * config.batch_size).view(num_updates, config.batch_size)
        update = partial(learner.update, batches)

    def arm(seconds: float) -> Sample:
        before = learner.updates
        sample = timed(update, run.device, seconds)
        return sample | {"updates": learner.updates - before}

    arm(0.2)
    return arm


def product_arm(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Arm:
    """Products of square float32 matrices on the CPU, with the threads of everything else."""
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE)

    def arm(seconds: float) -> Sample:
        sample = timed(lambda: product(a, b), torch.device("cpu"), seconds)
        return sample | {"flops": 2 * PRODUCT_SIZE**3 * sample["calls"]}

    arm(0.2)
    return arm


def environments_arm(config: Config) -> Arm:
    """Lanes of their own, stepped with random actions and nothing else."""
    environment, generator = make_environment(config, seed=1), np.random.default_rng(0)
    environment.start()

    def step() -> None:
        environment.send(generator.integers(environment.spec.num_actions, size=config.num_envs))
        environment.recv()

    def arm(seconds: float) -> Sample:
        sample = timed(step, torch.device("cpu"), seconds)
        return sample | {"frames": FRAME_SKIP * config.num_envs * sample["calls"]}

    arm(0.2)
    return arm


def act_arm(loop: Loop) -> Arm:
    """Action values of one observation per lane, from the replay's frames to the host."""
    run = loop.run

    def arm(seconds: float) -> Sample:
        sample = timed(lambda: run.learner.act(run.ring.newest()).cpu(), run.device, seconds)
        return sample | {"frames": FRAME_SKIP * run.config.num_envs * sample["calls"]}

    arm(0.2)
    return arm


def add_sb3(arms: dict[str, Arm], names: Sequence[str], config: Config) -> str | None:
    """Adds an arm for each `kind:num_envs` of `names`; returns why there is none, if so."""
    if not names:
        return "not asked for"
    if importlib.util.find_spec("stable_baselines3") is None:
        return "stable_baselines3 is not installed: pip install 'growtrain[bench]'"
    if config.encoder_width != 1:
        return f"its encoder cannot be made {config.encoder_width:g} times as wide"
    try:
        for name in names:
            kind, count = name.split(":")
            say(f"Stable-Baselines3, {name}: filling its replay")
            arms[f"sb3 {name}"] = sb3_arm(kind, int(count), config, WARM_UP_UPDATES)
    except ImportError as error:
        return f"{error}: pip install 'growtrain[bench]'"
    return None


Samples = dict[str, list[Sample]]


def take_turns(
    arms: dict[str, Arm], seconds: float, repeats: int, keep: Callable[[Samples], object] = lambda _: None
) -> Samples:
    """All samples of every arm; the order of turns is reversed from repeat to repeat, after each of which `keep` gets them so far."""
    shares = {name: SHARES.get(name, 1.0) for name in arms}
    unit = seconds / repeats / sum(shares.values())
    samples: Samples = {name: [] for name in arms}
    for repeat in range(repeats):
        for name in arms if repeat % 2 == 0 else reversed(arms):
            samples[name].append(arms[name](unit * shares[name]))
        say(f"repeat {repeat + 1} of {repeats}")
        keep(samples)
    return samples


def rates(samples: Sequence[Sample], what: str) -> list[float]:
    """`what` per second, in every repeat."""
    return [sample[what] / sample["seconds"] for sample in samples]


def efficiency(loop: Sequence[Sample], update: Sequence[Sample]) -> list[float]:
    """The part of the loop's wall-clock that its updates would have taken alone, in every repeat."""
    return divided(rates(loop, "updates"), rates(update, "updates"))


def flop_ratios(update: Sequence[Sample], product: Sequence[Sample], flops_per_update: int) -> list[float]:
    """Time of a bare update over the time its FLOPs would take at the matrix product's rate, in every repeat."""
    return divided(rates(product, "flops"), [flops_per_update * rate for rate in rates(update, "updates")])


def divided(numerators: Iterable[float], denominators: Iterable[float]) -> list[float]:
    """Quotients, repeat by repeat."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def profile(loop: Loop, steps: int) -> dict[str, Any]:
    """Profiles the loop; profiling slows it down, so `busy_seconds_per_step` is to be set against the time of an unprofiled step.

    Returns:
        `steps`, `seconds`, `busy_seconds` (at least one kernel or copy runs on the GPU; 0 on a CPU), `kernels` and `operators`
        [name, calls, seconds on the device / on the CPU without what they call], the longest first.
    """
    from torch.profiler import ProfilerActivity

    device, activities = loop.run.device, [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            loop.step()
        synchronize(device)
        seconds = time.perf_counter() - start
    on_device = device_events(profiler)
    counts: Counter[str] = Counter(e.name for e in on_device)
    microseconds: Counter[str] = Counter()
    for e in on_device:
        microseconds[e.name] += e.time_range.end - e.time_range.start
    operators = sorted(profiler.key_averages(), key=lambda row: row.self_cpu_time_total, reverse=True)
    busy = covered((e.time_range.start, e.time_range.end) for e in on_device) / 1e6
    return {
        "steps": steps,
        "seconds": seconds,
        "busy_seconds": busy,
        "busy_seconds_per_step": busy / steps,
        "kernels_per_step": len(on_device) / steps,
        "kernels": [[name, counts[name], total / 1e6] for name, total in microseconds.most_common(TOP)],
        "operators": [[row.key, row.count, row.self_cpu_time_total / 1e6] for row in operators[:TOP]],
    }


def modelled(config: Config, spec: Spec, gpu: str) -> dict[str, Any]:
    """What `plan --hardware` counts and models, to be set against the profile.

    Returns:
        `kernels_per_step`, copies included, of a step of all environments, and `update_seconds`, None where it does not know the GPU.
    """
    (work,), hardware = count_work(config, spec), hardware_of(gpu)
    updates = config.num_envs * config.replay_ratio
    least = hardware and (hardware.eager_kernel if config.execution == "eager" else hardware.graph_kernel).value
    return {
        "kernels_per_step": updates * len(work.update) + len(work.act) + len(work.store),
        "update_seconds": total(kernel_times(work.update, hardware, least)) if hardware and least else None,
    }


def measure(arguments: argparse.Namespace, run_dir: Path, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Builds everything, measures, and returns the record that goes into the JSON file.

    Args:
        arguments: of the command line.
        run_dir: of the loop's run.
        keep: gets the record so far after every repeat.
    """
    config = paper(
        game=arguments.game,
        schedule="fixed",
        num_envs=arguments.num_envs,
        batch_size=arguments.batch_size,
        replay_ratio=arguments.replay_ratio,
        replay_capacity=arguments.replay_capacity,
        width=arguments.width,
        encoder_width=arguments.encoder_width,
        device=arguments.device,
        execution=arguments.execution,
        num_threads=arguments.num_threads,
        learning_starts=FRAME_SKIP * arguments.warm_up_steps,
        epsilon_decay_frames=0,  # from the first update on the network is asked, as in all but the beginning of a run
        eval_period=0,
    )
    say("our loop: filling its replay")
    loop = Loop(config, run_dir)
    device = loop.run.device
    machine = describe_machine(device.type)
    arms: dict[str, Arm] = {"loop": loop, "update": update_arm(loop)}
    arms |= {"environments": environments_arm(config), "act": act_arm(loop)}
    no_sb3: str | None = "on a GPU the loop is compared with its parts only"
    if device.type == "cpu":
        arms["product"] = product_arm(torch.mm)
        if torch.backends.mkldnn.is_available():
            arms["product oneDNN"] = product_arm(matrix_product)
        names = ["dummy:1", f"dummy:{config.num_envs}", f"subproc:{config.num_envs}"]
        no_sb3 = add_sb3(arms, names if arguments.sb3 is None else arguments.sb3, config)
    spec = loop.run.learner.spec
    shape = network_shape(config, spec, config.width)
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    record: dict[str, Any] = {
        "benchmark": "throughput",
        "machine": machine,
        "settings": settings | {"game": canonical_game(config.game), "num_actions": spec.num_actions},
        "device": device.type,
        "in_graph": uses_graph(config, device),
        "flops_per_update": update_flops(shape, config.batch_size, 0, True).total,
        "warm_up_updates": WARM_UP_UPDATES,
        "sb3_missing": no_sb3,
        "samples": {},
        "profile": None,
        "modelled": modelled(config, spec, machine["gpu"]) if device.type == "cuda" else None,
    }
    record["samples"] = take_turns(
        arms, arguments.seconds, arguments.repeats, lambda samples: keep(record | {"samples": samples})
    )
    if arguments.profile_steps:
        record["profile"] = profile(loop, arguments.profile_steps)
    loop.run.collector.environment.close()
    return record


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    settings, samples = record["settings"], record["samples"]
    done, planned = len(samples["loop"]), settings["repeats"]
    repeats = planned if done == planned else f"{done} of {planned}"
    lines = [
        f"# Throughput of the training loop on a {'GPU' if record['device'] == 'cuda' else 'CPU'}",
        "",
        machine_lines(record["machine"])
        + f"- Measured: {settings['game']}, {settings['num_envs']} environments, batch {settings['batch_size']}, "
        f"{settings['replay_ratio']:g} updates per agent step, head {settings['width']}, encoder width "
        f"{settings['encoder_width']:g}, updates {'in a CUDA graph' if record['in_graph'] else 'not in a graph'}; "
        f"{repeats} repeats within {settings['seconds']:g} s, after {settings['warm_up_steps']} random "
        f"agent steps and {record['warm_up_updates']} updates of warm-up",
        "- Cells: median over repeats [quartiles]; ratios are taken within a repeat",
        "",
    ]
    rows = _gpu_rows(record) if record["device"] == "cuda" else _cpu_rows(record)
    lines += [table(["what", "measured"], rows), _where_time_goes(samples), ""]
    if record["device"] == "cpu":
        lines += [_sides(record), ""]
    if record["profile"]:
        lines += _profile_tables(record)
    return "\n".join(lines)


def _cpu_rows(record: dict[str, Any]) -> list[list[str]]:
    samples = record["samples"]
    loop_fps, update_rates = rates(samples["loop"], "frames"), rates(samples["update"], "updates")
    products = [name for name in PRODUCTS if name in samples]
    what = "efficiency: the loop's updates x bare update / wall-clock"
    rows = [_row(what, efficiency(samples["loop"], samples["update"]), 2)]
    for name in products:
        ratio = flop_ratios(samples["update"], samples[name], record["flops_per_update"])
        rows.append(_row(f"bare update / its FLOPs at the rate of {PRODUCTS[name]}", ratio, 2))
    best, others = best_sb3(samples), [name for name in samples if name.startswith("sb3 ")]
    for name in others:
        what = f"loop / Stable-Baselines3 {name.removeprefix('sb3 ')}{', its best' if name == best else ''}"
        ratio = divided(loop_fps, rates(samples[name], "frames"))
        rows.append(_row(what, ratio, 2))
    rows += [
        _row("loop, frames/s", loop_fps, 0),
        *(
            _row(f"{name.replace('sb3', 'Stable-Baselines3')}, frames/s", rates(samples[name], "frames"), 0)
            for name in others
        ),
        _row("environments alone, frames/s", rates(samples["environments"], "frames"), 0),
        _row("acting alone, frames/s", rates(samples["act"], "frames"), 0),
        _row("bare update, ms", [1e3 / rate for rate in update_rates], 1),
        *(
            _row(f"{PRODUCTS[name]}, GFLOP/s", [rate / 1e9 for rate in rates(samples[name], "flops")], 1)
            for name in products
        ),
    ]
    return rows


def _gpu_rows(record: dict[str, Any]) -> list[list[str]]:
    settings, samples = record["settings"], record["samples"]
    loop, environments = rates(samples["loop"], "frames"), rates(samples["environments"], "frames")
    updates = rates(samples["update"], "updates")
    update_fps = [FRAME_SKIP * rate / settings["replay_ratio"] for rate in updates]
    slower = [min(pair) for pair in zip(environments, update_fps, strict=True)]
    rows = [
        _row("environments alone, frames/s", environments, 0),
        _row("updates alone, updates/s", updates, 0),
        _row("updates alone, frames/s at the replay ratio", update_fps, 0),
        _row("acting alone, frames/s", rates(samples["act"], "frames"), 0),
        _row("the real loop, frames/s", loop, 0),
        _row("loop / the slower of environments and updates", divided(loop, slower), 2),
    ]
    if record["profile"]:
        steps = [rate / FRAME_SKIP / settings["num_envs"] for rate in loop]
        busy = [record["profile"]["busy_seconds_per_step"] * rate for rate in steps]
        rows.append(_row("GPU busy in the loop (busy time of a profiled step x steps/s)", busy, 2))
        counts = (record["profile"]["kernels_per_step"], record["modelled"]["kernels_per_step"])
        rows.append(
            ["kernels and copies of a step, profiled / modelled", " / ".join(f"{count:.0f}" for count in counts)]
        )
    if record["modelled"]["update_seconds"]:
        least = [record["modelled"]["update_seconds"] * rate for rate in updates]
        rows.append(_row("modelled least time of an update / measured", least, 2))
    return rows


def _row(what: str, values: Sequence[float], digits: int) -> list[str]:
    return [what, with_spread(values, digits)]


def best_sb3(samples: dict[str, list[Sample]]) -> str | None:
    """The arm of Stable-Baselines3 with the most frames per second; None without any."""
    medians = {n: summarize(rates(s, "frames"))["median"] for n, s in samples.items() if n.startswith("sb3 ")}
    return max(medians, key=lambda name: medians[name]) if medians else None


def _where_time_goes(samples: dict[str, list[Sample]]) -> str:
    """Shares of the loop's wall-clock by phase, and what a step takes."""
    loop = samples["loop"]
    phases = {
        name: with_spread([sample["phases"].get(name, 0.0) / sample["seconds"] for sample in loop])
        for name in ("act", "learn", "environment")
    }
    steps = with_spread([1e3 * sample["seconds"] / sample["calls"] for sample in loop], 2)
    ratio = sum(sample["updates"] for sample in loop) * FRAME_SKIP / sum(sample["frames"] for sample in loop)
    return (
        f"The loop's wall-clock: acting {phases['act']}, learning (drawing batches and updates) {phases['learn']}, "
        f"waiting for the environments and storing their step {phases['environment']}; a step of all environments takes "
        f"{steps} ms, with {ratio:.4f} updates per agent step."
    )


def _sides(record: dict[str, Any]) -> str:
    if record["sb3_missing"]:
        return f"No comparison with Stable-Baselines3: {record['sb3_missing']}."
    settings, samples = record["settings"], record["samples"]
    ratios = ", ".join(
        f"{name.removeprefix('sb3 ')} {sum(s['updates'] for s in turns) * FRAME_SKIP / sum(s['frames'] for s in turns):.4f}"
        for name, turns in samples.items()
        if name.startswith("sb3 ")
    )
    return f"""Both sides: the same torch threads, batch, replay ratio and random filling; Nature encoder and one hidden layer of
{settings["width"]}, the same preprocessing, uniform replay of {settings["replay_capacity"]} transitions, epsilon 0.01, target copied every
30,000 agent steps. growtrain: Double DQN (three forward passes per update), centred RMSProp, environments in C++ threads beside
the learner. Stable-Baselines3: DQN (two forward passes per update), Adam and clipping of the gradient's norm; `make_atari_env` and
`VecFrameStack`, `optimize_memory_usage=True`; `dummy:N` steps N environments one after the other in the process, `subproc:N` each in
its own; `learn` in pieces, with an empty logger. Updates per agent step, measured: {ratios}."""


def _profile_tables(record: dict[str, Any]) -> list[str]:
    profiled, steps = record["profile"], record["profile"]["steps"]
    gpu = (
        f", the GPU busy for {profiled['busy_seconds'] / profiled['seconds']:.0%} of it"
        if record["device"] == "cuda"
        else ""
    )
    lines = [
        f"Profile of {steps} steps in {profiled['seconds']:.2f} s, which profiling slows down{gpu}:",
        "",
    ]
    for title, rows in (("GPU kernels", profiled["kernels"]), ("CPU operators, self time", profiled["operators"])):
        if rows:
            cells = [
                [f"`{name[:90]}`".replace("|", "\\|"), f"{calls / steps:.1f}", f"{1e3 * seconds / steps:.3f}"]
                for name, calls, seconds in rows
            ]
            lines.append(table([title, "calls per step", "ms per step"], cells))
    return lines


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--game", default="phoenix")
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--replay-ratio", type=float, default=0.25, help="updates per agent step")
    parser.add_argument("--replay-capacity", type=int, default=20_000, help="transitions, on both sides")
    parser.add_argument("--width", type=int, default=512, help="hidden units of the head, on both sides")
    parser.add_argument("--encoder-width", type=float, default=1.0, help="factor on the convolutions' channels")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--execution", default="auto", choices=get_args(Execution))
    parser.add_argument("--num-threads", type=int, default=0, help="0: all that this process may use")
    parser.add_argument("--warm-up-steps", type=int, default=4_000, help="random agent steps before, on both sides")
    parser.add_argument("--seconds", type=float, default=200.0, help="of measuring in all; building comes on top")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--sb3", nargs="*", help="dummy:N and subproc:N; default both, and dummy:1; empty: none")
    parser.add_argument("--profile-steps", type=int, help="steps of all environments; default 200 on a GPU, else 0")
    parser.add_argument("--output", type=Path, help="path without suffix; .json and .md are added")
    arguments = parser.parse_args(words)
    if arguments.seconds <= 0 or arguments.repeats < 1 or arguments.warm_up_steps < arguments.batch_size:
        parser.error("--seconds and --repeats must be positive, --warm-up-steps at least --batch-size")
    for name in arguments.sb3 or ():
        kind, _, count = name.partition(":")
        if kind not in ("dummy", "subproc") or not count.isdecimal() or int(count) < 1:
            parser.error(f"--sb3 {name}: write dummy:N or subproc:N with N environments")
    if arguments.profile_steps is None:
        gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
        arguments.profile_steps = 200 if gpu else 0
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Measures, prints the report and writes the files, after every repeat."""
    arguments = parse(words)

    def keep(record: dict[str, Any]) -> None:
        if arguments.output:
            write_outputs(arguments.output, record, report(record))

    try:
        with tempfile.TemporaryDirectory() as directory:
            record = measure(arguments, Path(directory), keep)
    except ConfigError as error:
        say(f"throughput: {error}")
        return 2
    print(report(record))
    keep(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
