"""Draws the pictures of the report that are made of pixels: patch tokens as colours, and the nearest images of a query.

They are self-contained data URIs: PNG where colours must be exact, JPEG for photographs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vitrim.errors import OutputError
from vitrim.report.picture import Picture, Search, Strip, Tile

TILE_PX = 144
GAP_PX = 10
THUMBNAIL_PX = 96
ORIGINAL_LINE, SMALLER_LINE = (255, 170, 0), (0, 110, 255)
BONE, MARGIN_PX, JOINT_PX = (128, 128, 128), 16, 8  # JOINT_PX: radius of the joint whose features differ most


def draw_patches(
    images: Tensor | None,
    teacher: Tensor | None,
    student: Tensor | None,
    grid: tuple[int, int] | None,
) -> Picture | None:
    """Draw rows of image, teacher, student and difference; the first three principal components as colours.

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
    """Turn patch tokens into colours, by the projection and scaling of the teacher's.

    Args:
        teacher: patch tokens of the original, (B, N, D) with D >= 3.
        student: patch tokens of the smaller model, (B, N, D).

    Returns:
        Teacher, student and difference magnitude in 0..1, each (B, N, 3).
    """
    from matplotlib import colormaps

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
    shades = torch.from_numpy(colormaps["magma"](distance.numpy())[..., :3])
    return colors[0], colors[1], shades


def draw_neighbours(found: Mapping[str, Any]) -> Picture | None:
    """Draw rows of a query and its nearest images in both models.

    Args:
        found: as `ReportData.neighbours` describes it; empty where nothing was searched.
    """
    if not found:
        return None

    def tile(image: int, note: str = "", *, agreed: bool = True) -> Tile:
        label = found["labels"][image]
        name = f"Image {image}" + (f", class {label}" if label >= 0 else "") + note
        return Tile(alt=name, uri=_jpeg(found["thumbnails"][image]), agreed=agreed)

    searches = []
    for row in found["queries"]:
        both = set(row["original"]) & set(row["smaller"])
        sides = [
            tuple(tile(i, ", in both" if i in both else f", {who} only", agreed=i in both) for i in row[who])
            for who in ("original", "smaller")
        ]
        agreed = f"{len(both)} of {len(row['original'])}"
        searches.append(Search(query=tile(row["image"]), original=sides[0], smaller=sides[1], agreed=agreed))
    k, share = len(found["queries"][0]["original"]), found["overlap"]
    overlap = "" if share is None else f"On average {share:.0%} are the same in both models; t"
    return Picture(
        key="neighbours",
        title="Nearest neighbours",
        alt=f"{len(searches)} queries and their {k} nearest images in both models.",
        caption=f"The {k} nearest of {found['num_images']} held-out images by pooled vector, nearest first. "
        f"{overlap or 'T'}he queries go from the least agreement to the most. "
        "Solid frame: found by both; dashed frame: by one model only.",
        searches=tuple(searches),
    )


