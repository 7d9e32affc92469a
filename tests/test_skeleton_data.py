"""Recordings of skeletons: every kind of source, the parts, what a model is given, and what is refused."""

import math

import numpy as np
import pytest
import torch

from tests.support.skeletons import pairs, recording, write_table
from vitrim.data import augment_for, transform_for
from vitrim.data.inputs import open_inputs
from vitrim.data.skeletons import MIRROR, SkeletonTransform, poses_of_stream, random_turn
from vitrim.errors import DataError
from vitrim.models.load import load_model
from vitrim.models.origin import Reading
from vitrim.models.skeleton import PARENTS

_, ORIGIN = load_model("vitrim/skeleton-hyperformer-small", weights=False)


def opened(data, **given):
    return open_inputs(data, ORIGIN, **given)


def test_every_kind_of_source_gives_the_same_tensors_and_labels(tmp_path):
    found = pairs(6)
    table = write_table(tmp_path / "one.parquet", found)
    for number, (joints, label) in enumerate(found):
        folder = tmp_path / "classes" / f"c{label}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number}.npy", joints)
        (tmp_path / "flat").mkdir(exist_ok=True)
        np.save(tmp_path / "flat" / f"{number}.npy", joints)
    lines = "".join(f"{number}.npy,{label}\n" for number, (_, label) in enumerate(found))
    (tmp_path / "flat" / "labels.csv").write_text(lines)
    wanted = opened(found)
    assert wanted[0][0].shape == (3, 32, 20) and [wanted[n][1] for n in range(6)] == [0, 1, 2, 0, 1, 2]
    for source in (table, str(table), tmp_path / "flat"):
        mine = opened(source)
        assert all(torch.equal(mine[n][0], wanted[n][0]) and mine[n][1] == wanted[n][1] for n in range(6))
    by_class = opened(tmp_path / "classes")
    assert by_class.classes.names == ("c0", "c1", "c2") and [by_class[n][1] for n in range(6)] == [0, 0, 1, 1, 2, 2]
    ready = opened([(wanted[n][0], wanted[n][1]) for n in range(6)])
    assert torch.equal(ready[3][0], wanted[3][0]) and opened(wanted) is not None


def test_parts_are_files_or_folders_named_so_or_views_where_the_third_stands_beside_others(tmp_path):
    write_table(tmp_path / "both" / "train.parquet", pairs(6))
    write_table(tmp_path / "both" / "test.parquet", pairs(3), views=(3,))
    assert len(opened(tmp_path / "both")) == 6 and len(opened(tmp_path / "both", default="test")) == 3
    for part, count in (("train", 4), ("test", 2)):
        for number in range(count):
            folder = tmp_path / "arrays" / part / str(number % 2)
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{number}.npy", recording(number % 2, number))
    assert len(opened(tmp_path / "arrays")) == 4 and len(opened(tmp_path / "arrays", split="test")) == 2
    mixed = write_table(tmp_path / "mixed.parquet", pairs(9), views=(1, 2, 3))
    assert len(opened(mixed)) == 6 and len(opened(mixed, split="test")) == 3 and len(opened(mixed, limit=2)) == 2
    alone = write_table(tmp_path / "alone.parquet", pairs(6), views=(1, 2))
    assert len(opened(alone)) == 6
    with pytest.raises(DataError, match="has no splits"):
        opened(alone, split="test")


def test_streams_are_what_they_are_called_frame_by_frame():
    joints = torch.tensor(recording(0, 5, frames=7))
    by = {name: SkeletonTransform(13, name)(joints) for name in ("joint", "bone", "joint-motion", "bone-motion")}
    assert all(each.shape == (3, 13, 20) for each in by.values())
    assert float(by["joint"].amin()) == -1 and float(by["joint"].amax()) == 1
    scaled = 2 * (joints - joints.amin((0, 1))) / (joints.amax((0, 1)) - joints.amin((0, 1))) - 1
    for t in range(13):
        frame = scaled[round(t * 6 / 12)]
        torch.testing.assert_close(by["joint"][:, t].T, frame)
        for v in range(20):
            torch.testing.assert_close(by["bone"][:, t, v], frame[v] - frame[PARENTS[v]], atol=1e-6, rtol=1e-5)
    for kind in ("joint", "bone"):
        torch.testing.assert_close(by[f"{kind}-motion"][:, :-1], by[kind][:, 1:] - by[kind][:, :-1])
        assert not by[f"{kind}-motion"][:, -1].any()
    assert not by["bone"][:, :, 2].any()  # the joint that hangs on itself


