"""One run's configuration: a frozen dataclass, validated across fields, with a JSON round trip and a fingerprint.

Source of the defaults: `presets.py`, which names one for each value. The defaults here are the paper preset's at 200M frames
(Double DQN as in DQN Zoo `double_q`; Nikishin et al., "Deep Reinforcement Learning with Plasticity Injection", NeurIPS 2023).

Units: every budget, period and schedule is in emulator frames; an agent step is `FRAME_SKIP` frames.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast, get_args, get_type_hints

FRAME_SKIP = 4
PAPER_TOTAL_FRAMES = 200_000_000
_FRAMES_AN_EVAL_EPISODE = (
    5_000  # of early agents; those of good ones are longer, which is what 30 in 500k frames allows for
)
_MOST_EVAL_EPISODES = 30  # Mnih et al. 2015, "Evaluation procedure"

Activation = Literal["relu", "crelu", "fourier"]
Anchor = Literal["frozen", "zero", "mirrored"]
Intervention = Literal[
    "inject",
    "reset-head",
    "reset-encoder",
    "reset-all",
    "shrink-perturb",
    "widen",
    "net2wider",
    "redo",
    "fresh-optimizer",
]
Split = Literal["fc1", "conv3", "conv2", "conv1"]
TrainableHeads = Literal["newest", "all"]
Normalization = Literal["none", "layer", "spectral"]
Regularizer = Literal["none", "l2", "l2-init", "parseval"]
WeightProjection = Literal["none", "nap"]
OptimizerName = Literal["centered_rmsprop", "adam"]
OutputBias = Literal["shared", "per_action"]
Execution = Literal["auto", "eager", "graph"]
Device = Literal["auto", "cpu", "cuda"]
PresetName = Literal["paper", "modern"]
OnGrowthFailure = Literal["stop", "continue"]
DiagnosticsDepth = Literal["light", "full"]
Tracker = Literal["wandb", "trackio"]


class ConfigError(ValueError):
    """A setting is wrong; the message is one line that names the setting and the remedy."""


def setting(default: Any, doc: str, unit: str = "", identity: bool = True) -> Any:
    """A field with its docstring, its unit, and whether it decides what is learned (`identity`) or only how it is run."""
    return field(default=default, metadata={"doc": doc, "unit": unit, "identity": identity})


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run. `dataclasses.replace` makes variants; construction validates and raises `ConfigError`."""

    # What is run
    game: str = setting("phoenix", "Atari 2600 game, in any spelling.")
    schedule: str = setting(
        "grow3x",
        "fixed, grow1x, grow3x, full1x, full3x, or at:25M,50M (frames) or at:0.1,0.5 (fractions); to compare with: reset, "
        "shrink-perturb, widen3x (at the times of grow3x), redo (every --redo-period); adaptive: when plasticity is measured to be lost.",
    )
    preset: PresetName = setting("paper", "Where the defaults come from: the paper's baseline agent, or a modern DQN.")
    seed: int = setting(0, "Seed of everything random; any integer (normalised through numpy's SeedSequence).")
    total_frames: int = setting(PAPER_TOTAL_FRAMES, "Budget of the run.", "frames")

    # Environment
    num_envs: int = setting(8, "Environments stepped together (lanes); 1 is the paper's strict alternation.")
    sticky_actions: float = setting(0.0, "Probability that the emulator repeats the previous action.")
    life_loss_terminal: bool = setting(True, "Losing a life ends the return (discount 0) while the episode goes on.")
    noop_max: int = setting(30, "Random no-ops at an episode's start, at most.", "frames")
    max_episode_frames: int = setting(108_000, "Cap of an episode (30 minutes of play).", "frames")
    reward_clip: float = setting(1.0, "Rewards are clipped to +-this for learning (0: not clipped); scores stay true.")

    # Network
    width: int = setting(512, "Hidden units of the small network's head; full1x and full3x take 2x and 4x this.")
    encoder_width: float = setting(1.0, "Factor on the channels of the three convolutions.")
    split: Split = setting(
        "fc1", "First layer of the head; what lies before it is the encoder (conv1: all of the network is the head)."
    )
    normalization: Normalization = setting("none", "Normalisation of the penultimate layer.")
    activation: Activation = setting(
        "relu", "Of the hidden layers: relu, crelu (twice the outputs), or fourier (sine and cosine of half the units)."
    )
    output_bias: OutputBias = setting(
        "shared", "One bias for all actions (van Hasselt et al. 2016, tuned DDQN) or one for each."
    )

    # Growth
    intervention: Intervention = setting(
        "inject", "What happens at the times of grow1x, grow3x or at:...; the other schedules have their own."
    )
    anchor: Anchor = setting(
        "frozen", "What cancels the new head at its injection: frozen is the paper's; zero and mirrored cost less."
    )
    trainable_heads: TrainableHeads = setting(
        "newest", "Which heads train after an injection: the newest, or all but the anchors (the paper's ablation)."
    )
    freeze_encoder_at: int = setting(0, "Injection from which the encoder stops learning (0: never).")
    shrink_alpha: float = setting(
        0.8, "Share of the old weights after shrink-perturb, the rest is fresh (SR-SPR, D'Oro et al. 2023)."
    )
    adaptive_period: int = setting(
        0,
        "Interval between decisions of the adaptive schedule (0: a 50th of the budget, a 10th of a short one).",
        "frames",
    )
    adaptive_min_gap: int = setting(
        0, "Least interval between its injections, and before the first (0: an eighth of the budget).", "frames"
    )
    adaptive_max: int = setting(3, "Its injections, at most.")
    adaptive_threshold: float = setting(
        0.1, "Gain of a fresh head that tells of lost plasticity, as a share of what can be learned."
    )
    adaptive_patience: int = setting(2, "Decisions in a row that must find plasticity lost.")
    redo_period: int = setting(0, "Interval of the redo schedule (0: 1,000 updates; less in a short budget).", "frames")
    redo_tau: float = setting(
        0.025, "Score up to which redo recycles a unit (Sokar et al. 2023: 0.025 at replay ratio 1/4, else 0.1)."
    )
    on_growth_failure: OnGrowthFailure = setting(
        "stop", "After a rolled-back growth: stop, or continue ungrown.", identity=False
    )

    # Agent
    optimizer: OptimizerName = setting("centered_rmsprop", "centered_rmsprop (epsilon inside the root) or adam.")
    lr: float = setting(2.5e-4, "Learning rate.")
    optimizer_eps: float = setting(0.01 / 32**2, "Epsilon of the optimizer.")
    optimizer_decay: float = setting(0.95, "Decay of centred RMSProp's moments.")
    batch_size: int = setting(32, "Transitions in one update.", "transitions")
    replay_ratio: float = setting(0.25, "Updates per agent step.")
    discount: float = setting(0.99, "Discount per agent step.")
    target_period: int = setting(120_000, "Interval between copies of the online network into the target.", "frames")
    max_grad_norm: float = setting(0.0, "Global gradient-norm clip (0: none).")
    regularizer: Regularizer = setting(
        "none", "Penalty in the loss: l2, l2-init (distance from the initial weights), or parseval (orthogonal layers)."
    )
    regularizer_strength: float = setting(1e-4, "Factor on the penalty (0: none).")
    weight_projection: WeightProjection = setting(
        "none", "nap: every hidden layer is normalised, and its weights go back to their initial norm after an update."
    )
    replay_capacity: int = setting(1_000_000, "Replay capacity.", "transitions")
    learning_starts: int = setting(200_000, "Frames played at random before the first update.", "frames")
    epsilon_start: float = setting(1.0, "Exploration epsilon until learning starts.")
    epsilon_end: float = setting(0.01, "Exploration epsilon after its decay.")
    epsilon_decay_frames: int = setting(
        4_000_000, "Length of epsilon's linear decay, from the start of learning.", "frames"
    )

    # Evaluation, records
    eval_period: int = setting(1_000_000, "Interval between evaluations (0: none).", "frames", identity=False)
    eval_episodes: int = setting(
        0, "Whole episodes of an evaluation (0: one for each 5k frames of --eval-frames, from 1 to 30).", identity=False
    )
    eval_frames: int = setting(
        500_000,
        "About what an evaluation takes: sets its number of episodes, not their length.",
        "frames",
        identity=False,
    )
    eval_epsilon: float = setting(0.01, "Epsilon in evaluation.", identity=False)
    log_period: int = setting(100_000, "Interval between records in metrics.jsonl.", "frames", identity=False)
    diagnostics_period: int = setting(
        100_000, "Interval between records in diagnostics.jsonl (0: none).", "frames", identity=False
    )
    diagnostics: DiagnosticsDepth = setting(
        "light", "light; full adds the loss's sharpness and a fit of random targets: seconds each time.", identity=False
    )
    checkpoint_period: int = setting(
        5_000_000, "Interval between checkpoints (0: only the last).", "frames", identity=False
    )
    keep: int = setting(1, "Checkpoints kept besides the newest.", identity=False)
    track: str = setting("none", "Trackers that get the records too: wandb, trackio, or wandb,trackio.", identity=False)
    track_project: str = setting("growtrain", "Project of the run in its trackers.", identity=False)

    # Execution
    device: Device = setting("auto", "auto takes the GPU when there is one.", identity=False)
    execution: Execution = setting(
        "auto", "eager; graph: the update in a CUDA graph; auto: graph where there is a GPU.", identity=False
    )
    num_threads: int = setting(
        0, "CPU threads for tensors and environments (0: all in the affinity mask).", identity=False
    )

    def __post_init__(self) -> None:
        """Checks every field and the relations between them; raises `ConfigError`."""
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value, choices = getattr(self, item.name), get_args(hints[item.name])
            if choices and value not in choices:
                raise ConfigError(f"{flag(item.name)} is {value!r}: choose one of {', '.join(choices)}")
            if hints[item.name] in (int, float) and not isinstance(value, bool) and value != value:
                raise ConfigError(f"{flag(item.name)} is not a number: give a finite value")
        for name in (
            "total_frames",
            "num_envs",
            "width",
            "batch_size",
            "target_period",
            "log_period",
            "replay_capacity",
            "adaptive_max",
            "adaptive_patience",
        ):
            self._require(getattr(self, name) > 0, name, "must be positive")
        for name in ("encoder_width", "lr", "optimizer_eps", "replay_ratio"):
            self._require(0 < getattr(self, name) < float("inf"), name, "must be positive and finite")
        for name in (
            "keep",
            "noop_max",
            "learning_starts",
            "epsilon_decay_frames",
            "eval_period",
            "eval_episodes",
            "eval_frames",
            "checkpoint_period",
            "redo_period",
            "redo_tau",
            "adaptive_period",
            "adaptive_min_gap",
            "adaptive_threshold",
            "diagnostics_period",
        ):
            self._require(getattr(self, name) >= 0, name, "must not be negative")
        self._require(self.num_threads >= 0, "num_threads", "must not be negative (0 takes all cores there are)")
        for name in ("freeze_encoder_at", "max_grad_norm", "reward_clip"):
            self._require(getattr(self, name) >= 0, name, "must not be negative (0 turns it off)")
        for name in ("sticky_actions", "epsilon_start", "epsilon_end", "eval_epsilon", "discount", "shrink_alpha"):
            self._require(0 <= getattr(self, name) <= 1, name, "must lie in [0, 1]")
        if self.activation == "fourier":
            self._require(
                self.width % 2 == 0, "width", "must be even with --activation fourier, half sine and half cosine"
            )
        for name in self.trackers:
            self._require(name in get_args(Tracker), "track", f"may name {', '.join(get_args(Tracker))}, or be none")
        self._require(
            re.fullmatch(r"[A-Za-z0-9._-]{1,128}", self.track_project) is not None,
            "track_project",
            "must be of letters, digits, dots, dashes and underscores",
        )
        self._require(0 <= self.optimizer_decay < 1, "optimizer_decay", "must lie in [0, 1)")
        self._require(self.epsilon_end <= self.epsilon_start, "epsilon_end", "must not exceed --epsilon-start")
        self._require(
            0 <= self.regularizer_strength < float("inf"), "regularizer_strength", "must be finite and not negative"
        )
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
        self._require(self.max_episode_frames >= FRAME_SKIP, "max_episode_frames", f"must be at least {FRAME_SKIP}")
        self._require(
            self.learning_starts < self.total_frames,
            "learning_starts",
            f"must be below --total-frames {self.total_frames}: lower it or raise the budget",
        )
        self._require(
            self.learning_starts >= FRAME_SKIP * self.num_envs,
            "learning_starts",
            f"must be at least one step of every environment ({FRAME_SKIP * self.num_envs} frames)",
        )
        self._require(
            self.replay_capacity >= self.batch_size and self.replay_capacity >= self.num_envs,
            "replay_capacity",
            "must hold at least one batch and one transition of every environment",
        )
        self._require(
            not (self.freeze_encoder_at and self.split == "conv1"),
            "freeze_encoder_at",
            "has no encoder to freeze with --split conv1: leave one of them out",
        )
        if self.eval_period:
            self._require(
                self.eval_frames > 0, "eval_frames", "must be positive, or turn evaluation off with --eval-period 0"
            )

    def _require(self, holds: bool, name: str, remedy: str) -> None:
        if not holds:
            raise ConfigError(f"{flag(name)} is {getattr(self, name)}: it {remedy}")

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
    def entropy(self) -> int:
        """The seed as a non-negative integer for numpy's `SeedSequence`; different seeds stay different."""
        return self.seed if self.seed >= 0 else (1 << 128) - self.seed

    @property
    def num_eval_episodes(self) -> int:
        """Episodes of an evaluation."""
        return self.eval_episodes or self._usual_eval_episodes

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
        return max(1, min(_MOST_EVAL_EPISODES, self.eval_frames // _FRAMES_AN_EVAL_EPISODE))

    @property
    def threads(self) -> int:
        """`num_threads`, or as many as this process has cores."""
        return self.num_threads or len(os.sched_getaffinity(0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; an unknown or missing field raises `ConfigError` that names it.

        A field that decides nothing of what is learned may be missing, and has its default then: a run outlives a new flag.
        """
        fields = dataclasses.fields(cls)
        unknown = set(values) - {item.name for item in fields}
        missing = {item.name for item in fields if item.metadata["identity"]} - set(values)
        if wrong := sorted(unknown | missing):
            raise ConfigError(f"configuration has unknown or missing fields: {', '.join(wrong)}")
        return cls(**values)

    def fingerprint(self) -> str:
        """Twelve hex digits over the fields that decide what is learned; runs that differ only in how they run share it."""
        identity = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["identity"]}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def flag(name: str) -> str:
    """The command-line flag of a field: `replay_ratio` -> `--replay-ratio`."""
    return "--" + name.replace("_", "-")


def parse_count(text: str) -> int:
    """A whole number with an optional k, M or G suffix: `100k` -> 100000, `0.5M` -> 500000; raises `ConfigError`."""
    scale = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}.get(text[-1:].lower(), 1)
    digits = (text if scale == 1 else text[:-1]).replace("_", "")
    try:
        return int(digits) * scale  # exactly: a seed may have more digits than a float
    except ValueError:
        pass
    try:
        value = float(digits) * scale
        count = round(value)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{text!r} is not a count: write for example 200000, 200k or 0.2M") from error
    if abs(value - count) > 1e-6 * max(1.0, abs(value)):
        raise ConfigError(f"{text!r} is not a whole number: write for example 200000, 200k or 0.2M")
    return count


def format_count(count: float) -> str:
    """A short form of a count: 100000 -> `100k`, 2500000 -> `2.5M`."""
    for scale, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if abs(count) >= scale:
            return f"{count / scale:.4g}{suffix}"
    return f"{count:.4g}"


def episodes_text(episodes: Sequence[float]) -> str:
    """`12 episodes`, `3 to 40 episodes`, of the numbers of episodes behind some scores."""
    least, most = (f"{value:.0f}" for value in (min(episodes), max(episodes)))
    return f"{least} episode{'' if most == '1' else 's'}" if least == most else f"{least} to {most} episodes"
