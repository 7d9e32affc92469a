"""Shards and streams: which images are read, by whom, in which order, and that nothing is collected."""

import io
import itertools
import json
import sys
import textwrap
from collections import Counter

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import to_tensor

import vitrim
from tests.support.processes import run_python
from tests.support.streams import picture, piped, png, train, write_shards, write_tar
from vitrim.config.options import RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.data import ImageStream, is_text, open_images, open_stream, split_images
from vitrim.errors import DataError, MissingExtraError, RecipeError
from vitrim.recover.sampler import StreamSampler, open_sampler


class Numbers:
    """Shards in memory whose images are their own places; knows which shards were begun and how much was read."""

    def __init__(self, *sizes: int):
        self.sizes, self.begun, self.num_read = sizes, [], 0
        self.names = [f"shard {shard}" for shard in range(len(sizes))]

    def read(self, shard):
        self.begun.append(shard)
        for number in range(self.sizes[shard]):
            self.num_read += 1
            yield torch.full((1, 1, 1), shard * 1000.0 + number), -1


def numbers(*sizes: int) -> ImageStream:
    return ImageStream(shards=Numbers(*sizes), name="numbers")


def order_of(stream, **kwargs):
    ranks = {name: kwargs.pop(name) for name in ("rank", "num_processes") if name in kwargs}
    options = RecoverOptions(**{"steps": 1, "batch_size": 6, "stream_lanes": 4, "shuffle_buffer": 8, **kwargs})
    return StreamSampler(stream, options, 0, **ranks)


def images_at(steps) -> list[dict[int, float]]:
    """What each step sees, by position."""
    return [
        {
            row: image
            for micro in micros
            for row, image in zip(micro.rows_B.tolist(), micro.images_BCHW.flatten().tolist(), strict=True)
        }
        for micros in steps
    ]


# Tar files on a disk


def test_tar_files_are_images_by_number(tmp_path):
    files = write_shards(tmp_path / "shards", num_shards=3, per_shard=4)
    sources = (tmp_path / "shards", files, str(tmp_path / "shards" / "{000..002}.tar"), [str(file) for file in files])
    for images in map(open_images, sources):
        assert len(images) == 12 and images.has_labels
        for n in (11, 0, 4, 3, 11):
            assert torch.equal(images[n][0], to_tensor(picture(n))) and images[n][1] == n
    assert len(open_images(files[1])) == 4 and open_images(str(files[1]))[0][1] == 4


def test_a_sample_is_what_webdataset_says_it_is(tmp_path):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    members = {
        "__meta__/a.png": png(9),
        "x/one.PNG": png(0),
        "x/one.json": b"{}",
        "x/one.seg.png": png(9),
        "y/one.cls": b"7",
        "y/one.jpg": png(1),
        "only.cls": b"1",
        "./._hidden.png": png(9),
        "notes": b"no",
        "bare.webp": png(2),
    }
    file = write_tar(tmp_path / "x.tar", members)
    kinds = ("png", "jpg", "webp")
    with file.open("rb") as opened:
        reference = [
            (next(sample[kind] for kind in kinds if kind in sample), int(sample.get("cls", b"-1")))
            for sample in group_by_keys(tar_file_expander([{"url": "", "stream": opened}]))
            if any(kind in sample for kind in kinds)
        ]
    images, stream = open_images(file), open_stream(f"pipe:cat {file}").take(10, seed=0)[0]
    assert sorted(label for _, label in reference) == [-1, -1, 7]
    assert len(images) == len(stream) == len(reference) == 3
    for n, (encoded, label) in enumerate(reference):
        assert torch.equal(images[n][0], to_tensor(Image.open(io.BytesIO(encoded)))) and images[n][1] == label
    assert sorted(stream[n][1] for n in range(3)) == [-1, -1, 7]


