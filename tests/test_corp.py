"""CORP (arXiv 2602.05243): ranking, folding of MLP units, of query and key dimensions, and of values."""

from importlib.resources import files

import pytest
import torch
from torch import nn

import vitrim
from vitrim.calibrate import Workbench
from vitrim.cut import cut_
from vitrim.errors import BudgetError, ModelError, RecipeError
from vitrim.layers.attention import SlimAttention
from vitrim.models.attention import find_attentions
from vitrim.models.sites import find_mlps
from vitrim.ops.head_dims import fold_logits, fold_values, oas_shrinkage
from vitrim.recipe import Recipe
from vitrim.surgery import KeepHeadDims, Plan, apply_


def cut(case, **options):
    values = {key: options.pop(key) for key in ("keep_ratio", "width") if key in options}
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
def test_corp_keeping_every_head_dimension_is_the_model(request, name, attention_case, run):
    case = attention_case(name)
    student, report = cut(case, parts="attention", keep_dims=1.0, values=True)
    assert report.plan.edits and not report.notes
    torch.testing.assert_close(run(student, case.batches[0]), run(case.model, case.batches[0]), atol=1e-4, rtol=1e-4)


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
        error(run, cut(case, width=24, **options)[0], case) for options in ({}, {"compensate": False}, {"ridge": 1e12})
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


def test_corp_a_dropped_unit_that_depends_on_kept_ones_costs_nothing(build, run):
    case = build("timm-vit")
    for site in case.sites:  # unit 1 is unit 0 at half the height: GELU is no line, so copy it exactly and weigh less
        value = case.model.get_submodule(site.value)
        with torch.no_grad():
            value.weight[1], value.bias[1] = value.weight[0], value.bias[0]
    sites = find_mlps(case.model)
    student = case.copy()
    recipe = Recipe.parse({"method": "corp", "width": sites[0].d_hidden - 1, "options": {"ridge": 1e-12}})
    report = cut_(student, case.model, sites, recipe, case.batches, quiet=True)
    lost = [set(range(edit.site.d_hidden)) - set(edit.keep) for edit in report.plan.edits]
    if all(units <= {0, 1} for units in lost):
        torch.testing.assert_close(
            run(student, case.batches[0]), run(case.model, case.batches[0]), atol=1e-5, rtol=1e-4
        )
    kept = run(student, case.batches[0]) - run(case.model, case.batches[0])
    assert float(kept.square().mean()) < 1e-3 * float(run(case.model, case.batches[0]).square().mean())


def spread(size, seed):
    basis = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return basis @ basis.T


def test_corp_logits_are_those_of_the_best_m():
    """q' k' = q_S (I + M) k_S, where M solves G_Q M G_K + lambda M = C; the antisymmetric part of M is not lost."""
    gram_q, gram_k = spread(8, 0), spread(8, 1)
    keep, dropped, ridge = torch.tensor([6, 1, 3, 0, 7]), torch.tensor([2, 4, 5]), 0.3
    left, right = fold_logits(gram_q, gram_k, keep, ridge=ridge)
    product = left.T @ right
    m = product - torch.eye(5)
    q_ss, k_ss = gram_q[keep][:, keep], gram_k[keep][:, keep]
    wanted = gram_q[keep][:, dropped] @ gram_k[dropped][:, keep]
    penalty = ridge * q_ss.diagonal().mean() * k_ss.diagonal().mean()
    torch.testing.assert_close(q_ss @ m @ k_ss + penalty * m, wanted, atol=1e-8, rtol=1e-8)
    kronecker = torch.kron(q_ss, k_ss) + penalty * torch.eye(25)  # the slow way
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
    covariance = torch.diag(torch.linspace(1, 9, 30, dtype=torch.float64))
    assert 0 < oas_shrinkage(covariance, 100_000) < 0.01 < oas_shrinkage(covariance, 20) <= 1
    assert oas_shrinkage(torch.eye(5), 100) == 1.0


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
    bench = Workbench(model.eval(), [], {}, [torch.randn(2, 3, 32, 32)], seed=0)
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
    recipe = Recipe.parse({"method": "corp", "width": 8})
    with pytest.raises(RecipeError, match="corp needs calibration images"):
        cut_(case.copy(), case.model, case.sites, recipe, None, quiet=True)


def test_corp_output_with_slim_attention_loads_in_a_fresh_process(tmp_path):
    model = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
    recipe = Recipe.parse(
        {"method": "corp", "keep_ratio": 0.5, "options": {"parts": "both"}, "calibrate": {"num_images": 64}}
    )
    found = vitrim.compress(model, data="digits", recipe=recipe, out=tmp_path / "out", quiet=True)
    assert found.metrics["reload_difference"] <= 1e-6
    assert "query and key" in found.metrics["edits"][0]["what"] and found.metrics["widths"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vitrim.load(tmp_path / "out")(images), found.model(images))
