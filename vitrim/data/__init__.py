"""Images of any source as one dataset of preprocessed tensors, or as a stream of them."""

from vitrim.data.captions import PairBatch, PairSet, open_pairs
from vitrim.data.images import Batch, ImageSet, collate, first_images, open_images, split_indices
from vitrim.data.split import Split, split_images
from vitrim.data.streams import Draw, ImageStream, Record, open_stream
from vitrim.data.texts import is_text, open_texts
from vitrim.data.transforms import augment_for, transform_for

__all__ = [
    "Batch",
    "Draw",
    "ImageSet",
    "ImageStream",
    "PairBatch",
    "PairSet",
    "Record",
    "Split",
    "augment_for",
    "collate",
    "first_images",
    "is_text",
    "open_images",
    "open_pairs",
    "open_stream",
    "open_texts",
    "split_images",
    "split_indices",
    "transform_for",
]
