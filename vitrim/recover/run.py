"""Everything that a step of distillation reads and writes: models, optimizer, order of images, best state, curve.

The rate is a function of the step and the order of images of seed and epoch, so what `state` gives is all it takes to
go on exactly. When and how long is decided in `distill.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.config.options import RecoverOptions
from vitrim.data import ImageSet, ImageStream
from vitrim.distributed.precision import attention_in_float32, is_bf16
from vitrim.distributed.processes import from_main, mean, num_processes
from vitrim.distributed.sharding import block_paths, checkpointed, full, local, shard, share_of
from vitrim.metrics.judging import FeatureModel, features_on_cpu, relative_error
from vitrim.models.features import features, restored
from vitrim.progress import progress
from vitrim.recover.adapters import adapted, notes_on, without_decay
from vitrim.recover.elastic import Widths
from vitrim.recover.losses import EmbeddingSpace, feature_loss, patches_at, space_loss
from vitrim.recover.sampler import MicroBatch, open_sampler
from vitrim.recover.schedule import cosine_between, rate_shape, rates_to_try
from vitrim.recover.targets import LiveTargets, Target, Targets, in_precision, open_cached
from vitrim.types import Features

# A loss this many times the usual one, or one that is no number, is a run that has left the road.
EXPLODED = 100.0
# The rate after a roll-back, and how many a run may have.
SLOWER, MAX_ROLLBACKS = 0.5, 8
# What a run in one process says to a wish for shards.
ALONE = "recover.fsdp: there is one process, so nothing was spread; start several with torchrun."
# A short run may end this much above the start before its rate counts as too high, if the start is nearer than that.
SHOCK, NEAR = 1.5, 0.1
# An error below this is none.
TINY = 1e-12


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
    adapter: dict[str, Any] | None = None


class Run:
    """Everything that a step reads and writes."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: ImageSet | ImageStream,
        held_out: Sequence[Tensor],
        options: RecoverOptions,
        seed: int,
        widths: Widths | None = None,
        cache: Path | None = None,
        space: EmbeddingSpace | None = None,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.student, self.teacher, self.options, self.widths = student, teacher, options, widths
        self.device = next(student.parameters()).device
        # A step at one width has nothing to say to the output weights of the others.
        some_unused = DistributedDataParallelKwargs(find_unused_parameters=widths is not None)
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", kwargs_handlers=[some_unused])
        self.is_main = self.accelerator.is_main_process
        self.order = open_sampler(
            images,
            options,
            seed,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        self.num_steps = options.steps or max(1, round((options.epochs or 1) * self.order.steps_per_epoch))
        self.step, self.result = 0, Recovery(num_steps=self.num_steps)
        self.usual: dict[float, float] = {}  # by MLP ratio: a narrow student's loss is no measure for a wide one's
        self.held_out = [(batch, features_on_cpu(teacher, batch, options.features_at)) for batch in held_out]
        live = LiveTargets(teacher, options, self.device)
        self.targets: Targets = live
        if cache is not None and isinstance(images, ImageSet):  # a stream is never cached
            self.targets = open_cached(live, images, self.held_out[0][1], seed=seed, folder=cache)
        self.spread = options.fsdp and num_processes() > 1
        self.notes = [ALONE] if options.fsdp and not self.spread else []
        self.blocks = block_paths(teacher) if self.spread or options.checkpoint_activations else []
        # With a cache each process runs the teacher when it meets a gap, which shards can't: all have to run together.
        self.teacher_spread = self.spread and cache is None
        if self.teacher_spread:
            dtype = torch.bfloat16 if is_bf16(options.precision, self.device) else None
            live.teacher = shard(teacher, self.blocks, device=self.device, at=options.features_at, dtype=dtype)
        self.best: dict[str, Tensor] = {}
        self.best_score = math.inf
        self.ema: dict[str, Tensor] = {}
        self.space = None if space is None else space.to(self.device)

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Train exactly the parameters that the loss reaches; put modes and flags back afterwards."""
        with restored(self.student):
            self._require_grad_of_reached_()
            try:
                with adapted(self.student, self.options.adapter, seed=self.order.seed, write=self.is_main) as adapter:
                    with self._prepared():
                        yield
                self.result.adapter, self.result.notes = adapter, [*self.result.notes, *notes_on(adapter)]
            finally:
                for model in (self.student, self.teacher) if self.spread else ():  # they waited in main memory
                    model.to(self.device)

    def _require_grad_of_reached_(self) -> None:
        """Have exactly those parameters ask for gradients that one backward pass gives one."""
        self.student.eval()  # no dropout, no drop path: the target is the teacher's deterministic output
        for p in self.student.parameters():
            p.requires_grad_(p.is_floating_point())  # int8 weights stay as they are
        probe, target = self.held_out[0]
        for ratio in [None] if self.widths is None else self.widths.units:
            with self._held(self.student, ratio):
                found = features(self.student, probe[:2].to(self.device), at=self.options.features_at)
                feature_loss(found, _first(target, 2, self.device)).backward()
        for p in self.student.parameters():
            p.requires_grad_(p.grad is not None)
            p.grad = None

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """What trains: the student itself, or a copy of it in shards; it is judged as it is, without a wrapper."""
        at = self.options.features_at
        self.judged = FeatureModel(self.student, at)
        if self.spread:
            self.judged = shard(self.student, self.blocks, device=self.device, at=at)
        self.trained = self.judged.model
        self.parameters = list(self._named().values())
        self.optimizer = self._optimizer()
        self.model: nn.Module = self.judged if self.spread else self.accelerator.prepare(self.judged)
        with checkpointed(self.trained, self.blocks) if self.options.checkpoint_activations else nullcontext():
            yield

    def _named(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.trained.named_parameters() if p.requires_grad}

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW with decay on matrices only, the betas of the paper."""
        spared = without_decay(self.trained, self.options.adapter)
        matrices = [p for p in self.parameters if p.ndim > 1 and id(p) not in spared]
        others = [p for p in self.parameters if p.ndim <= 1 or id(p) in spared]
        groups = [{"params": matrices, "decays": True}, {"params": others, "decays": False}]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def start(self, quiet: bool) -> None:
        """Judge the untrained student, keep it as best so far, and find the rate if none was given."""
        self.validate(loss=math.nan)
        self.result.lr = self.options.lr or self._find_rate(quiet)
        self.ema = {name: p.detach().clone() for name, p in self._named().items()} if self.options.ema else {}

    def _find_rate(self, quiet: bool) -> float:
        """Short runs from the same start, each with a full schedule, at falling rates.

        Where a rate improves the student at once, the best such rate is taken. A repaired student is near its optimum:
        no short run improves it, all that shows is the shock of the first noisy steps; then the largest rate whose
        shock stays within SHOCK is taken, since the full run has the time to make up for it. A student that is not
        NEAR the original has everything to gain, so there a rate has to improve it.
        """
        num_steps = max(8, min(30, self.num_steps // 10))
        start = self._values()
        errors: dict[float, float] = {}
        chosen: float | None = None
        shock = SHOCK if self.result.curve[0]["relative_error"] < NEAR else 1.0
        rates = rates_to_try(self.options)
        with progress("range test", len(rates), quiet=quiet or not self.is_main) as bar:
            for rate in rates:
                for batches in self.batches(0, num_steps):
                    self.train_step(batches, lr=rate * rate_shape(self.step, num_steps, self.options.warmup_ratio))
                errors[rate] = self._score(self._held_out_errors())
                self.trained.load_state_dict(start)
                self.optimizer.state.clear()
                self.step, self.usual = 0, {}
                bar.advance(1, f"rate {rate:g}: error {errors[rate]:.4f}")
                if chosen is not None and errors[rate] >= errors[chosen]:
                    break
                if errors[rate] <= shock * self.best_score:
                    chosen = rate
                    if errors[rate] > self.best_score:
                        break
        self.result.rate_test = {f"{rate:g}": error for rate, error in errors.items()}
        return chosen or rates[-1]

    def is_due(self) -> bool:
        """Whether held-out images are to be judged after this step."""
        every = max(1, self.num_steps // self.options.num_validations)
        return self.step % every == 0 or self.step == self.num_steps

    def is_kept(self) -> bool:
        """Whether the state is to be kept after this step."""
        every = self.options.save_every
        return self.is_due() or (every is not None and self.step % every == 0)

    @property
    def ratio(self) -> float:
        """The MLP ratio that the step at hand trains; 1 stands for the only one there is."""
        return 1.0 if self.widths is None else self.widths.at(self.step, self.order.seed)

    @property
    def current_rate(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def batches(self, first: int, last: int | None = None) -> Iterator[list[MicroBatch]]:
        """This process's images for steps `first`..`last`, a list of micro-batches each."""
        return self.order.steps(first, self.num_steps if last is None else last)

    def train_step(self, batches: Sequence[MicroBatch], lr: float | None = None) -> float:
        """One optimizer step over a list of micro-batches; the mean loss over the images of all processes."""
        shape = rate_shape(self.step, self.num_steps, self.options.warmup_ratio)
        decay = cosine_between(*self.options.weight_decay, self.step / self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.result.lr * shape if lr is None else lr
            group["weight_decay"] = decay if group["decays"] else 0.0
        total, share = 0.0, self.order.global_batch / num_processes()
        exact_attention = attention_in_float32(self.device, enabled=is_bf16(self.options.precision, self.device))
        with self._held(self.trained, self.ratio), exact_attention:
            for index, batch in enumerate(batches):
                last = index == len(batches) - 1
                with nullcontext() if last else self.accelerator.no_sync(self.model):
                    loss = self._loss(batch) * (len(batch.images_BCHW) / share)
                    self.accelerator.backward(loss)
                total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        total = mean(total)
        self.diverged = self._is_bad(total)
        if not self.diverged:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step % self.order.steps_per_epoch == 0:
            self.targets.flush()
            self.accelerator.wait_for_everyone()
            self.targets.refresh()
        for average, p in zip(self.ema.values(), self.parameters, strict=False):
            local(average).lerp_(local(p.detach()), 1 - self.options.ema)
        return total

    def _held(self, model: nn.Module, ratio: float | None) -> AbstractContextManager[None]:
        """A model at one of its widths, where it has several."""
        return nullcontext() if self.widths is None or ratio is None else self.widths.held(model, ratio)

    def _is_bad(self, loss: float) -> bool:
        """Whether a loss is no number, or far above what it has been."""
        all_seen = len(self.usual) == (1 if self.widths is None else len(self.widths.units))
        if not math.isfinite(loss) or (all_seen and loss > EXPLODED * max(self.usual.values())):
            return True
        before = self.usual.get(self.ratio)
        self.usual[self.ratio] = loss if before is None else max(0.9 * before + 0.1 * loss, loss / EXPLODED)
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
        """The mean feature loss on a micro-batch; where no image could be read, on one without meaning."""
        readable = len(batch.images_BCHW) > 0
        if not readable:
            batch = batch._replace(images_BCHW=torch.zeros_like(self.held_out[0][0][:1]))
        if readable or self.teacher_spread:  # a teacher in shards runs on all processes or none
            target = self.targets(batch)
        else:
            target = Target(_first(self.held_out[0][1], 1, self.device))
        with in_precision(self.options, self.device):
            pooled, patches = self.model(batch.images_BCHW.to(self.device))
        found = patches_at(Features(pooled_BD=pooled, patches_BND=patches), target.positions_BP)
        if self.space is not None:
            return space_loss(found, target.features, self.space)
        return feature_loss(found, target.features)

    def validate(self, loss: float) -> float:
        """Judge the state (its moving average where one is kept), add to the curve, keep it if it is the best."""
        with self._averaged():
            errors = self._held_out_errors()
            error, score = errors["relative_error"], self._score(errors)
            if score < self.best_score:
                self.best_score, self.result.best_error, self.result.best_step = score, error, self.step
                self.best = self._values()
        point = {"step": self.step, **errors}
        self.result.curve.append(point if math.isnan(loss) else {**point, "loss": loss})
        return error

    def _score(self, errors: Mapping[str, float]) -> float:
        """What a state is judged by, the lower the better.

        With several widths it is the worst of their errors, each as a multiple of what that width started with: so a
        state that is kept has made none of them worse, however large the gain of another.
        """
        first = self.result.curve[0] if self.result.curve else errors
        changes = [max(error, TINY) / max(first[key], TINY) for key, error in errors.items() if key != "relative_error"]
        return max(changes, default=errors["relative_error"])

    def _held_out_errors(self) -> dict[str, float]:
        """The relative error; with several widths their mean, and that of each."""
        if self.widths is None:
            return from_main({"relative_error": relative_error(self.judged, self.held_out, self.options.features_at)})
        errors = {}
        for ratio in self.widths.units:
            with self._held(self.trained, ratio):
                errors[f"mlp_ratio={ratio:g}"] = relative_error(self.judged, self.held_out, self.options.features_at)
        return from_main({"relative_error": sum(errors.values()) / len(errors), **errors})

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Hold the moving average in place of the parameters."""
        if not self.ema:
            yield
            return
        current = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                for p, average in zip(self.parameters, self.ema.values(), strict=True):
                    p.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.parameters, current, strict=True):
                    p.copy_(value)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which the run goes on exactly, with the targets on disk.

        Tensors stand by the names of their parameters, so any number of processes can take them up.
        """
        self.targets.flush()
        moments = {name: self.optimizer.state.get(p, {}) for name, p in self._named().items()}
        return {
            "student": self.trained.state_dict(),
            "optimizer": {name: dict(kept) for name, kept in moments.items()},
            "best": self.best,
            "ema": self.ema,
            "step": self.step,
            "usual": dict(self.usual),
            "best_score": self.best_score,
            "result": dict(self.result.__dict__),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take up a saved state; what changes in place is copied, so that it can be taken up again."""
        self.trained.load_state_dict(saved["student"])
        self.optimizer.state.clear()
        for name, p in self._named().items():
            moments = saved["optimizer"][name].items()
            if moments:  # torch counts steps on the CPU
                self.optimizer.state[p] = {
                    key: value.clone() if key == "step" else value.to(p.device, copy=True) for key, value in moments
                }
        self.best, self.step, self.usual = dict(saved["best"]), saved["step"], dict(saved["usual"])
        self.best_score = saved["best_score"]
        self.ema = {name: average.to(self.device, copy=True) for name, average in saved["ema"].items()}
        kept = saved["result"]
        self.result = Recovery(**{**kept, "curve": list(kept["curve"]), "notes": list(kept["notes"])})

    def place(self, keys: Sequence[Any], tensor: Tensor) -> Tensor:
        """A whole tensor of a saved state as this process holds it: its share, where its parameter is in shards."""
        held = self.trained.state_dict()
        return share_of(tensor, held[name]) if (name := next((key for key in keys if key in held), None)) else tensor

    def finish(self) -> None:
        """Give the student the best state seen."""
        self.student.load_state_dict({name: full(tensor).cpu() for name, tensor in self.best.items()})

    def _values(self) -> dict[str, Tensor]:
        """Copies of all that the student holds."""
        return {name: tensor.detach().clone() for name, tensor in self.trained.state_dict().items()}


def _first(found: Features, count: int, device: torch.device) -> Features:
    """The first images of a batch of features, on a device."""
    patches = None if found.patches_BND is None else found.patches_BND[:count].to(device)
    return Features(pooled_BD=found.pooled_BD[:count].to(device), patches_BND=patches)
