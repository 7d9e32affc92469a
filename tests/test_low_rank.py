"""Layers as two of low rank: what Greenformers and LORTSAR promise, and the slips that published code makes."""

import copy
import itertools
import json
from importlib.resources import files

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch import nn

import vitrim
from vitrim.calibrate import LiveModelView, sums
from vitrim.compression.cut import cut_
from vitrim.compression.saved_cut import resume_cut_, save_cut
from vitrim.config.recipe import Recipe
from vitrim.errors import BudgetError, RecipeError, SiteNotFoundError
from vitrim.layers.low_rank import LowRankConv, LowRankLinear
from vitrim.methods import make_method
from vitrim.models.layers import find_layers
from vitrim.models.sites import find_mlps
from vitrim.ops import low_rank as ops
from vitrim.surgery import Plan, ToLowRank, apply_, reshape_, transform

DIGITS = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
CONVS = {
    "1x1": lambda: nn.Conv2d(12, 20, 1),
    "k x 1": lambda: nn.Conv2d(6, 10, (5, 1), stride=(2, 1), padding=(2, 0)),
    "dilated, reflected": lambda: nn.Conv2d(6, 10, 3, dilation=2, padding=2, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(6, 10, 3, padding="same", bias=False),
    "grouped": lambda: nn.Conv2d(12, 18, 3, groups=3, padding=1),
    "grouped 1x1": lambda: nn.Conv2d(12, 18, 1, groups=6),
    "1d": lambda: nn.Conv1d(8, 12, 4, stride=4),
    "3d": lambda: nn.Conv3d(4, 8, (1, 2, 2), groups=2),
}


def holding(layer: nn.Module) -> nn.Module:
    """A model that is one layer."""
    return nn.ModuleDict({"layer": layer}).eval()


def factored(layer: nn.Module, rank: int) -> nn.Module:
    """What stands in a layer's place after an edit without tensors; any rank, also one that does not pay."""
    model = holding(copy.deepcopy(layer))
    apply_(model, [ToLowRank(layer=find_layers(model)[0], rank=rank)])
    return model["layer"]


def full_rank(layer: nn.Module) -> int:
    site = find_layers(holding(layer))[0]
    return min(site.num_rows, site.num_cols)


def proposed(model: nn.Module, batches=None, *, sites=(), keep=0.5, name="low-rank", seed=0, **options):
    """The edits for a model, each carried out before the next is asked for, and the notes."""
    widths = {site.path: round(keep * site.d_hidden) for site in sites}
    view, edits = LiveModelView(model, sites, widths, batches, seed=seed), []
    for edit in make_method(name, options).propose(view):
        if not next(model.parameters()).is_meta:
            apply_(model, [edit])
        edits.append(edit)
    return edits, view.notes


def cut(case, *, images=True, **values):
    """A student whose layers are factored, to half unless options say how much stays, and the report."""
    budget = {} if {"rank", "energy"} & values.get("options", {}).keys() else {"keep_ratio": 0.5}
    student, recipe = case.copy(), Recipe.parse({"method": "low-rank", **budget, **values})
    return student, cut_(student, case.model, case.sites, recipe, case.batches if images else None, quiet=True)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        return BertModel(BertConfig())


# --- Greenformers, arXiv 2108.10808 -----------------------------------------------------------------------------------

LAST_SIX = ("encoder.layer.[6-9].*", "encoder.layer.1[01].*", "pooler.*")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 256, "only": "*"}, 66_818_304),
        ({"rank": 0.4, "only": "*"}, 58_052_352),
        ({"rank": 0.2, "only": LAST_SIX}, 74_965_248),
    ],
)
def test_greenformers_counts_of_bert_base(options, expected):
    model = bert()
    assert count(model) == 109_482_240
    edits, _ = proposed(model, **options)
    reshape_(model, edits)
    assert count(model) == expected


@pytest.mark.parametrize("rank", [12, 13, 24, 400, 1.0])
def test_greenformers_leaves_the_object_alone_where_factors_do_not_pay(rank):
    model = holding(nn.Linear(24, 24))
    layer = model["layer"]
    edits, notes = proposed(model, rank=rank, only="*")  # break-even: 12
    assert edits == [] and model["layer"] is layer
    assert any(
        "1 of 1 layers stay whole, since factors of their rank would save nothing: layer." in note for note in notes
    )
    edits, notes = proposed(model, rank=11, only="*")
    assert [edit.rank for edit in edits] == [11] and isinstance(model["layer"], LowRankLinear)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 11), (11, 7), (9, 9)])
