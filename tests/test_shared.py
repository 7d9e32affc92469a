"""The flagship on the real thing: the ViT trained on CIFAR-10 in ../shared."""

from pathlib import Path

import pytest

import vitrim

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL, DATA = SHARED / "models" / "cifar10-vit", SHARED / "data" / "cifar10"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not (MODEL.exists() and DATA.exists()), reason="../shared holds no CIFAR-10 ViT here"),
]


def test_half_of_a_real_vit_goes_and_its_features_stay():
    recipe = vitrim.Recipe.parse({"calibrate": {"num_images": 400}, "repair": {"refit_steps": 40, "max_tokens": 16384}})
    ours = vitrim.compress(f"local-dir:{MODEL}", data=DATA / "train.parquet", recipe=recipe, quiet=True)
    paper = vitrim.compress(f"local-dir:{MODEL}", method="dgmr-paper", quiet=True)
    test = DATA / "test.parquet"
    scores = [
        vitrim.evaluate(model, f"local-dir:{MODEL}", test, limit=1000, latency=False)
        for model in (ours.model, paper.model)
    ]
    assert scores[0]["student"]["parameters"] < 0.51 * scores[0]["teacher"]["parameters"]
    assert scores[0]["fidelity"]["relative_error"] < 0.02 < scores[1]["fidelity"]["relative_error"]
    assert scores[0]["student"]["top1"] > scores[0]["teacher"]["top1"] - 2 > scores[1]["student"]["top1"]
