"""What pruning a checkpoint will need, said before it starts: memory, disk and time, from shapes alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrim.errors import RecipeError
from vitrim.recipe import Recipe, RepairOptions
from vitrim.types import MlpSite

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes that calibration needs beside the running program.

    `streams` may be spilled to disk; `blocks` are one block of teacher and student each, `sample` the tokens kept for
    the refit, `batch` one batch's activations, `hidden` the units of the widest MLP, `kept` those that stay.
    """

    streams: int
    blocks: int
    sample: int
    batch: int
    hidden: int
    kept: int

    def bytes(self, *, spilled: bool, moments: torch.dtype) -> int:
        """All of it: two sets of second moments (as summed, and centred), and the factor of the selection."""
        squares = self.hidden * (2 * self.hidden * moments.itemsize + self.kept * 8)
        return squares + self.blocks + self.sample + self.batch + (0 if spilled else self.streams)


def needs_of(sites: Sequence[MlpSite], recipe: Recipe, batches: Sequence[Tensor], encoder: nn.Module) -> Needs:
    """What calibration will need.

    Args:
        sites: what is cut, by paths from the encoder.
        recipe: widths and repair.
        batches: calibration images.
        encoder: the model, on meta.
    """
    num_tokens = _tokens_of(encoder, batches[0], sites[0])
    repair = recipe.repair_options() or RepairOptions()
    num_images, per_batch = sum(map(len, batches)), len(batches[0])
    d_model, hidden = max(site.d_model for site in sites), max(site.d_hidden for site in sites)
    block = max(sum(p.numel() for p in encoder.get_submodule(site.block).parameters()) for site in sites)
    tokens = num_images * num_tokens
    return Needs(
        streams=3 * tokens * d_model * 4,  # inputs of both models, and the teacher's outputs
        blocks=2 * block * 4,
        sample=int(1.25 * min(repair.max_tokens, tokens)) * 2 * d_model * 4,
        batch=per_batch * num_tokens * (6 * d_model + 4 * hidden) * 4,
        hidden=hidden,
        kept=max(recipe.width_of(site) for site in sites),
    )


def parse_bytes(text: str | int) -> int:
    """A size such as 4GB, 512MiB or 1000000.

    Raises:
        RecipeError: it is none.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise RecipeError(f"size: {text!r} is none; write a number of bytes, or such as 4GB or 512MiB.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def show_bytes(count: int) -> str:
    """A size for people."""
    return f"{count / 10**9:.2f} GB" if count >= 10**8 else f"{count / 10**6:.1f} MB"


def _tokens_of(encoder: nn.Module, batch: Tensor, site: MlpSite) -> int:
    """Tokens an image at a block, seen by a hook in a forward pass on meta."""
    seen: list[Tensor] = []
    handle = encoder.get_submodule(site.value).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    was_meta = encoder.to("meta")
    try:
        with torch.no_grad():
            was_meta(torch.empty_like(batch[:1], device="meta"))
    finally:
        handle.remove()
    return seen[0].numel() // seen[0].shape[-1]