def test_greenformers_full_rank_svd_is_exact(shape, bias):
    layer = nn.Linear(*shape, bias=bias)
    inputs = torch.randn(5, shape[0])
    torch.testing.assert_close(factored(layer, min(shape))(inputs), layer(inputs), atol=1e-5, rtol=1e-5)


def test_greenformers_a_higher_rank_has_a_lower_error_and_lortsar_it_is_eckart_and_young_s():
    layer = nn.Linear(30, 20)
    sigma = torch.linalg.svdvals(layer.weight.double())
    errors = [(factored(layer, rank).weight - layer.weight).norm().item() for rank in range(1, 21)]
    assert all(before > after for before, after in itertools.pairwise(errors))
    expected = [sigma[rank:].square().sum().sqrt().item() for rank in range(1, 21)]
    assert errors == pytest.approx(expected, abs=1e-5)


def test_greenformers_leaves_the_source_bit_equal_and_shares_nothing_with_it_not_even_the_bias(build):
    case = build("timm-vit")
    source = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    _, report = cut(case, options={"whiten": False})
    state = case.model.state_dict()
    made = dict(
        transform(
            {name: state[name] for edit in report.plan.edits for name in edit.affected_tensors()}, report.plan.edits
        )
    )
    assert all(torch.equal(source[name], tensor) for name, tensor in state.items())
    places = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert not any(tensor.untyped_storage().data_ptr() in places for tensor in made.values())
    assert sum(name.endswith("up.bias") for name in made) == len(report.plan.edits) == 8


def test_greenformers_touches_nothing_but_what_the_patterns_name(build):
    case = build("timm-vit")
    student, report = cut(case, options={"only": ["blocks.1.attn.*", "head"], "rank": 2})
    assert [edit.layer.path for edit in report.plan.edits] == ["blocks.1.attn.qkv", "blocks.1.attn.proj", "head"]
    old, new = case.model.state_dict(), student.state_dict()
    kept = [name for name in old if not name.startswith(("blocks.1.attn.", "head."))]
    assert all(torch.equal(old[name], new[name]) for name in kept)
    assert set(new) - set(kept) == {
        f"{path}.{name}"
        for path in ("blocks.1.attn.qkv", "blocks.1.attn.proj", "head")
        for name in ("down.weight", "up.weight", "up.bias")
    }


@pytest.mark.parametrize("options", [{}, {"whiten": False}, {"solver": "semi-nmf"}, {"only": "*", "energy": 0.8}])
def test_greenformers_state_dict_round_trips_by_the_plan_alone(build, run, options):
    case = build("timm-vit-scaled")
    student, report = cut(case, options=options)
    document = json.loads(json.dumps(report.plan.to_json()))
    again = Plan.from_json(document)
    assert again == report.plan.without_tensors()
    empty = case.copy().to("meta")
    reshape_(empty, again.edits)
    empty.load_state_dict(student.state_dict(), assign=True)
    assert torch.equal(run(empty, case.batches[0]), run(student, case.batches[0]))


@pytest.mark.parametrize("solver", ["svd", "semi-nmf", "random", "nmf"])
def test_greenformers_one_seed_gives_the_same_factors(solver):
    source = holding(nn.Linear(20, 30))
    with torch.no_grad():
        source["layer"].weight.abs_()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    models = [copy.deepcopy(source) for _ in range(3)]
    for model, seed in zip(models, (4, 4, 5), strict=True):
        proposed(model, solver=solver, rank=3, only="*", seed=seed)
    first, same, other = (model["layer"].weight for model in models)
    assert torch.equal(first, same)
    assert torch.equal(first, other) == (solver in ("svd", "semi-nmf"))  # these draw nothing at all
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3, 2)])
def test_greenformers_takes_any_leading_dims_also_where_the_input_is_not_contiguous(lead):
    layer = nn.Linear(12, 8)
    small, inputs = factored(layer, 8), torch.randn(12, *reversed(lead)).permute(*reversed(range(len(lead) + 1)))
    assert inputs.shape == (*lead, 12) and (len(lead) < 1 or not inputs.is_contiguous())
    torch.testing.assert_close(small(inputs), layer(inputs), atol=1e-5, rtol=1e-5)


