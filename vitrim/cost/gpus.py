"""What the GPUs that runs are planned for can do at most, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GpuName = Literal["h100", "a100", "l40s"]
PER_NODE = 8
# Memory of a GPU that a run can't have: the driver's own, and what kernels of libraries keep.
RUNTIME_BYTES = 10**9


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU; rates in operations or bytes a second.

    Attributes:
        memory: bytes.
        bf16: of dense matrix products in bfloat16.
        fp32: of products in float32, as torch makes them by default: without TF32.
        bandwidth: of its memory.
        link: to the other GPUs of its machine, one way.
        network: to GPUs of other machines, one way.
    """

    memory: int
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    network: float

    def bytes_per_s(self, num_gpus: int) -> float:
        """Return the rate at which each of several GPUs sends to the others."""
        return self.link if num_gpus <= PER_NODE else self.network


GPUS: dict[GpuName, Gpu] = {
    "h100": Gpu(memory=80 * 10**9, bf16=989e12, fp32=67e12, bandwidth=3.35e12, link=450e9, network=50e9),
    "a100": Gpu(memory=80 * 10**9, bf16=312e12, fp32=19.5e12, bandwidth=2.039e12, link=300e9, network=25e9),
    "l40s": Gpu(memory=48 * 10**9, bf16=362e12, fp32=91.6e12, bandwidth=0.864e12, link=32e9, network=25e9),
}
