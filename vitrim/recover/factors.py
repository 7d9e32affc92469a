"""Trains LoRA factors of a frozen model while a method looks on and masks: the loop around `BetweenSteps`.

Images, their order, targets, adapters and the rate's course are those of distillation. Only factors have gradients;
frozen weights never get one. With several processes each step's gradients are their mean, so all see the same and
decide the same. No gradient is ever scaled, so nothing has to be undone before a method looks at it.

As long as the model equals its teacher, the distance between their features has no gradient, so nothing could be told
apart. In such a step the method sees gradients of a random projection of the features instead, and no step is taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.config.options import AdapterOptions, RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import ImageSet, ImageStream, open_images
from vitrim.distributed.processes import any_process, mean, mean_
from vitrim.errors import Interrupted, RecipeError
from vitrim.layers.adapters import Lora, find_adapters, merge_adapters_
from vitrim.methods.registry import BetweenSteps, FactorTraining
from vitrim.models.features import device_of, features, logits, restored
from vitrim.ops.lora_importance import Factors
from vitrim.progress import Progress
from vitrim.recover.adapters import attach_
from vitrim.recover.files import FACTORS_STATE
from vitrim.recover.losses import feature_loss, label_loss
from vitrim.recover.sampler import MicroBatch, open_sampler
from vitrim.recover.schedule import rate_shape, stop_on_interrupt
from vitrim.recover.state import clear_state, resumed_state, save_state
from vitrim.recover.targets import LiveTargets, in_precision
from vitrim.tokens import Features

# A state is kept this often in a training.
NUM_STATES, WARMUP = 10, 0.1
# Below this share of the targets' mean square, the distance of features is rounding.
SAME = 1e-8


@dataclass(frozen=True, kw_only=True)
class TrainingSource:
    """Images to train factors on, and how the run goes on.

    Attributes:
        images: what to train on, augmented already.
        context: seed, and the folder for the state; without one nothing is kept.
        rank: number of this process among those that share each step.
        num_processes: how many do.
        made: whatever else a state depends on; one with another is refused.
    """

    images: ImageSet | ImageStream
    context: RunContext = field(default_factory=RunContext)
    rank: int = 0
    num_processes: int = 1
    made: str = ""

    @classmethod
    def of_batches(cls, batches: Sequence[Tensor], seed: int) -> TrainingSource:
        """Return preprocessed images as a source for this process alone."""
        images = open_images([image for batch in batches for image in batch])
        return cls(images=images, context=RunContext(seed=seed, quiet=True))


def train_factors_(
    model: nn.Module,
    teacher: nn.Module,
    source: TrainingSource,
    training: FactorTraining,
    between: BetweenSteps,
    *,
    number: int = 0,
    bar: Progress | None = None,
) -> dict[str, Tensor]:
    """Train factors in front of a model's weights, and return the adapted weights; the model is left as it was.

    Args:
        model: trained in eval mode; in masked form if `between` masks.
        teacher: its features are the target.
        source: images and context.
        training: which layers, and how.
        between: called in each step, between the backward pass and the optimizer's step.
        number: of the step in the recipe, for the name of the state.
        bar: shows the progress.

    Returns:
        The adapted weight of each layer, by full name.

    Raises:
        RecipeError: a layer can't have factors of this rank, the images have no labels, no loss was a number, or the
            state to continue from is that of another run.
        Interrupted: stopped by Ctrl-C; with a work folder, the run can be resumed.
    """
    _check(model, source, training)
    with restored(model), torch.inference_mode(False), torch.enable_grad():
        for name, p in model.eval().named_parameters():
            p.requires_grad_(name in {f"{path}.weight" for path in training.layers})
        try:
            attach_(model, AdapterOptions(rank=training.rank, alpha=training.alpha), seed=source.context.seed)
            with _masked(model, training.layers, between):
                _Loop(model, teacher, source, training, between, number).run_(bar or Progress("", 0))
            return {f"{place.path}.weight": _weight(place.module).detach().clone() for place, _ in find_adapters(model)}
        finally:
            for _, adapter in find_adapters(model):
                adapter.B.data.zero_()  # type: ignore[union-attr]  # merging then gives the frozen weight, bit for bit
            merge_adapters_(model)


class _Loop:
    """The factors, their optimizer, and the steps."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        source: TrainingSource,
        training: FactorTraining,
        between: BetweenSteps,
        number: int,
    ) -> None:
        self.model, self.source, self.training, self.between = model, source, training, between
        self.device, self.step, self.num_bad = device_of(model), 0, 0
        self.adapters: dict[str, tuple[nn.Module, Lora]] = {
            place.path: (place.module, adapter) for place, adapter in find_adapters(model) if isinstance(adapter, Lora)
        }
        self.options = RecoverOptions(steps=training.steps, batch_size=training.batch_size)
        self.targets = LiveTargets(teacher, self.options, self.device)
        seed, ranks = source.context.seed, {"rank": source.rank, "num_processes": source.num_processes}
        self.sampler = open_sampler(source.images, self.options, seed, **ranks)
        self.parameters = [p for _, adapter in self.adapters.values() for p in (adapter.A, adapter.B)]
        self.optimizer = torch.optim.AdamW(self._groups(), lr=0.0, weight_decay=0.0)
        work = source.context.work
        self.state = None if work is None else work / FACTORS_STATE.format(number)

    def _groups(self) -> list[dict[str, Any]]:
        """Return each factor with its peak rate; that of B grows with the weight that B A is added to."""
        groups: list[dict[str, Any]] = []
        for module, adapter in self.adapters.values():
            weight = _frozen(module)
            scale = float(weight.square().mean().sqrt()) * weight.shape[1] ** 0.5
            groups += [{"params": [adapter.A], "peak": self.training.lr}]
            groups += [{"params": [adapter.B], "peak": self.training.lr * scale}]
        return groups

    def run_(self, bar: Progress) -> None:
        """Take all steps, from the state of a stopped run where there is one."""
        self._resume()
        steps = range(self.step, self.training.steps)
        with stop_on_interrupt() as stop:
            sampled = self.sampler.steps(self.step, self.training.steps)
            for _, batches in zip(bar.track(steps, "training factors"), sampled, strict=False):
                self._take(batches)
                stopped = self._any(stop.is_set()) and self.step < self.training.steps
                if stopped or self.step % max(1, self.training.steps // NUM_STATES) == 0:
                    self._keep()
                if stopped:
                    where = f"; continue with --resume (state in {self.state})" if self.state else ""
                    raise Interrupted(f"pruning stopped at step {self.step} of {self.training.steps}{where}.")
        if self.num_bad == self.training.steps:
            raise RecipeError("options.lr: no step of the training had a loss that is a number; give a lower lr.")

    def _any(self, flag: bool) -> bool:
        """Return whether a flag is set on any of the processes that share the steps."""
        return any_process(flag) if self.source.num_processes > 1 else flag

    def _take(self, batches: Sequence[MicroBatch]) -> None:
        """Take one step: backward, the method's look, the optimizer's step."""
        self.probed = False
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        total, share = 0.0, self.sampler.global_batch / self.source.num_processes
        for batch in batches:
            if len(batch.images_BCHW):
                loss = self._loss(batch) * (len(batch.images_BCHW) / share)
                loss.backward()
                total += float(loss.detach())
        if self.source.num_processes > 1:
            mean_(p.grad for p in self.parameters if p.grad is not None)
            total = mean(total)
        self.step += 1
        self.between.see(self.step, {path: self._factors(*pair) for path, pair in self.adapters.items()})
        finite = math.isfinite(total)  # the same on all processes
        self.num_bad += not finite
        if not finite or self._any(self.probed):
            return
        shape = rate_shape(self.step - 1, self.training.steps, WARMUP)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * shape
        self.optimizer.step()

    def _loss(self, batch: MicroBatch) -> Tensor:
        """Return the mean loss of the images that count."""
        images = batch.images_BCHW.to(self.device)
        if not self.training.on_labels:
            target = self.targets(batch).features
            with in_precision(self.options, self.device):
                found = features(self.model, images)
            loss = feature_loss(found, target)
            if float(loss.detach()) > SAME * sum(float(part.float().square().mean()) for part in target.tensors):
                return loss
            self.probed = True
            return _projected(found, seed=self.source.context.seed * 1_000_003 + self.step)
        with in_precision(self.options, self.device):
            scores_BC = logits(self.model, images)
        assert scores_BC is not None
        return label_loss(scores_BC, batch.labels_B.to(self.device))

    def _factors(self, module: nn.Module, adapter: Lora) -> Factors:
        grads = {"grad_a_RN": adapter.A.grad, "grad_b_MR": adapter.B.grad}
        held = {"a_RN": adapter.A.detach(), "b_MR": adapter.B.detach(), "scale": adapter.alpha / adapter.rank}
        return Factors(weight_MN=_frozen(module).detach(), **held, **grads)  # type: ignore[arg-type]

    def _made(self) -> str:
        """Return what a state depends on."""
        return json.dumps([self.source.made, self.source.context.seed, self.training.__dict__], default=str)

    def _keep(self) -> None:
        if self.state is not None:
            factors = {path: {"A": adapter.A, "B": adapter.B} for path, (_, adapter) in self.adapters.items()}
            counts = {"made": self._made(), "step": self.step, "num_bad": self.num_bad}
            held = {"optimizer": self.optimizer.state_dict(), "between": self.between.state()}
            save_state(self.state, {**counts, **held, "factors": factors})

    def _resume(self) -> None:
        """Take up the state of a stopped run, if the run is to continue; else remove it."""
        if self.state is None:
            return
        kept = resumed_state(self.state) if self.source.context.resume else None
        if kept is None:
            clear_state(self.state)
            return
        if kept["made"] != self._made():
            raise RecipeError(f"resume: {self.state} is of another recipe; give that one again, or overwrite.")
        with torch.no_grad():
            for path, factors in kept["factors"].items():
                adapter = self.adapters[path][1]
                adapter.A.copy_(factors["A"])
                adapter.B.copy_(factors["B"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.between.restore(kept["between"])
        self.step, self.num_bad = kept["step"], kept["num_bad"]


def _check(model: nn.Module, source: TrainingSource, training: FactorTraining) -> None:
    """Check that each layer can have factors, and that there are labels if they are asked for.

    Raises:
        RecipeError: not so.
    """
    for path in training.layers:
        layer = model.get_submodule(path)
        if not isinstance(layer, nn.Linear) or hasattr(layer, "parametrizations"):
            raise RecipeError(f"{path}: is {type(layer).__name__}, no linear layer, so it can't have factors.")
        if training.rank > min(layer.weight.shape):
            size = " x ".join(map(str, layer.weight.shape))
            raise RecipeError(f"options.rank={training.rank}: {path} is {size}; use 1..{min(layer.weight.shape)}.")
    if training.on_labels and not (isinstance(source.images, ImageSet) and source.images.has_labels):
        raise RecipeError("options.loss=labels: the images have no labels; pass a labelled source, or use features.")


@contextmanager
def _masked(model: nn.Module, layers: Sequence[str], between: BetweenSteps) -> Iterator[None]:
    """Multiply the inputs of layers by the method's masks, as they are by then."""

    def masking(path: str) -> Callable[..., Any]:
        def mask(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
            found = between.masks.get(path)
            return None if found is None else (args[0] * found.to(args[0]), *args[1:])

        return mask

    handles = [model.get_submodule(path).register_forward_pre_hook(masking(path)) for path in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _projected(found: Features, *, seed: int) -> Tensor:
    """Return the mean over images of the sum of features times random signs, the same for all images."""
    generator, total = torch.Generator().manual_seed(seed), torch.zeros((), device=found.pooled_BD.device)
    for part in found.tensors:
        signs = torch.randint(2, part.shape[1:], generator=generator) * 2 - 1
        total = total + (part.float() * signs.to(part.device)).sum() / len(part)
    return total


def _weight(module: nn.Module) -> Tensor:
    """Return the weight that a layer has now."""
    return module.weight  # type: ignore[return-value]


def _frozen(module: nn.Module) -> Tensor:
    """Return the weight behind an adapter."""
    return module.parametrizations["weight"].original  # type: ignore[index, return-value]
