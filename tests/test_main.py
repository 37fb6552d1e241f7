"""The command line as a user meets it: flags are frozen, every wrong one gets one line and exit code 2, and the main job runs."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from growtrain.__main__ import main
from growtrain.commands.running import default_run_dir
from growtrain.records import Evaluation
from growtrain.runs.run import Run
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError
from growtrain.telemetry.sinks import read_jsonl

TINY = [
    *("--game", "pong", "--total-frames", "4k", "--num-envs", "4", "--width", "32", "--encoder-width", "0.25"),
    *("--batch-size", "8", "--eval-frames", "400", "--max-episode-frames", "1k"),  # an evaluation plays a whole one
    *("--learning-starts", "200", "--log-period", "1k"),
]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--game", "phonix"], "phoenix"),
        (["--shedule", "grow3x"], "--schedule"),
        (["--schedule", "grow3"], "grow3x"),
        (["--run-dir", ""], "--run-dir: it is empty: name a path"),
        (["--schedule", "at:nan"], "--schedule: 'nan' is not a count"),
        (["--schedule", "every:"], "--schedule: '' is not a count"),
        (["evaluate", "nowhere"], "nowhere is no directory: name that of a run"),
        (["--schedule", "at:0"], "increasing times above 0"),
        (["--num-threads", "100000"], "and 1024"),
        (["plan", "--schedule", "every:1"], "--schedule every:1: that is 199799999 times, of at most 1000"),
        (["--schedule", "redo", "--redo-period", "1"], "--redo-period 1: that is"),
        (["probe", "--game", "dmc/quadruped-run"], "name an Atari game"),
        (["probe", "--policy", "nowhere"], "nowhere has no checkpoints"),
        (["rescue", "nowhere", "--frames", "-1"], "--frames"),
        (
            ["sweep", "--dir", "x", "--games", "pong", "--schedules", "fixed", "--seeds", "a"],
            "--seeds: 'a' is not a count",
        ),
        (["--schedule", "grow99x"], "inject fewer times, or raise --total-frames"),
        (["--total-frames", "1"], "must be below --total-frames 1: lower it or raise the budget"),
        (["--replay-capacity", "1"], "lower --batch-size or --num-envs"),
        (["--total-frames", "100k", "--learning-starts", "1", "--schedule", "fixed"], "raise it or lower --num-envs"),
        (["--total-frames", "lots"], "200k"),
        (["--total-frames", "-5"], "--total-frames"),
        (["--epsilon-end", "2"], "--epsilon-end"),
        (["--lr", "fast"], "--lr"),
        (["--lr"], "--lr: needs a value"),
        (["--total-frames", "-5k"], "does not begin with a dash"),
        (["--num-threads", "-1"], "0, which takes all cores"),
        (["--anchor", "rope"], "mirrored"),
        (["--anchor", "mirrored", "--activation", "crelu"], "--anchor zero"),
        (["--weight-projection", "nap"], "--normalization layer"),
        (["--num-envs", "0"], "--num-envs"),
        (["--learning-starts", "300M"], "--learning-starts"),
        (["--device", "tpu"], "--device"),
        (["--track", "tensorboard"], "wandb, trackio"),
        (["fly"], "unknown command 'fly'"),
        (["evaluate", "/nowhere"], "/nowhere"),
        (["--preset", "future"], "paper"),
        (["--life-loss-terminal", "maybe"], "yes or no"),
        (["--schedule", "reset", "--intervention", "redo"], "leave it out"),
        (["--schedule", "widen3x", "--normalization", "layer"], "--intervention widen"),
        (["--replay-ratio", "1e-7"], "--replay-ratio is 1e-07: it must lie between 1e-6 and 10000"),
        (["--replay-ratio", "1e300"], "--replay-ratio"),
        (["--max-episode-frames", "1e13"], "--max-episode-frames is 10000000000000: it must be at most 2147483647"),
        (["--total-frames", "1e300"], "it must be at most 1e+15"),
        (["plan", "--eval-episodes", "1e300"], "--eval-episodes"),
        (["--lr", "1e300"], "--lr is 1e+300: it must lie between 1.2e-38 and 3.4e38"),
        (["--lr", "1e-300"], "--lr"),
        (["plan", "--encoder-width", "1e30"], "--encoder-width is 1e+30: it must be positive, and at most 1000"),
    ],
)
def test_wrong_input_gets_one_helpful_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert list(tmp_path.iterdir()) == []  # before any work


def test_missing_gpu_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_first_line_says_that_frozen_networks_wait_for_a_copy_of_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "--schedule", "at:500", "--freeze", "network", "--eval-period", "0", "--total-frames", "2k"]
    assert main([*words, "--run-dir", str(tmp_path)]) == 0
    (event,) = read_jsonl(tmp_path / "growth_events.jsonl")
    said = capsys.readouterr().out.splitlines()[0]
    assert said.endswith("injections at 500, each at the target's next copy (every 500)")
    assert event["frames"] == 512  # the copy at 500, after a whole step of four lanes


def test_train_then_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert main([*TINY, "--schedule", "grow3x", "--run-dir", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert out.count("inject  max |dQ| online 0 target 0") == 3
    assert "shrink with the budget" in out
    assert [e["frames"] for e in read_jsonl(run_dir / "growth_events.jsonl")] == [1008, 2000, 3008]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("done", None)
    assert main(["evaluate", str(run_dir), "--eval-frames", "800"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["stage"] == 3
    assert (record["episodes"], record["unfinished"]) == (1, 0)
    assert -21 <= record["episode_return"] <= 21
    assert record["eval_frames"] > 800  # no game of Pong is over so soon
    assert main(["evaluate", str(run_dir), "--eval-episodes", "3", "--max-episode-frames", "800"]) == 0
    record = json.loads(capsys.readouterr().out)
    # In three lanes of four.
    assert (record["episodes"], record["unfinished"], record["eval_frames"]) == (3, 0, 3 * 800)
    for other in (["--game", "breakout"], ["--width", "9"]):  # an agent's own
        assert main(["evaluate", str(run_dir), *other]) == 2
        assert other[0] in capsys.readouterr().err
    assert main(["evaluate", str(run_dir), "--at", "77"]) == 2
    assert "no checkpoint at 77" in capsys.readouterr().err
    assert main([*TINY, "--run-dir", str(run_dir)]) == 2  # never over another run
    assert "already" in capsys.readouterr().err


def test_plan_prints_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--no-timing", "--anchor", "mirrored"]) == 0
    out = capsys.readouterr().out
    assert "6.519M" in out  # parameters of the last stage
    assert "7.07 GB" in out  # replay
    assert list(tmp_path.iterdir()) == []


def test_a_periodic_intervention_as_a_user_sees_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "--total-frames", "2k", "--schedule", "redo", "--redo-period", "500", "--redo-tau", "0.3"]
    assert main([*words, "--run-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "redo 3 times from 500 to 1.5k" in out.splitlines()[0]
    assert out.count("redo  max |dQ| online") == 3
    assert "stage 0/0" in out.splitlines()[-1]


def test_run_names_are_safe_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = default_run_dir(Config(schedule="at:0.1,0.5", game="pong")).name
    assert name.startswith("pong-at_0.1_0.5-s0-")
    with pytest.raises(ConfigError, match="--schedule"):
        Config(schedule="../../x\n<b>")


def test_a_signal_stops_with_a_checkpoint_and_75(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*TINY, "--total-frames", "10M", "--run-dir", str(run_dir)]
    process = subprocess.Popen([sys.executable, "-m", "growtrain", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("train"):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "stopped"
    assert list((run_dir / "checkpoints").glob("0*"))


STDERR = {"a closed pipe": "2>&1 >&3 | true", "a full disk": "2>/dev/full >&3", "closed": "2>&- >&3"}


@pytest.mark.parametrize("what", STDERR)
def test_a_message_that_cannot_be_shown_ends_nothing(what: str) -> None:
    """Neither a warning nor the last line changes what is done, nor the exit code."""
    script = (
        "import sys, time, warnings, growtrain.commands.doctor as doctor\n"
        "from growtrain.__main__ import main\n"
        "from growtrain.commands.running import complain\n"
        "def command(words):\n"
        "    time.sleep(0.2)  # the reader goes away\n"
        "    for text in 'ab':\n"
        "        warnings.warn(text)\n"
        "    complain('c')\n"
        "    print('done')\n"
        "    return 75\n"
        "doctor.main = command\n"
        "sys.exit(main(['doctor']))\n"
    )
    shell = f'exec 3>&1; "$0" -c "$1" {STDERR[what]}; exit ${{PIPESTATUS[0]}}'
    ended = subprocess.run(["bash", "-c", shell, sys.executable, script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "done\n", "")


def test_lines_of_a_command_that_nobody_reads_end_nothing() -> None:
    """Such as a diagnosis of hours, whose answer is in files."""
    script = (
        "import sys, time, growtrain.commands.doctor as doctor\n"
        "from growtrain.__main__ import main\n"
        "from growtrain.commands.running import complain, say\n"
        "def command(words):\n"
        "    time.sleep(0.2)  # the reader goes away\n"
        "    for text in 'ab':\n"
        "        say(text)\n"
        "    complain('c')\n"
        "    return 75\n"
        "doctor.main = command\n"
        "sys.exit(main(['doctor']))\n"
    )
    shell = '"$0" -c "$1" | true; exit ${PIPESTATUS[0]}'
    ended = subprocess.run(["bash", "-c", shell, sys.executable, script], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (75, "growtrain: c\n")


FAILURES = {
    "checkpoint.CheckpointFailed": "growtrain.runs",
    "base.Diverged": "growtrain.learners",
    "base.EnvironmentHung": "growtrain.environments",
    "transaction.GrowthFailed": "growtrain.growth",
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("command", ["train", "diagnose", "evaluate", "rescue", "video"])
def test_what_ends_a_run_is_one_line_in_every_command(
    command: str, failure: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = failure.split(".")
    error = getattr(importlib.import_module(f"{FAILURES[failure]}.{module}"), name)

    def fails(words: list[str]) -> int:
        raise error("so\nit is")

    monkeypatch.setattr(f"growtrain.commands.{command}.main", fails)
    assert main([command]) == 1
    assert capsys.readouterr().err == "growtrain: so it is; the checkpoints made before are whole\n"


def test_a_directory_with_what_is_left_of_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its config.json it does not look like a run, and two runs' records would be mixed."""
    for index, name in enumerate(("metrics.jsonl", "checkpoints/000000000400", "summary.json", "initial.safetensors")):
        run_dir = tmp_path / str(index)
        (run_dir / name).parent.mkdir(parents=True)
        (run_dir / name).touch()
        for words in (
            ["train", "--run-dir"],
            ["rescue", str(tmp_path), "--run-dir"],
            ["resume", str(tmp_path), "--fork"],
        ):
            (tmp_path / "config.json").touch()  # of the run that is forked
            assert main([*words, str(run_dir)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{words[-1]} {run_dir} holds what is left of another run ({name})" in line
        assert [path for path in run_dir.rglob("*") if path.is_file()] == [run_dir / name]


def test_a_signal_in_the_last_evaluation_breaks_it_off_and_a_resume_makes_up_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code agrees with the summary; of a run that is done a signal that comes later makes nothing else."""
    evaluate, save, signals = Run.evaluate, Run.save, [signal.SIGTERM]

    def hears(self: Run, should_stop: Callable[[], bool | str]) -> Iterator[Evaluation]:
        for number in signals if self.frames >= self.config.total_frames else ():
            signal.raise_signal(number)
        return evaluate(self, should_stop)

    def hears_too_late(self: Run, *, required: bool = False) -> None:
        save(self, required=required)
        if self.frames >= self.config.total_frames:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "evaluate", hears)
    words = [
        *TINY,
        "--total-frames",
        "800",
        "--schedule",
        "fixed",
        "--eval-period",
        "300",
        "--max-episode-frames",
        "80",
    ]
    once = tmp_path / "once"
    assert main([*words, "--run-dir", str(once)]) == 75
    assert "stopped by SIGTERM; go on with: growtrain resume" in capsys.readouterr().err
    summary = json.loads((once / "summary.json").read_text())
    assert (summary["status"], summary["reason"], summary["frames"]) == ("stopped", "SIGTERM", 800)
    assert [record["frames"] for record in read_jsonl(once / "evaluations.jsonl")] == [304, 608]
    signals.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", hears_too_late)
        assert main(["resume", str(once)]) == 0
    assert "stopped" not in capsys.readouterr().err
    summary = json.loads((once / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("done", None)
    assert [record["frames"] for record in read_jsonl(once / "evaluations.jsonl")] == [304, 608, 800]

    signals[:] = [signal.SIGINT, signal.SIGINT]
    twice = tmp_path / "twice"
    assert main([*words, "--run-dir", str(twice)]) == 1
    assert "stopped at once" in capsys.readouterr().err
    signals.clear()
    assert main(["resume", str(twice)]) == 0
    assert [record["frames"] for record in read_jsonl(twice / "evaluations.jsonl")] == [304, 608, 800]
    assert json.loads((twice / "summary.json").read_text())["status"] == "done"


def test_closed_stdout_does_not_end_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "growtrain", *TINY, "--run-dir", str(run_dir)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=600) == 0
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "done"


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ("--schedule grow3x --freeze-encoder-at 4 --anchor zero", "--freeze-encoder-at 4"),
        ("--schedule grow3x --freeze-encoder-at 3 --trainable-heads newest", None),
        ("--schedule fixed --anchor mirrored --adaptive-max 5", "--anchor mirrored, --adaptive-max 5"),
        ("--schedule reset --anchor mirrored --intervention inject", "--anchor mirrored, --intervention inject"),
        ("--schedule grow1x --intervention shrink-perturb --shrink-alpha 0.5", None),
        ("--schedule redo --redo-tau 0.1 --redo-period 1M --shrink-alpha 0.5", "--shrink-alpha 0.5"),
        (
            "--optimizer adam --optimizer-decay 0.9 --regularizer-strength 0.1",
            "--optimizer-decay 0.9, --regularizer-strength 0.1",
        ),
        ("--regularizer l2 --regularizer-strength 0.1 --optimizer-decay 0.9", None),
    ],
)
def test_flags_without_effect_are_named(words: str, idle: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--no-timing", *words.split()]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "without effect" in line]
    assert sorted(", ".join(said).removeprefix("without effect in this run: ").split(", ")) == sorted(
        (idle or "").split(", ")
    )


@pytest.mark.filterwarnings("always")
def test_a_warning_is_said_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(words: list[str]) -> int:
        for text in ("one fork", "one fork", "another"):
            warnings.warn(text, stacklevel=1)
        return len(words)

    monkeypatch.setattr("growtrain.commands.doctor.main", warns)
    for _ in range(2):  # a command of its own each
        assert main(["doctor"]) == 0
        assert [line.split(": ")[-1] for line in capsys.readouterr().err.splitlines()] == ["one fork", "another"]


@pytest.mark.parametrize(("ratio", "said"), [("1e-6", 1), ("1e-4", 0)])
def test_a_run_that_would_learn_nothing_is_said(ratio: str, said: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--no-timing", "--total-frames", "200k", "--replay-ratio", ratio]) == 0
    assert capsys.readouterr().out.count("it makes no update in the frames after --learning-starts 4k") == said


def test_doctor_says_what_works_and_why_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok") and " atari " in line for line in lines)
    assert any(line.startswith("missing") and " gpu " in line and "unavailable: " in line for line in lines)


def test_help_answers_at_once() -> None:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "growtrain", "--shedule"], capture_output=True, check=False
    )
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "growtrain", "--help"], capture_output=True, text=True
    )
    assert " torch\n" not in result.stderr, f"--help imports torch ({time.perf_counter() - start:.1f} s)"


@pytest.mark.parametrize("command", ["resume", "inspect", "evaluate", "diagnose", "rescue", "report", "video"])
def test_a_path_that_is_no_run_is_refused_at_once(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "growtrain", command, "nowhere"], capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert [line.startswith("growtrain: nowhere ") and ": name" in line for line in said] == [True]
    assert " torch\n" not in done.stderr  # which takes seconds to load
