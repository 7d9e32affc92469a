"""Prunes checkpoints of giants file to file: peak memory, time, and whether a killed run ends in the same bytes.

No model is ever in memory, here either: the checkpoint is written tensor by tensor, seeded random bf16 in shards with
an index and timm's config, and pruned by `vitrim prune-checkpoint` in a process of its own, whose peak resident memory
the system counts. Then a second run is killed with SIGKILL in the middle of selection, gone on with, killed in the
middle of writing, and gone on with again. Beside the time stands that of a plain copy of the checkpoint, and of the
published selection loop, of which a few picks are timed and scaled. Gaussian weights are the slowest to select from.

    python benchmarks/streaming.py                               # all: about 50 minutes on two cores, 35 GB of disk
    python benchmarks/streaming.py --model EVA-CLIP-E --depth 2  # a small one
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from giants import MEASURE
from selection import naive
from timm.models._hub import save_config_for_hf

from vitrim.cost.memory import parse_bytes
from vitrim.models.origin import on_meta
from vitrim.output.provenance import environment
from vitrim.storage.documents import write_json
from vitrim.storage.tensor_files import CHUNK_BYTES, open_tensors, tensor_bytes
from vitrim.storage.tensor_writer import TensorWriter

SHARD_BYTES = 2 * 10**9
NUM_PICKS = 12  # of the published loop, timed
POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A timm architecture, the depth at which it is run here of its full one, and the rows that are selected from."""

    architecture: str
    depth: int
    full_depth: int
    rows: tuple[str, ...]


CHECKPOINTS = {
    "EVA-CLIP-E": Checkpoint(
        architecture="eva02_enormous_patch14_clip_224", depth=64, full_depth=64, rows=("fc1.weight",)
    ),
    "DINOv3-7B": Checkpoint(
        architecture="vit_7b_patch16_dinov3", depth=4, full_depth=40, rows=("fc1_g.weight", "fc1_x.weight")
    ),
    "DINOv2-g": Checkpoint(architecture="vit_giant_patch14_dinov2", depth=4, full_depth=40, rows=("fc1.weight",)),
}
# Selection and repair on images, in a process of its own; the images are noise, since only memory is looked at.
CALIBRATE = """
import json, logging, sys, torch, vitrim

logging.getLogger("vitrim").addHandler(logging.StreamHandler())
logging.getLogger("vitrim").setLevel("INFO")
source, out, budget, num_images, batch_size, size = sys.argv[1:]
generator = torch.Generator().manual_seed(0)
images = list(torch.randn(int(num_images), 3, int(size), int(size), generator=generator))
calibrate = {"batch_size": int(batch_size), "num_images": int(num_images)}
recipe = vitrim.Recipe(mlp_ratio=1, repair={"refit": False}, calibrate=calibrate)
vitrim.prune_checkpoint(source, out, recipe=recipe, data=images, memory_budget=budget or None)
"""


def main() -> None:
    """Run the checkpoints that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=CHECKPOINTS, default=[*CHECKPOINTS])
    parser.add_argument("--depth", type=int, help="blocks, instead of each model's own number")
    parser.add_argument("--kill-depth", type=int, default=64, help="the most blocks of the run that is killed")
    parser.add_argument(
        "--calibrate", nargs="+", choices=CHECKPOINTS, default=["EVA-CLIP-E", "DINOv2-g"], help="run on images too"
    )
    parser.add_argument("--calibrate-depth", type=int, default=2)
    parser.add_argument("--num-images", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the files where they are")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has already")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/streaming.json"))
    arguments = parser.parse_args()
    result: dict[str, Any] = {"rows": [], "calibration": []}
    if arguments.resume and arguments.out.exists():
        result = json.loads(arguments.out.read_text())
    result["environment"] = environment() | {"seed": arguments.seed, "threads": torch.get_num_threads()}
    done = {part: {row["model"] for row in result[part]} for part in ("rows", "calibration")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="vitrim-streaming-"))
    try:
        for name in arguments.model:
            if name not in done["rows"]:
                result["rows"].append(one(name, folder / name, arguments))
                write_json(arguments.out, result)
        for name in arguments.calibrate if arguments.calibrate_depth else []:
            if name not in done["calibration"]:
                result["calibration"] += calibration(name, folder / name, arguments)
                write_json(arguments.out, result)
    finally:
        if not arguments.keep:
            remove(folder)
    print(markdown(result), calibration_table(result), sep="\n\n")


def one(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one checkpoint."""
    known, seed = CHECKPOINTS[name], arguments.seed
    depth = arguments.depth or known.depth
    source = folder / "source"
    row: dict[str, Any] = {"model": name, "depth": depth, "full_depth": known.full_depth, "load": os.getloadavg()[0]}
    row["write_source_s"] = timed(lambda: write_checkpoint(source, known.architecture, depth, seed))
    row["naive_s"] = naive_seconds(source, known, depth)
    row["copy_s"] = timed(lambda: copy(source, folder / "copy"))
    remove(folder / "copy")
    inspected = run_measured(vitrim("inspect", source, "--mlp-ratio", "1", "--json"))
    row["inspect"] = {key: inspected[key] for key in ("seconds", "peak_bytes")}
    row["estimate_run"] = json.loads(inspected["output"])["checkpoint"]
    done = run_measured(vitrim("prune-checkpoint", source, folder / "whole", "--mlp-ratio", "1", "--json"))
    printed = json.loads(done["output"])
    for key, field in (("parameters", "parameters"), ("bytes", "num_bytes")):
        row[key] = [printed[when][field] for when in ("before", "after")]
    row |= {key: printed[key] for key in ("stock", "loads_with")}
    row |= {"seconds": done["seconds"], "peak_bytes": done["peak_bytes"], "sha256": hashes(folder / "whole")}
    if depth > arguments.kill_depth:
        for part in ("source", "whole"):
            remove(folder / part)
        write_checkpoint(source, known.architecture, arguments.kill_depth, seed)
        run_measured(vitrim("prune-checkpoint", source, folder / "whole", "--mlp-ratio", "1", "--quiet"))
    row["killed"] = {"depth": min(depth, arguments.kill_depth), **killed_and_resumed(source, folder)}
    if not arguments.keep:
        remove(folder)
    return row


