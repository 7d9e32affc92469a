"""Models of skeletons together and in the report: what is drawn of them, and streams whose scores are added."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import vitrim
from tests.support.skeletons import pairs, write_table
from vitrim.cli.app import run
from vitrim.data.inputs import open_inputs
from vitrim.errors import DataError, ModelError, SiteNotFoundError
from vitrim.models.features import features
from vitrim.models.load import load_model
from vitrim.models.origin import Reading
from vitrim.models.sites import find_mlps
from vitrim.output.save import save
from vitrim.report.collect import look
from vitrim.report.tiles import BONE, JOINT_PX, MARGIN_PX, SMALLER_LINE, TILE_PX, _skeleton, draw_frames
from vitrim.surgery import Plan

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


def test_frames_are_the_most_different_ones_in_order_and_models_that_are_alike_or_of_other_lengths_draw_none():
    model, other, origin = two(num_frames=27, depth=4)
    batch = next(iter(open_inputs(pairs(2), origin).loader(batch_size=2)))
    for row in look(model, other, origin, [batch])["frames"]["sequences"]:
        assert len(row["frames"]) == 6 and row["frames"] == sorted(row["frames"])
        number = batch.labels_B.tolist().index(row["label"])
        with torch.no_grad():
            a, b = (features(each, batch.images_BCHW).patches_BND[number] for each in (model, other))
        by_frame = (a - b).norm(dim=1).view(27, 20).mean(1)
        assert set(row["frames"]) == set(by_frame.topk(6).indices.tolist())
    assert look(model, model, origin, [batch])["frames"] == {}
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


STREAMS = ("joint", "bone-motion")


@pytest.fixture(scope="module")
def streams():
    """Originals and small models of two streams."""
    return {stream: two(stream=stream) for stream in STREAMS}


def test_scores_of_streams_are_added_on_each_side_and_each_model_is_judged_alone_too(streams):
    students, teachers = ([each[side] for each in streams.values()] for side in (1, 0))
    found = vitrim.evaluate_together(students, teachers, pairs(60), batch_size=7, quiet=True)
    said = []
    for side, models in ((found.student, students), (found.teacher, teachers)):
        added, labels = torch.zeros(60, 3), torch.tensor([label for _, label in pairs(60)])
        for number, (model, (_, _, origin)) in enumerate(zip(models, streams.values(), strict=True), start=1):
            images = open_inputs(pairs(60), origin)
            with torch.no_grad():
                scores = model(torch.stack([images[n][0] for n in range(60)]))
            added += scores
            assert side.scores[f"top1 of model {number}"] == pytest.approx(100 * accuracy(scores, labels))
        assert side.scores["top1"] == pytest.approx(100 * accuracy(added, labels))
        assert side.cost.parameters == sum(p.numel() for model in models for p in model.parameters())
        said.append(added.argmax(1))
    assert found.fidelity["top1_agreement"] == pytest.approx(float((said[0] == said[1]).double().mean()))
    assert "scores of 2 models added" in found.judged_on and "top-1 (%) of model 2" in found.summary()
    assert found.below({"top1": 100.0}) and "top-1 agreement" in repr(found)


def accuracy(scores, labels):
    return float((scores.argmax(1) == labels).double().mean())


def test_models_that_can_not_be_added_are_refused_in_one_line(streams):
    (joint, _, _), (motion, _, _) = streams.values()
    for students, teachers, data, said in (
        (
            [joint, motion],
            [motion, joint],
            pairs(6),
            r"model 1: takes joint \[3, 8, 20\], and original 1 bone-motion .*its own original",
        ),
        ([joint, motion], [joint], pairs(6), "2 small models, and 1 to compare with"),
        ([joint, two(num_classes=4)[0]], [joint, joint], pairs(6), "model 2: has 4 classes, and original 1 has 3"),
    ):
        with pytest.raises(ModelError, match=said):
            vitrim.evaluate_together(students, teachers, data, quiet=True)
    with pytest.raises(ModelError, match=r"the small model: takes joint .*, and .* bone-motion"):
        vitrim.evaluate(joint, motion, pairs(6), latency=False)
    with pytest.raises(DataError, match="has no labels, so top-1 is not measured"):
        vitrim.evaluate_together([joint] * 2, [joint] * 2, [recorded for recorded, _ in pairs(6)], quiet=True)


def test_streams_are_judged_together_on_the_command_line(streams, tmp_path, capsys):
    table = str(write_table(tmp_path / "data.parquet", pairs(12)))
    given = ["evaluate"]
    for side in (1, 0):
        for name, each in streams.items():
            (folder := tmp_path / f"{name}-{side}").mkdir()
            save(
                folder, each[side], origin=each[2], plan=Plan(edits=(), method="none", options={}, seed=0, versions={})
            )
            given += [*([] if side else ["--against"]), str(folder)]
    given += ["--data", table, "--quiet"]
    assert run([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {"top1", *(f"top1 of {tmp_path / name}-1" for name in STREAMS)}
    assert found["num_images"] == 12 and names <= found["student"].keys()
    for more, said in ((["--index", table], "index: goes with one model"), (["--exit", "1"], "exit: goes with one")):
        assert run([*given, *more]) == 2
        assert said in capsys.readouterr().err


def numbered(joints, label=0, frames=None):
    """One more recording as a row of a table."""
    return {"label": label, "num_frames": len(joints) if frames is None else frames, "joints": joints.tobytes()}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (numbered(np.zeros((4, 25, 3), np.float32)), "has 25 joints in each of 4 frames, and the model takes 20"),
        (numbered(np.zeros((4, 20, 3), np.float32), frames=5), "has 16 joints in each of 5 frames"),
        (numbered(np.zeros((4, 20, 3), np.float32), frames=7), "says 7 frames and holds 960 bytes"),
        (numbered(np.zeros((0, 20, 3), np.float32)), "has no frames; leave empty sequences out"),
        (numbered(np.zeros((4, 20, 3), np.float32), label=7), "has classes 0 to 7, the model's head classes 0 to 2"),
    ],
)
def test_bad_recordings_end_a_command_in_one_line_before_any_work(row, said, tmp_path, capsys):
    rows = [*(numbered(joints, label) for joints, label in pairs(30)), row]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    (tmp_path / "labels.yaml").write_text("recover: {loss: labels, steps: 1}")
    given = ["compress", "vitrim/skeleton-hyperformer", "--method", "lortsar", "--keep-ratio", "0.5", "--quiet"]
    given += [word for name, value in ARGS.items() for word in ("--model-arg", f"{name}={value}")]
    given += ["--recipe", str(tmp_path / "labels.yaml"), "--data", str(tmp_path / "data.parquet")]
    assert run([*given, "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert said in shown and len(shown.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"data.parquet", "labels.yaml"}


def test_labels_of_skeletons_are_the_heads_if_there_are_fewer_and_refused_outside_of_it(tmp_path, capsys):
    model, _, origin = two()
    (tmp_path / "m").mkdir()
    save(tmp_path / "m", model, origin=origin, plan=Plan(edits=(), method="none", options={}, seed=0, versions={}))
    joints = [each for each, _ in pairs(6)]
    write_table(tmp_path / "few.parquet", list(zip(joints, [0, 1, 0, 1, 1, 0], strict=True)))
    write_table(tmp_path / "out.parquet", list(zip(joints, [0, 1, 5, 9, 4, 7], strict=True)))
    folder = str(tmp_path / "m")
    found = vitrim.evaluate(folder, folder, str(tmp_path / "few.parquet"), latency=False, quiet=True)
    assert found.student.num_images["top1"] == 6
    assert run(["evaluate", folder, "--against", folder, "--data", str(tmp_path / "out.parquet"), "--quiet"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].endswith("labels 4, 5, 7, ... (4 of 6 images), but the model's head has 3 classes; use 0..2.")
    with pytest.raises(SiteNotFoundError, match="The method lortsar makes convolutions smaller, too"):
        find_mlps(model)
