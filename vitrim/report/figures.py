"""Draws the lines and bars of the report: each function turns plain values into a `Picture`, or into None without data.

Drawings become inline SVG whose colours are CSS variables of the page, so they follow light, dark and print. Pictures
made of pixels are in `tiles.py`. This module writes no file, and never touches pyplot's global state.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vitrim.report.picture import Picture, final_value, format_change, format_number

# Stand-ins that no default of matplotlib uses; `finish` swaps them for the page's CSS variables.
INK, MUTED, RULE, BEFORE, CUT, AFTER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", BEFORE: "before", CUT: "cut", AFTER: "after"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.titlesize": 9,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    **{f"{axis}tick.{kind}.size": 0 for axis in "xy" for kind in ("major", "minor")},
    "grid.color": RULE,
    "grid.linewidth": 0.6,
}
styled = matplotlib.rc_context(STYLE)  # decorates every function that draws
WIDTH_IN = 8.6
MAX_CURVE_POINTS = 120  # of a residual curve; keeps the page of a 64-block model under 3 MB
MAX_CLASSES = 16  # in the picture of answers


@styled
def draw_size(summary: Mapping[str, Mapping[str, float | None]]) -> Picture | None:
    """Draw bars of parameters and MACs, before and after.

    Args:
        summary: row name to values; the rows "parameters" and "MACs per image" are drawn.
    """
    pairs = []
    for name, title in (("parameters", "Parameters"), ("MACs per image", "MACs per image")):
        row = summary.get(name, {})
        before, after = row.get("before"), final_value(row)
        if before and after is not None:
            pairs.append((title, before, after))
    caption = "MACs are multiply-accumulate operations of one forward pass for one image."
    return _draw_pairs(pairs, key="size", title="Size", caption=caption)


@styled
def draw_latency(latency: Mapping[str, Mapping[int, float]]) -> Picture | None:
    """Draw bars of the time of one batch, a panel for each batch size.

    Args:
        latency: "before" and "after", each from batch size to milliseconds.
    """
    before, after = latency.get("before", {}), latency.get("after", {})
    sizes = [size for size in sorted(before) if size in after and before[size] > 0]
    pairs = [(f"Batch {size}", before[size], after[size]) for size in sizes]
    caption = "Milliseconds for one batch, medians of passes by turns. Each panel has its own scale; "
    caption += "sizes whose times were noisy are left out."
    return _draw_pairs(pairs, unit=" ms", key="latency", title="Latency", caption=caption)


@styled
def draw_block_errors(block_errors: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Draw lines of the relative error of each block's output, after the cut and at the end.

    Args:
        block_errors: one mapping for each block with "block", "after_cut" and "after" (None: not measured).
    """
    names = [str(row["block"]) for row in block_errors]
    figure, axes = new_figure(1, height=2.7)
    words, legend = [], []
    for field, color, label in (("after_cut", CUT, "after the cut"), ("after", AFTER, "after recovery")):
        points = [(i, row[field]) for i, row in enumerate(block_errors) if row.get(field) is not None]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        _draw_line(axes[0], x, y, color=color)
        words.append(f"{label} from {y[0]:.3g} in the first to {y[-1]:.3g} in the last, at most {max(y):.3g}")
        legend.append((VARIABLES[color], label))
    if not words:
        return None
    step = math.ceil(len(names) / 24)
    axes[0].set_xticks(range(0, len(names), step), names[::step])
    axes[0].set_ylim(bottom=0)
    axes[0].tick_params(axis="x", pad=9)  # clear of the 0 of the other axis
    axes[0].set_xlabel("block")
    return finish(
        figure,
        key="blocks",
        title="Error by block",
        alt=f"Lines of relative error by block: {'; '.join(words)}.",
        caption="Relative squared error of each block's output tokens against the original model: "
        "0 is identical, 1 is no better than predicting the mean.",
        legend=tuple(legend),
    )


@styled
def draw_residuals(curves: Mapping[str, Mapping[str, Any]]) -> Picture | None:
    """Draw a small panel for each site: the energy that Gram-Schmidt leaves after k picks, with the cut marked.

    Args:
        curves: site path to "residual" (fractions from 1 down), "num_units" and "cut"; "picks" says after
            how many picks each fraction holds; where it is absent they are even from 0 to num_units.
    """
    curves = {path: curve for path, curve in curves.items() if len(curve["residual"]) > 1}
    if not curves:
        return None
    num_columns = min(8 if len(curves) > 24 else 6, len(curves))
    num_rows = math.ceil(len(curves) / num_columns)
    figure = Figure(figsize=(WIDTH_IN, 1.28 * num_rows + 0.3), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).ravel()
    labels = _short_labels(list(curves))
    pairs = zip(grid, curves.items(), strict=False)
    left = [_draw_residual(axes, curve, labels[path]) for axes, (path, curve) in pairs]
    for axes in grid[len(curves) :]:
        axes.set_axis_off()
    range_left = f"between {100 * min(left):.3g}% and {100 * max(left):.3g}%"
    return finish(
        figure,
        key="residuals",
        title="What the kept units span",
        alt=f"Residual curves of {len(curves)} sites, falling from 1; at the cut {range_left} is left.",
        caption="Share of the hidden units' energy not yet spanned after k picks, against k. "
        "The dot marks the cut: units kept, and the share left out.",
    )


