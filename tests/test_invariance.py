"""One model written in several ways that compute the same gives the same result: nothing depends on how weights scale.

What is known to differ is listed in `DIFFERS`, with the reason in docs/choosing.md.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch

from tests.support.rescaled import FACTORS, KINDS, images, original_units, rescalings, tiny_vit
from vitrim.calibrate import walk
from vitrim.compression.cut import cut_
from vitrim.config.options import AtOnceOptions, BlockwiseOptions, RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.data import open_images
from vitrim.metrics.fidelity import fidelity
from vitrim.models.features import features
from vitrim.models.sites import find_mlps
from vitrim.recover.at_once import train_at_once_
from vitrim.recover.distill import recover_
from vitrim.repair.blockwise import recover_blocks_
from vitrim.surgery import KeepUnits

NO_REFIT = {"refit": False}
# method -> recipe; all at half of the hidden units, or of the values
METHODS: dict[str, dict[str, Any]] = {
    "dgmr": {"method": "dgmr", "repair": NO_REFIT},
    "dgmr on features": {"method": "dgmr", "options": {"select_on": "features"}, "repair": NO_REFIT},
    "corp": {"method": "corp", "options": {"parts": "both", "values": True}},
    "low-rank": {"method": "low-rank"},
    "fips": {"method": "fips", "options": {"steps": 30, "num_tokens": 512, "batch_size": 128}},
}
# By definition: the published criteria look at parts of what a rescaling moves.
DIFFERS = {
    "corp": ("single values",),  # a unit's energy without its output weights
    "low-rank": ("values", "single values", "layer scale"),  # all outputs of a layer count alike
    "fips": ("single values", "layer scale"),  # inputs and outputs of an MLP share one basis
}
WAYS = [(vit, name) for vit in KINDS for name in rescalings(tiny_vit(vit, depth=1))]
EXTREME = [f" x {factor:g}" for factor in (min(FACTORS), max(FACTORS))]


CALIBRATION, HELD_OUT = images(48, 1), images(32, 2)


@cache
def result(vit: str, name: str, method: str) -> tuple[float, dict[int, list[int]]]:
    """Error of a cut model on other images, and the kept units in the original's numbers."""
    model = tiny_vit(vit, depth=2)
    model = rescalings(model)[name](model) if name else model
    student, sites = copy.deepcopy(model), find_mlps(model)
    recipe = Recipe.parse({"keep_ratio": 0.5, **(METHODS | {"refit": REFIT})[method]})
    report = cut_(student, model, sites, recipe, CALIBRATION, quiet=True)
    keeps = {site.path: site for site in sites}
    keep = [edit.keep for edit in report.plan.edits if isinstance(edit, KeepUnits) and edit.site.path in keeps]
    kept = original_units(name, dict(enumerate(keep)), sites[0].d_hidden)
    return fidelity(student, model, HELD_OUT)["relative_error"], kept


REFIT = {"method": "dgmr", "repair": {"refit_steps": 30}}


@pytest.mark.parametrize(("vit", "name"), WAYS)
def test_a_rescaled_model_computes_the_same(vit, name):
    model = tiny_vit(vit).double()
    again = rescalings(model)[name](model)
    with torch.no_grad():
        expected, found = (features(each, HELD_OUT[0].double()) for each in (model, again))
    torch.testing.assert_close(found.pooled_BD, expected.pooled_BD, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.patches_BND, expected.patches_BND, atol=1e-10, rtol=1e-10)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("vit", "name"), [(vit, n) for vit, n in WAYS if "x" not in n or n.endswith(tuple(EXTREME))])
def test_a_cut_does_not_depend_on_how_weights_are_scaled(vit, name, method):
    if name.startswith(DIFFERS.get(method, ())):
        pytest.skip("by definition of the method")
    (expected, units), (error, again) = result(vit, "", method), result(vit, name, method)
    assert error == pytest.approx(expected, rel=0.02)
    assert {n: sorted(keep) for n, keep in again.items()} == {n: sorted(keep) for n, keep in units.items()}


@pytest.mark.parametrize("name", ["norms x 64", "stream x 0.015625", "values x 64"])
def test_a_refit_does_not_depend_on_how_weights_are_scaled(name):
    assert result("swiglu", name, "refit")[0] == pytest.approx(result("swiglu", "", "refit")[0], rel=0.02)


def test_a_layer_scale_of_six_decades_is_found_and_the_smallest_is_as_exact():
    model = tiny_vit("layer-scale", depth=1)
    gamma = model.blocks[0].ls2.gamma
    with torch.no_grad():
        gamma.copy_(torch.logspace(-6, 0, len(gamma)))
    (visit,) = walk(model, copy.deepcopy(model), find_mlps(model), CALIBRATION)
    torch.testing.assert_close(visit.scale_D, gamma.detach(), atol=0, rtol=1e-3)


@cache
def trained(vit: str, name: str, how: str) -> float:
    """Error of a cut model after training, relative to that before."""
    model = tiny_vit(vit, depth=2)
    model = rescalings(model)[name](model) if name else model
    student, sites = copy.deepcopy(model), find_mlps(model)
    recipe = Recipe.parse({"keep_ratio": 0.5, "method": "dgmr", "repair": False})
    cut_(student, model, sites, recipe, CALIBRATION, quiet=True)
    before = fidelity(student, model, HELD_OUT)["relative_error"]
    data, context = open_images([(image, -1) for batch in CALIBRATION for image in batch]), RunContext(quiet=True)
    if how == "blockwise":
        options = BlockwiseOptions(num_images=48, batch_size=16, steps=30, train="block")
        recover_blocks_(student, model, find_mlps(student), data, held_out=HELD_OUT, options=options, context=context)
    elif how == "at once":
        options = AtOnceOptions(steps=40, batch_size=16, num_validations=4)
        train_at_once_(student, model, data, held_out=HELD_OUT, options=options, context=context)
    else:
        options = RecoverOptions(steps=80, batch_size=16, num_validations=4)
        recover_(student, model, data, held_out=HELD_OUT, options=options, context=context)
    return fidelity(student, model, HELD_OUT)["relative_error"] / before


@pytest.mark.parametrize("name", ["values x 0.015625", "values x 64"])
def test_block_by_block_sees_gates_and_values_of_one_layer_apart(name):
    assert trained("swiglu", name, "blockwise") == pytest.approx(trained("swiglu", "", "blockwise"), rel=0.02)


@pytest.mark.parametrize("name", ["norms x 64", "stream x 0.015625"])
@pytest.mark.parametrize("how", ["blockwise", "at once", "distillation"])
def test_training_does_not_depend_on_how_weights_are_scaled(how, name):
    after, again = trained("gelu", "", how), trained("gelu", name, how)
    assert not math.isnan(again) and again == pytest.approx(after, rel=0.02)
