"""The main job end to end, on small models and scikit-learn's digits."""

import json
import re

import pytest
import timm
import torch
from PIL import Image

import vitrim
from tests.support.digits import DIGITS, few
from vitrim.data import open_images
from vitrim.errors import BudgetError, DataError, ModelError, OutputError, RecipeError
from vitrim.metrics.record import Metrics
from vitrim.models.load import load_model


def tiny():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0
    ).eval()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("compress") / "out"
    recover = {"steps": 4, "batch_size": 16, "lr": 1e-4}
    return vitrim.compress(DIGITS, data="digits", recipe=few(), recover=recover, out=out, quiet=True)


def test_half_of_the_parameters_go_and_the_features_stay(result):
    before, after = (cost.parameters for cost in (result.metrics.before, result.metrics.after))
    assert after == sum(p.numel() for p in result.model.parameters()) < 0.52 * before
    assert result.metrics.after_recovery.fidelity["relative_error"] < 0.05
    assert result.metrics.after_recovery.fidelity["relative_error"] <= (
        result.metrics.after_cut.fidelity["relative_error"] + 1e-9
    )


def test_the_published_schedule_is_filled_in_for_the_models_family_and_recorded(tmp_path):
    recover = {"schedule": "published", "steps": 2, "batch_size": 32}
    found = vitrim.compress(
        DIGITS, data="digits", recipe=few(repair=False), recover=recover, out=tmp_path / "out", quiet=True
    )
    assert found.metrics.recovery["lr"] == pytest.approx(7.5e-6 * 32 / 256) and not found.metrics.recovery["rate_test"]
    written = vitrim.Recipe.load(tmp_path / "out" / "recipe.yaml").recover
    assert (written.schedule, written.augment, written.ema, written.steps) == ("published", "dinov2", 0.997, 2)
    assert any("published it for dinov2" in note for note in found.metrics.notes)


def test_the_folder_holds_everything_and_loads_with_stock_timm(result):
    names = {"model.safetensors", "config.json", "vitrim.json", "recipe.yaml", "metrics.json", "report.html"}
    names |= {"README.md", "recovery.jsonl"}
    assert {path.name for path in result.out.iterdir()} == names
    stock = timm.create_model(f"local-dir:{result.out}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stock(images), result.model(images))
    assert torch.equal(vitrim.load(result.out)(images), result.model(images))
    assert result.metrics.stock and result.metrics.reload_difference <= 1e-5
    assert vitrim.Recipe.load(result.out / "recipe.yaml").recover.steps == 4
    failed = any("did not improve on the cut" in note for note in result.metrics.notes)
    said = "" if not failed else ", which did not improve on the cut: this is the model before it"
    card = (result.out / "README.md").read_text()
    assert f"from the original (4 steps, 64 images seen, {result.metrics.recovery['seconds']:.0f} s){said}." in card
    assert json.loads((result.out / "metrics.json").read_text())["images"]["held_out"] == 143


def test_the_file_of_metrics_is_what_is_returned(result):
    written, returned = json.loads((result.out / "metrics.json").read_text()), result.metrics.to_json()
    assert written == json.loads(json.dumps(returned))
    assert written["seconds"] > 0 and written["loads_with"].startswith("timm.create_model(")
    assert str(result.out) in written["loads_with"] and written["reload_difference"] <= 1e-5
    assert Metrics.from_json(written) == result.metrics


def test_a_second_run_with_the_seed_gives_the_same_plan_byte_for_byte(tmp_path, result):
    again = vitrim.compress(DIGITS, data="digits", recipe=few(), out=tmp_path / "again", quiet=True)
    first, second = (json.loads((out / "vitrim.json").read_text()) for out in (result.out, again.out))
    assert json.dumps(first["plan"]) == json.dumps(second["plan"])
    assert first["plan_sha256"] == second["plan_sha256"] == again.plan.sha256
    other = vitrim.compress(DIGITS, data="digits", recipe=few(), seed=1, quiet=True)
    assert other.plan.sha256 != again.plan.sha256


def test_what_vitrim_wrote_can_be_inspected_evaluated_and_cut_again(tmp_path, result):
    found = vitrim.inspect(str(result.out))
    assert {site.d_hidden for site in found.sites} == {96}
    measured = vitrim.evaluate(str(result.out), DIGITS, "digits", limit=60, latency=False)
    assert measured.student.cost.parameters < measured.teacher.cost.parameters
    assert measured.fidelity["pooled_cosine"] > 0.95 and "knn" in measured.student.scores
    again = vitrim.compress(str(result.out), method="magnitude", hidden_dim=40, out=tmp_path / "again", quiet=True)
    assert vitrim.inspect(str(again.out)).sites[0].d_hidden == 40


def test_evaluate_runs_each_model_once_for_features_and_once_for_its_head(result):
    seen = {}
    models = {"student": result.model, "teacher": load_model(DIGITS)[0]}
    handles = [
        model.patch_embed.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: seen.get(name, 0) + len(args[0])})
        )
        for name, model in models.items()
    ]
    found = vitrim.evaluate(*models.values(), "digits", limit=40, latency=False)
    num_checks = 10 + 3  # the input, MACs and memory; and that the model is repeatable
    assert seen == {"student": 2 * 40 + num_checks, "teacher": 2 * 40 + num_checks}
    assert found.teacher.scores["top1"] > 90 and "linear_probe" in found.student.scores
    for handle in handles:
        handle.remove()


