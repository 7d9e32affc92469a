"""The cut and its repair: never worse than no repair, nothing left behind, and clear refusals before any work."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.activations import inputs_of, targets_of
from vitrim.calibrate import walk
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import BudgetError, RecipeError
from vitrim.repair.refit import refit_, site_tensors
from vitrim.surgery import KeepUnits, apply_, read_weights
from vitrim.types import MlpSite

QUICK = {"refit_steps": 5}


def cut(case, *, batches=None, student=None, **values):
    """The student and the report of one cut with images."""
    student = case.copy() if student is None else student
    recipe = Recipe.parse({"keep_ratio": 0.4, "repair": QUICK, **values})
    return student, cut_(student, case.model, case.sites, recipe, batches or case.batches, quiet=True)


def mlp_outputs(model, site, batches):
    """What a site puts out over batches, in full forwards."""
    seen = []
    handle = model.get_submodule(site.output).register_forward_hook(
        lambda _, args, out: seen.append(out.double().flatten(0, -2))
    )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(seen)


def test_repair_and_refit_are_never_worse_than_what_they_start_from(case, run):
    student, report = cut(case, method="magnitude")
    assert list(report.errors) == [site.path for site in case.sites]
    for errors in report.errors.values():
        assert 0 < errors["repaired"] < errors["unrepaired"]
        if "held_out_refitted" in errors:
            assert errors["held_out_refitted"] <= errors["held_out_repaired"]
    assert report.plan.widths == {site.path: read_weights(student, site).num_units for site in case.sites}
    assert run(student, case.batches[0]).isfinite().all()


@pytest.mark.parametrize(
    "name", ["timm-vit-scaled", "timm-packed", "timm-split-norm", "timm-post-norm", "timm-swin", "llama-order"]
)
@pytest.mark.parametrize("method", ["dgmr", "random"])
def test_reported_errors_are_those_of_the_student_itself(build, name, method):
    case = build(name)
    student, report = cut(case, method=method, repair={"feedback": 0.0, "refit": False})
    for site in case.sites:
        theirs, ours = (mlp_outputs(model, site, case.batches[:-1]) for model in (case.model, student))
        error = float((theirs - ours).square().sum(1).mean())
        assert report.errors[site.path]["repaired"] == pytest.approx(error, rel=1e-4)


def test_the_whole_model_is_closer_to_the_original_with_repair(build, run):
    case = build("timm-vit-scaled")
    batches = [torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    errors = []
    for repair in (False, {"refit": False}, {"refit_steps": 60}):
        student, _ = cut(case, method="dgmr", repair=repair, batches=batches)
        errors.append(float((run(student, batches[-1]) - run(case.model, batches[-1])).square().mean()))
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]


def test_a_huge_ridge_leaves_the_kept_weights_as_they_are(build):
    case = build("timm-vit")
    student, report = cut(case, method="random", repair={"ridge": 1e12, "refit": False})
    for edit in report.plan.edits:
        old, new = read_weights(case.model, edit.site), read_weights(student, edit.site)
        torch.testing.assert_close(new.output_DH, old.output_DH[:, list(edit.keep)], atol=1e-5, rtol=1e-5)


def test_without_repair_no_tensor_is_changed_and_no_error_is_reported(build):
    case = build("timm-vit")
    _, report = cut(case, method="dgmr", repair=False)
    assert report.errors == {}
    assert all(edit.tensors == {} for edit in report.plan.edits)


def test_the_plan_holds_the_tensors_that_the_student_ends_with(build):
    case = build("timm-split-norm")
    student, report = cut(case, method="dgmr")
    for edit in report.plan.edits:
        assert len(edit.tensors) == 8  # weight and bias of gate, value, norm and output
        for name, tensor in edit.tensors.items():
            assert torch.equal(tensor, student.get_parameter(name))


def flagged(case):
    """A student with a few frozen parameters, and which ones they are."""
    student = case.copy()
    frozen = {case.sites[0].output + ".weight", case.sites[1].value + ".bias", "cls_token"}
    for name, p in student.named_parameters():
        p.requires_grad_(name not in frozen)
    return student, frozen


def test_a_cut_leaves_no_gradients_hooks_or_flags_behind(build):
    case = build("timm-split-norm")
    student, frozen = flagged(case)
    teacher_before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    cut(case, method="dgmr", student=student)
    assert {name for name, p in student.named_parameters() if not p.requires_grad} == frozen
    assert all(p.grad is None and p.is_leaf for p in student.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert all(torch.equal(tensor, teacher_before[name]) for name, tensor in case.model.state_dict().items())


def test_a_student_in_train_mode_is_cut_as_in_eval_mode_and_keeps_its_mode(build):
    case = build("timm-vit-scaled")
    students = []
    for train in (False, True):
        student = case.copy().train(train)
        for block in student.blocks:
            block.mlp.drop1.p = block.mlp.drop2.p = 0.3
        cut(case, method="dgmr", student=student)
        assert all(module.training == train for module in student.modules())
        students.append(student)
    assert all(torch.equal(a, b) for a, b in zip(*(s.parameters() for s in students), strict=True))


def first_visit(case, share=0.4):
    """A student whose first site is cut, and what calibration saw of it before."""
    student = case.copy()
    visit = next(walk(case.model, student, case.sites, case.batches))
    apply_(student, [KeepUnits(site=visit.site, keep=tuple(range(int(share * visit.site.d_hidden))))])
    return student, visit


def held_out_error(student, visit):
    """Squared error of the MLP on the held-out tokens, weighted by the layer scale, by calling the MLP."""
    with torch.no_grad():
        error = student.get_submodule(visit.site.path)(inputs_of(visit.held_out)) - targets_of(visit.held_out)
    return float((error * (1 if visit.scale_D is None else visit.scale_D)).double().square().sum(1).mean())


def test_refit_lowers_the_held_out_error_and_reports_it(kind):
    student, visit = first_visit(kind)
    before = held_out_error(student, visit)
    reported = refit_(student, visit, num_steps=30)
    assert reported == pytest.approx((before, held_out_error(student, visit)), rel=1e-3)
    assert reported[1] < 0.97 * before


@given(st.floats(1e-5, 10.0), st.integers(0, 100))
@settings(max_examples=12, deadline=None)
def test_refit_is_never_worse_on_held_out_tokens_at_any_rate(build_once, lr, seed):
    student, visit = copy.deepcopy(build_once)
    before, tensors = held_out_error(student, visit), site_tensors(student, visit.site)
    reported = refit_(student, visit, num_steps=3, lr=lr, seed=seed)
    after = held_out_error(student, visit)
    assert after <= before and reported[1] <= reported[0]
    if reported[0] == reported[1]:  # refused: then nothing has moved
        same = site_tensors(student, visit.site)
        assert all(torch.equal(tensors[name], same[name]) for name in tensors)


@pytest.fixture(scope="module")
def build_once():
    from tests.support.models import build_case

    return first_visit(build_case("timm-vit-scaled"))


def test_a_refit_that_diverges_is_taken_back(build_once):
    student, visit = copy.deepcopy(build_once)
    tensors = site_tensors(student, visit.site)
    before, after = refit_(student, visit, num_steps=5, lr=1e30)
    assert before == after
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in site_tensors(student, visit.site).items())


def test_refit_leaves_an_exact_mlp_alone(build):
    case = build("timm-vit")
    student, visit = first_visit(case, share=1.0)
    before, after = refit_(student, visit, num_steps=2, lr=1e-2)
    assert before == after < 1e-8
    assert torch.equal(read_weights(student, visit.site).value_HD, read_weights(case.model, visit.site).value_HD)


def test_refit_puts_flags_back_and_leaves_no_gradients(build):
    case = build("timm-split-norm")
    student, visit = first_visit(case)
    for p in student.parameters():
        p.requires_grad_(p.ndim == 2)
    flags = [p.requires_grad for p in student.parameters()]
    refit_(student, visit, num_steps=2)
    assert [p.requires_grad for p in student.parameters()] == flags
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize("name", ["timm-post-norm", "timm-swin-v2"])
def test_mlps_with_a_norm_behind_them_are_repaired_without_feedback_and_a_note_says_so(build, name):
    case = build(name)
    _, report = cut(case, method="random")
    wanted = [f"{s.path}: no fixed layer scale behind the MLP, so its target has no feedback." for s in case.sites]
    assert list(report.notes) == wanted
    assert cut(case, method="random", repair={**QUICK, "feedback": 0.0})[1].notes == ()


def test_an_mlp_that_cannot_stand_alone_is_repaired_but_not_refitted(build):
    case = build("encoder-pre-norm")
    student, report = cut(case, method="random")
    for site, note in zip(case.sites, report.notes, strict=True):
        assert note == f"{site.path}: the MLP can't be run outside its block, so it was not refitted."
        assert set(report.errors[site.path]) == {"unrepaired", "repaired"}
    old = read_weights(case.model, case.sites[0]).value_HD
    kept = list(report.plan.edits[0].keep)
    assert torch.equal(read_weights(student, case.sites[0]).value_HD, old[kept])


def test_an_inner_norm_is_spoken_of(build):
    _, report = cut(build("timm-split-norm"), method="random")
    assert [note.split(": ")[0] for note in report.notes] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert all("norm over the hidden units" in note for note in report.notes)


def test_a_bias_free_mlp_stays_bias_free(build):
    case = build("llama-order")
    student, report = cut(case, method="dgmr")
    for edit in report.plan.edits:
        assert read_weights(student, edit.site).output_bias_D is None
        assert set(edit.tensors) == {f"{edit.site.path}.{name}.weight" for name in ("w1", "w3", "w2")}


def test_both_mlps_of_a_parallel_block_are_cut(build):
    case = build("timm-parallel")
    student, report = cut(case, method="dgmr")
    assert [edit.site.path for edit in report.plan.edits] == [site.path for site in case.sites]
    assert {read_weights(student, site).num_units for site in case.sites} == {32}  # 38.4 rounded to sixteens


@pytest.mark.parametrize("budget", [{"hidden_dim": 97}, {"keep_ratio": 0.001}, {"mlp_ratio": 3.1}, {"mlp_ratio": 0.01}])
@pytest.mark.parametrize("images", [True, False])
def test_a_width_out_of_range_is_refused_before_any_work(build, budget, images):
    case = build("timm-vit")
    teacher, calls = case.copy(), []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    student = case.copy()
    recipe = Recipe.parse({"method": "dgmr", **budget})
    batches = case.batches if images else None
    with pytest.raises(
        BudgetError, match=r"^blocks\.0\.mlp: (keep_ratio|mlp_ratio|hidden_dim|width).* of 96 units; use 1\.\.96\.$"
    ):
        cut_(student, teacher, case.sites, recipe, batches, quiet=True)
    assert calls == []
    assert read_weights(student, case.sites[0]).num_units == 96


def test_no_images_means_no_repair_and_a_note_says_so(build):
    case = build("timm-vit")
    student = case.copy()
    recipe = Recipe.parse({"method": "magnitude", "repair": QUICK, "hidden_dim": 8})
    report = cut_(student, case.model, case.sites, recipe, None, quiet=True)
    assert report.notes == ("no images given: nothing was repaired; pass data for closed-form repair.",)
    assert report.errors == {} and read_weights(student, case.sites[0]).num_units == 8


@pytest.mark.parametrize("num_batches", [1, 2])
def test_few_batches_are_enough(build, num_batches):
    case = build("timm-vit")
    _, report = cut(case, method="dgmr", batches=case.batches[:num_batches])
    assert all(errors["held_out_refitted"] <= errors["held_out_repaired"] for errors in report.errors.values())


def site(d_model, d_hidden):
    return MlpSite(path="mlp", kind="plain", d_model=d_model, d_hidden=d_hidden, value="fc1", output="fc2")


@pytest.mark.parametrize(
    ("budget", "d_model", "d_hidden", "expected"),
    [
        ({"mlp_ratio": 1.0}, 384, 1536, 384),
        ({"mlp_ratio": 1.0}, 100, 400, 100),  # exact, though no multiple of 16
        ({"mlp_ratio": 0.5}, 100, 400, 48),
        ({"mlp_ratio": 2.0}, 100, 400, 192),
        ({"mlp_ratio": 2.0, "round_to": 8}, 100, 400, 200),
        ({"mlp_ratio": 1.99, "exact": True}, 100, 400, 199),
        ({"mlp_ratio": 0.53}, 384, 1536, 208),
        ({"mlp_ratio": 0.53, "round_to": 8}, 384, 1536, 200),
        ({"mlp_ratio": 4.0}, 100, 400, 400),
        ({"mlp_ratio": 4.0}, 25, 100, 100),  # the full width, though no multiple of 16
        ({"mlp_ratio": 0.01}, 100, 400, 1),  # never nothing, nor more than asked for
        ({"keep_ratio": 1.0}, 100, 273, 273),
        ({"keep_ratio": 0.5}, 100, 273, 144),
        ({"keep_ratio": 0.5, "round_to": 8}, 100, 273, 136),
        ({"keep_ratio": 0.5, "exact": True}, 100, 273, 136),
        ({"keep_ratio": 0.5, "round_to": 1}, 100, 273, 136),
        ({"keep_ratio": 0.5, "round_to": 64}, 100, 273, 128),
        ({"keep_ratio": 0.99}, 100, 273, 272),
        ({"keep_ratio": 0.999}, 100, 273, 273),
        ({"keep_ratio": 0.01}, 100, 273, 3),
        ({"keep_ratio": 0.5}, 6, 6, 3),  # fewer units than round_to
        ({"hidden_dim": 99}, 100, 400, 99),
        ({"hidden_dim": 1, "round_to": 64}, 100, 400, 1),
        ({"hidden_dim": 400, "round_to": 64}, 100, 400, 400),
    ],
)
def test_widths(budget, d_model, d_hidden, expected):
    assert Recipe.parse(budget).width().of(site(d_model, d_hidden)) == expected


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.floats(0.001, 1.0))
@settings(max_examples=200, deadline=None)
def test_rounding_stays_in_range_and_never_moves_an_exact_width(d_model, d_hidden, round_to, ratio):
    place = site(d_model, d_hidden)
    asked = Recipe(keep_ratio=ratio, round_to=round_to).width()
    if round(ratio * d_hidden) == 0:
        with pytest.raises(BudgetError, match="asks to keep 0 of"):
            asked.of(place)
    else:
        rounded = asked.of(place)
        assert 1 <= rounded <= d_hidden
        assert rounded % round_to == 0 or rounded == d_hidden or ratio * d_hidden < round_to
        assert abs(rounded - ratio * d_hidden) <= round_to / 2 + 0.5
    width = max(1, int(ratio * d_hidden))
    assert Recipe(hidden_dim=width, round_to=round_to).width().of(place) == width
    assert Recipe(keep_ratio=1.0, round_to=round_to).width().of(place) == d_hidden


@pytest.mark.parametrize("budget", [{"hidden_dim": 8, "mlp_ratio": 1.0}, {"keep_ratio": 0.5, "hidden_dim": 3}])
def test_two_budgets_are_refused(budget):
    with pytest.raises(
        RecipeError, match="give exactly one of params_ratio, macs_ratio, mlp_ratio, keep_ratio, hidden_dim, not "
    ):
        Recipe.parse(budget)


@pytest.mark.parametrize(
    "budget",
    [
        {"mlp_ratio": 0},
        {"mlp_ratio": -1},
        {"keep_ratio": 1.2},
        {"hidden_dim": 1.5},
        {"hidden_dim": 0},
        {"hidden_dim": -8},
    ],
)
def test_budgets_that_mean_nothing_are_refused(budget):
    with pytest.raises(RecipeError, match=rf"^recipe: {next(iter(budget))}: .*got"):
        Recipe.parse(budget)
