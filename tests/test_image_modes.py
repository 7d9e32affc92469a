"""Images of every mode, orientation and state, from every kind of source: the right pixels, or left out and counted."""

from __future__ import annotations

import io
import logging
import struct

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageOps
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import to_tensor

import vitrim
from tests.support.streams import write_tar
from vitrim.config.recipe import Recipe
from vitrim.data import open_images, open_pairs, open_stream, split_images
from vitrim.errors import DataError

DIGITS = "local-dir:vitrim/assets/digits-vit"
RAMP = np.linspace(0, 1, 60).reshape(6, 10)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def of(values: np.ndarray, dtype) -> Image.Image:
    return Image.fromarray(values.astype(dtype))


def tiff_of_12_bits(values: np.ndarray, photometric: int = 1) -> bytes:
    """A TIFF of 12 bits a value, two values in three bytes, which no library here writes."""
    pairs = (values * 4095).round().astype(int).reshape(-1, 2)
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())
    tags = {256: values.shape[1], 257: len(values), 258: 12, 259: 1, 262: photometric, 273: 8, 277: 1, 278: len(values)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags.items(), (279, len(packed))])
    offset = 8 + len(packed)
    return struct.pack("<2sHI", b"II", 42, offset) + packed + struct.pack("<H", len(tags) + 1) + entries + bytes(4)


def every_source(data: list[bytes], folder, names: str = "png") -> dict:
    """The same encoded images as each kind of source that knows encoded images."""
    import pyarrow as pa
    from pyarrow import parquet

    (folder / "files").mkdir(parents=True)
    for number, image in enumerate(data):
        (folder / "files" / f"{number:03d}.{names}").write_bytes(image)
    cells = [{"bytes": image, "path": None} for image in data]
    parquet.write_table(pa.table({"image": cells}), folder / "x.parquet")
    shard = write_tar(folder / "x.tar", {f"{n:03d}.{names}": image for n, image in enumerate(data)})
    hugging_face = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    return {
        "folder": open_images(folder / "files"),
        "parquet": open_images(folder / "x.parquet"),
        "tar": open_images(shard),
        "datasets": open_images(hugging_face),
        "decoded by datasets": open_images([row["image"] for row in hugging_face]),
        "stream": open_stream(hugging_face.to_iterable_dataset()).take(len(data), seed=0)[0],
        "shards": open_stream(f"pipe:cat {shard}").take(len(data), seed=0)[0],
        "list": open_images([Image.open(io.BytesIO(image)) for image in data]),
    }


EIGHT_BITS = (RAMP * 255).round() / 255
KNOWN = {
    "16 bits": encoded(of(RAMP * 65535, np.uint16)),
    "16 bits, TIFF": encoded(of(RAMP * 65535, np.uint16), "TIFF"),
    "16 bits, big-endian": encoded(of(RAMP * 65535, ">u2"), "TIFF"),
    "16 bits, PGM": encoded(of(RAMP * 65535, np.uint16), "PPM"),
    "12 bits": tiff_of_12_bits(RAMP),
    "12 bits, white is zero": tiff_of_12_bits(1 - RAMP, 0),
    "float": encoded(of(RAMP, np.float32), "TIFF"),
    "grey": encoded(of((RAMP * 255).round(), np.uint8)),
    "grey and alpha": encoded(of((RAMP * 255).round(), np.uint8).convert("LA")),
    "premultiplied, opaque": encoded(of((RAMP * 255).round(), np.uint8).convert("RGBA")),
}


