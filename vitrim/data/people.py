"""Where joints stand: a column of a parquet file, or COCO's JSON of persons with a folder of images beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitrim.data.decode import decode, to_rgb
from vitrim.data.folders import is_image, walk
from vitrim.data.labels import Classes
from vitrim.errors import DAMAGED, DataError
from vitrim.models.joints import LAYOUTS

MARGIN = 1.25  # of a person's box, on each side together
FARTHEST = 1e5  # pixels; a joint further out is an error


class CocoPeople:
    """The persons of COCO's JSON, each cut out of its image by its box and a margin; black where the image ends."""

    classes: Classes | None = None

    def __init__(self, path: Path) -> None:
        self._files, found = _read_coco(path)
        self._people = [person for person in found if person.get("num_keypoints", 1) and not person.get("iscrowd")]
        if not self._people:  # as in COCO's captions and boxes
            raise DataError(f"{path}: no image has a person with joints; pass COCO's person_keypoints file.")
        values = [person.get("keypoints") for person in self._people]
        for row, person in enumerate(self._people):
            box, area = person.get("bbox"), person.get("area") or 0.0
            if not isinstance(box, list) or len(box) != 4 or not all(map(_is_place, box)) or not min(box[2:]) > 0:
                raise DataError(f"{path}: person {row} has the box {box!r:.60}; use x, y, width and height.")
            if person.get("image_id") not in self._files:
                raise DataError(f"{path}: person {row} is in image {person.get('image_id')!r}, which has no file.")
            if not isinstance(area, int | float) or not 0 <= area < math.inf:
                raise DataError(f"{path}: person {row} has the area {area!r:.40}; use pixels, 0 or more.")
        areas = [person.get("area") or 0.0 for person in self._people]
        self.joints = joints_of(values, str(path), areas)
        corners_N2 = torch.tensor([_around(person["bbox"])[:2] for person in self._people], dtype=torch.float32)
        self.joints[..., :2] -= corners_N2[:, None]

    def __len__(self) -> int:
        return len(self._people)

    def read(self, row: int) -> tuple[Image.Image, int]:
        """Return a person's picture, and no label."""
        person = self._people[row]
        return to_rgb(decode(self._files[person["image_id"]])).crop(_around(person["bbox"])), -1

    def where(self, row: int) -> str:
        """Return what to call a picture in a message."""
        return f"person {row}, {self._files[self._people[row]['image_id']]}"


def joints_of(values: Sequence[Any], where: str, areas: Sequence[float] = ()) -> Tensor:
    """Return lists of numbers, x, y (and whether it is known) of each joint, as joints (N, K, 4).

    These are x, y, 1 for a joint that is known, and the person's size: the root of the area, 0 where that is not known.

    Raises:
        DataError: a row has no person, another number of joints, or a value that is no place in a picture.
    """
    sizes = {2 * count: (count, 2) for count in LAYOUTS} | {3 * count: (count, 3) for count in LAYOUTS}
    rows = []
    for number, row in enumerate(values):
        if not row:
            raise DataError(f"{where}: row {number} has no person; leave it out.")
        if not isinstance(row, Sequence) or isinstance(row, str | bytes):
            raise DataError(f"{where}: row {number} has {type(row).__name__} for joints; use a list (x, y, ...).")
        if len(row) not in sizes or len(row) != len(values[0]):
            wanted = " or ".join(map(str, sizes if number == 0 else [len(values[0])]))
            raise DataError(f"{where}: row {number} has {len(row)} numbers for joints; use {wanted} (x, y, ...).")
        if not all(map(_is_place, row)):
            raise DataError(f"{where}: row {number} has joints out of range; use pixels.")
        rows.append(row)
    count, parts = sizes[len(rows[0])]
    joints_NKX = torch.tensor(rows, dtype=torch.float32).view(len(rows), count, parts)
    known_NK1 = joints_NKX[..., 2:] > 0 if parts == 3 else torch.ones(len(rows), count, 1)
    empty = (known_NK1.sum((1, 2)) == 0).nonzero().flatten().tolist()
    if empty:
        raise DataError(f"{where}: row {empty[0]} has no person, since no joint is known; leave it out.")
    if bool(((joints_NKX[..., :2] >= 0) & (joints_NKX[..., :2] <= 1)).all()):
        raise DataError(f"{where}: all joints are within 0..1, so shares of the picture; use pixels.")
    size_N = torch.tensor(areas or [0.0] * len(rows)).sqrt()
    return torch.cat([joints_NKX[..., :2], known_NK1, size_N[:, None, None].expand(-1, count, 1)], dim=-1)


def _read_coco(path: Path) -> tuple[dict[Any, Path], list[dict[str, Any]]]:
    """Return the files of images by number, and the persons.

    Images are below the folder of the JSON, or, where that is called annotations, below the one above.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: Path(image["file_name"]).name for image in said["images"]}
        people = [{**person, "image_id": person.get("image_id")} for person in said["annotations"]]
        hash(tuple(person["image_id"] for person in people))  # a list is no number of an image
    except DAMAGED as error:
        raise DataError(f"{path}: is not COCO's JSON ({error!r:.80}); it has 'images' and 'annotations'.") from None
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    wanted = set(names.values())
    files = {file.name: file for _, inside in walk(root) for file in inside if is_image(file) and file.name in wanted}
    return {number: files[name] for number, name in names.items() if name in files}, people


def _is_place(value: Any) -> bool:
    """Return whether a value is a place in a picture, along one axis."""
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < FARTHEST


def _around(box: Sequence[float]) -> tuple[int, int, int, int]:
    """Return a box (x, y, width, height) with its margin, as left, top, right and bottom in whole pixels."""
    x, y, width, height = box
    extra = ((MARGIN - 1) / 2 * width, (MARGIN - 1) / 2 * height)
    left, top = math.floor(x - extra[0]), math.floor(y - extra[1])
    return left, top, math.ceil(x + width + extra[0]), math.ceil(y + height + extra[1])
