from __future__ import annotations

import io
import random
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

import vitrim
from vitrim.config.options import Augmentation, CalibrateOptions
from vitrim.data import (
    Batch,
    ImageSet,
    augment_for,
    collate,
    first_images,
    open_images,
    split_indices,
    transform_for,
    views,
)
from vitrim.data.images import check_workers
from vitrim.data.split import draw_calibration
from vitrim.data.views import with_views
from vitrim.errors import DataError, RecipeError

CFG_32 = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 1.0}


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


TRUNCATED_JPEG = encoded(picture(7, (64, 64)), "JPEG")[:900]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of two images each."""
    for number, (name, label) in enumerate([("b.png", "cat"), ("a.png", "cat"), ("d.bmp", "ant"), ("c.png", "ant")]):
        (tmp_path / label).mkdir(exist_ok=True)
        picture(number).save(tmp_path / label / name)
    return tmp_path


@pytest.fixture
def damaged(folder) -> Path:
    """The same with four files that can't be decoded."""
    (folder / "cat" / "truncated.jpg").write_bytes(TRUNCATED_JPEG)
    (folder / "cat" / "text.jpg").write_text("this is not an image")
    (folder / "ant" / "empty.webp").write_bytes(b"")
    broken = bytearray(encoded(picture(3)))
    broken[40:60] = bytes(20)
    (folder / "ant" / "broken.png").write_bytes(bytes(broken))
    return folder


def test_folder_reads_pixels_and_labels_from_sub_folders(folder):
    images = open_images(folder)
    assert len(images) == 4 and images.has_labels and images.name == str(folder)
    expected = [(3, 0), (2, 0), (1, 1), (0, 1)]  # ant before cat, files by name
    for (image, label), (seed, want) in zip((images[i] for i in range(4)), expected, strict=True):
        assert torch.equal(image, to_tensor(picture(seed))) and label == want


def test_folder_is_unlabelled_when_an_image_lies_elsewhere(folder):
    picture(9).save(folder / "cover.png")
    images = open_images(str(folder))
    assert len(images) == 5 and not images.has_labels
    assert [images[i][1] for i in range(5)] == [-1] * 5


def test_corrupt_images_are_none_and_counted(damaged):
    images = open_images(damaged)
    assert len(images) == 8
    assert [images[i] is None for i in range(8)] == [True, False, False, True, False, False, True, True]
    assert images.problem(6) is not None and "UnidentifiedImageError" in images.problem(6)
    assert images.problem(1) is None
    batches = list(images.loader(batch_size=3))
    assert [len(batch.images_BCHW) for batch in batches] == [2, 2]
    assert sum(batch.num_skipped for batch in batches) == 4
    assert torch.cat([batch.labels_B for batch in batches]).tolist() == [0, 0, 1, 1]


def test_batches_without_images_pass_their_count_on(damaged):
    images = open_images(damaged)
    found = [(len(b.images_BCHW), b.num_skipped) for b in images.loader(batch_size=1, indices=[0, 3, 1, 2, 6, 4, 7])]
    assert found == [(1, 2), (1, 0), (1, 2)]
    assert list(images.loader(batch_size=2, indices=[0, 3])) == []
    empty = collate([None, None])
    assert len(empty.images_BCHW) == len(empty.labels_B) == 0 and empty.num_skipped == 2
    assert empty.images_BCHW.ndim == 4 and empty.labels_B.dtype == torch.int64


