"""One run's configuration: a frozen dataclass, validated across fields, with a JSON round trip and a fingerprint.

Everything that is known of a setting stands at its field. Source of the defaults: `presets.py`, which names one for each value. The
defaults here are the paper preset's at 200M frames (Double DQN as in DQN Zoo `double_q`; Nikishin et al., "Deep Reinforcement Learning
with Plasticity Injection", NeurIPS 2023).

Units: every budget, period and schedule is in emulator frames; an agent step is `Config.frame_skip` of them.
"""

import dataclasses
import hashlib
import json
import math
import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Self, cast, get_args, get_type_hints

from growtrain.environments.games import canonical_game, family_of, games_of
from growtrain.settings.machine import usable_cores
from growtrain.settings.schedules import Intervention, Schedule, copy_of_last, schedule_of
from growtrain.settings.text import ConfigError, flag, parse_count

PAPER_TOTAL_FRAMES = 200_000_000
_MOST_EVAL_EPISODES = 30  # Mnih et al. 2015, "Evaluation procedure"

Activation = Literal["relu", "crelu", "fourier"]
Anchor = Literal["frozen", "zero", "mirrored"]
Freeze = Literal["heads", "network"]
LiveEncoder = Literal["warm", "cold"]
Split = Literal["fc1", "conv3", "conv2", "conv1"]
TrainableHeads = Literal["newest", "all"]
Normalization = Literal["none", "layer", "spectral"]
Regularizer = Literal["none", "l2", "l2-init", "parseval"]
WeightProjection = Literal["none", "nap"]
OptimizerName = Literal["centered_rmsprop", "rmsprop", "adam"]
OutputBias = Literal["shared", "per_action"]
Execution = Literal["auto", "eager", "graph"]
Device = Literal["auto", "cpu", "cuda"]
PresetName = Literal["paper", "modern", "minatar", "sac"]
Grow = Literal["both", "critic", "actor"]
OnGrowthFailure = Literal["stop", "continue"]
DiagnosticsDepth = Literal["light", "full"]
Tracker = Literal["wandb", "trackio"]


@dataclass(frozen=True)
class Bounds:
    """What a number must be: `holds` says whether it is, `remedy` what to do about it."""

    holds: Callable[[float], bool]
    remedy: str


_POSITIVE = Bounds(lambda value: value > 0, "must be positive")
_FLOAT32 = Bounds(
    lambda value: 1.2e-38 <= value <= 3.4e38, "must lie between 1.2e-38 and 3.4e38: networks have 32 bits"
)
_CHANNELS = Bounds(lambda value: 0 < value <= 1_000, "must be positive, and at most 1000")
_MOST = 10**15  # of a count: far more than can be run, and still exact in what is computed of it
_NOT_NEGATIVE = Bounds(lambda value: value >= 0, "must not be negative")
_OFF_AT_0 = Bounds(lambda value: value >= 0, "must not be negative (0 turns it off)")
_SHARE = Bounds(lambda value: 0 <= value <= 1, "must lie in [0, 1]")


@dataclass(frozen=True)
class Shrinks:
    """How a setting shrinks with a budget below its preset's: in proportion, down to `least`, itself kept within parts of the budget.

    Attributes:
        least: the least that it is useful at, in the setting's unit.
        at_most: the least is at most the budget divided by this (0: whatever the budget).
        at_least: and at least the budget divided by this (0: no more than `least`).
    """

    least: int
    at_most: int = 0
    at_least: int = 0


