"""A checkpoint with its architecture: the files' headers, the model on meta, and how their tensor names match."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from vitrim.config.recipe import Recipe
from vitrim.errors import CheckpointError
from vitrim.models.fit import check_fit, check_floats, in_model_names
from vitrim.models.load import backend_of, load_model, split_source
from vitrim.models.origin import ModelBackend, Origin, in_one_line
from vitrim.models.sites import find_mlps, resolve_scope
from vitrim.storage.tensor_files import TensorFiles, find_weights, open_tensors, user_path
from vitrim.surgery import KeepUnits, edit_of
from vitrim.types import MlpSite

# Files of other libraries and pickled files are not downloaded.
NOT_FETCHED = ("*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.onnx", "*.gguf")


@dataclass(frozen=True, kw_only=True)
class CheckpointJob:
    """A checkpoint and its architecture: `names` maps names in the files to names in the model."""

    model: nn.Module
    origin: Origin
    backend: ModelBackend
    files: TensorFiles
    names: Mapping[str, str]
    sites: tuple[MlpSite, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen when architecture and files were opened, for the user."""
        return tuple(dict.fromkeys((*self.origin.notes, *self.files.notes)))

    @property
    def encoder(self) -> nn.Module:
        """The part of the architecture that takes the inputs, on the meta device."""
        return self.model.get_submodule(self.origin.encoder)

    @property
    def sites_in_encoder(self) -> list[MlpSite]:
        """The MLPs, with paths from the encoder."""
        return [site.within(self.origin.encoder) for site in self.sites]

    @property
    def by_model_name(self) -> TensorFiles:
        """The tensors under the model's names."""
        return self.files.renamed(self.names)

    def finite_chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor of the files, checked to be finite; what is no parameter may be a mask.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        return self.files.finite_chunks(name, masks=self.names.get(name) not in self._parameters)

    @cached_property
    def _parameters(self) -> frozenset[str]:
        """Names of the architecture's parameters; what else it holds are buffers."""
        return frozenset(name for name, _ in self.model.named_parameters())


def open_checkpoint(source: str, recipe: Recipe) -> CheckpointJob:
    """Open a checkpoint: the architecture on meta, the files (headers only) and the mapping of their names.

    Raises:
        ModelError, CheckpointError: there is no such model, or its files can't be read.
    """
    local, path = _local(source, fetch=True)
    reading = recipe.reading()
    model, origin = load_model(local, weights=False, reading=reading)
    backend = backend_of(origin.library)
    if backend is None:
        raise CheckpointError(f"{source}: no library builds this architecture; use compress with the module.")
    files = open_tensors(path, prefer=backend.WEIGHTS.partition("_model")[0], weights=reading.weights)
    files = in_model_names(files, model, reading.weights)
    encoder, scope = resolve_scope(model, recipe.scope, origin.encoder)
    if encoder != origin.encoder:  # the known preprocessing belongs to another part
        origin = replace(origin, encoder=encoder, preprocessing={})
    with in_one_line(source):  # the library's own code runs on tensors that may have any shape
        names = backend.names(model, files.fakes())
    return CheckpointJob(
        model=model,
        origin=replace(origin, name=source),
        backend=backend,
        files=files,
        names=names,
        sites=find_mlps(model, scope=scope),
    )


def has_files(source: str) -> bool:
    """Return whether a source has weights on this machine; nothing is downloaded or read."""
    try:
        _, path = _local(source, fetch=False)
    except CheckpointError:
        return False
    return bool(find_weights(path))


def _local(source: str, *, fetch: bool) -> tuple[str, Path]:
    """Return the name and path of a source's local files; those of a hub id are downloaded first."""
    prefix, _, rest = source.partition("/")
    if prefix == "timm" and "@" in rest and not rest.startswith(("local-dir:", "hf-hub:")):
        return source, user_path(rest.partition("@")[2])
    prefix, rest = split_source(source)
    prefix = prefix and f"{prefix}/"
    path = user_path(rest.removeprefix("local-dir:"))
    if fetch and not path.exists() and (prefix == "hf/" or rest.startswith("hf-hub:")):
        path = _fetched(rest.removeprefix("hf-hub:"), source)
    folder = path.parent if path.is_file() else path
    if not path.exists() or not folder.is_dir() or (path.is_file() and not any(folder.glob("*config.json"))):
        raise CheckpointError(
            f"{source}: no model folder there; pass a folder with config.json and weights, timm/NAME@FILE, hf/ORG/NAME "
            "or PREFIX/hf-hub:ORG/NAME."
        )
    return f"{prefix}{'' if prefix == 'hf/' or not prefix else 'local-dir:'}{folder}", path


def _fetched(name: str, source: str) -> Path:
    """Download a repository from the hub, and return its folder in the cache."""
    from huggingface_hub import snapshot_download

    with in_one_line(source):
        return Path(snapshot_download(name, ignore_patterns=list(NOT_FETCHED)))


def check_tensors(job: CheckpointJob) -> None:
    """Check that a checkpoint's tensors fit the architecture.

    Raises:
        CheckpointError: a tensor of an MLP is missing or has another shape, or weights are quantized.
    """
    fakes = job.files.fakes()
    check_floats(fakes, job.model, job.origin.name)
    found = {job.names[name]: fake for name, fake in fakes.items() if name in job.names}
    check_fit(found, job.model, job.origin.name, "Check its config, or fetch it again.", strict=False)
    wanted = job.model.state_dict()
    cut = edit_of(KeepUnits(site=site, keep=(0,)) for site in job.sites)
    missing = [name for name in wanted if name in cut and name not in found]
    if missing:
        raise CheckpointError(
            f"{job.origin.name}: holds no {missing[0]} (and {len(missing) - 1} more MLP tensors), or holds them in a "
            "form that the library converts when it loads them; use compress."
        )


def check_values(job: CheckpointJob) -> None:
    """Read every tensor of a checkpoint once, piece by piece, and check that its values are finite.

    Raises:
        CheckpointError: a value is NaN or infinite; the tensor is named.
    """
    for name in job.files:
        for _ in job.finite_chunks(name):
            pass
