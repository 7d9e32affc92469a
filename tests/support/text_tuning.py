"""Captioned images, and a pair whose text tower is tuned on them."""

from __future__ import annotations

from tests.support.pairs import NAMES, WORDS, pictures
from vitrim.clip.embedded_pairs import embed_pairs
from vitrim.clip.text_tower import TextOptions, tune_text_
from vitrim.config.run_context import RunContext
from vitrim.data import open_pairs
from vitrim.models.towers import open_pair
from vitrim.output.load import open_model

QUICK = {"steps": 12, "batch_size": 8, "lr": 3e-3, "num_validations": 4}


def captioned(num, size=32):
    """Images of six classes, each with one or two captions that name its class."""
    texts = [
        [f"a photo of the {NAMES[i % 6]} {WORDS[i % 17]}", f"the {NAMES[i % 6]} on a {WORDS[i % 13]}"]
        for i in range(num)
    ]
    return [
        (image, captions[: 1 + i % 2])
        for i, (image, captions) in enumerate(zip(pictures(num, size), texts, strict=True))
    ]


def opened(folder):
    return open_pair(*open_model(str(folder)))


def tuned(folder, *, options=None, work=None, resume=False):
    """A pair tuned on 32 captioned images and judged on 8, and what tuning did."""
    pair = opened(folder)
    train, held_out = embed_pairs(pair, open_pairs(captioned(40))).split(8, seed=0)
    chosen = TextOptions(**{**QUICK, **(options or {})})
    context = RunContext(work=work, resume=resume, quiet=True)
    return pair, tune_text_(pair, train, held_out=held_out, options=chosen, context=context)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
