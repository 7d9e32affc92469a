"""Everything that a step of distillation reads and writes: models, optimizer, order of images, best state, curve.

The rate is a function of the step, and the order of images is a function of seed and epoch, so a snapshot of what is
held here is all it takes to continue exactly. When and how long to train is decided in `distill.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from vitrim.config.options import RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import ImageSet, ImageStream
from vitrim.distributed.precision import attention_in_float32, is_bf16
from vitrim.distributed.processes import join_, mean, num_processes
from vitrim.distributed.sharding import block_paths, checkpointed, full, local, shard
from vitrim.errors import RecipeError
from vitrim.inputs import is_named
from vitrim.metrics.judging import FeatureModel, kept_by, read_features
from vitrim.models.features import restored
from vitrim.recover.adapters import adapted, notes_on
from vitrim.recover.elastic import Widths, at_width
from vitrim.recover.judge import Judge, score
from vitrim.recover.losses import EmbeddingSpace, class_loss, feature_loss, patches_at, space_loss
from vitrim.recover.optimizers import adamw, relative_steps, sgd
from vitrim.recover.result import Recovery, Validation
from vitrim.recover.sampler import MicroBatch, open_sampler
from vitrim.recover.schedule import cosine_between, rate_shape
from vitrim.recover.targets import LiveTargets, Target, Targets, cache_folder, in_precision, open_cached
from vitrim.repair.relative_steps import RelativeSteps
from vitrim.tokens import Features, features_of

# A loss this many times the usual one, or one that is no number, means that the run has diverged.
EXPLODED = 100.0
# Note for the user where shards were asked for and there is one process.
ALONE = "recover.fsdp: there is one process, so nothing was spread; start several with torchrun."


class Run:
    """A distillation between two steps: models, optimizer, images, targets, and what was found so far.

    Args:
        student: the cut model; trained in place, or as a copy in shards.
        teacher: the original.
        images: what to train on, augmented already.
        held_out: preprocessed images (B, C, H, W) that judge the student.
        options: length, batch, rate and the rest.
        context: seed, whether progress is shown, and the folder for a teacher cache that has none of its own.
        widths: the widths that the student serves, where it serves several.
        space: where pooled vectors are compared, for the image tower of a pair.

    Raises:
        RecipeError: the options don't fit the images, or a cache of targets has no folder.
        CheckpointError: the folder of the teacher cache holds the cache of something else.
        OutputError: the folder of the teacher cache can't be used.
    """

    # How the bar, and messages, call it.
    title, name, result_name = "distil", "distillation", "recovery"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        images: ImageSet | ImageStream,
        held_out: Sequence[Tensor],
        options: RecoverOptions,
        context: RunContext,
        widths: Widths | None = None,
        space: EmbeddingSpace | None = None,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        cache = cache_folder(options, context.work)
        self.student, self.teacher, self.options, self.widths = student, teacher, options, widths
        self.context, self.device = context, next(student.parameters()).device
        join_(self.device.type)
        # A step at one width gives no gradient to the output weights of the others.
        some_unused = DistributedDataParallelKwargs(find_unused_parameters=widths is not None)
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", kwargs_handlers=[some_unused])
        self.is_main = self.accelerator.is_main_process
        ranks = {"rank": self.accelerator.process_index, "num_processes": self.accelerator.num_processes}
        self.sampler = open_sampler(images, options, context.seed, **ranks)
        self.num_steps = options.steps or max(1, round((options.epochs or 1) * self.sampler.steps_per_epoch))
        self.step, self.result = 0, Recovery(num_steps=self.num_steps, optimizer=options.steps_by)
        self.usual: dict[float, float] = {}  # by MLP ratio: a narrow student's loss is no measure for a wide one's
        self.judge = self._make_judge(held_out)
        live = LiveTargets(teacher, options, self.device)
        self.targets: Targets = live
        if cache is not None and isinstance(images, ImageSet):  # a stream is never cached
            self.targets = open_cached(live, images, self.judge.held_out[0][1], seed=context.seed, folder=cache)
        self.spread = options.fsdp and num_processes() > 1
        self.notes = [ALONE] if options.fsdp and not self.spread else []
        self.blocks = block_paths(teacher) if self.spread or options.checkpoint_activations else []
        # With a cache each process runs the teacher when a target is missing, which shards can't: they run together.
        self.teacher_spread = self.spread and cache is None
        if self.teacher_spread:
            dtype = torch.bfloat16 if is_bf16(options.precision, self.device) else None
            live.teacher = shard(teacher, self.blocks, device=self.device, at=options.features_at, dtype=dtype)
        self.since = time.monotonic()  # when `result.seconds` was last brought up to date
        self.best: dict[str, Tensor] = {}
        self.best_score = math.inf
        self.ema: dict[str, Tensor] = {}
        self.space = None if space is None else space.to(self.device)
        self.kept_patches = kept_by(student, self.judge.held_out[0][0])
        cached = options.cache_teacher
        if self.kept_patches and cached is not None and (cached.num_patches or cached.patch_ratio):
            raise RecipeError(
                "recover.cache_teacher: keeps some patches of each image, and the student keeps others; leave out "
                "num_patches and patch_ratio."
            )

    def _make_judge(self, held_out: Sequence[Tensor]) -> Judge:
        """Return what measures the student on held-out images."""
        return Judge(self.teacher, held_out, at=self.options.features_at, widths=self.widths)

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Train exactly the parameters that the loss reaches; put modes and flags back afterwards."""
        with restored(self.student):
            self._require_grad_of_reached_()
            try:
                with adapted(self.student, self.options.adapter, seed=self.context.seed, write=self.is_main) as adapter:
                    with self._prepared():
                        yield
                self.result.adapter, self.result.notes = adapter, [*self.result.notes, *notes_on(adapter)]
            finally:
                for model in (self.student, self.teacher) if self.spread else ():  # they waited in main memory
                    model.to(self.device)

    def _require_grad_of_reached_(self) -> None:
        """Set `requires_grad` on exactly those parameters that one backward pass gives a gradient."""
        self.student.eval()  # no dropout, no drop path: the target is the teacher's deterministic output
        for name, p in self.student.named_parameters():
            p.requires_grad_(p.is_floating_point() and self._may_train(name))  # int8 weights stay as they are
        for ratio in [None] if self.widths is None else self.widths.units:
            with at_width(self.student, self.widths, ratio):
                self._probe().backward()
        for p in self.student.parameters():
            p.requires_grad_(p.grad is not None)
            p.grad = None

    def _may_train(self, _: str) -> bool:
        """Return whether the parameter of a name is trained where the loss reaches it."""
        return True

    def _reader(self) -> FeatureModel:
        """Return the student as it is trained and judged: a call gives its features."""
        return FeatureModel(self.student, self.options.features_at)

    def _probe(self) -> Tensor:
        """Return the loss of two images."""
        probe, target = self._few(2)
        found = read_features(self._reader(), probe.to(self.device), self.options.features_at)
        return self._compared(found, target)

    def _few(self, count: int) -> tuple[Tensor, Features]:
        """Return some held-out images with the teacher's features."""
        images = self._few_images(count)
        return images, self.judge.held_out[0][1].each(lambda tensor: tensor[: len(images)].to(self.device))

    def _few_images(self, count: int) -> Tensor:
        """Return some held-out images; all of a batch of named tensors, whose features may be a row of all images."""
        images = self.judge.held_out[0][0]
        return images if is_named(images) else images[:count]

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Build what trains, the student or a copy of it in shards, with its optimizer; it is judged unwrapped."""
        at = self.options.features_at
        self.judged = self._reader()
        if self.spread:
            self.judged = shard(self.student, self.blocks, device=self.device, at=at)
        self.trained = self.judged.model
        self.parameters = list(self.named_parameters().values())
        self.optimizer = self._optimizer()
        self.model: nn.Module = self.judged if self.spread else self.accelerator.prepare(self.judged)
        with checkpointed(self.trained, self.blocks) if self.options.checkpoint_activations else nullcontext():
            yield

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name."""
        return {name: p for name, p in self.trained.named_parameters() if p.requires_grad}

    def _optimizer(self) -> torch.optim.Optimizer | RelativeSteps:
        """Build what takes the steps."""
        if self.options.steps_are_shares:
            probe = self.judge.held_out[0][0].to(self.device)
            return relative_steps(self.trained, self.named_parameters(), probe, self.options.features_at)
        make = sgd if self.options.steps_by == "sgd" else adamw
        return make(self.trained, self.named_parameters(), self.options.adapter)

    def start_over_(self, values: Mapping[str, Tensor], *, step: int = 0) -> None:
        """Start anew before the first step, or at another, with these values of all tensors and a fresh optimizer."""
        self.trained.load_state_dict(values)
        self.optimizer.state.clear()
        self.step, self.usual = step, {}

    @property
    def started(self) -> int:
        """Step at which the schedule began."""
        return self.result.restarts[-1] if self.result.restarts else 0

    def gains_nothing(self) -> bool:
        """Return whether a found rate has had half of the steps that were left at its start, and bettered nothing."""
        late = 2 * (self.step - self.started) >= self.num_steps - self.started
        found = bool(self.result.rate_test)  # a rate that was asked for is kept
        return found and late and self.step < self.num_steps and self.result.best_step <= self.started

    def gains_no_more(self) -> bool:
        """Return whether, behind a gain, half of the schedule's steps bettered nothing, and the error is not falling.

        It falls where the later half of what was judged since has something lower than the half before it: so does the
        error of a run whose noise shrinks with its rate, which may yet gain.
        """
        best, length = self.result.best_step, self.num_steps - self.started
        if best <= self.started or self.step == self.num_steps or 2 * (self.step - best) < length:
            return False
        points = [point for point in self.result.curve if point["step"] > best]
        scores = [self.score({k: v for k, v in point.items() if k not in ("step", "loss")}) for point in points]
        half = len(scores) // 2
        return half > 0 and min(scores[half:]) >= min(scores[:half])

    def is_due(self) -> bool:
        """Return whether held-out images are judged after this step."""
        every = max(1, self.num_steps // self.options.num_validations)
        return self.step % every == 0 or self.step == self.num_steps

    def is_kept(self) -> bool:
        """Return whether the state is kept after this step."""
        every = self.options.save_every
        return self.is_due() or (every is not None and self.step % every == 0)

    @property
    def ratio(self) -> float:
        """MLP ratio that the next step trains; 1 where the student has a single width."""
        return 1.0 if self.widths is None else self.widths.at(self.step, self.context.seed)

    @property
    def current_rate(self) -> float:
        """Learning rate of the last step; 0 before the first."""
        return self.optimizer.param_groups[0]["lr"] if self.step else 0.0

    def batches(self, first: int, last: int | None = None) -> Iterator[list[MicroBatch]]:
        """Yield this process's images for steps `first` up to `last` (or the end), a list of micro-batches each."""
        return self.sampler.steps(first, self.num_steps if last is None else last)

    def train_step(self, batches: Sequence[MicroBatch], lr: float | None = None) -> float:
        """Take one optimizer step.

        Args:
            batches: this process's micro-batches of the step.
            lr: learning rate; None takes that of the schedule.

        Returns:
            The mean loss over the images of all processes. `diverged` says whether it was too bad to step on.
        """
        floor = min(1.0, self.options.min_lr / self.result.lr) if lr is None else 0.0
        done, length = self.step - self.started, self.num_steps - self.started
        shape = rate_shape(done, length, self.options.warmup_ratio, floor=floor, drops=self.options.drops)
        decay = cosine_between(*self.options.weight_decay, self.step / self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.result.lr * shape if lr is None else lr
            group["weight_decay"] = decay if group["decays"] else 0.0
        self.result.num_images += self.sampler.global_batch
        total = self._backward(batches)
        if not self.options.steps_are_shares:  # those don't depend on the size of gradients
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        total = mean(total)
        self.diverged = self._is_bad(total)
        if not self.diverged:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step % self.sampler.steps_per_epoch == 0:
            self.targets.flush()
            self.accelerator.wait_for_everyone()
            self.targets.refresh()
        for average, p in zip(self.ema.values(), self.parameters, strict=False):
            local(average).lerp_(local(p.detach()), 1 - self.options.ema)
        return total

    def _backward(self, batches: Sequence[MicroBatch]) -> float:
        """Add up the gradients of all micro-batches; returns this process's part of the loss."""
        total, share = 0.0, self.sampler.global_batch / num_processes()
        exact_attention = attention_in_float32(self.device, enabled=is_bf16(self.options.precision, self.device))
        with at_width(self.trained, self.widths, self.ratio), exact_attention:
            for index, batch in enumerate(batches):
                last = index == len(batches) - 1
                with nullcontext() if last else self.accelerator.no_sync(self.model):
                    loss = self._loss(batch) * (len(batch.images_BCHW) / share)
                    self.accelerator.backward(loss)
                total += float(loss.detach())
        return total

    def _is_bad(self, loss: float) -> bool:
        """Return whether a loss is no number, or far above the usual one; else add it to the usual one."""
        all_seen = len(self.usual) == (1 if self.widths is None else len(self.widths.units))
        if not math.isfinite(loss) or (all_seen and loss > EXPLODED * max(self.usual.values())):
            return True
        before = self.usual.get(self.ratio)
        self.usual[self.ratio] = loss if before is None else max(0.9 * before + 0.1 * loss, loss / EXPLODED)
        return False

    def _loss(self, batch: MicroBatch) -> Tensor:
        """Return the mean feature loss on a micro-batch; where no image could be read, on a stand-in of zeros."""
        readable, batch = len(batch.images_BCHW) > 0, self._stood_in(batch)
        if readable or self.teacher_spread:  # a teacher in shards runs on all processes or none
            target = self.targets(batch)
        else:
            target = Target(self._few(1)[1])
        with in_precision(self.options, self.device):
            parts = self.model(batch.images_BCHW.to(self.device))
        found = patches_at(features_of(parts, token_positions=self.kept_patches), target.positions_BP)
        return self._compared(found, target.features)

    def _compared(self, found: Features, target: Features) -> Tensor:
        """Return the loss of a student's features: of class probabilities, in a pair's space, or of all tokens."""
        if self.options.features_at == "logits":
            return class_loss(found, target)
        return feature_loss(found, target) if self.space is None else space_loss(found, target, self.space)

    def _stood_in(self, batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch, or zeros in its place where no image of it could be read."""
        if len(batch.images_BCHW):
            return batch
        return batch._replace(images_BCHW=torch.zeros_like(self._few_images(1)))

    def validate(self, loss: float) -> Validation:
        """Judge the state, or its moving average where that is better; add it to the curve, keep it if it is the best.

        Args:
            loss: training loss of the step, for the curve; NaN before the first.
        """
        errors = self._judge()
        if self.ema:
            with self._averaged():
                errors = min(errors, self._judge(), key=self.score)
        error = errors["relative_error"]
        point = {"step": self.step, **errors}
        self.result.curve.append(point if math.isnan(loss) else {**point, "loss": loss})
        return Validation(
            step=self.step,
            num_steps=self.num_steps,
            held_out_error=error,
            best_error=self.result.best_error,
            lr=self.current_rate,
        )

    def _judge(self) -> dict[str, float]:
        """Return the errors of the student as it is now, and keep it if it is the best."""
        errors = self.judge.errors(self.judged)
        value = self.score(errors)
        if value < self.best_score:
            self.best_score, self.result.best_step = value, self.step
            self.result.best_error, self.best = errors["relative_error"], self.values()
        return errors

    def score(self, errors: Mapping[str, float]) -> float:
        """Return the number by which states are compared, the lower the better."""
        return score(errors, self.result.curve[0] if self.result.curve else errors)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the moving average in place of the parameters, and the parameters back afterwards."""
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

    def count_time(self) -> None:
        """Bring the seconds of the result up to date."""
        now = time.monotonic()
        self.result.seconds, self.since = self.result.seconds + now - self.since, now

    def finish(self) -> None:
        """Give the student the best state seen."""
        self.count_time()
        self.student.load_state_dict({name: full(tensor).cpu() for name, tensor in self.best.items()})

    def values(self) -> dict[str, Tensor]:
        """Return copies of all tensors that the trained student holds, by name."""
        return {name: tensor.detach().clone() for name, tensor in self.trained.state_dict().items()}
