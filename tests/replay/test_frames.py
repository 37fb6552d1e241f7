"""The frame ring against naive stacking, against ALE's own stacks, and against the uniform distribution."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ale_py import AtariVectorEnv
from scipy import stats
from tensordict import TensorDict
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from growtrain.replay.buffer import ring_replay
from growtrain.replay.frames import FrameRing, replay_bytes
from growtrain.replay.ring import Column, rows_per_lane

FRAME_SHAPE = (2, 2, 5)  # channels, height, width
Step = dict[str, npt.NDArray[Any]]


def make_ring(capacity: int = 24, num_lanes: int = 1, seed: int = 0, **options: Any) -> FrameRing:
    options = {"frame_shape": FRAME_SHAPE, "stack_size": 4} | options
    return FrameRing(capacity, num_lanes, rng=np.random.default_rng(seed), **options)


class Stream:
    """Random steps of `num_lanes` environments; no two frames are alike and none is zero."""

    def __init__(self, num_lanes: int, seed: int, p_terminated: float = 0.1) -> None:
        self.num_lanes, self.p_terminated = num_lanes, p_terminated
        self.rng = np.random.default_rng(seed)
        self.count = 0

    def frames(self) -> npt.NDArray[np.uint8]:
        out = np.full((self.num_lanes, *FRAME_SHAPE), 255, np.uint8)
        for frame in out:
            self.count += 1
            frame.reshape(-1)[:8] = np.frombuffer(np.int64(self.count).tobytes(), np.uint8)
        return out

    def step(self) -> Step:
        draw = self.rng.random((3, self.num_lanes))
        over, cut, life_lost = draw[0] < self.p_terminated, draw[1] < 0.05, draw[2] < 0.1
        return {
            "action": self.rng.integers(0, 18, self.num_lanes),
            "reward": self.rng.normal(size=self.num_lanes).astype(np.float32),
            "terminated": over | life_lost,  # the episode goes on after the loss of a life
            "frame": self.frames(),
            "started": over | cut,
            "first_frame": self.frames(),
        }


class NaiveReplay:
    """Every transition ever, with full stacks; which ones a ring of `rows` rows must still hold."""

    def __init__(self, num_lanes: int, rows: int, stack_size: int) -> None:
        self.rows, self.stack_size = rows, stack_size
        self.lanes = range(num_lanes)
        self.episode: list[list[npt.NDArray[np.uint8]]] = [[] for _ in self.lanes]
        self.written = [0] * num_lanes
        self.transitions: list[dict[int, tuple[Any, ...]]] = [{} for _ in self.lanes]

    def stack(self, lane: int) -> npt.NDArray[np.uint8]:
        padding = [np.zeros(FRAME_SHAPE, np.uint8)] * self.stack_size
        return np.concatenate((padding + self.episode[lane])[-self.stack_size :])

    def start(self, frames: npt.NDArray[np.uint8]) -> None:
        for lane in self.lanes:
            self.begin(lane, frames[lane])

    def begin(self, lane: int, frame: npt.NDArray[np.uint8]) -> None:
        self.episode[lane] = [frame]
        self.written[lane] += 1

    def extend(self, step: Step) -> None:
        for lane in self.lanes:
            observation, oldest = self.stack(lane), max(0, len(self.episode[lane]) - self.stack_size)
            history = len(self.episode[lane]) - 1 - oldest
            self.episode[lane].append(step["frame"][lane])
            number = self.written[lane] - 1
            outcome = (step["action"][lane], step["reward"][lane], step["terminated"][lane])
            self.transitions[lane][number] = (number - history, observation, *outcome, self.stack(lane))
            self.written[lane] += 1
            if step["started"][lane]:
                self.begin(lane, step["first_frame"][lane])

    def expected(self) -> dict[int, tuple[Any, ...]]:
        """Flat row -> transition, for those of which no frame has been overwritten."""
        return {
            lane * self.rows + number % self.rows: transition[1:]
            for lane in self.lanes
            for number, transition in self.transitions[lane].items()
            if transition[0] >= self.written[lane] - self.rows
        }


def assert_equal_to_naive(ring: FrameRing, naive: NaiveReplay) -> None:
    ring.check_valid()
    np.testing.assert_array_equal(ring.newest().numpy(), np.stack([naive.stack(lane) for lane in naive.lanes]))
    expected = naive.expected()
    flat = np.flatnonzero(ring.valid)
    assert flat.tolist() == sorted(expected)
    assert len(ring) == len(expected)
    if not expected:
        return
    batch = ring.get(torch.from_numpy(flat))
    for i, row in enumerate(flat.tolist()):
        observation, action, reward, terminated, next_observation = expected[row]
        np.testing.assert_array_equal(batch["observation"][i].numpy(), observation)
        np.testing.assert_array_equal(batch["next", "observation"][i].numpy(), next_observation)
        assert batch["action"][i].item() == action
        assert batch["next", "reward"][i].item() == reward
        assert batch["next", "terminated"][i].item() == terminated


def run(ring: FrameRing, steps: int, seed: int = 0, p_terminated: float = 0.1) -> Stream:
    stream = Stream(ring.num_lanes, seed, p_terminated)
    ring.start(stream.frames())
    for _ in range(steps):
        ring.extend(**stream.step())
    return stream


@pytest.mark.parametrize(
    ("num_lanes", "capacity", "stack_size", "p_terminated"),
    [
        (1, 1, 4, 0.1),
        (1, 1, 4, 0.6),
        (1, 30, 4, 0.1),
        (8, 8, 4, 0.3),
        (8, 100, 4, 0.05),
        (2, 9, 1, 0.2),
        (3, 3, 2, 0.2),
    ],
)
def test_the_ring_holds_exactly_what_naive_stacking_says(
    num_lanes: int, capacity: int, stack_size: int, p_terminated: float
) -> None:
    ring = make_ring(capacity, num_lanes, stack_size=stack_size)
    naive = NaiveReplay(num_lanes, ring.rows, stack_size)
    stream = Stream(num_lanes, seed=capacity, p_terminated=p_terminated)
    first = stream.frames()
    ring.start(first)
    naive.start(first)
    for _ in range(150):
        assert_equal_to_naive(ring, naive)
        step = stream.step()
        ring.extend(**step)
        naive.extend(step)
    assert min(naive.written) > 3 * ring.rows  # it has wrapped, many times


def test_a_restart_drops_the_open_transition_and_nothing_else() -> None:
    ring, stream = make_ring(20, 2), Stream(2, seed=1)
    naive = NaiveReplay(2, ring.rows, 4)
    for _ in range(9):
        first = stream.frames()
        ring.start(first)
        naive.start(first)
        assert_equal_to_naive(ring, naive)
        for _ in range(4):
            step = stream.step()
            ring.extend(**step)
            naive.extend(step)
            assert_equal_to_naive(ring, naive)


def test_a_lost_life_does_not_break_the_stack_and_a_cut_episode_does_not_terminate() -> None:
    ring, stream = make_ring(24, 1), Stream(1, seed=0)
    ring.start(stream.frames())
    quiet = {"terminated": np.array([False]), "started": np.array([False])}
    rows = [
        ring.extend(**(stream.step() | quiet | change)).item()
        for change in ({}, {"terminated": np.array([True])}, {}, {"started": np.array([True])}, {})
    ]
    batch = ring.get(torch.tensor(rows))
    assert batch["next", "terminated"].flatten().tolist() == [False, True, False, False, False]
    padding = (batch["observation"].unflatten(1, (4, -1)).flatten(2) == 0).all(-1).sum(1)
    assert padding.tolist() == [3, 2, 1, 0, 3]
    assert ring.valid.sum() == 5  # the cut episode's last row is not among them
    assert not ring.contains(rows[3] + 1)


@pytest.mark.parametrize("num_lanes", [1, 3, 8])
def test_capacity_fits_when_no_episode_ends(num_lanes: int) -> None:
    ring = make_ring(50, num_lanes)
    stream = Stream(num_lanes, seed=0)
    ring.start(stream.frames())
    for _ in range(200):
        ring.extend(**(stream.step() | {"started": np.zeros(num_lanes, bool)}))
    assert len(ring) == ring.max_size == -(-50 // num_lanes) * num_lanes


def test_stacks_equal_those_of_the_emulator() -> None:
    num_lanes, steps = 2, 130
    env = AtariVectorEnv(
        "breakout", num_lanes, num_threads=1, noop_max=5, use_fire_reset=False, max_num_frames_per_episode=160
    )
    ring = FrameRing(60, num_lanes, rng=np.random.default_rng(0), frame_shape=(1, 84, 84), stack_size=4)
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=np.array([3, 4]))
    ring.start(observation[:, -1:])
    truth: dict[int, tuple[Any, ...]] = {}
    compared = padded = episodes = 0
    for t in range(steps):
        action = rng.integers(0, 4, num_lanes)
        following, reward, terminated, truncated, _ = env.step(action)
        ended = terminated | truncated
        first = following
        if ended.any():
            episodes += int(ended.sum())
            first, _ = env.reset(seed=rng.integers(0, 1000, ended.sum()), options={"reset_mask": ended})
        flat = ring.extend(
            action=action,
            reward=reward,
            terminated=terminated,
            frame=following[:, -1:],
            started=ended,
            first_frame=first[:, -1:],
        )
        for lane, row in enumerate(flat.tolist()):
            truth[row] = (observation[lane], action[lane], following[lane])
        observation = np.where(ended[:, None, None, None], first, following)
        np.testing.assert_array_equal(ring.newest().numpy(), observation)
        if t % 10 == 9:
            ring.check_valid()
            rows = np.flatnonzero(ring.valid).tolist()
            transitions = ring.gather(torch.tensor(rows))
            for i, row in enumerate(rows):
                before, done, after = truth[row]
                np.testing.assert_array_equal(transitions.observation[i].numpy(), before)
                np.testing.assert_array_equal(transitions.next_observation[i].numpy(), after)
                assert transitions.action[i] == done
                compared += 1
                padded += not before[0].any()
    env.close()
    assert compared > 500
    assert padded > 10
    assert episodes >= 4
    assert steps > 3 * ring.rows


@pytest.mark.parametrize("call", [1, 32, 16_000])
@pytest.mark.parametrize("steps", [12, 400], ids=["filling", "wrapped"])
def test_sampling_is_uniform_whatever_the_size_of_a_call(steps: int, call: int) -> None:
    ring = make_ring(100, 4)
    run(ring, steps, p_terminated=0.3)
    assert len(ring) < 0.9 * ring.valid.size  # there is something to reject
    calls = [ring.sample_indices(call).numpy() for _ in range(16_000 // call)]
    for drawn in (np.concatenate(calls), np.concatenate([each[-1:] for each in calls])):
        counts = np.bincount(drawn, minlength=ring.valid.size)
        assert counts[~ring.valid].sum() == 0
        if drawn.size >= 400:
            assert stats.chisquare(counts[ring.valid]).pvalue > 1e-3


def test_draws_within_a_call_are_independent() -> None:
    ring = make_ring(8, 1)
    run(ring, 8, p_terminated=0.3)
    drawn = ring.sample_indices(20_000).numpy().reshape(-1, 2)
    _, codes = np.unique(drawn, return_inverse=True)
    table = np.zeros((len(ring), len(ring)))
    np.add.at(table, tuple(codes.reshape(-1, 2).T), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_batch_has_the_layout_of_torchrl() -> None:
    replay = ring_replay(make_ring(50, 2), batch_size=7)
    ring, stream = replay.storage, Stream(2, seed=0)
    naive = NaiveReplay(2, ring.rows, 4)
    first = stream.frames()
    ring.start(torch.from_numpy(first))
    naive.start(first)
    for _ in range(80):
        step = stream.step()
        naive.extend(step)
        fields: dict[str, Any] = {key: torch.as_tensor(values) for key, values in step.items()}
        fields["reward"] = fields["reward"][:, None]  # TorchRL's environments give (N, 1)
        replay.extend(TensorDict(fields, batch_size=[2]))
    assert_equal_to_naive(ring, naive)
    assert replay.write_count == 160

    batch, info = replay.sample(return_info=True)
    n, stacked = 7, (7, 4 * FRAME_SHAPE[0], *FRAME_SHAPE[1:])
    layout = {key: (tuple(batch[key].shape), batch[key].dtype) for key in batch.keys(True, True)}
    assert layout == {
        "observation": (stacked, torch.uint8),
        "action": ((n,), torch.int64),
        ("next", "observation"): (stacked, torch.uint8),
        ("next", "reward"): ((n, 1), torch.float32),
        ("next", "done"): ((n, 1), torch.bool),
        ("next", "terminated"): ((n, 1), torch.bool),
    }
    expected = naive.expected()
    for i, row in enumerate(info["index"].tolist()):
        np.testing.assert_array_equal(batch["observation"][i].numpy(), expected[row][0])
        np.testing.assert_array_equal(batch["next", "observation"][i].numpy(), expected[row][-1])
    # One gather serves both stacks.
    assert (
        batch["observation"].untyped_storage().data_ptr() == batch["next"]["observation"].untyped_storage().data_ptr()
    )

    replay.empty()
    ring.check_valid()
    assert len(replay) == 0
    assert not replay.can_sample(1)


def test_gathering_has_static_shapes_and_reads_no_value() -> None:
    ring = make_ring(50, 2)
    run(ring, 60)
    flat = ring.sample_indices(9)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # raises on anything that depends on data
        transitions = ring.gather(fake.from_tensor(flat))
    assert transitions.frames.shape == (9, 5, *FRAME_SHAPE)


@pytest.mark.parametrize("num_lanes", [1, 8, 64])
def test_a_million_transitions_take_seven_gigabytes(num_lanes: int) -> None:
    planned = replay_bytes(1_000_000, num_lanes, frame_shape=(1, 84, 84), stack_size=4)
    frames = num_lanes * rows_per_lane(1_000_000, num_lanes, 4) * 84 * 84
    assert 7.056e9 < frames < planned < 7.2e9


@pytest.mark.parametrize(("capacity", "num_lanes", "stack_size"), [(1, 1, 1), (100, 8, 4), (33, 5, 2)])
def test_planned_memory_is_what_is_allocated(capacity: int, num_lanes: int, stack_size: int) -> None:
    ring = make_ring(capacity, num_lanes, stack_size=stack_size)
    assert ring.nbytes == replay_bytes(capacity, num_lanes, frame_shape=FRAME_SHAPE, stack_size=stack_size)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_memory_is_committed_only_as_it_fills() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    ring = FrameRing(100_000, 8, rng=np.random.default_rng(0), frame_shape=(1, 84, 84), stack_size=4)
    assert ring.nbytes > 7e8
    assert resident() - before < 5e7


@pytest.mark.parametrize("steps", [0, 5, 200])
def test_a_restored_ring_goes_on_identically(steps: int) -> None:
    ring, other = make_ring(40, 3), make_ring(40, 3, seed=9)
    stream = run(ring, steps)
    run(other, 70, seed=7)  # what it held before must leave no trace
    if steps:
        ring.sample_indices(5)
    file = io.BytesIO()
    torch.save(ring_replay(ring).state_dict(), file)
    file.seek(0)
    ring_replay(other).load_state_dict(torch.load(file, weights_only=True))
    other.check_valid()
    assert len(other) == len(ring)
    for _ in range(60):
        step = stream.step()
        ring.extend(**step)
        other.extend(**step)
        batch, same = ring.sample(8), other.sample(8)
        assert (batch == same).all()
        np.testing.assert_array_equal(ring.valid, other.valid)


def test_the_state_of_a_ring_that_fills_leaves_out_what_was_never_written() -> None:
    ring = make_ring(1000, 2)
    run(ring, 10, p_terminated=0.0)
    state = ring.state_dict()
    assert state["frames"].shape[1] == state["filled"] < 20


@pytest.mark.parametrize("options", [{"capacity": 41}, {"num_lanes": 2}, {"stack_size": 3}, {"frame_shape": (5, 2)}])
def test_a_state_of_other_sizes_is_refused(options: dict[str, Any]) -> None:
    ring = make_ring(**({"capacity": 40, "num_lanes": 1} | options))
    with pytest.raises(ValueError, match="match the config"):
        ring.load_state_dict(make_ring(40, 1).state_dict())


def test_extend_refuses_bad_steps_and_stays_whole() -> None:
    ring, stream = make_ring(20, 2), Stream(2, seed=0)
    with pytest.raises(RuntimeError, match="start"):
        ring.extend(**stream.step())
    with pytest.raises(ValueError, match="complete"):
        ring.sample_indices(1)
    ring.start(stream.frames())
    with pytest.raises(ValueError, match="complete"):
        ring.sample(1)
    ring.extend(**stream.step())
    before = ring.valid.copy()
    step = stream.step() | {"started": np.array([True, False])}
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "frame must be uint8", {"frame": step["frame"].astype(np.float32)}),
        (ValueError, "frame must be", {"frame": step["frame"][:1]}),
        (ValueError, "first_frame must be", {"first_frame": step["frame"][:, :1]}),
        (ValueError, "pass first_frame", {"first_frame": None}),
        (ValueError, "reshape", {"action": np.zeros(3, np.int64)}),
        (ValueError, "reshape", {"reward": np.zeros((2, 2))}),
        (ValueError, "reshape", {"started": np.zeros(1, bool)}),
    ]
    for error, message, change in bad:
        with pytest.raises(error, match=message):
            ring.extend(**(step | change))
        np.testing.assert_array_equal(ring.valid, before)
        ring.check_valid()
    ring.extend(**step)
    assert len(ring) == 4


def test_what_makes_no_sense_says_so() -> None:
    ring = make_ring(20, 2)
    run(ring, 5, p_terminated=0.0)
    replay = ring_replay(ring)
    with pytest.raises(ValueError, match="at least 1"):
        ring.sample_indices(0)
    with pytest.raises(IndexError, match="no complete transition"):
        ring.get(torch.tensor([ring.rows - 1]))
    with pytest.raises(TypeError, match="flat rows"):
        ring.get(3)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="not by index"):
        replay[0] = TensorDict()
    with pytest.raises(NotImplementedError, match="all lanes at once"):
        replay.add(TensorDict())
    for part in (ring, replay.sampler, replay.writer):
        for action in (part.dumps, part.loads):
            with pytest.raises(NotImplementedError, match="state_dict"):
                action("somewhere")
    with pytest.raises(TypeError, match="PCG64"):
        FrameRing(10, 1, rng=np.random.Generator(np.random.MT19937(0)), frame_shape=(1, 8, 8), stack_size=4)
    for arguments in ((0, 1, 4), (1, 0, 4), (1, 1, 0), (1, 1, 256)):
        with pytest.raises(ValueError, match=r"at least 1|1\.\.255"):
            rows_per_lane(*arguments)


def test_check_valid_notices_corruption() -> None:
    def newest(ring: FrameRing) -> None:
        ring.valid[ring.sample_indices(1)] = False
        ring.valid[ring._cursor[0]] = True

    def oldest(ring: FrameRing) -> None:
        ring.valid[ring.sample_indices(1)] = False
        ring.valid[(ring._cursor[0] + 1) % ring.rows] = True

    def count(ring: FrameRing) -> None:
        ring._num_valid += 1

    def padding(ring: FrameRing) -> None:
        ring._frames[-1, 0] = 1

    def age(ring: FrameRing) -> None:
        ring._age[ring.sample_indices(1)] -= 1

    def age_on_device(ring: FrameRing) -> None:
        ring._transitions[ring.sample_indices(1), 3] += 1

    corruptions = {
        newest: "newest row",
        oldest: "overwritten",
        count: "count",
        padding: "zero row",
        age: "leaves its episode|mixes episodes",
        age_on_device: "differ",
    }
    for corrupt, message in corruptions.items():
        ring = make_ring(30, 1)
        run(ring, 100, p_terminated=0.0)
        ring.check_valid()
        corrupt(ring)
        with pytest.raises(AssertionError, match=message):
            ring.check_valid()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_on_a_gpu_it_equals_the_cpu_without_a_sync_and_inside_a_graph() -> None:
    ring, reference = make_ring(60, 4, device="cuda"), make_ring(60, 4)
    stream = Stream(4, seed=0)
    first = stream.frames()
    ring.start(first)
    reference.start(first)
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(100):
            step = stream.step()
            ring.extend(**step)
            reference.extend(**step)
        batch, newest = ring.sample(32), ring.newest()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(newest.cpu(), reference.newest())
    assert (batch.cpu() == reference.sample(32)).all()
    ring.check_valid()

    flat = ring.sample_indices(32).cuda()
    graph = torch.cuda.CUDAGraph()
    ring.gather(flat)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = ring.gather(flat)
    for _ in range(3):
        indices = ring.sample_indices(32)
        flat.copy_(indices)
        graph.replay()
        for mine, theirs in zip(captured, reference.gather(indices), strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0)


A_VALUES = Column((3,), torch.float32)


def frozen(observations: torch.Tensor) -> torch.Tensor:
    """A fixed function of an observation: (n, C, H, W) -> (n, 3) float32, different for different ones."""
    flat = observations.flatten(1).float()
    weights = torch.sin(torch.arange(3 * flat.shape[1]).float()).view(-1, 3)
    return flat @ weights


def sweep(ring: FrameRing) -> None:
    for rows in ring.rows_read().split(7):
        ring.write("values", rows, frozen(ring.observations(rows)))


@pytest.mark.parametrize(
    ("capacity", "stack_size", "p_terminated"), [(40, 4, 0.2), (2, 1, 0.5), (2, 4, 0.5), (60, 2, 0.0)]
)
def test_a_column_holds_a_function_of_every_observation(capacity: int, stack_size: int, p_terminated: float) -> None:
    """Filled in one sweep in the middle, then as rows come: what a batch gathers is the function of its own s and s'."""
    ring = make_ring(capacity, 2, stack_size=stack_size)
    stream = run(ring, 33, p_terminated=p_terminated)
    ring.add_column("values", Column((3,), torch.float32))
    sweep(ring)
    for _ in range(80):
        assert torch.allclose(ring.read("values", ring.newest_rows()), frozen(ring.newest()))
        valid = torch.from_numpy(np.flatnonzero(ring.valid))
        batch = ring.get(valid)
        assert torch.allclose(batch["values"], frozen(batch["observation"]))
        assert torch.allclose(batch["next", "values"], frozen(batch["next", "observation"]))
        arrived = ring.following(ring.extend(**stream.step()))
        for rows in (arrived, ring.newest_rows()):  # an ended episode's last frame, and what the policy sees next
            ring.write("values", rows, frozen(ring.observations(rows)))
    ring.drop_column("values")
    assert "values" not in ring.get(torch.from_numpy(np.flatnonzero(ring.valid)))


