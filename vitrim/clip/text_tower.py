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
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from vitrim.clip.contrastive import contrastive_loss, gather_rows
from vitrim.config.options import Precision
from vitrim.data import PairSet
from vitrim.distributed.precision import autocast
from vitrim.distributed.processes import any_process, is_main, mean, num_processes, rank
from vitrim.errors import DataError, Interrupted
from vitrim.metrics.retrieval import embed_captioned
from vitrim.metrics.zero_shot import embed_all
from vitrim.models.features import restored
from vitrim.models.towers import Pair, scale_and_bias, unit
from vitrim.progress import progress
from vitrim.recover.schedule import rate_shape, stop_on_interrupt
from vitrim.recover.state import clear_state, has_state, load_state, save_state


class TextOptions(BaseModel):
    """Text tuning. One of `steps` and `epochs` says how long.

    `batch_size` is that of a step over all processes: every caption is compared with that many images. The rate is the
    paper's for EVA-CLIP-E; small towers want a higher one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=320, ge=2)
    lr: float = Field(default=1e-6, gt=0)
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    precision: Precision = "auto"
    num_validations: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> TextOptions:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


@dataclass(frozen=True, kw_only=True)
class EmbeddedPairs:
    """Images as unit vectors (N, E), and the token ids of all captions (M, L).

    The captions of image i are those from first_N[i] to first_N[i + 1].
    """

    images_NE: Tensor
    ids_ML: Tensor
    first_N: Tensor
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.images_NE)

    def drawn(self, rows_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Vectors of these images, and the ids of one caption of each, drawn at random."""
        counts_N = self.first_N[1:] - self.first_N[:-1]
        draw_N = (torch.rand(len(self), generator=generator) * counts_N).long()
        return self.images_NE[rows_B], self.ids_ML[(self.first_N[:-1] + draw_N)[rows_B]].long()

    def split(self, num_held_out: int, seed: int) -> tuple[EmbeddedPairs, EmbeddedPairs]:
        """The rest and the held-out images, drawn at random, each with its captions."""
        if not 0 < num_held_out < len(self):
            raise DataError(
                f"captions: asked to hold out {num_held_out} of {len(self)} images; use 1..{len(self) - 1}."
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._subset(order[num_held_out:]), self._subset(order[:num_held_out])

    def _subset(self, rows: Tensor) -> EmbeddedPairs:
        counts = (self.first_N[1:] - self.first_N[:-1])[rows]
        places = torch.cat([torch.arange(int(self.first_N[row]), int(self.first_N[row + 1])) for row in rows])
        first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return EmbeddedPairs(images_NE=self.images_NE[rows], ids_ML=self.ids_ML[places], first_N=first)


@dataclass
class TextTuning:
    """What tuning did: the curve of held-out losses and the step whose state was kept."""

    curve: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.inf
    num_steps: int = 0
    notes: list[str] = field(default_factory=list)


def embed_pairs(pair: Pair, pairs: PairSet, *, batch_size: int = 64, num_workers: int = 0) -> EmbeddedPairs:
    """Run the image tower once over all images, each process over its share, and tokenise the captions.

    Raises:
        DataError: no image could be read.
        ModelError: the pair's tokenizer is not known.
    """
    from accelerate.utils import gather_object

    share = pairs.shared(rank(), num_processes())
    vectors, captions, rows, num_skipped = embed_captioned(
        pair.model, share.batches(batch_size, num_workers=num_workers)
    )
    found = [(vectors, captions, rows, num_skipped)]
    found = gather_object(found) if num_processes() > 1 else found
    order = torch.cat([rows for _, _, rows, _ in found]).argsort().tolist()
    texts = [texts for _, captions, _, _ in found for texts in captions]
    texts = [texts[place] for place in order]
    counts = torch.tensor([0, *(len(each) for each in texts)])
    return EmbeddedPairs(
        images_NE=unit(torch.cat([vectors for vectors, *_ in found])[order]),
        ids_ML=pair.tokenize([text for each in texts for text in each]).int(),
        first_N=counts.cumsum(0),
        num_skipped=sum(num for *_, num in found),
    )


def tune_text_(
    pair: Pair,
    train: EmbeddedPairs,
    held_out: EmbeddedPairs,
    *,
    options: TextOptions,
    seed: int = 0,
    state: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> TextTuning:
    """Tune the text tower of a pair in place, by the loss that such a pair is trained with.

    Args:
        pair: its text tower ends with the best state seen; its image tower is never run.
        train: pairs to learn from; each epoch takes every image once, with one of its captions.
        held_out: pairs that judge which state is best.
        options: length, batch, rate and the rest.
        seed: of the order of images and the choice of captions.
        state: where to keep a resumable state; None keeps none.
        resume: continue from `state` where it exists.
        quiet: show no progress.

    Raises:
        DataError: there are fewer than two images for each process.
        Interrupted: stopped by Ctrl-C; with `state`, the run can be resumed.
    """
    run = _Run(pair, train, held_out, options, seed)
    with run.trainable():
        if resume and state is not None and has_state(state):
            run.load(load_state(state))
        else:
            if state is not None:
                clear_state(state)
            run.validate(math.nan)
        _loop(run, state, quiet)
        run.restore_best_()
    return run.result


class _TextModel(nn.Module):
    """The text tower as a module, so that data-parallel wrappers see the call that trains it."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.model, self.pair = pair.model, pair

    def forward(self, ids_BN: Tensor) -> Tensor:
        return unit(self.pair.embed_texts(ids_BN))


class _Run:
    """Everything that a step reads and writes."""

    def __init__(
        self, pair: Pair, train: EmbeddedPairs, held_out: EmbeddedPairs, options: TextOptions, seed: int
    ) -> None:
        from accelerate import Accelerator

        self.pair, self.train, self.held_out, self.options, self.seed = pair, train, held_out, options, seed
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
        """Have exactly those text parameters ask for gradients that one backward pass gives one."""
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
        """AdamW with decay on matrices only, as for the image tower."""
        matrices = [p for p in self.named.values() if p.ndim > 1]
        others = [p for p in self.named.values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))

    def train_step(self) -> float:
        """One step on the whole batch; the mean loss over the processes."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows_N = torch.randperm(len(self.train), generator=generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * rate_shape(self.step, self.num_steps, self.options.warmup_ratio)
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
        """This process's part of the loss of the whole batch."""
        device, own = self.pair.device, slice(rank() * self.share, (rank() + 1) * self.share)
        with autocast(self.options.precision, device):
            texts_QE = self.model(ids_BL[own].to(device))
        return contrastive_loss(images_BE.to(device), gather_rows(texts_QE), *self.shift, own=own)

    def validate(self, loss: float) -> float:
        """The loss on held-out pairs, in batches of the training's size; keeps the state if it is the best."""
        generator = torch.Generator().manual_seed(self.seed)
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
        """Whether held-out pairs are to be judged after this step."""
        return self.step % max(1, self.num_steps // self.options.num_validations) == 0 or self.step == self.num_steps

    def restore_best_(self) -> None:
        """Put the best state into the model."""
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(self.best[name])

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which the run goes on exactly."""
        return {
            "text": {name: p.detach() for name, p in self.named.items()},
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "step": self.step,
            "result": dict(self.result.__dict__),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(saved["text"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best, self.step = dict(saved["best"]), saved["step"]
        self.result = TextTuning(**saved["result"])


def _loop(run: _Run, state: Path | None, quiet: bool) -> None:
    """Steps from where the run stands to its end, with validation, state and Ctrl-C."""
    with stop_on_interrupt() as stop, progress("text tower", run.num_steps, quiet=quiet or not is_main()) as bar:
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
