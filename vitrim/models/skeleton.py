"""Hyperformer, a transformer on sequences of skeletons, in its setting for NW-UCLA (own code, after the paper's facts).

A sequence is a tensor (3, T, V), so everything that takes images takes it. A block is attention among the joints of one
frame and then convolutions over time in four branches. Attention adds to the products of queries and keys three terms
of position: the distance in bones, the body part of the other joint (a hyperedge), and that part alone; a learned
matrix stands beside the attention map. As in the authors' code there is no MLP. Which joints form a part is ours.

Shapes: B sequences, C channels, T frames, V joints, H heads, E body parts.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from vitrim.errors import ModelError

Stream = Literal["joint", "bone", "joint-motion", "bone-motion"]
NUM_JOINTS = 20
# The joint that each of the 20 joints of NW-UCLA hangs on, from the shoulder centre (2), which hangs on itself.
PARENTS = (1, 2, 2, 2, 2, 4, 5, 6, 2, 8, 9, 10, 0, 12, 13, 14, 0, 16, 17, 18)
# Torso and head, left arm, right arm, left leg, right leg.
PARTS = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4)
STRIDED = (4, 7)  # blocks that halve the frames
PROJ_GROUPS, BRANCHES = 6, 4


class Hyperformer(nn.Module):
    """A classifier of skeleton sequences (B, 3, T, V).

    Args:
        num_classes: actions.
        num_heads: heads of 24 channels each; even, so that branches and groups come out whole, or 9.
        depth: blocks.
        num_frames: T, to which sequences are resampled.
        stream: what a sequence is turned into in front of the model.

    Raises:
        ModelError: a value can't be.
    """

    def __init__(
        self,
        num_classes: int = 10,
        num_heads: int = 9,
        depth: int = 10,
        num_frames: int = 52,
        stream: Stream = "joint",
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "num_heads": num_heads, "depth": depth, "num_frames": num_frames}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ModelError(f"hyperformer: {name} is {value!r}; use a whole number of 1 or more.")
        if stream not in get_args(Stream):
            raise ModelError(f"hyperformer: stream is {stream!r}; use one of {', '.join(get_args(Stream))}.")
        self.num_classes, self.num_features, self.num_prefix_tokens = num_classes, 24 * num_heads, 0
        self.num_frames, self.stream = num_frames, stream
        width = self.num_features
        self.data_bn = nn.BatchNorm1d(3 * NUM_JOINTS)
        strides = [2 if number in STRIDED else 1 for number in range(depth)]
        self.blocks = nn.ModuleList(Block(3 if n == 0 else width, width, num_heads, s) for n, s in enumerate(strides))
        self.head = nn.Linear(width, num_classes)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What an input is: the size of a sequence, and which stream of it."""
        return {"input_size": [3, self.num_frames, NUM_JOINTS], "skeleton": self.stream}

    def forward_features(self, joints_BCTV: Tensor) -> Tensor:
        """Return the channels of each joint in each frame that is left, as tokens (B, T V, C)."""
        if joints_BCTV.shape[1] != 3 or joints_BCTV.shape[3] != NUM_JOINTS:
            raise ModelError(f"hyperformer: got {tuple(joints_BCTV.shape)}; use (B, 3, T, {NUM_JOINTS}).")
        rows_BKT = joints_BCTV.permute(0, 3, 1, 2).flatten(1, 2)
        x_BCTV = self.data_bn(rows_BKT).unflatten(1, (NUM_JOINTS, 3)).permute(0, 2, 3, 1)
        for block in self.blocks:
            x_BCTV = block(x_BCTV)
        return x_BCTV.flatten(2).transpose(1, 2)

    def forward(self, joints_BCTV: Tensor) -> Tensor:
        """Return the scores of the actions (B, classes)."""
        return self.head(self.forward_features(joints_BCTV).mean(1))


