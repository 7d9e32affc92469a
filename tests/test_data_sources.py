from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision.transforms.functional import to_tensor

from vitrim.data import open_images, sources, transform_for
from vitrim.errors import DataError, VitrimError

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "test.parquet"

CFG_32 = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 1.0}


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_folder_takes_all_kinds_at_any_depth_and_no_other_files(tmp_path):
    deep = tmp_path / "2023" / "may"
    deep.mkdir(parents=True)
    for name in ("a.JPG", "b.jpeg", "c.png", "d.webp", "e.bmp", "f.ppm", "g.tif"):
        picture(0).save(deep / name)
    for name in ("notes.txt", "._a.jpg", "movie.mp4"):
        (deep / name).write_text("no")
    images = open_images(tmp_path)
    assert len(images) == 7 and not images.has_labels
    assert all(images[i] is not None for i in range(7))


def test_every_image_mode_becomes_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        picture(0).convert("L").convert(mode).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    images = open_images(tmp_path)
    assert [images[i][0].shape for i in range(6)] == [(3, 10, 12)] * 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "no such file or folder"),
        (lambda p: p, "no images found"),
        (lambda p: "cifar10", "no such file or folder"),
        (lambda p: 42, "int: not a source"),
        (lambda p: [], "no images found"),
        (lambda p: None, "not a source"),
    ],
)
def test_sources_that_are_none(tmp_path, make, message):
    with pytest.raises(DataError, match=message) as caught:
        open_images(make(tmp_path))
    assert "\n" not in str(caught.value) and "pass a folder of images" in str(caught.value)
    assert isinstance(caught.value, VitrimError)


def test_an_unsupported_file(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"x\.zip: not a \.parquet file"):
        open_images(tmp_path / "x.zip")


def write_parquet(path: Path, images, labels=None, *, as_struct=True, group_rows=2, **extra):
    import pyarrow as pa
    from pyarrow import parquet

    cells = [{"bytes": image, "path": None} for image in images] if as_struct else images
    columns = {"id": list(range(len(images))), "image": cells, **extra}
    if labels is not None:
        columns["label"] = labels
    parquet.write_table(pa.table(columns), path, row_group_size=group_rows)


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_reads_across_row_groups_in_any_order(tmp_path, as_struct, monkeypatch):
    monkeypatch.setattr(sources, "PARQUET_CACHE_BYTES", 2500)  # two of the four groups
    write_parquet(tmp_path / "x.parquet", [encoded(picture(i)) for i in range(7)], list(range(7)), as_struct=as_struct)
    images = open_images(tmp_path / "x.parquet")
    assert len(images) == 7 and images.has_labels
    for i in (6, 0, 3, 3, 5, 1, 2, 4, 0):
        assert torch.equal(images[i][0], to_tensor(picture(i))) and images[i][1] == i
    assert 1 <= len(images._rows._cache) <= 2


def test_parquet_corrupt_missing_and_unlabelled_cells(tmp_path):
    picture(5).save(tmp_path / "beside.png")
    cells = [
        {"bytes": encoded(picture(0)), "path": "0.png"},
        {"bytes": b"junk", "path": None},
        None,
        {"bytes": None, "path": "beside.png"},
        {"bytes": None, "path": None},
    ]
    write_parquet(tmp_path / "x.parquet", cells, [3, None, 1, None, 0], as_struct=False)
    images = open_images(tmp_path / "x.parquet")
    assert [images[i] is None for i in range(5)] == [False, True, True, False, True]
    assert images[0][1] == 3 and images[3][1] == -1
    assert torch.equal(images[3][0], to_tensor(picture(5)))
    write_parquet(tmp_path / "y.parquet", [encoded(picture(0))])
    assert not open_images(tmp_path / "y.parquet").has_labels


def test_parquet_folders_are_split_by_file_name(tmp_path):
    for name, number in (
        ("train-00000-of-00002", 0),
        ("train-00001-of-00002", 2),
        ("test-00000-of-00001", 5),
    ):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_parquet(tmp_path / "data" / f"{name}.parquet", [encoded(picture(number + i)) for i in range(2)])
    assert torch.equal(open_images(tmp_path)[2][0], to_tensor(picture(2)))
    assert (len(open_images(tmp_path)), len(open_images(tmp_path, split="test"))) == (4, 2)
    with pytest.raises(DataError, match=r"parquet files: no split 'val'; use one of \['test', 'train'\]"):
        open_images(tmp_path, split="val")
    other = tmp_path / "other"
    other.mkdir()
    write_parquet(other / "part-0.parquet", [encoded(picture(0))])
    write_parquet(other / "part-1.parquet", [encoded(picture(1))])
    assert len(open_images(other)) == 2
    with pytest.raises(DataError, match="has no splits, so not 'val' either"):
        open_images(other, split="val")


def test_parquet_column_choice_and_errors(tmp_path):
    image = encoded(picture(0))
    write_parquet(tmp_path / "a.parquet", [image], thumbnail=[b"x"], width=[12], coarse_label=[4])
    assert open_images(tmp_path / "a.parquet")[0][1] == 4
    write_parquet(tmp_path / "b.parquet", ["text"], as_struct=False)
    with pytest.raises(DataError, match="0 candidates for the image"):
        open_images(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"c\.parquet: not a readable parquet file"):
        open_images(tmp_path / "c.parquet")


