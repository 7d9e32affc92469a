"""VBP and GRAIL, which fold what they drop into what stays, against slow versions of themselves."""

from __future__ import annotations

import pytest
import torch

from vitrim.calibrate import LiveModelView
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import BudgetError, ModelError, RecipeError
from vitrim.methods import Grail, Vbp, make_method
from vitrim.ops import folding
from vitrim.surgery import apply_, read_weights, submodule


def view_of(case, width, *, repaired=False):
    return LiveModelView(
        case.copy(),
        case.sites,
        dict.fromkeys((site.path for site in case.sites), width),
        case.batches,
        seed=0,
        repaired=repaired,
    )


def hidden_tokens(model, site, batches):
    """The activations in front of an MLP's output projection, all tokens stacked, in float64."""
    seen = []
    handle = submodule(model, site.output).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat([tokens.flatten(0, -2) for tokens in seen]).double()


def cut(case, method, **values):
    student = case.copy()
    return student, cut_(student, case.model, case.sites, Recipe(method=method, **values), case.batches, quiet=True)


def test_vbp_keeps_the_units_of_most_variance_in_the_whole_model(build):
    case = build("timm-vit")
    edits = list(Vbp().propose(view_of(case, 24)))
    tokens = [hidden_tokens(case.model, site, case.batches) for site in case.sites]
    scores = {(n, unit): float(t[:, unit].var()) for n, t in enumerate(tokens) for unit in range(t.shape[1])}
    best = set(sorted(scores, key=lambda key: -scores[key])[:48])
    assert {(n, unit) for n, edit in enumerate(edits) for unit in edit.keep} == best
    assert edits[0].width != edits[1].width


def test_vbp_puts_the_means_of_dropped_units_into_the_bias(kind):
    edit = next(Vbp().propose(view_of(kind, 8)))
    before = read_weights(kind.model, edit.site)
    mean = hidden_tokens(kind.model, edit.site, kind.batches).mean(0)
    gone = sorted(set(range(edit.site.d_hidden)) - set(edit.keep))
    if before.output_bias_D is None:
        assert not edit.tensors
        return
    torch.testing.assert_close(edit.tensors[f"{edit.site.output}.weight"], before.output_DH[:, list(edit.keep)])
    expected = before.output_bias_D.double() + before.output_DH.double()[:, gone] @ mean[gone]
    torch.testing.assert_close(edit.tensors[f"{edit.site.output}.bias"].double(), expected, atol=1e-5, rtol=1e-5)


def test_vbp_of_units_that_never_vary_loses_nothing(build, run):
    case = build("timm-vit")
    model = case.copy()
    with torch.no_grad():
        for block in model.blocks:  # half of the units see nothing but their bias
            block.mlp.fc1.weight[::2] = 0
    student, teacher = (case.copy() for _ in range(2))
    for other in (student, teacher):
        other.load_state_dict(model.state_dict())
    report = cut_(student, teacher, case.sites, Recipe(method="vbp", hidden_dim=48), case.batches, quiet=True)
    assert all(set(edit.keep) == set(range(1, 96, 2)) for edit in report.plan.edits)
    torch.testing.assert_close(run(student, case.batches[0]), run(model, case.batches[0]), atol=1e-5, rtol=1e-5)


def test_vbp_says_where_no_bias_can_take_up_the_means(build):
    assert any("has no output bias" in note for note in cut(build("llama-order"), "vbp", hidden_dim=8)[1].notes)


@pytest.mark.parametrize("method", ["vbp", "grail"])
def test_our_repair_takes_the_place_of_a_methods_own_fold(build, method):
    case = build("timm-vit")
    assert all(not edit.tensors for edit in make_method(method).propose(view_of(case, 24, repaired=True)))
    _, report = cut(case, method, hidden_dim=24, repair={"refit": False})
    assert set(report.errors) == {site.path for site in case.sites}
    for edit in report.plan.edits:
        weights = read_weights(case.model, edit.site)
        torch.testing.assert_close(edit.tensors[f"{edit.site.value}.weight"], weights.value_HD[list(edit.keep)])


def test_reconstruction_is_ridge_regression_of_the_old_units_on_the_new():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 12, generator=generator).double() @ torch.randn(12, 12, generator=generator).double()
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 1, 1])
    for merge in (folding.averaging(labels, 4), folding.choosing(torch.tensor([7, 2, 5]), 12)):
        merged = hidden @ merge.T
        penalty = 1e-2 * merged.square().sum(0).mean()
        rows = torch.cat([merged, penalty.sqrt() * torch.eye(len(merge)).double()])
        wanted = torch.cat([hidden, torch.zeros(len(merge), 12).double()])
        slow = torch.linalg.lstsq(rows, wanted).solution.T
        torch.testing.assert_close(folding.reconstruction(hidden.T @ hidden, merge, ridge=1e-2), slow)


