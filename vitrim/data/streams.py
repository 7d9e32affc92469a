"""Images without a known number, read in order as they arrive: shards behind urls, and streamed Hugging Face sets.

A stream has no length and can't return an image by its number, so it is asked for "the next ones". They are read in
lanes, each a share of the shards, dealt out anew for every pass over the set. Within a lane, windows of images are
shuffled, one after the other: like a shuffle buffer, but no image crosses the edge of a window, so a run can continue
from the middle without the images before. Which processes read which lanes is decided in `recover`.

Only one window per lane is held in memory. Images are decoded last, by the process that uses them. A shard that can't
be
read to its end is an error; an image that can't be decoded is left out.
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrim.data.decode import READ_ERRORS, Seen, decode
from vitrim.data.images import Batch, ImageSet, Transform, collate, prepare
from vitrim.data.labels import number_labels, plain_label
from vitrim.data.parts import Part
from vitrim.data.shards import IMAGE_SUFFIXES, can_seek, label_of, shard_urls
from vitrim.data.sources import Rows, find_columns, name_of, unpack
from vitrim.errors import DataError, VitrimError, reason_of
from vitrim.models.origin import require
from vitrim.storage.sealed import line_of, read_journal

PREFIX = "hf-stream:"
# Lanes from which images are taken that are only looked at; a window of them is as long as it has to be.
NUM_LANES = 8

Place = tuple[int, int]


class Record(NamedTuple):
    """An image as it was read (usually encoded), its label, and its place: the shard and the number in it."""

    image: Any
    label: int | str | None
    place: Place


Draw = tuple[int, Record]


class Shards(Protocol):
    """The parts of a stream; each can only be read from its first image on."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the shards; a name stands for the same images in every run."""
        ...

    def read(self, shard: int) -> Iterator[tuple[Any, int | str | None]]:
        """Yield the images of a shard, not decoded, with their labels; the same ones each time."""
        ...


