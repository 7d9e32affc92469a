"""The parts of a recipe: what calibration, allocation, repair, blockwise training and recovery can be told.

Each is frozen and checked by itself; `recipe` puts them together.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vitrim.checked import Checked
from vitrim.types import FeaturesAt

Precision = Literal["auto", "fp32", "bf16"]


Counted = Literal["params", "macs", "latency"]


class CalibrateOptions(Checked):
    """Images that selection and repair learn from."""

    num_images: int = Field(default=2000, ge=1)
    """How many images."""
    batch_size: int = Field(default=64, ge=1)
    """Images in a pass."""


class RepairOptions(Checked):
    """Closed-form least squares, then a short local refit of each MLP."""

    ridge: float = Field(default=1e-4, gt=0)
    """Ridge, relative to the mean energy of a kept unit."""
    feedback: float = Field(default=1.0, ge=0, le=1)
    """Share of the residual stream's error that a block's target corrects."""
    refit: bool = True
    """Refit each MLP after its repair."""
    refit_steps: int = Field(default=300, ge=1)
    """Steps of the refit, which bound its time."""
    refit_lr: float = Field(default=1e-2, gt=0)
    """Rate of the refit."""
    max_tokens: int = Field(default=100_000, ge=256)
    """Tokens that the refit samples."""


class AllocateOptions(Checked):
    """Widths that differ from MLP to MLP, together at most as expensive as equal ones."""

    cost: Counted = "params"
    """What expense is counted in: parameters, multiply-accumulates, or time measured on the device."""
    cache: Path | None = None
    """Folder that keeps the error curves, for other widths and costs; without, they are kept for this run alone."""


class BlockwiseOptions(Checked):
    """Each block trained by itself to put out what the teacher's does, on images whose activations lie on disk."""

    num_images: int = Field(default=10_000, ge=1)
    """Images to train on."""
    batch_size: int = Field(default=64, ge=1)
    """Images in a step."""
    steps: int = Field(default=300, ge=1)
    """Steps spent on each block."""
    lr: float | None = Field(default=None, gt=0)
    """Rate; without, 1e-3 for the MLP and 5e-4 for the whole block."""
    inputs: Literal["student", "teacher"] = "student"
    """The student's own inputs, so that a block corrects the blocks before it, or the teacher's, so that blocks are
    independent and are spread over processes."""
    train: Literal["mlp", "block"] = "mlp"
    """What of a block is trained: its MLP, or all of it, attention and norms too."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that decode images."""


class CacheOptions(Checked):
    """Where and how the teacher's targets are kept, so that later epochs need not run the teacher."""

    views: int = Field(default=1, ge=1)
    """Draws of augmentation of each image: epoch e sees draw e mod `views`."""
    dtype: Literal["bf16", "int8", "float32"] = "bf16"
    """Type in which targets are kept."""
    patch_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of the patch tokens that is kept, at random; without, all."""
    num_patches: int | None = Field(default=None, ge=1)
    """Patch tokens that are kept, at random; without, all."""
    folder: Path | None = None
    """Folder that stays and serves other runs; without, the cache lies beside the run's state."""

    @model_validator(mode="after")
    def _one_share(self) -> CacheOptions:
        if self.patch_ratio is not None and self.num_patches is not None:
            raise ValueError("give one of patch_ratio and num_patches, or neither to keep all patches")
        return self


class AdapterOptions(Checked):
    """Low-rank factors that train in place of the linear weights and are merged into them."""

    kind: Literal["lora", "op-lora"] = "lora"
    """Plain factors, or factors that a small network emits (OP-LoRA)."""
    rank: int = Field(default=16, ge=1)
    """Rank of the factors."""
    alpha: float = Field(default=16.0, gt=0)
    """Factors are scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Ends of layer names, as in PEFT; without, every linear weight that the loss reaches."""
    hidden: int = Field(default=32, ge=1)
    """Hidden width of an OP-LoRA generator."""
    latent: int = Field(default=32, ge=1)
    """Width of its latent vector."""
    train_vectors: bool = False
    """Train norms, biases and other vectors, too."""
    decay_generator: bool = False
    """Let weight decay act on the generator."""
    save: Path | None = None
    """Folder for the factors, in PEFT's layout."""

    @model_validator(mode="after")
    def _all_in_factors(self) -> AdapterOptions:
        if self.save is not None and self.train_vectors:
            raise ValueError("with train_vectors the factors are not all that was trained; give one of it and save")
        return self


