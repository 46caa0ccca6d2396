"""Kinds of GPU: what their datasheets promise, and which share of it programs get.

Datasheets: NVIDIA's of V100, A100, H100, H200, B200, L40S and RTX 4090; A800 and H800 are A100 and H100 with NVLink cut
to 400 GB/s in both directions together; Ascend 910B: Huawei's. Network: a node's usual adapters over its GPUs (DGX A100
and HGX A100: eight of 200 Gb/s for eight GPUs; H100: eight of 400 Gb/s).
"""

import dataclasses

from megatron_ext.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a kind of GPU, its links and its host; docs/planner.md says on which runs."""

    matmul: float  # share of the peak that the best matrix product reaches
    attention: float  # the same of FlashAttention, forward and backward together
    memory: float  # share of the memory bandwidth that elementwise kernels reach
    link: float  # share of the bandwidth between the GPUs of a node that a large collective reaches
    network: float  # the same between nodes
    launch_us: float  # microseconds that the host takes to start one kernel
    hand_over_us: float  # microseconds in which a microbatch is passed on, beyond its bytes
    step_ms: float  # milliseconds of a step that no other term explains


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind. peak_tflops: dense products in bf16 (fp16 where there is no bf16). GB: 10^9 bytes; one direction."""

    name: str
    peak_tflops: float
    memory_gib: float
    bandwidth_gb_s: float  # of the device memory
    link_gb_s: float  # to the other GPUs of its node
    network_gb_s: float  # to other nodes
    multiprocessors: int
    reported_as: tuple[str, ...]  # parts of the driver's name of a device; of the table the longest one in it tells
    measured: Measured
    has_bf16: bool = True

    @property
    def flops(self) -> float:
        return self.peak_tflops * 1e12

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gib * 2**30

    @property
    def traffic(self) -> float:
        """Bytes per second that elementwise kernels read and write."""
        return self.bandwidth_gb_s * 1e9 * self.measured.memory


# matmul and link were measured by others (ml-engineering's best products, nccl-tests), the rest is fitted
_A100 = Measured(0.87, 0.55, 0.72, 0.78, 0.45, 23.5, 450.0, 1.0)
_HOPPER = Measured(0.80, 0.50, 0.75, 0.82, 0.60, 10.0, 50.0, 1.0)
_BLACKWELL = dataclasses.replace(_HOPPER, matmul=0.776)
_GPUS = (
    Gpu("v100-32g", 125.0, 32, 900, 150, 6.25, 80, ("V100",), _A100, has_bf16=False),
    Gpu("a100-40g", 312.0, 40, 1555, 300, 25, 108, ("A100-SXM4-40GB", "A100-PCIE-40GB"), _A100),
    Gpu("a100-80g", 312.0, 80, 2039, 300, 25, 108, ("A100",), _A100),
    Gpu("a800-80g", 312.0, 80, 2039, 200, 25, 108, ("A800",), _A100),
    Gpu("h100-80g", 989.4, 80, 3350, 450, 50, 132, ("H100",), _HOPPER),
    Gpu("h100pcie-80g", 756.0, 80, 2039, 63, 50, 114, ("H100 PCIe",), _HOPPER),
    Gpu("h800-80g", 989.4, 80, 3350, 200, 50, 132, ("H800",), _HOPPER),
    Gpu("h20-96g", 148.0, 96, 4000, 450, 50, 78, ("H20",), _HOPPER),
    Gpu("h200-141g", 989.4, 141, 4800, 450, 50, 132, ("H200",), _HOPPER),
    Gpu("b200-180g", 2250.0, 180, 7700, 900, 50, 148, ("B200",), _BLACKWELL),
    Gpu("l40s-48g", 362.0, 48, 864, 32, 25, 142, ("L40S",), _A100),
    Gpu("4090-24g", 165.2, 24, 1008, 32, 12.5, 128, ("4090",), _A100),
    Gpu("3090-24g", 71.0, 24, 936, 32, 12.5, 82, ("3090",), _A100),
    Gpu("910b-64g", 313.0, 64, 1600, 196, 25, 24, ("910B",), _A100),
)


def gpu_names() -> tuple[str, ...]:
    return tuple(gpu.name for gpu in _GPUS)


def gpu_named(name: str) -> Gpu:
    """The kind called `name`, or the only one that begins so (h200). Raises RequestError, naming the known ones."""
    found = [gpu for gpu in _GPUS if gpu.name == name.lower()] or [
        gpu for gpu in _GPUS if gpu.name.startswith(name.lower() + "-")
    ]
    if len(found) != 1:
        raise RequestError(
            f"--gpu {name}: {'ambiguous' if found else 'unknown'}; known are {', '.join(gpu_names())}, or give "
            "--peak-tflops, --memory-gb and --bandwidth"
        )
    return found[0]


def gpu_reported_as(name: str) -> Gpu | None:
    """The kind whose driver calls a device `name`; None if it is not in the table."""
    matches = [(len(part), gpu) for gpu in _GPUS for part in gpu.reported_as if part in name]
    return max(matches, key=lambda match: match[0])[1] if matches else None
