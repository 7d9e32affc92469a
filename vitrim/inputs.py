"""Images as named tensors, for models that take more than one tensor (B, C, H, W): patches and grids, masks, frames.

`Inputs` stands wherever a batch of images does. It knows no model and no library: a model is called with its `tensors`
by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vitrim.errors import ModelError

# What libraries call how far an image reaches: its height and width (and frames), in patches or pixels. As many of its
# tokens as there are in a row of all images go with it as its share of the product says.
REACHES = ("grid_thw", "image_grid_thw", "spatial_shapes", "image_sizes")
# What libraries call the mask (B, N) of tokens that are no padding.
MASKS = ("pixel_attention_mask", "patch_valid")
# What they call places of patches (B, N, 2), of which those of padding are negative.
POSITIONS = ("pixel_position_ids",)


class Inputs:
    """A batch of images, each of which is several named tensors; it can be used as a tensor of images can.

    It has a length, is indexed and sliced by image, moved, split and joined (`torch.cat` and `torch.stack` join).

    Args:
        images: of each image its tensors by name, as the model's processor gives them for that image alone: with a
            first dimension of 1, or of as many patches as it has.

    Example:
        >>> one = {"hidden_states": torch.ones(4, 12), "grid_thw": torch.tensor([[1, 2, 2]])}
        >>> batch = torch.cat([Inputs([one]), Inputs([one])])
        >>> len(batch), batch.tensors["hidden_states"].shape
        (2, torch.Size([8, 12]))
    """

    ndim = 1  # as far as others need to know: images in a row

    def __init__(self, images: Sequence[Mapping[str, Tensor]]) -> None:
        self.images = tuple(images)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the model is called with, by name: the images one behind the other, padded where their sides differ."""
        return {
            name: _joined([image[name] for image in self.images], fill=-1 if name in POSITIONS else 0)
            for name in self.images[0]
        }

    @property
    def pixels(self) -> Tensor:
        """The numbers of all images in a row, without grids and masks."""
        parts = [t.flatten() for image in self.images for t in image.values() if t.is_floating_point()]
        return torch.cat(parts) if parts else torch.empty(0)

    @cached_property
    def reach_B(self) -> Tensor | None:
        """How far each image reaches, as the product of its sides; None if nothing says so, as of equal images."""
        names = [name for name in REACHES if name in self.images[0]]
        if not names and any(name in self.images[0] for name in POSITIONS) and (real_BN := self.real_BN) is not None:
            return real_BN.sum(1)
        return torch.stack([image[names[0]].prod() for image in self.images]) if names else None

    @property
    def real_BN(self) -> Tensor | None:
        """The mask (B, N) of tokens that are no padding; None if there is no such mask."""
        for name in [name for name in POSITIONS if name in self.images[0]]:
            return self.tensors[name].ge(0).all(-1)
        names = [name for name in MASKS if name in self.images[0]]
        return _joined([image[names[0]] for image in self.images]).bool() if names else None

    def tokens_of(self, tokens: Tensor) -> list[Tensor]:
        """Return the tokens (N, D) of each image without padding, from those of all in one row, or (B, N, D).

        Raises:
            ModelError: the tokens in a row are not shared by what the images say of their sizes.
        """
        if tokens.ndim == 3 and len(tokens) == len(self):
            real_BN = self.real_BN
            if real_BN is None or real_BN.shape != tokens.shape[:2]:
                return list(tokens)
            return [row_ND[real_N] for row_ND, real_N in zip(tokens, real_BN.to(tokens.device), strict=True)]
        row_ND = tokens.flatten(0, -2)
        reach_B = torch.ones(len(self)) if self.reach_B is None else self.reach_B.double().cpu()
        share_B = reach_B * len(row_ND) / reach_B.sum()
        if bool((share_B - share_B.round()).abs().max() > 1e-6):
            raise ModelError(f"{len(row_ND)} tokens in one row: which are whose of {len(self)} images can't be told.")
        return list(row_ND.split(share_B.round().long().tolist()))

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Inputs]:
        return (Inputs([image]) for image in self.images)

    def __getitem__(self, index: Any) -> Inputs:
        """Return some of the images: by number (still a batch, of one), slice, numbers or mask; None gives all."""
        if index is None:
            return self
        places = torch.arange(len(self))[index].flatten().tolist()
        return Inputs([self.images[place] for place in places])

    def split(self, size: int) -> list[Inputs]:
        """Return batches of at most `size` images."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def repeat(self, times: int) -> Inputs:
        """Return the images several times over."""
        return Inputs(self.images * times)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Inputs:
        """Return the images on a device; what is no whole number and no mask has the type."""
        return self._each(lambda t: t.to(device or t.device, dtype if t.is_floating_point() else None))

    def cpu(self) -> Inputs:
        """Return the images on the CPU."""
        return self.to("cpu")

    def float(self) -> Inputs:
        """Return the images in float32."""
        return self.to(dtype=torch.float32)

    def is_floating_point(self) -> bool:
        """Whether these are images and not ids of words: they are."""
        return True

    @property
    def is_cuda(self) -> bool:
        """Whether they are on a GPU of CUDA."""
        return self.device.type == "cuda"

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(iter(self.images[0].values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in parts_of(self))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs([{name: change(tensor) for name, tensor in image.items()} for image in self.images])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Join batches, or make images of zeros, by torch's own functions."""
        if func in (torch.cat, torch.stack):
            return cls([image for batch in args[0] for image in batch.images])
        if func is torch.zeros_like:
            return args[0]._each(lambda t: torch.zeros_like(t) if t.is_floating_point() else t)
        return NotImplemented


