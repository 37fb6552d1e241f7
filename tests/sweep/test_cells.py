"""What a sweep's command asks for: lists taken apart, every configuration checked first, and flags that mean the same to the child."""

import json
from pathlib import Path
from typing import Any

import pytest

from growtrain.commands.commandline import Parser, add_config_flags, explicit_settings
from growtrain.environments.atari_scores import ATARI_57
from growtrain.settings.presets import resolve
from growtrain.settings.text import ConfigError
from growtrain.sweep.cells import Progress, expand, growtrain_words, progress, sweep_words


def parsed(words: list[str] | tuple[str, ...]) -> dict[str, Any]:
    parser = Parser()
    add_config_flags(parser)
    return explicit_settings(parser.parse_strict(words))


def test_every_game_with_every_schedule_and_seed_once() -> None:
    cells = expand("ALE/Phoenix-v5, assault,phoenix", "fixed, at:25M,50M,at:0.1 , grow3x", "2", {})
    assert len(cells) == 2 * 4 * 2
    assert {cell.game for cell in cells} == {"phoenix", "assault"}
    assert {cell.schedule for cell in cells} == {"fixed", "at:25M,50M", "at:0.1", "grow3x"}
    assert len({cell.run_dir for cell in cells}) == len({cell.fingerprint for cell in cells}) == len(cells)
    assert all(set(cell.run_dir) <= set("abcdefghijklmnopqrstuvwxyzM0123456789/_.-") for cell in cells)
    assert {cell.game for cell in expand("atari57", "fixed", "1", {})} == set(ATARI_57)


def test_seeds_are_a_count_or_a_list() -> None:
    assert [cell.seed for cell in expand("pong", "fixed", "3", {})] == [0, 1, 2]
    assert [cell.seed for cell in expand("pong", "fixed", "5,-1", {})] == [5, -1]
    assert [cell.seed for cell in expand("pong", "fixed", "7,", {})] == [7]


@pytest.mark.parametrize(
    ("games", "schedules", "seeds", "settings", "says"),
    [
        ("phoenix,phonix", "fixed", "1", {}, "did you mean phoenix"),
        (" , ", "fixed", "1", {}, "--games is empty"),
        ("pong", "grow0x", "1", {}, "grow3x"),
        ("pong", "fixed,at:300M", "1", {}, "--total-frames"),
        ("pong", "fixed", "0", {}, "--seeds"),
        ("pong", "fixed", "two", {}, "count"),
        ("pong", "fixed", "2.5", {}, "not a whole number"),
        ("pong", "fixed", "1e300", {}, "--seeds is 1e300: give how many"),
        ("pong", "fixed", "1", {"seed": 3}, "--seeds"),
        ("pong", "fixed", "1", {"schedule": "fixed"}, "--schedules"),
        ("pong", "fixed", "1", {"num_envs": 0}, "--num-envs"),
    ],
)
def test_wrong_entries_are_named(games: str, schedules: str, seeds: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        expand(games, schedules, seeds, settings)


def test_a_child_reads_from_its_flags_what_was_validated() -> None:
    settings = {"total_frames": 40_000, "lr": 1e-5, "life_loss_terminal": False, "preset": "modern", "device": "cpu"}
    for cell in expand("pong", "at:0.2,0.5", "-3,99", settings):
        explicit = parsed(cell.words)
        assert explicit == settings | {"game": "pong", "schedule": "at:0.2,0.5", "seed": cell.seed}
        assert resolve("modern", explicit)[0].fingerprint() == cell.fingerprint


def test_only_what_is_learned_makes_another_cell() -> None:
    (one,) = expand("pong", "fixed", "1", {})
    (same,) = expand("pong", "fixed", "1", {"device": "cpu", "log_period": 7})
    (other,) = expand("pong", "fixed", "1", {"width": 256})
    assert (one.fingerprint, one.run_dir) == (same.fingerprint, same.run_dir)
    assert one.run_dir != other.run_dir


def test_a_sweep_of_one_cell_asks_for_that_cell(tmp_path: Path) -> None:
    settings = {"width": 64, "total_frames": 30_000}
    cell = expand("pong,breakout", "fixed,at:0.2,0.5", "-3,", settings)[-1]
    words = sweep_words(cell, tmp_path, settings)
    parser = Parser()
    for name in ("--dir", "--games", "--schedules", "--seeds"):
        parser.add_argument(name)
    add_config_flags(parser)
    namespace = parser.parse_strict(words[1:])
    assert expand(namespace.games, namespace.schedules, namespace.seeds, explicit_settings(namespace)) == [cell]


def test_a_run_that_has_begun_is_resumed(tmp_path: Path) -> None:
    (cell,) = expand("pong", "fixed", "1", {})
    run_dir = tmp_path / cell.run_dir
    assert growtrain_words(cell, tmp_path) == ["train", "--run-dir", str(run_dir), *cell.words]
    (run_dir / "checkpoints").mkdir(parents=True)
    assert growtrain_words(cell, tmp_path)[0] == "train"  # it ended before anything was written
    (run_dir / "config.json").write_text("{}")
    assert growtrain_words(cell, tmp_path) == ["resume", str(run_dir), *cell.words]


def test_progress_is_read_from_the_runs_files(tmp_path: Path) -> None:
    assert progress(tmp_path) == Progress()
    lines = [json.dumps({"frames": frames, "frames_per_second": frames / 2, "x": "y" * 5000}) for frames in range(99)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"frames": 10')
    assert progress(tmp_path) == Progress(frames=98, frames_per_second=49.0)
    (tmp_path / "summary.json").write_text('{"status": "stopped", "frames": 98}')
    assert not progress(tmp_path).finished
    (tmp_path / "summary.json").write_text('{"status": "done", "frames": 120}')
    assert progress(tmp_path) == Progress(frames=120, finished=True)
    (tmp_path / "summary.json").write_text("[")
    assert progress(tmp_path).frames == 98
