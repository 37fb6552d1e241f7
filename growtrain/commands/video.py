"""Writes an episode of a run's newest checkpoint as a film."""

from collections.abc import Sequence
from pathlib import Path

from growtrain.commandline import Parser
from growtrain.config import ConfigError, format_count, parse_count


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="growtrain video",
        description="Play an evaluation episode of a run's checkpoint and write it as a film: in colour, with its action values.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    parser.add_argument("--at", type=parse_count, metavar="N", help="frames of the checkpoint (default: the newest)")
    parser.add_argument("--episode", type=parse_count, default=0, metavar="N", help="which one (default: 0)")
    parser.add_argument(
        "--frames",
        type=parse_count,
        metavar="N",
        help="at most (default: 18k, 5 minutes; 3.6k for .gif, kept in memory)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=".mp4 or .gif (default: RUN/video-<frames>-<episode>.mp4)"
    )
    parser.add_argument("--device", default="auto", help="where the network plays (default: auto)")
    namespace = parser.parse_strict(words)
    if namespace.frames is not None and namespace.frames < 1:
        raise ConfigError("--frames must be at least 1")
    try:
        import PIL
    except ImportError as error:
        raise ConfigError(f"{error}: pip install 'growtrain[video]'") from error
    del PIL

    import torch

    from growtrain import video
    from growtrain.checkpoint import load_learner
    from growtrain.training import resolve_device

    if namespace.output is not None:
        video.require_suffix(namespace.output)
    device = resolve_device(namespace.device)
    learner, config, frames, stage = load_learner(namespace.run, device, at=namespace.at)
    torch.set_num_threads(config.threads)
    output = namespace.output or namespace.run / f"video-{frames}-{namespace.episode}.mp4"
    most = namespace.frames or video.MAX_FRAMES[output.suffix.lower()]
    episode = video.play(
        learner.q_values,
        config,
        frames=frames,
        episode=namespace.episode,
        max_frames=most,
        device=device,
    )
    grown = f", stage {stage}" if stage else ""
    heading = f"{config.game}, {config.schedule} after {format_count(frames)} frames{grown}"
    video.write(output, video.pictures(episode, config, heading))
    seconds, size = len(episode.actions) / video.DECISIONS_PER_SECOND, output.stat().st_size / 1e6
    cut = "" if episode.ended else f", cut off at --frames {format_count(most)}"
    print(f"{output}: score {episode.score:g}, {len(episode.actions)} decisions{cut}; {seconds:.0f} s, {size:.1f} MB")
    return 0
