"""CORP (arXiv 2602.05243): ranking, folding of MLP units, of query and key dimensions, and of values."""

import copy
from importlib.resources import files

import pytest
import torch
from torch import nn

import vitrim
from vitrim.calibrate import LiveModelView
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import BudgetError, ModelError, RecipeError
from vitrim.layers.attention import SlimAttention
from vitrim.methods import Corp
from vitrim.models.attention import find_attentions
from vitrim.models.sites import find_mlps
from vitrim.ops.head_dims import fold_logits, fold_values, oas_shrinkage
from vitrim.surgery import KeepHeadDims, Plan, apply_
from vitrim.types import MlpSite


def cut(case, **options):
    values = {key: options.pop(key) for key in ("keep_ratio", "hidden_dim") if key in options}
    student = case.copy()
    recipe = Recipe.parse({"method": "corp", "options": options, **values})
    return student, cut_(student, case.model, case.sites, recipe, case.batches, quiet=True)


def error(run, model, case, batches=None):
    pairs = [(run(model, batch), run(case.model, batch)) for batch in (batches or case.batches)]
    return sum(float((a - b).square().sum()) for a, b in pairs)


def test_corp_keeping_everything_is_the_model(kind, run):
    student, _ = cut(kind, keep_ratio=1.0)
    torch.testing.assert_close(run(student, kind.batches[0]), run(kind.model, kind.batches[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "hf-clip"])
def test_corp_keeping_every_head_dimension_is_the_model(name, attention_case, run):
    case = attention_case(name)
    student, report = cut(case, parts="attention", keep_dims=1.0, values=True)
    assert not report.plan.edits and not report.notes
    assert torch.equal(run(student, case.batches[0]), run(case.model, case.batches[0]))


@pytest.fixture
def attention_case(build):
    """Models with plain attention: timm's fused one, and two of transformers'."""

    def make(name):
        if name == "timm-vit":
            return build(name)
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        size |= {"image_size": 32, "patch_size": 8}
        if name == "hf-vit":
            model = transformers.ViTModel(transformers.ViTConfig(**size), add_pooling_layer=False)
        else:
            model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size))
        model.eval()
        shape = build("timm-vit")
        batches = [torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        return type(shape)(**{**shape.__dict__, "model": model, "sites": find_mlps(model), "batches": batches})

    return make


def test_corp_folding_beats_dropping_and_mean_only(build, run):
    case = build("timm-vit")
    folded, dropped, mean_only = (
        error(run, cut(case, hidden_dim=24, **options)[0], case)
        for options in ({}, {"compensate": False}, {"ridge": 1e12})
    )
    assert folded < mean_only and folded < dropped


def test_corp_attention_folding_beats_dropping(build, run):
    case = build("timm-vit")
    for values in (False, True):
        folded, dropped = (
            error(run, cut(case, parts="attention", keep_dims=0.5, values=values, compensate=compensate)[0], case)
            for compensate in (True, False)
        )
        assert folded < dropped


class Tower(nn.Module):
    """Two residual MLPs in float64; by their biases every ReLU is always on, so hidden units are affine in 8 inputs."""

    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 8)) for _ in range(2))
        self.double()
        for layer in self.layers:
            nn.init.constant_(layer[0].bias, bias)

    def forward(self, tokens):
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return tokens


def tower(bias, **options):
    """A tower cut to 10 of 20 units, the original, its batches and the edits."""
    model = Tower(bias).eval()
    batches = [torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(seed)).double() for seed in range(3)]
    sites = tuple(
        MlpSite(path=f"layers.{n}", kind="plain", d_model=8, d_hidden=20, value=f"layers.{n}.0", output=f"layers.{n}.2")
        for n in range(2)
    )
    view = LiveModelView(copy.deepcopy(model), sites, {site.path: 10 for site in sites}, batches, seed=0)
    edits = []
    for edit in Corp(**options).propose(view):
        apply_(view.model, [edit])
        edits.append(edit)
    return view.model, model, batches, edits


def hidden_of(model, edit, batches):
    """All tokens' activations in front of an output projection, as one matrix."""
    seen = []
    hook = model.get_submodule(edit.site.output).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return torch.cat(seen)


