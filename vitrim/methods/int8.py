"""Int8: the weights of linear layers in one byte each, and activations too where asked for; torchao does the rounding.

The paper is a survey of how this is done; nothing is calibrated here. In a recipe of several methods it comes last,
since nothing else works on integers. Integers are not trained either: recovery after it would train only what is left
(biases, norms, embeddings). So recover first, and quantise the output of that run in a run of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from vitrim.methods.registry import ModelMethod, register
from vitrim.surgery import ToInt8
from vitrim.types import ModelView


@register
class Int8(ModelMethod):
    """Store the weights of linear layers as int8."""

    name = "int8"
    paper = "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation"
    arxiv = "2004.09602"
    summary = "linear weights as int8 with a scale for each output, by torchao; a quarter of the file"
    needs = "weights"
    takes = "nothing"
    edits = (ToInt8,)

    activations: bool = False
    """Round the activations of each token to int8 as well."""
    skip: tuple[str, ...] = ("head",)
    """Layers that stay as they are: those whose name, or whose parent's name, ends with one of these."""

    def propose(self, view: ModelView) -> Iterator[ToInt8]:
        """The edits.

        Args:
            view: the model.

        Yields:
            One edit for each linear layer that another module can stand in for.
        """
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
