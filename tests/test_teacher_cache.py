"""The teacher cache: what it gives back, what it refuses, and that training can't tell it from the teacher."""

import json
import os
import shutil
import signal
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as tv

import vitrim
from tests.support.distillation import (
    EPOCH,
    HELD_OUT,
    assert_equal,
    counted,
    make_images,
    make_student,
    make_teacher,
    run,
    weights,
)
from tests.support.processes import run_python
from vitrim.config.options import CacheOptions, RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.data import open_images
from vitrim.errors import CheckpointError, Interrupted, OutputError, RecipeError
from vitrim.recover.cache_layout import Layout, cache_bytes, decode, draw_positions, encode
from vitrim.recover.sampler import Sampler
from vitrim.recover.targets import LiveTargets, open_cached
from vitrim.recover.teacher_cache import TeacherCache
from vitrim.tokens import Features

CPU = torch.device("cpu")


def made(num_images=12, *, num_patches=7, width=5, seed=0):
    """Features with some large values, as teachers have them."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(num_images, width + 1, generator=generator)
    patches = torch.randn(num_images, num_patches, width, generator=generator)
    patches[:, 0, 0] *= 50
    return Features(pooled_BD=pooled, patches_BND=patches)


def opened(folder, found, *, num_views=1, seed=0, shard_bytes=300, **options):
    layout = Layout.of(found, CacheOptions(**options))
    sizes = {"num_images": len(found.pooled_BD), "num_views": num_views}
    return TeacherCache(folder, {"teacher": "a"}, layout, **sizes, seed=seed, shard_bytes=shard_bytes)


def chosen(found, rows):
    return Features(pooled_BD=found.pooled_BD[rows], patches_BND=found.patches_BND[rows])


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


# --- the types


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=12),
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12),
)
@settings(deadline=None)
def test_rounding_stays_within_its_bounds(large, small):
    for values in (torch.tensor(large), torch.tensor(small)):
        errors = {
            dtype: (decode(*encode(values, dtype)) - values).double().abs() for dtype in ("bf16", "int8", "float32")
        }
        exact = values.double().abs()
        least = 1e-36  # below, float32 itself runs out
        assert bool((errors["bf16"] <= exact / 2**8 + least).all())
        assert bool((errors["int8"] <= exact.max() / 254 * (1 + 1e-5) + least).all())
        assert bool((errors["float32"] == 0).all())


def test_each_vector_has_a_scale_of_its_own_and_no_number_stays_none():
    values = torch.tensor([[1.0, -0.5], [1e4, 0.0], [0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    stored, scale = encode(values, "int8")
    assert stored.dtype == torch.int8 and scale is not None and scale.shape == (5,)
    back = decode(stored, scale)
    torch.testing.assert_close(back[:3], values[:3], atol=0.0, rtol=1 / 127)
    assert not bool(back[3:].isfinite().any())


def test_positions_follow_from_seed_row_and_view_alone():
    drawn = [draw_positions(3, row, view, num_kept=4, num_patches=9) for row in range(30) for view in range(2)]
    again = [draw_positions(3, row, view, num_kept=4, num_patches=9) for row in range(30) for view in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert all(len(set(p.tolist())) == 4 and p.tolist() == sorted(p.tolist()) for p in drawn)
    assert set(torch.cat(drawn).tolist()) == set(range(9))
    assert len({tuple(p.tolist()) for p in drawn}) > 30
    assert not torch.equal(torch.cat(drawn), torch.cat([draw_positions(4, 0, 0, num_kept=4, num_patches=9)] * 60))


# --- the folder


@pytest.mark.parametrize("dtype", ["bf16", "int8", "float32"])
@pytest.mark.parametrize("num_patches", [None, 3])
def test_what_is_read_is_what_was_added(tmp_path, dtype, num_patches):
    found = made()
    cache = opened(tmp_path / "cache", found, num_views=2, dtype=dtype, num_patches=num_patches)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for rows in order.split(5):
        cache.add(rows, 1, chosen(found, rows))
    before = [cache.read(order, 1, CPU)]
    cache.flush()
    assert len(shards(tmp_path / "cache")) > 1
    backend = opened(tmp_path / "cache", found, num_views=2, dtype=dtype, num_patches=num_patches)
    assert bool(backend.has(order, 1).all()) and not bool(backend.has(order, 0).any())
    for features, positions in (*before, backend.read(order, 1, CPU)):
        for slot, row in enumerate(order.tolist()):
            kept = list(range(7)) if num_patches is None else draw_positions(0, row, 1, num_kept=3, num_patches=7)
            if num_patches is not None:
                assert torch.equal(positions[slot], kept)
            patches = torch.stack([found.patches_BND[row, p] for p in kept])
            for read, true in ((features.pooled_BD[slot], found.pooled_BD[row]), (features.patches_BND[slot], patches)):
                bound = {
                    "float32": torch.zeros_like(true),
                    "bf16": true.abs() / 2**8,
                    "int8": true.abs().amax(-1, keepdim=True).expand_as(true) / 253.9,
                }[dtype]
                assert read.dtype == torch.float32 and bool(((read - true).abs() <= bound).all())


def test_a_model_of_one_vector_an_image_has_no_patches_to_keep(tmp_path):
    found = Features(pooled_BD=torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    cache = opened(tmp_path, found, dtype="float32", patch_ratio=0.5)
    cache.add(torch.arange(6), 0, found)
    features, positions = cache.read(torch.tensor([4, 2]), 0, CPU)
    assert torch.equal(features.pooled_BD, found.pooled_BD[[4, 2]])
    assert features.patches_BND is None and positions is None


def test_what_was_not_written_is_lost_and_what_was_is_kept(tmp_path):
    found = made()
    cache = opened(tmp_path, found, shard_bytes=10**9)
    for first, last in ((0, 5), (5, 9), (9, 12)):
        rows = torch.arange(first, last)
        cache.add(rows, 0, chosen(found, rows))
        if last == 9:
            cache.flush()
    assert opened(tmp_path, found).has(torch.arange(12), 0).tolist() == [True] * 9 + [False] * 3


def test_shards_of_others_are_taken_up_on_request(tmp_path):
    found = made()
    mine, theirs = opened(tmp_path, found), opened(tmp_path, found)
    theirs.add(torch.arange(4), 0, chosen(found, range(4)))
    theirs.flush()
    assert not bool(mine.has(torch.arange(4), 0).any())
    mine.refresh()
    assert torch.equal(
        mine.read(torch.arange(4), 0, CPU)[0].pooled_BD, theirs.read(torch.arange(4), 0, CPU)[0].pooled_BD
    )


@pytest.mark.parametrize("options", [{}, {"dtype": "int8"}, {"dtype": "float32", "patch_ratio": 0.25}])
def test_the_estimate_is_what_the_files_take(tmp_path, options):
    found = made(400, num_patches=16, width=32)
    cache = opened(tmp_path, found, num_views=2, shard_bytes=2**18, **options)
    estimate = cache_bytes(cache.layout, 400, 2)
    for view in range(2):
        for rows in torch.arange(400).split(32):
            cache.add(rows, view, chosen(found, rows))
    cache.flush()
    assert sum(path.stat().st_size for path in shards(tmp_path)) == pytest.approx(estimate, rel=0.02)
    assert max(path.stat().st_size for path in shards(tmp_path)) < 2 * 2**18
    assert f"{estimate / 10**6:,.1f} MB for 400 images x 2 views" in cache.notes[0]


def test_a_disk_without_room_is_refused_before_the_first_image(tmp_path, monkeypatch):
    found = made(1000)
    needed = cache_bytes(Layout.of(found, CacheOptions()), 1000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(OutputError, match=r"needs 0\.1 MB more and 0\.1 MB are free; use int8"):
        opened(tmp_path, found)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    opened(tmp_path, found).add(torch.arange(1000), 0, found)


def test_a_disk_that_fills_up_stops_cleanly_and_keeps_the_shards_before(tmp_path, monkeypatch):
    found = made()
    cache = opened(tmp_path, found)
    cache.add(torch.arange(4), 0, chosen(found, range(4)))
    cache.flush()
    before = sorted(tmp_path.iterdir())
    cache.add(torch.arange(4, 8), 0, chosen(found, range(4, 8)))

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left on device.*make room and go on with resume"):
        cache.flush()
    assert sorted(tmp_path.iterdir()) == before
    assert opened(tmp_path, found).has(torch.arange(12), 0).sum() == 4


def test_what_a_killed_run_left_half_written_goes_when_it_is_old(tmp_path):
    found = made()
    opened(tmp_path, found)
    old, new = tmp_path / ".a.safetensors.0", tmp_path / ".b.safetensors.0"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    opened(tmp_path, found)
    assert new.exists() and not old.exists()


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"photo")
    with pytest.raises(OutputError, match="holds files and is no teacher cache; name another folder"):
        opened(tmp_path, made())
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file: can't be used \(File exists\)"):
        opened(tmp_path / "file", made())


def test_a_damaged_index_is_refused(tmp_path):
    opened(tmp_path, made())
    (tmp_path / "index.json").write_text('{"format": "vit')
    with pytest.raises(CheckpointError, match=r"index\.json: can't be used .* Remove the folder or name another one"):
        opened(tmp_path, made())


@pytest.mark.parametrize("damage", ["cut short", "a bit", "empty", "another", "row outside"])
def test_a_damaged_shard_is_noted_and_counts_as_not_there(tmp_path, damage):
    found = made()
    cache = opened(tmp_path, found)
    for rows in torch.arange(12).split(4):
        cache.add(rows, 0, chosen(found, rows))
        cache.flush()
    bad, _, other = shards(tmp_path)
    if damage in ("cut short", "empty"):
        bad.write_bytes(bad.read_bytes()[: -1 if damage == "cut short" else 0])
    elif damage == "a bit":
        data = bytearray(bad.read_bytes())
        data[-1] ^= 1
        bad.write_bytes(data)
    else:
        name = tmp_path / "elsewhere"
        few = opened(name, found, dtype="int8") if damage == "another" else opened(name, made(30))
        rows = torch.arange(4) if damage == "another" else torch.arange(20, 24)
        few.add(rows, 0, chosen(made(30), rows))
        few.flush()
        bad.write_bytes(shards(name)[0].read_bytes())
    again = opened(tmp_path, found)
    assert len(again.notes) == 2 and bad.name in again.notes[1] and "made again" in again.notes[1]
    there = again.has(torch.arange(12), 0)
    assert there.sum() == 8
    rows = torch.arange(12)[~there]
    again.add(rows, 0, chosen(found, rows))
    assert torch.equal(again.read(rows, 0, CPU)[0].pooled_BD, found.pooled_BD[rows].bfloat16().float())
    other.write_bytes(other.read_bytes()[:-40])  # under the eyes of a run
    with pytest.raises(CheckpointError, match=r"can't be read \(ends too early\); remove it and go on"):
        again.read(torch.arange(12)[there], 0, CPU)


# --- training


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 4, "gradient_accumulation_steps": 2},
        {"lr": None},
        {"features_at": "pre_norm"},
        {"features_at": "logits"},
    ],
)
def test_training_on_a_full_float32_cache_equals_training_on_the_teacher_bit_for_bit(tmp_path, options):
    live, cached = make_student(make_teacher()), make_student(make_teacher())
    expected = run(live, make_teacher(), options={**EPOCH, **options})
    teacher, seen = counted(make_teacher())
    cache = {"dtype": "float32", "folder": tmp_path / "cache"}
    result = run(cached, teacher, options={**EPOCH, **options, "cache_teacher": cache})
    assert_equal(weights(live), weights(cached))
    assert result.curve == expected.curve and result.rate_test == expected.rate_test
    assert sum(seen) == len(HELD_OUT[0]) + 48  # and nothing in the second and third epoch
    values = 3 if options.get("features_at") == "logits" else 32 * 17
    size = f"{48 * (8 + 8 + 4 * values) / 10**6:.1f} MB for 48 images x 1 views"
    assert result.notes == [f"teacher cache: {size} in {tmp_path / 'cache'}"] and expected.notes == []


@pytest.mark.parametrize(
    ("options", "within"),
    [({}, 0.01), ({"dtype": "int8"}, 0.01), ({"num_patches": 4}, 0.5), ({"dtype": "int8", "patch_ratio": 0.5}, 0.5)],
)
def test_training_on_rounded_targets_or_some_patches_recovers_too(tmp_path, options, within):
    live, cached = make_student(make_teacher()), make_student(make_teacher())
    expected = run(live, make_teacher(), options={"steps": 36})
    result = run(cached, make_teacher(), options={"steps": 36, "cache_teacher": {"folder": tmp_path, **options}})
    assert result.best_error == pytest.approx(expected.best_error, rel=within)
    assert result.best_error < 0.5 * result.curve[0]["relative_error"]


@pytest.mark.parametrize("cache", [{"dtype": "int8", "num_patches": 5}, {"views": 2}])
def test_a_stopped_run_goes_on_bit_for_bit_from_the_cache_beside_its_state(tmp_path, cache):
    whole, stopped, again = (make_student(make_teacher()) for _ in range(3))
    options = {**EPOCH, "cache_teacher": cache}
    expected = run(whole, make_teacher(), options=options, work=tmp_path / "whole")

    def interrupt(found):
        if found.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    work = tmp_path / "stopped"
    with pytest.raises(Interrupted, match=r"step [45] of 18") as stop:
        run(stopped, make_teacher(), options=options, work=work, on_validation=interrupt)
    done = 8 * int(str(stop.value).split("step ")[1].split()[0])
    teacher, seen = counted(make_teacher())
    result = run(again, teacher, options=options, work=work, resume=True)
    assert_equal(weights(whole), weights(again))
    assert result.curve == expected.curve
    assert sum(seen) == len(HELD_OUT[0]) + 48 * cache.get("views", 1) - done
    assert (tmp_path / "stopped" / "teacher-cache" / "index.json").is_file()


def test_another_run_reuses_a_named_folder(tmp_path):
    options = {"steps": 6, "cache_teacher": {"folder": tmp_path}}
    run(make_student(make_teacher()), make_teacher(), options=options)
    teacher, seen = counted(make_teacher())
    narrow = make_student(make_teacher(), width=8)
    result = run(narrow, teacher, options={**options, "steps": 12})
    assert sum(seen) == len(HELD_OUT[0])
    assert "0.1 MB of it there already" in result.notes[0]


def test_only_the_images_of_a_damaged_shard_go_through_the_teacher_again(tmp_path):
    options = {**EPOCH, "cache_teacher": {"folder": tmp_path, "dtype": "float32"}}
    live, again = make_student(make_teacher()), make_student(make_teacher())
    run(live, make_teacher(), options=options)
    first = min(shards(tmp_path), key=lambda path: path.stat().st_size)
    first.write_bytes(first.read_bytes()[:-1])
    teacher, seen = counted(make_teacher())
    result = run(again, teacher, options=options)
    assert 0 < sum(seen) - len(HELD_OUT[0]) < 48 and first.name in result.notes[1]
    for name, tensor in weights(live).items():  # a batch of fewer images may round otherwise
        torch.testing.assert_close(tensor, weights(again)[name], atol=1e-5, rtol=1e-4)


def test_unreadable_images_are_left_out(tmp_path):
    for row in range(16):
        Image.fromarray(pixels(16)[row].numpy()).save(tmp_path / f"{row:02}.png")
    for row in (3, 4):
        (tmp_path / f"{row:02}.png").write_bytes(b"not an image")
    images = open_images(tmp_path)
    live, cached = make_student(make_teacher()), make_student(make_teacher())
    options = {"batch_size": 2, "steps": 20}
    run(live, make_teacher(), images=images, options=options)
    teacher, seen = counted(make_teacher())
    cache = {"dtype": "float32", "folder": tmp_path / "cache"}
    run(cached, teacher, images=images, options={**options, "cache_teacher": cache})
    assert sum(seen) == len(HELD_OUT[0]) + 14
    for name, tensor in weights(live).items():  # a batch of one image may round otherwise than one of two
        torch.testing.assert_close(tensor, weights(cached)[name], atol=1e-5, rtol=1e-4)


def pixels(num_images):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (num_images, 16, 16, 3), dtype=torch.uint8, generator=generator)


def augmented(seed=0):
    photos = open_images([Image.fromarray(image.numpy()) for image in pixels(10)])
    return photos.augmented(tv.Compose([tv.RandomCrop(16, padding=4), tv.ToTensor()]), seed)


def test_an_epoch_sees_its_own_order_and_the_view_that_is_kept(tmp_path):
    plain = RecoverOptions(steps=15, batch_size=2)
    options = plain.model_copy(update={"cache_teacher": CacheOptions(views=2, dtype="float32")})
    free = [step[0] for step in Sampler(augmented(), plain, seed=5).steps(0, 15)]
    kept = [step[0] for step in Sampler(augmented(), options, seed=5).steps(0, 15)]
    assert [batch.rows_B.tolist() for batch in free] == [batch.rows_B.tolist() for batch in kept]
    seen = {}
    for batch in kept:
        for row, image in zip(batch.rows_B.tolist(), batch.images_BCHW, strict=True):
            seen.setdefault((row, batch.epoch), image)
    assert len(seen) == 30
    assert all(torch.equal(seen[row, 0], seen[row, 2]) for row in range(10))
    assert not any(torch.equal(seen[row, 0], seen[row, 1]) for row in range(10))
    assert all(torch.equal(a.images_BCHW, b.images_BCHW) for a, b in zip(free[:10], kept[:10], strict=True))

    teacher, asked = counted(make_teacher())
    live = LiveTargets(teacher, options, CPU)
    like = live(kept[0]).features
    cached = open_cached(live, augmented(), like, seed=5, folder=tmp_path)
    asked.clear()
    targets = [cached(batch) for batch in kept]
    assert sum(asked) == 20
    for batch, target in zip(kept, targets, strict=True):
        assert target.positions_BP is None
        torch.testing.assert_close(target.features.pooled_BD, live(batch).features.pooled_BD, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(target.features.patches_BND, live(batch).features.patches_BND, atol=1e-6, rtol=1e-6)


CHANGES = {
    "teacher": {"teacher": lambda: change(make_teacher())},
    "images": {"images": lambda: augmented(seed=1)},
    "num_images": {"images": lambda: augmented().subset(range(9))},
    "seed": {"seed": 6},
    "precision": {"options": {"precision": "bf16"}},
    "features_at": {"options": {"features_at": "pre_norm"}},
    "dtype": {"cache": {"dtype": "int8"}},
    "num_kept": {"cache": {"patch_ratio": 0.5}},
    "views": {"cache": {"views": 3}},
}


def change(model):
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] += 1e-3
    return model


@pytest.mark.parametrize("key", [None, *CHANGES])
def test_the_cache_of_anything_else_is_refused_in_one_line(tmp_path, key):
    def open_with(*, teacher=make_teacher, images=augmented, seed=5, options=None, cache=None):
        chosen = RecoverOptions(steps=1, cache_teacher={"views": 2, **(cache or {})}, **(options or {}))
        live = LiveTargets(teacher(), chosen, CPU)
        like = Features(pooled_BD=torch.zeros(1, 32), patches_BND=torch.zeros(1, 16, 32))
        return open_cached(live, images(), like, seed=seed, folder=tmp_path / "cache")

    open_with()
    before = (tmp_path / "cache" / "index.json").read_text()
    if key is None:
        open_with()
    else:
        with pytest.raises(CheckpointError) as refused:
            open_with(**CHANGES[key])
        said = str(refused.value)
        assert f"cache: is a teacher cache of list made with another {key} (" in said and "\n" not in said
        assert said.endswith("name another folder or remove this one.")
    assert (tmp_path / "cache" / "index.json").read_text() == before


def test_two_processes_share_what_the_first_epoch_stored(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, torch
            torch.set_num_threads(1)
            from tests.support.distillation import EPOCH, counted, make_student, make_teacher, run, weights
            teacher, seen = counted(make_teacher())
            student = make_student(make_teacher())
            cache = {"dtype": "float32", "folder": sys.argv[1]}
            run(student, teacher, options={**EPOCH, "lr": 1e-4, "cache_teacher": cache})
            torch.save((weights(student), sum(seen)), sys.argv[2] + os.environ["RANK"])
            """
        )
    )
    done = run_python(script, tmp_path / "cache", tmp_path / "rank", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    alone = make_student(make_teacher())
    run(alone, make_teacher(), options={**EPOCH, "lr": 1e-4})
    for rank in range(2):
        together, num_seen = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        assert num_seen == len(HELD_OUT[0]) + 24
        for name, tensor in weights(alone).items():
            torch.testing.assert_close(tensor, together[name], atol=2e-5, rtol=1e-4)


# --- options


def test_a_recipe_turns_the_cache_on_in_short_or_at_length():
    on = Recipe.parse({"recover": {"steps": 3, "cache_teacher": True}})
    off = Recipe.parse({"recover": {"steps": 3, "cache_teacher": False}})
    assert on.recover.cache_teacher == CacheOptions() and off.recover.cache_teacher is None
    assert RecoverOptions(steps=3).cache_teacher is None
    long = on.updated({"recover": {"cache_teacher": {"views": 4, "num_patches": 64, "folder": "targets"}}})
    assert long.recover.cache_teacher == CacheOptions(views=4, num_patches=64, folder=Path("targets"))
    assert json.loads(long.model_dump_json())["recover"]["cache_teacher"]["folder"] == "targets"
    assert [long.recover.view_of(epoch) for epoch in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [off.recover.view_of(epoch) for epoch in range(3)] == [0, 1, 2]
    for wrong, said in (
        ({"view": 2}, "did you mean 'recover.cache_teacher.views'"),
        ({"views": 0}, "greater than or equal to 1"),
        ({"patch_ratio": 0.5, "num_patches": 3}, "give one of patch_ratio and num_patches"),
    ):
        with pytest.raises(RecipeError, match=said):
            Recipe.parse({"recover": {"steps": 3, "cache_teacher": wrong}})


def test_what_the_model_or_the_run_does_not_allow_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="this run writes nothing; name a folder for the cache"):
        run(make_student(make_teacher()), make_teacher(), options={"cache_teacher": True})
    with pytest.raises(RecipeError, match="num_patches: 17 asked; the model has 16"):
        cache = {"num_patches": 17, "folder": tmp_path}
        run(make_student(make_teacher()), make_teacher(), options={"cache_teacher": cache})


def test_compress_keeps_the_cache_beside_the_run_and_takes_it_away_at_the_end(tmp_path):
    images = [make_images(40)[i][0] for i in range(40)]
    recover = {"steps": 9, "batch_size": 12, "lr": 1e-4, "cache_teacher": True}
    recipe = Recipe.parse({"mlp_ratio": 1, "calibrate": {"num_images": 16}, "repair": False})
    result = vitrim.compress(
        make_teacher(), data=images, recipe=recipe, recover=recover, out=tmp_path / "out", quiet=True
    )
    assert any("for 36 images x 1 views" in note for note in result.metrics.notes)
    assert not [path for path in tmp_path.rglob("*") if "teacher-cache" in path.name]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
