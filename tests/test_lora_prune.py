"""LoRAPrune (arXiv 2305.18403): its importance, its masks, its schedule, and the mistakes that its code makes."""

from __future__ import annotations

import copy
import signal
from importlib.resources import files
from itertools import pairwise
from typing import ClassVar

import pytest
import timm
import torch
from torch import nn

import vitrim
from tests.support import two_prune
from tests.support.distillation import assert_equal, make_images, make_teacher
from tests.support.models import timm_vit
from tests.support.processes import run_python
from vitrim.compression import cut as cut_module
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.data import open_images
from vitrim.errors import Interrupted, OutputError, RecipeError
from vitrim.methods import lora_prune
from vitrim.methods.registry import FactorTraining
from vitrim.models.sites import find_mlps
from vitrim.ops.lora_importance import Factors, cubic_share, group_scores
from vitrim.recover import factors as factors_module
from vitrim.recover.factors import TrainingSource, train_factors_
from vitrim.surgery import KeepHeads, KeepUnits

DIGITS = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
RECOVER = {"steps": 1, "batch_size": 8, "lr": 1e-4}
GENERATOR = torch.Generator().manual_seed(0)


def random_factors(rows, columns, rank=3):
    def draw(*shape):
        return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)

    return Factors(
        weight_MN=draw(rows, columns),
        a_RN=draw(rank, columns),
        b_MR=draw(rows, rank),
        grad_a_RN=draw(rank, columns),
        grad_b_MR=draw(rows, rank),
        scale=0.7,
    )


def test_at_the_start_with_a_whole_basis_the_estimate_is_the_gradient_of_the_weight():
    inputs, weight = torch.randn(9, 6, generator=GENERATOR), torch.randn(5, 6, generator=GENERATOR)
    a_RN = torch.linalg.qr(torch.randn(6, 6, generator=GENERATOR))[0].requires_grad_()
    b_MR, scale = torch.zeros(5, 6, requires_grad=True), 2.0
    adapted = weight.clone().requires_grad_()
    ((inputs @ adapted.T).sin().sum()).backward()
    ((inputs @ (weight + scale * b_MR @ a_RN).T).sin().sum()).backward()
    found = Factors(
        weight_MN=weight,
        a_RN=a_RN.detach(),
        b_MR=b_MR.detach(),
        grad_a_RN=a_RN.grad,
        grad_b_MR=b_MR.grad,
        scale=scale,
    )
    torch.testing.assert_close(found.estimated_gradient_MN, scale * adapted.grad)


@pytest.mark.parametrize(("columns", "parts"), [(False, 1), (False, 3), (True, 1)])
def test_scores_equal_a_naive_loop(columns, parts):
    factors, groups, width = random_factors(*((4, 12) if columns else (12 * parts, 4))), 4, 3
    product = factors.grad_b_MR @ factors.a_RN + factors.b_MR @ factors.grad_a_RN
    product = product - factors.grad_b_MR @ factors.grad_a_RN
    saliency = (product * (factors.weight_MN + factors.scale * factors.b_MR @ factors.a_RN)).abs()
    saliency = saliency.T if columns else saliency
    total = [0.0] * groups
    for part in range(parts):
        sums = []
        for group in range(groups):
            first = (part * groups + group) * width
            sums.append(sum(float(v) for row in saliency[first : first + width] for v in row))
        length = sum(v * v for v in sums) ** 0.5
        total = [a + b / length for a, b in zip(total, sums, strict=True)]
    assert group_scores(factors, groups, columns=columns, num_parts=parts).tolist() == pytest.approx(total)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_the_schedule_never_falls_and_ends_at_the_whole_target(steps):
    shares = [cubic_share(step, steps, ends=0.1) for step in range(1, steps + 1)]
    assert shares == sorted(shares) and shares[-1] == 1.0
    if steps == 1000:
        assert shares[99] == 0 < shares[100] and shares[898] < 1 == shares[899]
        assert shares[299] == pytest.approx(1 - 0.75**3)


class Watched(lora_prune._Pruner):
    """What happens between steps, written down, with the model of the moment."""

    model: nn.Module
    history: list

    def see(self, step, factors):
        frozen = [p for name, p in self.model.named_parameters() if not p.requires_grad]
        assert frozen and all(p.grad is None for p in frozen)
        assert {n.rpartition(".")[2] for n, p in self.model.named_parameters() if p.requires_grad} == {"A", "B"}
        if step == 1:
            assert all(not bool(f.b_MR.any()) and torch.equal(f.adapted_MN, f.weight_MN) for f in factors.values())
        super().see(step, factors)
        self.history.append({path: kept.clone() for path, kept in self.kept.items()})


