"""Retrieval by captions: exact against a slow reference, in chunks, with ties; and every source of captions."""

import io
import json
import tarfile
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.pairs import WORDS, pictures, write_pair
from vitrim.clip.tasks import retrieval
from vitrim.data import open_pairs
from vitrim.errors import DataError
from vitrim.metrics.retrieval import image_text_recall

KS = (1, 2, 5)


def brute_force(images, texts, owners, ks):
    """Sorts all candidates of every query, in double precision."""
    cosines = (
        torch.nn.functional.normalize(images.double(), dim=1) @ torch.nn.functional.normalize(texts.double(), dim=1).T
    )
    found = {}
    for way, scores, is_right in (
        ("image_to_text", cosines, lambda query, place: owners[place] == query),
        ("text_to_image", cosines.T, lambda query, place: owners[query] == place),
    ):
        hits = dict.fromkeys(ks, 0)
        for query, row in enumerate(scores):
            ranked = sorted(range(len(row)), key=lambda place: -float(row[place]))
            for k in ks:
                hits[k] += any(is_right(query, place) for place in ranked[:k])
        found[way] = {f"recall@{k}": hits[k] / len(scores) for k in ks}
    return found


@pytest.mark.parametrize("chunk_numbers", [1, 100, 64_000_000])
def test_recalls_are_those_of_sorting_everything(chunk_numbers):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 8, generator=generator)
    counts = torch.randint(1, 5, (40,), generator=generator)
    owners = torch.arange(40).repeat_interleave(counts)
    texts = images[owners] + 1.5 * torch.randn(len(owners), 8, generator=generator)
    order = torch.randperm(len(owners), generator=generator)  # captions stand in any order
    found = image_text_recall(images, texts[order], owners[order], ks=KS, chunk_numbers=chunk_numbers)
    expected = brute_force(images, texts[order], owners[order].tolist(), KS)
    assert found == {way: pytest.approx(values) for way, values in expected.items()}
    assert 0.1 < found["image_to_text"]["recall@1"] < found["image_to_text"]["recall@5"] < 1


def every_order(scores, right, k):
    """Share of all orders of equal candidates in which one of the k first is right."""
    orders = [order for order in permutations(range(len(scores))) if [scores[i] for i in order] == sorted(scores)[::-1]]
    return sum(any(right[i] for i in order[:k]) for order in orders) / len(orders)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), max_size=4))
def test_ties_count_as_the_mean_over_their_orders(captions):
    """Two images, and captions that point in one of three directions each."""
    captions = [(0, 0), (1, 1), *captions]
    directions = torch.eye(3)
    texts, owners = (
        torch.stack([directions[way] for _, way in captions]),
        torch.tensor([owner for owner, _ in captions]),
    )
    images = torch.stack([directions[0] + directions[1], directions[0]])
    found = image_text_recall(images, texts, owners, ks=KS)
    for k in KS:
        rows = (torch.nn.functional.normalize(images, dim=1) @ texts.T).tolist()
        slow = [every_order(row, [owner == i for owner in owners.tolist()], k) for i, row in enumerate(rows)]
        assert found["image_to_text"][f"recall@{k}"] == pytest.approx(sum(slow) / 2)
    for k in (1, 2):
        scores = (torch.nn.functional.normalize(images, dim=1) @ texts.T).T.tolist()
        slow = [every_order(row, [i == owner for i in range(2)], k) for row, owner in zip(scores, owners, strict=True)]
        assert found["text_to_image"][f"recall@{k}"] == pytest.approx(sum(slow) / len(slow))


def test_collapsed_features_get_the_recall_of_guessing():
    owners = torch.arange(10).repeat_interleave(2)
    found = image_text_recall(torch.ones(10, 4), torch.ones(20, 4), owners, ks=(1, 5))
    missed = torch.tensor([(18 - i) / (20 - i) for i in range(5)], dtype=torch.float64)
    assert found["text_to_image"] == pytest.approx({"recall@1": 0.1, "recall@5": 0.5})
    assert found["image_to_text"] == pytest.approx({"recall@1": 0.1, "recall@5": 1 - float(missed.prod())})


