"""One image of any kind (encoded, PIL of any mode, an array of 8 or 16 bits) as 8-bit RGB, upright.

Every source reads its images through here, so all of them treat a mode, an orientation and a broken file alike. What
can't be read right raises one of READ_ERRORS, and whoever reads counts it and leaves it out. Transparency is dropped,
as torchvision, timm and transformers drop it.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrim.errors import DataError, reason_of

MAX_ASPECT = 200  # a strip of one pixel by a million is a small file, and its short side is scaled to the model's
READ_ERRORS = (
    OSError,
    SyntaxError,
    Image.DecompressionBombError,
)  # PIL raises SyntaxError for broken PNG chunks
DECODE_ERRORS = (*READ_ERRORS, Image.DecompressionBombWarning, ValueError, EOFError, IndexError, struct.error)
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIXTEEN_BITS = 65_535
IN_16_BITS = ("PNG", "PPM")  # formats of which PIL opens 16 bits as mode "I", scaled to the full range
UNREADABLE = "unreadable"
USUAL = ("RGB", "L", "RGBA")  # 8 bits a channel: nothing to say about them


@dataclass(frozen=True)
class Raw:
    """What is no image, and becomes a tensor by a model's own transform alone: a recording of joints."""

    value: Any


def decode(encoded: bytes | Path) -> Image.Image:
    """Decode an image file or its bytes, in its own mode; any error of PIL becomes OSError."""
    with _as_os_error(), Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
        if image.format == "EPS":  # the bytes decide, not the name, and PIL would have Ghostscript run them
            raise OSError("an EPS is a program, not an image")
        _check_size(image)
        image.load()
        return image


def as_picture(image: Any, where: str) -> Any:
    """Return an array or tensor of whole numbers of 8 or 16 bits as a PIL image; anything else as it is.

    Raises:
        OSError: there is no image (None).
        DataError: it can't be told which side of the array holds the channels.
    """
    if image is None:
        raise OSError("no image (None)")
    if isinstance(image, Tensor) and image.dtype in (torch.uint8, torch.uint16) and image.ndim > 1:
        image = image.numpy()
    if not isinstance(image, np.ndarray) or image.dtype not in (np.uint8, np.uint16):
        return image
    if image.ndim == 3:
        image = np.moveaxis(image, 0, -1) if channels_first(image.shape, where, str(image.dtype)) else image
        image = image[..., 0] if image.shape[-1] == 1 else image
    elif image.ndim != 2:
        return image
    if image.dtype == np.uint16 and image.ndim == 3:  # PIL has no such mode
        image = _to_8_bits(image, SIXTEEN_BITS)
    return Image.fromarray(np.ascontiguousarray(image))


def channels_first(shape: tuple[int, ...], where: str, kind: str) -> bool:
    """Return whether an array of three sides is (C, H, W) and not (H, W, C), where C is 1, 3 or 4.

    Raises:
        DataError: it may be both, or is neither.
    """
    first, last = shape[0] in (1, 3, 4), shape[-1] in (1, 3, 4)
    if first == last:
        what = "may be (C, H, W) or (H, W, C)" if first else "has no side of 1, 3 or 4 channels"
        raise DataError(f"{where} is {kind} {tuple(shape)}, which {what}; pass PIL images.")
    return first


