"""How many tokens stand in front of the patches, as a model's run shows: held to what its own code gives."""

import pytest
import timm
import torch
from torch import Tensor, nn

from vitrim.errors import ModelError
from vitrim.models.features import features
from vitrim.models.prefix import Prefix, num_prefix_tokens

HF = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32}
HF |= {"patch_size": 8}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
# Class, config, tokens in front, patches.
TRANSFORMERS = {
    "ViTModel": ("ViT", HF, 1, 16),
    "DeiTModel": ("DeiT", HF, 2, 16),
    "BeitModel": ("Beit", HF, 1, 16),
    "Dinov2Model": ("Dinov2", HF, 1, 16),
    "Dinov2WithRegistersModel": ("Dinov2WithRegisters", HF, 5, 16),
    "DINOv3ViTModel": ("DINOv3ViT", HF | {"num_register_tokens": 4}, 5, 16),
    "CLIPVisionModel": ("CLIPVision", HF, 1, 16),
    "SiglipVisionModel": ("SiglipVision", HF, 0, 16),
    "Aimv2VisionModel": ("Aimv2Vision", HF, 0, 16),
    "SwinModel": (
        "Swin",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        0,
        16,
    ),
    "HieraModel": (
        "Hiera",
        {"image_size": [32, 32], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1}
        | {"patch_size": [7, 7], "patch_stride": [4, 4], "masked_unit_size": [4, 4], "query_stride": [2, 2]},
        0,
        16,
    ),
    "CvtModel": (
        "Cvt",
        {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "cls_token": [False, False, True]},
        0,
        4,
    ),
    "Llama4VisionModel": (
        "Llama4Vision",
        HF
        | ROPE
        | {"intermediate_size": 128, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 32, "projector_output_dim": 32},
        0,
        4,
    ),
}
TIMM = {
    "vit_tiny_patch16_224": ({"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}, 1),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "patch_size": 8, "depth": 1}, 2),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 28, "depth": 1, "embed_dim": 48, "num_heads": 2}, 5),
}


def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name in TIMM:
            return timm.create_model(name, num_classes=0, **TIMM[name][0]).eval()
        transformers = pytest.importorskip("transformers")
        config, values, *_ = TRANSFORMERS[name]
        module = (
            getattr(transformers, name, None) or pytest.importorskip("transformers.models.llama4").Llama4VisionModel
        )
        return module(getattr(transformers, f"{config}Config")(**values)).eval()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_it_is_what_the_librarys_own_code_puts_in_front(name):
    model, (*_, front, patches) = built(name), TRANSFORMERS[name]
    before = dict(model.__dict__), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        found = features(model, IMAGES)
    assert (found.num_prefix, found.patches_BND.shape[1]) == (front, patches)
    assert num_prefix_tokens(model) == front
    assert model.__dict__ == before[0] and all(
        torch.equal(model.state_dict()[key], value) for key, value in before[1].items()
    )


@pytest.mark.parametrize("name", TIMM)
def test_it_is_what_timm_says(name):
    model = built(name)
    size = model.patch_embed.img_size
    prefix = Prefix(model, "final")
    with torch.no_grad():
        assert features(model, IMAGES[..., : size[0], : size[1]]).num_prefix == model.num_prefix_tokens == TIMM[name][1]
    del model.num_prefix_tokens  # and what is seen when it does not say so
    with torch.no_grad(), prefix.watched():
        tokens = model.forward_features(IMAGES[..., : size[0], : size[1]])
    assert prefix.number(tokens.shape[1]) == TIMM[name][1]


class Written(nn.Module):
    """A ViT of no block, whose class token, under a name of its own, stands in front, behind, or leaves at the end."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.summary, self.grid = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(1, 17, 8))
        self.register_buffer("waves", torch.randn(1, 17, 8))
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).mT
        if self.place == "added":
            own = self.summary.view(1, 1, 8) + self.grid[:, :1] + torch.zeros(len(images), 1, 8) + self.waves[:, :1]
            tokens = torch.cat([own, patches + self.grid[:, 1:]], dim=1)
        elif self.place == "copied":
            tokens = torch.concat(tensors=(self.summary.repeat(len(images), 1, 1), patches), dim=-2) + self.grid
        elif self.place == "image":  # made of the image, so it is no token of the model's own
            tokens = torch.cat([patches.mean(1, keepdim=True) + self.summary, patches], dim=1)
        else:
            tokens = torch.cat([patches, self.summary.expand(len(images), 1, 8)], dim=1)
        if self.place == "later":  # a CLS token in front of registers that were put there first
            tokens = torch.cat([self.waves[:, :3].expand(len(images), -1, -1), patches], dim=1)
            tokens = torch.cat([self.summary.expand(len(images), 1, 8), tokens], dim=1)
        tokens = tokens + self.mix(tokens, tokens, tokens, need_weights=False)[0]
        return tokens[:, 1:] if self.place == "dropped" else tokens


@pytest.mark.parametrize(
    ("place", "front"), [("added", 1), ("copied", 1), ("image", 0), ("behind", 0), ("later", 4), ("dropped", 0)]
)
def test_a_hand_written_model_is_looked_at_as_it_runs(place, front):
    torch.manual_seed(0)
    model = Written(place)
    with torch.inference_mode():
        first, larger = features(model, IMAGES), features(model, IMAGES)
        tokens = model(IMAGES)
    assert first.num_prefix == larger.num_prefix == front
    assert torch.equal(first.patches_BND, tokens[:, front:])
    assert torch.equal(first.pooled_BD, tokens[:, 0] if front else tokens.mean(1))


def test_it_is_kept_for_images_of_other_sizes_and_is_not_known_before_a_run():
    model = built("ViTModel")
    with pytest.raises(ModelError, match="where patches begin shows when it runs"):
        num_prefix_tokens(model)
    with torch.no_grad():
        features(model, IMAGES)
        model.config.image_size, forward = 64, model.forward
        model.forward = lambda images: forward(images, interpolate_pos_encoding=True)
        found = features(model, torch.randn(1, 3, 64, 64))
    assert found.num_prefix == 1 and found.patches_BND.shape[1] == 64


def test_it_is_seen_without_weights():
    model = built("Dinov2WithRegistersModel").to("meta")
    with torch.inference_mode():
        assert features(model, IMAGES.to("meta")).num_prefix == 5
