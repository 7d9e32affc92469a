"""A tiny BERT and its tokenizer."""

from __future__ import annotations

from functools import cache

import torch

WORDS = "a big small model cuts units of an encoder and keeps what it says about text while images go elsewhere".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(WORDS), *"abcdefghijklmnopqrstuvwxyz"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


@cache
def bert_tokenizer():
    import transformers

    return transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(dict.fromkeys(VOCABULARY))})


def build_bert():
    import transformers

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        size = len(bert_tokenizer())
        config = transformers.BertConfig(**SIZES, vocab_size=size, max_position_embeddings=32)
        model = transformers.BertModel(config).eval()
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