@pytest.fixture
def watch(monkeypatch):
    """Runs a cut by lora-prune, and gives the student, the report, the masks by step and the full trained weights."""

    def run(model, sites, batches, **options):
        history, trained = [], {}
        monkeypatch.setattr(lora_prune, "_Pruner", Watched)

        def train(live, *given, between, **more):
            between.model, between.history = live, history
            trained.update(train_factors_(live, *given, between=between, **more))
            trained["masks"] = dict(between.masks)
            return {name: tensor for name, tensor in trained.items() if name != "masks"}

        monkeypatch.setattr(cut_module, "train_factors_", train)
        values = {"keep_ratio": 0.5, **{key: options.pop(key) for key in ("keep_ratio",) if key in options}}
        recipe = Recipe.parse({"method": "lora-prune", "exact": True, "options": options, **values})
        student = copy.deepcopy(model)
        return student, cut_(student, model, sites, recipe, batches, quiet=True), history, trained

    return run


FEW = {"steps": 12, "rank": 4, "every": 2, "batch_size": 6, "lr": 1e-2}


@pytest.mark.parametrize("name", ["timm-vit-scaled", "timm-packed", "timm-split", "hf-vit"])
def test_the_cut_equals_the_masked_model_and_masks_only_close(build, watch, run, name):
    case = build(name)
    parts = "mlp" if name == "timm-split" else "both"  # DINOv3 has positions in its attention
    student, report, history, trained = watch(case.model, case.sites, case.batches, parts=parts, **FEW)
    assert len(history) == 12 and not history[0][case.sites[0].output].logical_not().any()
    for before, after in pairwise(history):
        assert all(bool((before[path] | ~after[path]).all()) for path in before)
    masked, masks = copy.deepcopy(case.model), trained.pop("masks")
    masked.load_state_dict({**case.model.state_dict(), **trained})
    assert any(not torch.equal(trained[key], case.model.state_dict()[key]) for key in trained)
    for path, mask in masks.items():
        masked.get_submodule(path).register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
    expected = run(masked, case.batches[0])
    torch.testing.assert_close(run(student, case.batches[0]), expected, atol=1e-5, rtol=1e-5)
    assert {type(edit) for edit in report.plan.edits} == {KeepUnits, *([KeepHeads] if parts == "both" else [])}
    totals = [edit.site.d_hidden if isinstance(edit, KeepUnits) else edit.site.num_heads for edit in report.plan.edits]
    assert [len(edit.keep) for edit in report.plan.edits] == [round(total / 2) for total in totals]


def test_the_papers_masks_on_queries_keys_values_and_inputs_give_the_same_outputs_and_gradients(build, watch, run):
    case = build("timm-vit")
    _, _, _, trained = watch(case.model, case.sites, case.batches, parts="both", **FEW)
    masks, totals = trained.pop("masks"), []
    for where in ("ours", "theirs"):
        model = copy.deepcopy(case.model)
        model.load_state_dict({**case.model.state_dict(), **trained})
        for block in range(2):
            for inputs, output in (("attn.qkv", "attn.proj"), ("mlp.fc1", "mlp.fc2")):
                mask = masks[f"blocks.{block}.{output}"]
                if where == "ours":
                    hook = lambda _, args, mask=mask: (args[0] * mask,)  # noqa: E731
                    model.get_submodule(f"blocks.{block}.{output}").register_forward_pre_hook(hook)
                else:
                    wide = mask.repeat(3) if inputs == "attn.qkv" else mask
                    hook = lambda _, args, output, wide=wide: output * wide  # noqa: E731
                    model.get_submodule(f"blocks.{block}.{inputs}").register_forward_hook(hook)
        model(case.batches[0]).square().sum().backward()
        totals.append([run(model, case.batches[0]), *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*totals, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 9, 10])
@pytest.mark.parametrize("keep_ratio", [0.1, 0.37, 0.9])
def test_the_target_is_reached_exactly(steps, keep_ratio):
    teacher = make_teacher()
    recipe = Recipe.parse(
        {
            "method": "lora-prune",
            "keep_ratio": keep_ratio,
            "exact": True,
            "options": {"steps": steps, "rank": 2, "batch_size": 2},
        }
    )
    batches = [torch.randn(4, 3, 16, 16)]
    report = cut_(copy.deepcopy(teacher), teacher, find_mlps(teacher), recipe, batches, quiet=True)
    assert [edit.width for edit in report.plan.edits] == [round(keep_ratio * 128)] * 2
    assert report.plan.edits[0].keep != report.plan.edits[1].keep