@pytest.mark.parametrize("name", [*KNOWN])
def test_values_are_scaled_by_the_range_of_their_mode(name):
    try:
        image = Image.open(io.BytesIO(KNOWN[name]))
    except OSError:
        pytest.skip("this Pillow does not open it")
    found, _ = open_images([image])[0]
    assert found.shape == (3, 6, 10)
    assert abs(found.numpy() - RAMP).max() <= 0.51 / 255


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(values=arrays.arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_any_16_bit_image_is_within_half_a_level(values):
    found, _ = open_images([Image.open(io.BytesIO(encoded(Image.fromarray(values))))])[0]
    assert np.abs(found[0].numpy().astype(np.float64) - values / 65535).max() <= 0.500001 / 255
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.filterwarnings("ignore:Palette images")  # the reference's
def test_modes_of_8_bits_are_as_torchvision_loads_them(tmp_path):
    from torchvision.datasets.folder import pil_loader

    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 12, 4), dtype=np.uint8))
    see_through = colours.convert("RGB").convert("P")
    see_through.info["transparency"] = bytes(range(256))
    made = {mode: colours.convert("RGB").convert(mode) for mode in ("1", "L", "P", "LA", "CMYK", "YCbCr", "HSV", "LAB")}
    made |= {"RGBA": colours, "P with transparency": see_through, "PA": colours.convert("RGB").convert("PA")}
    for number, (mode, image) in enumerate(made.items()):
        kind = {"CMYK": "jpg", "YCbCr": "jpg", "HSV": None, "PA": None, "LAB": "tif"}.get(mode, "png")
        if kind is None:  # no file holds it, but a dataset may
            assert torch.equal(open_images([image])[0][0], to_tensor(image.convert("RGB")))
            continue
        image.save(tmp_path / f"{number:02d}.{kind}")
        reference = to_tensor(pil_loader(str(tmp_path / f"{number:02d}.{kind}")))
        assert torch.equal(open_images(tmp_path)[-1][0], reference), mode


def test_all_sources_decode_alike_and_count_alike(tmp_path):
    data = [KNOWN[name] for name in ("16 bits", "grey", "float")] + [
        encoded(of(RAMP * 900, np.float32), "TIFF"),  # a range that is not known
        encoded(of(RAMP * 70000, np.int32), "TIFF"),
        encoded(of(RAMP * np.nan, np.float32), "TIFF"),
        encoded(Image.new("RGB", (9, 5), "red")),
    ]
    for name, images in every_source(data, tmp_path).items():
        items = [images[row] for row in range(len(data))]
        got = sorted(item[0].mean().item() for item in items if item is not None)
        assert [item is None for item in items].count(True) == 3, name
        assert got == pytest.approx([1 / 3, 0.5, 0.5, 0.5], abs=1e-3), name
        assert images.kinds() == {"unreadable": 3, "I;16": 1, "L": 1, "F": 1, "RGB": 1}, name
        left, modes = images.remarks()
        assert left.startswith("3 of 7 images could not be read and were left out") and "1 of I;16" in modes, name


