"""Patch Slimming beside token merging and beside narrower layers, on a ViT of CIFAR-10, at equal MACs.

Images of 32x32 in patches of 4x4 are 64 patches and CLS: few tokens, of which attention takes a small part of the work,
so these numbers say little about images of 224 pixels. Rows are the relative error of CLS and, where there is a head,
top-1, for each way to choose tokens at several shares of the MACs: after the cut, after tuning block by block, after
distillation; and at a quarter of the MACs narrower layers (`dgmr` of MLPs and attention), fewer tokens, and both.
Behind them the time of forward passes, as ratios to the original, by turns in the same run. Rows are written as they
come, and a stopped run goes on behind the last of them.

    python benchmarks/patch_slimming.py               # CIFAR-10 ViT, three seeds: an hour of two cores
    python benchmarks/patch_slimming.py --model deep  # of deep_vit.py
    python benchmarks/patch_slimming.py --quick       # a few minutes, with few images and steps
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rows import MODELS, SHARED, Row, Rows, by_seed, mean, mean_top1, results, table
from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.compression.share import find_share
from vitrim.config.options import BlockwiseOptions, RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import count_macs
from vitrim.cost.latency import measure_latency
from vitrim.data import first_images, open_images, transform_for
from vitrim.metrics.fidelity import TokenComparison
from vitrim.models.features import evaluating, num_classes
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.recover.distill import recover_
from vitrim.repair.blockwise import recover_blocks_

# row -> recipe without its budget
TOKENS: dict[str, dict[str, Any]] = {
    "patch-slimming": {"method": "patch-slimming"},
    "patch-slimming, shortcut": {"method": "patch-slimming", "options": {"shortcut": True}},
    "tome": {"method": "tome"},
}
WIDTH: dict[str, Any] = {"method": "dgmr", "options": {"parts": "both"}}
QUARTER = 0.25
STACKED = ("dgmr of MLPs and attention", "patch-slimming", "dgmr to a half, then patch-slimming")
BATCHES = (1, 8, 64)


def main() -> None:
    """Measure every row for every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("cifar10", "deep"), default="cifar10")
    parser.add_argument("--source", help="where the model is, if it is elsewhere")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.75, 0.5], help="shares of MACs that stay")
    parser.add_argument("--num-images", type=int, default=256, help="for calibration")
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=150, help="of distillation, 32 images each")
    parser.add_argument("--block-steps", type=int, default=50, help="of tuning, for each block")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the images for calibration")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.quick:
        asked.macs, asked.num_images, asked.num_test, asked.steps, asked.block_steps = [0.5], 64, 500, 20, 10
        asked.seeds = [0]
    out = asked.out or results(f"patch_slimming-{asked.model}{'-quick' if asked.quick else ''}")
    same = ("model", "macs", "num_images", "num_test", "steps", "block_steps")
    kept = Rows(out, {key: vars(asked)[key] for key in same})
    for seed in asked.seeds:
        bench = Bench(asked, seed)
        kept.get("original", lambda: bench.judge(bench.teacher))  # noqa: B023
        for name, row in bench.rows():
            kept.get(f"{name}, seed {seed}", row)
        if seed == asked.seeds[0]:
            kept.get("latency", bench.latency)
    print(markdown(kept.found))


