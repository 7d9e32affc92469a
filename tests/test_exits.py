"""Early exits of looped blocks: what is read at them, their training, and leaving once a class is sure."""

import copy
import math
import signal

import pytest
import torch
import torchvision

import vitrim
from tests.support.distillation import HELD_OUT, assert_equal, make_images, stopped_at, weights
from tests.support.exits import alone_and_in_a_job, make_pair, train
from tests.support.processes import run_python
from vitrim.config.options import ExitOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.errors import BudgetError, Interrupted, ModelError, RecipeError
from vitrim.methods import Recursive
from vitrim.metrics.exits import at_confidence
from vitrim.metrics.judging import FeatureModel, read_features
from vitrim.models.exits import Loops, UntilSure
from vitrim.models.features import features
from vitrim.recover.exits import ExitModel, ExitRun
from vitrim.recover.losses import feature_loss

IMAGES = HELD_OUT[0]


def torchvision_vit():
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    model = torchvision.models.VisionTransformer(num_classes=5, **sizes).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def shorter(model, depth):
    """The slow reference: a copy without the blocks behind a depth."""
    short = copy.deepcopy(model)
    del short.blocks[depth:]
    return short


def test_an_exit_is_the_model_without_the_blocks_behind_it(run):
    _, student = make_pair()
    loops = Loops(student)
    assert loops.blocks == [[f"blocks.{n}", f"blocks.{n + 1}"] for n in (0, 2, 4)]
    runs = []
    for block in student.blocks:
        block.register_forward_pre_hook(lambda *_: None)
        block.attn.register_forward_hook(lambda *_: runs.append(1))
    every = loops.exits(lambda: run(student, IMAGES))
    assert len(runs) == 6  # no block ran twice
    for number, found in enumerate(every, 1):
        expected = run(shorter(student, 2 * number), IMAGES)
        with loops.up_to(number):
            torch.testing.assert_close(run(student, IMAGES), expected)
        torch.testing.assert_close(found, expected)
    with torch.no_grad(), loops.up_to(1) as seen:
        student(IMAGES)
    with torch.no_grad(), loops.up_to(2, seen["output"]):
        runs.clear()
        torch.testing.assert_close(student(IMAGES), every[1])
        assert len(runs) == 2
    torch.testing.assert_close(run(student, IMAGES), every[-1])
    assert not any("forward" in vars(block) for block in student.blocks)


def test_blocks_need_no_numbers_for_names(run):
    """As in torchvision, whose blocks are `encoder_layer_0` and so on."""
    model = torchvision_vit()
    vitrim.prune_(model, Recursive(num_blocks=2, rank=2))
    loops, images = Loops(model), torch.randn(3, 3, 32, 32)
    layers = "encoder.layers.encoder_layer"
    assert loops.blocks == [[f"{layers}_0", f"{layers}_1"], [f"{layers}_2", f"{layers}_3"]]
    short = copy.deepcopy(model)
    del short.encoder.layers[2:]
    torch.testing.assert_close(loops.exits(lambda: run(model, images))[0], run(short, images))
    with loops.up_to(1):
        torch.testing.assert_close(run(model, images), run(short, images))


def test_there_are_no_exits_without_loops_and_none_beyond():
    teacher, student = make_pair()
    with pytest.raises(ModelError, match="its blocks are not looped"):
        Loops(teacher)
    for number in (0, 4):
        with pytest.raises(RecipeError, match=rf"exit: {number} is no loop of this model; use 1\.\.3"):
            with Loops(student).up_to(number):
                pass
    with pytest.raises(RecipeError, match=r"confidence: is 1\.5"):
        UntilSure(student, 1.5)
    student.reset_classifier(0)
    with pytest.raises(ModelError, match="has no class head to be sure by"):
        UntilSure(student, 0.5)


def test_an_image_leaves_at_the_first_exit_that_is_sure():
    _, student = make_pair()
    with torch.no_grad():
        student.head.weight.mul_(3)
        scores = torch.stack(Loops(student).exits(lambda: student(IMAGES)))
        sure = scores.softmax(-1).amax(-1)
        threshold = float(sure[:-1].median())
        slow = [next((e for e in range(2) if sure[e, n] >= threshold), 2) for n in range(len(IMAGES))]
        assert len(set(slow)) > 1
        leaving = UntilSure(student, threshold)
        found = leaving(IMAGES)
        assert leaving.depths == [2 * (number + 1) for number in slow]
        assert leaving.first_sure(scores).tolist() == slow
        torch.testing.assert_close(found, torch.stack([scores[number, n] for n, number in enumerate(slow)]))
        UntilSure(student, 0.0)(IMAGES)
        assert leaving.first_sure(scores).shape == (len(IMAGES),)


