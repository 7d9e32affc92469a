"""Patch Slimming beside token merging and beside narrower layers, on the CIFAR-10 ViT of ../shared, at equal MACs.

Images of 32x32 in patches of 4x4 are 64 patches and CLS: few tokens, of which attention takes a small part of the work,
so these numbers say little about images of 224 pixels. Three tables. `tokens`: top-1 and the relative error of CLS by
the share of MACs that stays, for each way to choose tokens, after the cut, after tuning block by block and after
distillation. `stack`: narrower layers (`dgmr` of MLPs and attention), fewer tokens, and both, at a quarter of the MACs.
`latency`: forward passes as ratios to the original, by turns in the same run. Prints rows as they come, then tables,
and writes JSON with machine, versions and command.

    python benchmarks/patch_slimming.py                    # within an hour on two cores
    python benchmarks/patch_slimming.py --seeds 0 1 2      # mean and spread over other calibration images
    python benchmarks/patch_slimming.py --quick            # a few minutes, with few images and steps
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

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
from vitrim.models.features import evaluating
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment
from vitrim.recover.distill import recover_
from vitrim.repair.blockwise import recover_blocks_

SHARED = Path(__file__).resolve().parents[2] / "shared"
# row -> recipe without its budget
TOKENS: dict[str, dict[str, Any]] = {
    "patch-slimming": {"method": "patch-slimming"},
    "patch-slimming, shortcut": {"method": "patch-slimming", "options": {"shortcut": True}},
    "tome": {"method": "tome"},
}
WIDTH: dict[str, Any] = {"method": "dgmr", "options": {"parts": "both"}}
QUARTER = 0.25
BATCHES = (1, 8, 64)


def main() -> None:
    """Measure every row for every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.75, 0.5, 0.35], help="shares of MACs that stay")
    parser.add_argument("--num-images", type=int, default=500, help="for calibration")
    parser.add_argument("--num-test", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300, help="of distillation, 32 images each")
    parser.add_argument("--block-steps", type=int, default=100, help="of tuning, for each block")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/patch_slimming.json"))
    given = parser.parse_args()
    if given.quick:
        given.macs, given.num_images, given.num_test, given.steps, given.block_steps = [0.5], 64, 500, 20, 10
    result: dict[str, Any] = {
        "environment": environment(),
        "arguments": {key: str(value) for key, value in vars(given).items()},
        "seeds": {},
    }
    for seed in given.seeds:
        bench = Bench(given, seed)
        rows = {"tokens": bench.tokens(given.macs), "stack": bench.stack()}
        result["seeds"][seed] = {"original": bench.judge(bench.teacher), **rows}
        if seed == given.seeds[0]:
            result["latency"] = bench.latency()
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))