def test_poses_are_drawn_from_any_stream_as_far_as_it_says_them():
    joints = torch.tensor(recording(1, 5, frames=9))
    given = {name: SkeletonTransform(9, name)(joints) for name in ("joint", "bone", "joint-motion", "bone-motion")}
    drawn = {name: poses_of_stream(given[name], name) for name in given}
    torch.testing.assert_close(drawn["joint"], given["joint"].permute(1, 2, 0))
    torch.testing.assert_close(drawn["bone"], drawn["joint"] - drawn["joint"][:, 2:3], atol=1e-5, rtol=0)
    for name, whole in (("joint-motion", drawn["joint"]), ("bone-motion", drawn["bone"])):  # all but the first pose
        torch.testing.assert_close(drawn[name] - drawn[name][:1], whole - whole[:1], atol=1e-5, rtol=0)
    still = poses_of_stream(torch.zeros(3, 4, 20), "bone-motion")
    moved = poses_of_stream(torch.zeros(3, 4, 20), "joint-motion")
    torch.testing.assert_close(still, moved - moved[:, 2:3], atol=1e-6, rtol=0)  # the same person stands in both


def test_augmentation_turns_by_at_most_60_degrees_draws_frames_in_order_and_repeats_by_seed_epoch_and_item():
    known = ORIGIN.preprocessing
    images = opened(pairs(4)).augmented(augment_for(known, "light", flip=False), seed=3)
    first = images[1][0]
    assert torch.equal(first, images[1][0]) and not torch.equal(first, opened(pairs(4))[1][0])
    images.set_epoch(1)
    assert not torch.equal(first, images[1][0])
    still = torch.tensor(recording(2, 0, 5))
    torch.manual_seed(0)
    turned = SkeletonTransform(9, "joint", augment=True)(still)
    assert turned.shape == (3, 9, 20) and turned.abs().max() <= 1
    for _ in range(50):
        turn = random_turn()
        torch.testing.assert_close(turn @ turn.T, torch.eye(3), atol=1e-5, rtol=0)
        assert float(turn[0, 0]) >= math.cos(math.radians(60)) - 1e-6  # around the vertical axis
    mirror = torch.tensor(MIRROR)
    assert torch.equal(mirror[mirror], torch.arange(20))
    assert all(MIRROR[PARENTS[v]] == PARENTS[MIRROR[v]] for v in range(20))


def test_a_recording_of_one_frame_or_flat_in_one_axis_is_finite():
    flat = torch.zeros(1, 20, 3)
    flat[..., 0] = torch.arange(20.0)
    for stream in ("joint", "bone-motion"):
        assert SkeletonTransform(8, stream)(flat).isfinite().all()


def bad(joints):
    return [(joints, 0), *pairs(3)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bad(np.zeros((4, 25, 3), np.float32)), "item 0 has 25 joints in each of 4 frames, and the model takes 20"),
        (bad(np.zeros((0, 20, 3), np.float32)), "item 0 has no frames"),
        (bad(np.zeros((4, 20, 2), np.float32)), r"array \(4, 20, 2\)"),
        (bad("text"), "item 0 is an array"),
        (bad(np.full((4, 20, 3), 1j)), r"item 0 is an array \(4, 20, 3\) of complex128; use numbers"),
        (bad(np.full((4, 20, 3), "a")), "item 0 is an array"),
        ([], "no sequences found"),
        (5, "no source of sequences"),
        ("nowhere.parquet", "no such file"),
    ],
)
def test_what_is_no_recording_is_refused_in_one_line_when_it_is_opened(data, said):
    with pytest.raises(DataError, match=said) as caught:
        opened(data)
    assert "\n" not in str(caught.value)


def test_tables_with_missing_frames_or_columns_and_folders_with_missing_labels_are_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = {"label": [0], "num_frames": [7], "joints": [recording(0, 0, 4).tobytes()]}
    for name, columns, said in (
        ("short", rows, "says 7 frames"),
        ("empty", {**rows, "num_frames": [0]}, "has no frames"),
        ("null", {**rows, "num_frames": [None]}, "has no frames"),
        ("negative", {**rows, "num_frames": [-2]}, "has -2 frames"),
        ("text", {**rows, "num_frames": ["4"]}, "bytes joints, str frames"),
        ("list", {**rows, "joints": [[0.5] * 240]}, "list joints, int frames; use float32 bytes"),
        ("other", {"x": [1]}, "has columns x"),
    ):
        parquet.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        with pytest.raises(DataError, match=said):
            opened(tmp_path / f"{name}.parquet")
    np.save(tmp_path / "a.npy", recording(0, 0))
    (tmp_path / "labels.csv").write_text("b,1\n")
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    with pytest.raises(DataError, match=r"names no label for a\.npy"):
        opened(tmp_path)


def test_a_recording_with_a_joint_that_is_not_finite_is_left_out_and_said():
    broken = recording(0, 0)
    broken[3, 5, 1] = np.nan
    images = opened([(broken, 0), *pairs(3)])
    assert images[0] is None and images[1] is not None
    assert "1 images could not be read" in images.remarks()[0] and "frame 3" in images.remarks()[0]


def test_preprocessing_of_images_is_as_before_and_a_stream_is_an_argument_of_the_model():
    bone = load_model("vitrim/skeleton-hyperformer", weights=False, reading=Reading(model_args={"stream": "bone"}))[1]
    assert transform_for(bone.preprocessing).stream == "bone" and transform_for(bone.preprocessing).num_frames == 52