class RecoverOptions(Checked):
    """Label-free distillation; one of `steps` and `epochs` says how long."""

    steps: int | None = Field(default=None, ge=1)
    """Steps of distillation."""
    epochs: float | None = Field(default=None, gt=0)
    """Epochs of distillation."""
    batch_size: int = Field(default=128, ge=1)
    """Images in a pass, over all processes."""
    lr: float | None = Field(default=None, gt=0)
    """Peak rate; without, a short range test finds it."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the rate rises."""
    weight_decay: tuple[float, float] = (0.0, 0.0)
    """Weight decay at the start and at the end."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Passes in a step, which so sees that many times `batch_size` images."""
    precision: Precision = "auto"
    """`auto` is bf16 on GPUs that have it, and fp32 elsewhere."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a running mean of the weights; 0 keeps none."""
    augment: Literal["none", "light", "strong"] = "light"
    """How strongly images are augmented."""
    flip: bool = False
    """Flip images at random."""
    features_at: FeaturesAt = "final"
    """Where features are compared: behind the final norm, or in front of it."""
    num_validations: int = Field(default=10, ge=1)
    """How often the student is judged on held-out images."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that decode images."""
    save_every: int | None = Field(default=None, ge=1)
    """Keep a state to resume from every so many steps, beside those at validations."""
    fsdp: bool = False
    """Spread both models over the processes of torchrun (FSDP2)."""
    checkpoint_activations: bool = False
    """Run the student's blocks twice rather than keep what they saw."""
    epoch_images: int | None = Field(default=None, ge=1)
    """Images in an epoch, for data without a length, such as a stream."""
    stream_lanes: int = Field(default=8, ge=1)
    """Shards of a stream that are read side by side."""
    shuffle_buffer: int = Field(default=4096, ge=1)
    """Images of a stream that are shuffled among each other."""
    report_to: tuple[str, ...] = ()
    """Trackers beside the log, such as tensorboard or wandb."""
    elastic: tuple[float, ...] | None = None
    """MLP ratios that the one result shall serve, each step training one of them."""
    text_bank: Path | None = None
    """Text file: how similar the image tower of a pair finds each of its lines is to stay, too."""
    text_bank_weight: float = Field(default=1.0, gt=0)
    """Weight of the text bank beside the features."""
    cache_teacher: CacheOptions | None = None
    """Keep the teacher's targets, so that later epochs don't run it; True for the defaults."""
    adapter: AdapterOptions | None = None
    """Train low-rank factors in place of the weights; a kind alone stands for its defaults."""

    @field_validator("adapter", mode="before")
    @classmethod
    def _adapter_by_kind(cls, given: Any) -> Any:
        """A kind alone stands for its defaults."""
        return {"kind": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _adapter_or_elastic(self) -> RecoverOptions:
        if self.adapter is not None and self.elastic is not None:
            raise ValueError("elastic trains the weights themselves; drop adapter or elastic")
        return self

    @field_validator("cache_teacher", mode="before")
    @classmethod
    def _cache_or_not(cls, given: Any) -> Any:
        """True stands for the defaults, False for no cache."""
        return {True: CacheOptions(), False: None}[given] if isinstance(given, bool) else given

    @field_validator("elastic")
    @classmethod
    def _several_widths(cls, ratios: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if ratios is None:
            return None
        if len(set(ratios)) < 2 or len(set(ratios)) < len(ratios) or not 0 < min(ratios) <= max(ratios) < math.inf:
            raise ValueError("give at least two different MLP ratios above 0")
        return tuple(sorted(ratios))

    @model_validator(mode="after")
    def _one_length(self) -> RecoverOptions:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self

    def view_of(self, epoch: int) -> int:
        """Return which draw of augmentation an epoch sees: its own, or one of those for which targets are kept."""
        return epoch if self.cache_teacher is None else epoch % self.cache_teacher.views
