"""Images with one or several captions each, read in order: webdataset's shards, parquet, COCO's JSON, datasets.

A pass reads every row once; nothing is shuffled and no image is kept. Images that can't be decoded are counted and left
out; images without a caption are skipped.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vitrim.data.decode import READ_ERRORS, decode
from vitrim.data.folders import walk
from vitrim.data.images import Transform, check_workers, collate, prepare
from vitrim.data.parts import Part
from vitrim.data.shards import IMAGE_SUFFIXES, TAR_ERRORS, shard_urls
from vitrim.data.sources import name_of, open_rows, unpack
from vitrim.errors import DataError
from vitrim.models.origin import require

LOG = logging.getLogger("vitrim")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "txt", "sentence", "sentences", "raw", "alt_text")
ALLOWED = (
    "pass .tar shards with .txt or .json captions, a .parquet file with a caption column, COCO's captions .json, a "
    "folder of shards or parquet files, a datasets.Dataset, or an iterable of (image, captions)"
)

Row = tuple[list[str], Callable[[], Any]]


class PairBatch(NamedTuple):
    """Images (B, C, H, W), their numbers in the source, the captions of each, and how many could not be read."""

    images_BCHW: Tensor
    rows_B: Tensor
    captions: list[list[str]]
    num_skipped: int


class PairSet(IterableDataset):
    """An iterable dataset of images with captions, in the order of their source."""

    def __init__(
        self,
        rows: Callable[[], Iterator[Row]],
        *,
        name: str,
        transform: Transform | None = None,
        limit: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.name = name
        self._rows, self._transform, self._limit, self._share = rows, transform, limit, share

    def shared(self, rank: int, num_processes: int) -> PairSet:
        """Return every `num_processes`-th image, starting at `rank`; the images keep their numbers in the source."""
        known = {"name": self.name, "transform": self._transform, "limit": self._limit}
        return PairSet(self._rows, share=(rank, num_processes), **known)

    def __iter__(self) -> Iterator[tuple[int, list[str], Tensor | None]]:
        worker, (rank, size) = get_worker_info(), self._share
        if worker is not None:
            rank, size = rank * worker.num_workers + worker.id, size * worker.num_workers
        captioned = (row for row in self._rows() if row[0])
        for number, (captions, read) in enumerate(islice(captioned, self._limit)):
            if number % size == rank:
                yield number, captions, self._image(read, number)

    def batches(self, batch_size: int, *, num_workers: int = 0) -> Iterator[PairBatch]:
        """Yield batches of up to `batch_size` images; fewer if some could not be read, or at the end.

        Raises:
            DataError: the source has no image with a caption, or none can be read, or there can be no workers.
        """
        check_workers(num_workers)
        generator = torch.Generator().manual_seed(0)  # else every pass would draw from the global one
        loader = iter(DataLoader(self, batch_size=None, num_workers=num_workers, generator=generator))
        num_read = num_skipped = 0
        while items := list(islice(loader, batch_size)):
            batch = collate([None if image is None else (image, number) for number, _, image in items])
            num_read, num_skipped = num_read + len(batch.labels_B), num_skipped + batch.num_skipped
            captions = [items[place][1] for place in batch.places_B.tolist()]
            yield PairBatch(batch.images_BCHW, batch.labels_B, captions, batch.num_skipped)
        if not num_read and self._share[1] == 1:
            raise DataError(f"{self.name}: no image with a caption could be read ({num_skipped} failed); {ALLOWED}.")

    def _image(self, read: Callable[[], Any], number: int) -> Tensor | None:
        try:
            return prepare(read(), self._transform, name=self.name, index=number)
        except READ_ERRORS:
            return None


def open_pairs(
    source: Any,
    *,
    transform: Transform | None = None,
    split: str | None = None,
    limit: int | None = None,
    default: str = "test",
    image_folder: str | Path | None = None,
) -> PairSet:
    """Open any source of images with captions.

    Args:
        source: webdataset's shards (a sample is an image and a `.txt` with a caption a line, or a `.json` with
            `caption` or `captions`), a parquet file with a column of captions (text, or lists of text), COCO's captions
            as `.json`, a folder of shards or parquet files, a `datasets.Dataset`, or any iterable of (image, caption or
            captions), or of dicts that name them.
        transform: function from a PIL image to a tensor (C, H, W).
        split: part to read of a source that has parts; refused for one that has none.
        limit: read only this many images, the first ones.
        default: part to read of a source that has parts where no split is given.
        image_folder: folder of the images that a `.json` names; None for the folder of the `.json`.

    Raises:
        DataError: the source is missing, or not one of these kinds.
        MissingExtraError: webdataset is needed and not installed.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; use 1 or more, or None for all images.")
    if isinstance(source, PairSet):
        return source
    part = Part(asked=split, default=default)
    rows, name = _open(source, part, image_folder)
    for note in part.notes:
        LOG.info("%s", note)
    return PairSet(rows, name=name, transform=transform, limit=limit)


