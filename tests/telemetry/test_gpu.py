"""The GPU monitor against a fake NVML, and against whatever this machine has."""

import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from growtrain.telemetry.gpu import AbsentMonitor, GpuMonitor, Series, add_up, open_monitor

UUID = "11111111-2222-3333-4444-555555555555"
PERIOD = 0.002


class FakeNvml(ModuleType):
    """One device: 60 % busy, 300 W, 1 kJ more at every reading of its energy. `broken` maps a function's name to what it raises."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.broken: dict[str, str] = {}
        self.prefix = "GPU-"
        self.energy = 5_000_000
        self.initialised = 0
        self.samples = threading.Semaphore(0)

    def _check(self, name: str) -> None:
        if name in self.broken or "everything" in self.broken:
            raise self.NVMLError(self.broken.get(name) or self.broken["everything"])

    def nvmlInit(self) -> None:
        self._check("nvmlInit")
        self.initialised += 1

    def nvmlShutdown(self) -> None:
        self.initialised -= 1
        self._check("nvmlShutdown")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.prefix + UUID:
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetName(self, handle: str) -> str:
        self._check("nvmlDeviceGetName")
        return "Fake GPU"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "1.2"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        self._check("nvmlDeviceGetUtilizationRates")
        self.samples.release()
        return SimpleNamespace(gpu=60, memory=1)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        self._check("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(used=7 * 2**30, total=80 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._check("nvmlDeviceGetPowerUsage")
        return 300_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._check("nvmlDeviceGetTotalEnergyConsumption")
        self.energy += 1_000_000
        return self.energy


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    return fake


def open_fake(period: float = PERIOD) -> GpuMonitor:
    monitor = open_monitor(torch.device("cuda"), period)
    assert isinstance(monitor, GpuMonitor)
    return monitor


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 3
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)


def run_for_samples(monitor: GpuMonitor, nvml: FakeNvml, count: int = 4) -> dict[str, Any]:
    monitor.start()
    for _ in range(count):
        assert nvml.samples.acquire(timeout=3)
    monitor.stop()
    return monitor.summary()


def test_normal_run(nvml: FakeNvml) -> None:
    summary = run_for_samples(open_fake(), nvml)
    samples = summary["utilization_samples"]
    assert samples >= 4
    assert summary["available"] is True
    assert summary["name"] == "Fake GPU"
    assert summary["utilization_mean"] == pytest.approx(60)
    assert summary["power_watts_mean"] == pytest.approx(300)
    assert summary["energy_joules"] == pytest.approx(1000 * (samples - 1))  # not 5 MJ from before the run
    assert summary["energy_source"] == "NVML energy counter"
    assert summary["memory_peak_bytes"] == 7 * 2**30
    assert summary["memory_total_bytes"] == 80 * 2**30
    assert summary["seconds"] > 0
    assert summary["lost"] is None
    assert nvml.initialised == 0


def test_parts_of_a_run_add_up() -> None:
    """By hand: 10 s at 20 % and 30 s at 60 % are 40 s at 50 %. What one part lacks is unavailable, with the part's reason."""
    parts: list[dict[str, Any]] = [
        {
            "available": True, "name": name, "seconds": seconds, "utilization_mean": percent, "utilization_samples": 4,
            "power_watts_mean": 100.0, "energy_joules": joules, "energy_source": "NVML energy counter",
            "memory_peak_bytes": peak, "lost": None,
        }
        for name, seconds, percent, joules, peak in (("A", 10.0, 20.0, 1_000.0, 5), ("B", 30.0, 60.0, 3_000.0, 4))
    ]  # fmt: skip
    total = add_up(*parts)
    assert (total["name"], total["seconds"], total["utilization_mean"]) == ("B", 40.0, 50.0)
    assert (total["energy_joules"], total["memory_peak_bytes"], total["utilization_samples"]) == (4_000.0, 5, 8)
    assert total["energy_source"] == "NVML energy counter"
    no_energy = {"energy_joules": "unavailable: not permitted", "energy_source": "unavailable: not permitted"}
    assert add_up(parts[0] | no_energy, parts[1])["energy_joules"] == "unavailable: not permitted"
    absent = {"available": False, "reason": "NVML: no driver"}
    for pair in ((parts[0], absent), (absent, parts[1])):
        assert add_up(*pair) == {"available": False, "reason": "for a part of the run, NVML: no driver"}
    assert add_up(absent, {"available": False, "reason": "later"})["reason"] == "later"


def test_stopping_twice_releases_once(nvml: FakeNvml) -> None:
    monitor = open_fake(period=60)
    monitor.start()
    monitor.stop()
    monitor.stop()
    assert nvml.initialised == 0
    assert monitor.summary()["utilization_samples"] == 2  # the first and the last, however short the run


