"""Methods that decide about a whole model, and several methods after each other."""

import json

import pytest
import torch

from vitrim.compression.cut import cut_
from vitrim.compression.saved_cut import resume_cut_, save_cut
from vitrim.config.recipe import Recipe
from vitrim.errors import CheckpointError, RecipeError, SiteNotFoundError
from vitrim.methods import METHODS, ModelMethod, register
from vitrim.models.sites import find_mlps
from vitrim.surgery import Edit, KeepUnits, Plan, read_weights
from vitrim.surgery.edits import KINDS


@pytest.fixture
def hungriest():
    """A throw-away method: over the whole model, the units whose inputs have the most energy, seen block by block."""

    @register
    class Hungriest(ModelMethod):
        name, needs, takes = "hungriest", "images", "widths"
        paper, arxiv, summary = "none", "0000.00000", "a test"

        def propose(self, view):
            for site in view.sites:
                energy = torch.zeros(site.d_hidden)

                def see(path, inputs, output, energy=energy):
                    energy += inputs.flatten(0, -2).square().sum(0)

                view.observe([site.output], see)
                yield KeepUnits(site=site, keep=tuple(energy.topk(view.widths[site.path]).indices.tolist()))

    yield
    del METHODS["hungriest"]


def cut(case, **values):
    student = case.copy()
    report = cut_(student, case.model, case.sites, Recipe.parse(values), case.batches, quiet=True)
    return student, report


def test_a_method_of_a_whole_model_picks_by_what_it_observes(kind, hungriest, run):
    student, report = cut(kind, method="hungriest", hidden_dim=10)
    for site, edit in zip(kind.sites, report.plan.edits, strict=True):
        seen = []
        hook = kind.model.get_submodule(site.output).register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # noqa: B023
        for batch in kind.batches:
            run(kind.model, batch)
        hook.remove()
        energy = torch.cat([inputs.flatten(0, -2) for inputs in seen]).square().sum(0)
        assert sorted(edit.keep) == sorted(energy.topk(10).indices.tolist())
        assert read_weights(student, edit.site).num_units == 10


def test_its_cuts_are_repaired_like_those_of_any_other_method(build, hungriest):
    case = build("timm-vit")
    _, report = cut(case, method="hungriest", hidden_dim=10, repair={"refit_steps": 3})
    assert set(report.errors) == {site.path for site in case.sites}
    assert all(errors["repaired"] < errors["unrepaired"] for errors in report.errors.values())
    assert all(f"{edit.site.output}.weight" in edit.tensors for edit in report.plan.edits)


def test_without_images_it_says_what_it_needs(build, hungriest):
    case = build("timm-vit")
    with pytest.raises(RecipeError, match="hungriest needs calibration images"):
        cut_(case.copy(), case.model, case.sites, Recipe(method="hungriest", hidden_dim=8), None, quiet=True)


FIRST = {"method": "magnitude", "hidden_dim": 40}
SECOND = {"method": "dgmr", "hidden_dim": 12, "repair": {"refit_steps": 2}}
TWICE = {"steps": [FIRST, SECOND]}


def test_steps_work_on_what_the_ones_before_have_left(build, run):
    case = build("timm-vit")
    student, report = cut(case, **TWICE)
    assert report.plan.method == "magnitude+dgmr" and set(report.plan.options) == {"magnitude", "dgmr"}
    assert [edit.width for edit in report.plan.edits] == [40] * len(case.sites) + [12] * len(case.sites)
    assert report.plan.edits[-1].site.d_hidden == 40
    assert report.plan.describe()["widths"] == {site.path: [site.d_hidden, 12] for site in case.sites}
    alone = case.copy()
    first = cut_(alone, case.model, case.sites, Recipe(method="magnitude", hidden_dim=40), case.batches, quiet=True)
    assert first.plan.edits == report.plan.edits[: len(case.sites)]
    recipe = Recipe(method="dgmr", hidden_dim=12, repair={"refit_steps": 2})
    cut_(alone, case.model, find_mlps(alone), recipe, case.batches, quiet=True)
    assert torch.equal(run(alone, case.batches[0]), run(student, case.batches[0]))


