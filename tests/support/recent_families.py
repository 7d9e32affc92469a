"""Rows of the table for encoders of the last two years, and for the backbones of detectors and depth models."""

from __future__ import annotations

from functools import partial

from tests.support.family import HF, HF_VIT, IMAGE, POOLED, SPLIT, VIT, Family, from_timm, hf_family, timm_family

NAFLEX = {key: value for key, value in VIT.items() if key != "img_size"}
RATIO = {**IMAGE, "mlp_ratio": 4}
LAST = {**RATIO, "out_indices": [2]}
DAVIT = {"depths": (1, 1), "embed_dim": (16, 32), "num_heads": (2, 2), "num_groups": (2, 2), "window_size": 4}
DAVIT |= {"patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True)}
DEPTH = {"patch_size": 8, "reassemble_hidden_size": 32, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
DETR = {"d_model": 32, "decoder_layers": 1, "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4}
DETR |= {"decoder_ffn_dim": 32, "num_queries": 4, "group_detr": 1}
SAM = {**HF, "image_size": 64, "patch_size": 16, "mlp_dim": 128}
SAM |= {"output_channels": 16, "window_size": 2, "global_attn_indexes": [1]}
STAGES = {"embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 2, 2, 2]}
STAGES |= {"blocks_per_stage": [1, 1, 1, 2], "window_size_per_stage": [8, 4, 4, 4], "global_attention_blocks": [4]}
STAGES |= {"image_size": [64, 64], "hidden_size": 8, "num_attention_heads": 1}
NECK = {"backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
SAM2 = {
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": {"model_type": "sam2_hiera_det_model", **STAGES},
        "fpn_hidden_size": 16,
        **NECK,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 16},
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
}
HIERA_DET = {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 2), "global_att_blocks": (4,), "num_classes": 0}
OVIS = {  # its tokens come out four in one, and then as shares of visual words
    "vision_config": {**HF_VIT, "vocab_size": 40, "num_visual_indicator_tokens": 5, "hidden_stride": 2},
    "text_config": {**HF, "model_type": "qwen2", "num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 64},
    "visual_indicator_token_ids": [1, 2, 3, 4, 5],
    "image_token_id": 6,
    "hidden_size": 32,
    "vocab_size": 64,
}
VITAMIN = {"img_size": 32, "num_heads": 6, "depth": 1, "num_classes": 5}  # behind its stages of convolutions
ONE_BLOCK = (("blocks.*.mlp", 1),)
GEMMA = {"img_size": 48, "patch_size": 8, "intermediate_size": 128}
LAST_MAP = {"pre_norm": False, "size": 64, "features": (4, 64, 64)}

RECENT_TIMM = (
    timm_family("RADIO v3", "vit_base_patch16_radio_v3", pre_norm=False),
    timm_family("TIPSv2", "vit_base_patch14_reg1_tipsv2"),
    timm_family("EUPE", "vit_tiny_patch16_dinov3_qkvb"),
    timm_family("Perception Encoder (attention pool)", "vit_pe_core_tiny_patch16_384", sites=POOLED),
    Family(
        source="timm",
        name="SAM 2 trunk",
        build=partial(from_timm, "sam2_hiera_tiny", HIERA_DET),
        sites=(("blocks.*.mlp", 5),),
        stock=False,
        **LAST_MAP,
    ),
    timm_family("ViTamin", "vitamin_small_224", VITAMIN, kind=SPLIT, sites=ONE_BLOCK, features=(4, 384, 384)),
    Family(
        source="timm",
        name="Gemma 4",
        build=partial(from_timm, "gemma4_vit_167m_enc", {"embed_dim": 32, "depth": 2, "num_heads": 2, **GEMMA}),
        kind=SPLIT,
        size=48,
        features=(36, 32, 32),
        pre_norm=False,
    ),
    Family(
        source="timm",
        name="MobileCLIP2",
        build=partial(from_timm, "fastvit_mci3", {"layers": (1,) * 5, "embed_dims": (32,) * 5, "num_classes": 5}),
        sites=(("stages.*.blocks.*.mlp", 5),),
        size=64,
        features=(1, 64, 64),
        pre_norm=False,
        stock=False,
    ),
    Family(source="timm", name="NaFlexViT", build=partial(from_timm, "naflexvit_base_patch16_gap", NAFLEX)),
)
RECENT_TRANSFORMERS = (
    hf_family(
        "RADIO",
        "RadioModel",
        {**RATIO, "mlp_ratio": 4.0, "num_cls_tokens": 2, "num_registers": 1, "max_img_size": 32},
        "encoder.layer",
        pre_norm=False,
    ),
    hf_family("TIPSv2 image tower", "Tipsv2VisionModel", RATIO, "encoder.layer"),
    hf_family(
        "AIMv2 image tower",
        "Aimv2VisionModel",
        HF_VIT,
        kind=SPLIT,
        sites=(("encoder.layers.*.ffn", 2),),
        pre_norm=False,
    ),
    hf_family(
        "SAM image encoder",
        "SamVisionModel",
        SAM,
        pre_norm=False,
        size=64,
        features=(16, 16, 16),
    ),
    hf_family(
        "Ovis2",
        "Ovis2Model",
        OVIS,
        kind=SPLIT,
        sites=(("transformer.encoder.layers.*.ffn", 2),),
        features=(4, 128, 128),
        pre_norm=False,
    ),
    hf_family("SAM 2 trunk", "Sam2HieraDetModel", STAGES, sites=(("blocks.*.mlp", 5),), **LAST_MAP),
    hf_family("SAM 2", "Sam2Model", SAM2, sites=(("backbone.blocks.*.mlp", 5),), **LAST_MAP),
    hf_family(
        "SAM 3 trunk",
        "Sam3ViTModel",
        {**HF_VIT, "window_size": 2, "global_attn_indexes": [1], "pretrain_image_size": 32},
        pre_norm=False,
    ),
    hf_family(
        "DaViT in Florence-2",
        "Florence2VisionBackbone",
        DAVIT | {"projection_dim": 32},
        sites=(("blocks.*.*.spatial_block.ffn", 2), ("blocks.*.*.channel_block.ffn", 2)),
        pre_norm=False,
    ),
    hf_family("DINOv2 backbone", "Dinov2Backbone", LAST, "encoder.layer"),
    hf_family("DINOv3 backbone", "DINOv3ViTBackbone", {**HF_VIT, "out_indices": [2]}, "model.layer"),
    hf_family(
        "Depth Anything v2, its backbone",
        "DepthAnythingForDepthEstimation",
        DEPTH
        | {
            "head_hidden_size": 8,
            "backbone_config": {
                "model_type": "dinov2",
                **RATIO,
                "num_hidden_layers": 4,
                "out_indices": [1, 2, 3, 4],
                "reshape_hidden_states": False,
            },
        },
        sites=(("encoder.layer.*.mlp", 4),),
    ),
    hf_family(
        "ViTPose, its backbone",
        "VitPoseForPoseEstimation",
        {
            "use_simple_decoder": True,
            "backbone_config": {
                "model_type": "vitpose_backbone",
                **HF,
                "mlp_ratio": 4,
                "image_size": [32, 32],
                "patch_size": [8, 8],
                "out_indices": [2],
                "num_experts": 1,
            },
        },
        "encoder.layer",
    ),
    hf_family(
        "RF-DETR, its backbone",
        "RfDetrForObjectDetection",
        DETR | {"backbone_config": {"model_type": "rf_detr_dinov2", **LAST, "num_windows": 2}},
        "encoder.layer",
        among_patches=4,  # a class token in each of 2 x 2 windows
    ),
    hf_family(
        "EoMT",
        "EomtForUniversalSegmentation",
        {**RATIO, "num_hidden_layers": 3, "num_blocks": 1, "num_queries": 4, "num_upscale_blocks": 1},
        sites=(("layers.*.mlp", 3),),
    ),
)