def test_corp_dropped_units_that_are_affine_in_kept_ones_cost_nothing():
    student, model, batches, _ = tower(40.0, ridge=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(student(batches[0]), model(batches[0]), atol=1e-5, rtol=1e-5)
    dropped = tower(40.0, compensate=False)[0]
    with torch.no_grad():
        assert (dropped(batches[0]) - model(batches[0])).abs().max() > 1


def test_corp_ranks_by_active_energy_and_a_huge_ridge_compensates_the_mean_alone_layer_by_layer():
    """The slow way, on the model as it is with the layers before already cut."""
    student, model, batches, edits = tower(-0.5, ridge=1e12)
    now = copy.deepcopy(model)
    for edit in edits:
        hidden = hidden_of(now, edit, batches)
        energy = hidden.square().mean(0)
        active = (hidden.abs() > 0.01 * energy.sqrt()).double().mean(0)
        assert list(edit.keep) == sorted(range(20), key=lambda unit: -float(energy[unit] * active[unit]))[:10]
        output, lost = now.get_submodule(edit.site.output), sorted(set(range(20)) - set(edit.keep))
        bias = output.bias + output.weight[:, lost] @ hidden.mean(0)[lost]
        torch.testing.assert_close(edit.tensors[f"{edit.site.output}.weight"], output.weight.detach()[:, edit.keep])
        torch.testing.assert_close(edit.tensors[f"{edit.site.output}.bias"], bias.detach())
        apply_(now, [edit])
    assert torch.equal(now(batches[0]), student(batches[0]))


def test_corp_calibration_error_of_a_layer_is_no_more_than_dropped_or_mean_only():
    for bias in (-0.5, 0.3):
        errors = {}
        for name, options in (("folded", {}), ("mean only", {"ridge": 1e12}), ("dropped", {"compensate": False})):
            _, model, batches, (edit, _) = tower(bias, **options)
            hidden, output = hidden_of(model, edit, batches), model.get_submodule(edit.site.output)
            made = hidden[:, edit.keep] @ edit.tensors[f"{edit.site.output}.weight"].T
            made = made + edit.tensors[f"{edit.site.output}.bias"]
            errors[name] = float((made - output(hidden)).detach().square().mean())
        assert errors["folded"] < errors["mean only"] < errors["dropped"]


def test_corp_streamed_sums_equal_those_of_one_batch_and_a_ridge_does_not_depend_on_the_count():
    """The published code's ridge is absolute while its Gram matrices grow with the number of tokens."""
    _, model, batches, edits = tower(0.0, ridge=0.1)
    site = edits[0].site
    view = LiveModelView(model, (site,), {site.path: 10}, batches, seed=0)
    whole = hidden_of(model, edits[0], batches)
    stats = view.stats(site)
    torch.testing.assert_close(stats.hidden_HH, whole.T @ whole)
    torch.testing.assert_close(stats.hidden_H, whole.sum(0))
    for others in ([torch.cat(batches)], batches * 5):
        view = LiveModelView(model, (site,), {site.path: 10}, others, seed=0)
        (again,) = Corp(ridge=0.1).propose(view)
        assert again.keep == edits[0].keep
        for name, tensor in edits[0].tensors.items():
            torch.testing.assert_close(again.tensors[name], tensor)


def test_corp_takes_no_gradients(build):
    case = build("timm-vit")
    student, report = cut(case, parts="both", keep_ratio=0.5, values=True)
    assert all(p.grad is None for model in (student, case.model) for p in model.parameters())
    assert not any(tensor.requires_grad for edit in report.plan.edits for tensor in edit.tensors.values())


def spread(size, seed):
    basis = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return basis @ basis.T


def test_corp_logits_are_those_of_the_best_m():
    """q' k' = q_S (I + M) k_S, where M solves G_Q M G_K + lambda * M = C; the antisymmetric part of M is not lost."""
    gram_q, gram_k = spread(8, 0), spread(8, 1)
    keep, dropped, ridge = torch.tensor([6, 1, 3, 0, 7]), torch.tensor([2, 4, 5]), 0.3
    left, right = fold_logits(gram_q, gram_k, keep, ridge=ridge)
    product = left.T @ right
    m = product - torch.eye(5)
    q_ss, k_ss = gram_q[keep][:, keep], gram_k[keep][:, keep]
    wanted = gram_q[keep][:, dropped] @ gram_k[dropped][:, keep]
    penalty = ridge * torch.outer(q_ss.diagonal(), k_ss.diagonal())
    torch.testing.assert_close(q_ss @ m @ k_ss + penalty * m, wanted, atol=1e-8, rtol=1e-8)
    kronecker = torch.kron(q_ss, k_ss) + penalty.flatten().diag()  # the slow way
    torch.testing.assert_close(m, torch.linalg.solve(kronecker, wanted.flatten()).view(5, 5), atol=1e-8, rtol=1e-8)
    assert (m - m.T).abs().max() > 1e-3


def test_corp_dependent_dimensions_give_the_logits_back():
    generator = torch.Generator().manual_seed(0)
    basis_q, basis_k = (torch.randn(200, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    mix_q, mix_k = (torch.randn(4, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    q, k = basis_q @ mix_q, basis_k @ mix_k  # 7 dimensions of rank 4
    keep = torch.arange(4)
    left, right = fold_logits(q.T @ q / 200, k.T @ k / 200, keep, ridge=1e-14)
    torch.testing.assert_close((q[:, keep] @ left.T) @ (k[:, keep] @ right.T).T, q @ k.T, atol=1e-5, rtol=1e-5)


def test_corp_values_that_depend_on_kept_ones_fold_exactly_constants_included():
    generator = torch.Generator().manual_seed(1)
    kept = torch.randn(300, 3, dtype=torch.float64, generator=generator)
    values = torch.cat([kept, kept @ torch.randn(3, 2, dtype=torch.float64, generator=generator) + 5], dim=1)
    b, c, dropped = fold_values(values.sum(0), values.T @ values, 300, torch.arange(3), ridge=1e-14)
    assert dropped.tolist() == [3, 4]
    torch.testing.assert_close(kept @ b.T + c, values[:, 3:], atol=1e-6, rtol=1e-6)


def test_shrinkage_is_large_for_few_samples_and_small_for_many():
    covariance = spread(30, 0)
    assert 0 < oas_shrinkage(covariance, 100_000) < 0.01 < oas_shrinkage(covariance, 20) <= 1
    scale = torch.logspace(-2, 2, 30, dtype=torch.float64)
    assert oas_shrinkage(scale * covariance * scale[:, None], 20) == pytest.approx(oas_shrinkage(covariance, 20))
    assert oas_shrinkage(torch.eye(5), 100) == 1.0


def test_corp_ridge_of_logits_is_relative():
    gram_q, gram_k, keep = spread(8, 0), spread(8, 1), torch.tensor([0, 2, 3, 5])
    small, large = (fold_logits(scale * gram_q, scale * gram_k, keep, ridge=0.3) for scale in (1, 1000))
    torch.testing.assert_close(small[0].T @ small[1], large[0].T @ large[1])


def test_corp_ranks_head_dimensions_by_the_energy_of_q_times_k(build):
    case = build("timm-vit")
    _, report = cut(case, parts="attention", keep_dims=0.25, compensate=False)
    edit, seen = report.plan.edits[0], []
    hook = case.model.get_submodule(edit.site.query).register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        for batch in case.batches:
            case.model(batch)
    hook.remove()
    q, k, _ = torch.cat(seen).flatten(0, 1).double().unflatten(-1, (3, edit.site.num_heads, -1)).unbind(1)
    energy = (q * k).square().mean(0)
    for head, dims in enumerate(edit.keep_qk):
        assert list(dims) == sorted(energy[head].topk(len(dims)).indices.tolist())


def test_corp_softmax_keeps_its_scale_and_the_edit_replays(build, run):
    case = build("timm-vit")
    student, report = cut(case, parts="attention", keep_dims=0.5, compensate=False)
    attention = student.get_submodule(report.plan.edits[0].site.path)
    assert isinstance(attention, SlimAttention) and attention.scale == report.plan.edits[0].site.head_dim ** -0.5
    assert attention.q.out_features < attention.v.out_features
    again = Plan.from_json(report.plan.to_json())
    replayed = case.copy()
    apply_(replayed, again.edits)
    assert torch.equal(run(replayed, case.batches[0]), run(student, case.batches[0]))


def test_corp_both_parts_cut_each_block_in_turn(build):
    _, report = cut(build("timm-vit"), parts="both", keep_ratio=0.5)
    kinds = [edit.KIND for edit in report.plan.edits]
    assert kinds == ["keep_head_dims", "keep_units"] * (len(kinds) // 2)


def test_attention_with_positions_or_norms_inside_is_left_alone_with_a_note():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, qk_norm=True, num_classes=0)
    bench = LiveModelView(model.eval(), [], {}, [torch.randn(2, 3, 32, 32)], seed=0)
    assert bench.attentions() == [] and "no plain attention" in bench.notes[0]


def test_wrong_dimensions_and_masks_are_refused(build):
    case = build("timm-vit")
    site = next(find_attentions(case.model))
    full = (tuple(range(site.head_dim)),) * site.num_heads
    for wrong in (full[:-1], ((0, 0),) * site.num_heads, ((site.head_dim,),) * site.num_heads, ((),) * site.num_heads):
        with pytest.raises(BudgetError, match="heads, at least one"):
            apply_(case.copy(), [KeepHeadDims(site=site, keep_qk=wrong, keep_v=full)])
    slim = SlimAttention(8, num_heads=2, num_qk=2, num_v=4, scale=0.5, qkv_bias=True, proj_bias=True, as_tuple=False)
    tokens = torch.randn(1, 3, 8)
    assert slim(tokens, None, is_causal=False).shape == tokens.shape
    for more in ({"attn_mask": torch.ones(3, 3)}, {"rope": (tokens, tokens)}, {"is_causal": True}):
        with pytest.raises(ModelError, match="takes no mask"):
            slim(tokens, **more)


def test_corp_needs_plain_attention_and_images(build):
    class Plain(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.blocks = nn.Sequential(block)

    case = build("timm-vit")
    recipe = Recipe.parse({"method": "corp", "hidden_dim": 8})
    with pytest.raises(RecipeError, match="corp needs calibration images"):
        cut_(case.copy(), case.model, case.sites, recipe, None, quiet=True)


@pytest.mark.fresh
def test_corp_output_with_slim_attention_loads_in_a_fresh_process(tmp_path):
    model = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
    recipe = Recipe.parse(
        {"method": "corp", "keep_ratio": 0.5, "options": {"parts": "both"}, "calibrate": {"num_images": 64}}
    )
    found = vitrim.compress(model, data="digits", recipe=recipe, out=tmp_path / "out", quiet=True)
    assert found.metrics.reload_difference <= 1e-6
    assert "query and key" in found.metrics.edits[0]["what"] and found.metrics.widths
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vitrim.load(tmp_path / "out")(images), found.model(images))
