"""A small pose model, and stick figures: pictures of one person each, as a parquet file or as COCO's JSON."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from vitrim.models.joints import COCO, LSP, JointLayout
from vitrim.models.load import load_model
from vitrim.models.origin import Reading
from vitrim.models.pose import PoseConfig

TINY = PoseConfig(image_size=(32, 24), patch_size=(4, 3), stem_width=4, stem_depth=1, width=16, depth=3, num_heads=2)

# Where the joints of a person stand, in tenths of the picture.
STANDING = (
    (4, 9),
    (4, 7),
    (4, 5),
    (6, 5),
    (6, 7),
    (6, 9),
    (2, 5),
    (3, 4),
    (4, 3),
    (6, 3),
    (7, 4),
    (8, 5),
    (5, 3),
    (5, 1),
)


def tiny():
    """A pose model in which all matters: also the biases and norms that start at 0 and 1."""
    torch.manual_seed(0)
    model, _ = load_model("vitrim/pose-small", reading=Reading(model_args=TINY.to_json()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def colour(joint: int) -> tuple[int, int, int]:
    """A colour of its own for each joint."""
    return (250, 14 * joint, 240 - 14 * joint)


def figure(
    seed: int, layout: JointLayout = LSP, size: tuple[int, int] = (60, 80)
) -> tuple[Image.Image, list[list[float]]]:
    """A picture and its joints (x, y)."""
    draw = random.Random(seed)
    places = [STANDING[joint % 14] for joint in range(len(layout.names))]
    joints = [[x * size[0] / 10 + draw.uniform(-3, 3), y * size[1] / 10 + draw.uniform(-3, 3)] for x, y in places]
    picture = Image.new("RGB", size, (20, 30, 20))
    pen = ImageDraw.Draw(picture)
    for first, second in layout.bones:
        pen.line([*joints[first], *joints[second]], fill=(90, 90, 90), width=1)
    for joint, (x, y) in enumerate(joints):
        pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour(joint))
    return picture, joints


def write_parquet(path: Path, count: int = 12, rows: list | None = None) -> Path:
    """A parquet file of figures; `rows` are other values for its joints."""
    import pyarrow as pa
    from pyarrow import parquet

    made = [figure(seed) for seed in range(count)]
    images = []
    for picture, _ in made:
        picture.save(buffer := io.BytesIO(), "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    values = [[value for joint in joints for value in joint] for _, joints in made] if rows is None else rows
    parquet.write_table(pa.table({"image": images, "keypoints": values}), path)
    return path


def write_coco(folder: Path, count: int = 3, **changed) -> Path:
    """COCO's JSON and its images: two persons in each, and one without joints."""
    (folder / "val").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, people = [], []
    for number in range(count):
        pair = [figure(2 * number + side, COCO) for side in (0, 1)]
        both = Image.new("RGB", (120, 80))
        for side, (picture, joints) in enumerate(pair):
            both.paste(picture, (60 * side, 0))
            values = [value for x, y in joints for value in (x + 60 * side, y, 2)]
            person = {"image_id": number, "keypoints": values, "num_keypoints": 17, "area": 900.0}
            people.append({**person, "bbox": [60 * side, 0, 60, 80], "iscrowd": 0, **changed})
        people.append({"image_id": number, "keypoints": [0] * 51, "num_keypoints": 0, "bbox": [0, 0, 9, 9]})
        both.save(folder / "val" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
    path = folder / "annotations" / "persons.json"
    path.write_text(json.dumps({"images": images, "annotations": people}), encoding="utf-8")
    return path
