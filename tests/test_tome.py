"""Token merging against a slow version of itself, where merging must change nothing, and where it can't be had."""

from __future__ import annotations

import pytest
import torch

import vitrim
from tests.support.models import build_case, timm_vit
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.cost.count import count_macs
from vitrim.errors import BudgetError, ModelError, RecipeError, SiteNotFoundError
from vitrim.layers.merged_tokens import MergedTokens, merge
from vitrim.metrics.fidelity import block_fidelity
from vitrim.models.features import features
from vitrim.models.sites import find_mlps
from vitrim.surgery import MergeTokens, apply_


def merged(case, **values):
    student = case.copy()
    recipe = Recipe.parse({"method": "tome", "exact": True, **values})
    return student, cut_(student, case.model, case.sites, recipe, case.batches, quiet=True)


def slow_merge(tokens, sizes, keys, num_prefix, num_merged):
    """One image, patch by patch: the first side loses those that are most like one of the second."""
    patches = range(num_prefix, len(tokens))
    first, second = list(patches[::2]), list(patches[1::2])
    keys = keys / keys.norm(dim=-1, keepdim=True)
    best = {a: max(second, key=lambda b: float(keys[a] @ keys[b])) for a in first}
    order = sorted(first, key=lambda a: -float(keys[a] @ keys[best[a]]))
    gone, left = order[:num_merged], sorted(order[num_merged:])
    groups = {b: [b, *(a for a in gone if best[a] == b)] for b in second}
    rows = [[number] for number in [*range(num_prefix), *left]] + list(groups.values())
    total = [sum(sizes[i] for i in row) for row in rows]
    means = [sum(tokens[i] * sizes[i] for i in row) / size for row, size in zip(rows, total, strict=True)]
    return torch.stack(means), torch.stack(total)


@pytest.mark.parametrize("num_prefix", [1, 3])
@pytest.mark.parametrize("num_merged", [1, 4])
def test_merging_is_what_it_is_patch_by_patch(num_prefix, num_merged):
    torch.manual_seed(0)
    tokens, keys = torch.randn(2, num_prefix + 9, 6), torch.randn(2, num_prefix + 9, 5)
    sizes = torch.randint(1, 5, (2, num_prefix + 9, 1)).float()
    found, left = merge(tokens, sizes, keys, num_prefix, num_merged)
    assert found.shape[1] == num_prefix + 9 - num_merged
    for image in range(2):
        means, total = slow_merge(tokens[image], sizes[image], keys[image], num_prefix, num_merged)
        torch.testing.assert_close(found[image], means)
        torch.testing.assert_close(left[image], total)
    torch.testing.assert_close((found * left).sum(1), (tokens * sizes).sum(1))


def test_rounding_among_patches_that_are_not_merged_changes_nothing():
    """The next block's two sides go by the order of what stays, so that must not hang on who is a little more alike."""
    first = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.6, 0.8, 1e-6], [0.6, 0.8, 2e-6]])
    second = torch.tensor([[1.0, 0.0, 0.0]]).expand(4, 3)
    tokens, sizes = torch.arange(9.0).reshape(1, 9, 1), torch.ones(1, 9, 1)
    for order in ([1, 2, 3], [3, 2, 1], [2, 3, 1]):  # of three that are equally alike but for rounding
        keys = torch.zeros(1, 9, 3)
        keys[0, 1::2], keys[0, 2::2] = first[[0, *order]], second
        found, left = merge(tokens, sizes, keys, 1, 1)
        assert found.flatten().tolist()[:4] == [0.0, 3.0, 5.0, 7.0]
        assert left.sum() == 9


def test_patches_that_are_equal_can_be_merged_without_loss():
    """A merged token counts in attention for all that it stands for, also in the blocks behind."""
    case = build_case("timm-vit-scaled")
    first, second = (edit.site for edit in merged(case, keep_ratio=0.5)[1].plan.edits)
    whole, sizes = case.copy(), {"num_prefix": 1, "num_patches": 16}
    half = MergeTokens(site=first, num_given=16, num_merged=8, **sizes)
    apply_(whole, [half, MergeTokens(site=second, num_given=8, num_merged=0, **sizes)])
    tokens = torch.cat([torch.randn(2, 1, 32), torch.randn(2, 8, 32).repeat_interleave(2, dim=1)], dim=1)
    with torch.inference_mode():
        found, wanted = whole.blocks(tokens), case.model.blocks(tokens)
    assert found.shape[1] == 9
    torch.testing.assert_close(found, wanted[:, [0, *range(2, 17, 2)]], atol=1e-5, rtol=1e-4)


def test_sequences_get_shorter_and_features_are_those_of_cls():
    case = build_case("hf-dinov2")
    student, report = merged(case, keep_ratio=0.6)
    assert count_macs(student, case.batches[0][:1]) < count_macs(case.model, case.batches[0][:1])
    assert "Errors compare CLS alone" in report.notes[-1]
    found = features(student, case.batches[0])
    assert found.patches_BND is None and found.token_positions == ()
    rows = block_fidelity(student, case.model, case.batches, [site.block for site in case.sites])
    assert 0 < rows[1]["relative_error"] < 1


def test_what_has_lost_the_sizes_says_so():
    case = build_case("timm-vit")
    student, _ = merged(case, keep_ratio=0.5)
    with pytest.raises(ModelError, match="merged tokens came without their sizes"):
        student.blocks[1](torch.randn(1, student.blocks[1].num_given, 32))
    with pytest.raises(ModelError, match=r"chosen among 17 and these images have 10"):
        student.blocks[0](torch.randn(1, 10, 32))


def test_it_trains_is_saved_and_loads(tmp_path):
    case, images = build_case("timm-vit"), torch.randn(60, 3, 32, 32)
    recipe = {"method": "tome", "macs_ratio": 0.8, "exact": True, "recover": {"steps": 3, "batch_size": 4}}
    result = vitrim.compress(case.model, data=images, recipe=recipe, out=tmp_path / "out", quiet=True)
    assert 0.6 < result.metrics.after.macs / result.metrics.before.macs <= 0.8
    assert result.metrics.after_recovery.relative_error <= result.metrics.after_cut.relative_error
    again = vitrim.load(tmp_path / "out", model=case.copy())
    assert torch.equal(again(images[:4]), result.model(images[:4]))
    assert all(isinstance(block, MergedTokens) for block in again.blocks)


def test_what_cant_be_merged_is_refused():
    case = build_case("timm-vit")
    with pytest.raises(BudgetError, match=r"halving in every block leaves 0\.375 of all patches; use 0\.375\.\.1"):
        merged(case, keep_ratio=0.2)
    with pytest.raises(BudgetError, match=r"blocks\.0: asked to merge 9 of 16 patches; use 0\.\.8"):
        apply_(case.copy(), [made(case, num_merged=9)])
    pooling = timm_vit(global_pool="avg").eval()
    student = type(case)(name="avg", model=pooling, sites=find_mlps(pooling), batches=case.batches)
    with pytest.raises(SiteNotFoundError, match=r"blocks\.1: its patches are pooled"):
        merged(student, keep_ratio=0.5)
    with pytest.raises(RecipeError, match=r"blockwise: tome merges tokens"):
        Recipe.parse({"method": "tome", "blockwise": {}})


def made(case, *, num_merged):
    site = merged(case, keep_ratio=0.5)[1].plan.edits[0].site
    return MergeTokens(site=site, num_prefix=1, num_given=16, num_merged=num_merged, num_patches=16)
