"""FiPS (arXiv 2411.09816): one dense basis for the matrices of several MLPs, sparse coefficients for each."""

import copy
import json
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

import vitrim
from tests.support.models import Residual, Tower
from vitrim.calibrate import LiveModelView
from vitrim.compression.cut import cut_
from vitrim.compression.saved_cut import resume_cut_, save_cut
from vitrim.config.recipe import Recipe
from vitrim.cost.count import model_size
from vitrim.errors import BudgetError, CheckpointError, RecipeError, SiteNotFoundError
from vitrim.layers.fips import SharedBasisLinear, pack, unpack
from vitrim.methods import Fips, fips
from vitrim.models.sites import find_mlps
from vitrim.ops.fips import cubic_sparsity, exchange, largest, leading_basis, num_coefficients, rank_for_budget
from vitrim.surgery import Plan, ToFips, apply_, mlp_output, read_weights, reshape_

ROLES = ("input", "input", "output")


def layers_of(sites):
    """Paths with roles, by what a layer is called."""
    named = [(path, role) for s in sites for path, role in zip((s.value, s.gate, s.output), ROLES, strict=True)]
    return {path: role for path, role in named if path is not None}


def share(model, sites, rank, *, mask=lambda coeff: torch.ones_like(coeff, dtype=torch.bool)):
    """The edit for some MLPs, from the joined SVD."""
    roles = layers_of(sites)
    turned = [model.get_submodule(path).weight.detach() for path in roles]
    turned = [weight.T if role == "input" else weight for weight, role in zip(turned, roles.values(), strict=True)]
    basis, coeff = leading_basis(torch.cat(turned, dim=1), rank)
    columns = coeff.split([weight.shape[1] for weight in turned], dim=1)
    return ToFips.by(
        basis, {path: (role, c * mask(c), mask(c)) for (path, role), c in zip(roles.items(), columns, strict=True)}
    )


def half(coeff):
    return largest(coeff.abs(), coeff.numel() // 2)


def cut(case, *, images=True, model=None, **values):
    student = case.copy() if model is None else model
    options = {"steps": 12, "every": 3, "batch_size": 64, **values.pop("options", {})}
    recipe = Recipe.parse({"method": "fips", "keep_ratio": 0.5, "options": options, **values})
    report = cut_(student, case.model, find_mlps(student), recipe, case.batches if images else None, quiet=True)
    return student, report


def shared_layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, SharedBasisLinear)}


# The numbers


def test_fips_rank_is_the_papers_for_deit_b():
    columns = 4 * 768 * 2 * 4  # hidden widths of fc1 and fc2 in four blocks
    assert rank_for_budget(768, columns, keep=0.5, sparsity=0.75) == 1365
    assert rank_for_budget(768, columns, keep=0.25, sparsity=0.75) == 682


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.tuples(st.integers(4, 60), st.integers(4, 400)),
    keep=st.floats(0.1, 0.95),
    sparsity=st.sampled_from([0.0, 0.5, 0.75, 0.9]),
    masks=st.booleans(),
)
def test_fips_rank_is_the_largest_that_the_budget_pays_for(sizes, keep, sparsity, masks):
    rows, columns = sizes

    def stored(rank):
        return rank * (rows + columns * (1 - sparsity) + (columns / 32 if masks else 0))

    rank = rank_for_budget(rows, columns, keep=keep, sparsity=sparsity, masks=masks)
    assert stored(rank) <= keep * rows * columns * (1 + 1e-9) and stored(rank + 1) > keep * rows * columns * (1 - 1e-9)
    if rank:
        low = min(rank, rows)
        count = num_coefficients(rows, columns, low, keep=keep, masks=masks)
        total = low * rows + count + (low * columns / 32 if masks else 0)
        assert (1 - sparsity) * low * columns - 1 <= count <= low * columns and total <= keep * rows * columns


