"""The frozen values that the parts of vitrim hand to each other.

A method looks at `MlpWeights` and `Stats` and returns edits; a `Plan` is an ordered list of edits. Nothing here
changes a module (that is `surgery.py`) and nothing here reads a file (that is `checkpoint.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from vitrim.errors import CheckpointError

MlpKind = Literal["plain", "packed_gated", "split_gated"]


@dataclass(frozen=True, kw_only=True)
class MlpSite:
    """One MLP of a model: where it is and what its tensors are called.

    `value`, `gate`, `output` and `norm` are dotted module paths from the root of the model. A packed gated MLP
    has no `gate` of its own: its `value` projection holds the gate rows first, then the value rows. `has_bias`
    speaks of the input projections; `block` is the transformer block around the MLP.
    """

    path: str
    kind: MlpKind
    d_model: int
    d_hidden: int
    value: str
    output: str
    gate: str | None = None
    norm: str | None = None
    has_bias: bool = True
    block: str = ""

    @property
    def num_groups(self) -> int:
        """Rows of the value projection per hidden unit: 2 when gate and value are packed in one matrix."""
        return 2 if self.kind == "packed_gated" else 1

    def below(self, prefix: str) -> MlpSite:
        """The same site as seen from a module that holds this one's root at `prefix`."""
        return self._renamed(lambda path: f"{prefix}.{path}".strip("."))

    def within(self, prefix: str) -> MlpSite:
        """The same site as seen from the module at `prefix`: the inverse of `below`."""
        return self._renamed(lambda path: "" if path == prefix else path.removeprefix(f"{prefix}."))

    def _renamed(self, rename: Callable[[str], str]) -> MlpSite:
        paths = ("path", "value", "output", "gate", "norm", "block")
        names = {key: rename(getattr(self, key)) for key in paths if getattr(self, key) is not None}
        return replace(self, **names)

    @property
    def label(self) -> str:
        """The kind in words, for tables."""
        return self.kind.replace("_", " ") + (" + norm" if self.norm else "")


@dataclass(frozen=True, kw_only=True)
class MlpWeights:
    """The canonical view of a site's weights: H hidden units, D model width."""

    value_HD: Tensor
    output_DH: Tensor
    gate_HD: Tensor | None = None
    value_bias_H: Tensor | None = None
    gate_bias_H: Tensor | None = None
    output_bias_D: Tensor | None = None

    @property
    def num_units(self) -> int:
        """How many hidden units the site has."""
        return self.value_HD.shape[0]

    @property
    def input_rows(self) -> Tensor:
        """Each unit's input weights as one row: its value row, behind its gate row where it has one."""
        if self.gate_HD is None:
            return self.value_HD
        return torch.cat([self.gate_HD, self.value_HD], dim=1)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Sums over calibration tokens at one site, in float64: H hidden units, D model width.

    `hidden` is the input of the output projection, `target` what the projection should put out. All are plain sums
    (not means), so that batches can be added up; `num_tokens` turns them into means.
    """

    num_tokens: int
    hidden_H: Tensor
    hidden_HH: Tensor
    target_D: Tensor
    cross_HD: Tensor
    target_square: float


@dataclass(frozen=True, kw_only=True)
class SiteView:
    """All that a method may look at to decide about one MLP: plain matrices and sums, no module.

    `stats` and `scale_D` (the layer scale that follows the MLP) are None where nothing was measured.
    """

    site: MlpSite
    weights: MlpWeights
    num_keep: int
    generator: Generator
    stats: Stats | None = None
    scale_D: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class KeepUnits:
    """Keep these hidden units of an MLP, in this order, and cut the others.

    `repaired` maps full tensor names to values that replace the sliced originals: the output projection after least
    squares, or all the tensors of the site after a refit.
    """

    site: MlpSite
    keep: tuple[int, ...]
    repaired: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """How many hidden units stay."""
        return len(self.keep)

    def below(self, prefix: str) -> KeepUnits:
        """The same edit as seen from a module that holds this one's root at `prefix`."""
        if not prefix:
            return self
        repaired = {f"{prefix}.{name}": tensor for name, tensor in self.repaired.items()}
        return replace(self, site=self.site.below(prefix), repaired=repaired)

    def within(self, prefix: str) -> KeepUnits:
        """The same edit as seen from the module at `prefix`: the inverse of `below`."""
        if not prefix:
            return self
        repaired = {name.removeprefix(f"{prefix}."): tensor for name, tensor in self.repaired.items()}
        return replace(self, site=self.site.within(prefix), repaired=repaired)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready description; repaired tensors stand in it by name and SHA-256, not by value."""
        site = {name: value for name, value in self.site.__dict__.items() if value is not None}
        hashes = {name: tensor_sha256(tensor) for name, tensor in sorted(self.repaired.items())}
        return {"edit": "keep_units", "site": site, "keep": list(self.keep), "repaired": hashes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KeepUnits:
        """The inverse of `to_json`, without the repaired tensors (a checkpoint holds them as weights)."""
        return cls(site=MlpSite(**data["site"]), keep=tuple(int(i) for i in data["keep"]))


Edit = KeepUnits


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An ordered list of edits and how they came about; the same inputs and seed give the same bytes."""

    edits: tuple[Edit, ...]
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def widths(self) -> dict[str, int]:
        """Hidden width of each edited site after the cut."""
        return {edit.site.path: edit.width for edit in self.edits}

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready description of the plan."""
        return {
            "format": "vitrim-plan/1",
            "method": self.method,
            "options": dict(self.options),
            "seed": self.seed,
            "versions": dict(self.versions),
            "edits": [edit.to_json() for edit in self.edits],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`.

        Raises:
            CheckpointError: the document is not a plan of a format this version reads.
        """
        try:
            if data["format"] != "vitrim-plan/1":
                raise CheckpointError(f"plan: format is {data['format']!r}; this version reads 'vitrim-plan/1'.")
            edits = tuple(KeepUnits.from_json(edit) for edit in data["edits"])
            return cls(edits=edits, **{key: data[key] for key in ("method", "options", "seed", "versions")})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"plan: damaged or incomplete ({error!r}); write it again with compress.") from None

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON: equal plans, equal hash."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def below(self, prefix: str) -> Plan:
        """The same plan as seen from a module that holds this one's root at `prefix`."""
        return replace(self, edits=tuple(edit.below(prefix) for edit in self.edits))

    def without_tensors(self) -> Plan:
        """The reshape half alone: indices and widths, no repaired tensors."""
        return replace(self, edits=tuple(replace(edit, repaired={}) for edit in self.edits))


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a vision encoder puts out: B images, N patch tokens, D width.

    `pooled_BD` is the CLS token, or the mean of the patch tokens where a model has none. `patches_BND` is None for a
    model that puts out one vector an image.
    """

    pooled_BD: Tensor
    patches_BND: Tensor | None = None


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's raw bytes, dtype and shape."""
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{flat.dtype}{tuple(flat.shape)}".encode())
    digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
