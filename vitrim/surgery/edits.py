"""The base class of all edits, and the functions that apply edits to a model or a state dict.

Every edit has two halves. `reshape_` changes a module tree (also on the meta device); `map_tensor` changes the tensors
of a state dict, one by one, read lazily. Pruning a live model, loading a compressed checkpoint and pruning file to file
use the same two halves in different order. Each kind of edit has a file of its own beside this one; nothing here
decides what to cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor, nn
from typing_extensions import Self

from vitrim.errors import CheckpointError
from vitrim.storage.hashes import tensor_sha256
from vitrim.surgery.modules import submodule
from vitrim.types import Site

KINDS: dict[str, type[Edit]] = {}


@dataclass(frozen=True, kw_only=True)
class Edit(ABC):
    """One decision about some modules of a model, as data.

    `tensors` maps full tensor names, as they are after the edit, to their values; a name that is not in it gets what
    `map_tensor` makes of the original. A field that names a module is a `Site`, or is called `path` or `paths`. A
    subclass is a frozen dataclass with a KIND; MAKES says what a model then has. In a plan ORDER never falls from one
    edit to the next, so that nothing is cut that has been replaced.
    """

    KIND: ClassVar[str]
    MAKES: ClassVar[str]
    ORDER: ClassVar[int] = 0
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "KIND"):  # what several edits share is none itself
            KINDS[cls.KIND] = cls

    @abstractmethod
    def affected_tensors(self) -> list[str]:
        """Return the names of the tensors that the edit reads, cuts, replaces or removes; some may not exist."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Check that the edit can be applied to a model.

        Raises:
            BudgetError: it asks for more than the module has.
            SiteNotFoundError: a module that it names is missing or of another kind.
        """

    @abstractmethod
    def reshape_(self, model: nn.Module) -> None:
        """Change the modules to their new shape; new tensors are uninitialised, on the device of the old ones."""

    @abstractmethod
    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and values that replace one affected tensor after the edit: none, one or several."""

    def shape_only(self) -> Self:
        """Return an edit that gives the same shapes but holds no tensors: enough to build the model."""
        return replace(self, tensors={})

    def describe(self) -> str:
        """Return the edit in a few words, for tables."""
        return self.KIND.replace("_", " ")

    @property
    def where(self) -> str:
        """Path of the edited module, or of the first of several."""
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Site):
                return value.path
            if part.name in ("path", "paths"):
                return value if isinstance(value, str) else value[0]
        return ""

    def given(self, name: str, like: Tensor) -> Tensor:
        """Return one of the edit's tensors, with the dtype and on the device of another."""
        return self.tensors[name].to(device=like.device, dtype=like.dtype).contiguous()

    def below(self, prefix: str) -> Self:
        """Return the edit with paths from a larger model, which holds this one at `prefix`."""
        return self.renamed(lambda path: f"{prefix}.{path}".strip(".")) if prefix else self

    def within(self, prefix: str) -> Self:
        """Return the edit with paths relative to the module at `prefix`: the inverse of `below`."""
        return self.renamed(lambda path: "" if path == prefix else path.removeprefix(f"{prefix}.")) if prefix else self

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """Return the edit with every path and tensor name passed through a function."""
        new: dict[str, Any] = {"tensors": {rename(name): tensor for name, tensor in self.tensors.items()}}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Site):
                new[part.name] = value.renamed(rename)
            elif part.name == "path":
                new[part.name] = rename(value)
            elif part.name == "paths":
                new[part.name] = tuple(rename(path) for path in value)
        return replace(self, **new)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description, with the SHA-256 of each tensor in place of its values."""
        values = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "tensors"}
        plain = {
            name: {key: item for key, item in value.__dict__.items() if item is not None}
            if isinstance(value, Site)
            else list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }  # fmt: skip
        hashes = {name: tensor_sha256(tensor) for name, tensor in sorted(self.tensors.items())}
        return {"edit": self.KIND, **plain, "tensors": hashes}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Edit:
        """Rebuild an edit from `to_json`, without its tensors (a checkpoint holds them as weights).

        Raises:
            CheckpointError: this version does not know the kind of edit.
            pydantic.ValidationError: a field is missing, unknown or of the wrong type.
        """
        values = {name: value for name, value in data.items() if name not in ("edit", "tensors")}
        kind = KINDS.get(data["edit"])
        if kind is None:
            raise CheckpointError(f"plan: has an edit {data['edit']!r}; this version knows {', '.join(sorted(KINDS))}.")
        return TypeAdapter(kind).validate_python(values)


def apply_(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Apply edits to a live model in place, for example cut its MLPs.

    Args:
        model: the model that the edits were made for.
        edits: the edits, in order.

    Raises:
        BudgetError: an edit asks for more than there is.
        SiteNotFoundError: an edit names a module that the model does not have.

    Example:
        >>> from torch import nn
        >>> from vitrim.models.sites import find_mlps
        >>> from vitrim.surgery import KeepUnits, apply_
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
        >>> [site] = find_mlps(model)
        >>> apply_(model, [KeepUnits(site=site, keep=(0, 3, 5))])
        >>> model[0], model[2]
        (Linear(in_features=4, out_features=3, bias=True), Linear(in_features=3, out_features=4, bias=True))
    """
    checked, names = _check_first(model, edits), edit_of(edits)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    smaller = dict(transform(tensors, edits))
    _reshape_checked_(model, edits, checked)
    model.load_state_dict(smaller, strict=False, assign=True)


