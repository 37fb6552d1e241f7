"""What the GPU did during a run, sampled through NVML in a thread of its own; a null object where there is nothing to sample.

A number that could not be measured is the string `unavailable: <reason>`, never 0.

Units: utilization in percent of time with a kernel running (NVML's own definition; it says nothing of how full the chip was), power in
watts, energy in joules, memory in bytes, time in seconds. All of them are of the whole device, other processes included.
"""

import contextlib
import operator
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from time import perf_counter
from types import ModuleType
from typing import Any, Final

import torch

PERIOD: Final = 0.5
_PATIENCE: Final = 3  # failed samples in a row after which the driver counts as lost
_JOIN_SECONDS: Final = 5.0


class AbstractMonitor(ABC):
    """Watches a device from `start` to `stop`, once."""

    @abstractmethod
    def start(self) -> None:
        """Begins; called once."""

    @abstractmethod
    def stop(self) -> None:
        """Ends and takes a last sample; without effect the second time."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """What was measured so far, as JSON values; callable at any time. `available` tells whether there is anything."""


class AbsentMonitor(AbstractMonitor):
    """Nothing to watch, and why."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def start(self) -> None:
        """Does nothing."""

    def stop(self) -> None:
        """Does nothing."""

    def summary(self) -> dict[str, Any]:
        """`{"available": False, "reason": ...}`."""
        return {"available": False, "reason": self._reason}


class GpuMonitor(AbstractMonitor):
    """Samples one NVML device every `period` seconds. Memory is constant in the length of the run.

    What NVML refuses at the first sample (MIG, permissions) is unavailable for the run. When three later samples in a row fail, the driver
    is taken for lost: the monitor ends, keeps what it had and says so under `lost`.
    """

    def __init__(self, nvml: ModuleType, handle: Any, period: float = PERIOD) -> None:
        self._nvml = nvml
        self._period = period
        self._fixed = {
            "name": self._ask(lambda: str(nvml.nvmlDeviceGetName(handle))),
            "driver_version": self._ask(lambda: str(nvml.nvmlSystemGetDriverVersion())),
            "memory_total_bytes": self._ask(lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total)),
        }
        self._readers: dict[str, Callable[[], float]] = {
            "utilization": lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "memory": lambda: float(nvml.nvmlDeviceGetMemoryInfo(handle).used),
            "power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "energy": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
        }
        self._series = {field: Series() for field in self._readers}
        self._refusals = dict.fromkeys(self._readers, "not sampled yet")
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpu-monitor", daemon=True)

    def start(self) -> None:
        """Takes the first sample and starts the thread; raises `RuntimeError` the second time."""
        now = perf_counter()
        for field, read in list(self._readers.items()):
            try:
                self._series[field].add(now, read())
            except self._nvml.NVMLError as error:
                self._refusals[field] = str(error)
                del self._readers[field]
        self._thread.start()

    def stop(self) -> None:
        """Takes the last sample, ends the thread and releases NVML."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_SECONDS)
        if self._thread.is_alive():
            # NVML calls can hang with the driver. The thread is a daemon, and NVML stays open because the thread is inside it.
            with self._lock:
                self._lost = f"NVML did not answer for {_JOIN_SECONDS:g} s at the end"
            return
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def summary(self) -> dict[str, Any]:
        """Name and driver, `utilization_mean` (%), `power_watts_mean`, `energy_joules` and its source, peak memory, and `lost`.

        `seconds` is the time between the first and the last sample; means are over that time. `lost` is None or a sentence.
        """
        with self._lock:
            return {
                "available": True,
                **self._fixed,
                "seconds": max(series.seconds for series in self._series.values()),
                "utilization_mean": self._measured("utilization", self._series["utilization"].mean),
                "utilization_samples": self._measured("utilization", self._series["utilization"].count),
                "power_watts_mean": self._measured("power", self._series["power"].mean),
                **self._energy(),
                "memory_peak_bytes": self._measured("memory", int(self._series["memory"].peak)),
                "lost": self._lost,
            }

    def _measured(self, field: str, value: float) -> float | str:
        return value if self._series[field].count else f"unavailable: {self._refusals[field]}"

    def _energy(self) -> dict[str, float | str]:
        counter, power = self._series["energy"], self._series["power"]
        # The counter starts again from 0 when the driver is loaded anew.
        if counter.count > 1 and counter.last >= counter.first:
            return {"energy_joules": counter.last - counter.first, "energy_source": "NVML energy counter"}
        if power.count > 1:
            return {"energy_joules": power.integral, "energy_source": "integral of power samples"}
        reason = f"unavailable: {self._refusals['energy' if not counter.count else 'power']}"
        return {"energy_joules": reason, "energy_source": reason}

    def _ask(self, question: Callable[[], str | int]) -> str | int:
        try:
            return question()
        except self._nvml.NVMLError as error:
            return f"unavailable: {error}"

    def _watch(self) -> None:
        start, failures = perf_counter(), 0
        while not self._stopping.wait(self._period):
            error = self._sample()
            failures = 0 if error is None else failures + 1
            if failures == _PATIENCE:
                with self._lock:
                    self._lost = f"after {perf_counter() - start:.1f} s: {error}"
                return
        error = self._sample()
        if error is not None:
            with self._lock:
                self._lost = f"at the last sample: {error}"

    def _sample(self) -> str | None:
        """One sample of every field, or of none and the error."""
        try:
            values = {field: read() for field, read in self._readers.items()}
        except self._nvml.NVMLError as error:
            return str(error)
        now = perf_counter()
        with self._lock:
            for field, value in values.items():
                self._series[field].add(now, value)
        return None


def add_up(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run that went on later: seconds, samples and energy add up, means are over the seconds, peaks are the higher.

    Name, driver and size are those of `now`. What one of the two lacks, the sum lacks as well.
    """
    if not before["available"] or not now["available"]:
        lacking = now if before["available"] else before
        return (
            now
            if before["available"] is now["available"]
            else {"available": False, "reason": f"for a part of the run, {lacking['reason']}"}
        )

    def both(field: str, combine: Callable[[Any, Any], Any]) -> Any:
        lacking = next((part[field] for part in (before, now) if isinstance(part[field], str)), None)
        return combine(before[field], now[field]) if lacking is None else lacking

    seconds = before["seconds"] + now["seconds"]

    def mean(field: str) -> Any:
        return both(field, lambda a, b: (a * before["seconds"] + b * now["seconds"]) / seconds if seconds else b)

    sources = dict.fromkeys((before["energy_source"], now["energy_source"]))
    return now | {
        "seconds": seconds,
        "utilization_mean": mean("utilization_mean"),
        "utilization_samples": both("utilization_samples", operator.add),
        "power_watts_mean": mean("power_watts_mean"),
        "energy_joules": both("energy_joules", operator.add),
        "energy_source": " and ".join(sources),
        "memory_peak_bytes": both("memory_peak_bytes", max),
        "lost": now["lost"] or before["lost"],
    }


