"""The model that ships with vitrim: small, loads with stock timm, and as accurate as its README says."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_model_data_config

import vitrim

ASSET = Path(vitrim.__file__).parent / "assets" / "digits-vit"


@pytest.fixture(scope="module")
def model():
    return timm.create_model(f"local-dir:{ASSET}", pretrained=True).eval()


def test_files_are_small():
    assert {path.name for path in ASSET.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert (ASSET / "model.safetensors").stat().st_size < 2_000_000


def test_loads_in_float32_with_the_weights_of_the_file(model):
    stored = load_file(ASSET / "model.safetensors")
    loaded = model.state_dict()
    assert stored.keys() == loaded.keys()
    for name, value in loaded.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[name].float()), name
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]


def test_is_as_accurate_as_its_readme_says(model):
    match = re.search(r"top-1 accuracy ([\d.]+)%", (ASSET / "README.md").read_text())
    assert match is not None
    claimed = float(match[1])
    assert claimed >= 96
    digits = load_digits()
    pixels = np.rint(digits.images[-360:] * (255 / 16)).astype(np.uint8)
    transform = create_transform(**resolve_model_data_config(model))
    images = torch.stack([transform(Image.fromarray(image).convert("RGB")) for image in pixels])
    assert images.shape == (360, 3, 32, 32)
    with torch.no_grad():
        found = model(images).argmax(dim=1).numpy()
    assert 100 * (found == digits.target[-360:]).mean() >= claimed - 0.3
