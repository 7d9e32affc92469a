"""Tunes the text tower of a CLIP-like pair to an image tower that was cut: DGMR's last step, on images with captions.

The image tower is frozen and sees each image once. The text tower with its projection is trained and nothing else:
scale and bias stay as they are. With several processes, each embeds its share of the captions and compares them with
all images of the step, so the gradient is that of one process with the whole batch. What comes back is the best state
on held-out pairs, the start included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vitrim.checked import Checked
from vitrim.clip.contrastive import contrastive_loss, gather_rows
from vitrim.clip.embedded_pairs import EmbeddedPairs
from vitrim.config.options import Precision
from vitrim.config.published import TEXT, filled
from vitrim.config.run_context import RunContext
from vitrim.distributed.precision import autocast
from vitrim.distributed.processes import any_process, is_main, join_, mean, num_processes, rank
from vitrim.errors import DataError, Interrupted
from vitrim.metrics.zero_shot import embed_all
from vitrim.models.features import restored
from vitrim.models.towers import Pair, scale_and_bias, unit
from vitrim.output.stage import TEXT_STATE
from vitrim.progress import progress
from vitrim.recover.schedule import cosine_between, rate_shape, stop_on_interrupt
from vitrim.recover.state import clear_state, resumed_state, save_state


class TextOptions(Checked):
    """Text tuning; exactly one of `steps` and `epochs` says how long, unless a schedule does."""

    schedule: Literal["published"] | None = None
    """`published` takes what is not given from what the DGMR paper did for EVA-CLIP-E: 20 epochs, rate and decay."""
    steps: int | None = Field(default=None, ge=1)
    """Training steps."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the images, in place of steps."""
    batch_size: int = Field(default=320, ge=2)
    """Captions in a step over all processes; each is compared with as many images."""
    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate, the paper's for EVA-CLIP-E; small towers want a higher one."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the rate rises."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end."""
    weight_decay: tuple[float, float] = (0.0, 0.0)
    """Weight decay on matrices, at the start and at the end."""
    precision: Precision = "auto"
    """`auto` is bf16 on GPUs that have it, and fp32 elsewhere."""
    num_validations: int = Field(default=10, ge=1)
    """How often held-out pairs are judged."""

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, given: Any) -> Any:
        """Fill in the published values where none are given."""
        published = isinstance(given, Mapping) and given.get("schedule") == "published"
        return filled(TEXT, given) if published else given

    @model_validator(mode="after")
    def _fits_together(self) -> TextOptions:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above the peak rate, {self.lr:g}")
        return self


@dataclass
class TextTuning:
    """Result of text tuning.

    Attributes:
        curve: one point per validation: `step`, `held_out_loss`, and `loss` of the step (not at the start).
        best_step: step whose state was kept; 0 is the untuned start.
        best_loss: held-out loss of that state.
        num_steps: steps asked for.
        notes: sentences for the user.
    """

    curve: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.inf
    num_steps: int = 0
    notes: list[str] = field(default_factory=list)


def tune_text_(
    pair: Pair,
    train: EmbeddedPairs,
    *,
    held_out: EmbeddedPairs,
    options: TextOptions,
    context: RunContext | None = None,
) -> TextTuning:
    """Tune the text tower of a pair in place, by the loss that such a pair is trained with.

    Args:
        pair: its text tower ends with the best state seen; its image tower is never run.
        train: pairs to learn from; each epoch takes every image once, with one of its captions.
        held_out: pairs that judge which state is best.
        options: length, batch, rate and the rest.
        context: the seed of the order of images and of the choice of captions, the folder for the state, whether to
            continue from the state there, and whether progress is shown. Without it: seed 0, no files.

    Returns:
        The curve of held-out losses, and which state was kept.

    Raises:
        DataError: there are fewer than two images for each process.
        Interrupted: stopped by Ctrl-C; with a work folder, the run can be resumed.
    """
    context = context or RunContext()
    run, state = _Run(pair, train, held_out, options, context), context.work and context.work / TEXT_STATE
    with run.trainable():
        kept = resumed_state(state) if context.resume and state is not None else None
        if kept is not None:
            run.load(kept)
        else:
            if state is not None:
                clear_state(state)
            run.validate(math.nan)
        _loop(run, state)
        run.restore_best_()
    return run.result


def _loop(run: _Run, state: Path | None) -> None:
    """Take steps from where the run is to its end, with validation, state and Ctrl-C."""
    with (
        stop_on_interrupt() as stop,
        progress("text tower", run.num_steps, quiet=run.context.quiet or not is_main()) as bar,
    ):
        bar.done = run.step
        while run.step < run.num_steps:
            loss = run.train_step()
            if not math.isfinite(loss):
                said = f"loss {loss} at step {run.step}: tuning ended there with its best state; give a lower lr."
                run.result.notes = [*run.result.notes, said]
                return
            due, stopped = run.is_due(), any_process(stop.is_set()) and run.step < run.num_steps
            if due:
                run.validate(loss)
            bar.advance(1, f"held-out loss {run.result.curve[-1]['held_out_loss']:.4f}")
            if state is not None and (due or stopped):
                save_state(state, run.state())
            if stopped:
                where = f"; continue with --resume (state in {state})" if state else ""
                raise Interrupted(f"text tuning stopped at step {run.step} of {run.num_steps}{where}.")