def test_the_loss_weighs_exits_and_lets_only_the_last_see_the_teacher():
    teacher, student = make_pair()
    options = ExitOptions(steps=1, batch_size=8, weight=0.1)
    recover = vitrim.RecoverOptions(**options.model_dump(exclude={"weight"}), optimizer="relative")
    given = {"images": make_images(16), "held_out": HELD_OUT, "options": recover, "context": RunContext(quiet=True)}
    run = ExitRun(student, teacher, weight=0.1, **given)
    found = read_features(ExitModel(student, "final"), IMAGES, "final")
    with torch.no_grad():
        target = features(teacher, IMAGES)
    loss = run._compared(found, target)
    parts = [features(shorter(student, depth), IMAGES) for depth in (2, 4, 6)]
    slow = feature_loss(parts[2], target)
    for part in parts[:2]:
        patches = ((part.patches_BND - parts[2].patches_BND.detach()) ** 2).mean()
        slow = slow + 0.1 * (((part.pooled_BD - parts[2].pooled_BD.detach()) ** 2).mean() + patches)
    torch.testing.assert_close(loss, slow)
    errors = run.judge.errors(FeatureModel(student, "final"))
    assert {*errors} == {"relative_error", "exit=1", "exit=2", "exit=3"}
    weighted = (0.1 * errors["exit=1"] + 0.1 * errors["exit=2"] + errors["exit=3"]) / 1.2
    assert errors["relative_error"] == pytest.approx(weighted)


@pytest.mark.parametrize("at", ["final", "logits"])
def test_training_brings_exits_closer(at):
    teacher, student = make_pair()
    found = train(student, teacher, steps=30, features_at=at, weight=0.5)
    first, best = found.curve[0], min(found.curve, key=lambda point: point["relative_error"])
    assert best["exit=1"] < 0.9 * first["exit=1"] and found.improved
    assert all(math.isfinite(point["exit=3"]) for point in found.curve)


def test_stopped_training_goes_on_bit_for_bit(tmp_path, monkeypatch):
    teacher, whole = make_pair()
    stopped, again = copy.deepcopy(whole), copy.deepcopy(whole)
    expected = train(whole, teacher)
    real = ExitRun.train_step

    def stop(run, *given):
        if run.step == 7:
            raise KeyError("stopped")
        return real(run, *given)

    with monkeypatch.context() as patch:
        patch.setattr(ExitRun, "train_step", stop)
        with pytest.raises(KeyError, match="stopped"):
            train(stopped, teacher, work=tmp_path)
    found = train(again, teacher, work=tmp_path, resume=True)
    assert_equal(weights(whole), weights(again))
    assert found.curve == expected.curve


def test_a_job_that_is_terminated_in_its_exits_goes_on_bit_for_bit(tmp_path, monkeypatch):
    teacher, _ = make_pair()
    recipe = {"method": "recursive", "options": {"num_blocks": 2, "rank": 2}, "calibrate": {"views": 3}}
    recipe["recover"] = {"steps": 2, "batch_size": 8, "lr": 1e-3}
    recipe["exits"] = {"steps": 6, "batch_size": 8, "num_validations": 3}
    given = {"data": make_images(), "recipe": recipe, "quiet": True}
    monkeypatch.setattr("vitrim.output.save.verify", lambda *_, **__: 0.0)  # a fresh process takes its time
    expected = vitrim.compress(teacher, **given)
    told = r"early exits stopped at step 4 of 6; continue with --resume"
    with stopped_at(ExitRun, 4, signal.SIGTERM), pytest.raises(Interrupted, match=told):
        vitrim.compress(teacher, **given, out=tmp_path / "out")
    found = vitrim.compress(teacher, **given, out=tmp_path / "out", resume=True)
    assert_equal(weights(found.model), weights(expected.model))
    assert found.metrics.exits["curve"] == expected.metrics.exits["curve"]


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    done = run_python("-m", "tests.support.exits", tmp_path / "two.pt", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    pairs = zip(alone_and_in_a_job(), torch.load(tmp_path / "two.pt", weights_only=True), strict=True)
    for (ours, curve), (theirs, other) in pairs:
        assert [{**point} for point in other] == [pytest.approx(point, rel=1e-3) for point in curve]
        torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=1e-3)


def test_a_recipe_trains_exits_last():
    teacher, _ = make_pair()
    recipe = {"method": "recursive", "options": {"num_blocks": 2, "rank": 2}, "recover": {"steps": 2, "lr": 1e-4}}
    exits = {"steps": 3, "batch_size": 8, "lr": 0.003, "num_validations": 1}
    found = vitrim.compress(teacher, data=make_images(), recipe={**recipe, "exits": exits}, quiet=True)
    assert {"exit=1", "exit=2", "exit=3"} < {*found.metrics.exits["curve"][-1]}
    assert found.metrics.recovery is not None
    with pytest.raises(RecipeError, match="exits: are trained at one width"):
        Recipe.parse({"recover": {"steps": 2, "elastic": (1, 2)}, "exits": {}})
    with pytest.raises(RecipeError, match="exits: are at the ends of loops, and no step loops blocks"):
        vitrim.compress(teacher, data=make_images(), recipe={"method": "magnitude", "mlp_ratio": 1, "exits": {}})


