"""The values of what is frozen whole, kept in the replay: right at every row that can be read, through growth, wrap-around and resume."""

import dataclasses
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import Tensor, nn

from growtrain.diagnosis.forks import fork_config
from growtrain.diagnosis.page import Settings
from growtrain.diagnosis.rescue import rescue_run
from growtrain.growth.kinds import kind_of
from growtrain.growth.transaction import GrowthFailed
from growtrain.learners.base import Diverged
from growtrain.learners.saved import check_saved, read_saved
from growtrain.networks.injected import trains
from growtrain.planning.costs import make_plan
from growtrain.records import GrowthEvent
from growtrain.runfiles import Unreadable
from growtrain.runs.checkpoint import CheckpointWriter, NoCheckpoint, open_newest
from growtrain.runs.frozen_values import COLUMN, check_saved_column
from growtrain.runs.loop import train
from growtrain.runs.resuming import changed_config
from growtrain.runs.run import Run
from growtrain.settings.config import Config
from growtrain.settings.text import ConfigError

ROUNDING = 1e-6  # a snapshot's output at another batch size differs in the last bits


# The same, in which a step of a lane is one frame, not four.
MINATAR: dict[str, Any] = {
    "game": "minatar/breakout",
    "schedule": "at:300,500,900",
    "total_frames": 1_600,
    "learning_starts": 50,
    "max_episode_frames": 190,
    "target_period": 60,
    "checkpoint_period": 800,
}


def config_of(**changes: Any) -> Config:
    """Breakout loses lives and ends; its episodes are cut short, too, and the ring wraps around."""
    settings: dict[str, Any] = {
        "game": "breakout",
        "schedule": "at:1200,2000,3600",
        "freeze": "network",
        "total_frames": 6_400,
        "num_envs": 4,
        "max_episode_frames": 760,
        "epsilon_end": 0.95,
        "sticky_actions": 0.25,
        "replay_capacity": 400,
        "target_period": 240,
        "checkpoint_period": 3_200,
    }
    return tiny(**settings | changes)


def snapshot_values(run: Run, observations: Tensor) -> Tensor:
    values = run.learner.frozen_value(observations)
    assert values is not None
    return values


def assert_right(run: Run) -> None:
    """What is kept is what the snapshot says, at every row that can be read, and in the batches that are drawn."""
    rows = run.ring.rows_read()
    kept = run.ring.columns[COLUMN].index_select(0, rows)
    torch.testing.assert_close(kept, snapshot_values(run, run.ring.observations(rows)), rtol=0, atol=ROUNDING)
    valid = torch.from_numpy(np.flatnonzero(run.ring.valid))
    batch = run.ring.get(valid)
    for part in (batch, batch["next"]):
        expected = snapshot_values(run, part["observation"].contiguous())
        torch.testing.assert_close(part[COLUMN], expected, rtol=0, atol=ROUNDING)
    newest = run.frozen_values.newest()
    torch.testing.assert_close(newest, snapshot_values(run, run.ring.newest()), rtol=0, atol=ROUNDING)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(config_of(), tmp_path / "run")
    yield run
    run.collector.environment.close(raise_if_closed=False)


