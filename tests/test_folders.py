"""Folders of images: the list, the classes and the splits, against torchvision's ImageFolder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from vitrim.data import open_images, open_pairs, open_stream
from vitrim.errors import DataError

NAMES = st.sampled_from(["cat", "dog", "Ant", "a", "a-b", "a b", "ä", "10", "9", "trainer", "test tube"])
FILES = st.sampled_from(["0.png", "1.JPG", "2.jpeg", "b.webp", "a.tiff", "x.bmp", "9.ppm", "z.PGM"])
OTHERS = st.sampled_from(["notes.txt", "Thumbs.db", "movie.mp4", "noending"])
HIDDEN = st.sampled_from([".hidden/x.png", "__MACOSX/cat/._x.png", ".x.png", "cat/.thumbs/x.png", "dog/__MACOSX/x.png"])


def touch(root: Path, *paths: str) -> Path:
    """Make files; what is in them does not matter before they are read."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return root


def listed(images, root: Path) -> list[tuple[str, int]]:
    found = images._rows._found
    return [(str(file.relative_to(root)), label) for file, label in zip(found.files, found.labels, strict=True)]


@st.composite
def trees(draw):
    """Two or more classes, each with an image at any depth, and files that are none; and what is hidden."""
    classes = draw(st.lists(NAMES, min_size=2, max_size=4, unique_by=str.lower))
    inner = st.lists(NAMES, max_size=2).map("/".join)
    paths = set()
    for name in classes:
        files = draw(st.lists(st.tuples(inner, FILES), min_size=1, max_size=4))
        paths |= {os.path.normpath(f"{name}/{folder}/{file}") for folder, file in files}
        paths |= {os.path.normpath(f"{name}/{draw(inner)}/{file}") for file in draw(st.lists(OTHERS, max_size=2))}
    return sorted(paths), draw(st.lists(HIDDEN, max_size=3)) if {"cat", "dog"} <= set(classes) else []


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(tree=trees())
def test_list_and_labels_are_torchvisions(tree):
    paths, hidden = tree
    with tempfile.TemporaryDirectory() as name:
        root = touch(Path(name), *paths)
        reference = ImageFolder(root)
        touch(root, *hidden)
        images = open_images(root)
        expected = [(str(Path(file).relative_to(root)), label) for file, label in reference.samples]
        assert listed(images, root) == expected
        assert list(images._rows._found.classes) == reference.classes and images.has_labels


ANY = ["cat", "dog", "train", "val", "test2017", ".hidden", "__MACOSX", "images", "é\u202e", "images train", "a b"]
PLACES = st.lists(st.sampled_from(ANY), max_size=3).map("/".join)
ENTRIES = st.tuples(PLACES, st.sampled_from(["0.png", "x.txt", "up.png", "gone.png", "empty", "x.parquet"]))
SPLITS = st.sampled_from([None, "train", "val", "nonsense"])


@settings(max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(entries=st.lists(ENTRIES, max_size=6), split=SPLITS, default=st.sampled_from(["train", "test"]))
def test_any_tree_opens_or_says_why_not_in_one_line(entries, split, default):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder, file in entries:
            (root / folder).mkdir(parents=True, exist_ok=True)
            if file in ("up.png", "gone.png") and not (root / folder / file).is_symlink():
                (root / folder / file).symlink_to(root if file == "up.png" else root / "nowhere")
            elif file != "empty" and not (root / folder / file).is_symlink():
                (root / folder / file).write_bytes(b"")
        try:
            images = open_images(root, split=split, default=default)
        except DataError as error:
            assert str(error).isprintable() and str(root) in str(error)
            return
        files = images._rows._found.files
        assert 0 < len(files) == len(set(files)) and not any(".hidden" in file.parts for file in files)
        assert split != "nonsense"
        assert [images[row] for row in range(len(files))] == [None] * len(files)


def test_an_empty_class_is_an_error_as_in_torchvision(tmp_path):
    touch(tmp_path, "cat/0.png", "dog/0.png", "annotations/instances.json")
    with pytest.raises(FileNotFoundError, match="annotations"):
        ImageFolder(tmp_path)
    with pytest.raises(
        DataError, match=r"every folder is a class, and 'annotations' holds no image that ends in .*\.png"
    ):
        open_images(tmp_path)
    shutil.rmtree(tmp_path / "annotations")
    (tmp_path / "bird").mkdir()
    with pytest.raises(DataError, match="'bird' holds no image"):
        open_images(tmp_path)


def test_endings_are_named_where_no_image_is_found(tmp_path):
    touch(tmp_path, "cat/0.heic", "dog/1.HEIC", "read.me")
    with pytest.raises(
        DataError, match=r"no images found \(but \.heic, \.me\); pass a folder of images \(\.bmp, \.jpeg"
    ):
        open_images(tmp_path)


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    touch(tmp_path / "elsewhere", "0.png", "deep/1.png")
    root = touch(tmp_path / "photos", "cat/0.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "up").symlink_to(root)
    assert {("cat/0.png", 0), ("dog/0.png", 1), ("dog/deep/1.png", 1)} <= set(listed(open_images(root), root))
    (root / "cat" / "up").unlink()
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(root / "cat" / "pipe.png")
    images = open_images(root)
    assert [path for path, _ in listed(images, root)] == ["cat/0.png", "cat/gone.png", "dog/0.png", "dog/deep/1.png"]
    assert images[1] is None and images.kinds() == {"unreadable": 1}


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        (["cat/0.png", "dog/0.png", "cover.png"], "images lie beside its folders"),
        (["2023/may/0.png", "2023/june/0.png"], "its images lie in one folder"),
    ],
)
def test_no_labels_is_said(tmp_path, paths, why):
    images = open_images(touch(tmp_path, *paths))
    assert not images.has_labels and len(images) == len(paths)
    assert images.remarks() == [f"{tmp_path}: {why}, so folders are no classes and there are no labels."]


