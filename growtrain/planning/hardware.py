"""What hardware can do at best, by data sheet and by what others have measured on it: the constants of `growtrain.planning.limits`.

Every constant names its source. NVIDIA's data sheets give peaks; where somebody has published what can be had of them, that is taken.
Peaks of arithmetic are the data sheets' own (dense), since a limit is asked for: real kernels of a batch of 32 reach less.

Units: seconds; bytes; FLOPs, 2 per multiply-add; frames of an emulator.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from growtrain.settings.text import ConfigError


@dataclass(frozen=True)
class Constant:
    """A number, and where it is from."""

    value: float
    source: str

    def scaled(self, factor: float) -> "Constant":
        """Another number of the same kind, to see what depends on it."""
        return Constant(self.value * factor, f"{factor:g} x {self.source}")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU and the host around it.

    Attributes:
        name: as `--hardware` takes it.
        title: as a person knows it.
        pattern: of the name that its driver gives, case-insensitive.
        product_flops: per second, of matrix products, which PyTorch does in float32 unless asked otherwise.
        convolution_flops: per second, of convolutions, which PyTorch allows cuDNN to do in TF32.
        memory_bandwidth, cache_bandwidth: bytes per second from device memory, and from the second-level cache.
        cache_bytes: of that cache.
        link_bandwidth: bytes per second between host and device.
        graph_kernel: seconds that a kernel in a CUDA graph takes at least.
        eager_kernel: seconds that a kernel takes at least which Python launches, one operator after the other.
        emulator_frames: per second of one core.
        cores: of the host, for emulators.
    """

    name: str
    title: str
    pattern: str
    product_flops: Constant
    convolution_flops: Constant
    memory_bandwidth: Constant
    cache_bandwidth: Constant
    cache_bytes: Constant
    link_bandwidth: Constant
    graph_kernel: Constant
    eager_kernel: Constant
    emulator_frames: Constant
    cores: Constant

    @property
    def constants(self) -> dict[str, Constant]:
        """By name."""
        values = ((item.name, getattr(self, item.name)) for item in dataclasses.fields(self))
        return {name: value for name, value in values if isinstance(value, Constant)}

    def with_scaled(self, constant: str, factor: float) -> "Hardware":
        """The same with one constant multiplied."""
        scaled: dict[str, Any] = {constant: self.constants[constant].scaled(factor)}
        return dataclasses.replace(self, **scaled)


_A100, _H100 = "NVIDIA A100 data sheet (2021)", "NVIDIA H100 data sheet (2023), dense"
_H200, _ADA = "NVIDIA H200 data sheet (2024), dense", "NVIDIA Ada GPU architecture white paper (2022), dense"
_L4 = "NVIDIA L4 data sheet (2023), dense"
_ACHIEVED = 0.85  # of the data sheet's; the same source's H200 gets 3,888 of 4,800 GB/s, an H100 PCIe 1,972 of 2,039
_ACHIEVED_BY = "te42kyfo/gpu-benches, gpu-l2-cache/a100_80.txt: 1,732 of 2,039 GB/s from beyond the cache"
_L2 = "te42kyfo/gpu-benches, gpu-l2-cache"

# The same on every GPU here, for want of published measurements on each.
_GRAPH_KERNEL = Constant(1.3e-6, "Spector et al. 2025, 'Look Ma, No Bubbles!', of a kernel in a CUDA graph on an H100")
_EAGER_KERNEL = Constant(7e-6, "meta-pytorch/autoparallel, pull request 146, per operator on an H100")
_EMULATOR = Constant(13_250, "results/throughput_sb3_cpu.md: 26,517 frames/s of Phoenix on 2 cores of an AMD EPYC")
_CORES = Constant(12, "Google Cloud's a2-highgpu-1g: 12 vCPUs to one A100")


def _bandwidth(data_sheet: float, source: str) -> Constant:
    return Constant(_ACHIEVED * data_sheet, f"{source}, times {_ACHIEVED} ({_ACHIEVED_BY})")