def test_what_is_wrong_with_a_tar_file(tmp_path):
    (file,) = write_shards(tmp_path / "shards", num_shards=1, per_shard=4)
    whole = file.read_bytes()
    broken = write_tar(tmp_path / "broken.tar", {"a.png": png(0), "b.png": b"junk", "c.png": png(0)[:60]})
    assert [open_images(broken)[n] is None for n in range(3)] == [False, True, True]
    for size in (2600, 3500):  # within the second image's header, and within its data
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"000\.tar: not a readable \.tar file"):
            open_images(file)
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(DataError, match=r"pipe:gzip -dc .*x\.tar"):
        open_images(tmp_path / "x.tar")
    with pytest.raises(DataError, match=r"nowhere\.tar: not a readable"):
        open_images(tmp_path / "nowhere.tar")
    with pytest.raises(DataError, match="no images found"):
        open_images(write_tar(tmp_path / "text.tar", {"a.txt": b"no"}))
    with pytest.raises(DataError, match="can only be read as a stream"):
        open_images("https://example.com/{000..127}.tar")


def test_shards_are_told_from_text_and_folders(tmp_path):
    assert is_text(["a sentence", "about a .tar file"]) and not is_text(["a.tar", "b.tar"])
    (tmp_path / "photos.tar").mkdir()
    picture(0).save(tmp_path / "photos.tar" / "a.png")
    assert len(open_images(tmp_path / "photos.tar")) == 1
    assert open_stream("digits") is None and open_stream(tmp_path) is None and open_stream(["a.tar"]) is None


@pytest.mark.parametrize("source", ["x/{0..1}.tar", "https://example.com/0.tar", "pipe:cat x", "x.tar.gz"])
def test_webdataset_is_asked_for_where_it_is_needed(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'vitrim\[shards\]'"):
        open_stream(source)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_on_tar_files_equals_training_on_the_folder_bit_for_bit(tmp_path):
    write_shards(tmp_path / "shards", num_shards=2, per_shard=8)
    (tmp_path / "folder").mkdir()
    for n in range(16):
        (tmp_path / "folder" / f"{n:05d}.png").write_bytes(png(n))
    first, second = (train(open_images(tmp_path / name))[0] for name in ("shards", "folder"))
    assert_equal(first, second)


# Streams


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any),
    num_processes=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    accumulate=st.integers(1, 3),
    lanes=st.sampled_from([1, 2, 4, 6]),
    buffer=st.integers(1, 12),
    data=st.data(),
)
def test_every_number_of_processes_sees_the_same_global_batches(
    sizes, num_processes, batch_size, accumulate, lanes, buffer, data
):
    held_out = {(shard, 0) for shard, size in enumerate(sizes) if size > 1}
    stream = numbers(*sizes).without(held_out)
    options = {
        "batch_size": batch_size,
        "gradient_accumulation_steps": accumulate,
        "stream_lanes": lanes,
        "shuffle_buffer": buffer,
    }
    num_images = sum(sizes) - len(held_out)
    num_steps = 3 * num_images // (batch_size * accumulate) + 2
    whole = images_at(order_of(stream, **options).steps(0, num_steps))
    assert [row for step in whole for row in step] == list(range(num_steps * batch_size * accumulate))
    assert not {image for step in whole for image in step.values()} & {shard * 1000.0 for shard, _ in held_out}
    # Each lane gives every image of its shards once a pass, so that two passes of all lanes hold each image twice.
    num_lanes = order_of(stream, **options).num_lanes
    for lane in range(num_lanes):
        images = stream.lane(lane, num_lanes=num_lanes, window=2, seed=0)
        passes = [sum(sizes[s] - (sizes[s] > 1) for s in stream._dealt(e, lane, num_lanes, 0)) for e in range(2)]
        for size in passes:
            places = [record.place for record in itertools.islice(images, size)]
            assert len(set(places)) == size and not set(places) & held_out
    # A process that begins in the middle, and knows nothing of what was before, sees what it would have seen.
    first = data.draw(st.integers(0, num_steps - 1))
    shares = []
    for rank in range(num_processes):
        known = dict(stream.sizes) if data.draw(st.booleans()) else {}
        fresh = ImageStream(shards=Numbers(*sizes), name="again", held_out=frozenset(held_out), sizes=known)
        order = order_of(fresh, rank=rank, num_processes=num_processes, **options)
        steps = list(order.steps(first, num_steps))
        assert {len(micros) for micros in steps} == {accumulate}
        shares.append(images_at(steps))
    for step, parts in enumerate(zip(*shares, strict=True), start=first):
        rows = [row for part in parts for row in part]
        assert len(rows) == len(set(rows))
        assert {row: image for part in parts for row, image in part.items()} == whole[step]