class Series:
    """Running statistics of one sampled quantity: no sample is kept. The mean is over time (trapezoids), so gaps do not bias it."""

    def __init__(self) -> None:
        self.count = 0
        self.first = self.last = self.peak = 0.0
        self.integral = self.seconds = 0.0
        self._time = 0.0

    def add(self, time: float, value: float) -> None:
        """A value at a time in seconds, not before the one added last."""
        if self.count:
            self.integral += (time - self._time) * (value + self.last) / 2
            self.seconds += time - self._time
            self.peak = max(self.peak, value)
        else:
            self.first = self.peak = value
        self.last, self._time = value, time
        self.count += 1

    @property
    def mean(self) -> float:
        """Time-weighted mean; the last value while there is no time between samples."""
        return self.integral / self.seconds if self.seconds else self.last


def open_monitor(device: torch.device, period: float = PERIOD) -> GpuMonitor | AbsentMonitor:
    """The monitor of the GPU that torch calls `device`, whatever `CUDA_VISIBLE_DEVICES` says; never raises for a missing one.

    Args:
        device: where the run computes.
        period: seconds between samples.
    """
    if device.type != "cuda":
        return AbsentMonitor(f"the run computes on {device.type}, which NVML does not watch")
    try:
        uuid = str(torch.cuda.get_device_properties(device).uuid)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        return AbsentMonitor(f"torch: {error}")
    try:
        import pynvml
    except ImportError as error:
        return AbsentMonitor(f"{error}: pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return AbsentMonitor(f"NVML: {error}")
    # Torch numbers devices by what is visible and NVML does not; the UUID is common to both. Torch drops its prefix.
    for prefix in ("GPU-", "MIG-"):
        with contextlib.suppress(pynvml.NVMLError):
            return GpuMonitor(pynvml, pynvml.nvmlDeviceGetHandleByUUID(prefix + uuid), period)
    pynvml.nvmlShutdown()
    return AbsentMonitor(f"NVML knows no device with the UUID {uuid}")
