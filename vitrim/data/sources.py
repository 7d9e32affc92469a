"""Open each kind of image source as rows that are read one at a time, not yet transformed.

Rows return PIL images or tensors with a label (-1 if unknown) and raise one of READ_ERRORS for an image that can't be
decoded. Preprocessing, counting and batching are in `images.py`.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from vitrim.data.decode import READ_ERRORS, decode
from vitrim.data.folders import Found, is_image, read_folder, walk
from vitrim.data.labels import Classes, names_in_schema, number_labels, plain_label
from vitrim.data.parts import Part
from vitrim.data.people import CocoPeople, joints_of
from vitrim.data.shards import TarIndex, can_seek, shard_urls
from vitrim.errors import DataError

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "jpg", "jpeg", "png", "webp", "picture", "photo")
JOINT_COLUMN = "keypoints"
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls", "y")
ALLOWED = (
    "pass a folder of images, a .parquet or .tar file or a folder of them, COCO's .json of persons, "
    "a datasets.Dataset or where it was saved, a torch Dataset or DataLoader, an iterable of tensors, or 'digits'"
)
NUM_DIGITS_TRAIN = 1437  # of 1797; the test part has 360
PARQUET_CACHE_BYTES = 512 * 2**20  # encoded row groups kept, in each process; CIFAR-10's 50,000 images take 114 MB


class Rows(Protocol):
    """Images and labels by row number; `classes` is None for a source without labels."""

    classes: Classes | None

    def __len__(self) -> int: ...

    def read(self, row: int) -> tuple[Any, int]:
        """Return the image (PIL or tensor) and the label of one row, or raise one of READ_ERRORS."""
        ...

    def where(self, row: int) -> str:
        """Return what to call an image in a message: its path if it has one."""
        return f"image {row}"


def open_rows(source: Any, *, part: Part, limit: int | None) -> tuple[Rows, str]:
    """Detect the kind of a source; return its rows and a name to show.

    Raises:
        DataError: the source is missing, has no such split or is of no known kind.
    """
    if isinstance(source, str) and source == "digits":
        split = part.asked or part.default
        return _digits(split), f"digits ({split})"
    urls = shard_urls(source)
    if urls is not None:
        part.without(name_of(source))
        return _Shards(_on_disk(urls)), name_of(source)
    if isinstance(source, str | Path):
        return _open_path(Path(source), part), str(source)
    name = type(source).__name__
    hugging_face = sys.modules.get("datasets")  # whoever holds one of its objects has imported it
    if hugging_face is not None and isinstance(source, hugging_face.DatasetDict | hugging_face.Dataset):
        return _HuggingFace(part.of_dataset(source, name), name), name
    part.without(name)
    if isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset):
        source = source.dataset
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        return _Items(source, name), name
    if isinstance(source, Iterable):
        _check_layout(source, name)
        return _Items(_collect(source, limit), name), name
    raise DataError(f"{name}: not a source of images; {ALLOWED}.")


def items_of(items: Sequence[Any], name: str) -> Rows:
    """Make rows of items in memory."""
    return _Items(items, name)


def name_of(source: Any) -> str:
    """Return a name to show for shards: the source itself, or the first of a list."""
    return str(source) if isinstance(source, str | Path) else f"{source[0]} and {len(source) - 1} more"


def _on_disk(urls: Sequence[str]) -> list[Path]:
    """Return shards as paths, or raise DataError if one can't be read by position."""
    others = [url for url in urls if not can_seek(url)]
    if others:
        raise DataError(f"{others[0]}: can only be read as a stream, and images by number are needed here; {ALLOWED}.")
    return [Path(url) for url in urls]


def _open_path(path: Path, part: Part) -> Rows:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; {ALLOWED}.")
    if path.is_file():
        if path.suffix.lower() not in (".parquet", ".json"):
            raise DataError(f"{path}: not a .parquet file, nor a .tar; {ALLOWED}.")
        part.without(str(path))
        return _Parquet([path]) if path.suffix.lower() == ".parquet" else CocoPeople(path)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        import datasets

        return _HuggingFace(part.of_dataset(datasets.load_from_disk(path), str(path)), str(path))
    tree = list(walk(path))
    files = sorted(file for _, files in tree for file in files)
    for suffix, rows in ((".parquet", _Parquet), (".tar", _Shards)):
        found = [file for file in files if file.suffix.lower() == suffix]
        if found and not any(map(is_image, files)):
            return rows(part.of_files(found, path))
    return _Files(read_folder(path, tree, part))


class _Files(Rows):
    """Image files of a folder."""

    def __init__(self, found: Found):
        self.classes = Classes(count=len(found.classes), names=tuple(found.classes)) if found.labels else None
        self._found = found

    def __len__(self) -> int:
        return len(self._found.files)

    def read(self, row: int) -> tuple[Image.Image, int]:
        return decode(self._found.files[row]), self._found.labels[row] if self.classes else -1

    def where(self, row: int) -> str:
        return str(self._found.files[row])


