"""Images of any source as one dataset of preprocessed tensors."""

from vitrim.data.images import Batch, ImageSet, collate, first_images, open_images, split_indices
from vitrim.data.transforms import augment_for, transform_for

__all__ = [
    "Batch",
    "ImageSet",
    "augment_for",
    "collate",
    "first_images",
    "open_images",
    "split_indices",
    "transform_for",
]