def _joined(parts: Sequence[Tensor], *, fill: int = 0) -> Tensor:
    """Return tensors one behind the other; where other sides differ, with zeros or `fill` behind the shorter ones."""
    sides = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    if any(list(part.shape[1:]) != sides for part in parts):
        missing = [[side - own for side, own in zip(sides, part.shape[1:], strict=True)] for part in parts]
        parts = [
            pad(part, [n for gap in reversed(gaps) for n in (0, gap)], value=fill)
            for part, gaps in zip(parts, missing, strict=True)
        ]
    return torch.cat(list(parts))


def is_named(image: Any) -> bool:
    """Return whether an image is named tensors, which can be used as a plain one can."""
    return isinstance(image, Inputs)


def is_image(item: Any) -> bool:
    """Return whether something is one image: floats (C, H, W), or named tensors; or one row of token ids."""
    return is_named(item) or (isinstance(item, Tensor) and item.ndim == (3 if item.is_floating_point() else 1))


def in_float32(images: Any) -> Any:
    """Return images in float32, and token ids as they are."""
    return images.float() if images.is_floating_point() else images


def run_on(model: nn.Module, images: Tensor | Inputs, **options: Any) -> Any:
    """Run a model on a batch of images, or of token ids, with options of its own."""
    return model(**images.tensors, **options) if isinstance(images, Inputs) else model(images, **options)


def in_one_row(tokens: Tensor, images: Tensor | Inputs) -> bool:
    """Return whether a model's tokens are those of all images in one row, and not a row for each image."""
    if isinstance(images, Inputs):
        return len(tokens) != len(images)
    return tokens.shape[0] != images.shape[0]  # a trace keeps both open


def tokens_by_image(tokens: Tensor, images: Tensor | Inputs) -> list[Tensor]:
    """Return the tokens (N, D) of each image without padding; of a plain tensor, all images have as many."""
    if isinstance(images, Inputs):
        return images.tokens_of(tokens)
    return list(tokens.flatten(0, -2).tensor_split(len(images)))


def real_tokens(tokens: Tensor, images: Tensor | Inputs) -> Tensor:
    """Return tokens (tokens, D) without padding, and of (B, N, D) one row (1, N, D) of them; others as they are."""
    real_BN = images.real_BN if isinstance(images, Inputs) else None
    if real_BN is None or tokens[..., 0].numel() != real_BN.numel():
        return tokens
    row_ND = tokens.flatten(0, -2)[real_BN.flatten().to(tokens.device)]
    return row_ND.expand(*[1] * (tokens.ndim - 2), -1, -1)


def parts_of(images: Tensor | Inputs) -> list[Tensor]:
    """Return the tensors that images consist of."""
    return [part for image in images.images for part in image.values()] if isinstance(images, Inputs) else [images]


def numbers(images: Any) -> Tensor:
    """Return the numbers that images consist of, as one tensor."""
    return images.pixels if isinstance(images, Inputs) else images