class _Shards(Rows):
    """Images in tar files."""

    def __init__(self, files: Sequence[Path]):
        self._index = TarIndex(files)
        _, self.classes = number_labels(self._index.labels, str(files[0]))

    def __len__(self) -> int:
        return len(self._index)

    def read(self, row: int) -> tuple[Image.Image, int]:
        return decode(self._index.read(row)), self._index.labels[row]


class _Parquet(Rows):
    """Rows of parquet files: opening reads footers, reading caches whole row groups while they fit.

    Files are opened anew for each row group, so that forked workers never share a file position.
    """

    def __init__(self, files: Sequence[Path]):
        import pyarrow as pa
        from pyarrow import parquet

        self._groups: list[tuple[Path, int]] = []
        self._starts = [0]
        self._columns: list[str] = []
        labels: list[Any] = []
        names: tuple[str, ...] = ()
        self._joints: list[Any] = []
        self._cache: OrderedDict[int, Any] = OrderedDict()
        for path in files:
            try:
                with parquet.ParquetFile(path) as file:
                    self._columns = self._columns or find_columns(file.schema_arrow, str(path))
                    if len(self._columns) > 1:
                        labels += file.read(columns=self._columns[1:]).column(0).to_pylist()
                        names = names or names_in_schema(file.schema_arrow, self._columns[1])
                    if JOINT_COLUMN in file.schema_arrow.names:
                        self._joints += file.read(columns=[JOINT_COLUMN]).column(0).to_pylist()
                    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{path}: not a readable parquet file ({error}); write or download it again.") from None
            for group, size in enumerate(sizes):
                self._groups.append((path, group))
                self._starts.append(self._starts[-1] + size)
        self._labels, self.classes = number_labels(labels or [None] * self._starts[-1], str(files[0]), names)
        self._name = str(files[0])

    @cached_property
    def joints(self) -> Tensor | None:
        """Joints (N, K, 4), None if the files have none; made when asked for, since most models want no joints.

        Raises:
            DataError: a row has no person, another number of joints, or a value that is no place in a picture.
        """
        return joints_of(self._joints, self._name) if len(self._joints) == len(self) > 0 else None

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}  # spawned workers fill their own

    def read(self, row: int) -> tuple[Image.Image, int]:
        group = bisect_right(self._starts, row) - 1
        table = self._table(group).slice(row - self._starts[group], 1)
        return _read_cell(table.column(self._columns[0])[0], self._groups[group][0].parent), self._labels[row]

    def _table(self, group: int) -> Any:
        from pyarrow import parquet

        if group not in self._cache:
            path, number = self._groups[group]
            with parquet.ParquetFile(path) as file:
                table = file.read_row_group(number, columns=self._columns[:1], use_threads=False)
            while self._cache and table.nbytes + sum(t.nbytes for t in self._cache.values()) > PARQUET_CACHE_BYTES:
                self._cache.popitem(last=False)
            self._cache[group] = table
        self._cache.move_to_end(group)
        return self._cache[group]


class _HuggingFace(Rows):
    """Rows of a `datasets.Dataset`, memory-mapped; decoded here, so that a corrupt image can be left out."""

    def __init__(self, dataset: Any, name: str):
        self._rows = dataset.with_format("arrow")
        self._column, *label = find_columns(dataset.features.arrow_schema, name)
        labels = self._rows.select_columns(label)[:].column(0).to_pylist() if label else [None] * len(dataset)
        names = getattr(dataset.features[label[0]], "names", ()) if label else ()
        self._labels, self.classes = number_labels(labels, name, names)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> tuple[Image.Image, int]:
        return _read_cell(self._rows[row : row + 1].column(self._column)[0], Path()), self._labels[row]