def test_a_step_without_a_width_takes_all_that_is_left(build):
    case = build("timm-vit")
    student, report = cut(
        case, steps=[{"method": "magnitude", "hidden_dim": 12, "repair": False}, {"method": "random"}]
    )
    assert [edit.width for edit in report.plan.edits] == [12] * 2 * len(case.sites)
    assert all(site.d_hidden == 12 for site in find_mlps(student))


def test_a_cut_of_several_steps_is_taken_up_with_every_tensor_of_its_plan(build, run, tmp_path):
    case = build("timm-vit")
    recipe = Recipe.parse({"steps": [{**FIRST, "repair": {"refit_steps": 2}}, SECOND]})
    student, teacher = case.copy(), case.model
    report = cut_(student, teacher, case.sites, recipe, case.batches, quiet=True)
    save_cut(student, report, recipe, tmp_path)
    again = case.copy()
    found = resume_cut_(again, recipe, tmp_path)
    assert found is not None and found.plan.sha256 == report.plan.sha256
    assert torch.equal(run(again, case.batches[0]), run(student, case.batches[0]))


def test_a_step_that_finds_nothing_left_says_so(build, monkeypatch):
    case = build("timm-vit")

    def none(model, **_):
        raise SiteNotFoundError("none")

    monkeypatch.setattr("vitrim.compression.cut.find_mlps", none)
    with pytest.raises(SiteNotFoundError, match="steps: dgmr finds no MLP"):
        cut(case, **TWICE)


def test_a_step_for_mlps_after_one_that_replaced_them_all_is_no_silent_nothing(build):
    low_rank = {"method": "low-rank", "options": {"rank": 2}}
    with pytest.raises(SiteNotFoundError, match=r"steps: top-k finds no MLP .* put it first, or leave it out"):
        cut(build("timm-vit"), steps=[low_rank, {"method": "top-k"}])
    _, report = cut(build("timm-vit"), steps=[low_rank, {"method": "int8"}])  # needs no MLP
    assert len({type(edit) for edit in report.plan.edits}) == 2


@pytest.fixture
def replacing():
    """An edit of a later order, which changes nothing, and a method that makes it."""

    class Replace(Edit):
        KIND = "replace_for_a_test"
        ORDER = 2

    @register
    class Replacing(ModelMethod):
        name, needs, takes, edits = "replacing", "weights", "nothing", (Replace,)
        paper, arxiv, summary = "none", "0000.00000", "a test"

        def propose(self, view):
            yield from ()

    yield
    del METHODS["replacing"], KINDS["replace_for_a_test"]


def test_an_order_that_cannot_work_is_refused_before_anything_runs(replacing):
    Recipe.parse({"steps": [{"method": "dgmr"}, {"method": "replacing"}]})
    with pytest.raises(RecipeError, match=r"steps: dgmr \(keep units.*\) can't follow replacing"):
        Recipe.parse({"steps": [{"method": "replacing"}, {"method": "dgmr"}]})
    with pytest.raises(RecipeError, match="unknown name"):
        Recipe.parse({"steps": [{"method": "dgmr"}, {"method": "nobody"}]})


def test_a_step_does_not_inherit_budget_or_options_and_the_recipe_round_trips():
    recipe = Recipe.parse({**TWICE, "seed": 3})
    first, second = recipe.steps
    assert (first.hidden_dim, second.hidden_dim, recipe.seed) == (40, 12, 3)
    bare = Recipe.parse({"steps": [{"hidden_dim": 9, "repair": False}, {"method": "random"}]}).steps[1]
    assert bare.budget is None and bare.repair is None
    assert Recipe.parse(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


def test_an_unknown_edit_in_a_plan_is_refused(build):
    document = cut(build("timm-vit"), method="random", hidden_dim=8)[1].plan.to_json()
    document["edits"][0]["edit"] = "paint_it_black"
    with pytest.raises(CheckpointError, match="plan: has an edit 'paint_it_black'; this version knows"):
        Plan.from_json(document)
