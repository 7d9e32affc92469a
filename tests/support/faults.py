"""Hostile files made from a seed, and a process of its own to open each in, so that a crash or a hang is one case lost.

tests/test_faults.py tries a few of every kind and benchmarks/faults.py many. It may work, or end in a VitrimError of
one line. Not in a traceback, a hang, a dead process, or a file outside the folder it was given.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import vitrim
from tests.support.checkpoints import SOURCES, snapshot
from tests.support.processes import ROOT
from vitrim.cli.app import run
from vitrim.config.recipe import Recipe
from vitrim.config.steps import Step
from vitrim.data import open_images
from vitrim.errors import VitrimError
from vitrim.output.verify import checking_with
from vitrim.types import MlpSite

INPUTS = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
SECONDS, MEMORY = 60, 2 * 2**30  # what a case may take, on top of the libraries
PATHS = ("../../escaped", "/etc/hostname", "a/../../b", "~", ".", "", "a\0b", "x" * 5000, "hf-hub:a/b", "local-dir:..")
ODD = (None, True, False, 0, -1, 1, 2, 0.5, 10**12, -(10**12), 10**30, float("nan"), float("inf"), [], {}, [[]])
NAMES = ("__class__", "forward", "weight", "blocks", "blocks.0", "keep_units", "Trainer", "timm", "plain", "é\u202e")

SITE = MlpSite(path="m", kind="plain", d_model=32, d_hidden=128, value="m.fc1", output="m.fc2")
ELASTIC = Recipe.parse(
    {
        "calibrate": {"num_images": 12, "batch_size": 8},
        "repair": {"refit": False},
        "recover": {"steps": 2, "batch_size": 4, "lr": 1e-5, "num_validations": 1, "elastic": [0.5, 1]},
    }
)
FULL = {
    **Recipe().model_dump(mode="json"),
    "steps": [
        {**Step(mlp_ratio=1).model_dump(mode="json"), "allocate": {"cost": "macs"}, "repair": {"ridge": 1e-3}},
        {"method": "low-rank", "options": {"rank": 0.5}},
    ],
    "recover": {"steps": 3, "adapter": {"kind": "lora", "rank": 4}, "cache_teacher": {"views": 2}},
}
MLP = {"path": "blocks.0.mlp", "value": "blocks.0.mlp.fc1", "output": "blocks.0.mlp.fc2", "block": "blocks.0"}
MLP |= {"kind": "plain", "d_model": 32, "d_hidden": 128, "has_bias": True}
HEADS = [list(range(8))] * 2
ATTENTION = {"path": "blocks.0.attn", "output": "blocks.0.attn.proj", "fused": True, "d_model": 32, "num_heads": 2}
ATTENTION |= dict.fromkeys(("query", "key", "value"), "blocks.0.attn.qkv")
ATTENTION |= {"head_dim": 16, "scale": 0.25, "as_tuple": False}
LAYER = {"path": "blocks.1.mlp.fc1", "kind": "linear", "num_in": 32, "num_out": 128}
LOOP = {"paths": ["blocks.0", "blocks.1"], "layers": ["mlp.fc1"], "sizes": [[32, 128]], "ranks": [[2], [0]]}
PLANNED = (
    {"edit": "recursive", **LOOP},
    {"edit": "keep_units", "site": MLP, "keep": [5, 3, 1]},
    {"edit": "low_rank", "layer": LAYER, "rank": 4},
    {"edit": "moefication", "site": MLP, "order": list(range(128)), "num_experts": 4, "num_active": 2},
    {"edit": "top_k", "site": MLP, "num_active": 5},
    {"edit": "replace_activation", "site": MLP},
    {"edit": "keep_head_dims", "site": ATTENTION, "keep_qk": HEADS, "keep_v": HEADS},
    {
        "edit": "fips",
        "paths": ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"],
        "roles": ["input", "input"],
        "columns": [128, 128],
        "counts": [64, 64],
        "d_model": 32,
        "rank": 8,
    },
)
LEADERBOARD = {
    "format": "vitrim-leaderboard/1",
    "asked": {"data": "digits"},
    "rows": [{"method": "random"}],
    "original": {},
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a child ended: its exit code (None: stopped for lateness; -9: killed), and its words on standard error."""

    code: int | None
    said: str

    @property
    def survived(self) -> bool:
        """Done, or refused in one line."""
        refused = self.said.startswith("vitrim: ") and self.said.count("\n") == 1
        return self.code == 0 or (self.code == 2 and refused)