def test_decompression_bombs_count_as_corrupt(tmp_path, monkeypatch):
    picture(0, (40, 40)).save(tmp_path / "warned.png")
    picture(0, (80, 80)).save(tmp_path / "refused.png")
    picture(0, (10, 10)).save(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    images = open_images(tmp_path)
    assert [images[i] is None for i in range(3)] == [True, False, True]
    assert "DecompressionBombWarning" in images.problem(2)


def test_a_folder_with_only_corrupt_images_opens_and_fails_when_drawn_from(tmp_path):
    (tmp_path / "a.jpg").write_text("not an image")
    (tmp_path / "b.jpg").write_bytes(TRUNCATED_JPEG)
    images = open_images(tmp_path)
    with pytest.raises(DataError, match=r"none of 2 images could be read \(.*Error: .*\)"):
        first_images(images, 5, seed=0)


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_below_one(limit):
    with pytest.raises(DataError, match="use 1 or more"):
        open_images([torch.zeros(3, 2, 2)], limit=limit)


def test_our_own_batches_can_be_opened_again():
    images = open_images("digits", limit=6)
    again = open_images(images.loader(batch_size=4).__iter__())
    assert len(again) == 6 and [again[i][1] for i in range(6)] == [images[i][1] for i in range(6)]
    assert len(open_images(images, limit=2, transform=transform_for(CFG_32))) == 2


def test_limits_of_sorted_sources_keep_all_classes(tmp_path):
    for label in ("a", "b", "c"):
        (tmp_path / label).mkdir()
        for i in range(4):
            picture(i).save(tmp_path / label / f"{i}.png")
    images = open_images(tmp_path, limit=6)
    assert [images[i][1] for i in range(len(images))] == [0, 0, 1, 1, 2, 2]
    assert len(open_images(tmp_path, limit=100)) == 12


def test_images_of_different_sizes_need_a_transform():
    images = open_images([picture(0), picture(1, (9, 9))])
    with pytest.raises(DataError, match=r"pass transform=transform_for\(model\)"):
        next(iter(images.loader(batch_size=2)))
    batch = next(iter(images.with_transform(transform_for(CFG_32)).loader(batch_size=2)))
    assert isinstance(batch, Batch) and batch.images_BCHW.shape == (2, 3, 32, 32)


def test_item_numbers_behave_like_a_sequence():
    images = open_images("digits", limit=3)
    assert torch.equal(images[-1][0], images[2][0])
    with pytest.raises(IndexError):
        images[3]
    assert len(list(iter(images))) == 3


def noisy(image: Image.Image) -> torch.Tensor:
    """An augmentation that draws from both generators that transforms use."""
    return to_tensor(image) + torch.rand(3, 1, 1) + random.random()


def test_augmentation_depends_on_seed_epoch_and_item_alone():
    images = open_images("digits", limit=12)
    augmented = images.augmented(noisy, seed=3)
    first = [augmented[i][0] for i in range(12)]
    torch.manual_seed(123)
    random.seed(9)
    backwards = [augmented[i][0] for i in reversed(range(12))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, backwards, strict=True))
    assert torch.equal(torch.stack(first), next(iter(augmented.loader(batch_size=12))).images_BCHW)
    shifts = torch.stack([a - images[i][0] for i, a in enumerate(first)])[:, 0, 0, 0]
    assert len(shifts.unique()) == 12
    augmented.set_epoch(1)
    assert not torch.equal(augmented[0][0], first[0])
    augmented.set_epoch(0)
    assert torch.equal(augmented[0][0], first[0])
    assert not torch.equal(images.augmented(noisy, seed=4)[0][0], first[0])


def test_augmentation_is_the_same_with_workers():
    augmented = open_images("digits", limit=10).augmented(noisy, seed=0)
    for epoch in (0, 1):
        augmented.set_epoch(epoch)
        alone = torch.cat([batch.images_BCHW for batch in augmented.loader(batch_size=3)])
        shared = torch.cat([batch.images_BCHW for batch in augmented.loader(batch_size=3, num_workers=2)])
        assert torch.equal(alone, shared)


