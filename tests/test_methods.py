"""Every registered method on every kind of MLP, and each method against a slow, obvious version of itself."""

import json
from dataclasses import replace

import pytest
import scipy.linalg
import torch
from torch import Tensor

from tests.support.activations import stored_stats
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.config.widths import BUDGETS
from vitrim.errors import CheckpointError, RecipeError, SiteNotFoundError
from vitrim.methods import METHODS, Corp, LoraPrune, ModelMethod, Random, find_method, make_method
from vitrim.surgery import KeepUnits, Plan, apply_, read_weights, reshape_
from vitrim.types import MlpSite, MlpWeights, SiteView

EVERY = pytest.mark.parametrize("method", METHODS)
CUTS = pytest.mark.parametrize(
    "method",
    [name for name, entry in METHODS.items() if entry.edits[0] is KeepUnits and entry not in (Corp, LoraPrune)],
)
BUDGETED = pytest.mark.parametrize("method", [n for n, entry in METHODS.items() if entry.takes != "nothing"])
QUICK = {"refit_steps": 3}
LEAST = {"tome": 0.5, "recursive": 0.6}  # can't go as far down: half of a block's patches, one of two blocks
FEW = {  # options of those that search or train
    "fips": {"steps": 3, "every": 1},
    "amp": {"rounds": 2, "trials": 3},
    "lora-prune": {"steps": 3, "rank": 2},
}


def cut(case, *, images=True, **values):
    """The student and the report of one cut."""
    student = case.copy()
    if values.get("repair") is None and find_method(values["method"]).repairs:
        values["repair"] = QUICK
    recipe = Recipe.parse(values)
    return student, cut_(student, case.model, case.sites, recipe, case.batches if images else None, quiet=True)