def test_greenformers_unknown_solver_is_refused_for_linear_layers_too():
    with pytest.raises(
        RecipeError, match=r"options\.solver of method low-rank: .*'svd', 'nmf', 'semi-nmf' or 'random'"
    ):
        Recipe.parse({"method": "low-rank", "options": {"solver": "swd"}})


def test_greenformers_nmf_refuses_negative_weights_before_anything_is_cut(build):
    case = build("timm-vit")
    student = case.copy()
    with pytest.raises(
        RecipeError, match=r"nmf needs weights of 0 or more, not blocks\.0\.attn\.qkv, .* 5 more; use semi-nmf"
    ):
        proposed(student, sites=case.sites, solver="nmf")
    assert student.state_dict().keys() == case.model.state_dict().keys()


@pytest.mark.parametrize(
    ("rank", "expected"), [(1, 1), (1.0, None), (0.5, 10), (0.4, 8), (0.001, 1), (19, 19), (20, None)]
)
def test_greenformers_rank_one_is_one_and_rank_1_0_is_the_full_share(rank, expected):
    model = holding(nn.Linear(30, 60))  # break-even 20
    edits, _ = proposed(model, rank=rank, only="*")
    assert [edit.rank for edit in edits] == ([] if expected is None else [expected])
    text = Recipe.parse({"method": "low-rank", "options": {"rank": rank}}).dump()
    again = make_method("low-rank", Recipe.parse(yaml.safe_load(text)).steps[0].options)
    assert again.rank == rank and type(again.rank) is type(rank)


def test_greenformers_break_even_of_a_convolution_counts_its_kernel_and_its_groups():
    """The toolkit compares channels alone, and so leaves a 3x3 convolution of 16 channels whole from rank 8 on."""
    model = holding(nn.Conv2d(16, 16, 3))
    before = count(model)
    edits, _ = proposed(model, rank=13, only="*")
    assert [edit.rank for edit in edits] == [13] and find_layers(holding(nn.Conv2d(16, 16, 3)))[0].break_even == 14
    assert count(model) == before - 16 * 144 + 13 * (16 + 144)
    grouped = holding(nn.Conv2d(16, 16, 3, groups=4))
    site = find_layers(grouped)[0]
    assert (site.num_rows, site.num_cols, site.break_even) == (4, 36, 3)
    before = count(grouped)
    assert [edit.rank for edit in proposed(grouped, rank=2, only="*")[0]] == [2]
    assert count(grouped) == before - 16 * 36 + 4 * 2 * (4 + 36)
    assert proposed(holding(nn.Conv2d(16, 16, 3, groups=16)), rank=1, only="*")[0] == []


@pytest.mark.parametrize("which", CONVS)
def test_greenformers_full_rank_convolution_is_exact_grouped_ones_too(which):
    torch.manual_seed(0)
    layer = CONVS[which]()
    inputs = torch.randn(2, layer.in_channels, *[9] * len(layer.kernel_size))
    small = factored(layer, full_rank(layer))
    assert isinstance(small, LowRankConv)
    torch.testing.assert_close(small(inputs), layer(inputs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(small.weight, layer.weight, atol=1e-5, rtol=1e-5)
    lower = factored(layer, 1)(inputs)
    assert lower.shape == layer(inputs).shape and (lower - layer(inputs)).abs().max() > 1e-2


def test_greenformers_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head, self.free = nn.Embedding(40, 16), nn.Linear(16, 40), nn.Linear(16, 16)
            self.head.weight = self.words.weight
            self.twice = nn.ModuleList([nn.Linear(16, 16)] * 2)

    model = Tied()
    edits, notes = proposed(model, rank=2, only="*")
    assert [edit.layer.path for edit in edits] == ["free"]
    assert model.head.weight is model.words.weight and model.twice[0] is model.twice[1]
    assert notes[-1] == "kept whole: head, twice.0; its parameters are also another layer's."


@pytest.mark.parametrize("name", ["encoder", "torchvision"])
def test_greenformers_packed_attention_is_left_whole_and_said_so(build, run, name):
    case = build(name)
    student, report = cut(case)
    assert [note for note in report.notes if "out_proj" in note and "nn.MultiheadAttention reads its weights" in note]
    assert not [edit for edit in report.plan.edits if "out_proj" in edit.layer.path]
    assert count(student) < count(case.model) and run(student, case.batches[0]).isfinite().all()


# --- LORTSAR, arXiv 2407.14655 ----------------------------------------------------------------------------------------


def test_lortsar_1x1_convolution_equals_the_linear_layer_on_permuted_input():
    conv = nn.Conv2d(10, 14, 1)
    linear = nn.Linear(10, 14)
    linear.load_state_dict({"weight": conv.weight.detach()[:, :, 0, 0], "bias": conv.bias.detach()})
    images = torch.randn(2, 10, 5, 4)
    ours, theirs = factored(conv, 4)(images), factored(linear, 4)(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 12), *CONVS.values()])
