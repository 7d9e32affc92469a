"""Labels of every kind and source, and whether they are those of a model's head."""

from __future__ import annotations

import io
import re

import datasets
import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from torch.utils.data import Dataset, Subset, TensorDataset

import vitrim
from vitrim.config.recipe import Recipe
from vitrim.data import open_images, open_stream, split_images
from vitrim.data.match import check_numbers, match_labels, match_names
from vitrim.errors import DataError
from vitrim.evaluation import _like, top1_of

PNG = io.BytesIO()
Image.new("RGB", (4, 4)).save(PNG, "PNG")
CELL = {"bytes": PNG.getvalue(), "path": None}


class Items(Dataset):
    def __init__(self, labels, **attributes):
        self.labels = labels
        self.__dict__ |= attributes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.new("RGB", (4, 4)), self.labels[index]


def every_source(labels: list, folder) -> dict:
    """Images with these labels as each kind of source whose labels are all known when it is opened."""
    parquet.write_table(
        pa.table({"image": [CELL] * len(labels), "label": labels}), folder / "x.parquet", row_group_size=2
    )
    table = pa.table({"image": [CELL] * len(labels), "label": labels})
    hugging_face = datasets.Dataset(table).cast_column("image", datasets.Image())
    return {
        "list": lambda: open_images([(Image.new("RGB", (4, 4)), label) for label in labels]),
        "parquet": lambda: open_images(folder / "x.parquet"),
        "datasets": lambda: open_images(hugging_face),
        "stream": lambda: open_stream(hugging_face.to_iterable_dataset()).take(len(labels), seed=0)[0],
    }


def labels_of(images) -> list[int]:
    return [images[row][1] for row in range(len(images))]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("labels")


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(labels=st.lists(st.text("abcÄ 10", max_size=3) | st.none(), min_size=1, max_size=6).filter(any))
def test_text_is_classes_in_sorted_order_everywhere(scratch, labels):
    names = sorted({label for label in labels if label is not None})
    expected = [-1 if label is None else names.index(label) for label in labels]
    for name, images in every_source(labels, scratch).items():
        images = images()
        found = labels_of(images)
        assert images.classes.names == tuple(names) and images.classes.count == len(names)
        assert found == expected if name != "stream" else sorted(found) == sorted(expected)


@pytest.mark.parametrize("labels", [[2, 0, 2, None], [2.0, 0.0, 2.0, None]])
def test_whole_numbers_are_classes_as_they_are(tmp_path, labels):
    for name, images in every_source(labels, tmp_path).items():
        images = images()
        assert sorted(labels_of(images)) == [-1, 0, 2, 2], name
        assert images.classes.names == () and images.classes.count == (None if name == "stream" else 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([True, False], "labels are bools; use class numbers, or text"),
        ([0.0, 0.5], r"label 0\.5 is no class number"),
        ([1.0, float("nan")], "label nan is no class number"),
        ([np.bool_(True), torch.tensor(True)], "labels are bools"),
        ([torch.tensor(0.5)], r"label 0\.5 is no class number"),
        ([1, "cat"], r"some labels are numbers \(1\), others text \('cat'\)"),
    ],
)
def test_what_is_no_class_is_refused_before_the_first_image_is_read(tmp_path, labels, message):
    sources = {"list": lambda: open_images([(Image.new("RGB", (4, 4)), label) for label in labels])}
    if len(labels) > 1 and isinstance(labels[0], bool | float):
        sources = every_source(labels, tmp_path)
    if "others" not in message:
        sources["set"] = lambda: open_images(Items(labels))
    for images in sources.values():
        with pytest.raises(DataError, match=message) as caught:
            images()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [None, -1, -100, {"boxes": []}, [0, 1], torch.zeros(3), (1, 2)])
def test_what_is_no_label_is_none(label):
    for images in (open_images([(Image.new("RGB", (4, 4)), label)]), open_images(Items([label]))):
        assert not images.has_labels and labels_of(images) == [-1]


