"""Images with captions as text tuning reads them: images embedded once, captions as token ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitrim.data import PairSet
from vitrim.distributed.processes import num_processes, rank
from vitrim.errors import DataError
from vitrim.metrics.retrieval import embed_captioned
from vitrim.models.towers import Pair, unit


@dataclass(frozen=True, kw_only=True)
class EmbeddedPairs:
    """Images as unit vectors, with the token ids of their captions.

    Attributes:
        images_NE: one unit vector for each image, (N, E).
        ids_ML: token ids of all captions, (M, L); those of image i are first_N[i] up to first_N[i + 1].
        first_N: see `ids_ML`; (N + 1,).
        num_skipped: images that could not be read.
    """

    images_NE: Tensor
    ids_ML: Tensor
    first_N: Tensor
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.images_NE)

    def drawn(self, rows_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the vectors (B, E) of these images, and the ids (B, L) of one random caption of each."""
        counts_N = self.first_N[1:] - self.first_N[:-1]
        draw_N = (torch.rand(len(self), generator=generator) * counts_N).long()
        return self.images_NE[rows_B], self.ids_ML[(self.first_N[:-1] + draw_N)[rows_B]].long()

    def split(self, num_held_out: int, seed: int) -> tuple[EmbeddedPairs, EmbeddedPairs]:
        """Split off held-out images, drawn at random, each with its captions.

        Returns:
            The rest, and the held-out part.

        Raises:
            DataError: `num_held_out` leaves one of the two empty.
        """
        if not 0 < num_held_out < len(self):
            raise DataError(
                f"captions: asked to hold out {num_held_out} of {len(self)} images; use 1..{len(self) - 1}."
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._subset(order[num_held_out:]), self._subset(order[:num_held_out])

    def _subset(self, rows: Tensor) -> EmbeddedPairs:
        counts = (self.first_N[1:] - self.first_N[:-1])[rows]
        places = torch.cat([torch.arange(int(self.first_N[row]), int(self.first_N[row + 1])) for row in rows])
        first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return EmbeddedPairs(images_NE=self.images_NE[rows], ids_ML=self.ids_ML[places], first_N=first)


def embed_pairs(pair: Pair, pairs: PairSet, *, batch_size: int = 64, num_workers: int = 0) -> EmbeddedPairs:
    """Run the image tower once over all images, each process over its share, and tokenise the captions.

    Args:
        pair: the two towers, with a tokenizer.
        pairs: images with captions.
        batch_size: images a forward pass.
        num_workers: processes that decode images.

    Returns:
        All pairs, on every process.

    Raises:
        DataError: no image could be read.
        ModelError: the pair's tokenizer is not known.
    """
    from accelerate.utils import gather_object

    share = pairs.shared(rank(), num_processes())
    vectors, captions, rows, num_skipped = embed_captioned(
        pair.model, share.batches(batch_size, num_workers=num_workers)
    )
    found = [(vectors, captions, rows, num_skipped)]
    found = gather_object(found) if num_processes() > 1 else found
    order = torch.cat([rows for _, _, rows, _ in found]).argsort().tolist()
    texts = [texts for _, captions, _, _ in found for texts in captions]
    texts = [texts[place] for place in order]
    counts = torch.tensor([0, *(len(each) for each in texts)])
    return EmbeddedPairs(
        images_NE=unit(torch.cat([vectors for vectors, *_ in found])[order]),
        ids_ML=pair.tokenize([text for each in texts for text in each]).int(),
        first_N=counts.cumsum(0),
        num_skipped=sum(num for *_, num in found),
    )
