"""A checkpoint beside its architecture: files by their headers, the model on meta, and how their names go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from vitrim.errors import CheckpointError
from vitrim.models.load import library, load_model
from vitrim.models.origin import Library, Origin
from vitrim.models.sites import find_mlps, resolve_scope
from vitrim.recipe import Recipe
from vitrim.surgery import edit_of
from vitrim.tensor_files import TensorFiles, open_tensors
from vitrim.types import KeepUnits, MlpSite

SHARD_BYTES = 2 * 10**9


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checkpoint and its architecture: `names` maps names in the files to names in the model."""

    model: nn.Module
    origin: Origin
    reader: Library
    files: TensorFiles
    names: Mapping[str, str]
    sites: tuple[MlpSite, ...]

    @property
    def by_model_name(self) -> TensorFiles:
        """The tensors under the model's names."""
        return self.files.renamed(self.names)


def open_job(source: str, recipe: Recipe) -> Job:
    """The architecture on meta, the files (headers alone) and how their names go together."""
    source, path = _local(source)
    model, origin = load_model(source, weights=False)
    reader = library(origin.library)
    if reader is None:
        raise CheckpointError(f"{source}: no library builds this architecture; use compress with the module.")
    files = open_tensors(path)
    encoder, scope = resolve_scope(model, recipe.scope, origin.encoder)
    origin = replace(origin, encoder=encoder)
    names = reader.names(model, files.fakes())
    return Job(
        model=model,
        origin=origin,
        reader=reader,
        files=files,
        names=names,
        sites=find_mlps(model, scope=scope),
    )


def _local(source: str) -> tuple[str, Path]:
    """A source by its local files; those of a hub id are downloaded."""
    prefix, _, rest = source.partition("/")
    if prefix == "timm" and "@" in rest:
        return source, Path(rest.partition("@")[2])
    folder = Path(source.removeprefix("local-dir:"))
    if prefix == "hf" and not Path(rest).is_dir() and not folder.exists():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(rest, ignore_patterns=["*.bin", "*.pth", "*.h5", "*.msgpack", "*.onnx"]))
    elif prefix == "hf" and not folder.exists():
        folder = Path(rest)
    if folder.is_file() and (folder.parent / "config.json").is_file():
        return str(folder.parent), folder
    if not folder.is_dir():
        raise CheckpointError(f"{source}: no such folder; pass a model folder, timm/NAME@FILE, or hf/ORG/NAME.")
    return str(folder), folder


def check_tensors(job: Job) -> None:
    """Refuse a checkpoint that is not the architecture's.

    Raises:
        CheckpointError: a tensor of an MLP is missing or has another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in job.model.state_dict().items()}
    found = {job.names[name]: info.shape for name, info in job.files.infos.items() if name in job.names}
    for name, shape in found.items():
        if shape != wanted[name]:
            raise CheckpointError(f"{job.origin.name}: {name} is {shape}, the architecture has {wanted[name]}.")
    cut = edit_of(KeepUnits(site=site, keep=(0,)) for site in job.sites)
    missing = [name for name in wanted if name in cut and name not in found]
    if missing:
        raise CheckpointError(
            f"{job.origin.name}: holds no {missing[0]} (and {len(missing) - 1} more MLP tensors), or holds them in a "
            "form that the library converts when it loads them; use compress."
        )
