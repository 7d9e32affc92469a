"""What each idea of the closed form is worth, before any training: selection, least squares, feedback, local refit.

Relative squared error of all output tokens against the original, on images that calibration has not seen; two models:
the digits ViT that comes with vitrim, and the CIFAR-10 ViT of ../shared where that is present.

    python benchmarks/repair.py              # about 15 minutes on 2 cores
    python benchmarks/repair.py --model digits

With `--cost` it measures one model, of images or of text, instead: the error on held-out inputs, and what each effort
of repair takes, in epochs of plain distillation on the same inputs in the same process: each input once, in batches of
32; the original forward, the cut copy forward and backward, one step of AdamW on all its weights, in float32.

    python benchmarks/repair.py --cost local-dir:benchmarks/models/deep-vit --num-images 800 --ratios 1
    python benchmarks/repair.py --cost ../shared/models/minilm --num-images 200 --ratios 1
    python benchmarks/repair.py --cost ../shared/models/minilm --num-images 200 --ratios 1 --select-on outputs features

`--cost vit-s` is a ViT-S/14 with random weights, for what it takes alone. What depends on the model's depth, on tokens
or on steps grows in proportion to each, and so does the epoch; so a part of it tells of the whole if the refit's steps
are cut in proportion to tokens. A selection's work does not depend on tokens, and counts too much then.

    python benchmarks/repair.py --cost vit-s --num-images 800 --ratios 1                      # 13 minutes of 2 cores
    python benchmarks/repair.py --cost vit-s --num-images 800 --ratios 1 --image-size 112 --depth 2 --refit-steps 75
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.data import ImageSet, first_images, open_images, split_indices, transform_for
from vitrim.data.inputs import open_set
from vitrim.distributed.devices import resolve_device
from vitrim.metrics.fidelity import fidelity
from vitrim.models.features import evaluating, features, inputs_for
from vitrim.models.origin import Origin
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_encoder, open_model
from vitrim.output.provenance import environment

SHARED = Path(__file__).resolve().parents[2] / "shared"
CIFAR10 = SHARED / "data" / "cifar10"
# name -> (model, calibration images, test images)
MODELS: dict[str, tuple[str, Any, Any]] = {
    "digits": (f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}", "digits", "digits"),
    "cifar10": (f"local-dir:{SHARED / 'models' / 'cifar10-vit'}", CIFAR10 / "train.parquet", CIFAR10 / "test.parquet"),
}
NO_REFIT = {"refit": False}
EFFORTS = {"fast": NO_REFIT, "default": True}
BATCH, RATE = 32, 1e-5  # of the epoch of distillation that is the unit of cost
# row -> (method, options, repair); each row adds one idea to the one before it
ROWS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "magnitude": ("magnitude", {}, False),
    "random": ("random", {}, False),
    "DGMR as published": ("dgmr-paper", {}, False),
    "weights + least squares": ("dgmr", {"select_on": "weights"}, {**NO_REFIT, "feedback": 0.0}),
    "activations + least squares": ("dgmr", {"select_on": "activations"}, {**NO_REFIT, "feedback": 0.0}),
    "outputs + least squares": ("dgmr", {}, {**NO_REFIT, "feedback": 0.0}),
    "+ half of the error fed back": ("dgmr", {}, {**NO_REFIT, "feedback": 0.5}),
    "+ all of it": ("dgmr", {}, {**NO_REFIT, "feedback": 1.0}),
    "half of it, + refit, 150 steps": ("dgmr", {}, {"feedback": 0.5, "refit_steps": 150}),
    "all of it, + refit, 150 steps": ("dgmr", {}, {"refit_steps": 150}),
    "all of it, + refit, 300 steps (default)": ("dgmr", {}, True),
    "all of it, + refit, 300 steps of 0.03 of the norm": ("dgmr", {}, {"refit_lr": 0.03}),
}


def main() -> None:
    """Run every row on every model and ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--cost", metavar="MODEL", help="measure the cost of each effort on this model instead")
    parser.add_argument("--data", help="for --cost; by default CIFAR-10, or the text that comes with Python's help")
    parser.add_argument("--num-test", type=int, default=500, help="held-out inputs, for --cost")
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=list(EFFORTS), help="for --cost")
    parser.add_argument(
        "--select-on", nargs="+", choices=["outputs", "features"], default=["outputs"], help="for --cost"
    )
    parser.add_argument("--image-size", type=int, default=224, help="for --cost vit-s")
    parser.add_argument("--depth", type=int, default=12, help="for --cost vit-s")
    parser.add_argument("--refit-steps", type=int, default=300, help="for --cost")
    parser.add_argument("--device", default="auto", help="for --cost")
    parser.add_argument("--out", type=Path, help="by default in benchmarks/results, repair.json or repair-cost.json")
    arguments = parser.parse_args()
    own = "repair" if arguments.cost is None else "repair-cost"
    arguments.out = arguments.out or Path(f"benchmarks/results/{own}.json")
    if arguments.cost is not None:
        found = costs(arguments)
        write(arguments.out, {"costs": found})
        print(cost_table(found))
        return
    names = [name for name in MODELS if arguments.model in (name, "all")]
    names = [name for name in names if name == "digits" or SHARED.exists()]
    table = {row: {} for row in ROWS}
    for name in names:
        for ratio in arguments.ratios:
            for row, error in errors(name, ratio, arguments.num_images).items():
                table[row][f"{name}, ratio {ratio:g}"] = error
    print(markdown(write(arguments.out, {"table": table})))


