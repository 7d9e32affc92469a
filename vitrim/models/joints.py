"""Joints of people: which are left and right of each other, the torso that distances are measured by, and the bones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vitrim.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class JointLayout:
    """An order of joints.

    Attributes:
        names: of all joints.
        pairs: joints that a flip of the image swaps.
        torso: a shoulder and the hip across, whose distance is the torso's diagonal.
        upper: joints of the upper half of the body.
        bones: joints that a drawing joins.
        sigmas: how far annotators differ at each joint, as COCO measured it; () where nobody has.
    """

    names: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    torso: tuple[int, int]
    upper: tuple[int, ...]
    bones: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...] = ()

    @property
    def swapped(self) -> list[int]:
        """Return for each joint the one that stands at its place once the image is flipped."""
        order = list(range(len(self.names)))
        for left, right in self.pairs:
            order[left], order[right] = right, left
        return order


LSP = JointLayout(
    names=(
        *("right ankle", "right knee", "right hip", "left hip", "left knee", "left ankle"),
        *("right wrist", "right elbow", "right shoulder", "left shoulder", "left elbow", "left wrist"),
        *("neck", "head top"),
    ),
    pairs=((0, 5), (1, 4), (2, 3), (6, 11), (7, 10), (8, 9)),
    torso=(9, 2),
    upper=(6, 7, 8, 9, 10, 11, 12, 13),
    bones=(
        *((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 12)),
        *((12, 9), (9, 10), (10, 11), (12, 13), (8, 2), (9, 3)),
    ),
)
COCO = JointLayout(
    names=(
        *("nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow"),
        *("right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee"),
        *("left ankle", "right ankle"),
    ),
    pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
    torso=(5, 12),
    upper=tuple(range(11)),
    bones=(
        *((0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12), (11, 12)),
        *((11, 13), (13, 15), (12, 14), (14, 16)),
    ),
    sigmas=(
        *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072),
        *(0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
    ),
)
LAYOUTS: Mapping[int, JointLayout] = {len(layout.names): layout for layout in (LSP, COCO)}


def layout_of(num_joints: int, where: str) -> JointLayout:
    """Return the order of joints of people with this many.

    Raises:
        ModelError: no order of that many joints is known.
    """
    if num_joints not in LAYOUTS:
        raise ModelError(f"{where}: has {num_joints} joints; use 14 (Leeds Sports Pose) or 17 (COCO).")
    return LAYOUTS[num_joints]
