"""Cutting attention heads with `dgmr`: in the walk, on each kind of projection, and what is refused."""

from dataclasses import replace

import pytest
import torch

from tests.support.models import CASES, timm_vit
from vitrim.calibrate import HeadVisit, LiveModelView
from vitrim.calibrate.activations import Activations
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import BudgetError, RecipeError
from vitrim.layers.attention import SlimAttention
from vitrim.models.sites import find_mlps
from vitrim.recover.elastic import Widths
from vitrim.surgery import KeepHeadDims, KeepHeads, KeepPaddedDims, Plan, apply_, reshape_

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def cut(case, *, images=True, method="dgmr", repair=None, **values):
    options = {"parts": values.pop("parts", "both")} | values.pop("options", {})
    student = case.copy()
    if repair is None and method == "dgmr":
        repair = {"refit": False}
    recipe = Recipe.parse({"method": method, "options": options, "repair": repair, **values})
    return student, cut_(student, case.model, case.sites, recipe, case.batches if images else None, quiet=True)


def attentions(case, **options):
    return LiveModelView(case.model, case.sites, {}, case.batches, seed=0).attentions(**options)


def foreign(build, name):
    """Models whose attention is not plain."""
    if name in CASES:
        return build(name)
    torch.manual_seed(0)
    if name == "qk-norm":
        model = timm_vit(qk_norm=True)
    else:
        transformers = pytest.importorskip("transformers")
        size = {**SIZE, "image_size": 32, "patch_size": 8}
        model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**size))
    shape = build("timm-vit")
    return type(shape)(**{**shape.__dict__, "model": model.eval(), "sites": find_mlps(model)})


def error(run, model, case):
    pairs = [(run(model, batch), run(case.model, batch)) for batch in case.batches]
    return sum(float((a - b).square().sum()) for a, b in pairs)


@pytest.fixture(params=["timm-vit", "timm-vit-scaled", "timm-parallel", "no-bias", "hf-vit", "hf-clip"])
def plain(request, build):
    """Models with plain attention: fused and split, with biases and without, with a layer scale and in parallel."""
    if request.param.startswith("timm"):
        return build(request.param)
    torch.manual_seed(0)
    if request.param == "no-bias":
        timm = pytest.importorskip("timm")
        small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
        model = timm.create_model("vit_tiny_patch16_224", qkv_bias=False, proj_bias=False, **small)
    else:
        transformers = pytest.importorskip("transformers")
        size = {**SIZE, "image_size": 32, "patch_size": 8}
        if request.param == "hf-vit":
            model = transformers.ViTModel(transformers.ViTConfig(**size), add_pooling_layer=False)
        else:
            model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size))
    model.eval()
    shape = build("timm-vit")
    return type(shape)(**{**shape.__dict__, "model": model, "sites": find_mlps(model)})


def test_heads_are_cut_with_less_error_than_corp_has(plain, run):
    student, report = cut(plain, parts="attention", keep_ratio=0.5)
    edits = report.plan.edits
    assert [edit.KIND for edit in edits] == ["keep_head_dims"] * len(edits) and edits
    for edit in edits:
        attention = student.get_submodule(edit.site.path)
        assert isinstance(attention, SlimAttention) and attention.scale == edit.site.scale
        assert attention.q.out_features == attention.v.out_features == edit.site.num_heads * edit.site.head_dim // 2
        assert report.errors[edit.site.path]["repaired"] <= report.errors[edit.site.path]["unrepaired"]
    ours = error(run, student, plain)
    theirs = cut(plain, method="corp", options={"values": True}, parts="attention", keep_ratio=0.5)[0]
    assert ours < error(run, theirs, plain)


