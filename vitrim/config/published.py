"""The schedules of the DGMR paper's own configs, which `schedule: published` fills in.

They give a rate for 256 images a step and one process's batch; on how many GPUs the paper trained is not published, so
the batch here is that of one. Its pure bf16 weights are not followed: parameters stay in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ALL = {"weight_decay": (0.04, 0.2), "warmup_ratio": 0.1, "epochs": 10.0, "flip": True}

# By the family of the image tower. Two of the ten epochs of EVA-CLIP-E's config warm up.
RECOVERY: Mapping[str, Mapping[str, Any]] = {
    "dinov2": {**_ALL, "batch_size": 64, "base_lr": 7.5e-6, "min_lr": 1e-7, "ema": 0.997, "augment": "dinov2"},
    "openclip": {**_ALL, "batch_size": 40, "base_lr": 1e-4, "min_lr": 1e-6, "augment": "clip"},
    "eva-clip": {
        **_ALL,
        "batch_size": 40,
        "base_lr": 6e-5,
        "min_lr": 1e-6,
        "warmup_ratio": 0.2,
        "augment": "clip",
        "features_at": "pre_norm",
    },
}

# Tuning of the text tower of EVA-CLIP-E. How many of its epochs warm up is not known.
TEXT: Mapping[str, Any] = {
    "epochs": 20.0,
    "batch_size": 320,
    "lr": 1e-6,
    "min_lr": 1e-7,
    "weight_decay": (0.04, 0.2),
}


def family_of(architecture: str, library: str | None) -> str:
    """Return whose schedule a model takes: that of the paper's CLIP towers if it is one, else that of DINOv2."""
    name = architecture.lower()
    if library != "open_clip" and not any(part in name for part in ("clip", "siglip")):
        return "dinov2"
    return "eva-clip" if "eva" in name else "openclip"


def filled(published: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return published values with the given ones in their place; a given length or rate replaces theirs whole."""
    for one in ({"steps", "epochs"}, {"lr", "base_lr"}):
        if any(given.get(name) is not None for name in one):
            published = {name: value for name, value in published.items() if name not in one}
    return {**published, **given}
