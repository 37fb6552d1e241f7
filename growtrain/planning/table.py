"""A plan as text.

Units: frames; FLOPs; bytes (GB = 10^9); hours.
"""

import dataclasses
import io

from rich.console import Console
from rich.table import Table

from growtrain.planning.costs import CHECKPOINTS, Plan, compressed_share, format_bytes, full_width, make_plan
from growtrain.planning.hardware import Hardware
from growtrain.planning.limits import Model, sensitivity
from growtrain.planning.speed import Speed
from growtrain.plasticity.adaptive import DECIDING
from growtrain.settings.schedules import schedule_of
from growtrain.settings.text import format_count, format_hours

BUSY_SPREAD = (
    0.2  # spread of timed updates beyond which a projection, and its ratio to full width, is not to be trusted
)


def render(plan: Plan, speed: Speed | None = None) -> str:
    """The plan as plain ASCII of at most 100 columns, with projected hours if speeds were measured."""
    baseline, memory = make_plan(full_width(plan.config), plan.spec), plan.memory
    checkpoints = CHECKPOINTS + plan.config.keep
    full, hours = baseline.stages[0], speed.projected_hours(plan, speed.run) if speed else []
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    headers = ("stage", "frames", "width", "parameters", "trainable", "updates", "GFLOP/update", "vs full", "hours")
    for header in headers if speed else headers[:-1]:
        table.add_column(header, justify="right", no_wrap=True)
    for cost in plan.stages:
        row = [str(cost.stage), f"{format_count(cost.start_frame)}-{format_count(cost.end_frame)}"]
        row += [f"{cost.live_width}+{cost.frozen_width}" if cost.frozen_width else str(cost.live_width)]
        row += [format_count(count) for count in (cost.parameters_total, cost.parameters_trainable, cost.updates)]
        row += [f"{cost.flops_per_update / 1e9:.3f}", f"{cost.flops_per_update / full.flops_per_update:.0%}"]
        table.add_row(*row, *map(format_hours, hours[cost.stage : cost.stage + 1]))
    text = io.StringIO()
    Console(file=text, width=100, color_system=None).print(table)
    compressed = f"{compressed_share(plan.spec):.0%}"
    gpu, evaluation = memory.needed("cuda"), f"{plan.evaluation_flops / 1e15:.3g} PFLOP"
    share = f"{plan.flops / baseline.flops:.0%} of full width ({full.live_width} hidden units)"
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    schedule = schedule_of(plan.config)
    plain = schedule.intervention == "inject" and not schedule.adaptive
    lines += [] if plain else ["", f"does     {schedule.describe()}"]
    lines += _decision_lines(plan, schedule.adaptive.period) if schedule.adaptive else []
    lines += ["", *_evaluation_lines(plan)]
    lines += f"""\
compute  {plan.flops / 1e15:.4g} PFLOP of training, {share}; {evaluation} of evaluation{_beside_not_growing(plan)}
memory   {format_bytes(memory.needed("cpu")["host"])} on a CPU; {format_bytes(gpu["host"])} host and {format_bytes(gpu["GPU"])} device \
on a GPU
         replay {format_bytes(memory.replay + memory.frozen_values)}, networks and optimizer \
{format_bytes(memory.networks + memory.injection)}, batches {format_bytes(memory.batch)}
disk     {format_bytes(plan.disk_bytes)} at most: records, {checkpoints} checkpoints, replay taken to compress to {compressed}
""".rstrip().split("\n")
    if speed:
        total, at_full = sum(hours), sum(speed.projected_hours(baseline, speed.baseline))
        spread, how = max(speed.run.spread, speed.baseline.spread), "overlapped" if speed.overlapped else "added"
        step = f"{1e3 * speed.environment_seconds:.2f} ms per step of {plan.config.num_envs} ({how})"
        lines += f"""\
time     {format_hours(total)} h of training, {total / at_full:.0%} of full width ({format_hours(at_full)} h); \
{format_hours(speed.evaluation_hours(plan))} h of evaluation
         evaluation takes {format_hours(speed.evaluation_hours(plan, at_most=True))} h at most, if no episode ends by itself
         projected from {speed.run.timed} timed updates on this machine: {speed.machine}
         spread of the timings {spread:.0%}{": the machine is busy, time it again" if spread > BUSY_SPREAD else ""}
         environments {step}; not included: sampling, logs, checkpoints""".split("\n")
    return "\n".join(lines)


