"""A pose model from end to end: cut, written, loaded, trained with joints, evaluated by them, exported."""

import base64
import copy
import io

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vitrim
from tests.support.people import TINY, tiny, write_parquet
from vitrim.cli.app import run
from vitrim.config.options import RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import open_images, split_indices
from vitrim.data.poses import PoseSet
from vitrim.errors import DataError
from vitrim.metrics.pose import pose_scores
from vitrim.models import from_vitrim
from vitrim.models.load import load_model, origin_of
from vitrim.models.pose import predict_joints
from vitrim.recover.labels import train_labels_
from vitrim.recover.losses import heatmap_loss
from vitrim.report.collect import look
from vitrim.report.tiles import ORIGINAL_LINE, SMALLER_LINE, TILE_PX, _person, draw_poses


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("people") / "people.parquet", 16)


@pytest.fixture(scope="module")
def cut(people, tmp_path_factory):
    model, out = tiny(), tmp_path_factory.mktemp("out") / "small"
    recipe = {"calibrate": {"num_images": 12, "batch_size": 4}, "repair": {"refit": False}}
    size = {"keep_ratio": 0.5, "exact": True}
    result = vitrim.compress(model, data=people, method="dgmr", **size, recipe=recipe, out=out, quiet=True)
    return model, result


def test_a_cut_pose_model_is_loaded_as_it_was_cut(cut):
    model, result = cut
    loaded, images = vitrim.load(result.out), torch.randn(2, 3, 32, 24)
    assert torch.equal(loaded(images), result.model(images))
    assert loaded.blocks[0].mlp.fc1.out_features == model.blocks[0].mlp.fc1.out_features // 2


def test_a_folder_of_its_config_and_weights_is_the_same_model(cut, tmp_path):
    model, images = cut[0], torch.randn(2, 3, 32, 24)
    from_vitrim.write_config(model, tmp_path, origin_of(model))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded, origin = load_model(str(tmp_path))
    assert torch.equal(loaded(images), model(images))
    assert origin.preprocessing["input_size"] == [3, 32, 24] and loaded.config == TINY


def test_it_is_evaluated_by_its_joints(cut, people):
    model, result = cut
    found = vitrim.evaluate(result.out, model, people, limit=6, latency=False)
    images = open_images(people, limit=6)
    for scored, it in ((found.student, result.model), (found.teacher, model)):
        wanted = pose_scores(it, PoseSet(images, model.preprocessing, 14).batches())
        assert scored.scores == pytest.approx(wanted) and scored.num_images == {"pck@0.2": 6}
    assert "pck@0.2" in found.summary() and "kNN" not in found.summary()
    assert found.below({"pck@0.2": 101.0})


def test_pictures_without_joints_are_evaluated_by_features_alone(cut):
    model, result = cut
    found = vitrim.evaluate(result.model, model, torch.randn(4, 3, 32, 24), latency=False)
    assert not found.student.scores


def test_joints_of_others_are_refused(people, tmp_path):
    rows = [[2.0] * 34] * 4
    with pytest.raises(DataError, match="has 17 joints a person, and the model 14"):
        vitrim.evaluate(tiny(), tiny(), write_parquet(tmp_path / "a.parquet", 4, rows), latency=False)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "row 2 has no person; leave it out"),
        ([2.0] * 30, "row 2 has 30 numbers for joints; use 28"),
        ([float("inf")] * 28, "row 2 has joints out of range; use pixels"),
    ],
)
def test_pictures_without_a_person_end_a_command_in_one_line_before_any_work(row, said, tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", 3, [[2.0] * 28, [2.0] * 28, row])
    given = ["--data", str(tmp_path / "a.parquet"), "--quiet"]
    for command in (["compress", "--out", str(tmp_path / "out")], ["evaluate", "--against", "vitrim/pose-small"]):
        assert run([command[0], "vitrim/pose-small", *command[1:], *given]) == 2
        shown = capsys.readouterr().err
        assert said in shown and len(shown.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_the_report_shows_the_joints_of_both_where_they_are_furthest_apart(cut):
    model, result = cut
    assert ">Joints<" in (result.out / "report.html").read_text(encoding="utf-8")
    images = torch.rand(10, 3, 32, 24)
    shown = look(model, result.model, origin_of(model), [(images, torch.full((10,), -1))])["poses"]
    with torch.no_grad():
        both = [predict_joints(it, images)[..., :2] for it in (model, result.model)]
    apart = (both[0] - both[1]).norm(dim=-1).mean(1)
    furthest = apart.topk(8).indices
    torch.testing.assert_close(shown["before"][..., :2], both[0][furthest])
    torch.testing.assert_close(shown["after"][..., :2], both[1][furthest])


def test_rows_of_people_are_equally_wide():
    found = {"images": torch.rand(7, 3, 32, 24), "before": torch.rand(7, 14, 3), "after": torch.rand(7, 14, 3)}
    strips = draw_poses({**found, "bones": [(0, 1)]}).strips
    sizes = [Image.open(io.BytesIO(base64.b64decode(strip.uri.partition(",")[2]))).size for strip in strips]
    assert len(sizes) == 2 and sizes[0] == sizes[1]


def test_bones_are_drawn_from_joint_to_joint():
    image, joints = torch.zeros(3, 32, 24), torch.tensor([[3.5, 3.5, 1.0], [19.5, 3.5, 1.0]])
    lower = joints + torch.tensor([0.0, 20.0, 0.0])
    picture = _person(image, joints, lower, [(0, 1)])
    scale = TILE_PX / 24
    assert picture.getpixel((round(12 * scale), round(4 * scale))) == ORIGINAL_LINE
    assert picture.getpixel((round(12 * scale), round(24 * scale))) == SMALLER_LINE
    assert picture.getpixel((round(12 * scale), round(14 * scale))) == (0, 0, 0)


def test_it_learns_from_joints_by_a_recipe_as_it_does_by_hand(people, tmp_path):
    model, images = tiny(), open_images(people)
    options = {"loss": "labels", "steps": 6, "batch_size": 4, "lr": 0.01, "num_validations": 2, "cycles": 2}
    by_hand, recipe = copy.deepcopy(model), {"calibrate": {"num_images": 4}, "repair": False, "seed": 3}
    size = {"method": "dgmr", "keep_ratio": 1.0}
    found = vitrim.compress(
        model, data=people, recover=options, recipe=recipe, **size, out=tmp_path / "out", quiet=True
    )
    rest, held = split_indices(16, num_held_out=1, seed=3)
    held_out = PoseSet(images.subset(held), model.preprocessing, 14).batches()
    train = PoseSet(images.subset(rest), model.preprocessing, 14, seed=3)
    given = {"options": RecoverOptions(**options), "context": RunContext(quiet=True, seed=3), "loss": heatmap_loss}
    wanted = train_labels_(by_hand, train, held_out=held_out, **given)
    assert found.metrics.recovery["curve"] == wanted.curve and found.metrics.stock
    inputs = torch.randn(2, 3, 32, 24)
    torch.testing.assert_close(vitrim.load(found.out)(inputs), by_hand.eval()(inputs))
    with pytest.raises(DataError, match="has no joints; pass a parquet file"):
        vitrim.compress(model, data=torch.randn(8, 3, 32, 24), recover=options, **size, quiet=True)


def test_it_is_exported(cut, tmp_path):
    exported = vitrim.export(cut[1].out, tmp_path / "pose.pt2", to="torch", latency=False)
    assert max(exported.differences.values()) < 1e-4
