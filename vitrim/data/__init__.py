"""Images of any source as one dataset of preprocessed tensors."""

from vitrim.data.images import Batch, ImageSet, collate, first_images, open_images, split_indices
from vitrim.data.texts import is_text, open_texts
from vitrim.data.transforms import augment_for, transform_for

__all__ = [
    "Batch",
    "ImageSet",
    "augment_for",
    "collate",
    "first_images",
    "is_text",
    "open_images",
    "open_texts",
    "split_indices",
    "transform_for",
]
