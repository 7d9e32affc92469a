"""The frozen values that the parts of vitrim hand to each other.

A method looks at `MlpWeights` and `Stats` and decides. What it decides, an edit, is in `surgery`, which carries it out.
Nothing here changes a module or reads a file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Generator, Tensor
from typing_extensions import Self

T = TypeVar("T")
MlpKind = Literal["plain", "packed_gated", "split_gated"]
LayerKind = Literal["linear", "transposed_linear", "conv"]
LayerSide = Literal["inputs", "outputs"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Modules of a model by their dotted paths; PATHS names the fields that hold one."""

    PATHS: ClassVar[tuple[str, ...]] = ("path",)

    path: str

    def below(self, prefix: str) -> Self:
        """The same site as seen from a module that holds this one's root at `prefix`."""
        return self.renamed(lambda path: f"{prefix}.{path}".strip("."))

    def within(self, prefix: str) -> Self:
        """The same site as seen from the module at `prefix`: the inverse of `below`."""
        return self.renamed(lambda path: "" if path == prefix else path.removeprefix(f"{prefix}."))

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same site with every path passed through a function."""
        return replace(
            self, **{key: rename(getattr(self, key)) for key in self.PATHS if getattr(self, key) is not None}
        )


@dataclass(frozen=True, kw_only=True)
class MlpSite(Site):
    """One MLP of a model: where it is and what its tensors are called.

    `value`, `gate`, `output` and `norm` are dotted module paths from the root of the model. A packed gated MLP
    has no `gate` of its own: its `value` projection holds the gate rows first, then the value rows. `has_bias`
    speaks of the input projections; `block` is the transformer block around the MLP.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("path", "value", "output", "gate", "norm", "block")

    kind: MlpKind
    d_model: int
    d_hidden: int
    value: str
    output: str
    gate: str | None = None
    norm: str | None = None
    has_bias: bool = True
    block: str = ""

    @property
    def num_groups(self) -> int:
        """Rows of the value projection per hidden unit: 2 when gate and value are packed in one matrix."""
        return 2 if self.kind == "packed_gated" else 1

    @property
    def label(self) -> str:
        """The kind in words, for tables."""
        return self.kind.replace("_", " ") + (" + norm" if self.norm else "")