def _hardware(
    name: str,
    title: str,
    pattern: str,
    source: str,
    fp32: float,
    tf32: float,
    memory: float,
    cache: Constant,
    cache_bandwidth: Constant,
    link: float,
) -> Hardware:
    """One row: TFLOP/s, GB/s and the source of all but the cache's."""
    return Hardware(
        name=name,
        title=title,
        pattern=pattern,
        product_flops=Constant(1e12 * fp32, f"{source}: float32"),
        convolution_flops=Constant(1e12 * tf32, f"{source}: TF32"),
        memory_bandwidth=_bandwidth(1e9 * memory, source),
        cache_bandwidth=cache_bandwidth,
        cache_bytes=cache,
        link_bandwidth=Constant(1e9 * link, f"{source}: PCIe, one way"),
        graph_kernel=_GRAPH_KERNEL,
        eager_kernel=_EAGER_KERNEL,
        emulator_frames=_EMULATOR,
        cores=_CORES,
    )


_MB_A100 = Constant(40e6, "NVIDIA A100 architecture white paper (2020)")
_MB_H100 = Constant(50e6, "NVIDIA H100 architecture white paper (2022): 50 of the chip's 60 MB")
_MB_H200 = Constant(
    60e6, f"its driver, in PyTorch's device properties: all of the chip's 60 MB; so, too, {_L2}/h200.txt"
)
_MB_4090 = Constant(72e6, _ADA)
_MB_L4 = Constant(48e6, f"{_ADA}: AD104")

_L2_A100 = Constant(5.4e12, f"{_L2}/a100_80.txt: 5.3 to 5.5 TB/s")
_L2_H100 = Constant(6.9e12, f"{_L2}/h100_pcie.txt, of the PCIe card: 6.8 to 7.1 TB/s")
_L2_H200 = Constant(9.8e12, f"{_L2}/h200.txt: 9.6 to 10.1 TB/s")
_L2_4090 = Constant(4.9e12, "smallscientist1/cuda_microbenchmark, analysis_RTX4090.md: 4,903 GB/s")
_L2_L4 = Constant(2.65e12, "the RTX 4090's, by size of the cache and clock (not measured)")

# Name, title, the driver's name, source; TFLOP/s in float32 and in TF32; GB/s of memory; cache; GB/s of the link.
_ROWS = (
    _hardware("a100", "NVIDIA A100 SXM 40 GB", r"A100-SXM4-40GB", _A100, 19.5, 156, 1555, _MB_A100, _L2_A100, 32),
    _hardware("a100-80gb", "NVIDIA A100 SXM 80 GB", r"A100-SXM4-80GB", _A100, 19.5, 156, 2039, _MB_A100, _L2_A100, 32),
    _hardware("h100", "NVIDIA H100 SXM", r"H100 80GB HBM3", _H100, 67, 495, 3350, _MB_H100, _L2_H100, 64),
    _hardware("h200", "NVIDIA H200", r"H200$", _H200, 67, 495, 4800, _MB_H200, _L2_H200, 64),
    _hardware("rtx4090", "NVIDIA GeForce RTX 4090", r"RTX 4090$", _ADA, 82.6, 82.6, 1008, _MB_4090, _L2_4090, 32),
    _hardware("l4", "NVIDIA L4", r"\bL4$", _L4, 30.3, 60, 300, _MB_L4, _L2_L4, 32),
)
HARDWARE = {row.name: row for row in _ROWS}


def hardware_named(name: str) -> Hardware:
    """The row of `--hardware`; raises `ConfigError` that lists the names."""
    if name.lower() not in HARDWARE:
        raise ConfigError(f"--hardware {name}: the table has {', '.join(HARDWARE)}")
    return HARDWARE[name.lower()]


def hardware_of(device_name: str) -> Hardware | None:
    """The row of a GPU by the name that its driver gives, None where the table has no such one."""
    return next((row for row in HARDWARE.values() if re.search(row.pattern, device_name, re.IGNORECASE)), None)
