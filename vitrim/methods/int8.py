"""Int8: the weights of linear layers in a byte each, and activations, too, where asked for; torchao rounds.

The paper is a survey of how it is done; nothing is calibrated here. It goes behind all other methods. Integers are not
trained: recovery behind it trains what is left (biases, norms, embeddings). So recover first, and quantise the output
of that run in a run of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from vitrim.methods.registry import MethodOptions, register
from vitrim.surgery import ToInt8
from vitrim.types import ModelView


class Int8Options(MethodOptions):
    """`activations` rounds each token to int8 as well. `skip`: ends of names of layers, or their parents, that stay."""

    activations: bool = False
    skip: tuple[str, ...] = ("head",)


@register(
    "int8",
    scope="model",
    edits=(ToInt8,),
    options=Int8Options,
    needs="weights",
    paper="Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation",
    arxiv="2004.09602",
    summary="linear weights as int8 with a scale for each output, by torchao; a quarter of the file",
    repairs=False,
)
def propose(view: ModelView, options: Int8Options) -> Iterator[ToInt8]:
    """One edit for each linear layer that another module can stand in for."""
    left = 0
    for layer in view.layers(factors=True):
        names = (layer.path, layer.path.rpartition(".")[0])
        if layer.fixed or layer.kind == "conv" or any(name.endswith(options.skip) for name in names):
            left += 1
        else:
            yield ToInt8(layer=layer, activations=options.activations)
    if left:
        why = "convolutions, those named in skip, and what can't be replaced"
        view.note(f"int8: {left} layers stay as they are ({why}).")
