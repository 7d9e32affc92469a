"""The frozen values that the parts of vitrim pass to each other.

A method looks at `MlpWeights` and `Stats` and decides; its decision is an edit, which is defined and applied in
`surgery`. Nothing here changes a module or reads a file, and importing it does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar

from typing_extensions import Self

if TYPE_CHECKING:  # `vitrim --help` imports names from here, and torch takes seconds to import
    from torch import Generator, Tensor

    from vitrim.tokens import Features

T = TypeVar("T")
MlpKind = Literal["plain", "packed_gated", "split_gated"]
LayerKind = Literal["linear", "transposed_linear", "conv"]
RunInputs = Literal["output", "hidden"]  # what stands for a run of blocks is made of: a layer's output, or its input
# Where features are read: after the final norm, before it, or behind the head, as class scores.
FeaturesAt = Literal["final", "pre_norm", "logits"]
# What an export is for, in which precision, and whether it is one file or the folder of Transformers.js.
Form = Literal["onnx", "openvino", "torch", "executorch", "coreml", "litert", "tensorrt"]
Precision = Literal["fp32", "fp16", "int8"]
Layout = Literal["file", "transformers-js"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in a model, given by dotted module paths; PATHS names the fields that hold a path."""

    PATHS: ClassVar[tuple[str, ...]] = ("path",)

    path: str

    def below(self, prefix: str) -> Self:
        """Return the site with paths from a larger model, which holds this one at `prefix`."""
        return self.renamed(lambda path: f"{prefix}.{path}".strip("."))

    def within(self, prefix: str) -> Self:
        """Return the site with paths relative to the module at `prefix`: the inverse of `below`."""
        return self.renamed(lambda path: "" if path == prefix else path.removeprefix(f"{prefix}."))

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """Return the site with every path passed through a function."""
        return replace(
            self, **{key: rename(getattr(self, key)) for key in self.PATHS if getattr(self, key) is not None}
        )


@dataclass(frozen=True, kw_only=True)
class MlpSite(Site):
    """One MLP of a model: where it is, what its layers are called, and its sizes.

    `value`, `gate`, `output` and `norm` are dotted module paths from the root of the model. A packed gated MLP
    has no `gate` of its own: its `value` projection holds the gate rows first, then the value rows. `has_bias`
    is about the input projections; `block` is the transformer block around the MLP.
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
        """Rows of the value projection per hidden unit: 2 if gate and value are packed in one matrix, else 1."""
        return 2 if self.kind == "packed_gated" else 1

    @property
    def label(self) -> str:
        """The kind in words, for tables."""
        return self.kind.replace("_", " ") + (" + norm" if self.norm else "")


@dataclass(frozen=True, kw_only=True)
class AttentionSite(Site):
    """One self-attention: paths of its projections and its sizes.

    With `fused` the paths of query, key and value are the same layer (rows of q, then k, then v). With `as_tuple` the
    module returns a tuple whose first item is the output. `block` is the transformer block around it, "" if not known.
    `mixes` says what of an attention that is not plain may be mixed in each head: `all`, or `values` alone where norms
    or positions stand between queries and keys; "" for a plain one, which vitrim's own can replace.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("path", "query", "key", "value", "output", "block")

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
    block: str = ""
    mixes: Literal["", "all", "values"] = ""

    @property
    def tensors(self) -> list[str]:
        """The names of the projections' tensors, each once; some may have no bias."""
        layers = dict.fromkeys((self.query, self.key, self.value, self.output))
        return [f"{path}.{name}" for path in layers for name in ("weight", "bias")]