def test_reading_leaves_the_global_generators_alone():
    augmented = open_images("digits", limit=4).augmented(noisy, seed=0)
    states = torch.random.get_rng_state(), random.getstate()
    list(augmented.loader(batch_size=2))
    first_images(augmented, 3, seed=5)
    split_indices(10, num_held_out=3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_loader_takes_indices_and_samplers():
    images = open_images("digits", limit=6)
    labels = [images[i][1] for i in range(6)]
    batches = list(images.loader(batch_size=2, indices=[5, 0, 3]))
    assert [batch.labels_B.tolist() for batch in batches] == [[labels[5], labels[0]], [labels[3]]]
    sampler = torch.utils.data.SequentialSampler(images)
    assert len(list(images.loader(batch_size=4, indices=sampler))) == 2


def test_first_images_draws_without_replacement_and_skips_corrupt_ones(damaged):
    images = open_images(damaged)
    batches, num_skipped = first_images(images, 100, seed=0, batch_size=3)
    assert [len(batch) for batch in batches] == [3, 1] and num_skipped == 4
    drawn = {tuple(image.flatten().tolist()) for image in torch.cat(batches)}
    assert drawn == {tuple(to_tensor(picture(i)).flatten().tolist()) for i in range(4)}


def test_first_images_is_a_seeded_random_choice():
    images = open_images(list(torch.arange(50.0).reshape(50, 1, 1, 1)))
    (first,), num_skipped = first_images(images, 10, seed=0)
    (again,), _ = first_images(images, 10, seed=0)
    (other,), _ = first_images(images, 10, seed=1)
    assert torch.equal(first, again) and not torch.equal(first, other) and num_skipped == 0
    assert len(first.flatten().unique()) == 10 and first.max() > 20
    (longer,), _ = first_images(images, 20, seed=0)
    assert torch.equal(longer[:10], first)


def test_split_indices_is_a_partition():
    rest, held = split_indices(100, num_held_out=30, seed=0)
    assert sorted(rest + held) == list(range(100)) and len(held) == 30
    assert rest == sorted(rest) and held == sorted(held)
    assert split_indices(100, num_held_out=30, seed=0) == (rest, held)
    assert split_indices(100, num_held_out=30, seed=1) != (rest, held)
    assert split_indices(3, num_held_out=0, seed=0) == ([0, 1, 2], [])
    for wrong in (-1, 3, 4):
        with pytest.raises(DataError, match=r"use 0\.\.2"):
            split_indices(3, num_held_out=wrong, seed=0)


def normalised(image: Image.Image) -> torch.Tensor:
    mean, std = (torch.tensor(CFG_32[key])[:, None, None] for key in ("mean", "std"))
    return (to_tensor(image) - mean) / std


def test_transform_only_normalises_an_image_of_the_right_size():
    image = picture(0, (32, 32))
    torch.testing.assert_close(transform_for(CFG_32)(image), normalised(image))
    torch.testing.assert_close(augment_for(CFG_32, "none")(image), normalised(image))


def test_transform_follows_crop_and_size():
    wide = picture(0, (80, 40))
    found = transform_for({**CFG_32, "crop_pct": 0.8, "interpolation": "bilinear"})(wide)
    expected = wide.resize((80, 40)).crop((24, 4, 56, 36))
    torch.testing.assert_close(found, normalised(expected))


def test_transform_for_a_model_takes_the_size_it_was_built_for():
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, embed_dim=24, depth=1, num_heads=2)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    assert transform_for(model)(picture(0)).shape == (3, 48, 48)
    for nothing in (torch.nn.Linear(2, 2), {"mean": (0, 0, 0)}):
        with pytest.raises(DataError, match="no input_size"):
            transform_for(nothing)


def test_light_augmentation_is_a_crop_of_the_padded_image():
    image = picture(0, (32, 32))
    padded = torch.nn.functional.pad(normalised(image), (4, 4, 4, 4), mode="reflect")
    crops = {}
    for y in range(9):
        for x in range(9):
            crops[y, x] = padded[:, y : y + 32, x : x + 32]
    seen = set()
    augmented = open_images([image] * 40).augmented(augment_for(CFG_32, "light", flip=False), seed=0)
    for i in range(40):
        matches = [place for place, crop in crops.items() if torch.allclose(crop, augmented[i][0], atol=1e-6)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 20


def test_light_augmentation_flips_half_of_the_images():
    image = picture(0, (32, 32))
    plain = open_images([image] * 60).augmented(augment_for({**CFG_32}, "light", flip=False), seed=0)
    mirrored = open_images([image] * 60).augmented(augment_for({**CFG_32}, "light"), seed=0)
    pairs = [(plain[i][0], mirrored[i][0]) for i in range(60)]
    num_flipped = sum(torch.equal(a.flip(-1), b) for a, b in pairs)
    assert sum(torch.equal(a, b) for a, b in pairs) == 60 - num_flipped and 15 < num_flipped < 45


@pytest.mark.parametrize("strength", get_args(Augmentation))
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (90, 40), (33, 200)])
@pytest.mark.parametrize("extra", [{}, {"crop_pct": 0.9, "crop_mode": "squash"}, {"input_size": (3, 24, 32)}])
def test_every_augmentation_ends_in_the_models_size(strength, size, extra):
    cfg = {**CFG_32, **extra}
    found = augment_for(cfg, strength)(picture(0, size))
    assert found.shape == cfg["input_size"] and found.dtype == torch.float32


def test_strong_augmentation_varies_and_unknown_ones_are_refused():
    augmented = open_images([picture(0, (64, 64))] * 5).augmented(augment_for(CFG_32, "strong"), seed=0)
    means = {round(augmented[i][0].mean().item(), 5) for i in range(5)}
    assert len(means) == 5
    with pytest.raises(RecipeError, match="one of 'none', 'light', 'strong'"):
        augment_for(CFG_32, "heavy")