def draw_poses(found: Mapping[str, Any]) -> Picture | None:
    """Draw the joints that both models see over pictures of people.

    Args:
        found: as `ReportData.poses` describes it; empty for models of other kinds.
    """
    if not found:
        return None
    rows = zip(found["images"], found["before"], found["after"], strict=True)
    people = [_person(image, before, after, found["bones"]) for image, before, after in rows]
    half = -(-len(people) // 2)
    parts = [part for part in (people[:half], people[half:]) if part]
    return Picture(
        key="poses",
        title="Joints",
        alt=f"{len(people)} people, with the joints that the original sees and those that the smaller model sees.",
        caption="Thick orange lines join the joints that the original sees, thin blue ones those that the smaller one "
        "sees: where both agree, the thin line runs within the thick one. Held-out images of the first batch where "
        "they are furthest apart, the furthest first.",
        strips=tuple(_joined("People", part, columns=half) for part in parts),
    )


def _person(image_CHW: Tensor, before_K3: Tensor, after_K3: Tensor, bones: Sequence[tuple[int, int]]) -> Image.Image:
    """Draw a picture of a person, as wide as a tile, and both models' joints."""
    scale = TILE_PX / image_CHW.shape[2]
    pixels = (image_CHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels).resize((TILE_PX, round(scale * image_CHW.shape[1])), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for joints_K3, colour, width in ((before_K3, ORIGINAL_LINE, 5), (after_K3, SMALLER_LINE, 2)):
        places = ((joints_K3[:, :2] + 0.5) * scale).tolist()
        for first, second in bones:
            pen.line([*places[first], *places[second]], fill=colour, width=width)
    return picture


def draw_frames(found: Mapping[str, Any]) -> Picture | None:
    """Draw the frames of skeletons in which both models' features differ most.

    Args:
        found: as `ReportData.frames` describes it; empty for models of other kinds.
    """
    if not found:
        return None
    most = max(float(row["apart"].max()) for row in found["sequences"])
    strips = []
    for row in found["sequences"]:
        of_frames = zip(row["frames"], row["joints"], row["apart"] / most, strict=True)
        label = f"{row['before']}, then {row['after']}" + (f" (is {row['label']})" if row["label"] >= 0 else "")
        strips.append(_joined(label, [_skeleton(*each, found["bones"]) for each in of_frames]))
    moved = "; the input is motion alone, shown on somebody who stands" if "motion" in found["stream"] else ""
    return Picture(
        key="frames",
        title="Frames",
        alt=f"{len(strips)} sequences, of each the frames of its skeleton in which the two models differ most.",
        caption="Held-out sequences of the first batch in which the features of both models are furthest apart, one a "
        f"row, and of each the frames where they are, with their numbers (0 to {found['num_frames'] - 1}){moved}. The "
        "larger a joint, the more its features differ. Beside them: the class that the original sees, then the smaller "
        "model's, and in brackets the right one.",
        strips=tuple(strips),
    )


def _skeleton(number: int, joints_V2: Tensor, apart_V: Tensor, bones: Sequence[tuple[int, int]]) -> Image.Image:
    """Draw one frame, whose joints are as large as their features differ, 0..1 of the most."""
    picture = Image.new("RGBA", (TILE_PX, TILE_PX), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    pen.text((0, 0), str(number), fill=BONE)
    places = (MARGIN_PX + joints_V2 * (TILE_PX - 2 * MARGIN_PX)).tolist()
    for first, second in bones:
        pen.line([*places[first], *places[second]], fill=BONE, width=2)
    for (x, y), share in zip(places, apart_V.tolist(), strict=True):
        radius = JOINT_PX * share
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=SMALLER_LINE)
    return picture


def _strip(label: str, tiles: Sequence[Tensor], *, smooth: bool = False) -> Strip:
    """Draw tiles (rows, columns, 3) in 0..1 in a row."""
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    pixels = [(tile.clamp(0, 1) * 255).round().to(torch.uint8).numpy() for tile in tiles]
    return _joined(label, [Image.fromarray(tile).resize((TILE_PX, TILE_PX), resample) for tile in pixels])


def _joined(label: str, pictures: Sequence[Image.Image], *, columns: int | None = None) -> Strip:
    """Put pictures of one size in a row of so many, or of as many as they are, as one PNG with transparent gaps."""
    size = ((columns or len(pictures)) * (TILE_PX + GAP_PX) - GAP_PX, pictures[0].height)
    canvas = Image.new("RGBA", size, (0, 0, 0, 0))
    for index, picture in enumerate(pictures):
        canvas.paste(picture, (index * (TILE_PX + GAP_PX), 0))
    buffer = io.BytesIO()
    canvas.save(buffer, format="png", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Strip(label=label, alt=f"{label}: {len(pictures)} tiles in a row.", uri=uri)


def _jpeg(image_CHW: Tensor) -> str:
    """Encode a thumbnail as a data URI; a smaller image is enlarged."""
    pixels = (image_CHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, format="jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
