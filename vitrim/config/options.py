"""The parts of a recipe: what calibration, allocation, repair, blockwise training and recovery can be told.

Each is frozen and checked by itself; `recipe` puts them together.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vitrim.models.features import FeaturesAt

Precision = Literal["auto", "fp32", "bf16"]


Counted = Literal["params", "macs", "latency"]


class Options(BaseModel):
    """Frozen, numbers are finite, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CalibrateOptions(Options):
    """The images from which selection and repair learn."""

    num_images: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=64, ge=1)


class RepairOptions(Options):
    """Closed-form least squares, then a short local refit of each MLP.

    `ridge` is relative to the mean energy of a kept unit; `feedback` is the share of the residual stream's error that a
    block's target corrects; `refit_steps` bounds the refit's time.
    """

    ridge: float = Field(default=1e-4, gt=0)
    feedback: float = Field(default=1.0, ge=0, le=1)
    refit: bool = True
    refit_steps: int = Field(default=300, ge=1)
    refit_lr: float = Field(default=1e-2, gt=0)
    max_tokens: int = Field(default=100_000, ge=256)


class AllocateOptions(Options):
    """Widths that differ from MLP to MLP, together at most as expensive as the recipe's width in all of them.

    `cost` is what expense is counted in: parameters, multiply-accumulates, or time measured on the device. The error
    curves behind it are kept in the folder `cache`, for other widths and budgets; None keeps them for this run alone.
    """

    cost: Counted = "params"
    cache: Path | None = None


class BlockwiseOptions(Options):
    """Each block trained by itself to put out what the teacher's does, on images whose activations lie on disk.

    `steps` of one batch are spent on each block. `inputs` are the student's own, so that a block corrects what the
    blocks before it got wrong, or the teacher's, so that blocks are independent and are spread over processes. `train`
    says what of a block is trained: its MLP, or all of it, attention and norms too. `lr` None is 1e-3 for the MLP and
    5e-4 for all.
    """

    num_images: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    steps: int = Field(default=300, ge=1)
    lr: float | None = Field(default=None, gt=0)
    inputs: Literal["student", "teacher"] = "student"
    train: Literal["mlp", "block"] = "mlp"
    num_workers: int = Field(default=0, ge=0)


class CacheOptions(Options):
    """Where and how the teacher's targets are kept, so that later epochs need not run the teacher.

    `views` is how many draws of augmentation each image has: epoch e sees draw e mod `views`. Of the patch tokens all
    are kept, or `patch_ratio` or `num_patches` of them at random. `folder` None keeps the cache beside the run's state,
    for this run alone; a named folder stays and serves other runs.
    """

    views: int = Field(default=1, ge=1)
    dtype: Literal["bf16", "int8", "float32"] = "bf16"
    patch_ratio: float | None = Field(default=None, gt=0, le=1)
    num_patches: int | None = Field(default=None, ge=1)
    folder: Path | None = None

    @model_validator(mode="after")
    def _one_share(self) -> CacheOptions:
        if self.patch_ratio is not None and self.num_patches is not None:
            raise ValueError("give one of patch_ratio and num_patches, or neither to keep all patches")
        return self


class AdapterOptions(Options):
    """What trains in place of the linear weights and is merged into them: factors of rank `rank`, times alpha / rank.

    `targets` are ends of layer names, as in PEFT; without, every linear weight that the loss reaches. `hidden` and
    `latent` are the sizes inside an OP-LoRA generator, `decay_generator` lets weight decay act on it. `train_vectors`
    trains norms, biases and other vectors, too. `save` is a folder for the factors in PEFT's layout.
    """

    kind: Literal["lora", "op-lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    targets: tuple[str, ...] = ()
    hidden: int = Field(default=32, ge=1)
    latent: int = Field(default=32, ge=1)
    train_vectors: bool = False
    decay_generator: bool = False
    save: Path | None = None

    @model_validator(mode="after")
    def _all_in_factors(self) -> AdapterOptions:
        if self.save is not None and self.train_vectors:
            raise ValueError("with train_vectors the factors are not all that was trained; give one of it and save")
        return self


class RecoverOptions(Options):
    """Label-free distillation. One of `steps` and `epochs` says how long; `lr` None runs a short range test.

    `elastic` are MLP ratios that the one student shall serve, each step training one of them. `epoch_images`,
    `stream_lanes` and `shuffle_buffer` are for streams: the length of an epoch, how many lanes are read side by side,
    and how many images are shuffled among each other. `report_to` names trackers that get what the log gets.
    `text_bank` is a text file: how similar the image tower of a pair finds each of its lines is to stay, too.
    `save_every` keeps a state to resume from every so many steps, beside those at validations. `fsdp` spreads both
    models over the processes, `checkpoint_activations` runs the student's blocks twice rather than keep what they saw.
    """

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=128, ge=1)
    lr: float | None = Field(default=None, gt=0)
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    weight_decay: tuple[float, float] = (0.0, 0.0)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    precision: Precision = "auto"
    ema: float = Field(default=0.0, ge=0, lt=1)
    augment: Literal["none", "light", "strong"] = "light"
    flip: bool = False
    features_at: FeaturesAt = "final"
    num_validations: int = Field(default=10, ge=1)
    num_workers: int = Field(default=0, ge=0)
    save_every: int | None = Field(default=None, ge=1)
    fsdp: bool = False
    checkpoint_activations: bool = False
    epoch_images: int | None = Field(default=None, ge=1)
    stream_lanes: int = Field(default=8, ge=1)
    shuffle_buffer: int = Field(default=4096, ge=1)
    report_to: tuple[str, ...] = ()
    elastic: tuple[float, ...] | None = None
    text_bank: Path | None = None
    text_bank_weight: float = Field(default=1.0, gt=0)
    cache_teacher: CacheOptions | None = None
    adapter: AdapterOptions | None = None

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
        """Which draw of augmentation an epoch sees: its own, or one of those for which targets are kept."""
        return epoch if self.cache_teacher is None else epoch % self.cache_teacher.views
