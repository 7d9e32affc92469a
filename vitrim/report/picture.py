"""Pictures as the page takes them, and numbers as people read them; plain values, nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Row of the patch picture: a PNG as a data URI."""

    label: str
    alt: str
    uri: str


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Image as a data URI; `agreed` where both models found it."""

    alt: str
    uri: str
    agreed: bool = True


@dataclass(frozen=True, kw_only=True)
class Search:
    """Query of the neighbour picture, and its nearest images in each model, nearest first."""

    query: Tile
    original: tuple[Tile, ...]
    smaller: tuple[Tile, ...]
    agreed: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Section of the page: a drawing, strips or searches under a title and a caption; or words alone.

    Attributes:
        key: id of the section, and the start of all ids in `svg`.
        title: heading.
        caption: what is shown, in a sentence or two.
        alt: the picture in words.
        legend: pairs of a CSS variable and a label.
        view_box: of the svg element.
        svg: the inside of the svg element.
        strips: rows of pixels.
        searches: queries with the images found.
    """

    key: str
    title: str
    caption: str
    alt: str
    legend: tuple[tuple[str, str], ...] = ()
    view_box: str = ""
    svg: str = ""
    strips: tuple[Strip, ...] = ()
    searches: tuple[Search, ...] = ()


def format_number(value: float | None, *, name: str = "") -> str:
    """Format a number for people: 22.1M, 1.24B parameters or 4.61G MACs, 0.1234, and a dash for None."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if value < 9999.5:
        return f"{value:.2f}" if "%" in name else f"{value:.4g}"
    units = ((1e12, "T"), (1e9, "B" if name.lower().startswith("param") else "G"), (1e6, "M"), (1e3, "k"))
    scale, suffix = next(unit for unit in units if value >= 0.9995 * unit[0])
    return f"{value / scale:.3g}{suffix}"


def format_change(change: float, unit: str) -> str:
    """Format a signed number with a typographic minus, such as +48.3%."""
    return f"{change:+.1f}{unit}".replace("-", "\N{MINUS SIGN}")


def final_value(row: Mapping[str, float | None]) -> float | None:
    """Return the value at the end: after recovery, or after the cut where there was none."""
    after = row.get("after")
    return row.get("after_cut") if after is None else after