def test_lortsar_bias_is_applied_once(make):
    layer = make()
    small = factored(layer, 1)
    assert small.down.bias is None and (small.up.bias is None) == (layer.bias is None) and small.bias is small.up.bias
    with torch.no_grad():
        small.up.weight.zero_()
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    shape = (3, channels) if isinstance(layer, nn.Linear) else (3, channels, *[9] * len(layer.kernel_size))
    outputs = small(torch.randn(shape))
    outputs = outputs if isinstance(layer, nn.Linear) else outputs.movedim(1, -1)
    expected = torch.zeros(len(outputs[0].flatten(0, -2)[0])) if layer.bias is None else layer.bias
    assert torch.equal(outputs, expected.expand_as(outputs))


class Skeleton(nn.Module):
    """As LORTSAR's model: nearly all 1x1 convolutions, one of them grouped, a k x 1, batch norms, learned attention."""

    def __init__(self):
        super().__init__()
        self.position, self.learned = nn.Parameter(torch.randn(1, 3, 1, 5)), nn.Parameter(torch.randn(5, 5))
        self.q, self.kv, self.proj = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 48, 1), nn.Conv2d(48, 48, 1, groups=6)
        self.norm, self.temporal, self.head = nn.BatchNorm2d(48), nn.Conv2d(48, 32, (5, 1)), nn.Linear(32, 12)

    def forward(self, x):
        x = self.norm(self.proj(self.kv(self.q(x + self.position)))) @ self.learned
        return self.head(self.temporal(x).relu().mean((2, 3)))


def skeleton(seed):
    torch.manual_seed(seed)
    return Skeleton().eval()


def test_lortsar_shrinks_convolutions_and_head_and_nothing_else():
    model = skeleton(0)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = count(model)
    edits, _ = proposed(model, name="lortsar", rank=0.5, only="*")
    assert [edit.layer.path for edit in edits] == ["q", "kv", "proj", "temporal", "head"]
    assert all(edit.tensors == {} for edit in edits)
    saved = sum(e.layer.groups * (e.layer.num_rows * e.layer.num_cols) for e in edits)
    saved -= sum(e.layer.groups * e.rank * (e.layer.num_rows + e.layer.num_cols) for e in edits)
    assert before - count(model) == saved > 0
    untouched = [name for name in old if name.startswith(("position", "learned", "norm."))]
    assert len(untouched) == 7 and all(torch.equal(old[name], model.state_dict()[name]) for name in untouched)
    assert model(torch.randn(2, 3, 9, 5)).shape == (2, 12)


def test_lortsar_streams_of_joints_and_bones_are_compressed_each_by_itself():
    joints, bones = skeleton(0), skeleton(1)
    alone = copy.deepcopy(joints)
    proposed(alone, name="lortsar", rank=2, only="*")
    for model in (bones, joints):
        proposed(model, name="lortsar", rank=2, only="*")
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), joints.parameters(), strict=True))
    assert not torch.equal(joints.kv.weight, bones.kv.weight)


def test_lortsar_chooses_the_rank_by_energy_too_over_all_groups_together():
    model = holding(nn.Conv2d(24, 24, 3, groups=2))
    rows = model["layer"].weight.detach().reshape(2, 12, -1).double()
    sigma = torch.linalg.svdvals(rows).square().sum(0)
    shares = {rank: float(sigma[:rank].sum() / sigma.sum()) for rank in range(1, 13)}
    for share in (0.05, 0.4, 0.7):
        expected = next(rank for rank, held in shares.items() if held >= share)
        edits, _ = proposed(copy.deepcopy(model), name="lortsar", energy=share, only="*")
        assert [edit.rank for edit in edits] == [expected]
    assert proposed(copy.deepcopy(model), name="lortsar", energy=1.0, only="*")[0] == []


