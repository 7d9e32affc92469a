"""Human pose from tokens (TokenPose's layout, as SDPose uses it): one token a joint, read out as a heatmap.

A convolutional stem makes features of a quarter of the image's size, patches of these and one token for each joint go
through the blocks, and a head turns each joint's token into a heatmap. Blocks are in timm's form, so that everything
that finds MLPs and attentions finds these. A block adds the positions of the patches itself, the first one excepted,
in front of which they are added already: so whoever calls block after block runs the model as it is.

Shapes: K joints, N patches, D model width; heatmaps are (B, K, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from vitrim.errors import ModelError
from vitrim.models.joints import layout_of

STRIDE = 4  # of the stem, and of the heatmaps
PREPROCESSING = {  # in timm's words
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "border",
}
SMALLEST = 1e-6  # value of a heatmap below which its logarithm says nothing


@dataclass(frozen=True, kw_only=True)
class PoseConfig:
    """Sizes of a pose model: input and patches are (height, width), patches in features of the stem."""

    num_joints: int = 14
    image_size: tuple[int, int] = (256, 192)
    patch_size: tuple[int, int] = (4, 3)
    stem_width: int = 64
    stem_depth: int = 4
    width: int = 192
    depth: int = 6
    num_heads: int = 8
    mlp_ratio: float = 3.0

    @property
    def heatmap_size(self) -> tuple[int, int]:
        """Height and width of a heatmap."""
        return self.image_size[0] // STRIDE, self.image_size[1] // STRIDE

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.heatmap_size[0] // self.patch_size[0], self.heatmap_size[1] // self.patch_size[1]

    def to_json(self) -> dict[str, Any]:
        """Return the sizes as JSON-ready values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "pose") -> PoseConfig:
        """Return the sizes that `to_json` wrote, checked.

        Raises:
            ModelError: a size is unknown or does not fit the others.
        """
        unknown = set(data) - {each.name for each in fields(cls)}
        if unknown:
            raise ModelError(f"{where}: unknown size {', '.join(sorted(unknown))}; use the fields of PoseConfig.")
        sizes: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        found = cls(**sizes)
        _check_kinds(found, where)
        layout_of(found.num_joints, where)
        steps = [STRIDE * side for side in found.patch_size]
        if any(side % step for side, step in zip(found.image_size, steps, strict=True)):
            raise ModelError(f"{where}: image_size {list(found.image_size)} is not made of patches of {steps} pixels.")
        if found.width % 4 or found.width % found.num_heads:
            raise ModelError(f"{where}: width {found.width}; use a multiple of 4 and of the {found.num_heads} heads.")
        return found


def _check_kinds(sizes: PoseConfig, where: str) -> None:
    """Refuse a size that is no positive number, or no pair of them.

    Raises:
        ModelError: there is one.
    """
    for name, value in asdict(sizes).items():
        is_pair, wanted = name in ("image_size", "patch_size"), "a whole number of 1 or more"
        kinds: tuple[type, ...] = (int,)
        if is_pair:
            wanted = "height and width in whole numbers, such as [128, 96]"
        elif name == "mlp_ratio":
            kinds, wanted = (int, float), "a number above 0"
        values = value if isinstance(value, tuple) else (value,)
        if len(values) != 1 + is_pair or not all(type(each) in kinds and 0 < each < math.inf for each in values):
            raise ModelError(f"{where}: {name} is {value!r:.40}; use {wanted}.")
    if not round(sizes.mlp_ratio * sizes.width):
        raise ModelError(f"{where}: mlp_ratio {sizes.mlp_ratio:g} of width {sizes.width} is no hidden unit; use more.")


CONFIGS: Mapping[str, PoseConfig] = {
    "pose-t": PoseConfig(),
    "pose-small": PoseConfig(
        image_size=(128, 96), patch_size=(4, 3), stem_width=32, stem_depth=1, width=96, num_heads=4
    ),
}


def pose_model(**sizes: Any) -> PoseModel:
    """Build a pose model from the fields of `PoseConfig`, as JSON holds them.

    Raises:
        ModelError: a size is unknown or does not fit the others.
    """
    return PoseModel(PoseConfig.from_json(sizes))