def write(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Write what was found to a file, with the machine and the command; return all of it."""
    result = {"environment": environment(), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def errors(name: str, ratio: float, num_images: int) -> dict[str, float]:
    """Relative error of each row on one model at one MLP ratio."""
    source, train, test = MODELS[name]
    teacher, _ = open_model(source)
    teacher.requires_grad_(False)
    sites, transform = find_mlps(teacher), transform_for(teacher)
    splits = ("train", "test") if train == test else (None, None)  # CIFAR-10's are files of their own
    images = open_images(train, transform=transform, split=splits[0])
    batches, _ = first_images(images, num_images, seed=0)
    judged = list(open_images(test, transform=transform, split=splits[1], limit=2000).loader(batch_size=200))
    found = {}
    for row, (method, options, repair) in ROWS.items():
        student = copy.deepcopy(teacher)
        recipe = Recipe.parse({"method": method, "options": options, "repair": repair, "mlp_ratio": ratio})
        cut_(student, teacher, sites, recipe, batches, quiet=True)
        found[row] = fidelity(student, teacher, judged)["relative_error"]
        print(f"{name} ratio {ratio:g} {row}: {found[row]:.5f}", flush=True)
    return found


def costs(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return error, fitted and held out, and cost of each effort at each MLP ratio, on one model."""
    teacher, inputs = cost_case(arguments)
    teacher = teacher.float().eval().requires_grad_(False).to(resolve_device(arguments.device))
    rest, held = split_indices(len(inputs), num_held_out=min(arguments.num_test, len(inputs) // 2), seed=0)
    batches, _ = first_images(inputs.subset(rest), arguments.num_images, seed=0)
    judged = list(inputs.subset(held).loader(batch_size=BATCH))
    sites, found = find_mlps(teacher), {}
    for ratio, effort, select_on in product(arguments.ratios, arguments.efforts, arguments.select_on):
        student, options = copy.deepcopy(teacher), {"select_on": select_on}
        repair = EFFORTS[effort] if effort == "fast" else {"refit_steps": arguments.refit_steps}
        recipe = Recipe.parse({"method": "dgmr", "options": options, "repair": repair, "mlp_ratio": ratio})
        cut = timed(lambda: cut_(student, teacher, sites, recipe, batches, quiet=True))  # noqa: B023
        errors = {
            "held-out error": fidelity(student, teacher, judged)["relative_error"],
            "fitted error": fidelity(student, teacher, batches)["relative_error"],
        }
        runs = [timed(lambda: distil_once(student, teacher, batches)) for _ in range(2)]  # noqa: B023
        epoch = [min(each) for each in zip(*runs, strict=True)]
        row = {**errors, "seconds": cut[0], "seconds of an epoch": epoch[0], "epochs": cut[0] / epoch[0]}
        row["epochs by processor time"] = cut[1] / epoch[1]  # for a machine that others use, too; not for a GPU
        name = f"{effort}, ratio {ratio:g}, {select_on}"
        found[name] = row
        print(f"{name}: {row}", flush=True)
    return found


def cost_case(arguments: argparse.Namespace) -> tuple[nn.Module, ImageSet]:
    """Return a model and its inputs: as named, or a ViT-S/14 with random weights and smooth noise."""
    if arguments.cost != "vit-s":
        model, origin = open_encoder(arguments.cost)
        return model, cost_inputs(arguments.data, origin)
    torch.manual_seed(0)
    size = {"img_size": arguments.image_size, "depth": arguments.depth, "init_values": 1.0}
    model = timm.create_model("vit_small_patch14_dinov2", **size)
    rough = torch.randn(arguments.num_images + arguments.num_test, 3, 16, 16)
    images = nn.functional.interpolate(rough, arguments.image_size, mode="bilinear")
    return model, open_images([(image, -1) for image in images])


def cost_inputs(data: str | None, origin: Origin) -> ImageSet:
    """Open what a model takes: images, or rows of text."""
    if data is None and "num_tokens" in origin.preprocessing:
        from pydoc_data.topics import topics

        return open_set(list(topics.values()), origin, limit=None)
    return open_set(CIFAR10 / "train.parquet" if data is None else data, origin, limit=None)


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that something takes: by the clock, and of the processor."""
    started = time.monotonic(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - started[0], time.process_time() - started[1]


def distil_once(student: nn.Module, teacher: nn.Module, batches: Sequence[Tensor]) -> None:
    """Distil a copy of a student for one epoch on all inputs, without any extras: the unit of cost."""
    student = copy.deepcopy(student).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    for part in torch.cat([*batches]).split(BATCH):
        moved = inputs_for(teacher, part)
        with evaluating(teacher):
            target = features(teacher, moved)
        found = features(student, moved)
        loss = (found.pooled_BD - target.pooled_BD.clone()).square().mean()
        if found.patches_BND is not None and target.patches_BND is not None:
            loss = loss + (found.patches_BND - target.patches_BND.clone()).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def cost_table(found: dict[str, dict[str, float]]) -> str:
    """Return the table of costs."""
    columns = list(next(iter(found.values())))
    lines = ["| effort | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(f"{row[each]:.4g}" for each in columns) + " |" for name, row in found.items()]
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """The table as the documentation shows it."""
    columns = list(next(iter(result["table"].values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row, cells in result["table"].items():
        lines.append(f"| {row} | " + " | ".join(f"{cells[column]:.4f}" for column in columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
