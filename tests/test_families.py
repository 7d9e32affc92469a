"""Every family of `families.py`: found, cut exactly, saved, loaded by its own library, and still a model to torch."""

import copy
import json
import shutil

import open_clip
import pytest
import torch

from tests.support.families import FAMILIES
from tests.support.models_table import BEGIN, END, PAGE, TOLERANCE, difference, measured, run, stock_reports, table

every_family = pytest.mark.parametrize("name", FAMILIES)
EXACT = [name for name, family in FAMILIES.items() if "norm" not in family.kind]
# A trace takes seconds: one of each library and kind of MLP. What is cut is what it traces in another width.
COMPILED = {(family.source, family.kind): name for name, family in FAMILIES.items()}.values()
NORMED = [name for name in FAMILIES if name not in EXACT]


@every_family
def test_its_mlps_are_found(name):
    found, family = measured(name), FAMILIES[name]
    assert found.paths == dict(family.sites)
    assert {site.label for site in found.sites} == {family.kind}


@every_family
def test_all_units_kept_give_the_model_back(name):
    found = measured(name)
    assert torch.equal(found.reordered(torch.arange), found.output)
    shuffled = found.reordered(lambda count: torch.randperm(count, generator=torch.Generator().manual_seed(0)))
    assert difference(shuffled, found.output) <= TOLERANCE


@pytest.mark.parametrize("name", EXACT)
def test_a_removed_unit_is_a_unit_of_zeros(name):
    found = measured(name)
    assert found.masked_difference <= TOLERANCE
    assert difference(found.cut_output, found.output) > 100 * TOLERANCE  # the units that went were no zeros before


@pytest.mark.parametrize("name", NORMED)
def test_repair_absorbs_what_a_norm_over_the_hidden_units_changes(name):
    found = measured(name)
    assert found.masked_difference > 0.01
    assert found.errors["repaired"] < 0.8 * min(found.errors["masked"], found.errors["cut"])


@every_family
def test_only_the_mlps_change(name):
    found = measured(name)
    cut = [edit.site for edit in found.plan.below(found.origin.encoder).edits]
    paths = tuple(f"{path}." for site in cut for path in (site.value, site.gate, site.output, site.norm) if path)
    after = found.student.state_dict()
    for key, tensor in found.model.state_dict().items():
        assert key.startswith(paths) or torch.equal(after[key], tensor), key
    assert sum(map(torch.numel, found.student.parameters())) < sum(map(torch.numel, found.model.parameters()))


@every_family
def test_vitrim_loads_it(name):
    found = measured(name)
    loaded = found.loaded(found.saved[0])
    assert torch.equal(run(found.encoder_of(loaded), found.inputs), found.cut_output)
    expected = found.student.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


@every_family
def test_its_own_library_loads_it_where_vitrim_is_not_installed(name):
    assert measured(name).saved[1] == FAMILIES[name].stock
    if FAMILIES[name].stock:
        difference = stock_reports()[name]
        assert isinstance(difference, float) and difference <= TOLERANCE, difference


@every_family
def test_bfloat16_stays_bfloat16(name):
    found, inputs = measured(name), FAMILIES[name].inputs
    live, loaded = (found.encoder_of(model) for model in found.in_bfloat16())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    inputs = inputs.bfloat16() if inputs.is_floating_point() else inputs
    assert torch.equal(run(loaded, inputs), run(live, inputs))


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_takes_it(name):
    assert measured(name).compiled <= TOLERANCE


@every_family
def test_torch_export_takes_it_as_it_takes_the_uncut_model(name):
    found = measured(name)
    if isinstance(found.exported, str):
        assert found.exported == found.uncut_exported
    else:
        assert found.exported <= TOLERANCE


@every_family
def test_features_have_a_pooled_vector_and_patches(name):
    found, family = measured(name), FAMILIES[name]
    num_patches, width, pooled_width = family.features
    final, before = found.features("final"), found.features("pre_norm")
    assert final is not None and final.patches_BND is not None
    assert final.pooled_BD.shape == (2, pooled_width) and final.patches_BND.shape == (2, num_patches, width)
    assert all(torch.isfinite(part).all() for part in (final.pooled_BD, final.patches_BND))
    assert (before is not None) == family.pre_norm
    if before is not None:
        assert before.pooled_BD.shape[0] == 2
        assert before.patches_BND.shape == (2, num_patches + family.among_patches, width)


def test_a_state_dict_means_the_same_in_other_names():
    ours, theirs = (measured(name).model for name in FAMILIES if name.startswith("state dict"))
    theirs = copy.deepcopy(theirs)
    theirs.head.bias.data.copy_(ours.head.bias)  # CLIP's projection has none
    images = FAMILIES["state dict: a ViT in timm's names"].inputs
    assert torch.equal(run(theirs, images), run(ours, images))


def test_the_table_in_the_docs_is_what_was_measured():
    page = PAGE.read_text()
    assert page.partition(BEGIN)[2].partition(END)[0] == f"\n{table()}\n", (
        "run python -m tests.support.models_table --write"
    )


def test_a_timm_tower_moves_with_its_folder(tmp_path):
    """As docs/models.md says: open_clip needs the new path in its config, `vitrim.load` does not."""
    found = measured("open_clip: EVA02-E (timm tower)")
    shutil.copytree(found.saved[0], tmp_path / "moved")
    path = tmp_path / "moved" / "open_clip_config.json"
    config = json.loads(path.read_text())
    for where in ("gone", "moved"):
        config["model_cfg"]["vision_cfg"]["timm_model_name"] = f"local-dir:{tmp_path / where / 'trunk'}"
        path.write_text(json.dumps(config))
        assert torch.equal(run(found.loaded(path.parent).visual, found.inputs), found.cut_output)
    moved = open_clip.create_model(f"local-dir:{path.parent}").eval()
    assert torch.equal(run(moved.visual, found.inputs), found.cut_output)