def test_whole_heads_are_picked_and_the_output_is_fitted_to_them(plain, run):
    student, report = cut(plain, parts="attention", options={"heads": "whole"}, keep_ratio=0.5)
    assert [edit.KIND for edit in report.plan.edits] == ["keep_heads"] * len(attentions(plain))
    for edit in report.plan.edits:
        attention = student.get_submodule(edit.site.path)
        assert len(edit.keep) == attention.num_heads == 1 and attention.scale == edit.site.scale
        assert report.errors[edit.site.path]["repaired"] <= report.errors[edit.site.path]["unrepaired"]
    assert Plan.from_json(report.plan.to_json()) == report.plan.without_tensors()
    replayed = plain.copy()
    apply_(replayed, report.plan.edits)
    assert torch.equal(run(replayed, plain.batches[0]), run(student, plain.batches[0]))
    empty = plain.copy()
    reshape_(empty, [edit.shape_only() for edit in report.plan.edits])
    empty.load_state_dict(student.state_dict(), assign=True)
    assert torch.equal(run(empty, plain.batches[0]), run(student, plain.batches[0]))


def test_dropping_a_head_is_silencing_its_columns(plain, run):
    for site in attentions(plain):
        dropped, silenced = plain.copy(), plain.copy()
        apply_(dropped, [KeepHeads(site=site, keep=(1,))])
        with torch.no_grad():
            silenced.get_submodule(site.output).weight[:, : site.head_dim] = 0
        expected = run(silenced, plain.batches[0])
        torch.testing.assert_close(run(dropped, plain.batches[0]), expected, atol=1e-5, rtol=1e-5)
        for wrong in ((), (1, 0), (0, 0), (2,)):
            with pytest.raises(BudgetError, match="in order and each once"):
                apply_(plain.copy(), [KeepHeads(site=site, keep=wrong)])


def test_both_parts_are_cut_block_by_block_attention_first_and_the_plan_replays(build, run):
    case = build("timm-vit")
    student, report = cut(case, keep_ratio=0.5)
    assert [edit.KIND for edit in report.plan.edits] == ["keep_head_dims", "keep_units"] * 2
    assert report.plan.widths and Plan.from_json(report.plan.to_json()) == report.plan.without_tensors()
    replayed = case.copy()
    apply_(replayed, report.plan.edits)
    assert torch.equal(run(replayed, case.batches[0]), run(student, case.batches[0]))
    again = cut(case, keep_ratio=0.5)[1]
    assert again.plan.sha256 == report.plan.sha256


@pytest.mark.parametrize(
    ("name", "mixes"),
    [
        ("timm-split", "values"),
        ("timm-split-norm", "values"),
        ("qk-norm", "values"),
        ("timm-swin", "all"),
        ("hf-bert", "all"),
        ("hf-dinov3", "values"),
    ],
)
def test_attention_that_is_not_plain_keeps_its_code(build, run, name, mixes):
    """Rotary positions, norms on queries and keys, windows with biases, masks and a residual sum inside."""
    case = foreign(build, name)
    student, report = cut(case, parts="attention", keep_ratio=0.5)
    kinds = [edit for edit in report.plan.edits if isinstance(edit, KeepPaddedDims)]
    assert kinds == list(report.plan.edits) and kinds
    for edit in kinds:
        half, whole = edit.site.head_dim // 2, edit.site.head_dim
        assert edit.site.mixes == mixes and edit.num_v == half
        assert edit.num_qk == (half if mixes == "all" else whole)
        assert type(student.get_submodule(edit.site.path)) is type(case.model.get_submodule(edit.site.path))
        assert report.errors[edit.site.path]["repaired"] <= report.errors[edit.site.path]["unrepaired"]
    said = [note for note in report.notes if "stay whole" in note]
    assert len(said) == (len(kinds) if mixes == "values" else 0)
    unfed = [note for note in report.notes if "has no feedback" in note]  # not where one window holds all tokens
    assert len(unfed) == (2 if mixes == "all" else 0)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (student, case.model)]
    assert sizes[0] < sizes[1]
    assert Plan.from_json(report.plan.to_json()) == report.plan.without_tensors()
    replayed, empty = case.copy(), case.copy()
    apply_(replayed, report.plan.edits)
    reshape_(empty, [edit.shape_only() for edit in report.plan.edits])
    empty.load_state_dict(student.state_dict(), assign=True)
    for again in (replayed, empty):
        assert torch.equal(run(again, case.batches[0]), run(student, case.batches[0]))
    sliced = case.copy()
    apply_(sliced, [replace(edit, tensors={}) for edit in report.plan.edits])
    assert error(run, student, case) < error(run, sliced, case)