def cut_or_skip(case, *, images=True, **values):
    """As `cut`; a method that needs images and has none, or can't do this MLP, must say so and change nothing."""
    method, student = find_method(values["method"]), case.copy()
    few = {"repair": QUICK if method.repairs else None, "options": FEW.get(method.name, {})}
    if "keep_ratio" in values:
        values["keep_ratio"] = max(values["keep_ratio"], LEAST.get(method.name, 0.0))
    if method.takes == "nothing":
        values = {name: value for name, value in values.items() if name not in BUDGETS}
    recipe = Recipe.parse({**few, **values})
    needs = issubclass(method, ModelMethod) and method.needs == "images" and not images
    try:
        report = cut_(student, case.model, case.sites, recipe, case.batches if images else None, quiet=True)
    except (RecipeError, SiteNotFoundError) as error:
        assert ("needs calibration images" in str(error)) == needs
        pairs = zip(student.state_dict().values(), case.model.state_dict().values(), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
        pytest.skip(f"refused: {error}")
    assert not needs
    return student, report


def dumped(plan):
    return json.dumps(plan.to_json(), sort_keys=True)


@CUTS
@pytest.mark.parametrize("images", [True, False])
def test_the_count_asked_for_is_kept_each_unit_once(kind, method, images):
    student, report = cut_or_skip(kind, method=method, hidden_dim=10, images=images)
    assert [edit.site for edit in report.plan.edits] == list(kind.sites)
    for edit in report.plan.edits:
        assert len(edit.keep) == len(set(edit.keep))
        assert issubclass(find_method(method), ModelMethod) or len(edit.keep) == 10
        assert 0 <= min(edit.keep) and max(edit.keep) < edit.site.d_hidden
        assert read_weights(student, edit.site).num_units == len(edit.keep)
    # A method that sees the whole model may spread the units over it.
    assert sum(edit.width for edit in report.plan.edits) == 10 * len(kind.sites)


@BUDGETED
@pytest.mark.parametrize("images", [True, False])
def test_the_full_budget_reproduces_the_model(kind, method, images, run):
    student, report = cut_or_skip(kind, method=method, keep_ratio=1.0, images=images)
    cuts = [edit for edit in report.plan.edits if isinstance(edit, KeepUnits)]
    assert all(sorted(edit.keep) == list(range(edit.site.d_hidden)) for edit in cuts)
    expected = run(kind.model, kind.batches[0])
    torch.testing.assert_close(run(student, kind.batches[0]), expected, atol=1e-5, rtol=1e-5)


@EVERY
def test_one_seed_gives_one_plan_byte_for_byte(kind, method):
    both = (cut_or_skip(kind, method=method, keep_ratio=0.25, seed=5) for _ in range(2))
    (first_student, first), (second_student, second) = both
    assert dumped(first.plan) == dumped(second.plan) and first.plan.sha256 == second.plan.sha256
    pairs = zip(first_student.parameters(), second_student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@BUDGETED
def test_another_width_gives_another_hash(build, method):
    case = build("timm-vit")
    widths = {"replace-me": (32, 96), "tome": (48, 80), "recursive": (64, 80)}.get(method, (32, 64))  # of two blocks
    whole = case.sites[0].d_hidden
    first, second = (cut_or_skip(case, method=method, keep_ratio=width / whole)[1].plan for width in widths)
    assert first.sha256 != second.sha256


@EVERY
def test_a_plan_survives_json_and_replays(kind, method, run):
    student, report = cut_or_skip(kind, method=method, keep_ratio=0.25, repair=False)
    again = Plan.from_json(json.loads(json.dumps(report.plan.to_json())))
    assert again == report.plan.without_tensors()
    pairs = zip(again.edits, report.plan.edits, strict=True)
    edits = [replace(read, tensors=made.tensors) for read, made in pairs]  # what a file of tensors would hold
    assert replace(again, edits=tuple(edits)).sha256 == report.plan.sha256
    replayed = kind.copy()
    apply_(replayed, edits)
    assert torch.equal(run(replayed, kind.batches[0]), run(student, kind.batches[0]))


@EVERY
def test_a_cut_model_is_built_again_from_its_shapes_and_tensors_alone(kind, method, run):
    """What loading an output does: the shape half, then the weights."""
    student, report = cut_or_skip(kind, method=method, keep_ratio=0.25, repair=False)
    empty = kind.copy()
    reshape_(empty, [edit.shape_only() for edit in report.plan.edits])
    empty.load_state_dict(student.state_dict(), assign=True)
    assert torch.equal(run(empty, kind.batches[0]), run(student, kind.batches[0]))


@CUTS
def test_repaired_tensors_stand_in_the_plan_by_hash(build, method, run):
    case = build("timm-split")
    student, report = cut(case, method=method, hidden_dim=8, repair=QUICK)
    again = Plan.from_json(json.loads(json.dumps(report.plan.to_json())))
    assert again == report.plan.without_tensors()
    changed = report.plan.edits[0].tensors[f"{case.sites[0].output}.weight"]
    before = report.plan.sha256
    replayed = case.copy()
    apply_(replayed, report.plan.edits)
    assert torch.equal(run(replayed, case.batches[0]), run(student, case.batches[0]))
    changed[0, 0] += 1e-3
    assert report.plan.sha256 != before


@pytest.mark.parametrize("damage", [{"format": "vitrim-plan/9"}, {"edits": [{}]}, {"edits": None}])
def test_a_damaged_plan_is_refused(build, damage):
    document = cut(build("timm-vit"), method="magnitude", hidden_dim=8)[1].plan.to_json()
    with pytest.raises(CheckpointError, match=r"^plan: "):
        Plan.from_json({**document, **damage})


def test_random_depends_on_the_seed_and_on_the_site(build):
    case = build("timm-vit")
    first, second = (cut(case, method="random", hidden_dim=20, seed=seed)[1].plan for seed in (0, 1))
    assert first.edits[0].keep != second.edits[0].keep
    assert first.edits[0].keep != first.edits[1].keep


def test_random_draws_each_unit_equally_often():
    view = view_of(torch.randn(12, 4), num_keep=4)
    draws = [Random().select(view).tolist() for _ in range(1500)]  # the generator moves on
    counts = torch.tensor(draws).flatten().bincount(minlength=12)
    assert all(len(set(draw)) == 4 for draw in draws)
    assert (counts - 500).abs().max() < 90  # five standard deviations


def view_of(value, *, gate=None, output=None, num_keep, stats=None):
    site = MlpSite(path="mlp", kind="plain", d_model=value.shape[1], d_hidden=len(value), value="fc1", output="fc2")
    output = torch.ones(value.shape[1], len(value)) if output is None else output
    return SiteView(
        site=site,
        weights=MlpWeights(value_HD=value, gate_HD=gate, output_DH=output),
        num_keep=num_keep,
        generator=torch.Generator().manual_seed(0),
        stats=stats,
    )


def select(name, view, **options):
    return make_method(name, options).select(view).tolist()


def qr_order(rows: Tensor, count: int) -> list[int]:
    """LAPACK's column-pivoted QR of the transposed rows."""
    return scipy.linalg.qr(rows.double().T.numpy(), mode="r", pivoting=True)[1][:count].tolist()


@pytest.mark.parametrize("name", ["dgmr-paper", "dgmr"])
def test_dgmr_on_weights_picks_what_lapack_picks(kind, name):
    options = {"select_on": "weights"}
    _, report = cut(
        kind, method=name, hidden_dim=24 if kind.sites[0].d_hidden > 24 else 16, options=options, repair=False
    )
    for edit in report.plan.edits:
        weights = read_weights(kind.model, edit.site)
        rows = weights.value_HD
        if weights.gate_HD is not None:
            rows = torch.cat([weights.gate_HD, weights.value_HD], dim=1)
        assert list(edit.keep) == qr_order(rows, edit.width)


@CUTS
def test_published_methods_leave_kept_values_bit_equal(build, method):
    if find_method(method).folds:
        pytest.skip("it folds the dropped units into the others: see test_folding.py")
    case = build("timm-packed")
    student, report = cut(case, method=method, hidden_dim=8, repair=False)
    for edit in report.plan.edits:
        old, new = read_weights(case.model, edit.site), read_weights(student, edit.site)
        assert torch.equal(new.value_HD, old.value_HD[list(edit.keep)])
        assert torch.equal(new.output_DH, old.output_DH[:, list(edit.keep)])
        assert torch.equal(new.output_bias_D, old.output_bias_D)


def test_biases_and_output_weights_play_no_part_in_the_published_choice(build):
    case = build("timm-vit")
    model = case.copy()
    for block in model.blocks:
        for p in (block.mlp.fc1.bias, block.mlp.fc2.weight, block.mlp.fc2.bias):
            p.data = torch.randn_like(p)
    expected = cut(case, method="dgmr-paper", hidden_dim=8)[1].plan.edits
    report = cut_(model, case.model, case.sites, Recipe(method="dgmr-paper", hidden_dim=8), None, quiet=True)
    assert [edit.keep for edit in report.plan.edits] == [edit.keep for edit in expected]


def test_a_gated_unit_is_scored_by_its_gate_and_value_rows_together():
    """Units 0 and 1 have equal value rows and gates at right angles; value rows alone would take unit 2 second."""
    value = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    gate = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    assert select("dgmr-paper", view_of(value, num_keep=2)) == [0, 2]
    assert select("dgmr-paper", view_of(value, gate=gate, num_keep=2)) == [0, 1]
    gate[1] = torch.tensor([0.0, 9.0])
    assert select("magnitude", view_of(value, gate=gate, num_keep=2)) == [1, 0]
    assert select("magnitude", view_of(value, num_keep=2)) == [0, 1]


def test_magnitude_equals_a_naive_loop(kind):
    _, report = cut(kind, method="magnitude", hidden_dim=11)
    for edit in report.plan.edits:
        weights = read_weights(kind.model, edit.site)
        scores = []
        for unit in range(edit.site.d_hidden):
            square = sum(float(v) ** 2 for v in weights.value_HD[unit])
            if weights.gate_HD is not None:
                square += sum(float(v) ** 2 for v in weights.gate_HD[unit])
            scores.append(-((square * sum(float(v) ** 2 for v in weights.output_DH[:, unit])) ** 0.5))
        assert list(edit.keep) == sorted(range(len(scores)), key=scores.__getitem__)[:11]


def test_magnitude_breaks_ties_by_index():
    assert select("magnitude", view_of(torch.ones(6, 2), num_keep=4)) == [0, 1, 2, 3]


def measured_view(*, bias, scale=None):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(200, 14, generator=generator, dtype=torch.float64) + 1
    hidden = hidden @ torch.randn(14, 14, generator=generator, dtype=torch.float64)
    target = hidden.relu() @ torch.randn(14, 5, generator=generator, dtype=torch.float64)
    view = view_of(torch.randn(14, 5), output=torch.randn(5, 14, generator=generator), num_keep=6)
    weights = MlpWeights(
        value_HD=view.weights.value_HD,
        output_DH=view.weights.output_DH,
        output_bias_D=torch.zeros(5) if bias else None,
    )
    stats = stored_stats(hidden, target)
    return hidden, target, SiteView(**{**view.__dict__, "weights": weights, "stats": stats, "scale_D": scale})


@pytest.mark.parametrize("bias", [True, False])
def test_dgmr_on_activations_picks_what_lapack_picks_from_the_scaled_activations(bias):
    hidden, _, view = measured_view(bias=bias)
    columns = (hidden - hidden.mean(0) if bias else hidden) * view.weights.output_DH.norm(dim=0)
    assert select("dgmr", view, select_on="activations") == qr_order(columns.T, 6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [None, torch.tensor([1.0, 0.1, 3.0, 0.0, -2.0])])
def test_dgmr_on_outputs_picks_what_lowers_the_error_of_a_full_refit_the_most(bias, scale):
    hidden, target, view = measured_view(bias=bias, scale=scale)
    if scale is not None:
        target = target * scale
    if bias:
        hidden, target = hidden - hidden.mean(0), target - target.mean(0)
    picks = []
    while len(picks) < 6:
        errors = {}
        for unit in set(range(14)) - set(picks):
            columns = hidden[:, [*picks, unit]]
            errors[unit] = float((target - columns @ torch.linalg.lstsq(columns, target).solution).square().sum())
        picks.append(min(errors, key=errors.__getitem__))
    assert select("dgmr", view, select_on="outputs") == picks == select("dgmr", view)


def test_dgmr_without_images_falls_back_to_weights_and_says_so(build):
    case = build("timm-vit")
    _, report = cut(case, method="dgmr", hidden_dim=8, images=False)
    assert any("no images given: units were selected on weights alone" in note for note in report.notes)
    paper = cut(case, method="dgmr-paper", hidden_dim=8, images=False)[1]
    assert [edit.keep for edit in report.plan.edits] == [edit.keep for edit in paper.plan.edits]
    assert paper.notes == ()
    seen = cut(case, method="dgmr", hidden_dim=8)[1]
    assert seen.notes == ()
    assert [edit.keep for edit in seen.plan.edits] != [edit.keep for edit in paper.plan.edits]


@pytest.mark.parametrize("select_on", ["features", "outputs", "activations"])
def test_what_needs_images_is_refused_without(build, select_on):
    case = build("timm-vit")
    student = case.copy()
    recipe = Recipe(method="dgmr", hidden_dim=8, options={"select_on": select_on})
    with pytest.raises(RecipeError, match=rf"select_on='{select_on}' needs images; pass data"):
        cut_(student, case.model, case.sites, recipe, None, quiet=True)
    assert read_weights(student, case.sites[0]).num_units == 96
