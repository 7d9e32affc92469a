"""Holds adapters on a student while it trains: which weights get one, what else trains, and how much memory it takes.

Linear weights get adapters, torch's own attention included. Convolutions, embeddings and bare matrices (a CLIP
projection) don't, and stay as they are. The adapters themselves are in `layers/adapters.py`, the file format of their
factors in `peft_layout.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vitrim.config.options import AdapterOptions
from vitrim.errors import RecipeError
from vitrim.layers.adapters import Adapter, Lora, OpLora, Place, attach_adapter_, find_adapters, merge_adapters_
from vitrim.recover.peft_layout import check_peft, save_adapter

# The packed and the separate matrices of torch's own attention; its output projection is a linear layer.
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# A trained value, its gradient and Adam's two moments, float32 each.
TRAINING_BYTES = 16


@contextmanager
def adapted(
    model: nn.Module, options: AdapterOptions | None, *, seed: int = 0, write: bool = True
) -> Iterator[dict[str, Any] | None]:
    """Hold adapters on a model in this context; at the end they are always merged, and written if that was asked for.

    Args:
        model: the parameters that the loss reaches require gradients, the others don't.
        options: kind, rank, targets and the rest; None holds no adapters.
        seed: of the adapters' initial values.
        write: whether this process is the one that writes.

    Yields:
        Plain values: counts, memory in MiB, and the weights left out with the reason; after training also how many of
        the generators' hidden units have died. None without options.

    Raises:
        RecipeError: a target names no such weight, or no weight can have an adapter of this rank.
        MissingExtraError: the factors are to be written, and peft is not installed.
        OutputError: the factors can't be written.
    """
    if options is None:
        yield None
        return
    try:
        done = attach_(model, options, seed=seed)
        if options.save is not None:
            check_peft(model)
        yield done
        if options.kind == "op-lora":
            done["num_dead_units"] = sum(a.num_dead() for _, a in find_adapters(model) if isinstance(a, OpLora))
        if options.save is not None and write:
            save_adapter(model, options.save)
    finally:
        merge_adapters_(model)


def attach_(model: nn.Module, options: AdapterOptions, *, seed: int = 0) -> dict[str, Any]:
    """Put an adapter on each linear weight that trains now, and freeze everything else.

    Args, Raises and the returned values are those of `adapted`, without the writing.
    """
    places = _chosen(list(_linear_weights(model)), options.targets)
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    skipped: dict[str, str] = {}
    for place in places:
        weight = _weight(place)
        if options.rank > min(weight.shape):
            skipped[place.name] = f"is {weight.shape[0]} x {weight.shape[1]}, too small for rank {options.rank}"
        elif owners[id(weight)] > 1:
            skipped[place.name] = "is tied to another layer's weight"
    places = [place for place in places if place.name not in skipped]
    if not places:
        reasons = "; ".join(f"{name} {reason}" for name, reason in list(skipped.items())[:3])
        raise RecipeError(f"recover.adapter: no linear weight can have one ({reasons or 'the loss reaches none'}).")
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and p.ndim <= 1 and options.train_vectors)
    shapes = [tuple(_weight(place).shape) for place in places]
    generator = torch.Generator().manual_seed(seed)
    for place in places:
        attach_adapter_(place, _build(place, options, generator))
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_bytes = TRAINING_BYTES * num_trained + 4 * sum(map(math.prod, shapes))  # adapted weights stand beside their own
    return {
        "kind": options.kind,
        "rank": options.rank,
        "num_weights": len(places),
        "num_trained": num_trained,
        "num_in_factors": options.rank * sum(map(sum, shapes)),
        "training_mib": round(num_bytes / 2**20, 1),
        "skipped": skipped,
    }


def notes_on(adapted: dict[str, Any] | None) -> list[str]:
    """List the weights that got no adapter and stayed as they were, as notes for the user."""
    skipped = adapted["skipped"] if adapted else {}
    if not skipped:
        return []
    name, reason = next(iter(skipped.items()))
    return [f"adapters: {len(skipped)} linear weights got none and stayed as they were; {name} {reason}."]


def without_decay(model: nn.Module, options: AdapterOptions | None) -> set[int]:
    """Return the ids of the parameters without weight decay: those of generators, unless it was asked for.

    Decay on A and B pulls a weight back to where it started. On a generator it does not: what it emits is a product of
    decayed layers plus b2, where A starts and which is a vector, so A and B shrink unevenly and not at the rate given.
    """
    if options is None or options.decay_generator:
        return set()
    return {id(p) for _, adapter in find_adapters(model) if isinstance(adapter, OpLora) for p in adapter.parameters()}


def _build(place: Place, options: AdapterOptions, generator: torch.Generator) -> Adapter:
    weight_MN = _weight(place)
    if options.kind == "lora":
        return Lora(weight_MN, rank=options.rank, alpha=options.alpha, generator=generator)
    return OpLora(
        weight_MN,
        rank=options.rank,
        alpha=options.alpha,
        hidden=options.hidden,
        latent=options.latent,
        generator=generator,
    )


def _weight(place: Place) -> nn.Parameter:
    weight = place.module._parameters[place.tensor]
    assert weight is not None
    return weight


def _linear_weights(model: nn.Module) -> Iterator[Place]:
    """Yield the weights of linear layers and of torch's attention that train now."""
    for path, module in model.named_modules():
        names: Sequence[str] = ("weight",) if isinstance(module, nn.Linear) else ()
        names = ATTENTION_WEIGHTS if isinstance(module, nn.MultiheadAttention) else names
        for tensor in names:
            weight = module._parameters.get(tensor)
            if weight is not None and weight.requires_grad:
                yield Place(path, module, tensor)


def _chosen(places: Sequence[Place], targets: Sequence[str]) -> list[Place]:
    """Return the places whose names end in a target; all of them where there are no targets."""
    for target in targets:
        if not any(_ends_in(place.name, target) for place in places):
            ends = sorted({".".join(place.name.split(".")[-2:]) for place in places})
            raise RecipeError(
                f"recover.adapter.targets: no linear layer that the loss reaches ends in {target!r}; "
                f"there are {', '.join(ends[:12])}."
            )
    return [place for place in places if not targets or any(_ends_in(place.name, target) for target in targets)]


def _ends_in(name: str, target: str) -> bool:
    """Return whether a dotted name ends in the parts of another."""
    return f".{name}".endswith(f".{target}")
