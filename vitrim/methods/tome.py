"""ToMe, token merging (arXiv 2210.09461): in every block some patches are averaged into those they are most like.

Which ones depends on the image. Patches are matched by the cosine of their keys, those of one half with those of the
other, and a merged token counts for all that it stands for. Nothing is searched and nothing trained, so it is the
baseline for whatever drops tokens. Tokens in front of the patches are never merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vitrim.errors import BudgetError, SiteNotFoundError
from vitrim.methods.registry import ModelMethod, register
from vitrim.surgery import MergeTokens
from vitrim.types import AttentionSite, ModelView


@register
class Tome(ModelMethod):
    """ToMe: merges as many patches in every block, to the nearest one, as leave the budget's share of them."""

    name = "tome"
    paper = "Token Merging: Your ViT But Faster"
    arxiv = "2210.09461"
    summary = "similar patches of an image averaged, equally many in each block; a baseline"
    needs = "images"
    repairs = False
    edits = (MergeTokens,)
    takes = "share"
    senseless = ("params_ratio", "mlp_ratio", "hidden_dim", "widths")  # all weights stay

    def check(self, view: ModelView) -> None:
        """Refuse a model whose tokens can't be merged, and a share that halves don't reach."""
        if view.has_images:
            _blocks(view)

    def propose(self, view: ModelView) -> Iterator[MergeTokens]:
        """Yield an edit for each block.

        Raises:
            BudgetError: halves alone can't merge as many.
            SiteNotFoundError: the model's features are not those of its CLS token.
        """
        if view.keep_ratio == 1:
            view.note("all tokens stay, so nothing was merged.")
            return
        sites, num_prefix, num_patches, counts = _blocks(view)
        given = num_patches
        for site, count in zip(sites, counts, strict=True):
            yield MergeTokens(
                site=site,
                num_prefix=num_prefix,
                num_given=given,
                num_merged=given - count,
                num_patches=num_patches,
            )
            given = count
        view.note(
            f"patches behind each block: {', '.join(map(str, counts))} of {num_patches}. Errors compare CLS alone."
        )


def _blocks(view: ModelView) -> tuple[Sequence[AttentionSite], int, int, list[int]]:
    """Return each block's attention, how many tokens precede how many patches, and how many of these each puts out."""
    sites, num_prefix, num_tokens, pools_prefix = view.token_blocks()
    num_patches = num_tokens - num_prefix
    if not pools_prefix:
        raise SiteNotFoundError(
            f"{sites[-1].block}: its patches are pooled, and merged ones would count as one each; use patch-slimming "
            "with num_last."
        )
    return sites, num_prefix, num_patches, _falling(num_patches, len(sites), view.keep_ratio)


def _falling(num_patches: int, depth: int, share: float) -> list[int]:
    """Return how many patches each block puts out, merging equally many in each: at most a share of all of them.

    Raises:
        BudgetError: a block can merge half of its patches at most, and that leaves more.
    """
    allowed = share * num_patches * depth
    for total in range(num_patches * depth + 1):
        counts, given = [], num_patches
        for number in range(depth):
            merged = (number + 1) * total // depth - number * total // depth
            given -= min(merged, given // 2)
            counts.append(given)
        if sum(counts) <= allowed:
            return counts
    least = -(-1000 * sum(counts) // (num_patches * depth)) / 1000
    raise BudgetError(
        f"keep_ratio={share:g}: halving in every block leaves {least:g} of all patches; use {least:g}..1."
    )