@dataclass(frozen=True, kw_only=True)
class ImageStream:
    """Shards as a stream of images.

    Args:
        shards: the parts to read.
        name: shown in messages.
        transform: function from a PIL image to a tensor (C, H, W).
        seed: seed of a random transform; None for a transform without randomness.
        held_out: places of images to skip.
        sizes: number of images, by name, of shards that were read to their end; a resumed run skips these unread.
        journal: file that stores `sizes`; None stores nothing.
        notes: what the user should know about how it was opened.
    """

    shards: Shards
    name: str
    transform: Transform | None = None
    seed: int | None = None
    held_out: frozenset[Place] = frozenset()
    sizes: dict[str, int] = field(default_factory=dict)
    journal: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_shards(self) -> int:
        """Number of parts that can be read independently."""
        return len(self.shards.names)

    def augmented(self, augment: Transform | None, seed: int) -> ImageStream:
        """Return the same images with a random transform; the draw at a position depends on seed and position alone."""
        return replace(self, transform=augment, seed=seed)

    def without(self, places: Collection[Place]) -> ImageStream:
        """Return the same stream without the images at these places, in every pass."""
        return replace(self, held_out=self.held_out | frozenset(places))

    def remembering(self, journal: Path) -> ImageStream:
        """Return the same stream with the sizes of shards read from a file, to which new sizes are added."""
        known = {line["shard"]: line["images"] for line in read_journal(journal, {"shard": str, "images": int})}
        new = {name: size for name, size in self.sizes.items() if name not in known}
        stream = replace(self, journal=journal, sizes=dict(known))
        for name, size in new.items():
            stream._learn(name, size)
        return stream

    def take(self, num_images: int, *, seed: int) -> tuple[ImageSet, list[Place]]:
        """Return the first images of a seeded order, encoded in memory, and their places; fewer at the stream's end.

        Raises:
            DataError: the stream has no images.
        """
        num_lanes = min(NUM_LANES, self.num_shards)
        window = -(-num_images // num_lanes)
        lanes = [self._pass(0, lane, num_lanes, window, seed) for lane in range(num_lanes)]
        found = (record for group in zip_longest(*lanes) for record in group if record is not None)
        records = list(islice(found, num_images))
        if not records:
            raise DataError(f"{self.name}: no images found; check the shards.")
        seen = Seen(len(records), self.notes)
        taken = _Taken(records, self.name, getattr(self.shards, "class_names", ()))
        images = ImageSet(taken, name=self.name, transform=self.transform, seen=seen)
        return images, [record.place for record in records]

    def lane(self, lane: int, *, num_lanes: int, window: int, seed: int, first: int = 0) -> Iterator[Record]:
        """Yield images of one of `num_lanes` lanes from number `first` on, pass after pass, without end.

        Shards are dealt out to lanes anew in each pass, in a seeded order; images are shuffled within windows.

        Args:
            lane: which lane, 0..num_lanes-1.
            num_lanes: number of lanes.
            window: number of images that are shuffled together.
            seed: seed of all orders.
            first: number of images of the lane, over all passes, to skip.

        Raises:
            DataError: the stream has no images, or a shard can't be read to its end.
        """
        for epoch in count():
            yield from self._pass(epoch, lane, num_lanes, window, seed, first)
            num_images = self._size(self._dealt(epoch, lane, num_lanes, seed)) or 0
            if not num_images and self._size(range(self.num_shards)) == 0:
                raise DataError(f"{self.name}: no images found; check the shards.")
            first = max(0, first - num_images)

    def load(self, draws: Iterable[Sequence[Draw]], *, num_workers: int = 0) -> Iterator[tuple[list[Draw], Batch]]:
        """Decode lists of images, each with its position, and yield each list (without images) with its batch.

        Workers decode; reading stays in this process.
        """
        waiting: deque[list[Draw]] = deque()
        loader = DataLoader(
            _Decoder(self.name, self.transform, self.seed),
            batch_sampler=_noted(draws, waiting),  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(0),  # workers' base seed; images draw from their own
        )
        for batch in loader:
            yield waiting.popleft(), batch

    def _pass(self, epoch: int, lane: int, num_lanes: int, window: int, seed: int, first: int = 0) -> Iterator[Record]:
        """Yield the images of one pass over a lane, from number `first` on."""
        number, inside = divmod(first, window)
        records = self._kept(self._dealt(epoch, lane, num_lanes, seed), skip=number * window)
        while shuffled := list(islice(records, window)):
            for place in _permutation(len(shuffled), seed, epoch, lane, number)[inside:]:
                yield shuffled[place]
            number, inside = number + 1, 0

    def _dealt(self, epoch: int, lane: int, num_lanes: int, seed: int) -> list[int]:
        """Return the shards of a lane in a pass, in order."""
        return _permutation(self.num_shards, seed, epoch)[lane::num_lanes]

    def _kept(self, shards: Sequence[int], skip: int) -> Iterator[Record]:
        """Yield the images of shards that are not held out, after `skip` of them.

        Shards of known size that are skipped as a whole are not read.
        """
        for shard in shards:
            size = self._size([shard])
            if size is not None and size <= skip:
                skip -= size
                continue
            for record in self._read(shard):
                if skip:
                    skip -= 1
                else:
                    yield record

    def _read(self, shard: int) -> Iterator[Record]:
        """Yield the images of a shard that are not held out."""
        name, number = self.shards.names[shard], -1
        try:
            for number, (image, label) in enumerate(self.shards.read(shard)):
                if (shard, number) not in self.held_out:
                    yield Record(image, label, (shard, number))
        except VitrimError:
            raise
        except Exception as error:  # networks, commands, archives and users' generators fail in their own ways
            reason = reason_of(error)
            raise DataError(
                f"{self.name}: shard {name} can't be read to its end, image {number + 1} ({reason}); go on with "
                "resume when it can, or leave it out."
            ) from error
        if name not in self.sizes:
            self._learn(name, number + 1)

    def _learn(self, name: str, size: int) -> None:
        """Store the size of a shard."""
        self.sizes[name] = size
        if self.journal is not None:
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(line_of({"shard": name, "images": size}))

    def _size(self, shards: Sequence[int]) -> int | None:
        """Return how many images shards have that are not held out; None if not known yet."""
        sizes = [self.sizes.get(self.shards.names[shard]) for shard in shards]
        if None in sizes:
            return None
        return sum(size or 0 for size in sizes) - sum(shard in shards for shard, _ in self.held_out)


def open_stream(
    source: Any, *, transform: Transform | None = None, split: str | None = None, default: str = "train"
) -> ImageStream | None:
    """Open a source that can only be read in order; return None for any other source.

    Args:
        source: urls of webdataset's shards (`https://...`, `pipe:COMMAND`, whatever webdataset opens), braces and
            lists included; local shards that are compressed; `hf-stream:ORG/NAME` or `hf-stream:ORG/NAME/CONFIG`; a
            `datasets.IterableDataset`, or one for each split.
        transform: function from a PIL image to a tensor (C, H, W).
        split: part to read of a Hugging Face set; refused for shards, which have none.
        default: part to read where no split is given.

    Raises:
        DataError: a Hugging Face set can't be opened or has no such split.
        MissingExtraError: webdataset is needed and not installed.
    """
    if isinstance(source, ImageStream):
        return source if transform is None else replace(source, transform=transform)
    name = source if isinstance(source, str) else type(source).__name__
    if isinstance(source, str) and source.startswith(PREFIX):
        source = _load_dataset(source.removeprefix(PREFIX))
    hugging_face = sys.modules.get("datasets")  # whoever holds one of its objects has imported it
    if hugging_face is not None and isinstance(source, hugging_face.IterableDataset | hugging_face.IterableDatasetDict):
        part = Part(asked=split, default=default)
        shards = _HuggingFace(part.of_dataset(source, name), name)
        return ImageStream(shards=shards, name=name, transform=transform, notes=tuple(part.notes))
    urls = shard_urls(source)
    if urls is None or all(can_seek(url) for url in urls):
        return None
    require("webdataset", "shards")
    Part(asked=split).without(name_of(source))
    return ImageStream(shards=_Urls(urls), name=name_of(source), transform=transform)


class _Urls:
    """Tar files in webdataset's order of members, read from the first byte to the last."""

    def __init__(self, urls: Sequence[str]):
        self.names = urls

    def read(self, shard: int) -> Iterator[tuple[bytes, int]]:
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        url = self.names[shard]
        with gopen(url) as stream:  # a command that fails says so when it is closed
            for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                image = next((value for kind, value in sample.items() if f".{kind}" in IMAGE_SUFFIXES), None)
                if image is not None:
                    yield image, label_of(sample.get("cls", b""))


class _HuggingFace:
    """Shards of a `datasets.IterableDataset`; images stay encoded if the set says which column holds them."""

    def __init__(self, dataset: Any, name: str):
        import datasets

        self._columns: list[str] = []
        self._name, self.class_names = name, ()
        if dataset.features is not None:
            self._columns = find_columns(dataset.features.arrow_schema, name)
            if len(self._columns) > 1:
                self.class_names = tuple(getattr(dataset.features[self._columns[1]], "names", ()))
            dataset = dataset.with_format(None).select_columns(self._columns)
            if isinstance(dataset.features[self._columns[0]], datasets.Image):
                dataset = dataset.cast_column(self._columns[0], datasets.Image(decode=False))
        self._dataset = dataset
        self.names = [f"{shard} of {dataset.num_shards}" for shard in range(dataset.num_shards)]

    def read(self, shard: int) -> Iterator[tuple[Any, int | str | None]]:
        for row in self._dataset.shard(num_shards=len(self.names), index=shard):
            image, label = [*(row[name] for name in self._columns), None][:2] if self._columns else unpack(row)
            yield image, plain_label(label, self._name)


class _Taken(Rows):
    """Images of a stream that are held in memory, by number."""

    def __init__(self, records: Sequence[Record], where: str, names: Sequence[str]):
        self._records = records
        self._labels, classes = number_labels([record.label for record in records], where, names)
        # Numbers without names: there may be more in what was not taken.
        self.classes = replace(classes, count=None) if classes is not None and not classes.names else classes

    def __len__(self) -> int:
        return len(self._records)

    def read(self, row: int) -> tuple[Any, int]:
        return _decoded(self._records[row].image), self._labels[row]


class _Decoder(Dataset):
    """Decodes images that are passed to it, without labels: its "index" is a position together with the image."""

    def __init__(self, name: str, transform: Transform | None, seed: int | None):
        self._name, self._transform, self._seed = name, transform, seed

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int] | None:
        position, record = draw
        try:
            image = _decoded(record.image)
            return prepare(image, self._transform, name=self._name, seed=self._seed, index=position), -1
        except READ_ERRORS:
            return None