class PoseModel(nn.Module):
    """A model whose forward turns images (B, 3, H, W) into heatmaps (B, K, H/4, W/4).

    `preprocessing` says how pictures become its input: scaled as a whole into the frame.

    Example:
        >>> import torch
        >>> model = PoseModel(PoseConfig(image_size=(32, 24), stem_depth=1, width=32, depth=2)).eval()
        >>> model(torch.zeros(1, 3, 32, 24)).shape
        torch.Size([1, 14, 8, 6])
    """

    positions: Tensor

    def __init__(self, config: PoseConfig) -> None:
        super().__init__()
        self.config, self.num_prefix_tokens, self.num_classes = config, config.num_joints, 0
        self.preprocessing = {**PREPROCESSING, "input_size": (3, *config.image_size)}
        self.patch_embed = PatchEmbed(config)
        self.joint_tokens = nn.Parameter(torch.zeros(1, config.num_joints, config.width))
        positions_ND = sine_positions(*config.grid, config.width)
        none_KD = positions_ND.new_zeros(config.num_joints, config.width)
        positions_TD = torch.cat([none_KD, positions_ND])
        self.register_buffer("positions", positions_TD, persistent=False)
        self.blocks = nn.Sequential(
            *(PoseBlock(config, positions_TD if number else None) for number in range(config.depth))
        )
        self.norm = nn.LayerNorm(config.width)
        self.heatmap_head = HeatmapHead(config)
        self.apply(_start_)
        if not self.joint_tokens.is_meta:
            nn.init.trunc_normal_(self.joint_tokens, std=0.02)

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """Return the tokens of joints and patches (B, K + N, D) after the final norm."""
        patches_BND = self.patch_embed(images_BCHW)
        tokens_BKD = self.joint_tokens.expand(patches_BND.shape[0], -1, -1)
        return self.norm(self.blocks(torch.cat([tokens_BKD, patches_BND], dim=1) + self.positions))

    def forward_head(self, tokens_BTD: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the heatmaps of the joints' tokens, or with `pre_logits` these tokens in one vector (B, K D)."""
        joints_BKD = tokens_BTD[:, : self.num_prefix_tokens]
        return joints_BKD.flatten(1) if pre_logits else self.heatmap_head(joints_BKD)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the heatmaps."""
        return self.forward_head(self.forward_features(images_BCHW))


class PatchEmbed(nn.Module):
    """Two convolutions of stride 2, residual blocks, and a linear map of each patch of what they give."""

    def __init__(self, config: PoseConfig) -> None:
        super().__init__()
        width = config.stem_width
        halves = (_conv(3, width, 3, stride=2), nn.ReLU(), _conv(width, width, 3, stride=2), nn.ReLU())
        widths = [width, *[4 * width] * config.stem_depth]
        self.stem = nn.Sequential(*halves, *(Bottleneck(num_in, width) for num_in in widths[:-1]))
        self.proj = nn.Conv2d(widths[-1], config.width, config.patch_size, stride=config.patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the patches (B, N, D)."""
        return self.proj(self.stem(images_BCHW)).flatten(2).transpose(1, 2)


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions; its output has four times the width of its middle."""

    def __init__(self, num_in: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(num_in, width, 1), nn.ReLU(), _conv(width, width, 3), nn.ReLU(), _conv(width, 4 * width, 1)
        )
        self.beside = nn.Identity() if num_in == 4 * width else _conv(num_in, 4 * width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return features of the same size."""
        return relu(self.body(x_BCHW) + self.beside(x_BCHW))


class PoseBlock(nn.Module):
    """A block in timm's form that first adds positions (K + N, D), if it has any."""

    positions: Tensor | None

    def __init__(self, config: PoseConfig, positions_TD: Tensor | None) -> None:
        from timm.layers.attention import Attention
        from timm.layers.mlp import Mlp

        super().__init__()
        self.register_buffer("positions", positions_TD, persistent=False)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attn = Attention(config.width, num_heads=config.num_heads, qkv_bias=True)
        self.mlp = Mlp(config.width, round(config.mlp_ratio * config.width))

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Return the tokens behind the block."""
        if self.positions is not None:
            tokens_BTD = tokens_BTD + self.positions
        tokens_BTD = tokens_BTD + self.attn(self.norm1(tokens_BTD))
        return tokens_BTD + self.mlp(self.norm2(tokens_BTD))


class HeatmapHead(nn.Module):
    """Two linear maps with a norm between them, from a joint's token to its heatmap."""

    def __init__(self, config: PoseConfig) -> None:
        super().__init__()
        self.size = config.heatmap_size
        self.wide = nn.Linear(config.width, 2 * config.width)
        self.norm = nn.LayerNorm(2 * config.width)
        self.map = nn.Linear(2 * config.width, math.prod(self.size))

    def forward(self, joints_BKD: Tensor) -> Tensor:
        """Return the heatmaps (B, K, h, w)."""
        return self.map(self.norm(self.wide(joints_BKD))).unflatten(-1, self.size)


def sine_positions(rows: int, columns: int, width: int) -> Tensor:
    """Return fixed positions (N, D) of a grid: sines and cosines of the row, then of the column, in one turn a side."""
    angles = [2 * math.pi * (torch.arange(count) + 1) / count for count in (rows, columns)]
    periods = 10_000 ** (2 * (torch.arange(width // 2) // 2) / (width // 2))
    row_ND, column_ND = (angle[:, None] / periods for angle in angles)
    waves = [torch.where(torch.arange(width // 2) % 2 == 0, part.sin(), part.cos()) for part in (row_ND, column_ND)]
    row_RCD = waves[0][:, None].expand(rows, columns, -1)
    column_RCD = waves[1][None].expand(rows, columns, -1)
    return torch.cat([row_RCD, column_RCD], dim=-1).flatten(0, 1)


def encode_joints(joints_BKX: Tensor, size: tuple[int, int], *, sigma: float = 2.0) -> Tensor:
    """Return heatmaps (B, K, h, w) with a Gaussian at each joint, (x, y, ...) in the input's pixels.

    The centre is not rounded to a pixel of the heatmap.
    """
    x_BK, y_BK = ((joints_BKX[..., axis] + 0.5) / STRIDE - 0.5 for axis in (0, 1))
    rows_h, columns_w = (torch.arange(side, device=joints_BKX.device) for side in size)
    up_BKh, across_BKw = (rows_h - y_BK[..., None]).square(), (columns_w - x_BK[..., None]).square()
    return torch.exp(-(up_BKh[..., None] + across_BKw[..., None, :]) / (2 * sigma**2))


def decode_joints(heatmaps_BKhw: Tensor) -> Tensor:
    """Return joints (B, K, 3): x, y in the input's pixels, and the height of the peak.

    The largest value is moved to the top of the parabola through its logarithm and those of its two neighbours, in
    each direction by itself: exact for a Gaussian.
    """
    peak_BK, index_BK = heatmaps_BKhw.flatten(2).max(-1)
    height, width = heatmaps_BKhw.shape[-2:]
    y_BK, x_BK = index_BK // width, index_BK % width
    logs = heatmaps_BKhw.clamp(min=SMALLEST).log().flatten(2)

    def shift(at_BK: Tensor, length: int, step: int) -> Tensor:
        inside = (at_BK > 0) & (at_BK < length - 1)
        before, here, after = (
            logs.gather(-1, (index_BK + inside * offset)[..., None])[..., 0] for offset in (-step, 0, step)
        )
        bend = before - 2 * here + after
        return torch.where(bend < 0, (before - after) / (2 * bend), 0.0).clamp(-0.5, 0.5)

    x_BK = x_BK + shift(x_BK, width, 1)
    y_BK = y_BK + shift(y_BK, height, width)
    return torch.stack([(x_BK + 0.5) * STRIDE - 0.5, (y_BK + 0.5) * STRIDE - 0.5, peak_BK], dim=-1)


def predict_joints(model: nn.Module, images_BCHW: Tensor, *, flip: bool = True) -> Tensor:
    """Return the joints (B, K, 3) that a pose model sees; with `flip` of the mean of an image and its mirror image."""
    heatmaps_BKhw = model(images_BCHW)
    if flip:
        order = layout_of(heatmaps_BKhw.shape[1], type(model).__name__).swapped
        heatmaps_BKhw = (heatmaps_BKhw + model(images_BCHW.flip(-1)).flip(-1)[:, order]) / 2
    return decode_joints(heatmaps_BKhw)


def _conv(num_in: int, num_out: int, side: int, *, stride: int = 1) -> nn.Sequential:
    """Return a convolution and the norm behind it."""
    convolution = nn.Conv2d(num_in, num_out, side, stride=stride, padding=side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(num_out))


def _start_(module: nn.Module) -> None:
    """Draw the start of the weights: truncated normal for linear layers, zero for their biases."""
    if isinstance(module, nn.Linear) and not module.weight.is_meta:
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
