"""CLIP-like pairs: an image tower and a text tower whose outputs share one space, and the tokenizer of the text tower.

Supported are pairs of open_clip (`CLIP`, `CustomTextCLIP`) and `CLIPModel` and `SiglipModel` of transformers. Their own
methods are called; no foreign `forward` is copied. Vectors come out in float32, not normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitrim.errors import ModelError
from vitrim.models import from_open_clip
from vitrim.models.features import device_of, features
from vitrim.models.load import tokenizer_of
from vitrim.models.origin import Origin
from vitrim.models.takes import encoder_path

Tokenize = Callable[[Sequence[str]], Tensor]

# Pairs of transformers whose text towers need no attention mask: CLIP reads its text from the left and takes the first
# end token, SigLIP was trained on padded rows.
MODEL_TYPES = ("clip", "siglip")
# What belongs to neither tower, and the image tower's own projection where it stands outside of it.
SHARED = ("logit_scale", "logit_bias")
IMAGE_PROJECTION = "visual_projection"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model with both towers and how it was built; `tokenizer` overrides the model's own."""

    model: nn.Module
    origin: Origin
    tokenizer: Tokenize | None = None

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return device_of(self.model)

    @cached_property
    def tokenize(self) -> Tokenize:
        """Function from strings to token ids (B, N), padded to the length of the text tower.

        Raises:
            ModelError: the model's tokenizer is not known.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        if hasattr(self.model, "encode_text") and self.origin.library == "open_clip":
            return from_open_clip.tokenizer(self.origin)
        if hasattr(self.model, "get_text_features"):
            config: Any = self.model.config
            return _padding(tokenizer_of(self.origin), config.text_config.max_position_embeddings)
        raise ModelError(
            f"{self.origin.name}: its tokenizer is not known; pass tokenizer=, a function from strings to ids (B, N)."
        )

    def embed_texts(self, ids_BN: Tensor) -> Tensor:
        """Return the projected vectors (B, E) of token ids (B, N), with gradients if they are enabled."""
        model: Any = self.model
        ids_BN = ids_BN.to(self.device)
        if hasattr(model, "encode_text"):
            return model.encode_text(ids_BN).float()
        return _vector(model.get_text_features(input_ids=ids_BN)).float()

    def logits(self, images_BE: Tensor, texts_TE: Tensor) -> Tensor:
        """Return similarities (B, T) of unit vectors (B, E) and (T, E), with the model's own scale and bias."""
        scale, bias = scale_and_bias(self.model)
        return scale * images_BE @ texts_TE.T + bias

    def text_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the text tower and its projection, by name."""
        tower = encoder_path(self.model)
        outside = (f"{tower}.", f"{IMAGE_PROJECTION}.")
        named = self.model.named_parameters()
        return {name: p for name, p in named if not name.startswith(outside) and name not in SHARED}


def open_pair(model: nn.Module, origin: Origin, *, tokenizer: Tokenize | None = None) -> Pair:
    """Make a pair of towers from a model and how it was built.

    Args:
        model: the whole model.
        origin: how it was built; says where the tokenizer is.
        tokenizer: function from strings to token ids (B, N) to use instead of the model's own.

    Raises:
        ModelError: vitrim knows no text tower in the model.
    """
    if not is_pair(model):
        raise ModelError(
            f"{origin.name}: {type(model).__name__} has no text tower that vitrim can run; use a pair of open_clip, or "
            "CLIPModel or SiglipModel of transformers."
        )
    return Pair(model=model, origin=origin, tokenizer=tokenizer)


def is_pair(model: nn.Module) -> bool:
    """Whether a model has both towers and vitrim knows how to run them."""
    if hasattr(model, "encode_image") and hasattr(model, "encode_text"):
        return True
    known = getattr(getattr(model, "config", None), "model_type", None) in MODEL_TYPES
    return known and hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def embed_images(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Return the projected vectors (B, E) of images, or the pooled vectors of an image tower that stands alone."""
    parameter = next(model.parameters())
    images_BCHW = images_BCHW.to(parameter.device, parameter.dtype)
    whole: Any = model
    if hasattr(model, "encode_image"):
        return whole.encode_image(images_BCHW).float()
    if hasattr(model, "get_image_features"):
        return _vector(whole.get_image_features(pixel_values=images_BCHW)).float()
    return features(model, images_BCHW).pooled_BD.float()


def scale_and_bias(model: nn.Module) -> tuple[Tensor, Tensor | float]:
    """Return the factor and the offset that a pair applies to similarities; the offset is 0 if it has none."""
    bias = getattr(model, "logit_bias", None)
    return cast(Tensor, model.logit_scale).float().exp(), 0.0 if bias is None else cast(Tensor, bias).float()


def image_projection(model: nn.Module) -> nn.Module | None:
    """Return the projection behind the image tower if it is outside of it (CLIP in transformers), else None."""
    return getattr(model, IMAGE_PROJECTION, None)


def unit(vectors_BE: Tensor) -> Tensor:
    """Return the rows scaled to length 1, in float32."""
    return normalize(vectors_BE.float(), dim=-1)


def _padding(tokenizer: Any, num_tokens: int) -> Tokenize:
    """Wrap a tokenizer of transformers as one function that pads every row to `num_tokens`, as SigLIP was trained."""

    def tokenize(texts: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": num_tokens, "return_tensors": "pt"}
        return tokenizer(list(texts), **options)["input_ids"]

    return tokenize


def _vector(output: Any) -> Tensor:
    """Return the vector in an output: transformers 4 returns it directly, 5 inside an object."""
    return output if isinstance(output, Tensor) else output.pooler_output