def test_spared_blocks_stay_whole_and_both_sparsities_are_said():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=5, num_heads=2, num_classes=3
    ).eval()
    options = {"steps": 4, "rank": 2, "batch_size": 4, "spare": True, "parts": "both"}
    recipe = Recipe.parse({"method": "lora-prune", "keep_ratio": 0.5, "options": options})
    report = cut_(copy.deepcopy(model), model, find_mlps(model), recipe, [torch.randn(4, 3, 16, 16)], quiet=True)
    assert [len(edit.keep) for edit in report.plan.edits] == [2, 1, 1, 1, 2, 64, 32, 32, 32, 64]
    assert report.notes == (
        "lora-prune: gone are 50.0% of the hidden units where any were cut, 30.0% of all; "
        "50.0% of the heads where any were cut, 30.0% of all.",
    )


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole_edits, whole = two_prune.prune()
    take = factors_module._Loop._take

    def stop(self, batches):
        if self.step == 8:
            raise KeyboardInterrupt
        take(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(factors_module._Loop, "_take", stop)
        with pytest.raises(KeyboardInterrupt):
            two_prune.prune(tmp_path)
    edits, resumed = two_prune.prune(tmp_path, resume=True)
    assert [edit.keep for edit in edits] == [edit.keep for edit in whole_edits]
    assert_equal(resumed, whole)
    with pytest.raises(RecipeError, match=r"^resume: .*factors-0\.state is of another recipe"):
        two_prune.prune(tmp_path, resume=True, rank=2)


def test_a_stopped_compress_leaves_its_state_and_goes_on_from_there(tmp_path, monkeypatch):
    take, steps = factors_module._Loop._take, []

    def counted(self, batches):
        steps.append(self.step)
        take(self, batches)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(factors_module._Loop, "_take", counted)
    given = {"steps": 8, "batch_size": 8, "every": 2}
    asked = Recipe(method="lora-prune", options=given, keep_ratio=0.5)
    data = open_images("digits", limit=60)
    with pytest.raises(Interrupted):
        vitrim.compress(DIGITS, recipe=asked, data=data, out=tmp_path / "small", quiet=True)
    assert (tmp_path / ".small.partial" / "factors-0.state").exists()
    with pytest.raises(OutputError, match="holds the state of a stopped run"):
        vitrim.compress(DIGITS, recipe=asked, data=data, out=tmp_path / "small", quiet=True)
    again = vitrim.compress(DIGITS, recipe=asked, data=data, out=tmp_path / "small", resume=True, quiet=True)
    assert steps == list(range(8)) and not (tmp_path / ".small.partial").exists()
    whole = vitrim.compress(DIGITS, recipe=asked, data=data, quiet=True)
    assert again.plan.sha256 == whole.plan.sha256
    assert_equal(again.model.state_dict(), whole.model.state_dict())


def test_ctrl_c_keeps_a_state_and_says_how_to_go_on(tmp_path, monkeypatch):
    take = factors_module._Loop._take

    def interrupt(self, batches):
        take(self, batches)
        if self.step == 5:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(factors_module._Loop, "_take", interrupt)
        with pytest.raises(Interrupted, match=r"stopped at step 5 of 12; continue with --resume \(state in "):
            two_prune.prune(tmp_path)
    assert_equal(two_prune.prune(tmp_path, resume=True)[1], two_prune.prune()[1])


def test_two_processes_prune_as_one(tmp_path):
    done = run_python("-m", "tests.support.two_prune", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    main, other = (torch.load(tmp_path / f"rank{number}.pt", weights_only=False) for number in (0, 1))
    edits, weights = two_prune.prune()
    assert main["kept"] == other["kept"] == [edit.keep for edit in edits]
    assert_equal(main["weights"], other["weights"])
    for name, tensor in weights.items():
        torch.testing.assert_close(main["weights"][name], tensor, atol=1e-5, rtol=1e-4)


def test_a_repair_that_was_asked_for_is_said_not_to_follow():
    model = timm_vit()
    recipe = Recipe.parse({"method": "lora-prune", "keep_ratio": 0.5, "repair": True, "options": {"steps": 1}})
    report = cut_(copy.deepcopy(model), model, find_mlps(model), recipe, [torch.randn(8, 3, 32, 32)], quiet=True)
    assert report.notes[-1] == ("repair: lora-prune gives what it keeps weights of its own, so nothing was repaired.")


def test_labels_are_read_only_where_they_were_asked_for():
    features, labels = (two_prune.prune(loss=loss)[1] for loss in ("features", "labels"))
    assert not torch.equal(features["blocks.0.mlp.fc2.weight"], labels["blocks.0.mlp.fc2.weight"])


def test_the_rate_of_a_factor_grows_with_its_weight():
    rates = []
    for scale in (1.0, 8.0):
        teacher = make_teacher()
        teacher.blocks[0].mlp.fc1.weight.data *= scale
        training = FactorTraining(layers=("blocks.0.mlp.fc1",), rank=2, alpha=4, steps=1, batch_size=2, lr=1e-3)
        groups = []

        class Nothing:
            masks: ClassVar = {}

            def see(self, step, factors):
                pass

        original = factors_module._Loop._groups

        def kept(loop, groups=groups, original=original):
            groups += original(loop)
            return groups

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(factors_module._Loop, "_groups", kept)
            train_factors_(teacher, make_teacher(), TrainingSource(images=make_images()), training, Nothing())
        rates.append([group["peak"] for group in groups])
    assert rates[1] == pytest.approx([rates[0][0], 8 * rates[0][1]]) and rates[0][0] == 1e-3


def prune_digits(**values):
    options = {"steps": 4, "rank": 2, "batch_size": 8, **values.pop("options", {})}
    given = {"keep_ratio": 0.5} if "params_ratio" not in values else {}
    return vitrim.compress(
        DIGITS,
        method="lora-prune",
        options=options,
        recipe={"calibrate": {"num_images": 32}},
        quiet=True,
        **{"data": "digits", **given, **values},
    )


def test_compress_writes_what_loads_again_and_goes_on_with_recovery(tmp_path):
    result = prune_digits(options={"parts": "both", "loss": "labels"}, out=tmp_path / "small", recover=RECOVER)
    again = vitrim.load(tmp_path / "small")
    assert_equal(again.state_dict(), result.model.state_dict())
    assert {edit.KIND for edit in result.plan.edits} == {"keep_heads", "keep_units"}
    assert any(note.startswith("lora-prune: gone are 50.0% of the hidden units") for note in result.metrics.notes)


def test_a_budget_of_the_whole_model_is_met_without_a_training_for_every_trial(monkeypatch):
    steps = []
    train = cut_module.train_factors_
    spy = lambda *args, training, **rest: (steps.append(training.steps), train(*args, training=training, **rest))[1]  # noqa: E731
    monkeypatch.setattr(cut_module, "train_factors_", spy)
    result = prune_digits(options={"parts": "both"}, params_ratio=0.6)
    assert steps[-1] == 4 and set(steps[:-1]) == {1}
    assert result.metrics.after.parameters <= 0.6 * result.metrics.before.parameters


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"steps": 0}, r"^options\.steps of method lora-prune: .*greater than or equal to 1; its options are "),
        ({"rank": 999}, r"^options\.rank=999: blocks\.0\.mlp\.fc1 is \d+ x \d+; use 1\.\.\d+\.$"),
        ({"loss": "classes"}, r"^options\.loss of method lora-prune: .*'features' or 'labels'"),
    ],
)
def test_bad_options_get_one_line(options, line):
    with pytest.raises(RecipeError, match=line):
        prune_digits(options=options)


