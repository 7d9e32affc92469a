"""Saves a cut model so that a stock library, or `load`, gives it back, and proves it in a fresh process.

An output folder is written beside its final place and renamed into it only when it is complete and verified. Nothing is
pickled. Reloading needs the plan's widths alone; tensors stand once, in model.safetensors.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrim.errors import DAMAGED, CheckpointError, OutputError
from vitrim.models.load import build_empty, library, load_model, origin_of
from vitrim.models.origin import Library, Origin, copy_companions, in_one_line, match_buffers_
from vitrim.models.stock import stock_origin
from vitrim.models.taps import evaluating
from vitrim.surgery import Plan, reshape_
from vitrim.tensor_files import open_tensors

WEIGHTS, ABOUT = "model.safetensors", "vitrim.json"
CUT_STATE, RECOVERY_STATE, RECOVERY_LOG = "cut.json", "recover.state", "recovery.jsonl"
PICKS, TEXT_STATE = "picks.jsonl", "text.state"
STATES = (CUT_STATE, PICKS, TEXT_STATE)  # each is something to go on from
LOCK = "lock"

# Run in a fresh interpreter: the stock check in one where importing vitrim fails, so that nothing of it can help.
STOCK_CHECK = """
import sys
sys.modules["vitrim"] = None
folder = sys.argv[1]
"""
OWN_CHECK = """
import sys, vitrim
model = vitrim.load(sys.argv[1])
"""
COMPARE = """
import torch
from safetensors.torch import load_file
probe = load_file(sys.argv[2])
encoder = model.to(probe["like"].dtype).float().eval().get_submodule(sys.argv[3])
with torch.inference_mode():
    output = encoder(probe["inputs"])
output = output if isinstance(output, torch.Tensor) else output[0]
error = float((output - probe["output"]).abs().max())
scale = float(probe["output"].abs().max())
assert error <= 1e-4 * max(scale, 1e-6), f"outputs differ by {error:.3g} at scale {scale:.3g}"
print(error / max(scale, 1e-30))
"""


@contextmanager
def staged_output(out: Path, *, resume: bool = False) -> Iterator[tuple[Path, Path]]:
    """A folder beside `out` that becomes `out` at the end, and a place for what a stopped run needs to go on.

    Args:
        out: the folder to write.
        resume: keep what an earlier, stopped run left in that place.

    Yields:
        The folder to write the output into, and the folder for resumable state. Both are gone afterwards, but for the
        state of a run that was stopped after its cut.

    Raises:
        OutputError: `out` exists already, its parent can't be written to, or another run is writing it.
    """
    refuse_existing(out)
    made = [parent for parent in out.parents if not os.path.lexists(parent)]
    work = out.with_name(f".{out.name}.partial")
    folder = work / "output"
    try:
        with _alone(work, out):
            try:
                _start(work, out, resume=resume)
                yield folder, work
                for config in folder.glob("*config.json"):  # one that names a part of its folder gets the final name
                    config.write_text(config.read_text().replace(str(folder.resolve()), str(out.resolve())))
                _settle(folder)
                folder.rename(out)
                for state in STATES:
                    (work / state).unlink(missing_ok=True)
            except (OSError, SafetensorError) as error:  # the second is how safetensors says that a disk is full
                reason = getattr(error, "strerror", None) or error
                raise OutputError(f"{out}: could not be written ({reason}).") from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                if not any((work / state).exists() for state in STATES):
                    shutil.rmtree(work, ignore_errors=True)
    finally:
        for parent in (work, *made):
            with suppress(OSError, ValueError):  # what holds something stays
                parent.rmdir()


def refuse_existing(out: Path, *, kind: str = "output folder") -> None:
    """Refuse a place where something is, if only a link that leads nowhere.

    Raises:
        OutputError: so it is.
    """
    if os.path.lexists(out):
        raise OutputError(f"{out}: exists already; choose another {kind} or remove this one.")


@contextmanager
def _alone(work: Path, out: Path) -> Iterator[None]:
    """Make a folder and hold a lock in it. The system drops the lock of a process that dies, whatever it died of."""
    try:
        if work.is_symlink():
            raise OSError(errno.ELOOP, f"{work} is a link")
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{out}: can't be written ({reason}); choose a folder you may write to.") from None
    try:
        if not _hold(lock) or not (work / LOCK).exists():  # the run that held it may have ended between the two
            raise OutputError(f"{out}: another run is writing it; wait for that one, or choose another output folder.")
        yield
    finally:
        os.close(lock)


def _hold(lock: int) -> bool:
    """Lock an open file, if no other process has; a system or a disk without locks lets every run through."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno != errno.EWOULDBLOCK
    return True


