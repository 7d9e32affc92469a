"""Text as rows of token ids of one length, for text encoders: an `ImageSet` of ids instead of pixels.

Running text is cut into full rows. Each stands between the special tokens that the tokenizer puts around a text and
holds no padding, so no attention mask is needed anywhere. Sentences shorter than a row share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrim.data.images import ImageSet, open_images
from vitrim.data.shards import shard_urls
from vitrim.data.sources import items_of
from vitrim.errors import DataError

ALLOWED = "pass a .txt file, a folder of them, or a list of strings"


def open_texts(source: Any, *, tokenizer: Any, num_tokens: int, limit: int | None = None) -> ImageSet:
    """Open text as rows of token ids.

    Args:
        source: a text file, a folder of `.txt` files, or strings.
        tokenizer: a transformers tokenizer.
        num_tokens: length of a row, special tokens included; shorter only if the whole text is.
        limit: return only this many rows, evenly spaced.

    Returns:
        Rows of int64 ids (num_tokens,), without labels.

    Raises:
        DataError: the source is missing, holds no text, or is none of these kinds.
    """
    texts, name = _texts(source)
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    ids = [token for row in found for token in row]
    if not ids:
        raise DataError(f"{name}: holds no text; {ALLOWED}.")
    first, last = _around(tokenizer, next(text for text, row in zip(texts, found, strict=True) if row))
    room = min(num_tokens - len(first) - len(last), len(ids))
    starts = range(0, len(ids) - room + 1, room)
    rows: list[Tensor] = [torch.tensor([*first, *ids[start : start + room], *last]) for start in starts]
    return open_images(ImageSet(items_of(rows, name), name=name), limit=limit)


def is_text(source: Any) -> bool:
    """Whether a source is text: a `.txt` file, a folder that holds some, or strings that name no shards."""
    if isinstance(source, str | Path):
        path = Path(source)
        return path.suffix == ".txt" or (path.is_dir() and any(path.rglob("*.txt")))
    return (
        isinstance(source, Sequence) and len(source) > 0 and isinstance(source[0], str) and shard_urls(source) is None
    )


def _texts(source: Any) -> tuple[list[str], str]:
    """Return pieces of text and a name to show."""
    if not isinstance(source, str | Path):
        return list(source), "texts"
    path = Path(source)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as text ({error}); {ALLOWED}.") from None
    return lines, str(path)


def _around(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after a text."""
    whole, ids = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
    start = next(i for i in range(len(whole) - len(ids) + 1) if whole[i : i + len(ids)] == ids)
    return whole[:start], whole[start + len(ids) :]