def test_kept_values_are_the_snapshot_s_on_real_episodes(run: Run) -> None:
    kinds = {"terminated": 0, "truncated": 0, "life_lost": 0}
    receive = run.collector.environment.recv

    def counted() -> Any:
        step = receive()
        for kind in kinds:
            kinds[kind] += int(getattr(step, kind).sum())
        return step

    run.collector.environment.recv = counted  # type: ignore[method-assign]
    events = []
    while run.frames < run.config.total_frames:
        run.step()
        if run.growing.due():
            events += [record for record in run.growing.grow() if isinstance(record, GrowthEvent)]
            assert_right(run)
        run.learner.end_of_step(run.frames)
        if events and run.frames % 800 < 16:
            assert_right(run)
    assert [event.stage for event in events] == [1, 2, 3]
    assert all(event.max_abs_q_change_online == event.max_abs_q_change_target == 0.0 for event in events)
    # At the first copy of the target at or after its time.
    period = run.config.target_period
    assert [event.frames for event in events] == [-(-time // period) * period for time in (1200, 2000, 3600)]
    assert (run.ring.written > run.ring.rows).all(), "the ring has not wrapped around"
    assert kinds["truncated"] > 0
    assert kinds["life_lost"] > kinds["terminated"] > 0


def final(run_dir: Path) -> tuple[dict[str, Tensor], Tensor]:
    state = open_newest(run_dir).state
    return state["learner"]["online"], state["ring"]["columns"][COLUMN]


@pytest.mark.parametrize(("live_encoder", "changes"), [("warm", {}), ("cold", MINATAR)])
def test_a_run_that_stops_in_a_stage_goes_on_to_the_bit(
    live_encoder: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(live_encoder=live_encoder, **changes)
    list(train(config, tmp_path / "whole"))
    steps = iter(range(10**6))
    # Two injections, one to come.
    list(train(config, tmp_path / "parted", should_stop=lambda: next(steps) == 220))
    start = open_newest(tmp_path / "parted")
    assert 600 < start.frames / config.frame_skip < 900
    resumed = Run(config, tmp_path / "parted", start)
    assert_right(resumed)
    resumed.collector.environment.close()
    list(train(config, tmp_path / "parted", start=open_newest(tmp_path / "parted")))
    (whole, kept), (parted, kept_parted) = final(tmp_path / "whole"), final(tmp_path / "parted")
    assert whole.keys() == parted.keys()
    assert all(torch.equal(tensor, parted[name]) for name, tensor in whole.items())
    assert torch.equal(kept, kept_parted)
    assert sum(name.startswith("snapshot.networks.2.") for name in whole) > 0


def test_a_value_that_is_missing_is_never_learned_from(run: Run) -> None:
    while not run.growing.due():
        run.step()
        run.learner.end_of_step(run.frames)
    list(run.growing.grow())
    before = [p.clone() for p in run.learner.plastic_parts["q_network"][0].parameters()]
    run.ring.columns[COLUMN].fill_(torch.nan)
    batches = run.ring.sample(100 * run.config.batch_size).view(100, run.config.batch_size)
    with pytest.raises(Diverged):
        run.learner.update(batches)
    after = run.learner.plastic_parts["q_network"][0].parameters()
    assert all(map(torch.equal, before, after))


def test_nothing_is_kept_where_nothing_is_frozen_whole(tmp_path: Path) -> None:
    run = Run(config_of(freeze="heads"), tmp_path / "run")
    run.step()
    assert COLUMN not in run.ring.columns
    assert run.frozen_values.newest() is None
    assert not kind_of("inject", run.config).at_target_copy
    run.collector.environment.close()


def test_an_injection_that_is_rolled_back_keeps_nothing(run: Run) -> None:
    while not run.growing.due():
        run.step()
    online, target = run.learner.plastic_parts["q_network"]
    assert target is not None
    with torch.no_grad():
        online.get_submodule("head").get_parameter("live.2.weight")[0, 0] = torch.nan
    run.growing.config = config_of(on_growth_failure="continue")
    with pytest.warns(UserWarning, match="is not finite.*training goes on ungrown"):
        list(run.growing.grow())
    assert COLUMN not in run.ring.columns
    assert run.frozen_values.newest() is None


def play_to_injection(run: Run) -> None:
    while not run.growing.due():
        run.step()
        run.learner.end_of_step(run.frames)


def test_a_sweep_computes_the_newest_network_alone_and_gives_what_all_of_them_do_to_the_bit(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_to_injection(run)
    networks = list[tuple[int, int]]()  # of the forward passes of frozen networks: which, of how many rows
    sweep = run.frozen_values.sweep

    def counted(network: nn.Module, arguments: tuple[Tensor]) -> None:
        frozen = list(run.learner.plastic_parts["q_network"][0].get_submodule("snapshot.networks").children())
        if network in frozen:
            networks.append((frozen.index(network), len(arguments[0])))

    def watched() -> None:
        hook = nn.modules.module.register_module_forward_pre_hook(counted)
        sweep()
        hook.remove()

    monkeypatch.setattr(run.frozen_values, "sweep", watched)
    for stage in range(1, 4):
        run.learner.update(run.ring.sample_batches(4, run.config.batch_size))
        run.learner.copy_target()  # type: ignore[attr-defined]
        networks.clear()
        list(run.growing.grow())
        rows = run.ring.rows_read()
        assert networks == [(stage - 1, 256), (stage - 1, len(rows) - 256)]
        for chunk in rows.split(256):
            assert torch.equal(run.ring.read(COLUMN, chunk), snapshot_values(run, run.ring.observations(chunk)))


@pytest.mark.parametrize("stage", [1, 2])
def test_an_injection_whose_sweep_finds_no_memory_is_rolled_back_and_the_run_goes_on(
    stage: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.growing.config = config_of(on_growth_failure="continue")
    for _ in range(stage - 1):
        play_to_injection(run)
        list(run.growing.grow())
    play_to_injection(run)
    before = run.ring.columns.get(COLUMN, torch.empty(0)).clone()
    online, target = run.learner.plastic_parts["q_network"]
    assert target is not None
    names = list(online.state_dict())
    write, writes = run.ring.write, iter(range(10**6))

    def failing(*arguments: Any) -> None:
        if next(writes):
            raise torch.OutOfMemoryError("out of memory")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("growtrain.runs.frozen_values.ROWS_AT_ONCE", 64)
        patch.setattr(run.ring, "write", failing)
        with pytest.warns(UserWarning, match=r"rolled back: out of memory.*goes on ungrown"):
            list(run.growing.grow())
    assert next(writes) == 2, "the sweep did not fail in the middle"
    assert list(online.state_dict()) == list(target.state_dict()) == names
    if stage == 1:
        assert COLUMN not in run.ring.columns
    else:
        assert torch.equal(run.ring.columns[COLUMN].nan_to_num(7.0), before.nan_to_num(7.0))
        assert_right(run)
    assert (run.growing.entries, run.growing.interventions) == (stage, stage - 1)
    play_to_injection(run)  # and the next one is carried out
    list(run.growing.grow())
    assert_right(run)


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_an_injection_finds_no_memory_for_the_column(policy: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.growing.config = config_of(on_growth_failure=policy, freeze_encoder_at=1)
    play_to_injection(run)

    def no_memory(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("growtrain.replay.ring.mmap.mmap", no_memory)
        if policy == "stop":
            with pytest.raises(GrowthFailed, match="no memory for the frozen network's values"):
                list(run.growing.grow())
            return
        with pytest.warns(UserWarning, match=r"no memory for the frozen network's values.*training goes on ungrown"):
            list(run.growing.grow())
    assert COLUMN not in run.ring.columns
    assert run.frozen_values.newest() is None
    assert not trains(run.learner.networks["q_network"][0].get_submodule("encoder"))
    play_to_injection(run)
    list(run.growing.grow())
    assert_right(run)


def test_every_injection_needs_a_copy_of_the_target_before_the_end() -> None:
    with pytest.raises(ConfigError, match="no copy of the target for every injection"):
        config_of(schedule="at:6000", target_period=3_500)
    assert config_of(schedule="at:6000", target_period=3_500, freeze="heads").growth.num_stages == 2


def test_a_snapshot_that_the_checkpoint_only_claims_is_refused(run: Run) -> None:
    while not run.growing.due():
        run.step()
        run.learner.end_of_step(run.frames)
    list(run.growing.grow())
    state, spec = run.learner.state_dict(), run.learner.spec
    check_saved(state, run.config, spec, 1)
    assert read_saved(state).snapshots == 1
    with pytest.raises(ValueError, match="1 injections in 0"):
        check_saved(state, run.config, spec, 0)
    for width in (10**9, 33):
        with pytest.raises(ValueError, match=r"width|by the tensors"):
            check_saved(state | {"snapshot": [state["snapshot"][0] | {"width": width}]}, run.config, spec, 10**9)


def test_a_fork_of_a_run_that_waits_for_a_copy_of_the_target_injects_at_it_or_drops_it(tmp_path: Path) -> None:
    config = config_of(schedule="at:1300", total_frames=2_400)
    steps = iter(range(10**6))
    list(train(config, tmp_path / "run", should_stop=lambda: next(steps) == 86))
    start = open_newest(tmp_path / "run")
    assert 1_300 < start.frames < 1_440
    assert not start.state["stage"]
    forked, _ = changed_config(start, {"seed": 1}, fork=True)
    events = [record for record in train(forked, tmp_path / "fork", start=start) if isinstance(record, GrowthEvent)]
    assert [event.frames for event in events] == [1_440]
    assert COLUMN in open_newest(tmp_path / "fork").state["ring"]["columns"]

    start = open_newest(tmp_path / "run")
    settings = Settings(seeds=1, frames=400, arms=("untouched", "inject"))
    assert fork_config(start, "untouched", 0, settings).schedule == "fixed"
    assert fork_config(start, "inject", 0, settings).schedule == f"at:{start.frames}"
    rescued, _ = rescue_run(start, {}, 400)
    assert rescued.schedule == f"at:{start.frames}"
    with pytest.raises(ConfigError, match="the past cannot change"):
        changed_config(start, {"schedule": "at:1310"}, fork=True)
    # A copy at the checkpoint itself is over.
    with pytest.raises(ConfigError, match=r"brings no copy of the target.*between 1440 frames and the end at 1640"):
        rescue_run(dataclasses.replace(start, frames=1_440), {}, 200)


@pytest.mark.parametrize(("steps", "frames"), [(10, [160, 0]), (87, [1_392, 0]), (90, [1_440, 0]), (95, [1_440, 80])])
def test_acting_is_counted_as_it_was_done(steps: int, frames: list[int], tmp_path: Path) -> None:
    """Nothing while all is random, a sweep where there was one, of the rows there: the injection waits for a copy of the target."""
    config = config_of(schedule="at:1300", total_frames=3_200)
    taken = iter(range(10**6))
    run = Run(config, tmp_path / "unused")
    plan = make_plan(config, run.collector.environment.spec)
    run.collector.environment.close(raise_if_closed=False)
    list(train(config, tmp_path / "run", should_stop=lambda: next(taken) == steps))
    stages = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
    assert [stage["frames"] for stage in stages] == frames
    before, after = plan.stages
    assert [stage["flops_of_acting"] for stage in stages] == [
        before.flops_per_action * max(0, frames[0] - config.learning_starts) // 4,
        after.flops_per_action * frames[1] // 4 + (before.flops_per_action * 1_440 // 4 if steps >= 90 else 0),
    ]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one injection whose replay is not full."""
    run_dir = tmp_path_factory.mktemp("grown") / "run"
    config = config_of(schedule="at:480", total_frames=640, learning_starts=160, replay_capacity=400)
    list(train(config, run_dir))
    return run_dir


@pytest.mark.parametrize(("capacity", "changes"), [(400, MINATAR), (80, {"total_frames": 6_400})])
def test_a_fork_with_another_seed_that_ends_before_it_plays_goes_on_to_the_bit(
    capacity: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    """It is saved when its episodes have begun and nothing has been done there: in a ring that is full their rows held other values."""
    total = changes["total_frames"] // 10
    times = {"schedule": f"at:{total * 3 // 4}", "total_frames": total, "learning_starts": total // 4}
    config = config_of(**changes | times | {"replay_capacity": capacity})
    list(train(config, tmp_path / "run"))
    forked, _ = changed_config(open_newest(tmp_path / "run"), {"seed": 1, "total_frames": total * 3 // 2}, fork=True)
    list(train(forked, tmp_path / "whole", start=open_newest(tmp_path / "run")))
    parted = tmp_path / "parted"
    list(train(forked, parted, should_stop=lambda: True, start=open_newest(tmp_path / "run")))
    resumed = Run(forked, parted, open_newest(parted))
    assert resumed.frames == total
    assert_right(resumed)
    resumed.collector.environment.close(raise_if_closed=False)
    list(train(forked, parted, start=open_newest(parted)))
    (whole, kept), (other, kept_other) = final(tmp_path / "whole"), final(parted)
    assert all(torch.equal(tensor, other[name]) for name, tensor in whole.items())
    torch.testing.assert_close(kept_other, kept, rtol=0, atol=0, equal_nan=True)


def test_a_ring_that_is_loaded_lacks_what_the_saved_one_had_not_reached(grown: Path) -> None:
    start = open_newest(grown)
    run = Run(start.config, grown, start)
    run.collector.environment.close()
    missing = run.ring.columns[COLUMN].isnan().all(1).view(run.ring.num_lanes, run.ring.rows)
    filled = run.ring.state_dict()["filled"]
    assert 0 < filled < run.ring.rows
    assert missing[:, filled:].all()
    assert not missing[:, :filled].all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda ring, _: ring.update(columns={}), "columns none where 1 frozen"),
        (lambda ring, _: ring["columns"].update({COLUMN: ring["columns"][COLUMN].double()}), "torch.float64"),
        (lambda ring, _: ring["columns"].update({COLUMN: ring["columns"][COLUMN][..., :-1]}), "need"),
        (lambda ring, _: ring["columns"].update({COLUMN: ring["columns"][COLUMN][:, :-1]}), "need"),
        (lambda ring, _: ring["columns"].update(other=ring["columns"][COLUMN]), "other"),
        (lambda _, snapshots: snapshots.clear(), "where 0 frozen networks need none"),
    ],
)
def test_a_column_that_is_not_the_one_the_networks_need_is_refused_in_one_line(
    change: Any, says: str, grown: Path
) -> None:
    start = open_newest(grown)
    change(start.state["ring"], start.state["learner"]["snapshot"])
    with pytest.raises(ValueError, match=says) as refusal:
        check_saved_column(start.state)
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_whose_column_is_missing_is_passed_over_and_one_with_a_missing_value_refused(
    grown: Path, tmp_path: Path
) -> None:
    start = open_newest(grown)
    start.state["ring"]["columns"][COLUMN][:, 20] = torch.nan
    with pytest.raises(Unreadable, match="values of 4 rows are missing"):
        Run(start.config, tmp_path / "fork", start)
    start = open_newest(grown)
    ring = Run(start.config, grown, open_newest(grown)).ring
    start.state["ring"]["columns"] = {}
    CheckpointWriter(tmp_path / "run", keep=0).save(
        start.state, ring, start.config, frames=start.frames, device=torch.device("cpu")
    )
    with pytest.raises(NoCheckpoint, match="columns none where 1 frozen"):
        open_newest(tmp_path / "run")