def test_lanes_share_the_shards_and_a_pass_holds_every_image_once():
    stream = numbers(5, 5, 5, 5, 5, 5)
    lanes = [stream.lane(lane, num_lanes=3, window=4, seed=1) for lane in range(3)]
    for _ in range(2):
        seen = Counter(next(lane).place for lane in lanes for _ in range(10))
        assert seen == Counter((shard, number) for shard in range(6) for number in range(5))


def test_seed_pass_and_window_each_draw_an_order_of_their_own():
    def places(seed, first, shards=(40,)):
        lane = numbers(*shards).lane(0, num_lanes=1, window=20, seed=seed, first=first)
        return [record.place for record in itertools.islice(lane, 20)]

    first_window, second_window, second_pass = (places(0, first) for first in (0, 20, 40))
    assert sorted(first_window) == sorted(second_pass) == [(0, number) for number in range(20)]
    assert first_window != [(0, number) for number in range(20)] != second_pass
    assert first_window != second_pass and first_window != places(1, 0)
    assert [number - 20 for _, number in second_window] != [number for _, number in first_window]
    in_order = [[shard for shard, _ in places(0, first, shards=[1] * 20)] for first in (0, 20)]
    assert in_order[0] != in_order[1]


@pytest.mark.parametrize(("num_processes", "times_read"), [(1, 1), (2, 1), (4, 1), (8, 2), (3, 3)])
def test_a_shard_is_read_by_as_few_processes_as_the_lanes_allow(num_processes, times_read):
    begun = Counter()
    for rank in range(num_processes):
        stream = numbers(*[6] * 8)
        order = order_of(stream, batch_size=24, rank=rank, num_processes=num_processes)
        list(order.steps(0, 2))  # one pass
        begun += Counter(set(stream.shards.begun))
    assert begun == Counter({shard: times_read for shard in range(8)})


def test_a_resumed_run_reads_no_shard_again_that_it_has_finished(tmp_path):
    journal = tmp_path / "shards.jsonl"
    before = numbers(*[50] * 16).remembering(journal)
    expected = images_at(order_of(before, batch_size=100).steps(0, 7))
    assert {line["images"] for line in map(json.loads, journal.read_text().splitlines())} == {50}
    after = numbers(*[50] * 16).remembering(journal)
    assert images_at(order_of(after, batch_size=100).steps(6, 7)) == expected[6:]
    assert len(after.shards.begun) == 4  # one in each lane, of four
    assert images_at(order_of(numbers(*[50] * 16), batch_size=100).steps(6, 7)) == expected[6:]


def test_a_stream_is_never_collected():
    stream = numbers(10**6, 10**6)
    images, places = stream.take(10, seed=0)
    assert len(images) == len(set(places)) == 10 and stream.shards.num_read == 10
    order = order_of(stream, batch_size=6, shuffle_buffer=8)
    assert len(list(order.steps(0, 3))) == 3  # 18 images, in windows of 4 in each of 2 lanes
    assert stream.shards.num_read == 10 + 24


def test_held_out_images_stay_out_of_training():
    stream = numbers(*[40] * 8)
    recipe = Recipe.parse({"calibrate": {"num_images": 30, "batch_size": 8}})
    split = split_images(stream, recipe)
    held_out = {float(image) for batch in split.held_out for image in batch.images_BCHW.flatten()}
    assert split.counts == {"train": None, "calibration": 30, "held_out": 32, "skipped": 0}
    assert len(held_out) == 32 == len(split.train.held_out)
    assert not held_out & {float(image) for batch in split.calibration for image in batch.flatten()}
    seen = Counter(image for step in images_at(order_of(split.train).steps(0, 100)) for image in step.values())
    assert sum(seen.values()) == 600 and not held_out & seen.keys()
    assert len(seen) == 320 - 32