IMAGENET = ["train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png", "val/dog/4.png"]
COCO = ["train2017/0.png", "val2017/1.png", "test2017/2.png", "annotations/instances.json"]
YOLO = ["images/train/0.png", "images/val/1.png", "images/val/2.png"]
WITHIN = ["cat/train/0.png", "cat/test/1.png", "dog/train/2.png", "dog/test/3.png"]


@pytest.mark.parametrize(
    ("paths", "given", "expected"),
    [
        (IMAGENET, {}, [("train/cat/0.png", 0), ("train/dog/1.png", 1)]),
        (IMAGENET, {"split": "validation"}, [("val/cat/2.png", 0), ("val/dog/3.png", 1), ("val/dog/4.png", 1)]),
        (IMAGENET, {"default": "test"}, [("val/cat/2.png", 0), ("val/dog/3.png", 1), ("val/dog/4.png", 1)]),
        (COCO, {}, ["train2017/0.png"]),
        (COCO, {"split": "val2017"}, ["val2017/1.png"]),
        (COCO, {"default": "test"}, ["test2017/2.png"]),
        (YOLO, {}, ["images/train/0.png"]),
        (YOLO, {"split": "val"}, ["images/val/1.png", "images/val/2.png"]),
        (WITHIN, {}, [("cat/train/0.png", 0), ("dog/train/2.png", 1)]),
        (WITHIN, {"split": "test"}, [("cat/test/1.png", 0), ("dog/test/3.png", 1)]),
        (["train/0.png", "test/1.png", "extra/2.png", "3.png"], {}, ["train/0.png"]),
        (["train/cat/0.png", "train/dog/1.png"], {}, [("train/cat/0.png", 0), ("train/dog/1.png", 1)]),
    ],
)
def test_folders_called_after_splits_are_splits(tmp_path, paths, given, expected):
    images = open_images(touch(tmp_path, *paths), **given)
    found = images._rows._found
    files = [str(file.relative_to(tmp_path)) for file in found.files]
    assert (list(zip(files, found.labels, strict=True)) if found.labels else files) == expected
    assert any("is read" in remark for remark in images.remarks())
    assert any("2 images outside" in remark for remark in images.remarks()) == ("3.png" in paths)


@pytest.mark.parametrize(
    ("paths", "given", "message"),
    [
        (IMAGENET, {"split": "test"}, r"no split 'test'; use one of \['train', 'val'\]"),
        (["val/0.png", "test/1.png"], {}, r"no split 'train'; use one of \['test', 'val'\]"),
        (["test/cat/0.png", "test/dog/1.png"], {}, r"no split 'train'; use one of \['test'\]"),
        (["cat/0.png", "dog/1.png"], {"split": "test"}, "has no splits, so not 'test' either"),
        (["0.png"], {"split": "train"}, "has no splits"),
        (
            ["train/cat/0.png", "val/cat/1.png", "train/dog/2.png", "val/fish/x.txt"],
            {"split": "val"},
            "'fish' holds no",
        ),
        (["car/0.png", "odd/train/1.png", "odd/test/2.png"], {}, "some images lie in folders named test, train"),
    ],
)
def test_splits_are_obeyed_or_refused(tmp_path, paths, given, message):
    with pytest.raises(DataError, match=message):
        open_images(touch(tmp_path, *paths), **given)


def test_a_class_may_be_called_train(tmp_path):
    images = open_images(touch(tmp_path, "bus/0.png", "car/0.png", "train/0.png"))
    assert images._rows._found.classes == ("bus", "car", "train")


def test_a_split_is_refused_by_every_kind_of_source_without_any(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    hugging_face = datasets.Dataset.from_dict(
        {"image": [{"bytes": (tmp_path / "0.png").read_bytes(), "path": None}]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    hugging_face.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "parts").mkdir()
    hugging_face.to_parquet(tmp_path / "parts" / "part-0.parquet")
    tensors, pairs = torch.zeros(2, 3, 4, 4), [(Image.new("RGB", (4, 4)), "a photo")]
    for source in (
        hugging_face,
        tmp_path / "x.parquet",
        tmp_path / "parts",
        tensors,
        list(tensors),
        open_images(tensors),
    ):
        assert len(open_images(source)) > 0
        with pytest.raises(DataError, match="has no splits, so not 'test' either"):
            open_images(source, split="test")
    for stream in ("pipe:cat x.tar", hugging_face.to_iterable_dataset()):
        with pytest.raises(DataError, match="has no splits"):
            open_stream(stream, split="test")
    with pytest.raises(DataError, match="has no splits"):
        open_pairs(pairs, split="test")


def test_one_rule_for_names_of_splits_everywhere(hugging_face_parts):
    for name in ("val", "validation", "valid"):
        assert len(open_images(hugging_face_parts, split=name)) == 2
    assert len(open_images(hugging_face_parts, default="test")) == 2
    with pytest.raises(DataError, match=r"no split 'test'; use one of \['train', 'validation'\]"):
        open_images(hugging_face_parts, split="test")


@pytest.fixture
def hugging_face_parts():
    cells = [{"bytes": b"", "path": None}] * 2
    features = datasets.Features({"image": datasets.Image()})
    part = datasets.Dataset.from_dict({"image": cells}, features=features)
    return datasets.DatasetDict({"train": datasets.concatenate_datasets([part] * 2), "validation": part})
