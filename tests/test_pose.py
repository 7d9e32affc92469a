"""Poses: the model, heatmaps there and back, pictures with joints and how they are augmented, PCK and OKS AP."""

import random

import pytest
import torch

from tests.support.people import TINY, colour, figure, tiny, write_coco, write_parquet
from vitrim.data import open_images, transform_for
from vitrim.data.poses import PoseSet, augmented, flipped
from vitrim.errors import DataError, ModelError
from vitrim.metrics.pose import OKS_LEVELS, oks_ap, pck, pose_scores
from vitrim.models.attention import find_attentions
from vitrim.models.features import features
from vitrim.models.joints import COCO, LSP
from vitrim.models.origin import on_meta
from vitrim.models.pose import CONFIGS, PoseConfig, PoseModel, decode_joints, encode_joints, pose_model, predict_joints
from vitrim.models.sites import find_mlps

FRAME = {
    "input_size": [3, 64, 48],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "crop_pct": 1.0,
    "crop_mode": "border",
    "interpolation": "bicubic",
}


def make_joints(count, layout=LSP, side=100.0):
    joints = side * torch.rand(count, len(layout.names), 4)
    joints[..., 2] = (torch.rand(joints.shape[:2]) < 0.7).float()
    joints[:, list(layout.torso), 2] = 1
    return joints