def test_images_that_cannot_be_decoded_are_left_out_and_counted(tmp_path):
    members = {f"{n:02d}.png": b"junk" if n in (3, 5) else png(n) for n in range(12)}
    stream = open_stream([f"pipe:cat {write_tar(tmp_path / 'x.tar', members)}"])
    order = order_of(stream, batch_size=12)
    ((batch,),) = order.steps(0, 1)
    assert len(batch.images_BCHW) == len(batch.rows_B) == 10
    assert order.unreadable == {(0, 3), (0, 5)}
    _, result = train(stream)
    assert result.notes == ["2 images of the stream could not be read and were left out."]


@pytest.mark.parametrize(
    "command", ["cat {file}; exit 3", "head -c 3500 {file}", "cat {file}.gone", "echo no tar at all"]
)
def test_a_shard_that_breaks_off_is_an_error(tmp_path, command):
    (file,) = write_shards(tmp_path / "shards", num_shards=1, per_shard=4)
    stream = open_stream("pipe:" + command.format(file=file) + " 2>/dev/null")
    with pytest.raises(DataError, match=r"shard pipe:.* can't be read to its end.*leave it out") as caught:
        stream.take(100, seed=0)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no gopen handler"):
        open_stream("nowhere://example.com/a.tar").take(1, seed=0)


def test_empty_shards_are_an_error_and_no_endless_search():
    with pytest.raises(DataError, match="no images found"):
        numbers(0, 0).take(3, seed=0)
    with pytest.raises(DataError, match="no images found"):
        list(order_of(numbers(0, 0)).steps(0, 1))


def test_a_stopped_run_on_a_stream_goes_on_bit_for_bit_with_workers_or_without(tmp_path):
    source = piped(write_shards(tmp_path / "shards", num_shards=4, per_shard=5))
    whole, _ = train(open_stream(source))

    def stop(found):
        if found.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(open_stream(source), work=tmp_path / "work", on_validation=stop)
    again, _ = train(open_stream(source), work=tmp_path / "work", resume=True, num_workers=1)
    assert_equal(whole, again)