@dataclass(frozen=True, kw_only=True)
class BlockRun(Site):
    """A run of `length` consecutive blocks, from number `start` on, in a list of `total` blocks at `path`.

    `before` is the block in front of the run and `last` the last one of it. `output` is the layer of the block in front
    whose output is the last that is added to the residual stream. Where blocks end in a norm (BERT), `norm` is that of
    the block in front and `last_norm` that of the last. `names` are the names of a block's tensors, within the block.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("path", "before", "last", "output", "norm", "last_norm")

    start: int
    length: int
    total: int
    before: str
    last: str
    output: str
    norm: str | None = None
    last_norm: str | None = None
    names: tuple[str, ...] = ()

    @property
    def stop(self) -> int:
        """Number of the first block behind the run; `total` if there is none."""
        return self.start + self.length

    def block(self, index: int) -> str:
        """Return the path of a block."""
        return f"{self.path}.{index}".removeprefix(".")


@dataclass(frozen=True, kw_only=True)
class LayerSite(Site):
    """One linear or convolution layer, as G matrices (one per group) of M outputs by N inputs times kernel positions.

    A `transposed_linear` holds its weight as (in, out), as transformers' `Conv1D` does. `fixed` says why no other
    module can replace the layer; it is "" if one can.
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
        """N: inputs of a group times kernel positions."""
        return self.num_in // self.groups * math.prod(self.kernel)

    @property
    def break_even(self) -> int:
        """The rank of a group, rounded down, at which two factors have as many numbers as the matrix."""
        return self.num_rows * self.num_cols // (self.num_rows + self.num_cols)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight in the layer."""
        if self.kind == "transposed_linear":
            return self.num_in, self.num_out
        return self.num_out, self.num_in // self.groups, *self.kernel

    def matrices(self, weight: Tensor) -> Tensor:
        """Return the weight as (G, M, N)."""
        rows = weight.T if self.kind == "transposed_linear" else weight
        return rows.reshape(self.groups, self.num_rows, self.num_cols)


