"""What a run says beforehand that it will take, against counts of what it does."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from tests.support.rescaled import images, tiny_vit
from vitrim import compress
from vitrim.compression.ahead import Ahead
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.cost.count import count_macs
from vitrim.models.sites import find_mlps
from vitrim.types import AttentionSite, MlpSite


def site(number: int) -> MlpSite:
    block = f"blocks.{number}"
    names = {"path": f"{block}.mlp", "value": f"{block}.mlp.fc1", "output": f"{block}.mlp.fc2", "block": block}
    return MlpSite(kind="plain", d_model=10, d_hidden=40, **names)


def ahead(**values) -> Ahead:
    sites = [site(0), site(1)]
    known = {"sites": sites, "widths": {s.path: 20 for s in sites}, "tokens": {s.path: 5.0 for s in sites}}
    return Ahead(**{**known, "macs": 50_000, "num_images": 100, "num_views": 1, "num_train": 200, **values})


SUMS = 2 * 5 * (40 * 40 / 2 + 2 * 40 * 10) / 50_000  # of an image, in passes
NO_FEEDBACK = {"repair": {"refit": False, "feedback": 0}}


@pytest.mark.defaults
@pytest.mark.parametrize(
    ("recipe", "passes"),
    [
        ({"effort": "fast"}, [100 * (3 + SUMS)]),
        (NO_FEEDBACK, [100 * (3 + 2 * 5 * (40 * 40 / 2 + 40 * 10) / 50_000)]),
        ({"repair": False}, []),
        ({}, [100 * (3 + SUMS), 3 * 300 * 4096 * 2 * (2 * 10 * 20) / 50_000]),
        ({"repair": False, "at_once": {"steps": 7, "batch_size": 4, "lr": 0.01}}, [4 * 7 * 4]),
        ({"repair": False, "at_once": {"steps": 7, "batch_size": 4}}, [4 * 7 * 4 * 1.1]),
        ({"repair": False, "recover": {"epochs": 2, "batch_size": 20, "lr": 1e-3}}, [4 * 2 * 200]),
        ({"repair": False, "blockwise": {"steps": 9, "batch_size": 8, "train": "block"}}, [3 * 200 + 3 * 9 * 8]),
        ({"repair": False, "blockwise": {"steps": 9, "batch_size": 8}}, [600 + 3 * 72 * 2 * 5 * 400 / 50_000]),
    ],
)
def test_stages_are_counted(recipe, passes):
    assert [stage.passes for stage in ahead().stages(Recipe.parse(recipe))] == pytest.approx(passes)


def test_views_multiply_the_closed_form_alone():
    fit, refit = ahead(num_views=3).stages(Recipe.parse({}))
    assert fit.passes == pytest.approx(300 * (3 + SUMS)) and "100 images in 3 views" in fit.words
    assert refit == list(ahead().stages(Recipe.parse({})))[1]


def test_cuts_that_are_tried_are_counted_each():
    recipe = Recipe.parse({"recover": {"epochs": 1, "batch_size": 20, "lr": 1e-3}})
    once, tried = (list(ahead(num_cuts=number).stages(recipe)) for number in (1, 5))
    assert [stage.passes for stage in tried] == [5 * once[0].passes, 5 * once[1].passes, once[2].passes]
    assert tried[0].words == f"{once[0].words}, up to 5 times"


class Counted:
    """Images that pass through a block."""

    def __init__(self, block: torch.nn.Module) -> None:
        self.num_images = 0
        block.register_forward_hook(self._see)

    def _see(self, _, args, __) -> None:
        self.num_images += len(args[0])


def test_a_cut_takes_the_passes_that_were_said():
    batches, model = images(320, 1), tiny_vit("gelu", depth=3)
    student = copy.deepcopy(model)
    theirs, mine = Counted(model.blocks[1]), Counted(student.blocks[1])
    recipe = Recipe.parse({"keep_ratio": 0.5, "repair": {"refit": False}})
    cut_(student, model, find_mlps(model), recipe, batches, quiet=True, halves=True)
    probes = 5 * len(batches[0])  # of the layer scale, and of the order of blocks
    assert 320 <= theirs.num_images <= 320 + probes and 640 <= mine.num_images <= 640 + probes


def test_a_run_says_it_before_the_cut_and_is_quiet_where_asked(caplog):
    caplog.set_level(logging.INFO, logger="vitrim")
    model = tiny_vit("gelu", depth=1)
    given = {"data": torch.cat(images(64, 3)), "recipe": {"keep_ratio": 0.5, "effort": "fast", "device": "cpu"}}
    compress(model, **given, quiet=True)
    assert "ahead" not in caplog.text
    compress(model, **given)
    (line,) = [line for line in caplog.messages if line.startswith("ahead")]
    (mlp,) = find_mlps(model)
    num_tokens = model.pos_embed.shape[1]
    rows, columns = num_tokens * mlp.d_hidden, mlp.d_hidden / 2 + 2 * mlp.d_model
    sums = rows * columns / count_macs(model, torch.zeros(1, 3, 16, 16))
    total = f"{(3 + sums) * 2 / 4:.1f}"
    assert line.startswith(
        f"ahead: as much work as {total} epochs of distillation, each of which would run the original"
    )
    what = f"closed-form repair of 1 MLPs (3 passes over 58 images in 2 views, and sums worth {sums:.1f} more)"
    assert line.endswith(f"Of these {total} for the {what}.")


def test_attention_counts_where_it_is_cut():
    names = {"query": "a.qkv", "key": "a.qkv", "value": "a.qkv", "output": "a.proj", "fused": True, "as_tuple": False}
    heads = AttentionSite(path="a", **names, d_model=10, num_heads=2, head_dim=5, scale=1.0)
    counted = ahead(attentions=[heads], tokens={"a": 5.0, site(0).path: 5.0, site(1).path: 5.0})
    values, logits = 5 * 10 * (5 + 2 * 10) / 50_000, 5 * 10 * 4 * 5 / 50_000
    for options, expected in (
        ({"parts": "both"}, 3 + 4 + SUMS + values + logits),
        ({"parts": "attention"}, 3 + 4 + values + logits),
        ({"parts": "both", "heads": "whole"}, 3 + 2 + SUMS + values),
        ({}, 3 + SUMS),
    ):
        fit, *_ = counted.stages(Recipe.parse({"effort": "fast", "options": options}))
        assert fit.passes == pytest.approx(100 * expected)
        assert ("1 attentions" in fit.words) == bool(options) and ("2 MLPs" in fit.words) == (
            options.get("parts") != "attention"
        )