def test_a_column_is_saved_and_restored_with_the_ring() -> None:
    ring, other = make_ring(40, 3), make_ring(40, 3, seed=9)
    run(ring, 50)
    run(other, 70, seed=7)
    other.add_column("left over", A_VALUES)
    ring.add_column("values", A_VALUES)
    sweep(ring)
    file = io.BytesIO()
    torch.save(ring_replay(ring).state_dict(), file)
    file.seek(0)
    ring_replay(other).load_state_dict(torch.load(file, weights_only=True))
    assert list(other.added) == ["values"]
    for _ in range(3):
        batch, same = ring.sample(8), other.sample(8)
        assert (batch == same).all()
        assert torch.allclose(same["next", "values"], frozen(same["next", "observation"]))


def test_a_state_of_other_sizes_is_refused_and_changes_nothing() -> None:
    ring = make_ring(40, 3)
    run(ring, 50)
    before = ring.sample_indices(5), ring.state_dict()["rng"]
    ring.add_column("values", A_VALUES)
    state = ring.state_dict()
    for wrong in (
        make_ring(41 + 3, 3).state_dict(),
        make_ring(40, 3, stack_size=3).state_dict(),
        state | {"columns": {"values": state["columns"]["values"][:, :-1]}},
        make_ring(40, 3, frame_shape=(1, 2, 5)).state_dict(),
    ):
        with pytest.raises(ValueError, match="match the config"):
            ring.load_state_dict(wrong)
    assert ring.state_dict()["rng"] == before[1]
    ring.check_valid()


