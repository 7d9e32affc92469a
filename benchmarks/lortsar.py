"""LORTSAR on NW-UCLA: four streams of Hyperformer, cut by SVD to shares of their parameters, and trained again.

Views 1 and 2 train (a tenth of them judges which state is kept), view 3 tests. Each stream is trained from scratch with
labels; then, at 75, 50 and 35% of its parameters, cut by plain SVD with equal shares of each layer, and by ours: ranks
of all layers under one budget and factors that fit what layers put out. Accuracy in percent of each stream and of all
together (their scores added): before, after the cut, and after fine-tuning at a tenth of the rate. The narrow model
takes about half an hour a seed on two cores. Rows are written as they come, states and scores lie in
benchmarks/models/lortsar, and a stopped run goes on behind the last row.

    nice python benchmarks/lortsar.py                       # the narrow model, one seed
    nice python benchmarks/lortsar.py --seeds 0 1 2         # goes on from the same file
    nice python benchmarks/lortsar.py --quick               # few sequences and steps, a file of its own
    python benchmarks/lortsar.py --model full --epochs 750 --tune 150 --device cuda   # as the paper trains, for a GPU:
                                                            # 150 epochs of five passes, and 30 of them to fine-tune
    python benchmarks/lortsar.py --model full --quick --device cuda                   # a few steps of that
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any, get_args

import torch
from rows import ROOT, SHARED, Row, Rows, by_seed, mean, results, table
from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.config.options import RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import num_parameters
from vitrim.data import ImageSet, augment_for, first_images, split_indices
from vitrim.data.inputs import open_set
from vitrim.models.features import evaluating
from vitrim.models.layers import find_layers
from vitrim.models.load import load_model
from vitrim.models.origin import Origin, Reading
from vitrim.models.skeleton import Stream
from vitrim.recover.labels import train_labels_
from vitrim.types import LayerSite

DATA = SHARED / "data" / "nw-ucla"
KEPT = ROOT / "benchmarks" / "models" / "lortsar"
NAMES = {"small": "vitrim/skeleton-hyperformer-small", "full": "vitrim/skeleton-hyperformer"}
STREAMS: tuple[Stream, ...] = get_args(Stream)
WAYS = {"plain": {"whiten": False, "allocate": False}, "ours": {}}
QUICK = {"epochs": 0.1, "tune": 0.1, "ratios": [0.5], "num_test": 64, "num_images": 32}
RATE, NUM_CALIBRATION_BATCH = 0.025, 32


class Bench:
    """One stream and seed: its data, and what is done to its model."""

    def __init__(self, arguments: argparse.Namespace, stream: Stream, seed: int) -> None:
        self.arguments, self.seed = arguments, seed
        name, reading = NAMES[arguments.model], Reading(model_args={"stream": stream})
        self.model, self.origin = load_model(name, reading=reading)
        self.folder = KEPT / f"{arguments.model}-{arguments.epochs:g}-{arguments.tune:g}" / f"{stream}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        every = open_set(DATA / "train.parquet", self.origin, limit=None)
        rest, held = split_indices(len(every), num_held_out=len(every) // 10, seed=0)
        self.train, self.held_out = every.subset(rest), list(every.subset(held).loader(batch_size=64))
        self.test = open_set(DATA / "test.parquet", self.origin, limit=arguments.num_test)
        self.started()

    def started(self) -> None:
        """Give each seed a start of its own."""
        torch.manual_seed(self.seed)
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()
        self.model.to(self.arguments.device)

    def trained(self, model: nn.Module, epochs: float, rate: float, part: str) -> dict[str, Any]:
        """Train in place, from the state of a stopped run if there is one."""
        options = RecoverOptions(
            loss="labels",
            epochs=epochs,
            batch_size=16,
            optimizer="sgd",
            lr=rate,
            warmup_ratio=0.03,
            drops=(0.73, 0.8),
            num_validations=max(2, min(30, int(epochs))),
        )
        context = RunContext(work=self.folder / part, resume=True, quiet=True, seed=self.seed)
        result = train_labels_(
            model,
            augmented(self.train, self.origin, self.seed),
            held_out=self.held_out,
            options=options,
            context=context,
        )
        return {"best_step": result.best_step, "num_steps": result.num_steps, "seconds": round(result.seconds)}

    def judged(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Accuracy on the test view; the scores are kept for all streams together."""
        scores, labels = scores_of(model, self.test)
        torch.save(scores, self.folder / f"{name}.pt")
        return {"parameters": num_parameters(model), "top1": accuracy(scores, labels)}

    def original(self) -> dict[str, Any]:
        """Train from scratch."""
        found = self.trained(self.model, self.arguments.epochs, RATE, "scratch")
        torch.save(self.model.state_dict(), self.folder / "original.state")
        return {**self.judged(self.model, "original"), **found}

    def load(self) -> None:
        """Take up the trained model."""
        self.model.load_state_dict(torch.load(self.folder / "original.state", weights_only=True))

    def cut(self, way: str, ratio: float) -> dict[str, Any]:
        """Cut the trained model to a share of its parameters, judge, fine-tune and judge again."""
        started, student = time.monotonic(), copy.deepcopy(self.model)
        options = WAYS[way]
        keep = share_for(self.model, ratio, equal=way == "plain")
        recipe = Recipe.parse({"method": "lortsar", "keep_ratio": keep, "options": options, "seed": self.seed})
        number, size = self.arguments.num_images, NUM_CALIBRATION_BATCH
        batches = first_images(self.train, number, seed=self.seed, batch_size=size)[0]
        plan = cut_(student, copy.deepcopy(self.model).requires_grad_(False), (), recipe, batches, quiet=True).plan
        after, name = self.judged(student, f"{way}-{ratio:g}-cut"), f"{way}-{ratio:g}"
        found = self.trained(student, self.arguments.tune, RATE / 10, name)
        seconds = round(time.monotonic() - started)
        layers = len(plan.edits)
        return {
            "cut": after,
            "tuned": {**self.judged(student, f"{name}-tuned"), **found},
            "seconds": seconds,
            "layers": layers,
        }