@pytest.mark.parametrize("file", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_orientation_is_that_of_exif(orientation, file):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(Image.fromarray(pixels), file, exif=exif)
    reference = to_tensor(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert reference.shape == ((3, 16, 8) if orientation > 4 else (3, 8, 16))
    assert torch.equal(open_images([Image.open(io.BytesIO(data))])[0][0], reference)


def test_all_sources_turn_images_alike(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    data = [encoded(of(np.arange(128).reshape(8, 16), np.uint8), exif=exif)]
    reference = to_tensor(of(np.rot90(np.arange(128).reshape(8, 16), -1), np.uint8).convert("RGB"))
    for name, images in every_source(data, tmp_path).items():
        assert torch.equal(images[0][0], reference), name
    (batch,) = open_pairs([(Image.open(io.BytesIO(data[0])), "a photo")]).batches(1)
    assert torch.equal(batch.images_BCHW[0], reference)


def test_exif_that_is_damaged_says_nothing():
    data = encoded(Image.new("RGB", (4, 3)), exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert open_images([Image.open(io.BytesIO(data))])[0][0].shape == (3, 3, 4)


@pytest.mark.parametrize("broken", [None, Image.new("RGB", (0, 4)), Image.new("RGB", (4, 0)), Image.new("L", (1, 201))])
def test_no_image_is_left_out_alike_in_a_list_a_set_and_pairs(broken):
    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return [(broken, 0), (Image.new("RGB", (4, 4)), 1)][index]

    for images in (open_images(list(Items()[i] for i in range(2))), open_images(Items())):
        (batch,) = images.loader(batch_size=2)
        assert batch.labels_B.tolist() == [1] and batch.num_skipped == 1 and images.kinds()["unreadable"] == 1
    (batch,) = open_pairs([(broken, "one"), (Image.new("RGB", (4, 4)), "two")]).batches(2)
    assert batch.captions == [["two"]] and batch.num_skipped == 1


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, torch.uint8])
def test_arrays_of_whole_numbers_are_images_in_both_layouts(channels, first, dtype):
    largest = 65535 if dtype is np.uint16 else 255
    values = np.random.default_rng(0).integers(0, largest + 1, (4, 6, 7, channels))
    expected = torch.tensor(np.moveaxis(values, -1, 1) / largest)[:, :3].expand(4, 3, 6, 7)
    given = np.moveaxis(values, -1, 1) if first else values
    given = torch.tensor(given, dtype=dtype) if isinstance(dtype, torch.dtype) else given.astype(dtype)
    labels = torch.arange(4)
    for source in (
        given,
        [(given[:2], labels[:2]), (given[2:], labels[2:].numpy())],
        list(zip(given, labels.tolist(), strict=True)),
    ):
        images = open_images(source, transform=lambda image: to_tensor(image) + 1)
        assert abs(torch.stack([images[i][0] for i in range(4)]) - 1 - expected).max() <= 0.51 / 255
        assert images.kinds() == {f"{given.dtype} ({'C, H, W' if first else 'H, W, C'})".removeprefix("torch."): 4}
        assert "became 8-bit RGB" in images.remarks()[0]
        assert source is given or [images[i][1] for i in range(4)] == [0, 1, 2, 3]


def test_grey_arrays_have_no_side_of_channels():
    given = np.random.default_rng(0).integers(0, 256, (5, 6, 7), dtype=np.uint8)
    images = open_images(given)
    assert len(images) == 5 and torch.equal(images[4][0], to_tensor(given[4]).expand(3, 6, 7))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 3, 5, 3), np.uint8), r"item 0 is uint8 \(3, 5, 3\), which may be \(C, H, W\) or \(H, W, C\)"),
        (torch.zeros(2, 5, 6, 7, dtype=torch.uint8), "no side of 1, 3 or 4 channels"),
        (np.zeros((3, 28, 28), np.uint8), r"may be one image or 3 grey ones; use four sides"),
        (np.zeros((2, 3, 8, 8)), "item 0 is float64"),
        (np.zeros((2, 3, 8, 8), np.int64), "item 0 is int64"),
    ],
)
def test_arrays_that_may_be_several_things_are_refused(source, message):
    with pytest.raises(DataError, match=message) as caught:
        open_images(source)[0]
    assert "\n" not in str(caught.value)


def test_a_run_on_16_bit_copies_sees_what_a_run_on_the_originals_sees(tmp_path):
    """Clipped to two levels, such copies gave a small error that was not true."""
    pictures = [np.asarray(open_images("digits")._rows.read(row)[0])[..., 0] for row in range(20)]
    found = {}
    for name, dtype, scale in (("8", np.uint8, 1), ("16", np.uint16, 257)):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(pictures):
            Image.fromarray(picture.astype(dtype) * scale).save(tmp_path / name / f"{number:02d}.png")
        found[name] = split_images(open_images(tmp_path / name), Recipe.parse({}))
    eight, sixteen = found.values()
    assert torch.equal(eight.calibration[0], sixteen.calibration[0])
    assert torch.equal(eight.held_out[0].images_BCHW, sixteen.held_out[0].images_BCHW)
    assert sixteen.counts["modes"] == {"I;16": 20} and eight.counts["modes"] == {"L": 20} and not eight.notes
    assert sixteen.notes == ("images by mode: 20 of I;16; each became 8-bit RGB, scaled by the range of its kind.",)


def test_images_left_out_are_said(tmp_path, caplog):
    for number in range(12):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "00.png").write_bytes(b"junk")
    split = split_images(open_images(tmp_path), Recipe.parse({"calibrate": {"num_images": 12}}))
    said = f"1 of 12 images could not be read and were left out; the first: {tmp_path / '00.png'}, "
    assert split.counts["skipped"] == 1 and said in split.notes[0]
    with caplog.at_level(logging.WARNING, "vitrim"):
        vitrim.inspect(DIGITS, activity=tmp_path)
    assert [record.message.count("1 of 12 images could not be read") for record in caplog.records] == [1]


def test_float_tensors_are_taken_as_preprocessed():
    images = open_images(
        TensorDataset(torch.randn(3, 3, 4, 4)), transform=lambda _: pytest.fail("preprocessed already")
    )
    assert images[0] is not None and images.kinds() == {} and images.remarks() == []
