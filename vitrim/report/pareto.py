"""Draws the picture of a comparison: the cost of each run against its distance from the original, and the front.

Points are told apart by number and shape, and those that no other beats are filled. It takes plain values and reads
no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitrim.report.figures import AFTER, INK, MUTED, finish, new_figure, styled
from vitrim.report.picture import Picture, format_number

MARKERS = "os^DvPX"
SIDES = (
    (10, 8),
    (10, 0),
    (-10, 0),
    (0, 11),
    (0, -11),
    (-10, -10),
    (20, 0),
    (-20, 0),
)  # where a label may stand, in points from its point; off the line first
ROOM = (10, 9)  # what a label takes, in points


@dataclass(frozen=True, kw_only=True)
class Point:
    """Run in the picture, or with number 0 the original; less is better in both `cost` and `error`."""

    number: int
    name: str
    cost: float
    error: float


def front_of(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats (at most as large in both values, smaller in one), the cheapest first."""
    kept = [
        point
        for point in points
        if not any(
            other.cost <= point.cost
            and other.error <= point.error
            and (other.cost, other.error) != (point.cost, point.error)
            for other in points
        )
    ]
    return sorted(kept, key=lambda point: (point.cost, point.error))


@styled
def draw_pareto(panels: Mapping[str, Sequence[Point]]) -> Picture | None:
    """Draw runs by cost and relative error, a panel for each cost; None without any.

    Args:
        panels: the name of the cost to its points.
    """
    if not panels:
        return None
    figure, grid = new_figure(len(panels), height=3.4)
    words = []
    for axes, (title, points) in zip(grid, panels.items(), strict=True):
        front = front_of(points)
        axes.plot(
            [p.cost for p in front],
            [p.error for p in front],
            color=AFTER,
            linewidth=0.9,
            linestyle=(0, (3, 3)),
            drawstyle="steps-post",
        )
        for point in points:
            _draw_point(axes, point, on_front=point in front)
        axes.margins(x=0.12, y=0.12)
        axes.set_title(title, loc="left")
        axes.xaxis.set_major_formatter(lambda value, _, name=title: format_number(value, name=name))
        axes.set_ylabel("relative error" if axes is grid[0] else "")
        told = [_told(point, title, on_front=point in front) for point in points]
        words.append(f"{title}: {'; '.join(told)}")
    figure.draw_without_rendering()  # settles the scales: on them it depends which labels would meet
    for axes, points in zip(grid, panels.values(), strict=True):
        _label(axes, points)
    return finish(
        figure,
        key="pareto",
        title="Cost against closeness",
        alt=f"Points of cost and relative error. {'. '.join(words)}.",
        caption="Relative squared error of all output tokens against the original, over what a run costs; down and "
        "to the left is better. Filled points, on the dashed line: no other is as cheap and as close. The star is the "
        "original.",
    )


def _draw_point(axes: Any, point: Point, *, on_front: bool) -> None:
    """Draw a star for the original, and for a run the shape of its number, filled where it is on the front."""
    edge, fill = (AFTER, AFTER) if on_front else (MUTED, "none")
    marker, size = MARKERS[(point.number - 1) % len(MARKERS)], 7
    if not point.number:
        edge, fill, marker, size = INK, INK, "*", 11
    axes.plot([point.cost], [point.error], marker=marker, markersize=size, color=edge, markerfacecolor=fill, zorder=3)


def _told(point: Point, title: str, *, on_front: bool) -> str:
    name = f"{point.number} {point.name}" if point.number else point.name
    return f"{name} {format_number(point.cost, name=title)} and {point.error:.3g}{', on the front' if on_front else ''}"


def _label(axes: Any, points: Sequence[Point]) -> None:
    """Write each run's number beside its point, on the first side on which it meets no other label and no point."""
    scale = 72 / axes.figure.dpi
    places = [axes.transData.transform((point.cost, point.error)) * scale for point in points]
    taken = [(place[0], place[1]) for place in places]
    for point, place in zip(points, places, strict=True):
        if not point.number:
            continue
        spots = [(place[0] + dx, place[1] + dy) for dx, dy in SIDES]
        free = [n for n, spot in enumerate(spots) if not any(_meet(spot, other, place) for other in taken)]
        side = free[0] if free else 0
        taken.append(spots[side])
        axes.annotate(
            str(point.number),
            (point.cost, point.error),
            SIDES[side],
            textcoords="offset points",
            ha="center",
            va="center",
            color=INK,
            fontweight="bold",
        )


def _meet(spot: tuple[float, float], other: tuple[float, float], own: Any) -> bool:
    """Return whether a label would cover another label, or another point than its own."""
    if other == (own[0], own[1]):
        return False
    return abs(spot[0] - other[0]) < ROOM[0] and abs(spot[1] - other[1]) < ROOM[1]
