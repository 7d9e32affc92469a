"""A model of skeletons from end to end: what the report draws of it."""

import pytest
import torch

from tests.support.skeletons import pairs
from vitrim.data.inputs import open_inputs
from vitrim.models.features import features
from vitrim.models.load import load_model
from vitrim.models.origin import Reading
from vitrim.report.collect import look
from vitrim.report.tiles import BONE, JOINT_PX, MARGIN_PX, SMALLER_LINE, TILE_PX, _skeleton, draw_frames

ARGS = {"num_heads": 1, "depth": 6, "num_frames": 8, "num_classes": 3}


def two(**given):
    """A model and one that differs from it, with tokens of every second frame."""
    model, origin = load_model("vitrim/skeleton-hyperformer", reading=Reading(model_args={**ARGS, **given}))
    other, _ = load_model("vitrim/skeleton-hyperformer", reading=Reading(model_args={**ARGS, **given}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), other.eval(), origin


@pytest.mark.parametrize("stream", ["joint", "bone-motion"])
def test_the_report_draws_the_frames_of_skeletons_in_which_the_models_differ_most(stream):
    model, other, origin = two(stream=stream)
    batch = next(iter(open_inputs(pairs(7), origin).loader(batch_size=7)))
    found = look(model, other, origin, [batch])["frames"]
    with torch.no_grad():
        tokens = [features(each, batch.images_BCHW).patches_BND for each in (model, other)]
        said = [each(batch.images_BCHW).argmax(1) for each in (model, other)]
    apart = torch.stack(
        [
            torch.stack([(a[20 * t : 20 * t + 20] - b[20 * t : 20 * t + 20]).norm(dim=1) for t in range(4)])
            for a, b in zip(*tokens, strict=True)
        ]
    )
    furthest = sorted(range(7), key=lambda number: -float(apart[number].mean()))[:4]
    assert len(found["sequences"]) == 4 and found["num_frames"] == 8 and len(found["bones"]) == 19
    for row, number in zip(found["sequences"], furthest, strict=True):
        assert row["frames"] == [0, 2, 4, 6] and row["label"] == int(batch.labels_B[number])  # all, of so few
        assert [row["before"], row["after"]] == [int(each[number]) for each in said]
        torch.testing.assert_close(row["apart"], apart[number])
        assert row["joints"].shape == (4, 20, 2) and 0 <= float(row["joints"].min()) <= float(row["joints"].max()) <= 1
    picture = draw_frames(found)
    assert len(picture.strips) == 4 and ("somebody who stands" in picture.caption) == (stream == "bone-motion")


def test_frames_are_the_most_different_ones_in_order_and_other_lengths_draw_nothing():
    model, other, origin = two(num_frames=27, depth=4)
    batch = next(iter(open_inputs(pairs(2), origin).loader(batch_size=2)))
    for row in look(model, other, origin, [batch])["frames"]["sequences"]:
        assert len(row["frames"]) == 6 and row["frames"] == sorted(row["frames"])
        number = batch.labels_B.tolist().index(row["label"])
        with torch.no_grad():
            a, b = (features(each, batch.images_BCHW).patches_BND[number] for each in (model, other))
        by_frame = (a - b).norm(dim=1).view(27, 20).mean(1)
        assert set(row["frames"]) == set(by_frame.topk(6).indices.tolist())
    other.blocks[1].temporal = type(model.blocks[1].temporal)(24, 2)
    other.blocks[1].shortcut = torch.nn.AvgPool2d((2, 1), ceil_mode=True)
    assert look(model, other.eval(), origin, [batch])["frames"] == {}


def test_bones_are_drawn_and_joints_as_large_as_their_features_differ():
    joints = torch.tensor([[0.0, 0.5], [1.0, 0.5]])
    picture = _skeleton(3, joints, torch.tensor([1.0, 0.0]), [(0, 1)])
    half = TILE_PX // 2
    assert picture.getpixel((half, half))[:3] == BONE
    assert picture.getpixel((MARGIN_PX + JOINT_PX - 2, half))[:3] == SMALLER_LINE
    assert picture.getpixel((TILE_PX - MARGIN_PX - JOINT_PX + 2, half))[:3] == BONE
    assert picture.getpixel((half, half + 10))[3] == 0
