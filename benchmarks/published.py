"""Half of a model's MLPs, and half of MLPs and attention, without training, beside what the papers print.

The protocol of the papers' tables: 1,024 training images without labels to calibrate on, then top-1 of the model's own
head and kNN (k = 20, weighted by exp(cosine / 0.07), all training images as neighbours) on the validation images. The
folder holds `train` and `val`, each with a folder of images a class, or parquet files of these names. For whoever has
the weights and a GPU; nothing of it is particular to ImageNet. Rows are kept in the JSON as they are done, so a run
that was stopped goes on.

    python benchmarks/published.py timm/deit3_huge_patch14_224.fb_in1k --imagenet /data/imagenet
    python benchmarks/published.py timm/vit_base_patch14_dinov2.lvd142m --imagenet /data/imagenet
    python benchmarks/published.py local-dir:MODEL --imagenet ../shared/data/cifar10 --index 5000  # a stand-in
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import nn

import vitrim
from vitrim.cost.count import count_macs, num_parameters
from vitrim.data import open_images, transform_for
from vitrim.distributed.devices import resolve_device
from vitrim.evaluation import own_top1
from vitrim.methods import find_method
from vitrim.metrics.classify import extract, knn_top1
from vitrim.metrics.fidelity import fidelity
from vitrim.metrics.outputs import Outputs
from vitrim.output.load import open_encoder
from vitrim.output.provenance import environment

ROOT = Path(__file__).resolve().parents[1]
BOTH = {"parts": "both"}
# row -> recipe; all without training behind repair
ROWS: dict[str, dict[str, Any]] = {
    "MLP, corp": {"method": "corp"},
    "MLP, dgmr": {"method": "dgmr"},
    "both, corp": {"method": "corp", "options": BOTH},
    "both, dgmr": {"method": "dgmr", "options": BOTH},
}
KNN, TOP1, ZERO_SHOT = "kNN", "top-1", "zero-shot"


@dataclass(frozen=True, kw_only=True)
class Quoted:
    """What a paper prints of a model: what was cut, and a score before and after; nothing of it was run here."""

    names: tuple[str, ...]  # parts of the names by which libraries know the model
    cut: str
    metric: str
    before: float
    after: float
    trained: bool = False


# As read for shared/methods.md (CORP, AMP, DGMR) and shared/peers.md (SnapViT). CORP's abstract confirms 83.27, where
# v1 has 82.8; its DeiT-Base with both halves is left out, because that row repeats the one of the MLP. VBP (2507.12988)
# gives no score in what could be read: after 36% of DeiT-Base's parameters, "over 70%" of its accuracy.
DEIT_L, DEIT_H = ("deit3_large", "deit-large"), ("deit3_huge", "deit-huge")
DINOV3_B, SIGLIP2_B = (
    ("vit_base_patch16_dinov3", "dinov3-vitb16"),
    ("vit_base_patch16_siglip_*v2_webli", "siglip2-base"),
)
CLIP_G = ("vit_giant_patch14_clip", "ViT-g-14")
CLIP_BIG_G, EVA_E = ("vit_gigantic_patch14_clip", "ViT-bigG-14"), ("eva02_enormous", "EVA02-E-14")
DINOV2_G = ("vit_giant_patch14_dinov2", "dinov2-giant")
LESS, MORE = "MLP -25%, heads -10%", "MLP -45%, heads -30%"
MLP, BOTH_HALVES = "MLP 50%", "MLP and query/key 50%"
QUOTED = {
    "CORP, arXiv 2602.05243 v2, tables at 50%": (
        Quoted(names=("deit_tiny", "deit-tiny"), cut=MLP, metric=TOP1, before=72.02, after=55.37),
        Quoted(names=("deit_tiny", "deit-tiny"), cut=BOTH_HALVES, metric=TOP1, before=72.02, after=41.36),
        Quoted(names=("deit_small", "deit-small"), cut=MLP, metric=TOP1, before=79.72, after=69.34),
        Quoted(names=("deit_small", "deit-small"), cut=BOTH_HALVES, metric=TOP1, before=79.72, after=58.37),
        Quoted(names=("deit_base", "deit-base"), cut=MLP, metric=TOP1, before=81.74, after=72.00),
        Quoted(names=DEIT_L, cut=MLP, metric=TOP1, before=84.58, after=82.05),
        Quoted(names=DEIT_L, cut=BOTH_HALVES, metric=TOP1, before=84.58, after=80.30),
        Quoted(names=DEIT_H, cut=MLP, metric=TOP1, before=84.97, after=84.07),
        Quoted(names=DEIT_H, cut=BOTH_HALVES, metric=TOP1, before=84.97, after=83.27),
    ),
    "SnapViT, arXiv 2510.17700": (
        Quoted(names=DINOV3_B, cut=LESS, metric=KNN, before=82.16, after=53.98),
        Quoted(names=DINOV3_B, cut=MORE, metric=KNN, before=82.16, after=20.12),
        Quoted(names=SIGLIP2_B, cut=LESS, metric=KNN, before=80.17, after=44.57),
        Quoted(names=SIGLIP2_B, cut=MORE, metric=KNN, before=80.17, after=14.86),
        Quoted(names=DEIT_L, cut=LESS, metric=KNN, before=86.65, after=85.71),
        Quoted(names=DEIT_L, cut=MORE, metric=KNN, before=86.65, after=80.86),
    ),
    "AMP, arXiv 2603.08100, table in the README of visresearch/AMP": (
        Quoted(names=CLIP_G, cut="MLP, 0.62B left", metric=ZERO_SHOT, before=78.5, after=65.0),
        Quoted(names=CLIP_G, cut="MLP, 0.62B left", metric=ZERO_SHOT, before=78.5, after=78.4, trained=True),
        Quoted(names=CLIP_BIG_G, cut="MLP, 1.17B left", metric=ZERO_SHOT, before=80.1, after=70.2),
        Quoted(names=CLIP_BIG_G, cut="MLP, 1.17B left", metric=ZERO_SHOT, before=80.1, after=80.1, trained=True),
        Quoted(names=EVA_E, cut="MLP, 2.50B left", metric=ZERO_SHOT, before=82.0, after=59.2),
        Quoted(names=EVA_E, cut="MLP, 2.50B left", metric=ZERO_SHOT, before=82.0, after=82.0, trained=True),
    ),
    "DGMR, arXiv 2506.08591, README of visresearch/DGMR": (
        Quoted(names=DINOV2_G, cut="MLP to the model width", metric=KNN, before=83.5, after=83.5, trained=True),
    ),
}


def main() -> None:
    """Run every row that is not there yet, and print them beside the papers'."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for vitrim compress")
    parser.add_argument("--imagenet", type=Path, required=True, help="folder with train and val")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--keep", type=float, default=0.5, help="share of hidden units and of head dimensions")
    parser.add_argument("--num-images", type=int, default=1024, help="to calibrate on, without labels")
    parser.add_argument("--index", type=int, help="training images as neighbours; by default all")
    parser.add_argument("--limit", type=int, help="validation images; by default all")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("published.json"))
    arguments = parser.parse_args()
    print(markdown(run(arguments)))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every row that the JSON does not hold yet, and return all of it."""
    asked = {key: str(value) for key, value in vars(arguments).items() if key not in ("out", "rows", "device")}
    result: dict[str, Any] = {"asked": asked, "environment": environment(), "rows": {}}
    if arguments.out.exists():
        kept = json.loads(arguments.out.read_text())
        if kept["asked"] != asked:
            raise SystemExit(f"{arguments.out}: holds another run ({kept['asked']}); give another --out.")
        result["rows"] = kept["rows"]
    bench = Bench(arguments)
    for name in ("original", *arguments.rows):
        if name in result["rows"]:
            continue
        result["rows"][name] = bench.row(name)
        print(f"{name}: {result['rows'][name]}", flush=True)
        write(arguments.out, result)
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON; the old one stays until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(path)


class Bench:
    """The original, the images, and the judge that all rows share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.asked, self.device = arguments, resolve_device(arguments.device)
        self.teacher, _ = open_encoder(arguments.model)
        self.teacher = self.teacher.eval().requires_grad_(False).to(self.device)
        transform = transform_for(self.teacher)
        self.train = open_images(arguments.imagenet, transform=transform, split="train")
        self.index = self.train if arguments.index is None else self.train.spaced(arguments.index)
        part = "val" if (arguments.imagenet / "val").exists() else "test"
        found = open_images(arguments.imagenet, transform=transform, split=part)
        self.test = found if arguments.limit is None else found.spaced(arguments.limit)

    def row(self, name: str) -> dict[str, Any]:
        """Cut and judge; the seconds are the whole run's of `compress`, with what it measures."""
        if name == "original":
            return self.scores(self.teacher)
        recipe = ROWS[name]
        if not set(recipe.get("options", {})) <= set(find_method(recipe["method"]).model_fields):
            return {"refused": f"{recipe['method']} cuts no attention yet"}
        asked = {**recipe, "keep_ratio": self.asked.keep, "calibrate": {"num_images": self.asked.num_images}}
        small = vitrim.compress(
            self.teacher, data=self.train, recipe=asked, seed=self.asked.seed, device=self.asked.device, quiet=True
        )
        assert small.model is not None
        found = self.scores(small.model.eval().requires_grad_(False).to(self.device))
        return {**found, "seconds": small.metrics.seconds, "notes": list(small.metrics.notes)}

    def scores(self, model: nn.Module) -> dict[str, Any]:
        """Return kNN and top-1 in percent, the relative error of all tokens, parameters and MACs of one image."""
        size = self.asked.batch_size
        found = Outputs()
        close = fidelity(model, self.teacher, self.test.loader(batch_size=size), outputs=(found, Outputs()))
        known, labels = extract(model, self.index.loader(batch_size=size))
        nearest = knn_top1(known, labels, found.pooled_ND, found.labels_N, k=min(20, len(labels)))
        one = next(iter(self.test.loader(batch_size=1))).images_BCHW.to(self.device)
        return {
            KNN: 100 * nearest,
            TOP1: own_top1(model, found),
            "relative_error": close["relative_error"],
            "parameters": num_parameters(model),
            "macs": count_macs(model, one),
            "num_neighbours": len(labels),
            "num_images": len(found),
        }