def test_dinov2_augmentation_crops_and_changes_colours_as_often_as_the_paper_says():
    left, right = Image.new("RGB", (64, 64), (250, 20, 20)), picture(0, (64, 64))
    plain = augment_for(CFG_32, "dinov2", flip=False)
    steps = [type(step).__name__ for step in plain.transforms]
    assert steps[:1] + steps[-2:] == ["RandomResizedCrop", "ToTensor", "Normalize"]
    assert plain.transforms[0].scale == (0.05, 1.0) and augment_for(CFG_32, "clip").transforms[0].scale == (0.2, 1.0)
    red = open_images([left] * 400).augmented(plain, seed=0)
    std, mean = (torch.tensor(CFG_32[key])[:, None, None] for key in ("std", "mean"))
    pixels = torch.stack([red[i][0] * std + mean for i in range(400)]).mean((2, 3))
    grey = (pixels.amax(1) - pixels.amin(1) < 0.01).float().mean()
    untouched = ((pixels - torch.tensor([250, 20, 20]) / 255).abs().amax(1) < 0.01).float().mean()
    assert abs(grey - 0.2) < 0.06  # grey in a fifth of the images
    assert abs(untouched - 0.2 * 0.8 * 0.8) < 0.05  # neither jittered, nor grey, nor solarized: blur leaves it red
    assert augment_for(CFG_32, "dinov2")(right).shape == (3, 32, 32)


def test_accelerate_can_prepare_a_loader(damaged):
    from accelerate import Accelerator

    images = open_images(damaged)
    assert isinstance(images, ImageSet)
    loader = Accelerator(cpu=True).prepare(images.loader(batch_size=4))
    batches = list(loader)
    assert [type(batch).__name__ for batch in batches] == ["Batch", "Batch"]
    assert [(len(batch.images_BCHW), batch.num_skipped) for batch in batches] == [(2, 2), (2, 2)]


def test_views_stand_in_the_batch_of_their_image_and_are_crops_of_it():
    images = (
        torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[:, None, None, None]
    )
    batches = with_views(images.split(2), 3, seed=0)
    assert [len(batch) for batch in batches] == [6, 6, 6]
    for place, batch in enumerate(batches):
        assert torch.equal(batch[:2], images[2 * place : 2 * place + 2])
        for view, image in zip(batch[2:], [*batch[:2], *batch[:2]], strict=True):  # each as bright as its own image
            assert view.shape == image.shape and not torch.equal(view, image)
            assert abs(float(view.mean() / image.mean()) - 1) < 0.15
    assert all(torch.equal(a, b) for a, b in zip(batches, with_views(images.split(2), 3, seed=0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(images.split(2), with_views(images.split(2), 1, seed=0), strict=True))


def test_a_view_of_all_of_a_picture_is_the_picture_or_its_mirror(monkeypatch):
    monkeypatch.setattr(views, "LEAST_AREA", 1.0)
    monkeypatch.setattr(views, "MOST_ASPECT", 1.0)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (batch,) = with_views([image], 9, seed=1)
    mirrored = [bool(torch.allclose(view, image[0].flip(-1), atol=1e-5)) for view in batch[1:]]
    assert all(
        torch.allclose(view, image[0], atol=1e-5) or flag for view, flag in zip(batch[1:], mirrored, strict=True)
    )
    assert 0 < sum(mirrored) < 8


def test_rows_of_tokens_have_no_views():
    with pytest.raises(DataError, match=r"^calibrate\.views: 2 views are of images .* and an input is \(5,\); use 1\."):
        with_views([torch.zeros(2, 5, dtype=torch.int64)], 2, seed=0)


def test_workers_are_refused_where_tmpdir_is_too_long_for_their_sockets(monkeypatch):
    """A socket's path has at most 107 bytes; found at the start, since workers of recovery come after the cut."""
    monkeypatch.setattr("vitrim.data.images.get_temp_dir", lambda: "/" + "t" * 100)
    recipe = {"method": "magnitude", "recover": {"steps": 1, "num_workers": 2}}
    with pytest.raises(DataError, match=r"num_workers: 2 processes need sockets in TMPDIR, .* or num_workers to 0"):
        vitrim.compress("local-dir:no-such-model", data="digits", recipe=recipe)
    check_workers(0)
    monkeypatch.undo()
    check_workers(2)


@pytest.mark.parametrize(("num_images", "num_units", "wanted"), [(10, 0, 1), (10, 10, 1), (10, 11, 2), (10, 99, 4)])
def test_few_images_are_seen_in_several_views_and_texts_in_none(num_images, num_units, wanted):
    images = open_images(torch.rand(num_images, 3, 8, 8))
    drawn = draw_calibration(images, CalibrateOptions(), 0, num_units)
    assert drawn.num_views == wanted and sum(map(len, drawn.batches)) == wanted * num_images
    assert draw_calibration(images, CalibrateOptions(views=3), 0, num_units).num_views == 3
    assert draw_calibration(open_images(torch.arange(20).view(10, 2)), CalibrateOptions(), 0, num_units).num_views == 1
