"""Films one evaluation episode of a run, with the action values beside it."""

from collections.abc import Sequence

from growtrain.commands.commandline import Parser, given_path, reader
from growtrain.runfiles import require_directory
from growtrain.settings.text import ConfigError


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="growtrain video",
        description="Film one evaluation episode of a run in colour and real time, with the action values beside it.",
    )
    parser.add_argument("run", type=given_path, metavar="RUN", help="the run's directory")
    parser.add_argument("--at", type=reader(int), metavar="N", help="frames of the checkpoint (default: the newest)")
    parser.add_argument("--seed", type=reader(int), metavar="N", help="of the episode (default: the run's)")
    parser.add_argument(
        "--frames", type=reader(int), metavar="N", help="at most (default: the whole episode; of a GIF, its most: 3.6k)"
    )
    parser.add_argument(
        "--output",
        type=given_path,
        metavar="FILE",
        help=".mp4 or .gif, replaced (default: RUN/video-<frames>-s<seed>.mp4)",
    )
    namespace = parser.parse_strict(words)
    require_directory(namespace.run, "that of a run")

    try:
        from growtrain.runs.video import film
    except ImportError as error:
        raise ConfigError(f"video: {error}: pip install 'growtrain[video]'") from error

    for line in film(namespace.run, namespace.output, at=namespace.at, seed=namespace.seed, frames=namespace.frames):
        print(line, flush=True)
    return 0