def reshape_(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Change each edited module to its new shape; new tensors are uninitialised, on the device of the old ones."""
    edits = tuple(edits)
    _reshape_checked_(model, edits, _check_first(model, edits))


def _check_first(model: nn.Module, edits: Iterable[Edit]) -> list[bool]:
    """Check all edits that can be checked before any is applied, so that a bad one leaves the model unchanged.

    Returns:
        For each edit, whether it was checked; one that edits the result of an earlier edit is checked later.
    """
    seen: set[str] = set()
    checked = []
    for edit in edits:
        paths = {name.rpartition(".")[0] for name in edit.affected_tensors()}
        above = {".".join(parts[:end]) for parts in (path.split(".") for path in paths) for end in range(1, len(parts))}
        checked.append(seen.isdisjoint(paths | above))
        if checked[-1]:
            edit.check(model)
        seen |= paths | {edit.where}  # what stands there may hold the modules of later edits
    return checked


def _reshape_checked_(model: nn.Module, edits: Iterable[Edit], checked: Iterable[bool]) -> None:
    """Reshape edit by edit, and check those that could not be checked before."""
    for edit, known in zip(edits, checked, strict=True):
        if not known:
            edit.check(model)
        edit.reshape_(model)


def transform(tensors: Mapping[str, Tensor], edits: Iterable[Edit]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state dict one by one, with the edited ones cut or replaced.

    Args:
        tensors: names to tensors; each is read once, when it is needed.
        edits: the edits, in order.

    Yields:
        Every name and tensor in the order of `tensors`; an edited one is replaced by what the edits make of it.
    """
    edits = tuple(edits)
    touched = [set(edit.affected_tensors()) for edit in edits]
    first: dict[str, int] = {}
    for index, names in enumerate(touched):
        for name in names:
            first.setdefault(name, index)

    def onward(name: str, tensor: Tensor, start: int) -> Iterator[tuple[str, Tensor]]:
        for index in range(start, len(edits)):
            if name in touched[index]:
                for new, value in edits[index].map_tensor(name, tensor):
                    yield from onward(new, value, index + 1)
                return
        yield name, tensor

    for name in tensors:
        yield from onward(name, tensors[name], first.get(name, len(edits)))


def edit_of(edits: Iterable[Edit]) -> dict[str, Edit]:
    """Map the name of each affected tensor to the last edit that affects it; a name may not exist in the model."""
    return {name: edit for edit in edits for name in edit.affected_tensors()}


def resize_(module: nn.Module, *, dim: int, size: int, attributes: Sequence[str]) -> None:
    """Replace the parameters of a linear or norm layer by uninitialised ones with another size along `dim`.

    `attributes` are the layer's own records of that size, such as `out_features`, of which it has some.
    """
    for name, old in list(module.named_parameters(recurse=False)):
        if dim < old.ndim:
            shape = list(old.shape)
            shape[dim] = size
            fresh = torch.empty(shape, dtype=old.dtype, device=old.device)
            setattr(module, name, nn.Parameter(fresh, requires_grad=old.requires_grad))
    for name in [name for name in attributes if hasattr(module, name)]:
        setattr(module, name, (size,) if name == "normalized_shape" else size)


def replace_(model: nn.Module, path: str, new: nn.Module) -> None:
    """Replace the module at `path` by another one, in the same training mode."""
    parent, _, name = path.rpartition(".")
    holder = submodule(model, parent)
    setattr(holder, name, new.train(submodule(holder, name).training))