@pytest.mark.parametrize("rank", [3, 8, 13, 21])
def test_fips_start_is_the_svd_and_padding_leaves_the_product_alone(rank):
    joined = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    basis, coeff = leading_basis(joined, rank)
    u, s, v = torch.linalg.svd(joined.double(), full_matrices=False)
    low = min(rank, 8)
    torch.testing.assert_close((basis @ coeff).double(), u[:, :low] * s[:low] @ v[:low], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(coeff[:low].norm(dim=1).double(), s[:low], atol=1e-5, rtol=1e-5)  # all of sigma is there
    for row in range(8, rank):
        assert (basis[:, row] == 0).all() and torch.equal(coeff[row], coeff[row % 8] / 32)


def test_masks_have_the_exact_count_with_ties_and_the_cubic_schedule_ends_at_its_goal():
    assert largest(torch.ones(5, 7), 11).sum() == 11 and largest(torch.ones(4), 0).sum() == 0
    scores = torch.tensor([[3.0, 1.0], [2.0, 5.0]])
    assert largest(scores, 2).tolist() == [[True, False], [False, True]]
    sparsities = [cubic_sparsity(step / 10, 0.75) for step in range(11)]
    assert sparsities == sorted(sparsities) and sparsities[0] == pytest.approx(0.05) and sparsities[-1] == 0.75
    assert sparsities[5] == pytest.approx(0.75 - 0.7 * 0.5**3)
    assert cubic_sparsity(0.0, 0.01) == 0.01


def test_fips_rigl_drops_the_smallest_and_grows_by_gradient_from_zero():
    mask = torch.tensor([True, True, True, True, False, False, False])
    coeff = torch.tensor([0.1, -3.0, 2.0, -0.2, 0.0, 0.0, 0.0])
    gradient = torch.tensor([9.0, 50.0, 0.0, 0.0, -8.0, 1.0, 2.0])
    moved, stays = exchange(mask, coeff, gradient, 2)
    assert stays.tolist() == [False, True, True, False, False, False, False]
    assert moved.tolist() == [True, True, True, False, True, False, False]  # one that was dropped comes back as zero
    assert (coeff * stays)[0] == 0 and moved.sum() == mask.sum()
    assert exchange(mask, coeff, gradient, 100)[0].sum() == 4  # no more than there is room for


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 20), seed=st.integers(0, 99))
def test_places_are_one_bit_each_and_survive_packing(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5
    places = pack(mask)
    assert places.dtype == torch.uint8 and len(places) == -(-rows * columns // 8)
    assert torch.equal(unpack(places, (rows, columns)), mask)


# The layer and the edit


@pytest.mark.parametrize("extra", [0, 5])
def test_fips_without_zeros_at_the_full_rank_every_matrix_is_what_it_was(kind, extra, run):
    student = kind.copy()
    apply_(student, [share(student, kind.sites, kind.sites[0].d_model + extra)])
    for path in layers_of(kind.sites):
        before, after = kind.model.get_submodule(path), student.get_submodule(path)
        torch.testing.assert_close(after.weight, before.weight, atol=1e-5, rtol=1e-5)
        assert (after.in_features, after.out_features) == (before.in_features, before.out_features)
        assert after.bias is None or torch.equal(after.bias, before.bias)
    torch.testing.assert_close(run(student, kind.batches[0]), run(kind.model, kind.batches[0]), atol=1e-4, rtol=1e-4)


def test_fips_shares_between_mlps_of_every_library(case, run):
    student, widths = case.copy(), {site.d_model for site in case.sites}
    apply_(student, [share(student, [s for s in case.sites if s.d_model == width], width) for width in widths])
    torch.testing.assert_close(run(student, case.batches[0]), run(case.model, case.batches[0]), atol=1e-3, rtol=1e-3)


class Square(nn.Module):
    """An MLP whose layers are as wide as the model: their shapes don't tell which is which."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, tokens):
        return self.fc2(self.fc1(tokens).relu())


def test_fips_square_layers_are_turned_by_their_role():
    torch.manual_seed(0)
    model = Tower(*(Residual(Square(), 16) for _ in range(2))).eval()
    images, sites = torch.randn(4, 3, 32, 32), find_mlps(model)
    student, bench = copy.deepcopy(model), LiveModelView(model, sites, {s.path: 8 for s in sites}, [images], seed=0)
    (edit,) = Fips(steps=0).propose(bench)
    assert edit.roles == ("input", "output") * 2
    apply_(student, [edit])
    parts = [w for s in sites for w in (read_weights(model, s).value_HD.T, read_weights(model, s).output_DH)]
    sizes = torch.cat([(part.square().sum(0).mean().sqrt() / fips.LENGTH).expand(part.shape[1]) for part in parts])
    kept = torch.cat([layer.coeff_RC for layer in shared_layers(student).values()], 1)
    full = leading_basis(torch.cat(parts, 1) / sizes, 16)[1][: edit.rank]
    torch.testing.assert_close(kept, full * largest(full.abs(), sum(edit.counts)) * sizes, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("role", ["input", "output"])
def test_fips_factors_in_turn_equal_the_materialised_matrix_and_the_cheaper_of_them_runs(role):
    torch.manual_seed(0)
    sizes = (12, 40) if role == "input" else (40, 12)
    layer = SharedBasisLinear(*sizes, 10, role=role, num_values=100)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.places.copy_(pack(largest(torch.rand(10, 40), 100)))
        for num_tokens in (2, 200):
            tokens = torch.randn(num_tokens, sizes[0])
            with FlopCounterMode(display=False) as counter:
                output = layer(tokens)
            torch.testing.assert_close(output, tokens @ layer.weight.T + layer.bias, atol=1e-4, rtol=1e-4)
            in_turn, whole = num_tokens * 10 * (12 + 40), 12 * 10 * 40 + num_tokens * 12 * 40
            assert counter.get_total_flops() == 2 * min(in_turn, whole)
    assert in_turn > whole  # 200 tokens: the matrix is multiplied out once


def test_fips_basis_stands_once_and_its_gradient_is_the_sum_over_users(build):
    case = build("timm-vit")
    student, images = case.copy(), case.batches[0]
    apply_(student, [share(student, case.sites, 20, mask=half)])
    layers = shared_layers(student)
    owner = layers[case.sites[0].value]
    assert [name for name in student.state_dict() if name.endswith("basis")] == [f"{case.sites[0].value}.basis"]
    assert {layer.basis_DR.data_ptr() for layer in layers.values()} == {owner.basis.data_ptr()}
    assert sum(p is owner.basis for p in student.parameters()) == 1
    student(images).square().sum().backward()
    apart, total = copy.deepcopy(student), torch.zeros_like(owner.basis)
    for path, layer in shared_layers(apart).items():  # each with a basis of its own
        layer.others, layer.basis = (), nn.Parameter(layers[path].basis_DR.detach().clone())
    apart(images).square().sum().backward()
    for layer in shared_layers(apart).values():
        assert layer.basis.grad.abs().sum() > 0
        total += layer.basis.grad
    torch.testing.assert_close(owner.basis.grad, total, atol=1e-4, rtol=1e-4)


def test_fips_basis_moves_copies_freezes_and_takes_other_values_as_one(build, run):
    case = build("timm-vit")
    student = case.copy()
    apply_(student, [share(student, case.sites, 20, mask=half)])
    expected = run(student, case.batches[0])
    twin = copy.deepcopy(student)
    student.get_submodule(case.sites[0].value).basis.data.zero_()
    assert torch.equal(run(twin, case.batches[0]), expected)
    assert not torch.equal(run(student, case.batches[0]), expected)
    swapped = {f"{case.sites[0].value}.basis": twin.get_submodule(case.sites[0].value).basis}
    assert torch.equal(torch.func.functional_call(student.eval(), swapped, (case.batches[0],)).detach(), expected)
    student.load_state_dict(twin.state_dict())
    assert torch.equal(run(student, case.batches[0]), expected)
    twin.double()
    last = twin.get_submodule(case.sites[-1].output)
    assert last.basis_DR.dtype == torch.float64 and last.places.dtype == torch.uint8
    assert all(layer.basis_DR.is_meta for layer in shared_layers(twin.to("meta")).values())
    student.requires_grad_(False)
    assert not any(layer.basis_DR.requires_grad for layer in shared_layers(student).values())
    frozen = case.copy().requires_grad_(False)
    apply_(frozen, [share(frozen, case.sites, 20)])
    assert not any(p.requires_grad for p in frozen.parameters())


def test_fips_training_the_whole_model_keeps_every_mask(build):
    """The paper's global stage: what is not stored can't come back, whatever the optimizer does."""
    case = build("timm-vit")
    student, report = cut(case, images=False)
    before = {path: layer.weight.detach().clone() for path, layer in shared_layers(student).items()}
    masks = {path: layer.coeff_RC != 0 for path, layer in shared_layers(student).items()}
    hashed = report.plan.sha256
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for batch in case.batches:
        optimizer.zero_grad()
        student(batch).square().sum().backward()
        optimizer.step()
        for path, layer in shared_layers(student).items():
            assert not (layer.coeff_RC != 0)[~masks[path]].any()
            assert not torch.equal(layer.weight, before[path])
    assert report.plan.sha256 == hashed  # the plan's tensors are its own


def test_fips_basis_in_shards_is_refused(build):
    case, student = build("timm-vit"), build("timm-vit").copy()
    apply_(student, [share(student, case.sites, 20)])
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for block in student.blocks:
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
        with pytest.raises(RecipeError, match=r"recover\.fsdp: blocks that share tensors"):
            student(case.batches[0])
    finally:
        distributed.destroy_process_group()


def test_an_edit_that_does_not_fit_is_refused_and_changes_nothing(build):
    case = build("timm-vit")
    model = case.copy()
    edit = share(model, case.sites, 8)
    values = {**edit.__dict__}
    for change, error, message in (
        ({"paths": edit.paths[:1] * len(edit.paths)}, BudgetError, "needs different layers"),
        ({"counts": edit.counts[1:]}, BudgetError, "needs different layers"),
        ({"rank": 0}, BudgetError, "rank 0 with"),
        ({"counts": (10**6, *edit.counts[1:])}, BudgetError, "coefficients for"),
        ({"columns": (97, *edit.columns[1:])}, SiteNotFoundError, "takes a linear layer of 32 to 97"),
        ({"roles": edit.roles[::-1]}, SiteNotFoundError, "takes a linear layer of 96 to 32"),
        ({"paths": ("blocks.0.norm1", *edit.paths[1:])}, SiteNotFoundError, "blocks.0.norm1: is LayerNorm"),
        ({"paths": ("nowhere", *edit.paths[1:])}, SiteNotFoundError, "nowhere: no such module"),
        ({"tensors": {}}, CheckpointError, "the plan does not hold it"),
    ):
        with pytest.raises(error, match=message):
            apply_(model, [ToFips(**{**values, **change})])
    assert not shared_layers(model)
    apply_(model, [edit])
    with pytest.raises(SiteNotFoundError, match="is SharedBasisLinear"):
        apply_(model, [edit])


# The method


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("keep_ratio", [0.25, 0.75])
def test_fips_stores_no_more_than_its_budget_masks_counted(kind, images, keep_ratio):
    """By the bytes of the model itself, for hidden widths that are not 4 d."""
    student, report = cut(kind, images=images, keep_ratio=keep_ratio, round_to=1)
    dense = sum(kind.model.get_submodule(path).weight.nbytes for path in layers_of(kind.sites))
    after = student.state_dict()
    names = [name for name in after if name.rpartition(".")[2] in ("basis", "values", "places")]
    stored = sum(after[name].nbytes for name in names)
    assert stored <= keep_ratio * dense + len(names)  # a byte of padding for each mask
    assert stored >= 0.75 * keep_ratio * dense
    (edit,) = report.plan.edits
    assert 4 * edit.num_stored == pytest.approx(stored, abs=4)
    assert model_size(student)["num_bytes"] == pytest.approx(model_size(kind.model)["num_bytes"] - dense + stored)
    assert f"{stored / dense:.0%} of their values, masks counted" in edit.describe()


@pytest.mark.parametrize("schedule", ["gmp", "rigl"])
def test_fips_masks_hold_after_every_step_and_end_at_the_sparsity(build, schedule, monkeypatch):
    case, moved, seen = build("timm-vit"), fips._moved, []

    def spy(mask, coeff, count, step, options):
        assert not coeff.detach()[~mask].any()
        found = moved(mask, coeff, count, step, options)
        assert not found[1][~found[0]].any()
        seen.append((mask, *found))
        return found

    monkeypatch.setattr(fips, "_moved", spy)
    monkeypatch.setattr(fips, "_better", lambda view, mlps, pairs, plain, trained: trained)
    student, report = cut(case, options={"schedule": schedule, "steps": 20})
    (edit,) = report.plan.edits
    goal = 0.25 * edit.rank * sum(edit.columns)
    assert abs(sum(edit.counts) - goal) <= 1
    assert len({*edit.counts}) > 1  # the largest of all matrices together, not of each
    sizes = [int(after.sum()) for _, after, _ in seen]
    if schedule == "gmp":
        assert sizes[0] == round(0.95 * seen[0][0].numel()) and sizes == sorted(sizes, reverse=True)
        assert all(not after[~before].any() for before, after, _ in seen)
    else:
        assert {*sizes} == {sum(edit.counts)}
        changed = [not torch.equal(before, after) for before, after, _ in seen]
        assert any(changed) and not any(changed[int(0.75 * 19) + 1 :])
        assert any(bool((after & ~stays).any()) for _, after, stays in seen)
    assert all(torch.equal(left, found) for (_, left, _), (found, _, _) in pairwise(seen))
    final = torch.cat([layer.coeff_RC != 0 for layer in shared_layers(student).values()], 1)
    assert not final[~seen[-1][1]].any()


def test_fips_loss_is_zero_for_the_mlps_as_they_were(kind):
    bench = LiveModelView(kind.copy(), kind.sites, {}, kind.batches, seed=0)
    mlps, joined, sizes = fips._joined(bench, kind.sites)
    pairs = fips._observe(bench, mlps, Fips())
    basis, coeff = leading_basis(joined, kind.sites[0].d_model)
    factors = fips._Factors(basis_DR=basis, coeff_RC=coeff, mask_RC=coeff != 0, size_C=sizes)
    worse = replace(factors, basis_DR=0.9 * basis)
    with torch.no_grad():
        assert float(fips._loss(bench, mlps, [train for train, _ in pairs], factors)) <= 1e-9 * len(pairs)
        assert float(fips._loss(bench, mlps, [train for train, _ in pairs], worse)) > 1e-4 * len(pairs)


def test_fips_learns_on_what_the_original_model_has_there_before_any_edit(build, monkeypatch):
    """Two groups: the second one's inputs must not come through the first one's new layers."""
    case, observe, states = build("timm-vit"), LiveModelView.observe, []

    def spy(self, paths, see):
        states.append(
            all(torch.equal(p, q) for p, q in zip(self.model.parameters(), case.model.parameters(), strict=True))
        )
        observe(self, paths, see)

    monkeypatch.setattr(LiveModelView, "observe", spy)
    _, report = cut(case, options={"group": 1})
    assert len(report.plan.edits) == 2 and states == [True, True]


def test_fips_samples_are_pairs_of_one_token_spread_over_all_batches(build):
    case = build("timm-vit")
    bench = LiveModelView(case.copy(), case.sites, {}, case.batches, seed=0)
    mlps, *_ = fips._joined(bench, case.sites)
    pairs = fips._observe(bench, mlps, Fips(num_tokens=64))
    for site, (train, held_out) in zip(case.sites, pairs, strict=True):
        assert len(held_out[0]) == 7 and len(train[0]) == 57
        inputs, outputs = torch.cat([train[0], held_out[0]]), torch.cat([train[1], held_out[1]])
        torch.testing.assert_close(mlp_output(case.model, site, inputs).detach(), outputs, atol=1e-4, rtol=1e-4)
        every = []
        hook = case.model.get_submodule(site.value).register_forward_pre_hook(
            lambda _, args, every=every: every.append(args[0].flatten(0, 1))
        )
        with torch.no_grad():
            [case.model(batch) for batch in case.batches]
        hook.remove()
        owners = [sum(bool((tokens == row).all(1).any()) for row in inputs) for tokens in every]
        assert sum(owners) == 64 and min(owners) > 4


def test_running_an_mlp_with_other_tensors_sends_gradients_to_them_and_leaves_the_model_alone(kind):
    bench, site = LiveModelView(kind.copy().train(), kind.sites, {}, None, seed=0), kind.sites[0]
    tokens = torch.randn(5, site.d_model, generator=torch.Generator().manual_seed(0))
    expected = mlp_output(kind.model, site, tokens)
    torch.testing.assert_close(bench.run(site, tokens, {}), expected)
    weight = (2 * bench.tensor(f"{site.output}.weight")).requires_grad_()
    output = bench.run(site, tokens, {f"{site.output}.weight": weight})
    doubled = copy.deepcopy(kind.model)
    doubled.get_submodule(site.output).weight.data.mul_(2)
    torch.testing.assert_close(output, mlp_output(doubled, site, tokens))
    (gradient,) = torch.autograd.grad(output.square().sum(), [weight])
    assert gradient.abs().sum() > 0 and all(p.grad is None for p in bench.model.parameters())
    assert all(module.training for module in bench.model.modules())
    assert torch.equal(bench.tensor(f"{site.output}.weight"), kind.model.get_submodule(site.output).weight)


def test_fips_training_lowers_the_error_on_tokens_it_has_not_seen(build):
    case = build("timm-vit")

    def error(student):
        generator, total = torch.Generator().manual_seed(9), 0.0
        for batch in torch.randn(3, 4, 3, 32, 32, generator=generator):
            with torch.no_grad():
                total += float((student(batch) - case.model(batch)).square().sum())
        return total

    plain = error(cut(case, images=False)[0])
    for schedule in ("gmp", "rigl"):
        student, report = cut(case, options={"schedule": schedule, "steps": 150, "every": 10, "lr": 3e-3})
        assert report.notes == () and error(student) < 0.7 * plain


def test_fips_training_that_does_not_help_is_left_out_and_said(build, run):
    case = build("timm-vit")
    student, report = cut(case, options={"lr": 10.0})
    plain, plain_report = cut(case, images=False)
    assert torch.equal(run(student, case.batches[0]), run(plain, case.batches[0]))
    assert any("did not help on held-out tokens, so the SVD stays" in note for note in report.notes)
    assert any("no images given: the shared basis is an SVD" in note for note in plain_report.notes)
    assert cut(case, options={"steps": 0})[1].plan.edits[0].counts == plain_report.plan.edits[0].counts


def test_fips_an_mlp_that_needs_its_block_is_not_trained_and_said(build):
    _, report = cut(build("encoder"))
    assert any("not outside its block; it was not trained" in note for note in report.notes)


def test_fips_groups_are_mlps_in_a_row_of_one_width(build):
    case = build("timm-swin")
    widths = [site.d_model for site in case.sites]
    assert len({*widths}) > 1
    _, report = cut(case, images=False)
    assert [edit.d_model for edit in report.plan.edits] == sorted({*widths})
    _, report = cut(case, images=False, options={"group": [1, 1, 1]})
    assert [edit.paths[0] for edit in report.plan.edits] == [site.value for site in case.sites]
    with pytest.raises(RecipeError, match=r"sizes \[1, 1\] add up to 2; there are 3 MLPs"):
        cut(case, images=False, options={"group": [1, 1]})
    with pytest.raises(BudgetError, match="whose model width is another"):
        cut(case, images=False, options={"group": [1, 2]})
    with pytest.raises(BudgetError, match=r"a share of 0\.0\d+ pays for no basis"):
        cut(case, images=False, hidden_dim=1, keep_ratio=None, options={"sparsity": 0.0, "group": 1})


def test_fips_goes_before_and_after_what_it_can():
    Recipe.parse({"steps": [{"method": "dgmr"}, {"method": "fips"}]})
    Recipe.parse({"steps": [{"method": "fips"}, {"method": "low-rank"}]})
    for earlier in ("dgmr", "corp", "relufy"):
        with pytest.raises(RecipeError, match=f"steps: {earlier} .* can't follow fips"):
            Recipe.parse({"steps": [{"method": "fips"}, {"method": earlier}]})
    for later in ("top-k", "moefication"):
        with pytest.raises(RecipeError, match=f"steps: fips .* can't follow {later}"):
            Recipe.parse({"steps": [{"method": later}, {"method": "fips"}]})


def test_fips_after_a_cut_shares_what_is_left_and_says_where_nothing_is(build, run, tmp_path, monkeypatch):
    monkeypatch.setattr(fips, "_better", lambda view, mlps, pairs, plain, trained: trained)
    case = build("timm-vit")
    attention = {"method": "low-rank", "options": {"rank": 4, "only": ["*.attn.*"]}}
    step = {"method": "fips", "keep_ratio": 0.5, "options": {"steps": 4}}
    recipe = Recipe.parse({"steps": [{"method": "magnitude", "hidden_dim": 40}, step, attention]})
    student = case.copy()
    report = cut_(student, case.model, case.sites, recipe, case.batches, quiet=True)
    shared = [edit for edit in report.plan.edits if isinstance(edit, ToFips)]
    assert [edit.columns for edit in shared] == [(40,) * 4]
    assert not torch.equal(student.blocks[1].mlp.fc2.bias, case.model.blocks[1].mlp.fc2.bias)  # biases train, too
    again = case.copy()
    reshape_(again, Plan.from_json(json.loads(json.dumps(report.plan.to_json()))).edits)
    again.load_state_dict(student.state_dict())
    assert torch.equal(run(again, case.batches[0]), run(student, case.batches[0]))
    save_cut(student, report, recipe, tmp_path)
    resumed = case.copy()
    found = resume_cut_(resumed, recipe, tmp_path)
    assert found is not None and found.plan.sha256 == report.plan.sha256
    assert torch.equal(run(resumed, case.batches[0]), run(student, case.batches[0]))
    for first in (step, {"method": "low-rank", "keep_ratio": 0.5}):
        recipe = Recipe.parse({"steps": [first, step]})
        with pytest.raises(SiteNotFoundError, match="fips: no MLP is left to share a basis"):
            cut_(case.copy(), case.model, case.sites, recipe, case.batches, quiet=True)


@pytest.mark.fresh
def test_fips_is_written_loads_in_a_fresh_process_and_can_be_judged(tmp_path):
    model = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
    recipe = Recipe.parse(
        {
            "method": "fips",
            "keep_ratio": 0.5,
            "calibrate": {"num_images": 64},
            "options": {"steps": 5, "num_tokens": 500},
            "recover": {"steps": 3, "lr": 1e-4, "batch_size": 16},
        }
    )
    found = vitrim.compress(model, data="digits", recipe=recipe, out=tmp_path / "out", quiet=True)
    assert found.metrics.reload_difference <= 1e-6 and not found.metrics.stock
    assert "matrices share a basis of rank" in found.metrics.edits[0]["what"]
    assert found.metrics.after.parameters < 0.75 * found.metrics.before.parameters
    images = torch.randn(2, 3, 32, 32)
    loaded = vitrim.load(tmp_path / "out")
    assert torch.equal(loaded(images), found.model(images))
    assert any(name.endswith("basis") for name, _ in loaded.named_parameters())
    judged = vitrim.evaluate(str(tmp_path / "out"), model, data="digits", limit=32, latency=False)
    assert 0 < judged.fidelity["relative_error"] < 1
    with pytest.raises(SiteNotFoundError, match="no MLP found"):
        vitrim.compress(str(tmp_path / "out"), method="magnitude", hidden_dim=8, quiet=True)
