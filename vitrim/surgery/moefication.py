"""The edit that splits an MLP into experts: its hidden units reordered, with a router. See `layers.moefication`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitrim.errors import BudgetError, CheckpointError, SiteNotFoundError
from vitrim.layers.moefication import ExpertMlp, RouterKind, ScoreKind
from vitrim.surgery.edits import Edit, replace_
from vitrim.surgery.modules import submodule
from vitrim.types import MlpSite


@dataclass(frozen=True, kw_only=True)
class ToMoefication(Edit):
    """Hidden units are put in `order` and split into `num_experts` equal slices, of which a token runs `num_active`.

    `tensors` are the router's; an oracle has none. `score` says what an oracle goes by: the sum of an expert's
    activations, or the norm of its output.
    """

    KIND: ClassVar[str] = "moefication"
    MAKES: ClassVar[str] = "MLPs split into experts"
    ORDER: ClassVar[int] = 2

    site: MlpSite
    order: tuple[int, ...]
    num_experts: int
    num_active: int
    router: RouterKind = "mlp"
    score: ScoreKind = "norm"

    def shape_only(self) -> ToMoefication:
        """Return an edit with the same experts, without an order of its own or tensors."""
        return replace(self, order=tuple(range(len(self.order))), tensors={})

    def describe(self) -> str:
        """Return how many experts are active, and the kind of router."""
        return f"{self.num_active} of {self.num_experts} experts active a token, router: {self.router}"

    def affected_tensors(self) -> list[str]:
        """Return the names of all tensors of the MLP: each gets a new name."""
        layers = [path for path in (self.site.value, self.site.gate, self.site.output) if path is not None]
        return [f"{path}.{name}" for path in layers for name in ("weight", "bias")]

    def check(self, model: nn.Module) -> None:
        """Check that experts have equal sizes and the MLP is one module that holds its layers alone."""
        site, total = self.site, self.site.d_hidden
        if sorted(self.order) != list(range(total)):
            raise BudgetError(f"{site.path}: the order must have each of its {total} units once.")
        if total % self.num_experts or not 1 <= self.num_active <= self.num_experts:
            raise BudgetError(
                f"{site.path}: {self.num_active} of {self.num_experts} experts; use a number that divides {total} "
                "units, and 1 to all of them active."
            )
        if not all(path.startswith(f"{site.path}.") for path in (site.value, site.output)):
            raise SiteNotFoundError(f"{site.path}: is spread over several modules, so it can't be split into experts.")
        container = submodule(model, site.path)
        known = {name.removeprefix(f"{site.path}.") for name in self.affected_tensors()}
        others = [name for name, _ in (*container.named_parameters(), *container.named_buffers()) if name not in known]
        if site.norm is not None or others:
            raise SiteNotFoundError(
                f"{site.path}: has {site.norm or others[0]} over all hidden units, which no expert can run by itself."
            )

    def reshape_(self, model: nn.Module) -> None:
        """Replace the MLP by an `ExpertMlp` around it."""
        local, mlp = self.site.within(self.site.path), submodule(model, self.site.path)
        weight = next(mlp.parameters())
        new = ExpertMlp(
            mlp,
            value=local.value,
            gate=local.gate,
            output=local.output,
            packed=self.site.kind == "packed_gated",
            d_model=self.site.d_model,
            d_hidden=self.site.d_hidden,
            num_experts=self.num_experts,
            num_active=self.num_active,
            kind=self.router,
            score=self.score,
        )
        if new.router is not None:
            new.router.to(device=weight.device, dtype=weight.dtype).requires_grad_(weight.requires_grad)
        replace_(model, self.site.path, new)

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield a tensor of the MLP under its new name, its units in order; after the output weight, the router."""
        path = self.site.path
        yield f"{path}.mlp.{name.removeprefix(f'{path}.')}", self._ordered(name, tensor)
        if name == f"{self.site.output}.weight":
            for new in self._router_names():
                if new not in self.tensors:
                    raise CheckpointError(f"{new}: the plan does not hold it; load the saved model, or split again.")
                yield new, self.given(new, tensor)

    def _router_names(self) -> list[str]:
        layers = {"mlp": ("first", "second"), "similarity": ("first",), "oracle": ()}[self.router]
        return [f"{self.site.path}.router.{layer}.weight" for layer in layers]

    def _ordered(self, name: str, tensor: Tensor) -> Tensor:
        order = torch.tensor(self.order, device=tensor.device)
        if name == f"{self.site.output}.weight":
            return tensor.index_select(1, order).contiguous()
        if name == f"{self.site.output}.bias":
            return tensor
        groups = self.site.num_groups if name.startswith(f"{self.site.value}.") else 1
        rows = torch.cat([order + group * self.site.d_hidden for group in range(groups)])
        return tensor.index_select(0, rows).contiguous()