def test_padded_heads_at_their_full_size_change_nothing(build, run):
    for name in ("timm-split", "timm-split-norm", "hf-bert"):
        case = foreign(build, name)
        student, _ = cut(case, keep_ratio=1.0)
        assert torch.equal(run(student, case.batches[0]), run(case.model, case.batches[0]))
        for site in attentions(case, padded=True):
            apply_(student, [KeepPaddedDims(site=site, num_qk=site.head_dim, num_v=site.head_dim)])
        assert torch.equal(run(student, case.batches[0]), run(case.model, case.batches[0]))
        with pytest.raises(BudgetError, match="dimensions of each head"):
            apply_(case.copy(), [KeepPaddedDims(site=site, num_qk=0, num_v=1)])


def test_tokens_in_windows_get_no_feedback_in_an_order_that_is_not_theirs(build):
    case = build("timm-swin")
    site = replace(attentions(case, padded=True)[0], block=case.sites[0].block)
    both = [Activations(case.model, [site.block], case.batches, frozen=own, offload=None) for own in (True, False)]
    for activations in both:
        activations.enter(0)
    visit = HeadVisit(
        site=site, teacher=both[0], student=both[1], silent=[case.sites[0].output], feedback=1.0, num_fit=1
    )
    assert visit.scale_D is None


def test_keeping_everything_changes_no_bit(plain, run):
    for parts in ("attention", "both"):
        student, report = cut(plain, parts=parts, keep_ratio=1.0)
        assert not any(isinstance(edit, KeepHeadDims) for edit in report.plan.edits)
        assert torch.equal(run(student, plain.batches[0]), run(plain.model, plain.batches[0]))


def dependent(build):
    """A case whose heads have queries, keys and values of half the rank, in a model of its own."""
    case = build("timm-vit")
    case = replace(case, model=case.copy())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, module in case.model.named_modules():
            if name.endswith("qkv"):
                heads = module.weight.unflatten(0, (3, 2, 16))
                heads[:, :, 8:] = torch.randn(3, 2, 8, 8, generator=generator) @ heads[:, :, :8]
                module.bias.zero_()
    return case


def test_dependent_dimensions_cost_nothing(build, run):
    case = dependent(build)
    student, _ = cut(case, parts="attention", keep_ratio=0.5, repair={"refit": False, "ridge": 1e-8})
    torch.testing.assert_close(run(student, case.batches[0]), run(case.model, case.batches[0]), atol=1e-3, rtol=1e-3)


def test_feedback_corrects_what_blocks_before_got_wrong(build, run):
    case = dependent(build)
    with_it, without = (
        error(run, cut(case, keep_ratio=0.75, repair={"refit": False, "feedback": share})[0], case)
        for share in (1.0, 0.0)
    )
    assert with_it < without


def test_without_repair_the_output_projection_is_left_as_it_is_but_for_the_mixture(build, run):
    case = dependent(build)
    whole, report = cut(case, parts="attention", keep_ratio=0.75, repair=False)
    assert all("repaired" not in errors for errors in report.errors.values())
    assert error(run, whole, case) < 1e-9  # the mixture alone does it here
    repaired = cut(case, parts="attention", keep_ratio=0.5)[1]
    assert all(errors["repaired"] < errors["unrepaired"] for errors in repaired.errors.values())


def test_what_cannot_be_done_is_refused_in_a_line(build):
    case = build("timm-vit")
    with pytest.raises(RecipeError, match="pass data, or use parts='mlp'"):
        cut(case, images=False, keep_ratio=0.5)
    with pytest.raises(RecipeError, match="no attention that can be cut"):
        cut(build("timm-mixer"), keep_ratio=0.5)
    with pytest.raises(RecipeError, match="parts"):
        cut(case, method="dgmr-paper", keep_ratio=0.5)
    with pytest.raises(BudgetError, match="give keep_ratio here"):
        cut(case, params_ratio=0.5)
    with pytest.raises(RecipeError, match="picks each MLP's units in order"):
        Widths.of(
            Recipe.parse(
                {"method": "dgmr", "options": {"parts": "both"}, "recover": {"elastic": [0.5, 1], "epochs": 1}}
            ),
            case.sites,
        )
