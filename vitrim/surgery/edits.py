"""What an edit is, and how edits are carried out.

Every edit has two halves. `reshape_` changes a module tree (also on the meta device); `map_tensor` changes the tensors
of a state dict, one by one, read lazily. Pruning a live model, loading a compressed checkpoint and pruning file to file
are the same two halves in different order. Each kind of edit is a file of its own beside this one; nothing here decides
what to cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor, nn
from typing_extensions import Self

from vitrim.errors import CheckpointError
from vitrim.surgery.modules import submodule
from vitrim.types import Site, tensor_sha256

KINDS: dict[str, type[Edit]] = {}


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One decision about some modules of a model, as data.

    `tensors` maps full tensor names, as they are after the edit, to the values that stand there then; a name that is
    not in it gets what `map_tensor` makes of the original. A field that names a module is a `Site`, or is called `path`
    or `paths`. A subclass is a frozen dataclass with a KIND; a later edit of a plan may not have a lower ORDER than an
    earlier one, so that nothing is cut that has been replaced.
    """

    KIND: ClassVar[str]
    ORDER: ClassVar[int] = 0
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __init_subclass__(cls) -> None:
        KINDS[cls.KIND] = cls

    def affected_tensors(self) -> list[str]:
        """Names of the tensors that the edit reads, cuts, replaces or takes away; one may not be in the model."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        """Refuse an edit that can't be carried out on a model.

        Raises:
            BudgetError: it asks for more than there is.
            SiteNotFoundError: it names a module that the model does not have, or of another kind.
        """
        raise NotImplementedError

    def reshape_(self, model: nn.Module) -> None:
        """Give the modules their new form; new tensors are uninitialised, on the device of the old ones."""
        raise NotImplementedError

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What stands in the place of one touched tensor after the edit: none, one or several, by name."""
        raise NotImplementedError

    def shape_only(self) -> Self:
        """An edit of the same shape without its tensors: all that building the model takes."""
        return replace(self, tensors={})

    def describe(self) -> str:
        """The edit in a few words, for tables."""
        return self.KIND.replace("_", " ")

    @property
    def where(self) -> str:
        """Path of the module that the edit is about, or of the first of them."""
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Site):
                return value.path
            if part.name in ("path", "paths"):
                return value if isinstance(value, str) else value[0]
        return ""

    def given(self, name: str, like: Tensor) -> Tensor:
        """A tensor of the edit, in the type and on the device of another."""
        return self.tensors[name].to(device=like.device, dtype=like.dtype).contiguous()

    def below(self, prefix: str) -> Self:
        """The same edit as seen from a module that holds this one's root at `prefix`."""
        return self.renamed(lambda path: f"{prefix}.{path}".strip(".")) if prefix else self

    def within(self, prefix: str) -> Self:
        """The same edit as seen from the module at `prefix`: the inverse of `below`."""
        return self.renamed(lambda path: "" if path == prefix else path.removeprefix(f"{prefix}.")) if prefix else self

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same edit with every path and name passed through a function."""
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
        """A JSON-ready description; tensors stand in it by name and SHA-256, not by value."""
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
        """The inverse of `to_json`, without the tensors (a checkpoint holds them as weights).

        Raises:
            CheckpointError: the kind is unknown, or the values don't fit it.
        """
        values = {name: value for name, value in data.items() if name not in ("edit", "tensors")}
        kind = KINDS.get(data["edit"])
        if kind is None:
            raise CheckpointError(f"plan: has an edit {data['edit']!r}; this version knows {', '.join(sorted(KINDS))}.")
        return TypeAdapter(kind).validate_python(values)


def apply_(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Cut a live model in place.

    Args:
        model: the model that the edits were made for.
        edits: in their order.

    Raises:
        BudgetError: an edit asks for more than there is.
        SiteNotFoundError: an edit names a module that the model does not have.
    """
    checked, names = _check_first(model, edits), edit_of(edits)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    smaller = dict(transform(tensors, edits))
    _reshape_checked_(model, edits, checked)
    model.load_state_dict(smaller, strict=False, assign=True)


def reshape_(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Give each edited module its new form; the new tensors are uninitialised, on the device of the old ones."""
    edits = tuple(edits)
    _reshape_checked_(model, edits, _check_first(model, edits))


def _check_first(model: nn.Module, edits: Iterable[Edit]) -> list[bool]:
    """Refuse what can be known to be bad before anything is carried out, so that the model stays whole.

    Returns:
        For each edit, whether it was checked; one about what an earlier edit will have made has to wait for its turn.
    """
    seen: set[str] = set()
    checked = []
    for edit in edits:
        paths = {name.rpartition(".")[0] for name in edit.affected_tensors()}
        above = {".".join(parts[:end]) for parts in (path.split(".") for path in paths) for end in range(1, len(parts))}
        checked.append(seen.isdisjoint(paths | above))
        if checked[-1]:
            edit.check(model)
        seen |= paths
    return checked


def _reshape_checked_(model: nn.Module, edits: Iterable[Edit], checked: Iterable[bool]) -> None:
    """Reshape edit after edit, checking at their turn those that had to wait."""
    for edit, known in zip(edits, checked, strict=True):
        if not known:
            edit.check(model)
        edit.reshape_(model)


def transform(tensors: Mapping[str, Tensor], edits: Iterable[Edit]) -> Iterator[tuple[str, Tensor]]:
    """Pass a state dict through, tensor by tensor, with the edited tensors cut or replaced.

    Args:
        tensors: names to tensors; each is read once, when its turn comes.
        edits: what to do, in their order.

    Yields:
        Every name of `tensors` in its order, or what edits have put in its place.
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
    """Names of the tensors that edits touch, with the last edit that does; a name may not be in the model."""
    return {name: edit for edit in edits for name in edit.affected_tensors()}


def resize_(module: nn.Module, *, dim: int, size: int, attribute: str) -> None:
    """Replace the parameters of a linear or norm layer by uninitialised ones of another size."""
    for name, old in list(module.named_parameters(recurse=False)):
        if dim < old.ndim:
            shape = [*old.shape[:dim], size, *old.shape[dim + 1 :]]
            fresh = torch.empty(shape, dtype=old.dtype, device=old.device)
            setattr(module, name, nn.Parameter(fresh, requires_grad=old.requires_grad))
    if hasattr(module, attribute):
        setattr(module, attribute, (size,) if attribute == "normalized_shape" else size)


def replace_(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module in the place of another one, in the mode that that one was in."""
    parent, _, name = path.rpartition(".")
    holder = submodule(model, parent)
    setattr(holder, name, new.train(submodule(holder, name).training))