# --- ours: fitted to what the layers put out --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_factors_on_the_output_basis_are_the_best_of_their_rank_on_the_inputs_seen(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    mix = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, shape[1], generator=generator, dtype=torch.float64) @ mix
    outputs = inputs @ weight.T
    sigma = torch.linalg.svdvals(outputs)
    for seen in ({"inputs_NN": inputs.T @ inputs}, {"outputs_MM": outputs.T @ outputs}):
        basis, energy = ops.output_basis(weight, **seen)
        torch.testing.assert_close(energy, sigma[:9].square(), rtol=1e-4, atol=1e-4 * float(sigma[0] ** 2))
        for rank in (1, 4, 9):
            up, down = ops.project(weight, basis[:, :rank])
            error = (outputs - inputs @ (up @ down).T).norm()
            assert error == pytest.approx(float(sigma[rank:].square().sum().sqrt()), rel=1e-3, abs=1e-3)
            plain = torch.Tensor.__matmul__(*ops.truncate(weight, rank))
            assert error < (outputs - inputs @ plain.T).norm() or rank == 9
            torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_directions_that_no_input_reached_are_ranked_by_the_weight():
    weight = torch.diag(torch.tensor([1.0, 3.0, 2.0, 4.0]))
    basis, _ = ops.output_basis(weight, inputs_NN=torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0])))
    assert basis.abs().argmax(0).tolist() == [0, 3, 1, 2]
    assert ops.output_basis(torch.zeros(3, 3), inputs_NN=torch.zeros(3, 3))[0].isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda bias: nn.Linear(12, 20, bias=bias),
        lambda bias: nn.Linear(20, 12, bias=bias),
        lambda bias: nn.Conv2d(4, 20, 3, padding=1, bias=bias),
        lambda bias: nn.Conv2d(8, 12, 3, groups=2, bias=bias),
    ],
)
def test_a_whitened_layer_loses_what_the_best_approximation_of_its_outputs_loses(make, bias):
    torch.manual_seed(0)
    model = nn.Sequential(make(bias)).eval()
    layer = copy.deepcopy(model[0])
    linear = isinstance(layer, nn.Linear)
    shape = (40, layer.in_features) if linear else (6, layer.in_channels, 6, 6)
    batches = [torch.randn(shape) * torch.rand(shape[1:]) + 0.5 for _ in range(3)]
    (edit,), _ = proposed(model, batches, rank=2, only="*")

    def outputs(module):
        found = torch.cat([module(batch).detach().double() for batch in batches])
        found = found if linear else found.movedim(1, -1)
        return found.reshape(-1, edit.layer.groups, edit.layer.num_rows).transpose(0, 1)

    expected = outputs(layer)
    free = expected - expected.mean(1, keepdim=True) if bias else expected
    best = torch.linalg.svdvals(free)[:, 2:].square().sum().sqrt()
    assert (outputs(model) - expected).norm() == pytest.approx(float(best), rel=1e-3)
    assert {name.rpartition("0.")[2] for name in edit.tensors} == {"down.weight", "up.weight"} | (
        {"up.bias"} if bias else set()
    )


def test_whitening_is_the_default_with_images_and_beats_the_weights_alone_on_the_model(build, run):
    case = build("timm-vit-scaled")
    students = [cut(case, options=options)[0] for options in ({}, {"whiten": True}, {"whiten": False})]
    outputs = [run(student, case.batches[0]) for student in students]
    assert torch.equal(outputs[0], outputs[1])
    errors = [(output - run(case.model, case.batches[0])).norm() for output in outputs]
    assert errors[0] < 0.8 * errors[2]


def test_without_images_it_says_that_weights_alone_were_fitted_and_refuses_to_whiten(build):
    case = build("timm-vit")
    _, report = cut(case, images=False)
    assert report.notes == (
        "no images given: factors were fitted to weights alone; pass data to fit what layers put out.",
    )
    assert cut(case, images=False, options={"whiten": False})[1].notes == ()
    with pytest.raises(RecipeError, match=r"options\.whiten needs images; pass data"):
        cut(case, images=False, options={"whiten": True})