@pytest.mark.parametrize(
    ("cut", "error", "message"),
    [
        ({"options": {"num_blocks": 6, "rank": 2}}, RecipeError, "no step loops blocks; use recursive with fewer"),
        ({"options": {"num_blocks": 6}, "params_ratio": 0.5}, RecipeError, "no step loops blocks"),
        ({"keep_ratio": 1.0}, RecipeError, "no step loops blocks"),
        ({"options": {"num_blocks": 4, "rank": 2}}, RecipeError, "4 does not divide 6 blocks; use one of 1, 2, 3, 6"),
        ({"options": {"rank": 33}}, BudgetError, "33 is above the 32"),
        (
            {"exits": {"features_at": "logits"}},
            RecipeError,
            "exits.features_at: logits needs a model with a class head",
        ),
    ],
)
def test_what_leaves_no_loops_is_refused_before_the_first_image(cut, error, message, tmp_path):
    class Images(torch.utils.data.Dataset):
        def __getitem__(self, number):
            raise AssertionError("an image was read")

        def __len__(self):
            return 8

    recipe = {"method": "recursive", "exits": {"steps": 1}, **cut}
    teacher, _ = make_pair()
    if "exits" in cut:
        teacher.reset_classifier(0)
    with pytest.raises(error, match=message):
        vitrim.compress(teacher, data=Images(), recipe=recipe, out=tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())


def test_exits_that_turn_out_to_be_none_leave_no_state(tmp_path):
    # Behind two dropped blocks four are left, and all of them stay.
    steps = [
        {"method": "replace-me", "options": {"num_blocks": 4}},
        {"method": "recursive", "options": {"num_blocks": 4, "rank": 2}},
    ]
    recipe = {"steps": steps, "exits": {"steps": 1}}
    with pytest.raises(ModelError, match="its blocks are not looped"):
        vitrim.compress(make_pair()[0], data=make_images(), recipe=recipe, out=tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())


def test_leaving_once_sure_is_judged_image_by_image():
    teacher, student = make_pair()
    with torch.no_grad():
        student.head.weight.mul_(3)
    labels = torch.arange(8) % 5
    batches = [(IMAGES[:5], labels[:5]), (IMAGES[5:], labels[5:])]
    for confidence, exits in ((0.0, {1}), (0.55, {1, 2, 3}), (1.0, {3})):
        leaving = UntilSure(student, confidence)
        found = at_confidence(leaving, teacher, batches, top1=True)
        with torch.no_grad():
            scores = leaving(IMAGES)
            parts = [features(shorter(student, depth), IMAGES[n : n + 1]) for n, depth in enumerate(leaving.depths)]
            target = features(teacher, IMAGES)
        assert {depth // 2 for depth in leaving.depths} <= exits
        assert found["blocks"] == pytest.approx(sum(leaving.depths) / 8)
        assert found["top1"] == pytest.approx(100 * float((scores.argmax(1) == labels).double().mean()))
        assert found["exit=1"] == pytest.approx(leaving.depths.count(2) / 8)
        mine = torch.cat([torch.cat([part.pooled_BD[:, None], part.patches_BND], 1) for part in parts])
        theirs = torch.cat([target.pooled_BD[:, None], target.patches_BND], 1)
        spread = (theirs - theirs.mean((0, 1))).square().sum()
        assert found["relative_error"] == pytest.approx(float((mine - theirs).square().sum() / spread), rel=1e-4)
    assert "top1" not in at_confidence(leaving, teacher, [IMAGES], top1=True)


def test_evaluate_leaves_at_an_exit_or_once_sure(run):
    teacher, student = make_pair()
    data = make_images(12)
    whole = vitrim.evaluate(student, teacher, data, latency=False)
    first = vitrim.evaluate(student, teacher, data, latency=False, exit=1)
    assert first.student.cost.macs < 0.5 * whole.student.cost.macs and "left behind loop 1" in first.judged_on
    assert first.to_json()["exit"] == 1 and "exit" not in whole.to_json()
    again = vitrim.evaluate(student, teacher, data, latency=False, exit=3)
    assert again.fidelity == whole.fidelity
    sure = vitrim.evaluate(student, teacher, data, confidence=1.0)
    assert sure.sure["relative_error"] == pytest.approx(whole.fidelity["relative_error"])
    assert sure.sure["blocks"] == 6 and sure.sure["latency"]["ratio"] > 0
    named = {row[0] for row in sure.rows()}
    assert "left once sure: blocks that run, in the mean" in named
    assert "left once sure: share of images that leave at exit 3" in named
    for given, error, message in (
        ({"exit": 4}, RecipeError, r"exit: 4 is no loop of this model; use 1\.\.3"),
        ({"exit": 1, "confidence": 0.5}, RecipeError, "give one of the two"),
        ({"confidence": 2.0}, RecipeError, "confidence: is 2"),
    ):
        with pytest.raises(error, match=message):
            vitrim.evaluate(student, teacher, data, **given)
    with pytest.raises(ModelError, match="its blocks are not looped"):
        vitrim.evaluate(teacher, teacher, data, exit=1)