@dataclass(frozen=True, kw_only=True)
class MlpWeights:
    """The weights of one MLP in one layout for all kinds: H hidden units, D model width."""

    value_HD: Tensor
    output_DH: Tensor
    gate_HD: Tensor | None = None
    value_bias_H: Tensor | None = None
    gate_bias_H: Tensor | None = None
    output_bias_D: Tensor | None = None

    @property
    def num_units(self) -> int:
        """Number of hidden units H."""
        return self.value_HD.shape[0]

    @property
    def input_rows(self) -> Tensor:
        """Each unit's input weights as one row: (H, D), or (H, 2 D) with the gate row in front if there is one."""
        if self.gate_HD is None:
            return self.value_HD
        import torch

        return torch.cat([self.gate_HD, self.value_HD], dim=1)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Plain sums (not means) over calibration tokens at one MLP, in float64: H hidden units, D model width.

    `hidden` is the input of the output projection, `target` the output that it should have. `rounding` is that of
    products, relative to their factors' sizes. `fed` are the parts of `target_D` and `cross_HD` that are feedback.
    """

    num_tokens: int
    hidden_H: Tensor
    hidden_HH: Tensor
    target_D: Tensor
    cross_HD: Tensor
    target_square: float
    rounding: float = 2.0**-52
    fed: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class LayerSums:
    """Sums over calibration images at one layer, `of_inputs` or of outputs: T vectors in G groups of K, in float64."""

    layer: LayerSite
    of_inputs: bool
    num_tokens: int
    total_GK: Tensor
    square_GKK: Tensor


@dataclass(frozen=True, kw_only=True)
class SiteView:
    """Everything that a method may see to decide about one MLP: plain matrices and sums, no module.

    `num_keep` is how many hidden units it must keep. `stats` and `scale_D` (the layer scale after the MLP) are None if
    nothing was measured; `metric_DD` (how far errors of its output move the features) also if no method asks for it.
    """

    site: MlpSite
    weights: MlpWeights
    num_keep: int
    generator: Generator
    stats: Stats | None = None
    scale_D: Tensor | None = None
    metric_DD: Tensor | None = None


class ModelView(Protocol):
    """What a method that decides about a whole model can see, of the model after all edits that it has returned."""

    @property
    def sites(self) -> Sequence[MlpSite]:
        """The model's MLPs in forward order."""
        ...

    @property
    def widths(self) -> Mapping[str, int]:
        """How many hidden units each MLP is asked to keep, by path."""
        ...

    @property
    def keep_ratio(self) -> float:
        """Share that stays by the budget: as it was asked for, or else that of all hidden units."""
        ...

    @property
    def generator(self) -> Generator:
        """The seeded generator for all random choices."""
        ...

    @property
    def has_images(self) -> bool:
        """Whether there are calibration images; without them `observe` raises."""
        ...

    @property
    def repaired(self) -> bool:
        """Whether cuts of hidden units without tensors will be repaired, so that a method need not fold by itself."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Return a parameter by its full name; never write to it."""
        ...

    def weights(self, site: MlpSite) -> MlpWeights:
        """Return the weights of an MLP."""
        ...

    def layers(self, *, factors: bool = False) -> Sequence[LayerSite]:
        """Return every linear and convolution layer, replaceable or not; with `factors` also factors of low rank."""
        ...

    def blocks(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Return the blocks around the MLPs in forward order: by path, the shapes of their tensors by name within."""
        ...

    def track(self, items: Sequence[T], words: str) -> Iterator[T]:
        """Yield the items one by one and show the user the progress, described by `words`."""
        ...

    def note(self, text: str) -> None:
        """Tell the user something about what was done or left out."""
        ...

    def attentions(self) -> Sequence[AttentionSite]:
        """Return the plain self-attentions, each verified against vitrim's own on calibration images."""
        ...

    def stats(self, site: MlpSite) -> Stats:
        """Run the calibration images, and return the sums of an MLP's hidden units and of its outputs."""
        ...

    def layer_sums(self, layers: Sequence[LayerSite]) -> Iterator[tuple[Sequence[LayerSite], Mapping[str, LayerSums]]]:
        """Yield groups of layers with their sums by path, in as few passes over the images as memory allows.

        A layer that no image reaches has no sums. Later groups see the edits made after earlier ones.
        """
        ...

    def runs(self, length: int) -> Sequence[BlockRun]:
        """Return every run of this many blocks that can be taken out, each tried on images; note why others can't.

        Raises:
            BudgetError: there is none.
        """
        ...

    def run_sums(self, runs: Sequence[BlockRun], *, of: RunInputs) -> Iterator[tuple[BlockRun, Stats]]:
        """Yield each run with sums at its `output` layer, whose target is what would stand for the run.

        `hidden` in these sums is the layer's own output or its input, as `of` says. Images held out for `tried`
        are not in them.
        """
        ...

    def tried(self, edits: Iterable[T]) -> Iterator[tuple[T, float]]:
        """Yield each edit with the relative error of features that it would cause on held-out images."""
        ...

    def observe(self, paths: Sequence[str], see: Callable[[str, Tensor, Tensor], None]) -> None:
        """Run the calibration images, and call `see(path, input, output)` for each batch and each of these modules."""
        ...

    def run(self, site: MlpSite, tokens_ND: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return an MLP's output for tokens, with other tensors (by full name) in its layers; gradients reach them."""
        ...

    def pooled(self, silenced: Mapping[str, Tensor] | None = None, *, num_images: int | None = None) -> list[Tensor]:
        """Return the pooled features (B, D) of each batch of calibration images, always in the same batches.

        `silenced` gives, by a module's path, positions along the last dimension of its input to set to zero. With
        `num_images` it stops after the batch that reaches this many.
        """
        ...

    def differentiate(
        self, loss: Callable[[Features], Tensor], paths: Sequence[str], see: Callable[[str, Tensor, Tensor], None]
    ) -> None:
        """Differentiate a loss of each batch's features: `see(path, input, gradient of input)` is called per module."""
        ...

    def token_blocks(self) -> tuple[Sequence[AttentionSite], int, int, bool]:
        """Return each block's attention, how many tokens precede patches, of how many, whether these alone count."""
        ...

    def kept(self, site: AttentionSite, tokens_BND: Tensor, index: Sequence[int]) -> Tensor:
        """Return the tokens at an index as the block around an attention makes them of those that it is given."""
        ...

    def attention_maps(self, site: AttentionSite, tokens_BND: Tensor) -> Iterator[Tensor]:
        """Yield the attention (B, N, N) of each head, from the tokens that its block is given."""
        ...
