"""Int8: stores each weight of linear layers in one byte, and rounds activations too if asked; torchao rounds.

The paper is a survey of the technique; nothing is calibrated here. This method must come after all others. Integers are
not trained: recovery after it trains only what is left (biases, norms, embeddings). So recover first, and quantise the
output of that run in a second run.
"""

from __future__ import annotations

from collections.abc import Iterator

from vitrim.methods.registry import ModelMethod, register
from vitrim.surgery import ToInt8
from vitrim.types import ModelView


@register
class Int8(ModelMethod):
    """Int8: linear weights in one byte each, with one scale per output, rounded by torchao."""

    name = "int8"
    paper = "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation"
    arxiv = "2004.09602"
    summary = "linear weights as int8 with a scale for each output, by torchao; a quarter of the file"
    needs = "weights"
    repairs = False
    edits = (ToInt8,)
    takes = "nothing"

    activations: bool = False
    """Also round the activations of each token to int8."""
    skip: tuple[str, ...] = ("head",)
    """Layers to leave as they are, by the end of their name or of their parent's name."""

    def propose(self, view: ModelView) -> Iterator[ToInt8]:
        """Yield one edit for each linear layer that can be replaced by another module."""
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