class Bench:
    """The model, calibration images, test images and the judge that all rows share."""

    def __init__(self, given: argparse.Namespace, seed: int) -> None:
        self.given, self.seed = given, seed
        self.teacher, _ = open_model(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
        self.teacher.requires_grad_(False)
        data, transform = SHARED / "data" / "cifar10", transform_for(self.teacher)
        self.train = open_images(data / "train.parquet", transform=transform)
        self.batches, _ = first_images(self.train, given.num_images, seed=seed)
        test = open_images(data / "test.parquet", transform=transform, limit=given.num_test)
        self.test = [(batch.images_BCHW, batch.labels_B) for batch in test.loader(batch_size=100)]
        with evaluating(self.teacher):
            self.target = [self.teacher.forward_features(images)[:, 0] for images, _ in self.test]  # type: ignore[operator]
        self.held_out = first_images(self.train, 200, seed=seed + 1000)[0]
        self.whole = count_macs(self.teacher, self.batches[0][:1])
        self.models: dict[str, nn.Module] = {}

    def tokens(self, shares: list[float]) -> dict[str, dict[str, dict[str, float]]]:
        """Rows of fewer tokens, by share of MACs: after the cut, after tuning by block, after distillation."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for share in shares:
            for name, recipe in TOKENS.items():
                print(f"{share:g}, {name}", flush=True)
                student = self.cut(self.teacher, recipe, share)
                self.models.setdefault(f"{name} at {share:.0%}", student)
                found.setdefault(name, {})[f"{share:g}"] = self.judge(student)
                if name == "patch-slimming":
                    tuned = self.tuned(student)
                    found.setdefault(f"{name}, blocks tuned", {})[f"{share:g}"] = self.judge(tuned)
                    both = self.distilled(tuned)
                    found.setdefault(f"{name}, blocks tuned, distilled", {})[f"{share:g}"] = self.judge(both)
                if name in ("patch-slimming", "tome"):
                    found.setdefault(f"{name}, distilled", {})[f"{share:g}"] = self.judge(self.distilled(student))
        return found

    def stack(self) -> dict[str, dict[str, dict[str, float]]]:
        """Rows of a quarter of the MACs by width, by tokens and by both, after the cut and after distillation."""
        tokens = TOKENS["patch-slimming"]
        narrow = self.cut(self.teacher, WIDTH, QUARTER**0.5)
        students = {
            "dgmr of MLPs and attention": self.cut(self.teacher, WIDTH, QUARTER),
            "patch-slimming": self.cut(self.teacher, tokens, QUARTER),
            "dgmr to a half, then patch-slimming": self.cut(narrow, tokens, QUARTER),
        }
        self.models |= {f"{name} at {QUARTER:.0%}": student for name, student in students.items()}
        return {
            name: {"cut": self.judge(student), "distilled": self.judge(self.distilled(student))}
            for name, student in students.items()
        }

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
            options=BlockwiseOptions(num_images=self.given.num_images, steps=self.given.block_steps, train="block"),
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
            options=RecoverOptions(steps=self.given.steps, batch_size=32, num_validations=4),
            context=RunContext(seed=self.seed, quiet=True),
        )
        return student

    def judge(self, student: nn.Module) -> dict[str, float]:
        """Return top-1 in percent, the relative error of CLS, and the shares of MACs and of tokens that stay."""
        compared, right, total = TokenComparison(), 0, 0
        with evaluating(student):
            for (images, labels), target_BD in zip(self.test, self.target, strict=True):
                tokens = student.forward_features(images)  # type: ignore[operator]
                compared.update(tokens[:, 0], target_BD)
                scores = student.forward_head(tokens)  # type: ignore[operator]
                right, total = right + int((scores.argmax(1) == labels).sum()), total + len(images)
        macs = count_macs(student, self.batches[0][:1]) / self.whole
        found = {"top1": 100 * right / total, "relative_error": compared.relative_error, "macs": macs}
        found["tokens"] = tokens_left(student, self.batches[0][:1])
        print({key: round(value, 5) for key, value in found.items()}, flush=True)
        return found

    def latency(self) -> dict[str, dict[str, float]]:
        """Return the time of a pass as a ratio to the original's, by model and batch."""
        models = [self.teacher, *self.models.values()]
        times = measure_latency(models, self.batches[0][:1], batch_sizes=BATCHES)[1:]
        return {
            name: {str(size): row["ratio"] for size, row in found.items() if "ratio" in row}
            for name, found in zip(self.models, times, strict=True)
        }


def tokens_left(model: nn.Module, image: Tensor) -> float:
    """Return the share of all tokens that the blocks put out, CLS included."""
    left: list[int] = []
    blocks = list(model.blocks)  # type: ignore[arg-type]
    handles = [block.register_forward_hook(lambda *seen: left.append(seen[-1].shape[1])) for block in blocks]
    with evaluating(model):
        model(image)
    for handle in handles:
        handle.remove()
    return sum(left) / len(blocks) / model.pos_embed.shape[1]  # type: ignore[union-attr]


def tables(result: dict[str, Any]) -> str:
    """Write all tables: means over seeds, with the standard deviation where there are several."""
    seeds = list(result["seeds"].values())
    first = seeds[0]
    original = f"original: top-1 {first['original']['top1']:.1f}"
    by_tokens = _table([seed["tokens"] for seed in seeds], lambda share: f"{float(share):.0%} of MACs")
    stacked = _table([seed["stack"] for seed in seeds], str)
    lines = ["| | " + " | ".join(f"batch {size}" for size in BATCHES) + " |", "|---|" + "---:|" * len(BATCHES)]
    for name, row in result["latency"].items():
        lines.append(
            f"| {name} | " + " | ".join(f"{row[str(b)]:.2f}" if str(b) in row else "-" for b in BATCHES) + " |"
        )
    return "\n\n".join([original, by_tokens, stacked, "\n".join(lines)])


def _table(seeds: list[dict[str, dict[str, dict[str, float]]]], title: Any) -> str:
    """Write top-1 and, in parentheses, the relative error of CLS and the share of tokens of every row."""
    columns = list(dict.fromkeys(column for row in seeds[0].values() for column in row))
    lines = ["| | " + " | ".join(map(title, columns)) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in seeds[0].items():
        cells = []
        for column in columns:
            every = [seed[name][column] for seed in seeds] if column in row else []
            cells.append(_cell(every) if every else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(every: list[dict[str, float]]) -> str:
    means = {key: statistics.mean(one[key] for one in every) for key in every[0]}
    spread = f" ± {statistics.stdev(one['top1'] for one in every):.1f}" if len(every) > 1 else ""
    return f"{means['top1']:.1f}{spread} ({means['relative_error']:.4f}; {means['tokens']:.0%})"


if __name__ == "__main__":
    main()