def test_names_of_classes_are_read_where_a_source_has_them(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    hugging_face = datasets.Dataset.from_dict({"image": [CELL] * 2, "label": [1, 0]}, features=features)
    hugging_face.to_parquet(tmp_path / "x.parquet")
    stream = open_stream(hugging_face.to_iterable_dataset()).take(2, seed=0)[0]
    for images in (open_images(hugging_face), open_images(tmp_path / "x.parquet"), stream):
        assert images.classes.names == ("dog", "cat") and sorted(labels_of(images)) == [0, 1]
    named = Items(["cat", "dog", "cat"], classes=["dog", "cat"])
    assert labels_of(open_images(named)) == [1, 0, 1] and labels_of(open_images(Subset(named, [1]))) == [0]
    assert open_images(Items([0, 1], classes=["a", "b", "c"])).classes.count == 3
    tensors = open_images(TensorDataset(torch.zeros(3, 3, 4, 4), torch.tensor([4, 0, 1])))
    assert tensors.classes.count == 5 and labels_of(tensors) == [4, 0, 1]
    assert open_images(Items([4, 0])).classes.count is None
    assert open_images("digits", limit=3).classes.names == tuple("0123456789")


def test_text_in_a_dataset_that_does_not_name_its_classes_is_no_label_and_said():
    images = open_images(Items(["a caption", "another"]))
    assert not images.has_labels and labels_of(images) == [-1, -1]
    assert images.remarks() == ["Items: labels are text such as 'a caption', and it has no classes; none are used."]


def vit(num_classes: int, names=None) -> torch.nn.Module:
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **size).eval()
    if names is not None:
        model.pretrained_cfg["label_names"] = names
    return model


def folder_of(root, *names: str):
    for number, name in enumerate(names):
        (root / name).mkdir()
        for each in range(2):
            Image.new("RGB", (8, 8), (number * 60, each * 200, 9)).save(root / name / f"{each}.png")
    return root


@pytest.mark.parametrize(
    ("classes", "num_classes", "names", "expected"),
    [
        (("cat", "dog"), 2, None, [0, 0, 1, 1]),  # as many
        (("cat", "dog"), 2, ["dog", "cat"], [1, 1, 0, 0]),  # the same names in another order
        (("cat", "dog"), 4, ["ant", "dog", "cow", "cat"], [3, 3, 1, 1]),  # a part of the names
        (("n01", "n02"), 2, ["tench", "goldfish"], [0, 0, 1, 1]),  # other words for as many classes
        (("cat", "dog"), 1000, None, None),
        (("cat", "dog"), 3, ["ant", "dog", "cow"], None),
        (("cat", "dog"), 2, ["dog", "cow"], None),  # as many, but others
    ],
)
def test_labels_are_those_of_the_head_or_there_is_no_top1(tmp_path, classes, num_classes, names, expected):
    model, images = vit(num_classes, names), open_images(folder_of(tmp_path, *classes))
    matched, fits, note = match_labels(images, model)
    assert fits == (expected is not None) == (note is None)
    split = split_images(images, Recipe.parse({}), model=model)
    if expected is None:
        assert note == split.notes[-1] and "top-1 is not measured" in note and "2 classes (cat, dog)" in note
        assert top1_of(model, split.held_out) is None and labels_of(matched) == [0, 0, 1, 1]
        return
    assert labels_of(matched) == expected and split.notes == ()
    batches = list(matched.loader(batch_size=4))
    with torch.no_grad():
        right = model(batches[0].images_BCHW).argmax(1) == torch.tensor(expected)
    assert top1_of(model, batches) == 100 * right.double().mean()


def test_numbers_without_names_are_the_heads_only_if_there_are_as_many():
    for labels, num_classes, fits in (([0, 1, 2], 3, True), ([0, 1, 2], 1000, False), ([0, 5], 3, False)):
        pairs = [(Image.new("RGB", (8, 8)), label) for label in labels]
        assert match_labels(open_images(pairs), vit(num_classes))[1] == fits
    assert not match_labels(open_images(Items([0, 1, 2])), vit(3))[1]  # there may be more
    images, fits, note = match_labels(open_images(torch.zeros(2, 3, 8, 8)), vit(3))
    assert not fits and "has no labels, so top-1 is not measured" in note
    assert match_labels(images, vit(0))[1:] == (False, None)