def test_stopping_without_starting(nvml: FakeNvml) -> None:
    monitor = open_fake()
    assert monitor.summary()["energy_joules"] == "unavailable: not sampled yet"
    monitor.stop()
    assert nvml.initialised == 0


def test_starting_twice_is_an_error(nvml: FakeNvml) -> None:
    monitor = open_fake()
    monitor.start()
    with pytest.raises(RuntimeError):
        monitor.start()
    monitor.stop()


def test_energy_refused_is_integrated_from_power_and_says_so(nvml: FakeNvml) -> None:
    nvml.broken["nvmlDeviceGetTotalEnergyConsumption"] = "Insufficient Permissions"
    summary = run_for_samples(open_fake(), nvml)
    assert summary["energy_joules"] == pytest.approx(300 * summary["seconds"])
    assert summary["energy_source"] == "integral of power samples"
    assert summary["lost"] is None


def test_refused_fields_are_unavailable_and_never_zero(nvml: FakeNvml) -> None:
    nvml.prefix = "MIG-"
    nvml.broken = dict.fromkeys(
        ["nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption"],
        "Not Supported",
    )
    monitor = open_fake()
    monitor.start()
    monitor.stop()
    summary = monitor.summary()
    for key in ("utilization_mean", "utilization_samples", "power_watts_mean", "energy_joules", "energy_source"):
        assert summary[key] == "unavailable: Not Supported"
    assert summary["memory_peak_bytes"] == 7 * 2**30


def test_driver_lost_keeps_what_it_had(nvml: FakeNvml) -> None:
    monitor = open_fake()
    monitor.start()
    for _ in range(4):
        assert nvml.samples.acquire(timeout=3)
    nvml.broken["everything"] = "GPU is lost"
    wait_until(lambda: monitor.summary()["lost"] is not None)
    monitor.stop()
    summary = monitor.summary()
    assert summary["lost"].endswith("GPU is lost")
    assert summary["utilization_mean"] == pytest.approx(60)
    assert summary["energy_joules"] >= 2000


def test_a_failure_that_passes_is_survived(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([False, True, True, False, True, True] + [False] * 1000)  # the first is the sample of start()

    def power(handle: str) -> int:
        if next(failures):
            raise nvml.NVMLError("Timeout")
        return 300_000

    monkeypatch.setattr(nvml, "nvmlDeviceGetPowerUsage", power)
    summary = run_for_samples(open_fake(), nvml, 8)
    assert summary["lost"] is None
    assert summary["power_watts_mean"] == pytest.approx(300)


def test_a_restarted_energy_counter_is_not_believed(nvml: FakeNvml) -> None:
    monitor = open_fake()
    monitor.start()
    nvml.energy = 0
    monitor.stop()
    summary = monitor.summary()
    assert summary["energy_source"] == "integral of power samples"
    assert summary["energy_joules"] > 0


def test_no_driver(nvml: FakeNvml) -> None:
    nvml.broken["nvmlInit"] = "Driver Not Loaded"
    monitor = open_monitor(torch.device("cuda"))
    assert monitor.summary() == {"available": False, "reason": "NVML: Driver Not Loaded"}


def test_no_pynvml(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in open_monitor(torch.device("cuda")).summary()["reason"]


def test_unknown_device_releases_nvml(nvml: FakeNvml) -> None:
    nvml.prefix = "NPU-"
    assert UUID in open_monitor(torch.device("cuda")).summary()["reason"]
    assert nvml.initialised == 0


def test_cpu_run_is_not_watched(nvml: FakeNvml) -> None:
    monitor = open_monitor(torch.device("cpu"))
    assert isinstance(monitor, AbsentMonitor)
    monitor.start()
    monitor.stop()
    summary = monitor.summary()
    assert summary["available"] is False
    assert "cpu" in summary["reason"]
    assert nvml.initialised == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_real_machine_without_gpu_says_why() -> None:
    monitor = open_monitor(torch.device("cuda"))
    monitor.start()
    monitor.stop()
    summary = monitor.summary()
    assert summary["available"] is False
    assert summary["reason"].startswith("torch: ")
    assert len(summary["reason"]) > len("torch: ")


@pytest.mark.gpu
def test_real_gpu() -> None:
    monitor = open_monitor(torch.device("cuda"), 0.05)
    monitor.start()
    a = torch.randn(4096, 4096, device="cuda")
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        a = torch.tanh(a @ a)
        torch.cuda.synchronize()
    monitor.stop()
    summary = monitor.summary()
    assert summary["available"] is True
    assert summary["name"] == torch.cuda.get_device_name()
    assert summary["lost"] is None


def test_series_golden() -> None:
    series = Series()
    for time_, value in [(0, 10), (1, 20), (4, 0)]:  # areas 15 and 30
        series.add(time_, value)
    assert (series.integral, series.seconds, series.mean) == (45, 4, 11.25)
    assert (series.first, series.last, series.peak, series.count) == (10, 0, 20, 3)