def _start(work: Path, out: Path, *, resume: bool) -> None:
    """Empty the folder of a run, but for what it goes on from, and make that of its output."""
    refuse_existing(out)
    for old in [work / "output"] if resume else [path for path in work.iterdir() if path.name != LOCK]:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    (work / "output").mkdir()


def _settle(folder: Path) -> None:
    """Bring every file to disk before the folder gets its final name: after a power cut it is whole, or not there."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def save(folder: Path, student: nn.Module, *, origin: Origin, plan: Plan) -> bool:
    """Write weights, config and plan into a folder.

    Args:
        folder: an existing folder, normally one of `staged_output`.
        student: the cut model, whole.
        origin: how the uncut model is built.
        plan: what was cut, by paths from the root of the whole model.

    Returns:
        Whether the stock library can load the folder by itself.
    """
    path = folder / write_configs(folder, student, origin=origin, plan=plan)
    save_file(_distinct(student.state_dict()), path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())  # safetensors writes 0600
    return bool(read_about(folder)["stock"])


def write_configs(folder: Path, student: nn.Module, *, origin: Origin, plan: Plan) -> str:
    """Write everything of an output but the weights.

    Args:
        folder: an existing folder.
        student: the cut model, whole; it may be on meta.
        origin: how the uncut model is built.
        plan: what was cut, by paths from the root of the whole model.

    Returns:
        The name under which the weights are expected.
    """
    stock, reader = stock_origin(origin, plan.edits), library(origin.library)
    if stock is not None and reader is not None:
        reader.write_config(student, folder, stock)
    if reader is not None:
        copy_companions(origin, folder, reader.COMPANIONS)
    about = {
        "format": "vitrim/1",
        "stock": stock is not None,
        "origin": origin.without_place().to_json(),
        "plan": plan.without_tensors().to_json(),
        "plan_sha256": plan.sha256,
    }
    write_json(folder / ABOUT, about)
    return WEIGHTS if stock is None or reader is None else reader.WEIGHTS


def load(path: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Load a model that vitrim wrote, whatever its widths.

    Args:
        path: the output folder.
        model: the uncut model, for one that no library can build; it is reshaped in place.

    Returns:
        The cut model in eval mode.

    Raises:
        CheckpointError: the folder is not vitrim's, is damaged, or needs `model`.
    """
    path = Path(path)
    about = read_about(path)
    plan, origin = Plan.from_json(about["plan"]), Origin.from_json(about["origin"])
    student = model if model is not None else build_empty(origin)
    with in_one_line(str(path)):
        reshape_(student, plan.edits)
    _fill_(student, path, library(origin.library))
    if origin.library != "transformers":  # it keeps such buffers in float32 beside bf16 weights
        match_buffers_(student)
    return student.eval()


