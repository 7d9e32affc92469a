"""Builds the space in which the image tower of a pair is distilled: behind its projection, and beside a bank of texts.

The bank is any text file: captions, prompts, names of classes. It is embedded once, by the original text tower; no
image needs a caption.
"""

from __future__ import annotations

from torch import nn

from vitrim.config.options import RecoverOptions
from vitrim.errors import RecipeError
from vitrim.metrics.zero_shot import embed_all
from vitrim.models.origin import Origin
from vitrim.models.takes import encoder_path
from vitrim.models.towers import image_projection, open_pair, scale_and_bias, unit
from vitrim.recover.losses import EmbeddingSpace


def embedding_space_of(whole: nn.Module, origin: Origin, options: RecoverOptions) -> EmbeddingSpace | None:
    """Build the space in which an encoder's pooled vectors are compared.

    Args:
        whole: the original model.
        origin: how it was built, with the path of the encoder that is distilled.
        options: `text_bank` names the file, `text_bank_weight` how much it counts.

    Returns:
        The space; None for an encoder whose features are compared as they are.

    Raises:
        RecipeError: the bank can't be read, or a bank is given and the encoder is not the image tower of a pair.
        ModelError: the model is no pair that vitrim can run, or its tokenizer is not known.
    """
    is_image_tower = bool(origin.encoder) and origin.encoder == encoder_path(whole)
    fits = is_image_tower and options.features_at == "final"
    project = image_projection(whole) if fits else None
    if options.text_bank is None:
        return None if project is None else EmbeddingSpace(project=project)
    if not fits:
        raise RecipeError("recover.text_bank: needs the image tower of a pair and features_at 'final'.")
    try:
        texts = [line.strip() for line in options.text_bank.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recover.text_bank: {options.text_bank} can't be read ({error}).") from None
    if len(texts) < 2:
        raise RecipeError(f"recover.text_bank: {options.text_bank} holds {len(texts)} texts; a bank needs two or more.")
    pair = open_pair(whole, origin)
    bank_TE = unit(embed_all(pair, pair.tokenize(texts)))
    scale = float(scale_and_bias(whole)[0].detach())
    return EmbeddingSpace(project=project, bank_TE=bank_TE, scale=scale, weight=options.text_bank_weight)
