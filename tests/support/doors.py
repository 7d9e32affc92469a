"""The doors through which a stranger's bytes come in, each as one file of a folder and what opens it, in this process.

tests/test_doors.py knocks with what hypothesis makes, fuzz.py with what atheris finds. What is written outside a
folder is watched by faults.py, in children.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from PIL import Image

import vitrim
from tests.support.faults import FULL, INPUTS, PLANNED, ROOT, Scene, use_recipe
from tests.support.processes import run_python
from vitrim.data import open_images, transform_for
from vitrim.errors import VitrimError
from vitrim.storage.tensor_files import open_tensors


def _read_tensors(folder: Path) -> None:
    for tensor in open_tensors(folder).values():
        tensor.sum()


def _read_training_file(folder: Path) -> None:
    for tensor in open_tensors(folder / "last.pth").values():
        tensor.sum()


def _training_files() -> list[bytes]:
    found, state = [], {"module.a.weight": torch.ones(2, 3), "n": 1}
    args = argparse.Namespace(lr=0.1, out=Path("runs"), best=np.float64(1))
    for nest in (state, {"model": state, "ema": {"state_dict": state}, "args": args}):
        file = io.BytesIO()
        torch.save(nest, file)
        found.append(file.getvalue())
    return found


def _read_image(folder: Path) -> None:
    open_images(folder, transform=transform_for(INPUTS))[0]


# name -> the file, and what opens its folder
DOORS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "recipe": ("recipe.yaml", lambda folder: use_recipe(folder / "recipe.yaml")),
    "plan": ("vitrim.json", vitrim.load),
    "config": ("config.json", lambda folder: vitrim.inspect(str(folder))),
    "safetensors": ("model.safetensors", _read_tensors),
    "training file": ("last.pth", _read_training_file),
    "image": ("0.png", _read_image),
}


def folder_of(name: str, scene: Scene, scratch: Path) -> Path:
    """A folder for a door's file, with what belongs beside it."""
    beside = {"plan": scene.output, "config": scene.source}
    return scene.copy(beside[name], scratch) if name in beside else scratch


def valid(name: str, scene: Scene) -> list[bytes]:
    """Files that a door opens, or nearly: of every recipe and every kind of edit."""
    if name == "recipe":
        written = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
        return [yaml.safe_dump(FULL).encode(), *written]
    if name == "plan":
        about = json.loads((scene.output / "vitrim.json").read_text())
        plans = [about, *({**about, "plan": {**about["plan"], "edits": [edit]}} for edit in PLANNED)]
        return [json.dumps(plan).encode() for plan in plans]
    if name == "safetensors":
        tensors = {"a": torch.ones(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16), "none": torch.zeros(0, 2)}
        return [safetensors.torch.save(tensors, metadata={"format": "pt"})]
    if name == "training file":
        return _training_files()
    if name == "image":
        return [*_images()]
    folder = scene.source
    return [(folder / DOORS[name][0]).read_bytes()]


def _images() -> Iterator[bytes]:
    """Images whose modes and orientations are read in different ways."""
    exif = Image.Exif()
    exif[274] = 6
    pixels = Image.frombytes("RGB", (6, 4), bytes(range(72)))
    made = {"RGB": "PNG", "I;16": "PNG", "P": "PNG", "LA": "PNG", "CMYK": "JPEG", "F": "TIFF", "I;16B": "TIFF"}
    for mode, kind in made.items():
        image = Image.frombytes(mode, (6, 4), bytes(48)) if mode.startswith("I;16") else pixels.convert(mode)
        written = io.BytesIO()
        image.save(written, kind, exif=exif)
        yield written.getvalue()


def knock(name: str, folder: Path, data: bytes) -> str | None:
    """Give a door these bytes: None if it opens, its one line if not. All else is raised."""
    file, open_ = DOORS[name]
    (folder / file).write_bytes(data)
    try:
        open_(folder)
    except VitrimError as error:
        assert str(error).isprintable(), f"not one line of text: {error!r}"
        return str(error)
    return None


def search(name: str, scene: Scene, *, runs: int) -> tuple[int, list[str]]:
    """Look for bytes that break a door, led by coverage: how many were tried, and what was found, which ends it."""
    with tempfile.TemporaryDirectory() as scratch:
        options = [f"-runs={runs}", "-seed=1", "-timeout=60", "-rss_limit_mb=4096", f"-artifact_prefix={scratch}/"]
        done = run_python("-m", "tests.support.fuzz", name, scene.root, "-print_final_stats=1", *options)
        found = "\n".join(f"{path.name}: {path.read_bytes()!r}" for path in sorted(Path(scratch).iterdir()))
    tried = [int(number) for number in re.findall(r"(?:^#|executed_units: )(\d+)", done.stderr, re.MULTILINE)]
    said = f"{name}, exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-1000:]}\n{found}"
    return max(tried, default=0), [said] if done.returncode or not tried else []
