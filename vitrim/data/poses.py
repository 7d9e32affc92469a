"""Pictures of one person each, with the joints of the person: brought to a model's input, and augmented together.

A picture is scaled into the input's frame as a whole, as timm's crop mode "border" does it. Augmentation turns and
scales within the frame (SDPose's: rotation, scale, half a body, flips that swap left and right). Joints are (K, 4): x
and y in pixels, whose centres are whole numbers, 1 where the joint is known and inside, else 0, and the person's size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitrim.data.decode import READ_ERRORS
from vitrim.data.images import Batch, ImageSet, collate
from vitrim.errors import DataError
from vitrim.models.joints import JointLayout, layout_of
from vitrim.models.prefix import num_prefix_tokens

HALF_BODY, MIN_JOINTS, MARGIN = 0.3, 8, 1.5  # how often half a body is shown, of how many joints or more, and around it
TURNED, DEGREES, ZOOM = 0.6, 45, 0.35  # how often a picture is turned; spread of the angle, and of the scale


class PoseSet(Dataset):
    """Pictures with joints, item i is (image_CHW, joints_K4), or None if it can't be read.

    Args:
        images: a source whose rows have joints.
        preprocessing: `input_size`, `mean` and `std` of the model.
        num_joints: that the model knows.
        seed: of the augmentation, which is a function of it, the epoch and the item; None for none.

    Raises:
        DataError: the images have no joints, or not as many as the model.
    """

    def __init__(
        self, images: ImageSet, preprocessing: Mapping[str, Any], num_joints: int, *, seed: int | None = None
    ) -> None:
        joints_NKX = images.joints
        if joints_NKX is None:
            raise DataError(
                f"{images.name}: has no joints; pass a parquet file with a column 'keypoints', or COCO's JSON of "
                "persons with a folder of images beside it."
            )
        if joints_NKX.shape[1] != num_joints:
            raise DataError(f"{images.name}: has {joints_NKX.shape[1]} joints a person, and the model {num_joints}.")
        self.images, self.name, self.seed, self.epoch = images, images.name, seed, 0
        self.layout = layout_of(num_joints, images.name)
        self.size: tuple[int, int] = tuple(preprocessing["input_size"][-2:])  # type: ignore[assignment]
        self.mean, self.std = (torch.tensor(preprocessing[key]).view(-1, 1, 1) for key in ("mean", "std"))
        self.fill = tuple(round(255 * value) for value in preprocessing["mean"])

    @property
    def has_labels(self) -> bool:
        """Whether there is something to learn: the joints."""
        return True

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that augmentation draws for."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | None:
        from torchvision.transforms.functional import to_tensor

        try:
            picture, joints_K4 = self.images.person(index)
        except READ_ERRORS as error:
            self.images.leave_out(index, str(error))
            return None
        picture, joints_K4 = framed(picture, joints_K4, self.size, self.fill)
        if self.seed is not None:
            draw = random.Random(f"{self.seed}/{self.epoch}/{index}")
            picture, joints_K4 = augmented(picture, joints_K4, self.layout, draw, self.fill)
        return (to_tensor(picture) - self.mean) / self.std, known_inside(joints_K4, self.size)

    def batches(self, batch_size: int = 64) -> list[Batch]:
        """Return all items in order; the labels of a batch are its joints (B, K, 4)."""
        items = (self[index] for index in range(len(self)))
        starts = range(0, len(self), batch_size)
        return [collate([next(items) for _ in range(min(batch_size, len(self) - start))]) for start in starts]


def poses_of(model: nn.Module, images: ImageSet, *, seed: int | None = None, needed: bool = False) -> PoseSet | None:
    """Return a source as pictures with joints for a pose model; None for other models, and for images without joints.

    Args:
        model: of any kind.
        images: the source.
        seed: of the augmentation; None for none.
        needed: refuse images without joints for a pose model.

    Raises:
        DataError: the joints are not as many as the model's, or there are none and they are needed.
    """
    if not hasattr(model, "joint_tokens") or (images.joints is None and not needed):
        return None
    return PoseSet(images, model.preprocessing, num_prefix_tokens(model), seed=seed)  # type: ignore[arg-type]


def framed(
    picture: Image.Image, joints_K4: Tensor, size: tuple[int, int], fill: tuple[int, ...]
) -> tuple[Image.Image, Tensor]:
    """Scale a picture so that all of it is in a frame (height, width), in the middle; the joints go with it."""
    ratio = max(picture.height / size[0], picture.width / size[1])
    height, width = round(picture.height / ratio), round(picture.width / ratio)
    factors = torch.tensor([width / picture.width, height / picture.height])
    left, top = (size[1] - width) // 2, (size[0] - height) // 2
    frame = Image.new("RGB", (size[1], size[0]), fill)
    frame.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    moved_K2 = (joints_K4[:, :2] + 0.5) * factors + torch.tensor([left, top]) - 0.5
    return frame, torch.cat([moved_K2, joints_K4[:, 2:3], joints_K4[:, 3:] / ratio], dim=1)


def augmented(
    picture: Image.Image, joints_K4: Tensor, layout: JointLayout, draw: random.Random, fill: tuple[int, ...]
) -> tuple[Image.Image, Tensor]:
    """Show half of a body, turn, scale and flip, each at random."""
    middle = torch.tensor([picture.width / 2, picture.height / 2])
    centre, zoom = middle, 1 / min(max(draw.gauss(1, ZOOM), 1 - ZOOM), 1 + ZOOM)
    shown_K2 = _half(joints_K4, layout, draw) if draw.random() < HALF_BODY else None
    if shown_K2 is not None:
        low, high = shown_K2.amin(0) + 0.5, shown_K2.amax(0) + 0.5
        centre = (low + high) / 2
        zoom *= float((2 * middle / (MARGIN * (high - low)).clamp(min=1)).min())
    degrees = min(max(draw.gauss(0, DEGREES), -2 * DEGREES), 2 * DEGREES) if draw.random() < TURNED else 0.0
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    back = turn.T / zoom  # from a place in the new picture to one in the old
    (a, b), (d, e) = back.tolist()
    c, f = (centre - back @ middle).tolist()
    picture = picture.transform(
        picture.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR, fillcolor=fill
    )
    moved_K2 = (joints_K4[:, :2] + 0.5 - centre) @ (zoom * turn).T + middle - 0.5
    joints_K4 = torch.cat([moved_K2, joints_K4[:, 2:3], joints_K4[:, 3:] * zoom], dim=1)
    return flipped(picture, joints_K4, layout) if draw.random() < 0.5 else (picture, joints_K4)


def flipped(picture: Image.Image, joints_K4: Tensor, layout: JointLayout) -> tuple[Image.Image, Tensor]:
    """Mirror a picture; what was the left joint is the right one then."""
    mirrored_K4 = joints_K4[layout.swapped].clone()
    mirrored_K4[:, 0] = picture.width - 1 - mirrored_K4[:, 0]
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mirrored_K4


def known_inside(joints_K4: Tensor, size: tuple[int, int]) -> Tensor:
    """Return joints with 0 in the third column for those outside of a frame (height, width)."""
    limit = torch.tensor([size[1], size[0]]) - 0.5
    inside_K = ((joints_K4[:, :2] >= -0.5) & (joints_K4[:, :2] < limit)).all(1)
    known_K = (joints_K4[:, 2] > 0) & inside_K
    return torch.cat([joints_K4[:, :2], known_K[:, None], joints_K4[:, 3:]], dim=1)


def _half(joints_K4: Tensor, layout: JointLayout, draw: random.Random) -> Tensor | None:
    """Return the known joints of one half of a body, where many are known, and three or more of the half."""
    known = joints_K4[:, 2] > 0
    upper = torch.zeros_like(known)
    upper[list(layout.upper)] = True
    halves = [joints_K4[known & half, :2] for half in (upper, ~upper)]
    halves = [half for half in halves if len(half) > 2]
    return draw.choice(halves) if int(known.sum()) >= MIN_JOINTS and halves else None