def setting(
    default: Any,
    doc: str,
    unit: str = "",
    *,
    identity: bool = True,
    bounds: Bounds | None = None,
    forkable: bool = False,
    shrinks: Shrinks | None = None,
    needs: Callable[["Config"], bool] | None = None,
    evaluation: bool = False,
    common: bool = False,
    by_flag: bool = True,
) -> Any:
    """A field of `Config`.

    Args:
        default: the paper preset's value at 200M frames.
        doc: one sentence, for `--help`.
        unit: in which it is counted.
        identity: it decides what is learned, not only how that is run.
        bounds: what its value must be.
        forkable: a fork may change it though it decides what is learned: it acts on what comes, and fits the state that is there.
        shrinks: how it shrinks with a short budget.
        needs: whether it has an effect beside the other settings of a configuration; None: always.
        evaluation: an evaluation of a checkpoint may do it otherwise than the run's own.
        common: among the dozen that `--help` shows.
        by_flag: it is given on the command line; no: a command finds it out.
    """
    return field(
        default=default,
        metadata={
            "doc": doc,
            "unit": unit,
            "identity": identity,
            "bounds": bounds,
            "forkable": forkable,
            "shrinks": shrinks,
            "needs": needs,
            "evaluation": evaluation,
            "common": common,
            "by_flag": by_flag,
        },
    )


def _does(intervention: Intervention) -> Callable[["Config"], bool]:
    """Whether a run's schedule does this to the network."""
    return lambda config: config.growth.intervenes and config.growth.intervention == intervention


def _injects_heads(config: "Config") -> bool:
    return _does("inject")(config) and config.freeze == "heads"


def _begins_frozen(config: "Config") -> bool:
    return config.frozen_width > 0


def _is_adaptive(config: "Config") -> bool:
    return config.growth.adaptive is not None


def _is_discrete(config: "Config") -> bool:
    return not config.continuous


def _is_continuous(config: "Config") -> bool:
    return config.continuous


