"""Names of tensors in files of transformers: those of the hub, which its versions 4 read, too."""

import pytest
import torch
import transformers
from safetensors import safe_open

import vitrim
from tests.support.families import FAMILIES
from vitrim.models.features import first_tensor
from vitrim.models.sites import find_mlps
from vitrim.models.stored_names import stored
from vitrim.output.save import save
from vitrim.surgery import KeepUnits, Plan, apply_

# Names as transformers 4.57 writes them, and the hub has them.
IN_FILES = {
    "ViT: `ViTModel`": ["encoder.layer.0.attention.attention.query.weight", "encoder.layer.1.intermediate.dense.bias"],
    "DINOv2 S, B, L: `Dinov2Model`": ["encoder.layer.0.attention.attention.query.weight"],
    "DINOv3 S, B, L: `DINOv3ViTModel`": ["layer.0.mlp.up_proj.weight"],
    "CLIP image tower: `CLIPVisionModel`": ["vision_model.encoder.layers.0.mlp.fc1.weight"],
    "CLIP, both towers: `CLIPModel`": [
        "vision_model.encoder.layers.0.mlp.fc1.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
    ],
    "SigLIP image tower: `SiglipVisionModel`": ["vision_model.head.mlp.fc1.weight"],
    "BEiT: `BeitModel`": ["encoder.layer.0.attention.attention.query.weight"],
    "Swin: `SwinModel`": ["encoder.layers.0.blocks.0.attention.self.query.weight"],
    "CLIP tower inside a VLM: `LlavaForConditionalGeneration`": [
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "language_model.model.embed_tokens.weight",
    ],
    "BERT (text): `BertModel`": ["encoder.layer.0.intermediate.dense.weight"],
    # Here a file of the hub has value and gate in one tensor, which is more than a name.
    "DINOv2-g: `Dinov2Model`": ["encoder.layer.0.mlp.gate_proj.weight"],
}


@pytest.mark.parametrize("name", IN_FILES)
def test_files_have_the_names_of_the_hub(tmp_path, name):
    family = FAMILIES[f"transformers: {name}"]
    for folder in ("big", "out"):
        (tmp_path / folder).mkdir()
    model, origin = family.build(tmp_path / "big")
    sites = [site.below(origin.encoder) for site in find_mlps(model.get_submodule(origin.encoder))]
    edits = tuple(KeepUnits.first(site, 48 if site.d_hidden == 88 else site.d_hidden // 2) for site in sites)
    apply_(model, edits)
    assert save(tmp_path / "out", model, origin=origin, plan=Plan(edits=edits, method="first"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(IN_FILES[name]) <= {*file.keys()}
    theirs = getattr(transformers, origin.architecture).from_pretrained(tmp_path / "out")
    for loaded in (vitrim.load(tmp_path / "out"), theirs):
        assert torch.equal(*(_output(each, origin.encoder, family.inputs) for each in (loaded, model)))
        assert {*loaded.state_dict()} == {*model.state_dict()}


def _output(model, encoder, inputs):
    with torch.no_grad():
        return first_tensor(model.eval().get_submodule(encoder)(inputs))


def test_the_model_stays_as_it_was(tmp_path):
    """The rules by which transformers saves it hang on it, and are its own."""
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = transformers.ViTModel(config)
    assert len(stored(model, model.state_dict())) == len(model.state_dict())
    assert not hasattr(model, "_weight_conversions")
    model.save_pretrained(tmp_path)
    model = transformers.ViTModel.from_pretrained(tmp_path)
    before = model._weight_conversions
    stored(model, model.state_dict())
    assert model._weight_conversions is before