@styled
def draw_widths(sites: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Draw bars of the hidden units of each MLP, before and kept; None where all kept the same share.

    Args:
        sites: one mapping for each cut MLP with "path", "width_before" and "width_after".
    """
    kept = [site["width_after"] / site["width_before"] for site in sites]
    if not kept or max(kept) - min(kept) < 0.005:
        return None
    figure, (axes,) = new_figure(1, height=2.5)
    labels = _short_labels([site["path"] for site in sites])
    places, names = range(len(sites)), [labels[site["path"]] for site in sites]
    axes.bar(places, [site["width_before"] for site in sites], color=BEFORE, alpha=0.5, width=0.8)
    axes.bar(places, [site["width_after"] for site in sites], color=AFTER, width=0.52)
    step = math.ceil(len(names) / 24)
    axes.set_xticks(places[::step], [name.removeprefix("block ") for name in names[::step]])
    axes.set_xlabel("block" if names[0].startswith("block ") else "MLP")
    least, most = (names[kept.index(pick(kept))] for pick in (min, max))
    words = f"from {min(kept):.0%} in {least} to {max(kept):.0%} in {most}"
    return finish(
        figure,
        key="widths",
        title="Widths",
        alt=f"Bars of the hidden units of {len(sites)} MLPs, before and after; kept {words}.",
        caption=f"Hidden units of each MLP. They do not all keep the same share: {words}.",
        legend=((VARIABLES[BEFORE], "before"), (VARIABLES[AFTER], "kept")),
    )


@styled
def draw_answers(answers: Mapping[str, Sequence[int]]) -> Picture | None:
    """Draw bars of the right answers that each class has gained and lost.

    Args:
        answers: class numbers of the images: their "labels", and each model's answers "before" and "after".
    """
    columns = (answers.get(key, ()) for key in ("labels", "before", "after"))
    rows = [row for row in zip(*columns, strict=True) if row[0] >= 0]
    if not rows:
        return None
    gained = Counter(label for label, before, after in rows if before != label == after)
    lost = Counter(label for label, before, after in rows if before == label != after)
    mistakes = Counter((label, after) for label, before, after in rows if before == label != after).most_common(3)
    said = f"Of {len(rows)} held-out images with a label, {lost.total()} lost the right answer and "
    said += f"{gained.total()} gained it."
    if mistakes:
        pairs = (f"class {label} taken for {after} ({count})" for (label, after), count in mistakes)
        said += f" Most frequent new mistakes, and their number: {', '.join(pairs)}."
    texts: dict[str, Any] = {"key": "answers", "title": "Right answers gained and lost", "caption": said}
    changed = gained + lost
    if not changed:
        return Picture(alt="", **texts)
    shown = sorted(label for label, _ in changed.most_common(MAX_CLASSES))
    if len(changed) > len(shown):
        texts["caption"] += f" The {len(shown)} classes of most change of {len(changed)} are shown."
    figure, (axes,) = new_figure(1, height=2.4)
    axes.bar(range(len(shown)), [gained[label] for label in shown], color=AFTER, width=0.52)
    axes.bar(range(len(shown)), [-lost[label] for label in shown], color=CUT, width=0.52)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_xlim(-0.6, max(len(shown), 8) - 0.4)  # few bars don't become boards
    axes.set_xticks(range(len(shown)), [str(label) for label in shown])
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0f}"))
    axes.set_xlabel("class")
    words = ", ".join(f"class {label} gained {gained[label]} and lost {lost[label]}" for label in shown)
    legend = ((VARIABLES[AFTER], "gained, above the line"), (VARIABLES[CUT], "lost, below it"))
    return finish(figure, alt=f"Bars of right answers: {words}.", legend=legend, **texts)


@styled
def draw_recovery(points: Sequence[Mapping[str, float]]) -> Picture | None:
    """Draw lines of the held-out error and the training loss over the steps of recovery, on a log axis.

    Args:
        points: mappings with "step" and "relative_error" or "loss"; both kinds may be mixed.
    """
    kinds = (("relative_error", "Relative error, held-out images", AFTER), ("loss", "Training loss", BEFORE))
    series = []
    for field, label, color in kinds:
        found = sorted((p["step"], p[field]) for p in points if p.get(field) is not None and p[field] > 0)
        if found:
            series.append((label, color, found))
    if not series:
        return None
    figure, panels = new_figure(len(series), height=2.5)
    for axes, (label, color, found) in zip(panels, series, strict=True):
        x, y = zip(*found, strict=True)
        _draw_line(axes, x, y, color=color)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_title(label, loc="left")
        axes.set_xlabel("step")
    words = [f"{label} from {found[0][1]:.3g} to {found[-1][1]:.3g}" for label, _, found in series]
    return finish(
        figure,
        key="recovery",
        title="Recovery",
        alt=f"Lines over the training steps, log scale: {'; '.join(words)}.",
        caption="Distillation from the original model, without labels. Logarithmic scale.",
    )


def new_figure(num_panels: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """Make a figure of equal panels in a row, with horizontal grid lines only."""
    figure = Figure(figsize=(WIDTH_IN, height))
    figure.set_layout_engine("constrained", w_pad=0.12)
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
    return figure, panels


def _draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], *, color: str) -> None:
    """Draw a line with a dot at each point, while there is room for dots."""
    marker = "o" if len(x) <= 40 else None
    axes.plot(x, y, color=color, linewidth=1.8, marker=marker, markersize=4.5, clip_on=False)


def _draw_pairs(pairs: Sequence[tuple[str, float, float]], *, unit: str = "", **texts: Any) -> Picture | None:
    """Draw a panel for each (title, before, after): two bars, their values, the change."""
    if not pairs:
        return None
    figure, panels = new_figure(len(pairs), height=1.25)
    words = []
    for axes, (title, before, after) in zip(panels, pairs, strict=True):
        labels = [format_number(float(f"{value:.3g}"), name=title) + unit for value in (before, after)]
        words.append(f"{title} from {labels[0]} to {labels[1]}")
        axes.barh([1, 0], [before, after], color=[BEFORE, AFTER], height=0.62)
        axes.set_yticks([1, 0], ["before", "after"] if axes is panels[0] else ["", ""])
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(0, 1.32 * max(before, after))
        axes.set_title(title, loc="left")
        axes.set_title(format_change(100 * (after / before - 1), "%"), loc="right", color=AFTER)
        for height, value, label in ((1, before, labels[0]), (0, after, labels[1])):
            axes.annotate(label, (value, height), (5, 0), textcoords="offset points", va="center", color=INK)
    return finish(figure, alt=f"Bars, before and after. {'; '.join(words)}.", **texts)


def _draw_residual(axes: Axes, curve: Mapping[str, Any], label: str) -> float:
    """Draw one panel; returns the fraction left at the cut."""
    residual = np.asarray(curve["residual"], dtype=float)
    picks = np.asarray(curve.get("picks") or np.linspace(0, curve["num_units"], len(residual)), dtype=float)
    left = round(float(np.interp(curve["cut"], picks, residual)), 6)  # below is rounding, not energy
    shown = np.unique(np.linspace(0, len(picks) - 1, MAX_CURVE_POINTS).round().astype(int))
    axes.fill_between(picks[shown], residual[shown], color=BEFORE, alpha=0.25, linewidth=0)
    axes.plot(picks[shown], residual[shown], color=MUTED, linewidth=1.1)
    axes.plot([curve["cut"]] * 2, [0, 1], color=AFTER, linewidth=0.9, linestyle=(0, (2, 2)))
    axes.plot([curve["cut"]], [left], color=AFTER, marker="o", markersize=4, clip_on=False)
    for y, note, color in ((0.95, f"{curve['cut']} kept", INK), (0.75, f"{100 * left:.2g}% left", MUTED)):
        axes.text(0.97, y, note, transform=axes.transAxes, ha="right", va="top", fontsize=7.5, color=color)
    axes.set_xlim(0, curve["num_units"])
    axes.set_ylim(0, 1.04)
    axes.set_xticks([0, curve["num_units"]], ["0", str(curve["num_units"])], fontsize=7.5)
    for tick, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        tick.set_horizontalalignment(side)
    axes.set_yticks([0, 1], ["0", "1"], fontsize=7.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(label, loc="left", fontsize=8, pad=3)
    return left


def _short_labels(paths: Sequence[str]) -> dict[str, str]:
    """Shorten paths such as 'blocks.3.mlp' to 'block 3' where that still tells all of them apart."""
    numbers = {path: ".".join(part for part in path.split(".") if part.isdigit()) for path in paths}
    if not all(numbers.values()) or len(set(numbers.values())) < len(paths):
        return {path: path for path in paths}
    return {path: f"block {number}" for path, number in numbers.items()}


def finish(figure: Figure, *, key: str, legend: tuple[tuple[str, str], ...] = (), **texts: Any) -> Picture:
    """Turn a figure into a `Picture`: CSS variables for colours, ids that no other picture has."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing, bbox_inches="tight", pad_inches=0.03)
    root = re.search(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>(.*)</svg>', buffer.getvalue(), flags=re.DOTALL)
    assert root is not None
    body = re.sub(r"<style.*?</style>", "", root[2], flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", body)
    for stand_in, variable in VARIABLES.items():
        body = body.replace(stand_in, f"var(--{variable})")
    return Picture(key=key, legend=legend, view_box=root[1], svg=body, **texts)
