"""The pictures of the report: each function takes plain values and returns a `Picture`, or None without data.

Lines and bars become inline SVG whose colours are CSS variables of the page, so they follow light, dark and
print; patch maps become PNG. This module writes no file, and never touches pyplot's global state.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from torch import Tensor

from vitrim.errors import OutputError

# Stand-ins that no default of matplotlib uses; `_finish` swaps them for the page's CSS variables.
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
WIDTH_IN = 8.6
TILE_PX = 144
GAP_PX = 10
MAX_CURVE_POINTS = 120  # of a residual curve; keeps the page of a 64-block model under 3 MB


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One row of the patch picture: a PNG as a data URI."""

    label: str
    alt: str
    uri: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One section of the page: either `svg` (the inside of an svg element) or `strips`."""

    key: str
    title: str
    caption: str
    alt: str
    legend: tuple[tuple[str, str], ...] = ()
    view_box: str = ""
    svg: str = ""
    strips: tuple[Strip, ...] = ()


def format_number(value: float | None, *, name: str = "") -> str:
    """Write a number for people: 22.1M, 1.24B parameters or 4.61G MACs, 0.1234, and a dash for None."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if value < 9999.5:
        return f"{value:.2f}" if "%" in name else f"{value:.4g}"
    units = ((1e12, "T"), (1e9, "B" if name.lower().startswith("param") else "G"), (1e6, "M"), (1e3, "k"))
    scale, suffix = next(unit for unit in units if value >= 0.9995 * unit[0])
    return f"{value / scale:.3g}{suffix}"


def format_change(change: float, unit: str) -> str:
    """A signed number with a typographic minus, such as +48.3%."""
    return f"{change:+.1f}{unit}".replace("-", "\N{MINUS SIGN}")


def final_value(row: Mapping[str, float | None]) -> float | None:
    """The value at the end: after recovery, or after the cut where there was none."""
    after = row.get("after")
    return row.get("after_cut") if after is None else after


@matplotlib.rc_context(STYLE)
def draw_size(summary: Mapping[str, Mapping[str, float | None]]) -> Picture | None:
    """Bars of parameters and MACs, before and after.

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


@matplotlib.rc_context(STYLE)
def draw_latency(latency: Mapping[str, Mapping[int, float]]) -> Picture | None:
    """Bars of the time of one batch, a panel for each batch size.

    Args:
        latency: "before" and "after", each from batch size to milliseconds.
    """
    before, after = latency.get("before", {}), latency.get("after", {})
    sizes = [size for size in sorted(before) if size in after and before[size] > 0]
    pairs = [(f"Batch {size}", before[size], after[size]) for size in sizes]
    caption = "Milliseconds for one batch. Each panel has its own scale."
    return _draw_pairs(pairs, unit=" ms", key="latency", title="Latency", caption=caption)


@matplotlib.rc_context(STYLE)
def draw_block_errors(block_errors: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Lines of the relative error of each block's output, after the cut and at the end.

    Args:
        block_errors: one mapping for each block with "block", "after_cut" and "after" (None: not measured).
    """
    names = [str(row["block"]) for row in block_errors]
    figure, axes = _new_figure(1, height=2.7)
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
    axes[0].set_xlabel("block")
    return _finish(
        figure,
        key="blocks",
        title="Error by block",
        alt=f"Lines of relative error by block: {'; '.join(words)}.",
        caption="Relative squared error of each block's output tokens against the original model: "
        "0 is identical, 1 is no better than predicting the mean.",
        legend=tuple(legend),
    )


@matplotlib.rc_context(STYLE)
def draw_residuals(curves: Mapping[str, Mapping[str, Any]]) -> Picture | None:
    """One small panel for each site: what Gram-Schmidt leaves after k picks, with the cut marked.

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
    return _finish(
        figure,
        key="residuals",
        title="What the kept units span",
        alt=f"Residual curves of {len(curves)} sites, falling from 1; at the cut {range_left} is left.",
        caption="Share of the hidden units' energy not yet spanned after k picks, against k. "
        "The dot marks the cut: units kept, and the share left out.",
    )


@matplotlib.rc_context(STYLE)
def draw_recovery(points: Sequence[Mapping[str, float]]) -> Picture | None:
    """Lines of the held-out error and the training loss over the steps of recovery, on a log axis.

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
    figure, panels = _new_figure(len(series), height=2.5)
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
    return _finish(
        figure,
        key="recovery",
        title="Recovery",
        alt=f"Lines over the training steps, log scale: {'; '.join(words)}.",
        caption="Distillation from the original model, without labels. Logarithmic scale.",
    )


