"""Cutting a model is exact: what is left computes what the dense model computes with the removed units silenced."""

import copy
from collections.abc import Mapping

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitrim.errors import BudgetError, SiteNotFoundError
from vitrim.models.sites import find_mlps
from vitrim.surgery import KeepUnits, apply_, mlp_output, read_weights, reshape_, transform
from vitrim.types import MlpSite


def pick(site, count, seed=0):
    order = torch.randperm(site.d_hidden, generator=torch.Generator().manual_seed(seed))
    return tuple(order[:count].tolist())


def edits_for(sites, share=0.5):
    return [KeepUnits(site=s, keep=pick(s, max(1, int(share * s.d_hidden)), seed=i)) for i, s in enumerate(sites)]


def masked(model, edits):
    """The dense model with the output columns of the removed units at zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for edit in edits:
            gone = [i for i in range(edit.site.d_hidden) if i not in edit.keep]
            model.get_submodule(edit.site.output).weight[:, gone] = 0
    return model


def cut(model, edits):
    model = copy.deepcopy(model)
    apply_(model, edits)
    return model


def without_norms(model, sites):
    """The model and its sites with the inner norms taken out."""
    model = copy.deepcopy(model)
    for site in sites:
        if site.norm is not None:
            model.set_submodule(site.norm, nn.Identity())
    return model, find_mlps(model)


def test_cut_equals_masked_dense_on_the_whole_model(case, run):
    model, sites = without_norms(case.model, case.sites)
    edits = edits_for(sites)
    expected = run(masked(model, edits), case.batches[0])
    torch.testing.assert_close(run(cut(model, edits), case.batches[0]), expected, atol=1e-5, rtol=1e-5)
    assert (expected - run(model, case.batches[0])).abs().max() > 1e-3


def test_an_inner_norm_sees_other_statistics_after_the_cut(build, run):
    case = build("timm-split-norm")
    edits = edits_for(case.sites)
    expected, got = run(masked(case.model, edits), case.batches[0]), run(cut(case.model, edits), case.batches[0])
    assert (got - expected).abs().max() > 1e-3


def test_a_permutation_at_full_width_changes_nothing(case, run):
    permuted = cut(case.model, edits_for(case.sites, share=1.0))
    expected = run(case.model, case.batches[0])
    torch.testing.assert_close(run(permuted, case.batches[0]), expected, atol=1e-5, rtol=1e-5)


def test_kept_values_are_the_originals_in_pick_order(case):
    edits = edits_for(case.sites, share=0.3)
    small, touched = cut(case.model, edits), set()
    for edit in edits:
        site, keep = edit.site, list(edit.keep)
        old, new = read_weights(case.model, site), read_weights(small, site)
        assert torch.equal(new.value_HD, old.value_HD[keep])
        assert torch.equal(new.output_DH, old.output_DH[:, keep])
        for name in ("gate_HD", "gate_bias_H", "value_bias_H"):
            before, after = getattr(old, name), getattr(new, name)
            assert (after is None) if before is None else torch.equal(after, before[keep])
        assert (new.gate_HD is None) == (site.kind == "plain")
        if site.norm is not None:
            gains = [model.get_submodule(site.norm).weight for model in (case.model, small)]
            assert torch.equal(gains[1], gains[0][keep])
        paths = [path for path in (site.value, site.gate, site.norm, site.output) if path]
        touched |= {f"{path}.{part}" for path in paths for part in ("weight", "bias")} - {f"{site.output}.bias"}
    before, after = case.model.state_dict(), small.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - touched)


def test_both_halves_of_a_packed_matrix_are_cut_gate_first(build):
    case = build("timm-packed")
    site = case.sites[0]
    small = cut(case.model, [KeepUnits(site=site, keep=(5, 2))])
    for part in ("weight", "bias"):
        old, new = (getattr(model.get_submodule(site.value), part) for model in (case.model, small))
        assert torch.equal(new, old[[5, 2, 85 + 5, 85 + 2]])
    assert torch.equal(read_weights(case.model, site).gate_HD, case.model.get_submodule(site.value).weight[:85])


def test_layers_say_their_new_sizes(case):
    small = cut(case.model, edits_for(case.sites, share=0.25))
    for site in find_mlps(small):
        value, output = small.get_submodule(site.value), small.get_submodule(site.output)
        assert value.out_features == len(value.weight) == site.d_hidden * site.num_groups
        assert output.in_features == output.weight.shape[1] == site.d_hidden
        if site.norm is not None:
            assert small.get_submodule(site.norm).normalized_shape == (site.d_hidden,)
    widths = {site.path: int(0.25 * site.d_hidden) for site in case.sites}
    assert {site.path: site.d_hidden for site in find_mlps(small)} == widths


class Lazy(Mapping):
    """A mapping that counts how often each tensor is read."""

    def __init__(self, tensors):
        self.tensors, self.reads = tensors, []

    def __getitem__(self, name):
        self.reads.append(name)
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_a_lazy_state_dict_is_read_once_and_gives_what_apply_gives(case):
    edits = edits_for(case.sites)
    lazy, expected = Lazy(case.model.state_dict()), cut(case.model, edits).state_dict()
    stream = transform(lazy, edits)
    first = next(stream)[0]
    assert lazy.reads == [first]
    got = {first: lazy.tensors[first], **dict(stream)}
    assert lazy.reads == list(lazy.tensors) == list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected if name != first)


def test_an_empty_model_reshaped_takes_the_cut_weights(case):
    edits = edits_for(case.sites)
    expected = cut(case.model, edits).state_dict()
    empty = copy.deepcopy(case.model).to("meta")
    reshape_(empty, edits)
    assert all(p.is_meta for p in empty.parameters())
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in expected.items()}
    empty.load_state_dict(dict(transform(case.model.state_dict(), edits)), assign=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in empty.state_dict().items())


def test_an_edit_survives_any_order_of_edits_and_leaves_the_original_alone(build, run):
    case = build("timm-parallel")
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    edits = edits_for(case.sites)
    forward, backward = cut(case.model, edits), cut(case.model, edits[::-1])
    assert torch.equal(run(forward, case.batches[0]), run(backward, case.batches[0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())


def test_cutting_twice_is_cutting_once(build, run):
    case = build("timm-split")
    first = cut(case.model, [KeepUnits(site=case.sites[0], keep=(9, 1, 7, 3))])
    twice = cut(first, [KeepUnits(site=find_mlps(first)[0], keep=(3, 0))])
    once = cut(case.model, [KeepUnits(site=case.sites[0], keep=(3, 9))])
    assert torch.equal(run(twice, case.batches[0]), run(once, case.batches[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_requires_grad_stay(build, dtype):
    case = build("timm-split-norm")
    model = case.copy().to(dtype)
    frozen = {case.sites[0].value + ".weight", case.sites[1].output + ".weight", "cls_token"}
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    edits = edits_for(case.sites)
    edits[0] = KeepUnits(
        site=case.sites[0],
        keep=(1, 2),
        tensors={f"{case.sites[0].output}.weight": torch.ones(32, 2, dtype=torch.float64)},
    )
    apply_(model, edits)
    assert all(p.dtype == dtype and p.is_contiguous() for p in model.parameters())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())


def test_repaired_tensors_replace_the_sliced_ones(build):
    case = build("timm-vit")
    site = case.sites[1]
    weight, bias = torch.randn(32, 3, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    repaired = {f"{site.output}.weight": weight, f"{site.output}.bias": bias}
    small = cut(case.model, [KeepUnits(site=site, keep=(4, 0, 90), tensors=repaired)])
    new = read_weights(small, site)
    assert torch.equal(new.output_DH, weight.float()) and torch.equal(new.output_bias_D, bias.float())
    assert torch.equal(new.value_HD, read_weights(case.model, site).value_HD[[4, 0, 90]])


@pytest.mark.parametrize("keep", [(), (1, 1), (-1, 2), (0, 96)])
def test_bad_indices_are_refused_and_the_model_stays_whole(build, run, keep):
    case = build("timm-vit")
    good, bad = KeepUnits(site=case.sites[0], keep=(0,)), KeepUnits(site=case.sites[1], keep=keep)
    model = case.copy()
    for act in (lambda: apply_(model, [good, bad]), lambda: reshape_(model, [good, bad])):
        with pytest.raises(BudgetError, match=r"^blocks\.1\.mlp: .*0\.\.95\.$"):
            act()
        assert torch.equal(run(model, case.batches[0]), run(case.model, case.batches[0]))


def test_an_unknown_module_is_refused_and_the_model_stays_whole(build, run):
    case = build("timm-vit")
    site = MlpSite(path="x", kind="plain", d_model=32, d_hidden=96, value="x.fc1", output="x.fc2")
    model = case.copy()
    edits = [KeepUnits(site=case.sites[0], keep=(0,)), KeepUnits(site=site, keep=(0,))]
    with pytest.raises(SiteNotFoundError, match=r"^x\.fc1: no such module in VisionTransformer"):
        apply_(model, edits)
    assert torch.equal(run(model, case.batches[0]), run(case.model, case.batches[0]))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_order_of_any_units_is_exact(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    packed = data.draw(st.booleans())
    value, output = nn.Linear(6, 16 if packed else 8), nn.Linear(8, 6)
    with torch.no_grad():
        for p in (*value.parameters(), *output.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator))
    keep = tuple(data.draw(st.permutations(range(8)))[: data.draw(st.integers(1, 8))])
    site = MlpSite(
        path="", kind="packed_gated" if packed else "plain", d_model=6, d_hidden=8, value="value", output="output"
    )
    model = nn.ModuleDict({"value": value, "output": output})
    old = read_weights(model, site)
    tokens = torch.randn(5, 6, generator=generator)
    hidden = tokens @ old.value_HD.T + old.value_bias_H
    if old.gate_HD is not None:
        hidden = hidden * (tokens @ old.gate_HD.T + old.gate_bias_H).sigmoid()
    expected = hidden[:, list(keep)] @ old.output_DH[:, list(keep)].T
    apply_(model, [KeepUnits(site=site, keep=keep)])
    new = read_weights(model, site)
    hidden = tokens @ new.value_HD.T + new.value_bias_H
    if new.gate_HD is not None:
        hidden = hidden * (tokens @ new.gate_HD.T + new.gate_bias_H).sigmoid()
    torch.testing.assert_close(hidden @ new.output_DH.T, expected, atol=1e-5, rtol=1e-5)


def test_mlp_output_is_what_the_mlp_puts_out(build):
    for name in ("timm-vit", "timm-packed", "timm-split-norm", "hf-bert", "llama-order"):
        case = build(name)
        site = case.sites[0]
        tokens = torch.randn(6, site.d_model)
        with torch.no_grad():
            got = mlp_output(case.model, site, tokens)
            if name == "hf-bert":
                layer = case.model.get_submodule(site.path)
                expected = layer.output.dense(layer.intermediate(tokens))
            else:
                expected = case.model.get_submodule(site.path)(tokens)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert not case.model.get_submodule(site.output)._forward_hooks


def test_a_plan_for_another_width_is_refused_and_changes_nothing():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2)
    edits = [KeepUnits(site=site, keep=(1, 0, 5)) for site in find_mlps(model)]
    apply_(model, edits)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BudgetError, match="has 3 hidden units, the plan was made for 96"):
        apply_(model, edits)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