def quoted_for(model: str) -> tuple[list[tuple[str, Quoted]], str]:
    """Return what papers print of a model, or everything if they print nothing of it, and a title."""
    every = [(source, row) for source, rows in QUOTED.items() for row in rows]
    same = [
        (source, row) for source, row in every if any(fnmatch(model.lower(), f"*{name.lower()}*") for name in row.names)
    ]
    title = "What papers print of it" if same else "No paper is quoted on this model; what they print of others"
    return same or every, title


def markdown(result: dict[str, Any]) -> str:
    """Return our rows, and below them the papers', each with its source."""
    asked, rows = result["asked"], result["rows"]
    whole = rows["original"]
    lines = [
        f"{asked['model']} on {asked['imagenet']}: {whole['num_images']:,} images, {whole['num_neighbours']:,} "
        f"neighbours; {asked['keep']} of each part stays; no training.\n",
        "| cut | parameters | MACs | kNN (%) | top-1 (%) | relative error | seconds, with what compress measures |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        if "refused" in row:
            lines.append(f"| {name} | {row['refused']} | | | | | |")
            continue
        cells = [f"{row['parameters'] / 1e6:.2f}M", f"{row['macs'] / 1e9:.3f}G", f"{row[KNN]:.2f}"]
        cells += ["" if row[TOP1] is None else f"{row[TOP1]:.2f}", f"{row['relative_error']:.4f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {row.get('seconds', '')} |")
    found, title = quoted_for(asked["model"])
    lines += [f"\n{title} (read, not run):\n", "| model | cut | trained | score | before | after | source |"]
    lines.append("|---|---|---|---|---:|---:|---|")
    for source, row in found:
        cells = (row.names[0], row.cut, "yes" if row.trained else "no", row.metric, f"{row.before:g}", f"{row.after:g}")
        lines.append(f"| {' | '.join(cells)} | {source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
