"""An MLP split into experts, of which each token runs only a few: each expert gets the tokens that chose it.

The MLP stays whole as a submodule, with its hidden units in the order of the experts; an expert is the MLP's own
`forward` on a slice of its weights, so activation and gating are unchanged. There is one product for each expert that
has tokens. On a GPU, where many small products are slow, a speed-up needs a grouped kernel, which is not here.

Shapes: T tokens, D model width, E experts, S hidden units of an expert, A experts active a token.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

RouterKind = Literal["mlp", "similarity", "oracle"]
ScoreKind = Literal["sum", "norm"]


class Router(nn.Module):
    """Scores experts for a token from the token's direction: two linear layers without bias, tanh between them.

    A similarity router has only the first layer, whose rows are the experts' centroids.
    """

    def __init__(self, d_model: int, num_experts: int, *, kind: RouterKind) -> None:
        super().__init__()
        self.first = nn.Linear(d_model, num_experts, bias=False)
        self.second = nn.Linear(num_experts, num_experts, bias=False) if kind == "mlp" else None

    def forward(self, tokens_TD: Tensor) -> Tensor:
        """Return scores (T, E) for tokens (T, D)."""
        scores_TE = self.first(functional.normalize(tokens_TD, dim=-1))
        return scores_TE if self.second is None else self.second(scores_TE.tanh())


class ExpertMlp(nn.Module):
    """An MLP whose hidden units form `num_experts` equal slices; a token runs the `num_active` that score highest.

    `value`, `gate` and `output` are the paths of its layers inside `mlp`; `packed` says that the value layer holds the
    gate rows first. An oracle has no router: it runs every expert and keeps those that contribute the most, by `score`:
    the sum of an expert's activations (of a ReLU, whose none is negative) or the norm of its output.
    """

    def __init__(
        self,
        mlp: nn.Module,
        *,
        value: str,
        gate: str | None,
        output: str,
        packed: bool,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        num_active: int,
        kind: RouterKind,
        score: ScoreKind = "norm",
    ) -> None:
        super().__init__()
        self.score: ScoreKind = score
        self.mlp, self.value, self.gate, self.output, self.packed = mlp, value, gate, output, packed
        self.d_hidden, self.num_experts, self.num_active = d_hidden, num_experts, num_active
        self.router = None if kind == "oracle" else Router(d_model, num_experts, kind=kind)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return, for each token (..., D), the sum of its experts' outputs plus the output bias."""
        if self.num_active >= self.num_experts:
            return self.mlp(tokens)
        tokens_TD = tokens.reshape(-1, tokens.shape[-1])
        bias_D = self.mlp.get_submodule(self.output).bias
        output_TD = self._run_all(tokens_TD) if self.router is None else self._run_some(tokens_TD)
        if bias_D is not None:
            output_TD = output_TD + cast(Tensor, bias_D)
        return output_TD.reshape(*tokens.shape[:-1], -1)

    def expert(self, number: int, tokens_TD: Tensor) -> Tensor:
        """Return one expert's outputs (T, D), without the output bias."""
        size = self.d_hidden // self.num_experts
        start, stop = number * size, (number + 1) * size
        swapped: dict[str, Tensor] = {}
        for path in (self.value, self.gate):
            if path is not None:
                for name, tensor in self.mlp.get_submodule(path).named_parameters():
                    swapped[f"{path}.{name}"] = self._rows(tensor, start, stop)
        output = self.mlp.get_submodule(self.output)
        swapped[f"{self.output}.weight"] = cast(Tensor, output.weight)[:, start:stop]
        if output.bias is not None:
            swapped[f"{self.output}.bias"] = torch.zeros_like(cast(Tensor, output.bias))
        return functional_call(self.mlp, swapped, (tokens_TD[None],))[0]

    def _rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Return an expert's rows of a tensor; in a packed layer, those of gate and value."""
        if not self.packed:
            return tensor[start:stop]
        return torch.cat([tensor[start:stop], tensor[self.d_hidden + start : self.d_hidden + stop]])

    def _run_some(self, tokens_TD: Tensor) -> Tensor:
        """Run each expert on the tokens that chose it, and sum up."""
        assert self.router is not None
        chosen_TA = self.router(tokens_TD).topk(self.num_active, dim=-1).indices
        order = chosen_TA.flatten().argsort(stable=True)
        counts = chosen_TA.flatten().bincount(minlength=self.num_experts).tolist()
        output_TD: Tensor | None = None
        for number, rows in enumerate((order // self.num_active).split(counts)):
            if len(rows):
                part = self.expert(number, tokens_TD[rows])
                if output_TD is None:
                    output_TD = part.new_zeros(len(tokens_TD), part.shape[-1])
                output_TD.index_add_(0, rows, part)  # a copy for each expert took longer than the experts
        assert output_TD is not None
        return output_TD

    def _run_all(self, tokens_TD: Tensor) -> Tensor:
        """Run all experts, and sum those that contribute the most to each token: the products of the dense MLP."""
        outputs_TED, scores_TE = self.contributions(tokens_TD)
        chosen_TE = torch.zeros_like(scores_TE).scatter(-1, scores_TE.topk(self.num_active, dim=-1).indices, 1.0)
        return (outputs_TED * chosen_TE[:, :, None]).sum(1)

    def contributions(self, tokens_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return every expert's output (T, E, D) and score (T, E); a token's depend on no other token."""
        caught: list[Tensor] = []
        output = self.mlp.get_submodule(self.output)
        weight_DH = cast(Tensor, output.weight)
        rowless = {f"{self.output}.{name}": tensor[:0] for name, tensor in output.named_parameters()}
        handle = output.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        try:  # the output layer without rows: each expert's product with it follows here
            functional_call(self.mlp, rowless, (tokens_TD[None],))
        finally:
            handle.remove()
        hidden_TES = caught[0][0].unflatten(-1, (self.num_experts, -1))
        outputs_TED = torch.einsum("tes,des->ted", hidden_TES, weight_DH.unflatten(-1, (self.num_experts, -1)))
        return outputs_TED, hidden_TES.sum(-1) if self.score == "sum" else outputs_TED.norm(dim=-1)