class _TextModel(nn.Module):
    """A text tower as a module, so that data-parallel wrappers see the call that trains it."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.model, self.pair = pair.model, pair

    def forward(self, ids_BN: Tensor) -> Tensor:
        return unit(self.pair.embed_texts(ids_BN))


class _Run:
    """A text tuning between two steps: the pair, the optimizer, the pairs to learn from, and what was found so far."""

    def __init__(
        self, pair: Pair, train: EmbeddedPairs, held_out: EmbeddedPairs, options: TextOptions, context: RunContext
    ) -> None:
        from accelerate import Accelerator

        self.pair, self.train, self.held_out, self.options, self.context = pair, train, held_out, options, context
        join_(pair.device.type)
        self.accelerator = Accelerator(cpu=pair.device.type == "cpu")
        self.share = min(len(train), options.batch_size) // num_processes()
        self.batch = self.share * num_processes()
        if self.batch < 2:
            got = f"{len(train)} images and batches of {options.batch_size} for {num_processes()} processes"
            raise DataError(f"captions: {got}; a step needs at least one for each process, and two in all.")
        self.steps_per_epoch = len(train) // self.batch
        self.num_steps = options.steps or max(1, round((options.epochs or 1) * self.steps_per_epoch))
        scale, bias = scale_and_bias(pair.model)  # neither is trained
        self.shift = (float(scale.detach()), float(bias.detach()) if isinstance(bias, Tensor) else None)
        self.step, self.result = 0, TextTuning(num_steps=self.num_steps)
        self.best: dict[str, Tensor] = {}

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Train exactly the text parameters that the loss reaches; put modes and flags back afterwards."""
        with restored(self.pair.model):
            self._require_grad_of_reached_()
            self.optimizer = self._optimizer()
            self.model: nn.Module = self.accelerator.prepare(_TextModel(self.pair))
            yield

    def _require_grad_of_reached_(self) -> None:
        """Set `requires_grad` on exactly those text parameters that one backward pass gives a gradient."""
        self.pair.model.eval().requires_grad_(False)  # no dropout
        named = self.pair.text_parameters()
        for p in named.values():
            p.requires_grad_(True)
        unit(self.pair.embed_texts(self.held_out.ids_ML[:2].long())).sum().backward()
        self.named = {name: p for name, p in named.items() if p.grad is not None}
        for p in named.values():
            p.requires_grad_(p.grad is not None)
            p.grad = None

    def _optimizer(self) -> torch.optim.Optimizer:
        """Build AdamW with weight decay on matrices only, as for the image tower."""
        matrices = [p for p in self.named.values() if p.ndim > 1]
        others = [p for p in self.named.values() if p.ndim <= 1]
        groups = [{"params": matrices, "decays": True}, {"params": others, "decays": False}]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def train_step(self) -> float:
        """Take one step on the whole batch; returns the mean loss over the processes."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.context.seed * 1_000_003 + epoch)
        rows_N = torch.randperm(len(self.train), generator=generator)
        floor = self.options.min_lr / self.options.lr
        shape = rate_shape(self.step, self.num_steps, self.options.warmup_ratio, floor=floor)
        decay = cosine_between(*self.options.weight_decay, self.step / self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * shape
            group["weight_decay"] = decay if group["decays"] else 0.0
        loss = self._loss(*self.train.drawn(rows_N[place * self.batch : (place + 1) * self.batch], generator))
        self.accelerator.backward(loss)
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        total = mean(float(loss.detach()))
        if math.isfinite(total):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def _loss(self, images_BE: Tensor, ids_BL: Tensor) -> Tensor:
        """Return this process's part of the loss of the whole batch."""
        device, own = self.pair.device, slice(rank() * self.share, (rank() + 1) * self.share)
        with autocast(self.options.precision, device):
            texts_QE = self.model(ids_BL[own].to(device))
        return contrastive_loss(images_BE.to(device), gather_rows(texts_QE), *self.shift, own=own)

    def validate(self, loss: float) -> float:
        """Judge held-out pairs in batches of the training's size, add to the curve, keep the state if it is the best.

        Args:
            loss: training loss of the step, for the curve; NaN before the first.

        Returns:
            The mean loss on held-out pairs.
        """
        generator = torch.Generator().manual_seed(self.context.seed)
        images_NE, ids_NL = self.held_out.drawn(torch.arange(len(self.held_out)), generator)
        texts_NE, size, total = unit(embed_all(self.pair, ids_NL)), self.options.batch_size, 0.0
        for images_BE, texts_BE in zip(images_NE.split(size), texts_NE.split(size), strict=True):
            total += len(texts_BE) * float(contrastive_loss(images_BE, texts_BE, *self.shift))
        found = total / len(ids_NL)
        if found < self.result.best_loss or not self.best:
            self.result.best_loss, self.result.best_step = found, self.step
            self.best = {name: p.detach().clone() for name, p in self.named.items()}
        point = {"step": self.step, "held_out_loss": found}
        self.result.curve.append(point if math.isnan(loss) else {**point, "loss": loss})
        return found

    def is_due(self) -> bool:
        """Return whether held-out pairs are judged after this step."""
        return self.step % max(1, self.num_steps // self.options.num_validations) == 0 or self.step == self.num_steps

    def restore_best_(self) -> None:
        """Put the best state seen into the model."""
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(self.best[name])

    def state(self) -> dict[str, Any]:
        """Return nested tensors and plain values from which the run continues exactly."""
        return {
            "text": {name: p.detach() for name, p in self.named.items()},
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "step": self.step,
            "result": dict(self.result.__dict__),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Put a saved state into the run."""
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(saved["text"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best, self.step = dict(saved["best"]), saved["step"]
        self.result = TextTuning(**saved["result"])
