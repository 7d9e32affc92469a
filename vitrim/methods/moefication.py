"""MoEfication (arXiv 2110.01786): splits an MLP into experts of equal size, a few of which run for each token.

An expert holds units whose input weights point the same way (balanced k-means), or that fire together. The router
learns which experts contribute the most. The paper scores an expert by the sum of its ReLU activations; for other
activations, and for gated MLPs, we take the norm of the expert's output, as D2DMoE (arXiv 2310.04361) does. The number
of parameters stays; the work per token falls. Targets are computed from the tokens as they are, since biases make the
MLPs of ViTs inhomogeneous functions; only the router's input is normalised.

Shapes: N tokens, D model width, H hidden units, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from vitrim.errors import BudgetError
from vitrim.layers.moefication import Router, RouterKind, ScoreKind
from vitrim.methods.registry import BudgetUse, ModelMethod, register
from vitrim.ops.balanced_kmeans import balanced_kmeans, means_of
from vitrim.surgery import ToMoefication
from vitrim.types import MlpSite, MlpWeights, ModelView

UNITS_PER_EXPERT = 32  # the paper's value
VALIDATION_SHARE = 0.1


@register
class Moefication(ModelMethod):
    """MoEfication: splits each MLP into experts, of which a router picks a few for each token."""

    name = "moefication"
    paper = "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts"
    arxiv = "2110.01786"
    summary = "MLPs split into experts, a small router sends each token to a few of them"
    needs = "images"
    repairs = False
    edits = (ToMoefication,)
    takes = "share"

    num_experts: int | None = Field(default=None, ge=1)
    """Number of experts in each MLP; None makes experts of about 32 units."""
    num_active: int | None = Field(default=None, ge=1)
    """Number of experts that run for each token; None uses the budget's share."""
    split: Literal["weights", "activity"] = "weights"
    """Group units into experts by their input weights (k-means), or by which fire together."""
    router: RouterKind = "mlp"
    """How experts are picked: a trained MLP (`mlp`), the experts' centroids (`similarity`), or `oracle`, which runs all
    experts and shows the best possible choice."""
    num_tokens: int = Field(default=20_000, ge=64)
    """How many tokens the router is trained on."""
    epochs: int = Field(default=30, ge=1)
    """Epochs of router training."""
    batch_size: int = Field(default=512, ge=1)
    """Tokens in one step of router training."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate of router training."""

    def goes_by(self) -> BudgetUse:
        """Return which part of the budget the method uses: none if `num_active` is given."""
        return "nothing" if self.num_active is not None else self.takes

    def propose(self, view: ModelView) -> Iterator[ToMoefication]:
        """Yield one edit per MLP; each MLP is observed with the MLPs before it already split."""
        if self.num_active is None and view.keep_ratio >= 1:
            view.note("moefication: the full budget runs every expert, so nothing was split; give num_active to split.")
            return
        for site in view.sites:
            num_experts = self.num_experts or _divisor(site.d_hidden, site.d_hidden / UNITS_PER_EXPERT)
            if site.d_hidden % num_experts:
                raise BudgetError(
                    f"{site.path}: {num_experts} experts can't share {site.d_hidden} units equally; use a divisor."
                )
            active = self.num_active or max(1, round(num_experts * view.widths[site.path] / site.d_hidden))
            seen, weights = _observe(view, site, self.num_tokens), view.weights(site)
            labels = _split(weights, seen, num_experts, self, seed=int(view.generator.initial_seed()))
            order = labels.argsort(stable=True)
            score: ScoreKind = "sum" if bool((seen.hidden_NH >= 0).all()) else "norm"
            scores_NE = expert_scores(weights, seen.hidden_NH, order, num_experts, score)
            router = _router(weights, seen, order, scores_NE, min(active, num_experts), self, view.generator)
            tensors = {} if router is None else router.state_dict()
            yield ToMoefication(
                site=site,
                order=tuple(order.tolist()),
                num_experts=num_experts,
                num_active=min(active, num_experts),
                router=self.router,
                score=score,
                tensors={f"{site.path}.router.{name}": tensor.detach().clone() for name, tensor in tensors.items()},
            )


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A sample of tokens: the MLP's inputs and the activations of its hidden units."""

    inputs_ND: Tensor
    hidden_NH: Tensor