def augmented(images: ImageSet, origin: Origin, seed: int) -> ImageSet:
    """Training sequences, turned and drawn."""
    return images.augmented(augment_for(origin.preprocessing, "light", flip=False), seed)


def scores_of(model: nn.Module, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Class scores and labels of all sequences."""
    found, device = [], next(model.parameters()).device
    with evaluating(model):
        for batch in images.loader(batch_size=64):
            found.append((model(batch.images_BCHW.to(device)).cpu(), batch.labels_B))
    return torch.cat([scores for scores, _ in found]).clone(), torch.cat([labels for _, labels in found])


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    return round(100 * float((scores.argmax(1) == labels).double().mean()), 2)


def share_for(model: nn.Module, ratio: float, *, equal: bool) -> float:
    """The share of the values of all layers, or of each layer's break-even rank, that leaves a model at a ratio."""
    layers = [layer for layer in find_layers(model) if layer.path.startswith("blocks.")]
    whole = sum(layer.groups * layer.num_rows * layer.num_cols for layer in layers)
    wanted = whole - (1 - ratio) * num_parameters(model)
    if not equal:
        return wanted / whole
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(left(layer, middle) for layer in layers) <= wanted else (low, middle)
    return low


def left(layer: LayerSite, share: float) -> int:
    """The values of a layer at a share of its break-even rank."""
    rank = max(1, int(layer.break_even * share))
    whole = layer.groups * layer.num_rows * layer.num_cols
    return whole if rank >= layer.break_even else layer.groups * rank * (layer.num_rows + layer.num_cols)


def together(folder: Path, seed: int, name: str, labels: Tensor) -> float:
    """Accuracy of the added scores of all streams."""
    scores = [torch.load(folder / f"{stream}-{seed}" / f"{name}.pt", weights_only=True) for stream in STREAMS]
    return accuracy(torch.stack(scores).sum(0), labels)


def run_seed(arguments: argparse.Namespace, kept: Rows, seed: int) -> None:
    """Run all rows of a seed, and those of its streams together."""
    names = [f"{way}-{ratio:g}" for ratio in arguments.ratios for way in WAYS]
    for stream in STREAMS:
        bench = Bench(arguments, stream, seed)
        kept.get(f"original, {stream}, seed {seed}", bench.original)
        bench.load()
        for ratio in arguments.ratios:
            for way in WAYS:
                kept.get(f"{way} {ratio:g}, {stream}, seed {seed}", lambda: bench.cut(way, ratio))  # noqa: B023
    labels, folder = scores_of(bench.model, bench.test)[1], bench.folder.parent
    found = ["original", *(f"{name}-{when}" for name in names for when in ("cut", "tuned"))]
    kept.get(f"together, seed {seed}", lambda: {name: together(folder, seed, name, labels) for name in found})


def markdown(found: dict[str, Any]) -> str:
    """Accuracy of each stream and of all together: before, after the cut, and after fine-tuning; means over seeds."""
    seen, lines = by_seed(found), []

    def line(title: str, key: str, inner: str | None, name: str) -> list[str]:
        every: list[list[Row]] = [[row[inner] if inner else row for row in seen[f"{key}, {s}"]] for s in STREAMS]
        parts = [
            row["parameters"] / own["parameters"] for row, own in zip(every[0], seen["original, joint"], strict=True)
        ]
        streams = [mean([row["top1"] for row in rows], 1) for rows in every]
        return [title, f"{parts[0]:.0%}", *streams, mean([row[name] for row in seen["together"]], 1)]

    lines.append(line("original", "original", None, "original"))
    for ratio in found["arguments"]["ratios"]:
        for way in WAYS:
            for inner, what in (("cut", "cut"), ("tuned", "fine-tuned")):
                lines.append(line(f"{way}, {what}", f"{way} {ratio:g}", inner, f"{way}-{ratio:g}-{inner}"))
    return table(["", "parameters", *STREAMS, "together"], lines)


def main() -> None:
    """Run every row with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="small")
    parser.add_argument("--quick", action="store_true", help=", ".join(f"{k} {v}" for k, v in QUICK.items()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=12, help="passes over the sequences, from scratch")
    parser.add_argument("--tune", type=float, default=1.2, help="passes of fine-tuning")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.5, 0.35])
    parser.add_argument("--num-images", type=int, default=512, help="sequences that ours looks at")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.num_test = None
    if arguments.quick:
        vars(arguments).update(QUICK)
    name = f"lortsar-{arguments.model}{'-quick' if arguments.quick else ''}"
    same = ("model", "epochs", "tune", "ratios", "num_test", "num_images")
    kept = Rows(arguments.out or results(name), {key: vars(arguments)[key] for key in same})
    for seed in arguments.seeds:
        run_seed(arguments, kept, seed)
    print(markdown(kept.found))


if __name__ == "__main__":
    main()
