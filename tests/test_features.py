"""Where features are read in each kind of model: the encoder's own tokens, whatever head stands behind them."""

from __future__ import annotations

from functools import cache

import pytest
import timm
import torch
from torch import Tensor, nn

import vitrim
from tests.support.pairs import OPEN_CLIP
from vitrim.errors import ModelError
from vitrim.models.features import features, logits, num_classes
from vitrim.models.takes import encoder_path

HF = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32}
HF |= {"patch_size": 8}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
TIMM_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

# Class, config, where the pooled vector is read, where the patches are, their number, classes of the head.
TRANSFORMERS = {
    "ViTModel": ("ViT", HF, "token 0 of last_hidden_state", "tokens 1 and on of last_hidden_state", 16, 0),
    "ViTForImageClassification": ("ViT", HF, "token 0 of {}vit", "tokens 1 and on of {}vit", 16, 2),
    "ViTForMaskedImageModeling": ("ViT", HF, "token 0 of {}vit", "tokens 1 and on of {}vit", 16, 0),
    "DeiTModel": ("DeiT", HF, "token 0 of last_hidden_state", "tokens 2 and on of last_hidden_state", 16, 0),
    "DeiTForImageClassification": ("DeiT", HF, "token 0 of {}deit", "tokens 2 and on of {}deit", 16, 2),
    "DeiTForImageClassificationWithTeacher": ("DeiT", HF, "token 0 of {}deit", "tokens 2 and on of {}deit", 16, 2),
    "Dinov2Model": ("Dinov2", HF, "pooler_output", "tokens 1 and on of last_hidden_state", 16, 0),
    "Dinov2ForImageClassification": ("Dinov2", HF, "pooler_output", "tokens 1 and on of {}dinov2", 16, 2),
    "Dinov2WithRegistersModel": (
        "Dinov2WithRegisters",
        HF,
        "pooler_output",
        "tokens 5 and on of last_hidden_state",
        16,
        0,
    ),
    "DINOv3ViTModel": ("DINOv3ViT", HF, "pooler_output", "tokens 1 and on of last_hidden_state", 16, 0),
    "CLIPVisionModel": ("CLIPVision", HF, "pooler_output", "tokens 1 and on of last_hidden_state", 16, 0),
    "CLIPVisionModelWithProjection": ("CLIPVision", HF, "pooler_output", "tokens 1 and on of last_hidden_state", 16, 0),
    "SiglipVisionModel": ("SiglipVision", HF, "pooler_output", "last_hidden_state", 16, 0),
    "Aimv2VisionModel": ("Aimv2Vision", HF, "pooler_output", "last_hidden_state", 16, 0),
    "BeitModel": ("Beit", HF, "pooler_output", "tokens 1 and on of last_hidden_state", 16, 0),
    "BeitForImageClassification": ("Beit", HF, "pooler_output", "tokens 1 and on of {}beit", 16, 2),
    "BeitForMaskedImageModeling": ("Beit", HF, "token 0 of {}beit", "tokens 1 and on of {}beit", 16, 0),
    "SwinModel": ("Swin", SWIN, "pooler_output", "last_hidden_state", 16, 0),
    "SwinForImageClassification": ("Swin", SWIN, "pooler_output", "{}swin", 16, 2),
    "ConvNextModel": ("ConvNext", CONVNEXT, "pooler_output", "last_hidden_state", 1, 0),
    "ConvNextForImageClassification": ("ConvNext", CONVNEXT, "pooler_output", "{}convnext", 1, 2),
}
OTHERS = {
    "vit_tiny_patch16_224": (TIMM, "token 0 of forward_features", "tokens 1 and on of forward_features", 16, 5),
    "deit_tiny_distilled_patch16_224": (
        TIMM,
        "token 0 of forward_features",
        "tokens 2 and on of forward_features",
        16,
        5,
    ),
    "beit_base_patch16_224": (TIMM, "token 0 of forward_features", "tokens 1 and on of forward_features", 16, 5),
    "eva02_tiny_patch14_224": (TIMM, "token 0 of forward_features", "tokens 1 and on of forward_features", 16, 5),
    "vit_base_patch16_siglip_224": (
        TIMM | {"num_classes": 0},
        "forward_head, attention pool",
        "forward_features",
        16,
        0,
    ),
    "swin_tiny_patch4_window7_224": (TIMM_SWIN, "mean over forward_features", "forward_features", 16, 1000),
    "convnext_atto": ({}, "mean over forward_features", "forward_features", 1, 1000),
    "open_clip": ({}, "the tower's output, projected", "its tokens before the projection", 16, 0),
}


@cache
def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name in TRANSFORMERS:
            transformers = pytest.importorskip("transformers")
            config, values, *_ = TRANSFORMERS[name]
            if name in ("BeitForMaskedImageModeling",):
                values = values | {"vocab_size": 64}
            return getattr(transformers, name)(getattr(transformers, f"{config}Config")(**values)).eval()
        if name == "open_clip":
            return pytest.importorskip("open_clip").CLIP(**OPEN_CLIP).eval()
        return timm.create_model(name, **OTHERS[name][0]).eval()


