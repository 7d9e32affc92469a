"""SDPose: does it help to run the blocks in cycles while training, if the result runs them once?

Three parts, each with equal epochs or steps for all of its rows:

- `pose`: vitrim/pose-small from scratch on Leeds Sports Pose (../shared/data), N = 1, 2, 3 cycles, with and without
  tokens pulled to those of the next cycle. PCK at 0.2 of the torso on test images after one cycle, which is what the
  result costs, and after all. Then `dgmr` at half of its MLPs, recovered without labels.
- `classifier`: a small ViT on part of CIFAR-10, in the same way, top-1.
- `recipe`: half of the blocks of the CIFAR-10 ViT of ../shared, distilled without labels in one cycle or two: blocks
  out, `replace-me`, and `recursive`. Error of features and top-1 on test images.

Rows are written as they come, and a stopped run goes on behind the last of them.

    nice python benchmarks/sdpose.py                       # one seed
    nice python benchmarks/sdpose.py --seeds 0 1 2         # goes on from the same file
    nice python benchmarks/sdpose.py --quick               # few images and steps, a file of its own
    nice python benchmarks/sdpose.py --model pose-t --batch-size 64 --epochs 300 --lr 0.001 --device cuda
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rows import SHARED, Rows, by_seed, mean, results, table
from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.config.options import RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import count_macs, model_size
from vitrim.data import Batch, ImageSet, augment_for, first_images, open_images, split_indices
from vitrim.data.inputs import open_set
from vitrim.data.poses import PoseSet
from vitrim.distributed.devices import resolve_device
from vitrim.evaluation import own_top1, top1_of
from vitrim.metrics.fidelity import compare
from vitrim.metrics.pose import pose_scores
from vitrim.models.cycles import block_row, cycles
from vitrim.models.pose import CONFIGS, PoseModel
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_encoder
from vitrim.recover.distill import recover_
from vitrim.recover.labels import class_scores_loss, train_labels_
from vitrim.recover.losses import heatmap_loss

ROOT = Path(__file__).resolve().parents[1]
PEOPLE, CIFAR = SHARED / "data" / "lsp-extended", SHARED / "data" / "cifar10"
QUICK = {"epochs": 1, "steps": 2, "num_train": 48, "num_test": 24, "num_images": 48, "batch_size": 16}
PARTS = ["pose", "classifier", "recipe"]
SMALL_VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 4, "num_classes": 10}
CLASS_WEIGHTS = (1e-2, 1e-2)  # cross-entropy is far larger than an error of heatmaps


def variants(weights: tuple[float, float] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and options of the rows of training."""
    yield "1 cycle", {}
    for count in (2, 3):
        yield f"{count} cycles, nothing pulled", {"cycles": count, "cycle_weights": (0.0, 0.0)}
        yield f"{count} cycles", {"cycles": count} | ({} if weights is None else {"cycle_weights": weights})


