"""The ledger: every transition, leases that are lost and found, many drivers at once, and files that are no ledger."""

import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from growtrain.sweep.cells import Cell
from growtrain.sweep.ledger import Ledger, LedgerError


def cells(count: int) -> list[Cell]:
    return [
        Cell(game="pong", schedule="fixed", seed=seed, fingerprint="f", words=("--seed", str(seed)), run_dir=f"runs/{seed}",
             total_frames=1000)
        for seed in range(count)
    ]  # fmt: skip


def claim(ledger: Ledger) -> Cell | None:
    return ledger.claim([cell.id for cell in ledger.cells()], lambda cell: True)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path, create=True) as opened:
        yield opened
        opened.check_valid()


@pytest.fixture
def other(ledger: Ledger) -> Iterator[Ledger]:
    """Another driver on the same ledger, on another machine."""
    with Ledger(ledger.directory) as opened:
        opened.host = "elsewhere"
        yield opened


def test_submitting_again_adds_only_what_is_new(ledger: Ledger) -> None:
    ids = ledger.submit(cells(3))
    claim(ledger)
    ledger.done(ids[0])
    assert ledger.submit(cells(4))[:3] == ids
    assert [cell.status for cell in ledger.cells()] == ["done", "pending", "pending", "pending"]
    assert ledger.cells(ids[2:])[0].words == ("--seed", "2")


def test_a_seed_may_be_any_integer(ledger: Ledger) -> None:
    (cell,) = cells(1)
    for seed in (2**70, -(2**70)):
        ledger.submit([Cell(**vars(cell) | {"seed": seed, "run_dir": f"runs/{seed}"})])
    assert [cell.seed for cell in ledger.cells()] == [2**70, -(2**70)]


def test_a_life_of_a_cell(ledger: Ledger) -> None:
    (id,) = ledger.submit(cells(1))
    claimed = claim(ledger)
    assert claimed is not None
    assert (claimed.status, claimed.attempts, claimed.pid, claimed.host) == ("running", 1, os.getpid(), ledger.host)
    assert claim(ledger) is None
    assert ledger.beat({id: 300}) == {id}
    assert ledger.cells()[0].frames == 300
    ledger.release(id, 400)
    (cell,) = ledger.cells()
    assert (cell.status, cell.attempts, cell.frames, cell.token) == ("pending", 0, 400, None)
    for attempt in (1, 2):
        claim(ledger)
        ledger.fail(id, f"exit code 1: {attempt}", 500, max_attempts=2)
    (cell,) = ledger.cells()
    assert (cell.status, cell.attempts, cell.last_error) == ("failed", 2, "exit code 1: 2")
    assert claim(ledger) is None
    ledger.retry([id])
    claim(ledger)
    ledger.done(id)
    (cell,) = ledger.cells()
    assert (cell.status, cell.attempts, cell.frames, cell.last_error) == ("done", 1, 1000, "")


def test_cells_that_failed_come_last_and_locked_ones_not_at_all(ledger: Ledger) -> None:
    ids = ledger.submit(cells(3))
    claim(ledger)
    ledger.fail(ids[0], "x", 0, max_attempts=3)
    taken = [ledger.claim(ids, lambda cell: cell.seed != 1) for _ in range(3)]
    assert [cell.seed if cell else None for cell in taken] == [2, 0, None]


def test_a_driver_that_lives_keeps_its_cells(ledger: Ledger, other: Ledger) -> None:
    ledger.submit(cells(1))
    claim(ledger)
    assert other.reclaim(3) == []
    other.host = ledger.host
    other.pid = -1  # another process of this host
    assert other.reclaim(3) == []


def test_a_lease_that_ran_out_is_taken_back_and_its_driver_has_no_say_any_more(ledger: Ledger, other: Ledger) -> None:
    (id,) = ledger.submit(cells(1))
    ledger.lease_seconds = -1.0
    claim(ledger)
    assert [cell.id for cell in other.reclaim(3)] == [id]
    assert claim(other) is not None
    ledger.lease_seconds = 300.0
    assert ledger.beat({id: 700}) == set()  # so it knows
    ledger.done(id)
    ledger.fail(id, "late", 700, 1)
    ledger.release(id, 700)
    (cell,) = ledger.cells()
    assert (cell.status, cell.host, cell.frames, cell.attempts) == ("running", "elsewhere", 0, 2)
    assert other.beat({id: 10}) == {id}


