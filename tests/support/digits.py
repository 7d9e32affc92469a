"""The ViT that comes with vitrim, and a recipe that is quick on scikit-learn's digits."""

from __future__ import annotations

from importlib.resources import files

import vitrim

DIGITS = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
FEW = {
    "mlp_ratio": 1,
    "calibrate": {"num_images": 96, "batch_size": 32},
    "repair": {"refit_steps": 10, "max_tokens": 2048},
}


def few(**kwargs):
    return vitrim.Recipe.parse({"model": DIGITS, **FEW, **kwargs})