def _beside_not_growing(plan: Plan) -> str:
    """What growing adds to the compute of the network that the run begins with; nothing of a run that never grows."""
    config = plan.config
    if full_width(config) is config:
        return ""
    alone = make_plan(dataclasses.replace(config, schedule="fixed", intervention="inject", freeze="heads"), plan.spec)
    return f"\n         {plan.flops / alone.flops:.0%} of the network that it begins with, left alone"


def _decision_lines(plan: Plan, period: int) -> list[str]:
    """What an adaptive schedule measures, which no FLOPs or hours here count."""
    config = plan.config
    count = config.total_frames // period - config.learning_starts // period
    updates = 2 * DECIDING.seeds * (DECIDING.warm_up + DECIDING.updates)  # two copies
    own = format_count(round(config.replay_ratio * period / config.frame_skip))
    told = f"{count} decisions, each of {format_count(updates)} updates of copies, beside {own} of training"
    return [f"         not counted below: {told}"]


def _evaluation_lines(plan: Plan) -> list[str]:
    """How often it is evaluated, and what that takes and may take."""
    config, count = plan.config, sum(stage.evaluations for stage in plan.stages)
    if not count:
        return []
    episodes, each = config.num_eval_episodes, format_count(config.expected_eval_frames)
    line = f"evaluate {count} times {episodes} whole episode{'s' if episodes > 1 else ''}"
    return [f"{line}: {each} frames each time as planned, {format_count(config.max_eval_frames)} at most"]


def render_limit(model: Model, hardware: Hardware) -> str:
    """The least time of a run on named hardware, and what growing can save there, as plain ASCII of at most 130 columns."""
    limit = model.limit(hardware)
    updates = "every operator launched" if model.config.execution == "eager" else "updates in a CUDA graph"
    beside = {
        "fast": f"{model.config.num_envs} environments beside them",
        "reference": "one environment in strict alternation",
    }[model.stack]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    headers = (
        "stage",
        "width",
        "kernels",
        "GFLOP",
        "MB",
        "us/update",
        "latency",
        "memory",
        "arithmetic",
        "waits for",
        "hours",
    )
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    rows = [(str(stage.cost.stage), stage) for stage in limit.stages]
    if limit.baseline != limit.stages:
        rows.append(("full", limit.baseline[0]))
    for name, stage in rows:
        cost, shares = stage.cost, stage.shares
        table.add_row(
            name,
            f"{cost.live_width}+{cost.frozen_width}" if cost.frozen_width else str(cost.live_width),
            str(stage.num_kernels),
            f"{cost.flops_per_update / 1e9:.2f}",
            f"{stage.bytes_moved / 1e6:.0f}",
            f"{1e6 * stage.update_seconds:.0f}",
            *(f"{shares[bound]:.0%}" for bound in ("latency", "memory", "arithmetic")),
            stage.bound,
            format_hours(stage.training_hours),
        )
    text = io.StringIO()
    Console(file=text, width=130, color_system=None).print(table)
    lines = [f"modelled, not measured: the least time on one {hardware.title}; {updates}, {beside}"]
    lines += [line.rstrip() for line in text.getvalue().splitlines()]
    evaluation = f"{format_hours(limit.evaluation_hours)} h of evaluation"
    if limit.baseline == limit.stages:
        return "\n".join([*lines, f"limit    {format_hours(limit.training_hours)} h of training; {evaluation}"])
    saved, moved = limit.saved_hours, sensitivity(model, hardware)
    ends = [end for pair in moved.values() for end in pair]
    most = max(moved, key=lambda name: max(abs(end - saved) for end in moved[name]))
    share = f"{abs(saved) / limit.baseline_hours:.0%}"
    least, at_full = format_hours(limit.training_hours), format_hours(limit.baseline_hours)
    from_hours, to_hours = format_hours(min(ends), "+"), format_hours(max(ends), "+")
    lines += f"""\
limit    {least} h of training, full width {at_full} h: growing {"saves" if saved >= 0 else "costs"} \
{format_hours(abs(saved))} h ({share}); {evaluation}
moves    from {from_hours} to {to_hours} h saved as one constant is halved or doubled, most with {most.replace("_", " ")}
""".rstrip().split("\n")
    return "\n".join(lines)
