"""Nested tensors and plain values as JSON, with numbers in the place of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

# Marks of a tensor, a mapping (as pairs: JSON would make its keys strings) and a tuple in the JSON of the nesting.
TENSOR, MAPPING, TUPLE = "tensor", "mapping", "tuple"


def packed(value: Any, tensors: list[Tensor]) -> Any:
    """Turn nested values into JSON values; tensors are appended to a list and replaced by their numbers."""
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {TENSOR: len(tensors) - 1}
    if isinstance(value, Mapping):
        return {MAPPING: [[key, packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [packed(item, tensors) for item in value]
        return {TUPLE: items} if isinstance(value, tuple) else items
    return value


def unpacked(value: Any, tensor_at: Callable[[str, Sequence[Any]], Tensor], keys: Sequence[Any] = ()) -> Any:
    """Rebuild nested values: the inverse of `packed`.

    Args:
        value: what `packed` returned, or JSON made of it.
        tensor_at: called with the number of a tensor and the keys that lead to it, in the order of the numbers.
        keys: the keys that lead to the value.
    """
    if isinstance(value, list):
        return [unpacked(item, tensor_at, (*keys, index)) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == TENSOR:
        return tensor_at(str(content), keys)
    if kind == TUPLE:
        return tuple(unpacked(content, tensor_at, keys))
    return {key: unpacked(item, tensor_at, (*keys, key)) for key, item in content}
