"""Tests beside others have cores of their own where there are enough; every test draws the same numbers whatever ran before it."""

import os
import random

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: tests share their cores with others
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes seconds: the tests of the compiled step ask for it
if hasattr(os, "sched_setaffinity") and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
    # Threads that outnumber the cores wait for each other: tests would take half as long again.
    cores, num_workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: num_workers] or cores)

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what libraries draw from
    torch.manual_seed(0)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `torch.compile` compile."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")


def pytest_configure(config: pytest.Config) -> None:
    """Only tests asked for with `-m gpu` see a GPU: the others hold whole runs to bits that only a CPU keeps."""
    if "gpu" not in config.getoption("-m"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything initialises CUDA; child processes inherit it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests run only when asked for with `-m gpu`, where there is one; slow tests only when asked for with `-m slow`."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run with -m gpu"))
        if "slow" in item.keywords and "slow" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