def test_reconstruction_of_uncorrelated_units_is_plain_folding():
    labels = torch.tensor([0, 1, 1, 2, 0, 1])
    back = folding.reconstruction(torch.eye(6).double(), folding.averaging(labels, 3), ridge=1e-12)
    torch.testing.assert_close(back, torch.nn.functional.one_hot(labels, 3).double())


def test_reconstruction_refuses_what_can_not_be_solved():
    with pytest.raises(ModelError, match=r"^blocks\.0: the sums of its 2 merged units are not positive definite"):
        folding.reconstruction(-torch.eye(4), torch.eye(4)[:2], ridge=1e-3, where="blocks.0")


def test_grail_of_units_in_pairs_loses_nothing(build, run):
    """Each unit twice: folding finds the pairs, and the projection counts each of them double."""
    case = build("timm-vit")
    twice, student = case.copy(), case.copy()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in twice.blocks:
            for part in (block.mlp.fc1.weight, block.mlp.fc1.bias):
                part[order[48:]] = part[order[:48]]
    student.load_state_dict(twice.state_dict())
    cut_(
        student,
        twice,
        case.sites,
        Recipe(method="grail", hidden_dim=48, options={"ridge": 1e-9}),
        case.batches,
        quiet=True,
    )
    assert read_weights(student, case.sites[0]).num_units == 48
    torch.testing.assert_close(run(student, case.batches[0]), run(twice, case.batches[0]), atol=1e-4, rtol=1e-4)


def test_grail_merges_the_inputs_of_a_group_to_their_mean(kind):
    edit = next(Grail().propose(view_of(kind, 10)))
    before, after = read_weights(kind.model, edit.site), kind.copy()
    labels = folding.kmeans(before.input_rows.double(), 10, torch.Generator().manual_seed(0))
    apply_(after, [edit])
    found = read_weights(after, edit.site)
    for group, unit in enumerate(edit.keep):
        assert int(labels[unit]) == group  # the member that is nearest to the mean stands for the group
        members = labels == group
        torch.testing.assert_close(found.value_HD[group], before.value_HD[members].mean(0))
        if before.gate_HD is not None:
            torch.testing.assert_close(found.gate_HD[group], before.gate_HD[members].mean(0))
        if before.value_bias_H is not None:
            torch.testing.assert_close(found.value_bias_H[group], before.value_bias_H[members].mean(0))
    hidden = hidden_tokens(kind.model, edit.site, kind.batches)
    back = folding.reconstruction(hidden.T @ hidden, folding.averaging(labels, 10), ridge=1e-3)
    torch.testing.assert_close(found.output_DH, (before.output_DH.double() @ back).float(), atol=1e-4, rtol=1e-3)


def test_grail_reconstructs_behind_any_selection(build):
    case = build("timm-vit")
    errors = {}
    for name, options in {"magnitude": {}, "grail": {"units": "magnitude"}}.items():
        student, report = cut(case, name, hidden_dim=24, options=options, repair=False)
        with torch.inference_mode():
            errors[name] = float((student(case.batches[0]) - case.model(case.batches[0])).square().sum())
        if name == "magnitude":
            kept = report.plan.edits[0].keep
    assert report.plan.edits[0].keep == kept
    assert errors["grail"] < 0.7 * errors["magnitude"]
    assert cut(case, "grail", hidden_dim=24, options={"units": "dgmr"})[1].plan.edits[0].width == 24
    with pytest.raises(RecipeError, match=r"options.units of method grail: no way to choose units is called 'taylor'"):
        Grail(units="taylor")


def test_kmeans_puts_equal_rows_together_and_leaves_no_group_empty():
    rows = torch.eye(5).repeat(4, 1)
    labels = folding.kmeans(rows, 5, torch.Generator().manual_seed(0))
    assert all(len(set(labels[start::5].tolist())) == 1 for start in range(5)) and len(set(labels.tolist())) == 5
    for num_groups in (1, 7, 20):  # more groups than there are different rows
        assert set(folding.kmeans(rows, num_groups, torch.Generator().manual_seed(0)).tolist()) == set(
            range(num_groups)
        )
    with pytest.raises(BudgetError, match="21 groups of 20 rows"):
        folding.kmeans(rows, 21, torch.Generator().manual_seed(0))


def test_kmeans_leaves_no_row_nearer_to_another_mean():
    rows = torch.randn(80, 3, generator=torch.Generator().manual_seed(0)).double()
    labels = folding.kmeans(rows, 6, torch.Generator().manual_seed(1))
    means = torch.stack([rows[labels == group].mean(0) for group in range(6)])
    assert torch.equal(torch.cdist(rows, means).argmin(1), labels)
