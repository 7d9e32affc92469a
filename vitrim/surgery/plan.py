"""A plan: all decisions about a model, as data that can be saved, compared and applied again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from vitrim.errors import CheckpointError
from vitrim.surgery.drop_blocks import DropBlocks
from vitrim.surgery.edits import Edit
from vitrim.surgery.keep_units import KeepUnits


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An ordered list of edits and how they were found; the same inputs and seed give the same bytes."""

    edits: tuple[Edit, ...]
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description of the plan."""
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
        """Rebuild a plan from `to_json`, without its tensors.

        Raises:
            CheckpointError: the document is not a plan of a format this version reads.
        """
        try:
            if data["format"] != "vitrim-plan/1":
                raise CheckpointError(f"plan: format is {data['format']!r}; this version reads 'vitrim-plan/1'.")
            edits = tuple(Edit.from_json(edit) for edit in data["edits"])
            options, versions = dict(data["options"]), dict(data["versions"])
            return cls(edits=edits, method=data["method"], options=options, seed=data["seed"], versions=versions)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"plan: damaged ({where}: {first['msg']}); write it again with compress.") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"plan: damaged or incomplete ({error!r}); write it again with compress.") from None

    def new_path(self, path: str) -> str | None:
        """Return the path that one of the uncut model's modules has after the plan, None if its block was taken out."""
        for edit in self.edits:
            path_now = edit.new_path(path) if isinstance(edit, DropBlocks) else path
            if path_now is None:
                return None
            path = path_now
        return path

    @property
    def widths(self) -> dict[str, int]:
        """Return the hidden width of each MLP that is cut, after its last cut, by path."""
        return {edit.site.path: edit.width for edit in self.edits if isinstance(edit, KeepUnits)}

    def describe(self) -> dict[str, Any]:
        """Return what was cut, for metrics and report: widths before and after, and every other edit in words."""
        cuts = [edit for edit in self.edits if isinstance(edit, KeepUnits)]
        before = {edit.site.path: edit.site.d_hidden for edit in reversed(cuts)}
        return {
            "widths": {path: [before[path], width] for path, width in self.widths.items()},
            "edits": [
                {"edit": edit.KIND.replace("_", " "), "where": edit.where, "what": edit.describe()}
                for edit in self.edits
                if not isinstance(edit, KeepUnits)
            ],
        }

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON: equal plans have equal hashes."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def below(self, prefix: str) -> Plan:
        """Return the plan with paths from a larger model, which holds this one at `prefix`."""
        return replace(self, edits=tuple(edit.below(prefix) for edit in self.edits))

    def without_tensors(self) -> Plan:
        """Return the plan without tensors: enough to build the model."""
        return replace(self, edits=tuple(replace(edit, tensors={}) for edit in self.edits))
