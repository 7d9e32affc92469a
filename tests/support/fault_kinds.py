"""More doors of faults.py: images of every mode, folders as people have them, and files that training left."""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.faults import INPUTS, NAMES, ODD, Scene, door, scrambled
from vitrim.cli.app import run
from vitrim.data import open_images, transform_for
from vitrim.output.verify import checking_with

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F")
FOLDERS = (
    "cat",
    "dog",
    "train",
    "val",
    "test",
    ".hidden",
    "__MACOSX",
    "annotations",
    "train/cat",
    "val/cat",
    "é\u202e",
)
WRAPPERS = ("state_dict", "model", "model_state", "teacher", "student", "state_dict_ema", "model_ema", "module")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.", "module._orig_mod.", "model.")


def _mode(scene: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    """An image of any mode, with any orientation, in a format that has it; sometimes scrambled."""
    mode, kinds = rng.choice(MODES), {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    if mode in kinds:
        kind = kinds[mode]
        image = Image.fromarray(np.frombuffer(rng.randbytes(24 * 20 * kind().nbytes), kind).reshape(24, 20))
    else:
        image = Image.frombytes("RGB", (24, 20), rng.randbytes(1440)).convert("RGB" if mode == "YCbCr" else mode)
    exif = Image.Exif()
    exif[0x0112] = rng.choice((*range(10), 65535))
    path = folder / ("a.tif" if mode in ("F", "CMYK", "I") else "a.png")
    image.save(path, exif=exif)
    if rng.random() < 0.3:
        path.write_bytes(scrambled(rng, path.read_bytes()))
    shutil.copy(scene.root / "images" / "0.png", folder / "b.png")
    return lambda: door(lambda: _read(folder, None))


def _tree(scene: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    """A folder of folders: classes, splits, hidden ones, empty ones, links, and files that are no images."""
    for name in rng.sample(FOLDERS, rng.randrange(1, 6)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(rng.randrange(3)):
            shutil.copy(scene.root / "images" / "0.png", folder / name / rng.choice((f"{index}.png", f".{index}.png")))
        if rng.random() < 0.2:
            (folder / name / "notes.txt").write_text("no image")
    if rng.random() < 0.3:
        (folder / "link").symlink_to(rng.choice((folder, folder / "cat", folder / "nowhere")))
    split = rng.choice((None, None, "train", "val", "test", "../..", ""))
    return lambda: door(lambda: _read(folder, split))


def _training(scene: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    """A file as a training script saves it: nested, prefixed, with arguments and other things; sometimes scrambled."""
    copy = scene.copy(scene.source, folder)
    tensors: dict[Any, Any] = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    for _ in range(rng.randrange(3)):
        prefix = rng.choice(PREFIXES)
        tensors = {f"{prefix}{name}": value for name, value in tensors.items()}
    if rng.random() < 0.3:
        name = rng.choice(list(tensors))
        tensors[name] = rng.choice((torch.zeros(3), None, 1.5, tensors[name].to(torch.complex64), {}))
    saved: Any = tensors
    for _ in range(rng.randrange(3)):
        saved = {rng.choice(WRAPPERS): saved, "epoch": rng.choice(ODD), "optimizer": {"state": {0: torch.zeros(2)}}}
        if rng.random() < 0.5:
            saved["args"] = argparse.Namespace(model=rng.choice(NAMES), lr=0.1)
        if rng.random() < 0.3:
            saved[rng.choice(WRAPPERS)] = rng.choice(ODD)
    path = copy / rng.choice(("pytorch_model.bin", "model.pth"))
    torch.save(saved, path)
    if rng.random() < 0.3:
        path.write_bytes(scrambled(rng, path.read_bytes()))

    def work() -> int:
        with checking_with(lambda _: 0.0):
            return run(["prune-checkpoint", str(copy), str(folder / "out"), "--quiet"])

    return work


def _read(folder: Path, split: str | None) -> None:
    """Every image and label of a folder."""
    given = {} if split is None else {"split": split}
    for _ in open_images(folder, transform=transform_for(INPUTS), **given).loader(batch_size=2):
        pass


MORE: dict[str, Callable[[Scene, random.Random, Path], Callable[[], int]]] = {
    "image of any mode": _mode,
    "folder of images": _tree,
    "training checkpoint": _training,
}
