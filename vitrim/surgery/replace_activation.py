"""Putting a ReLU in the place of an MLP's own activation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitrim.errors import SiteNotFoundError
from vitrim.surgery.edits import Edit, replace_
from vitrim.surgery.modules import submodule
from vitrim.types import MlpSite


@dataclass(frozen=True, kw_only=True)
class ReplaceActivation(Edit):
    """A ReLU where the MLP's activation was. No tensor changes; the features do, so distil afterwards."""

    KIND: ClassVar[str] = "replace_activation"

    site: MlpSite

    def describe(self) -> str:
        """What it is now."""
        return "ReLU"

    def affected_tensors(self) -> list[str]:
        """The weight that reads the activations, though no value of it changes."""
        return [f"{self.site.output}.weight"]

    def check(self, model: nn.Module) -> None:
        """Refuse an MLP whose activation is no module of its own."""
        find_activation(model, self.site)

    def reshape_(self, model: nn.Module) -> None:
        """Put the ReLU there."""
        replace_(model, find_activation(model, self.site), nn.ReLU())

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """As it was."""
        yield name, tensor


def find_activation(model: nn.Module, site: MlpSite) -> str:
    """Path of the module that is an MLP's activation: without parts or parameters, elementwise, and not linear.

    Raises:
        SiteNotFoundError: there is none, or more than one, as where a function is called instead.
    """
    found = [
        f"{site.path}.{name}".strip(".")
        for name, module in submodule(model, site.path).named_modules()
        if not any(module.children()) and next(module.parameters(), None) is None and _is_activation(module)
    ]
    if len(found) != 1:
        raise SiteNotFoundError(f"{site.path}: {len(found)} modules look like its activation; one is needed.")
    return found[0]


def _is_activation(module: nn.Module) -> bool:
    """Whether a module maps numbers to numbers one by one, and bends."""
    numbers = torch.linspace(-2, 2, 41)
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            whole, half = module(numbers), module(numbers[:20])
    except Exception:  # foreign code on an input that it was not made for may raise anything
        return False
    finally:
        module.train(was_training)
    if not isinstance(whole, Tensor) or whole.shape != numbers.shape or not torch.equal(whole[:20], half):
        return False
    bends = whole[2:] - 2 * whole[1:-1] + whole[:-2]
    return bool(bends.abs().max() > 1e-4)
