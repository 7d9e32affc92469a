"""Which layers of a tower its users read, where that is not the last one alone: a projector's, a decoder's.

The whole model says so and the tower does not know, so the tower is told when a model is opened or built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

# On a tower: the hidden states that are read, and whether the tokens in front of the patches are, too.
READS = "read_by_projector"


class Reads(NamedTuple):
    """The hidden states that a projector reads, by number as in a list, and whether with CLS and registers."""

    layers: tuple[int, ...]
    prefix: bool


def reads(tower: nn.Module) -> Reads | None:
    """Return what a projector reads of a tower; None if it is its output."""
    said = getattr(tower, READS, None)
    return None if said is None else Reads(*said)


def tell_reads_(model: nn.Module, tower: str, config: Mapping[str, Any]) -> None:
    """Tell the tower of a whole model of transformers which of its hidden states the config says are read."""
    module, said = model.get_submodule(tower), config.get("vision_feature_layer")
    layers = (said,) if isinstance(said, int) else tuple(said or ())
    if tower and layers and layers != (-1,):
        setattr(module, READS, (layers, config.get("vision_feature_select_strategy") == "full"))
    elif hasattr(module, READS):
        delattr(module, READS)


def feature_maps(model: nn.Module, output: Any) -> tuple[Tensor, ...]:
    """Return the maps of several stages that a backbone puts out, as tokens (B, N, D); () for any other output."""
    found = getattr(output, "feature_maps", None)
    if found is None and isinstance(output, list | tuple) and len(output) > 1:  # timm's `features_only`
        found = output
    if not isinstance(found, Sequence) or not all(isinstance(each, Tensor) and each.ndim in (3, 4) for each in found):
        return ()
    if found is output and any(each.ndim == 3 for each in found):
        return ()
    info: Any = getattr(model, "feature_info", None)
    widths = info.channels() if hasattr(info, "channels") else [each.shape[1] for each in found]
    return tuple(_as_tokens(each, width) for each, width in zip(found, widths, strict=True))


def _as_tokens(found: Tensor, width: int) -> Tensor:
    """Return a map whose channels come first, or last, as tokens."""
    if found.ndim == 3:
        return found
    return found.flatten(2).mT if found.shape[1] == width else found.flatten(1, 2)
