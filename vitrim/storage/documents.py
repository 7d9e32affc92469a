"""JSON documents beside the tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with a fixed layout, so that equal values give equal bytes; numbers that are not finite become null.

    NaN and Infinity are no JSON, and most readers refuse a document that holds them.
    """
    path.write_text(json.dumps(finite(value), indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """Return nested values with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def not_finite(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted path of each number in nested values that is not finite."""
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from not_finite(item, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path
