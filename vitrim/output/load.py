"""Loads a model that vitrim wrote: the architecture on meta, reshaped by the plan, then its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from vitrim.errors import DAMAGED, CheckpointError, ModelError, VitrimError, reason_of
from vitrim.models.fit import check_fit
from vitrim.models.given import check_weights, unwrapped, with_values
from vitrim.models.load import PLAIN, backend_of, build_empty, load_model, origin_of
from vitrim.models.origin import ModelBackend, Origin, Reading, in_one_line, match_buffers_
from vitrim.storage.tensor_files import open_tensors, user_path
from vitrim.surgery import Plan, reshape_
from vitrim.torch_state import own_torch_state

HUB, OWN = "hf-hub:", "vitrim/"
WEIGHTS, ABOUT = "model.safetensors", "vitrim.json"


@own_torch_state()
def load(
    source: str | Path,
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a model that vitrim wrote, whichever widths it has.

    Args:
        source: the output folder, `hf-hub:ORG/NAME` for one on the Hugging Face hub, or `vitrim/NAME` for a model of
            vitrim's own, untrained.
        model: the uncut model, needed if no library can build it; it is reshaped in place.
        device: device for the model; by default the CPU.
        dtype: type of its parameters; by default the one in the file.

    Returns:
        The cut model in eval mode.

    Raises:
        CheckpointError: the folder is not vitrim's, is damaged, or needs `model`.
        ModelError: the hub has no such repository or can't be reached, there is no such device, or the type is not one
            of parameters.

    Example:
        >>> from importlib.resources import files
        >>> import vitrim
        >>> digits = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
        >>> import tempfile
        >>> from pathlib import Path
        >>> out = Path(tempfile.mkdtemp()) / "small"
        >>> result = vitrim.compress(digits, method="magnitude", mlp_ratio=1, out=out, quiet=True)
        >>> sum(parameter.numel() for parameter in vitrim.load(out).parameters())
        349738
    """
    path = local_folder(source)
    if model is None and str(source).startswith(OWN) and not is_output(path):
        return _placed(load_model(str(source))[0], str(source), device, dtype)
    about = read_about(path)
    plan, origin = Plan.from_json(about["plan"]), Origin.from_json(about["origin"]).placed_at(str(path))
    student = build_empty(origin) if model is None else unwrapped(_instance(model), in_place=True)
    try:
        with in_one_line(str(path)):
            reshape_(student, plan.edits)
        _fill_(student, path, backend_of(origin.library))
    except VitrimError as error:
        if model is None:
            raise
        raise CheckpointError(
            f"{path}: does not fit the model that was passed; build it with the arguments of the uncut one "
            f"(if it was, fetch the folder again): {str(error).removeprefix(f'{path}: ')}"
        ) from None
    if origin.library != "transformers":  # which keeps such buffers in float32 even with bf16 weights
        match_buffers_(student)
    return _placed(student, str(path), device, dtype)


def _instance(model: Any) -> nn.Module:
    """Return a model that a user passed.

    Raises:
        ModelError: it is something else, such as its class.
    """
    if isinstance(model, nn.Module):
        return model
    if callable(model):
        name = getattr(model, "__name__", type(model).__name__)
        what = f"{name} itself, which makes models; pass model={name}(...)"
    else:
        what = f"{type(model).__name__}; pass a module"
    raise ModelError(f"model: is {what}, built with the arguments of the uncut one.")


def _placed(model: nn.Module, name: str, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    """Return a model in eval mode, on a device and of a type where these are given."""
    if device is not None or dtype is not None:
        try:
            model.to(device=device, dtype=dtype)
        except (RuntimeError, TypeError) as error:
            raise ModelError(f"{name}: can't go to device={device}, dtype={dtype} ({reason_of(error)}).") from None
    return model.eval()


def local_folder(source: str | Path) -> Path:
    """Return the folder of an output, downloaded first if it is on the Hugging Face hub.

    Raises:
        ModelError: the hub has no such repository, or can't be reached.
    """
    name = str(source)
    if not name.startswith(HUB):
        return user_path(name.removeprefix("local-dir:"))
    from huggingface_hub import snapshot_download

    with in_one_line(name):
        return Path(snapshot_download(name.removeprefix(HUB)))


def _fill_(model: nn.Module, path: Path, backend: ModelBackend | None) -> None:
    """Load a folder's tensors into a model, by its own names or the library's older ones; tied ones are stored once."""
    files = open_tensors(path)
    if backend is not None and not files.keys() <= model.state_dict().keys():
        with in_one_line(str(path)):  # the library's own code runs on tensors that may have any shape
            files = files.renamed(backend.names(model, files.fakes()))
    check_fit(files, model, path, "Its plan or its weights are damaged; fetch it again.", strict=False)
    try:
        missing, unexpected = model.load_state_dict(dict(files), strict=False, assign=True)
        if missing and hasattr(model, "tie_weights"):
            model.tie_weights()  # type: ignore[operator]
        empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if unexpected or empty or (missing and not hasattr(model, "tie_weights")):
            raise RuntimeError(f"{(unexpected or empty or missing)[0]} is {'unknown' if unexpected else 'missing'}")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not fit the plan or is damaged ({reason_of(error)}).") from None


def open_model(model: nn.Module | str, reading: Reading = PLAIN) -> tuple[nn.Module, Origin]:
    """Return a model and how it was built, from a module, a name, or a folder (vitrim's own or a library's).

    Args:
        model: the module, name or folder.
        reading: how to read a source whose name leaves that open.

    Raises:
        ModelError: there is no such model, it is in a state that can't be compressed, or a weight is not finite.
        CheckpointError: vitrim wrote the folder, but it is damaged.
    """
    if isinstance(model, nn.Module):
        reading.refuse_model_args(type(model).__name__)
        model = with_values(unwrapped(model))
        return _whole(model, origin_of(model))
    if not isinstance(model, str | Path):
        raise ModelError(f"model: is {type(model).__name__}; pass a module, a name or a folder.")
    model = str(model)  # `out` of a result is a Path
    path = str(user_path(model.removeprefix("local-dir:")))
    if not is_output(path):
        return _whole(*load_model(model, reading=reading))
    reading.refuse_model_args(model)
    about = read_about(Path(path))
    origin = Origin.from_json(about["origin"]).placed_at(path).after(Plan.from_json(about["plan"]).edits)
    return _whole(load(path), origin)


def _whole(model: nn.Module, origin: Origin) -> tuple[nn.Module, Origin]:
    """Return a model and its origin, after checking that its weights are finite."""
    check_weights(model, origin.name)
    return model, origin


def is_output(path: str | Path) -> bool:
    """Return whether a path is a folder that vitrim wrote."""
    return (Path(path) / ABOUT).is_file()


def read_about(path: Path) -> dict[str, Any]:
    """Return the contents of vitrim.json.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        if about["format"] == "vitrim/1" and {"origin", "plan", "stock"} <= about.keys():
            return about
        reason = f"its format is {about['format']!r}; this version reads 'vitrim/1'"
    except FileNotFoundError:
        reason = f"has no {ABOUT}; pass a folder that vitrim wrote"
    except DAMAGED as error:
        reason = f"{ABOUT} is damaged ({error!r})"
    raise CheckpointError(f"{path}: {reason}.")


Model = nn.Module | str


def open_encoder(model: Model, reading: Reading = PLAIN) -> tuple[nn.Module, Origin]:
    """Return the part of a model that takes the inputs, and how the whole was built."""
    whole, origin = open_model(model, reading)
    return whole.get_submodule(origin.encoder), origin