def test_a_dead_driver_of_this_host_is_seen_at_once(ledger: Ledger) -> None:
    ledger.submit(cells(2))
    with subprocess.Popen(["true"]) as process:
        while not _is_zombie(process.pid):
            time.sleep(0.01)
        ledger.pid = process.pid  # a zombie: dead, but not gone
        claim(ledger)
        with Ledger(ledger.directory) as other:
            assert len(other.reclaim(9)) == 1
    claim(ledger)
    with Ledger(ledger.directory) as other:
        (lost,) = other.reclaim(9)
        assert lost.last_error == f"its driver, process {ledger.pid} on {ledger.host}, is gone"
    ledger.pid = os.getpid()
    claim(ledger)
    with Ledger(ledger.directory) as other:  # our own process id from before a restart
        assert len(other.reclaim(9)) == 1
    assert {cell.status for cell in ledger.cells()} == {"pending"}


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_lost_drivers_use_up_attempts(ledger: Ledger, other: Ledger) -> None:
    ledger.submit(cells(1))
    ledger.lease_seconds = -1.0
    for _ in range(2):
        assert claim(ledger) is not None
        other.reclaim(2)
    (cell,) = ledger.cells()
    assert cell.status == "failed"
    assert cell.last_error == f"its driver, process {os.getpid()} on {ledger.host}, has been silent for 0s"


def test_files_overrule_the_ledger_except_for_what_runs(ledger: Ledger) -> None:
    ids = ledger.submit(cells(4))
    for _ in range(3):
        claim(ledger)
    ledger.done(ids[0])
    ledger.fail(ids[1], "x", 0, max_attempts=1)
    ledger.reconcile(ids, lambda cell: cell.seed != 0)
    assert [cell.status for cell in ledger.cells()] == ["pending", "done", "running", "done"]


CLAIM_ALL = """
import sys, time
from pathlib import Path
from growtrain.sweep.ledger import Ledger
with Ledger(Path(sys.argv[1]), create=True) as ledger:
    print("ready", flush=True)
    sys.stdin.readline()
    ids = range(1, 1000)
    while cell := ledger.claim(ids, lambda cell: time.sleep(0.01) is None):  # in the transaction: the others are there, too
        ledger.beat({cell.id: 5})
        ledger.done(cell.id)
        print(cell.id)
"""


def test_many_drivers_at_once_run_every_cell_once(ledger: Ledger) -> None:
    ids = ledger.submit(cells(24))
    words = [sys.executable, "-c", CLAIM_ALL, str(ledger.directory)]
    pipe = subprocess.PIPE
    drivers = [subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    for driver in drivers:  # a race has a starting line
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
    for driver in drivers:
        assert driver.stdin is not None
        driver.stdin.write("go\n")
        driver.stdin.flush()
    claimed = [list(map(int, driver.communicate(timeout=60)[0].split())) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0] * 4
    assert Counter(id for each in claimed for id in each) == dict.fromkeys(ids, 1)
    assert {cell.status for cell in ledger.cells()} == {"done"}


def test_a_driver_killed_in_a_transaction_leaves_the_ledger_whole(ledger: Ledger) -> None:
    ledger.submit(cells(3))
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom growtrain.sweep.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "ledger._database.execute('PRAGMA cache_spill = 1'); ledger._database.execute('PRAGMA cache_size = 1')\n"
        "ledger._database.execute('BEGIN IMMEDIATE')\n"
        "ledger._database.execute(\"UPDATE cells SET status = 'failed', last_error = hex(randomblob(200000))\")\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(ledger.directory)]).returncode == -9
    assert (ledger.directory / "ledger.sqlite-journal").exists()  # it was in the middle of writing
    with Ledger(ledger.directory) as again:
        assert {cell.status for cell in again.cells()} == {"pending"}


def test_what_is_no_ledger_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"

    def refusal() -> str:
        with pytest.raises(LedgerError) as caught:
            Ledger(tmp_path, create=True)
        text = str(caught.value)
        assert str(path) in text
        assert "\n" not in text
        return text

    with pytest.raises(LedgerError, match="holds no sweep"):
        Ledger(tmp_path)
    path.mkdir()
    assert "cannot be opened" in refusal()
    path.rmdir()
    path.write_text("a text that somebody put there\n" * 100)
    assert "move it away" in refusal()
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE something (x)")
    database.close()
    assert "another --dir" in refusal()
    path.unlink()
    with Ledger(tmp_path, create=True) as ledger:
        ledger.submit(cells(200))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "move it away" in refusal()
    path.write_bytes(whole[:8192] + b"\x55" * 4096 + whole[12288:])
    assert "move it away" in refusal()
    for change, says in (
        ("PRAGMA user_version = 99", "schema 99"),
        ("UPDATE cells SET run_dir = '../../etc' WHERE id = 3", "cell 3"),
        ("UPDATE cells SET run_dir = '/etc' WHERE id = 3", "cell 3"),
        ("UPDATE cells SET words = '[1]' WHERE id = 3", "cell 3"),
        ("UPDATE cells SET words = 'rm -rf' WHERE id = 3", "damaged"),
        ("UPDATE cells SET seed = 'x' WHERE id = 3", "damaged"),
    ):
        path.write_bytes(whole)
        with sqlite3.connect(path) as database:
            database.execute(change)
        database.close()
        assert says in refusal()
    path.write_bytes(whole)
    Ledger(tmp_path).close()