def test_what_was_judged_on_few_images_or_none_says_so(tmp_path):
    """30 images hold 3 out: an error with its number, and neither recall nor agreement; without images nothing."""
    images = torch.randn(30, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with_few = vitrim.compress(tiny(), data=images, method="magnitude", repair=False, out=tmp_path / "few", quiet=True)
    metrics = with_few.metrics
    assert metrics.after_cut.num_images == metrics.images["held_out"] == 3
    assert not [name for name in metrics.after_cut.fidelity if "recall" in name or "agreement" in name]
    assert any(note.startswith("judged on 3 images: too few for recall") for note in metrics.notes)
    (error,) = [row for row in with_few.table()[1] if row[0] == "relative error"]
    assert error[-1] == "3" and with_few.table()[0] == ("", "original", "small", "images")
    assert "on 3 images, out=" in repr(with_few) and "after recovery" not in with_few.summary()
    page = (tmp_path / "few" / "report.html").read_text()
    card = (tmp_path / "few" / "README.md").read_text()
    for text in (with_few.summary(), with_few._repr_html_(), page, card):
        assert "Quality is on 3 images held out from the given data." in text
    assert "recovery" not in page.partition("<body>")[2].partition("Every option")[0].lower()
    assert re.search(r"against the original on 3 images", page)
    without = vitrim.compress(tiny(), method="magnitude", quiet=True)
    assert "Quality was not measured: no images were given." in without.summary()
    assert without.table()[0] == ("", "original", "small") and not without.metrics.images


def test_one_image_is_not_held_out_from_itself():
    only = vitrim.compress(tiny(), data=torch.randn(1, 3, 32, 32), method="magnitude", repair=False, quiet=True)
    assert only.metrics.images["held_out"] == 0 and only.metrics.after_cut is None
    assert "Quality was not measured: no image was held out." in only.summary()


def test_each_score_of_an_evaluation_has_its_number_of_images():
    found = vitrim.evaluate(DIGITS, DIGITS, "digits", limit=40, latency=False)
    counts = {row[0]: row[3] for row in found.rows()}
    assert (counts["relative error"], counts["top-1 (%)"], counts["kNN (%)"], counts["parameters"]) == (
        *"40 40 8".split(),
        "",
    )
    assert not any("recall" in name or "agreement" in name or "_" in name for name in counts)
    assert "40 images of digits (test), as they were given; none was held out." in found.summary()
    assert "judged on 40 images: too few" in found._repr_html_()


def test_it_shows_what_runs_behind_the_cut_and_while_it_evaluates(tmp_path, capsys):
    recipe = {"calibrate": {"num_images": 40}, "repair": {"refit": False}, "method": "magnitude", "mlp_ratio": 1}
    vitrim.compress(DIGITS, data="digits", recipe=recipe, out=tmp_path / "out")
    said = capsys.readouterr().err
    for part in (
        "judge: 1/",
        "costs: latency",
        "report: what both",
        "write: weights, loaded in a fresh",
        "write: report",
    ):
        assert part in said
    vitrim.evaluate(tmp_path / "out", DIGITS, "digits", limit=60)
    said = capsys.readouterr().err
    for part in ("images of digits (test)", "1/1 batches read", "1/1 batches compared", "latency", "what the features"):
        assert part in said
    vitrim.evaluate(DIGITS, DIGITS, "digits", limit=60, quiet=True, latency=False)
    assert capsys.readouterr().err == ""


def test_the_part_that_is_read_is_said(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for number in range(2):
            Image.new("RGB", (32, 32), (number, 9, 0)).save(tmp_path / part / f"{number}.png")
    found = vitrim.evaluate(DIGITS, DIGITS, tmp_path, latency=False, quiet=True)
    assert f"2 images of {tmp_path} (has splits test, train; test is read), as" in found.judged_on
    assert found.to_json()["data"] == f"{tmp_path} (has splits test, train; test is read)"


def test_the_given_module_is_left_as_it_was():
    model = tiny()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = vitrim.compress(model, data=images.split(8), recipe=few(), recover={"steps": 2, "lr": 1e-5}, quiet=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in [*model.parameters(), *result.model.parameters()])
    assert result.out is None and {site.d_hidden for site in vitrim.inspect(result.model).sites} == {32}


@pytest.mark.fresh
def test_a_bf16_model_comes_back_in_bf16_and_is_cut_in_float32(tmp_path):
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    results = [
        vitrim.compress(model, data=images, recipe=few(), out=tmp_path / name, quiet=True)
        for name, model in (("half", tiny().bfloat16()), ("full", tiny().bfloat16().float()))
    ]
    assert {tensor.dtype for tensor in vitrim.load(tmp_path / "half").state_dict().values()} == {torch.bfloat16}
    assert results[0].plan.sha256 == results[1].plan.sha256


def test_without_images_dgmr_falls_back_to_weights_and_says_so(tmp_path):
    result = vitrim.compress(tiny(), mlp_ratio=0.5, out=tmp_path / "out", quiet=True)
    paper = vitrim.compress(tiny(), method="dgmr-paper", mlp_ratio=0.5, quiet=True)
    assert [edit.keep for edit in result.plan.edits] == [edit.keep for edit in paper.plan.edits]
    assert any("selected on weights" in note for note in result.metrics.notes)


def test_a_module_no_library_can_build_is_saved_and_loaded_by_its_owner(tmp_path):
    def build():
        torch.manual_seed(0)
        mlp = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.GELU(), torch.nn.Linear(24, 12))
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 12), mlp).eval()

    images = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    result = vitrim.compress(build(), data=images, recipe=few(), hidden_dim=8, out=tmp_path / "out", quiet=True)
    assert torch.equal(vitrim.load(tmp_path / "out", model=build())(images), result.model(images))


