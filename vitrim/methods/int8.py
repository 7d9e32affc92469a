"""Int8: the weights of linear layers in a byte each, and activations, too, where asked for; torchao rounds.

The paper is a survey of how it is done; nothing is calibrated here. It goes behind all other methods. Integers are not
trained: recovery behind it trains what is left (biases, norms, embeddings). So recover first, and quantise the output
of that run in a run of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from vitrim.methods.registry import ModelMethod, register
from vitrim.surgery import ToInt8
from vitrim.types import ModelView


@register
class Int8(ModelMethod):
    """Int8: linear weights in a byte each, with a scale for each output, rounded by torchao."""

    name = "int8"
    paper = "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation"
    arxiv = "2004.09602"
    summary = "linear weights as int8 with a scale for each output, by torchao; a quarter of the file"
    needs = "weights"
    repairs = False
    edits = (ToInt8,)
    takes = "nothing"

    activations: bool = False
    """Round each token to int8 as well."""
    skip: tuple[str, ...] = ("head",)
    """Ends of names of layers, or of their parents, that stay as they are."""

    def propose(self, view: ModelView) -> Iterator[ToInt8]:
        """One edit for each linear layer that another module can stand in for."""
        left = 0
        for layer in view.layers(factors=True):
            names = (layer.path, layer.path.rpartition(".")[0])
            if layer.fixed or layer.kind == "conv" or any(name.endswith(self.skip) for name in names):
                left += 1
            else:
                yield ToInt8(layer=layer, activations=self.activations)
        if left:
            why = "convolutions, those named in skip, and what can't be replaced"
            view.note(f"int8: {left} layers stay as they are ({why}).")