def _observe(view: ModelView, site: MlpSite, num_tokens: int) -> _Seen:
    """Draw tokens from all batches in proportion to their size."""
    found: dict[str, list[Tensor]] = {site.value: [], site.output: []}

    def see(path: str, inputs: Tensor, _: Tensor) -> None:
        found[path].append(inputs.flatten(0, -2).float().cpu())

    view.observe([site.value, site.output], see)
    counts = [len(part) for part in found[site.value]]
    shares = [max(1, min(count, num_tokens * count // sum(counts))) for count in counts]
    rows = [
        torch.randperm(count, generator=view.generator)[:share] for count, share in zip(counts, shares, strict=True)
    ]
    inputs, hidden = (
        torch.cat([part[chosen] for part, chosen in zip(found[path], rows, strict=True)])
        for path in (site.value, site.output)
    )
    return _Seen(inputs_ND=inputs, hidden_NH=hidden)


def _split(weights: MlpWeights, seen: _Seen, num_experts: int, options: Moefication, *, seed: int) -> Tensor:
    """Return the number of each unit's expert, (H,)."""
    if options.split == "weights":
        rows_HD = weights.value_HD if weights.gate_HD is None else weights.gate_HD
        return balanced_kmeans(functional.normalize(rows_HD.float().cpu(), dim=1), num_experts, seed=seed)
    fires_NH = (seen.hidden_NH.abs() > seen.hidden_NH.square().mean().sqrt()).float()
    together_HH = fires_NH.T @ fires_NH  # units that fire with the same others belong together
    return balanced_kmeans(functional.normalize(together_HH, dim=1), num_experts, seed=seed)


def expert_scores(weights: MlpWeights, hidden_NH: Tensor, order: Tensor, num_experts: int, score: ScoreKind) -> Tensor:
    """Return what each expert contributes to each token (N, E): the sum of its activations, or its output's norm."""
    slices = order.split(len(order) // num_experts)
    if score == "sum":
        return torch.stack([hidden_NH[:, units].sum(1) for units in slices], dim=1)
    output_DH = weights.output_DH.float().cpu()
    return torch.stack([(hidden_NH[:, units] @ output_DH[:, units].T).norm(dim=1) for units in slices], dim=1)


def _router(
    weights: MlpWeights,
    seen: _Seen,
    order: Tensor,
    scores_NE: Tensor,
    num_active: int,
    options: Moefication,
    generator: torch.Generator,
) -> Router | None:
    """Return the trained router, or one made of centroids; None for an oracle."""
    if options.router == "oracle":
        return None
    rows_HD, num_experts = (
        (weights.value_HD if weights.gate_HD is None else weights.gate_HD).float().cpu(),
        scores_NE.shape[1],
    )
    labels = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)) // (len(order) // num_experts))
    router = Router(rows_HD.shape[1], num_experts, kind=options.router)
    with torch.no_grad():
        router.first.weight.copy_(means_of(functional.normalize(rows_HD, dim=1), labels, num_experts))
        if router.second is not None:
            router.second.weight.copy_(torch.eye(num_experts))
    if router.second is not None:
        _train_(router, seen.inputs_ND, scores_NE, num_active, options, generator)
    return router


def _train_(
    router: Router,
    inputs_ND: Tensor,
    scores_NE: Tensor,
    num_active: int,
    options: Moefication,
    generator: torch.Generator,
) -> None:
    """Train the router on the scores; keep the state, start included, that captures most of them on held-out tokens."""
    num_held_out = max(1, int(VALIDATION_SHARE * len(inputs_ND)))
    order = torch.randperm(len(inputs_ND), generator=generator)
    held_out, train = order[:num_held_out], order[num_held_out:]
    optimizer = torch.optim.Adam(router.parameters(), lr=options.lr)
    best, state = -1.0, {name: tensor.clone() for name, tensor in router.state_dict().items()}
    for epoch in range(options.epochs + 1):
        if epoch:
            shuffled = train[torch.randperm(len(train), generator=generator)]
            for rows in shuffled.split(options.batch_size):
                targets = scores_NE[rows] / scores_NE[rows].max().clamp(min=1e-12)
                loss = functional.binary_cross_entropy_with_logits(router(inputs_ND[rows]), targets)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            captured = captured_share(router(inputs_ND[held_out]), scores_NE[held_out], num_active)
        if captured > best:
            best, state = captured, {name: tensor.clone() for name, tensor in router.state_dict().items()}
    router.load_state_dict(state)


def captured_share(predicted_NE: Tensor, scores_NE: Tensor, num_active: int) -> float:
    """Return the share of all contributions that lies in the experts chosen by a prediction."""
    chosen = predicted_NE.topk(num_active, dim=-1).indices
    return float(scores_NE.gather(-1, chosen).sum() / scores_NE.sum().clamp(min=1e-12))


def _divisor(total: int, near: float) -> int:
    """Return the divisor nearest to a number; the larger one in a tie."""
    divisors = [number for number in range(1, total + 1) if total % number == 0]
    return min(divisors, key=lambda number: (abs(number - near), -number))