def test_sums_that_do_not_fit_into_memory_together_are_taken_in_several_passes(build, monkeypatch):
    case = build("timm-vit")
    passes = []
    observe = LiveModelView.observe
    monkeypatch.setattr(
        LiveModelView, "observe", lambda self, paths, see: passes.append(paths) or observe(self, paths, see)
    )
    _, once = cut(case)
    assert [len(paths) for paths in passes] == [8]
    monkeypatch.setattr(sums, "MAX_SUM_BYTES", 8 * 32 * 33 * 3)
    _, often = cut(case)
    assert [len(paths) for paths in passes] == [8, 3, 3, 2]
    assert [edit.rank for edit in once.plan.edits] == [edit.rank for edit in often.plan.edits]


def test_a_layer_whose_weight_is_read_and_that_is_never_called_is_factored_and_said_so():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight, self.layer.bias)

    model, inputs = Reads(), torch.randn(4, 8)
    edits, notes = proposed(model, [inputs], rank=2, only="*")
    assert edits[0].tensors == {} and notes == [
        "layer: never called, since other code reads the weights; factored by weight alone, and smaller but no faster."
    ]
    torch.testing.assert_close(model(inputs), model.layer(inputs))


# --- the other solvers ------------------------------------------------------------------------------------------------


def test_semi_nmf_has_no_negative_value_in_down_and_never_gets_worse_with_more_rounds():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    errors = []
    for rounds in (1, 2, 5, 20, 100):
        up, down = ops.semi_nmf(weight, 6, num_iter=rounds)
        assert down.min() >= 0 and up.min() < 0
        errors.append(float((weight - up @ down).norm()))
    assert all(before >= after - 1e-9 for before, after in itertools.pairwise(errors)) and errors[-1] < errors[0]
    best = float(torch.linalg.svdvals(weight)[6:].square().sum().sqrt())
    assert best < errors[-1] < 1.15 * best


def test_nmf_recovers_a_product_of_factors_without_negative_values():
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(20, 3, generator=generator) @ torch.rand(3, 30, generator=generator)
    up, down = ops.nmf(weight, 3, num_iter=500, generator=generator)
    assert min(up.min(), down.min()) >= 0
    assert (weight - up @ down).norm() < 0.01 * weight.norm()


def test_random_factors_start_as_torch_starts_linear_layers():
    up, down = ops.random_factors(torch.zeros(300, 200), 50, generator=torch.Generator().manual_seed(0))
    for factor, (height, width) in ((up, (300, 50)), (down, (50, 200))):
        theirs = nn.Linear(width, height).weight.detach()
        assert factor.shape == theirs.shape and factor.abs().max() <= width**-0.5
        assert float(factor.std()) == pytest.approx(float(theirs.std()), rel=0.05)


def test_a_zero_weight_has_factors_too():
    up, down = ops.truncate(torch.zeros(6, 5), 2)
    assert torch.equal(up @ down, torch.zeros(6, 5).double()) and up.isfinite().all() and down.isfinite().all()
    assert ops.rank_for_energy(torch.zeros(1, 5), 0.9) == 1


# --- layers, edit and options -----------------------------------------------------------------------------------------


def test_layers_are_found_by_what_they_do(build):
    from transformers.pytorch_utils import Conv1D

    class Doubles(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Quiet(nn.Linear):
        pass

    class Padded(nn.Conv2d):
        pass

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 6),
            "doubles": Doubles(4, 6),
            "quiet": Quiet(4, 6, bias=False),
            "hf": Conv1D(6, 4),
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "padded": Padded(4, 6, 3),
            "turned": nn.ConvTranspose2d(4, 6, 3),
            "words": nn.Embedding(4, 6),
            "done": LowRankLinear(4, 6, 2),
            "deep": nn.Sequential(nn.GELU(), nn.Linear(6, 4)),
        }
    )
    found = {site.path: site for site in find_layers(model)}
    assert list(found) == ["plain", "quiet", "hf", "conv", "deep.1"]
    assert (found["hf"].kind, found["hf"].num_in, found["hf"].num_out) == ("transposed_linear", 4, 6)
    assert (found["conv"].groups, found["conv"].kernel, found["quiet"].has_bias) == (2, (3, 3), False)
    assert (
        TypeAdapter(type(found["conv"])).validate_python(json.loads(json.dumps(found["conv"].__dict__)))
        == found["conv"]
    )