def test_corrupt_images_are_counted(tmp_path):
    digits = open_images("digits", limit=60)
    for index in range(60):
        image, _ = digits._rows.read(index)
        image.save(tmp_path / f"{index:02}.png")
    for index in (3, 30, 50):
        (tmp_path / f"{index:02}.png").write_bytes(b"not an image")
    result = vitrim.compress(DIGITS, data=tmp_path, recipe=few(), quiet=True)
    assert result.metrics.images["skipped"] == 3


def test_inspection_predicts_the_parameters_that_a_cut_leaves():
    for model, ratio in ((tiny(), 1.0), (DIGITS, 0.5)):
        (predicted,) = vitrim.inspect(model, mlp_ratio=ratio).predicted
        result = vitrim.compress(model, method="magnitude", mlp_ratio=ratio, quiet=True)
        assert predicted.parameters == result.metrics.after.parameters
        assert predicted.hidden_dims == result.plan.widths


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"model": "timm/vit_tinny_patch16_224"}, ModelError, "did you mean 'timm/vit_tiny"),
        ({"model": "local-dir:/nowhere"}, ModelError, "no such model"),
        ({"data": "/nowhere"}, DataError, "/nowhere"),
        ({"hidden_dim": 0}, RecipeError, "hidden_dim: .*greater than or equal to 1"),
        ({"hidden_dim": 385}, BudgetError, r"use 1\.\.384"),
        ({"mlp_ratio": 9.0}, BudgetError, r"use 1\.\.384"),
        ({"hidden_dim": 8, "keep_ratio": 0.5}, RecipeError, "exactly one"),
        ({"method": "dgrm"}, RecipeError, "did you mean 'dgmr'"),
        ({"options": {"select": 1}}, RecipeError, "select_on"),
        ({"options": {"select_on": "outputs"}}, RecipeError, "needs images"),
        ({"recover_steps": 10}, RecipeError, "needs images"),
        ({"recover": {"steps": 10, "stepz": 1}, "data": "digits"}, RecipeError, "recover.steps"),
        ({"scope": "tower"}, vitrim.VitrimError, "scope 'tower'"),
        ({"out": "/proc/nothing/out"}, OutputError, "can't be written"),
        ({"device": "cuda:99"}, RecipeError, "device"),
    ],
)
def test_bad_input_gives_one_clear_line(arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        vitrim.compress(arguments.pop("model", DIGITS), quiet=True, **arguments)
    assert "\n" not in str(caught.value)


def test_the_folder_of_a_result_can_be_given_as_it_is(result, tmp_path):
    assert vitrim.inspect(result.out, mlp_ratio=0.5).model == str(result.out)
    again = vitrim.compress(result.out, method="magnitude", hidden_dim=16, quiet=True)
    assert again.metrics.before.parameters == result.metrics.after.parameters
    sliced = vitrim.slice(f"local-dir:{result.out}", tmp_path / "out", mlp_ratio=0.5)
    assert set(sliced.plan.widths.values()) == {48}


@pytest.mark.parametrize("given", [None, 5], ids=str)
def test_what_is_no_model_is_refused_in_one_line(given):
    with pytest.raises(ModelError, match="pass a module, a name or a folder"):
        vitrim.compress(given, quiet=True)


@pytest.mark.parametrize("where", [{"device": "nonsense"}, {"dtype": torch.int32}, {"dtype": "float16"}], ids=str)
def test_loading_to_where_nothing_goes_is_refused_in_one_line(result, where):
    with pytest.raises(ModelError, match="can't go to") as caught:
        vitrim.load(result.out, **where)
    assert "\n" not in str(caught.value)
