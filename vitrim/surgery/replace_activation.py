"""The edit that replaces an MLP's activation by a ReLU."""

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
    """Replace an MLP's activation by a ReLU. No tensor changes, but the features do, so distil afterwards."""

    KIND: ClassVar[str] = "replace_activation"
    MAKES: ClassVar[str] = "a ReLU in place of its activation"

    site: MlpSite

    def describe(self) -> str:
        """Return the new activation."""
        return "ReLU"

    def affected_tensors(self) -> list[str]:
        """Return the weight that reads the activations, though its values don't change."""
        return [f"{self.site.output}.weight"]

    def check(self, model: nn.Module) -> None:
        """Check that the MLP's activation is a module of its own."""
        find_activation(model, self.site)

    def reshape_(self, model: nn.Module) -> None:
        """Replace the activation by a ReLU."""
        replace_(model, find_activation(model, self.site), nn.ReLU())

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensor unchanged."""
        yield name, tensor


def find_activation(model: nn.Module, site: MlpSite) -> str:
    """Find the module that is an MLP's activation, and return its path.

    It has no children or parameters, maps each number by itself, and is not linear.

    Raises:
        SiteNotFoundError: there is no such module (the activation may be a function), or more than one.
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
    """Whether a module maps each number by itself, and not linearly."""
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