def kind_of(image: Any) -> str:
    """Return in a word what an image was before it became RGB; "" for a tensor that is preprocessed already."""
    if isinstance(image, Image.Image):
        return image.mode
    if not isinstance(image, np.ndarray | Tensor) or image.ndim < 2 or "float" in str(image.dtype):
        return ""
    sides = "H, W" if image.ndim == 2 else "C, H, W" if image.shape[0] in (1, 3, 4) else "H, W, C"
    return f"{str(image.dtype).removeprefix('torch.')} ({sides})"


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB of 8 bits, turned as its EXIF data say.

    Values of more than 8 bits are scaled by the range of their kind: 16 bits, or fewer where a TIFF says so, and 0..1
    for float. The range is never taken from the values of an image, since that would treat two images differently.

    Raises:
        OSError: the image can't be decoded, has no pixels or is far longer than wide, or its range is not known.
    """
    with _as_os_error():
        _check_size(image)
        image.load()
        turned = UPRIGHT.get(_orientation(image))
        image = _in_8_bits(image)
        if image.mode in ("RGBa", "La"):  # colours multiplied with their opacity
            image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
        image = image.convert("RGB")
        return image if turned is None else image.transpose(turned)


class Seen:
    """What the images of a source were, as far as this process has read them: one byte an image.

    `notes` are on the source as a whole.
    """

    def __init__(self, num_images: int, notes: Iterable[str] = ()) -> None:
        self._codes, self._kinds, self.problem, self.notes = bytearray(num_images), [""], "", list(notes)

    def note(self, row: int, kind: str) -> None:
        """Note what an image was; "" for what needs no word."""
        if kind not in self._kinds:
            self._kinds.append(kind)
        self._codes[row] = self._kinds.index(kind)

    def failed(self, row: int, error: BaseException, where: str) -> None:
        """Note that an image could not be read, and if it is the first where it is and why."""
        self.problem = self.problem or f"{where}, {type(error).__name__}: {reason_of(error)}"
        self.note(row, UNREADABLE)

    def about(self, name: str) -> str:
        """Return the name of the source with its notes."""
        said = [note.removeprefix(f"{name}: ").removesuffix(".") for note in self.notes]
        return f"{name} ({'; '.join(said)})" if said else name

    def counts(self, rows: Iterable[int]) -> dict[str, int]:
        """Return how many of these images were of which kind, the most frequent first."""
        found = Counter(self._codes[row] for row in rows)
        return {self._kinds[code]: count for code, count in found.most_common() if code}


def remarks(counts: dict[str, int], problem: str) -> list[str]:
    """Return sentences on images that were left out, and on those of an unusual kind.

    Args:
        counts: images by kind, from `Seen.counts`.
        problem: why the first one could not be read.
    """
    kinds = {kind: count for kind, count in counts.items() if kind != UNREADABLE}
    said = []
    if UNREADABLE in counts:
        read = f"{counts[UNREADABLE]:,}" + (f" of {sum(counts.values()):,}" if kinds else "")
        said.append(f"{read} images could not be read and were left out; the first: {problem}.")
    if kinds.keys() - set(USUAL):
        listed = ", ".join(f"{count:,} of {kind}" for kind, count in kinds.items())
        said.append(f"images by mode: {listed}; each became 8-bit RGB, scaled by the range of its kind.")
    return said


def _check_size(image: Image.Image) -> None:
    if not min(image.size):
        raise OSError(f"{image.width} x {image.height} pixels: no image")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise OSError(f"{image.width} x {image.height} pixels: over {MAX_ASPECT} times as long as wide")


def _orientation(image: Image.Image) -> int:
    """Return how an image lies by its EXIF data: 1 (upright) where there are none, or none that can be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (*DECODE_ERRORS, TypeError, KeyError):
        return 1  # as every viewer shows it


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Scale modes of more than 8 bits to mode "L"; return other images as they are."""
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
        values, largest = np.asarray(image).astype(np.uint16), 2 ** min(int(bits), 16) - 1
    elif image.mode == "I" and image.format in IN_16_BITS:
        values, largest = np.asarray(image), SIXTEEN_BITS
    elif image.mode == "F":
        values, largest = np.asarray(image), 1
    elif image.mode == "I":
        raise OSError("whole numbers of 32 bits, whose range is not known; write it with 8 or 16 bits")
    else:
        return image
    if not (values.min() >= 0 and values.max() <= largest):  # false for NaN
        got = f"{values.min():g} to {values.max():g}"
        raise OSError(f"values from {got}, where mode {image.mode} has 0 to {largest}; scale it, or write 8 or 16 bits")
    return Image.fromarray(_to_8_bits(largest - values if tags.get(PHOTOMETRIC) == 0 else values, largest))


def _to_8_bits(values: np.ndarray, largest: int) -> np.ndarray:
    return np.round(values * (255.0 / largest)).astype(np.uint8)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn any error of PIL for a broken or oversized image into OSError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata; the pixels are what counts
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except OSError:
        raise
    except DECODE_ERRORS as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