def test_a_column_costs_one_more_kernel_and_none_where_there_is_none() -> None:
    def operators(ring: FrameRing) -> list[str]:
        flat = torch.from_numpy(np.flatnonzero(ring.valid)[:8])
        with Operators() as seen:
            ring.gather(flat)
        return [name for name in seen.names if "index_select" in name]

    ring = make_ring(40, 2)
    run(ring, 50)
    assert len(operators(ring)) == 2  # transitions, frames
    ring.add_column("values", A_VALUES)
    assert len(operators(ring)) == 3


class Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frame_shape", [(1, 2, 4), (4, 10, 10), (1, 1, 7)])
def test_a_batch_has_the_ring_s_pixels_whether_or_not_they_fill_words(frame_shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    ring = FrameRing(40, 2, rng=rng, frame_shape=frame_shape, stack_size=2)
    ring.start(rng.integers(0, 256, (2, *frame_shape), dtype=np.uint8))
    for _ in range(30):
        ring.extend(
            action=np.zeros(2, np.int64),
            reward=np.zeros(2, np.float32),
            terminated=np.zeros(2, np.bool_),
            frame=rng.integers(0, 256, (2, *frame_shape), dtype=np.uint8),
            started=np.zeros(2, np.bool_),
            first_frame=np.zeros((2, *frame_shape), np.uint8),
        )
    rows = ring.sample_indices(16)
    assert torch.equal(ring.gather(rows).observation, ring.observations(rows))