def test_names_of_transformers_are_those_of_its_config():
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 8}
    images = open_images([(Image.new("RGB", (8, 8)), name) for name in ("cat", "dog")])
    named = ViTForImageClassification(ViTConfig(patch_size=4, id2label={0: "dog", 1: "cat"}, **size))
    matched, fits, _ = match_labels(images, named)
    assert fits and labels_of(matched) == [1, 0]
    unnamed = ViTForImageClassification(ViTConfig(patch_size=4, num_labels=2, **size))
    matched, fits, _ = match_labels(images, unnamed)
    assert fits and labels_of(matched) == [0, 1]


def test_an_index_with_other_classes_is_matched_by_name():
    make = lambda names: open_images([(Image.new("RGB", (8, 8)), name) for name in names])  # noqa: E731
    index = _like(make(["cat", "dog"]), make(["ant", "cat", "dog", "cat"]))
    assert labels_of(index) == [2, 0, 1, 0] and index.classes.names == ("cat", "dog", "ant")
    numbered = open_images([(Image.new("RGB", (8, 8)), 1)])
    assert labels_of(_like(make(["cat"]), numbered)) == [1]


def test_names_for_zero_shot_are_matched_by_name(tmp_path):
    images = open_images(folder_of(tmp_path, "cat", "dog"))
    assert labels_of(match_names(images, ["dog", "ant", "cat"])) == [2, 2, 0, 0]
    assert labels_of(match_names(images, ["a cat", "a dog"])) == [0, 0, 1, 1]
    with pytest.raises(DataError, match=r"2 classes \(cat, dog\), and the names given are 3 classes \(ant, bee, cow\)"):
        match_names(images, ["ant", "bee", "cow"])


def test_numbers_outside_of_a_head_are_refused_where_they_are_meant_for_it_and_only_features_judged_where_not():
    def check(labels, model):
        images = open_images([(Image.new("RGB", (8, 8)), label) for label in labels])
        return check_numbers(images, list(images.loader(batch_size=2)), model)

    for labels, said in (
        ([1, 2, 3], "label 3 (1 of 3 images)"),
        ([0, 1, 2, 0, 1, 0, 9, 7], "labels 7, 9 (2 of 8 images)"),
    ):
        with pytest.raises(
            DataError, match=re.escape(f"{said}, but the model's head has 3 classes; use 0..2, or text")
        ):
            check(labels, vit(3))
    for labels, num_classes in (
        ([0, 1, 2], 3),
        ([0, 3, 4, 5], 3),
        ([7, 8], 0),
        (["ant", "bee", "cow", "dog"], 3),
        ([None, 0], 3),
    ):
        check(labels, vit(num_classes))


def test_evaluate_refuses_numbers_outside_of_the_head():
    model = vit(3)
    images = [(Image.new("RGB", (8, 8)), label) for label in (1, 2, 3)]
    with pytest.raises(DataError, match=r"label 3 \(1 of 3 images\)"):
        vitrim.evaluate(model, model, images, latency=False, quiet=True)


def test_images_of_which_few_have_a_label_are_evaluated():
    model = vit(3)
    noise = torch.randint(256, (25, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for known in ({0: 1, 7: 2, 12: 0, 20: 1}, {3: 0, 9: 2}, {4: 2, 5: 2, 6: 2}):
        pairs = [(Image.fromarray(picture), known.get(number)) for number, picture in enumerate(noise)]
        found = vitrim.evaluate(model, model, pairs, latency=False, quiet=True).student
        assert set(found.scores) <= {"knn", "linear_probe", "top1"} and found.num_images["top1"] == len(known)
    with pytest.raises(DataError, match="knn: training: no image has a label"):
        vitrim.evaluate(model, model, pairs, index=[picture for picture, _ in pairs], latency=False, quiet=True)
