"""Features of a vision encoder, as CLS or pooled vector plus patch tokens, before or after its final norm.

One small adapter for each way in which libraries hand features out: timm's `forward_features`, transformers'
model outputs, and any module that returns a tensor. No foreign `forward` is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrim.errors import ModelError
from vitrim.types import Features

FeaturesAt = Literal["final", "pre_norm"]

FINAL_NORMS = ("norm", "fc_norm", "ln_post", "layernorm", "encoder.layernorm", "encoder.ln", "post_layernorm")


def features(model: nn.Module, images_BCHW: Tensor, *, at: FeaturesAt = "final") -> Features:
    """Run a model on images and return its features.

    Args:
        model: a timm or transformers vision encoder, or a module that returns a (B, D) or (B, N, D) tensor.
        images_BCHW: preprocessed images, on the model's device.
        at: `final` reads the tokens behind the final norm, `pre_norm` in front of it.

    Returns:
        Pooled vector (CLS token where there is one) and patch tokens.

    Raises:
        ModelError: the output holds no tensor of features, or `pre_norm` was asked of a model without final norm.
    """
    if at == "final":
        tokens = _tokens(model, images_BCHW)
        return _pooled(model, tokens, _split(model, tokens))
    norm = final_norm(model)
    if norm is None:
        raise ModelError(f"{type(model).__name__}: no final norm found; use features_at='final'.")
    caught: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        _tokens(model, images_BCHW)
    finally:
        handle.remove()
    return _split(model, caught[-1])


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm that ends the encoder, where it has one with parameters."""
    for name in FINAL_NORMS:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        if any(True for _ in module.parameters()):
            return module
    return None


def logits(model: nn.Module, images_BCHW: Tensor) -> Tensor | None:
    """Class scores (B, classes) for a classifier, None for a model that has no classifier head."""
    if not num_classes(model):
        return None
    output = model(images_BCHW)
    return output if isinstance(output, Tensor) else getattr(output, "logits", None)


def num_classes(model: nn.Module) -> int:
    """Number of classes of the model's head, 0 where it has none."""
    classes = getattr(model, "num_classes", None)
    if classes is None and hasattr(getattr(model, "config", None), "num_labels"):
        has_head = isinstance(getattr(model, "classifier", None), nn.Linear)
        classes = model.config.num_labels if has_head else 0  # type: ignore[union-attr]
    return int(classes or 0)  # type: ignore[arg-type]


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU for a model that has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Hold models in eval mode without gradients, and put every module's mode back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _tokens(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """The model's tokens (B, N, D), or its single vector (B, D)."""
    forward: Callable[[Tensor], Any] = getattr(model, "forward_features", model)
    output = forward(images_BCHW)
    if isinstance(output, dict) and "x_norm_clstoken" in output:  # DINOv2's own code
        parts = (output["x_norm_clstoken"][:, None], output["x_norm_patchtokens"])
        return torch.cat(parts, dim=1)
    for name in ("last_hidden_state", "logits"):
        if isinstance(getattr(output, name, None), Tensor):
            output = getattr(output, name)
    if isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise ModelError(f"{type(model).__name__}: returned {type(output).__name__}; need a tensor of features.")
    if output.ndim == 4:  # Swin: channels last; convolutional stages: channels first
        width = getattr(model, "num_features", output.shape[-1])
        output = output.flatten(1, 2) if output.shape[-1] == width else output.flatten(2).transpose(1, 2)
    return output


def _split(model: nn.Module, tokens: Tensor) -> Features:
    """Tokens into pooled vector and patches, by the model's count of prefix tokens."""
    if tokens.ndim == 2:
        return Features(pooled_BD=tokens)
    if tokens.ndim == 4:
        tokens = tokens.flatten(1, 2)
    num_prefix = num_prefix_tokens(model)
    patches = tokens[:, num_prefix:]
    return Features(pooled_BD=tokens[:, 0] if num_prefix else patches.mean(1), patches_BND=patches)


def _pooled(model: nn.Module, tokens_BND: Tensor, found: Features) -> Features:
    """The vector that a model with attention pooling (SigLIP) really hands out, in place of the mean of its tokens."""
    if getattr(model, "attn_pool", None) is None:
        return found
    pooled_BD = model.forward_head(tokens_BND, pre_logits=True)  # type: ignore[operator]
    return Features(pooled_BD=pooled_BD, patches_BND=found.patches_BND)


def num_prefix_tokens(model: nn.Module) -> int:
    """CLS, distillation and register tokens in front of the patch tokens."""
    if hasattr(model, "num_prefix_tokens"):
        return int(model.num_prefix_tokens)  # type: ignore[arg-type]
    for name, module in model.named_modules():
        found = [getattr(module, key, None) for key in ("cls_token", "class_token", "class_embedding")]
        if any(isinstance(token, Tensor) for token in found):
            registers = getattr(model.get_submodule(name), "register_tokens", None)
            return 1 + (registers.shape[1] if isinstance(registers, Tensor) else 0)
    return 0
