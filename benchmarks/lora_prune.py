"""LoRAPrune beside one-shot cuts: half of all hidden units and half of attention of the CIFAR-10 ViT, same images.

Rows: `lora-prune` on features and on labels; `dgmr` (whole heads, then dimensions) and `corp` without training, and
each behind as many steps of the same batch of distillation, with LoRA or with all weights. Top-1 and relative squared
error of all output tokens on test images. A second table counts what a step holds beside the frozen model: saved
activations and adapted weights, gradients, and Adam's moments. Writes JSON with machine, versions, seeds and command.

    python benchmarks/lora_prune.py          # most of an hour on two idle cores
    python benchmarks/lora_prune.py --quick  # minutes
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from corp import SHARED, run
from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.config.options import AdapterOptions, RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.data import augment_for, first_images, open_images, transform_for
from vitrim.layers.adapters import merge_adapters_
from vitrim.metrics.fidelity import TokenComparison
from vitrim.models.features import evaluating, features
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of lora-prune, and of distillation behind a cut")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3], help="of lora-prune")
    parser.add_argument("--num-images", type=int, default=400, help="for the calibration of cuts")
    parser.add_argument("--num-train", type=int, default=5000)
    parser.add_argument("--num-test", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lora_prune.json"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.lrs, arguments.steps, arguments.batch_size = [0], [3e-3], 50, 32
        arguments.num_images, arguments.num_test = 128, 500
    bench = Bench(arguments)
    found: dict[str, Any] = {
        "environment": environment(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "original": bench.scores(bench.teacher),
        "memory": {name: bench.memory(name) for name in ("lora-prune", "all weights")},
        "rows": {},
    }
    print(f"original: top-1 {found['original']['top1']:.2f}\n\n{memory_table(found['memory'])}\n", flush=True)
    for seed in arguments.seeds:
        for name, row in bench.rows(seed):
            found["rows"].setdefault(name, []).append(row)
            print(f"seed {seed}: {name}: {row}", flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{table(found['rows'])}")


class Bench:
    """The model, its images and its judge."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.asked = arguments
        self.teacher, _ = open_model(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
        self.teacher.requires_grad_(False)
        data, transform = SHARED / "data" / "cifar10", transform_for(self.teacher)
        self.train = open_images(data / "train.parquet", transform=transform, limit=arguments.num_train)
        self.augment = augment_for(self.teacher, "light", flip=True)
        test = open_images(data / "test.parquet", transform=transform, limit=arguments.num_test)
        self.test = list(test.loader(batch_size=100))
        with evaluating(self.teacher):
            self.target = [run(self.teacher, batch.images_BCHW) for batch in self.test]

    def rows(self, seed: int) -> Any:
        """Yield each row's name and what was measured."""
        asked = self.asked
        for loss in ("features", "labels"):
            for lr in asked.lrs:
                options = {
                    "parts": "both",
                    "steps": asked.steps,
                    "batch_size": asked.batch_size,
                    "lr": lr,
                    "loss": loss,
                }
                recipe = {"method": "lora-prune", "options": {**options, **LORA}}
                student, seconds = self.cut(recipe, seed)
                yield f"lora-prune, {loss}, lr {lr:g}", {**self.scores(student), "seconds": seconds}
        for name, recipe in CUTS.items():
            cut, seconds = self.cut(recipe, seed)
            for after, adapter in AFTER.items():
                student, started = copy.deepcopy(cut), time.monotonic()
                if after:
                    self.distil(student, adapter, seed)
                spent = round(seconds + time.monotonic() - started, 1)
                yield f"{name}{after}", {**self.scores(student), "seconds": spent}

    def cut(self, values: dict[str, Any], seed: int) -> tuple[nn.Module, float]:
        """A cut copy of the model, and the seconds it took."""
        student, started = copy.deepcopy(self.teacher), time.monotonic()
        recipe = Recipe.parse({**values, "keep_ratio": 0.5, "seed": seed})
        batches, _ = first_images(self.train, self.asked.num_images, seed=seed)
        images = self.train.augmented(self.augment, seed)
        source = TrainingSource(images=images, context=RunContext(seed=seed, quiet=True))
        sites = find_mlps(self.teacher)
        cut_(student, self.teacher, sites, recipe, batches, quiet=True, source=source)
        return student, round(time.monotonic() - started, 1)

    def distil(self, student: nn.Module, adapter: AdapterOptions | None, seed: int) -> None:
        """Distil with as many images and steps; the rate is found by the range test."""
        steps, batch = self.asked.steps, self.asked.batch_size
        options = RecoverOptions(steps=steps, batch_size=batch, adapter=adapter, num_validations=4)
        held_out, _ = first_images(self.train, 64, seed=seed + 1)
        images, context = self.train.augmented(self.augment, seed), RunContext(seed=seed, quiet=True)
        recover_(student, self.teacher, images, held_out=held_out, options=options, context=context)

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Top-1 and relative error on the test images."""
        compared, right, total = TokenComparison(), 0, 0
        with evaluating(model):
            for batch, target in zip(self.test, self.target, strict=True):
                tokens = run(model, batch.images_BCHW)
                compared.update(tokens, target)
                right += int((model.forward_head(tokens).argmax(1) == batch.labels_B).sum())  # type: ignore[operator]
                total += len(tokens)
        return {"top1": round(100 * right / total, 2), "relative_error": round(compared.relative_error, 4)}

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


def memory_table(found: dict[str, dict[str, float]]) -> str:
    """The memory of a step in Markdown."""
    head = (
        "| What trains | activations and adapted weights, MiB | gradients | moments | together |\n|---|---|---|---|---|"
    )
    return "\n".join([head, *(f"| {name} | {' | '.join(map(str, row.values()))} |" for name, row in found.items())])


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """The rows in Markdown: means over the seeds."""
    lines = ["| What | relative error | top-1 | seconds |", "|---|---|---|---|"]
    for name, seen in rows.items():
        means = {key: statistics.fmean(row[key] for row in seen) for key in seen[0]}
        lines.append(f"| {name} | {means['relative_error']:.4f} | {means['top1']:.2f} | {means['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