def test_a_transformers_conv1d_becomes_a_linear_pair():
    from transformers.pytorch_utils import Conv1D

    layer, inputs = Conv1D(9, 7), torch.randn(2, 3, 7)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    torch.testing.assert_close(factored(layer, 7)(inputs), layer(inputs), atol=1e-5, rtol=1e-5)
    model = nn.Sequential(Conv1D(9, 7)).eval()
    nn.init.normal_(model[0].weight)
    expected = model(inputs)
    proposed(model, [inputs], rank=2, only="*")
    assert model[0].weight.shape == (9, 7) and (model(inputs) - expected).norm() < expected.norm()


def test_what_stands_in_the_place_of_a_layer_looks_like_it():
    linear, conv = nn.Linear(8, 12).requires_grad_(False), CONVS["grouped"]().train()
    small = factored(linear, 3)
    assert (small.in_features, small.out_features, small.weight.shape) == (8, 12, linear.weight.shape)
    assert torch.equal(small.bias, linear.bias) and not any(p.requires_grad for p in small.parameters())
    small = factored(conv, 2)
    for name in ("in_channels", "out_channels", "groups", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(small, name) == getattr(conv, name)
    assert all(p.requires_grad for p in small.parameters()) and repr(small).startswith(
        "LowRankConv(\n  12, 18, groups=3"
    )
    assert "rank=3" in repr(factored(linear, 3))


def test_every_model_is_factored_and_comes_back_by_the_plan(case, run):
    student, report = cut(case)
    output = run(student, case.batches[0])
    assert count(student) < count(case.model) and output.isfinite().all()
    again = case.copy()
    reshape_(again, Plan.from_json(report.plan.to_json()).edits)
    again.load_state_dict(student.state_dict())
    assert torch.equal(run(again, case.batches[0]), output)


def test_edits_that_do_not_fit_are_refused_and_leave_the_model_whole(build):
    case = build("timm-vit")
    layers = {layer.path: layer for layer in find_layers(case.model)}
    qkv, proj = layers["blocks.0.attn.qkv"], layers["blocks.0.attn.proj"]
    for rank in (0, 33):
        with pytest.raises(
            BudgetError, match=rf"blocks\.0\.attn\.qkv: asked for rank {rank} of a layer of rank 32; use 1\.\.32"
        ):
            apply_(case.copy(), [ToLowRank(layer=qkv, rank=rank)])
    student = case.copy()
    with pytest.raises(SiteNotFoundError, match=r"blocks\.1\.norm1: no layer with a weight of 96x32"):
        apply_(
            student, [ToLowRank(layer=proj, rank=2), ToLowRank(layer=qkv.renamed(lambda _: "blocks.1.norm1"), rank=2)]
        )
    assert student.state_dict().keys() == case.model.state_dict().keys()
    apply_(student, [ToLowRank(layer=proj, rank=2)])
    with pytest.raises(SiteNotFoundError, match=r"blocks\.0\.attn\.proj: no layer"):
        apply_(student, [ToLowRank(layer=proj, rank=2)])
    with pytest.raises(SiteNotFoundError, match="no layer with a weight of 6x4"):
        apply_(
            nn.Linear(4, 6), [ToLowRank(layer=find_layers(holding(nn.Linear(4, 6)))[0].renamed(lambda _: ""), rank=1)]
        )


def test_an_edit_says_what_it_does_where_from_any_root(build):
    layer = find_layers(holding(nn.Conv2d(12, 18, 3, groups=3)))[0]
    edit = ToLowRank(layer=layer, rank=2, tensors={"layer.up.weight": torch.zeros(1)})
    assert edit.describe() == "rank 2 of 6 in each of 3 groups, 39% of its values" and edit.where == "layer"
    below = edit.below("visual")
    assert below.where == "visual.layer" and list(below.tensors) == ["visual.layer.up.weight"]
    assert below.within("visual") == edit and edit.shape_only() == ToLowRank(layer=layer, rank=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 4, "energy": 0.5}, "give one of rank and energy"),
        ({"rank": 0}, "rank must be 1 or more"),
        ({"rank": 2.0}, "rank 2 is a share of the break-even rank, in 0..1; a rank is a whole number"),
        ({"rank": 0.0}, "a rank is a whole number"),
        ({"rank": True}, "rank"),
        ({"energy": 1.5}, "less than or equal to 1"),
        ({"solver": "nmf", "whiten": True}, "whiten goes with solver svd, not nmf"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.parse({"method": "low-rank", "options": options})


def test_patterns_and_budgets_that_lead_nowhere_are_refused(build):
    case = build("timm-vit")
    with pytest.raises(
        RecipeError, match=r"only: '\*\.atn\.\*' matches no .* layer; there are patch_embed\.proj, .* 7 more"
    ):
        cut(case, options={"only": ["head", "*.atn.*"]})
    with pytest.raises(RecipeError, match=r"no linear layer inside a block; name layers with options\.only"):
        proposed(holding(nn.Linear(8, 8)), rank=2)
    with pytest.raises(BudgetError, match=r"no MLP is left .* give options\.rank or energy"):
        proposed(holding(nn.Linear(8, 8)), only="*")


# --- end to end -------------------------------------------------------------------------------------------------------

FEW = {"calibrate": {"num_images": 96, "batch_size": 32}}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("low-rank") / "out"
    recipe = vitrim.Recipe.parse({**FEW, "recover": {"steps": 2, "batch_size": 16, "lr": 1e-5}})
    return vitrim.compress(DIGITS, data="digits", method="low-rank", keep_ratio=0.5, recipe=recipe, out=out, quiet=True)


def test_compress_factors_the_digits_model_and_it_loads_with_the_same_outputs(result):
    metrics = result.metrics
    assert metrics.after.parameters == count(result.model) < 0.53 * metrics.before.parameters
    assert metrics.after.macs < 0.6 * metrics.before.macs
    assert metrics.reload_difference <= 1e-5 and not metrics.stock
    assert metrics.after_recovery.fidelity["relative_error"] < 0.2
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vitrim.load(result.out)(images), result.model(images))
    assert any("has no config for low-rank layers; the result loads with vitrim.load" in note for note in metrics.notes)
    assert {row["edit"] for row in metrics.edits} == {"low rank"}


