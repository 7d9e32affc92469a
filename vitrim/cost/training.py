"""What a distillation holds on each device, and how long its steps take at least, from counts and a rehearsal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vitrim.cost.gpus import PER_NODE, Gpu
from vitrim.cost.rehearsal import Rehearsal

FLOAT, HALF = 4, 2
# Of a whole batch of tensors, as torch's AdamW takes them on a GPU: reads and writes of a parameter in a step, with the
# clipping of gradients.
OPTIMIZER_PASSES = 23
# Gathered at a time of a sharded model: a block and the next, and as many again of the student for its gradients.
GATHERED = 2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameters: of both models, of their largest blocks, and of the student's largest tensor."""

    teacher: int
    student: int
    teacher_block: int
    student_block: int
    largest: int


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a distillation is spread.

    Attributes:
        processes: one for each device.
        batch: images in a step, over all processes.
        parts: forward passes that a process makes of its share.
        fsdp: whether both models are in shards.
        checkpointed: whether blocks run again in the backward pass.
        bf16: whether products are made in bfloat16.
        moments: numbers that the optimizer keeps for each parameter.
        ema: whether a moving average is kept.
        on_gpu: whether the optimizer takes all tensors at once, and the state's copy lies elsewhere.
    """

    processes: int
    batch: int
    parts: int = 1
    fsdp: bool = False
    checkpointed: bool = False
    bf16: bool = True
    moments: int = 2
    ema: bool = False
    on_gpu: bool = True

    @property
    def micro(self) -> int:
        """Images in a forward pass of a process."""
        return math.ceil(math.ceil(self.batch / self.processes) / self.parts)

    @property
    def shards(self) -> int:
        """Processes that a model is spread over."""
        return self.processes if self.fsdp else 1

    def device_bytes(self, sizes: Sizes, activations: float) -> dict[str, float]:
        """Return what a device holds while it trains, by what it is.

        Args:
            sizes: of the models.
            activations: most bytes of a forward and backward pass of `micro` images, beside parameters and gradients.
        """
        student, shards = sizes.student, self.shards
        gradients = FLOAT * student / shards
        half = HALF if self.bf16 else FLOAT
        gathered = GATHERED * (2 * FLOAT * sizes.student_block + half * sizes.teacher_block) if shards > 1 else 0
        scratch = gradients if self.on_gpu else 3 * FLOAT * sizes.largest / shards
        passing = activations + gathered + (gradients if self.parts > 1 else 0)
        return {
            "student, optimizer, best state": FLOAT * (2 + self.moments + self.ema) * student / shards,
            "teacher": (half if shards > 1 else FLOAT) * sizes.teacher / shards,
            "buckets of gradients": FLOAT * student if self.processes > 1 and shards == 1 else 0,
            "a step: activations, gradients": max(passing, gradients + scratch),
        }

    def main_bytes(self, sizes: Sizes) -> float:
        """Return what each process holds in main memory: a copy of its part of a state, and with shards both models."""
        copied = FLOAT * (2 + self.moments + self.ema) * sizes.student / self.processes if self.processes > 1 else 0
        return copied + (FLOAT * (sizes.teacher + sizes.student) if self.shards > 1 else 0)

    def scaled(self, activations: float, sizes: Sizes, micro: int) -> float:
        """Return the bytes of a pass of `micro` images from those of a pass of this setup's own."""
        fixed = HALF * sizes.student if self.bf16 and not self.checkpointed else 0  # copies of weights
        return fixed + (activations - fixed) * micro / self.micro


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Least seconds of a step by what bounds them; `hidden` is the share of sending that goes on behind products."""

    products: float
    traffic: float
    optimizer: float
    sending: float
    hidden: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.products + self.traffic + self.optimizer + self.sending - self.hidden


def step_time(setup: Setup, sizes: Sizes, rehearsal: Rehearsal, gpu: Gpu) -> StepTime:
    """Return the least time of a step on GPUs of a kind."""
    rate = {torch.bfloat16: gpu.bf16, torch.float16: gpu.bf16}
    products, traffic = rehearsal.seconds(lambda dtype: rate.get(dtype, gpu.fp32), gpu.bandwidth)
    products, traffic = products * setup.parts, traffic * setup.parts
    sending = sent_bytes(setup, sizes) / gpu.bytes_per_s(setup.processes)
    return StepTime(
        products=products,
        traffic=traffic,
        optimizer=OPTIMIZER_PASSES * FLOAT * sizes.student / setup.shards / gpu.bandwidth,
        sending=sending,
        hidden=min(sending, (products + traffic) / 2),  # the backward pass
    )


def sent_bytes(setup: Setup, sizes: Sizes) -> float:
    """Return the bytes that a process sends in a step: an all-reduce of gradients; of shards, blocks and gradients."""
    ring = (setup.processes - 1) / setup.processes
    if setup.shards == 1:
        return 2 * ring * FLOAT * sizes.student
    half = HALF if setup.bf16 else FLOAT
    return setup.parts * ring * (3 * FLOAT * sizes.student + half * sizes.teacher)


def nodes_of(processes: int) -> tuple[int, int]:
    """Return how many machines there are, and GPUs in each."""
    return (1, processes) if processes <= PER_NODE else (processes // PER_NODE, PER_NODE)