@pytest.mark.parametrize("name", [*TRANSFORMERS, *OTHERS])
def test_what_is_taken_is_the_encoders_and_is_said(name):
    *_, pooled, patches, count, classes = (TRANSFORMERS | OTHERS)[name]
    model = built(name)
    encoder = model.get_submodule(encoder_path(model))
    with torch.no_grad():
        found = features(encoder, IMAGES)
    expected = f"pooled: {pooled}; patches: {patches}".replace("{}", "last_hidden_state of ")
    assert found.taken == expected and num_classes(encoder) == classes
    assert found.patches_BND is not None and found.patches_BND.shape[:2] == (3, count)
    if name != "open_clip":  # whose pooled vector is projected
        assert found.patches_BND.shape[2] == found.pooled_BD.shape[1] and found.pooled_BD.shape[1] > 5


def test_two_heads_of_deit_give_tokens_as_features_and_their_mean_as_scores():
    model = built("DeiTForImageClassificationWithTeacher")
    with torch.no_grad():
        tokens: Tensor = model.deit(IMAGES).last_hidden_state
        found, scores = features(model, IMAGES), logits(model, IMAGES)
        wanted = (model.cls_classifier(tokens[:, 0]) + model.distillation_classifier(tokens[:, 1])) / 2
    assert torch.equal(found.pooled_BD, tokens[:, 0]) and torch.equal(found.patches_BND, tokens[:, 2:])
    assert scores is not None and torch.allclose(scores, wanted)


def test_an_encoder_that_gives_no_patches_has_a_pooled_vector_alone():
    pit = timm.create_model("pit_ti_224", img_size=32, patch_size=8, depth=(1, 1, 1), heads=(2, 2, 2)).eval()
    found = features(pit, IMAGES)
    assert found.patches_BND is None and found.taken == "pooled: token 0 of forward_features"
    assert torch.equal(found.pooled_BD, pit.forward_features(IMAGES)[:, 0])


def test_inspect_says_where_features_are_read():
    found = vitrim.inspect(built("DeiTForImageClassificationWithTeacher"))
    assert found.features == (
        "features: pooled: token 0 of last_hidden_state of deit; patches: tokens 2 and on of last_hidden_state of deit"
    )
    assert found.to_json()["features"] == found.features and found.features in found.summary()


def masked(ratio: float) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.ViTMAEModel(transformers.ViTMAEConfig(**HF, mask_ratio=ratio)).eval()


class Untouched(torch.utils.data.Dataset):
    """Images that must not be read."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        raise AssertionError("an image was read")


@pytest.mark.parametrize("ratio", [0.75, 0.0])
def test_an_encoder_that_masks_at_random_is_refused_before_the_first_image(ratio):
    """Without a mask the patches are still shuffled."""
    model = masked(ratio)
    for use in (
        lambda: vitrim.compress(model, data=Untouched(), method="dgmr", mlp_ratio=1, quiet=True),
        lambda: vitrim.compress(model, method="magnitude", mlp_ratio=1, quiet=True),
        lambda: vitrim.evaluate(model, model, Untouched(), limit=3),
        lambda: vitrim.leaderboard(model, data=Untouched(), methods=["magnitude"], quiet=True),
        lambda: vitrim.prune_(model, "dgmr", [IMAGES], mlp_ratio=1),
    ):
        with pytest.raises(ModelError, match=r"is random: two runs .* by \d+% .*load it as ViTModel"):
            use()


def test_file_to_file_too_and_the_way_out_that_is_named_works(tmp_path):
    transformers = pytest.importorskip("transformers")
    masked(0.75).save_pretrained(tmp_path / "mae")
    options = {"data": [image for image in IMAGES], "method": "dgmr", "mlp_ratio": 1, "quiet": True}
    with pytest.raises(ModelError, match="is random"):
        vitrim.prune_checkpoint(str(tmp_path / "mae"), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["mae"]
    same = transformers.ViTModel.from_pretrained(tmp_path / "mae").eval()  # with a pooler, as transformers loads it
    assert vitrim.compress(same, method="magnitude", mlp_ratio=1, quiet=True).metrics.stock


class Mixing(nn.Module):
    """An encoder of one MLP that takes the mean of the batch away."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return (tokens + self.mlp(tokens - tokens.mean(0))).mean(1)


def test_an_encoder_that_mixes_the_images_of_a_batch_is_refused():
    torch.manual_seed(0)
    model = Mixing()
    with pytest.raises(ModelError, match=r"depend on the others in its batch \(they differ by \d+%\)"):
        vitrim.compress(model, data=IMAGES, method="magnitude", mlp_ratio=1, quiet=True)
    with pytest.raises(ModelError, match="depend on the others"):
        vitrim.prune_(model, "magnitude", [IMAGES], mlp_ratio=1)