def test_the_report_lists_the_layers(result):
    page = (result.out / "report.html").read_text()
    assert "blocks.0.attn.qkv" in page and "rank 36 of 96" in page and "low-rank" in page


def test_what_was_factored_is_no_mlp_to_cut_any_more(result):
    with pytest.raises(SiteNotFoundError, match="no MLP found"):
        find_mlps(result.model)
    measured = vitrim.evaluate(str(result.out), DIGITS, "digits", limit=60, latency=False)
    assert measured.student.cost.parameters == count(result.model)


def test_it_follows_a_cut_of_hidden_units_and_is_taken_up_after_a_stop(build, run, tmp_path):
    case = build("timm-vit")
    values = {"method": "dgmr", "hidden_dim": 24, "repair": {"refit_steps": 2}}
    second = {"method": "low-rank", "keep_ratio": 0.5, "options": {"only": "*.fc?"}}
    recipe = Recipe.parse({"steps": [values, second]})
    student = case.copy()
    report = cut_(student, case.model, case.sites, recipe, case.batches, quiet=True)
    assert [edit.KIND for edit in report.plan.edits] == ["keep_units"] * 2 + ["low_rank"] * 4
    assert report.plan.edits[2].layer.num_out == 24
    replayed = case.copy()
    apply_(replayed, report.plan.edits)
    assert torch.equal(run(replayed, case.batches[0]), run(student, case.batches[0]))
    save_cut(student, report, recipe, tmp_path)
    again = case.copy()
    found = resume_cut_(again, recipe, tmp_path)
    assert found is not None and found.plan.sha256 == report.plan.sha256
    assert torch.equal(run(again, case.batches[0]), run(student, case.batches[0]))
    with pytest.raises(RecipeError, match=r"dgmr \(keep units.*\) can't follow low-rank \(low rank\)"):
        Recipe.parse({"steps": [{"method": "low-rank"}, {"method": "dgmr"}]})


def test_a_repair_that_was_asked_for_and_has_nothing_to_do_is_noted(build):
    _, report = cut(build("timm-vit"), repair=True)
    assert report.errors == {} and "repair: low-rank cut no hidden units, so nothing was repaired." in report.notes