def test_the_large_model_has_the_papers_size():
    model = on_meta(lambda: PoseModel(CONFIGS["pose-t"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(4.4e6, rel=0.01)


def test_its_mlps_and_attentions_are_found():
    model = tiny()
    assert [site.block for site in find_mlps(model)] == ["blocks.0", "blocks.1", "blocks.2"]
    assert len(list(find_attentions(model))) == 3


def test_features_are_the_tokens_that_joints_are_read_from():
    model, images = tiny(), torch.randn(2, 3, 32, 24)
    found = features(model, images)
    assert found.pooled_BD.shape == (2, 14 * 16) and found.patches_BND.shape == (2, 4, 16)
    joints = found.pooled_BD.unflatten(1, (14, 16))
    assert torch.equal(model.heatmap_head(joints), model(images))


def test_positions_are_added_to_patches_before_every_block_but_only_once_before_the_first():
    model, images = tiny(), torch.randn(1, 3, 32, 24)
    tokens = torch.cat([model.joint_tokens, model.patch_embed(images)], dim=1)
    positions = torch.cat([torch.zeros(1, 14, 16), model.positions[None, 14:]], dim=1)
    for block in model.blocks:
        tokens = tokens + positions
        tokens = tokens + block.attn(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(model.norm(tokens), model.forward_features(images))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"num_joints": 15}, "has 15 joints; use 14"),
        ({"image_size": [30, 24]}, "is not made of patches"),
        ({"num_heads": 5}, "use a multiple of 4"),
        ({"wide": 1}, "unknown size wide"),
        ({"num_heads": 0}, "num_heads is 0; use a whole number of 1 or more"),
        ({"depth": 0}, "depth is 0; use a whole number"),
        ({"width": "wide"}, "width is 'wide'; use a whole number"),
        ({"image_size": 64}, r"image_size is 64; use height and width"),
        ({"image_size": [64]}, "use height and width"),
        ({"patch_size": [0, 3]}, "patch_size is .* use height and width"),
        ({"mlp_ratio": -1}, "mlp_ratio is -1; use a number above 0"),
        ({"mlp_ratio": float("nan")}, "use a number above 0"),
        ({"mlp_ratio": 0.01}, "is no hidden unit"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, said):
    with pytest.raises(ModelError, match=said):
        PoseConfig.from_json({**TINY.to_json(), **sizes})


def test_sizes_go_to_json_and_back():
    assert PoseConfig.from_json(TINY.to_json()) == TINY


def test_a_joint_is_decoded_where_it_was_encoded():
    torch.manual_seed(0)
    joints = torch.rand(5, 14, 2) * torch.tensor([32.0, 48.0]) + 8
    found = decode_joints(encode_joints(joints, (16, 12)))
    torch.testing.assert_close(found[..., :2], joints, atol=1e-3, rtol=0)


def test_the_mirror_image_is_read_with_left_and_right_swapped():
    joints, image = torch.rand(1, 14, 2) * 32 + 8, torch.randn(1, 3, 48, 48)
    mirrored = joints[:, LSP.swapped] * torch.tensor([-1, 1]) + torch.tensor([47, 0])
    given = []

    class Sees(torch.nn.Module):
        def forward(self, images):
            given.append(images)
            return encode_joints(joints if len(given) == 1 else mirrored, (12, 12))

    torch.testing.assert_close(predict_joints(Sees(), image)[..., :2], joints, atol=1e-3, rtol=0)
    assert torch.equal(given[1], image.flip(-1))


def test_pictures_are_framed_as_for_a_run_without_joints(tmp_path):
    images = open_images(write_parquet(tmp_path / "a.parquet"))
    poses, plain = PoseSet(images, FRAME, 14), images.with_transform(transform_for(FRAME))
    assert torch.equal(poses[3][0], plain[3][0])
    assert images.subset([3, 5]).joints.shape == (2, 14, 4)


@pytest.mark.parametrize("seed", range(8))
def test_joints_go_where_augmentation_takes_them(seed):
    picture, places = figure(seed, size=(96, 128))
    joints = torch.cat([torch.tensor(places) - 0.5, torch.ones(14, 1), torch.zeros(14, 1)], dim=1)
    turned, moved = augmented(picture, joints, LSP, random.Random(seed), (0, 0, 0))
    mirrored = abs(turned.getpixel(pixel(moved[2]))[2] - colour(2)[2]) > abs(
        turned.getpixel(pixel(moved[2]))[2] - colour(LSP.swapped[2])[2]
    )
    for joint in (2, 3, 8, 9):
        x, y = pixel(moved[joint])
        if 2 < x < 93 and 2 < y < 125:
            found = turned.getpixel((x, y))
            wanted = colour(LSP.swapped[joint] if mirrored else joint)
            assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 90, (joint, found, wanted)


def pixel(joint):
    """Where a joint is, as PIL counts."""
    return tuple(max(0, min(limit, round(float(value)))) for value, limit in zip(joint[:2], (95, 127), strict=True))


def test_a_flip_swaps_left_and_right_and_two_are_none():
    picture, places = figure(0)
    joints = torch.cat([torch.tensor(places), torch.ones(14, 2)], dim=1)
    once, there = flipped(picture, joints, LSP)
    assert float(there[0, 0]) == pytest.approx(59 - places[5][0])
    twice, back = flipped(once, there, LSP)
    assert twice.tobytes() == picture.tobytes()
    torch.testing.assert_close(back, joints)


def test_augmentation_depends_on_seed_epoch_and_item_alone(tmp_path):
    images = open_images(write_parquet(tmp_path / "a.parquet"))
    one, other = PoseSet(images, FRAME, 14, seed=1), PoseSet(images, FRAME, 14, seed=1)
    first = one[4]
    other[2]
    assert torch.equal(other[4][0], first[0]) and torch.equal(other[4][1], first[1])
    other.set_epoch(1)
    assert not torch.equal(other[4][1], first[1])


def test_pck_counts_known_joints_near_by_the_torso():
    torch.manual_seed(1)
    joints = make_joints(20)
    joints[3, LSP.torso[0], 2] = 0
    found = joints[..., :3] + 10 * torch.randn(20, 14, 3)
    right = total = 0
    for mine, theirs in zip(found, joints, strict=True):
        if theirs[9, 2] and theirs[2, 2]:
            torso = (theirs[9, :2] - theirs[2, :2]).norm()
            for a, b in zip(mine, theirs, strict=True):
                right += bool(b[2]) and bool((a[:2] - b[:2]).norm() <= 0.2 * torso)
                total += bool(b[2])
    assert pck(found, joints, LSP) == pytest.approx(100 * right / total)
    with pytest.raises(DataError, match="no person has a torso"):
        pck(found[3:4], joints[3:4], LSP)


def test_oks_ap_is_the_mean_over_levels_of_the_area_below_precision():
    torch.manual_seed(2)
    joints = make_joints(12, COCO)
    joints[..., 3] = 60.0
    found = joints[..., :3] + torch.linspace(0, 9, 12)[:, None, None] * torch.randn(12, 17, 3)
    similar = []
    for mine, theirs in zip(found, joints, strict=True):
        each = [
            torch.exp(-(a[:2] - b[:2]).square().sum() / (2 * b[3] ** 2 * (2 * sigma) ** 2))
            for a, b, sigma in zip(mine, theirs, COCO.sigmas, strict=True)
            if b[2]
        ]
        similar.append(float(torch.stack(each).mean()))
    order = sorted(range(12), key=lambda person: -float(found[person, :, 2].mean()))
    areas = []
    for level in OKS_LEVELS.tolist():
        points, hits = [], 0
        for place, person in enumerate(order, 1):
            hits += similar[person] >= level
            points.append((hits / 12, hits / place))
        areas += [max([p for r, p in points if r >= at / 100 - 1e-12], default=0) for at in range(101)]
    assert oks_ap(found, joints, COCO) == pytest.approx(100 * sum(areas) / len(areas))


def test_persons_of_coco_are_cut_out_with_their_joints(tmp_path):
    images = open_images(write_coco(tmp_path))
    assert len(images) == 6 and images.joints.shape == (6, 17, 4)
    picture, joints = images.person(1)
    x, y = (round(float(value)) for value in joints[8, :2])
    assert picture.getpixel((x, y)) == colour(8)
    scores = pose_scores(tiny_of(17), PoseSet(images, FRAME | {"input_size": [3, 32, 24]}, 17).batches(4))
    assert scores.keys() == {"pck@0.2", "oks_ap"}


def tiny_of(num_joints):
    return pose_model(**TINY.to_json() | {"num_joints": num_joints}).eval()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[1.0] * 28, []], "row 1 has no person"),
        ([[1.0] * 28, [1.0] * 34], "row 1 has 34 numbers for joints; use 28"),
        ([[1.0] * 30] * 2, "row 0 has 30 numbers"),
        ([[1.0] * 28, [float("nan")] * 28], "row 1 has joints out of range"),
        ([[0.25, 0.75] * 14] * 2, "all joints are within 0..1, so shares of the picture; use pixels"),
        ([3.5, 4.5], "row 0 has float for joints; use a list"),
        ([[1.0, 1.0, 0.0] * 14] * 2, "row 0 has no person, since no joint is known"),
    ],
)
def test_what_is_no_person_is_refused(tmp_path, rows, said):
    images = open_images(write_parquet(tmp_path / "a.parquet", 2, rows))
    assert len(list(images)) == 2  # whoever wants no joints never hears of them
    with pytest.raises(DataError, match=said):
        _ = images.joints


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_keypoints": 0}, "no image has a person"),
        ({"bbox": [1, 2, 0, 3]}, "person 0 has the box"),
        ({"image_id": 99}, "image 99, which has no file"),
        ({"keypoints": [1.0] * 50}, "row 0 has 50 numbers"),
        ({"keypoints": 7}, "row 0 has int for joints"),
        ({"bbox": [1, 2, "a", 3]}, "person 0 has the box"),
        ({"area": "large"}, "person 0 has the area 'large'"),
        ({"area": -4}, "person 0 has the area -4"),
        ({"image_id": [1]}, "is not COCO's JSON"),
    ],
)
def test_a_damaged_file_of_persons_is_refused(tmp_path, changed, said):
    with pytest.raises(DataError, match=said):
        open_images(write_coco(tmp_path, **changed))


def test_images_without_joints_or_with_others_are_refused(tmp_path):
    with pytest.raises(DataError, match="has no joints; pass a parquet"):
        PoseSet(open_images([torch.zeros(3, 8, 8)]), FRAME, 14)
    with pytest.raises(DataError, match="14 joints a person, and the model 17"):
        PoseSet(open_images(write_parquet(tmp_path / "a.parquet")), FRAME, 17)
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(DataError, match="is not COCO's JSON"):
        open_images(tmp_path / "b.json")
    (tmp_path / "b.json").write_text('{"images": [], "annotations": [1, 2]}')
    with pytest.raises(DataError, match="is not COCO's JSON"):
        open_images(tmp_path / "b.json")