def test_missing_labels_get_one_line_before_the_first_image():
    images = [torch.randn(1, 32, 32).expand(3, -1, -1) for _ in range(40)]
    with pytest.raises(
        RecipeError, match=r"^options\.loss=labels: .*has no labels; pass labels of the model's classes"
    ):
        prune_digits(options={"loss": "labels"}, data=images)
    with pytest.raises(RecipeError, match=r"^options\.loss=labels: the images have no labels"):
        vitrim.prune_(make_teacher(), lora_prune.LoraPrune(loss="labels", rank=2, steps=1), [torch.randn(4, 3, 16, 16)])


def test_a_model_without_heads_that_divide_gets_one_line(build):
    case = build("timm-mixer")
    for wrong, kind in (("parts", case.model), ("spare", make_teacher())):
        size = 16 if wrong == "spare" else 32
        given = {"spare": True} if wrong == "spare" else {"parts": "both"}
        method = lora_prune.LoraPrune(steps=1, rank=2, **given)
        with pytest.raises(RecipeError, match=rf"^options\.{wrong}: "):
            vitrim.prune_(copy.deepcopy(kind), method, [torch.randn(4, 3, size, size)], keep_ratio=0.5)


def test_a_text_encoder_is_pruned_too(build):
    case = build("hf-bert")
    plan = vitrim.prune_(case.copy(), lora_prune.LoraPrune(steps=2, rank=2), case.batches, keep_ratio=0.5)
    assert len(plan.edits) == len(case.sites)
