"""Everything that a step of distillation reads and writes: models, optimizer, order of images, best state, curve.

The rate is a function of the step and the order of images of seed and epoch, so what `state` gives is all it takes to
go on exactly. When and how long is decided in `distill.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.data import ImageSet
from vitrim.models.taps import evaluating, features
from vitrim.progress import progress
from vitrim.recipe import RecoverOptions
from vitrim.recover.losses import FeatureModel, feature_loss
from vitrim.recover.order import MicroBatch, Order
from vitrim.recover.schedule import cosine_between, rate_shape
from vitrim.recover.targets import LiveTargets, Targets, autocast, features_on_cpu
from vitrim.types import Features

# Rates of the range test, from the paper's own scale down; a repaired student wants the low end.
RATES = (2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5)
# A loss this many times the usual one, or one that is no number, is a run that has left the road.
EXPLODED = 100.0
# The rate after a roll-back, and how many a run may have.
SLOWER, MAX_ROLLBACKS = 0.5, 8
# A short run may end this much above the start before its rate counts as too high.
SHOCK = 1.5


@dataclass
class Recovery:
    """What recovery did: the curve of held-out relative errors, the rate it used and the step whose state was kept."""

    curve: list[dict[str, float]] = field(default_factory=list)
    lr: float = 0.0
    best_step: int = 0
    best_error: float = math.inf
    rate_test: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0
    notes: list[str] = field(default_factory=list)


class Run:
    """Everything that a step reads and writes."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: ImageSet,
        held_out: Sequence[Tensor],
        options: RecoverOptions,
        seed: int,
    ) -> None:
        from accelerate import Accelerator

        self.student, self.options = student, options
        self.device = next(student.parameters()).device
        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        self.is_main = self.accelerator.is_main_process
        self.order = Order(
            images,
            options,
            seed,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        self.num_steps = options.steps or max(1, round((options.epochs or 1) * self.order.steps_per_epoch))
        self.targets: Targets = LiveTargets(teacher, options, self.device)
        self.step, self.result, self.usual = 0, Recovery(num_steps=self.num_steps), math.nan
        self.held_out = [(batch, features_on_cpu(teacher, batch, options.features_at)) for batch in held_out]
        self.best: dict[str, Tensor] = {}
        self.ema: list[Tensor] = []

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Train exactly the parameters that the loss reaches; put modes and flags back afterwards."""
        flags = {name: p.requires_grad for name, p in self.student.named_parameters()}
        modes = {module: module.training for module in self.student.modules()}
        self.student.eval()  # no dropout, no drop path: the target is the teacher's deterministic output
        self.student.requires_grad_(True)
        probe, target = self.held_out[0]
        found = features(self.student, probe[:2].to(self.device), at=self.options.features_at)
        feature_loss(found, _first(target, 2, self.device)).backward()
        for p in self.student.parameters():
            p.requires_grad_(p.grad is not None)
            p.grad = None
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = self._optimizer()
        self.model: nn.Module = self.accelerator.prepare(FeatureModel(self.student, self.options.features_at))
        try:
            yield
        finally:
            for name, p in self.student.named_parameters():
                p.requires_grad_(flags[name])
                p.grad = None
            for module, mode in modes.items():
                module.training = mode

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW with decay on matrices only, the betas of the paper."""
        matrices = [p for p in self.parameters if p.ndim > 1]
        others = [p for p in self.parameters if p.ndim <= 1]
        groups = [{"params": matrices, "decays": True}, {"params": others, "decays": False}]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def start(self, quiet: bool) -> None:
        """Judge the untrained student, keep it as best so far, and find the rate if none was given."""
        self.validate(loss=math.nan)
        self.result.lr = self.options.lr or self._find_rate(quiet)
        self.ema = [p.detach().clone() for p in self.parameters] if self.options.ema else []

    def _find_rate(self, quiet: bool) -> float:
        """Short runs from the same start, each with a full schedule, at falling rates.

        Where a rate improves the student at once, the best such rate is taken. A repaired student is near its optimum:
        no short run improves it, all that shows is the shock of the first noisy steps; then the largest rate whose
        shock stays within SHOCK is taken, since the full run has the time to make up for it.
        """
        num_steps = max(8, min(30, self.num_steps // 10))
        start = copy.deepcopy(self.student.state_dict())
        errors: dict[float, float] = {}
        chosen: float | None = None
        with progress("range test", len(RATES), quiet=quiet or not self.is_main) as bar:
            for rate in RATES:
                for batches in self.batches(0, num_steps):
                    self.train_step(batches, lr=rate * rate_shape(self.step, num_steps, self.options.warmup_ratio))
                errors[rate] = self._held_out_error()
                self.student.load_state_dict(start)
                self.optimizer.state.clear()
                self.step, self.usual = 0, math.nan
                bar.advance(1, f"rate {rate:g}: error {errors[rate]:.4f}")
                if chosen is not None and errors[rate] >= errors[chosen]:
                    break
                if errors[rate] <= SHOCK * self.result.best_error:
                    chosen = rate
                    if errors[rate] > self.result.best_error:
                        break
        self.result.rate_test = {f"{rate:g}": error for rate, error in errors.items()}
        return chosen or RATES[-1]

    def is_due(self) -> bool:
        """Whether held-out images are to be judged after this step."""
        every = max(1, self.num_steps // self.options.num_validations)
        return self.step % every == 0 or self.step == self.num_steps

    @property
    def current_rate(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def batches(self, first: int, last: int | None = None) -> Iterator[list[MicroBatch]]:
        """This process's images for steps `first`..`last`, a list of micro-batches each."""
        return self.order.steps(first, self.num_steps if last is None else last)

    def train_step(self, batches: Sequence[MicroBatch], lr: float | None = None) -> float:
        """One optimizer step over a list of micro-batches; the mean loss."""
        shape = rate_shape(self.step, self.num_steps, self.options.warmup_ratio)
        decay = cosine_between(*self.options.weight_decay, self.step / self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.result.lr * shape if lr is None else lr
            group["weight_decay"] = decay if group["decays"] else 0.0
        total = 0.0
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(batch) / len(batches)
                self.accelerator.backward(loss)
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.diverged = self._is_bad(total)
        if not self.diverged:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for mean, p in zip(self.ema, self.parameters, strict=False):
            mean.lerp_(p.detach(), 1 - self.options.ema)
        return total

    def _is_bad(self, loss: float) -> bool:
        """Whether any process's loss is no number, or far above what it has been."""
        total = float(self.accelerator.reduce(torch.tensor(loss, device=self.device), reduction="mean"))  # type: ignore[arg-type]
        if not math.isfinite(total) or total > EXPLODED * self.usual:  # a comparison with NaN is False
            return True
        self.usual = total if math.isnan(self.usual) else max(0.9 * self.usual + 0.1 * total, total / EXPLODED)
        return False

    def roll_back(self, saved: Mapping[str, Any], loss: float) -> bool:
        """Go back to a good state with a lower rate, and say so; False where that has not helped too often."""
        failed, rate, notes = self.step, self.result.lr * SLOWER, list(self.result.notes)
        if len(notes) >= MAX_ROLLBACKS:
            said = f"diverged again at step {failed}: distillation ended there with its best state; give a lower lr."
            self.result.notes = [*notes, said]
            return False
        self.load(saved)
        self.result.lr = rate
        said = f"loss {loss:.3g} at step {failed}: went back to step {self.step} with the rate lowered to {rate:.3g}."
        self.result.notes = [*notes, said]
        return True

    def _loss(self, batch: MicroBatch) -> Tensor:
        """The feature loss on a micro-batch; one whose images were all unreadable counts nothing."""
        weight = 1.0 if len(batch.images_BCHW) else 0.0
        if not weight:
            batch = batch._replace(images_BCHW=torch.zeros_like(self.held_out[0][0][:1]))
        target = self.targets(batch) if weight else _first(self.held_out[0][1], 1, self.device)
        with autocast(self.options, self.device):
            pooled, patches = self.model(batch.images_BCHW.to(self.device))
        return weight * feature_loss(Features(pooled_BD=pooled, patches_BND=patches), target)

    def validate(self, loss: float) -> float:
        """Judge the state (its moving average where one is kept), add to the curve, keep it if it is the best."""
        with self._averaged():
            error = self._held_out_error()
            if error < self.result.best_error:
                self.result.best_error, self.result.best_step = error, self.step
                self.best = {name: tensor.detach().clone() for name, tensor in self.student.state_dict().items()}
        point = {"step": self.step, "relative_error": error}
        self.result.curve.append(point if math.isnan(loss) else {**point, "loss": loss})
        return error

    def _held_out_error(self) -> float:
        from vitrim.metrics.fidelity import TokenComparison

        compared = TokenComparison()
        with evaluating(self.student):
            for images, target in self.held_out:
                found = features(self.student, images.to(self.device), at=self.options.features_at)
                for mine, theirs in zip(_parts(found), _parts(target), strict=True):
                    compared.update(mine.cpu(), theirs)
        return compared.relative_error if math.isfinite(compared.relative_error) else math.inf

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Hold the moving average in place of the parameters."""
        if not self.ema:
            yield
            return
        current = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                for p, mean in zip(self.parameters, self.ema, strict=True):
                    p.copy_(mean)
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.parameters, current, strict=True):
                    p.copy_(value)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which the run goes on exactly."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "ema": self.ema,
            "step": self.step,
            "usual": self.usual,
            "result": dict(self.result.__dict__),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        self.student.load_state_dict(saved["student"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best, self.step, self.usual = dict(saved["best"]), saved["step"], saved["usual"]
        self.ema = [mean.to(self.device) for mean in saved["ema"]]
        kept = saved["result"]
        self.result = Recovery(**{**kept, "curve": list(kept["curve"]), "notes": list(kept["notes"])})


def _first(found: Features, count: int, device: torch.device) -> Features:
    """The first images of a batch of features, on a device."""
    patches = None if found.patches_BND is None else found.patches_BND[:count].to(device)
    return Features(pooled_BD=found.pooled_BD[:count].to(device), patches_BND=patches)


def _parts(found: Features) -> list[Tensor]:
    """The tensors that features hold."""
    return [found.pooled_BD] + ([] if found.patches_BND is None else [found.patches_BND])
