"""The flagship on the real thing: the ViT trained on CIFAR-10 in ../shared."""

from pathlib import Path

import pytest

import vitrim
from vitrim.data import open_images

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL, DATA = SHARED / "models" / "cifar10-vit", SHARED / "data" / "cifar10"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not (MODEL.exists() and DATA.exists()), reason="../shared holds no CIFAR-10 ViT here"),
]


def test_half_of_a_real_vit_goes_and_its_features_stay():
    recipe = vitrim.Recipe.parse(
        {"mlp_ratio": 1, "calibrate": {"num_images": 256}, "repair": {"refit_steps": 10, "max_tokens": 8192}}
    )
    ours = vitrim.compress(
        f"local-dir:{MODEL}", data=open_images(DATA / "train.parquet", limit=400), recipe=recipe, quiet=True
    )
    paper = vitrim.compress(f"local-dir:{MODEL}", method="dgmr-paper", mlp_ratio=1, quiet=True)
    test = DATA / "test.parquet"
    scores = [
        vitrim.evaluate(model, f"local-dir:{MODEL}", test, limit=500, latency=False)
        for model in (ours.model, paper.model)
    ]
    assert scores[0].student.cost.parameters < 0.51 * scores[0].teacher.cost.parameters
    assert scores[0].fidelity["relative_error"] < 0.02 < scores[1].fidelity["relative_error"]
    assert scores[0].student.scores["top1"] > scores[0].teacher.scores["top1"] - 2 > scores[1].student.scores["top1"]