def test_two_processes_take_the_same_steps_as_one_on_a_stream(tmp_path):
    write_shards(tmp_path / "shards", num_shards=4, per_shard=6)
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, torch
            from pathlib import Path
            from tests.support.streams import piped, train
            from vitrim.data import open_stream
            torch.set_num_threads(1)
            files = sorted(Path(sys.argv[1]).glob("*.tar"))
            weights, _ = train(open_stream(piped(files)), lr=1e-4, gradient_accumulation_steps=2)
            if int(os.environ.get("RANK", 0)) == 0:
                torch.save(weights, sys.argv[2])
            """
        )
    )
    for processes, out in ((None, "alone"), (2, "together")):
        done = run_python(script, tmp_path / "shards", tmp_path / out, processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / out, weights_only=True) for out in ("alone", "together"))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=2e-5, rtol=1e-4)


def test_a_stream_needs_a_length_and_takes_no_cache():
    with pytest.raises(RecipeError, match=r"epochs: numbers is a stream of unknown length; give recover\.steps"):
        open_sampler(numbers(4), RecoverOptions(epochs=1), 0)
    order = open_sampler(numbers(4), RecoverOptions(epochs=2, epoch_images=1000, batch_size=10), 0)
    assert order.steps_per_epoch == 100
    with pytest.raises(RecipeError, match="cache_teacher: numbers is a stream"):
        open_sampler(numbers(4), RecoverOptions(steps=1, cache_teacher=True), 0)


# Hugging Face sets

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})


def hub_set(num_images: int, num_shards: int) -> datasets.IterableDataset:
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(num_images)], "label": list(range(num_images))}
    return datasets.Dataset.from_dict(rows, features=FEATURES).to_iterable_dataset(num_shards=num_shards)


def assert_holds(stream: ImageStream, count: int):
    images, _ = stream.take(2 * count, seed=0)
    assert sorted(images[n][1] for n in range(len(images))) == list(range(count))
    assert all(torch.equal(images[n][0], to_tensor(picture(images[n][1]))) for n in range(count))


def test_streamed_sets_are_read_shard_by_shard_and_not_decoded(monkeypatch, tmp_path):
    stream = open_stream(hub_set(10, 3))
    assert stream.num_shards == 3
    assert_holds(stream, 10)
    parts = datasets.IterableDatasetDict({"train": hub_set(4, 1), "test": hub_set(6, 2)})
    assert_holds(open_stream(parts), 4)
    assert_holds(open_stream(parts, split="test"), 6)
    with pytest.raises(DataError, match=r"no split 'val'; use one of \['test', 'train'\]"):
        open_stream(parts, split="val")
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: 1 / 0)
    assert_holds(stream, 10)


def test_sets_without_features_and_images_behind_paths(tmp_path):
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(png(n))

    def rows():
        yield {"image": {"bytes": None, "path": str(tmp_path / "0.png")}, "label": 0}
        yield {"image": {"bytes": None, "path": (tmp_path / "1.png").as_uri()}, "label": 1}
        yield {"image": png(2), "label": 2}
        yield {"image": picture(3), "label": 3}

    assert_holds(open_stream(datasets.IterableDataset.from_generator(rows)), 4)

    def broken():
        yield {"image": {"bytes": None, "path": str(tmp_path / "gone.png")}}
        yield {"image": {"bytes": None, "path": None}}
        yield {"image": png(0)}

    images, _ = open_stream(datasets.IterableDataset.from_generator(broken)).take(3, seed=0)
    assert sorted(images[n] is None for n in range(3)) == [False, True, True]


def test_sets_by_name(tmp_path):
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(4)], "label": list(range(4))}
    table = datasets.Dataset.from_dict(rows, features=FEATURES).data.table
    from pyarrow import parquet

    (tmp_path / "set").mkdir()
    for part in range(2):
        parquet.write_table(table.slice(2 * part, 2), tmp_path / "set" / f"train-0000{part}-of-00002.parquet")
    stream = open_stream(f"hf-stream:{tmp_path / 'set'}")
    assert stream.num_shards == 2
    assert_holds(stream, 4)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"hf-stream:.*: no split 'val'; use one of \['train'\]"):
        open_stream(f"hf-stream:{tmp_path / 'set'}", split="val")
    with pytest.raises(DataError, match=r"hf-stream:.*can't be opened .*; use hf-stream:ORG/NAME\[/CONFIG\]"):
        open_stream(f"hf-stream:{empty}")


# The main job


def test_compress_and_evaluate_on_a_stream(tmp_path):
    from tests.support.digits import DIGITS, few

    source = piped(write_shards(tmp_path / "shards", num_shards=3, per_shard=50))
    recover = {"steps": 3, "batch_size": 8, "lr": 1e-4, "report_to": ["tensorboard"]}
    result = vitrim.compress(DIGITS, data=source, recipe=few(), recover=recover, out=tmp_path / "out", quiet=True)
    counts = {"train": None, "calibration": 96, "views": 4, "held_out": 15, "skipped": 0, "modes": {"RGB": 111}}
    assert result.metrics.images == counts
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "out"}
    assert list((tmp_path / "out" / "logs" / "vitrim").glob("events.*"))
    with pytest.raises(DataError, match="may not end; give limit"):
        vitrim.evaluate(result.model, DIGITS, source, latency=False)
    found = vitrim.evaluate(str(tmp_path / "out"), DIGITS, source, limit=20, latency=False)
    assert found.fidelity["relative_error"] < 1
    with pytest.raises(RecipeError, match="stream of unknown length"):
        vitrim.compress(DIGITS, data=source, recipe=few(), recover={"epochs": 1}, out=tmp_path / "b", quiet=True)
