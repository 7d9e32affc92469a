"""The parts of a recipe: options of calibration, allocation, repair, blockwise training and recovery.

Each is frozen and checked by itself; `recipe` combines them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vitrim.checked import Checked
from vitrim.config.published import RECOVERY, filled
from vitrim.types import FeaturesAt

Precision = Literal["auto", "fp32", "bf16"]


Augmentation = Literal["none", "light", "strong", "clip", "dinov2"]
Counted = Literal["params", "macs", "latency"]
PULL = (5e-6, 5e-6)  # weights of SDPose's paper


class CalibrateOptions(Checked):
    """The images that selection and repair use."""

    num_images: int = Field(default=2000, ge=1)
    """Number of images."""
    batch_size: int = Field(default=64, ge=1)
    """Images processed at once."""
    views: int | None = Field(default=None, ge=1)
    """Views of each image: the image, and random crops of it, mirrored half of the time; memory and time grow in
    proportion. By default up to 4 where there are fewer images than an MLP has hidden units, else the image alone."""


class RepairOptions(Checked):
    """Closed-form repair by least squares, then a short local refit of each MLP."""

    ridge: float = Field(default=1e-4, gt=0)
    """Least strength of the regularization: how much a relative change of a kept unit's weights costs. Each repair
    takes the one that is best on held-out tokens, of this, 10, 100 and 1000 times as much."""
    feedback: float = Field(default=1.0, ge=0, le=1)
    """How much of the error made by earlier blocks each repair tries to correct at most, from 0 to 1; it takes the part
    of it that pays on held-out tokens."""
    refit: bool = True
    """Train each MLP briefly after its closed-form repair."""
    refit_steps: int = Field(default=300, ge=1)
    """Steps of the refit; fewer take less time."""
    refit_lr: float | None = Field(default=None, gt=0)
    """Largest step of the refit, as a share of each weight's norm. By default some are tried at each MLP."""
    max_tokens: int = Field(default=100_000, ge=256)
    """How many tokens are sampled for the refit."""


class AllocateOptions(Checked):
    """Widths that differ between MLPs, and sizes between attentions where these are cut, at the cost of equal ones."""

    cost: Counted = "params"
    """What counts as cost: parameters, multiply-accumulates, or time measured on the device."""
    depth: bool = False
    """Also try with blocks taken out, as `replace-me` does; what they cost goes to the blocks that are left."""
    cache: Path | None = None
    """Folder for the measured error curves, to reuse them for other widths and costs. Without it they are not saved."""


class BlockwiseOptions(Checked):
    """Trains each block by itself to reproduce the teacher's output; activations of the images are stored on disk."""

    num_images: int = Field(default=10_000, ge=1)
    """Number of images to train on."""
    batch_size: int = Field(default=64, ge=1)
    """Images in one step."""
    steps: int = Field(default=300, ge=1)
    """Training steps for each block."""
    lr: float | None = Field(default=None, gt=0)
    """Largest step, as a share of each weight's norm. By default some are tried at each block."""
    inputs: Literal["student", "teacher"] = "student"
    """Train on the student's own inputs, so that a block also corrects errors of earlier blocks, or on the teacher's,
    so that blocks can be trained in parallel by several processes."""
    train: Literal["mlp", "block"] = "mlp"
    """Which part of a block is trained: its MLP, or all of it with attention and norms."""
    num_workers: int = Field(default=0, ge=0)
    """Number of processes that decode images."""


class AtOnceOptions(Checked):
    """Trains all blocks at once, each to put out what the teacher's does; no gradient passes from block to block."""

    steps: int = Field(default=600, ge=1)
    """Training steps."""
    batch_size: int = Field(default=32, ge=1)
    """Images in one step, over all processes."""
    lr: float | None = Field(default=None, gt=0)
    """Largest step, as a share of each weight's norm. By default some are tried."""
    ema: float = Field(default=0.99, ge=0, lt=1)
    """Decay of a moving average of the weights, which is judged beside the weights themselves; 0 keeps none."""
    precision: Precision = "auto"
    """Number format of the computation; `auto` is bf16 on GPUs that support it, and fp32 elsewhere."""
    augment: Augmentation = "light"
    """How strongly images are augmented, anew at every step."""
    flip: bool = False
    """Also flip images at random."""
    num_validations: int = Field(default=10, ge=1)
    """How often the student is evaluated on held-out images during the run."""
    num_workers: int = Field(default=0, ge=0)
    """Number of processes that decode images."""
    save_every: int | None = Field(default=None, ge=1)
    """Save a state to resume from every this many steps, in addition to those at validations."""


class ExitOptions(AtOnceOptions):
    """Trains early exits at the ends of loops: the last one learns from the teacher, and the others from the last."""

    weight: float = Field(default=0.1, gt=0)
    """Weight of the loss of each exit before the last, beside 1 for the last."""
    features_at: FeaturesAt = "final"
    """Where exits are compared: after the final norm, before it, or as class scores (`logits`)."""


