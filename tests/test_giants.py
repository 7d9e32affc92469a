"""The giants, counted on the meta device: published sizes, MACs by hand, the page, and what looking at one costs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

from vitrim.cost.count import count_macs, num_parameters

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("giants", ROOT / "benchmarks" / "giants.py")
assert SPEC is not None and SPEC.loader is not None
giants = sys.modules["giants"] = importlib.util.module_from_spec(SPEC)  # dataclasses look their module up there
SPEC.loader.exec_module(giants)
RESULT = json.loads((ROOT / "benchmarks" / "results" / "giants.json").read_text())
# billions of parameters: uncut, and with every hidden layer cut to the model width
KNOWN = {
    "EVA-CLIP-E": (4.349, 1.236),
    "OpenCLIP-G": (1.843, 0.800),
    "OpenCLIP-g": (1.011, 0.478),
    "DINOv2-g": (1.137, 0.663),
    "EVA-CLIP-8B": (7.5, 3.226),
}
SMALL = {
    "vit_tiny_patch16_224": giants.Giant(source="timm/vit_tiny_patch16_224", patch=16, width=192, depth=12, hidden=768),
    "vit_small_plus_patch16_dinov3": giants.Giant(  # gated, with registers and rotary positions
        source="timm/vit_small_plus_patch16_dinov3",
        patch=16,
        width=384,
        depth=12,
        hidden=1536,
        gated=True,
        num_prefix=5,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_the_published_ones_and_those_in_the_results(name):
    model, counted, (uncut, cut) = giants.build(giants.GIANTS[name]), RESULT["table"][name]["parameters"], KNOWN[name]
    assert num_parameters(model) == counted["uncut"] == pytest.approx(uncut * 1e9, rel=0.005)
    giants.cut_to_(model, 1)
    assert num_parameters(model) == counted["r1"] == pytest.approx(cut * 1e9, rel=0.005)


def test_internvit_has_the_parameters_that_its_model_card_gives():
    model = giants.build(giants.GIANTS["InternViT-6B"])
    assert round(num_parameters(model) / 1e6) == 5903


@pytest.mark.parametrize("name", SMALL)
def test_macs_of_a_small_model_are_the_same_on_meta_on_the_cpu_and_by_hand(name):
    giant = SMALL[name]
    expected, products = giants.closed_form_macs(giant, giant.hidden)
    images = torch.zeros(1, 3, 224, 224)
    assert count_macs(giants.build(giant), images) == expected
    assert count_macs(timm.create_model(name, num_classes=0, img_size=224), images) == expected
    assert products > 0.01 * expected  # a counter that missed attention would have been noticed


@pytest.mark.parametrize("name", ["EVA-CLIP-E", "DINOv2-g", "SigLIP so400m"])
def test_macs_of_a_giant_are_those_by_hand_and_those_in_the_results(name):
    giant, counted = giants.GIANTS[name], RESULT["table"][name]
    found = giants.measure(giant)
    assert found == {key: value for key, value in counted.items() if key != "inspect"}
    for key, hidden in (("uncut", giant.hidden), ("r2", 2 * giant.width), ("r1", giant.width)):
        assert found["macs"][key] == pytest.approx(giants.closed_form_macs(giant, hidden)[0], rel=giants.TOLERANCE)


def test_a_wrong_closed_form_is_an_error():
    with pytest.raises(ArithmeticError, match="closed form"):
        giants.measure(giants.Giant(source="timm/vit_tiny_patch16_224", patch=16, width=192, depth=11, hidden=768))


def test_the_page_shows_what_the_benchmark_wrote():
    page = (ROOT / "docs" / "giants.md").read_text()
    assert RESULT["table"].keys() == giants.GIANTS.keys()
    for part in giants.markdown(RESULT).split("\n\n"):
        assert part in page
    assert {"command", "machine", "torch", "timm", "transformers", "time", "seed"} <= RESULT["environment"].keys()


def test_disagreements_are_named_and_agreement_is_not():
    said = giants.disagreements(RESULT)
    assert "**OpenCLIP-g**: 52.8% fewer parameters" in said
    assert "**DINOv2-g**: 41.6% fewer parameters" in said
    assert "**EVA-CLIP-E**: 71.6% fewer parameters" in said
    agreeing = {
        "EVA-CLIP-E": {
            "parameters": {"uncut": 4_350_000_000, "r1": 1_239_750_000},
            "macs": {"uncut": 1_115_000_000_000, "r1": 317_775_000_000},
            "attention_product_macs": 0,
        }
    }
    assert giants.disagreements({"table": agreeing}) == ""
    agreeing["EVA-CLIP-E"]["parameters"] = {"uncut": 4_400_000_000, "r1": 1_100_000_000}
    assert [line.split(": ", 1)[1] for line in giants.disagreements({"table": agreeing}).split("\n")] == [
        "4.40B parameters; the paper writes 4.35B.",
        "4.00 times smaller at r = 1; the paper writes 3.5.",
        "75.0% fewer parameters at r = 1; the abstract says 71.5% of parameters and of FLOPs.",
    ]


def test_inspecting_the_largest_clip_tower_takes_less_than_a_gibibyte():
    name = "EVA-CLIP-E"
    command = [sys.executable, "-c", "from vitrim.cli import main; main()", "inspect", giants.GIANTS[name].source]
    run = giants.run_measured([*command, "--json"])
    assert run["peak_mib"] < 1024
    found, counted = json.loads(run["output"]), RESULT["table"][name]["parameters"]
    predicted = {row["mlp_ratio"]: row["parameters"] for row in found["predicted"] if "mlp_ratio" in row}
    for ratio, key in ((2.0, "r2"), (1.0, "r1")):  # what goes does not depend on the projection that timm adds
        assert found["parameters"]["total"] - predicted[ratio] == counted["uncut"] - counted[key]