def _open(source: Any, part: Part, image_folder: str | Path | None) -> tuple[Callable[[], Iterator[Row]], str]:
    """Detect the kind of a source; return a function that yields its rows, and a name to show."""
    urls = shard_urls(source)
    if urls is not None:
        require("webdataset", "shards")
        part.without(name_of(source))
        return partial(_of_shards, urls), name_of(source)
    if isinstance(source, str | Path):
        return _open_path(Path(source), part, image_folder), str(source)
    name = type(source).__name__
    hugging_face = sys.modules.get("datasets")  # whoever holds one of its objects has imported it
    if hugging_face is not None and isinstance(source, hugging_face.DatasetDict | hugging_face.Dataset):
        return partial(_of_dataset, part.of_dataset(source, name), name), name
    part.without(name)
    if isinstance(source, Iterable) or isinstance(source, Dataset):
        return partial(_of_items, source, name), name
    raise DataError(f"{name}: not a source of images with captions; {ALLOWED}.")


def _open_path(path: Path, part: Part, image_folder: str | Path | None) -> Callable[[], Iterator[Row]]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; {ALLOWED}.")
    if path.is_file():
        part.without(str(path))
    if path.suffix == ".json":
        return partial(_of_coco, path, path.parent if image_folder is None else Path(image_folder))
    if path.suffix == ".parquet":
        return partial(_of_parquet, [path])
    for kind in (".parquet", ".tar") if path.is_dir() else ():
        files = sorted(file for _, found in walk(path) for file in found if file.suffix == kind)
        if files and kind == ".parquet":
            return partial(_of_parquet, part.of_files(files, path))
        if files:
            require("webdataset", "shards")
            return partial(_of_shards, [str(file) for file in part.of_files(files, path)])
    raise DataError(f"{path}: holds no captions that vitrim can read; {ALLOWED}.")


def _of_shards(urls: Sequence[str]) -> Iterator[Row]:
    """Yield samples of tar files, each opened once and read to its end."""
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for url in urls:
        try:
            with gopen(url) as stream:
                for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                    image = next((value for kind, value in sample.items() if f".{kind}" in IMAGE_SUFFIXES), None)
                    if image is not None:
                        yield _captions_of_sample(sample), partial(decode, image)
        except TAR_ERRORS as error:
            raise DataError(f"{url}: can't be read to its end ({error}); write or download it again.") from None


def _captions_of_sample(sample: Mapping[str, Any]) -> list[str]:
    """Return the lines of `.txt`, or the captions in `.json`."""
    if "txt" in sample:
        return _texts(sample["txt"].decode("utf-8", errors="replace").splitlines())
    said = json.loads(sample["json"]) if "json" in sample else {}
    return _texts(next((said[key] for key in CAPTION_COLUMNS if key in said), [])) if isinstance(said, dict) else []


def _of_parquet(files: Sequence[Path]) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    for path in files:
        rows, _ = open_rows(path, part=Part(), limit=None)  # says what is wrong with a file that can't be read
        column = _caption_column(parquet.read_schema(path), str(path))
        try:
            texts = parquet.read_table(path, columns=[column]).column(column)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({error}); write or download it again.") from None
        for row, text in enumerate(texts):
            yield _texts(text.as_py()), partial(_first_of, rows, row)


def _of_dataset(dataset: Any, name: str) -> Iterator[Row]:
    """Yield rows of a `datasets.Dataset`; an image is decoded only when it is read."""
    rows, _ = open_rows(dataset, part=Part(), limit=None)
    column = _caption_column(dataset.features.arrow_schema, name)
    for row, text in enumerate(dataset.select_columns([column])):
        yield _texts(text[column]), partial(_first_of, rows, row)


def _of_coco(path: Path, folder: Path) -> Iterator[Row]:
    """Yield rows of COCO's captions file: images by id, and annotations that refer to an image's id."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        captions: dict[Any, list[str]] = {image["id"]: [] for image in said["images"]}
        for annotation in said["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        files = [(image["id"], folder / image["file_name"]) for image in said["images"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not COCO's captions ({reason}); it needs images and annotations.") from None
    if files and not any(file.exists() for _, file in files[:100]):
        raise DataError(f"{path}: {files[0][1]} does not exist; pass image_folder, where the images are.")
    for number, file in files:
        yield _texts(captions[number]), partial(decode, file)


def _of_items(items: Any, name: str) -> Iterator[Row]:
    """Yield rows of a torch Dataset or an iterable: (image, captions), or dicts."""
    numbered = not hasattr(items, "__iter__") and hasattr(items, "__len__")
    for item in (items[i] for i in range(len(items))) if numbered else items:
        image, second = unpack(item)
        texts = next((item[key] for key in CAPTION_COLUMNS if key in item), []) if isinstance(item, Mapping) else second
        if not (isinstance(texts, str) or (isinstance(texts, Sequence) and all(isinstance(t, str) for t in texts))):
            raise DataError(f"{name}: an item has {type(texts).__name__} for its captions; {ALLOWED}.")
        yield _texts(texts), partial(_same, image)


def _caption_column(schema: Any, where: str) -> str:
    """Return the name of the column of captions, which holds text or lists of text."""
    from pyarrow import types

    def holds_text(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind)

    texts = [field.name for field in schema if holds_text(field.type)]
    named = [name for name in texts if name.lower() in CAPTION_COLUMNS]
    if not named and len(texts) != 1:
        raise DataError(f"{where}: columns {schema.names} hold no clear captions; name the column 'caption'.")
    return (named or texts)[0]


def _texts(found: Any) -> list[str]:
    """Return captions stripped of white space, without empty ones."""
    return [text.strip() for text in ([found] if isinstance(found, str) else found or []) if text and text.strip()]


def _first_of(rows: Any, row: int) -> Any:
    return rows.read(row)[0]


def _same(image: Any) -> Any:
    return image