class _Items(Rows):
    """Items of a torch Dataset or of a list: images (tensors or PIL), pairs with a label, or dicts.

    The labels of a list are numbered at once. Those of a Dataset are known only as its images are read, so the first
    few say what they are, and text is a label only if the Dataset names its `classes`, as torchvision's do.
    """

    def __init__(self, items: Any, name: str, names: tuple[str, ...] = ()):
        if not hasattr(items, "__len__"):
            raise DataError(f"{name}: has no length; give it a __len__ or pass an iterable.")
        self._items, self._name, self.notes = items, name, ()
        self._labels: Sequence[int] | None = None
        if isinstance(items, list) or (isinstance(items, TensorDataset) and len(items.tensors) > 1):
            labels = [unpack(item)[1] for item in items] if isinstance(items, list) else list(items.tensors[1])
            self._labels, self.classes = number_labels(labels, name, names)
            return
        names = _classes_of(items)
        self._numbers = {name: number for number, name in enumerate(names)}
        first = [label for row in range(min(8, len(items))) if (label := self._label_of(row)) is not None]
        texts = [label for label in first if isinstance(label, str) and label not in self._numbers]
        if texts:
            self.notes = (f"{name}: labels are text such as {texts[0]!r}, and it has no classes; none are used.",)
        self.classes = Classes(count=len(names) or None, names=names) if first and not texts else None

    def __len__(self) -> int:
        return len(self._items)

    def read(self, row: int) -> tuple[Any, int]:
        image, label = unpack(self._items[row])
        if self._labels is not None:
            return image, self._labels[row]
        label = plain_label(label, self._name) if self.classes else None
        return image, -1 if label is None else self._numbers.get(label, -1) if isinstance(label, str) else label

    def _label_of(self, row: int) -> int | str | None:
        try:
            return plain_label(unpack(self._items[row])[1], self._name)
        except READ_ERRORS:
            return None  # a corrupt image among the first tells nothing about labels; the next one does


def _classes_of(dataset: Any) -> tuple[str, ...]:
    """Return the names of classes that a torch Dataset, or the one that it is a part of, says."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", ())
    return tuple(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else ()


def _digits(split: str) -> _Items:
    """Return scikit-learn's handwritten digits as RGB images of 8x8 pixels."""
    from sklearn.datasets import load_digits

    parts = {"train": slice(None, NUM_DIGITS_TRAIN), "test": slice(NUM_DIGITS_TRAIN, None)}
    if split not in parts:
        raise DataError(f"digits: no split {split!r}; use 'train' or 'test'.")
    digits: Any = load_digits()
    pixels = np.round(digits.images[parts[split]] * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(np.stack([image] * 3, axis=-1)) for image in pixels]
    return _Items(list(zip(images, digits.target[parts[split]].tolist(), strict=True)), "digits", tuple("0123456789"))


def _collect(source: Iterable[Any], limit: int | None) -> list[tuple[Any, Any]]:
    """Collect the first `limit` images of an iterable, with batches split into images."""
    return list(islice((pair for item in source for pair in _unbatch(item)), limit))


def _check_layout(source: Any, name: str) -> None:
    """Refuse an array of which it can't be told whether it is one image or several grey ones."""
    if isinstance(source, Tensor | np.ndarray) and source.ndim == 3 and {1, 3, 4} & {source.shape[0], source.shape[-1]}:
        raise DataError(
            f"{name}: an array {tuple(source.shape)} may be one image or {len(source)} grey ones; use four sides, "
            "(N, C, H, W) or (N, H, W, C)."
        )


def _unbatch(item: Any) -> Iterable[tuple[Any, Any]]:
    image, label = unpack(item)
    if not (isinstance(image, Tensor | np.ndarray) and image.ndim == 4):
        return [(image, label)]
    one_each = isinstance(label, Tensor | np.ndarray | Sequence) and len(label) == len(image)
    return zip(image, label if one_each else [-1] * len(image), strict=True)


def unpack(item: Any) -> tuple[Any, Any]:
    """Return image and label of an item: an image, a sequence that starts with both, or a dict that names them."""
    if isinstance(item, Mapping):
        image = next((item[key] for key in IMAGE_COLUMNS if key in item), None)
        return image, next((item[key] for key in LABEL_COLUMNS if key in item), -1)
    if isinstance(item, tuple | list):
        return item[0], item[1] if len(item) > 1 else -1
    return item, -1


def find_columns(schema: Any, where: str) -> list[str]:
    """Return the name of the image column, and of the label column if there is one, of an arrow schema."""
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in images if name.lower() in IMAGE_COLUMNS]
    if not named and len(images) != 1:
        raise DataError(
            f"{where}: columns {schema.names} have {len(images)} candidates for the image; "
            "have one column of encoded images (bytes, or a struct with bytes) named 'image'."
        )
    is_label = (types.is_integer, types.is_string, types.is_large_string, types.is_dictionary)
    is_refused = (types.is_floating, types.is_boolean)  # unless all are whole numbers; not overlooked
    known = {field.name: field.type for field in schema if any(like(field.type) for like in (*is_label, *is_refused))}
    labels = [name for name in LABEL_COLUMNS if name in known]
    labels += [name for name in known if name.lower().endswith("label")]
    return [*(named or images)[:1], *labels[:1]]


def _read_cell(scalar: Any, root: Path) -> Image.Image:
    """Decode the image in a cell of an arrow table."""
    cell = scalar.as_py()
    if isinstance(cell, Mapping):
        cell = root / (cell.get("path") or "") if cell["bytes"] is None else cell["bytes"]
    if cell is None:
        raise OSError("the cell is empty")
    return decode(cell)