def _played(name: str) -> Callable[["Config"], bool]:
    """Whether the game's family has this setting."""
    return lambda config: name in family_of(config.game).settings


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run. `dataclasses.replace` makes variants; construction validates and raises `ConfigError`."""

    # What is run
    game: str = setting(
        "phoenix",
        "Atari 2600 game, or minatar/breakout, asterix, freeway, seaquest or space_invaders, in any spelling; minatar/asterix+seaquest "
        "is a chain, played one after the other; or mujoco/HalfCheetah-v5, dmc/quadruped-run or another "
        "task, learned by SAC.",
        common=True,
    )
    schedule: str = setting(
        "grow3x",
        "fixed, grow1x, grow3x, full1x, full3x, or at:25M,50M (frames) or at:0.1,0.5 (fractions), or every:5M, or at-switch (of games); to "
        "compare with: reset, shrink-perturb, widen3x (at the times of grow3x), redo (every --redo-period); adaptive: when plasticity is "
        "measured to be lost.",
        forkable=True,
        common=True,
    )
    preset: PresetName = setting(
        "paper",
        "Where the defaults come from: the paper's baseline agent, a modern DQN, or MinAtar's or SAC (for their games unless another is "
        "given).",
        common=True,
    )
    seed: int = setting(
        0,
        "Seed of everything random; any integer (normalised through numpy's SeedSequence).",
        forkable=True,
        evaluation=True,
        common=True,
    )
    total_frames: int = setting(
        PAPER_TOTAL_FRAMES, "Budget of the run.", "frames", bounds=_POSITIVE, forkable=True, common=True
    )

    # Environment
    num_envs: int = setting(
        8,
        "Environments stepped together (lanes); 1 is the paper's strict alternation.",
        bounds=_POSITIVE,
        evaluation=True,
        common=True,
    )
    sticky_actions: float = setting(
        0.0,
        "Probability that the emulator repeats the previous action.",
        bounds=_SHARE,
        needs=_played("sticky_actions"),
        evaluation=True,
    )
    life_loss_terminal: bool = setting(
        True,
        "Losing a life ends the return (discount 0) while the episode goes on.",
        forkable=True,
        needs=_played("life_loss_terminal"),
    )
    minimal_actions: bool = setting(
        False, "Only the actions that do something in the game, instead of all.", needs=_played("minimal_actions")
    )
    switch_at: str = setting(
        "",
        "Where a chain goes on to its next game, as 500k,1M; those beyond the budget are never reached (empty: after equal shares).",
        forkable=True,
        needs=lambda config: bool(config.switch_at) and len(config.games) > 1,
    )
    keep_replay: bool = setting(
        True,
        "Where a chain of games switches, the replay is kept; no: it is emptied, and learning waits for --learning-starts again.",
        forkable=True,
        needs=lambda config: len(config.games) > 1,
    )
    noop_max: int = setting(
        30,
        "Random no-ops at an episode's start, at most.",
        "frames",
        bounds=_NOT_NEGATIVE,
        needs=_played("noop_max"),
        evaluation=True,
    )
    max_episode_frames: int = setting(
        108_000,
        "Cap of an episode (30 minutes of play).",
        "frames",
        bounds=Bounds(lambda value: value < 2**31, f"must be at most {2**31 - 1}, as far as the emulator counts"),
        needs=_played("max_episode_frames"),
        evaluation=True,
    )
    reward_clip: float = setting(
        1.0,
        "Rewards are clipped to +-this for learning (0: not clipped); scores stay true.",
        bounds=_OFF_AT_0,
        forkable=True,
    )

    # Network
    width: int = setting(
        512,
        "Hidden units of the small network's head; full1x and full3x take 2x and 4x this. Of SAC's networks, of both hidden layers; a full "
        "width is the last one's, of the networks that --grow names.",
        bounds=_POSITIVE,
        common=True,
    )
    encoder_width: float = setting(
        1.0, "Factor on the channels of the three convolutions.", bounds=_CHANNELS, needs=_is_discrete
    )
    split: Split = setting(
        "fc1",
        "First layer of the head; what lies before it is the encoder (conv1: all of the network is the head).",
        needs=_is_discrete,
    )
    normalization: Normalization = setting(
        "none", "Normalisation of the penultimate layer; of SAC's networks, of every hidden layer."
    )
    activation: Activation = setting(
        "relu", "Of the hidden layers: relu, crelu (twice the outputs), or fourier (sine and cosine of half the units)."
    )
    output_bias: OutputBias = setting(
        "shared",
        "One bias for all actions (van Hasselt et al. 2016, tuned DDQN) or one for each.",
        needs=_is_discrete,
    )

    # Growth
    intervention: Intervention = setting(
        "inject",
        "What happens at the times of grow1x, grow3x or at:...; the other schedules have their own.",
        forkable=True,
        needs=lambda config: _does(config.intervention)(config),
    )
    anchor: Anchor = setting(
        "frozen",
        "What cancels the new head at its injection: frozen is the paper's; zero and mirrored cost less.",
        forkable=True,
        needs=_injects_heads,
        common=True,
    )
    freeze: Freeze = setting(
        "heads",
        "What an injection freezes: heads (the paper), on an encoder that goes on learning; or the whole network, whose values are kept in "
        "the replay from then on, so that an update costs what the small network's costs (Atari's default without --preset and --anchor).",
        forkable=True,
        needs=_does("inject"),
        common=True,
    )
    grow: Grow = setting(
        "both",
        "Of SAC's networks, those that an intervention acts on, or full1x and full3x widen: the two critics, the actor, or all three.",
        forkable=True,
        # With fullNx it came later, and leaves the fingerprints of runs that widen all networks what they were.
        needs=lambda config: (
            config.continuous
            and (config.growth.intervenes or (config.growth.width_multiplier > 1 and config.grow != "both"))
        ),
        common=True,
    )
    live_encoder: LiveEncoder = setting(
        "warm",
        "Beside a network that was frozen: warm goes on with its encoder's weights and moments, cold begins anew with an encoder, too.",
        forkable=True,
        needs=lambda config: _does("inject")(config) and config.freeze == "network" and not config.continuous,
    )
    frozen_width: int = setting(
        0,
        "Hidden units of a file's network that is frozen whole from the start (0: there is none).",
        bounds=_NOT_NEGATIVE,
        needs=_begins_frozen,
        by_flag=False,
    )
    frozen_encoder_width: float = setting(
        1.0,
        "Factor on the channels of its convolutions.",
        bounds=_CHANNELS,
        needs=_begins_frozen,
        by_flag=False,
    )
    trainable_heads: TrainableHeads = setting(
        "newest",
        "Which heads train after an injection: the newest, or all but the anchors (the paper's ablation).",
        forkable=True,
        needs=_injects_heads,
    )
    freeze_encoder_at: int = setting(
        0,
        "Injection from which the encoder stops learning (0: never).",
        bounds=_OFF_AT_0,
        forkable=True,
        needs=lambda config: config.freeze_encoder_at < config.growth.num_stages and not config.continuous,
        common=True,
    )
    shrink_alpha: float = setting(
        0.8,
        "Share of the old weights after shrink-perturb, the rest is fresh (SR-SPR, D'Oro et al. 2023).",
        bounds=_SHARE,
        forkable=True,
        needs=_does("shrink-perturb"),
    )
    adaptive_period: int = setting(
        0,
        "Interval between decisions of the adaptive schedule (0: a 50th of the budget, a 10th of a short one).",
        "frames",
        bounds=_NOT_NEGATIVE,
        forkable=True,
        needs=_is_adaptive,
    )
    adaptive_min_gap: int = setting(
        0,
        "Least interval between its injections, and before the first (0: an eighth of the budget).",
        "frames",
        bounds=_NOT_NEGATIVE,
        forkable=True,
        needs=_is_adaptive,
    )
    adaptive_max: int = setting(3, "Its injections, at most.", bounds=_POSITIVE, forkable=True, needs=_is_adaptive)
    adaptive_threshold: float = setting(
        0.1,
        "Gain of a fresh head that tells of lost plasticity, as a share of what can be learned.",
        bounds=_NOT_NEGATIVE,
        forkable=True,
        needs=_is_adaptive,
    )
    adaptive_patience: int = setting(
        2, "Decisions in a row that must find plasticity lost.", bounds=_POSITIVE, forkable=True, needs=_is_adaptive
    )
    redo_period: int = setting(
        0,
        "Interval of the redo schedule (0: 1,000 updates; less in a short budget).",
        "frames",
        bounds=_NOT_NEGATIVE,
        forkable=True,
        needs=lambda config: config.growth.periodic,
    )
    redo_tau: float = setting(
        0.025,
        "Score up to which redo recycles a unit (Sokar et al. 2023: 0.025 at replay ratio 1/4, else 0.1).",
        bounds=_NOT_NEGATIVE,
        forkable=True,
        needs=_does("redo"),
    )
    on_growth_failure: OnGrowthFailure = setting(
        "stop", "After a rolled-back growth: stop, or continue ungrown.", identity=False
    )

    # Agent
    optimizer: OptimizerName = setting(
        "centered_rmsprop",
        "centered_rmsprop (epsilon inside the root), rmsprop (centred too, epsilon outside, as in PyTorch), or adam.",
    )
    lr: float = setting(2.5e-4, "Learning rate.", bounds=_FLOAT32, forkable=True)
    optimizer_eps: float = setting(0.01 / 32**2, "Epsilon of the optimizer.", bounds=_FLOAT32, forkable=True)
    optimizer_decay: float = setting(
        0.95,
        "Decay of centred RMSProp's moments.",
        bounds=Bounds(lambda value: 0 <= value < 1, "must lie in [0, 1)"),
        forkable=True,
        needs=lambda config: config.optimizer != "adam",
    )
    batch_size: int = setting(32, "Transitions in one update.", "transitions", bounds=_POSITIVE, forkable=True)
    replay_ratio: float = setting(
        0.25,
        "Updates per agent step.",
        bounds=Bounds(lambda value: 1e-6 <= value <= 10_000, "must lie between 1e-6 and 10000"),
    )
    priming_updates: int = setting(
        0,
        "Updates on what was played until learning starts, before anything more is: heavy priming, which makes an agent lose plasticity.",
        "updates",
        bounds=_NOT_NEGATIVE,
        needs=lambda config: config.priming_updates > 0,
    )
    discount: float = setting(0.99, "Discount per agent step.", bounds=_SHARE, forkable=True)
    double_dqn: bool = setting(
        True,
        "The online network chooses the action that the target network values; no: plain DQN.",
        forkable=True,
        needs=_is_discrete,
    )
    target_period: int = setting(
        120_000,
        "Interval between copies of the online network into the target.",
        "frames",
        bounds=_POSITIVE,
        forkable=True,
        shrinks=Shrinks(4_000, at_most=4),
        needs=_is_discrete,
    )
    target_tau: float = setting(
        0.005,
        "Share of the critics' weights that their targets take over at each update (Polyak averaging).",
        bounds=_SHARE,
        forkable=True,
        needs=_is_continuous,
    )
    max_grad_norm: float = setting(0.0, "Global gradient-norm clip (0: none).", bounds=_OFF_AT_0, forkable=True)
    regularizer: Regularizer = setting(
        "none", "Penalty in the loss: l2, l2-init (distance from the initial weights), or parseval (orthogonal layers)."
    )
    regularizer_strength: float = setting(
        1e-4,
        "Factor on the penalty (0: none).",
        bounds=Bounds(lambda value: 0 <= value < math.inf, "must be finite and not negative"),
        forkable=True,
        needs=lambda config: config.regularizer != "none",
    )
    weight_projection: WeightProjection = setting(
        "none", "nap: every hidden layer is normalised, and its weights go back to their initial norm after an update."
    )
    replay_capacity: int = setting(
        1_000_000, "Replay capacity.", "transitions", bounds=_POSITIVE, shrinks=Shrinks(25_000)
    )
    learning_starts: int = setting(
        200_000,
        "Frames played at random before the first update.",
        "frames",
        bounds=_NOT_NEGATIVE,
        shrinks=Shrinks(4_000, at_most=20),
        common=True,
    )
    epsilon_start: float = setting(1.0, "Exploration epsilon until learning starts.", bounds=_SHARE, forkable=True)
    epsilon_end: float = setting(0.01, "Exploration epsilon after its decay.", bounds=_SHARE, forkable=True)
    epsilon_decay_frames: int = setting(
        4_000_000,
        "Length of epsilon's linear decay, from the start of learning.",
        "frames",
        bounds=_NOT_NEGATIVE,
        forkable=True,
        shrinks=Shrinks(20_000, at_most=20),
    )

    # Evaluation, records
    eval_period: int = setting(
        1_000_000,
        "Interval between evaluations (0: none).",
        "frames",
        identity=False,
        bounds=_NOT_NEGATIVE,
        shrinks=Shrinks(25_000, at_most=4, at_least=4),
    )
    eval_episodes: int = setting(
        0,
        "Whole episodes of an evaluation (0: one for each 5k frames of --eval-frames, 500 of MinAtar, from 1 to 30).",
        identity=False,
        bounds=_NOT_NEGATIVE,
        evaluation=True,
    )
    eval_frames: int = setting(
        500_000,
        "About what an evaluation takes: sets its number of episodes, not their length.",
        "frames",
        identity=False,
        bounds=_NOT_NEGATIVE,
        shrinks=Shrinks(40_000, at_most=2),
        needs=lambda config: not config.eval_episodes,
        evaluation=True,
    )
    eval_epsilon: float = setting(0.01, "Epsilon in evaluation.", identity=False, bounds=_SHARE, evaluation=True)
    log_period: int = setting(
        100_000,
        "Interval between records in metrics.jsonl.",
        "frames",
        identity=False,
        bounds=_POSITIVE,
        shrinks=Shrinks(2_000, at_most=4),
    )
    diagnostics_period: int = setting(
        100_000,
        "Interval between records in diagnostics.jsonl (0: none).",
        "frames",
        identity=False,
        bounds=_NOT_NEGATIVE,
        shrinks=Shrinks(25_000, at_most=4),
    )
    diagnostics: DiagnosticsDepth = setting(
        "light", "light; full adds the loss's sharpness and a fit of random targets: seconds each time.", identity=False
    )
    checkpoint_period: int = setting(
        5_000_000,
        "Interval between checkpoints (0: only the last).",
        "frames",
        identity=False,
        bounds=_NOT_NEGATIVE,
        shrinks=Shrinks(25_000, at_most=4, at_least=4),
        common=True,
    )
    keep: int = setting(1, "Checkpoints kept besides the newest.", identity=False, bounds=_NOT_NEGATIVE)
    track: str = setting("none", "Trackers that get the records too: wandb, trackio, or wandb,trackio.", identity=False)
    track_project: str = setting(
        "growtrain", "Project of the run in its trackers.", identity=False, needs=lambda config: config.track != "none"
    )

    # Execution
    device: Device = setting(
        "auto", "auto takes the GPU when there is one.", identity=False, evaluation=True, common=True
    )
    execution: Execution = setting(
        "auto", "eager; graph: the update in a CUDA graph; auto: graph where there is a GPU.", identity=False
    )
    num_threads: int = setting(
        0,
        "CPU threads for tensors and environments (0: all in the affinity mask, as far as a CPU quota pays for them).",
        identity=False,
        bounds=Bounds(
            lambda value: 0 <= value <= 1_024, "must lie between 0, which takes all cores there are, and 1024"
        ),
        evaluation=True,
    )

    def __post_init__(self) -> None:
        """Checks every field and the relations between them; raises `ConfigError`."""
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value, choices, bounds = getattr(self, item.name), get_args(hints[item.name]), item.metadata["bounds"]
            if hints[item.name] in _KINDS:
                value = self._converted(item.name, hints[item.name])
            if choices and value not in choices:
                raise ConfigError(f"{flag(item.name)} is {value!r}: choose one of {', '.join(choices)}")
            if hints[item.name] in (int, float) and not isinstance(value, bool) and value != value:
                raise ConfigError(f"{flag(item.name)} is not a number: give a finite value")
            if bounds:
                self._require(bounds.holds(value), item.name, bounds.remedy)
                if hints[item.name] is int:
                    self._require(value <= _MOST, item.name, f"must be at most {_MOST:.0e}")
        try:
            object.__setattr__(self, "game", canonical_game(self.game))
        except ValueError as error:
            raise ConfigError(f"--game: {error}") from error
        if has_effect("switch_at", self):
            self._check_switches()
        self._check_relations()
        if self.continuous:
            self._check_continuous(schedule_of(self))
        self._check_copies(schedule_of(self))

    def _converted(self, name: str, kind: Any) -> Any:
        """A field's value, made a Python number or text where it is as good as one, which is kept; raises `ConfigError` for others."""
        value: Any = getattr(self, name)
        wanted, said = _KINDS[kind]
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{flag(name)} is {value!r}: give {said}")
        if kind in (int, float) and not isinstance(value, int | float):
            value = kind(value)  # NumPy's
        object.__setattr__(self, name, value)
        return value

    def _check_switches(self) -> None:
        try:
            times = [parse_count(time) for time in self.switch_at.split(",")]
        except ConfigError as error:
            raise ConfigError(f"--switch-at is {self.switch_at}: {error}") from error
        self._require(
            len(times) == len(self.games) - 1 and all(before < time for before, time in pairwise((0, *times))),
            "switch_at",
            f"must be {len(self.games) - 1} increasing counts of frames for {len(self.games)} games, as 500k,1M",
        )

    def _check_relations(self) -> None:
        self._require(
            self.learning_starts < self.total_frames,
            "learning_starts",
            f"must be below --total-frames {self.total_frames}: lower it or raise the budget",
        )
        if self.activation == "fourier":
            self._require(
                self.width % 2 == 0, "width", "must be even with --activation fourier, half sine and half cosine"
            )
        width = self.width if self.continuous else self.start_width()
        self._require(
            self.normalization != "layer" or width > (2 if self.activation == "fourier" else 1),
            "width",
            "gives one unit, which --normalization layer makes a constant: give more",
        )
        for name in self.trackers:
            self._require(name in get_args(Tracker), "track", f"may name {', '.join(get_args(Tracker))}, or be none")
        self._require(
            re.fullmatch(r"[A-Za-z0-9._-]{1,128}", self.track_project) is not None,
            "track_project",
            "must be of letters, digits, dots, dashes and underscores",
        )
        self._require(self.epsilon_end <= self.epsilon_start, "epsilon_end", "must not exceed --epsilon-start")
        self._require(
            self.weight_projection == "none" or self.normalization == "layer",
            "weight_projection",
            "rescales layers that are normalised: add --normalization layer",
        )
        self._require(
            self.anchor != "mirrored" or self.activation == "relu",
            "anchor",
            f"needs --activation relu, not {self.activation}: use --anchor zero or --anchor frozen",
        )
        if self.freeze == "network":
            self._require(
                self.activation == "relu",
                "freeze",
                f"needs --activation relu, not {self.activation}: the live head is silent by paired units",
            )
            self._require(
                self.trainable_heads == "newest",
                "freeze",
                "leaves no older head to train: use --trainable-heads newest",
            )
            self._require(
                self.live_encoder == "warm" or not self.freeze_encoder_at,
                "freeze_encoder_at",
                "would freeze fresh weights with --live-encoder cold: leave one of them out",
            )
        skip = self.frame_skip
        self._require(self.max_episode_frames >= skip, "max_episode_frames", f"must be at least {skip}")
        self._require(
            self.learning_starts >= skip * self.num_envs,
            "learning_starts",
            f"must be at least one step of every environment ({skip * self.num_envs} frames): raise it or lower --num-envs",
        )
        self._require(
            self.replay_capacity >= self.batch_size and self.replay_capacity >= self.num_envs,
            "replay_capacity",
            "must hold at least one batch and one transition of every environment: raise it, or lower --batch-size or --num-envs",
        )
        self._require(
            not (self.freeze_encoder_at and self.split == "conv1") or self.continuous,
            "freeze_encoder_at",
            "has no encoder to freeze with --split conv1: leave one of them out",
        )
        if self.eval_period:
            self._require(
                self.eval_frames > 0, "eval_frames", "must be positive, or turn evaluation off with --eval-period 0"
            )

    def _check_continuous(self, schedule: Schedule) -> None:
        """What SAC cannot do, each in a line."""
        acts = schedule.intervenes and schedule.intervention == "inject"
        self._require(
            not (acts and self.freeze == "network" and self.grow != "actor"),
            "freeze",
            "cannot be kept in the replay for critics, whose input holds the policy's action, another at every update: what is frozen of "
            "them is computed in each; add --grow actor, or use --freeze heads",
        )
        self._require(
            self.normalization != "spectral", "normalization", "is of networks with an encoder: use none or layer"
        )
        self._require(
            schedule.intervention != "reset-encoder",
            "intervention",
            "has no encoder to reset in SAC's networks: use reset-head, which is all of each of them",
        )

    def _check_copies(self, schedule: Schedule) -> None:
        """A network is frozen whole at a copy of the target: one must come for every injection."""
        if self.freeze == "heads" or schedule.intervention != "inject" or schedule.adaptive or self.continuous:
            return
        self._require(
            copy_of_last(schedule.injection_frames, self.target_period) < self.total_frames,
            "target_period",
            f"brings no copy of the target for every injection before --total-frames {self.total_frames}, at which --freeze network "
            "freezes: lower it, or inject earlier",
        )

    def _require(self, holds: bool, name: str, remedy: str) -> None:
        if not holds:
            raise ConfigError(f"{flag(name)} is {getattr(self, name)}: it {remedy}")

    @property
    def growth(self) -> Schedule:
        """When the network grows, and how."""
        return schedule_of(self)

    @property
    def frame_skip(self) -> int:
        """Emulator frames an agent step of the game."""
        return family_of(self.game).frame_skip

    @property
    def continuous(self) -> bool:
        """Whether actions are real numbers, and the learner SAC."""
        return family_of(self.game).continuous

    def grows(self, network: str) -> bool:
        """Whether interventions act on the learner's network of that name: of SAC's, those that `grow` names."""
        return not self.continuous or self.grow == "both" or network.startswith(self.grow)

    def start_width(self, network: str = "") -> int:
        """The last hidden layer's units of the learner's network of that name at the start: `fullNx` widens those that grow."""
        return self.width * (self.growth.width_multiplier if self.grows(network) else 1)

    @property
    def games(self) -> tuple[str, ...]:
        """The games of a chain, by their family's names for them; a single game is its own."""
        return games_of(self.game)

    @property
    def switch_frames(self) -> tuple[int, ...]:
        """The frames, within the budget, at which a chain goes on to its next game: `switch_at`, or after equal shares."""
        count = len(self.games)
        if self.switch_at and count > 1:
            return tuple(frames for frames in map(parse_count, self.switch_at.split(",")) if frames < self.total_frames)
        return tuple(self.total_frames * index // count for index in range(1, count))

    def game_after(self, frames: int) -> int:
        """Which game of a chain, counted from 0, an agent has played last that has played so many frames."""
        return sum(frames > end for end in self.game_ends[:-1])

    @property
    def game_ends(self) -> tuple[int, ...]:
        """Frames at which each game of a chain ends, the last at the end of the run: with the first step that gets there."""
        step = self.frame_skip * self.num_envs
        return tuple(-(-frames // step) * step for frames in (*self.switch_frames, self.total_frames))

    @property
    def keeps_initial_weights(self) -> bool:
        """Whether learning needs the weights that what trains had at its start."""
        return self.regularizer == "l2-init" or self.weight_projection == "nap"

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """The trackers of `track`, each once."""
        names = [] if self.track == "none" else self.track.split(",")
        return cast(tuple[Tracker, ...], tuple(dict.fromkeys(names)))

    @property
    def num_eval_episodes(self) -> int:
        """Episodes of an evaluation."""
        return self.eval_episodes or self._usual_eval_episodes

    @property
    def num_eval_lanes(self) -> int:
        """Environments of an evaluation: no more than it has episodes."""
        return min(self.num_envs, self.num_eval_episodes)

    @property
    def expected_eval_frames(self) -> int:
        """What an evaluation is taken to cost: `eval_frames`, in proportion where the number of episodes is given, below its bound."""
        return min(self.eval_frames * self.num_eval_episodes // self._usual_eval_episodes, self.max_eval_frames)

    @property
    def max_eval_frames(self) -> int:
        """The most that the episodes of an evaluation can last together."""
        return self.num_eval_episodes * self.max_episode_frames

    @property
    def _usual_eval_episodes(self) -> int:
        # Good agents' episodes are longer, which is what 30 in 500k frames of Atari allow for.
        return max(1, min(_MOST_EVAL_EPISODES, self.eval_frames // family_of(self.game).early_episode_frames))

    @property
    def entropy(self) -> int:
        """The seed as a non-negative integer for numpy's `SeedSequence`; different seeds stay different."""
        return self.seed if self.seed >= 0 else (1 << 128) - self.seed

    @property
    def threads(self) -> int:
        """`num_threads`, or as many as this process can keep busy."""
        return self.num_threads or usable_cores()

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; an unknown or missing field raises `ConfigError` that names it.

        A field that decides nothing of what is learned, or has no effect beside the others, may be missing, and has its default then: a
        run outlives a new flag.
        """
        fields = dataclasses.fields(cls)
        unknown = set(values) - {item.name for item in fields}
        missing = {item.name for item in fields if item.metadata["identity"]} - set(values)
        config = None if unknown else cls(**values)
        if wrong := sorted(unknown | {name for name in missing if config is None or has_effect(name, config)}):
            raise ConfigError(f"configuration has unknown or missing fields: {', '.join(wrong)}")
        assert config is not None
        return config

    def fingerprint(self) -> str:
        """Twelve hex digits over the fields that decide what is learned; runs that differ only in how they run share it.

        Fields that came after the first sweeps are left out where they have no effect: those sweeps' runs are still the same.
        """
        deciding = [f.name for f in dataclasses.fields(self) if f.metadata["identity"]]
        identity = {name: getattr(self, name) for name in deciding if name not in _LATER or has_effect(name, self)}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


_KINDS: dict[type, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "text"),
}
_LATER = frozenset({"switch_at", "grow", "target_tau", "frozen_width", "frozen_encoder_width", "priming_updates"})


def has_effect(name: str, config: Config) -> bool:
    """Whether a setting can make a difference in a run, beside its other settings."""
    needs: Callable[[Config], bool] | None = Config.__dataclass_fields__[name].metadata["needs"]
    return needs is None or needs(config)