def _fill_(model: nn.Module, path: Path, reader: Library | None) -> None:
    """Give a model the tensors of a folder, in its own names or the library's older ones; tied tensors stand once."""
    files = open_tensors(path)
    if reader is not None and not files.keys() <= model.state_dict().keys():
        with in_one_line(str(path)):  # the library's own code, on tensors that may be of any shape
            files = files.renamed(reader.names(model, files.fakes()))
    try:
        missing, unexpected = model.load_state_dict(dict(files), strict=False, assign=True)
        if missing and hasattr(model, "tie_weights"):
            model.tie_weights()  # type: ignore[operator]
        empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if unexpected or empty or (missing and not hasattr(model, "tie_weights")):
            raise RuntimeError(f"{(unexpected or empty or missing)[0]} is {'unknown' if unexpected else 'missing'}")
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path}: does not fit the plan or is damaged ({reason}).") from None


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, each storage once: what a model ties together it ties again when it is loaded."""
    seen: set[tuple[int, torch.Size]] = set()
    kept = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen or tensor.numel() == 0:
            kept[name] = tensor.contiguous()
        seen.add(key)
    return kept


def open_model(model: nn.Module | str) -> tuple[nn.Module, Origin]:
    """A model and how it was built, from a module, a name, or a folder (vitrim's own or a library's).

    Raises:
        ModelError: no such model.
        CheckpointError: the folder is vitrim's and damaged.
    """
    if isinstance(model, nn.Module):
        return model, origin_of(model)
    path = model.removeprefix("local-dir:")
    if not is_output(path):
        return load_model(model)
    about = read_about(Path(path))
    origin = Origin.from_json(about["origin"]).placed_at(path).after(Plan.from_json(about["plan"]).edits)
    return load(path), origin


def is_output(path: str | Path) -> bool:
    """Whether a path is a folder that vitrim wrote."""
    return (Path(path) / ABOUT).is_file()


def read_about(path: Path) -> dict[str, Any]:
    """The contents of vitrim.json.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        about = json.loads((path / ABOUT).read_text())
        if about["format"] == "vitrim/1" and {"origin", "plan", "stock"} <= about.keys():
            return about
        reason = f"its format is {about['format']!r}; this version reads 'vitrim/1'"
    except FileNotFoundError:
        reason = f"has no {ABOUT}; pass a folder that vitrim wrote"
    except DAMAGED as error:
        reason = f"{ABOUT} is damaged ({error!r})"
    raise CheckpointError(f"{path}: {reason}.")


def verify(folder: Path, student: nn.Module, inputs: Tensor, *, origin: Origin, stock: bool) -> float:
    """Load a folder in a fresh process and compare its outputs with the model in memory.

    Args:
        folder: what `save` wrote.
        student: the model in memory, whole; its encoder is run.
        inputs: a few images (or rows of token ids) to compare on.
        origin: the library that loads the folder, and the encoder's path.
        stock: load with the stock library, vitrim not importable; otherwise with `load`.

    Returns:
        Largest difference relative to the largest output.

    Raises:
        OutputError: the folder does not load, or loads to something else.
    """
    reference = copy.deepcopy(student.get_submodule(origin.encoder)).cpu()
    like = next(reference.parameters()).new_empty(0)
    reference = reference.to(like.dtype).float()  # bf16 is compared in float32, but with all buffers rounded to it
    with evaluating(reference):
        output = reference(inputs.cpu())
    output = output if isinstance(output, Tensor) else output[0]
    reader = library(origin.library)
    load_it = STOCK_CHECK + reader.RELOAD if stock and reader is not None else OWN_CHECK
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe.safetensors"
        tensors = {"inputs": inputs.cpu().contiguous(), "output": output.clone().contiguous(), "like": like}
        save_file(tensors, probe)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", load_it + COMPARE, str(folder), str(probe), origin.encoder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().split("\n") or ["no message"])[-1]
        raise OutputError(f"{folder}: written, but does not load back to the same outputs ({reason}).")
    return float(done.stdout.split()[-1])


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("vitrim", "torch", "timm")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with a fixed layout, so that equal values give equal bytes."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def _umask() -> int:
    """The process's file mode mask; reading it means setting it for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