def write_checkpoint(folder: Path, architecture: str, depth: int, seed: int) -> None:
    """A checkpoint in timm's layout, in shards, without the model: each tensor is drawn by itself and written."""
    folder.mkdir(parents=True)
    args = {"depth": depth, "num_classes": 0}
    model = on_meta(lambda: timm.create_model(architecture, **args))
    tensors = [(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    writer = TensorWriter(
        folder, tensors, stem="model", shard_bytes=SHARD_BYTES, journal=folder.parent / "journal", resume=False
    )
    for name, dtype, shape in tensors:
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        values = 0.02 * torch.randn(shape, generator=generator) + float("norm" in name and name.endswith("weight"))
        writer.write(name, [tensor_bytes(values.to(dtype))])
    writer.close()
    save_config_for_hf(model, str(folder / "config.json"), model_args=args)


def naive_seconds(source: Path, known: Checkpoint, depth: int) -> float:
    """What the published loop would take for all blocks: a few picks of the first, scaled."""
    files = open_tensors(source)
    rows_HD = torch.cat([files[f"blocks.0.mlp.{name}"].float() for name in known.rows], dim=1)
    if known.architecture == "vit_giant_patch14_dinov2":  # gate and value in one matrix
        rows_HD = torch.cat(rows_HD.chunk(2), dim=1)
    num_keep = files["blocks.0.norm1.weight"].shape[0]
    return timed(lambda: naive(rows_HD, NUM_PICKS)) * num_keep / NUM_PICKS * depth


def killed_and_resumed(source: Path, folder: Path) -> dict[str, Any]:
    """Kill a run twice, half-way through each stage, and compare what it ends in with the run that was left alone."""
    out, work = folder / "killed", folder / ".killed.partial"
    num_sites = sum(name.endswith(".norm2.weight") for name in open_tensors(source))
    output = sum(path.stat().st_size for path in (folder / "whole").glob("*.safetensors"))
    command = vitrim("prune-checkpoint", source, out, "--mlp-ratio", "1", "--quiet")
    stages = {
        "picked": lambda: max(0, lines(work / "picks.jsonl") - 1) / num_sites,
        "written": lambda: sum(path.stat().st_blocks * 512 for path in (work / "weights").glob("*")) / output,
    }
    row: dict[str, Any] = {}
    for stage, share in stages.items():
        run = subprocess.Popen([*command, *(["--resume"] if row else [])], stdout=subprocess.DEVNULL)
        while run.poll() is None and share() < 0.5:
            time.sleep(POLL_S)
        assert run.poll() is None, f"the run ended before it could be killed: {run.returncode}"
        run.send_signal(signal.SIGKILL)
        run.wait()
        row[stage] = share()
    row["resumed_s"] = timed(lambda: subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL))
    return {**row, "equal": hashes(out) == hashes(folder / "whole"), "left": [p.name for p in folder.glob(".*")]}


def calibration(name: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Memory of selection and repair on images, beside what was said that it needs: in memory, and the least."""
    known, found = CHECKPOINTS[name], []
    source, num_images, batch_size = folder / "source", arguments.num_images, max(1, arguments.num_images // 2)
    write_checkpoint(source, known.architecture, arguments.calibrate_depth, arguments.seed)
    size = str(timm.get_pretrained_cfg(known.architecture).input_size[-1])
    # With a budget of one byte nothing is run: the refusal says what would be enough.
    words = [sys.executable, "-c", CALIBRATE, str(source)]
    more = [str(num_images), str(batch_size), size]
    refused = subprocess.run([*words, str(folder / "none"), "1", *more], capture_output=True, text=True, check=False)
    least = refused.stderr.partition("calibration needs ")[2].partition(";")[0]
    for budget in ("", least.replace(" ", "")):
        started = time.perf_counter()
        done = run_measured([*words, str(folder / f"out{len(found)}"), budget, *more], stderr=True)
        said = done["errors"].strip().split("\n")[0].partition(": ")[2]
        in_memory = said.partition("on top ")[2].partition(",")[0]
        found.append(
            {
                "model": name,
                "depth": arguments.calibrate_depth,
                "images": num_images,
                "batch_size": batch_size,
                "budget": budget or None,
                "said": said,
                "said_bytes": parse_bytes(budget or in_memory),
                "peak_bytes": done["peak_bytes"],
                "seconds": time.perf_counter() - started,
            }
        )
    same = [hashes(folder / f"out{index}") for index in range(2)]
    found[-1]["equal_to_in_memory"] = same[0] == same[1]
    if not arguments.keep:
        remove(folder)
    return found


def vitrim(*words: Any) -> list[str]:
    """A command line."""
    return [sys.executable, "-c", "from vitrim.cli import main; main()", *map(str, words)]


def run_measured(command: list[str], *, stderr: bool = False) -> dict[str, Any]:
    """Run a command through a small process, which counts its peak of resident memory."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if stderr else None,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[-6:])}: {done.stderr}")
    found = json.loads(done.stdout)
    return {**found, "peak_bytes": round(found["peak_mib"] * 2**20), "errors": done.stderr}


def copy(source: Path, target: Path) -> None:
    """Copy every file, down to the disk."""
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as backend, (target / path.name).open("wb") as writer:
            while chunk := backend.read(CHUNK_BYTES):
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights."""
    found = {}
    for path in sorted(folder.glob("*.safetensors*")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def lines(path: Path) -> int:
    """Lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def timed(run: Any) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def remove(path: Path) -> None:
    """Delete a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def markdown(result: dict[str, Any]) -> str:
    """The tables as the documentation shows them."""
    head = (
        "model",
        "blocks",
        "parameters",
        "files",
        "peak memory (said)",
        "time (said)",
        "plain copy",
        "published loop",
        "killed twice, same bytes",
    )
    rows = []
    for row in result["rows"]:
        (before, after), said = row["parameters"], row["estimate_run"]
        killed = f"{'yes' if row['killed']['equal'] else 'NO'}, at {row['killed']['depth']} blocks"
        rows.append(
            (
                row["model"],
                f"{row['depth']} of {row['full_depth']}",
                f"{before / 1e9:.3f}B -> {after / 1e9:.3f}B ({after / before - 1:+.1%})",
                f"{row['bytes'][0] / 1e9:.2f} -> {row['bytes'][1] / 1e9:.2f} GB",
                f"{row['peak_bytes'] / 1e9:.2f} ({said['memory'] / 1e9:.2f}) GB",
                f"{row['seconds']:.0f} ({said['seconds']:.0f}) s",
                f"{row['copy_s']:.0f} s",
                f"{row['naive_s'] / 60:.0f} min",
                killed,
            )
        )
    return table(head, rows)


def calibration_table(result: dict[str, Any]) -> str:
    """Selection and repair on images, as the documentation shows them."""
    program = {row["model"]: row["estimate_run"]["program"] for row in result["rows"]}
    head_of_images = ("model", "blocks", "images", "way", "peak memory (said)", "time", "same bytes as in memory")
    calibrated = [
        (
            row["model"],
            str(row["depth"]),
            str(row["images"]),
            f"--memory-budget {row['budget']}" if row["budget"] else "in memory",
            f"{row['peak_bytes'] / 1e9:.2f} ({(row['said_bytes'] + program[row['model']]) / 1e9:.2f}) GB",
            f"{row['seconds']:.0f} s",
            {None: "", True: "yes", False: "no: moments in float32"}[row.get("equal_to_in_memory")],
        )
        for row in result["calibration"]
    ]
    return table(head_of_images, calibrated)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    main()