class AfterAll(nn.Module):
    """A model that is read behind the last of some cycles."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model, self.count, self.blocks = model, count, block_row(model)

    def forward(self, images_BCHW: Tensor) -> Any:
        """What the model puts out behind the last cycle."""
        return cycles(self.model, self.blocks, self.count, lambda: self.model(images_BCHW))[-1].output


class Bench:
    """What is trained on, and how."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, resolve_device(arguments.device)
        self.trained = {"batch_size": arguments.batch_size, "lr": arguments.lr, "num_validations": 4}

    def train(
        self,
        model: nn.Module,
        images: Any,
        held_out: list[Batch],
        loss: Callable[[Any, Tensor], Tensor],
        **options: Any,
    ) -> dict[str, Any]:
        """Train a model with labels for the epochs that all rows get; of its states the best of one pass is kept."""
        started = time.monotonic()
        given = RecoverOptions(**self.trained, epochs=self.arguments.epochs, loss="labels", **options)
        context = RunContext(quiet=True, seed=self.arguments.seed)
        found = train_labels_(model, images, held_out=held_out, options=given, loss=loss, context=context)
        return {"best_step": found.best_step, "steps": found.num_steps, "seconds": time.monotonic() - started}

    def pose(self, options: dict[str, Any], *, cut: bool) -> dict[str, Any]:
        """One row of poses: PCK after one cycle and after all; and with `cut` at half of the MLPs."""
        torch.manual_seed(self.arguments.seed)
        model = PoseModel(CONFIGS[self.arguments.model]).to(self.device)
        pre, joints = model.preprocessing, model.num_prefix_tokens
        every = open_images(PEOPLE / "train.parquet", limit=self.arguments.num_train)
        rest, held = split_indices(len(every), num_held_out=len(every) // 15, seed=0)
        train = every.subset(rest)
        test = PoseSet(open_images(PEOPLE / "test.parquet", limit=self.arguments.num_test), pre, joints).batches()
        held_out = PoseSet(every.subset(held), pre, joints).batches()
        images = PoseSet(train, pre, joints, seed=self.arguments.seed)
        found = self.train(model, images, held_out, heatmap_loss, **options)
        found["pck"] = pose_scores(model, test)["pck@0.2"]
        if (count := options.get("cycles", 1)) > 1:
            found["pck, all cycles"] = pose_scores(AfterAll(model, count), test)["pck@0.2"]
        if cut:
            found["halved"] = self.halved(model, train, test)
        size = model_size(model)["num_parameters"]
        return {**found, "parameters": size, "macs": count_macs(model, test[0].images_BCHW[:1])}

    def halved(self, teacher: PoseModel, train: ImageSet, test: list[Batch]) -> dict[str, Any]:
        """PCK with half of the units of each MLP: after the cut by `dgmr`, and after recovery without labels."""
        started, student = time.monotonic(), copy.deepcopy(teacher)
        images = train.with_transform(augment_for(teacher.preprocessing, "none"))
        batches = [batch.to(self.device) for batch in first_images(images, self.arguments.num_images, seed=0)[0]]
        cut_(student, teacher, find_mlps(student), half("dgmr"), batches, quiet=True)
        found: dict[str, Any] = {"after cut": pose_scores(student, test)["pck@0.2"]}
        self.distil(student, teacher, images, batches)
        size = model_size(student)["num_parameters"] / model_size(teacher)["num_parameters"]
        after = pose_scores(student, test)["pck@0.2"]
        return {**found, "after recovery": after, "parameters": size, "seconds": time.monotonic() - started}

    def distil(
        self, student: nn.Module, teacher: nn.Module, images: ImageSet, batches: list[Tensor], **options: Any
    ) -> None:
        """Recover a student without labels, in the steps that all rows get."""
        given = {"steps": self.arguments.steps, "batch_size": self.arguments.batch_size, "num_validations": 2}
        recover_(
            student,
            teacher.requires_grad_(False),
            images,
            held_out=batches[:2],
            options=RecoverOptions(**given, optimizer="relative", **options),
            context=RunContext(quiet=True, seed=self.arguments.seed),
        )

    def classifier(self, options: dict[str, Any]) -> dict[str, Any]:
        """One row of the classifier: top-1 after one cycle and after all."""
        from timm.models.vision_transformer import VisionTransformer

        torch.manual_seed(self.arguments.seed)
        model = VisionTransformer(**SMALL_VIT).to(self.device)
        known = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
        plain = augment_for(known, "none")
        every = open_images(CIFAR / "train.parquet", limit=3 * self.arguments.num_train)
        rest, held = split_indices(len(every), num_held_out=len(every) // 15, seed=0)
        test = open_images(CIFAR / "test.parquet", transform=plain, limit=4 * self.arguments.num_test)
        held_out = list(every.subset(held).with_transform(plain).loader(batch_size=100))
        images = every.subset(rest).augmented(augment_for(known, "light"), self.arguments.seed)
        found = self.train(model, images, held_out, class_scores_loss, **options)
        model.eval()
        batches = list(test.loader(batch_size=100))
        found["top1"] = top1_of(model, batches)
        if (count := options.get("cycles", 1)) > 1:
            found["top1, all cycles"] = top1_of(_like(AfterAll(model, count), model), batches)
        return found

    def recipe(self, name: str) -> dict[str, Any]:
        """One row of half of the blocks: error and top-1 after equal steps of distillation."""
        started = time.monotonic()
        teacher, origin = open_encoder(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
        teacher = teacher.float().eval().to(self.device)
        student, count = copy.deepcopy(teacher), len(block_row(teacher)) // 2
        train = open_set(CIFAR / "train.parquet", origin, limit=None)
        test = list(open_set(CIFAR / "test.parquet", origin, limit=4 * self.arguments.num_test).loader(batch_size=100))
        batches = [batch.to(self.device) for batch in first_images(train, self.arguments.num_images, seed=0)[0]]
        method, options = name.split(", ")[0], RECIPES[name]
        cut_(student, teacher, find_mlps(student), Recipe.parse(METHODS[method](count)), batches, quiet=True)
        augmented = train.augmented(augment_for(origin.preprocessing, "light", flip=True), self.arguments.seed)
        found: dict[str, Any] = {"before": judged(student, teacher, test)}
        self.distil(student, teacher, augmented, batches, **options)
        share = model_size(student)["num_parameters"] / model_size(teacher)["num_parameters"]
        macs = count_macs(student, test[0].images_BCHW[:1]) / count_macs(teacher, test[0].images_BCHW[:1])  # type: ignore[operator]
        after = judged(student, teacher, test)
        return {**found, "after": after, "parameters": share, "macs": macs, "seconds": time.monotonic() - started}


METHODS: dict[str, Callable[[int], dict[str, Any]]] = {
    "blocks out": lambda count: {"method": "replace-me", "options": {"num_blocks": count, "compensate": False}},
    "replace-me": lambda count: {"method": "replace-me", "options": {"num_blocks": count}},
    "recursive": lambda count: {"method": "recursive", "options": {"num_blocks": count, "rank": 0}},
}
RECIPES: dict[str, dict[str, Any]] = {
    "blocks out, 1 cycle": {},
    "blocks out, 2 cycles": {"cycles": 2},
    "replace-me, 1 cycle": {},
    "replace-me, 2 cycles": {"cycles": 2},
    "recursive, 1 cycle": {},
}


def half(method: str) -> Recipe:
    """The recipe of half of the units, in closed form alone."""
    return Recipe.parse({"method": method, "repair": {"refit": False}, "keep_ratio": 0.5, "exact": True})


def judged(student: nn.Module, teacher: nn.Module, test: list[Batch]) -> dict[str, Any]:
    """Error and top-1 of a student."""
    found, outputs, _ = compare(student, teacher, test)
    return {"error": found["relative_error"], "top1": own_top1(student, outputs)}


def _like(wrapped: nn.Module, model: nn.Module) -> nn.Module:
    """A wrapper that says how many classes there are."""
    wrapped.num_classes = model.num_classes  # type: ignore[assignment]
    return wrapped.eval()


def main() -> None:
    """Run every row of every part with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", default="pose-small")
    parser.add_argument("--quick", action="store_true", help=", ".join(f"{k} {v}" for k, v in QUICK.items()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=10, help="of the parts with labels")
    parser.add_argument("--steps", type=int, default=150, help="of distillation")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-train", type=int, default=3000)
    parser.add_argument("--num-test", type=int, default=500)
    parser.add_argument("--num-images", type=int, default=600, help="for calibration")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    name = f"sdpose-{arguments.model}{'-quick' if arguments.quick else ''}"
    same = ("model", "epochs", "steps", "lr", "batch_size", "num_train", "num_test", "num_images")
    bench, kept = Bench(arguments), Rows(arguments.out or results(name), {key: vars(arguments)[key] for key in same})
    for seed in arguments.seeds:
        arguments.seed = seed
        for part in arguments.parts:
            run_part(part, bench, kept)
    print("\n\n".join(make(kept.found) for make in (pose_table, halved_table, classifier_table, recipe_table)))


def pose_table(found: dict[str, Any]) -> str:
    """PCK of models trained in cycles: read after one cycle, which is what the result costs, and after all."""
    lines = _cycle_lines(found, "pose", "pck", 100.0)
    return table(["Trained in", "PCK@0.2", "read after all cycles"], lines)


def classifier_table(found: dict[str, Any]) -> str:
    """Top-1 of classifiers trained in cycles."""
    return table(["Trained in", "top-1", "read after all cycles"], _cycle_lines(found, "classifier", "top1", 1.0))


def halved_table(found: dict[str, Any]) -> str:
    """PCK of trained pose models at half of their MLPs."""
    lines = []
    for name, rows in by_seed(found).items():
        if "halved" in rows[0]:
            halved = [row["halved"] for row in rows]
            cells = [mean([100 * one[when] for one in halved], 1) for when in ("after cut", "after recovery")]
            whole = mean([100 * row["pck"] for row in rows], 1)
            lines.append([name.split(": ")[1], f"{halved[0]['parameters']:.0%}", whole, *cells])
    return table(["Trained in", "parameters", "PCK@0.2", "half, cut", "half, recovered"], lines)


def recipe_table(found: dict[str, Any]) -> str:
    """Half of the blocks of a trained classifier, distilled without labels."""
    lines = []
    for name, rows in by_seed(found).items():
        if name.startswith("recipe: "):
            sizes = [f"{rows[0][what]:.0%}" for what in ("parameters", "macs")]
            judged = [[row[when] for row in rows] for when in ("before", "after")]
            cells = [
                mean([row[what] for row in every], 3 if what == "error" else 1)
                for every in judged
                for what in ("error", "top1")
            ]
            lines.append([name.split(": ")[1], *sizes, *cells])
    head = ["Half of the blocks by", "parameters", "MACs", "error", "top-1", "error, distilled", "top-1, distilled"]
    return table(head, lines)


def _cycle_lines(found: dict[str, Any], part: str, score: str, factor: float) -> list[list[str]]:
    lines = []
    for name, rows in by_seed(found).items():
        if name.startswith(f"{part}: "):
            every = f"{score}, all cycles"
            last = mean([factor * row[every] for row in rows], 1) if every in rows[0] else "-"
            lines.append([name.split(": ")[1], mean([factor * row[score] for row in rows], 1), last])
    return lines


def run_part(part: str, bench: Bench, kept: Rows) -> None:
    """Run the rows of a part with a seed."""
    seed = bench.arguments.seed
    if part == "recipe":
        for name in RECIPES:
            kept.get(f"{part}: {name}, seed {seed}", lambda name=name: bench.recipe(name))
        return
    for name, options in variants(None if part == "pose" else CLASS_WEIGHTS):
        if part == "pose":
            cut = name in ("1 cycle", "2 cycles")
            kept.get(f"{part}: {name}, seed {seed}", lambda o=options, cut=cut: bench.pose(o, cut=cut))
        else:
            kept.get(f"{part}: {name}, seed {seed}", lambda o=options: bench.classifier(o))


if __name__ == "__main__":
    main()
