"""Times distillation against a plain loop, block by block against end to end, and one process against several.

The plain loop is written here after the paper's recipe: teacher and student forward at every step, no cache, float32,
gradients for the student alone; same images, augmentation, order, rates and steps as vitrim's. Epochs of the ways are
taken in turns, so that a busy machine slows all of them. Needs ../shared (CIFAR-10 and the ViT trained on it). Prints
tables and writes JSON with machine, versions, seed and command.

    python benchmarks/distillation.py            # about 15 minutes on 2 cores
    python benchmarks/distillation.py --quick    # a minute, to see that it runs
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrim.compression.cut import cut_
from vitrim.config.options import BlockwiseOptions, CacheOptions, CalibrateOptions, RecoverOptions, RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.data import augment_for, first_images, open_images, split_indices, transform_for
from vitrim.metrics.fidelity import fidelity
from vitrim.models.features import features
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment
from vitrim.recover.distill import recover_
from vitrim.recover.files import RECOVERY_LOG
from vitrim.recover.losses import feature_loss
from vitrim.recover.run import Run
from vitrim.recover.sampler import open_sampler
from vitrim.recover.schedule import rate_shape
from vitrim.repair.blockwise import recover_blocks_
from vitrim.storage.tensor_writer import read_journal
from vitrim.surgery import KeepUnits, apply_

SHARED = Path(__file__).resolve().parents[2] / "shared"
PLAIN = "plain loop, float32"
# What vitrim's loop is run with; each is compared with the plain loop.
WAYS: dict[str, dict[str, Any]] = {
    "vitrim, float32": {"precision": "fp32"},
    "vitrim, bf16": {"precision": "bf16"},
    "vitrim, float32, cached teacher": {"precision": "fp32", "cache_teacher": CacheOptions()},
    "vitrim, bf16, cached teacher": {"precision": "bf16", "cache_teacher": CacheOptions()},
    "vitrim, bf16, cached teacher, 1 worker": {"precision": "bf16", "cache_teacher": CacheOptions(), "num_workers": 1},
}
BLOCKWISE: dict[str, dict[str, Any]] = {
    "MLPs, student's inputs": {},
    "whole blocks, student's inputs": {"train": "block"},
    "MLPs, teacher's inputs": {"inputs": "teacher"},
}
# Of distillation end to end, which gets the better of them.
RATES = (1e-4, 3e-4)
NUM_CURVE_STEPS = 50


def main() -> None:
    """Run all parts, or the one curve that torchrun was started for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=2048, help="of an epoch; a multiple of the batch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=96, help="hidden units that stay of 768")
    parser.add_argument("--blockwise-steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distillation.json"))
    parser.add_argument("--curve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fsdp", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.num_images, arguments.epochs, arguments.batch_size, arguments.blockwise_steps = 128, 2, 32, 5
    bench = Bench(arguments)
    if arguments.curve is not None:
        bench.curve(arguments.curve, fsdp=arguments.fsdp)
        return
    result: dict[str, Any] = {
        "environment": environment(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "command": " ".join(sys.argv),
        "start": bench.error(bench.student),
    }
    for part, table in (
        (bench.speed, speed_table),
        (bench.blockwise, blockwise_table),
        (bench.processes, processes_table),
    ):
        result[part.__name__] = part()
        print(f"\n{table(result)}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


class Bench:
    """The model, its cut copy, and the images that all parts share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.seed = arguments, arguments.seed
        self.teacher, _ = open_model(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
        self.teacher.requires_grad_(False)
        self.sites = find_mlps(self.teacher)
        num_held_out = 128 if arguments.quick else 512
        data = SHARED / "data" / "cifar10" / "train.parquet"
        images = open_images(data, transform=transform_for(self.teacher), limit=arguments.num_images + num_held_out)
        rest, held = split_indices(len(images), num_held_out=num_held_out, seed=self.seed)
        self.images = images.subset(rest)
        self.train = self.images.augmented(augment_for(self.teacher, "light", flip=True), self.seed)
        self.held_out = [batch.images_BCHW for batch in images.subset(held).loader(batch_size=128)]
        self.student = self.teacher if arguments.curve else self.cut(feedback=1.0)

    def cut(self, feedback: float) -> nn.Module:
        """The student that every run starts from: cut and repaired, not trained."""
        student = copy.deepcopy(self.teacher).requires_grad_(True)
        repair = RepairOptions(feedback=feedback, refit_steps=20 if self.arguments.quick else 300)
        calibrate = CalibrateOptions(num_images=min(1000, self.arguments.num_images))
        recipe = Recipe(hidden_dim=self.arguments.width, seed=self.seed, repair=repair, calibrate=calibrate)
        batches, _ = first_images(self.images, calibrate.num_images, seed=self.seed)
        cut_(student, self.teacher, self.sites, recipe, batches, quiet=True)
        return student

    def error(self, student: nn.Module) -> float:
        """Relative error of all features on the held-out images."""
        return fidelity(student, self.teacher, self.held_out)["relative_error"]

    def options(self, **given: Any) -> RecoverOptions:
        """Options of the timed runs: validation at the end of each epoch, no range test."""
        arguments = self.arguments
        length = {} if "steps" in given else {"epochs": arguments.epochs}
        known = {"batch_size": arguments.batch_size, "lr": arguments.lr, "num_validations": arguments.epochs}
        return RecoverOptions(**{**known, **length, **given})

    def speed(self) -> list[dict[str, Any]]:
        """Seconds an epoch of every way, the ways in turns, and how close each ends."""
        with tempfile.TemporaryDirectory() as folder:
            runs = {PLAIN: self.plain()} | {
                name: self.ours(values, Path(folder) / str(index)) for index, (name, values) in enumerate(WAYS.items())
            }
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            errors: dict[str, float] = {}
            for name in [name for _ in range(self.arguments.epochs) for name in runs]:
                spent, errors[name] = next(runs[name])
                seconds[name].append(round(spent, 2))
        first, later = seconds[PLAIN][0], mean(seconds[PLAIN][1:])
        return [
            {
                "way": name,
                "epochs_s": spent,
                "first_ratio": round(first / spent[0], 2),
                "later_ratio": round(later / mean(spent[1:]), 2),
                "error": errors[name],
            }
            for name, spent in seconds.items()
        ]

    def plain(self) -> Iterator[tuple[float, float]]:
        """The plain loop: seconds of each epoch, and the error behind it."""
        options, student = self.options(), copy.deepcopy(self.student)
        order = open_sampler(self.train, options, self.seed)
        steps_per_epoch = self.arguments.num_images // options.batch_size
        num_steps = steps_per_epoch * self.arguments.epochs
        trained = [p for name, p in student.named_parameters() if not name.startswith("head.")]
        optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        started = time.perf_counter()
        for step, batches in enumerate(order.steps(0, num_steps)):
            for group in optimizer.param_groups:
                group["lr"] = self.arguments.lr * rate_shape(step, num_steps, options.warmup_ratio)
            images = batches[0].images_BCHW
            with torch.no_grad():
                target = features(self.teacher, images)
            feature_loss(features(student, images), target).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % steps_per_epoch == 0:
                error = self.error(student)  # inside the time, as vitrim's own validation is
                yield time.perf_counter() - started, error
                started = time.perf_counter()

    def ours(self, values: dict[str, Any], folder: Path) -> Iterator[tuple[float, float]]:
        """The loop of vitrim: seconds of each epoch, and the error behind it."""
        options, student = self.options(**values), copy.deepcopy(self.student)
        run = self.run_of(student, options, work=folder)
        steps_per_epoch = run.num_steps // self.arguments.epochs
        with run.trainable():
            run.result.lr = self.arguments.lr
            for _ in range(self.arguments.epochs):
                started = time.perf_counter()
                for batches in run.batches(run.step, run.step + steps_per_epoch):
                    loss = run.train_step(batches)
                error = run.validate(loss).held_out_error
                yield time.perf_counter() - started, error

    def blockwise(self) -> list[dict[str, Any]]:
        """Block by block, and end to end in as many seconds."""
        rows = []
        alone = self.cut(feedback=0.0)
        for name, values in BLOCKWISE.items():
            start = alone if values.get("inputs") == "teacher" else self.student
            student = copy.deepcopy(start)
            steps, batch_size = self.arguments.blockwise_steps, min(64, self.arguments.batch_size)
            known = {"num_images": self.arguments.num_images, "steps": steps, "batch_size": batch_size}
            options = BlockwiseOptions(**known, **values)
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                found = recover_blocks_(
                    student,
                    self.teacher,
                    self.sites,
                    self.images,
                    held_out=self.held_out,
                    options=options,
                    context=RunContext(work=Path(folder), quiet=True, seed=self.seed),
                )
            spent = time.perf_counter() - started
            rows.append(
                {"way": name, "seconds": round(spent, 1), "start": self.error(start), "error": self.error(student)}
            )
            rows[-1]["notes"] = "; ".join(found.notes)
            rows += [self.end_to_end(start, rate, spent) for rate in RATES]
        return rows

    def end_to_end(self, start: nn.Module, rate: float, budget_s: float) -> dict[str, Any]:
        """Distillation of the whole for about so many seconds, with a schedule that ends there."""
        steps = max(1, round(budget_s / self.pace(start)))
        return {"way": f"end to end, rate {rate:g}", **self.distil(start, rate, steps)}

    def pace(self, start: nn.Module) -> float:
        """Seconds that a step takes: the middle one of five."""
        options, seconds = self.options(steps=5, precision="fp32"), []
        run = self.run_of(copy.deepcopy(start), options)
        with run.trainable():
            started = time.perf_counter()
            for batches in run.batches(0):
                run.train_step(batches)
                seconds.append(time.perf_counter() - started)
                started = time.perf_counter()
        return sorted(seconds)[2]

    def run_of(self, student: nn.Module, options: RecoverOptions, work: Path | None = None) -> Run:
        """A run of vitrim's loop, before its first step."""
        context = RunContext(work=work, quiet=True, seed=self.seed)
        given = {"images": self.train, "held_out": self.held_out, "options": options, "context": context}
        return Run(student, self.teacher, **given)

    def distil(self, start: nn.Module, rate: float, steps: int) -> dict[str, Any]:
        """Some steps of vitrim's loop, in float32 as block by block runs; validated at the end alone."""
        student = copy.deepcopy(start)
        options = self.options(steps=steps, lr=rate, precision="fp32", num_validations=1)
        started = time.perf_counter()
        given = {"held_out": self.held_out, "options": options, "context": RunContext(quiet=True, seed=self.seed)}
        recover_(student, self.teacher, self.train, **given)
        spent = round(time.perf_counter() - started, 2)
        return {"seconds": spent, "steps": steps, "start": self.error(start), "error": self.error(student)}

    def processes(self) -> list[dict[str, Any]]:
        """Losses of the first steps with one process, two, and two that share shards of both models."""
        curves = {}
        with tempfile.TemporaryDirectory() as folder:
            for index, (name, count, more) in enumerate(
                (("1 process", 1, []), ("2 processes", 2, []), ("2 processes, shards", 2, ["--fsdp"]))
            ):
                curve = Path(folder) / f"{index}"
                start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
                given = ["--quick"] if self.arguments.quick else []
                numbers = ["--num-images", str(self.arguments.num_images), "--width", str(self.arguments.width)]
                command = [sys.executable, *start, __file__, *given, *numbers, "--curve", str(curve), *more]
                started = time.perf_counter()
                subprocess.run(command, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
                curves[name] = (
                    [line["loss"] for line in read_journal(curve / RECOVERY_LOG)],
                    time.perf_counter() - started,
                )
        one = curves["1 process"][0]
        return [
            {
                "way": name,
                "steps": len(losses),
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "largest_difference": max(abs(a - b) / b for a, b in zip(losses, one, strict=True)),
                "seconds": round(spent, 1),
            }
            for name, (losses, spent) in curves.items()
        ]

    def curve(self, work: Path, *, fsdp: bool) -> None:
        """Log the losses of one run among the processes that torchrun started, in a work folder."""
        steps = 5 if self.arguments.quick else NUM_CURVE_STEPS
        options = self.options(steps=steps, precision="fp32", num_validations=1, fsdp=fsdp)
        student = copy.deepcopy(self.teacher).requires_grad_(True)
        kept = {site.path: tuple(range(self.arguments.width)) for site in self.sites}
        apply_(student, [KeepUnits(site=site, keep=kept[site.path]) for site in self.sites])
        recover_(
            student,
            self.teacher,
            self.train,
            held_out=self.held_out,
            options=options,
            context=RunContext(work=work, quiet=True, seed=self.seed),
        )


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def speed_table(result: dict[str, Any]) -> str:
    """How much faster than the plain loop an epoch is, and where each way ends."""
    return _table(
        ("loop", "first epoch", "later epochs", "relative error at the end"),
        [
            (row["way"], f"{row['first_ratio']:.2f}x", f"{row['later_ratio']:.2f}x", f"{row['error']:.4f}")
            for row in result["speed"]
        ],
    )


def blockwise_table(result: dict[str, Any]) -> str:
    """Block by block, and under each row end to end for about as long."""
    return _table(
        ("what is trained", "seconds", "relative error before", "after"),
        [
            (row["way"], f"{row['seconds']:.0f}", f"{row['start']:.4f}", f"{row['error']:.4f}")
            for row in result["blockwise"]
        ],
    )


def processes_table(result: dict[str, Any]) -> str:
    """Losses of the same run among several processes."""
    return _table(
        ("run", "steps", "first loss", "last loss", "largest relative difference of a loss"),
        [
            (
                row["way"],
                str(row["steps"]),
                f"{row['first_loss']:.4f}",
                f"{row['last_loss']:.4f}",
                f"{row['largest_difference']:.1e}",
            )
            for row in result["processes"]
        ],
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    main()