@pytest.mark.shared
@pytest.mark.skipif(not CIFAR10.exists(), reason="needs ../shared/data/cifar10/test.parquet")
def test_cifar10_parquet_opens_quickly_and_matches_its_rows():
    from pyarrow import parquet

    images = open_images(CIFAR10, transform=transform_for({**CFG_32, "mean": (0,) * 3, "std": (1,) * 3}))
    assert len(images) == 10_000 and images.has_labels
    table = parquet.read_table(CIFAR10)
    for row in (0, 1, 9_999, 5_000):
        cell = table.slice(row, 1).to_pylist()[0]
        image, label = images[row]
        assert torch.equal(image, to_tensor(Image.open(io.BytesIO(cell["image"]["bytes"]))))
        assert label == cell["label"]
    labels = {images[i][1] for i in range(200)}
    assert labels == set(range(10))


@pytest.fixture(scope="module")
def hugging_face():
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(picture(i)), "path": None} for i in range(4)] + [{"bytes": b"junk", "path": None}]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 2, 0, 1]}, features=features)


def test_datasets_object_saved_or_in_memory(hugging_face, tmp_path):
    import datasets

    hugging_face.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": hugging_face}).save_to_disk(tmp_path / "parts")
    for images in (
        open_images(hugging_face),
        open_images(tmp_path / "one"),
        open_images(tmp_path / "parts", split="test"),
        open_images(datasets.DatasetDict({"test": hugging_face}), split="test"),
    ):
        assert len(images) == 5 and images.has_labels and images[4] is None
        for i in range(4):
            assert torch.equal(images[i][0], to_tensor(picture(i))) and images[i][1] == i % 3
    with pytest.raises(DataError, match=r"no split 'train'; use one of \['test'\]"):
        open_images(tmp_path / "parts")


def test_datasets_object_after_shuffling_and_selecting(hugging_face):
    images = open_images(hugging_face.select([3, 1]))
    assert torch.equal(images[0][0], to_tensor(picture(3))) and images[1][1] == 1


def test_streaming_datasets_are_collected(hugging_face):
    images = open_images(hugging_face.select(range(4)).to_iterable_dataset(), limit=3)
    assert len(images) == 3 and images[1][1] == 1
    assert torch.equal(images[2][0], to_tensor(picture(2)))


class Pairs(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def test_torch_datasets_and_loaders_keep_tensors_as_they_are():
    tensors = torch.randn(5, 3, 4, 4)
    labels = torch.arange(5)
    labelled = TensorDataset(tensors, labels)
    for source in (labelled, DataLoader(labelled, batch_size=2, shuffle=True)):
        images = open_images(source, transform=lambda image: pytest.fail("tensors are preprocessed already"))
        assert len(images) == 5 and images.has_labels
        assert torch.equal(images[3][0], tensors[3]) and images[3][1] == 3
    assert not open_images(TensorDataset(tensors)).has_labels
    assert not open_images(Pairs(list(tensors))).has_labels


def test_torch_dataset_of_pil_images_with_errors():
    images = open_images(Pairs([OSError("broken"), (picture(1).convert("L"), 1), {"image": picture(2), "label": 2}]))
    assert images[0] is None and images.has_labels
    assert images[1][0].shape == (3, 10, 12) and images[2][1] == 2
    with pytest.raises(KeyError):
        open_images(Pairs([picture(0)] * 9 + [KeyError("a bug, not a corrupt image")]))[9]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(4, 4), r"float32 \(4, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "uint8"),
        ("a caption", "str"),
    ],
)
def test_items_that_are_no_images(item, message):
    with pytest.raises(DataError, match=message):
        open_images(Pairs([item]))[0]


def test_a_dataset_without_length_is_refused():
    class Endless(Dataset):
        def __getitem__(self, index):
            return torch.zeros(3, 2, 2)

    with pytest.raises(DataError, match="Endless: has no length"):
        open_images(Endless())


class Stream(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_iterables_are_taken_apart_up_to_the_limit():
    tensors = torch.randn(7, 3, 4, 4)
    labels = torch.arange(7)
    batches = [(tensors[:3], labels[:3]), (tensors[3:6], labels[3:6]), (tensors[6], labels[6])]
    for source in (batches, iter(batches), Stream(batches), DataLoader(Stream(batches), batch_size=None)):
        images = open_images(source, limit=5)
        assert len(images) == 5 and images.has_labels
        assert torch.equal(images[4][0], tensors[4]) and images[4][1] == 4
    unlabelled = open_images(iter([tensors[:4], tensors[4:]]))
    assert len(unlabelled) == 7 and not unlabelled.has_labels
    assert torch.equal(open_images(tensors)[6][0], tensors[6])

    def endless():
        while True:
            yield tensors

    assert len(open_images(endless(), limit=10)) == 10


def test_digits_are_scaled_and_split():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = open_images("digits"), open_images("digits", split="test")
    assert (len(train), len(test)) == (1437, 360) and train.has_labels
    for images, i, row in ((train, 0, 0), (train, 1436, 1436), (test, 0, 1437), (test, 359, 1796)):
        image, label = images[i]
        expected = np.floor(digits.images[row] * 255 / 16 + 0.5) / 255
        assert abs(image.double().numpy() - expected[None]).max() < 1e-2 and label == digits.target[row]
        assert torch.equal(image[0], image[2])
    with pytest.raises(DataError, match="use 'train' or 'test'"):
        open_images("digits", split="val")


def test_image_sets_pickle_for_spawned_workers(tmp_path):
    import pickle

    write_parquet(tmp_path / "x.parquet", [encoded(picture(i)) for i in range(3)])
    images = open_images(tmp_path / "x.parquet", transform=transform_for(CFG_32))
    before = images[0][0]
    again = pickle.loads(pickle.dumps(images))
    assert not again._rows._cache and images._rows._cache
    assert torch.equal(again[0][0], before)
