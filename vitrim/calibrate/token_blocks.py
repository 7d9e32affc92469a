"""Finds the blocks of a model that tokens can leave, and tries on images whether the model stays the same.

A block is split into its parts by what libraries call them (`layers.kept_tokens`). No library is trusted to put them
together as that file does: with all tokens the split block has to put out what the block does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from vitrim.calibrate.activations import block_calls
from vitrim.calibrate.runs import with_edits
from vitrim.errors import SiteNotFoundError
from vitrim.layers.kept_tokens import KeptTokens, block_names
from vitrim.models.features import device_of, evaluating, features, first_tensor
from vitrim.models.takes import takes_token_ids
from vitrim.surgery import KeepTokens, apply_, submodule
from vitrim.types import AttentionSite, MlpSite

ADVICE = "use a method that cuts widths."


def find_token_blocks(
    model: nn.Module, sites: Sequence[MlpSite], attentions: Sequence[AttentionSite], images: Tensor
) -> tuple[Sequence[AttentionSite], int, int, bool]:
    """Return each block's attention in forward order, how many tokens precede the patches, of how many tokens in all.

    Last comes whether these alone count: pooled features and scores are the same without patches behind the blocks.

    Args:
        model: the model.
        sites: its MLPs.
        attentions: its plain attentions; blocks with others can't be split.
        images: a few images to try it on.

    Raises:
        SiteNotFoundError: a block can't be split, or no token stands in front of the patches.
    """
    with evaluating(model):
        name, num_prefix = type(model).__name__, features(model, images[:1].to(device_of(model))).num_prefix
    if takes_token_ids(model) or not num_prefix:
        raise SiteNotFoundError(
            f"{name}: has no CLS token that all patches could be judged by (it pools patches, or takes text); {ADVICE}"
        )
    blocks = list(dict.fromkeys(site.block for site in sites))
    inside = {site.path.rpartition(".")[0]: site for site in attentions}
    missing = [block for block in blocks if block not in inside]
    if missing or len(inside) != len(blocks):
        where = next(iter(missing or inside.keys() - set(blocks)))
        raise SiteNotFoundError(
            f"{where}: is no block around one plain attention (windows, positions, norms or masks inside), and tokens "
            f"can only leave blocks that are; {ADVICE}"
        )
    found = [replace(inside[block], block=block) for block in blocks]
    calls = _watched(model, blocks, images.to(device_of(model)))
    for site in found:
        _check_split(model, site, calls)
    last, total = found[-1], calls[blocks[-1]][0].shape[1]
    return found, num_prefix, total, _pools_prefix(model, last, num_prefix, total, images)


def split_block(model: nn.Module, site: AttentionSite) -> KeptTokens:
    """Return a copy of the block around an attention, split so that tokens can leave it.

    Raises:
        SiteNotFoundError: the block has other parts.
    """
    block = submodule(model, site.block)
    block_names(block, site.block)  # here, since in the holder it has another path
    holder = nn.Sequential(copy.deepcopy(block))
    apply_(holder, [KeepTokens(site=site.within(site.block).below("0"), keep=(0,), among=(0,))])
    return cast(KeptTokens, holder[0].eval().requires_grad_(False))


def _check_split(model: nn.Module, site: AttentionSite, calls: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Check that a block split into its parts puts out what it does.

    Raises:
        SiteNotFoundError: it does not.
    """
    if site.block not in calls:
        raise SiteNotFoundError(f"{site.block}: did not run, or gives more than its tokens; {ADVICE}")
    tokens_BND, wanted_BND = calls[site.block]
    found_BND = split_block(model, site).run(tokens_BND, torch.arange(tokens_BND.shape[1], device=tokens_BND.device))
    size = float(wanted_BND.abs().max())
    if found_BND.shape != wanted_BND.shape or not torch.allclose(found_BND, wanted_BND, atol=1e-5 * size, rtol=1e-4):
        raise SiteNotFoundError(f"{site.block}: does more than its parts in order, so it can't be split; {ADVICE}")


def _watched(model: nn.Module, blocks: Sequence[str], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the tokens that go into each block and those that come out, of blocks that give nothing else."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for block, ((args, kwargs), output) in block_calls(model, blocks, images).items():
        came = args[0] if args else kwargs.get("hidden_states")
        if isinstance(came, Tensor) and isinstance(output, Tensor) and came.ndim == 3:
            seen[block] = (came, output)
    return seen


def _pools_prefix(model: nn.Module, last: AttentionSite, num_prefix: int, total: int, images: Tensor) -> bool:
    """Return whether pooled features and scores stay the same where the last block puts out no patches."""
    edit = KeepTokens(site=last, keep=tuple(range(num_prefix)), among=tuple(range(total)))
    shorter, images = with_edits(model, [edit]), images.to(device_of(model))

    def vectors(each: nn.Module) -> list[Tensor]:
        whole = first_tensor(each(images))
        return [features(each, images).pooled_BD, *([whole] if whole.ndim == 2 else [])]

    try:
        with evaluating(model, shorter):
            pairs = list(zip(vectors(model), vectors(shorter), strict=True))
    except Exception:  # foreign code that pools patches may raise anything where there are none
        return False
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max())) for one, other in pairs)