class Block(nn.Module):
    """Attention among the joints of a frame, then convolutions over time, around both a shortcut."""

    def __init__(self, num_in: int, width: int, num_heads: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_in)
        self.attention = JointAttention(num_in, width, num_heads)
        self.pe_proj = nn.Conv2d(num_in, width, 1, bias=False)
        self.skip_proj = nn.Conv2d(num_in, width, 1, bias=False) if num_in != width else nn.Identity()
        self.temporal = TemporalBranches(width, stride)
        self.shortcut: nn.Module = nn.Identity()
        if num_in != width or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, width, 1, stride=(stride, 1)), nn.BatchNorm2d(width))
        part_VE = one_hot(torch.tensor(PARTS)).float()
        share_VE = part_VE / part_VE.sum(0)
        self.same_part_VV: Tensor
        self.register_buffer("same_part_VV", share_VE @ part_VE.T, persistent=False)

    def forward(self, x_BCTV: Tensor) -> Tensor:
        """Return as many frames, or half as many."""
        parts_BCTV = self.pe_proj(x_BCTV @ self.same_part_VV)  # a joint's body part: the mean over its joints
        normed_BCTV = self.norm(x_BCTV.movedim(1, -1)).movedim(-1, 1)
        among_BCTV = self.skip_proj(x_BCTV) + self.attention(normed_BCTV, parts_BCTV)
        return (self.temporal(among_BCTV) + self.shortcut(x_BCTV)).relu()


class JointAttention(nn.Module):
    """Attention among the joints of one frame, with terms for their distance and for body parts."""

    def __init__(self, num_in: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        hops_VV = bone_distances()
        self.hops_VV: Tensor
        self.register_buffer("hops_VV", hops_VV, persistent=False)
        self.q = nn.Conv2d(num_in, width, 1, bias=False)
        self.kv = nn.Conv2d(num_in, 2 * width, 1, bias=False)
        self.proj = nn.Conv2d(width, width, 1, groups=PROJ_GROUPS)
        self.distance = nn.Parameter(torch.zeros(int(hops_VV.max()) + 1, width))
        self.part_weight = nn.Parameter(torch.zeros(num_heads, width // num_heads))
        self.outer = nn.Parameter(torch.eye(NUM_JOINTS).repeat(num_heads, 1, 1))
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x_BCTV: Tensor, parts_BCTV: Tensor) -> Tensor:
        """Attend from each joint to all joints of its frame; `parts_BCTV` holds each joint's body part."""
        keys, values = self.kv(x_BCTV).chunk(2, dim=1)
        q, k, v, parts = (self._heads(each) for each in (self.q(x_BCTV), keys, values, parts_BCTV))  # (B, T, H, V, C)
        distance_HVVC = self.distance.unflatten(1, (self.num_heads, -1))[self.hops_VV].movedim(2, 0)
        scores = q @ (k + parts).mT + torch.einsum("bthvc,hvwc->bthvw", q, distance_HVVC)
        scores = scores + (parts * self.part_weight[:, None]).sum(-1)[..., None, :]
        mixed = (self.alpha * (self.scale * scores).softmax(-1) + self.outer) @ v
        return self.proj(mixed.permute(0, 2, 4, 1, 3).flatten(1, 2))

    def _heads(self, x_BCTV: Tensor) -> Tensor:
        return x_BCTV.unflatten(1, (self.num_heads, -1)).permute(0, 3, 1, 4, 2)


class TemporalBranches(nn.Module):
    """Four branches over time, a quarter of the channels each: two dilated convolutions, a maximum, and none."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        part, down = width // BRANCHES, (stride, 1)
        self.branches = nn.ModuleList()
        for dilation in (1, 2):
            pad = (2 * dilation, 0)
            over = nn.Conv2d(part, part, (5, 1), stride=down, padding=pad, dilation=(dilation, 1))
            self.branches.append(nn.Sequential(*_mixed(width, part), nn.ReLU(), over, nn.BatchNorm2d(part)))
        pool = nn.MaxPool2d((3, 1), stride=down, padding=(1, 0))
        self.branches.append(nn.Sequential(*_mixed(width, part), nn.ReLU(), pool, nn.BatchNorm2d(part)))
        self.branches.append(nn.Sequential(*_mixed(width, part, stride)))

    def forward(self, x_BCTV: Tensor) -> Tensor:
        """Return the branches side by side."""
        return torch.cat([branch(x_BCTV) for branch in self.branches], dim=1)


def _mixed(width: int, part: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(width, part, 1, stride=(stride, 1)), nn.BatchNorm2d(part)


def bone_distances() -> Tensor:
    """Return how many bones lie between each two joints, int64 (V, V)."""
    hops_VV = torch.full((NUM_JOINTS, NUM_JOINTS), NUM_JOINTS)
    hops_VV.fill_diagonal_(0)
    for joint, parent in enumerate(PARENTS):
        if joint != parent:
            hops_VV[joint, parent] = hops_VV[parent, joint] = 1
    for middle in range(NUM_JOINTS):
        hops_VV = torch.minimum(hops_VV, hops_VV[:, middle, None] + hops_VV[None, middle])
    return hops_VV
