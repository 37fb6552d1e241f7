"""What a run will cost, before anything runs: parameters, FLOPs, memory, disk. Its speed is measured in `growtrain.planning.speed`.

The anchors of Nikishin et al. (2023, section 4) add two frozen heads per injection, which carry gradients into the encoder for ever;
`zero` and `mirrored` add one; a frozen encoder needs none of those gradients. Here is what that comes to against a full-width network.

Conventions: 2 FLOPs per multiply-add; matrix products and convolutions only. A layer of M multiply-adds costs M forward, M more for its
weights' gradient if it trains, and M more for its input's gradient if something below it trains, which the first convolution never needs.

Units: frames; FLOPs; bytes (GB = 10^9).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn

from growtrain.environments.base import Spec
from growtrain.growth.inject import count_parameters
from growtrain.growth.kinds import KINDS, Kind, kind_of
from growtrain.networks.activations import outputs_per_unit
from growtrain.networks.build import NETWORKS, make_parts, make_vector_part
from growtrain.networks.snapshot import ROWS_AT_ONCE
from growtrain.plasticity.measurer import STATES
from growtrain.replay.make import replay_bytes
from growtrain.replay.ring import rows_per_lane
from growtrain.settings.budget import PRIMING_AT_ONCE, updates_due
from growtrain.settings.config import Config
from growtrain.settings.schedules import schedule_of

PASSES = 3  # forward passes of an update: online on s, online on s' (which plain DQN does without), target on s'
SHARED_PASSES = 2  # of what is frozen in both networks: s, s'
# The old live head, and the anchor if there is one.
FROZEN_HEADS_PER_INJECTION = {"frozen": 2, "zero": 1, "mirrored": 1}

# Assumptions about memory and disk, on the generous side of what was seen on Linux x86-64; bytes unless said.
PROCESS_BYTES = 464 * 2**20  # Python, PyTorch, TorchRL: 330 MiB resident after import, and what a run adds
LANE_BYTES = 8 * 2**20  # two emulators, 4 MiB each: one for training, one for evaluation
CUDA_HOST_BYTES = 2 * 2**30  # CUDA's libraries and pinned memory
CUDA_DEVICE_BYTES = 1 * 2**30  # CUDA context, workspaces of cuBLAS and cuDNN, graph pools
SHARED_COPIES = (
    2  # of networks frozen whole: each is there once, and what is freed around its injection is not all taken again
)
COPIES_SAVING = 2  # of a checkpoint's tensors, one by one and as a file
ROW_BYTES = 18  # of a replay's row in a checkpoint, without its frame
COMPRESSED_REPLAY = 0.05  # share of its size; zlib takes the frames of four games to 1.5-4 %
CHECKPOINTS = 2  # the newest and one being written, besides the ones that --keep keeps; what they share counts for each
LINE_BYTES = 2_000  # a line of metrics.jsonl, 500 bytes, and what other sinks make of it


@dataclass(frozen=True, kw_only=True)
class NetworkShape:
    """The sizes of the encoder and of one head, from which everything else follows.

    Attributes:
        convolutions: multiply-adds per observation of each convolution of the encoder, from the input up.
        head_convolutions, hidden, output: the same of the convolutions that are in the head, and of its two linear layers.
        encoder_gram, head_gram: multiply-adds of W W^T of the layers of each but the output, if `parseval` needs them.
        encoder_parameters, head_parameters: numbers of parameters.
        encoder_activations, head_activations: floats per observation that a forward pass keeps for its backward pass.
    """

    convolutions: tuple[int, ...]
    head_convolutions: tuple[int, ...]
    hidden: int
    output: int
    encoder_gram: int
    head_gram: int
    encoder_parameters: int
    head_parameters: int
    encoder_activations: int
    head_activations: int

    @property
    def head(self) -> int:
        """Multiply-adds per observation of one head."""
        return sum(self.head_convolutions) + self.hidden + self.output


@dataclass(frozen=True, kw_only=True)
class UpdateFlops:
    """The FLOPs of one update by what they are for; `live` are the heads that train, `frozen` all the others together."""

    encoder_forward: int
    encoder_weight_gradients: int
    encoder_input_gradients: int
    live_forward: int
    live_weight_gradients: int
    live_input_gradients: int
    frozen_forward: int
    frozen_input_gradients: int
    regularizer: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage costs.

    Attributes:
        stage: injections done.
        start_frame, end_frame: its frames, the end excluded.
        updates, policy_steps: gradient steps, and agent steps for which the network is asked (it is not while epsilon is 1).
        evaluations, evaluation_frames: those made in it, and the frames that they are taken to need.
        live_width, frozen_width: hidden units of the heads that train, and of the others, together.
        parameters_total, parameters_trainable: of the online network.
        parameters_shared: of them in networks that were frozen whole, which online and target share.
        flops_per_update, flops_per_action: of a gradient step on one batch, and of the online network on one observation.
        flops_per_swept_row, rows_swept: of what an injection that froze the whole network computed for the replay at the stage's
            beginning.
    """

    stage: int
    start_frame: int
    end_frame: int
    updates: int
    policy_steps: int
    evaluations: int
    evaluation_frames: int
    live_width: int
    frozen_width: int
    parameters_total: int
    parameters_trainable: int
    parameters_shared: int
    flops_per_update: int
    flops_per_action: int
    flops_per_swept_row: int = 0
    rows_swept: int = 0

    @property
    def frames(self) -> int:
        """Frames played in the stage."""
        return self.end_frame - self.start_frame

    @property
    def flops(self) -> int:
        """FLOPs of the stage's training: updates, acting, and the sweep that it begins with; without evaluation."""
        return self.updates * self.flops_per_update + self.flops_of_acting

    @property
    def flops_of_sweep(self) -> int:
        """FLOPs of the sweep that the stage begins with."""
        return self.flops_per_swept_row * self.rows_swept

    @property
    def flops_of_acting(self) -> int:
        """FLOPs of the stage's acting, with what is computed of frozen networks for the replay, and the sweep."""
        return self.policy_steps * self.flops_per_action + self.flops_of_sweep


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory in bytes, by what it is for.

    Attributes:
        replay: the whole ring; `replay_index` of it is on the host wherever the learner is.
        frozen_values: what is kept beside it of networks that are frozen whole.
        networks: online and target, what they share, gradients, slots, temporaries.
        injection: what one needs beside that: the old networks and values to go back to.
        batch: the batches drawn at once and an update's activations, or those of what looks at more observations at once.
        saving: a checkpoint on its way to the disk, which does not fit into what an injection has freed.
        process: everything else on the host.
    """

    replay: int
    replay_index: int
    frozen_values: int
    networks: int
    injection: int
    batch: int
    saving: int
    process: int

    def needed(self, device_type: str) -> dict[str, int]:
        """Bytes of `host` and, for a learner on `cuda`, of `GPU` memory."""
        learner = self.replay - self.replay_index + self.frozen_values + self.networks + self.injection + self.batch
        host = self.process + self.replay_index
        if device_type == "cpu":
            return {"host": host + learner + self.saving}
        return {"host": host + self.saving + CUDA_HOST_BYTES, "GPU": learner + CUDA_DEVICE_BYTES}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's costs; `disk_bytes` is the most that its directory takes."""

    config: Config
    spec: Spec
    stages: tuple[StageCost, ...]
    memory: Memory
    disk_bytes: int

    @property
    def flops(self) -> int:
        """FLOPs of all training: updates and acting; without what an adaptive schedule measures."""
        return sum(stage.flops for stage in self.stages)

    @property
    def evaluation_flops(self) -> int:
        """FLOPs of acting in evaluations, if their episodes last as planned."""
        return sum(stage.evaluation_frames // self.config.frame_skip * stage.flops_per_action for stage in self.stages)


def network_shape(config: Config, spec: Spec, width: int) -> NetworkShape:
    """Reads the sizes off the layers of an encoder and a head `width` wide, built without memory."""
    with torch.device("meta"):
        encoder, head = make_parts(config, spec, width)
    _, *sides = spec.observation_shape  # of a picture
    hidden, output = (layer.weight for layer in head if isinstance(layer, nn.Linear))
    # Before and after normalisation and activation.
    kept_per_unit = 1 + (config.weight_projection == "nap") + outputs_per_unit(config.activation)
    convolutions: tuple[list[int], list[int]] = ([], [])  # of the encoder, of the head
    grams = [0, len(hidden) * hidden.numel()]
    activations = [math.prod(spec.observation_shape), kept_per_unit * len(hidden) + spec.num_actions]
    for part, module in enumerate((encoder, head)):
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                sides = [(side - layer.kernel_size[0]) // layer.stride[0] + 1 for side in sides]
                pixels = math.prod(sides)
                convolutions[part].append(layer.weight.numel() * pixels)
                grams[part] += layer.out_channels * layer.weight.numel()
                activations[part] += kept_per_unit * layer.out_channels * pixels
    parseval = config.regularizer == "parseval" and config.regularizer_strength > 0
    return NetworkShape(
        convolutions=tuple(convolutions[0]),
        head_convolutions=tuple(convolutions[1]),
        hidden=hidden.numel(),
        output=output.numel(),
        encoder_gram=parseval * grams[0],
        head_gram=parseval * grams[1],
        encoder_parameters=count_parameters(encoder),
        head_parameters=count_parameters(head),
        encoder_activations=activations[0],
        head_activations=activations[1],
    )


def update_flops(
    shape: NetworkShape,
    batch_size: int,
    num_frozen: int,
    encoder_trains: bool,
    num_live: int = 1,
    double_dqn: bool = True,
    shares: bool = True,
) -> UpdateFlops:
    """The FLOPs of one Double-DQN update with `num_frozen` heads that do not train beside the `num_live` that do.

    From the first target copy after the encoder froze: online and target then share what is frozen, the other heads only if none of them
    trains. TorchRL's loss, `--execution eager`, shares nothing.
    """
    flops, encoder, head = 2 * batch_size, sum(shape.convolutions), shape.head
    encoder_trains = encoder_trains and encoder > 0
    first = (*shape.head_convolutions, shape.hidden)[0]  # of a head's layers, what lies below it is the encoder
    passes = PASSES if double_dqn else PASSES - 1
    encoder_passes = passes if encoder_trains or not shares else SHARED_PASSES
    frozen_passes = passes if encoder_trains or num_live > 1 or not shares else SHARED_PASSES
    return UpdateFlops(
        encoder_forward=flops * encoder_passes * encoder,
        encoder_weight_gradients=flops * encoder_trains * encoder,
        encoder_input_gradients=flops * encoder_trains * sum(shape.convolutions[1:]),
        live_forward=flops * passes * num_live * head,
        live_weight_gradients=flops * num_live * head,
        live_input_gradients=flops * num_live * (head - first + encoder_trains * first),
        frozen_forward=flops * frozen_passes * num_frozen * head,
        frozen_input_gradients=flops * encoder_trains * num_frozen * head,
        regularizer=2
        * 3
        * (encoder_trains * shape.encoder_gram + num_live * shape.head_gram),  # a product, two for its gradient
    )


@dataclass(frozen=True, kw_only=True)
class StageSizes:
    """What the networks of a stage are.

    Attributes:
        live_width, frozen_width, parameters_total, parameters_trainable, flops_per_update, flops_per_action: as of `StageCost`.
        parameters_shared: as of `StageCost`, too.
        flops_per_frozen_row: of the network that was frozen whole last, on one observation.
        activations: floats per observation that a forward pass keeps for its backward pass.
    """

    live_width: int
    frozen_width: int
    parameters_total: int
    parameters_trainable: int
    parameters_shared: int
    flops_per_update: int
    flops_per_action: int
    flops_per_frozen_row: int
    activations: int


def _q_network_sizes(config: Config, spec: Spec, stage: int, kind: Kind) -> StageSizes:
    """Of a Q-network and its target."""
    width = config.start_width() + (config.width * stage if kind.adds == "units" else 0)
    shape = network_shape(config, spec, width)
    injections, snapshots = (stage if kind.adds == what else 0 for what in ("heads", "snapshot"))
    num_live = 1 + (injections if config.trainable_heads == "all" else 0)
    num_heads = 1 + injections * FROZEN_HEADS_PER_INJECTION[config.anchor]
    encoder_trains = not 0 < config.freeze_encoder_at <= stage
    shares = config.execution != "eager"
    flops = update_flops(
        shape, config.batch_size, num_heads - num_live, encoder_trains, num_live, config.double_dqn, shares
    )
    frozen = [shape] * snapshots
    # A head that is drawn anew gives up what was frozen.
    if config.frozen_width and not (stage and kind.adds == "nothing" and "live" in kind.born):
        own = dataclasses.replace(config, encoder_width=config.frozen_encoder_width)
        frozen.append(network_shape(own, spec, config.frozen_width))
    shared = sum(each.encoder_parameters + each.head_parameters for each in frozen)
    products = sum(sum(each.convolutions) + each.head for each in frozen)
    # What is frozen whole is read from the replay, or computed in every pass.
    passes = 0 if shares else PASSES if config.double_dqn else PASSES - 1
    return StageSizes(
        live_width=num_live * width,
        frozen_width=(num_heads - num_live + snapshots) * width + (len(frozen) - snapshots) * config.frozen_width,
        parameters_total=shape.encoder_parameters + num_heads * shape.head_parameters + shared,
        parameters_trainable=encoder_trains * shape.encoder_parameters + num_live * shape.head_parameters,
        flops_per_update=flops.total + 2 * config.batch_size * passes * products,
        flops_per_action=2 * (sum(shape.convolutions) + num_heads * shape.head + products),
        parameters_shared=shared,
        flops_per_frozen_row=2 * (snapshots > 0) * (sum(shape.convolutions) + shape.head),
        activations=max(
            shape.encoder_activations + num_heads * shape.head_activations,
            *(each.encoder_activations + each.head_activations for each in frozen),
            0,
        ),
    )


def _sac_sizes(config: Config, spec: Spec, stage: int, kind: Kind) -> StageSizes:
    """Of SAC's two critics, their targets, and the actor.

    A critic's heads are computed three times, at (s, a), at (s, a~) and by its target at (s', a'), and pass a gradient to a~ once;
    an actor's twice. Only live heads have gradients of their weights, of a critic from (s, a) alone.
    """
    total = trainable = per_update = per_action = per_row = activations = live_width = frozen_width = 0
    for name in NETWORKS:
        grows = config.grows(name)
        width = config.start_width(name) + (config.width * stage if grows and kind.adds == "units" else 0)
        with torch.device("meta"):
            part = make_vector_part(config, spec, name, width)
        layers = [layer for layer in part if isinstance(layer, nn.Linear)]
        injections, snapshots = (stage if grows and kind.adds == what else 0 for what in ("heads", "snapshot"))
        live = 1 + (injections if config.trainable_heads == "all" else 0)
        heads = 1 + injections * FROZEN_HEADS_PER_INJECTION[config.anchor]
        products = [layer.weight.numel() for layer in layers]
        head, below = sum(products), sum(products[1:])
        parameters = count_parameters(part)
        total += (heads + snapshots) * parameters
        trainable += live * parameters
        learning = live * (head + below)
        if name == "actor":
            per_update += 2 * heads * head + learning
            per_action += (heads + snapshots) * head
            per_row += (snapshots > 0) * head
        else:
            per_update += 4 * heads * head + learning
            kept_per_unit = 1 + outputs_per_unit(config.activation)
            activations += 2 * heads * kept_per_unit * sum(layer.out_features for layer in layers)
        if grows:
            live_width, frozen_width = (
                live * layers[-2].out_features,
                (heads + snapshots - live) * layers[-2].out_features,
            )
    return StageSizes(
        live_width=live_width,
        frozen_width=frozen_width,
        parameters_total=total,
        parameters_trainable=trainable,
        flops_per_update=2 * config.batch_size * per_update,
        flops_per_action=2 * per_action,
        parameters_shared=0,  # an actor has no target
        flops_per_frozen_row=2 * per_row,
        activations=spec.frame_shape[0] + activations,
    )


def make_plan(config: Config, spec: Spec) -> Plan:
    """The costs of a run of `config` on what `spec` says of its game; raises `ConfigError` for an impossible schedule."""
    schedule = schedule_of(config)
    kind = kind_of(schedule.intervention, config)
    stages, end, activations = [], 0, 0
    for stage, frames in enumerate(schedule.stage_frames(config.total_frames)):
        start, end = end, end + frames
        first, last = start // config.frame_skip, end // config.frame_skip
        sizes = (_sac_sizes if spec.continuous else _q_network_sizes)(config, spec, stage, kind)
        activations = max(activations, sizes.activations)
        cost = StageCost(
            stage=stage,
            start_frame=start,
            end_frame=end,
            updates=updates_due(config, last) - updates_due(config, first),
            policy_steps=_policy_steps(config, first, last),
            evaluations=(evaluations := _evaluations(config, start, end)),
            evaluation_frames=evaluations * config.expected_eval_frames,
            live_width=sizes.live_width,
            frozen_width=sizes.frozen_width,
            parameters_total=sizes.parameters_total,
            parameters_trainable=sizes.parameters_trainable,
            parameters_shared=sizes.parameters_shared,
            flops_per_update=sizes.flops_per_update,
            flops_per_action=sizes.flops_per_action,
            flops_per_swept_row=sizes.flops_per_frozen_row,
            rows_swept=_rows_filled(config, first),
        )
        stages.append(cost)
    memory = _memory(config, spec, activations, stages)
    lines = config.total_frames // config.log_period + _evaluations(config, 0, config.total_frames)
    lines += (growths := len(schedule.injection_frames))
    if config.diagnostics_period:
        periods = config.total_frames // config.diagnostics_period
        lines += periods + 2 * (min(growths, periods + 1) if schedule.periodic else growths)
    checkpoint = (
        _saved_bytes(config, spec, stages) + memory.frozen_values + math.ceil(compressed_share(spec) * memory.replay)
    )
    disk_bytes = (CHECKPOINTS + config.keep) * checkpoint + lines * LINE_BYTES
    return Plan(config=config, spec=spec, stages=tuple(stages), memory=memory, disk_bytes=disk_bytes)


def compressed_share(spec: Spec) -> float:
    """What a replay's size on disk is taken to be a share of its size in memory; state vectors do not compress."""
    return 1.0 if spec.is_vector else COMPRESSED_REPLAY


def flops_of_acting(plan: Plan, frames: Sequence[int], reached: int) -> list[int]:
    """FLOPs of each stage's acting, and of the sweep that it began with, in a run whose stages came when they came.

    Args:
        plan: of the run, whose networks it had.
        frames: played in each stage.
        reached: the last stage whose injection was carried out.
    """
    skip, found = plan.config.frame_skip, []
    for cost, (start, end) in zip(plan.stages, pairwise(accumulate(frames, initial=0)), strict=True):
        asked = _policy_steps(plan.config, start // skip, end // skip)
        swept = _rows_filled(plan.config, start // skip) if cost.stage <= reached else 0
        found.append(asked * cost.flops_per_action + swept * cost.flops_per_swept_row)
    return found


def _policy_steps(config: Config, first: int, last: int) -> int:
    """Agent steps after the first and up to the last for which the network is asked, which it is not while epsilon is 1."""
    at_random = config.learning_starts // config.frame_skip if config.epsilon_start >= 1 else 0
    return max(last, at_random) - max(first, at_random)


def _rows_filled(config: Config, agent_steps: int) -> int:
    """Rows that the replay holds after so many agent steps, or since a chain's switch emptied it, which a later step of all lanes does."""
    lanes, switches = config.num_envs, () if config.keep_replay else config.switch_frames
    emptied = [-(-frames // (config.frame_skip * lanes)) * lanes for frames in switches]
    since = max((steps for steps in emptied if steps < agent_steps), default=0)
    return min(agent_steps - since, config.replay_capacity)


def full_width(config: Config) -> Config:
    """The baseline to compare with: the width that growth ends with, from the start. A run that never grows is its own.

    Where every injection adds an encoder, too, it is a network of the same number of parameters, with more channels and more hidden units.
    """
    schedule = schedule_of(config)
    if not schedule.injection_frames or KINDS[schedule.intervention].adds == "nothing":
        return config
    # The last hidden layer of what grows is wider, which has as many parameters, nearly, as heads beside each other.
    if config.continuous:
        return dataclasses.replace(
            config, schedule=f"full{len(schedule.injection_frames)}x", intervention="inject", freeze="heads"
        )
    times, channels = 1.0 + len(schedule.injection_frames), config.encoder_width
    if kind_of(schedule.intervention, config).adds == "snapshot" and config.live_encoder == "cold":
        times = math.sqrt(times)
        channels *= times
    return dataclasses.replace(
        config, schedule="fixed", intervention="inject", width=round(config.width * times), encoder_width=channels
    )


def _evaluations(config: Config, start: int, end: int) -> int:
    """Evaluations in (start, end]: at every multiple of the period, and at the end of the run."""
    if not config.eval_period:
        return 0
    return (
        end // config.eval_period
        - start // config.eval_period
        + (end == config.total_frames and end % config.eval_period > 0)
    )


def updates_at_once(config: Config) -> int:
    """Updates owed after one step of all lanes, rounded up; their batches are drawn together."""
    return math.ceil(config.num_envs * config.replay_ratio)


def _measured_bytes(config: Config, spec: Spec) -> int:
    """The states that diagnostics keep from one record to the next."""
    return STATES * spec.stack_size * spec.frame_bytes if config.diagnostics_period else 0


def _saved_bytes(config: Config, spec: Spec, stages: list[StageCost]) -> int:
    """What a checkpoint holds, the replay aside."""
    largest, trainable = _largest(stages), max(stage.parameters_trainable for stage in stages)
    # Online, target, two optimizer slots.
    parameters = 2 * (largest.parameters_total + trainable) - largest.parameters_shared
    parameters += (config.keeps_initial_weights + bool(config.diagnostics_period)) * trainable  # the initial ones
    return 4 * parameters + _measured_bytes(config, spec)


def _largest(stages: list[StageCost]) -> StageCost:
    return max(stages, key=lambda stage: stage.parameters_total)


def _memory(config: Config, spec: Spec, activations_per_state: int, stages: list[StageCost]) -> Memory:
    """Of the largest stage; a forward pass keeps at most so many floats per observation."""
    largest, batch_size, lanes = _largest(stages), config.batch_size, config.num_envs
    trainable = max(stage.parameters_trainable for stage in stages)
    at_once = 2 * batch_size  # activations and their gradients
    if config.diagnostics_period:
        at_once = max(at_once, STATES)
    sweeps = kind_of(schedule_of(config).intervention, config).adds == "snapshot" and len(stages) > 1
    if sweeps:
        at_once = max(at_once, ROWS_AT_ONCE)
    frozen_whole = sweeps or config.frozen_width > 0
    activations = 4 * at_once * activations_per_state
    updates = max(updates_at_once(config), min(PRIMING_AT_ONCE, config.priming_updates))
    drawn = updates * batch_size * (spec.stack_size + 1) * spec.frame_bytes
    rows = lanes * rows_per_lane(config.replay_capacity, lanes, spec.stack_size)
    frozen_values = 4 * spec.num_outputs * rows * frozen_whole
    own = largest.parameters_total - largest.parameters_shared
    return Memory(
        replay=replay_bytes(config, spec),
        replay_index=2 * rows + 8 * lanes,
        frozen_values=frozen_values,
        # Gradient, two slots, a temporary; the initial ones, for the loss and for diagnostics.
        networks=4
        * (
            2 * own
            + SHARED_COPIES * largest.parameters_shared
            + (4 + config.keeps_initial_weights + bool(config.diagnostics_period)) * trainable
        ),
        injection=4 * 2 * own + frozen_values,
        batch=drawn + activations + 2 * _measured_bytes(config, spec),
        saving=COPIES_SAVING * (_saved_bytes(config, spec, stages) + frozen_values + ROW_BYTES * rows),
        process=PROCESS_BYTES + LANE_BYTES * lanes,
    )


def format_bytes(count: int) -> str:
    """As in `1.50 GB`, of 10^9 bytes."""
    return f"{count / 1e9:.2f} GB"