def test_no_more_similarities_are_held_than_allowed(monkeypatch):
    seen, real = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append(real(a, b).numel()) or real(a, b))
    vectors = torch.randn(300, 4)
    image_text_recall(vectors, vectors, torch.arange(300), chunk_numbers=3000)
    assert max(seen) == 3000 and sum(seen) == 2 * 300 * 300


@pytest.mark.parametrize(
    "images, texts, owners, words",
    [
        ((3, 4), (3, 5), [0, 1, 2], "pass vectors of one width"),
        ((3, 4), (3, 4), [0, 1], "pass vectors of one width"),
        ((3, 4), (3, 4), [0, 1, 3], "texts belong to images 0..2"),
        ((3, 4), (3, 4), [0, 1, 1], "an image has no caption"),
        ((0, 4), (0, 4), [], "got images"),
    ],
)
def test_shapes_that_do_not_fit(images, texts, owners, words):
    with pytest.raises(DataError, match=words):
        image_text_recall(torch.ones(images), torch.ones(texts), torch.tensor(owners, dtype=torch.int64))


# Sources of captions

CAPTIONS = [["a cat on the car", "two cat"], ["the red ship"], ["a frog", "a small frog", "the big frog in a car"]]


def pixels(index):
    return Image.new("RGB", (32, 32), (60 * index, 100, 200 - 60 * index))


def encoded(index, kind="PNG"):
    buffer = io.BytesIO()
    pixels(index).save(buffer, kind)
    return buffer.getvalue()


def write_shards(folder, *, as_json=False):
    folder.mkdir()
    for shard, rows in enumerate(([0, 1], [2])):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for row in rows:
                caption = json.dumps({"captions": CAPTIONS[row]}) if as_json else "\n".join(CAPTIONS[row])
                for kind, data in (("png", encoded(row)), ("json" if as_json else "txt", caption.encode())):
                    info = tarfile.TarInfo(f"{row:06d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def write_parquet(path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = pa.array([{"bytes": encoded(row), "path": None} for row in range(3)])
    parquet.write_table(
        pa.table({"image": images, "caption": pa.array(CAPTIONS), "id": pa.array(["x", "y", "z"])}), path
    )
    return path


def write_coco(folder):
    (folder / "images").mkdir(parents=True)
    for row in range(3):
        (folder / "images" / f"{row}.png").write_bytes(encoded(row))
    notes = [
        {"id": 9 - i, "image_id": 70 + row, "caption": text} for row in range(3) for i, text in enumerate(CAPTIONS[row])
    ]
    said = {"images": [{"id": 70 + row, "file_name": f"{row}.png"} for row in range(3)], "annotations": notes}
    (folder / "captions.json").write_text(json.dumps(said))
    return folder / "captions.json"


def as_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"image": [pixels(row) for row in range(3)], "sentences": CAPTIONS})