def draw_patches(
    images: Tensor | None,
    teacher: Tensor | None,
    student: Tensor | None,
    grid: tuple[int, int] | None,
) -> Picture | None:
    """Rows of image, teacher, student and difference; the first three principal components as colours.

    Args:
        images: pictures in 0..1, (B, 3, H, W), or None.
        teacher: patch tokens of the original, (B, N, D) with D >= 3.
        student: patch tokens of the smaller model, (B, N, D).
        grid: rows and columns of patches; their product is N.

    Raises:
        OutputError: the tokens do not fill the grid.
    """
    if teacher is None or student is None or grid is None:
        return None
    if teacher.shape != student.shape or teacher.shape[1] != grid[0] * grid[1]:
        raise OutputError(
            f"report: patch tokens are {tuple(teacher.shape)} and {tuple(student.shape)}; they must be equal"
            f" and fill a {grid[0]} x {grid[1]} grid. Pass patch tokens only, no CLS token."
        )
    teacher_rgb, student_rgb, difference = patch_colors(teacher, student)
    rows = [("Original", teacher_rgb), ("Smaller", student_rgb), ("Difference", difference)]
    strips = []
    if images is not None:
        strips.append(_strip("Image", list(images.detach().cpu().permute(0, 2, 3, 1)), smooth=True))
    strips += [_strip(label, [tokens.unflatten(0, grid) for tokens in colors]) for label, colors in rows]
    return Picture(
        key="patches",
        title="Patch tokens",
        alt=f"{len(teacher)} images and their patch tokens in both models, coloured by principal component.",
        caption="The first three principal components of the original's patch tokens as red, green and blue; "
        "the smaller model is drawn with the same projection and scale. Difference: distance between the two "
        "tokens, black at 0, brightest where it reaches the spread of the original's tokens.",
        strips=tuple(strips),
    )


def patch_colors(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Colours of patch tokens, by the projection and scaling of the teacher's.

    Args:
        teacher: patch tokens of the original, (B, N, D) with D >= 3.
        student: patch tokens of the smaller model, (B, N, D).

    Returns:
        Teacher, student and difference magnitude in 0..1, each (B, N, 3).
    """
    teacher, student = teacher.detach().cpu().double(), student.detach().cpu().double()
    mean = teacher.mean(dim=(0, 1))
    centred = (teacher - mean).flatten(0, 1)
    basis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)
    # Eigenvectors have no sign of their own: fix it, so that a rerun looks the same.
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    ranges = torch.quantile(centred @ basis, torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    span = (ranges[1] - ranges[0]).clamp_min(1e-12)
    colors = [(((tokens - mean) @ basis - ranges[0]) / span).clamp(0, 1) for tokens in (teacher, student)]
    spread = centred.square().sum(dim=1).mean().sqrt().clamp_min(1e-12)
    distance = ((student - teacher).norm(dim=-1) / spread).clamp(0, 1)
    shades = torch.from_numpy(matplotlib.colormaps["magma"](distance.numpy())[..., :3])
    return colors[0], colors[1], shades


def _new_figure(num_panels: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels in a row, with horizontal grid lines only."""
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
    """A line with a dot at each point, while there is room for dots."""
    marker = "o" if len(x) <= 40 else None
    axes.plot(x, y, color=color, linewidth=1.8, marker=marker, markersize=4.5, clip_on=False)


def _draw_pairs(pairs: Sequence[tuple[str, float, float]], *, unit: str = "", **texts: Any) -> Picture | None:
    """A panel for each (title, before, after): two bars, their values, the change."""
    if not pairs:
        return None
    figure, panels = _new_figure(len(pairs), height=1.25)
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
    return _finish(figure, alt=f"Bars, before and after. {'; '.join(words)}.", **texts)


def _draw_residual(axes: Axes, curve: Mapping[str, Any], label: str) -> float:
    """Fill one panel; returns the fraction left at the cut."""
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
    """'blocks.3.mlp' becomes 'block 3' where that still tells all paths apart."""
    numbers = {path: ".".join(part for part in path.split(".") if part.isdigit()) for path in paths}
    if not all(numbers.values()) or len(set(numbers.values())) < len(paths):
        return {path: path for path in paths}
    return {path: f"block {number}" for path, number in numbers.items()}


def _finish(figure: Figure, *, key: str, legend: tuple[tuple[str, str], ...] = (), **texts: Any) -> Picture:
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


def _strip(label: str, tiles: Sequence[Tensor], *, smooth: bool = False) -> Strip:
    """A row of tiles (rows, columns, 3) in 0..1 as one PNG with transparent gaps."""
    canvas = Image.new("RGBA", (len(tiles) * (TILE_PX + GAP_PX) - GAP_PX, TILE_PX), (0, 0, 0, 0))
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    for index, tile in enumerate(tiles):
        pixels = (tile.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        picture = Image.fromarray(pixels).resize((TILE_PX, TILE_PX), resample)
        canvas.paste(picture, (index * (TILE_PX + GAP_PX), 0))
    buffer = io.BytesIO()
    canvas.save(buffer, format="png", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Strip(label=label, alt=f"{label}: {len(tiles)} tiles in a row.", uri=uri)
