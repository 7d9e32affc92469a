"""LoRAPrune beside one-shot cuts: half of all hidden units and half of attention of a ViT, same images.

Rows: `lora-prune` on features and on labels; `dgmr` (whole heads, then dimensions) and `corp` without training, and
each behind as many steps of the same batch of distillation, with LoRA or with all weights. Relative squared error of
all output tokens on test images and, where there is a head, top-1. A second table counts what a step holds beside the
frozen model: saved activations and adapted weights, gradients, and Adam's moments. Rows are written as they come.

    python benchmarks/lora_prune.py               # CIFAR-10 ViT, three seeds: an hour of two cores
    python benchmarks/lora_prune.py --model deep  # of deep_vit.py
    python benchmarks/lora_prune.py --quick       # minutes
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import MODELS, SHARED, Row, Rows, by_seed, mean, mean_top1, results, table
from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.config.options import AdapterOptions, RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.data import augment_for, first_images, open_images, transform_for
from vitrim.evaluation import own_top1
from vitrim.layers.adapters import merge_adapters_
from vitrim.metrics.fidelity import compare
from vitrim.models.features import features, num_classes
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.recover.adapters import attach_
from vitrim.recover.distill import recover_
from vitrim.recover.factors import TrainingSource
from vitrim.recover.losses import feature_loss

LORA = {"rank": 8, "alpha": 16.0}
# row -> method and its options at half of both parts
CUTS: dict[str, dict[str, Any]] = {
    "dgmr, whole heads": {"method": "dgmr", "options": {"parts": "both", "heads": "whole"}},
    "dgmr, head dims": {"method": "dgmr", "options": {"parts": "both"}},
    "corp": {"method": "corp", "options": {"parts": "both", "values": True}},
}
AFTER = {"": None, ", then LoRA": AdapterOptions(kind="lora", **LORA), ", then all weights": None}


def main() -> None:
    """Run all rows for all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("cifar10", "deep"), default="cifar10")
    parser.add_argument("--source", help="where the model is, if it is elsewhere")
    parser.add_argument("--steps", type=int, default=250, help="of lora-prune, and of distillation behind a cut")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-3], help="of lora-prune")
    parser.add_argument("--num-images", type=int, default=400, help="for the calibration of cuts")
    parser.add_argument("--num-train", type=int, default=5000)
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.quick:
        asked.seeds, asked.steps, asked.num_images, asked.num_test = [0], 50, 128, 500
    out = asked.out or results(f"lora_prune-{asked.model}{'-quick' if asked.quick else ''}")
    same = ("model", "steps", "batch_size", "num_images", "num_train", "num_test")
    bench, kept = Bench(asked), Rows(out, {key: vars(asked)[key] for key in same})
    kept.get("original", lambda: bench.scores(bench.teacher))
    for name in ("lora-prune", "all weights"):
        kept.get(f"memory, {name}", lambda: bench.memory(name))  # noqa: B023
    for seed in asked.seeds:
        for name, run_row in bench.rows(seed):
            kept.get(f"{name}, seed {seed}", run_row)
    print(markdown(kept.found))


class Bench:
    """The model, its images and its judge."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.teacher, _ = open_model(asked.source or MODELS[asked.model])
        self.teacher.requires_grad_(False)
        data, transform = SHARED / "data" / "cifar10", transform_for(self.teacher)
        self.train = open_images(data / "train.parquet", transform=transform, limit=asked.num_train)
        self.augment = augment_for(self.teacher, "light", flip=True)
        test = open_images(data / "test.parquet", transform=transform, limit=asked.num_test)
        self.test = list(test.loader(batch_size=100))

    def rows(self, seed: int) -> Iterator[tuple[str, Callable[[], Row]]]:
        """Each row's name and what measures it."""
        asked = self.asked
        given = {"parts": "both", "steps": asked.steps, "batch_size": asked.batch_size, **LORA}
        for loss in ("features", "labels") if num_classes(self.teacher) else ("features",):
            for lr in asked.lrs:
                recipe = {"method": "lora-prune", "options": {**given, "lr": lr, "loss": loss}}
                yield f"lora-prune, {loss}, lr {lr:g}", lambda recipe=recipe: self.scores(self.cut(recipe, seed))
        for name, recipe in CUTS.items():
            for after, adapter in AFTER.items():
                yield f"{name}{after}", partial(self.cut_and_distilled, recipe, after, adapter, seed)

    def cut_and_distilled(self, recipe: Row, after: str, adapter: AdapterOptions | None, seed: int) -> Row:
        """Scores of a one-shot cut, and what may follow it."""
        student = self.cut(recipe, seed)
        if after:
            self.distil(student, adapter, seed)
        return self.scores(student)

    def cut(self, values: dict[str, Any], seed: int) -> nn.Module:
        """A cut copy of the model."""
        student = copy.deepcopy(self.teacher)
        recipe = Recipe.parse({**values, "keep_ratio": 0.5, "seed": seed})
        batches, _ = first_images(self.train, self.asked.num_images, seed=seed)
        images = self.train.augmented(self.augment, seed)
        source = TrainingSource(images=images, context=RunContext(seed=seed, quiet=True))
        cut_(student, self.teacher, find_mlps(self.teacher), recipe, batches, quiet=True, source=source)
        return student

    def distil(self, student: nn.Module, adapter: AdapterOptions | None, seed: int) -> None:
        """Distil with as many images and steps; the rate is found by the range test."""
        steps, batch = self.asked.steps, self.asked.batch_size
        options = RecoverOptions(steps=steps, batch_size=batch, adapter=adapter, num_validations=4)
        held_out, _ = first_images(self.train, 64, seed=seed + 1)
        images, context = self.train.augmented(self.augment, seed), RunContext(seed=seed, quiet=True)
        recover_(student, self.teacher, images, held_out=held_out, options=options, context=context)

    def scores(self, model: nn.Module) -> Row:
        """Relative error on the test images, and top-1 where there is a head."""
        found, outputs, _ = compare(model, self.teacher, self.test)
        return {"error": found["relative_error"], "top1": own_top1(model, outputs)}

    def memory(self, name: str) -> dict[str, float]:
        """MiB that a training step holds beside the model itself: of activations, gradients and moments."""
        model = copy.deepcopy(self.teacher).eval().requires_grad_(True)
        if name == "lora-prune":
            attach_(model, AdapterOptions(targets=("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), **LORA))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        images = self.test[0].images_BCHW[: self.asked.batch_size]
        with torch.no_grad():
            target = features(self.teacher, images)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = feature_loss(features(model, images), target)
        trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        del loss
        merge_adapters_(model)
        parts = {"activations": sum(saved.values()), "gradients": trained, "moments": 2 * trained}
        mib = {part: round(size / 2**20, 2) for part, size in parts.items()}
        return {**mib, "all": round(sum(parts.values()) / 2**20, 2)}


def markdown(found: dict[str, Any]) -> str:
    """The memory of a step, and the rows: means over the seeds."""
    seen, kinds = by_seed(found), ("activations", "gradients", "moments", "all")
    memory = [
        [name.removeprefix("memory, "), *(str(row[0][kind]) for kind in kinds)]
        for name, row in seen.items()
        if kinds[0] in row[0]
    ]
    lines = [
        [name, mean([one["error"] for one in row], 4), mean_top1(row)]
        for name, row in seen.items()
        if "error" in row[0]
    ]
    head = ["What trains", "activations and adapted weights, MiB", "gradients", "moments", "together"]
    return f"{table(head, memory)}\n\n{table(['What', 'relative error', 'top-1'], lines)}"


if __name__ == "__main__":
    main()