def _decoded(image: Any) -> Any:
    """Decode bytes, or a mapping with bytes or a path or url; return PIL images and tensors as they are."""
    if isinstance(image, Mapping) and image.get("bytes") is None:
        import fsspec

        if image.get("path") is None:
            raise OSError("the cell is empty")
        with fsspec.open(image["path"], "rb") as file:
            image = file.read()  # type: ignore[union-attr]
    elif isinstance(image, Mapping):
        image = image["bytes"]
    return decode(image) if isinstance(image, bytes) else image


def _noted(draws: Iterable[Sequence[Draw]], waiting: deque[list[Draw]]) -> Iterator[Sequence[Draw]]:
    """Yield the draws, and append each one without its images to `waiting` as it goes to the loader."""
    for drawn in draws:
        waiting.append([(position, record._replace(image=None)) for position, record in drawn])
        yield drawn


def _permutation(size: int, *key: int) -> list[int]:
    """Return a random order of 0..size-1, the same for the same key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.randperm(size, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big"))).tolist()


def _load_dataset(name: str) -> Any:
    """Open all splits of a Hugging Face set by name or folder, streamed."""
    import datasets

    parts = [name] if Path(name).exists() else ["/".join(name.split("/")[:2]), *name.split("/")[2:]]
    try:
        load: Any = datasets.load_dataset
        return load(*parts, streaming=True)
    except Exception as error:  # the Hub, networks and scripts fail in their own ways
        reason = reason_of(error)
        raise DataError(f"{PREFIX}{name}: can't be opened ({reason}); use {PREFIX}ORG/NAME[/CONFIG].") from error