class CacheOptions(Checked):
    """Where and how the teacher's targets are stored, so that later epochs need not run the teacher."""

    views: int = Field(default=1, ge=1)
    """Number of different augmentations stored per image: epoch e uses number e mod `views`."""
    dtype: Literal["bf16", "int8", "float32"] = "bf16"
    """Number format in which targets are stored."""
    patch_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of the patch tokens to store, chosen at random. All by default."""
    num_patches: int | None = Field(default=None, ge=1)
    """Number of patch tokens to store, chosen at random. All by default."""
    folder: Path | None = None
    """Folder to keep for other runs. By default the cache is stored with the run's state."""

    @model_validator(mode="after")
    def _one_share(self) -> CacheOptions:
        if self.patch_ratio is not None and self.num_patches is not None:
            raise ValueError("give one of patch_ratio and num_patches, or neither to keep all patches")
        return self


class AdapterOptions(Checked):
    """Low-rank factors that are trained instead of the linear weights and then merged into them."""

    kind: Literal["lora", "op-lora"] = "lora"
    """Plain low-rank factors (`lora`), or factors that a small network generates (`op-lora`)."""
    rank: int = Field(default=16, ge=1)
    """Rank of the factors."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of the factors: they are multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Ends of the names of layers to adapt, as in PEFT. By default every linear weight that affects the loss."""
    hidden: int = Field(default=32, ge=1)
    """Hidden width of the network that generates factors (`op-lora`)."""
    latent: int = Field(default=32, ge=1)
    """Width of that network's input vector (`op-lora`)."""
    train_vectors: bool = False
    """Also train norms, biases and other vectors."""
    decay_generator: bool = False
    """Apply weight decay to the network that generates factors (`op-lora`)."""
    save: Path | None = None
    """Folder in which to save the factors, in PEFT's layout."""

    @model_validator(mode="after")
    def _all_in_factors(self) -> AdapterOptions:
        if self.save is not None and self.train_vectors:
            raise ValueError("with train_vectors the factors are not all that was trained; give one of it and save")
        return self