def in_child(work: Callable[[], int], *, seconds: float = SECONDS, memory: int | None = None) -> Outcome:
    """Run something in a forked process, with a time and, on top of what it has, a memory that it may take."""
    with tempfile.TemporaryFile("w+") as said, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; the child starts none
        child = os.fork()
        if child == 0:
            _be_child(work, said, memory)
        deadline, found = time.monotonic() + seconds, (0, 0)
        while found[0] == 0 and time.monotonic() < deadline:
            found = os.waitpid(child, os.WNOHANG)
            time.sleep(0.002)
        if found[0] == 0:
            os.kill(child, 9)
            os.waitpid(child, 0)
        said.seek(0)
        return Outcome(code=os.waitstatus_to_exitcode(found[1]) if found[0] else None, said=said.read())


def _be_child(work: Callable[[], int], said: Any, memory: int | None) -> None:
    """What the forked process does, until its end."""
    code = 70
    try:
        os.dup2(said.fileno(), 2)
        sys.stderr, sys.stdout = said, Path(os.devnull).open("w")
        torch.set_num_threads(1)  # others did not survive the fork
        if memory is not None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        said.flush()
        os._exit(code)


def door(open_it: Callable[[], Any]) -> int:
    """Open something through Python as the command line would: 0, or one line and 2."""
    try:
        open_it()
    except VitrimError as error:
        print(f"vitrim: {error}", file=sys.stderr)
        return 2
    return 0


def mutated(rng: random.Random, data: Any) -> Any:
    """A JSON document with one to three odd values, names or gaps in it."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not (places := holders(data)):
            return rng.choice(ODD)
        holder = rng.choice(places)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        what = rng.randrange(8)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[rng.choice((*PATHS, *NAMES))] = holder.pop(key)
        elif what == 2 and isinstance(holder, list):
            holder.append(holder[key])
        else:
            other = rng.choice(places)
            taken = rng.choice(list(other.values()) if isinstance(other, dict) else other or [0])
            values = (rng.choice(ODD), rng.choice(PATHS), rng.choice(NAMES), taken)
            holder[key] = json.loads(json.dumps(rng.choice(values)))
    return data


def holders(data: Any) -> list[Any]:
    """Every non-empty mapping and list in a document."""
    inner = list(data.values()) if isinstance(data, dict) else data if isinstance(data, list) else []
    return ([data] if inner else []) + [found for value in inner for found in holders(value)]


def scrambled(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some flipped, cut out, doubled or put in."""
    scrambled = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 32))):
        at = rng.randrange(len(scrambled) + 1)
        what = rng.randrange(6)
        if what < 3 and at < len(scrambled):
            scrambled[at] = rng.choice((0, 255, 128, scrambled[at] ^ (1 << rng.randrange(8))))
        elif what == 3:
            scrambled[at:at] = rng.choice((b"\0" * 8, b"\xff" * 4, b"- [", b"99999999999", rng.randbytes(16)))
        elif what == 4:
            del scrambled[at : at + rng.choice((1, 4, 64))]
        elif rng.random() < 0.2:
            del scrambled[at:]
    return bytes(scrambled)


def text_of(rng: random.Random, data: Any) -> bytes:
    """A document as a file: with odd values, or its bytes scrambled, or as a parser would not have it."""
    plain = json.dumps(data, indent=1)
    number = b'{"format": ' + b"9" * 5000 + b"}"
    odd = (b"[" * 100_000, b'{"a":' * 50_000, b"", b"\xff\xfe", b"null", number, b"\0" * 64)
    what = rng.randrange(10)
    if what < 7:
        return json.dumps(mutated(rng, data)).encode("utf-8", "surrogatepass")
    return scrambled(rng, plain.encode()) if what < 9 else rng.choice(odd)