class Numbered(torch.utils.data.Dataset):
    """As torchvision's CocoCaptions: no iterator, (image, captions)."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return pixels(index), CAPTIONS[index]


SOURCES = {
    "shards": lambda root: (write_shards(root / "shards"), {}),
    "shards, json": lambda root: (write_shards(root / "shards", as_json=True), {}),
    "shards in braces": lambda root: (str(write_shards(root / "shards") / "{000..001}.tar"), {}),
    "parquet": lambda root: (write_parquet(root / "a.parquet"), {}),
    "folder of parquet": lambda root: (write_parquet(root / "a.parquet").parent, {}),
    "coco": lambda root: (write_coco(root / "coco"), {"image_folder": root / "coco" / "images"}),
    "dataset": lambda root: (as_dataset(root), {}),
    "torch dataset": lambda root: (Numbered(), {}),
    "pairs": lambda root: ([(pixels(row), CAPTIONS[row]) for row in range(3)], {}),
    "dicts": lambda root: ([{"image": pixels(row), "caption": CAPTIONS[row]} for row in range(3)], {}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_pairs(tmp_path, name):
    source, options = SOURCES[name](tmp_path)
    pairs = open_pairs(source, **options)
    for _ in range(2):  # and again
        first, second = pairs.batches(2)
        assert first.captions + second.captions == CAPTIONS
        assert first.rows_B.tolist() + second.rows_B.tolist() == [0, 1, 2]
        found = torch.cat([first.images_BCHW, second.images_BCHW])
        expected = [[60 * row / 255, 100 / 255, (200 - 60 * row) / 255] for row in range(3)]
        torch.testing.assert_close(found[:, :, 0, 0], torch.tensor(expected))
    assert [b.captions for b in open_pairs(source, limit=2, **options).batches(8)] == [CAPTIONS[:2]]


def test_processes_and_workers_share_the_images(tmp_path):
    source = open_pairs(write_shards(tmp_path / "shards"))
    shares = [[b for b in source.shared(rank, 2).batches(8, num_workers=rank)] for rank in range(2)]
    assert [[b.rows_B.tolist() for b in share] for share in shares] == [[[0, 2]], [[1]]]
    assert shares[1][0].captions == CAPTIONS[1:2]
    (batch,) = source.batches(8, num_workers=2)
    assert sorted(batch.rows_B.tolist()) == [0, 1, 2]
    assert [batch.captions[i] for i in batch.rows_B.argsort()] == CAPTIONS


def test_images_without_a_caption_are_passed_over():
    class Gaps(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"image": pixels(index), "text": [" ", "", CAPTIONS[0][0]][index % 3]}

    (batch,) = open_pairs(Gaps()).batches(8)
    assert batch.captions == [[CAPTIONS[0][0]]] and batch.num_skipped == 0


def test_broken_images_are_counted(tmp_path):
    path = write_coco(tmp_path / "coco")
    (tmp_path / "coco" / "images" / "1.png").write_bytes(encoded(1)[:40])
    (batch,) = open_pairs(path, image_folder=tmp_path / "coco" / "images").batches(8)
    assert batch.captions == [CAPTIONS[0], CAPTIONS[2]] and batch.rows_B.tolist() == [0, 2] and batch.num_skipped == 1
    for row in range(3):
        (tmp_path / "coco" / "images" / f"{row}.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"no image with a caption could be read \(3 failed\)"):
        list(open_pairs(path, image_folder=tmp_path / "coco" / "images").batches(8))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda root: "nowhere", "nowhere: no such file or folder"),
        (lambda root: root, "holds no captions that vitrim can read"),
        (lambda root: write_coco(root / "coco"), "pass image_folder"),
        (lambda root: (root / "a.json").write_text("[]") and root / "a.json", "not COCO's captions"),
        (lambda root: (root / "a.tar").write_bytes(b"no tar") and root / "a.tar", "can't be read to its end"),
        (lambda root: [(pixels(0), 3)], "an item has int for its captions"),
        (lambda root: 5, "int: not a source of images with captions"),
    ],
)
def test_a_source_that_does_not_fit_is_one_clear_line(tmp_path, make, words):
    with pytest.raises(DataError, match=words) as caught:
        list(open_pairs(make(tmp_path)).batches(4))
    assert "\n" not in str(caught.value)


# The whole way


@pytest.mark.parametrize("layout", ["open_clip", "siglip"])
def test_a_pair_is_measured_as_by_hand(tmp_path, layout):
    from vitrim.models.towers import embed_images, open_pair
    from vitrim.output.load import open_model

    folder = write_pair(layout, tmp_path / layout)
    generator = torch.Generator().manual_seed(0)
    captions = [
        [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (5,), generator=generator)) for _ in range(1 + row % 3)]
        for row in range(20)
    ]
    images = pictures(20)
    found = retrieval(str(folder), list(zip(images, captions, strict=True)), ks=KS, quiet=True, batch_size=7)
    pair = open_pair(*open_model(str(folder)))
    with torch.no_grad():
        texts = pair.embed_texts(pair.tokenize([text for texts in captions for text in texts]))
        owners = [row for row in range(20) for _ in captions[row]]
        slow = brute_force(embed_images(pair.model, images), texts, owners, KS)
    for way, recalls in slow.items():
        assert found[way] == pytest.approx({name: 100 * share for name, share in recalls.items()})
    assert (found["num_images"], found["num_captions"], found["num_skipped"]) == (20, len(owners), 0)