class Bench:
    """The model, calibration images, test images and the judge that all rows share."""

    def __init__(self, asked: argparse.Namespace, seed: int) -> None:
        self.asked, self.seed = asked, seed
        self.teacher, _ = open_model(asked.source or MODELS[asked.model])
        self.teacher.requires_grad_(False)
        data, transform = SHARED / "data" / "cifar10", transform_for(self.teacher)
        self.train = open_images(data / "train.parquet", transform=transform)
        self.batches, _ = first_images(self.train, asked.num_images, seed=seed)
        test = open_images(data / "test.parquet", transform=transform, limit=asked.num_test)
        self.test = [(batch.images_BCHW, batch.labels_B) for batch in test.loader(batch_size=100)]
        with evaluating(self.teacher):
            self.target = [self.teacher.forward_features(images)[:, 0] for images, _ in self.test]  # type: ignore[operator]
        self.held_out = first_images(self.train, 200, seed=seed + 1000)[0]
        self.whole = count_macs(self.teacher, self.batches[0][:1])
        self.models: dict[str, nn.Module] = {}

    def rows(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        """Each row's name and what measures it."""
        for share in self.asked.macs:
            for name in TOKENS:
                yield f"{name} at {share:.0%}", partial(self.judged, name, share)
                if name == "patch-slimming":
                    yield f"{name}, blocks tuned at {share:.0%}", partial(self.judged, name, share, self.tuned)
                    both = partial(self.judged, name, share, self.tuned, self.distilled)
                    yield f"{name}, blocks tuned, distilled at {share:.0%}", both
                if name in ("patch-slimming", "tome"):
                    yield f"{name}, distilled at {share:.0%}", partial(self.judged, name, share, self.distilled)
        for name in STACKED:
            yield f"{name} at {QUARTER:.0%}", partial(self.judged, name, QUARTER)
            yield f"{name}, distilled at {QUARTER:.0%}", partial(self.judged, name, QUARTER, self.distilled)

    def judged(self, name: str, share: float, *trained: Callable[[nn.Module], nn.Module]) -> Row:
        """Cut, train and judge."""
        student = self.student(name, share)
        for train in trained:
            student = train(student)
        return self.judge(student)

    def student(self, name: str, share: float) -> nn.Module:
        """A model cut in one of the ways of the rows, kept for the rows behind it."""
        key = f"{name} at {share:.0%}"
        if key not in self.models:
            if name in TOKENS:
                self.models[key] = self.cut(self.teacher, TOKENS[name], share)
            elif name == STACKED[0]:
                self.models[key] = self.cut(self.teacher, WIDTH, share)
            else:
                narrow = self.cut(self.teacher, WIDTH, share**0.5)
                self.models[key] = self.cut(narrow, TOKENS["patch-slimming"], share)
        return self.models[key]

    def cut(self, model: nn.Module, recipe: dict[str, Any], share: float) -> nn.Module:
        """Return a copy of a model, cut to a share of the original's MACs."""
        sites, now = find_mlps(model), count_macs(model, self.batches[0][:1])
        asked = Recipe.parse({**recipe, "macs_ratio": share * self.whole / now, "exact": True, "seed": self.seed})
        ratio = find_share(asked, model, sites, self.batches[0])
        student = copy.deepcopy(model)
        cut_(student, model, sites, asked.updated({"keep_ratio": ratio}), self.batches, quiet=True)
        return student

    def tuned(self, student: nn.Module) -> nn.Module:
        """Return a copy trained block by block."""
        student = copy.deepcopy(student)
        recover_blocks_(
            student,
            self.teacher,
            find_mlps(self.teacher),
            self.train,
            held_out=self.held_out,
            options=BlockwiseOptions(num_images=self.asked.num_images, steps=self.asked.block_steps, train="block"),
            context=RunContext(seed=self.seed, quiet=True),
        )
        return student

    def distilled(self, student: nn.Module) -> nn.Module:
        """Return a copy trained as a whole on the teacher's features."""
        student = copy.deepcopy(student)
        recover_(
            student,
            self.teacher,
            self.train,
            held_out=self.held_out,
            options=RecoverOptions(steps=self.asked.steps, batch_size=32, num_validations=4),
            context=RunContext(seed=self.seed, quiet=True),
        )
        return student

    def judge(self, student: nn.Module) -> Row:
        """Return top-1 in percent, the relative error of CLS, and the shares of MACs and of tokens that stay."""
        compared, right, total = TokenComparison(), 0, 0
        with evaluating(student):
            for (images, labels), target_BD in zip(self.test, self.target, strict=True):
                tokens = student.forward_features(images)  # type: ignore[operator]
                compared.update(tokens[:, 0], target_BD)
                if num_classes(student):
                    scores = student.forward_head(tokens)  # type: ignore[operator]
                    right, total = right + int((scores.argmax(1) == labels).sum()), total + len(images)
        macs = count_macs(student, self.batches[0][:1]) / self.whole
        found = {"error": compared.relative_error, "top1": 100 * right / total if total else None, "macs": macs}
        return {**found, "tokens": tokens_left(student, self.batches[0][:1])}

    def latency(self) -> dict[str, dict[str, float]]:
        """Return the time of a pass as a ratio to the original's, by model and batch."""
        tokens = [(name, share) for share in self.asked.macs for name in TOKENS]
        for name, share in [*tokens, *((name, QUARTER) for name in STACKED)]:
            self.student(name, share)
        models = [self.teacher, *self.models.values()]
        times = measure_latency(models, self.batches[0][:1], batch_sizes=BATCHES)[1:]
        return {
            name: {str(size): row["ratio"] for size, row in found.items() if "ratio" in row}
            for name, found in zip(self.models, times, strict=True)
        }


def tokens_left(model: nn.Module, image: Tensor) -> float:
    """Return the share of the first block's tokens that the blocks put out in the mean."""
    seen: list[tuple[int, int]] = []
    blocks = list(model.blocks)  # type: ignore[arg-type]
    handles = [
        block.register_forward_hook(lambda _, given, out: seen.append((given[0].shape[1], out.shape[1])))
        for block in blocks
    ]
    with evaluating(model):
        model(image)
    for handle in handles:
        handle.remove()
    return sum(left for _, left in seen) / len(blocks) / seen[0][0]


def markdown(found: dict[str, Any]) -> str:
    """All tables: means over seeds, with the standard deviation where there are several."""
    seen = {tuple(name.rsplit(" at ", 1)): row for name, row in by_seed(found).items() if " at " in name}
    columns = list(dict.fromkeys(share for _, share in seen))
    lines = [
        [name, *(cell(seen[name, share]) if (name, share) in seen else "-" for share in columns)]
        for name in dict.fromkeys(name for name, _ in seen)
    ]
    times = [
        [name, *(f"{row[str(size)]:.2f}" if str(size) in row else "-" for size in BATCHES)]
        for name, row in found["rows"].get("latency", {}).items()
    ]
    tokens = table(["", *(f"{share} of MACs" for share in columns)], lines)
    if not times:  # a run that was stopped in front of them
        return tokens
    return f"{tokens}\n\n{table(['', *(f'batch {size}' for size in BATCHES)], times)}"


def cell(every: list[Row]) -> str:
    """Top-1 and, in parentheses, the relative error of CLS and the share of tokens."""
    tokens = sum(one["tokens"] for one in every) / len(every)
    return f"{mean_top1(every)} ({mean([one['error'] for one in every], 4)}; {tokens:.0%})"


if __name__ == "__main__":
    main()