class Scene:
    """A model folder, images, an output, all small, made unless they are there; and what is tried on copies of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.source, self.output = root, root / "timm", root / "output"
        self._folders = {"timm": self.source}
        if self.output.exists():
            return
        SOURCES["timm"](self.source)
        (root / "images").mkdir()
        rng = random.Random(0)
        for index in range(12):
            Image.frombytes("RGB", (32, 32), rng.randbytes(3072)).save(root / "images" / f"{index}.png")
        vitrim.compress(str(self.source), data=root / "images", recipe=ELASTIC, out=self.output, quiet=True)

    def try_(self, kind: str, seed: int) -> Outcome:
        """One hostile file of a kind, opened in a child; what changed outside its folder is a loss, too."""
        from tests.support.fault_kinds import MORE  # which is made of what is here

        rng = random.Random(f"{kind} {seed}")
        with tempfile.TemporaryDirectory(dir=self.root) as scratch:
            folder = Path(scratch) / "inner" / "folder"
            folder.mkdir(parents=True)
            (Path(scratch) / "canary").write_text("as it was")
            work = (KINDS | MORE)[kind](self, rng, folder)
            before = self._around(Path(scratch))
            outcome = in_child(work, memory=MEMORY)
            after = self._around(Path(scratch))
        return outcome if before == after else Outcome(code=70, said=f"wrote outside its folder\n{outcome.said}")

    def _around(self, scratch: Path) -> Any:
        """All that a case has no business with."""
        return snapshot([self.source, self.output]), sorted(scratch.glob("*")), sorted(self.root.glob("*"))

    def folder(self, name: str) -> Path:
        """A model in one of the layouts of checkpoints.py, made when it is first asked for."""
        if name not in self._folders:
            self._folders[name] = Path(SOURCES[name](self.root / name))
        return self._folders[name]

    def copy(self, of: Path, folder: Path) -> Path:
        """A copy, free to be damaged."""
        return Path(shutil.copytree(of, folder / "copy"))


def _recipe(_: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    import yaml

    text = rng.choice(sorted((ROOT / "recipes").glob("*.yaml"))).read_text()
    if rng.random() < 0.5:
        text = yaml.safe_dump({"recipe": mutated(rng, FULL)}["recipe"], allow_unicode=True)
    data = text.encode("utf-8", "surrogatepass")
    (folder / "recipe.yaml").write_bytes(scrambled(rng, data) if rng.random() < 0.5 else data)
    return lambda: door(lambda: use_recipe(folder / "recipe.yaml"))


def use_recipe(path: Path) -> None:
    """All that is done with a recipe before there is a model."""
    recipe = Recipe.load(path).updated({"seed": 1})
    recipe.dump()
    for number in range(len(recipe.steps)):
        width = recipe.width(number)
        if not width.is_of_the_model:
            width.of(SITE)


def _plan(scene: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    copy = scene.copy(scene.output, folder)
    (copy / "vitrim.json").write_bytes(text_of(rng, json.loads((copy / "vitrim.json").read_text())))
    return lambda: run(["inspect", str(copy)]) if rng.random() < 0.5 else door(lambda: vitrim.load(copy))


def _edits(scene: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    """The plan alone, among it edits of every kind."""
    copy = scene.copy(scene.output, folder)
    about = json.loads((copy / "vitrim.json").read_text())
    plain = rng.choice(PLANNED)
    about["plan"]["edits"] = mutated(rng, [*about["plan"]["edits"][: rng.randrange(2)], plain])
    (copy / "vitrim.json").write_text(json.dumps(about))
    return lambda: door(lambda: vitrim.load(copy))


def _config(scene: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    copy = scene.copy(scene.folder(rng.choice(("timm", "open_clip", "old transformers"))), folder)
    path = next(copy.glob("*config.json"))
    path.write_bytes(text_of(rng, json.loads(path.read_text())))
    return lambda: run(["inspect", str(copy)])


def _index(scene: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    copy = scene.copy(scene.folder("timm shards"), folder)
    path = copy / "model.safetensors.index.json"
    path.write_bytes(text_of(rng, json.loads(path.read_text())))
    return lambda: run(["prune-checkpoint", str(copy), str(folder / "out"), "--quiet"])


def _weights(scene: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    copy = scene.copy(scene.output if rng.random() < 0.5 else scene.source, folder)
    data = (copy / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = text_of(rng, json.loads(data[8 : 8 + length]))
    said = rng.choice((len(header), len(header), len(header), 0, 2**63, 2**64 - 1, 10**9, len(header) + 1))
    (copy / "model.safetensors").write_bytes(said.to_bytes(8, "little") + header + data[8 + length :])
    if (copy / "vitrim.json").exists():
        return lambda: door(lambda: vitrim.load(copy))
    return lambda: run(["prune-checkpoint", str(copy), str(folder / "out"), "--quiet"])


def _image(scene: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    name = rng.choice(("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF"))
    mode = rng.choice(("RGB", "L", "P", "CMYK", "1", "LA", "PA", "I", "F", "I;16", "I;16B"))
    colours = Image.frombytes("RGB", (24, 20), rng.randbytes(1440))
    image = Image.frombytes(mode, (24, 20), rng.randbytes(960)) if mode[:4] == "I;16" else colours.convert(mode)
    written = io.BytesIO()
    exif = b"Exif\0\0" + scrambled(rng, b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    try:
        image.save(written, name, **({"exif": exif} if name in ("PNG", "JPEG", "WEBP") else {}))
    except (OSError, ValueError):  # not every format has every mode
        image.convert("RGB").save(written, name)
    (folder / "a.png").write_bytes(scrambled(rng, written.getvalue()))
    shutil.copy(scene.root / "images" / "0.png", folder / "b.png")
    return lambda: door(lambda: _read_all(folder))


def _tar(scene: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    path = folder / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for index in range(3):
            for kind, data in (("png", (scene.root / "images" / "0.png").read_bytes()), ("cls", b"3")):
                odd = (rng.choice(PATHS)[:90].replace("\0", "") or "e") if rng.random() < 0.4 else str(index)
                member = tarfile.TarInfo(f"{odd}.{kind}")
                data = rng.choice((data, data, scrambled(rng, data), b"9" * rng.choice((20, 5000))))
                member.size = len(data)
                if rng.random() < 0.1:
                    member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/hostname", 0
                tar.addfile(member, io.BytesIO(data))
    if rng.random() < 0.6:
        path.write_bytes(scrambled(rng, path.read_bytes()))
    return lambda: door(lambda: _read_all(path))


def _elastic(scene: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    copy = scene.copy(scene.output, folder)
    (copy / "elastic.json").write_bytes(text_of(rng, json.loads((copy / "elastic.json").read_text())))
    ratio = rng.choice(("0.5", "0.5", "1", "0.25"))

    def work() -> int:
        with checking_with(lambda _: 0.0):
            return run(["slice", str(copy), "--mlp-ratio", ratio, "--out", str(folder / "out")])

    return work


def _leaderboard(_: Scene, rng: random.Random, folder: Path) -> Callable[[], int]:
    from vitrim.compression import leaderboard

    (folder / "leaderboard.json").write_text(json.dumps(mutated(rng, LEADERBOARD)))

    def work() -> int:
        leaderboard._Runner.of = lambda *_: (_ for _ in ()).throw(VitrimError("opened"))  # type: ignore[assignment]
        return run(["leaderboard", "--out", str(folder), "--methods", "random", "--quiet"])

    return work


def _read_all(source: Path) -> None:
    """Every image of a source, preprocessed as a model would have it."""
    from vitrim.data import transform_for

    for _ in open_images(source, transform=transform_for(INPUTS)).loader(batch_size=2):
        pass


KINDS: dict[str, Callable[[Scene, random.Random, Path], Callable[[], int]]] = {
    "recipe": _recipe,
    "vitrim.json": _plan,
    "edits of a plan": _edits,
    "config.json": _config,
    "index of shards": _index,
    "header of safetensors": _weights,
    "image": _image,
    "tar shard": _tar,
    "elastic.json": _elastic,
    "leaderboard.json": _leaderboard,
}