@dataclass(frozen=True, kw_only=True)
class AttentionSite(Site):
    """One self-attention: paths of its projections, one and the same where `fused` (rows of q, then k, then v).

    `as_tuple`: its output is the first of a tuple.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("path", "query", "key", "value", "output")

    query: str
    key: str
    value: str
    output: str
    fused: bool
    d_model: int
    num_heads: int
    head_dim: int
    scale: float
    as_tuple: bool


@dataclass(frozen=True, kw_only=True)
class LayerSite(Site):
    """One linear or convolution layer, seen as G matrices, one a group: M outputs by N inputs times kernel positions.

    A `transposed_linear` holds its weight as (in, out), as transformers' `Conv1D` does. `fixed` says why no other
    module can stand in the layer's place; "" where one can.
    """

    kind: LayerKind
    num_in: int
    num_out: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    has_bias: bool = True
    fixed: str = ""

    @property
    def num_rows(self) -> int:
        """M: outputs of a group."""
        return self.num_out // self.groups

    @property
    def num_cols(self) -> int:
        """N: what an output of a group is a weighted sum of."""
        return self.num_in // self.groups * math.prod(self.kernel)

    @property
    def break_even(self) -> int:
        """The rank of a group, rounded down, at which two factors have as many values as the matrix."""
        return self.num_rows * self.num_cols // (self.num_rows + self.num_cols)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight as the layer holds it."""
        if self.kind == "transposed_linear":
            return self.num_in, self.num_out
        return self.num_out, self.num_in // self.groups, *self.kernel

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as (G, M, N)."""
        rows = weight.T if self.kind == "transposed_linear" else weight
        return rows.reshape(self.groups, self.num_rows, self.num_cols)


@dataclass(frozen=True, kw_only=True)
class MlpWeights:
    """The canonical view of a site's weights: H hidden units, D model width."""

    value_HD: Tensor
    output_DH: Tensor
    gate_HD: Tensor | None = None
    value_bias_H: Tensor | None = None
    gate_bias_H: Tensor | None = None
    output_bias_D: Tensor | None = None

    @property
    def num_units(self) -> int:
        """How many hidden units the site has."""
        return self.value_HD.shape[0]

    @property
    def input_rows(self) -> Tensor:
        """Each unit's input weights as one row: its value row, behind its gate row where it has one."""
        if self.gate_HD is None:
            return self.value_HD
        return torch.cat([self.gate_HD, self.value_HD], dim=1)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Sums over calibration tokens at one site, in float64: H hidden units, D model width.

    `hidden` is the input of the output projection, `target` what the projection should put out. All are plain sums
    (not means), so that batches can be added up; `num_tokens` turns them into means.
    """

    num_tokens: int
    hidden_H: Tensor
    hidden_HH: Tensor
    target_D: Tensor
    cross_HD: Tensor
    target_square: float


@dataclass(frozen=True, kw_only=True)
class LayerStats:
    """Sums over calibration tokens at one layer, of its inputs or of its outputs, in float64: G groups of K numbers.

    Plain sums (not means), on the device of the layer. For a convolution every position of an image is a token.
    """

    num_tokens: int
    total_GK: Tensor
    square_GKK: Tensor


@dataclass(frozen=True, kw_only=True)
class SiteView:
    """All that a method may look at to decide about one MLP: plain matrices and sums, no module.

    `stats` and `scale_D` (the layer scale that follows the MLP) are None where nothing was measured.
    """

    site: MlpSite
    weights: MlpWeights
    num_keep: int
    generator: Generator
    stats: Stats | None = None
    scale_D: Tensor | None = None


class ModelView(Protocol):
    """What a method that decides about a whole model may look at and ask for.

    Every answer is of the model as the edits that the method has handed out so far have left it.
    """

    @property
    def sites(self) -> Sequence[MlpSite]:
        """Its MLPs, in the order in which the data meets them."""
        ...

    @property
    def widths(self) -> Mapping[str, int]:
        """Hidden units that each MLP is asked to keep, by path."""
        ...

    @property
    def keep_ratio(self) -> float:
        """Share of all hidden units that stay by the budget asked for; what a method of another kind goes by."""
        ...

    @property
    def generator(self) -> Generator:
        """The one source of chance, seeded."""
        ...

    @property
    def has_images(self) -> bool:
        """Whether there are calibration images; without, `observe` can't be asked."""
        ...

    def tensor(self, name: str) -> Tensor:
        """A parameter by its full name; never to be written to."""
        ...

    def weights(self, site: MlpSite) -> MlpWeights:
        """The canonical view of an MLP's weights."""
        ...

    def layers(self, *, factors: bool = False) -> Sequence[LayerSite]:
        """Every linear and convolution layer, also those that can't be replaced; `factors`: also the two of a layer."""
        ...

    def track(self, items: Sequence[T], words: str) -> Iterator[T]:
        """Go through items; how far is shown to the user."""
        ...

    def note(self, text: str) -> None:
        """Tell the user something about what was, or was not, done."""
        ...

    def attentions(self) -> Sequence[AttentionSite]:
        """Its plain self-attentions, each confirmed by running one of ours beside it; this takes images."""
        ...

    def observe(self, paths: Sequence[str], see: Callable[[str, Tensor, Tensor], None]) -> None:
        """Run the calibration images, and call `see(path, input, output)` for each batch at each of these modules."""
        ...

    def stats(self, site: MlpSite) -> Stats:
        """Run the calibration images and sum up an MLP's hidden units; the target is what its own projection makes."""
        ...

    def layer_stats(self, sides: Mapping[LayerSite, LayerSide]) -> dict[str, LayerStats]:
        """Run the calibration images once and sum up the inputs or outputs of layers, by path.

        Outputs alone can be asked of a convolution, whose inputs overlap. A layer that is never called has no sums.
        """
        ...

    def run(self, site: MlpSite, tokens_ND: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What an MLP puts out for tokens, with other tensors, by full name, in its layers; gradients go to them."""
        ...

    def pooled(self, silenced: Mapping[str, Tensor] | None = None, *, num_images: int | None = None) -> list[Tensor]:
        """The pooled features (B, D) of each batch of calibration images, always the same batches.

        `silenced` gives, by path of a module, positions along the last dimension of its input that are set to zero.
        With `num_images` only as many batches are run as it takes to see so many.
        """
        ...

    def differentiate(
        self, loss: Callable[[Features], Tensor], paths: Sequence[str], see: Callable[[str, Tensor, Tensor], None]
    ) -> None:
        """For each batch, take a loss of its features; `see(path, input, its gradient)` is called for each module."""
        ...


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a vision encoder puts out: B images, N patch tokens, D width.

    `pooled_BD` is the CLS token, or the mean of the patch tokens where a model has none. `patches_BND` is None for a
    model that puts out one vector an image.
    """

    pooled_BD: Tensor
    patches_BND: Tensor | None = None


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's raw bytes, dtype and shape."""
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{flat.dtype}{tuple(flat.shape)}".encode())
    digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