class RecoverOptions(Checked):
    """Distillation without labels; exactly one of `steps` and `epochs` sets its length, unless a schedule does."""

    schedule: Literal["published"] | None = None
    """`published` takes what is not given from the DGMR paper's own config for the model's family: length, batch, rate,
    weight decay, augmentation."""
    steps: int | None = Field(default=None, ge=1)
    """Length of distillation in steps."""
    epochs: float | None = Field(default=None, gt=0)
    """Length of distillation in epochs."""
    batch_size: int = Field(default=128, ge=1)
    """Images in a pass, over all processes."""
    loss: Literal["features", "labels"] = "features"
    """Learn the teacher's features, without labels, or the labels of the images, without a teacher (cross-entropy)."""
    optimizer: Literal["relative", "adamw", "sgd"] | None = None
    """`relative` takes steps that are shares of each weight's norm, so weights may have any scale; `adamw` takes steps
    of one size, and `sgd` follows the gradient with Nesterov's momentum of 0.9. By default relative, unless a rate,
    weight decay, a schedule, an adapter, elastic or fsdp is given."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate, for `optimizer: relative` a share of each weight's norm. By default a short test finds it."""
    base_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate at 256 images a step, instead of `lr`; with other batches it grows in proportion."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises to its peak."""
    drops: tuple[float, ...] = ()
    """Shares of the steps at which the learning rate falls to a tenth, instead of a cosine."""
    weight_decay: tuple[float, float] = (0.0, 0.0)
    """Weight decay at the start and at the end."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per step, so that each step sees this many times `batch_size` images."""
    precision: Precision = "auto"
    """Number format of the computation; `auto` is bf16 on GPUs that support it, and fp32 elsewhere."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a moving average of the weights; 0 keeps none."""
    augment: Augmentation = "light"
    """How strongly images are augmented; `clip` and `dinov2` do as the DGMR paper does for these families."""
    flip: bool = False
    """Also flip images at random."""
    features_at: FeaturesAt = "final"
    """Where features are compared: after the final norm, before it, or as class scores (`logits`): then the loss is the
    divergence of the student's class probabilities from the teacher's."""
    num_validations: int = Field(default=10, ge=1)
    """How often the student is evaluated on held-out images during the run."""
    num_workers: int = Field(default=0, ge=0)
    """Number of processes that decode images."""
    save_every: int | None = Field(default=None, ge=1)
    """Save a state to resume from every this many steps, in addition to those at validations."""
    fsdp: bool = False
    """Split both models across the processes of torchrun (FSDP2)."""
    checkpoint_activations: bool = False
    """Save memory by recomputing the student's blocks in the backward pass instead of storing their activations."""
    epoch_images: int | None = Field(default=None, ge=1)
    """Images that count as one epoch, for data without a length, such as a stream."""
    stream_lanes: int = Field(default=8, ge=1)
    """Number of shards of a stream that are read at the same time."""
    shuffle_buffer: int = Field(default=4096, ge=1)
    """Size of the buffer in which a stream's images are shuffled."""
    report_to: tuple[str, ...] = ()
    """Experiment trackers in addition to the log, such as tensorboard or wandb."""
    cycles: int = Field(default=1, ge=1)
    """How often in a row the blocks run in training, with the loss behind each cycle (SDPose); the result runs once."""
    cycle_weights: tuple[float, float] = PULL
    """Weights of how far tokens are from those of the next cycle: of those in front of the patches, and of patches."""
    cycle_detach: bool = False
    """Whether tokens of the next cycle are fixed when tokens are pulled to them; in the paper they are pulled, too."""
    elastic: tuple[float, ...] | None = None
    """MLP ratios that one result should support; each step trains one of them."""
    text_bank: Path | None = None
    """Text file, one text per line; the image tower's similarity to each text is preserved as well."""
    text_bank_weight: float = Field(default=1.0, gt=0)
    """Weight of the text bank's loss relative to the features'."""
    cache_teacher: CacheOptions | None = None
    """Store the teacher's targets so that later epochs need not run it; True uses the default options."""
    adapter: AdapterOptions | None = None
    """Train low-rank factors instead of the weights; give a kind alone to use its default options."""

    @field_validator("adapter", mode="before")
    @classmethod
    def _adapter_by_kind(cls, given: Any) -> Any:
        """Turn the name of a kind into the default options of that kind."""
        return {"kind": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _adapter_or_elastic(self) -> RecoverOptions:
        if self.adapter is not None and self.elastic is not None:
            raise ValueError("elastic trains the weights themselves; drop adapter or elastic")
        return self

    @field_validator("cache_teacher", mode="before")
    @classmethod
    def _cache_or_not(cls, given: Any) -> Any:
        """Turn True into the default options and False into no cache."""
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
    def _one_length_and_rate(self) -> RecoverOptions:
        if (self.steps is not None and self.epochs is not None) or (self.schedule is None and not self.has_length):
            raise ValueError("give exactly one of steps and epochs")
        if self.lr is not None and self.base_lr is not None:
            raise ValueError("give one of lr and base_lr, or neither to find a rate")
        peak = self.peak_lr(self.batch_size * self.gradient_accumulation_steps)
        if peak is not None and self.min_lr > peak:
            raise ValueError(f"min_lr {self.min_lr:g} is above the peak rate, {peak:g}")
        return self

    @model_validator(mode="after")
    def _cycles_of_a_whole_model(self) -> RecoverOptions:
        given = {"elastic": self.elastic, "checkpoint_activations": self.checkpoint_activations, "fsdp": self.fsdp}
        unfit = next((name for name, value in given.items() if value), None)
        if self.cycles > 1 and unfit is not None:
            raise ValueError(f"cycles: run whole blocks several times, which goes with no {unfit}; drop one of the two")
        if self.cycles == 1 and (self.cycle_detach or self.cycle_weights != PULL):
            raise ValueError("cycle_weights and cycle_detach say how cycles pull at each other; give cycles, 2 or more")
        if min(self.cycle_weights) < 0:
            raise ValueError("cycle_weights: use 0 or more")
        return self

    @model_validator(mode="after")
    def _shares_of_whole_weights(self) -> RecoverOptions:
        if self.optimizer == "relative" and (unfit := self._only_with_adamw()):
            raise ValueError(f"optimizer: relative goes with no {unfit[0]}; drop one of the two")
        return self

    def _only_with_adamw(self) -> list[str]:
        """Return which given options need AdamW: steps that are shares need whole weights that are not zero."""
        given = {
            "weight_decay": self.weight_decay != (0.0, 0.0),
            "schedule": self.schedule is not None,
            "adapter": self.adapter is not None,
            "elastic": self.elastic is not None,
            "fsdp": self.fsdp,
        }
        return [name for name, is_given in given.items() if is_given]

    @property
    def steps_by(self) -> Literal["relative", "adamw", "sgd"]:
        """What takes the steps: the optimizer that was asked for, or the one that what was given needs."""
        if self.optimizer is not None:
            return self.optimizer
        has_rate = self.lr is not None or self.base_lr is not None
        return "adamw" if has_rate or self._only_with_adamw() else "relative"

    @property
    def steps_are_shares(self) -> bool:
        """Whether a step's size is a share of each weight's own norm."""
        return self.steps_by == "relative"

    @property
    def has_length(self) -> bool:
        """Whether the length is known; a published schedule has one only when it is filled in."""
        return self.steps is not None or self.epochs is not None

    def as_published(self, family: str) -> RecoverOptions:
        """Return the options with the values that the paper published for a family, where none were given."""
        return RecoverOptions.model_validate(filled(RECOVERY[family], self.model_dump(exclude_unset=True)))

    def peak_lr(self, images_per_step: int) -> float | None:
        """Return the peak learning rate that was given, or None if it is to be found."""
        return self.lr if self.base_lr is None else self.base_lr * images_per_step / 256

    def view_of(self, epoch: int) -> int:
        """Return which augmentation an epoch uses: its own, or one of those for which targets are stored."""
        return epoch if self.cache_teacher is None else epoch % self.cache_teacher.views
