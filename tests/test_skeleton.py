"""Hyperformer, a model of vitrim's own: its facts, its places, and how it is loaded and written."""

import json

import pytest
import torch
from torch import nn

import vitrim
from vitrim.errors import ModelError
from vitrim.models.features import features
from vitrim.models.from_vitrim import MODELS
from vitrim.models.load import build_empty, load_model
from vitrim.models.origin import Origin, Reading
from vitrim.models.skeleton import PARENTS, PARTS, Block, Hyperformer, JointAttention, bone_distances
from vitrim.output.load import open_model
from vitrim.output.save import save
from vitrim.surgery import Plan

EMPTY = Plan(edits=(), method="none", options={}, seed=0, versions={})


def tiny(**given):
    torch.manual_seed(0)
    model = Hyperformer(**{"num_heads": 1, "depth": 2, "num_frames": 8, "num_classes": 3, **given})
    for p in model.parameters():  # positions start at zero, where nothing could be told apart
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def test_hyperformer_has_the_layers_and_the_parameters_of_the_paper_in_its_setting_for_nw_ucla():
    model = Hyperformer()
    assert sum(p.numel() for p in model.parameters()) == 2_695_754
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    counts = {}
    for conv in convs:
        key = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups)
        counts[key] = counts.get(key, 0) + 1
    assert counts[216, 216, (1, 1), 1] == 20 and counts[216, 432, (1, 1), 1] == 9
    assert counts[216, 54, (1, 1), 1] == 40 and counts[54, 54, (5, 1), 1] == 20 and counts[216, 216, (1, 1), 6] == 10
    assert len(model.blocks) == 10 and sum(isinstance(module, nn.Linear) for module in model.modules()) == 1


def test_bone_distances_are_those_of_a_walk_along_the_bones():
    edges = {frozenset((joint, parent)) for joint, parent in enumerate(PARENTS) if joint != parent}
    for start in range(20):
        reached, ring = {start: 0}, [start]
        while ring:
            ring = [b for a in ring for b in range(20) if frozenset((a, b)) in edges and b not in reached]
            reached |= {joint: max(reached.values()) + 1 for joint in ring}
        assert [reached[joint] for joint in range(20)] == bone_distances()[start].tolist()


def test_attention_adds_the_terms_of_position_as_written_out_joint_by_joint():
    torch.manual_seed(0)
    layer = JointAttention(24, 48, 2).eval()
    for p in layer.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x, parts = torch.randn(1, 24, 1, 20), torch.randn(1, 48, 1, 20)
    q, kv, hops = layer.q(x)[0, :, 0], layer.kv(x)[0, :, 0], bone_distances()
    mixed = torch.zeros(48, 20)
    for head in range(2):
        rows = slice(24 * head, 24 * head + 24)
        qh, kh, vh, eh = q[rows], kv[:48][rows], kv[48:][rows], parts[0, rows, 0]
        for i in range(20):
            scores = torch.stack(
                [
                    qh[:, i] @ kh[:, j]
                    + qh[:, i] @ eh[:, j]
                    + qh[:, i] @ layer.distance[hops[i, j], rows]
                    + layer.part_weight[head] @ eh[:, j]
                    for j in range(20)
                ]
            )
            weights = layer.alpha * (scores * 24**-0.5).softmax(0) + layer.outer[head, i]
            mixed[rows, i] = vh @ weights
    torch.testing.assert_close(layer(x, parts), layer.proj(mixed[None, :, None]), atol=1e-4, rtol=1e-4)


def test_a_joints_body_part_is_the_mean_over_its_joints():
    block, x = Block(3, 24, 1, 1), torch.randn(2, 3, 4, 20)
    means = torch.stack([x[..., [j for j in range(20) if PARTS[j] == PARTS[i]]].mean(-1) for i in range(20)], -1)
    torch.testing.assert_close(x @ block.same_part_VV, means)


def test_scores_come_from_the_mean_of_the_tokens_and_frames_are_halved_twice():
    model = tiny(depth=8)
    x = torch.randn(2, 3, 8, 20)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 2 * 20, 24) and model(x).shape == (2, 3)
    torch.testing.assert_close(model(x), model.head(tokens.mean(1)))
    found = features(model, x)
    torch.testing.assert_close(found.pooled_BD, tokens.mean(1))
    assert found.patches_BND.shape == tokens.shape


def test_a_model_by_name_is_untrained_and_the_same_each_time_and_takes_arguments():
    model, origin = load_model("vitrim/skeleton-hyperformer-small")
    again = vitrim.load("vitrim/skeleton-hyperformer-small")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert "random" in origin.notes[0] and origin.preprocessing == {"input_size": [3, 32, 20], "skeleton": "joint"}
    other, origin = load_model("vitrim/skeleton-hyperformer-small", reading=Reading(model_args={"num_classes": 4}))
    assert other.num_classes == 4 and build_empty(Origin.from_json(origin.to_json())).num_classes == 4
    assert set(MODELS) >= {"skeleton-hyperformer", "skeleton-hyperformer-small"}


@pytest.mark.parametrize("with_plan", [True, False])
def test_a_folder_holds_config_and_weights_and_loads_by_the_same_doors(tmp_path, with_plan):
    model, origin = load_model("vitrim/skeleton-hyperformer-small", reading=Reading(model_args={"depth": 1}))
    model.head.weight.data.fill_(0.5)
    assert save(tmp_path, model, origin=origin, plan=EMPTY)
    if with_plan:
        assert vitrim.load(tmp_path).head.weight.eq(0.5).all()
    else:
        (tmp_path / "vitrim.json").unlink()
    found, origin = open_model(str(tmp_path))
    assert found.head.weight.eq(0.5).all() and len(found.blocks) == 1 and origin.library == "vitrim"
    assert json.loads((tmp_path / "config.json").read_text())["vitrim_model"] == "skeleton-hyperformer-small"


@pytest.mark.parametrize(
    ("source", "args", "said"),
    [
        ("vitrim/nothing", {}, "vitrim has skeleton-hyperformer"),
        ("vitrim/skeleton-hyperformer", {"colour": 1}, "colour"),
        ("vitrim/skeleton-hyperformer", {"depth": 0}, "depth is 0"),
        ("vitrim/skeleton-hyperformer", {"stream": "skin"}, "use one of joint, bone"),
    ],
)
def test_wrong_names_and_arguments_are_refused_in_one_line(source, args, said):
    with pytest.raises(ModelError, match=said) as caught:
        load_model(source, reading=Reading(model_args=args))
    assert "\n" not in str(caught.value)
